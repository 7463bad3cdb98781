"""Builders for what a configuration or a run names: data, networks, samplers, tasks, optimizers."""

import contextlib
import math
import re
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from ddpm.commands.train.words import in_words
from ddpm.commands.validate import trusted
from ddpm.config import (
    TASK,
    InvalidInput,
    build,
    build_data,
    build_group,
    conf_dir,
    plain,
    read_config,
    resolved,
)

CLASSIFIER = "ddpm.training.tasks.classifier.Classifier"  # the task whose networks guide samples
PROGRESSIVE = "ddpm.training.tasks.progressive.Progressive"  # tasks whose networks draw in few steps
CONSISTENCY = "ddpm.training.tasks.consistency.Consistency"
TEXT = "text"  # attribute of a network's text encoder, and the key of a frozen one in a task
STUDENT = "ddpm.samplers.Student"  # the sampler of progressive distillation
LABELS = {"class": "classes", "style": "styles"}  # key of a label -> attribute of the data that names its values
NONE = "none"  # requests samples without a label
BOUNDS = {key: (0.0, math.inf) for key in ("lr", "eps", "weight_decay", "momentum")}  # of an optimizer's settings
BOUNDS |= {key: (0.0, 1.0) for key in ("betas", "alpha")}


def sampler_of(config: DictConfig, trained: DictConfig, trust: list[str]) -> Any:
    """Build the sampler of `sampler=`; the default, DDIM with 50 steps, gives way to a distilled network's own.

    A network distilled to N steps knows only the times of these. The resulting settings are written into `config`, from
    which samples are named.
    """
    settings = resolved(config.sampler) if isinstance(config.sampler, DictConfig) else config.sampler
    of_task = plain(trained.task) if trained.get("task") is not None else {}
    distilled_to = of_task.get("steps") if of_task.get("_target_") == PROGRESSIVE else None
    if of_task.get("_target_") in (PROGRESSIVE, CONSISTENCY) and settings == by_default():
        settings = plain(trained.sampler)
    if isinstance(settings, dict) and settings.get("_target_") == STUDENT:
        if distilled_to is None:
            raise InvalidInput("sampler=student needs a run of task=progressive, which this is not")
        if settings.get("steps") not in (None, distilled_to):
            raise InvalidInput(f"sampler.steps={settings['steps']}: the run was distilled to {distilled_to} steps")
        settings["steps"] = distilled_to
    config.sampler = settings
    return build(settings, "sampler", trust)


def by_default() -> Any:
    """Return the settings of the default sampler."""
    return plain(OmegaConf.load(conf_dir() / "sampler" / "ddim.yaml"))


def guidance_of(config: DictConfig, trust: list[str], device: Any) -> Any:
    """Build the guidance of `guidance=`, with the second network that it may need, read from RUN or RUN@STEP."""
    from ddpm.guidance import ClassifierOf, Trained

    settings = plain(config.guidance)
    key = next((key for key in ("bad", "run") if isinstance(settings, dict) and settings.get(key) is not None), None)
    if key is None or settings[key] == "???":
        return build(config.guidance, "guidance", trust)
    named = str(settings.pop(key))
    run, folder = open_run_at(named, f"guidance.{key}")
    trained = read_config(run.path / "config.yaml")
    needed, how = ("diffusion", "") if key == "bad" else ("schedule", "; train one with task=classifier")
    classifies = trained.get("task") is not None and trained.task.get("_target_") == CLASSIFIER
    if not has(trained, "model", needed) or classifies != (key == "run"):
        what = "network that a sampler draws from" if key == "bad" else "classifier"
        raise InvalidInput(f"guidance.{key}={named}: it trained no {what}{how}")
    config.guidance[key] = f"{run.path}@{folder.name}"  # recorded with the samples: a run may continue
    model, mathematics = (build_group(trained, group, trust) for group in ("model", needed))
    load_into(model, folder / "ema.safetensors")
    network = (Trained if key == "bad" else ClassifierOf)(mathematics, model.to(device).eval())
    return build(settings, "guidance", trust, **{key: network})


def has(config: DictConfig, *groups: str) -> bool:
    """Whether a run's configuration has a `_target_` in each of these groups."""
    return all(isinstance(config.get(group), DictConfig) and "_target_" in config[group] for group in groups)


def open_run(path: str, which: Any, key: str = "run") -> tuple[Any, Path]:
    """Return a run and the folder of a checkpoint, as `ddpm.runs.directory.open_run`; raise InvalidInput for none."""
    from ddpm.runs.directory import open_run

    try:
        return open_run(path, which, key)
    except FileNotFoundError as error:
        raise InvalidInput(str(error)) from error


def split_step(named: str) -> tuple[str, str | int]:
    """Return folder and checkpoint of RUN, RUN@STEP, RUN@best or RUN@last; RUN alone means the last."""
    if not re.fullmatch(r".+@(\d+|best|last)", named) or Path(named).exists():
        return named, "last"
    path, _, step = named.rpartition("@")
    return path, int(step) if step.isdecimal() else step


