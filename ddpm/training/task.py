"""The protocol of a task: modules that are trained, the random draws of a step, and its losses."""

import copy
import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn

from ddpm.data.batch import Batch, Condition, Rows, labels_of, takes
from ddpm.data.dataset import Dataset
from ddpm.randomness import Keyed
from ddpm.runs.checkpoint import NAME
from ddpm.sources.base import Source

__all__ = [
    "Batch",
    "Condition",
    "Drawn",
    "Optimizer",
    "Phase",
    "Task",
    "checksum",
    "must_take",
    "must_take_shape",
    "shape_of",
    "trial_loss",
]

Losses = dict[str, Tensor]
"""Name of a part of the loss -> its value for each row, (B,)."""
Optimizer = Callable[[list[nn.Parameter]], torch.optim.Optimizer]


@dataclass(frozen=True, kw_only=True)
class Drawn(Rows):
    """All inputs of a step's losses; a task adds its own tensors, each with one row a sample.

    Args:
        weight: factor of each row's loss, (B,), where rows are not drawn uniformly; None for 1.
    """

    weight: Tensor | None = None


class Phase(NamedTuple):
    """A part of a step with an optimizer of its own. Most tasks have one; adversarial ones have two, in turn."""

    name: str
    trains: tuple[str, ...]  # names of modules
    losses: Callable[[Drawn, float], Losses]
    optimizer: Optimizer | None = None  # None for that of the run


