"""`ddpm-study status`, `retry` and `report`: progress of a sweep, new attempts of failed runs, and results."""

import functools
import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from ddpm.commands.console import say, table
from ddpm.commands.study.plan import science_of
from ddpm.commands.train import training
from ddpm.config import InvalidInput, build, build_data, resolved
from ddpm.runs.safe_yaml import CADENCE
from ddpm.study.formatting import counted

OUTLINE = 4000  # data points drawn behind the samples of a run
RETRIED_WITH = ("device", "compile", "graph", "evaluation", "data.root", "trust")  # keys that change no result


# ------------------------------------------------------------------------------------------------- status and retry


def status(words: list[str]) -> None:
    """Print the progress of a study's runs.

    Args:
        words: the study's folder.
    Raises: InvalidInput if there are no runs in it.
    """
    folder, others = _folder(words)
    _must_be_known(others, ())
    arms, unread = _read(folder)
    rows = [["arm", "seeds", "state"]]
    for arm in arms:
        states = [run.state for run in arm.runs]
        line = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
        rows.append([arm.label, str(len(arm.runs)), line])
    say(table(rows))
    for arm in arms:
        for run in arm.runs:
            if not run.done:
                where = f"{run.status.get('host')}, process {run.status.get('pid')}"
                where += f", job {job}" if (job := run.status.get("cluster_job")) else ""
                reason = run.status.get("reason") or f"step {run.status.get('step') or 0:,}, {where}"
                say(f"{run.state} {run.path}: {' '.join(str(reason).split())}")
            for line in run.unmeasured:
                say(f"not measured {run.path}: {line}")
    for line in unread:
        say(f"cannot be read: {line}")
    states = [run.state for arm in arms for run in arm.runs]
    unmeasured = sum(bool(run.unmeasured) for arm in arms for run in arm.runs)
    counts = [f"{states.count(state)} {state}" for state in sorted(set(states))]
    counts += [f"{unmeasured} of them lack requested measurements"] if unmeasured else []
    say(f"{counted(len(states), 'run')}: {', '.join(counts)}")


def retry(words: list[str]) -> int:
    """Retry the failed runs of a study, resume the interrupted ones, and carry out missing evaluations.

    Args:
        words: the study's folder, and values of keys that change no result, such as device=cpu.
    Returns: the exit code: 1 if a run failed again, or is locked by another process.
    Raises: InvalidInput.
    """
    folder, others = _folder(words)
    for word in others:
        key, equals, _ = word.partition("=")
        if not equals or key not in (*RETRIED_WITH, *(f"trainer.{name}" for name in CADENCE)):
            allowed = ", ".join(f"{name}=" for name in RETRIED_WITH)
            raise InvalidInput(f"{word}: a run is retried unchanged; allowed: {allowed} and the trainer's cadence")
    arms, _ = _read(folder)
    open_runs = [run for arm in arms for run in arm.runs if run.state in ("FAILED", "INTERRUPTED") or run.unmeasured]
    if not open_runs:
        say(f"nothing in {folder} failed, was interrupted, or is not measured")
        return 0
    failed = []
    for run in open_runs:
        say(f"{'not measured' if run.unmeasured else run.state} before: {run.path}")
        try:
            training.train(_again(run, others))
        except (InvalidInput, training.RunFailed) as error:
            say(f"FAILED {run.path}: {error}")
            failed.append(run.path)
    if failed:
        say(f"{len(failed)} of {len(open_runs)} runs are not done: " + ", ".join(path.name for path in failed))
    return 1 if failed else 0


def _again(run: Any, words: list[str]) -> DictConfig:
    """Return the configuration of a run, to be trained in the same directory."""
    if not run.settings:
        raise InvalidInput(f"{run.path} has no config.yaml: repeat the command that started it, with retry=true")
    if run.settings.get("extend") is not None:
        raise InvalidInput(f"{run.path} extends another run: repeat the command that started it, with retry=true")
    config = OmegaConf.create(run.settings | {"trust": []})  # a stored configuration may come from anybody
    OmegaConf.set_struct(config, True)
    try:
        merged = OmegaConf.merge(config, OmegaConf.from_dotlist(words))
    except Exception as error:  # OmegaConf's, of many classes
        raise InvalidInput(f"{' '.join(words)}: {str(error).splitlines()[0]}") from error
    assert isinstance(merged, DictConfig)  # as its first argument is
    OmegaConf.set_struct(merged, False)
    runs = run.path.parent
    merged.runs, merged.study = str(runs.parent), runs.name
    if science_of(resolved(merged)) != science_of(run.settings):
        raise InvalidInput(f"{' '.join(words)} would make another run of it")
    return merged


# -------------------------------------------------------------------------------------------------------------- report


