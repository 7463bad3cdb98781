"""A training step, for every task: draw, losses in micro-batches, gradients, optimizers, averages."""

import functools
import math
from collections.abc import Iterator, Sequence
from operator import itemgetter
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from ddpm.data.augment import Augment
from ddpm.data.dataset import Dataset
from ddpm.data.non_leaking import NonLeaking
from ddpm.randomness import Keyed
from ddpm.runs import checkpoint, preflight
from ddpm.runs.precision import computing, resolve
from ddpm.training.ema import EMA
from ddpm.training.graph import Graph, Replayed
from ddpm.training.nonfinite import NonFiniteGuard, Seen
from ddpm.training.post_hoc import PowerAverages, tracked
from ddpm.training.ranks import Ranks
from ddpm.training.task import Drawn, Losses, Optimizer, Phase, Task, trial_loss


class Settings(Protocol):
    """The settings of training that a step needs, see `ddpm.training.trainer.Trainer`."""

    batch_size: int
    accumulate: int
    precision: str
    clip: float | None
    ema_decay: float
    ema_warmup: float
    ema_snapshots: int
    max_skipped: int


class Taken(NamedTuple):
    """The record of a step: loss and gradient norm of the first phase, and the parts of the loss of all phases."""

    loss: Tensor  # the mean training loss
    grad_norm: Tensor  # before clipping
    parts: dict[str, Tensor]  # the mean of each part of the loss, of all phases; empty where there is one


