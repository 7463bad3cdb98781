"""`ddpm-train`: one training run, in one process or several, and the figures at its end."""

import contextlib
import errno
import shlex
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

from omegaconf import DictConfig, OmegaConf

from ddpm.commands.console import how_drawn, say, schedule_name, warn_of_range
from ddpm.commands.evaluate import evaluating
from ddpm.commands.evaluate.sounds import PAGE, for_display, mel_of, write_results
from ddpm.commands.launch import job_number, jobs_at_once, multirun, overrides, standing_for
from ddpm.commands.sample.points import MOMENTS, draw_plane, is_plane, some
from ddpm.commands.sample.sampling import FRAMES, save_way
from ddpm.commands.train import cluster, text_encoder
from ddpm.commands.train.codec import keep, recipe_of, with_codec
from ddpm.commands.train.next_steps import next_commands
from ddpm.commands.train.prepare import (
    Plan,
    disk,
    evaluations,
    must_be_tracked,
    no_room,
    planned,
    status_of,
    trial_loss,
)
from ddpm.commands.train.teacher import stage, stages
from ddpm.commands.train.words import keep as keep_tokenizer
from ddpm.commands.validate import must_be_whole
from ddpm.config import InvalidInput, resolve_device

MANY_POINTS = 2000  # samples in a figure of points


class RunFailed(Exception):
    """Raised if a run fails after it started; the message states why, and how to resume."""


class Held(RunFailed):
    """Raised if another process holds the lock of the run."""


class Stopped(Exception):
    """Raised by a watcher to stop a run early; the message states why. The run is INTERRUPTED and can be resumed."""


Opened = tuple[Any, Any, DictConfig, int]
"""The result of `ddpm.commands.sources.source_of`."""


def train(config: DictConfig) -> None:
    """Start the configured run, or resume it; do nothing if it is done.

    In a sweep a run that failed before is skipped, unless retry=true; one that was refused before it started is not.

    Raises: InvalidInput before it starts, RunFailed afterwards.
    """
    with _slot(config) as device_name:
        device, teacher = resolve_device(device_name), None
        config = _with_codec(config, device)
        for steps in stages(config):
            teacher = _train(stage(config, steps, teacher), device)


def _with_codec(config: DictConfig, device: Any) -> DictConfig:
    """Train the codec first, if `init_codec` holds overrides; return the configuration with the trained codec."""
    if (recipe := recipe_of(config)) is None:
        return config
    words, made = recipe
    with standing_for(words):
        return with_codec(config, words, _train(made, device))


def _train(config: DictConfig, device: Any) -> Path:
    """Train one run, and return its folder."""
    from ddpm.runs.directory import DONE, FAILED
    from ddpm.training import ranks

    try:
        team, device = ranks.join(device)
    except ValueError as error:
        raise InvalidInput(str(error)) from error
    plan = planned(config, device, team.size)
    if not team.leads:
        _follow(plan, team)
        return Path(plan.run.path)
    status = status_of(plan.run)
    if status.get("state") == DONE:
        team.broadcast(None)
        say(f"{plan.run.path} is done already ({status.get('step')} steps); nothing to do")
    elif status.get("state") == FAILED and status.get("started") and multirun() and not config.get("retry"):
        raise RunFailed(f"{plan.run.path} failed before ({status.get('reason')}); retry=true tries it again")
    else:
        lead(plan, team)
    measure(plan)
    return Path(plan.run.path)


@contextlib.contextmanager
def _slot(config: DictConfig) -> Iterator[str]:
    """Context with the device of a job; if a launcher runs several on this machine, it reserves a slot of the device.

    Raises: InvalidInput for an invalid number of slots.
    """
    from ddpm.runs import device_slots

    at_once, device = jobs_at_once(), config.device
    if at_once is None:
        yield device
        return
    must_be_whole(config, "slots", least=1)
    import torch

    if device in ("auto", "cuda") and torch.cuda.device_count():
        devices, each = [f"cuda:{number}" for number in range(torch.cuda.device_count())], config.slots
    else:
        resolved = resolve_device(device)
        devices, each = [str(resolved)], config.slots if resolved.type == "cuda" else at_once
    with device_slots.taken(devices, each, say) as slot:
        torch.set_num_threads(min(torch.get_num_threads(), slot.threads))
        yield slot.device


