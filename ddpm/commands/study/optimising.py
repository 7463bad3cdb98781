"""`ddpm-study optimise`: hyperparameter search by Optuna; each trial is an ordinary run."""

import contextlib
import math
import re
import shlex
import sys
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ddpm.commands.console import say
from ddpm.commands.launch import composed, training_command
from ddpm.commands.train import training
from ddpm.commands.train.prepare import Plan, planned, status_of
from ddpm.commands.validate import must_be_one_of, must_be_whole, settings
from ddpm.config import SCIENCE, InvalidInput, compose, plain, resolve_device, with_known_keys
from ddpm.runs.safe_yaml import CADENCE, MEMORY

if TYPE_CHECKING:
    from ddpm.study.search import Search, Worker

SEARCHED = (*(key for key in SCIENCE if key != "seed"), "data", "augment")  # first parts of the keys of a search space
IDLE = (*(f"trainer.{key}" for key in CADENCE), *(f"model.{key}" for key in MEMORY))  # keys that change no result
HELD_OUT = "held_out"  # the measure of every run: its held-out loss
INCOMPARABLE = ("schedule", "diffusion", "data")  # groups that make held-out losses incomparable
PROTOCOLS = {"bits_per_dim": "bits_per_dim_vlb", "log_likelihood": "bits_per_dim_flow"}  # of other names
PROTOCOLS |= {"latent_structure": "latent_", "reconstruction": "psnr", "codes": "bits_per_code"}
INSTALL = "pip install -c constraints.txt -e '.[optuna]'"
ENOUGH_TRIALS = 10  # to report the importance of settings
STATES = {"COMPLETE": "complete", "PRUNED": "pruned", "FAIL": "failed", "RUNNING": "being trained by others"}


def optimise(words: list[str]) -> int:
    """Search settings by trials, each an ordinary run, until there are `search.trials`; then report.

    The trials are stored in <runs>/<study>/optuna.log. A repeated command resumes: trials of a killed process, from
    their checkpoints, then the missing ones. Several processes may work on one study.

    Args:
        words: as ddpm-train takes them, and search.KEY=VALUE, see conf/optimise.yaml.
    Returns: 0, or 1 if trials failed.
    Raises: InvalidInput before the first trial.
    """
    try:
        import optuna  # noqa: F401
    except ImportError as error:
        raise InvalidInput(f"a search needs Optuna, which is not installed: {INSTALL}") from error
    from ddpm.study.search import StudyRefused, Worker, quiet

    config = composed("optimise", words)
    if not isinstance(config.retry, bool):
        raise InvalidInput(f"retry={config.retry} must be true or false")
    with quiet():
        search = _search_of(config, words)
        base = _base(search)
        _must_measure(search, base)
        shared = {"settings": base.run.hash, "evaluation": base.settings.get("evaluation") or []}
        try:
            with Worker(base.run.path.parent, search, shared, config.retry) as worker:
                while (trial := worker.next_trial()) is not None:
                    _carry_out(worker, trial)
                return _report(worker)
        except StudyRefused as error:
            raise InvalidInput(str(error)) from error
        except KeyboardInterrupt:
            say("interrupted; the same command resumes")
            sys.exit(130)


def _search_of(config: DictConfig, words: list[str]) -> "Search":
    """Return the search that a configuration describes; raise InvalidInput for invalid settings."""
    from ddpm.study.search import Search

    options = settings(config, "search")
    must_be_whole(config, "search.trials", least=1)
    must_be_whole(config, "search.seed", least=0)
    must_be_one_of(config, "search.direction", ("auto", "minimize", "maximize"))
    must_be_one_of(config, "search.sampler", ("tpe", "random"))
    must_be_one_of(config, "search.pruner", ("auto", "median", "halving", "none"))
    measure, pruner = options.measure, options.pruner
    if not isinstance(measure, str) or not measure:
        raise InvalidInput(f"search.measure={measure} must be {HELD_OUT}, or how a name in evaluation.json begins")
    if pruner == "auto":
        pruner = "median" if measure == HELD_OUT else "none"
    space = _space(options)
    _must_leave_comparable(space, measure, pruner)
    keys = [word.partition("=")[0].lstrip("+~") for word in words]
    fixed = tuple(w for k, w in zip(keys, words, strict=True) if k not in space and not re.match(r"search\b|retry$", k))
    better = _better(measure)
    if better == "neither" and options.direction == "auto":
        raise InvalidInput(
            f"search.measure={measure}: neither direction is better by itself; "
            "set search.direction=maximize or minimize"
        )
    maximise = options.direction == "maximize" or (options.direction == "auto" and better == "higher")
    return Search(fixed, space, options.trials, measure, maximise, options.sampler, pruner, options.seed)


