"""`ddpm-study lr-range` and `ddpm-study optimise`: settings that are found by trying them."""

import contextlib
import logging
import math
import os
import platform
import re
import shlex
import sys
import uuid
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ddpm.commands import training
from ddpm.commands.asked import must_be_writable, trusted
from ddpm.commands.planning import Plan, planned, status_of
from ddpm.commands.told import progress_bar, say
from ddpm.config import (
    CADENCE,
    MEMORY,
    SCIENCE,
    InvalidInput,
    build,
    compose,
    plain,
    resolve_device,
    with_known_keys,
)

if TYPE_CHECKING:
    import optuna
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from ddpm.study.lr_range import RangeTest, Suggestion

SEARCHED = (*(key for key in SCIENCE if key != "seed"), "data", "augment")  # what the keys of a space begin with
HELD_OUT = "held_out"  # the measure that every run has
INCOMPARABLE = ("schedule", "diffusion", "data")  # whose values make held-out losses mean other things
PROTOCOLS = {  # metric of ddpm-evaluate -> how its names in evaluation.json begin, where they do not with itself
    "precision_recall": ("precision", "recall"),
    "density_coverage": ("density", "coverage"),
    "bits_per_dim": ("bits_per_dim_vlb",),
    "log_likelihood": ("bits_per_dim_flow",),
    "steps": ("steps_frechet",),
}
MAXIMISED = ("recognition", "precision", "recall", "density", "coverage")
EXAMPLE = "'search.space={optimizer.lr:{low:1e-4,high:1e-1,log:true},trainer.batch_size:{choices:[32,64]}}'"
INSTALL = "pip install -c constraints.txt -e '.[optuna]'"
ENOUGH_TRIALS = 10  # for a word on which setting matters


def _composed(name: str, words: list[str]) -> DictConfig:
    """The configuration of words that were typed; refuses what a single process cannot do with it."""
    from ddpm import ranks

    if ranks.started():
        raise InvalidInput("this is done by one process: start it without torchrun")
    try:
        config = compose(name, words)
    except InvalidInput as error:
        raise InvalidInput(with_known_keys(name, str(error), words)) from error
    if config.extend is not None:
        raise InvalidInput(f"extend={config.extend} cannot be used here; init={config.extend} starts from its weights")
    return config


def _settings(config: DictConfig, name: str) -> DictConfig:
    """A node of settings."""
    node = config[name]
    if not isinstance(node, DictConfig):
        raise InvalidInput(f"{name}={node} must hold settings, such as {name}.KEY=VALUE")
    return node


def _number(config: DictConfig, name: str, key: str, whole: bool = False, least: float | None = None) -> Any:
    """A number among settings; refuses anything else."""
    value = config[key]
    if isinstance(value, bool) or not isinstance(value, int if whole else int | float) or not math.isfinite(value):
        raise InvalidInput(f"{name}.{key}={value} must be {'an integer' if whole else 'a finite number'}")
    if least is not None and value < least:
        raise InvalidInput(f"{name}.{key}={value} must be at least {least:g}")
    return value


def _command(words: list[str]) -> str:
    """What is typed to train by these words."""
    own = (Path.cwd() / "experiments" / "train.py").is_file()
    return f"{'python experiments/train.py' if own else 'ddpm-train'} {shlex.join(words)}"


# ------------------------------------------------------------------------------------------------- ddpm-study lr-range


def lr_range(words: list[str]) -> None:
    """Train some steps at rates that grow, and suggest a learning rate; draws a figure and writes the numbers.

    Makes no run directory, and keeps no weights.

    Args:
        words: as ddpm-train takes them, and range.KEY=VALUE, see conf/lr_range.yaml.
    Raises: InvalidInput before the first step.
    """
    from ddpm.study.lr_range import RangeTest, rates

    config = _composed("lr_range", words)
    asked = _settings(config, "range")
    start, end, beta, stop = (_number(asked, "range", key) for key in ("start", "end", "beta", "stop"))
    steps = _number(asked, "range", "steps", whole=True, least=10)
    try:
        walk, test = rates(start, end, steps), RangeTest(beta, stop)
    except ValueError as error:
        raise InvalidInput(f"range: {error}") from error
    out = asked.out
    if out is not None and not (isinstance(out, str) and out.endswith(".png")):
        raise InvalidInput(f"range.out={out} must be the name of a .png file")
    must_be_writable(out)
    plan = planned(config, resolve_device(config.device), marking=False)
    figure = plan.run.path.parent / "lr_range.png" if out is None else Path(out)
    figure.parent.mkdir(parents=True, exist_ok=True)
    try:
        _walk(plan, walk, test)
    except KeyboardInterrupt:
        say("interrupted; nothing was written")
        sys.exit(130)
    found = test.suggestion()
    test.write(figure.with_suffix(".csv"))
    _draw_range(figure, test, found)
    _say_range(words, plan, test, found, steps)
    say(f"wrote {figure} {figure.with_suffix('.csv')}")