def report(words: list[str]) -> None:
    """Write the report of a study: report.html, report.md and report.png.

    Args:
        words: the study's folder; baseline=ARM or LEVEL of a factor, measure=NAME, out=FOLDER.
    Raises: InvalidInput.
    """
    from ddpm.runs.files import replacing
    from ddpm.study import figures, formatting, page
    from ddpm.study.report import findings

    folder, others = _folder(words)
    options = _must_be_known(others, ("baseline", "measure", "out"))
    arms, unread = _read(folder)
    out = Path(options.get("out", folder))
    if not out.is_dir():
        raise InvalidInput(f"out={out} is no folder")
    try:
        choices = (options.get("baseline"), options.get("measure"))
        result = findings(folder, arms, unread, _network, _schedule, *choices, _outline)
    except ValueError as error:
        raise InvalidInput(str(error)) from error
    with replacing(out / "report.html") as temporary:
        temporary.write_text(page.page(result))
    with replacing(out / "report.png") as temporary:
        figures.summary(temporary, result)
    if result.trade_offs:
        with replacing(out / "trade_offs.png") as temporary:
            figures.trade_offs(result.trade_offs, figures.styles(result.trade_offs[0].runs)).savefig(
                temporary, format="png"
            )
    with replacing(out / "report.md") as temporary:
        panels = "trade_offs.png" if result.trade_offs else None
        temporary.write_text(formatting.markdown(result, "report.png", panels))
    say("\n".join(result.verdict))
    for warning in result.warnings:
        say(f"warning: {warning}")
    say(
        f"wrote {out / 'report.html'}, report.md and report.png: {len(result.arms)} arms, "
        f"{len(result.failures)} not done"
    )


@functools.lru_cache(maxsize=4096)
def _network_of(model: str, shape: tuple[int, ...], of_noise: bool) -> tuple[int, float | None]:
    import torch

    from ddpm.training import cost
    from ddpm.training.task import shape_of

    with torch.device("meta"):
        network = build(json.loads(model), "model")
    of_sample = shape_of(network) or shape  # latents have another shape than the data
    gflop = cost.gflop(network, of_sample, backward=False) if of_noise else None
    return sum(p.numel() for p in network.parameters()), gflop


def _network(settings: dict[str, Any]) -> tuple[int, float | None] | None:
    """Return parameters and GFLOP of a configured network; GFLOP only if it is called with x_t and t."""
    try:
        size = settings["data"].get("image_size")
        height, width = (size, size) if isinstance(size, int) else size or (0, 0)
        shape = (2,) if size is None else (settings["data"]["channels"], height, width)
        return _network_of(json.dumps(settings["model"]), shape, "schedule" in settings)
    except (InvalidInput, ValueError, KeyError, TypeError):
        return None


def _schedule(settings: dict[str, Any]) -> tuple[list[float], list[float]] | None:
    """Return t / T and sqrt(alpha_bar) of a configured schedule, or None."""
    try:
        schedule = build(settings["schedule"], "schedule")
    except (InvalidInput, KeyError):
        return None
    chosen = range(0, schedule.T + 1, max(1, schedule.T // 100))
    return [t / schedule.T for t in chosen], schedule.alpha_bar[list(chosen)].sqrt().tolist()


def _outline(settings: dict[str, Any]) -> Any:
    """Return training points (n, 2) of a configuration's data; None if they are not points in the plane.

    Also None, with a message, if the data cannot be built any more: samples are then drawn without them.
    """
    from ddpm.data.dataset import spread

    of_data = settings.get("data")
    if not isinstance(of_data, dict) or of_data.get("image_size") is not None:  # images, which are slow to read
        return None
    try:
        data = build_data(of_data, [])
    except InvalidInput as error:
        say(f"the points of the data are not shown behind the samples: {error}")
        return None
    return data.batch(data.train[spread(len(data.train), OUTLINE)]).x.cpu() if data.shape == (2,) else None


# ---------------------------------------------------------------------------------------------------- what is typed


def _folder(words: list[str]) -> tuple[Path, list[str]]:
    """Return the folder that was typed first, and the other words."""
    if not words or "=" in words[0]:
        raise InvalidInput("the folder of a study is missing, such as runs/default")
    return Path(words[0]), words[1:]


def _must_be_known(words: list[str], allowed: Sequence[str]) -> dict[str, str]:
    """Return words as key -> value; raise InvalidInput for keys that are not allowed."""
    result = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals or key not in allowed:
            known = ", ".join(f"{name}=" for name in allowed)
            raise InvalidInput(
                f"{shlex.quote(word)} is not known here; allowed: " + (known or "nothing but the folder")
            )
        result[key] = value
    return result


def _read(folder: Path) -> tuple[list[Any], list[str]]:
    """Return the arms of a study, and lines on runs that cannot be read."""
    from ddpm.study.reading import arms_of, read

    try:
        runs, unread = read(folder, science_of)
    except ValueError as error:
        raise InvalidInput(str(error)) from error
    return arms_of(runs), unread
