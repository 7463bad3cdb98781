"""Distillation: runs whose teacher is another run, in one stage or several."""

import itertools
import os
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from ddpm.checks import is_whole
from ddpm.commands.console import say
from ddpm.commands.launch import overrides
from ddpm.commands.load import CONSISTENCY, PROGRESSIVE, STUDENT, open_run_at
from ddpm.config import InvalidInput, conf_dir, plain, read_config

UNFINISHED = ("RUNNING", "INTERRUPTED")
NOT_OF_TEACHER = (  # keys that a student takes from the command line
    "runs", "study", "question", "baseline", "evaluation", "extend", "init", "trust", "compile", "graph", "device",
    "slots", "retry",
)  # fmt: skip
CHOSEN = ("diffusion.loss", "diffusion.clip_x_0", "diffusion.dynamic_threshold")  # its own choice


def stages(config: DictConfig) -> list[int | None]:
    """Return the steps of the students of progressive distillation, one per stage; [None] for other runs.

    Raises: InvalidInput unless each has half the steps of the one before.
    """
    task = plain(config.get("task"))
    if not isinstance(task, dict) or task.get("_target_") != PROGRESSIVE or not isinstance(task.get("steps"), list):
        return [None]
    from ddpm.training import ranks

    steps = task["steps"]
    if len(steps) > 1 and ranks.started():
        raise InvalidInput(
            f"task.steps={steps}: several stages are trained by one process; give one, such as task.steps=4"
        )
    whole = bool(steps) and all(is_whole(n, 1) for n in steps)
    if not whole or any(2 * after != before for before, after in itertools.pairwise(steps)):
        raise InvalidInput(f"task.steps={steps}: each student has half the steps of the one before, such as [8,4,2,1]")
    return list(steps)


def stage(config: DictConfig, steps: int | None, teacher: Path | None) -> DictConfig:
    """Return the configuration of one stage.

    Args:
        steps: of its student; None for a run without stages.
        teacher: the run of the stage before; None for the first, whose teacher is the configured one.
    """
    if steps is None:
        return config
    config = config.copy()
    config.task.steps = steps
    if teacher is not None:
        config.teacher = str(teacher)
    return config


def student_of(config: DictConfig) -> DictConfig:
    """Return the configuration of a student: its teacher's, overridden by task, sampler and the typed values.

    Raises: InvalidInput for a run that cannot be a teacher, and for settings that a student cannot choose.
    """
    run, checkpoint = open_run_at(str(config.teacher), "teacher")
    if run.status().get("state") in UNFINISHED:
        say(f"warning: teacher={config.teacher} is not finished: once it is, the same command trains anew")
    base = read_config(run.path / "config.yaml")
    if any(not isinstance(base.get(group), DictConfig) for group in ("model", "schedule", "diffusion")):
        raise InvalidInput(f"teacher={config.teacher}: it trained no network that a sampler draws from")
    if config.get("init") is not None:
        raise InvalidInput(f"init={config.init}: a student begins with the weights of its teacher; leave init out")
    words = _typed()
    task = _task_of(config, base) | {"drop": base.model.get("drop", 0.0)}
    composed = config.copy()
    composed.task = task
    sampler = OmegaConf.to_container(composed.sampler, resolve=True)
    if task["_target_"] == PROGRESSIVE and sampler != {"_target_": STUDENT, "steps": task["steps"]}:
        raise InvalidInput(
            f"sampler: a student of {task['steps']} steps is sampled with exactly these; leave sampler out"
        )
    own_weight = base.diffusion.get("target") == "v" or base.diffusion.get("preconditioning") is not None
    loss = "simple" if own_weight else "snr_plus_one"  # the same weighting as simple of v
    merged = OmegaConf.merge(
        {key: base[key] for key in base if key not in ("task", "sampler", *NOT_OF_TEACHER)},
        {
            "trainer": {"steps": None, "epochs": None, "seconds": None},
            "diffusion": {"loss": loss, "loss_options": None},
        },
        {key: config.get(key) for key in NOT_OF_TEACHER},
        OmegaConf.from_dotlist(words),
        {"task": task, "sampler": sampler, "teacher": f"{os.path.abspath(run.path)}@{checkpoint.name}"},
    )
    assert isinstance(merged, DictConfig)  # as its first argument is
    return merged


def _task_of(config: DictConfig, teacher: DictConfig) -> dict[str, Any]:
    """Return the task of a student; raise InvalidInput if the teacher was not trained at the times that it needs."""
    task, before = plain(config.task), plain(teacher.task) if teacher.get("task") is not None else {}
    own, of_teacher = task["_target_"], before.get("_target_")
    if of_teacher == CONSISTENCY or (of_teacher == PROGRESSIVE and own != PROGRESSIVE):
        kind = str(of_teacher).rpartition(".")[2]
        raise InvalidInput(
            f"teacher={config.teacher}: a run of {kind} was trained on few times; take the run that it learned from"
        )
    if own == PROGRESSIVE:
        steps = task["steps"][0] if isinstance(task.get("steps"), list) and task["steps"] else task.get("steps")
        if of_teacher == PROGRESSIVE and isinstance(steps, int) and 2 * steps != before.get("steps"):
            raise InvalidInput(
                f"task.steps={steps}: teacher={config.teacher} was distilled to {before.get('steps')} steps, and its "
                "student has half of them"
            )
        task["steps"] = steps
    return dict(task)


def _typed() -> list[str]:
    """Return the typed overrides of the teacher's values, as KEY=VALUE.

    Raises: InvalidInput for keys that a student takes from its teacher, and if there is no budget.
    """
    groups = {p.name for p in conf_dir().iterdir() if p.is_dir()} - {"task", "sampler"}
    words = []
    for word in overrides():
        key = word.partition("=")[0]
        theirs = key in groups or key.startswith(("+", "~", "model.", "schedule.")) or key == "task.drop"
        if theirs or (key.startswith("diffusion.") and not key.startswith(CHOSEN)):
            raise InvalidInput(
                f"{word}: a student has the configuration of its teacher; only values of task, sampler, trainer, "
                f"optimizer, data, {', '.join(CHOSEN)} may be changed"
            )
        if key.partition(".")[0] in ("trainer", "optimizer", "data", "diffusion", "augment", "seed", "recognition"):
            words.append(word)
    if not any(word.startswith(("trainer.steps=", "trainer.epochs=", "trainer.seconds=")) for word in words):
        raise InvalidInput("a student needs a budget: add trainer.steps=N, trainer.epochs=N or trainer.seconds=N")
    return words