def _space(options: DictConfig) -> dict[str, Any]:
    """Return the search space; raise InvalidInput for keys that change no result, and for those of no run."""
    from ddpm.study import search

    try:
        space = search.space(plain(options.space))
    except ValueError as error:
        raise InvalidInput(f"search.space: {error}") from error
    if not space:
        raise InvalidInput(f"search.space={options.space} must name what is searched, such as {search.EXAMPLE}")
    for key in space:
        if key.partition(".")[0] not in SEARCHED:
            allowed = ", ".join(SEARCHED)
            raise InvalidInput(f"search.space: {key} cannot be searched; allowed are keys of {allowed}")
        if key in IDLE:
            raise InvalidInput(f"search.space: {key} changes no result, so there is nothing to search")
    return space


def _better(measure: str) -> str:
    from ddpm.study.report import KINDS

    return next((kind.better for name, kind in KINDS.items() if measure.startswith(name)), "lower")


def _must_leave_comparable(space: dict[str, Any], measure: str, pruner: str) -> None:
    """Raise InvalidInput if the search uses held-out losses that are not comparable between its trials."""
    other = ", ".join(key for key in space if key.partition(".")[0] in INCOMPARABLE)
    if other and (measure == HELD_OUT or pruner != "none"):
        raise InvalidInput(
            f"search.measure={measure} search.pruner={pruner}: held-out losses are not comparable if runs differ in "
            f"{other}; set search.measure=frechet or loss_by_snr, a line of evaluation for it, and search.pruner=none"
        )


def _planned(words: list[str]) -> Plan:
    """Return the plan of a run with these overrides; the settings of the search are no part of it."""
    config = compose("optimise", words)
    config = OmegaConf.masked_copy(config, [key for key in config if key != "search"])  # type: ignore[misc]
    OmegaConf.set_struct(config, True)
    return planned(config, resolve_device(config.device), marking=False)


def _base(search: "Search") -> Plan:
    """Return the plan that trials vary, to find errors that all share; check that every end of the space composes."""
    ends = search.ends()
    for end in ends:
        try:
            compose("optimise", end)
        except InvalidInput as error:
            raise InvalidInput(f"search.space: {with_known_keys('optimise', str(error), end)}") from error
    try:
        return _planned(list(search.fixed))
    except InvalidInput:
        with contextlib.suppress(InvalidInput):
            return _planned(ends[0])  # the missing or wrong value may be one that is searched
        raise


def _must_measure(search: "Search", base: Plan) -> None:
    """Raise InvalidInput for a measure that no run will have, and for held-out losses without held-out images."""
    from ddpm.study.report import KINDS

    if len(base.data.held_out) == 0 and (search.measure == HELD_OUT or search.pruner != "none"):
        raise InvalidInput(
            f"{base.data.name} has no held-out part, which the search measures on: set data.validation=0.1"
        )
    last, every = base.parts.trainer.last_step(len(base.data.train)), base.parts.trainer.checkpoint_every
    if search.pruner != "none" and last is not None and last <= every:
        say(f"note: no trial is pruned before its end: trainer.checkpoint_every={every} is not below its {last} steps")
    if search.measure == HELD_OUT:
        return
    metrics: list[str] = ["recognition"] if base.config.recognition else []
    for line in base.settings.get("evaluation") or []:
        named = plain(compose("evaluate", [f"run={base.run.path.name}", *shlex.split(line)]).metric)
        metrics += named if isinstance(named, list) else [named]
    names: list[str] = []
    for metric in metrics:  # precision_recall, for example, gives two
        names += [PROTOCOLS[metric]] if metric in PROTOCOLS else [kind for kind in KINDS if kind in metric] or [metric]
    if not any(search.measure.startswith(name) or name.startswith(search.measure) for name in names):
        raise InvalidInput(
            f"search.measure={search.measure}: a run will have {', '.join([HELD_OUT, *names])}; add a line to "
            f"evaluation, such as 'evaluation=[\"metric={search.measure}\"]'"
        )