class Task(ABC):
    """A training objective, with the networks that it trains.

    A trainer moves the modules to its device, draws, computes the losses of each phase, steps its optimizer and
    averages the weights of all modules; all else about training is the trainer's, and the same for every task.

    Args:
        modules: trained networks, by name; lower-case letters, digits and underscores. Each has files in a checkpoint.
        frozen: networks that are used but not trained, by name; a checkpoint refers to them by checksum.
        weights: part of the loss -> its weight in the sum that is trained; 1 for those that are not named.
        only: patterns such as "model.middle_*", of MODULE.PARAMETER as in `fnmatch`: only parameters that match one of
            them are trained; None for all.
    Raises: ValueError for a pattern that no parameter matches, or an invalid name.
    """

    couples_batch = False
    """Whether the loss of a row depends on the others: then every process computes the whole batch, in one piece."""

    perceives = False
    """Whether its loss needs `frozen["perceptual"]`, a `ddpm.latent.perceptual.Perceptual`, which is set before
    training."""

    draws_of_data = False
    """Whether samples derive from data, such as reconstructions."""

    instead = ""
    """What to do instead with a run that draws no samples, in words."""

    replayable = False
    """Whether `losses` computes the same in each step, from the draws and from tensors that are changed in place: it
    reads no progress, no value of a tensor, and no number that changes. A GPU can then replay it, see
    `ddpm.training.graph`."""

    def __init__(
        self,
        modules: Mapping[str, nn.Module],
        frozen: Mapping[str, nn.Module] | None = None,
        weights: Mapping[str, float] | None = None,
        only: Sequence[str] | None = None,
    ):
        self.modules, self.frozen, self.weights = dict(modules), dict(frozen or {}), dict(weights or {})
        if not self.modules:
            raise ValueError("a task without modules trains nothing")
        for name in (*self.modules, *self.frozen):
            if not NAME.fullmatch(name) or name in ("ema", "state", "manifest"):
                raise ValueError(
                    f"a module cannot be called {name!r}: up to 64 lower-case letters, digits and underscores can, a "
                    "letter first"
                )
        if both := self.modules.keys() & self.frozen.keys():
            raise ValueError(f"{', '.join(sorted(both))}: a module is either trained or frozen")
        for module in self.frozen.values():
            module.eval().requires_grad_(False)
        if only is not None:
            if not only:
                raise ValueError("only = [] trains nothing; null trains all parameters")
            self._train_only(only)

    def _train_only(self, patterns: Sequence[str]) -> None:
        named = {f"{name}.{key}": p for name, module in self.modules.items() for key, p in module.named_parameters()}
        for pattern in patterns:
            if not any(fnmatchcase(name, pattern) for name in named):
                parts = sorted({".".join(name.split(".")[:2]) + ".*" for name in named})
                raise ValueError(f"only: no parameter matches {pattern!r}; there are {', '.join(parts)}")
        for name, parameter in named.items():
            parameter.requires_grad_(any(fnmatchcase(name, pattern) for pattern in patterns))

    def concerns(self) -> list[str]:
        """Return known problems of the settings that are nevertheless allowed, a line each."""
        return []

    # ------------------------------------------------------------------------------------------------ training steps

    @property
    def phases(self) -> tuple[Phase, ...]:
        """The phases of a step, in order."""
        return (Phase("all", tuple(self.modules), self.losses),)

    def averages(self, name: str) -> bool:
        """Return whether the weights of a module are averaged; if not, its average equals the present weights."""
        return True

    @abstractmethod
    def draw(self, batch: Batch, random: Keyed, progress: float) -> Drawn:
        """Make all random draws of a step's whole batch, except dropout.

        Args:
            batch: of the data, on the task's device.
            random: the generators of the step.
            progress: the share of the budget that is used, 0..1.
        """

    @abstractmethod
    def losses(self, drawn: Drawn, progress: float) -> Losses:
        """Return the parts of the loss for rows of draws, each (B,)."""

    def total(self, losses: Losses) -> Tensor:
        """Return the weighted sum of the parts, (B,)."""
        weighted = [
            part if self.weights.get(name, 1) == 1 else self.weights[name] * part for name, part in losses.items()
        ]
        return weighted[0] if len(weighted) == 1 else torch.stack(weighted).sum(0)

    def after_step(self, drawn: Drawn, losses: Losses) -> None:  # noqa: B027  # most tasks need none
        """Update the state after a step, given draws and first-phase losses of the whole batch, over all processes.

        State that changes here must be in `state_dict`. It is also called after steps that were skipped because their
        losses were not finite.
        """

    def facts(self, drawn: Drawn) -> dict[str, Tensor]:
        """Return facts of each row, such as t, for an autopsy of non-finite steps: each (B,)."""
        return {}

    # --------------------------------------------------------------------------------------------- evaluation

    def draw_held_out(self, batch: Batch, random: Keyed) -> Drawn:
        """Make the draws for held-out data: the same each time, whatever the run's seed."""
        return self.draw(batch, random, 1.0)

    def held_out(self, drawn: Drawn) -> Losses:
        """Return the parts of the loss on held-out data: those of the first phase."""
        return self.phases[0].losses(drawn, 1.0)

    def source(
        self,
        data: Dataset | None,
        seed: int,
        device: torch.device,
        precision: str = "fp32",
        requested: Sequence[int] | None = None,
    ) -> Source | None:
        """Return the source of samples of the modules; None, or a `Silent` one, for a task that draws none.

        Args:
            data: data whose conditions samples take, where the task is conditional; None if not available.
            seed, device, precision, requested: as in `ddpm.sources.base.Source`.
        """
        return None

    def codec(self) -> Any:
        """Return the codec for other runs' latents, see `ddpm.latent.codec.Codec`; None for a task that trains none."""
        return None

    def preview(self, n: int, data: Dataset, seed: int, precision: str) -> Tensor | None:
        """Return n samples for display, (n, *), on the CPU, always from the same noise; None if the task draws none.

        Args:
            data: as in `source`.
        """
        device = next(next(iter(self.modules.values())).parameters()).device
        source = self.source(data, seed, device, precision)
        return None if source is None or not source.draws else source.decoded_by(data.codec).draw(range(n))

    def draw_results(self, folder: Path, data: Dataset) -> None:  # noqa: B027
        """Draw the task's own figures into the run's folder, at its end; none by default."""

    # -------------------------------------------------------------------------------------------------- state

    def state_dict(self) -> dict[str, Any]:
        """Return the state that a resumed run needs besides weights: tensors, numbers, and containers of them."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:  # noqa: B027
        """Restore `state_dict`; an empty one leaves the initial state."""

    def to(self, device: torch.device) -> Self:
        """Move the modules, and the task's other tensors, to a device; returns self."""
        for module in (*self.modules.values(), *self.frozen.values()):
            module.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch leaves it untyped
        return self

    def using(self, modules: Mapping[str, nn.Module]) -> Self:
        """Return a copy of the task with other modules, such as averaged ones; all else is shared."""
        other = copy.copy(self)
        other.modules = dict(modules)
        return other

    # ---------------------------------------------------------------------------------------------- requirements

    def check(self, data: Dataset) -> None:  # noqa: B027
        """Raise ValueError if the task cannot be trained, or not on these data."""


