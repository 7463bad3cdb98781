"""Sources of samples: a trained network with everything that determines a sample but its number."""

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from ddpm.data.batch import classes_of, labels_of
from ddpm.samplers import Callback

LABELS = (("class", "classes"), ("style", "styles"))  # that can be requested: singular and plural


class Range:
    """Counter of values outside [-1, 1], which pictures clip."""

    def __init__(self) -> None:
        self.samples = self.values = self.outside = self.not_finite = 0
        self.largest = 1.0

    def note(self, x: Tensor) -> None:
        """Count samples (n, *); those that are no images (n, C, H, W) have no range to leave."""
        finite = x.flatten(1).isfinite().all(1)
        self.samples, self.not_finite = self.samples + len(x), self.not_finite + int((~finite).sum())
        if x.ndim != 4:
            return
        size = x[finite].abs()
        self.values, self.outside = self.values + size.numel(), self.outside + int((size > 1 + 1e-6).sum())
        self.largest = max(self.largest, size.max().item() if size.numel() else 1.0)

    def __str__(self) -> str:
        """Return a remark on how far samples leave the range; empty if all is within."""
        concerns = []
        if self.not_finite:
            concerns.append(f"{self.not_finite} of {self.samples} samples hold numbers that are not finite")
        if self.outside:
            share = self.outside / self.values
            concerns.append(f"{share:.2%} of all values lie outside [-1, 1], up to {self.largest:.3g}; shown clipped")
        return "; ".join(concerns)


