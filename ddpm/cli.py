"""Command-line entry points train, sample, edit, evaluate, schedule, study and read, and their exit codes.

Exit codes: 0 done; 1 a run or some arms failed; 2 invalid input (one line, nothing started); 130 / 143 interrupted.
"""

import argparse
import errno
import os
import re
import sys
import tempfile
from collections.abc import Callable
from typing import NoReturn

import hydra
from hydra._internal.utils import get_args_parser
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from ddpm.commands import reading_site, scheduling
from ddpm.commands.console import in_one_line, say
from ddpm.commands.evaluate import evaluating
from ddpm.commands.launch import job_name, multirun, note_sweep
from ddpm.commands.sample import editing, pipelines, sampling
from ddpm.commands.study import lr_range, optimising, plan, studying
from ddpm.commands.train import checking, stacking, training
from ddpm.commands.train.cluster import Outcome
from ddpm.commands.train.sweeping import collecting, worker_of_a_launcher
from ddpm.config import InvalidInput, compose, conf_dir, in_quotes, jobs, with_known_keys

Job = Callable[[DictConfig], None]
FILES = ("image", "mask", "out", "depth", "pipeline")  # keys of file names, whose values are quoted for Hydra
TEXTS = ("prompt", "negative")  # keys of free text, quoted too
QUOTED = r"'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\""


def train() -> None:
    """`ddpm-train`: train a network and draw samples; with --check only report what that would take."""
    if checking.CHECK not in sys.argv[1:]:
        _main("train", stacking.train)
        return
    sys.argv[1:] = [word for word in sys.argv[1:] if word != checking.CHECK]
    _without_traces("train", checking.check, failing=2)


def sample() -> None:
    """`ddpm-sample`: draw samples from a run or a published pipeline; with --check only report what that would take."""
    checked = checking.CHECK in sys.argv[1:]
    sys.argv[1:] = [word for word in sys.argv[1:] if word != checking.CHECK]
    sys.argv[1:] = pipelines.with_defaults([_typed_in_quotes(word) for word in sys.argv[1:]])
    if checked:
        _without_traces("sample", checking.check_samples, failing=2)
    else:
        _without_traces("sample", sampling.sample)


def edit() -> None:
    """`ddpm-edit`: edit an image with a run's network, or with a published pipeline."""
    sys.argv[1:] = pipelines.with_defaults([_typed_in_quotes(word) for word in sys.argv[1:]])
    _without_traces("edit", editing.edit)


def evaluate() -> None:
    """`ddpm-evaluate`: measure a run's network by its samples or by held-out images."""
    if of_sample := [word for word in sys.argv[1:] if word.startswith(("pipeline=", "prompt=", "negative="))]:
        _refuse(
            InvalidInput(f"{of_sample[0]}: ddpm-evaluate measures a run; this key is for ddpm-sample and ddpm-edit")
        )
    _without_traces("evaluate", evaluating.evaluate)


def schedule() -> None:
    """`ddpm-schedule`: print a table and draw a figure of a noise schedule, next to others."""
    _without_traces("schedule_report", scheduling.schedule)


def study() -> None:
    """`ddpm-study`: plan a sweep, show its progress, retry failed runs, report the results; search settings."""
    verb, words = (sys.argv[1:2] or ["--help"])[0], sys.argv[2:]
    if verb in ("--help", "-h"):
        print(STUDY)
        return
    try:
        if verb not in VERBS:
            raise InvalidInput(f"{verb} is not known; allowed: {', '.join(VERBS)}; ddpm-study --help explains them")
        if options := [word for word in words if word.startswith("-")]:
            raise InvalidInput(f"{options[0]}: there are no options; settings are given as key=value")
        code = VERBS[verb](words)
    except InvalidInput as error:
        _refuse(error)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # the reader of the pipe has closed it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return
    if code:
        sys.exit(code)


def read() -> None:
    """`ddpm-read`: build the pages that show equation and code side by side."""
    words = sys.argv[1:]
    if {"--help", "-h"} & set(words):
        print(reading_site.HELP)
        return
    try:
        if options := [word for word in words if word.startswith("-")]:
            raise InvalidInput(f"{options[0]}: there are no options; settings are given as key=value")
        reading_site.read(words)
    except InvalidInput as error:
        _refuse(error)
    except KeyboardInterrupt:
        sys.exit(130)


VERBS: dict[str, Callable[[list[str]], int | None]] = {
    "plan": plan.plan,
    "status": studying.status,
    "retry": studying.retry,
    "report": studying.report,
    "lr-range": lr_range.lr_range,
    "optimise": optimising.optimise,
}
STUDY = """ddpm-study: plan a sweep, show its progress, report its results, search settings

  plan WORDS                what `ddpm-train -m WORDS` would do: arms, parameters, FLOPs, memory, time, refusals
  status RUNS/STUDY         the state of every arm, and why runs are not done
  retry RUNS/STUDY          retry failed runs, resume interrupted ones
  report RUNS/STUDY         report.html, report.md, report.png   [baseline=ARM|LEVEL] [measure=NAME] [out=FOLDER]
  lr-range WORDS            learning-rate range test   [range.start= range.end= range.steps= range.out=]
  optimise WORDS            search settings by Optuna   search.space={...} [search.trials= search.measure= ...]

WORDS are those of ddpm-train, such as experiment=mnist schedule=linear,cosine seed=0,1,2,3,4"""