def lead(plan: Plan, team: Any, watch: Callable[[int, float | None], None] | None = None) -> None:
    """Train as the leading process, which locks the run and writes all files.

    Args:
        watch: receives the loss on held-out images, see `ddpm.training.trainer.Trainer.fit`; may raise Stopped.
    Raises: InvalidInput, RunFailed, Stopped.
    """
    from ddpm.runs import checkpoint
    from ddpm.runs.directory import DONE, INTERRUPTED, RunIsHeld, now

    run = plan.run
    try:
        with run.locked():
            if status_of(run).get("state") == DONE:  # another process has finished it meanwhile
                team.broadcast(None)
                say(f"{run.path} is done already")
                return
            try:
                resume = checkpoint.last_whole(run.checkpoints) or plan.parent
                if resume is not None:
                    must_be_tracked(plan.parts.trainer, resume, checkpoint.load_state(resume))
            except ValueError as error:  # of a newer version, and must not be deleted
                team.broadcast(None)
                raise InvalidInput(str(error)) from error
            print_start(plan, team, resume)
            ended = _train_and_draw(plan, team, resume, watch)
            run.write_status(DONE, reason=f"budget of {ended} used", ended=now(), paired=ended != "seconds")
            if multirun() or watch is not None:  # one of many runs
                status = run.status()
                say(f"done: {run.path}, {status['step']:,} steps in {status['seconds']:.0f} s")
            else:
                _print_next(plan, ended)
    except RunIsHeld as error:
        team.broadcast(None)
        raise Held(str(error)) from error
    except KeyboardInterrupt:
        run.write_status(INTERRUPTED, reason="interrupted twice", ended=now())
        say("interrupted; the same command resumes from the last checkpoint")
        sys.exit(130)


def print_start(plan: Plan, team: Any, resume: Path | None) -> None:
    """Print what will be trained and on which device, with warnings."""
    say(
        f"run {plan.run.path}: {plan.parts.parameters:,} parameters, "
        f"{len(plan.data.train):,} training {plan.data.units}, {plan.device}"
        + (f", {team.size} processes" if team.size > 1 else "")
    )
    for concern in plan.parts.task.concerns():
        say(f"warning: {concern}")
    conditioned = any(getattr(module, "augment_dim", 0) for module in plan.parts.task.modules.values())
    if getattr(plan.parts.augment, "tells", 0) and plan.parts.sampler is not None and not conditioned:
        say("warning: the network is not conditioned on the augmentation (model.augment_dim), so samples will show it")
    room, free, _ = disk(plan)
    if room > free:
        say(f"warning: {no_room(plan)}")
    if resume is not None:
        say(f"going on from {resume}")


def _train_and_draw(
    plan: Plan, team: Any, resume: Path | None, watch: Callable[[int, float | None], None] | None
) -> str:
    """Train and draw the results; return the budget that ended the run, or write any other end into its status."""

    def fit() -> tuple[str, Any]:
        begin(plan, overrides(), job_number())
        team.broadcast((plan.run.path, resume))
        return _fit(plan, team, resume, watch)

    return concluded(plan, fit)


def concluded(plan: Plan, fit: Callable[[], tuple[str, Any]], source: Any = None) -> str:
    """Fit a run and draw its results; return the budget that ended it.

    Any other end is written into the run's status.

    Args:
        fit: returns that budget and the averaged task, or raises the exception that ended training.
        source: source of the results, a `TrainedSampler`; None for `source_of_results`.
    Raises: RunFailed, Stopped; SystemExit after a signal.
    """
    from ddpm.runs import checkpoint
    from ddpm.runs.directory import INTERRUPTED, now
    from ddpm.training.interrupt import Interrupted, terminable

    run = plan.run
    try:
        ended, averaged = fit()
        with terminable():
            _draw_results(plan, averaged, source)
        return ended
    except Interrupted as error:
        run.write_status(INTERRUPTED, reason=str(error), ended=now())
        say(f"{error}; the same command resumes from {checkpoint.last_whole(run.checkpoints)}")
        if error.signum not in (signal.SIGINT, signal.SIGTERM):
            signal.raise_signal(error.signum)  # for the handler that restarts the job
        sys.exit(128 + error.signum)
    except Stopped as error:
        run.write_status(INTERRUPTED, reason=str(error), ended=now())
        raise
    except Exception as error:
        _record_failure(run, error)


