"""Jobs in a cluster's queue: detects when each has ended, by its run's files and the queue."""

import contextlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ddpm.commands.console import say

if TYPE_CHECKING:
    from ddpm.runs.directory import Run

LAUNCHER = "hydra_plugins.hydra_submitit_launcher."
LOOK = 1.0  # seconds between two checks of a job's files
SOON, SELDOM = 2.0, 10.0  # seconds between two queries of the queue, if a run seems to have ended, and otherwise
GRACE = 3.0  # seconds for a file to appear on a shared disk once the queue reports the end of its job
PATIENCE = 30.0  # the same, if the queue does not answer
OVER = {  # final states of SLURM
    "COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "BOOT_FAIL", "DEADLINE", "OUT_OF_MEMORY", "PREEMPTED",
    "REVOKED",
}  # fmt: skip
GONE = "no longer in the queue"  # state of a job that the queue does not list
ANEW = "SIGUSR2"  # in the reason of a run whose job will be restarted


class Outcome(NamedTuple):
    """The failure of a job."""

    reason: str
    held: bool = False  # its run is locked by another process, which trains it
    name: str = ""  # in a sweep: the overrides in which the job differs from others


class Returned(NamedTuple):
    """The result of a job, with the attributes that Hydra's launchers return."""

    overrides: list[str]
    return_value: Any


# ------------------------------------------------------------------------------------------------------ within a job


def note_run(path: Path) -> str | None:
    """Write the run's path next to the files of its cluster job; return the job's number, or None outside a job."""
    if "SUBMITIT_FOLDER" not in os.environ:
        return None
    import submitit

    job = submitit.JobEnvironment()
    _note_of(job.paths, job.job_id).write_text(str(path.resolve()))
    return str(job.job_id)


def _note_of(paths: Any, job: str) -> Path:
    return Path(paths.folder) / f"{job}_run.txt"


# ------------------------------------------------------------------------------------------ in the waiting process


class Queue:
    """The states of this user's SLURM jobs, cached between queries.

    Args:
        ask: returns the state of each job by its number; None without an answer.
        clock: returns seconds.
    """

    def __init__(self, ask: Callable[[], dict[str, str] | None], clock: Callable[[], float] = time.monotonic):
        self.ask, self.clock = ask, clock
        self.queried = -float("inf")
        self.states: dict[str, str] | None = None

    def state(self, job: str, every: float) -> str | None:
        """Return the state of a job, at most `every` seconds old; GONE if it is unknown, None without an answer."""
        if self.clock() - self.queried >= every:
            self.states = self.ask()
            self.queried = self.clock()
        return None if self.states is None else self.states.get(job, GONE)


def squeue() -> dict[str, str] | None:
    """Return job -> state for this user's jobs, including recently ended ones; needs no accounting.

    Returns: None if SLURM does not answer.
    """
    command = ["squeue", "--noheader", "--array", "--states=all", f"--user={os.getuid()}", "--format=%i %T"]
    try:
        output = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    return dict(line.split()[:2] for line in output.splitlines() if len(line.split()) >= 2)


