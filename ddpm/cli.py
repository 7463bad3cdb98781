"""The commands: train, sample, evaluate and schedule.

Exit codes: 0 done; 1 a run or some arms failed; 2 invalid input (one line, nothing begun); 130 / 143 interrupted.
"""

import contextlib
import errno
import functools
import inspect
import json
import os
import re
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import hydra
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ddpm.config import (
    AUGMENTATION,
    InvalidInput,
    build,
    build_data,
    compose,
    conf_dir,
    must_be_finite,
    must_be_storable,
    plain,
    read_config,
    resolve_device,
    resolved,
    science,
    with_known_keys,
)

Job = Callable[[DictConfig], None]


class RunFailed(Exception):
    """A run that began did not end well; the message says why and how to go on."""


def train() -> None:
    """`ddpm-train`: train a network and draw what it learned; with --check only say what that would take."""
    if CHECK not in sys.argv[1:]:
        _main("train", _train)
        return
    sys.argv[1:] = [word for word in sys.argv[1:] if word != CHECK]
    with tempfile.TemporaryDirectory() as scratch:  # for what Hydra writes of a sweep
        sys.argv.append(f"hydra.sweep.dir='{scratch}'")
        _main("train", _check, failing=2)


def sample() -> None:
    """`ddpm-sample`: draw samples from a run directory."""
    _main("sample", _sample)


def evaluate() -> None:
    """`ddpm-evaluate`: measure what a run directory learned, by its samples or by held-out images."""
    _main("evaluate", _evaluate)


def schedule() -> None:
    """`ddpm-schedule`: say what a noise schedule is, in a table and a figure, beside others."""
    _main("schedule_report", _schedule)


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
            if not _multirun():
                _refuse(error)
            reason = f"{_overrides()}: {error}"
        except OmegaConfBaseException as error:  # a key that was removed, say
            if not _multirun():
                _refuse(InvalidInput(str(error).splitlines()[0]))
            reason = f"{_overrides()}: {error}"
        except OSError as error:
            if error.errno != errno.ENAMETOOLONG:  # which is what was typed
                raise
            if not _multirun():
                _refuse(InvalidInput(f"{error.strerror}: {error.filename}"))
            reason = f"{_overrides()}: {error}"
        except RunFailed as error:
            reason = f"{_overrides()}: {error}" if _multirun() else str(error)
        else:
            return
        reason = _in_one_line(reason)
        if failing == 2:
            print(f"error: {reason}", file=sys.stderr, flush=True)
        else:
            _say(f"FAILED {reason}")
        if os.getpid() != launcher:  # a launcher with processes of its own: let Hydra carry the failure back
            raise RunFailed(reason)
        failed.append(reason)

    hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name=name)(guarded)()
    if len(failed) > 1 and failing != 2:
        _say(f"{len(failed)} runs failed:\n" + "\n".join(f"  {reason}" for reason in failed))
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


# ------------------------------------------------------------------------------------------------------------- train

CHECK = "--check"


class Plan(NamedTuple):
    """A training run that has been found right, and of which nothing is begun."""

    run: Any
    config: DictConfig
    settings: dict[str, Any]  # the configuration, resolved: what the run directory keeps
    data: Any
    augment: Any
    model: Any
    diffusion: Any
    sampler: Any
    optimizer: Any
    trainer: Any
    device: Any
    parent: Path | None  # the checkpoint of the run that is extended
    moments: float  # bytes that the optimizer keeps for each byte of weights


def _train(config: DictConfig) -> None:
    from ddpm import ranks
    from ddpm.runs import DONE

    device = resolve_device(config.device)
    try:
        team, device = ranks.join(device)
    except ValueError as error:
        raise InvalidInput(str(error)) from error
    plan = _plan(config, device, team.size)
    if not team.leads:
        _follow(plan, team)
        return
    status = _status(plan.run)
    if status.get("state") == DONE:
        team.told(None)
        _say(f"{plan.run.path} is done already ({status.get('step')} steps); nothing to do")
        return
    _lead(plan, team)


def _plan(config: DictConfig, device: Any, processes: int = 1, marking: bool = True) -> Plan:
    """Read and build all that a run needs, and refuse what would break it later.

    Args:
        marking: mark a run of a sweep that is refused as FAILED with the reason, unless it is done or being trained.
    Raises: InvalidInput.
    """
    import torch

    import ddpm
    from ddpm import checkpoint
    from ddpm.files import regular_size
    from ddpm.randomness import generator
    from ddpm.runs import DONE, FAILED, RUNNING, Run, now, science_hash

    trust = _trusted(config)
    parents, parent = {}, None
    if config.extend is not None:
        config, parent = _extended(config)
        parents["extend"] = checkpoint.sha256(parent / "model.safetensors")
    settings = resolved(config)
    must_be_finite(settings, "")
    must_be_storable(settings)
    _must_be_whole(config, "seed")
    for key in ("recognition", "compile"):
        if not isinstance(config.get(key, False), bool):  # runs of earlier versions have no `compile`
            raise InvalidInput(f"{key}={config[key]} must be true or false")
    if config.data is not None and config.data.get("root", "") is None:
        raise InvalidInput("data.root must be given: data.root=FOLDER")
    initial = None
    if config.init is not None:
        initial = _weights_file(Path(str(config.init)))
        try:
            regular_size(initial, checkpoint.LARGEST)
        except ValueError as error:
            raise InvalidInput(f"init={config.init}: {error}") from error
        parents["init"] = checkpoint.sha256(initial)
    data = build_data(config.data, trust)
    facts = science(settings, data.identity(), parents, ddpm.NUMERICS)
    run = Run(_folder_of_runs(config) / science_hash(facts))

    try:
        torch.manual_seed(generator(config.seed, "initial weights").initial_seed())
        model = build(config.model, "model", trust)
        _must_match(model, data)
        augment = None if config.get("augment") is None else build(config.augment, "augment", trust)
        diffusion = build(config.diffusion, "diffusion", trust, schedule=build(config.schedule, "schedule", trust))
        sampler = build(config.sampler, "sampler", trust)
        _must_walk(sampler, diffusion)
        _must_have_room(model, diffusion, data.shape[0])
        trainer = build(config.trainer, "trainer", trust)
        _must_divide(trainer, processes)
        optimizer = build(config.optimizer, "optimizer", trust, params=list(model.parameters()))
        moments = _must_step(config.optimizer, trust, device)
        _must_fit(model, moments, data, trainer, device)
        if initial is not None:
            _load(model, initial)
        if parent is not None:
            _load(model, parent / "model.safetensors")
            _must_leave_a_budget(config, trainer, data, parent)
    except InvalidInput as error:
        if marking and _multirun() and _status(run).get("state") not in (DONE, RUNNING):
            run.path.mkdir(parents=True, exist_ok=True)
            run.write_status(FAILED, reason=str(error), ended=now())
        raise
    return Plan(
        run, config, settings, data, augment, model, diffusion, sampler, optimizer, trainer, device, parent, moments
    )


def _check(config: DictConfig) -> None:
    """Say what training would do, and what it would need of what is there; begin nothing.

    Raises: InvalidInput for all that would be refused, and where memory or disk do not suffice.
    """
    from ddpm import preflight, ranks
    from ddpm.runs import DONE, RUNNING

    if ranks.started():
        raise InvalidInput(f"{CHECK} looks at one process: start it without torchrun")
    device = resolve_device(config.device)
    download = isinstance(config.data, DictConfig) and config.data.get("download") is True
    if download:
        config = config.copy()
        config.data.download = False
    try:
        plan = _plan(config, device, marking=False)
    except InvalidInput as error:
        if not download:
            raise
        does = f"start the run, which downloads it: {CHECK} does not"
        raise InvalidInput(str(error).replace("set download=true", does)) from error
    data, model, trainer = plan.data, plan.model, plan.trainer
    status = _status(plan.run)
    if status.get("state") == RUNNING:
        raise InvalidInput(f"{plan.run.path} is being trained by process {status.get('pid')} on {status.get('host')}")
    channels, height, width = data.shape
    last = trainer.last_step(len(data.train))
    budget = [] if last is None else [f"{last:,} steps of {trainer.batch_size:,} images"]
    budget += [] if trainer.seconds is None else [f"{trainer.seconds:,g} s"]
    lines = {
        "run": f"{plan.run.path}: {_state(plan, status)}",
        "data": f"{data.name}, {len(data.train):,} images to train on and {len(data.held_out):,} held out, "
        f"{channels}x{height}x{width}",
        "model": f"{type(model).__name__}, {sum(p.numel() for p in model.parameters()):,} parameters",
        "budget": " or ".join(budget),
    }
    if status.get("state") != DONE:
        needed, there = _must_fit(model, plan.moments, data, trainer, device, _activations(plan))
        room, free, parts = _disk(plan)
        if room > free:
            raise InvalidInput(_no_room(plan))
        lines["memory"] = f"{preflight.in_words(sum(needed))} of {_known(there)} on {device}: {needed}"
        lines["disk"] = f"{preflight.in_words(room)} of {preflight.in_words(free)} at {plan.run.path.parent}: {parts}"
    _say("\n".join(([_overrides()] if _multirun() else []) + [f"{key:8}{line}" for key, line in lines.items()]))


