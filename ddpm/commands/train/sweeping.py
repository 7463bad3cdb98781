"""Sweeps under any Hydra launcher: outcomes of the jobs, and signal handling."""

import contextlib
import os
import signal
import sys
from collections.abc import Callable, Iterator
from typing import Any

from hydra.core.plugins import Plugins

from ddpm.commands.console import in_one_line, say
from ddpm.commands.launch import jobs_at_once
from ddpm.commands.train.cluster import Outcome, awaiting


@contextlib.contextmanager
def collecting(outcomes: list[Outcome]) -> Iterator[None]:
    """Context that collects the outcomes of a sweep's jobs, whatever launcher returns them.

    Jobs whose run was locked by another process are launched once more at the end. A launcher that loses its processes
    is an outcome too.
    """
    make = Plugins.instantiate_sweeper

    def instantiate_sweeper(plugins: Plugins, **settings: Any) -> Any:
        sweeper = make(plugins, **settings)
        sweep = sweeper.sweep

        def swept(arguments: list[str]) -> Any:
            with awaiting(sweeper.launcher):
                return _swept(sweeper, sweep, arguments, outcomes)

        sweeper.sweep = swept  # type: ignore[method-assign]
        return sweeper

    Plugins.instantiate_sweeper = instantiate_sweeper  # type: ignore[assignment, method-assign]
    try:
        yield
    finally:
        Plugins.instantiate_sweeper = make  # type: ignore[method-assign]


def _swept(sweeper: Any, sweep: Callable[[list[str]], Any], arguments: list[str], outcomes: list[Outcome]) -> Any:
    """Run a sweep and return its jobs, see `collecting`.

    At SIGINT or SIGTERM the workers of a launcher are asked to write their checkpoints, and the sweep ends when they
    have; at the second one it ends at once. Without workers the run of this process has its own way to end.
    """
    received: list[int] = []
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def end(signum: int, frame: object) -> None:
        if signum == signal.SIGINT:
            raise KeyboardInterrupt
        sys.exit(128 + signum)

    def note(signum: int, frame: object) -> None:
        workers = _workers()
        if not workers:
            end(signum, frame)
        received.append(signum)
        say(f"{signal.Signals(signum).name}: the runs write their checkpoints; interrupt again to stop at once")
        for number in before:
            signal.signal(number, end)
        for process in workers:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGTERM)

    for number in before:
        signal.signal(number, note)
    try:
        returned = [job for batch in sweep(arguments) for job in batch]
        locked = [job for job in returned if job.return_value is not None and job.return_value.held]
        if locked and not received:
            say(f"{len(locked)} runs were locked by other processes: trying each once more")
            again = sweeper.launcher.launch([job.overrides for job in locked], initial_job_idx=len(returned))
            returned = [job for job in returned if job not in locked] + list(again)
        alike = set.intersection(*(set(job.overrides) for job in returned)) if len(returned) > 1 else set()
        for job in returned:
            if job.return_value is not None:
                name = in_one_line(" ".join(word for word in job.overrides if word not in alike))
                outcomes.append(job.return_value._replace(name=name))
        return returned
    except _lost_processes() as error:
        reason = f"the launcher lost a process: {_first_line(error)}; the same command resumes what is missing"
        say(f"FAILED {reason}")
        outcomes.append(Outcome(reason, False, "the sweep"))
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if received:
            say("interrupted; the same command resumes")
            sys.exit(128 + received[0])


class _Worker:
    """State of a launcher's worker process, which runs several jobs one after the other."""

    def __init__(self) -> None:
        self.ending = False  # after a signal: the remaining jobs are not started

    def note(self, signum: int, frame: object) -> None:
        """Handle a signal that arrives between runs."""
        self.ending = True


_WORKER = _Worker()


def worker_of_a_launcher() -> _Worker | None:
    """Return the state of this process if it is a parallel launcher's worker, after installing its signal handlers."""
    if jobs_at_once() is None:
        return None
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _WORKER.note)
    return _WORKER


def _workers() -> list[int]:
    """Return the process ids of the joblib launcher's workers."""
    if "joblib" not in sys.modules:
        return []
    from joblib.externals.loky import reusable_executor

    executor = reusable_executor._executor
    return [] if executor is None else list(executor._processes or {})


def _lost_processes() -> tuple[type[Exception], ...]:
    """Return the exceptions that launchers raise if the system killed a worker, for example for lack of memory."""
    kinds: list[type[Exception]] = []
    if "joblib" in sys.modules:
        from joblib.externals.loky.process_executor import TerminatedWorkerError

        kinds.append(TerminatedWorkerError)
    return tuple(kinds)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
