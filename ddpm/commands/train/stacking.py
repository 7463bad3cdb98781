"""`ddpm-train -m stack=seed`: runs of a sweep that differ in a few numbers, trained and sampled as one stack."""

import contextlib
import copy
import functools
import json
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any, NamedTuple

from omegaconf import DictConfig, OmegaConf

from ddpm.commands.console import say
from ddpm.commands.launch import job_number, sweep
from ddpm.commands.sources import source_of
from ddpm.commands.train import training
from ddpm.commands.train.checking import activations
from ddpm.commands.train.prepare import Plan, must_be_sound, must_be_tracked, must_fit, planned, status_of
from ddpm.config import InvalidInput, compose, resolve_device, resolved

FREE = (  # keys in which runs of a stack may differ: the losses do not depend on them
    "seed", "optimizer.lr", "optimizer.weight_decay", "optimizer.betas", "trainer.ema_decay", "trainer.ema_warmup",
)  # fmt: skip
DROPS = ("task.drop", "model.drop")  # these too, if none or all are 0: otherwise the networks differ


class Job(NamedTuple):
    """A run of a stack."""

    plan: Plan
    words: list[str]
    number: int
    resume: Path | None
    step: int  # that it resumes from


def train(config: DictConfig) -> None:
    """Train the configured run, in a stack with those runs of the sweep that fit into it.

    Those that are done are measured, with samples drawn jointly. Their own jobs then find them done, or failed, and do
    the rest. Runs that cannot be stacked are trained, or sampled, one by one, with a notice.

    Raises: as `ddpm.commands.train.training.train`.
    """
    number = job_number()
    if config.get("stack") is not None and number not in sweep().taken:
        must_be_sound(config)
        _train_stacks(config, number)
    if number in sweep().failed:  # in this process: retry=true does not apply
        config = OmegaConf.merge(config, {"retry": False})  # type: ignore[assignment]
    training.train(config)


def _train_stacks(config: DictConfig, number: int | None) -> None:
    """Train and measure, in stacks, the jobs that equal this one but for `FREE`."""
    jobs = sweep().jobs
    if number is None or number >= len(jobs):
        say(
            "stack=seed: a single run is not stacked" if number is None else _alone("another process trains the others")
        )
        return
    left = {n: _composed(words) for n, words in enumerate(jobs) if n not in sweep().taken}
    own = _form(config)
    alike = {n: other for n, other in left.items() if other is not None and _form(other) == own}
    sweep().taken.update(alike)
    every = _plans({n: config if n == number else other for n, other in alike.items()})
    if len(every) < 2:
        return
    size = _fitting(next(iter(every.values())))
    _train_at_once(every, size)
    _measure_at_once(list(every.values()), size)


def _train_at_once(plans: dict[int, Plan], size: int) -> None:
    """Train those of the plans, by job, that are not done, in stacks of at most `size` runs."""
    from ddpm.runs.directory import DONE

    plans = {n: plan for n, plan in plans.items() if status_of(plan.run).get("state") != DONE}
    if len(plans) < 2:
        return
    if reason := _why_not(next(iter(plans.values()))):
        say(_alone(reason))
        return
    with contextlib.ExitStack() as locks:
        at_step = defaultdict[int, list[Job]](list)
        for n, plan in plans.items():
            if (job := _lock(plan, sweep().jobs[n], n, locks)) is not None:
                at_step[job.step].append(job)
        for step, those in at_step.items():
            if size == 1:
                say(_alone("a step of two runs does not fit in memory"))
            elif len(those) == 1:
                say(f"{those[0].plan.run.path}: {_alone(f'no other run is at step {step:,}')}")
            stacks = (those[first : first + size] for first in range(0, len(those), size))
            for stack in stacks:
                if len(stack) > 1:
                    _train_together(stack)


def _alone(reason: str) -> str:
    return f"stack=seed: trained one by one, because {reason}"


def _composed(words: list[str]) -> DictConfig | None:
    """Return the configuration of a job; None if it does not compose, which its own job reports."""
    others = tuple(word for word in words if not word.startswith(("hydra", "seed=")))
    seeds = [word for word in words if word.startswith("seed=")]
    try:
        config = copy.deepcopy(_without_seed(others))
    except InvalidInput:
        return None
    if seeds:
        OmegaConf.update(config, "seed", OmegaConf.from_dotlist(seeds[-1:]).seed)
    return config


@functools.lru_cache(maxsize=256)  # most jobs differ in their seeds alone
def _without_seed(words: tuple[str, ...]) -> DictConfig:
    return compose("train", list(words))


