"""`ddpm-study plan`: runs, parameters, memory and time of a sweep, before it starts."""

import functools
import itertools
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from omegaconf import DictConfig, OmegaConf

from ddpm.commands.console import say, table
from ddpm.commands.launch import standing_for
from ddpm.commands.load import split_step, task_of
from ddpm.commands.train import perceptual
from ddpm.commands.train.codec import codec_of, fill, must_be_codec, recipe_of, with_codec
from ddpm.commands.train.prepare import built, checksums, must_be_measurable, must_be_sound, status_of, weights_of_init
from ddpm.commands.train.subject import tuned_of, with_class
from ddpm.commands.train.text_encoder import text_of
from ddpm.commands.train.words import in_words
from ddpm.commands.validate import trusted
from ddpm.config import (
    LATER,
    TASK,
    InvalidInput,
    build_data,
    compose,
    jobs,
    resolve_device,
    resolved,
    science,
    with_known_keys,
)

TIMED_GFLOP = 100  # of the timed steps at most: a second or two on a laptop's CPU


class Planned(NamedTuple):
    """A planned run of a sweep."""

    words: list[str]
    config: DictConfig
    settings: dict[str, Any]
    data: Any | None  # None if they are not available
    status: dict[str, Any]  # status.json of its run directory; {} if there is none, or it is not known
    path: Path | None = None  # of that directory, if it is known
    codec: Any = None  # whose latents or codes it trains on, on the meta device
    first: Any = None  # the run, `Planned`, that trains its codec first
    refused: str | None = None  # why there is no such run


class Needs(NamedTuple):
    """The resources that an arm needs, or why it cannot be trained."""

    parameters: int | None = None
    gflop: float | None = None  # of training on an image, forward and backward
    images: int | None = None  # of training, repeats counted
    memory: int | None = None  # bytes of a step
    refused: str | None = None


def plan(words: list[str]) -> None:
    """Compose every job of a sweep, start none, and print a table of its arms.

    Runs that train a codec for others, see `init_codec`, have a table of their own before.

    Args:
        words: those of `ddpm-train -m`.
    Raises: InvalidInput for what does not compose.
    """
    from ddpm.study.formatting import duration

    composed, merged, incomplete = _composed(words)
    data = _DataCache()
    runs = [_planned(job, config, data) for job, config in composed]
    first = list({_key(run.first.settings): run.first for run in runs if run.first is not None}.values())
    before = 0.0
    if first:
        say("trained first, each once, for the runs that are trained on its latents or codes:")
        before = _print_table(first, 0, [], [])
        say("\nand then:")
    total = _print_table(runs, merged, incomplete, data.missing)
    if before and total:
        say(f"about {duration(before + total)} for both")


def _key(settings: dict[str, Any]) -> str:
    """Return a key that is equal for runs with the same science."""
    return json.dumps(science_of(settings), sort_keys=True, default=str)


def _print_table(runs: Sequence[Planned], merged: int, incomplete: Sequence[str], missing: Sequence[str]) -> float:
    """Print the table of arms and its totals; return the estimated seconds that are left to train."""
    from ddpm.study.reading import Recorded, arms_of

    records = [
        Recorded(
            Path(str(number)), run.settings, _as_status(run, number), {}, science_of(run.settings | {"seed": None})
        )
        for number, run in enumerate(runs)
    ]
    arms = arms_of(records)
    by_record = dict(zip(map(id, records), runs, strict=True))
    of_arm = [[by_record[id(record)] for record in arm.runs] for arm in arms]
    needs = [_needs(its[0]) for its in of_arm]
    rate = _rate(of_arm, needs)
    total, reasons = 0.0, dict[str, str]()
    rows = [["arm", "runs", "parameters", "GFLOP to train on an image", "memory", "a run", "state"]]
    for arm, its_runs, need in zip(arms, of_arm, needs, strict=True):
        a_run = None if need.refused else _seconds(its_runs, need, rate)
        if need.refused:
            reasons.setdefault(need.refused, f"refused ({len(reasons) + 1})")
        total += (a_run or 0.0) * sum(run.status.get("state") != "DONE" for run in its_runs)
        rows.append(_row(arm.label, its_runs, need, a_run, reasons))
    say(table(rows))
    for reason, name in reasons.items():
        say(f"{name}: {reason}")
    refused = sum(len(its) for its, need in zip(of_arm, needs, strict=True) if need.refused)
    for line in incomplete:
        say(f"refused: {line}")
    say(_summary(runs, arms, merged, refused, total, rate, missing))
    return total


