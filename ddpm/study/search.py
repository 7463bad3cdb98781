"""Hyperparameter search: the space, the overrides of a trial, and the Optuna study on disk that processes share."""

import contextlib
import logging
import math
import os
import platform
import re
import uuid
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import filelock

from ddpm.runs.files import shortened

if TYPE_CHECKING:
    import optuna

EXAMPLE = "'search.space={optimizer.lr:{low:1e-4,high:1e-1,log:true},trainer.batch_size:{choices:[32,64]}}'"
LONGEST = 120  # characters of a setting in a message
UNREADABLE = (ValueError, KeyError, TypeError, AttributeError, AssertionError)  # what a broken journal raises


class StudyRefused(Exception):
    """Raised when the study on disk cannot be continued, with the reason."""


def space(ranges: Any) -> dict[str, Any]:
    """Return dotted key -> Optuna's distribution, from nested or dotted keys.

    Args:
        ranges: key -> {low, high}, with log: true or step: S; or {choices: [...]}. Integers where both ends are.
    Raises: ValueError for anything else.
    """
    if not isinstance(ranges, dict | None):
        raise ValueError(f"it is {ranges}, but ranges are needed, such as {EXAMPLE}")
    distributions = {}
    for key, value in _leaves(ranges or {}):
        try:
            distributions[key] = _distribution(value)
        except ValueError as error:
            raise ValueError(f"{key}: {error}") from error
    return distributions