def open_run_at(named: str, key: str) -> tuple[Any, Path]:
    """Open RUN, RUN@STEP, RUN@best or RUN@last, as `open_run`."""
    return open_run(*split_step(named), key)


def requested_labels(config: DictConfig, names: Callable[[], Sequence[str]], key: str = "class") -> list[int] | None:
    """Return the label values that `class=` or `style=` requests, by number or name; None for all, each in turn.

    A word that occurs in one name alone, such as ka in character_1_ka, requests it too. [] for `none`: without a label.

    Args:
        names: returns the names of all values, by number; called if one is requested by its name.
        key: the key: class, style, or either after from_.
    Raises: InvalidInput for an unknown name, with the known ones.
    """
    requested, kind = plain(config[key]), key.removeprefix("from_")
    if requested is None or requested == "all":
        return None
    listed = requested if isinstance(requested, list) else [requested]
    if not listed or not all(isinstance(y, int | str) and not isinstance(y, bool) for y in listed):
        raise InvalidInput(f"{key}={requested} must be a {kind}, by number or name, a list such as [3,5], none, or all")
    known: Sequence[str] = ()
    with contextlib.suppress(InvalidInput):  # numbers need no names
        known = names()
    for y in listed:
        if isinstance(y, int) and str(y) in known and known.index(str(y)) != y:
            raise InvalidInput(
                f"{key}={y} is the number of one {kind} and the name of another, which is number "
                f"{known.index(str(y))}: give the one by its name, the other by its number"
            )
    without = [y for y in listed if str(y).lower() == NONE and y not in known]
    if without and key == kind:
        if len(listed) > 1:
            raise InvalidInput(f"{key}={requested}: {NONE} (without a {kind}) cannot be combined with others")
        return []
    if any(isinstance(y, str) for y in listed):
        known = names()
    return [_number(y, known, key) if isinstance(y, str) else y for y in listed]


def _number(name: str, known: Sequence[str], key: str) -> int:
    """Return the index of a name: equal but for case, or the only name that contains it as a word."""
    if name in known:
        return known.index(name)
    lower, words = name.lower(), [re.split(r"[\W_]+", other.lower()) for other in known]
    alike = [y for y, other in enumerate(known) if other.lower() == lower]
    alike = alike or [y for y, of_one in enumerate(words) if lower in of_one and not lower.isdigit()]
    if len(alike) == 1:
        return alike[0]
    near = [other for other in known if len(lower) > 1 and lower in other.lower()]
    each = {word: other for other, of_one in zip(known, words, strict=True) for word in (*of_one, other.lower())}
    near += [each[word] for word in get_close_matches(lower, each)]
    nearest = f", perhaps {' or '.join(list(dict.fromkeys(near))[:3])}" if near else ""
    several = LABELS[key.removeprefix("from_")]
    raise InvalidInput(f"{key}={name} is not known{nearest}; the {several} are {', '.join(known) or 'without names'}")


def label_names(several: str, config: DictConfig, run: Any, trained: DictConfig) -> Sequence[str]:
    """Return the names of a run's classes or styles, as its status.json records them; else those of its data."""
    noted = noted_names(several, run)
    return tuple(getattr(data_of(config, trained), several, ())) if noted is None else noted


def noted_names(several: str, run: Any) -> Sequence[str] | None:
    """Return the names of classes or styles in a run's status.json; None if it has none, as in earlier versions."""
    noted = None
    with contextlib.suppress(ValueError):  # status.json of a newer version
        noted = run.status().get(several)
    return noted if isinstance(noted, list) and all(isinstance(name, str) for name in noted) else None


def data_of(config: DictConfig, trained: DictConfig) -> Any:
    """Return the data of a run, from its own path or `data.root`, with token ids of captions if it has a tokenizer."""
    data = plain(trained.data)
    if config.data.root is not None and isinstance(data, dict):
        data["root"] = config.data.root
    run = None if config.get("run") is None else Path(str(config.run))
    return in_words(build_data(data, trusted(config)), trained, trusted(config), run)


def task_of(config: DictConfig, trust: list[str], on: str = "cpu", made: dict[str, Any] | None = None) -> Any:
    """Build the task of a run with its networks, by default diffusion; a teacher's weights are not loaded yet.

    With `init_text` the text encoder in its network is frozen.

    Args:
        on: device of new networks.
        made: groups that are built already, by name.
    Raises: InvalidInput.
    """
    if config.get("task") is None:
        of_trainer = {key: config.trainer[key] for key in ("time_sampling", "offset_noise") if key in config.trainer}
        config = OmegaConf.merge(config, {"task": {"_target_": TASK} | of_trainer})  # type: ignore[assignment]
    frozen = {} if config.get("teacher") is None else {"teacher": build_group(config, "model", trust, {}, on)}
    task = build_group(config, "task", trust, made, on, **frozen)
    for network in task.modules.values():
        if config.get("init_text") is not None and getattr(network, TEXT, None) is not None:
            task.frozen[TEXT] = network.text.requires_grad_(False)
    return task