def _as_status(run: Planned, number: int) -> dict[str, Any]:
    """Return a stand-in for a run's status.json, with the order of its job."""
    return {"overrides": run.words, "state": run.status.get("state", "new"), "started": f"{number:09}"}


class _Job(NamedTuple):
    words: list[str]
    config: DictConfig


def _composed(words: list[str]) -> tuple[list[_Job], int, list[str]]:
    """Return the jobs of a sweep with distinct science, the number of duplicates, and lines on incomplete jobs.

    Raises: InvalidInput for what does not compose, and if all jobs lack a value.
    """
    try:
        sweep_jobs = jobs("train", words, multirun=True) or []
    except InvalidInput as error:
        raise InvalidInput(with_known_keys("train", str(error), words)) from error
    by_science: dict[str, _Job] = {}
    incomplete: list[str] = []
    by_words: dict[tuple[str, ...], DictConfig] = {}
    for job in sweep_jobs:
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
        try:
            settings = resolved(config)
        except InvalidInput as error:
            own = " ".join(word for word in job if not all(word in other for other in sweep_jobs))
            incomplete.append(f"{own or 'the run'}: {error}")
            continue
        by_science.setdefault(_key(settings), _Job(job, config))
    if not by_science:
        raise InvalidInput(incomplete[0])
    return list(by_science.values()), len(sweep_jobs) - len(by_science) - len(incomplete), incomplete


def science_of(settings: dict[str, Any]) -> dict[str, Any]:
    """Return what a run's result depends on, by its settings alone, without the location of the data."""
    others = ("init", "extend", "teacher", "init_codec", "init_text")
    parents = {key: str(settings[key]) for key in others if settings.get(key) is not None}
    if recipe := (settings.get("codec") or {}).get("recipe"):  # each seed has a run of its own
        parents["init_codec"] = " ".join(word for word in recipe if not word.startswith("seed="))
    data = {key: value for key, value in settings["data"].items() if key not in ("root", "download")}
    result = science(settings, {}, parents, 0) | {"data": data}
    task = result.get("task", {})
    if isinstance(task, dict) and "_target_" not in task:  # of diffusion
        result["task"] = LATER["task"] | task
    for group in ("model", "diffusion", "trainer"):
        if isinstance(result.get(group), dict):
            result[group] = LATER[group] | result[group]
    if isinstance(result.get("model"), dict):
        del result["model"]["drop"]  # the network takes it from its task
    if isinstance(task, dict) and "parts" in task and task.get("_target_", TASK) != TASK:
        result[perceptual.PERCEPTUAL] = perceptual.chosen(settings)  # by its settings: its weights are not known here
    return result


class _DataCache:
    """Cache of the jobs' data, without downloading any or drawing pictures."""

    def __init__(self) -> None:
        self.known: dict[str, Any] = {}
        self.missing: list[str] = []  # why data are not available

    def of(self, config: DictConfig, settings: dict[str, Any]) -> tuple[Any | None, str | None]:
        """Return a job's data, or None if they are not available, and a note on what only training will determine."""
        parts = ("data", "tokenizer", "subject", "adapter", "init")
        key = json.dumps([settings.get(part) for part in parts], sort_keys=True, default=str)
        if key not in self.known:
            offline = {"download": False} if "download" in settings["data"] else {}
            trust = trusted(config)
            try:
                data = build_data(settings["data"] | offline, trust)
                data, lacks = with_class(data, config, trust, drawing=False)
                self.known[key] = in_words(data, config, trust, _start_of(config)), lacks
            except InvalidInput as error:
                if config.get("subject") is not None:  # nothing could be downloaded for it, so the settings are wrong
                    raise
                self.known[key] = None, None
                self.missing.append(str(error))
        return self.known[key]


