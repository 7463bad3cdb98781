"""Lock files by which concurrent jobs on one machine share its devices and threads."""

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
    """A share of a machine: a device and a number of threads."""

    device: str
    threads: int


@contextlib.contextmanager
def taken(devices: Sequence[str], each: int, say: Callable[[str], None]) -> Iterator[Slot]:
    """Hold a slot for the duration of the block, waiting while all are taken; a process that dies frees its slot.

    Devices are filled evenly. The locks are files in a per-user folder of the system's temporary directory, so they
    apply to all sweeps of a user on a machine. Nothing here touches a device.

    Args:
        devices: names such as "cuda:0" or "cpu".
        each: slots of a device, at least 1.
        say: called once with a message if the slot has to be waited for.
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
    """Acquire the first free lock; return it and its device."""
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
    """Return the physical name of a device, whatever CUDA_VISIBLE_DEVICES renumbers it to in this process."""
    kind, _, index = device.partition(":")
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if kind == "cuda" and visible:
        names = visible.split(",")
        number = int(index or 0)
        index = names[number].strip() if number < len(names) else index
    return f"{kind}{index}".replace("/", "_")