def begin(plan: Plan, words: list[str], number: int | None, **facts: Any) -> None:
    """Write the run's configuration, and the facts of its training into its status.

    Args:
        words, number: the overrides of the run, and its index in a sweep.
        facts: other entries of its status.
    """
    import torch

    from ddpm.runs import files
    from ddpm.runs.directory import now
    from ddpm.training import cost

    with files.replacing(plan.run.path / "config.yaml", durable=True) as temporary:
        OmegaConf.save(OmegaConf.create(plan.settings), temporary)
    if plan.codec is not None:
        keep(plan.codec, plan.data.codec, plan.run.path)
    if plan.text is not None:
        text_encoder.keep(plan.text, plan.run.path)
    if plan.data.tokenizer is not None:
        keep_tokenizer(plan.data.tokenizer, plan.run.path)
    machine = {key: cost.machine(plan.device)[key] for key in ("name", "torch", "python")}
    known = plan.run.status()
    queued = cluster.note_run(plan.run.path)
    plan.run.begin(
        data=plan.data.identity(),
        classes=list(getattr(plan.data, "classes", ())),  # names by which samples are requested
        **({"styles": list(plan.data.styles)} if plan.data.styles else {}),
        overrides=words or known.get("overrides") or [],
        job=number,
        begun=known.get("begun") or now(),
        threads=torch.get_num_threads(),
        machine=machine,
        **({"cluster_job": queued} if queued or "cluster_job" in known else {}),
        **facts,
    )


def measure(plan: Plan, opened: Callable[[DictConfig, str], Opened] | None = None) -> None:
    """Measure a finished run by the lines of `evaluation`, each once.

    Args:
        opened: opens the source for the configuration of a line; None for `ddpm.commands.sources.source_of`.
    Raises: RunFailed if a line cannot be carried out; Held.
    """
    from ddpm.runs.directory import DONE, RunIsHeld
    from ddpm.training.interrupt import Interrupted, terminable

    lines = plan.settings.get("evaluation", [])
    if set(lines) <= set(status_of(plan.run).get("evaluated") or []):
        return
    try:
        with plan.run.locked(), terminable():
            done = status_of(plan.run).get("evaluated") or []
            for line, config in zip(lines, evaluations(plan.run.path, lines, plan.config), strict=True):
                if line in done:
                    continue
                try:
                    evaluating.evaluate(config, *([] if opened is None else [opened(config, line)]))
                except InvalidInput as error:
                    raise RunFailed(f"{plan.run.path} is trained, but not measured by {line}: {error}") from error
                done = [*done, line]
                plan.run.write_status(DONE, evaluated=done)
    except RunIsHeld as error:
        raise Held(f"{error.path} is being measured by {error.holder}") from error
    except (Interrupted, KeyboardInterrupt) as error:
        say(f"{plan.run.path} is trained, but measuring it was interrupted; the same command resumes")
        sys.exit(128 + getattr(error, "signum", signal.SIGINT))


def _follow(plan: Plan, team: Any) -> None:
    """Train as a follower of the leading process, which locks the run and writes all files."""
    from ddpm.runs.directory import Run
    from ddpm.training.interrupt import Interrupted

    beginning = team.broadcast()
    if beginning is None:
        return
    path, resume = beginning
    try:
        _fit(plan._replace(run=Run(path)), team, resume)
    except Interrupted as error:
        sys.exit(128 + error.signum)


