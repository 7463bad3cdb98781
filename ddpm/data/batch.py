"""What a step is computed from: data, and what a network may be told beside x_t and t."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Self

import torch
from torch import Tensor, nn

PARTS = ("classes", "tokens", "image")  # of a condition, in the order in which they are nulled


@dataclass(frozen=True)
class Rows:
    """Tensors that have their first axis in common: one row a sample."""

    def rows(self, select: Callable[[Tensor], Tensor]) -> Self:
        """The same with other rows: `select` takes some of each tensor."""
        return replace(self, **{f.name: _rows(getattr(self, f.name), select) for f in fields(self)})

    def to(self, device: torch.device | str) -> Self:
        """The same on a device."""
        return self.rows(lambda x: on(device, x))

    def tensors(self) -> list[Tensor]:
        """Its tensors, those of what it holds among them."""
        found: list[Tensor] = []

        def note(x: Tensor) -> Tensor:
            found.append(x)
            return x

        self.rows(note)
        return found

    def holding(self, tensors: Iterable[Tensor]) -> Self:
        """The same with other tensors, in the order of `tensors()`."""
        left = iter(tensors)
        return self.rows(lambda _: next(left))


def on(device: torch.device | str, x: Tensor) -> Tensor:
    """x on a device; from the CPU to a GPU through pinned memory, so that nothing waits for the step before to end."""
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
    """What a network may be told beside x_t and t. Each part is there or not, and can be null row by row.

    Args:
        classes: integers (B,), or (B, K) for K labels at once.
        tokens: ids (B, L), or embeddings (B, L, D).
        image: channels that are concatenated to x_t, (B, C', H, W).
        mask: of tokens, true where one counts, (B, L); None where all do.
        null: part -> true where it is null, (B,), or (B, K) for K labels; a part that is not named is null nowhere.
        augment: what was done to x, (B, K), see `ddpm.data.non_leaking`; None for nothing, which is as zeros. It is no
            part: data need not have it, nothing nulls it, and whoever draws samples leaves it out.
    """

    classes: Tensor | None = None
    tokens: Tensor | None = None
    image: Tensor | None = None
    mask: Tensor | None = None
    null: Mapping[str, Tensor] = field(default_factory=dict)
    augment: Tensor | None = None

    @property
    def parts(self) -> tuple[str, ...]:
        """The names of the parts that are there."""
        return tuple(name for name in PARTS if getattr(self, name) is not None)

    def nulled(self, where: Tensor | Mapping[str, Tensor] | None = None) -> "Condition":
        """The same, null where it was and in further rows.

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
        """The rows of two conditions with the same parts, these first; of samples, whose images nothing was done to."""
        both = {name: torch.cat([getattr(self, name), getattr(other, name)]) for name in self.parts}
        if self.mask is not None and other.mask is not None:
            both["mask"] = torch.cat([self.mask, other.mask])
        null = {
            name: torch.cat([one._null_rows(name) for one in (self, other)]) for name in {**self.null, **other.null}
        }
        return Condition(**both, null=null)

    def _null_rows(self, name: str) -> Tensor:
        """Where a part is null, (B,), or (B, K) of K labels."""
        part = getattr(self, name)
        null = self.null.get(name, torch.zeros(len(part), dtype=torch.bool, device=part.device))
        return null[:, None].expand_as(part) if name == "classes" and part.ndim > null.ndim else null

    def dropped(self, drop: float, generator: torch.Generator) -> "Condition":
        """Each part of each row nulled with probability `drop`; all parts have their draws, whether they are there.

        Of several labels further coins null single ones, each with probability `drop`, in the rows where not all are.
        With `drop` = 0 the condition stays as it is, without rows that are null nowhere: a network that has no learned
        null refuses them, since it looks at no value.
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
        """What of it a network takes, as the network is called with it: `network(x_t, t, condition)`.

        None if it takes nothing; the classes alone, as a tensor, if they are all that it takes and none is null. What
        was done to x is told to those with `augment_dim` > 0.
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
    """The parts of a condition that a network takes: what it says in `takes`, or classes if it has `num_classes`."""
    by_itself: tuple[str, ...] | None = getattr(network, "takes", None)
    if by_itself is not None:
        return by_itself
    return () if classes_of(network) is None else ("classes",)


def classes_of(network: object) -> int | None:
    """The number of classes that a network is told of, of several labels those of the first; None if of none."""
    return next(iter(labels_of(network)), None)


def labels_of(network: object) -> tuple[int, ...]:
    """The number of classes of each label that a network is told of; empty if it is told of none."""
    classes: int | Sequence[int] | None = getattr(network, "num_classes", None)
    return () if classes is None else (classes,) if isinstance(classes, int) else tuple(classes)


@dataclass(frozen=True)
class Batch(Rows):
    """Samples of a data set, and what belongs to them.

    Args:
        x: floats, as the network sees them, or integers for codes, (B, *).
        condition: empty where the data know nothing else of a sample.
        of_prior: true for those that stand beside what is to be learned, so that no other is forgotten, (B,), see
            `ddpm.data.prior_preservation`; None for none.
    """

    x: Tensor
    condition: Condition = field(default_factory=Condition)
    of_prior: Tensor | None = None

    @property
    def y(self) -> Tensor | None:
        """The classes (B,), where the data have labels; of several the first."""
        classes = self.condition.classes
        return classes if classes is None or classes.ndim == 1 else classes[:, 0]

    def __len__(self) -> int:
        return len(self.x)
