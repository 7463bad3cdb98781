"""What was asked for: the words that were typed, values that several commands check, and the run that they name."""

import contextlib
import math
import os
import shlex
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ddpm.config import (
    TASK,
    InvalidInput,
    build,
    build_data,
    build_group,
    compose,
    plain,
    read_config,
    resolve_device,
    resolved,
    with_known_keys,
)


def multirun() -> bool:
    """Whether this job is one of a sweep."""
    return HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN


def overrides() -> list[str]:
    """The words that were typed for this job, without those to Hydra itself; none where Hydra started no job."""
    config: Any = HydraConfig.instance().cfg
    if config is None:
        return []
    words: Any = OmegaConf.to_container(config.hydra.overrides.task, resolve=False)  # an interpolation stays one
    return list(map(str, words))


def job_number() -> int | None:
    """The place of this job in its sweep, from 0."""
    config: Any = HydraConfig.instance().cfg
    return OmegaConf.select(config, "hydra.job.num") if multirun() else None


def jobs_at_once() -> int | None:
    """How many jobs the launcher runs at once on this machine; None for all launchers but joblib's."""
    config: Any = HydraConfig.instance().cfg
    launcher = None if config is None else OmegaConf.select(config, "hydra.launcher")
    if launcher is None or not str(launcher.get("_target_")).startswith("hydra_plugins.hydra_joblib_launcher."):
        return None
    n, cores = launcher.get("n_jobs") or 1, os.cpu_count() or 1
    return max(1, n if n > 0 else cores + 1 + n)


def job_name() -> str:
    """What tells this job from the others of its sweep."""
    return " ".join(overrides()) or "defaults"


def command(verb: str) -> str:
    """What is typed for ddpm-VERB: in a checkout its script."""
    own = (Path.cwd() / "experiments" / f"{verb}.py").is_file()
    return f"python experiments/{verb}.py" if own else f"ddpm-{verb}"


def training_command(words: list[str]) -> str:
    """What is typed to train by these words."""
    return f"{command('train')} {shlex.join(words)}"


def composed(name: str, words: list[str]) -> DictConfig:
    """The configuration of words that were typed to ddpm-study, for what one process does, and which extends no run."""
    from ddpm.training import ranks

    if ranks.started():
        raise InvalidInput("this is done by one process: start it without torchrun")
    try:
        config = compose(name, words)
        extend, *_ = (config[key] for key in ("extend", "retry", "device"))  # which are read before all is resolved
    except InvalidInput as error:
        raise InvalidInput(with_known_keys(name, str(error), words)) from error
    except OmegaConfBaseException as error:
        raise InvalidInput(str(error).splitlines()[0]) from error
    if extend is not None:
        raise InvalidInput(f"extend={extend} cannot be used here; init={extend} starts from its weights")
    return config


def settings(config: DictConfig, name: str) -> DictConfig:
    """A node of settings; refuses anything else, and interpolations that lead nowhere."""
    node = config[name]
    if not isinstance(node, DictConfig):
        raise InvalidInput(f"{name}={node} must hold settings, such as {name}.KEY=VALUE")
    resolved(node)
    return node


def trusted(config: DictConfig) -> list[str]:
    """The names that the command line, and nothing else, adds to the allowed targets."""
    names = plain(config.trust)
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise InvalidInput(f"trust={names} must be a list of names, such as trust=[my_package.MyNet]")
    return names


def must_be_whole(config: DictConfig, *keys: str, least: int | None = None) -> None:
    """Refuse what is not a whole number, or below `least`; a key may be dotted."""
    for key in keys:
        value = OmegaConf.select(config, key)
        if isinstance(value, bool) or not isinstance(value, int) or (least is not None and value < least):
            raise InvalidInput(f"{key}={value} must be an integer" + (f" >= {least}" if least is not None else ""))


def must_be_numbers(config: DictConfig, *keys: str) -> None:
    """Refuse what is not a finite number; a key may be dotted."""
    for key in keys:
        value = OmegaConf.select(config, key)
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise InvalidInput(f"{key}={value} must be a finite number")


def must_be_one_of(config: DictConfig, key: str, allowed: Iterable[str]) -> None:
    """Refuse what is none of the names that are allowed; a key may be dotted."""
    if (value := OmegaConf.select(config, key)) not in (allowed := tuple(allowed)):
        raise InvalidInput(f"{key}={value} is not known; allowed: {', '.join(allowed)}")