class Source(ABC):
    """A source of samples: sample number i is a function of the seed, of i and of its class, and of nothing else.

    Args:
        model: the trained network; it is put into evaluation mode. Its labels are those that can be requested.
        shape: of a sample, such as (C, H, W).
        seed: of all samples.
        device: the model's device.
        precision: in which it computes, one of `ddpm.runs.precision.PRECISIONS`.
        requested: the classes that are drawn in turn: sample number i is of class requested[i modulo their number].
            None for all K classes of a network that has any; empty for none of them, the network's learned null.
        styles: the same of the second label of a network that has several: one style is the same for a whole turn of
            the classes. Further labels follow likewise, each with all its values.
    Attributes:
        range: counts how far the samples leave [-1, 1].
    Raises:
        ValueError: labels that the network does not have.
    """

    diffusion: Any = None
    """The `GaussianDiffusion` by which a sampler draws; None without a sampler."""
    sampler: Any = None
    """The sampler from noise to data; None for a source without one."""
    guidance: Any = ""
    """The guidance of predictions: false, and an empty string in words, for none."""
    measures: tuple[str, ...] = ()
    """Measures of the network itself, if there is no sampler; the only ones of a source that is not `like_data`."""
    draws = True
    """Whether there are samples."""
    like_data: bool = True
    """Whether samples are of the kind of the data, with which they can be compared."""
    condition_data: Any = None
    """The data whose conditions the network takes; None for a network that needs none."""
    codec: Any = None
    """The codec that decodes samples, see `ddpm.latent.codec.Codec`; None if they need no decoding."""

    def __init__(
        self,
        model: nn.Module,
        shape: tuple[int, ...],
        seed: int,
        device: torch.device,
        precision: str = "fp32",
        requested: Sequence[int] | None = None,
        styles: Sequence[int] | None = None,
    ):
        self.model: nn.Module = model.to(device, memory_format=torch.channels_last).eval()  # type: ignore[call-overload]
        counts = (self.num_classes, *labels_of(model)[1:2])
        for (one, several), chosen, count in zip(LABELS, (requested, styles), (*counts, None), strict=False):
            if chosen is not None and count is None:
                raise ValueError(f"{one} = {_listed(chosen)}: the network was trained without {several}")
            if chosen is not None and not all(0 <= y < (count or 0) for y in chosen):
                raise ValueError(f"{one} = {_listed(chosen)}: the network has the {several} 0..{(count or 0) - 1}")
        self.shape, self.seed, self.device, self.precision = shape, seed, device, precision
        self.requested, self.styles = requested, styles
        self.range = Range()

    @abstractmethod
    def draw(self, numbers: range | list[int], callback: Callback | None = None) -> Tensor:
        """Return the samples of these numbers, (n, *shape), on the CPU.

        Args:
            callback: of a source with a sampler, as samplers call it.
        """

    def decode(self, x: Tensor) -> Tensor:
        """Return samples x (n, *shape) for display, on the CPU: x itself, or decoded by the codec."""
        return x.cpu() if self.codec is None else self.codec.decode(x.to(self.device)).cpu()

    @property
    def decoded_shape(self) -> tuple[int, ...]:
        """The shape of one decoded sample."""
        return self.shape if self.codec is None else tuple(self.codec.of)

    def encode(self, x: Tensor) -> Tensor:
        """Return pictures x (n, *decoded_shape) as the network sees them: x itself, or its latents; on the device."""
        x = x.to(self.device)
        return x if self.codec is None else self.codec.sample(self.codec.posterior(x))

    def decoded_by(self, codec: Any) -> Self:
        """Return a copy whose samples a codec decodes; None for none."""
        other = copy.copy(self)
        other.codec = codec
        if codec is not None:
            codec.model.to(self.device)
        return other

    def condition_images(self, numbers: range | list[int]) -> Tensor | None:
        """Return pictures (n, *shape) of the conditioning images of these samples; None if there are none."""
        return None

    @property
    def num_classes(self) -> int | None:
        """The number of classes that can be requested; None for none."""
        return classes_of(self.model)

    @property
    @abstractmethod
    def evaluations(self) -> int:
        """The number of network evaluations per sample."""

    @property
    @abstractmethod
    def walk(self) -> str:
        """The method of drawing samples, in words."""

    def classes(self, numbers: range | list[int]) -> Tensor | None:
        """Return the classes (n,) of the samples of these numbers, on the CPU; None where there are none."""
        return next(iter(self.labels(numbers)), None)

    def labels(self, numbers: range | list[int]) -> list[Tensor | None]:
        """Return each label (n,) of the samples of these numbers, on the CPU, the class first; None if null.

        Empty where neither the network nor its guidance has labels.
        """
        turns = self.turns
        if turns and self.condition_data is not None and self.condition_data.labels is not None:
            rows, further = self.condition_data.condition_rows(numbers), self.condition_data.further_labels
            every = [self.condition_data.labels, *(() if further is None else further.unbind(1))][: len(turns)]
            return [y.cpu()[rows] if values else None for y, values in zip(every, turns, strict=True)]
        labels: list[Tensor | None] = []
        turn = torch.tensor(list(numbers))
        for values in turns:
            labels.append(torch.tensor(values)[turn % len(values)] if values else None)
            turn = turn // max(1, len(values))
        return labels

    @property
    def turns(self) -> list[Sequence[int]]:
        """The values that each label cycles through, the class first, and fastest; empty for one that is null."""
        counts = labels_of(self.model) or ((self.num_classes,) if self.num_classes else ())
        chosen = [self.requested, self.styles, *[None] * len(counts)]
        return [range(count) if values is None else values for count, values in zip(counts, chosen, strict=False)]

    def with_seed(self, seed: int) -> Self:
        """Return a copy with another seed, and a new count of values outside [-1, 1]."""
        other = copy.copy(self)
        other.seed, other.range = seed, Range()
        return other

    def batches(self, numbers: list[int], batch: int) -> Iterator[tuple[list[int], Tensor]]:
        """Yield numbers and samples, `batch` at a time."""
        for start in range(0, len(numbers), batch):
            part = numbers[start : start + batch]
            yield part, self.draw(part)

    def samples(self, n: int, batch: int = 256) -> Tensor:
        """Return the first n samples, (n, *shape)."""
        return torch.cat([x for _, x in self.batches(list(range(n)), batch)])


class Silent(Source):
    """The source of a network that draws no samples, and is only measured.

    Args:
        model, shape, seed, device, precision, requested: as in `Source`.
        measures: the names of its measures.
    """

    draws = like_data = False
    evaluations = 0
    walk = "nothing is drawn"

    def __init__(
        self,
        model: nn.Module,
        shape: tuple[int, ...],
        seed: int,
        device: torch.device,
        precision: str = "fp32",
        requested: Sequence[int] | None = None,
        *,
        measures: tuple[str, ...],
    ):
        super().__init__(model, shape, seed, device, precision, requested)
        self.measures = measures

    def draw(self, numbers: range | list[int], callback: Callback | None = None) -> Tensor:
        """Raise ValueError, as there are no samples."""
        raise ValueError(f"{type(self.model).__name__} draws no samples; it is measured by {', '.join(self.measures)}")


def _listed(values: Sequence[int]) -> str:
    return (str(values[0]) if len(values) == 1 else str(list(values))) if values else "none"
