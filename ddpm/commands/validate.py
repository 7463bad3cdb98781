"""Checks of values that several commands share: each raises InvalidInput that states what is allowed."""

import math
import os
from collections.abc import Iterable
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from ddpm.checks import is_whole
from ddpm.config import InvalidInput, plain, resolved


def settings(config: DictConfig, name: str) -> DictConfig:
    """Return a node of settings; raise InvalidInput for anything else, and for interpolations without a target."""
    node = config[name]
    if not isinstance(node, DictConfig):
        raise InvalidInput(f"{name}={node} must hold settings, such as {name}.KEY=VALUE")
    resolved(node)
    return node


def trusted(config: DictConfig) -> list[str]:
    """Return the target names that `trust=` adds to the allowed ones; only the command line can set it."""
    names = plain(config.trust)
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise InvalidInput(f"trust={names} must be a list of names, such as trust=[my_package.MyNet]")
    return names


def must_be_whole(config: DictConfig, *keys: str, least: int | None = None) -> None:
    """Raise InvalidInput unless every value is an integer, at least `least`; a key may be dotted."""
    for key in keys:
        value = OmegaConf.select(config, key)
        if not is_whole(value, least):
            raise InvalidInput(f"{key}={value} must be an integer" + (f" >= {least}" if least is not None else ""))


def must_be_numbers(config: DictConfig, *keys: str) -> None:
    """Raise InvalidInput unless every value is a finite number; a key may be dotted."""
    for key in keys:
        value = OmegaConf.select(config, key)
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise InvalidInput(f"{key}={value} must be a finite number")


def must_be_one_of(config: DictConfig, key: str, allowed: Iterable[str]) -> None:
    """Raise InvalidInput unless the value is one of the allowed names; a key may be dotted."""
    if (value := OmegaConf.select(config, key)) not in (allowed := tuple(allowed)):
        raise InvalidInput(f"{key}={value} is not known; allowed: {', '.join(allowed)}")


def must_be_writable(out: str | None) -> None:
    """Raise InvalidInput if `out` cannot be written; called before anything is drawn."""
    if out is None:
        return
    if not isinstance(out, str) or not out:
        raise InvalidInput(f"out={out} must be the name of a file or a folder/")
    path = Path(out)
    if not path.parent.is_dir():
        raise InvalidInput(f"out={out}: the folder {path.parent} does not exist")
    if not str(out).endswith("/") and path.suffix not in (".npy", ".png", ".gif", ".wav", ""):
        allowed = ".npy, .png, .gif, .wav (of sounds), or a folder/"
        raise InvalidInput(f"out={out}: the ending {path.suffix} is not known; allowed: {allowed}")
    if path.is_dir() and path.suffix and not str(out).endswith("/"):
        raise InvalidInput(f"out={out} is a folder; end it with / to write numbered pictures there")
    if path.is_file() and (not path.suffix or str(out).endswith("/")):
        raise InvalidInput(f"out={out} is a file, not a folder for numbered pictures")
    target = path if path.exists() else path.parent
    if not os.access(target, os.W_OK):
        raise InvalidInput(f"out={out}: {target} is not writable")


def must_be_drawable(config: DictConfig) -> None:
    """Raise InvalidInput for sampling settings that are invalid for every run."""
    from ddpm.runs.precision import PRECISIONS

    must_be_one_of(config, "precision", ("auto", *PRECISIONS))
    if (width := width_of_average(config)) is None:
        must_be_one_of(config, "weights", ("ema", "raw", "ema:WIDTH"))
    else:
        config.weights = f"ema:{width!r}"  # one name for ema:0.1, ema:.1 and ema:1e-1
    must_be_whole(config, "batch", least=1)
    must_be_whole(config, "seed")


def width_of_average(config: DictConfig) -> float | None:
    """Return WIDTH of weights=ema:WIDTH, or None for other weights; raise InvalidInput for an impossible width."""
    from ddpm.training.post_hoc import exponent

    name, colon, width = str(config.weights).partition(":")
    if name != "ema" or not colon:
        return None
    try:
        value = float(width)
    except ValueError:
        raise InvalidInput(f"weights={config.weights}: {width!r} is no number, as in ema:0.05") from None
    try:
        exponent(value)
    except ValueError as error:
        raise InvalidInput(f"weights={config.weights}: {error}") from error
    return value