def _carry_out(worker: "Worker", trial: Any) -> None:
    """Train and measure the run of a trial, and report its value to the Optuna study."""
    from optuna.trial import TrialState

    search, study, value, state = worker.search, worker.study, None, TrialState.COMPLETE
    again = trial.user_attrs.get("continues")
    goes_on = "" if again is None else f", which resumes {again}"
    count = f"({len(worker.trials())} of {search.trials})"
    say(f"\ntrial {trial.number}{goes_on} {count}: {' '.join(search.chosen(trial.params))}")
    try:
        value = _value(search, trial)
    except training.Stopped as stopped:
        state, message = TrialState.PRUNED, str(stopped)
    except (InvalidInput, training.RunFailed, OmegaConfBaseException) as error:
        state, message = TrialState.FAIL, " ".join(str(error).split())
    if value is None:
        trial.set_user_attr("reason", message)
    study.tell(trial, value, state)
    if value is not None:
        best = study.best_trial
        message = f"{search.measure} {value:.5g}; best so far {best.value:.5g}, of trial {best.number}"
    say(f"{'FAILED ' if state == TrialState.FAIL else ''}trial {trial.number}: {message}")


def _value(search: "Search", trial: Any) -> float:
    """Train the run of a trial, unless it is done, and measure it; return the value of the measure.

    Raises: training.Stopped if it is pruned; InvalidInput, training.RunFailed.
    """
    from ddpm.runs.directory import DONE
    from ddpm.training.ranks import Ranks

    words = search.words(trial.params)
    plan = _planned(words)
    trial.set_user_attr("run", plan.run.hash)
    watcher, status = Watcher(search, plan, trial), status_of(plan.run)
    if status.get("state") == DONE:
        say(f"{plan.run.path} is done already ({status.get('step')} steps)")
    else:
        try:
            training.lead(plan, Ranks(), watch=watcher)
        finally:
            if (state := status_of(plan.run).get("state")) is not None:
                plan.run.write_status(state, overrides=words)  # the overrides that train it by itself
    training.measure(plan)
    value = watcher.last if search.measure == HELD_OUT else _measured(plan, search.measure)
    if value is None or not math.isfinite(value):
        raise training.RunFailed(f"{plan.run.path}: its {search.measure} is {value}, which is not a usable number")
    return value


class Watcher:
    """Reports a trial's held-out losses to Optuna, including those before an interruption, and prunes the trial."""

    def __init__(self, search: "Search", plan: Plan, trial: Any):
        from ddpm.runs.directory import held_out_lines, read_metrics

        self.trial, self.prunes = trial, search.pruner != "none"
        self.last: float | None = None
        # another measure may be maximised, but the loss is minimised all the same
        self.sign = -1 if search.maximise and search.measure != HELD_OUT else 1
        self.last_step = plan.parts.trainer.last_step(len(plan.data.train))
        for line in held_out_lines(read_metrics(plan.run.path)):
            self._report(line["step"], line["loss"])

    def __call__(self, step: int, loss: float | None) -> None:
        """Report the loss of a checkpoint; raise training.Stopped if the trial is pruned."""
        finite = self._report(step, loss)
        if not self.prunes or step == self.last_step:  # training is complete, so pruning would save nothing
            return
        if not finite or self.trial.should_prune():
            value = f"{loss:.5g}" if finite else loss
            raise training.Stopped(f"pruned at step {step:,}: the loss on held-out images is {value}")

    def _report(self, step: int, loss: float | None) -> bool:
        """Report a loss, if finite, and return whether it is; Optuna takes one per step."""
        self.last = loss
        if loss is None or not math.isfinite(loss):
            return False
        self.trial.report(self.sign * loss, step)
        return True


