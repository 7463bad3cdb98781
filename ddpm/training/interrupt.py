"""Signal handling: training ends with a checkpoint, everything else with an exception."""

import contextlib
import signal
import sys
from collections.abc import Iterator
from typing import Any


class Interrupted(Exception):
    """Raised when a signal ended training, after a checkpoint was written, or ended what follows training."""

    def __init__(self, signum: int):
        super().__init__(f"interrupted by {signal.Signals(signum).name}")
        self.signum = signum


@contextlib.contextmanager
def terminable() -> Iterator[None]:
    """Raise Interrupted on SIGTERM within the context; without effect outside the main thread."""

    def end(signum: int, frame: object) -> None:
        raise Interrupted(signum)

    try:
        before = signal.signal(signal.SIGTERM, end)
    except ValueError:
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def signals() -> Iterator[list[int]]:
    """Collect SIGINT, SIGTERM, and a SIGUSR2 that has a handler, instead of ending at the first.

    The second has its usual effect. A cluster's launcher gives notice by SIGUSR2 (submitit does, and starts the job
    anew); where it set no handler, that signal is left alone. Outside the main thread, where Python cannot catch any,
    nothing is collected.
    """
    received: list[int] = []

    def note(signum: int, frame: object) -> None:
        received.append(signum)
        signal.signal(signum, before[signum])
        print(f"\n{signal.Signals(signum).name}: writing a checkpoint; once more to stop at once", file=sys.stderr)

    before: dict[int, Any] = {}
    with contextlib.suppress(ValueError):
        for name in ("SIGINT", "SIGTERM", "SIGUSR2"):
            number = getattr(signal, name, None)  # Windows has no SIGUSR2
            if number is not None and (name != "SIGUSR2" or callable(signal.getsignal(number))):
                before[number] = signal.signal(number, note)
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