def untrained_judge(settings: Any, name: str, data: Any, trust: list[str] | None = None, seed: int = 0) -> Any:
    """Build the classifier of the images' classes, not yet trained.

    Args:
        settings: arguments of its constructor that do not follow from the data.
        name: for messages.
        seed: of its initial weights.
    Raises: InvalidInput.
    """
    import torch

    from ddpm.randomness import generator

    torch.manual_seed(generator(seed, "judge").initial_seed())
    channels, height, width = data.shape
    classes = max(1, data.num_classes)
    return build(settings, name, trust, image_size=(height, width), in_channels=channels, num_classes=classes)


def optimizer_of(config: DictConfig, trust: list[str]) -> Callable[..., Any]:
    """Return a function that builds the optimizer of a run from parameters.

    Raises: InvalidInput for numbers that no optimizer takes, before torch rejects them.
    """
    settings = resolved(config.optimizer) if isinstance(config.optimizer, DictConfig) else {}
    for key, value in settings.items():
        least, below = BOUNDS.get(key, (-math.inf, math.inf))
        for number in value if isinstance(value, list) else [value]:
            real = isinstance(number, int | float) and not isinstance(number, bool)
            if real and not least <= number < below:
                allowed = f"in [{least:g}, {below:g})" if below < math.inf else f">= {least:g} and finite"
                raise InvalidInput(f"optimizer.{key} = {value} must be {allowed}")
    return lambda parameters: build(config.optimizer, "optimizer", trust, params=list(parameters))


def augmentation(config: DictConfig, trust: list[str], data: Any) -> Any:
    """Build the augmentation of a run, or None; raise InvalidInput for data without images or with measured ones."""
    augment = None if config.get("augment") is None else build(config.augment, "augment", trust)
    active, condition = getattr(augment, "active", augment is not None), getattr(data, "condition", None)
    if active and condition is not None and condition in getattr(data, "measured", ()):
        raise InvalidInput(f"augment changes pictures, but not their data.condition={condition}; set augment=none")
    if "pictures" in data.holds:
        return augment
    if active:
        raise InvalidInput(f"augment changes pictures, but {data.name} holds none; set augment=none")
    return None


def load_into(model: Any, file: Path, lacking: Callable[[str], bool] = lambda name: False) -> None:
    """Load weights into a network; raise InvalidInput if names are missing that `lacking` does not allow."""
    from ddpm.runs import checkpoint

    try:
        checkpoint.load_into(model, file, lacking)
    except ValueError as error:
        raise InvalidInput(str(error)) from error


def put_average(model: Any, run: Any, folder: Path, width: float) -> None:
    """Load the average of the given width at a checkpoint's step into a network's parameters; buffers stay.

    Raises: InvalidInput for a run without snapshots of averages.
    """
    import torch

    from ddpm.runs import checkpoint, snapshots
    from ddpm.runs.files import shortened
    from ddpm.training import post_hoc

    step, named = int(folder.name), f"run={run.path} weights=ema:{width!r}"
    try:
        state = checkpoint.load_state(folder)
        if not state.get("tracked"):
            raise ValueError(
                f"checkpoint {step} has no tracked averages; runs with trainer.ema_snapshots=32 store them, from their "
                "first step on (for an existing run, train another one under study=NAME)"
            )
        files = snapshots.found(run.path / snapshots.FOLDER, step)
        saved = {n: partial(checkpoint.load_weights, path) for n, path in files.items()}
        averages, missed = post_hoc.reconstruct(saved | {step: lambda: state["tracked"]}, step, width)
        parameters = dict(model.named_parameters())
        if {name: p.shape for name, p in parameters.items()} != {name: x.shape for name, x in averages.items()}:
            raise ValueError("its averages are those of another network")
    except ValueError as error:
        raise InvalidInput(f"{named}: {error}") from error
    if missed > post_hoc.WELL_MATCHED:
        print(
            f"warning: {shortened(named)}: {len(saved)} snapshots miss {missed:.0%} of its profile; widths near "
            f"{' and '.join(f'{w:g}' for w in post_hoc.WIDTHS)} match better, or a run with more snapshots "
            "(trainer.ema_snapshots)"
        )
    with torch.no_grad():
        for name, p in parameters.items():
            p.copy_(averages[name])


def must_match(model: Any, data: Any) -> None:
    """Raise InvalidInput if a network does not take the data."""
    from ddpm.training.task import must_take

    try:
        must_take(model, data)
    except ValueError as error:
        raise InvalidInput(str(error)) from error


def must_walk(sampler: Any, diffusion: Any, key: str = "sampler") -> None:
    """Raise InvalidInput if a sampler cannot step along the schedule."""
    try:
        sampler.times(diffusion.schedule)
    except ValueError as error:
        raise InvalidInput(f"{key}: {error}") from error