def _form(config: DictConfig) -> str | None:
    """Return a key of the settings in which the runs of a stack must agree; None for an incomplete configuration."""
    try:
        plain: Any = OmegaConf.create(resolved(config))
    except InvalidInput:
        return None
    for key in (*FREE, *DROPS):
        value = OmegaConf.select(plain, key)
        if value is not None:
            OmegaConf.update(plain, key, bool(value) if key in DROPS else None)
    return json.dumps(OmegaConf.to_container(plain), sort_keys=True, default=str)


def _plans(configs: dict[int, DictConfig]) -> dict[int, Plan]:
    """Return the plans of jobs that need training or measuring, each run once; refused jobs report for themselves."""
    from ddpm.runs.directory import DONE, FAILED

    plans, paths = dict[int, Plan](), set[Path]()
    for number, config in configs.items():
        if any(config.get(key) is not None for key in ("extend", "teacher", "init_codec", "init_text")):
            continue
        try:
            plan = planned(config, resolve_device(config.device), marking=False)
            status = status_of(plan.run)
        except InvalidInput:
            continue
        if plan.codec is not None or plan.text is not None:  # taken from the run that is tuned
            continue
        failed = status.get("state") == FAILED and status.get("started") and not config.get("retry")
        measured = set(plan.settings.get("evaluation", [])) <= set(status.get("evaluated") or [])
        done = status.get("state") == DONE and measured
        if not done and not failed and plan.run.path not in paths:
            plans[number] = plan
            paths.add(plan.run.path)
    return plans


def _why_not(plan: Plan) -> str | None:
    from ddpm.training import stack

    if plan.config.get("compile"):
        return "compile=true compiles one network"
    return stack.why_not(plan.parts.task, plan.parts.trainer)


