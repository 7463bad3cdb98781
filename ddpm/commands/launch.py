"""How a command was started: the words that were typed, and what Hydra makes of them."""

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

_instead: list[list[str]] = []  # words of runs that stand for the job's own, the last one now


@contextlib.contextmanager
def standing_for(words: list[str]) -> Iterator[None]:
    """Within it these are the words of the job: of a run that it needs first."""
    _instead.append(words)
    try:
        yield
    finally:
        _instead.pop()


def multirun() -> bool:
    """Whether this job is one of a sweep."""
    return HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN


def overrides() -> list[str]:
    """The words that were typed for this job, without those to Hydra itself; none where Hydra started no job."""
    if _instead:
        return list(_instead[-1])
    config: Any = HydraConfig.instance().cfg
    if config is None:
        return []
    words: Any = OmegaConf.to_container(config.hydra.overrides.task, resolve=False)  # an interpolation stays one
    return list(map(str, words))


def job_number() -> int | None:
    """The place of this job in its sweep, from 0."""
    config: Any = HydraConfig.instance().cfg
    return OmegaConf.select(config, "hydra.job.num") if multirun() else None


class Sweep:
    """The jobs of a sweep that this process runs.

    Args:
        jobs: the words of each, by job number.
    """

    def __init__(self, jobs: list[list[str]]):
        self.jobs = jobs
        self.taken = set[int]()  # jobs for which others were looked for, to be trained at once with them
        self.failed = set[int]()  # those whose runs failed at once with others


_sweep = Sweep([])


def note_sweep(jobs: list[list[str]]) -> None:
    """Keep the words of every job, before the first of them."""
    global _sweep
    _sweep = Sweep(jobs)


def sweep() -> Sweep:
    """The sweep of this process; without jobs where there is none, or in a launcher's worker, which runs a part."""
    return _sweep


def jobs_at_once() -> int | None:
    """How many jobs the launcher runs at once on this machine; None for all launchers but joblib's."""
    config: Any = HydraConfig.instance().cfg
    launcher = None if config is None else OmegaConf.select(config, "hydra.launcher")
    if launcher is None or not str(launcher.get("_target_")).startswith("hydra_plugins.hydra_joblib_launcher."):
        return None
    n, cores = launcher.get("n_jobs") or 1, os.cpu_count() or 1
    return max(1, n if n > 0 else cores + 1 + n)


def job_name() -> str:
    """What tells this job from the others of its sweep."""
    return " ".join(overrides()) or "defaults"


def command(verb: str) -> str:
    """What is typed for ddpm-VERB: in a checkout its script."""
    own = (Path.cwd() / "experiments" / f"{verb}.py").is_file()
    return f"python experiments/{verb}.py" if own else f"ddpm-{verb}"


def word(key: str, value: object) -> str:
    """KEY=VALUE as it is typed into a shell, for a value of any characters."""
    text, plain = str(value), r"[^\s,'\"\[\]{}()=:~#&;<>!`\\^]+"
    if not re.fullmatch(rf"{plain}( {plain})*", text):
        text = "'" + text.replace("'", "\\'") + "'"
    return shlex.quote(f"{key}={text}")


def training_command(words: list[str]) -> str:
    """What is typed to train by these words."""
    return f"{command('train')} {shlex.join(words)}"


def composed(name: str, words: list[str]) -> DictConfig:
    """The configuration of words that were typed to ddpm-study, for one process and a run without a parent."""
    from ddpm.training import ranks

    if ranks.started():
        raise InvalidInput("this is done by one process: start it without torchrun")
    try:
        config = compose(name, words)
        extend, *_ = (config[key] for key in ("extend", "retry", "device"))  # which are read before all is resolved
    except InvalidInput as error:
        raise InvalidInput(with_known_keys(name, str(error), words)) from error
    except OmegaConfBaseException as error:
        raise InvalidInput(str(error).splitlines()[0]) from error
    if extend is not None:
        raise InvalidInput(f"extend={extend} cannot be used here; init={extend} starts from its weights")
    if "teacher" in config and config.teacher is not None:
        raise InvalidInput(f"teacher={config.teacher} cannot be used here: a student is trained by ddpm-train alone")
    return config
