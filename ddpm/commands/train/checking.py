"""`ddpm-train --check` and `ddpm-sample --check`: dry runs that report what training or sampling would need."""

import functools
from typing import Any

from omegaconf import DictConfig

from ddpm.commands.console import say
from ddpm.commands.launch import job_name, multirun
from ddpm.commands.load import must_walk
from ddpm.commands.sample import pipelines
from ddpm.commands.sources import how_drawn_from, source_of
from ddpm.commands.train.prepare import Plan, disk, must_fit, no_room, planned, status_of, trial_loss
from ddpm.commands.validate import must_be_whole
from ddpm.config import InvalidInput, resolve_device

CHECK = "--check"


def check(config: DictConfig) -> None:
    """Print what training would do, and its share of memory and disk; start nothing.

    Raises: InvalidInput for all that training would refuse, and if memory or disk do not suffice.
    """
    from ddpm.runs import preflight
    from ddpm.runs.directory import DONE, RUNNING
    from ddpm.training import ranks

    if ranks.started():
        raise InvalidInput(f"{CHECK} checks a single process: start it without torchrun")
    device = resolve_device(config.device)
    download = isinstance(config.data, DictConfig) and config.data.get("download") is True
    if download:
        config = config.copy()
        config.data.download = False
    try:
        plan = planned(config, device, marking=False, learning=False)
    except InvalidInput as error:
        if not download:
            raise
        does = f"start the run, which downloads it: {CHECK} does not"
        raise InvalidInput(str(error).replace("set download=true", does)) from error
    data, task, trainer = plan.data, plan.parts.task, plan.parts.trainer
    status = status_of(plan.run)
    if status.get("state") == RUNNING:
        raise InvalidInput(f"{plan.run.path} is being trained by process {status.get('pid')} on {status.get('host')}")
    last = trainer.last_step(len(data.train))
    budget = [] if last is None else [f"{last:,} steps of {trainer.batch_size:,} {data.units}"]
    budget += [] if trainer.seconds is None else [f"{trainer.seconds:,g} s"]
    lines = {
        "run": f"{plan.run.path}: {_state(plan, status)}"
        if plan.lacks is None
        else f"{plan.run.path.parent}: new; {plan.lacks}",
        "data": f"{data.name}, {len(data.train):,} {data.units} to train on and {len(data.held_out):,} held out, "
        + "x".join(map(str, data.shape)),
        "model": " and ".join(type(module).__name__ for module in task.modules.values())
        + f", {plan.parts.parameters:,} parameters",
        "budget": " or ".join(budget),
    }
    if status.get("state") != DONE:
        needed, there = must_fit(plan.parts, data, device, activations(plan))
        room, free, parts = disk(plan)
        if room > free:
            raise InvalidInput(no_room(plan))
        lines["memory"] = f"{preflight.in_words(sum(needed))} of {_known(there)} on {device}: {needed}"
        lines["disk"] = f"{preflight.in_words(room)} of {preflight.in_words(free)} at {plan.run.path.parent}: {parts}"
    say("\n".join(([job_name()] if multirun() else []) + [f"{key:8}{line}" for key, line in lines.items()]))


def _state(plan: Plan, status: dict[str, Any]) -> str:
    """Return the state of a run, and what the command without --check would do."""
    from ddpm.runs import checkpoint
    from ddpm.runs.directory import DONE

    if status.get("state") == DONE:
        return f"done ({status['step']:,} steps); nothing to do"
    try:
        resume = checkpoint.last_whole(plan.run.checkpoints) or plan.parent
    except ValueError as error:  # of a newer version
        raise InvalidInput(str(error)) from error
    before = f"{status['state']} before, " if status else "new, "
    return before + (f"would resume from {resume}" if resume is not None else "would begin at step 1")


def activations(plan: Plan) -> int:
    """Return the bytes that a micro-batch's backward pass reads, extrapolated from losses of one and two images."""
    from ddpm.runs import preflight

    micro = plan.parts.trainer.batch_size // plan.parts.trainer.accumulate
    try:
        losses = (functools.partial(trial_loss, plan, phase=number) for number in range(len(plan.parts.task.phases)))
        return max(preflight.activations(loss, plan.parts.weights, micro) for loss in losses)
    except RuntimeError as error:  # torch raises it for lack of memory
        raise InvalidInput(f"a loss of one or two images cannot be computed on {plan.device}: {error}") from error


def _known(size: int | None) -> str:
    """Return a size in words; None is an unknown amount."""
    from ddpm.runs import preflight

    return "an unknown amount" if size is None else preflight.in_words(size)


# ------------------------------------------------------------------------------------------------------------ drawing