def _fitting(plan: Plan) -> int:
    """Return how many such runs fit into memory in one stack."""
    needed, there = must_fit(plan.parts, plan.data, plan.device, activations(plan))
    return 2**31 if there is None else max(1, there // max(1, sum(needed)))


def _lock(plan: Plan, words: list[str], number: int, locks: contextlib.ExitStack) -> Job | None:
    """Lock a run and return it with the step that it resumes from; None for one that is left to its own job."""
    from ddpm.runs import checkpoint
    from ddpm.runs.directory import DONE, RunIsHeld

    try:
        locks.enter_context(plan.run.locked())
        if status_of(plan.run).get("state") == DONE:  # another process has finished it meanwhile
            return None
        resume, step = checkpoint.last_whole(plan.run.checkpoints), 0
        if resume is not None:
            state = checkpoint.load_state(resume)
            must_be_tracked(plan.parts.trainer, resume, state)
            step = state["step"]
    except (RunIsHeld, InvalidInput, ValueError):
        return None
    return Job(plan, [word for word in words if not word.startswith("hydra")], number, resume, step)


def _train_together(jobs: list[Job]) -> None:
    """Train these runs in a stack, and draw the results of each; its outcome is written into its status.

    Raises: SystemExit after a signal.
    """
    from ddpm.runs.directory import DONE, FAILED, INTERRUPTED, now
    from ddpm.training.interrupt import Interrupted

    say(f"stack=seed: {len(jobs)} runs at once")
    code: int | str | None = None
    try:
        try:
            results = _fitted(jobs)
        except Exception as error:  # of the stack as a whole, such as too little memory
            for job in jobs:
                job.plan.run.write_status(INTERRUPTED, reason=f"not stacked: {error}", ended=now())
            say(_alone((str(error).strip() or type(error).__name__).splitlines()[0]))
            return
        sources = _sources_of(jobs, results)
        for job, result in zip(jobs, results, strict=True):
            run = job.plan.run
            if code is not None and not isinstance(result, Exception):  # its figures are drawn when it is resumed
                result = Interrupted(int(code) - 128)
            try:
                ended = training.concluded(job.plan, functools.partial(_unwrap, result), sources.get(job.number))
            except SystemExit as end:
                code = end.code
                continue
            except training.RunFailed:
                sweep().failed.add(job.number)
                continue
            run.write_status(DONE, reason=f"budget of {ended} used", ended=now(), paired=True)
            say(f"done: {run.path}, {run.status()['step']:,} steps in {run.status()['seconds']:.0f} s")
    except KeyboardInterrupt:
        for job in jobs:
            if status_of(job.plan.run).get("state") not in (DONE, FAILED):
                job.plan.run.write_status(INTERRUPTED, reason="interrupted twice", ended=now())
        say("interrupted; the same command resumes from the last checkpoints")
        sys.exit(130)
    if code is not None:
        sys.exit(code)


def _fitted(jobs: list[Job]) -> list[Any]:
    """Return, for each run, the budget that ended it and the averaged task, or the exception that ended it."""
    from ddpm.training.ranks import Ranks
    from ddpm.training.stack import fit_together

    begun = []
    for job in jobs:
        plan = job.plan
        training.print_start(plan, Ranks(), job.resume)
        training.begin(plan, job.words, job.number, stacked=len(jobs))
        begun.append(
            plan.parts.trainer.begin(
                plan.run, plan.parts.task, plan.data, plan.parts.optimizer, seed=plan.config.seed, device=plan.device,
                augment=plan.parts.augment, resume=job.resume, shown=job is jobs[0],
            )
        )  # fmt: skip
    return list(fit_together([job.plan.parts.trainer for job in jobs], begun))


def _sources_of(jobs: list[Job], results: list[Any]) -> dict[int, Any]:
    """Return job -> the source of its results, which draws jointly with those of the others if possible."""
    from ddpm.sources.stacked import SharingSampler

    ended = {
        job.number: training.source_of_results(job.plan, result[1])
        for job, result in zip(jobs, results, strict=True)
        if not isinstance(result, Exception)
    }
    sources = {number: source for number, source in ended.items() if source is not None}
    shared = _shared(list(sources.values()))
    if shared is None:
        return sources
    return {number: SharingSampler(one, shared, place) for place, (number, one) in enumerate(sources.items())}


def _shared(sources: list[Any]) -> Any:
    """Return a joint sampler for these sources; print why and return None if they cannot be stacked."""
    from ddpm.sources.stacked import Shared

    def tell(reason: str) -> None:
        say(f"stack=seed: sampled one by one, because {reason}")

    if len(sources) < 2 or any(source.sampler is None for source in sources):  # without a sampler they draw in one step
        return None
    try:
        return Shared(sources, tell)
    except (ValueError, RuntimeError) as error:  # they differ, or memory does not suffice
        tell(str(error).splitlines()[0])
        return None


def _measure_at_once(plans: list[Plan], size: int) -> None:
    """Measure the finished runs, drawing from at most `size` jointly; failures are left to their own jobs."""
    for first in range(0, len(plans), size):
        together = plans[first : first + size]
        opening = _Opening([plan.run.path for plan in together])
        for plan in together:
            with contextlib.suppress(training.RunFailed, InvalidInput):
                if any(opening.is_due(plan.run.path, line) for line in plan.settings.get("evaluation", [])):
                    say(f"measuring {plan.run.path}")
                    training.measure(plan, opening)


class _Opening:
    """Opens the sources of runs to be measured, which draw jointly with those measured by the same line.

    Args:
        paths: of the runs.
    """

    def __init__(self, paths: list[Path]):
        self.paths = paths
        self.shared = dict[str, tuple[Any, list[str]]]()  # by line: the joint sampler, and its runs in order

    def __call__(self, config: DictConfig, line: str) -> training.Opened:
        """Return the result of `source_of`, with a source that draws jointly if possible."""
        from ddpm.sources.stacked import SharingSampler

        if line not in self.shared:
            sources = self._sources(config, line)
            self.shared[line] = _shared(list(sources.values())), list(sources)
        source, *more = source_of(config)
        shared, runs = self.shared[line]
        if shared is not None and str(config.run) in runs:
            source = SharingSampler(source, shared, runs.index(str(config.run)))
        return (source, *more)

    def is_due(self, path: Path, line: str) -> bool:
        """Whether a run is done, and not yet measured by a line."""
        from ddpm.runs.directory import DONE, Run

        status = status_of(Run(path))
        return status.get("state") == DONE and line not in (status.get("evaluated") or [])

    def _sources(self, config: DictConfig, line: str) -> dict[str, Any]:
        """Return run folder -> the source that a line draws from."""
        sources = {}
        for path in self.paths:
            other = copy.deepcopy(config)
            other.run = str(path)
            with contextlib.suppress(InvalidInput, RuntimeError):  # reported when it is measured; too little memory
                if self.is_due(path, line):
                    sources[str(path)] = source_of(other)[0]
        return sources


def _unwrap(result: Any) -> Any:
    """Return the budget that ended a run with its averaged task, or raise the exception that ended it."""
    if isinstance(result, Exception):
        raise result
    return result
