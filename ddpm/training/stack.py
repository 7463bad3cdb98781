"""Stacked training: several runs that differ in their seeds, trained at once as one program."""

import contextlib
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ddpm.data.batch import Rows
from ddpm.training.interrupt import signals
from ddpm.training.step import Settings, Taken, Training
from ddpm.training.task import Task
from ddpm.training.trainer import Begun, Trainer


class Stack:
    """Arms whose losses and gradients are computed together, and everything else of a step separately.

    The weights of S arms become rows of one tensor (S, *) a parameter, and so their gradients; the arms' own parameters
    become views of these rows. The draws of all arms are concatenated, S B rows; the loss and its mathematics
    see these rows, and the networks S times B of them through `torch.vmap`. Each arm then clips, steps its optimizer
    and averages as a single run does: it is that run but for rounding.

    Args:
        arms: of one task and one form, see `why_not`; they differ in their seeds, or in numbers no loss depends on.
            Their weights are loaded before.
    Raises: ValueError with the reason why they cannot be stacked.
    """

    def __init__(self, arms: Sequence[Training]):
        if reason := next(filter(None, map(_why_no_arm, arms)), None) or _why_not_together(arms):
            raise ValueError(f"these runs cannot be stacked: {reason}")
        self.arms = list(arms)
        networks = {name: [arm.task.modules[name] for arm in arms] for name in arms[0].task.modules}
        self.networks = {name: _Together(alike) for name, alike in networks.items()}
        self.task = arms[0].task.using(self.networks)

    def step(self, step: int, progress: float = 0.0) -> list[Taken]:
        """Take a step of every arm, as `Training.step` does."""
        drawn = [arm.begin(step, progress) for arm in self.arms]
        phases = [arm.phases[0] for arm in self.arms]
        rows = drawn[0].holding(map(torch.cat, zip(*(its.tensors() for its in drawn), strict=True)))
        with self.arms[0].autocast:
            losses = self.task.losses(rows, progress)
        total = self.task.total(losses)
        means = (total if rows.weight is None else rows.weight * total).unflatten(0, (len(self.arms), -1)).mean(1)
        for network in self.networks.values():
            network.forget_gradients()
        torch.stack([phase.scaler.scale(mean) for phase, mean in zip(phases, means, strict=True)]).sum().backward()
        for network in self.networks.values():
            network.hand_out_gradients()
        each = [
            {name: part.detach().unflatten(0, (len(self.arms), -1))[s] for name, part in losses.items()}
            for s in range(len(self.arms))
        ]
        return [
            arm.end(step, its, [phase.update(step, its, mean, parts)])
            for arm, phase, its, mean, parts in zip(self.arms, phases, drawn, means.detach(), each, strict=True)
        ]


def fit_together(trainers: Sequence[Trainer], begun: Sequence[Begun]) -> list[tuple[str, Task] | Exception]:
    """Train several runs in lockstep, each by its own loop, with their steps taken together.

    A run whose numbers break, or that meets another error of its own, ends alone and the others go on; a signal ends
    all of them, each after its checkpoint.

    Args:
        trainers, begun: of each run, from `Trainer.begin`; at one step, with one budget in steps or epochs.
    Returns:
        for each run the result of `Trainer.fit`, or its exception.
    Raises: ValueError, before the first step, for runs that cannot be stacked.
    """
    runs = list(zip(trainers, begun, strict=True))
    if len({(one.step, trainer.last_step(len(one.training.data.train))) for trainer, one in runs}) > 1:
        raise ValueError("these runs cannot be stacked: they are at different steps, or end at different ones")
    if reason := next(filter(None, (why_not(one.training.task, trainer) for trainer, one in runs)), None):
        raise ValueError(f"these runs cannot be stacked: {reason}")
    arms = [one.training for one in begun]
    stack, stacked = Stack(arms), list(range(len(arms)))
    ended: dict[int, tuple[str, Task] | Exception] = {}
    pending: dict[int, tuple[int, float]] = {}

    with signals() as received, contextlib.ExitStack() as closing:
        loops = [trainer.loop(one, received) for trainer, one in runs]
        for loop in loops:
            closing.callback(loop.close)

        def go_on(n: int, go: Callable[[], tuple[int, float]]) -> None:
            try:
                pending[n] = go()
            except StopIteration as end:
                ended[n] = end.value
            except Exception as error:  # any error ends this run alone: the caller reports it
                ended[n] = error

        for n, loop in enumerate(loops):
            go_on(n, loop.__next__)
        while pending:
            (step, fraction), there = next(iter(pending.values())), list(pending)
            if there != stacked:
                stack, stacked = Stack([arms[n] for n in there]), there
            pending.clear()
            for n, taken in zip(there, stack.step(step, fraction), strict=True):
                go_on(n, functools.partial(loops[n].send, taken))
    return [ended[n] for n in range(len(arms))]