def check_samples(config: DictConfig) -> None:
    """Print what sampling would compute, and its memory and time from evaluating one batch; draw nothing.

    Raises: InvalidInput for all that sampling would refuse, except a missing prompt.
    """
    must_be_whole(config, "n", least=1)
    pipeline = None
    if pipelines.is_requested(config):
        config.prompt = "" if config.prompt is None else config.prompt  # for a model of sounds it means none
        pipeline, source, run = pipelines.open_pipeline(config)
        step = 0
        try:
            source.condition([0])
        except ValueError as error:  # it needs more than a text as condition
            raise InvalidInput(str(error)) from error
    else:
        source, run, _, step = source_of(config)
    if source.sampler is not None:
        must_walk(source.sampler, source.diffusion)
    encoder = getattr(pipeline, "encoder", None)  # of texts
    modules = [source.model] + ([] if encoder is None else [encoder])
    modules += [] if source.codec is None else [source.codec.model]
    weights, batch = sum(p.nbytes for module in modules for p in module.parameters()), min(config.n, config.batch)
    networks = _networks(source, pipeline)
    lines = {
        "draws": how_drawn_from(source, run, step, config, source.evaluations),
        "networks": "; ".join(f"{name}: {size:,} parameters" for name, (size, _) in networks.items()),
        "compute": _compute(source, networks, config.n),
        **_measured(source, weights, config.n, batch),
    }
    say("\n".join(f"{key:10}{line}" for key, line in lines.items()))


def _networks(source: Any, pipeline: Any) -> dict[str, tuple[int, float]]:
    """Return network -> (parameters, GFLOP): of evaluating one image, encoding one text, decoding one image."""
    import copy

    import torch

    from ddpm.training.cost import flops, gflop_forward

    def size(module: Any) -> int:
        return sum(p.numel() for p in module.parameters())

    name = type(source.model).__name__ if pipeline is None else "U-Net"
    found = {name: (size(source.model), gflop_forward(source))}
    if getattr(pipeline, "encoder", None) is not None:
        encoder = copy.deepcopy(pipeline.encoder).to("meta")
        ids = torch.zeros(1, encoder.length, dtype=torch.long, device="meta")
        found["text encoder"] = (size(encoder), flops(encoder, ids, backward=False) / 1e9)
    if source.codec is not None:
        decoder = copy.deepcopy(source.codec.model).to("meta")
        z = torch.empty(1, *source.codec.shape, device="meta")
        codes = source.codec.kind == "codes"  # codes are looked up in a codebook
        once = float("nan") if codes else flops(decoder.decode, z, backward=False) / 1e9
        found["autoencoder"] = (size(decoder), once)
    return found


def _compute(source: Any, networks: dict[str, tuple[int, float]], n: int) -> str:
    """Return the GFLOP of each network, and of all samples, in words."""
    import math

    (_, (_, once)), *others = networks.items()
    evaluations = _passes(source) * source.evaluations if source.sampler is not None else 1
    unit = f"an evaluation, {evaluations:,} of them an image" if source.sampler is not None else "an image"
    what = {"text encoder": "a text", "autoencoder": "to decode one"}
    parts = [f"{_short(once)} GFLOP {unit}"]
    parts += [f"{_short(cost)} GFLOP {what[name]}" for name, (_, cost) in others if not math.isnan(cost)]
    decoding = next((cost for name, (_, cost) in others if name == "autoencoder"), 0.0)
    whole = n * (evaluations * once + (0.0 if math.isnan(decoding) else decoding))
    return f"{'; '.join(parts)}; {_short(whole)} GFLOP for {n:,}"


def _passes(source: Any) -> int:
    """Return the evaluations of the network per step: 2 if guidance needs it with and without the condition, else 1."""
    w = getattr(source.guidance, "w", None)
    return 1 if not str(source.guidance) or w in (0, 1) else 2


def _measured(source: Any, weights: int, n: int, batch: int) -> dict[str, str]:
    """Return memory and time in words, measured by evaluating a batch and decoding once; `weights` is in bytes."""
    from ddpm.runs import preflight
    from ddpm.training import cost

    device = source.device
    try:
        before: int | None = cost.peak(device, anew=True)
    except (RuntimeError, OSError):  # a system that does not report it
        before = None
    seconds = cost.evaluation_seconds(source, batch) * source.evaluations
    used = None if before is None else cost.peak(device) - before
    decoding = cost.decoding_seconds(source) if source.sampler is not None and source.codec is not None else 0.0
    there = preflight.available(device)
    memory = f"{preflight.in_words(weights)} of weights"
    memory += f", and {preflight.in_words(max(0, used))} while {batch} are evaluated" if used is not None else ""
    whole = seconds * -(-n // batch) + decoding * n
    took = f"about {_short(whole)} s for {n:,} on {device}, {batch} at a time"
    return {"memory": f"{memory}; {_known(there)} is available", "time": took}


def _short(x: float) -> str:
    """Return a number with three significant digits."""
    return f"{float(f'{x:.3g}'):,g}"
