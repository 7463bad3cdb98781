"""How a command was started: the overrides that were typed, and Hydra's view of the job and its sweep."""

import contextlib
import os
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ddpm.config import InvalidInput, compose, with_known_keys

_replacements: list[list[str]] = []  # stack of overrides that replace the job's own


@contextlib.contextmanager
def standing_for(words: list[str]) -> Iterator[None]:
    """Context in which `overrides` returns these words: those of a run that the job trains first."""
    _replacements.append(words)
    try:
        yield
    finally:
        _replacements.pop()


def multirun() -> bool:
    """Whether this job is one of a sweep."""
    return HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN


def overrides() -> list[str]:
    """Return the overrides typed for this job, without those of Hydra itself; [] if Hydra started no job."""
    if _replacements:
        return list(_replacements[-1])
    config: Any = HydraConfig.instance().cfg
    if config is None:
        return []
    words: Any = OmegaConf.to_container(config.hydra.overrides.task, resolve=False)  # interpolations are left as typed
    return list(map(str, words))


def job_number() -> int | None:
    """Return the index of this job in its sweep, from 0; None without a sweep."""
    config: Any = HydraConfig.instance().cfg
    return OmegaConf.select(config, "hydra.job.num") if multirun() else None


class Sweep:
    """The jobs of a sweep that this process runs.

    Args:
        jobs: the overrides of each, by job number.
    """

    def __init__(self, jobs: list[list[str]]):
        self.jobs = jobs
        self.taken = set[int]()  # numbers of jobs that were considered for a stack
        self.failed = set[int]()  # numbers of jobs whose run failed in a stack


_sweep = Sweep([])


def note_sweep(jobs: list[list[str]]) -> None:
    """Store the overrides of every job of the sweep, before the first job starts."""
    global _sweep
    _sweep = Sweep(jobs)


def sweep() -> Sweep:
    """Return the sweep of this process; it has no jobs in a single run, or in a launcher's worker."""
    return _sweep


def jobs_at_once() -> int | None:
    """Return how many jobs the launcher runs in parallel on this machine; None for all launchers but joblib's."""
    config: Any = HydraConfig.instance().cfg
    launcher = None if config is None else OmegaConf.select(config, "hydra.launcher")
    if launcher is None or not str(launcher.get("_target_")).startswith("hydra_plugins.hydra_joblib_launcher."):
        return None
    n, cores = launcher.get("n_jobs") or 1, os.cpu_count() or 1
    return max(1, n if n > 0 else cores + 1 + n)


def job_name() -> str:
    """Return the name of this job in its sweep: its overrides."""
    return " ".join(overrides()) or "defaults"


def command(verb: str) -> str:
    """Return the shell command for ddpm-VERB: its script in a checkout, else the console script."""
    own = (Path.cwd() / "experiments" / f"{verb}.py").is_file()
    return f"python experiments/{verb}.py" if own else f"ddpm-{verb}"


def word(key: str, value: object) -> str:
    """Return KEY=VALUE quoted for Hydra and a shell, for a value of any characters."""
    text, plain = str(value), r"[^\s,'\"\[\]{}()=:~#&;<>!`\\^]+"
    if not re.fullmatch(rf"{plain}( {plain})*", text):
        text = "'" + text.replace("'", "\\'") + "'"
    return shlex.quote(f"{key}={text}")


def training_command(words: list[str]) -> str:
    """Return the shell command that trains with these overrides."""
    return f"{command('train')} {shlex.join(words)}"


def composed(name: str, words: list[str]) -> DictConfig:
    """Return the configuration of overrides typed to ddpm-study, for one process and a run without a parent."""
    from ddpm.training import ranks

    if ranks.started():
        raise InvalidInput("this runs in one process: start it without torchrun")
    try:
        config = compose(name, words)
        extend, *_ = (config[key] for key in ("extend", "retry", "device"))  # read before all is resolved
    except InvalidInput as error:
        raise InvalidInput(with_known_keys(name, str(error), words)) from error
    except OmegaConfBaseException as error:
        raise InvalidInput(str(error).splitlines()[0]) from error
    if extend is not None:
        raise InvalidInput(f"extend={extend} cannot be used here; init={extend} starts from its weights")
    if "teacher" in config and config.teacher is not None:
        raise InvalidInput(f"teacher={config.teacher} cannot be used here: a student is trained by ddpm-train alone")
    return config