def why_not(task: Task, trainer: Trainer) -> str | None:
    """Return why a run cannot be stacked with others; None if it can."""
    if trainer.seconds is not None:
        return "a budget in seconds ends each run where it is then (set trainer.seconds=null)"
    return _why_no_step(task, trainer)


def _why_no_arm(arm: Training) -> str | None:
    return "several processes share its batch" if arm.ranks.size > 1 else _why_no_step(arm.task, arm.settings)


def _why_no_step(task: Task, settings: Settings) -> str | None:
    networks = [module for network in task.modules.values() for module in network.modules()]
    reasons = {
        "its step is cut into micro-batches (trainer.accumulate)": settings.accumulate > 1,
        f"{type(task).__name__} trains in several phases": len(task.phases) > 1,
        f"the loss of {type(task).__name__} couples the batch": task.couples_batch,
        "its task learns from step to step besides its weights": bool(task.state_dict()),
        "its network draws random numbers (model.dropout), which would differ in a stack": any(
            isinstance(module, nn.Dropout) and module.p > 0 for module in networks
        ),
        "its network is computed twice to save memory (model.checkpointing)": any(
            getattr(module, "checkpointing", False) for module in networks
        ),
        "its network is compiled": any(getattr(module, "_compiled_call_impl", None) is not None for module in networks),
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


def _why_not_together(arms: Sequence[Training]) -> str | None:
    """Return why these runs, each of which could be stacked, cannot be stacked with one another; None if they can."""

    def form(arm: Training) -> object:
        return (
            type(arm.task),
            arm.settings.batch_size,
            arm.precision,
            arm.device,
            [
                (name, key, x.shape, x.dtype, x.requires_grad)
                for name, network in arm.task.modules.items()
                for key, x in network.state_dict(keep_vars=True).items()
            ],
        )

    return None if all(form(arm) == form(arms[0]) for arm in arms[1:]) else "they differ in more than numbers"


class _Together(nn.Module):
    """Networks of one form, called as one with the rows of all: (S B, *) -> (S B, *)."""

    def __init__(self, networks: Sequence[nn.Module]):
        super().__init__()
        self.alike = list(networks)  # a plain list, which nn.Module does not register: the parameters here are the rows
        named = [dict(network.named_parameters()) for network in networks]
        self.stacked = {name: _stacked([of[name] for of in named]) for name in named[0]}
        buffers = [dict(network.named_buffers()) for network in networks]
        self.buffered = {name: torch.stack([of[name] for of in buffers]) for name in buffers[0]}
        self.own = {name: [of[name] for of in named] for name in named[0]}
        for name, x in self.stacked.items():
            for own, row in zip(self.own[name], x.detach(), strict=True):
                own.data = row

    def __getattr__(self, name: str) -> Any:
        """Return any other attribute, such as `takes`, of the first network."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["alike"][0], name)

    def forward(self, *inputs: Any) -> Tensor:
        S, first, args = len(self.alike), self.alike[0], _Inputs(dict(enumerate(inputs)))

        def of_one(weights: dict[str, Tensor], buffers: dict[str, Tensor], tensors: list[Tensor]) -> Any:
            return functional_call(first, (weights, buffers), tuple(args.holding(tensors).inputs.values()))

        out: Tensor = torch.vmap(of_one)(self.stacked, self.buffered, [x.unflatten(0, (S, -1)) for x in args.tensors()])
        return out.flatten(0, 1)

    def forget_gradients(self) -> None:
        for x in self.stacked.values():
            x.grad = None

    def hand_out_gradients(self) -> None:
        """Give each parameter its row of the gradients."""
        for name, x in self.stacked.items():
            for own, row in zip(self.own[name], len(self.alike) * [None] if x.grad is None else x.grad, strict=True):
                own.grad = row


@dataclass(frozen=True)
class _Inputs(Rows):
    """The arguments of a network's call, by their position."""

    inputs: Mapping[int, Any]


def _stacked(rows: Sequence[nn.Parameter]) -> Tensor:
    """Return parameters of one shape as one (S, *), whose rows have the memory layout of the originals."""
    first = rows[0].detach()
    x = torch.empty_strided(
        (len(rows), *first.shape), (first.numel(), *first.stride()), dtype=first.dtype, device=first.device
    )
    for row, own in zip(x, rows, strict=True):
        row.copy_(own.detach())
    return x.requires_grad_(rows[0].requires_grad)
