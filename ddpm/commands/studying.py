"""`ddpm-study`: what a sweep would do, how far it is, what failed once more, and what it means."""

import functools
import json
import math
import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from omegaconf import DictConfig, OmegaConf

from ddpm.commands import training
from ddpm.commands.asked import trusted
from ddpm.commands.planning import built, status_of
from ddpm.commands.told import say
from ddpm.config import (
    CADENCE,
    InvalidInput,
    build,
    build_data,
    compose,
    jobs,
    resolve_device,
    resolved,
    science,
    with_known_keys,
)

RETRIED_WITH = ("device", "compile", "evaluation", "data.root", "trust")  # of what changes no result
TIMED_GFLOP = 100  # of the steps that are timed, at most: a second or two of a laptop's CPU


# --------------------------------------------------------------------------------------------------------------- plan


class Planned(NamedTuple):
    """A run of a sweep, as it would be."""

    words: list[str]
    config: DictConfig
    settings: dict[str, Any]
    status: dict[str, Any]  # of its run directory; {} before there is one, or where the data are not at hand
    name: str | None  # of its run directory, likewise


class Needs(NamedTuple):
    """What an arm takes, or why it cannot be trained."""

    parameters: int | None = None
    gflop: float | None = None  # of training on an image: forward and backward
    images: int | None = None  # that a run is trained on, counted each time
    memory: int | None = None  # bytes of a step
    refused: str | None = None


def plan(words: list[str]) -> None:
    """Compose every job of a sweep, begin none, and say in a table what they would be.

    Args:
        words: those of `ddpm-train -m`.
    Raises: InvalidInput for what does not compose.
    """
    from ddpm.study.reading import Recorded, arms_of

    composed, merged = _composed(words)
    data = _data_of(composed[0].config)
    runs = [_planned(job, config, data) for job, config in composed]
    records = [
        Recorded(Path(str(number)), run.settings, _as_status(run, number), {}, _science(run.settings | {"seed": None}))
        for number, run in enumerate(runs)
    ]
    arms = arms_of(records)
    by_record = dict(zip(map(id, records), runs, strict=True))
    of_arm = [[by_record[id(record)] for record in arm.runs] for arm in arms]
    needs = [_needs(found[0], data) for found in of_arm]
    rate = _rate(of_arm, needs, data)
    total, reasons = 0.0, dict[str, str]()
    rows = [["arm", "runs", "parameters", "GFLOP/image", "memory", "a run", "state"]]
    for arm, found, need in zip(arms, of_arm, needs, strict=True):
        a_run = None if need.refused else _seconds(found, need, rate)
        if need.refused:
            reasons.setdefault(need.refused, f"refused ({len(reasons) + 1})")
        total += (a_run or 0.0) * sum(run.status.get("state") != "DONE" for run in found)
        rows.append(_row(arm.label, found, need, a_run, reasons))
    say(_table(rows))
    for reason, name in reasons.items():
        say(f"{name}: {reason}")
    refused = sum(len(found) for found, need in zip(of_arm, needs, strict=True) if need.refused)
    say(_summary(runs, arms, merged, refused, total, rate, data is not None, composed[0].config))


def _as_status(run: Planned, number: int) -> dict[str, Any]:
    """What status.json would say of a run of the sweep, in the order of its jobs."""
    return {"overrides": run.words, "state": run.status.get("state", "new"), "started": f"{number:09}"}


class _Job(NamedTuple):
    words: list[str]
    config: DictConfig


