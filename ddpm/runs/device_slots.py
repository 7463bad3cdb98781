"""Slots: each of several jobs that run at once on a machine takes a share of it, device and threads, by a lock file."""

import contextlib
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import filelock

INTERVAL = 0.2  # seconds between two looks for a slot that has become free


class Slot(NamedTuple):
    """A share of a machine."""

    device: str
    threads: int


@contextlib.contextmanager
def taken(devices: Sequence[str], each: int, say: Callable[[str], None]) -> Iterator[Slot]:
    """Hold a slot for the life of the block, after waiting for one if all are taken; those of the dead are free.

    Devices are filled evenly. The locks are files in a folder of the user's in the system's temporary one, so they hold
    for all sweeps of a user on a machine. Nothing here touches a device.

    Args:
        devices: names such as "cuda:0" or "cpu".
        each: slots of a device, at least 1.
        say: is told of a wait, once.
    Raises: ValueError if `each` is less than 1.
    """
    if each < 1:
        raise ValueError(f"slots = {each} must be at least 1")
    threads = max(1, (os.cpu_count() or 1) // (each * len(devices)))
    ranked = [(_lock(device, number), device) for number in range(each) for device in devices]
    lock, device = _first_free(ranked, say)
    try:
        yield Slot(device, threads)
    finally:
        lock.release()


def _first_free(
    ranked: list[tuple[filelock.FileLock, str]], say: Callable[[str], None]
) -> tuple[filelock.FileLock, str]:
    """The first lock that can be had, held, and its device."""
    waiting = False
    while True:
        for lock, device in ranked:
            with contextlib.suppress(filelock.Timeout):
                lock.acquire(timeout=0)
                return lock, device
        if not waiting:
            say(f"all {len(ranked)} slots are taken: waiting for one")
            waiting = True
        time.sleep(INTERVAL)


def _lock(device: str, number: int) -> filelock.FileLock:
    folder = Path(tempfile.gettempdir()) / f"ddpm-slots-{os.getuid() if hasattr(os, 'getuid') else 'user'}"
    folder.mkdir(mode=0o700, exist_ok=True)
    return filelock.FileLock(folder / f"{_physical(device)}-{number}.lock")


def _physical(device: str) -> str:
    """What a device is called whatever CUDA_VISIBLE_DEVICES makes of it in this process."""
    kind, _, index = device.partition(":")
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if kind == "cuda" and visible:
        names = visible.split(",")
        number = int(index or 0)
        index = names[number].strip() if number < len(names) else index
    return f"{kind}{index}".replace("/", "_")