def _measured(plan: Plan, measure: str) -> float | None:
    """Return the value in evaluation.json whose name begins with the measure; raise RunFailed for none or several."""
    from ddpm.runs import results

    path = plan.run.path / "evaluation.json"
    try:
        known = results.recorded(path)
    except ValueError as error:
        raise training.RunFailed(str(error)) from error
    names = [measure] if measure in known else [name for name in known if name.startswith(measure)]
    if len(names) != 1:
        raise training.RunFailed(
            f"{path} has {', '.join(names) or 'nothing'} of search.measure={measure}, where one is needed; it has: "
            f"{', '.join(known) or 'nothing'}"
        )
    value = known[names[0]].get("value")
    return value if type(value) in (int, float) else None


def _report(worker: "Worker") -> int:
    """Print the results, write optimise.md and optimise.png; return 1 if trials failed."""
    from ddpm.figures import plots
    from ddpm.runs.files import replacing

    trials, search, folder = worker.trials(), worker.search, worker.folder
    counts = {name: sum(t.state.name == state for t in trials) for state, name in STATES.items()}
    lines = [f"{len(trials)} trials: {', '.join(f'{n} {name}' for name, n in counts.items() if n)}"]
    if counts["complete"]:
        best = worker.study.best_trial
        lines.append(
            f"best {search.measure} {best.value:.6g}, of trial {best.number}: {folder / best.user_attrs['run']}"
        )
        lines.append(f"    {training_command(search.words(best.params))}")
    lines += _importance(worker, counts["complete"])
    say("\n" + "\n".join(lines))
    page, picture = folder / "optimise.md", folder / "optimise.png"
    order = "larger" if search.maximise else "smaller"
    title = f"# {folder.name}: search by {search.measure}, of which {order} is better"
    caution = "The best of many trials looks better than it is by chance: train it with other seeds before trusting it."
    table = "\n".join(_table(search, trials))
    with replacing(page) as temporary:
        temporary.write_text(
            "\n\n".join([title, *lines, caution, "![values and settings](optimise.png)", table]) + "\n"
        )
    plots.search(picture, trials, search.space, search.measure, search.maximise)
    say(f"wrote {page} {picture}")
    if failed := [f"  trial {t.number}: {t.user_attrs.get('reason')}" for t in trials if t.state.name == "FAIL"]:
        say("\n".join([f"{len(failed)} trials failed, and retry=true tries them again:", *failed]))
    return 1 if failed else 0


def _importance(worker: "Worker", done: int) -> list[str]:
    """Return a line on the share of variance that each setting explains; [] for few trials, or a single setting."""
    from optuna.importance import FanovaImportanceEvaluator, get_param_importances

    if done >= ENOUGH_TRIALS and len(worker.search.space) > 1:
        with contextlib.suppress(ValueError, RuntimeError, ImportError):  # all values equal, for example
            importances = get_param_importances(worker.study, evaluator=FanovaImportanceEvaluator(seed=0))
            shares = ", ".join(f"{key} {share:.0%}" for key, share in importances.items())
            return [f"share of the variance of {worker.search.measure} between trials (fANOVA): {shares}"]
    return []


def _table(search: "Search", trials: list[Any]) -> list[str]:
    """Return lines of a Markdown table of the trials, the best first."""
    done = [t for t in trials if t.state.name == "COMPLETE"]
    done.sort(key=lambda t: -t.value if search.maximise else t.value)
    lines = [f"| trial | {search.measure} | {' | '.join(f'`{key}`' for key in search.space)} | run | ended |"]
    lines.append(f"|---:|---:|{'---|' * (len(search.space) + 2)}")
    for t in [*done, *(t for t in trials if t.state.name != "COMPLETE")]:
        value = f"{t.value:.6g}" if t.value is not None else ""
        run = f"`{t.user_attrs['run']}`" if "run" in t.user_attrs else ""
        ended = t.user_attrs.get("reason") or STATES[t.state.name]
        cells = [t.number, value, *(t.params.get(key) for key in search.space), run, ended]
        texts = (f"{x:.4g}" if isinstance(x, float) else str(x).replace("|", "\\|") for x in cells)
        lines.append(f"| {' | '.join(texts)} |")
    return lines
