"""`ddpm-train --check`: what training would do and need."""

import functools
from typing import Any

from omegaconf import DictConfig

from ddpm.commands.console import say
from ddpm.commands.launch import job_name, multirun
from ddpm.commands.prepare import Plan, disk, must_fit, no_room, planned, status_of, trial_loss
from ddpm.config import InvalidInput, resolve_device

CHECK = "--check"


def check(config: DictConfig) -> None:
    """Say what training would do, and what it would need of what is there; begin nothing.

    Raises: InvalidInput for all that would be refused, and where memory or disk do not suffice.
    """
    from ddpm.runs import preflight
    from ddpm.runs.directory import DONE, RUNNING
    from ddpm.training import ranks

    if ranks.started():
        raise InvalidInput(f"{CHECK} looks at one process: start it without torchrun")
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
    """What the same command without --check would find of a run, and do."""
    from ddpm.runs import checkpoint
    from ddpm.runs.directory import DONE

    if status.get("state") == DONE:
        return f"done ({status['step']:,} steps); nothing to do"
    try:
        resume = checkpoint.last_whole(plan.run.checkpoints) or plan.parent
    except ValueError as error:  # a newer version's
        raise InvalidInput(str(error)) from error
    before = f"{status['state']} before, " if status else "new, "
    return before + (f"would go on from {resume}" if resume is not None else "would begin at step 1")


def activations(plan: Plan) -> int:
    """Bytes that the backward pass of a micro-batch reads: from losses of one and two images, as training has them."""
    from ddpm.runs import preflight

    micro = plan.parts.trainer.batch_size // plan.parts.trainer.accumulate
    try:
        losses = (functools.partial(trial_loss, plan, phase=number) for number in range(len(plan.parts.task.phases)))
        return max(preflight.activations(loss, plan.parts.weights, micro) for loss in losses)
    except RuntimeError as error:  # torch's for memory that there is not
        raise InvalidInput(f"a loss of one or two images cannot be computed on {plan.device}: {error}") from error


def _known(size: int | None) -> str:
    """Bytes in words, where the system tells them."""
    from ddpm.runs import preflight

    return "an unknown amount" if size is None else preflight.in_words(size)