def _state(plan: Plan, status: dict[str, Any]) -> str:
    """What the same command without --check would find of a run, and do."""
    from ddpm import checkpoint
    from ddpm.runs import DONE

    if status.get("state") == DONE:
        return f"done ({status['step']:,} steps); nothing to do"
    try:
        resume = checkpoint.last_whole(plan.run.checkpoints) or plan.parent
    except ValueError as error:  # a newer version's
        raise InvalidInput(str(error)) from error
    before = f"{status['state']} before, " if status else "new, "
    return before + (f"would go on from {resume}" if resume is not None else "would begin at step 1")


def _activations(plan: Plan) -> int:
    """Bytes that the backward pass of a micro-batch reads: from losses of one and two images, as training has them."""
    from ddpm import preflight

    micro = plan.trainer.batch_size // plan.trainer.accumulate
    try:
        return preflight.activations(functools.partial(_loss, plan), plan.model.parameters(), micro)
    except RuntimeError as error:  # torch's for memory that there is not
        raise InvalidInput(f"a loss of one or two images cannot be computed on {plan.device}: {error}") from error


def _loss(plan: Plan, n: int) -> Any:
    """The mean loss of n images, all the same, computed as training does."""
    import torch

    from ddpm.precision import computing, resolve
    from ddpm.trainer import classes_for

    data, device = plan.data, plan.device
    precision = resolve(plan.trainer.precision, device, sum(p.numel() for p in plan.model.parameters()))
    model = plan.model.to(device, memory_format=torch.channels_last).train()
    x_0, y = data.batch(data.train[:1].expand(n), device)
    with computing(device, precision):
        return plan.diffusion.loss(model, x_0, classes_for(model, y)).mean()


