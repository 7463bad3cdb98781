"""Snapshots of averaged weights, stored next to a run's checkpoints and written atomically.

One file a snapshot, `averages/STEP.CHECKSUM.safetensors`: the name has the first 16 digits of the sha256 of the
content, so that one renaming puts the file and its checksum in place.
"""

import hashlib
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path

import safetensors.torch
from torch import Tensor

from ddpm.runs import checkpoint
from ddpm.runs.files import replacing

FOLDER = "averages"  # of a run directory
NAME = re.compile(r"([1-9]\d{0,17})\.([0-9a-f]{16})\.safetensors")


def save(folder: Path, step: int, tensors: Mapping[str, Tensor]) -> Path:
    """Write a snapshot atomically; another one of the same step is deleted.

    Args:
        folder: the run's `averages` folder; made if it is missing.
    """
    folder.mkdir(parents=True, exist_ok=True)
    content = safetensors.torch.save({name: x.contiguous() for name, x in tensors.items()})
    path = folder / f"{step}.{hashlib.sha256(content).hexdigest()[:16]}.safetensors"
    with replacing(path, durable=True) as temporary:
        temporary.write_bytes(content)
    for other in folder.glob(f"{step}.*.safetensors"):
        if other != path:
            other.unlink()
    return path


def found(folder: Path, last: int) -> dict[int, Path]:
    """Return step -> file of the snapshots up to a step, in order; damaged ones are reported and skipped."""
    intact = {}
    for step, path in _all(folder):
        if step > last:
            continue
        try:
            damaged = not checkpoint.sha256(path).startswith(path.name.split(".")[1])
        except OSError:
            damaged = True
        if damaged:
            print(f"snapshot {path} is damaged (it does not match its checksum); going on without it")
        else:
            intact[step] = path
    return intact


def drop_after(folder: Path, step: int) -> None:
    """Delete the snapshots of later steps than `step`, and half-written ones of killed processes."""
    for later, path in _all(folder):
        if later > step:
            path.unlink()
    for left in folder.glob(".*.safetensors"):
        left.unlink()


def inherit(folder: Path, parent: Path, step: int) -> None:
    """Hard-link (or copy) into a run the snapshots, up to a step, of the parent run that it extends."""
    for earlier, path in _all(parent):
        if earlier <= step and not (folder / path.name).exists():
            folder.mkdir(parents=True, exist_ok=True)
            try:
                os.link(path, folder / path.name)
            except OSError:  # a file system without links
                with replacing(folder / path.name, durable=True) as temporary:
                    shutil.copy2(path, temporary)


def _all(folder: Path) -> list[tuple[int, Path]]:
    named = [(match, path) for path in folder.glob("*.safetensors") if (match := NAME.fullmatch(path.name))]
    return sorted((int(match[1]), path) for match, path in named)
