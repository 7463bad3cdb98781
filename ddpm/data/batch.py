"""Batches and conditions: the data of a training step, and what a network is conditioned on."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Self

import torch
from torch import Tensor, nn

PARTS = ("classes", "tokens", "image")  # of a condition, in the order in which they are nulled


@dataclass(frozen=True)
class Rows:
    """A dataclass of tensors that share their first axis, one row per sample."""

    def rows(self, select: Callable[[Tensor], Tensor]) -> Self:
        """Return a copy with `select` applied to every tensor, to take other rows."""
        return replace(self, **{f.name: _rows(getattr(self, f.name), select) for f in fields(self)})

    def to(self, device: torch.device | str) -> Self:
        """Return a copy with every tensor moved to a device."""
        return self.rows(lambda x: on(device, x))

    def tensors(self) -> list[Tensor]:
        """Return all tensors, including those of nested fields."""
        found: list[Tensor] = []

        def note(x: Tensor) -> Tensor:
            found.append(x)
            return x

        self.rows(note)
        return found

    def holding(self, tensors: Iterable[Tensor]) -> Self:
        """Return a copy with other tensors in place of its own, in the order of `tensors()`."""
        left = iter(tensors)
        return self.rows(lambda _: next(left))


def on(device: torch.device | str, x: Tensor) -> Tensor:
    """Return x on a device; from the CPU to a GPU through pinned memory, so as not to wait for the last step."""
    if x.device.type == "cpu" and torch.device(device).type == "cuda":
        return x.pin_memory().to(device, non_blocking=True)
    return x.to(device)


def _rows(value: Any, select: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Rows):
        return value.rows(select)
    if isinstance(value, Mapping):
        return {key: _rows(inner, select) for key, inner in value.items()}
    return select(value) if isinstance(value, Tensor) else value


@dataclass(frozen=True)
class Condition(Rows):
    """What a network is conditioned on besides x_t and t. Each part is optional, and can be null row by row.

    Args:
        classes: integers (B,), or (B, K) for K labels at once.
        tokens: token ids (B, L), or embeddings (B, L, D).
        image: channels that are concatenated to x_t, (B, C', H, W).
        mask: of tokens, true for those to attend to, (B, L); None for all.
        null: part -> true where it is null, (B,), or (B, K) for K labels; a part that is not named is null nowhere.
        augment: parameters of the augmentation of x, (B, K), see `ddpm.data.non_leaking`; None is as zeros. It is
            no part: data need not have it, nothing nulls it, and sampling leaves it out.
    """

    classes: Tensor | None = None
    tokens: Tensor | None = None
    image: Tensor | None = None
    mask: Tensor | None = None
    null: Mapping[str, Tensor] = field(default_factory=dict)
    augment: Tensor | None = None

    @property
    def parts(self) -> tuple[str, ...]:
        """The names of the parts that are not None."""
        return tuple(name for name in PARTS if getattr(self, name) is not None)

    def nulled(self, where: Tensor | Mapping[str, Tensor] | None = None) -> "Condition":
        """Return a copy that is null in further rows, in addition to those that were null before.

        Args:
            where: true for the rows whose every part is nulled, (B,); or a part's name -> such rows, (B,), of K labels
                (B, K) too; None for all rows.
        """
        null = dict(self.null)
        for name in self.parts:
            part = getattr(self, name)
            rows = where.get(name) if isinstance(where, Mapping) else where
            if isinstance(where, Mapping) and rows is None:
                continue
            if rows is None:
                rows = torch.ones(len(part), dtype=torch.bool)
            both = [rows.to(part.device), *([null[name]] if name in null else [])]
            if name == "classes":
                both = [one[:, None].expand_as(part) if part.ndim > one.ndim else one for one in both]
            null[name] = both[0] if len(both) == 1 else both[0] | both[1]
        return replace(self, null=null)

    def __len__(self) -> int:
        """The number of rows; 0 without parts."""
        return len(getattr(self, self.parts[0])) if self.parts else 0

    def concat(self, other: "Condition") -> "Condition":
        """Return the rows of both conditions, which have the same parts; `augment` is dropped, as in sampling."""
        both = {name: torch.cat([getattr(self, name), getattr(other, name)]) for name in self.parts}
        if self.mask is not None and other.mask is not None:
            both["mask"] = torch.cat([self.mask, other.mask])
        null = {
            name: torch.cat([one._null_rows(name) for one in (self, other)]) for name in {**self.null, **other.null}
        }
        return Condition(**both, null=null)

    def _null_rows(self, name: str) -> Tensor:
        """Return where a part is null, (B,), or (B, K) of K labels."""
        part = getattr(self, name)
        null = self.null.get(name, torch.zeros(len(part), dtype=torch.bool, device=part.device))
        return null[:, None].expand_as(part) if name == "classes" and part.ndim > null.ndim else null

    def dropped(self, drop: float, generator: torch.Generator) -> "Condition":
        """Return a copy with each part of each row nulled with probability `drop`; draws are made for absent parts too.

        Of several labels further coins null single ones, each with probability `drop`, in the rows where not all are.
        With `drop` = 0 the condition is returned as it is, without an all-false `null`, which a network that has no
        learned null would refuse.
        """
        if not self.parts or not drop:
            return self
        coins = torch.rand(len(getattr(self, self.parts[0])), len(PARTS), generator=generator, device=generator.device)
        dropped = self.nulled({name: coins[:, PARTS.index(name)] < drop for name in self.parts})
        if self.classes is None or self.classes.ndim == 1:
            return dropped
        single = torch.rand(self.classes.shape, generator=generator, device=generator.device)
        return dropped.nulled({"classes": single < drop})

    def for_network(self, network: nn.Module) -> "Condition | Tensor | None":
        """Return the parts that a network takes, in the form in which it is called: `network(x_t, t, condition)`.

        None if it takes nothing; the classes alone, as a tensor, if they are all that it takes and none is null.
        `augment` is passed to networks with `augment_dim` > 0.
        """
        taken = {name: getattr(self, name) for name in takes(network) if getattr(self, name) is not None}
        null = {name: rows for name, rows in self.null.items() if name in taken}
        augment = self.augment if getattr(network, "augment_dim", 0) else None
        if taken.keys() == {"classes"} and not null and augment is None:
            return self.classes
        if not taken and augment is None:
            return None
        return Condition(**taken, null=null, mask=self.mask if "tokens" in taken else None, augment=augment)


def takes(network: object) -> tuple[str, ...]:
    """Return the parts of a condition that a network takes: its `takes`, or classes if it has `num_classes`."""
    declared: tuple[str, ...] | None = getattr(network, "takes", None)
    if declared is not None:
        return declared
    return () if classes_of(network) is None else ("classes",)


def classes_of(network: object) -> int | None:
    """Return the number of classes a network is conditioned on (of the first label); None for none."""
    return next(iter(labels_of(network)), None)


def labels_of(network: object) -> tuple[int, ...]:
    """Return the number of classes of each label a network is conditioned on; empty if it is unconditional."""
    classes: int | Sequence[int] | None = getattr(network, "num_classes", None)
    return () if classes is None else (classes,) if isinstance(classes, int) else tuple(classes)


@dataclass(frozen=True)
class Batch(Rows):
    """Samples of a data set with their conditions.

    Args:
        x: floats, as the network sees them, or integers for codes, (B, *).
        condition: empty where the data have nothing but x.
        of_prior: true for the prior-preservation images of a subject's class, (B,), see
            `ddpm.data.prior_preservation`; None for none.
    """

    x: Tensor
    condition: Condition = field(default_factory=Condition)
    of_prior: Tensor | None = None

    @property
    def y(self) -> Tensor | None:
        """The classes (B,) of labelled data; with several labels the first."""
        classes = self.condition.classes
        return classes if classes is None or classes.ndim == 1 else classes[:, 0]

    def __len__(self) -> int:
        return len(self.x)