def _compile(plan: Plan, processes: int) -> None:
    """Compile the network and try it on a batch; where that fails, say why and leave the network as it was."""
    started, model = time.perf_counter(), plan.model
    model.compile()
    try:
        _loss(plan, plan.trainer.batch_size // plan.trainer.accumulate // processes).backward()
    except Exception as error:  # whatever a compiler stumbles over, and torch has many classes for it
        model._compiled_call_impl = None
        reason = str(error).strip().splitlines() or [type(error).__name__]
        _say(f"warning: the network cannot be compiled here, and is trained as it is: {reason[0]}")
    else:
        _say(f"compiled in {time.perf_counter() - started:.0f} s")
    for p in model.parameters():
        p.grad = None


def _must_fit(
    model: Any, moments: float, data: Any, trainer: Any, device: Any, activations: int = 0
) -> tuple[Any, int | None]:
    """Refuse a training step that is larger than the memory; (what it needs, the bytes that there are).

    Without activations, whose count takes a moment, this is what it needs at least.
    """
    from ddpm import preflight

    needed = preflight.memory(model, moments, data.images, trainer.batch_size, trainer.accumulate, activations)
    there = preflight.available(device)
    if there is not None:
        there += sum(x.nbytes for x in (*model.parameters(), data.images) if x.device.type == device.type)
    if there is not None and sum(needed) > there:
        raise InvalidInput(
            f"a training step needs {preflight.in_words(sum(needed))} of memory on {device} ({needed}), but "
            f"{preflight.in_words(there)} are available; raise trainer.accumulate, or lower trainer.batch_size or "
            "model.channels"
        )
    return needed, there


def _disk(plan: Plan) -> tuple[int, int, str]:
    """Bytes that the run is going to write, those that are free there, and what is written, in words."""
    from ddpm import preflight

    trainer, path = plan.trainer, plan.run.path
    one = preflight.checkpoint(plan.model, plan.moments)
    count = preflight.checkpoints(trainer.last_step(len(plan.data.train)), trainer.checkpoint_every, trainer.keep)
    parts = f"{count:,} checkpoints of {preflight.in_words(one)}, {preflight.in_words(preflight.PICTURES)} of pictures"
    return preflight.disk(one, count, path), preflight.free(path), parts


def _no_room(plan: Plan) -> str:
    """What is said where the disk is too small for a run."""
    from ddpm import preflight

    room, free, parts = _disk(plan)
    return (
        f"the run needs {preflight.in_words(room)} of disk ({parts}), but {preflight.in_words(free)} are free at "
        f"{plan.run.path.parent}; lower trainer.keep or model.channels, or set runs= to a folder on another disk"
    )


def _known(size: int | None) -> str:
    from ddpm import preflight

    return "an unknown amount" if size is None else preflight.in_words(size)


def _must_step(config: DictConfig, trust: list[str], device: Any) -> float:
    """Refuse an optimizer that can take no step on the device; returns what it keeps, see `preflight.moments_of`."""
    import torch

    from ddpm import preflight

    weight = torch.nn.Parameter(torch.ones(2, device=device))
    weight.grad = torch.tensor([0.0, 1.0], device=device)
    trial = build(config, "optimizer", trust, params=[weight])
    try:
        trial.step()
    except (RuntimeError, ValueError, AssertionError, TypeError, ArithmeticError) as error:
        raise InvalidInput(f"optimizer: it takes no step on {device}: {' '.join(str(error).split())}") from error
    if not weight.isfinite().all():
        raise InvalidInput(
            f"optimizer: from weights of 1 with gradients of 0 and 1 its first step makes {weight.tolist()}; choose "
            "another eps, lr or momentum"
        )
    return preflight.moments_of(trial)


def _lead(plan: Plan, team: Any) -> None:
    """Train as the process that holds the run and writes, alone or before others."""
    from ddpm import checkpoint, files
    from ddpm.runs import DONE, INTERRUPTED, RunIsHeld, now
    from ddpm.schedules import concerns
    from ddpm.trainer import Interrupted

    run, config = plan.run, plan.config
    try:
        with run.locked():
            try:
                resume = checkpoint.last_whole(run.checkpoints) or plan.parent
            except ValueError as error:  # a newer version's, which must not be deleted
                team.told(None)
                raise InvalidInput(str(error)) from error
            _say(
                f"run {run.path}: {sum(p.numel() for p in plan.model.parameters()):,} parameters, "
                f"{len(plan.data.train):,} training images, {plan.device}"
                + (f", {team.size} processes" if team.size > 1 else "")
            )
            for concern in concerns(plan.diffusion.schedule, plan.diffusion.target):
                _say(f"warning: {concern}")
            room, free, _ = _disk(plan)
            if room > free:
                _say(f"warning: {_no_room(plan)}")
            if resume is not None:
                _say(f"going on from {resume}")
            try:
                with files.replacing(run.path / "config.yaml", durable=True) as temporary:
                    OmegaConf.save(OmegaConf.create(plan.settings), temporary)
                run.begin()
                team.told((run.path, resume))
                ended, ema = _fit(plan, team, resume)
                _draw_results(run, config, plan.data, plan.diffusion, ema.model, plan.sampler, plan.device)
            except Interrupted as error:
                run.write_status(INTERRUPTED, reason=str(error), ended=now())
                _say(f"{error}; the same command goes on from {checkpoint.last_whole(run.checkpoints)}")
                if error.signum not in (signal.SIGINT, signal.SIGTERM):
                    signal.raise_signal(error.signum)  # to whoever waited for it, and starts the job anew
                sys.exit(128 + error.signum)
            except Exception as error:
                _record_failure(run, error)
            run.write_status(DONE, reason=f"budget of {ended} used", ended=now(), paired=ended != "seconds")
            _next_steps(run, ended)
    except RunIsHeld as error:
        team.told(None)
        raise RunFailed(str(error)) from error
    except KeyboardInterrupt:
        run.write_status(INTERRUPTED, reason="interrupted twice", ended=now())
        _say("interrupted; the same command goes on from the last checkpoint")
        sys.exit(130)


def _follow(plan: Plan, team: Any) -> None:
    """Train beside the leading process, which holds the run and writes all that is written."""
    from ddpm.runs import Run
    from ddpm.trainer import Interrupted

    told = team.told()
    if told is None:
        return
    path, resume = told
    try:
        _fit(plan._replace(run=Run(path)), team, resume)
    except Interrupted as error:
        sys.exit(128 + error.signum)


def _fit(plan: Plan, team: Any, resume: Path | None) -> tuple[str, Any]:
    if plan.config.get("compile"):
        _compile(plan, team.size)
    return plan.trainer.fit(
        plan.run, plan.model, plan.diffusion, plan.data, plan.optimizer,
        seed=plan.config.seed, device=plan.device, augment=plan.augment, resume=resume, ranks=team,
    )  # fmt: skip


def _status(run: Any) -> dict[str, Any]:
    try:
        return run.status()
    except ValueError as error:  # a newer version's
        raise InvalidInput(str(error)) from error


def _must_divide(trainer: Any, processes: int) -> None:
    """Refuse micro-batches that so many processes cannot share evenly."""
    micro = trainer.batch_size // trainer.accumulate
    if micro % processes:
        raise InvalidInput(
            f"trainer.batch_size = {trainer.batch_size} in {trainer.accumulate} micro-batches is not divisible by the "
            f"{processes} processes that torchrun started; the next that is: "
            f"{-(-micro // processes) * processes * trainer.accumulate}"
        )


def _record_failure(run: Any, error: Exception) -> None:
    """Write FAILED with its reason, keep what was saved, and raise RunFailed with what to do."""
    from ddpm import checkpoint
    from ddpm.runs import FAILED, now

    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    reason = f"the disk is full ({error})" if full else f"{type(error).__name__}: {error}"
    try:
        run.write_status(FAILED, reason=reason, traceback=traceback.format_exc(), ended=now())
    except OSError as second:
        reason += f"; status.json could not be written either ({second})"
    last = checkpoint.last_whole(run.checkpoints)
    kept = f"the last whole checkpoint is {last}" if last else "there is no checkpoint yet"
    advice = "free some space, then the same command goes on from there" if full else "the same command tries again"
    if isinstance(error, FloatingPointError):
        advice = f"what the last steps were computed from is in {run.path / 'autopsy'}; {advice}"
    raise RunFailed(f"{run.path}: {reason}; {kept}; {advice}") from error


def _extended(config: DictConfig) -> tuple[DictConfig, Path]:
    """The configuration of the run that `extend` names with the command line's values over it, and its checkpoint."""
    from ddpm.runs import open_run

    try:
        parent, path = open_run(str(config.extend))
    except FileNotFoundError as error:
        raise InvalidInput(str(error).replace("run=", "extend=", 1)) from error
    base = read_config(parent.path / "config.yaml")
    words = list(HydraConfig.get().overrides.task)
    groups = sorted(p.name for p in conf_dir().iterdir() if p.is_dir())
    for word in words:
        key = word.partition("=")[0]
        if key in groups or key.startswith(("+", "~")):
            raise InvalidInput(
                f"{word}: a run that extends another has its configuration; only values may be changed, "
                "such as trainer.steps=2000"
            )
    if not any(word.startswith(("trainer.steps=", "trainer.epochs=", "trainer.seconds=")) for word in words):
        raise InvalidInput("extend needs a larger budget: add trainer.steps=N, trainer.epochs=N or trainer.seconds=N")
    merged = OmegaConf.merge(
        {} if "augment" in base else {"augment": {"_target_": AUGMENTATION}},  # which runs of earlier versions lack
        base,
        {"trainer": {"steps": None, "epochs": None, "seconds": None}, "init": None},
        _place(base, config, parent.path),
        OmegaConf.from_dotlist(words),
        {"trust": _trusted(config), "compile": config.get("compile", False)},
    )
    assert isinstance(merged, DictConfig)  # as the first of them is
    return merged, path


def _place(base: DictConfig, config: DictConfig, parent: Path) -> dict[str, Any]:
    """Where a child goes: to its parent, or, if that does not lie where it says, where the command line says."""
    stored = Path(str(base.get("runs"))) / str(base.get("study"))
    at_home = os.path.abspath(stored) == os.path.abspath(parent.parent)
    return {key: (base if at_home else config).get(key) for key in ("runs", "study")}


def _must_leave_a_budget(config: DictConfig, trainer: Any, data: Any, parent: Path) -> None:
    """Refuse to extend a run by a budget that it has used up already."""
    from ddpm import checkpoint

    try:
        state = checkpoint.load_state(parent)
    except ValueError as error:
        raise InvalidInput(f"extend={config.extend}: {error}") from error
    if trainer.is_used_up(len(data.train), state["step"], state["seconds"]):
        given = ", ".join(
            f"trainer.{key}={config.trainer[key]}" for key in ("steps", "epochs", "seconds") if config.trainer[key]
        )
        raise InvalidInput(
            f"{given} is not more than the {state['step']} steps and {state['seconds']:.0f} s that {config.extend} has "
            "used already"
        )


LONGEST_NAME = 255  # bytes, in every usual file system
IN_NO_NAME = "<>\"'`|?*\\$;&!~{}"  # of a study: a shell, a web page or another file system reads more into them


def _folder_of_runs(config: DictConfig) -> Path:
    """<runs>/<study>; refuses one that could not be made, and a study that leads out of `runs`."""
    from ddpm.files import shown

    for key in ("runs", "study"):
        if config[key] is not None and type(config[key]) not in (str, int):
            raise InvalidInput(f"{key}={config[key]} must be text: the name of a folder")
    if not config.runs or not config.study or "\0" in str(config.runs):
        raise InvalidInput(f"runs={config.runs} study={config.study}: both must be names of folders")
    study = str(config.study)
    parts = study.removesuffix("/").split("/")
    if not study.isprintable() or set(study) & set(IN_NO_NAME) or {"", ".."} & set(parts):
        raise InvalidInput(
            f"study={study!r} must be a name, or several separated by /, none of them empty or .., without control "
            f"characters and without {' '.join(IN_NO_NAME)}"
        )
    folder = Path(str(config.runs)) / study
    for part in folder.parts:
        if len(part.encode()) > LONGEST_NAME:
            raise InvalidInput(
                f"runs= and study=: {shown(part)} is longer than the {LONGEST_NAME} bytes of a folder's name"
            )
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise InvalidInput(f"runs={config.runs}: {there} is not a folder that can be written to")
    return folder


def _trusted(config: DictConfig) -> list[str]:
    """The names that the command line, and nothing else, adds to the allowed targets."""
    names = plain(config.trust)
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise InvalidInput(f"trust={names} must be a list of names, such as trust=[my_package.MyNet]")
    return names


def _must_be_whole(config: DictConfig, *keys: str, least: int | None = None) -> None:
    """Refuse what is not a whole number, or below `least`."""
    for key in keys:
        value = config[key]
        if isinstance(value, bool) or not isinstance(value, int) or (least is not None and value < least):
            raise InvalidInput(f"{key}={value} must be an integer" + (f" >= {least}" if least is not None else ""))


def _weights_file(path: Path) -> Path:
    """The weights of a run directory (EMA, last checkpoint), or of a folder with {ema,model}.safetensors."""
    from ddpm.runs import open_run

    folder = path
    if (path / "config.yaml").is_file():
        try:
            _, folder = open_run(path)
        except FileNotFoundError as error:
            raise InvalidInput(str(error).replace("run=", "init=", 1)) from error
    for name in ("ema.safetensors", "model.safetensors"):
        if (folder / name).is_file():
            return folder / name
    raise InvalidInput(
        f"init={path}: neither a run directory with a checkpoint nor a folder with ema.safetensors or model.safetensors"
    )


def _load(model: Any, file: Path) -> None:
    from ddpm import checkpoint

    try:
        checkpoint.load_into(model, file)
    except ValueError as error:
        raise InvalidInput(str(error)) from error


def _must_match(model: Any, data: Any) -> None:
    """Refuse a network that does not take the data's images."""
    takes = (getattr(model, "in_channels", None), *getattr(model, "image_size", ()))
    if None not in takes and takes != data.shape:
        raise InvalidInput(
            f"the model takes images of (C, H, W) = {takes}, but the data are {data.shape}; set "
            "model.image_size and model.in_channels, or data.image_size and data.channels"
        )
    if getattr(model, "num_classes", None) is not None:
        if data.labels is None:
            raise InvalidInput(f"model.num_classes = {model.num_classes}, but the data have no labels")
        if model.num_classes < data.num_classes:
            raise InvalidInput(f"model.num_classes = {model.num_classes}, but the data have {data.num_classes} classes")


def _must_have_room(model: Any, diffusion: Any, channels: int) -> None:
    """Refuse a network with other output channels than the target, and a learned variance, need; or no loss for it."""
    try:
        diffusion.must_be_trainable()
    except ValueError as error:
        raise InvalidInput(f"diffusion: {error}") from error
    needed = channels * (2 if diffusion.variance == "learned" else 1)
    if getattr(model, "out_channels", needed) != needed:
        raise InvalidInput(
            f"model.out_channels = {model.out_channels}, but diffusion.variance={diffusion.variance} with {channels} "
            f"channels of the data takes model.out_channels={needed}"
        )


def _must_walk(sampler: Any, diffusion: Any, key: str = "sampler") -> None:
    """Refuse a sampler that cannot walk along the schedule."""
    try:
        sampler.times(diffusion.schedule)
    except ValueError as error:
        raise InvalidInput(f"{key}: {error}") from error


def _draw_results(
    run: Any, config: DictConfig, data: Any, diffusion: Any, model: Any, sampler: Any, device: Any
) -> None:
    """The pictures at the end of a run, and its figures."""
    import torch

    from ddpm import evaluation, images, plots, quality
    from ddpm.forward import q_sample
    from ddpm.precision import as_trained
    from ddpm.randomness import SampleNoise
    from ddpm.runs import git_commit, read_metrics
    from ddpm.sampling import Source

    history = read_metrics(run.path)
    plots.loss(
        run.path / "loss.png",
        *(
            [(line["step"], line["loss"]) for line in history if line["split"] == split]
            for split in ("train", "held_out")
        ),
    )
    plots.schedules(run.path / "schedule.png", {_schedule_name(config.schedule): diffusion.schedule})
    precision = as_trained(run.status()["precision"], device)
    source = Source(diffusion, model, sampler, data.shape, config.seed, device, precision)
    judged = config.recognition and quality.has_classes(data) and len(data.held_out) > 0
    samples = source.drawn(512 if judged else 64)
    images.save_samples(run.path / "samples.png", samples[:64])
    frames = [images.grid(x_t, columns=8) for _, x_t in source.way(32, 40)]
    images.save_gif(run.path / "denoising.gif", frames, seconds_per_frame=0.08)

    T = diffusion.schedule.T
    times = [round(T * share / 4) for share in range(5)]
    x_0 = data.batch(data.train[:1], device)[0].cpu()
    eps = SampleNoise(config.seed, [0]).x_T(data.shape)
    x_t = q_sample(diffusion.schedule, x_0.expand(5, *data.shape), torch.tensor(times), eps)
    plots.forward_process(run.path / "forward.png", x_t, times, diffusion.schedule.alpha_bar[times].tolist())
    _warn_of_range(source)

    if judged:
        drawn = quality.Drawn(samples, samples.new_zeros(len(samples), 0), source.classes(range(len(samples))))
        found = quality.by_regression(drawn, data)
        settings = _protocol(len(samples), config, "ema", sampler, diffusion.schedule, git_commit())
        values = settings | quality.together([found], [config.seed])
        evaluation.record(run.path, f"recognition_logistic_{len(samples)}_train", values)
        walk = f"{type(sampler).__name__} with {len(sampler.times(diffusion.schedule)) - 1} steps"
        _say(f"{len(samples)} samples, {walk}, EMA weights:\n{found.words}")


def _protocol(
    n: int, config: DictConfig, weights: str, sampler: Any, schedule: Any, commit: str | None
) -> dict[str, Any]:
    """The part of a record in evaluation.json that says how its samples were drawn, if any were: with a sampler."""
    walked = sampler is not None
    return {
        "low": None,
        "high": None,
        "n": n,
        "seeds": [config.seed],
        "weights": weights,
        "sampler": type(sampler).__name__ if walked else None,
        "sampler_settings": {k: v for k, v in plain(config.sampler).items() if k != "_target_"} if walked else None,
        "steps": len(sampler.times(schedule)) - 1 if walked else None,
        "evaluations": sampler.evaluations(schedule) if walked else None,
        "commit": commit,
    }


def _next_steps(run: Any, ended: str) -> None:
    """Where the results are and what to type next."""
    pictures = "  ".join(sorted(p.name for p in run.path.iterdir() if p.suffix in (".png", ".gif")))
    status = run.status()
    command = "python experiments" if (Path.cwd() / "experiments" / "sample.py").is_file() else None
    draw = f"{command}/sample.py" if command else "ddpm-sample"
    again = f"{command}/train.py" if command else "ddpm-train"
    _say(f"""done: {status["step"]:,} steps in {status["seconds"]:.0f} s (the budget of {ended} is used)
  results       {run.path}
  pictures      {pictures}
  curves        tensorboard --logdir {run.path.parent}
next:
  more samples  {draw} run={run.path} n=100 seed=1 out=samples.png
  few steps     {draw} run={run.path} 'steps_strip=[1,2,3,5,10,20,50]' out=strip.png
  train longer  {again} extend={run.path} trainer.steps={2 * status["step"]}
  a sweep       {again} -m 'model.channels=16,32' 'model.attention_resolutions=[],[4]' schedule=linear,cosine""")


# -------------------------------------------------------------------------------------------------- sample and evaluate


def _source(config: DictConfig) -> tuple[Any, Any, DictConfig, int]:
    """What `run=` on the command line can draw: (source, run, the run's configuration, step of the checkpoint)."""
    from ddpm.precision import PRECISIONS, as_trained
    from ddpm.runs import open_run
    from ddpm.sampling import Source

    if config.precision not in ("auto", *PRECISIONS):
        raise InvalidInput(f"precision={config.precision} is not known; allowed: auto, {', '.join(PRECISIONS)}")
    if config.weights not in ("ema", "raw"):
        raise InvalidInput(f"weights={config.weights} is not known; allowed: ema, raw")
    _must_be_whole(config, "batch", least=1)
    _must_be_whole(config, "seed")
    device = resolve_device(config.device)
    try:
        run, folder = open_run(str(config.run), config.checkpoint)
    except FileNotFoundError as error:
        raise InvalidInput(str(error)) from error
    trained, trust = read_config(run.path / "config.yaml"), _trusted(config)
    model = build(trained.model, "model", trust)
    diffusion = build(trained.diffusion, "diffusion", trust, schedule=build(trained.schedule, "schedule", trust))
    sampler = build(config.sampler, "sampler", trust)
    _load(model, folder / ("ema.safetensors" if config.weights == "ema" else "model.safetensors"))
    shape, precision = (model.in_channels, *model.image_size), config.precision
    if precision == "auto":
        with contextlib.suppress(ValueError):  # a newer version's status: its weights may be read all the same
            precision = run.status().get("precision")
        precision = as_trained(precision if precision in tuple(PRECISIONS) else "fp32", device)
    return Source(diffusion, model, sampler, shape, config.seed, device, precision), run, trained, int(folder.name)


def _sample(config: DictConfig) -> None:
    from ddpm import images, plots

    resolved(config)
    _must_be_whole(config, "n", least=1)
    _must_be_writable(config.out)
    source, run, trained, step = _source(config)
    _must_walk(source.sampler, source.diffusion)
    out = Path(str(config.out)) if config.out is not None else run.path / f"samples_{_label(source, step, config)}.png"
    folder = config.out is not None and (str(config.out).endswith("/") or out.suffix == "")
    strip, process, between = plain(config.steps_strip), config.process, plain(config.between)
    figures = [name for name in ("steps_strip", "process", "between") if config[name] is not None]
    if figures and (folder or out.suffix != ".png"):
        raise InvalidInput(f"out={config.out}: {figures[0]} is a figure, written to a .png file")
    if len(figures) > 1:
        raise InvalidInput(f"{' and '.join(figures)} are different figures; ask for one at a time")

    cost = f"{type(source.sampler).__name__}, {source.sampler.evaluations(source.diffusion.schedule)} evaluations"
    drawn = f"{run.path}, step {step:,}, {config.weights} weights, {cost}, seed {config.seed}"
    if not (figures or folder):
        _say(drawn)
    if strip is not None:
        _steps_strip(config, source, strip, out)
    elif between is not None:
        _between(config, source, trained, between, out)
    elif process is not None:
        if isinstance(process, bool) or not isinstance(process, int) or process < 2:
            raise InvalidInput(f"process={process} must be an integer >= 2: the number of pictures from noise to image")
        way = source.way(min(config.n, 8), process)
        plots.labelled_columns(out, [(f"$t = {t:.4g}$", x_t) for t, x_t in way])
    elif folder:
        _numbered(config, source, run, step, out)
    elif out.suffix == ".gif":
        images.save_gif(out, [images.grid(x_t) for _, x_t in source.way(config.n, 40)], seconds_per_frame=0.08)
    else:
        import torch

        parts = list(_with_bar(source.batches(list(range(config.n)), config.batch), config.n))
        images.save_samples(out, torch.cat([x for _, x in parts]))
    if figures or folder:  # whose settings are checked where they are drawn
        _say(drawn)
    _warn_of_range(source)
    _say(f"wrote {out}")


def _warn_of_range(source: Any) -> None:
    if concern := str(source.range):
        _say(f"warning: {concern}")


def _steps_strip(config: DictConfig, source: Any, strip: list[Any], out: Path) -> None:
    """The same noise at several numbers of steps, one row each."""
    from ddpm import plots

    samplers = []
    for steps in strip if isinstance(strip, list) else [strip]:
        settings = resolved(config.sampler) | {"steps": steps, "times": None}
        sampler = build(settings, f"steps_strip, {steps}", _trusted(config))
        _must_walk(sampler, source.diffusion)
        samplers.append((f"{steps} step{'s' * (steps != 1)}", sampler))
    n = min(config.n, 12)
    plots.labelled_rows(out, [(label, source.using(sampler).draw(range(n))) for label, sampler in samplers])


BETWEEN = 8  # pictures from one image to the other


def _between(config: DictConfig, source: Any, trained: DictConfig, between: Any, out: Path) -> None:
    """The way between two held-out images, in one row with the images themselves at its ends."""
    import torch

    from ddpm import plots

    data = _data(config, trained)
    pair = between if isinstance(between, list) else [between]
    legal = [isinstance(i, int) and not isinstance(i, bool) and 0 <= i < len(data.held_out) for i in pair]
    if len(pair) != 2 or not all(legal):
        raise InvalidInput(f"between={between}: two of the {len(data.held_out)} held-out images, such as between=[0,1]")
    x, y = data.batch(data.held_out[pair])
    try:
        way = source.between(x, y, BETWEEN)
    except ValueError as error:
        raise InvalidInput(str(error)) from error
    labels = [f"{i / (BETWEEN - 1):.2f}" for i in range(BETWEEN)]
    images = [(f"image {pair[0]}", x[:1]), *zip(labels, torch.split(way, 1), strict=True), (f"image {pair[1]}", x[1:])]
    plots.labelled_columns(out, images)


def _data(config: DictConfig, trained: DictConfig) -> Any:
    """The data of a run, from where the run found them or from `data.root`."""
    data = plain(trained.data)
    if config.data.root is not None and isinstance(data, dict):
        data["root"] = config.data.root
    return build_data(data, _trusted(config))


def _numbered(config: DictConfig, source: Any, run: Any, step: int, out: Path) -> None:
    """One PNG file a sample; those that are there already are kept, if they are of the same run and settings."""
    from ddpm import images
    from ddpm.files import replacing

    out.mkdir(exist_ok=True)
    settings = {
        "run": str(run.path.resolve()),
        "step": step,
        "weights": config.weights,
        "seed": config.seed,
        "sampler": OmegaConf.to_container(config.sampler),
    }
    note = out / "samples.json"
    if note.exists() and _noted(note) != settings:
        raise InvalidInput(f"out={config.out} holds samples of other settings (see {note}); choose another folder")
    if not note.exists() and any(out.glob("[0-9]*.png")):
        raise InvalidInput(f"out={config.out} holds pictures that were not written here; choose another folder")
    with replacing(note) as temporary:
        temporary.write_text(json.dumps(settings, indent=1))
    missing = [i for i in range(config.n) if not (out / f"{i:06}.png").exists()]
    if len(missing) < config.n:
        _say(f"{config.n - len(missing)} of {config.n} samples are there already")
    for numbers, x in _with_bar(source.batches(missing, config.batch), len(missing)):
        for number, picture in zip(numbers, images.to_numpy(x), strict=True):
            images.save_png(out / f"{number:06}.png", picture)


def _noted(note: Path) -> Any:
    from ddpm.files import read_json

    try:
        return read_json(note)
    except ValueError as error:
        raise InvalidInput(f"{error}; choose another folder") from error


def _must_be_writable(out: str | None) -> None:
    """Refuse an `out` that could not be written in the end, before anything is drawn."""
    if out is None:
        return
    if not isinstance(out, str) or not out:
        raise InvalidInput(f"out={out} must be the name of a file or a folder/")
    path = Path(out)
    if not path.parent.is_dir():
        raise InvalidInput(f"out={out}: the folder {path.parent} does not exist")
    if not str(out).endswith("/") and path.suffix not in (".npy", ".png", ".gif", ""):
        raise InvalidInput(f"out={out}: the ending {path.suffix} is not known; allowed: .npy, .png, .gif, or a folder/")
    if path.is_dir() and path.suffix and not str(out).endswith("/"):
        raise InvalidInput(f"out={out} is a folder; end it with / to write numbered pictures there")
    if path.is_file() and (not path.suffix or str(out).endswith("/")):
        raise InvalidInput(f"out={out} is a file, not a folder for numbered pictures")
    target = path if path.exists() else path.parent
    if not os.access(target, os.W_OK):
        raise InvalidInput(f"out={out}: {target} is not writable")


OF_SAMPLES = ("recognition", "frechet", "kernel", "precision_recall", "density_coverage", "memorisation")
OF_IMAGES = ("bits_per_dim", "log_likelihood", "loss_by_snr")  # held-out ones
FEATURES = ("classifier", "inception", "pca", "pixels")
RECOGNISERS = ("auto", "classifier", "logistic")
LEAST = {"frechet": 2, "kernel": 3, "precision_recall": 4, "density_coverage": 6, "memorisation": 2}  # images it takes
ENOUGH_FOR_PCA = 10_000  # training images
FEW_PIXELS = 256  # that a logistic regression reads well, and in seconds


class Measure(NamedTuple):
    """A measure whose input has been found right, and of which nothing is begun."""

    plan: str  # what it will do, in words
    evaluations: int  # of the network, counted by image
    carry_out: Callable[[], None]


def _evaluate(config: DictConfig) -> None:
    resolved(config)
    metrics = plain(config.metric)
    metrics = metrics if isinstance(metrics, list) else [metrics]
    allowed = (*OF_SAMPLES, *OF_IMAGES, "cost", "steps")
    if not metrics or not set(map(str, metrics)) <= set(allowed):
        raise InvalidInput(f"metric={','.join(map(str, metrics))} is not known; allowed: {', '.join(allowed)}")
    metrics = list(dict.fromkeys(metrics))
    for key in ("data", "inception", "frechet", "steps", "cost", *OF_IMAGES[:2]):
        if not isinstance(config[key], DictConfig):
            raise InvalidInput(f"{key}={config[key]} must hold settings, such as {key}.KEY=VALUE")
    for key, known in (("features", FEATURES), ("recogniser", RECOGNISERS)):
        if config[key] not in known:
            raise InvalidInput(f"{key}={config[key]} is not known; allowed: {', '.join(known)}")
    if not isinstance(config.frechet.bias, bool):
        raise InvalidInput(f"frechet.bias={config.frechet.bias} must be true or false")
    if config.n is not None:
        _must_be_whole(config, "n", least=1)
    _must_be_whole(config, "seeds", least=1)
    source, run, trained, step = _source(config)
    data = _data(config, trained)
    subject = _Subject(config, source, run, trained, step, data)
    of_samples = [metric for metric in metrics if metric in OF_SAMPLES]
    measures = [_measure_samples(subject, of_samples)] if of_samples else []
    measures += [_measure_images(subject, metric) for metric in metrics if metric in OF_IMAGES]
    measures += [_measure_steps(subject)] if "steps" in metrics else []
    measures += [_measure_cost(subject)] if "cost" in metrics else []
    _say_plan(subject, measures)
    for measure in measures:  # only now that all of them have found their input right
        measure.carry_out()


class _Subject:
    """What is evaluated, and what its measures share: built once, and refused before anything is drawn."""

    def __init__(self, config: DictConfig, source: Any, run: Any, trained: DictConfig, step: int, data: Any):
        self.config, self.source, self.data = config, source, data
        self.run, self.trained, self.step = run, trained, step
        self.seeds = [config.seed + k for k in range(config.seeds)]
        self.cache = run.path.parent.parent / "judges"

    def settings(self, n: int, sampler: Any = None) -> dict[str, Any]:
        """The part of a record that says what was evaluated, and how samples were drawn if there is a sampler."""
        from ddpm.runs import git_commit

        schedule = self.source.diffusion.schedule
        told = _protocol(n, self.config, self.config.weights, sampler, schedule, git_commit())
        return told | {"checkpoint": self.step, "precision": self.source.precision}

    def record(self, protocol: str, values: dict[str, Any], words: str) -> None:
        from ddpm import evaluation

        evaluation.record(self.run.path, protocol, values)
        _say(f"{protocol}:\n{words}")

    @functools.cached_property
    def judge(self) -> Any:
        """The classifier, not yet trained."""
        import torch

        from ddpm.randomness import generator

        torch.manual_seed(generator(0, "judge").initial_seed())
        channels, height, width = self.data.shape
        classes = max(1, self.data.num_classes)
        judge = build(self.config.judge, "judge", image_size=(height, width), in_channels=channels, num_classes=classes)
        if self.data.labels is None:
            raise InvalidInput(
                f"{self.data.name} has no labels, and features=classifier needs them; features=inception, pca and "
                "pixels do not"
            )
        return judge

    @functools.cached_property
    def features(self) -> tuple[int, Callable[[], tuple[Any, float | None]]]:
        """How many features there are, and what makes their extractor, with a classifier's accuracy."""
        from ddpm import quality
        from ddpm.metrics import features

        config, data, device = self.config, self.data, self.source.device
        if config.features == "classifier":
            judge = self.judge
            size = features.Judge(judge, "").size
            return size, lambda: quality.judge_of(data, judge, self.cache, device, _say)
        try:
            if config.features == "inception":
                weights = config.inception.weights
                made: Any = features.Inception(None if weights is None else str(weights), device)
            elif config.features == "pixels":
                made = features.Pixels(data.shape)
            else:
                some = data.train[:: -(-len(data.train) // ENOUGH_FOR_PCA)]
                made = features.PCA(data.batch(some)[0], config.pca, quality.data_key(data))
        except (ValueError, ImportError, OSError) as error:
            raise InvalidInput(f"features={config.features}: {error}") from error
        return made.size, lambda: (made, None)

    @functools.cached_property
    def real(self) -> tuple[Any, float | None]:
        """The real images as the extractor sees them, and a classifier's accuracy."""
        from ddpm import quality

        cheap = self.config.features in ("pca", "pixels")
        try:
            extractor, accuracy = self.features[1]()
            return quality.Real(self.data, extractor, None if cheap else self.cache / "features"), accuracy
        except (ValueError, OSError) as error:  # a judge that is damaged, a folder that cannot be written to
            raise InvalidInput(f"features={self.config.features}: {error}") from error


def _say_plan(subject: _Subject, measures: list[Measure]) -> None:
    """What is going to be done, and how long the network will take for it, by the time of one batch."""
    from ddpm import cost

    config, source = subject.config, subject.source
    batch, evaluations = min(config.batch, config.n or 256, 256), sum(measure.evaluations for measure in measures)
    took = cost.evaluation_seconds(source, batch) / batch
    lines = [f"  {measure.plan}" for measure in measures]
    if config.features == "inception" and "features" in vars(subject):  # asked for: 300x300 pixels take their time
        extractor, _ = subject.features[1]()
        x, _ = subject.data.batch(subject.data.held_out[:8])
        of_one = cost.seconds(lambda: extractor(x), source.device) / len(x)
        lines.append(f"  features of Inception: {_duration(1000 * of_one)} for 1,000 images")
    lines.append(
        f"  the network: {evaluations:,} evaluations, counted by image; at least {_duration(evaluations * took)} on "
        f"{source.device} ({1 / took:,.0f} images/s)"
    )
    _say("\n".join(["plan:", *lines]))


def _listed(seeds: list[int]) -> str:
    return f"seeds {seeds[0]} to {seeds[-1]}" if len(seeds) > 1 else f"seed {seeds[0]}"


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02} min"


def _measure_samples(subject: _Subject, metrics: list[str]) -> Measure:
    """Check the input of measures of samples; returns what draws the samples and measures them."""
    config, source, data = subject.config, subject.source, subject.data
    _must_walk(source.sampler, source.diffusion)
    logistic = "recognition" in metrics and _by_regression(subject)
    _must_compare(data, metrics)
    n = _number(subject, "frechet" in metrics)
    by_features = [metric for metric in metrics if not (metric == "recognition" and logistic)]
    if by_features:
        _ = subject.features  # refuses those that cannot be
    if "recognition" in by_features and config.features != "classifier":
        raise InvalidInput(f"recogniser=classifier needs features=classifier, not {config.features}")
    if n < (least := max(LEAST.get(metric, 1) for metric in metrics)):
        raise InvalidInput(f"n = {n}: {', '.join(metrics)} need at least {least} samples")
    if "frechet" in metrics and config.frechet.bias and len(data.held_out) <= (size := subject.features[0]):
        raise InvalidInput(
            f"frechet.bias=true: {len(data.held_out)} held-out images are too few for the covariance of {size} "
            f"features: at least {size + 1}"
        )
    cost = config.seeds * n * source.sampler.evaluations(source.diffusion.schedule)
    plan = (
        f"{', '.join(metrics)}: {n:,} samples, {_listed(subject.seeds)}, {type(source.sampler).__name__} with "
        f"{len(source.sampler.times(source.diffusion.schedule)) - 1} steps"
        + (f"; features of them and of {len(data):,} images by {config.features}" if by_features else "")
    )
    return Measure(plan, cost, lambda: _carry_out_samples(subject, by_features, logistic, n))


def _must_compare(data: Any, metrics: list[str]) -> None:
    """Refuse data of which too few images are held out, or are trained on, for measures of samples."""
    from ddpm import evaluation

    try:
        evaluation.must_hold_out(data, metrics[0], 1)
    except ValueError as error:
        raise InvalidInput(str(error)) from error
    least = max(LEAST.get(metric, 1) for metric in metrics)
    for part, numbers in (("held out", data.held_out), ("trained on", data.train)):
        if len(numbers) < least:
            few = f"of {data.name} {len(numbers)} images are {part}"
            raise InvalidInput(f"{few}, but {', '.join(metrics)} need at least {least}")


def _number(subject: _Subject, of_covariance: bool) -> int:
    """How many samples are measured: what was asked for; or 512, or as many as are held out, if those suffice."""
    few = min(512, len(subject.data.held_out))
    if not of_covariance:
        return subject.config.n or few
    size, _ = subject.features
    if len(subject.data.train) <= size:
        raise InvalidInput(
            f"{len(subject.data.train)} training images are too few for the covariance of {size} features, which "
            "frechet needs: take features=pca with fewer components (pca=...), or metric=kernel"
        )
    n: int = subject.config.n or max(few, size + 1)
    if n <= size:
        raise InvalidInput(
            f"n = {n} samples are too few for the covariance of {size} features, which frechet needs: n is at least "
            f"{size + 1}, or take features=pca with fewer components (pca=...), or metric=kernel"
        )
    return n


def _by_regression(subject: _Subject) -> bool:
    """Whether a logistic regression is to recognise samples; refuses data without labels, or of one class."""
    from ddpm import quality

    recogniser, (_, height, width) = subject.config.recogniser, subject.data.shape
    if subject.data.labels is None:
        raise InvalidInput(f"{subject.data.name} has no labels, and recognition needs them")
    if not quality.has_classes(subject.data):
        raise InvalidInput(f"{subject.data.name} has training images of one class only: there is nothing to recognise")
    return recogniser == "logistic" or (recogniser == "auto" and height * width <= FEW_PIXELS)


def _carry_out_samples(subject: _Subject, metrics: list[str], logistic: bool, n: int) -> None:
    """Draw the samples of every seed, measure them, and write what was found."""
    from ddpm import evaluation, plots, quality

    config, data = subject.config, subject.data
    real: Any  # as the extractor sees them
    real, accuracy = subject.real if metrics else (None, None)
    found: dict[str, list[quality.Found]] = {}
    pictures: Any = None
    try:
        for count, seed in enumerate(subject.seeds, 1):
            drawn = _drawn(subject, n, seed, real)
            if logistic:
                found.setdefault(f"recognition_logistic_{n}_train", []).append(quality.by_regression(drawn, data))
            for metric in metrics:
                if metric == "memorisation":
                    results, nearest = quality.copies(drawn, real)
                    pictures = pictures or (drawn.x, nearest)
                else:
                    results = quality.MEASURES[metric](drawn, real)
                for name, result in results.items():
                    found.setdefault(real.protocol(name, n), []).append(result)
            for protocol, each in found.items():  # what is known so far stays, whatever comes
                values = subject.settings(n, subject.source.sampler) | quality.together(each, subject.seeds[:count])
                if accuracy is not None and "_classifier-" in protocol:
                    values["judge_accuracy"] = accuracy
                evaluation.record(subject.run.path, protocol, values)
                if count == len(subject.seeds):
                    _say(f"{protocol}:\n{quality.in_words(each, values)}")
    except ValueError as error:
        told = ["recognition"] * logistic + metrics
        raise InvalidInput(f"metric={','.join(told)}: {error}") from error
    if pictures is not None:
        _draw_copies(subject, *pictures)
    if "frechet" in metrics and config.frechet.bias:
        curve = quality.bias_curve(real)
        path = subject.run.path / "frechet_bias.png"
        plots.bias(path, curve, n, found[real.protocol("frechet", n)][0].value)
        _say(f"wrote {path}: the distance of held-out images, for growing numbers of them")


def _drawn(subject: _Subject, n: int, seed: int, real: Any, sampler: Any = None) -> Any:
    """n samples of a seed, with their features where there is an extractor."""
    import torch

    from ddpm import quality

    source = subject.source.with_seed(seed)
    source = source if sampler is None else source.using(sampler)
    x = torch.cat([x for _, x in _with_bar(source.batches(list(range(n)), subject.config.batch), n)])
    _warn_of_range(source)
    features = x.new_zeros(n, 0) if real is None else real.features(x)
    return quality.Drawn(x, features, source.classes(range(n)))


def _draw_copies(subject: _Subject, x: Any, found: Any) -> None:
    """The samples that are nearest to training images, with those, by features and by pixels."""
    from ddpm import plots

    data, path, groups = subject.data, subject.run.path / "memorisation.png", {}
    for name, result in found.items():
        closest = result.relative.argsort()[:10]
        real, _ = data.batch(data.train[result.index[closest].cpu()])
        groups[f"by {name}"] = (x[closest], real.cpu(), result.relative[closest].tolist())
    plots.copies(path, groups)
    _say(f"wrote {path}: the samples that are closest to a training image, above it")


def _measure_images(subject: _Subject, metric: str) -> Measure:
    """Check the input of a measure of held-out images; returns what measures them."""
    from ddpm import evaluation
    from ddpm.likelihood import flow_times

    config, source, data = subject.config, subject.source, subject.data
    schedule, options = source.diffusion.schedule, config.get(metric)
    n = config.n or min(512, len(data.held_out))
    _must_match(source.model, data)
    times: list[int] = []
    try:
        evaluation.must_hold_out(data, metric, n)
        if metric == "bits_per_dim":
            times = evaluation.bound_times(schedule.T, options.steps)
            cost = len(times) * n
        elif metric == "loss_by_snr":
            cost = len(evaluation.snr_bins(schedule)) * n
        else:
            flow_times(schedule, options.steps, options.start)
            _must_be_whole(options, "probes", least=1)
            cost = 4 * options.steps * n
    except (ValueError, InvalidInput) as error:
        raise InvalidInput(f"{metric}: {error}") from error
    derivatives = f", {options.probes * cost:,} derivatives of the network" if metric == "log_likelihood" else ""
    plan = f"{metric}: {n:,} held-out images, {cost:,} evaluations{derivatives}"
    return Measure(plan, cost, lambda: _carry_out_images(subject, metric, n, cost, times))


def _carry_out_images(subject: _Subject, metric: str, n: int, cost: int, times: list[int]) -> None:
    from ddpm import evaluation, plots

    config, source, data, path = subject.config, subject.source, subject.data, subject.run.path
    options, drawn = config.get(metric), ""
    with _bar(cost) as bar:
        try:
            if metric == "bits_per_dim":
                protocol, found, values, bound = evaluation.measure_bits_per_dim(
                    source, data, n, times, config.batch, bar.update
                )
                evaluation.write_terms(path / "bits_per_dim.csv", bound)
                plots.bits_per_dim(path / "bits_per_dim.png", bound.times, bound.terms, bound.L_T)
                drawn = f"wrote {path / 'bits_per_dim.png'} and bits_per_dim.csv: the bits of each t"
            elif metric == "loss_by_snr":
                protocol, found, values, curve = evaluation.measure_loss_by_snr(
                    source, data, n, config.batch, bar.update
                )
                evaluation.write_loss_by_snr(path / "loss_by_snr.csv", curve)
                plots.loss_by_snr(path / "loss_by_snr.png", {path.name: curve})
                drawn = f"wrote {path / 'loss_by_snr.png'} and loss_by_snr.csv: the errors in each bin"
            else:
                flow = (options.steps, options.probes, options.start)
                protocol, found, values = evaluation.measure_log_likelihood(
                    source, data, n, *flow, config.batch, bar.update
                )
        except ValueError as error:
            raise InvalidInput(f"metric={metric}: {error}") from error
    told = subject.settings(n) | {
        "variance": source.diffusion.variance,
        "clip_x_0": source.diffusion.clip_x_0,
        "steps": cost // n,
        "evaluations": cost // n,
    }
    if metric == "loss_by_snr":  # whose noise has no seed, and whose predictions are not clipped
        told |= {"seeds": [], "clip_x_0": False}
    subject.record(protocol, told | values, found)
    if drawn:
        _say(drawn)


def _samplers(subject: _Subject, key: str, names: Any, steps: Any, spacings: Any) -> list[tuple[dict[str, Any], Any]]:
    """(what tells it from others, sampler) for every combination, in order; refuses what cannot walk."""
    config, found = subject.config, []
    for option, values in (("samplers", names), ("steps", steps), ("spacing", spacings)):
        if not isinstance(values, list) or not values:
            raise InvalidInput(f"{key}.{option}={values} must be a list, such as {key}.{option}={EXAMPLES[option]}")
    for name in names:
        settings = plain(compose("evaluate", [f"sampler={name}"]).sampler)
        for spacing in spacings:
            for count in steps:
                told = {"sampler": name, "spacing": spacing or settings["spacing"], "steps": count}
                built = settings | {"steps": count, "spacing": told["spacing"], "times": None}
                sampler = build(built, f"{key}, {name}", _trusted(config))
                _must_walk(sampler, subject.source.diffusion, f"{key}, {name}")
                found.append((told, sampler))
    return found


EXAMPLES = {"samplers": "[ddim,heun]", "steps": "[10,50]", "spacing": "[uniform,karras]"}


def _measure_steps(subject: _Subject) -> Measure:
    """Check a grid of samplers, steps and spacings; returns what measures each combination that is not there yet."""
    options, schedule = subject.config.steps, subject.source.diffusion.schedule
    grid = _samplers(subject, "steps", *(plain(options[key]) for key in ("samplers", "steps", "spacing")))
    _must_compare(subject.data, ["frechet"])
    n = _number(subject, of_covariance=True)
    cost = len(subject.seeds) * n * sum(sampler.evaluations(schedule) for _, sampler in grid)
    plan = (
        f"steps: {n:,} samples, {_listed(subject.seeds)}, in each of {len(grid)} ways, less those that are there "
        "already"
    )
    return Measure(plan, cost, lambda: _carry_out_steps(subject, grid, n))


def _carry_out_steps(subject: _Subject, grid: list[tuple[dict[str, Any], Any]], n: int) -> None:
    """The Frechet distance of every combination, each written as soon as it is known."""
    from ddpm import evaluation, plots, quality

    path, schedule = subject.run.path, subject.source.diffusion.schedule
    real, _ = subject.real
    protocol, settings = real.protocol("steps_frechet", n), subject.settings(n) | {"seeds": subject.seeds}
    cells = _cells(path / "evaluation.json", protocol, settings)
    for told, sampler in grid:
        if any(told.items() <= cell.items() for cell in cells):
            continue
        try:
            found = [
                quality.frechet(_drawn(subject, n, seed, real, sampler), real)["frechet"] for seed in subject.seeds
            ]
        except ValueError as error:
            raise InvalidInput(f"metric=steps: {error}") from error
        record = quality.together(found, subject.seeds)
        kept = {key: record[key] for key in ("value", "low", "high", "relative")}
        cells.append(told | {"evaluations": sampler.evaluations(schedule)} | kept)
        best = {"value": min(cell["value"] for cell in cells), "real_vs_real": record["real_vs_real"], "cells": cells}
        evaluation.record(path, protocol, settings | best)
        name = f"{told['sampler']}, {told['steps']} steps, {told['spacing']}"
        _say(f"{name}: {quality.in_words(found, record)}")
    plots.steps_quality(
        path / "steps.png", cells, evaluation.recorded(path / "evaluation.json")[protocol]["real_vs_real"]
    )
    _say(f"{protocol}: {len(cells)} combinations\nwrote {path / 'steps.png'}")


def _cells(path: Path, protocol: str, settings: dict[str, Any]) -> list[dict[str, Any]]:
    """The combinations that are there already, measured with the same settings; none where any is damaged."""
    from ddpm import evaluation

    try:
        before = evaluation.recorded(path).get(protocol, {})
    except ValueError:  # which `record` is going to tell of
        return []
    cells, numbers = before.get("cells"), [before.get("real_vs_real")]
    if any(before.get(key) != settings[key] for key in ("n", "seeds", "weights", "checkpoint", "precision")):
        return []
    if not isinstance(cells, list) or not all(isinstance(cell, dict) for cell in cells):
        return []
    numbers += [cell.get(key) for cell in cells for key in ("evaluations", "value")]
    named = all(isinstance(cell.get(key), str) for cell in cells for key in ("sampler", "spacing"))
    return cells if named and all(type(number) in (int, float) for number in numbers) else []


def _measure_cost(subject: _Subject) -> Measure:
    """Check what training and sampling are to be timed with; returns what times them."""
    import torch

    from ddpm import cost

    config, trained, trust = subject.config, subject.trained, _trusted(subject.config)
    _must_match(subject.source.model, subject.data)
    names, steps = (plain(config.cost[key]) for key in ("samplers", "steps"))
    samplers = {
        f"{told['sampler']} {told['steps']}": sampler
        for told, sampler in _samplers(subject, "cost", names, steps, [None])
    }
    trainer = build(trained.trainer, "trainer", trust)
    augment = None if trained.get("augment") is None else build(trained.augment, "augment", trust)

    def optimizer(parameters: Any) -> torch.optim.Optimizer:
        return build(trained.optimizer, "optimizer", trust, params=list(parameters))

    def carry_out() -> None:
        try:
            protocol, words, values = cost.measure_cost(
                subject.source, subject.data, trainer, optimizer, samplers, config.batch, augment=augment
            )
        except ValueError as error:
            raise InvalidInput(f"metric=cost: {error}") from error
        first = next(iter(samplers))
        steps = len(samplers[first].times(subject.source.diffusion.schedule)) - 1
        settings = subject.settings(config.batch) | {"sampler": first, "steps": steps}
        subject.record(protocol, settings | values, words)

    plan = f"cost: training steps of {trainer.batch_size} images, and one evaluation of {config.batch}, timed"
    return Measure(plan, 4 * config.batch, carry_out)


# ----------------------------------------------------------------------------------------------------------- schedule


def _schedule(config: DictConfig) -> None:
    from ddpm import plots
    from ddpm.schedules import concerns
    from ddpm.targets import TARGETS

    must_be_finite(resolved(config), "")
    if config.target not in TARGETS:
        raise InvalidInput(f"target={config.target} is not known; allowed: {', '.join(TARGETS)}")
    if not str(config.out).endswith(".png"):
        raise InvalidInput(f"out={config.out} must be the name of a .png file")
    _must_be_writable(config.out)
    others = plain(config.compare)
    if not isinstance(others, list) or not all(isinstance(name, str) for name in others):
        raise InvalidInput(f"compare={others} must be a list of names, such as compare=[linear,sigmoid]")
    named = {_schedule_name(config.schedule): build(config.schedule, "schedule", _trusted(config))}
    T = next(iter(named.values())).T
    for name in dict.fromkeys(others):
        other = compose("schedule_report", [f"schedule={name}"]).schedule
        _set_T(other, T)
        named[f"{name} (default)" if name in named else name] = build(other, f"compare, {name}")
    table = plots.schedule_table(named)
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for name, *cells in table:
        _say("  ".join([name.ljust(widths[0]), *map(str.rjust, cells, widths[1:])]))
    for name, found in named.items():
        for concern in concerns(found, config.target):
            _say(f"warning: {name}: {concern}")
    plots.schedules(str(config.out), named)
    _say(f"wrote {config.out}")


def _schedule_name(config: DictConfig) -> str:
    """What a figure calls a schedule: the function that makes it."""
    name = str(config._target_).rpartition(".")[2]
    return "betas" if name == "NoiseSchedule" else name


def _set_T(config: DictConfig, T: int) -> None:
    """Give a schedule, or the one within it, so many steps; one of given betas has those it has."""
    if "T" in config:
        config.T = T
    elif "schedule" in config:
        _set_T(config.schedule, T)


# ----------------------------------------------------------------------------------------------------------- together


def _label(source: Any, step: int, config: DictConfig) -> str:
    """Part of a file's name, with the sampler's settings where they are not the default."""
    sampler = type(source.sampler)
    walk = f"{sampler.__name__.lower()}{len(source.sampler.times(source.diffusion.schedule)) - 1}"
    for name, parameter in inspect.signature(sampler).parameters.items():
        value = plain(config.sampler.get(name, parameter.default))
        if name != "steps" and value != parameter.default:
            walk += f"_{name}-{re.sub(r'[^0-9A-Za-z.]+', '-', str(value)).strip('-')[:40]}"
    return f"step{step}_{config.weights}_{walk}_seed{config.seed}"


def _with_bar(batches: Any, n: int) -> Any:
    """The batches, while a progress bar counts their samples."""
    with _bar(n) as bar:
        for numbers, x in batches:
            yield numbers, x
            bar.update(len(x))


def _bar(total: int) -> Any:
    """A progress bar that counts images, or evaluations of the network by image."""
    from tqdm import tqdm

    return tqdm(total=total, unit="image", disable=not sys.stderr.isatty())


def _multirun() -> bool:
    return HydraConfig.get().mode == RunMode.MULTIRUN


def _overrides() -> str:
    return " ".join(HydraConfig.get().overrides.task) or "defaults"


def _say(message: str) -> None:
    print(message, flush=True)


def _refuse(error: Exception) -> None:
    """Invalid input: one line, exit code 2."""
    if os.environ.get("RANK", "0") == "0":  # of several processes that refuse the same
        print(f"error: {_in_one_line(str(error))}", file=sys.stderr)
    sys.exit(2)


def _in_one_line(text: str) -> str:
    """Text for a terminal: what was typed, and is told again, neither breaks the line nor steers."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