def _composed(words: list[str]) -> tuple[list[_Job], int]:
    """The jobs of a sweep, each science once, and how many more said the same."""
    try:
        found = jobs("train", words, multirun=True) or []
    except InvalidInput as error:
        raise InvalidInput(with_known_keys("train", str(error), words)) from error
    kept: dict[str, _Job] = {}
    by_words: dict[tuple[str, ...], DictConfig] = {}
    for job in found:
        job = [word for word in job if not word.startswith("hydra")]
        seeds = [word for word in job if word.startswith("seed=")]
        others = tuple(word for word in job if word not in seeds)
        if others not in by_words:
            try:
                by_words[others] = compose("train", list(job))
            except InvalidInput as error:
                raise InvalidInput(with_known_keys("train", str(error), list(job))) from error
        config = by_words[others].copy()
        if seeds:
            OmegaConf.update(config, "seed", OmegaConf.from_dotlist(seeds[-1:]).seed)
        settings = resolved(config)
        key = json.dumps(_science(settings), sort_keys=True, default=str)
        kept.setdefault(key, _Job(job, config))
    return list(kept.values()), len(found) - len(kept)


def _science(settings: dict[str, Any]) -> dict[str, Any]:
    """What a run depends on, by its settings alone: of the data not where they are."""
    parents = {key: str(settings[key]) for key in ("init", "extend") if settings.get(key) is not None}
    data = {key: value for key, value in settings["data"].items() if key not in ("root", "download")}
    return science(settings, {}, parents, 0) | {"data": data}


def _data_of(config: DictConfig) -> Any | None:
    """The data of the sweep, or None if they are not at hand; nothing is downloaded."""
    settings = resolved(config)["data"]
    try:
        return build_data(settings | ({"download": False} if "download" in settings else {}), trusted(config))
    except (InvalidInput, TypeError):
        return None


def _planned(words: list[str], config: DictConfig, data: Any | None) -> Planned:
    """A job with its run directory, where the data tell its name."""
    import ddpm
    from ddpm.runs import Run, science_hash

    settings = resolved(config)
    if data is None or config.init is not None or config.extend is not None:
        return Planned(words, config, settings, {}, None)
    name = science_hash(science(settings, data.identity(), {}, ddpm.NUMERICS))
    run = Run(Path(str(config.runs)) / str(config.study) / name)
    return Planned(words, config, settings, status_of(run), name)


def _stand_in(settings: dict[str, Any]) -> Any:
    """Stands for data that are not at hand: black images of the shape that is configured, of one class."""
    import torch

    from ddpm.data import ImageData

    size = settings["image_size"]
    height, width = (size, size) if isinstance(size, int) else size
    try:
        images = torch.zeros(64, settings["channels"], height, width, dtype=torch.uint8)
        return ImageData("not at hand", "none", images, torch.zeros(64, dtype=torch.long))
    except (ValueError, RuntimeError, TypeError) as error:
        raise InvalidInput(f"data: {str(error).splitlines()[0]}") from error


def _needs(run: Planned, data: Any | None) -> Needs:
    """Parameters, floating point operations and memory of an arm, counted on the meta device; or why it is refused."""
    from ddpm import preflight

    config = run.config
    try:
        at_hand = data if data is not None else _stand_in(run.settings["data"])
        parts = built(config, trusted(config), at_hand, resolve_device(config.device), on="meta")
        parameters = sum(p.numel() for p in parts.model.parameters())
        steps = parts.trainer.last_step(len(data.train)) if data is not None else parts.trainer.steps
        images = None if steps is None else steps * parts.trainer.batch_size
        loss = functools.partial(_loss_on_meta, parts, at_hand.shape)
        micro = parts.trainer.batch_size // parts.trainer.accumulate
        activations = preflight.activations(loss, parts.model.parameters(), micro)
        batch = parts.trainer.batch_size, parts.trainer.accumulate
        needed = preflight.memory(parts.model, parts.moments, at_hand.images, *batch, activations)
        gflop = _gflop(parts.model, at_hand.shape, backward=True)
        return Needs(parameters, gflop, images, sum(needed), _too_large(needed, resolve_device(config.device)))
    except InvalidInput as error:
        return Needs(refused=str(error))


def _too_large(needed: Any, device: Any) -> str | None:
    from ddpm import preflight

    there = preflight.available(device)
    if there is None or sum(needed) <= there:
        return None
    return f"a step needs {preflight.in_words(sum(needed))}, but {preflight.in_words(there)} are available on {device}"