def _walk(plan: Plan, walk: list[float], test: "RangeTest") -> None:
    """Train a step at each rate, as a run does, until the test is over."""
    from ddpm import cost
    from ddpm.ranks import Ranks
    from ddpm.sampling import Source

    config, trust = plan.config, trusted(plan.config)

    def optimizer(parameters: Any) -> Any:
        return build(config.optimizer, "optimizer", trust, params=list(parameters))

    plan.data.to(plan.device)
    source = Source(plan.diffusion, plan.model, plan.sampler, plan.data.shape, config.seed, plan.device)
    steps = cost.Training(source, plan.data, plan.trainer, optimizer, plan.augment)
    with progress_bar(len(walk) * plan.trainer.batch_size) as bar:
        for number, rate in enumerate(walk, 1):
            for group in steps.optimizer.param_groups:
                group["lr"] = rate
            Ranks().seed_dropout(config.seed, number)
            steps.step()
            _, loss, _ = steps.guard.recent[-1]
            test.add(rate, loss.item())
            bar.update(plan.trainer.batch_size)
            if test.ended:
                break


def _say_range(words: list[str], plan: Plan, test: "RangeTest", found: "Suggestion", steps: int) -> None:
    """How the test went, what it suggests, and what to type with it."""
    images = plan.trainer.batch_size
    over = f"; ended because {test.ended}" if test.ended else ""
    say(
        f"{len(test.rates)} of {steps} steps of {images:,} images, at rates from {test.rates[0]:.3g} to "
        f"{test.rates[-1]:.3g}{over}"
    )
    kept = [w for w in words if not re.match(r"[+~]*(range[.=]|optimizer\.lr=)", w)]
    told = {"steepest fall": found.steepest, "a tenth of the rate of the lowest loss": found.below_minimum}
    lines = [
        f"  {name:40}{rate:.2g}\n    {_command([*kept, f'optimizer.lr={rate:.2g}'])}"
        for name, rate in told.items()
        if rate is not None
    ]
    if lines:
        say("\n".join(["suggested learning rates, as the peak of the trainer's schedule:", *lines]))
    if found.note:
        say(("note: " if lines else "no learning rate is suggested: ") + found.note)