class Training:
    """A task with all the state that its steps change: weights, their averages, optimizers, loss scales and counters.

    Args:
        settings: batch, micro-batches, precision, clipping and averaging of the steps.
        task: is moved to the device.
        data: training data; on the device already, or are copied batch by batch.
        optimizer: makes an optimizer of parameters, for every phase without its own.
        seed: all randomness is keyed by it, and by the step.
        precision: one of `ddpm.runs.precision.PRECISIONS`; None for that of the settings.
        augment: augmentation of training batches; None for none.
        ranks: the processes that share every batch; None for this one alone.
        graph: replays the gradients of a step, where possible, see `eager`; None for no graph.
    Raises: ValueError for a loss that couples the batch, and micro-batches.
    """

    def __init__(
        self,
        settings: Settings,
        task: Task,
        data: Dataset,
        optimizer: Optimizer,
        *,
        seed: int,
        device: torch.device,
        precision: str | None = None,
        augment: Augment | NonLeaking | None = None,
        ranks: Ranks | None = None,
        graph: Graph | None = None,
    ):
        if task.couples_batch and settings.accumulate > 1:
            raise ValueError(
                f"accumulate = {settings.accumulate}: the loss of {type(task).__name__} needs the whole batch at once; "
                "set trainer.accumulate=1"
            )
        names = [phase.name for phase in task.phases]
        unknown = {name for phase in task.phases for name in phase.trains} - task.modules.keys()
        if len(set(names)) < len(names) or unknown:
            raise ValueError(
                f"the phases of {type(task).__name__} need names of their own, and modules of the task: they are "
                f"{', '.join(names)}" + (f", and train {', '.join(sorted(unknown))}" if unknown else "")
            )
        checkpoint.must_be_plain(task.state_dict(), "the state of the task")
        self.settings, self.task, self.data = settings, task.to(device), data
        self.seed, self.device, self.augment, self.ranks = seed, device, augment, ranks or Ranks()
        parameters = sum(p.numel() for module in task.modules.values() for p in module.parameters())
        self.precision = precision or resolve(settings.precision, device, parameters)
        self.hindrance = None if graph is None else self._hindrance()
        graph = None if self.hindrance else graph
        self.autocast = computing(device, self.precision, cache=graph is None)
        self.averages = {
            name: EMA(module, settings.ema_decay if task.averages(name) else 0.0, settings.ema_warmup)
            for name, module in task.modules.items()
        }
        averaged = {name: module for name, module in task.modules.items() if task.averages(name)}
        self.tracked = PowerAverages(averaged) if settings.ema_snapshots else None
        self.make = optimizer
        self.phases = [_Optimized(phase, self, optimizer, graph) for phase in task.phases]

    @property
    def averaged(self) -> Task:
        """The task with averaged weights."""
        return self.task.using({name: average.model for name, average in self.averages.items()})

    @property
    def eager(self) -> str | None:
        """Why steps are taken without the graph that was to replay them; None if it replays them, or none was given."""
        return self.hindrance or self.phases[0].gradients.eager

    def _hindrance(self) -> str | None:
        """Return the known reason why a graph cannot replay the steps; None if there is none."""
        if self.ranks.size > 1:
            return f"{self.ranks.size} processes share every batch"
        if len(self.task.phases) > 1:
            return f"{type(self.task).__name__} has {len(self.task.phases)} phases, each with gradients of its own"
        return None if self.task.replayable else f"the losses of {type(self.task).__name__} cannot be replayed"

    @property
    def skipped(self) -> int:
        """The number of optimizer steps skipped so far because loss or gradient was not finite."""
        return sum(phase.guard.skipped for phase in self.phases)

    def scale_lr(self, factor: float) -> None:
        """Set every learning rate to its optimizer's own times a factor."""
        for phase in self.phases:
            for group, lr in zip(phase.optimizer.param_groups, phase.base_lrs, strict=True):
                group["lr"] = lr * factor

    def set_lr(self, lr: float) -> None:
        """Set every learning rate."""
        for phase in self.phases:
            for group in phase.optimizer.param_groups:
                group["lr"] = lr

    @property
    def lr(self) -> float:
        """The learning rate of the first phase."""
        return float(self.phases[0].optimizer.param_groups[0]["lr"])

    def draw(self, step: int, progress: float = 0.0) -> Drawn:
        """Draw a step's whole batch, a function of (seed, step) and of what the task has learned from earlier steps."""
        random = Keyed(self.seed, step, device=self.device)
        order = self.data.order(self.seed, step, self.settings.batch_size)
        batch = self.data.batch(order, self.device, random("flip"))
        if self.augment is not None:
            batch = self.augment.of(batch, random("augment"))
            batch = self.data.conditioned(batch, order, random("condition image"))
        return self.task.draw(batch, random, progress)

    def micro_batches(self, drawn: Drawn) -> Iterator[Drawn]:
        """Yield the draws of a step in micro-batches, of each the rows of this process."""
        for part in torch.arange(self.settings.batch_size, device=self.device).chunk(self.settings.accumulate):
            rows = drawn.rows(itemgetter(part))
            yield rows if self.task.couples_batch else rows.rows(self.ranks.share)

    def step(self, step: int, progress: float = 0.0) -> Taken:
        """Take a training step; steps count from 1. Learning rates are those set last."""
        drawn = self.begin(step, progress)
        return self.end(step, drawn, [phase.step(step, drawn, progress) for phase in self.phases])

    def begin(self, step: int, progress: float = 0.0) -> Drawn:
        """Prepare the networks for a step, and return its draws."""
        for module in self.task.modules.values():
            module.train()
        self.ranks.seed_dropout(self.seed, step)
        return self.draw(step, progress)

    def end(self, step: int, drawn: Drawn, taken: Sequence[tuple[Taken, Losses]]) -> Taken:
        """Average the weights after the phases of a step, and notify the task."""
        for module in self.task.modules.values():
            renormalise(module)
        for name, average in self.averages.items():
            average.update(self.task.modules[name])
        if self.tracked:
            self.tracked.update(step)
        first, losses = taken[0][0], taken[0][1]
        self.task.after_step(drawn, losses)
        names = [name for _, losses in taken for name in losses]
        parts = {  # parts of one name in several phases are prefixed by their phase
            name if names.count(name) == 1 else f"{phase.phase.name}_{name}": part.mean()
            for phase, (_, losses) in zip(self.phases, taken, strict=True)
            for name, part in losses.items()
        }
        return first._replace(parts=parts if len(parts) > 1 else {})

    def must_be_sound(self, last: bool = False) -> None:
        """Raise FloatingPointError if too many steps were skipped in a row, or a loss scale has collapsed.

        Args:
            last: whether the budget is used up; then also if nothing was learned, for every step was skipped.
        """
        for phase in self.phases:
            phase.guard.must_be_sound(phase.scaler, last)

    def report(self) -> list[dict[str, Any]]:
        """Return the last steps as plain data, for an autopsy: a line per step and phase."""
        several = len(self.phases) > 1
        lines = [
            ({"phase": phase.phase.name} if several else {}) | line
            for phase in self.phases
            for line in phase.guard.report()
        ]
        return sorted(lines, key=itemgetter("step"))

    def state_dict(self) -> dict[str, Any]:
        """Return the state that a resumed run needs besides the weights and their averages."""
        return {
            "precision": self.precision,
            "ema_updates": {name: average.updates for name, average in self.averages.items()},
            "phases": {phase.phase.name: phase.state_dict() for phase in self.phases},
            "task": self.task.state_dict(),
            **({"tracked": self.tracked.state_dict()} if self.tracked else {}),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore `state_dict`."""
        for name, average in self.averages.items():
            average.updates = state["ema_updates"][name]
        if self.tracked:
            self.tracked.load_state_dict(state.get("tracked", {}))
        for phase in self.phases:
            if phase.phase.name not in state["phases"]:
                raise ValueError(f"the checkpoint has the phases {', '.join(state['phases'])}, not {phase.phase.name}")
            phase.load_state_dict(state["phases"][phase.phase.name])
        self.task.load_state_dict(state["task"])

    def needs(self) -> preflight.Memory:
        """Estimate the memory of a step, by computing losses of one and two samples."""
        micro = self.settings.batch_size // self.settings.accumulate
        activations = 0
        for number, phase in enumerate(self.phases):
            loss = functools.partial(self._trial_loss, number)
            activations = max(activations, preflight.activations(loss, phase.parameters, micro))
        weight = nn.Parameter(torch.ones(2, device=self.device))
        weight.grad = torch.ones_like(weight)
        trial = self.make([weight])
        trial.step()
        moments, batch = preflight.moments_of(trial), (self.settings.batch_size, self.settings.accumulate)
        averages = 1 + tracked(self.settings.ema_snapshots)
        modules, still = self.task.modules.values(), self.task.frozen.values()
        return preflight.memory(modules, moments, self.data, *batch, activations, averages, still)

    def _trial_loss(self, phase: int, n: int) -> Tensor:
        with self.autocast:
            return trial_loss(self.task, self.data, n, self.device, phase)


def renormalise(module: nn.Module) -> None:
    """Renormalise the weights of layers that have `renormalise_`, see `models.magnitude`."""
    for layer in module.modules():
        if callable(its := getattr(layer, "renormalise_", None)):
            its()


class _Optimized:
    """A phase with its optimizer, its loss scale and its guard against non-finite steps."""

    def __init__(self, phase: Phase, training: Training, optimizer: Optimizer, graph: Graph | None):
        self.phase, self.training = phase, training
        self.gradients = Replayed(self._gradients, graph)
        named = [
            (f"{name}.{key}", p) for name in phase.trains for key, p in training.task.modules[name].named_parameters()
        ]
        self.all_names = [name for name, _ in named]
        self.names = [name for name, p in named if p.requires_grad]
        self.parameters = [p for _, p in named if p.requires_grad]
        if not self.parameters:
            raise ValueError(f"the phase {phase.name!r} of {type(training.task).__name__} trains no parameter")
        self.optimizer = (phase.optimizer or optimizer)(self.parameters)
        self.base_lrs = [group["lr"] for group in self.optimizer.param_groups]
        self.scaler = torch.amp.GradScaler(training.device.type, enabled=training.precision == "fp16")
        self.guard = NonFiniteGuard(training.settings.max_skipped, training.device)

    def step(self, step: int, drawn: Drawn, progress: float) -> tuple[Taken, Losses]:
        """Step the optimizer; returns the losses of the whole batch, over all processes."""
        return self.update(step, drawn, *self.backward(drawn, progress))

    def backward(self, drawn: Drawn, progress: float) -> tuple[Tensor, Losses]:
        """Compute every parameter's gradient; returns the trained loss, and the parts of the whole batch."""
        loss, parts = self.gradients(drawn, progress)
        ranks = self.training.ranks
        whole = (lambda x: x) if self.training.task.couples_batch else ranks.gathered
        together = {name: torch.cat([whole(losses[name]) for losses in parts]) for name in parts[0]}
        ranks.average_([loss, *(p.grad for p in self.parameters if p.grad is not None)])
        return loss, together

    def update(self, step: int, drawn: Drawn, loss: Tensor, together: Losses) -> tuple[Taken, Losses]:
        """Step the optimizer by the present gradients, unless they are not finite."""
        training, task = self.training, self.training.task
        self.scaler.unscale_(self.optimizer)
        grad_norm = nn.utils.clip_grad_norm_(self.parameters, training.settings.clip or math.inf)
        seen = Seen(step, task.facts(drawn), task.total(together))
        self.guard.step(seen, loss, grad_norm, self.optimizer, self.scaler)
        return Taken(loss, grad_norm, {}), together

    def _gradients(self, drawn: Drawn, progress: float) -> tuple[Tensor, list[Losses]]:
        """Compute this process's gradients of a step; returns its loss, and its parts in each micro-batch.

        Nothing here may synchronise with the device: it is what a graph replays.
        """
        training, task = self.training, self.training.task
        self.optimizer.zero_grad()
        loss, parts = torch.zeros((), device=training.device), list[Losses]()
        for rows in training.micro_batches(drawn):
            with training.autocast:
                losses = self.phase.losses(rows, progress)
            for name, value in losses.items():
                if value.ndim != 1:
                    raise ValueError(f"the loss {name!r} has the shape {tuple(value.shape)}, not one value a sample")
            total = task.total(losses)
            part = (total if rows.weight is None else rows.weight * total).mean() / training.settings.accumulate
            self.scaler.scale(part).backward()
            loss += part.detach()
            parts.append({name: value.detach() for name, value in losses.items()})
        return loss, parts

    def state_dict(self) -> dict[str, Any]:
        """Return the state that a resumed run needs."""
        names = {} if self.names == self.all_names else {"parameters": self.names}
        return {
            "optimizer": self.optimizer.state_dict()["state"],
            "scaler": self.scaler.state_dict(),
            "guard": self.guard.state_dict(),
        } | names

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore `state_dict`."""
        before = {name: number for number, name in enumerate(state.get("parameters", self.all_names))}
        known = {  # of parameters trained before; newly trained ones begin without state
            number: state["optimizer"][before[name]]
            for number, name in enumerate(self.names)
            if before.get(name) in state["optimizer"]
        }
        self.optimizer.load_state_dict(self.optimizer.state_dict() | {"state": known})
        self.scaler.load_state_dict(state["scaler"])
        self.guard.load_state_dict(state["guard"])
