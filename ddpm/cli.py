"""The command line: train, sample, evaluate, schedule and study, and the exit code of how each ends.

Exit codes: 0 done; 1 a run or some arms failed; 2 invalid input (one line, nothing begun); 130 / 143 interrupted.
"""

import contextlib
import errno
import os
import re
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, NoReturn

import hydra
from hydra._internal.utils import get_args_parser
from hydra.core.plugins import Plugins
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from ddpm.commands import (
    checking,
    evaluating,
    forecasting,
    optimising,
    ranging,
    sampling,
    scheduling,
    studying,
    training,
)
from ddpm.commands.asked import job_name, jobs_at_once, multirun
from ddpm.commands.told import in_one_line, say
from ddpm.config import InvalidInput, compose, conf_dir, jobs, with_known_keys

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


def study() -> None:
    """`ddpm-study`: plan a sweep, see how far it is, try again what failed, report what it means; search a setting."""
    verb, words = (sys.argv[1:2] or ["--help"])[0], sys.argv[2:]
    if verb in ("--help", "-h"):
        print(STUDY)
        return
    try:
        if verb not in VERBS:
            raise InvalidInput(f"{verb} is not known; allowed: {', '.join(VERBS)}; ddpm-study --help says what they do")
        if options := [word for word in words if word.startswith("-")]:
            raise InvalidInput(f"{options[0]}: there are no options; settings are given as key=value")
        code = VERBS[verb](words)
    except InvalidInput as error:
        _refuse(error)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # whoever read has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return
    if code:
        sys.exit(code)


VERBS: dict[str, Callable[[list[str]], int | None]] = {
    "plan": forecasting.plan,
    "status": studying.status,
    "retry": studying.retry,
    "report": studying.report,
    "lr-range": ranging.lr_range,
    "optimise": optimising.optimise,
}
STUDY = """ddpm-study: what a sweep is going to be, how far it is, and what it means

  plan WORDS                what `ddpm-train -m WORDS` would do: arms, parameters, FLOPs, memory, time, what is refused
  status RUNS/STUDY         the state of every arm, and why runs are not done
  retry RUNS/STUDY          try what failed again, go on with what was interrupted
  report RUNS/STUDY         report.html, report.md, report.png   [baseline=ARM] [measure=NAME] [out=FOLDER]
  lr-range WORDS            learning-rate range test   [range.start= range.end= range.steps= range.out=]
  optimise WORDS            search settings by Optuna   search.space={...} [search.trials= search.measure= ...]

WORDS are those of ddpm-train, such as experiment=mnist schedule=linear,cosine seed=0,1,2,3,4"""


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
    outcomes: list[Outcome] = []

    def guarded(config: DictConfig) -> Outcome | None:
        held = False
        if (worker := jobs_at_once() is not None) and _Worker.ends_after_a_signal():
            return Outcome("it was not begun, for the sweep was interrupted", False)
        try:
            job(config)
        except (SystemExit, KeyboardInterrupt):
            if not worker:
                raise
            _Worker.ending = True
            return Outcome("interrupted", False)
        except InvalidInput as error:
            if not multirun():
                _refuse(error)
            reason = str(error)
        except OmegaConfBaseException as error:  # a key that was removed, say
            if not multirun():
                _refuse(InvalidInput(str(error).splitlines()[0]))
            reason = str(error)
        except OSError as error:
            if error.errno != errno.ENAMETOOLONG:  # which is what was typed
                raise
            if not multirun():
                _refuse(InvalidInput(f"{error.strerror}: {error.filename}"))
            reason = str(error)
        except training.RunFailed as error:
            reason, held = str(error), isinstance(error, training.Held)
        else:
            return None
        outcome = Outcome(in_one_line(reason), held)
        told = f"{in_one_line(job_name())}: {outcome.reason}" if multirun() else outcome.reason
        if failing == 2:
            print(f"error: {told}", file=sys.stderr, flush=True)
        else:
            say(f"{'HELD' if held else 'FAILED'} {told}")
        if not multirun():  # of which Hydra gives nothing back
            outcomes.append(outcome)
        return outcome

    with _collecting(outcomes):
        hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name=name)(guarded)()
    if len(outcomes) > 1 and failing != 2:
        lines = [f"  {'held' if held else 'failed'}: {name}: {reason}" for reason, held, name in outcomes]
        say(f"{len(outcomes)} runs are not done:\n" + "\n".join(lines))
    if outcomes:
        sys.exit(failing)


class Outcome(NamedTuple):
    """What became of a job that did not end well."""

    reason: str
    held: bool  # by another process, which goes on with it
    name: str = "the sweep"  # the words in which the job differs from others of its sweep


