"""Runs: a directory named by the hash of its science, with its state, its lock and its metrics."""

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
NAMED = 5  # damaged lines that are named; the rest are counted
PATIENCE = 1.0  # seconds; who only looks at a run has its lock for a moment, and must not keep it from starting
STATES = RUNNING, DONE, FAILED, INTERRUPTED = "RUNNING", "DONE", "FAILED", "INTERRUPTED"


class RunIsHeld(Exception):
    """Another process has this run: `holder` says which."""

    def __init__(self, path: Path, status: dict[str, Any]):
        self.path, self.holder = path, f"process {status.get('pid')} on {status.get('host')}"
        super().__init__(f"{path} is being trained by {self.holder}")


def science_hash(science: dict[str, Any]) -> str:
    """Twelve hexadecimal digits that name everything a result depends on."""
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
        """What status.json says; a RUNNING run that nobody holds is INTERRUPTED; {} if it never began.

        Raises: ValueError if a newer version wrote it.
        """
        status = self._stored()
        if status.get("state") == RUNNING and not self._held():
            status |= {"state": INTERRUPTED, "reason": "the process ended without a word"}
        return status

    def _stored(self) -> dict[str, Any]:
        """status.json as it is; {} if there is none, or it cannot be read: the checkpoints know all that matters."""
        path = self.path / "status.json"
        try:
            status = read_json(path)
        except FileNotFoundError:
            return {}
        except ValueError as error:
            print(f"{error}; the checkpoints tell how far the run is")
            return {}
        if not _is_status(status):
            print(f"{path} is not the status of a run; the checkpoints tell how far it is")
            return {}
        found = status.get("format")
        if isinstance(found, int) and found > FORMAT:
            raise ValueError(
                f"run {self.path} was written by a newer version: its format {found} is newer than {FORMAT}, the "
                "newest that this version knows"
            )
        return status

    def write_status(self, state: str, **fields: Any) -> None:
        """Write status.json: these fields over those that it has."""
        status = dict.fromkeys(("state", "reason", "traceback", "step", "seconds", "started", "ended"))
        status |= self._stored() | {"state": state, "hash": self.hash, "format": FORMAT, **fields}
        with replacing(self.path / "status.json", durable=True) as temporary:
            temporary.write_text(json.dumps(status, indent=1))

    def begin(self, **facts: Any) -> None:
        """Write status.json for a process that starts or resumes, with what else is to be known of the run."""
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
        """Hold the run for the life of the block; the system frees it if the process dies.

        Raises: RunIsHeld with the holder's host and process.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        path = self.path / "run.lock"
        if path.is_symlink():  # which old versions of filelock follow, and empty the file that is there
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

    def _held(self) -> bool:
        if (self.path / "run.lock").is_symlink():  # no lock of ours, see `locked`
            return False
        lock = filelock.FileLock(self.path / "run.lock")
        try:
            lock.acquire(timeout=PATIENCE / 10, poll_interval=0.01)
        except (filelock.Timeout, OSError):
            return True
        lock.release()
        return False


class Metrics:
    """metrics.jsonl and the same in TensorBoard; lines after the step that a run resumes from are dropped.

    Args:
        folder: the run directory.
        step: the last step that counts; 0 for a new run.
    """

    def __init__(self, folder: Path, step: int):
        self.path, self.step = folder / "metrics.jsonl", step
        kept = [line for line in read_metrics(folder) if line["step"] <= step]
        with replacing(self.path, durable=True) as temporary:
            temporary.write_text("".join(json.dumps(line) + "\n" for line in kept))
        self.file = open(self.path, "a")  # noqa: SIM115

    @cached_property
    def board(self) -> "SummaryWriter":
        """TensorBoard's file, made for the first line: its import takes longer than many first steps."""
        from torch.utils.tensorboard import SummaryWriter

        return SummaryWriter(str(self.path.parent / "tensorboard"), purge_step=self.step + 1)

    def write(self, step: int, split: str, **values: float | None) -> None:
        """One line; numbers that are not finite become null."""
        values = {k: v if v is not None and math.isfinite(v) else None for k, v in values.items()}
        self.file.write(json.dumps({"step": step, "split": split, **values}) + "\n")
        self.file.flush()
        for name, value in values.items():
            if value is not None:
                self.board.add_scalar(f"{split}/{name}", value, step)

    def flush(self) -> None:
        """Wait until all lines are on disk: before a checkpoint, whose steps they belong to."""
        os.fsync(self.file.fileno())

    def close(self) -> None:
        self.file.close()
        self.board.close()


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl; a last line that was cut off is left out, as are damaged ones, with a message.

    Raises: ValueError if it is no file, or beyond reason in size.
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
    """Those of losses on held-out data that are of as many samples as the last one ("n"): others are no comparison.

    A run that an earlier version began has lines of the first samples instead of evenly spread ones, without "n".
    """
    held_out = [line for line in lines if line["split"] == "held_out"]
    return [line for line in held_out if line.get("n") == held_out[-1].get("n")]


def _is_of_metrics(values: Any) -> bool:
    """Whether these are a step, the name of a part of the data, and numbers or null, a loss among them."""
    if not isinstance(values, dict) or not {"step", "split", "loss"} <= values.keys():
        return False
    if not _is_count(values["step"]) or not isinstance(values["split"], str):
        return False
    numbers = [value for key, value in values.items() if key != "split" and value is not None]
    return all(is_number(value) for value in numbers)


def _is_status(status: Any) -> bool:
    """Whether this is a state in a word, and a step and seconds where a run has any."""
    if not isinstance(status, dict) or not isinstance(status.get("state"), str):
        return False
    step, seconds = status.get("step"), status.get("seconds")
    return (step is None or _is_count(step)) and (seconds is None or is_number(seconds))


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63


def open_run(path: str | Path, which: str | int = "last", key: str = "run") -> tuple[Run, Path]:
    """A run that has something to sample from.

    Args:
        path: the run directory.
        which: "last", "best", or a step.
        key: by which the path was given, for messages.
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
            asked = shortened(str(which))
            raise FileNotFoundError(f"{key}={path}: checkpoint {asked} cannot be read ({damage}); there: {names}")
    if found is None:
        raise FileNotFoundError(f"{key}={path}: no whole checkpoint in {run.checkpoints}; train it further first")
    return run, found


def now() -> str:
    """The time, in UTC, ISO 8601."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def git_commit() -> str | None:
    """The commit of the code that runs, with a plus sign if it was changed since; None outside a checkout."""

    def git(*words: str) -> str:
        return subprocess.run(
            ["git", "-C", str(Path(__file__).parent), *words], capture_output=True, text=True, check=True, timeout=10
        ).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", Path(__file__).name)  # else the repository is somebody else's
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None


class Stopwatch:
    """Seconds used, those of earlier processes included."""

    def __init__(self, before: float = 0.0):
        self.start = time.monotonic() - before

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.start