def _leaves(node: dict[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in node.items():
        if isinstance(value, dict) and value and all(isinstance(inner, dict) for inner in value.values()):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _distribution(node: Any) -> Any:
    """Return the distribution of a range of numbers, or of choices."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if not isinstance(node, dict) or not (node.keys() == {"choices"} or {"low", "high"} <= node.keys()):
        raise ValueError(f"{node} must be {{low: L, high: H}}, with log: true or step: S, or {{choices: [...]}}")
    if "low" not in node:
        values = node["choices"]
        words = tuple(dict.fromkeys(map(word, values))) if isinstance(values, list) else ()
        if len(words) < 2:
            raise ValueError(f"choices={values} must be a list of two values or more")
        return CategoricalDistribution(words)
    if unknown := node.keys() - {"low", "high", "log", "step"}:
        raise ValueError(f"{', '.join(map(str, unknown))} is not known; allowed: low, high, log, step")
    low, high, log, step = node["low"], node["high"], node.get("log", False), node.get("step")
    numbers = [low, high] if step is None else [low, high, step]
    if any(isinstance(x, bool) or not isinstance(x, int | float) or not math.isfinite(x) for x in numbers):
        raise ValueError(f"low, high and step must be finite numbers, not {', '.join(map(str, numbers))}")
    if not low < high:
        raise ValueError(f"low={low} must be less than high={high}")
    if not isinstance(log, bool) or (log and low <= 0):
        raise ValueError(f"log={log} with low={low}: log is true or false, and needs low > 0")
    whole = isinstance(low, int) and isinstance(high, int)
    if step is not None and (log or step <= 0 or (whole and step % 1)):
        raise ValueError(f"step={step} must be > 0, whole between whole numbers, and not be given with log")
    if whole:
        return IntDistribution(low, high, log=log, step=int(step or 1))
    return FloatDistribution(low, high, log=log, step=step)


def word(value: Any) -> str:
    """Format a value as it is typed after KEY=."""
    if isinstance(value, list):
        return f"[{','.join(map(word, value))}]"
    if isinstance(value, dict):
        return f"{{{','.join(f'{key}:{word(inner)}' for key, inner in value.items())}}}"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    text = str(value)
    named = re.fullmatch(r"[A-Za-z_][\w./-]*", text) and text.lower() not in ("null", "true", "false", "nan", "inf")
    quoted = text.replace("\\", "\\\\").replace("'", "\\'")
    return text if named or isinstance(value, int | float) else f"'{quoted}'"


@dataclass(frozen=True)
class Search:
    """Settings of a search."""

    fixed: tuple[str, ...]  # the overrides that all trials share
    space: dict[str, Any]
    trials: int
    measure: str
    maximise: bool
    sampler: str  # tpe, random
    pruner: str  # median, halving, none
    seed: int

    def chosen(self, params: dict[str, Any]) -> list[str]:
        """Return the overrides for the parameters of a trial."""
        return [f"{key}={params[key]}" for key in self.space]

    def words(self, params: dict[str, Any]) -> list[str]:
        """Return all overrides of the run of a trial."""
        return [*self.fixed, *self.chosen(params)]

    def ends(self) -> list[list[str]]:
        """Return the overrides of runs at the border of the space, which cover each choice and each end of a range."""
        values = {key: getattr(of, "choices", None) or (of.low, of.high) for key, of in self.space.items()}
        count = max(map(len, values.values()))
        return [self.words({key: of[min(i, len(of) - 1)] for key, of in values.items()}) for i in range(count)]


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Context in which Optuna logs nothing, and gives no warnings about experimental features."""
    import optuna

    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"optuna(\..*)?")
            warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
            yield
    finally:
        optuna.logging.set_verbosity(before)


class Worker:
    """A process that works on the study <folder>/optuna.log, alone or with others.

    It holds a lock for its lifetime, whose name is stored with its trials: a running trial whose lock is free was left
    by a process that died, and is begun again under another number, from the checkpoint of its run.

    Args:
        settings: of all trials, which must stay the same in a study, as its space, measure and direction.
        retry: also repeat failed trials.
    Raises: StudyRefused, on entering.
    """

    def __init__(self, folder: Path, search: Search, settings: dict[str, Any], retry: bool):
        self.folder, self.search, self.retry = folder, search, retry
        self.contract = settings | {
            "search.space": {key: str(distribution) for key, distribution in search.space.items()},
            "search.measure": search.measure,
            "search.direction": "maximize" if search.maximise else "minimize",
        }
        folder.mkdir(parents=True, exist_ok=True)
        self.name = f"{platform.node()}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
        self.lock = filelock.FileLock(folder / "optuna.lock")  # of the journal too; reentrant
        self.life = filelock.FileLock(self._lifetime_lock(self.name))

    def __enter__(self) -> "Worker":
        self.life.acquire()
        try:
            with self.lock:
                self.study = self._study()
                if self.retry:
                    self._enqueue([t for t in self.trials() if t.state.name == "FAIL"])
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        self.life.release()
        self._lifetime_lock(self.name).unlink(missing_ok=True)

    def _lifetime_lock(self, name: str) -> Path:
        return self.folder / f"optuna.{name}.lock"

    def _study(self) -> "optuna.Study":
        """Return the study on disk, or a new one."""
        import optuna
        from optuna.pruners import MedianPruner, NopPruner, SuccessiveHalvingPruner
        from optuna.storages import JournalStorage
        from optuna.storages.journal import JournalFileBackend

        log, name = self.folder / "optuna.log", self.folder.name
        pruner = {"median": MedianPruner, "halving": SuccessiveHalvingPruner, "none": NopPruner}[self.search.pruner]()
        _mend(log)
        lock: Any = self.lock  # ours: Optuna's own would outlive a process that is killed
        try:
            storage = JournalStorage(JournalFileBackend(str(log), lock_obj=lock))
            known = name in optuna.get_all_study_names(storage)
            study = optuna.load_study(study_name=name, storage=storage, pruner=pruner) if known else None
            differs = self._differs(study.user_attrs.get("contract") or {}) if study is not None else ""
        except UNREADABLE as error:
            raise StudyRefused(f"{log} cannot be read as a study of Optuna ({error}); move it away") from error
        if study is not None and differs:
            if any(t.state.is_finished() or self._alive(t) for t in study.get_trials(deepcopy=False)):
                raise StudyRefused(
                    f"{log} has trials by other settings, which cannot be compared ({differs}); repeat their command, "
                    "or choose another study=NAME"
                )
            optuna.delete_study(study_name=name, storage=storage)  # no trial has finished yet
            study = None
        if study is None:
            direction = self.contract["search.direction"]
            study = optuna.create_study(study_name=name, storage=storage, direction=direction, pruner=pruner)
            study.set_user_attr("contract", self.contract)
        return study

    def _differs(self, known: dict[str, Any]) -> str:
        """Describe the settings of the contract that differ from the known ones."""
        pairs = {key: (known.get(key), now) for key, now in self.contract.items() if known.get(key) != now}
        return "; ".join(
            f"{k}: {shortened(str(a), LONGEST)} then, {shortened(str(b), LONGEST)} now" for k, (a, b) in pairs.items()
        )

    def trials(self) -> list[Any]:
        """Return the trials that count, in order: all but those continued under another number."""
        every = self.study.get_trials(deepcopy=False)
        begun_again = {t.user_attrs.get("continues") for t in every}
        return [t for t in every if t.number not in begun_again and t.state.name != "WAITING"]

    def next_trial(self) -> Any:
        """Return the next trial: one left by a process that died, else a new one; None when there are enough."""
        from optuna.samplers import RandomSampler, TPESampler

        from ddpm.randomness import generator

        with self.lock:
            self._enqueue([t for t in self.trials() if t.state.name == "RUNNING" and not self._alive(t)])
            number = len(self.trials())
            if number >= self.search.trials:
                return None
            # keyed by the number, so that a search that was interrupted proposes what it would have proposed
            seed = generator(self.search.seed, "search", number).initial_seed() % 2**32
            tpe = self.search.sampler == "tpe"
            self.study.sampler = (
                TPESampler(seed=seed, constant_liar=True, multivariate=True) if tpe else RandomSampler(seed=seed)
            )
            trial = self.study.ask(self.search.space)
            trial.set_user_attr("worker", self.name)
        return trial

    def _enqueue(self, trials: list[Any]) -> None:
        """Enqueue trials to be begun again."""
        from optuna.trial import TrialState

        for trial in trials:
            self.study.enqueue_trial(trial.params, user_attrs={"continues": trial.number})
            if not trial.state.is_finished():
                self.study.tell(trial.number, state=TrialState.FAIL)

    def _alive(self, trial: Any) -> bool:
        """Whether another live process runs a trial; none of our own runs when this is called."""
        name = trial.user_attrs.get("worker")
        if trial.state.name != "RUNNING" or not isinstance(name, str) or name == self.name:
            return False
        path = self._lifetime_lock(Path(name).name)
        try:
            with filelock.FileLock(path, timeout=0):
                path.unlink(missing_ok=True)
        except filelock.Timeout:
            return True
        return False


def _mend(log: Path) -> None:
    """Truncate an unfinished last line, left by a process that died: no other could be appended to it."""
    content = log.read_bytes() if log.is_file() else b""
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        os.truncate(log, whole)
