"""Run directories: named by the hash of the settings that determine a result, with status, lock and metrics."""

import contextlib
import hashlib
import json
import math
import os
import platform
import subprocess
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import filelock

from ddpm.runs import checkpoint
from ddpm.runs.files import is_number, read_json, regular_size, replacing, shortened

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

FORMAT = 1
LARGEST_METRICS = 128 * 2**20  # bytes of metrics.jsonl, for nearly a million lines
NAMED = 5  # damaged lines that are reported one by one; the rest are counted
PATIENCE = 1.0  # seconds; a process that only inspects a run locks it for a moment, which must not block a start
STATES = RUNNING, DONE, FAILED, INTERRUPTED = "RUNNING", "DONE", "FAILED", "INTERRUPTED"


class RunIsHeld(Exception):
    """Raised when another process, named by `holder`, has locked the run."""

    def __init__(self, path: Path, status: dict[str, Any]):
        self.path, self.holder = path, f"process {status.get('pid')} on {status.get('host')}"
        super().__init__(f"{path} is being trained by {self.holder}")


def science_hash(science: dict[str, Any]) -> str:
    """Return twelve hexadecimal digits that identify all settings that a result depends on."""
    text = json.dumps(science, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


class Run:
    """A run directory.

    Args:
        path: DIR/NAME/<hash>.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def hash(self) -> str:
        return self.path.name

    def status(self) -> dict[str, Any]:
        """Return status.json, with INTERRUPTED for RUNNING if no process has the lock; {} if the run never began.

        Raises: ValueError if a newer version wrote it.
        """
        status = self._stored()
        if status.get("state") == RUNNING and not self._is_locked():
            status |= {"state": INTERRUPTED, "reason": "the process ended without recording a reason"}
        return status

    def _stored(self) -> dict[str, Any]:
        """Return status.json as stored; {} if it is missing or unreadable: the checkpoints have all that matters."""
        path = self.path / "status.json"
        try:
            status = read_json(path)
        except FileNotFoundError:
            return {}
        except ValueError as error:
            print(f"{error}; the checkpoints show how far the run is")
            return {}
        if not _is_status(status):
            print(f"{path} is not the status of a run; the checkpoints show how far it is")
            return {}
        found = status.get("format")
        if isinstance(found, int) and found > FORMAT:
            raise ValueError(
                f"run {self.path} was written by a newer version: its format {found} is newer than {FORMAT}, the "
                "newest that this version knows"
            )
        return status

    def write_status(self, state: str, **fields: Any) -> None:
        """Update status.json with a state and these fields."""
        status = dict.fromkeys(("state", "reason", "traceback", "step", "seconds", "started", "ended"))
        status |= self._stored() | {"state": state, "hash": self.hash, "format": FORMAT, **fields}
        with replacing(self.path / "status.json", durable=True) as temporary:
            temporary.write_text(json.dumps(status, indent=1))

    def begin(self, **facts: Any) -> None:
        """Write status.json for a process that starts or resumes, with further facts of the run."""
        self.write_status(
            RUNNING,
            started=now(),
            ended=None,
            reason=None,
            traceback=None,
            host=platform.node(),
            pid=os.getpid(),
            commit=git_commit(),
            **facts,
        )

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Lock the run for the duration of the block; the system releases the lock if the process dies.

        Raises: RunIsHeld with the holder's host and process.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        path = self.path / "run.lock"
        if path.is_symlink():  # old versions of filelock follow it and truncate its target
            path.unlink()
        lock = filelock.FileLock(path)
        try:
            lock.acquire(timeout=PATIENCE, poll_interval=0.01)
        except filelock.Timeout:
            raise RunIsHeld(self.path, self.status()) from None
        try:
            yield
        finally:
            lock.release()

    def _is_locked(self) -> bool:
        if (self.path / "run.lock").is_symlink():  # not our lock, see `locked`
            return False
        lock = filelock.FileLock(self.path / "run.lock")
        try:
            lock.acquire(timeout=PATIENCE / 10, poll_interval=0.01)
        except (filelock.Timeout, OSError):
            return True
        lock.release()
        return False


class Metrics:
    """Writer of metrics.jsonl and of the same values to TensorBoard; lines after the resumed step are dropped.

    Args:
        folder: the run directory.
        step: the step that the run resumes from; 0 for a new run.
    """

    def __init__(self, folder: Path, step: int):
        self.path, self.step = folder / "metrics.jsonl", step
        earlier = [line for line in read_metrics(folder) if line["step"] <= step]
        with replacing(self.path, durable=True) as temporary:
            temporary.write_text("".join(json.dumps(line) + "\n" for line in earlier))
        self.file = open(self.path, "a")  # noqa: SIM115

    @cached_property
    def board(self) -> "SummaryWriter":
        """The TensorBoard writer, made for the first line: its import takes longer than many first steps."""
        from torch.utils.tensorboard import SummaryWriter

        return SummaryWriter(str(self.path.parent / "tensorboard"), purge_step=self.step + 1)

    def write(self, step: int, split: str, **values: float | None) -> None:
        """Append one line; numbers that are not finite become null."""
        values = {k: v if v is not None and math.isfinite(v) else None for k, v in values.items()}
        self.file.write(json.dumps({"step": step, "split": split, **values}) + "\n")
        self.file.flush()
        for name, value in values.items():
            if value is not None:
                self.board.add_scalar(f"{split}/{name}", value, step)

    def flush(self) -> None:
        """Wait until all lines are on disk; called before the checkpoint of their steps is written."""
        os.fsync(self.file.fileno())

    def close(self) -> None:
        self.file.close()
        self.board.close()


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """Return the lines of metrics.jsonl; a last line that was cut off, and damaged ones (reported), are left out.

    Raises: ValueError if it is not a regular file, or too large.
    """
    path, found, damaged = folder / "metrics.jsonl", [], []
    try:
        size = regular_size(path, LARGEST_METRICS)
    except FileNotFoundError:
        return []
    with open(path, "rb") as file:
        *whole, _ = file.read(size).split(b"\n")
    for number, line in enumerate(whole, 1):
        try:
            values = json.loads(line)
        except (ValueError, RecursionError):
            values = None
        if _is_of_metrics(values):
            found.append(values)
        else:
            damaged.append(number)
    for number in damaged[:NAMED]:
        print(f"{path}, line {number} cannot be read and is left out")
    if len(damaged) > NAMED:
        print(f"{path}: so are {len(damaged) - NAMED:,} more of its {len(whole):,} lines")
    return found


def held_out_lines(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the held-out lines measured on as many samples ("n") as the last one: others are not comparable.

    Runs begun by an earlier version have lines without "n", measured on the first samples, not on evenly spaced ones.
    """
    held_out = [line for line in lines if line["split"] == "held_out"]
    return [line for line in held_out if line.get("n") == held_out[-1].get("n")]


def _is_of_metrics(values: Any) -> bool:
    """Whether values are a line of metrics: a step, the name of a split, and numbers or null, among them the loss."""
    if not isinstance(values, dict) or not {"step", "split", "loss"} <= values.keys():
        return False
    if not _is_count(values["step"]) or not isinstance(values["split"], str):
        return False
    numbers = [value for key, value in values.items() if key != "split" and value is not None]
    return all(is_number(value) for value in numbers)


def _is_status(status: Any) -> bool:
    """Whether status is a dictionary with a state as text, and valid step and seconds where it has any."""
    if not isinstance(status, dict) or not isinstance(status.get("state"), str):
        return False
    step, seconds = status.get("step"), status.get("seconds")
    return (step is None or _is_count(step)) and (seconds is None or is_number(seconds))


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63


def open_run(path: str | Path, which: str | int = "last", key: str = "run") -> tuple[Run, Path]:
    """Open a run and one of its checkpoints.

    Args:
        path: the run directory.
        which: "last", "best", or a step.
        key: the option that the path came from, for error messages.
    Returns: the run, and the checkpoint's folder, verified.
    Raises: FileNotFoundError if there is no run, or no (whole) checkpoint in it.
    """
    run = Run(path)
    if not (run.path / "config.yaml").is_file():
        raise FileNotFoundError(f"{key}={path}: no config.yaml there, so this is no run directory")
    if which == "last":
        found = checkpoint.last_whole(run.checkpoints)
    else:
        step = checkpoint.best(run.checkpoints) if which == "best" else which
        there = [str(n) for n in checkpoint.steps(run.checkpoints)]
        found = run.checkpoints / str(step) if step is not None else None
        damage = found and (checkpoint.verify(found) if str(step) in there else "there is none of that name")
        if damage:
            names = ", ".join(there) or "none"
            requested = shortened(str(which))
            raise FileNotFoundError(f"{key}={path}: checkpoint {requested} cannot be read ({damage}); there: {names}")
    if found is None:
        raise FileNotFoundError(f"{key}={path}: no whole checkpoint in {run.checkpoints}; train it further first")
    return run, found


def now() -> str:
    """Return the current UTC time in ISO 8601."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def git_commit() -> str | None:
    """Return the commit of the running code, with a plus sign if files changed since; None outside a checkout."""

    def git(*words: str) -> str:
        return subprocess.run(
            ["git", "-C", str(Path(__file__).parent), *words], capture_output=True, text=True, check=True, timeout=10
        ).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", Path(__file__).name)  # else it is another project's repository
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None


class Stopwatch:
    """Clock of the seconds used by a run, including those of earlier processes."""

    def __init__(self, before: float = 0.0):
        self.start = time.monotonic() - before

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.start