def must_be_writable(out: str | None) -> None:
    """Refuse an `out` that could not be written in the end, before anything is drawn."""
    if out is None:
        return
    if not isinstance(out, str) or not out:
        raise InvalidInput(f"out={out} must be the name of a file or a folder/")
    path = Path(out)
    if not path.parent.is_dir():
        raise InvalidInput(f"out={out}: the folder {path.parent} does not exist")
    if not str(out).endswith("/") and path.suffix not in (".npy", ".png", ".gif", ""):
        raise InvalidInput(f"out={out}: the ending {path.suffix} is not known; allowed: .npy, .png, .gif, or a folder/")
    if path.is_dir() and path.suffix and not str(out).endswith("/"):
        raise InvalidInput(f"out={out} is a folder; end it with / to write numbered pictures there")
    if path.is_file() and (not path.suffix or str(out).endswith("/")):
        raise InvalidInput(f"out={out} is a file, not a folder for numbered pictures")
    target = path if path.exists() else path.parent
    if not os.access(target, os.W_OK):
        raise InvalidInput(f"out={out}: {target} is not writable")


def must_be_drawable(config: DictConfig) -> None:
    """Refuse settings by which nothing can be drawn, whatever the run."""
    from ddpm.runs.precision import PRECISIONS

    must_be_one_of(config, "precision", ("auto", *PRECISIONS))
    must_be_one_of(config, "weights", ("ema", "raw"))
    must_be_whole(config, "batch", least=1)
    must_be_whole(config, "seed")


def source_of(config: DictConfig) -> tuple[Any, Any, DictConfig, int]:
    """What `run=` on the command line can draw: (source, run, the run's configuration, step of the checkpoint)."""
    from ddpm.runs.directory import open_run
    from ddpm.runs.precision import PRECISIONS, as_trained
    from ddpm.samplers.trained import TrainedSampler
    from ddpm.training.task import shape_of

    must_be_drawable(config)
    device = resolve_device(config.device)
    try:
        run, folder = open_run(str(config.run), config.checkpoint)
    except FileNotFoundError as error:
        raise InvalidInput(str(error)) from error
    trained, trust = read_config(run.path / "config.yaml"), trusted(config)
    model, diffusion = (build_group(trained, group, trust) for group in ("model", "diffusion"))
    sampler = build(config.sampler, "sampler", trust)
    load_into(model, folder / ("ema.safetensors" if config.weights == "ema" else "model.safetensors"))
    shape, precision = shape_of(model) or (), config.precision
    if precision == "auto":
        with contextlib.suppress(ValueError):  # a newer version's status: its weights may be read all the same
            precision = run.status().get("precision")
        precision = as_trained(precision if precision in tuple(PRECISIONS) else "fp32", device)
    return (
        TrainedSampler(diffusion, model, sampler, shape, config.seed, device, precision),
        run,
        trained,
        int(folder.name),
    )


def data_of(config: DictConfig, trained: DictConfig) -> Any:
    """The data of a run, from where the run found them or from `data.root`."""
    data = plain(trained.data)
    if config.data.root is not None and isinstance(data, dict):
        data["root"] = config.data.root
    return build_data(data, trusted(config))


def task_of(config: DictConfig, trust: list[str], on: str = "cpu", made: dict[str, Any] | None = None) -> Any:
    """The task of a run, and what it is made of; of a run that names none, diffusion.

    Args:
        on: where networks are made.
        made: groups that are built already, by name.
    Raises: InvalidInput.
    """
    if config.get("task") is None:
        of_trainer = {key: config.trainer[key] for key in ("time_sampling", "offset_noise") if key in config.trainer}
        config = OmegaConf.merge(config, {"task": {"_target_": TASK} | of_trainer})  # type: ignore[assignment]
    return build_group(config, "task", trust, made, on)


def optimizer_of(config: DictConfig, trust: list[str]) -> Callable[..., Any]:
    """What makes the optimizer of a run from parameters."""
    return lambda parameters: build(config.optimizer, "optimizer", trust, params=list(parameters))


def augmentation(config: DictConfig, trust: list[str], data: Any) -> Any:
    """The augmentation of a run, or None; refuses one that changes anything of data that are no pictures."""
    augment = None if config.get("augment") is None else build(config.augment, "augment", trust)
    if "pictures" in data.holds:
        return augment
    if getattr(augment, "active", augment is not None):
        raise InvalidInput(f"augment changes pictures, but {data.name} holds none; set augment=none")
    return None


def load_into(model: Any, file: Path) -> None:
    """Give a network its weights; refuses a file that does not hold them."""
    from ddpm.runs import checkpoint

    try:
        checkpoint.load_into(model, file)
    except ValueError as error:
        raise InvalidInput(str(error)) from error


def must_match(model: Any, data: Any) -> None:
    """Refuse a network that does not take the data."""
    from ddpm.training.task import must_take

    try:
        must_take(model, data)
    except ValueError as error:
        raise InvalidInput(str(error)) from error


def must_walk(sampler: Any, diffusion: Any, key: str = "sampler") -> None:
    """Refuse a sampler that cannot walk along the schedule."""
    try:
        sampler.times(diffusion.schedule)
    except ValueError as error:
        raise InvalidInput(f"{key}: {error}") from error