@contextlib.contextmanager
def _collecting(outcomes: list[Outcome]) -> Iterator[None]:
    """Within it, what the jobs of a sweep return is collected, whatever launcher carries it back.

    Jobs that found their run held by another process are launched once more in the end. A launcher that loses its
    processes is an outcome too.
    """
    make = Plugins.instantiate_sweeper

    def instantiate_sweeper(plugins: Plugins, **settings: Any) -> Any:
        sweeper = make(plugins, **settings)
        sweep = sweeper.sweep
        sweeper.sweep = lambda arguments: _swept(sweeper, sweep, arguments, outcomes)  # type: ignore[method-assign]
        return sweeper

    Plugins.instantiate_sweeper = instantiate_sweeper  # type: ignore[assignment, method-assign]
    try:
        yield
    finally:
        Plugins.instantiate_sweeper = make  # type: ignore[method-assign]


def _swept(sweeper: Any, sweep: Callable[[list[str]], Any], arguments: list[str], outcomes: list[Outcome]) -> Any:
    """What a sweep returns, see `_collecting`.

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
        say(f"{signal.Signals(signum).name}: the runs write their checkpoints; once more to stop at once")
        for number in before:
            signal.signal(number, end)
        for process in workers:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGTERM)

    for number in before:
        signal.signal(number, note)
    try:
        returned = [job for batch in sweep(arguments) for job in batch]
        held = [job for job in returned if job.return_value is not None and job.return_value.held]
        if held and not received:
            say(f"{len(held)} runs were held by other processes: once more to each")
            again = sweeper.launcher.launch([job.overrides for job in held], initial_job_idx=len(returned))
            returned = [job for job in returned if job not in held] + list(again)
        alike = set.intersection(*(set(job.overrides) for job in returned)) if len(returned) > 1 else set()
        for job in returned:
            if job.return_value is not None:
                name = in_one_line(" ".join(word for word in job.overrides if word not in alike))
                outcomes.append(job.return_value._replace(name=name))
        return returned
    except _lost_processes() as error:
        reason = f"the launcher lost a process: {_first_line(error)}; the same command goes on with what is missing"
        say(f"FAILED {reason}")
        outcomes.append(Outcome(reason, False))
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if received:
            say("interrupted; the same command goes on")
            sys.exit(128 + received[0])


class _Worker:
    """A process of a launcher that runs several jobs, one after the other."""

    ending = False  # after a signal: the jobs that are left are not begun

    @classmethod
    def ends_after_a_signal(cls) -> bool:
        """Whether a signal came; from now on one that nobody else waits for is noted."""

        def note(signum: int, frame: object) -> None:
            cls.ending = True

        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, note)
        return cls.ending


def _workers() -> list[int]:
    """The processes of the joblib launcher, if it runs."""
    if "joblib" not in sys.modules:
        return []
    from joblib.externals.loky import reusable_executor

    executor = reusable_executor._executor
    return [] if executor is None else list(executor._processes or {})


def _lost_processes() -> tuple[type[Exception], ...]:
    """What launchers raise where the system ended a process of theirs, for want of memory, say."""
    found: list[type[Exception]] = []
    if "joblib" in sys.modules:
        from joblib.externals.loky.process_executor import TerminatedWorkerError

        found.append(TerminatedWorkerError)
    if "submitit" in sys.modules:
        from submitit.core.utils import UncompletedJobError

        found.append(UncompletedJobError)
    return tuple(found)


def _check_composition(name: str, argv: list[str]) -> None:
    """Compose every job that Hydra would start, before it starts the first; of jobs that differ in the seed, one.

    Raises: InvalidInput for an option that is not known, and a group, choice, key or value that does not compose.
    """
    parser = get_args_parser()
    parser.error = _refuse_option  # type: ignore[method-assign]  # whose usage is a screen long
    known = parser.parse_args(argv)
    if known.help or known.hydra_help or known.shell_completion or known.info:
        return
    may_sweep = known.multirun or any(re.match(r"\+*(experiment|hydra)", word) for word in known.overrides)
    try:
        sweep = jobs(name, known.overrides, known.multirun) if may_sweep else None
    except InvalidInput as error:
        raise InvalidInput(with_known_keys(name, str(error), known.overrides)) from error
    seen = set()
    for overrides in [known.overrides] if sweep is None else sweep:
        words = [word for word in overrides if not word.startswith("hydra")]
        alike = tuple(word for word in words if not re.fullmatch(r"seed=\d+", word))
        if alike in seen:
            continue
        seen.add(alike)
        try:
            compose(name, words)
        except InvalidInput as error:
            raise InvalidInput(with_known_keys(name, str(error), overrides)) from error
    if sweep is not None:
        from ddpm import ranks  # only now: with it comes torch, and what does not compose is told at once

        if ranks.started():
            raise InvalidInput("a sweep cannot run under torchrun; start each of its runs by a torchrun of its own")


def _refuse_option(message: str) -> NoReturn:
    raise InvalidInput(f"{message}; settings are given as key=value, and --help lists the options")


def _refuse(error: Exception) -> None:
    """Invalid input: one line, exit code 2."""
    if os.environ.get("RANK", "0") == "0":  # of several processes that refuse the same
        print(f"error: {in_one_line(str(error))}", file=sys.stderr)
    sys.exit(2)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