def _start_of(config: DictConfig) -> Path | None:
    """Return the run that `init` names, which may have a tokenizer, or None."""
    return None if config.get("init") is None else Path(split_step(str(config.init))[0])


def _planned(words: list[str], config: DictConfig, at_hand: _DataCache) -> Planned:
    """Return a job with its data and its run directory, if the data determine its name."""
    for key in ("extend", "teacher", "init_text"):
        if config.get(key) is not None:
            raise InvalidInput(f"{key}={config[key]}: a run that starts from another is checked by ddpm-train --check")
    settings = resolved(config)
    if not isinstance(settings["data"], dict):
        raise InvalidInput(f"data={settings['data']} must hold settings, such as data=digits")
    try:
        if "subject" in config:
            with standing_for(words):
                config = tuned_of(config)
        config, codec, first, parents = _with_codec(config, at_hand)
        settings = resolved(config)
        data, lacks = at_hand.of(config, settings)
        known = None if lacks is not None or parents is None else parents | _parents(config)
        path = None if data is None or known is None else _path(config, settings, data, known)
        latents = data if data is None or codec is None else _latents(data, codec)
    except InvalidInput as error:
        return Planned(words, config, settings, None, {}, refused=str(error))
    return Planned(words, config, settings, latents, {} if path is None else _status(path), path, codec, first)


def _status(path: Path) -> dict[str, Any]:
    from ddpm.runs.directory import Run

    return status_of(Run(path))


def _parents(config: DictConfig) -> dict[str, str]:
    """Return the checksums of the networks that a run starts from, without its codec."""
    found = {} if config.get("init") is None else checksums("init", weights_of_init(str(config.init)))
    text = None if config.get("init_text") is None else text_of(config)  # a tuned run may have one
    return found if text is None else found | {"init_text": text.sha256}


def _path(config: DictConfig, settings: dict[str, Any], data: Any, parents: dict[str, str]) -> Path | None:
    """Return the run directory; None if a classifier must be trained before its name is known."""
    import ddpm
    from ddpm.runs.directory import science_hash

    folder = Path(str(config.runs)) / str(config.study)
    judged = perceptual.parents_of(config, trusted(config), data, folder.parent)
    if judged is None:
        return None
    return folder / science_hash(science(settings, data.identity(), parents | judged, ddpm.NUMERICS))


# --------------------------------------------------------------------------------------------------------------- codecs


def _with_codec(
    config: DictConfig, at_hand: _DataCache
) -> tuple[DictConfig, Any, Planned | None, dict[str, str] | None]:
    """Complete a run's configuration by its codec.

    Returns: the configuration; the codec, on the meta device, or None; the run that trains it first, if there is one;
        and its checksum by parent name, or None if that is not known yet.
    """
    from ddpm.runs.directory import DONE

    if config.get("init_codec") is None:
        return config, None, None, {}
    config, first = config.copy(), None
    if (recipe := recipe_of(config)) is not None:
        words, made = recipe
        first = _planned(words, made, at_hand)
        if first.refused is not None:
            raise InvalidInput(f"init_codec: {first.refused}")
        if first.path is None or first.status.get("state") != DONE:
            task = task_of(first.config, trusted(config))
            must_be_codec(task, "init_codec")
            config.codec.recipe = words
            fill(config, task.codec())
            return config, _unloaded(task.codec()), first, None
        config = with_codec(config, words, first.path)
    found = codec_of(config, lambda: build_data(config.data, trusted(config)).shape)
    assert found is not None  # init_codec names one
    fill(config, found.codec)
    return config, _unloaded(found.codec), first, {"init_codec": found.sha256}