def _fit(
    plan: Plan, team: Any, resume: Path | None, watch: Callable[[int, float | None], None] | None = None
) -> tuple[str, Any]:
    """Train, with compiled networks if configured; return (the budget that was used up, the averaged task)."""
    from ddpm.training.graph import graph_on

    if plan.config.get("compile"):
        _compile(plan, team.size)
    graph = None if plan.config.get("graph", "off") == "off" else graph_on(plan.device)
    return plan.parts.trainer.fit(
        plan.run, plan.parts.task, plan.data, plan.parts.optimizer,
        seed=plan.config.seed, device=plan.device, augment=plan.parts.augment, resume=resume, ranks=team, graph=graph,
        watch=watch,
    )  # fmt: skip


def _compile(plan: Plan, processes: int) -> None:
    """Compile the networks and try them on a batch; if that fails, print why and leave them uncompiled."""
    started, task = time.perf_counter(), plan.parts.task
    micro = plan.parts.trainer.batch_size // plan.parts.trainer.accumulate // processes
    for module in task.modules.values():
        module.compile()
    try:
        for phase in range(len(task.phases)):
            trial_loss(plan, micro, phase).backward()
    except Exception as error:  # compilers raise exceptions of many classes
        for module in task.modules.values():
            module._compiled_call_impl = None
        reason = str(error).strip().splitlines() or [type(error).__name__]
        say(f"warning: the network cannot be compiled here, and is trained as it is: {reason[0]}")
    else:
        say(f"compiled in {time.perf_counter() - started:.0f} s")
    for module in task.modules.values():
        module.zero_grad()


def _record_failure(run: Any, error: Exception) -> NoReturn:
    """Write FAILED with its reason into the status, and raise RunFailed with advice."""
    from ddpm.runs import checkpoint
    from ddpm.runs.directory import FAILED, now

    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    reason = f"the disk is full ({error})" if full else f"{type(error).__name__}: {error}"
    try:
        run.write_status(FAILED, reason=reason, traceback=traceback.format_exc(), ended=now())
    except OSError as second:
        reason += f"; status.json could not be written either ({second})"
    last = checkpoint.last_whole(run.checkpoints)
    saved = f"the last whole checkpoint is {last}" if last else "there is no checkpoint yet"
    repeated = "the same command with retry=true" if multirun() else "the same command"
    advice = f"free some space, then {repeated} resumes from there" if full else f"{repeated} tries again"
    if isinstance(error, FloatingPointError):
        advice = f"the inputs of the last steps are in {run.path / 'autopsy'}; {advice}"
    raise RunFailed(f"{run.path}: {reason}; {saved}; {advice}") from error


def source_of_results(plan: Plan, averaged: Any) -> Any:
    """Build the source of a run's results; None for a task that draws no samples."""
    from ddpm.runs.precision import as_trained

    config, sampler = plan.config, plan.parts.sampler
    precision = as_trained(plan.run.status()["precision"], plan.device)
    walking = {} if sampler is None else {"sampler": sampler}
    source = averaged.source(plan.data, config.seed, plan.device, precision, **walking)
    return None if source is None else source.decoded_by(plan.data.codec)


