"""Checkpoints: written whole or not at all, verified before use, and free of pickled code.

A checkpoint is a folder `checkpoints/STEP` with model.safetensors, ema.safetensors, state.pt (optimizer and counters,
loaded with weights_only=True) and manifest.json (format, step, held-out loss, sha256 of each file).
"""

import hashlib
import json
import math
import os
import re
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ddpm.images import replacing

FORMAT = 1


def save(folder: Path, step: int, model: nn.Module, ema: nn.Module, state: dict, held_out: float | None) -> Path:
    """Write folder/step: under a temporary name, flushed to disk, then renamed.

    Args:
        folder: the run's `checkpoints` folder.
        state: what else resuming needs; tensors, numbers, strings and containers of them.
        held_out: the EMA weights' loss on the held-out part, if it was measured.
    Returns: the checkpoint's folder.
    """
    final, temporary = folder / str(step), folder / f".{step}.{os.getpid()}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        for name, network in {"model": model, "ema": ema}.items():
            save_weights(network, temporary / f"{name}.safetensors")
        with open(temporary / "state.pt", "wb") as file:  # given a path, torch hides a full disk's error
            torch.save(state, file)
        checksums = {path.name: sha256(path) for path in sorted(temporary.iterdir())}
        measured = held_out if held_out is not None and math.isfinite(held_out) else None
        manifest = {"format": FORMAT, "step": step, "held_out": measured, "sha256": checksums}
        (temporary / "manifest.json").write_text(json.dumps(manifest, indent=1))
        for path in temporary.iterdir():
            _fsync(path)
        if final.exists():
            shutil.rmtree(final)
        os.rename(temporary, final)
        _fsync(folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return final


def rotate(folder: Path, keep: int) -> None:
    """Delete all checkpoints but the last `keep` and the best one, and what killed processes left half-written."""
    for left in folder.glob(".*"):
        shutil.rmtree(left)
    steps = _steps(folder)
    kept = {*steps[-keep:], best(folder)}
    for step in steps:
        if step not in kept:
            shutil.rmtree(folder / str(step))


def best(folder: Path) -> int | None:
    """The step with the lowest held-out loss; the last step if none was measured; None without checkpoints."""
    losses = {step: _held_out(folder / str(step)) for step in _steps(folder)}
    measured = {step: loss for step, loss in losses.items() if loss is not None}
    return min(measured, key=measured.get) if measured else max(losses, default=None)


def drop_after(folder: Path, step: int) -> None:
    """Delete the checkpoints of later steps than `step`: damaged ones, that a run goes back behind.

    Raises: ValueError, before any is deleted, if one is not damaged but of a newer format.
    """
    later = [folder / str(n) for n in _steps(folder) if n > step]
    for path in later:
        if (damage := verify(path)) and "newer than" in damage:
            raise ValueError(f"checkpoint {path} was written by a newer version ({damage}); use that, or move it away")
    for path in later:
        shutil.rmtree(path)


def last_whole(folder: Path) -> Path | None:
    """The newest checkpoint whose files match their checksums, or None; damaged ones are named and passed over."""
    for step in reversed(_steps(folder)):
        path = folder / str(step)
        if (damage := verify(path)) is None:
            return path
        print(f"checkpoint {path} is damaged ({damage}); going back to the one before")
    return None


def verify(path: Path) -> str | None:
    """What is wrong with a checkpoint, in words; None if it is whole."""
    try:
        manifest = json.loads((path / "manifest.json").read_text())
        if manifest["format"] > FORMAT:
            return f"its format {manifest['format']} is newer than {FORMAT}, the newest that this version knows"
        if missing := {"model.safetensors", "ema.safetensors", "state.pt"} - manifest["sha256"].keys():
            return f"its manifest does not name {', '.join(sorted(missing))}"
        for name, checksum in manifest["sha256"].items():
            if sha256(path / name) != checksum:
                return f"{name} does not match its checksum"
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def save_weights(network: nn.Module, path: Path) -> None:
    """Write a network's parameters and buffers as safetensors; the folder is made if it is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        try:
            save_file({k: v.contiguous() for k, v in network.state_dict().items()}, temporary)
        except SafetensorError as error:
            number = re.search(r"os error (\d+)", str(error))
            raise (OSError(int(number[1]), str(error)) if number else error) from error


def load_weights(path: Path, device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """The tensors of one .safetensors file; ValueError if it is none."""
    try:
        return load_file(path, device=str(device))
    except SafetensorError as error:
        raise ValueError(f"{path} is no whole safetensors file: {error}") from error


def load_state(path: Path) -> dict:
    """What `save` was given as state; tensors on the CPU. Refuses anything but plain data."""
    return torch.load(path / "state.pt", map_location="cpu", weights_only=True)


def load_into(network: nn.Module, path: Path) -> None:
    """Put the weights of a .safetensors file into a network.

    Raises: ValueError that lists the names and shapes that do not fit.
    """
    theirs, mine = load_weights(path), network.state_dict()
    missing, unknown = sorted(mine.keys() - theirs.keys()), sorted(theirs.keys() - mine.keys())
    shapes = [
        f"{k} {tuple(theirs[k].shape)}, the network's is {tuple(mine[k].shape)}"
        for k in sorted(mine.keys() & theirs.keys())
        if mine[k].shape != theirs[k].shape
    ]
    wrong = {"missing": missing, "unknown": unknown, "of another shape": shapes}
    if any(wrong.values()):
        told = "; ".join(
            f"{len(v)} {k}: {', '.join(v[:3])}{', ...' if len(v) > 3 else ''}" for k, v in wrong.items() if v
        )
        raise ValueError(f"{path} does not fit the network: {told}")
    network.load_state_dict(theirs)


def _held_out(path: Path) -> float | None:
    """The held-out loss in a checkpoint's manifest; None if it was not measured or cannot be read."""
    try:
        held_out = json.loads((path / "manifest.json").read_text())["held_out"]
    except (OSError, ValueError, LookupError, TypeError):
        return None
    return held_out if isinstance(held_out, int | float) and math.isfinite(held_out) else None


def _steps(folder: Path) -> list[int]:
    """Steps of the checkpoints in a folder, in order."""
    return sorted(int(p.name) for p in folder.glob("*") if p.name.isdecimal()) if folder.is_dir() else []


def sha256(path: Path) -> str:
    """The checksum of a file, 64 hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
