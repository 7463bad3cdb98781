"""Students: runs that learn from another run, alone or stage by stage."""

import itertools
import re
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from ddpm.commands.launch import overrides
from ddpm.config import InvalidInput, conf_dir, plain, read_config

PROGRESSIVE = "ddpm.training.tasks.progressive.Progressive"
OWN = ("task", "sampler")  # groups that a student does not have from its teacher
CHOSEN = (
    "diffusion.loss",
    "diffusion.clip_x_0",
    "diffusion.dynamic_threshold",
)  # of the mathematics, what it may choose


def stages(config: DictConfig) -> list[int | None]:
    """The steps of the students that a configuration asks for, one after the other; [None] for a run by itself.

    Raises: InvalidInput where one has not half the steps of the one before.
    """
    task = plain(config.get("task"))
    if not isinstance(task, dict) or task.get("_target_") != PROGRESSIVE or not isinstance(task.get("steps"), list):
        return [None]
    steps = task["steps"]
    whole = bool(steps) and all(isinstance(n, int) and not isinstance(n, bool) and n > 0 for n in steps)
    if not whole or any(2 * after != before for before, after in itertools.pairwise(steps)):
        raise InvalidInput(f"task.steps={steps}: each student has half the steps of the one before, such as [8,4,2,1]")
    return list(steps)


def stage(config: DictConfig, steps: int | None, teacher: Path | None) -> DictConfig:
    """The configuration of one of several stages.

    Args:
        steps: of its student; None for a run by itself.
        teacher: the run of the stage before; None for the first, whose teacher is the one that was asked for.
    """
    if steps is None:
        return config
    config = config.copy()
    config.task.steps = steps
    if teacher is not None:
        config.teacher = str(teacher)
    return config


def student_of(config: DictConfig, place: Any) -> tuple[DictConfig, Path]:
    """The configuration of a student: its teacher's, with task, sampler and the values that were typed over it.

    Args:
        config: with `teacher`, RUN, RUN@STEP or RUN@best.
        place: (configuration of the teacher, config, folder of the teacher) -> where the student goes.
    Returns: the configuration, and the checkpoint of the teacher.
    Raises: InvalidInput for a run that has nothing to teach, or what a student does not choose.
    """
    from ddpm.commands.load import opened

    named = str(config.teacher)
    path, _, step = named.rpartition("@") if re.fullmatch(r".+@(\d+|best|last)", named) else (named, "", "last")
    run, checkpoint = opened(path, int(step) if step.isdecimal() else step, "teacher")
    base = read_config(run.path / "config.yaml")
    if any(not isinstance(base.get(group), DictConfig) for group in ("model", "schedule", "diffusion")):
        raise InvalidInput(f"teacher={named}: it trained no network that a sampler draws from")
    if config.get("init") is not None:
        raise InvalidInput(f"init={config.init}: a student begins with the weights of its teacher; leave init out")
    words = _typed()
    own = plain(config.task)
    before = plain(base.task) if base.get("task") is not None else {}
    if own.get("_target_") == PROGRESSIVE:
        steps = own["steps"][0] if isinstance(own.get("steps"), list) and own["steps"] else own.get("steps")
        if before.get("_target_") == PROGRESSIVE and isinstance(steps, int) and 2 * steps != before.get("steps"):
            raise InvalidInput(
                f"task.steps={steps}: the teacher {run.path} was distilled to {before.get('steps')} steps, and its "
                "student has half of them"
            )
        own["steps"] = steps
    own["drop"] = base.model.get("drop", 0.0)
    own_weight = base.diffusion.get("target") == "v" or base.diffusion.get("preconditioning") is not None
    loss = "simple" if own_weight else "snr_plus_one"  # which is what simple is of v
    merged = OmegaConf.merge(
        {key: base[key] for key in base if key not in (*OWN, "extend", "init", "evaluation")},
        {"trainer": {"steps": None, "epochs": None, "seconds": None}, "init": None, "extend": None},
        {"diffusion": {"loss": loss, "loss_options": None}, "evaluation": plain(config.evaluation)},
        place(base, config, run.path),
        OmegaConf.from_dotlist(words),
        {"task": own, "sampler": _sampler_of(config, own), "teacher": f"{run.path}@{checkpoint.name}"},
        {key: config.get(key) for key in ("trust", "compile", "device", "slots", "retry")},
    )
    assert isinstance(merged, DictConfig)  # as the first of them is
    return merged, checkpoint


def _typed() -> list[str]:
    """The values that were typed over those of the teacher, as KEY=VALUE.

    Raises: InvalidInput for what a student has from its teacher, and where no budget is among them.
    """
    groups = {p.name for p in conf_dir().iterdir() if p.is_dir()} - set(OWN)
    words = []
    for word in overrides():
        key = word.partition("=")[0]
        if (
            key in groups
            or key.startswith(("+", "~", "model.", "schedule."))
            or (key.startswith("diffusion.") and not key.startswith(CHOSEN))
        ):
            raise InvalidInput(
                f"{word}: a student has the configuration of its teacher; only values of task, sampler, trainer, "
                f"optimizer, data, {', '.join(CHOSEN)} may be changed"
            )
        if key.partition(".")[0] not in OWN and key != "teacher":
            words.append(word)
    if not any(word.startswith(("trainer.steps=", "trainer.epochs=", "trainer.seconds=")) for word in words):
        raise InvalidInput("a student needs a budget: add trainer.steps=N, trainer.epochs=N or trainer.seconds=N")
    return words


def _sampler_of(config: DictConfig, task: dict[str, Any]) -> Any:
    """The sampler of a student, whose steps are those of its task where they are not given."""
    composed = config.copy()
    composed.task = task
    return OmegaConf.to_container(composed.sampler, resolve=True)
