"""The command line: train, sample, evaluate and schedule, and the exit code of how each ends.

Exit codes: 0 done; 1 a run or some arms failed; 2 invalid input (one line, nothing begun); 130 / 143 interrupted.
"""

import errno
import os
import sys
import tempfile
from collections.abc import Callable
from typing import NoReturn

import hydra
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra._internal.utils import get_args_parser
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from ddpm.commands import checking, evaluating, sampling, scheduling, training
from ddpm.commands.asked import job_name, multirun
from ddpm.commands.told import say
from ddpm.config import InvalidInput, compose, conf_dir, with_known_keys

Job = Callable[[DictConfig], None]


def train() -> None:
    """`ddpm-train`: train a network and draw what it learned; with --check only say what that would take."""
    if checking.CHECK not in sys.argv[1:]:
        _main("train", training.train)
        return
    sys.argv[1:] = [word for word in sys.argv[1:] if word != checking.CHECK]
    _without_traces("train", checking.check, failing=2)


def sample() -> None:
    """`ddpm-sample`: draw samples from a run directory."""
    _without_traces("sample", sampling.sample)


def evaluate() -> None:
    """`ddpm-evaluate`: measure what a run directory learned, by its samples or by held-out images."""
    _without_traces("evaluate", evaluating.evaluate)


def schedule() -> None:
    """`ddpm-schedule`: say what a noise schedule is, in a table and a figure, beside others."""
    _without_traces("schedule_report", scheduling.schedule)


def _without_traces(name: str, job: Job, failing: int = 1) -> None:
    """The same as `_main`, but what Hydra writes of a sweep goes where nobody sees it."""
    with tempfile.TemporaryDirectory() as scratch:
        sys.argv.append(f"hydra.sweep.dir='{scratch}'")
        _main(name, job, failing)


def _main(name: str, job: Job, failing: int = 1) -> None:
    """Check that every job composes, hand over to Hydra, and turn what became of the jobs into an exit code.

    Args:
        failing: the exit code where a job of a sweep failed; 2 if jobs only look whether their input is right.
    """
    try:
        _check_composition(name, sys.argv[1:])
    except InvalidInput as error:
        _refuse(error)
    failed: list[str] = []
    launcher = os.getpid()

    def guarded(config: DictConfig) -> None:
        try:
            job(config)
        except InvalidInput as error:
            if not multirun():
                _refuse(error)
            reason = f"{job_name()}: {error}"
        except OmegaConfBaseException as error:  # a key that was removed, say
            if not multirun():
                _refuse(InvalidInput(str(error).splitlines()[0]))
            reason = f"{job_name()}: {error}"
        except OSError as error:
            if error.errno != errno.ENAMETOOLONG:  # which is what was typed
                raise
            if not multirun():
                _refuse(InvalidInput(f"{error.strerror}: {error.filename}"))
            reason = f"{job_name()}: {error}"
        except training.RunFailed as error:
            reason = f"{job_name()}: {error}" if multirun() else str(error)
        else:
            return
        reason = _in_one_line(reason)
        if failing == 2:
            print(f"error: {reason}", file=sys.stderr, flush=True)
        else:
            say(f"FAILED {reason}")
        if os.getpid() != launcher:  # a launcher with processes of its own: let Hydra carry the failure back
            raise training.RunFailed(reason)
        failed.append(reason)

    hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name=name)(guarded)()
    if len(failed) > 1 and failing != 2:
        say(f"{len(failed)} runs failed:\n" + "\n".join(f"  {reason}" for reason in failed))
    if failed:
        sys.exit(failing)


def _check_composition(name: str, argv: list[str]) -> None:
    """Compose every job that Hydra would start, before it starts the first.

    Raises: InvalidInput for an option that is not known, and a group, choice, key or value that does not compose.
    """
    parser = get_args_parser()
    parser.error = _refuse_option  # type: ignore[method-assign]  # whose usage is a screen long
    known = parser.parse_args(argv)
    if known.help or known.hydra_help or known.shell_completion or known.info:
        return
    jobs = [known.overrides]
    if known.multirun:
        try:
            parsed = OverridesParser.create().parse_overrides(known.overrides)
            only_hydra_expands = any("glob(" in o for o in known.overrides)
            batches = [] if only_hydra_expands else BasicSweeper.split_arguments(parsed, None)
            jobs = [job for batch in batches for job in batch]
        except HydraException as error:
            raise InvalidInput("; ".join(str(error).split("\n"))) from error
    for overrides in jobs:
        try:
            compose(name, [o for o in overrides if not o.startswith("hydra")])
        except InvalidInput as error:
            raise InvalidInput(with_known_keys(name, str(error), overrides)) from error
    if known.multirun:
        from ddpm import ranks  # only now: with it comes torch, and what does not compose is told at once

        if ranks.started():
            raise InvalidInput("a sweep cannot run under torchrun; start each of its runs by a torchrun of its own")


def _refuse_option(message: str) -> NoReturn:
    raise InvalidInput(f"{message}; settings are given as key=value, and --help lists the options")


def _refuse(error: Exception) -> None:
    """Invalid input: one line, exit code 2."""
    if os.environ.get("RANK", "0") == "0":  # of several processes that refuse the same
        print(f"error: {_in_one_line(str(error))}", file=sys.stderr)
    sys.exit(2)


def _in_one_line(text: str) -> str:
    """Text for a terminal: what was typed, and is told again, neither breaks the line nor steers."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