def _unloaded(codec: Any) -> Any:
    """Return a frozen codec on the meta device, whose weights can be counted."""
    codec.model.requires_grad_(False).to("meta")
    return codec


def _latents(data: Any, codec: Any) -> Any:
    """Return a stand-in for encoded data: zeros that take no memory, but are counted as if they did."""
    import torch

    from ddpm.data.encoded import Encoded, must_suit

    try:
        must_suit(data, codec)
    except ValueError as error:
        raise InvalidInput(f"init_codec: {error}") from error
    one = codec.posterior(torch.zeros(1, *codec.of, device="meta"))
    zeros = torch.zeros(1, *one.shape[1:], dtype=one.dtype).expand(len(data), *one.shape[1:])
    return Encoded(data, codec, zeros, fit=False)


def _stand_in(run: Planned) -> Any:
    """Return a stand-in for missing data: black images of the configured shape, with one class and caption."""
    import torch

    from ddpm.data import ImageData

    settings = run.settings["data"]
    try:
        size = settings["image_size"]
        height, width = (size, size) if isinstance(size, int) else size
        images = torch.zeros(64, settings["channels"], height, width, dtype=torch.uint8)
        data = ImageData("not at hand", "none", images, torch.zeros(64, dtype=torch.long))
    except (ValueError, RuntimeError, TypeError, KeyError) as error:
        raise InvalidInput(f"data: {str(error).splitlines()[0]}") from error
    data.captions = ("not at hand",) * len(data)
    in_tokens = in_words(data, run.config, trusted(run.config), _start_of(run.config))
    return in_tokens if run.codec is None else _latents(in_tokens, run.codec)


def _needs(run: Planned) -> Needs:
    """Return parameters, FLOPs and memory of an arm, counted on the meta device, or why it is refused."""
    import torch

    from ddpm.runs import preflight
    from ddpm.training import cost
    from ddpm.training.post_hoc import tracked
    from ddpm.training.task import trial_loss

    config, data = run.config, run.data
    if run.refused is not None:
        return Needs(refused=run.refused)
    try:
        must_be_sound(config)
        at_hand = data if data is not None else _stand_in(run)
        parts = built(config, trusted(config), at_hand, resolve_device(config.device), on="meta")
        if run.codec is not None:
            parts.task.frozen["codec"] = run.codec.model
        for module in (*parts.task.modules.values(), *parts.task.frozen.values()):
            module.to("meta")  # networks that the task has built itself, too
        if data is not None:
            must_be_measurable(config, run.settings, parts, data)
        steps = parts.trainer.last_step(len(data.train)) if data is not None else parts.trainer.steps
        images = None if steps is None else steps * parts.trainer.batch_size
        trial = functools.partial(trial_loss, parts.task, at_hand, device=torch.device("meta"))
        losses = [functools.partial(trial, phase=number) for number in range(len(parts.task.phases))]
        micro = parts.trainer.batch_size // parts.trainer.accumulate
        activations = max(preflight.activations(loss, parts.weights, micro) for loss in losses)
        batch, modules = (parts.trainer.batch_size, parts.trainer.accumulate), parts.task.modules.values()
        averages = 1 + tracked(parts.trainer.ema_snapshots)
        still = parts.task.frozen.values()
        needed = preflight.memory(modules, parts.moments, at_hand, *batch, activations, averages, still)
        gflop = sum(map(cost.gflop_of_loss, losses))
        return Needs(parts.parameters, gflop, images, sum(needed), _too_large(needed, resolve_device(config.device)))
    except InvalidInput as error:
        return Needs(refused=str(error))