def _draw_results(plan: Plan, averaged: Any, source: Any = None) -> None:
    """Draw the samples and figures at the end of a run."""
    from ddpm.data.dataset import spread
    from ddpm.figures import images, plots
    from ddpm.figures.images import in_plane, plane_of
    from ddpm.metrics import quality
    from ddpm.runs import results
    from ddpm.runs.directory import git_commit, held_out_lines, read_metrics

    run, config, data, sampler = plan.run, plan.config, plan.data, plan.parts.sampler
    history = read_metrics(run.path)
    plots.loss(
        run.path / "loss.png",
        [(line["step"], line["loss"]) for line in history if line["split"] == "train"],
        [(line["step"], line["loss"]) for line in held_out_lines(history)],
    )
    averaged.draw_results(run.path, data)
    source = source_of_results(plan, averaged) if source is None else source
    if source is None or not source.draws:
        return
    data = data.original
    pictures, walks = "pictures" in data.holds, source.sampler is not None
    note = plane_of(data.shape[0]) if len(data.shape) == 1 else None
    judged = config.recognition and pictures and quality.has_classes(data) and len(data.held_out) > 0
    judged = judged and source.like_data
    if judged and not quality.fits_regression(data):
        judged = False
        say("recognition=true is skipped: too many pixels for logistic regression; see evaluate.py metric=recognition")
    way = source.way(MANY_POINTS, MOMENTS) if walks and not pictures else None
    n = 512 if judged else 64 if pictures else MANY_POINTS
    samples = source.samples(n) if way is None else way[-1][1]
    images.save_samples(run.path / "samples.npy", samples[:64] if pictures else samples)
    if pictures:
        mel = mel_of(config)
        images.save_samples(run.path / "samples.png", for_display(mel, samples[:64]))
        if mel is not None:
            write_results(run.path / PAGE, source, data, samples)
        if (conditions := source.condition_images(range(64))) is not None:
            images.save_samples(run.path / "samples_conditions.png", conditions)
    else:
        numbers = data.held_out if len(data.held_out) else data.train
        real = data.batch(numbers[spread(len(numbers), MANY_POINTS)]).x.cpu()
        groups = {f"{data.name}, held out": in_plane(real), "samples": in_plane(samples)}
        plots.points(run.path / "samples.png", groups, note)
    if walks:
        save_way(run.path / "denoising.gif", source.way(32, FRAMES) if way is None else some(way, FRAMES), 8)
        _draw_forward_process(plan, source, note)
        if is_plane(source) and config.trainer.previews:  # they take longer than a short run
            draw_plane(run.path, source, data, way)
    warn_of_range(source)

    if judged:
        drawn = quality.Samples(samples, samples.new_zeros(len(samples), 0), source.classes(range(len(samples))))
        result = quality.by_regression(drawn, data)
        schedule = source.diffusion.schedule if walks else None
        settings = how_drawn(len(samples), config, "ema", sampler, schedule, git_commit())
        values = settings | quality.together([result], [config.seed])
        results.record(run.path, f"recognition_logistic_{len(samples)}_train", values)
        say(f"{len(samples)} samples, {source.walk}, EMA weights:\n{result.words}")


def _draw_forward_process(plan: Plan, source: Any, note: str | None) -> None:
    """Draw the noise schedule, and the forward process on data."""
    import torch

    from ddpm.data.dataset import spread
    from ddpm.figures import plots
    from ddpm.figures.images import as_pictures
    from ddpm.forward import q_sample
    from ddpm.randomness import SampleNoise

    run, config, data, schedule = plan.run, plan.config, plan.data, source.diffusion.schedule
    plots.schedules(run.path / "schedule.png", {schedule_name(config.schedule): schedule})
    T, n = schedule.T, 1 if "pictures" in data.original.holds else MANY_POINTS
    times = [round(T * share / 4) for share in range(5)]
    x_0 = data.batch(data.train[spread(len(data.train), n)], source.device).x.cpu()
    eps = SampleNoise(config.seed, list(range(len(x_0)))).x_T(data.shape)
    x_t = torch.cat([as_pictures(source.decode(q_sample(schedule, x_0, t, eps))) for t in times])
    plots.forward_process(run.path / "forward.png", x_t, times, schedule.alpha_bar[times].tolist(), note)


def _print_next(plan: Plan, ended: str) -> None:
    """Print where the results are, and the next commands."""
    run, status = plan.run, plan.run.status()
    pictures = "  ".join(sorted(p.name for p in run.path.iterdir() if p.suffix in (".png", ".gif")))
    following = "\n  ".join(f"{what:14}{line}" for what, line in next_commands(plan, status["step"]).items())
    say(f"""done: {status["step"]:,} steps in {status["seconds"]:.0f} s (the budget of {ended} is used)
  results       {run.path}
  pictures      {pictures}
  curves        tensorboard --logdir {shlex.quote(str(run.path.parent))}
next:
  {following}""")
