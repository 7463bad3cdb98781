"""The protocol of a task: modules that are trained, what a step draws, and the losses of what was drawn."""

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
    """All that the losses of a step are computed from; a task adds its own tensors, each with one row a sample.

    Args:
        weight: what the loss of each row is multiplied by, (B,), where rows are not drawn evenly; None for 1.
    """

    weight: Tensor | None = None


class Phase(NamedTuple):
    """A part of a step with an optimizer of its own. Most tasks have one; adversarial ones have two, in turn."""

    name: str
    trains: tuple[str, ...]  # names of modules
    losses: Callable[[Drawn, float], Losses]
    optimizer: Optimizer | None = None  # None for that of the run


class Task(ABC):
    """An objective, with the networks that it trains.

    A trainer moves the modules to its device, draws, computes the losses of each phase, steps its optimizer and
    averages the weights of all modules; all else about training is the trainer's, and the same for every task.

    Args:
        modules: what is trained, by name; lower-case letters, digits and underscores. A checkpoint has files of each.
        frozen: what is used and not trained, by name; a checkpoint refers to it by checksum.
        weights: part of the loss -> its weight in the sum that is trained; 1 for those that are not named.
        only: patterns such as "model.middle_*", of MODULE.PARAMETER as in `fnmatch`: only parameters that match one of
            them are trained; None for all.
    Raises: ValueError for a pattern that no parameter matches, or a name that is none.
    """

    couples_batch = False
    """Whether the loss of a row depends on the others: then every process computes the whole batch, in one piece."""

    perceives = False
    """Whether its loss compares by `frozen["perceptual"]`, a `ddpm.latent.perceptual.Perceptual`, which is put there
    before it is trained."""

    draws_of_data = False
    """Whether samples are drawn of data, such as reconstructions."""

    instead = ""
    """What can be done with a run that draws no samples, in words."""

    replayable = False
    """Whether `losses` computes the same in each step, of what was drawn and of tensors that are changed in place: it
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
        """Known problems of the settings, which are done as asked for all the same: a line each."""
        return []

    # ------------------------------------------------------------------------------------------------ what a step needs

    @property
    def phases(self) -> tuple[Phase, ...]:
        """The parts of a step, in order."""
        return (Phase("all", tuple(self.modules), self.losses),)

    def averages(self, name: str) -> bool:
        """Whether the weights of a module are averaged; where not, their average is what they are."""
        return True

    @abstractmethod
    def draw(self, batch: Batch, random: Keyed, progress: float) -> Drawn:
        """All draws of a step's whole batch: its randomness but that of dropout.

        Args:
            batch: of the data, on the task's device.
            random: the generators of the step.
            progress: the share of the budget that is used, 0..1.
        """

    @abstractmethod
    def losses(self, drawn: Drawn, progress: float) -> Losses:
        """The parts of the loss, for rows of what was drawn: each (B,)."""

    def total(self, losses: Losses) -> Tensor:
        """The weighted sum of the parts, (B,)."""
        weighted = [
            part if self.weights.get(name, 1) == 1 else self.weights[name] * part for name, part in losses.items()
        ]
        return weighted[0] if len(weighted) == 1 else torch.stack(weighted).sum(0)

    def after_step(self, drawn: Drawn, losses: Losses) -> None:  # noqa: B027  # most tasks have nothing to note
        """Take note of a step: of the whole batch, and its losses of the first phase, from all processes.

        What changes here belongs into `state_dict`. It is called after steps that were skipped too, for their losses
        were not finite.
        """

    def facts(self, drawn: Drawn) -> dict[str, Tensor]:
        """Facts of each row for an autopsy of broken numbers besides its loss, such as t: each (B,)."""
        return {}

    # --------------------------------------------------------------------------------------------- what is looked at

    def draw_held_out(self, batch: Batch, random: Keyed) -> Drawn:
        """Draws for held-out data: the same each time, whatever the run's seed."""
        return self.draw(batch, random, 1.0)

    def held_out(self, drawn: Drawn) -> Losses:
        """The parts of the loss on held-out data: those of the first phase."""
        return self.phases[0].losses(drawn, 1.0)

    def source(
        self,
        data: Dataset | None,
        seed: int,
        device: torch.device,
        precision: str = "fp32",
        requested: Sequence[int] | None = None,
    ) -> Source | None:
        """The source of samples of the modules; None, or a `Silent` one, for a task that draws none.

        Args:
            data: of which samples are told, where the task tells them of anything; None where they are not at hand.
            seed, device, precision, requested: as in `ddpm.sources.base.Source`.
        """
        return None

    def codec(self) -> Any:
        """The codec that other runs draw through, see `ddpm.latent.codec.Codec`; None for a task that trains none."""
        return None

    def preview(self, n: int, data: Dataset, seed: int, precision: str) -> Tensor | None:
        """n samples as they are shown, (n, *), on the CPU, always from the same noise; None for a task that draws none.

        Args:
            data: as in `source`.
        """
        device = next(next(iter(self.modules.values())).parameters()).device
        source = self.source(data, seed, device, precision)
        return None if source is None or not source.draws else source.decoded_by(data.codec).draw(range(n))

    def draw_results(self, folder: Path, data: Dataset) -> None:  # noqa: B027
        """Draw into the run's folder, at its end, what the task itself has to show; here nothing."""

    # -------------------------------------------------------------------------------------------------- what is kept

    def state_dict(self) -> dict[str, Any]:
        """The state that a resumed run needs besides weights: tensors, numbers, and containers of them."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:  # noqa: B027
        """Go on from `state_dict`; an empty one leaves all as it is in the beginning."""

    def to(self, device: torch.device) -> Self:
        """Move the modules, and what else the task holds, to a device; returns self."""
        for module in (*self.modules.values(), *self.frozen.values()):
            module.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch leaves it untyped
        return self

    def using(self, modules: Mapping[str, nn.Module]) -> Self:
        """A copy of the task with other modules, such as averaged ones; all else is shared."""
        other = copy.copy(self)
        other.modules = dict(modules)
        return other

    # ---------------------------------------------------------------------------------------------- what it asks for

    def check(self, data: Dataset) -> None:  # noqa: B027
        """Raise ValueError where the task cannot be trained, or not on these data."""


def checksum(module: nn.Module) -> str:
    """Of a module's parameters and buffers, wherever they lie: sha256, 64 hexadecimal digits."""
    digest = hashlib.sha256()
    for name, x in sorted(module.state_dict().items()):
        digest.update(f"{name} {x.dtype} {tuple(x.shape)}\n".encode())
        digest.update(x.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def shape_of(network: object) -> tuple[int, ...] | None:
    """The shape of a sample that a network takes: its `shape`, or (in_channels, *image_size); None if it has none."""
    shape = getattr(network, "shape", None)
    if shape is None:
        shape = (getattr(network, "in_channels", None), *getattr(network, "image_size", (None,)))
    return None if None in shape else tuple(shape)


def must_take_shape(network: nn.Module, data: Dataset) -> None:
    """Raise ValueError for a network that does not take samples of the data, whatever it is told of them."""
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
    """Raise ValueError for a network that does not take samples of the data, or what it must be told of them."""
    must_take_shape(network, data)
    counts = labels_of(network)
    if counts:
        given = f"model.num_classes = {counts[0] if len(counts) == 1 else list(counts)}"
        if data.labels is None:
            raise ValueError(f"{given}, but the data have no labels")
        if len(counts) != len(data.label_counts):
            needs = data.label_counts[0] if len(data.label_counts) == 1 else list(data.label_counts)
            raise ValueError(
                f"{given}, but a sample of {data.name} has {len(data.label_counts)} of such labels; set "
                f"model.num_classes={str(needs).replace(' ', '')}"
            )
        for count, needed in zip(counts, data.label_counts, strict=True):
            if count < needed:
                raise ValueError(f"{given}, but the data have {needed} classes")
    there = data.batch(data.train[:1]).condition
    if missing := [part for part in takes(network) if part not in there.parts]:
        raise ValueError(
            f"the model must be told of {' and '.join(missing)}, of which {data.name} has nothing"
            + ("; set model.condition_channels=0, or data.condition" if "image" in missing else "")
        )
    taken = getattr(network, "condition_channels", None)
    if there.image is not None and taken not in (None, there.image.shape[1]):
        raise ValueError(
            f"model.condition_channels = {taken}, but the image that {data.name} tells of has {there.image.shape[1]}; "
            f"set model.condition_channels={there.image.shape[1]}, or data.condition=null"
        )


def trial_loss(task: Task, data: Dataset, n: int, device: torch.device, phase: int = 0) -> Tensor:
    """The mean loss of n samples, all the same, as a step computes it: to count its memory, or to try a compiler.

    Args:
        task: on the device; on "meta", where nothing is computed, it draws on the CPU.
        phase: which of the task's.
    """
    for module in task.modules.values():
        module.train()
    drawing = torch.device("cpu") if device.type == "meta" else device
    batch = data.batch(data.train[:1].expand(n), drawing)
    drawn = task.draw(batch, Keyed(0, device=drawing), 1.0).to(device)  # as in the end, where all parts are computed
    return task.total(task.phases[phase].losses(drawn, 1.0)).mean()