def _draw_range(path: Path, test: "RangeTest", found: "Suggestion") -> None:
    """The losses over the rates, and what is suggested."""
    import numpy as np

    from ddpm import plots

    figure = _figure(0.45)
    axes: Axes = figure.add_subplot()
    rates, losses, smoothed = np.array(test.rates), np.array(test.losses), np.array(test.smoothed)
    losses, smoothed = (np.where(np.isfinite(y), y, np.nan) for y in (losses, smoothed))
    axes.plot(rates, losses, color="tab:blue", alpha=0.3, linewidth=0.8, label="loss of a step")
    axes.plot(rates, smoothed, color="tab:blue", linewidth=1.8, label=f"averaged, beta = {test.beta:g}")
    marks = {"steepest fall": found.steepest, "a tenth of the lowest": found.below_minimum, "lowest": found.minimum}
    for (name, rate), colour in zip(marks.items(), ("tab:red", "tab:green", "0.5"), strict=True):
        if rate is not None:
            axes.axvline(rate, color=colour, linewidth=1.2, linestyle="--", label=f"{name}: {rate:.2g}")
    axes.set_xscale("log")
    finite = smoothed[np.isfinite(smoothed)]
    if len(finite):
        low, high = np.nanmin(losses), max(finite[0], np.nanmax(losses[: max(1, len(losses) // 2)]))
        if high > low:  # else the burst would flatten the rest
            axes.set_ylim(low - 0.08 * (high - low), high + 0.15 * (high - low))
    _looks(axes, "learning rate", "loss")
    axes.legend(frameon=False, fontsize=plots.SIZE)
    _save(figure, path)


# ------------------------------------------------------------------------------------------------- ddpm-study optimise


@dataclass(frozen=True)
class Dimension:
    """A setting that is searched: a range of numbers, or a few values."""

    key: str
    choices: tuple[str, ...] = ()  # as words; empty for a range
    low: float = 0.0
    high: float = 1.0
    log: bool = False
    step: float | None = None

    @property
    def whole(self) -> bool:
        """Whether it is a range of integers."""
        return isinstance(self.low, int) and isinstance(self.high, int)

    @property
    def examples(self) -> tuple[Any, ...]:
        """Values at the border."""
        return self.choices or (self.low, self.high)

    @property
    def distribution(self) -> Any:
        """The same for Optuna."""
        from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

        if self.choices:
            return CategoricalDistribution(self.choices)
        if self.whole:
            return IntDistribution(int(self.low), int(self.high), log=self.log, step=int(self.step or 1))
        return FloatDistribution(float(self.low), float(self.high), log=self.log, step=self.step)

    def facts(self) -> list[Any]:
        """What tells it from others, for JSON."""
        return [self.key, list(self.choices) or [self.low, self.high, self.log, self.step]]


@dataclass(frozen=True)
class Search:
    """What is searched and how."""

    fixed: tuple[str, ...]  # the words that all trials share
    space: tuple[Dimension, ...]
    trials: int
    measure: str
    maximise: bool
    sampler: str
    pruner: str
    seed: int

    def chosen(self, params: dict[str, Any]) -> list[str]:
        """What is typed for the values of a trial."""
        return [f"{d.key}={params[d.key]}" for d in self.space]

    def words(self, params: dict[str, Any]) -> list[str]:
        """What is typed for the run of a trial."""
        return [*self.fixed, *self.chosen(params)]


def optimise(words: list[str]) -> int:
    """Search settings by trials, each an ordinary run, until there are as many as asked for; then report.

    The trials are kept in <runs>/<study>/optuna.log. Repeated, the command goes on: with trials that a killed process
    left, from their checkpoints, and with those that are missing. Several processes may work on one study.

    Args:
        words: as ddpm-train takes them, and search.KEY=VALUE, see conf/optimise.yaml.
    Returns: 0, or 1 if trials failed.
    Raises: InvalidInput before the first trial.
    """
    config = _composed("optimise", words)
    if not isinstance(config.retry, bool):
        raise InvalidInput(f"retry={config.retry} must be true or false")
    search = _search(config, words)
    _must_have_optuna()
    base = _base(search)
    _must_measure(search, base)
    last, every = base.trainer.last_step(len(base.data.train)), base.trainer.checkpoint_every
    if search.pruner != "none" and last is not None and last <= every:
        say(f"note: no trial is pruned before its end: trainer.checkpoint_every={every} is not below its {last} steps")
    try:
        with _quiet(), Worker(search, base, retry=config.retry) as worker:
            while (trial := worker.next_trial()) is not None:
                _carry_out(worker, trial)
            return _report(worker)
    except KeyboardInterrupt:
        say("interrupted; the same command goes on")
        sys.exit(130)


def _must_have_optuna() -> None:
    try:
        import optuna  # noqa: F401
    except ImportError as error:
        raise InvalidInput(f"a search needs Optuna, which is not installed: {INSTALL}") from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Within it, Optuna logs nothing, and warns of nothing that is experimental in it."""
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


# ------------------------------------------------------------------------------------------------------ what was asked


def _search(config: DictConfig, words: list[str]) -> Search:
    """What `search` of a configuration asks for; refuses what is not clear."""
    asked = _settings(config, "search")
    trials = _number(asked, "search", "trials", whole=True, least=1)
    seed = _number(asked, "search", "seed", whole=True, least=0)
    for key, known in (
        ("direction", ("auto", "minimize", "maximize")),
        ("sampler", ("tpe", "random")),
        ("pruner", ("auto", "median", "halving", "none")),
    ):
        if asked[key] not in known:
            raise InvalidInput(f"search.{key}={asked[key]} is not known; allowed: {', '.join(known)}")
    measure = asked.measure
    if not isinstance(measure, str) or not measure:
        raise InvalidInput(f"search.measure={measure} must be {HELD_OUT}, or how a name in evaluation.json begins")
    space = tuple(_dimension(key, value) for key, value in _leaves(plain(asked.space)))
    if not space:
        raise InvalidInput(f"search.space={asked.space} must say what is searched, such as {EXAMPLE}")
    direction, pruner = asked.direction, asked.pruner
    if direction == "auto":
        direction = "maximize" if measure.startswith(MAXIMISED) else "minimize"
    if pruner == "auto":
        pruner = "median" if measure == HELD_OUT else "none"
    other = [d.key for d in space if d.key.split(".")[0] in INCOMPARABLE]
    if other and measure == HELD_OUT:
        raise InvalidInput(
            f"search.measure={HELD_OUT} does not compare runs that differ in {', '.join(other)}: their losses mean "
            "other things; set search.measure=frechet or loss_by_snr, and the lines of evaluation for it"
        )
    if other and pruner != "none":
        raise InvalidInput(
            f"search.pruner={pruner} compares losses on held-out images, which mean other things where runs differ in "
            f"{', '.join(other)}; set search.pruner=none"
        )
    taken = {d.key for d in space}
    keys = [(word.partition("=")[0].lstrip("+~"), word) for word in words]
    fixed = tuple(word for key, word in keys if key not in taken and not re.match(r"(search\b|retry$)", key))
    return Search(fixed, space, trials, measure, direction == "maximize", asked.sampler, pruner, seed)


def _leaves(node: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys of a space with what is said of each, however far they are indented."""
    if not isinstance(node, dict):
        if node is not None or prefix:
            raise InvalidInput(f"search.space: {prefix or 'it'} is {node}, but ranges are needed, such as {EXAMPLE}")
        return
    for key, value in node.items():
        name = f"{prefix}.{key}" if prefix else str(key)
        if isinstance(value, dict) and value and all(isinstance(inner, dict) for inner in value.values()):
            yield from _leaves(value, name)
        else:
            yield name, value


def _dimension(key: str, told: Any) -> Dimension:
    """What is said of a key; refuses what is no range and no choice, and keys that change no result."""
    where = f"search.space: {key}"
    first, _, rest = key.partition(".")
    if first not in SEARCHED:
        raise InvalidInput(f"{where} cannot be searched; allowed are keys of {', '.join(SEARCHED)}")
    if (first == "trainer" and rest in CADENCE) or (first == "model" and rest in MEMORY):
        raise InvalidInput(f"{where} changes no result, so there is nothing to search")
    if not isinstance(told, dict) or not (told.keys() == {"choices"} or {"low", "high"} <= told.keys()):
        allowed = "{low: L, high: H}, with log: true or step: S, or {choices: [...]}"
        raise InvalidInput(f"{where}: {told} must be {allowed}")
    if told.keys() == {"choices"}:
        values = told["choices"]
        words = tuple(dict.fromkeys(map(_word, values))) if isinstance(values, list) else ()
        if len(words) < 2:
            raise InvalidInput(f"{where}: choices={values} must be a list of two values or more")
        return Dimension(key, words)
    if unknown := told.keys() - {"low", "high", "log", "step"}:
        raise InvalidInput(f"{where}: {', '.join(map(str, unknown))} is not known; allowed: low, high, log, step")
    low, high, log, step = told["low"], told["high"], told.get("log", False), told.get("step")
    numbers = [low, high, *([] if step is None else [step])]
    if any(isinstance(x, bool) or not isinstance(x, int | float) or not math.isfinite(x) for x in numbers):
        raise InvalidInput(f"{where}: low, high and step must be finite numbers, not {', '.join(map(str, numbers))}")
    if not low < high:
        raise InvalidInput(f"{where}: low={low} must be less than high={high}")
    if not isinstance(log, bool) or (log and low <= 0):
        raise InvalidInput(f"{where}: log={log} with low={low}: log is true or false, and needs low > 0")
    if step is not None and (log or step <= 0 or (isinstance(low, int) and isinstance(high, int) and step % 1)):
        raise InvalidInput(f"{where}: step={step} must be > 0, whole between whole numbers, and not be given with log")
    return Dimension(key, (), low, high, log, step)


def _word(value: Any) -> str:
    """A value as it is typed after KEY=."""
    if isinstance(value, list):
        return f"[{','.join(map(_word, value))}]"
    if isinstance(value, dict):
        return f"{{{','.join(f'{key}:{_word(inner)}' for key, inner in value.items())}}}"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    text = str(value)
    named = re.fullmatch(r"[A-Za-z_][\w./-]*", text) and text.lower() not in ("null", "true", "false", "nan", "inf")
    quoted = text.replace("\\", "\\\\").replace("'", "\\'")
    return text if named or isinstance(value, int | float) else f"'{quoted}'"


def _planned(words: list[str]) -> Plan:
    """The run of these words; what its configuration says of a search is no part of it."""
    config = compose("optimise", words)
    config = OmegaConf.masked_copy(config, [key for key in config if key != "search"])  # type: ignore[misc]
    OmegaConf.set_struct(config, True)
    return planned(config, resolve_device(config.device), marking=False)


def _base(search: Search) -> Plan:
    """The run that trials vary, built to find what is wrong with all of them; and every end of the space composes."""
    corners = max(len(d.examples) for d in search.space)
    ends = [
        search.words({d.key: d.examples[min(i, len(d.examples) - 1)] for d in search.space}) for i in range(corners)
    ]
    for end in ends:
        try:
            compose("optimise", end)
        except InvalidInput as error:
            raise InvalidInput(f"search.space: {with_known_keys('optimise', str(error), end)}") from error
    try:
        return _planned(list(search.fixed))
    except InvalidInput:
        with contextlib.suppress(InvalidInput):
            return _planned(ends[0])  # what lacks, or is wrong, may be what is searched
        raise


def _must_measure(search: Search, base: Plan) -> None:
    """Refuse a measure that no run is going to have, and held-out images where there are none."""
    images, lines = len(base.data.held_out), base.settings.get("evaluation") or []
    if images == 0 and (search.measure == HELD_OUT or search.pruner != "none"):
        raise InvalidInput(f"{base.data.name} holds nothing out, and the search looks at that: set data.validation=0.1")
    if search.measure == HELD_OUT:
        return
    metrics: list[str] = ["recognition"] if base.config.recognition else []
    for line in lines:
        found = plain(compose("evaluate", [f"run={base.run.path.name}", *shlex.split(line)]).metric)
        metrics += found if isinstance(found, list) else [found]
    names = [name for metric in metrics for name in PROTOCOLS.get(metric, (metric,))]
    if not any(search.measure.startswith(name) or name.startswith(search.measure) for name in names):
        raise InvalidInput(
            f"search.measure={search.measure}: a run will have {', '.join([HELD_OUT, *names])}; add a line to "
            f"evaluation, such as 'evaluation=[\"metric={search.measure}\"]'"
        )


def _contract(base: Plan, search: Search) -> dict[str, Any]:
    """What all trials of a study must share to be compared."""
    return {
        "settings": base.run.hash,
        "evaluation": base.settings.get("evaluation") or [],
        "search.space": sorted(d.facts() for d in search.space),
        "search.measure": search.measure,
        "search.direction": "maximize" if search.maximise else "minimize",
    }


# ------------------------------------------------------------------------------------------------------------ the study


class Worker:
    """A process that works on a study, beside others or alone.

    It holds a lock for its life, whose name its trials bear: a trial that runs while nobody holds its lock was left by
    a process that died, and is begun again under another number, from the checkpoint of its run.

    Args:
        base: the run that trials vary, which tells the study's folder and what all its trials share.
        retry: also try again what failed before.
    Raises: InvalidInput, on entering, where the study has trials that cannot be compared with those to come.
    """

    def __init__(self, search: Search, base: Plan, retry: bool):
        import filelock

        self.search, self.retry, self.contract = search, retry, _contract(base, search)
        self.folder = folder = base.run.path.parent
        folder.mkdir(parents=True, exist_ok=True)
        self.name = f"{platform.node()}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
        self.lock = filelock.FileLock(folder / "optuna.lock")  # of the journal too: who has it may take it again
        self.life = filelock.FileLock(self._life_of(self.name))

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
        self._life_of(self.name).unlink(missing_ok=True)

    def _life_of(self, name: str) -> Path:
        return self.folder / f"optuna.{name}.lock"

    def _study(self) -> "optuna.Study":
        """The study on disk, or a new one."""
        import optuna
        from optuna.storages import JournalStorage
        from optuna.storages.journal import JournalFileBackend

        log, direction = self.folder / "optuna.log", self.contract["search.direction"]
        _mend(log)
        pruner = {
            "median": optuna.pruners.MedianPruner,
            "halving": optuna.pruners.SuccessiveHalvingPruner,
            "none": optuna.pruners.NopPruner,
        }[self.search.pruner]()
        name = self.folder.name
        try:
            # whose own lock would outlive a process that is killed
            storage = JournalStorage(JournalFileBackend(str(log), lock_obj=_Lock(self.lock)))  # type: ignore[arg-type]
            known = name in optuna.get_all_study_names(storage)
            study = optuna.load_study(study_name=name, storage=storage, pruner=pruner) if known else None
            if study is not None and (differs := self._differs(study)):
                if any(t.state.is_finished() or self._alive(t) for t in study.get_trials(deepcopy=False)):
                    raise InvalidInput(
                        f"{log} has trials by other settings, which cannot be compared ({differs}); repeat their "
                        "command, or choose another study=NAME"
                    )
                optuna.delete_study(study_name=name, storage=storage)  # of which nothing has come yet
                study = None
            if study is None:
                study = optuna.create_study(study_name=name, storage=storage, direction=direction, pruner=pruner)
                study.set_user_attr("contract", self.contract)
        except (ValueError, KeyError, TypeError, AttributeError, AssertionError) as error:
            told = f"{log} cannot be read as a study of Optuna ({error}); move it away to begin anew"
            raise InvalidInput(told) from error
        return study

    def _differs(self, study: "optuna.Study") -> str:
        """What of the contract is another one, in words."""
        known = study.user_attrs.get("contract") or {}
        return "; ".join(
            f"{key}: {_brief(known.get(key))} then, {_brief(value)} now"
            for key, value in self.contract.items()
            if known.get(key) != value
        )

    def trials(self) -> list[Any]:
        """Those that count, in order: all but what goes on under another number."""
        every = self.study.get_trials(deepcopy=False)
        begun_again = {t.user_attrs.get("continues") for t in every}
        return [t for t in every if t.number not in begun_again and t.state.name != "WAITING"]

    def next_trial(self) -> Any:
        """The next trial to carry out: one that was left by a process that died, else a new one; None when enough."""
        from ddpm.randomness import generator

        with self.lock:
            left = [t for t in self.trials() if t.state.name == "RUNNING" and not self._alive(t)]
            self._enqueue(left)
            number = len(self.trials())
            if number >= self.search.trials:
                return None
            # keyed by the number, so that a search that was interrupted proposes what it would have proposed
            seed = generator(self.search.seed, "search", number).initial_seed() % 2**32
            self.study.sampler = self._sampler(seed)
            trial = self.study.ask({d.key: d.distribution for d in self.search.space})
            trial.set_user_attr("worker", self.name)
        return trial

    def _sampler(self, seed: int) -> Any:
        import optuna

        if self.search.sampler == "random":
            return optuna.samplers.RandomSampler(seed=seed)
        return optuna.samplers.TPESampler(seed=seed, constant_liar=True, multivariate=True)

    def _enqueue(self, trials: list[Any]) -> None:
        """Have these trials begun again."""
        from optuna.trial import TrialState

        for trial in trials:
            self.study.enqueue_trial(trial.params, user_attrs={"continues": trial.number})
            if not trial.state.is_finished():
                self.study.tell(trial.number, state=TrialState.FAIL)

    def _alive(self, trial: Any) -> bool:
        """Whether the process that has a trial lives."""
        import filelock

        name = trial.user_attrs.get("worker")
        if trial.state.name != "RUNNING" or not isinstance(name, str):
            return False
        if name == self.name:  # one at a time, and it is asked for the next: the last one was not told
            return False
        path = self._life_of(Path(name).name)
        if not path.is_file():
            return False
        try:
            with filelock.FileLock(path, timeout=0):
                path.unlink(missing_ok=True)
        except filelock.Timeout:
            return True
        return False


class _Lock:
    """A lock of ours as Optuna's journal takes it."""

    def __init__(self, lock: Any):
        self.lock = lock

    def acquire(self) -> bool:
        self.lock.acquire()
        return True

    def release(self) -> None:
        self.lock.release()


def _mend(log: Path) -> None:
    """Cut off a last line that a process did not live to finish: no other could be appended to it."""
    if not log.is_file():
        return
    content = log.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        os.truncate(log, whole)


def _brief(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 120 else f"{text[:120]}..."


# ------------------------------------------------------------------------------------------------------------ a trial


def _carry_out(worker: Worker, trial: Any) -> None:
    """Train and measure the run of a trial, and tell the study what came of it."""
    from optuna.trial import TrialState

    search, study = worker.search, worker.study
    again = trial.user_attrs.get("continues")
    goes_on = "" if again is None else f", which goes on with {again}"
    count = f"({len(worker.trials())} of {search.trials})"
    say(f"\ntrial {trial.number}{goes_on} {count}: {' '.join(search.chosen(trial.params))}")
    try:
        value = _value(search, trial)
    except training.Stopped as stopped:
        trial.set_user_attr("reason", str(stopped))
        study.tell(trial, state=TrialState.PRUNED)
        say(f"trial {trial.number}: {stopped}")
    except (InvalidInput, training.RunFailed, OmegaConfBaseException) as error:
        reason = " ".join(str(error).split())
        trial.set_user_attr("reason", reason)
        study.tell(trial, state=TrialState.FAIL)
        say(f"FAILED trial {trial.number}: {reason}")
    else:
        study.tell(trial, value)
        best = study.best_trial
        say(f"trial {trial.number}: {search.measure} {value:.5g}; best so far {best.value:.5g}, of trial {best.number}")


def _value(search: Search, trial: Any) -> float:
    """Train the run of a trial, unless it is done, and measure it; returns the measure's value.

    Raises: training.Stopped if it is pruned; InvalidInput, training.RunFailed.
    """
    from ddpm.ranks import Ranks
    from ddpm.runs import DONE

    words = search.words(trial.params)
    plan = _planned(words)
    trial.set_user_attr("run", plan.run.hash)
    watcher = Watcher(search, plan, trial)
    status = status_of(plan.run)
    if status.get("state") == DONE:
        say(f"{plan.run.path} is done already ({status.get('step')} steps)")
    else:
        try:
            training.lead(plan, Ranks(), watch=watcher)
        finally:
            if (state := status_of(plan.run).get("state")) is not None:
                plan.run.write_status(state, overrides=words)  # what would have been typed for it
    training.measure(plan)
    watcher.catch_up()
    value = watcher.last if search.measure == HELD_OUT else _measured(plan, search.measure)
    if value is None or not math.isfinite(value):
        raise training.RunFailed(f"{plan.run.path}: its {search.measure} is {value}, no number to go by")
    return value


class Watcher:
    """Reports the losses on held-out images of a trial's run, those before it was interrupted too, and prunes it."""

    def __init__(self, search: Search, plan: Plan, trial: Any):
        self.plan, self.trial, self.reported = plan, trial, set[int]()
        self.prunes = search.pruner != "none"
        # another measure may have another direction; the loss is to be small all the same
        self.sign = -1 if search.maximise and search.measure != HELD_OUT else 1
        self.last_step = plan.trainer.last_step(len(plan.data.train))
        self.last: float | None = None
        self.catch_up()

    def catch_up(self) -> None:
        """Report what the run has measured."""
        from ddpm.runs import read_metrics

        for line in read_metrics(self.plan.run.path):
            if line["split"] == "held_out":
                self._report(line["step"], line["loss"])

    def __call__(self, step: int, loss: float | None) -> None:
        """A checkpoint: report its loss, and raise training.Stopped if others did better."""
        self._report(step, loss)
        if not self.prunes or step == self.last_step:  # the whole way gone, its value costs nothing more
            return
        if loss is None or not math.isfinite(loss):
            raise training.Stopped(f"pruned at step {step:,}: the loss on held-out images is {loss}")
        if self.trial.should_prune():
            raise training.Stopped(f"pruned at step {step:,}: the loss on held-out images is {loss:.5g}")

    def _report(self, step: int, loss: float | None) -> None:
        self.last = loss
        if loss is not None and math.isfinite(loss) and step not in self.reported:
            self.reported.add(step)
            self.trial.report(self.sign * loss, step)


def _measured(plan: Plan, measure: str) -> float | None:
    """The value in evaluation.json whose name begins with the measure; refuses none and several."""
    from ddpm import evaluation

    path = plan.run.path / "evaluation.json"
    try:
        known = evaluation.recorded(path)
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


# ----------------------------------------------------------------------------------------------------------- the report


def _report(worker: Worker) -> int:
    """Say what was found, write optimise.md and optimise.png; returns 1 if trials failed."""
    from ddpm.files import replacing

    trials, search, folder = worker.trials(), worker.search, worker.folder
    failed = [t for t in trials if t.state.name == "FAIL"]
    running = [t for t in trials if t.state.name == "RUNNING"]
    done = [t for t in trials if t.state.name == "COMPLETE"]
    counts = {"complete": len(done), "failed": len(failed), "being trained by others": len(running)}
    counts["pruned"] = len(trials) - sum(counts.values())
    lines = [f"{len(trials)} trials: {', '.join(f'{n} {name}' for name, n in counts.items() if n)}"]
    best = None
    if done:
        best = (max if search.maximise else min)(done, key=lambda t: t.value)
        lines += [
            f"best {search.measure} {best.value:.6g}, of trial {best.number}: {folder / best.user_attrs['run']}",
            f"  {_command(search.words(best.params))}",
        ]
    shares = _importance(worker, len(done))
    if shares:
        told = ", ".join(f"{key} {share:.0%}" for key, share in shares.items())
        lines.append(f"share of the variance of {search.measure} between trials (fANOVA): {told}")
    say("\n" + "\n".join(lines))
    with replacing(folder / "optimise.md") as temporary:
        temporary.write_text(_page(worker, trials, best, lines[0], shares))
    _draw_search(folder / "optimise.png", search, trials)
    say(f"wrote {folder / 'optimise.md'} {folder / 'optimise.png'}")
    if failed:
        told = "\n".join(f"  trial {t.number}: {t.user_attrs.get('reason')}" for t in failed)
        say(f"{len(failed)} trials failed, and retry=true tries them again:\n{told}")
    return 1 if failed else 0


def _importance(worker: Worker, done: int) -> dict[str, float]:
    """Share of the variance that each setting explains; {} where there are few trials, or one setting."""
    from optuna.importance import FanovaImportanceEvaluator, get_param_importances

    if done < ENOUGH_TRIALS or len(worker.search.space) < 2:
        return {}
    with contextlib.suppress(ValueError, RuntimeError, ImportError):  # all values alike, say
        found = get_param_importances(worker.study, evaluator=FanovaImportanceEvaluator(seed=0))
        return {key: float(share) for key, share in found.items()}
    return {}


def _page(worker: Worker, trials: list[Any], best: Any, counts: str, shares: dict[str, float]) -> str:
    """The report in Markdown."""
    search = worker.search
    keys = [d.key for d in search.space]
    order = "larger" if search.maximise else "smaller"
    lines = [f"# {worker.folder.name}: search by {search.measure}", "", f"{counts}; {order} is better.", ""]
    if best is not None:
        lines += [f"Best: **{best.value:.6g}**, trial {best.number}, run `{best.user_attrs['run']}`:", "", "```"]
        lines += [_command(search.words(best.params)), "```", ""]
    lines += [
        "The best of many trials is flattered by chance: train it with other seeds before it is believed.", "",
        "![values and settings](optimise.png)", "",
    ]  # fmt: skip
    if shares:
        lines += ["| setting | share of the variance (fANOVA) |", "|---|---:|"]
        lines += [f"| `{key}` | {share:.0%} |" for key, share in shares.items()] + [""]
    lines += [f"| trial | {search.measure} | {' | '.join(f'`{key}`' for key in keys)} | run | ended |"]
    lines += [f"|---:|---:|{'---|' * (len(keys) + 2)}"]
    value = {t.number: t.value if t.value is not None else math.nan for t in trials}
    rank = [t for t in trials if t.state.name == "COMPLETE"]
    rank.sort(key=lambda t: -value[t.number] if search.maximise else value[t.number])
    for t in [*rank, *(t for t in trials if t.state.name != "COMPLETE")]:
        cells = [
            str(t.number),
            f"{value[t.number]:.6g}" if t.state.name == "COMPLETE" else "",
            *(_cell(t.params.get(key)) for key in keys),
            f"`{t.user_attrs['run']}`" if "run" in t.user_attrs else "",
            str(t.user_attrs.get("reason") or t.state.name.lower()).replace("|", "\\|"),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value).replace("|", "\\|")


def _draw_search(path: Path, search: Search, trials: list[Any]) -> None:
    """The values in the order of trials, the best so far, and the values over each setting."""
    columns = min(4, len(search.space))
    rows = math.ceil(len(search.space) / columns)
    figure = _figure(0.32 + 0.3 * rows)
    grid = figure.add_gridspec(1 + rows, columns, height_ratios=[1.1, *[1] * rows])
    values = [t.value for t in trials if t.state.name == "COMPLETE"]
    log = len(values) > 1 and 0 < 5 * min(values) < max(values)
    _draw_history(figure.add_subplot(grid[0, :]), search, trials)
    for i, dimension in enumerate(search.space):
        axes = figure.add_subplot(grid[1 + i // columns, i % columns])
        _draw_slice(axes, dimension, trials)
        _looks(axes, dimension.key, search.measure if i % columns == 0 else "")
    for axes in figure.axes:
        if log:
            axes.set_yscale("log")
    _save(figure, path)


def _draw_history(axes: "Axes", search: Search, trials: list[Any]) -> None:
    """A mark for each trial, and the best so far as a line."""
    from matplotlib.ticker import MaxNLocator

    from ddpm import plots

    done = [t for t in trials if t.state.name == "COMPLETE"]
    best = [(max if search.maximise else min)(t.value for t in done[: i + 1]) for i in range(len(done))]
    axes.plot([t.number for t in done], [t.value for t in done], "o", color="tab:blue", markersize=4, label="complete")
    if done:
        last = max(t.number for t in trials)
        places = [*(t.number for t in done), last]
        axes.step(places, [*best, best[-1]], where="post", color="tab:red", linewidth=1.4, label="best so far")
    for state, marker, colour in (("PRUNED", "|", "0.5"), ("FAIL", "x", "tab:orange")):
        places = [t.number for t in trials if t.state.name == state]
        if places:  # without a value: at the bottom
            across = axes.get_xaxis_transform()
            label = {"PRUNED": "pruned", "FAIL": "failed"}[state]
            axes.plot(places, [0.03] * len(places), marker, color=colour, transform=across, label=label)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    _looks(axes, "trial", search.measure)
    if trials:
        axes.legend(frameon=False, fontsize=plots.SIZE, ncols=4, loc="upper right")


def _draw_slice(axes: "Axes", dimension: Dimension, trials: list[Any]) -> None:
    """The values over a setting; darker is later."""
    done = [t for t in trials if t.state.name == "COMPLETE" and dimension.key in t.params]
    chosen = [t.params[dimension.key] for t in done]
    places = [dimension.choices.index(c) for c in chosen] if dimension.choices else chosen
    axes.scatter(places, [t.value for t in done], c=[t.number for t in done], cmap="Blues", vmin=-len(trials) / 2, s=18)
    if dimension.choices:
        axes.set_xticks(range(len(dimension.choices)), list(dimension.choices))
        axes.set_xlim(-0.5, len(dimension.choices) - 0.5)
    elif dimension.log:
        axes.set_xscale("log")


# -------------------------------------------------------------------------------------------------------------- figures


def _figure(height: float) -> "Figure":
    """An empty figure of the usual width, and a height in widths."""
    from matplotlib.figure import Figure

    from ddpm import plots

    width = plots.WIDTH / plots.DPI
    return Figure(figsize=(width, height * width), dpi=plots.DPI, layout="constrained")


def _looks(axes: "Axes", x_label: str, y_label: str) -> None:
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def _save(figure: "Figure", path: Path) -> None:
    from ddpm.files import replacing

    with replacing(path) as temporary:
        figure.savefig(temporary, format="png")