def _loss_on_meta(parts: Any, shape: tuple[int, ...], n: int) -> Any:
    """The loss of n images that are nowhere."""
    import torch

    from ddpm.trainer import classes_for

    x_0, t = torch.empty(n, *shape, device="meta"), torch.ones(n, dtype=torch.long, device="meta")
    y = classes_for(parts.model, torch.zeros(n, dtype=torch.long, device="meta"))
    return parts.diffusion.loss(parts.model.train(), x_0, y, t=t, eps=torch.empty_like(x_0)).mean()


def _gflop(model: Any, shape: tuple[int, ...], backward: bool) -> float:
    """GFLOP of a network on the meta device for one image."""
    import torch

    from ddpm.cost import flops
    from ddpm.trainer import classes_for

    x_t, t = torch.empty(1, *shape, device="meta"), torch.ones(1, dtype=torch.long, device="meta")
    y = classes_for(model, torch.zeros(1, dtype=torch.long, device="meta"))
    return flops(model, x_t, t, *([] if y is None else [y]), backward=backward) / 1e9


def _rate(of_arm: Sequence[list[Planned]], needs: Sequence[Needs], data: Any | None) -> float | None:
    """GFLOP of training in a second, by timed steps of the first arm that can be trained; None if all is done."""
    import torch

    from ddpm import cost
    from ddpm.sampling import Source

    legal = [(found[0], need) for found, need in zip(of_arm, needs, strict=True) if need.gflop and not need.refused]
    if not legal or all(run.status.get("state") == "DONE" for found in of_arm for run in found):
        return None
    run, need = legal[0]
    assert need.gflop is not None
    device, trust = resolve_device(run.config.device), trusted(run.config)
    data = _stand_in(run.settings["data"]) if data is None else data
    parts = built(run.config, trust, data, device)
    trainer = parts.trainer
    trainer.batch_size = max(1, min(trainer.batch_size // trainer.accumulate, int(TIMED_GFLOP / need.gflop / 4)))
    trainer.accumulate = 1
    model = parts.model.to(device, memory_format=torch.channels_last)
    source = Source(parts.diffusion, model, parts.sampler, data.shape, 0, device, "fp32")
    make = functools.partial(_optimizer, run.config, trust)
    training_step = cost.Training(source, data.to(device), trainer, make, parts.augment)
    training_step.step()
    return need.gflop * trainer.batch_size / cost.seconds(training_step.step, device, repeat=3)


def _optimizer(config: DictConfig, trust: list[str], params: Iterable[Any]) -> Any:
    return build(config.optimizer, "optimizer", trust, params=list(params))


def _seconds(found: list[Planned], need: Needs, rate: float | None) -> float | None:
    """Of a run: of those of the arm that are done, else by floating point operations, or a budget in time."""
    done = [run.status["seconds"] for run in found if run.status.get("state") == "DONE" and run.status.get("seconds")]
    if done:
        return sum(done) / len(done)
    budget = found[0].config.trainer.seconds
    if rate is None or need.gflop is None or need.images is None:
        return budget
    return min(need.images * need.gflop / rate, budget or math.inf)


def _row(label: str, found: list[Planned], need: Needs, a_run: float | None, reasons: dict[str, str]) -> list[str]:
    from ddpm import preflight
    from ddpm.study.words import MISSING, amount, duration, number

    states = [run.status.get("state", "new") for run in found]
    told = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
    return [
        label,
        str(len(found)),
        amount(need.parameters),
        MISSING if need.gflop is None else number(need.gflop),
        MISSING if need.memory is None else preflight.in_words(need.memory),
        duration(a_run),
        reasons[need.refused] if need.refused else told,
    ]


def _summary(
    runs: Sequence[Planned],
    arms: Sequence[Any],
    merged: int,
    refused: int,
    total: float,
    rate: float | None,
    at_hand: bool,
    config: DictConfig,
) -> str:
    """What the table adds up to."""
    from ddpm.study.words import duration

    done = sum(run.status.get("state") == "DONE" for run in runs)
    lines = [f"{len(runs)} runs of {len(arms)} arms in {Path(str(config.runs)) / str(config.study)}"]
    if merged:
        lines.append(f"{merged} more jobs say the same as others, and are one run with them")
    if done:
        lines.append(f"{done} are done already")
    if refused:
        lines.append(f"{refused} are refused: they would be FAILED with that reason, and the others run")
    if not at_hand:
        lines.append("the data are not at hand: no run was looked for, classes and epochs were not counted")
    if rate is not None and total:
        lines.append(
            f"about {duration(total)} for what is missing, one after the other, on {resolve_device(config.device)} "
            f"({rate:,.0f} GFLOP/s in three steps of the first arm; small networks are less exact)"
        )
    return "\n".join(lines)


def _table(rows: Sequence[Sequence[str]]) -> str:
    """Columns side by side; numbers to the right, the last one as it is."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]) - 1)]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *(row[i].rjust(widths[i]) for i in range(1, len(widths))), row[-1]])
        for row in rows
    )


# ------------------------------------------------------------------------------------------------- status and retry


def status(words: list[str]) -> None:
    """Say how far the runs of a study are.

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
        told = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
        rows.append([arm.label, str(len(arm.runs)), told])
    say(_table(rows))
    for arm in arms:
        for run in arm.runs:
            if not run.done:
                where = f"{run.status.get('host')}, process {run.status.get('pid')}"
                reason = run.status.get("reason") or f"step {run.status.get('step') or 0:,}, {where}"
                say(f"{run.state} {run.path}: {' '.join(str(reason).split())}")
    for line in unread:
        say(f"cannot be read: {line}")
    states = [run.state for arm in arms for run in arm.runs]
    say(f"{len(states)} runs: " + ", ".join(f"{states.count(state)} {state}" for state in sorted(set(states))))


def retry(words: list[str]) -> int:
    """Try the runs of a study that failed, and go on with those that were interrupted.

    Args:
        words: the study's folder, and values of keys that change no result, such as device=cpu.
    Returns: the exit code: 1 if a run failed again, or is held by another process.
    Raises: InvalidInput.
    """
    folder, others = _folder(words)
    for word in others:
        key, equals, _ = word.partition("=")
        if not equals or key not in (*RETRIED_WITH, *(f"trainer.{name}" for name in CADENCE)):
            allowed = ", ".join(f"{name}=" for name in RETRIED_WITH)
            raise InvalidInput(f"{word}: a run is tried again as it is; allowed: {allowed} and the trainer's cadence")
    arms, _ = _read(folder)
    open_runs = [run for arm in arms for run in arm.runs if run.state in ("FAILED", "INTERRUPTED")]
    if not open_runs:
        say(f"nothing in {folder} failed or was interrupted")
        return 0
    failed = []
    for run in open_runs:
        say(f"{run.state} before: {run.path}")
        try:
            training.train(_again(run, others))
        except (InvalidInput, training.RunFailed) as error:
            say(f"FAILED {run.path}: {error}")
            failed.append(run.path)
    if failed:
        say(f"{len(failed)} of {len(open_runs)} runs are not done: " + ", ".join(path.name for path in failed))
    return 1 if failed else 0


def _again(run: Any, words: list[str]) -> DictConfig:
    """The configuration of a run, to be trained in the same directory."""
    if not run.settings:
        raise InvalidInput(f"{run.path} has no config.yaml: repeat the command that began it, with retry=true")
    config = OmegaConf.create(run.settings | {"trust": []})  # what is stored may be anybody's
    OmegaConf.set_struct(config, True)
    try:
        merged = OmegaConf.merge(config, OmegaConf.from_dotlist(words))
    except Exception as error:  # OmegaConf's, of many classes
        raise InvalidInput(f"{' '.join(words)}: {str(error).splitlines()[0]}") from error
    assert isinstance(merged, DictConfig)  # as the first of them is
    OmegaConf.set_struct(merged, False)
    runs = run.path.parent
    merged.runs, merged.study = str(runs.parent), runs.name
    if _science(resolved(merged)) != _science(run.settings):
        raise InvalidInput(f"{' '.join(words)} would make another run of it")
    return merged


# -------------------------------------------------------------------------------------------------------------- report


def report(words: list[str]) -> None:
    """Write what a study means: report.html, report.md and report.png.

    Args:
        words: the study's folder; baseline=ARM, measure=NAME, out=FOLDER.
    Raises: InvalidInput.
    """
    from ddpm.files import replacing
    from ddpm.study import figures, page
    from ddpm.study import words as in_words
    from ddpm.study.report import findings

    folder, others = _folder(words)
    options = _must_be_known(others, ("baseline", "measure", "out"))
    arms, unread = _read(folder)
    out = Path(options.get("out", folder))
    if not out.is_dir():
        raise InvalidInput(f"out={out} is no folder")
    try:
        found = findings(folder, arms, unread, _network, _schedule, options.get("baseline"), options.get("measure"))
    except ValueError as error:
        raise InvalidInput(str(error)) from error
    with replacing(out / "report.html") as temporary:
        temporary.write_text(page.page(found))
    figures.summary(out / "report.png", found)
    with replacing(out / "report.md") as temporary:
        temporary.write_text(in_words.markdown(found, "report.png"))
    say("\n".join(found.verdict))
    for warning in found.warnings:
        say(f"warning: {warning}")
    say(
        f"wrote {out / 'report.html'}, report.md and report.png: {len(found.arms)} arms, {len(found.failures)} not done"
    )


@functools.lru_cache(maxsize=4096)
def _network_of(model: str, shape: tuple[int, int, int]) -> tuple[int, float]:
    import torch

    with torch.device("meta"):
        network = build(json.loads(model), "model")
    return sum(p.numel() for p in network.parameters()), _gflop(network, shape, backward=False)


def _network(settings: dict[str, Any]) -> tuple[int, float] | None:
    """Parameters and GFLOP of what a configuration builds."""
    try:
        size = settings["data"]["image_size"]
        height, width = (size, size) if isinstance(size, int) else size
        return _network_of(json.dumps(settings["model"]), (settings["data"]["channels"], height, width))
    except (InvalidInput, ValueError, KeyError, TypeError):
        return None


def _schedule(settings: dict[str, Any]) -> tuple[list[float], list[float]] | None:
    """t / T and sqrt(alpha_bar) of what a configuration builds."""
    try:
        schedule = build(settings["schedule"], "schedule")
    except (InvalidInput, KeyError):
        return None
    chosen = range(0, schedule.T + 1, max(1, schedule.T // 100))
    return [t / schedule.T for t in chosen], schedule.alpha_bar[list(chosen)].sqrt().tolist()


# ---------------------------------------------------------------------------------------------------- what is typed


def _folder(words: list[str]) -> tuple[Path, list[str]]:
    """The folder that was typed first, and the other words."""
    if not words or "=" in words[0]:
        raise InvalidInput("the folder of a study is missing, such as runs/default")
    return Path(words[0]), words[1:]


def _must_be_known(words: list[str], allowed: Sequence[str]) -> dict[str, str]:
    """Words as key -> value; refuses others than those."""
    found = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals or key not in allowed:
            known = ", ".join(f"{name}=" for name in allowed)
            raise InvalidInput(
                f"{shlex.quote(word)} is not known here; allowed: " + (known or "nothing but the folder")
            )
        found[key] = value
    return found


def _read(folder: Path) -> tuple[list[Any], list[str]]:
    """The arms of a study, and lines on runs that cannot be read."""
    from ddpm.study.reading import arms_of, read

    try:
        runs, unread = read(folder, _science)
    except ValueError as error:
        raise InvalidInput(str(error)) from error
    return arms_of(runs), unread