def _without_traces(name: str, job: Job, failing: int = 1) -> None:
    """Run `_main` with Hydra's sweep folder in a temporary directory that is deleted afterwards."""
    with tempfile.TemporaryDirectory() as scratch:
        sys.argv.append(f"hydra.sweep.dir='{scratch}'")
        _main(name, job, failing)


def _main(name: str, job: Job, failing: int = 1) -> None:
    """Check that every job composes, hand over to Hydra, and exit with a code for how the jobs ended.

    Args:
        failing: the exit code if a job of a sweep failed; 2 if jobs only check their input.
    """
    try:
        sys.argv[1:] = _in_order(sys.argv[1:])
        _check_composition(name, sys.argv[1:])
    except InvalidInput as error:
        _refuse(error)
    outcomes: list[Outcome] = []

    def guarded(config: DictConfig) -> Outcome | None:
        held = False
        if (worker := worker_of_a_launcher()) and worker.ending:
            return Outcome("not started: the sweep was interrupted", False)
        try:
            job(config)
        except (SystemExit, KeyboardInterrupt):
            if not worker:
                raise
            worker.ending = True
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
            if error.errno != errno.ENAMETOOLONG:  # a name that was typed
                raise
            if not multirun():
                _refuse(InvalidInput(f"{error.strerror}: {error.filename}"))
            reason = str(error)
        except training.RunFailed as error:
            reason, held = str(error), isinstance(error, training.Held)
        else:
            return None
        outcome = Outcome(in_one_line(reason), held)
        message = f"{in_one_line(job_name())}: {outcome.reason}" if multirun() else outcome.reason
        if failing == 2:
            print(f"error: {message}", file=sys.stderr, flush=True)
        else:
            say(f"{'HELD' if held else 'FAILED'} {message}")
        if not multirun():  # Hydra returns nothing from a single run
            outcomes.append(outcome)
        return outcome

    with collecting(outcomes):
        try:
            hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name=name)(guarded)()
        except KeyboardInterrupt:
            say("interrupted")
            sys.exit(130)
    lines = [f"  {'held' if held else 'failed'}: {name}: {reason}" for reason, held, name in outcomes if name]
    if lines and failing != 2:
        say(f"{len(lines)} {'run is' if len(lines) == 1 else 'runs are'} not done:\n" + "\n".join(lines))
    if outcomes:
        sys.exit(failing)


def _in_order(argv: list[str]) -> list[str]:
    """Return the settings, quoted where Hydra needs it, then the options, which may be typed anywhere between them.

    Raises: InvalidInput for an option that is not known.
    """
    settings = _parser().parse_intermixed_args(argv).overrides
    options = list(argv)
    for word in settings:
        options.remove(word)
    return [*map(in_quotes, settings), *options]


def _parser() -> argparse.ArgumentParser:
    """Return Hydra's argument parser, with refusals on one line."""
    parser: argparse.ArgumentParser = get_args_parser()
    parser.error = _refuse_option  # type: ignore[method-assign]  # its usage is a screen long
    return parser


def _check_composition(name: str, argv: list[str]) -> None:
    """Compose every job that Hydra would start, before the first starts; one of those that differ in the seed alone.

    Raises: InvalidInput for an option that is not known, and a group, choice, key or value that does not compose.
    """
    known = _parser().parse_args(argv)
    modes = {"--multirun": known.multirun, "--run": known.run, "--cfg": known.cfg, "--info": known.info}
    if len(chosen := [name for name, value in modes.items() if value]) > 1:
        raise InvalidInput(f"{' and '.join(chosen)} exclude each other")
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
    note_sweep(sweep or [])
    if sweep is not None:
        from ddpm.training import ranks  # only now: it imports torch, and composition errors should come fast

        if ranks.started():
            raise InvalidInput("a sweep cannot run under torchrun; start each of its runs by a torchrun of its own")


def _typed_in_quotes(word: str) -> str:
    """Return a word with its file name or text quoted for Hydra's grammar: image=a (1).png becomes image='a (1).png'.

    Quoted values, null, lists of prompts and the values of a sweep stay as they are.
    """
    key, equals, value = word.partition("=")
    if key not in (*FILES, *TEXTS) or value in ("", "null") or {"-m", "--multirun"} & set(sys.argv):
        return word
    if re.fullmatch(QUOTED, value) or (key in FILES and "$" in value):
        return word
    if key == "out" and re.fullmatch(r"-?[\d.]+", value):  # a number is no file name, but a slip
        return word
    if key in TEXTS and value[0] == "[" and value[-1] == "]":
        return word
    value = re.sub(r"(\\+)(?='|$)", r"\1\1", value)  # Hydra reads a backslash as an escape only there
    return key + equals + "'" + value.replace("'", "\\'").replace("${", "\\${") + "'"


def _refuse_option(message: str) -> NoReturn:
    if message.startswith("unrecognized arguments"):  # the message also lists settings that follow them
        message = f"unrecognized {' '.join(word for word in message.split() if word.startswith('-'))}"
    raise InvalidInput(f"{message}; settings are given as key=value, and --help lists the options")


def _refuse(error: Exception) -> None:
    """Print the error on one line and exit with code 2."""
    if os.environ.get("RANK", "0") == "0":  # only one of several processes that refuse the same
        print(f"error: {in_one_line(str(error))}", file=sys.stderr)
    sys.exit(2)