def checksum(module: nn.Module) -> str:
    """Return the checksum of a module's parameters and buffers, on any device: sha256, 64 hexadecimal digits."""
    digest = hashlib.sha256()
    for name, x in sorted(module.state_dict().items()):
        digest.update(f"{name} {x.dtype} {tuple(x.shape)}\n".encode())
        digest.update(x.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def shape_of(network: object) -> tuple[int, ...] | None:
    """Return the sample shape of a network: its `shape`, or (in_channels, *image_size); None if it has none."""
    shape = getattr(network, "shape", None)
    if shape is None:
        shape = (getattr(network, "in_channels", None), *getattr(network, "image_size", (None,)))
    return None if None in shape else tuple(shape)


def must_take_shape(network: nn.Module, data: Dataset) -> None:
    """Raise ValueError if a network's sample shape is not that of the data, whatever its conditions."""
    shape = shape_of(network)
    if shape is not None and shape != data.shape:
        if len(shape) == len(data.shape) == 3:
            raise ValueError(
                f"the model takes images of (C, H, W) = {shape}, but the data are {data.shape}; set "
                "model.image_size and model.in_channels, or data.image_size and data.channels"
            )
        raise ValueError(
            f"the model takes samples of shape {shape}, but those of {data.name} have {data.shape}; model=unet takes "
            "images (C, H, W), model=mlp points (features,)"
            + (f"; set model.features={data.shape[0]}" if len(shape) == len(data.shape) == 1 else "")
        )


def must_take(network: nn.Module, data: Dataset) -> None:
    """Raise ValueError if a network does not take the data's samples, or needs conditions that the data lack."""
    must_take_shape(network, data)
    counts = labels_of(network)
    if counts:
        setting = f"model.num_classes = {counts[0] if len(counts) == 1 else list(counts)}"
        if data.labels is None:
            raise ValueError(f"{setting}, but the data have no labels")
        if len(counts) != len(data.label_counts):
            needs = data.label_counts[0] if len(data.label_counts) == 1 else list(data.label_counts)
            raise ValueError(
                f"{setting}, but a sample of {data.name} has {len(data.label_counts)} of such labels; set "
                f"model.num_classes={str(needs).replace(' ', '')}"
            )
        for count, needed in zip(counts, data.label_counts, strict=True):
            if count < needed:
                raise ValueError(f"{setting}, but the data have {needed} classes")
    there = data.batch(data.train[:1]).condition
    if missing := [part for part in takes(network) if part not in there.parts]:
        raise ValueError(
            f"the model must be given {' and '.join(missing)}, which {data.name} does not have"
            + ("; set model.condition_channels=0, or data.condition" if "image" in missing else "")
        )
    taken = getattr(network, "condition_channels", None)
    if there.image is not None and taken not in (None, there.image.shape[1]):
        raise ValueError(
            f"model.condition_channels = {taken}, but the condition image of {data.name} has {there.image.shape[1]}; "
            f"set model.condition_channels={there.image.shape[1]}, or data.condition=null"
        )


def trial_loss(task: Task, data: Dataset, n: int, device: torch.device, phase: int = 0) -> Tensor:
    """Return the mean loss of n equal samples, as a step computes it: to measure memory, or to try a compiler.

    Args:
        task: on the device; on "meta", where nothing is computed, it draws on the CPU.
        phase: the index of the phase.
    """
    for module in task.modules.values():
        module.train()
    drawing = torch.device("cpu") if device.type == "meta" else device
    batch = data.batch(data.train[:1].expand(n), drawing)
    drawn = task.draw(batch, Keyed(0, device=drawing), 1.0).to(device)  # as in the end, where all parts are computed
    return task.total(task.phases[phase].losses(drawn, 1.0)).mean()