class Awaited:
    """A submitted job, in place of submitit's own class.

    Without accounting submitit never learns that a job died. So a result file, once present, decides. Until then the
    run's status and lock count, and whether the queue still lists the job: a run that is interrupted at its time limit,
    or on a node that failed, resumes in the same job. Only if the queue does not answer and no run has started is
    submitit queried.

    Args:
        job: submitit's.
        overrides: of the job.
        queue: that it is in; None for processes on this machine, which submitit itself can observe.
        pause: waits the given seconds.
        clock: returns seconds.
    """

    def __init__(
        self,
        job: Any,
        overrides: list[str],
        queue: Queue | None,
        pause: Callable[[float], None] = time.sleep,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.job, self.overrides, self.queue, self.pause, self.clock = job, overrides, queue, pause, clock
        self.ended: float | None = None  # time since when it seems to be over

    def results(self) -> list[Any]:
        """Wait until the job is over; return a list with its result or its failure."""
        while not self._over():
            self.pause(LOOK)
        try:
            if not self.job.paths.result_pickle.exists():
                return [Returned(self.overrides, self._lost())]
            returned = self.job.results()[0]
            _ = returned.return_value  # raises the job's exception
            return [returned]
        except Exception as error:  # any class: it comes from the job
            return [Returned(self.overrides, Outcome(f"{_last_line(error)}; its log is {self.job.paths.stderr}"))]

    def run(self) -> "Run | None":
        """Return the run that the job trains, or trained last; None before it has one."""
        from ddpm.runs.directory import Run  # only now: it imports torch

        try:
            return Run(_note_of(self.job.paths, self.job.job_id).read_text())
        except OSError:
            return None

    def _over(self) -> bool:
        """Whether the job has ended."""
        from ddpm.runs.directory import RUNNING

        with contextlib.suppress(OSError):
            os.listdir(self.job.paths.folder)  # makes a shared disk show new files
        if self.job.paths.result_pickle.exists():
            return True
        status = self._status()
        rests = status.get("state") not in (None, RUNNING)
        state = None if self.queue is None else self.queue.state(self.job.job_id, SOON if rests else SELDOM)
        if state is not None:
            seems, wait = state.rstrip("+") in OVER | {GONE}, GRACE
        elif self.queue is None or not status:
            seems, wait = self.job.done(), GRACE
        else:
            seems, wait = rests and not _goes_on(status), PATIENCE
        self.ended = (self.clock() if self.ended is None else self.ended) if seems else None
        return self.ended is not None and self.clock() - self.ended >= wait

    def _status(self) -> dict[str, Any]:
        run = self.run()
        return {} if run is None else run.status()

    def _lost(self) -> Outcome | None:
        """Return why the job left no result; None if its run is done all the same."""
        from ddpm.runs.directory import DONE, INTERRUPTED

        run, status = self.run(), self._status()
        state = None if self.queue is None else self.queue.state(self.job.job_id, SELDOM)
        how = f"job {self.job.job_id}" + (f" ({state})" if state else "")
        if run is None or not status:
            return Outcome(f"{how} ended before its run began; its log is {self.job.paths.stderr}")
        if status["state"] == DONE:
            if not _unmeasured(run):
                return None
            return Outcome(f"{run.path} is trained, but {how} ended before it was measured; the same command resumes")
        if status["state"] == INTERRUPTED:
            at = f"{how} ended at step {status.get('step') or 0:,}"
            return Outcome(f"{run.path}: {at} ({status.get('reason')}); the same command resumes")
        reason = status.get("reason") or status["state"]
        return Outcome(f"{run.path}: {reason}; {how} ended; its log is {self.job.paths.stderr}")


def _goes_on(status: dict[str, Any]) -> bool:
    """Whether a run was interrupted and will be restarted by the cluster."""
    return ANEW in str(status.get("reason"))


def _unmeasured(run: "Run") -> bool:
    """Whether a run that is done lacks evaluations of its configuration."""
    from ddpm.runs.safe_yaml import read_settings
    from ddpm.study.reading import Recorded

    try:
        settings = read_settings(run.path / "config.yaml")
    except (OSError, ValueError):
        return False
    return bool(Recorded(run.path, settings, run.status(), {}, {}).unmeasured)


def _last_line(error: Exception) -> str:
    """Return the last line with letters of an exception's message, which may carry a log."""
    lines = [line.strip() for line in str(error).splitlines() if any(c.isalpha() for c in line)]
    own = [line for line in lines if not line.startswith("You can check full logs")]
    return (own or [type(error).__name__])[-1]


@contextlib.contextmanager
def awaiting(launcher: Any) -> Iterator[None]:
    """Context in which jobs of submitit's launchers are wrapped in `Awaited`; other launchers are left alone.

    Raises: SystemExit with 2 if this machine submits no jobs.
    """
    kind = f"{type(launcher).__module__}.{type(launcher).__name__}"
    if not kind.startswith(LAUNCHER):
        yield
        return
    slurm = kind.endswith("SlurmLauncher")
    if slurm and (missing := [name for name in ("sbatch", "srun", "squeue") if shutil.which(name) is None]):
        print(
            f"error: hydra/launcher=slurm submits jobs by SLURM, whose {', '.join(missing)} is not on this machine; "
            "on one machine hydra/launcher=joblib or submitit_local start several runs",
            file=sys.stderr,
        )
        sys.exit(2)
    import submitit

    executors: Any = submitit.AutoExecutor
    submit, queue = executors.map_array, Queue(squeue) if slurm else None

    def map_array(executor: Any, function: Any, *arguments: Any) -> list[Any]:
        words = [list(job) for job in arguments[0]]
        try:
            jobs = submit(executor, function, *arguments)
        except submitit.core.utils.UncompletedJobError as error:  # from sbatch: an unknown partition, for example
            print(f"error: the jobs were refused: {_last_line(error)}", file=sys.stderr)
            sys.exit(2)
        if slurm:
            numbers = ", ".join(sorted({job.job_id.partition("_")[0] for job in jobs}))
            folder = launcher.config.hydra.sweep.dir
            say(
                f"{len(jobs)} jobs are in the queue as {numbers}: squeue shows their progress, ddpm-study "
                f"status {folder} that of the runs; Ctrl-C leaves them there, scancel {numbers} "
                "ends them with checkpoints"
            )
        return [Awaited(job, job_words, queue) for job, job_words in zip(jobs, words, strict=True)]

    executors.map_array = map_array
    try:
        yield
    finally:
        executors.map_array = submit