def _too_large(needed: Any, device: Any) -> str | None:
    from ddpm.runs import preflight

    there = preflight.available(device)
    if there is None or sum(needed) <= there:
        return None
    return f"a step needs {preflight.in_words(sum(needed))}, but {preflight.in_words(there)} are available on {device}"


def _rate(of_arm: Sequence[list[Planned]], needs: Sequence[Needs]) -> float | None:
    """Return the GFLOP/s of training, from timed steps of the first arm that can be trained; None if all is done."""
    from ddpm.training import cost
    from ddpm.training.step import Training

    legal = [(runs[0], need) for runs, need in zip(of_arm, needs, strict=True) if need.gflop and not need.refused]
    if not legal or all(run.status.get("state") == "DONE" for runs in of_arm for run in runs):
        return None
    run, need = legal[0]
    assert need.gflop is not None
    device, trust = resolve_device(run.config.device), trusted(run.config)
    data = _stand_in(run) if run.data is None else run.data
    parts = built(run.config, trust, data, device)
    trainer = parts.trainer
    trainer.batch_size = max(1, min(trainer.batch_size // trainer.accumulate, int(TIMED_GFLOP / need.gflop / 4)))
    trainer.accumulate = 1
    training = Training(
        trainer, parts.task, data.to(device), parts.optimizer, seed=0, device=device, augment=parts.augment
    )
    numbers = itertools.count(1)
    training.step(next(numbers))
    took = cost.seconds(lambda: training.step(next(numbers)), device, repeat=3)
    return need.gflop * trainer.batch_size / took


def _seconds(runs: list[Planned], need: Needs, rate: float | None) -> float | None:
    """Return the seconds of a run: the mean of the arm's finished runs, else by FLOPs, or by a time budget."""
    done = [run.status["seconds"] for run in runs if run.status.get("state") == "DONE" and run.status.get("seconds")]
    if done:
        return sum(done) / len(done)
    budget = runs[0].config.trainer.seconds
    if rate is None or need.gflop is None or need.images is None:
        return budget
    return min(need.images * need.gflop / rate, budget or math.inf)


def _row(label: str, runs: list[Planned], need: Needs, a_run: float | None, reasons: dict[str, str]) -> list[str]:
    from ddpm.runs import preflight
    from ddpm.study.formatting import MISSING, amount, duration, number

    states = [run.status.get("state", "new") for run in runs]
    counts = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
    return [
        label,
        str(len(runs)),
        amount(need.parameters),
        MISSING if need.gflop is None else number(need.gflop),
        MISSING if need.memory is None else preflight.in_words(need.memory),
        duration(a_run),
        reasons[need.refused] if need.refused else counts,
    ]


def _summary(
    runs: Sequence[Planned],
    arms: Sequence[Any],
    merged: int,
    refused: int,
    total: float,
    rate: float | None,
    missing: Sequence[str],
) -> str:
    """Return the totals of the table, in words."""
    from ddpm.study.formatting import counted, duration

    done, config = sum(run.status.get("state") == "DONE" for run in runs), runs[0].config
    folder = Path(str(config.runs)) / str(config.study)
    lines = [f"{counted(len(runs), 'run')} of {counted(len(arms), 'arm')} in {folder}"]
    if merged:
        lines.append(f"{merged} more jobs have the same settings as others and share their runs")
    if done:
        lines.append(f"done already: {done}")
    if refused:
        lines.append(f"{refused} are refused: they would be FAILED with that reason, and the others run")
    for reason in missing:
        lines.append(
            "the data are not available, so no existing run was looked up, and classes and epochs "
            f"were not counted: {reason}"
        )
    if rate is not None and total:
        lines.append(
            f"about {duration(total)} for the missing runs, one after the other, on {resolve_device(config.device)} "
            f"({rate:,.0f} GFLOP/s in three steps of the first arm; small networks are less exact)"
        )
    return "\n".join(lines)
