"""Sources of samples: something trained, with all that decides a sample but its number."""

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from ddpm.data.batch import classes_of, labels_of
from ddpm.samplers import Callback

LABELS = (("class", "classes"), ("style", "styles"))  # that are asked for: what one is called, and several


class Range:
    """How far images leave [-1, 1], which a picture does not show: there they are clipped."""

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
        """A remark on how far samples leave the range; empty if all is within."""
        concerns = []
        if self.not_finite:
            concerns.append(f"{self.not_finite} of {self.samples} samples hold numbers that are not finite")
        if self.outside:
            share = self.outside / self.values
            concerns.append(f"{share:.2%} of all values lie outside [-1, 1], up to {self.largest:.3g}; shown clipped")
        return "; ".join(concerns)


class Source(ABC):
    """Where samples are drawn from: sample number i is a function of the seed, of i and of its class, and of no other.

    Args:
        model: what was trained; it is put into evaluation mode. Its labels are those that may be asked for.
        shape: of a sample, such as (C, H, W).
        seed: of all samples.
        device: where the model is.
        precision: in which it computes, one of `ddpm.runs.precision.PRECISIONS`.
        requested: the classes that are drawn in turn: sample number i is of class requested[i modulo their number].
            None for all K classes of a network that has any; empty for none of them, the network's learned null.
        styles: the same of the second label of a network that has several: one style is the same for a whole turn of
            the classes. Further labels follow likewise, each with all its values.
    Attributes:
        range: how far what was drawn leaves [-1, 1].
    Raises:
        ValueError: labels that the network does not have.
    """

    diffusion: Any = None
    """The mathematics by which a sampler draws; None for what draws otherwise."""
    sampler: Any = None
    """What walks from noise to a sample; None for what does not walk."""
    guidance: Any = ""
    """How predictions are guided: false, in words, for not."""
    measures: tuple[str, ...] = ()
    """What is measured of it besides its samples, if there is no sampler; of what is not `like_data`, all that is."""
    draws = True
    """Whether there are samples."""
    like_data: bool = True
    """Whether there are samples of the kind of the data, with which they can be compared."""
    condition_data: Any = None
    """The data of whose images the network is told; None for a network that is told of none."""
    codec: Any = None
    """What turns what is drawn into what is shown, see `ddpm.latent.codec.Codec`; None where that is the same."""

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
        for (one, several), given, count in zip(LABELS, (requested, styles), (*counts, None), strict=False):
            if given is not None and count is None:
                raise ValueError(f"{one} = {_listed(given)}: the network was trained without {several}")
            if given is not None and not all(0 <= y < (count or 0) for y in given):
                raise ValueError(f"{one} = {_listed(given)}: the network has the {several} 0..{(count or 0) - 1}")
        self.shape, self.seed, self.device, self.precision = shape, seed, device, precision
        self.requested, self.styles = requested, styles
        self.range = Range()

    @abstractmethod
    def draw(self, numbers: range | list[int], callback: Callback | None = None) -> Tensor:
        """The samples of these numbers, (n, *shape), on the CPU.

        Args:
            callback: of a source that walks, as samplers call it.
        """

    def decode(self, x: Tensor) -> Tensor:
        """Samples x (n, *shape) as they are shown, on the CPU: x itself, or decoded by the codec."""
        return x.cpu() if self.codec is None else self.codec.decode(x.to(self.device)).cpu()

    @property
    def decoded_shape(self) -> tuple[int, ...]:
        """Of one sample, as it is shown."""
        return self.shape if self.codec is None else tuple(self.codec.of)

    def encode(self, x: Tensor) -> Tensor:
        """Pictures x (n, *decoded_shape) as they are drawn: x itself, or its latents; on the device."""
        x = x.to(self.device)
        return x if self.codec is None else self.codec.sample(self.codec.posterior(x))

    def decoded_by(self, codec: Any) -> Self:
        """A copy whose samples a codec decodes; None for none."""
        other = copy.copy(self)
        other.codec = codec
        if codec is not None:
            codec.model.to(self.device)
        return other

    def condition_images(self, numbers: range | list[int]) -> Tensor | None:
        """Pictures (n, *shape) of the images that these samples are told of; None for no such."""
        return None

    @property
    def num_classes(self) -> int | None:
        """The number of classes that may be asked for; None for none."""
        return classes_of(self.model)

    @property
    @abstractmethod
    def evaluations(self) -> int:
        """How often the network is evaluated for a sample."""

    @property
    @abstractmethod
    def walk(self) -> str:
        """How samples are drawn, in words."""

    def classes(self, numbers: range | list[int]) -> Tensor | None:
        """The classes (n,) of the samples of these numbers, on the CPU; None where there are none to tell."""
        return next(iter(self.labels(numbers)), None)

    def labels(self, numbers: range | list[int]) -> list[Tensor | None]:
        """Each label (n,) of the samples of these numbers, on the CPU, the class first; None for one that is null.

        Empty where neither the network nor its guidance knows of any.
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
        """The values that each label has in turn, the class first, and fastest; empty for one that is null."""
        counts = labels_of(self.model) or ((self.num_classes,) if self.num_classes else ())
        given = [self.requested, self.styles, *[None] * len(counts)]
        return [range(count) if values is None else values for count, values in zip(counts, given, strict=False)]

    def with_seed(self, seed: int) -> Self:
        """A copy with another seed, which counts anew what leaves [-1, 1]."""
        other = copy.copy(self)
        other.seed, other.range = seed, Range()
        return other

    def batches(self, numbers: list[int], batch: int) -> Iterator[tuple[list[int], Tensor]]:
        """Numbers and samples, `batch` at a time."""
        for start in range(0, len(numbers), batch):
            part = numbers[start : start + batch]
            yield part, self.draw(part)

    def samples(self, n: int, batch: int = 256) -> Tensor:
        """The first n samples, (n, *shape)."""
        return torch.cat([x for _, x in self.batches(list(range(n)), batch)])


class Silent(Source):
    """Something trained that draws nothing, and is only measured.

    Args:
        model, shape, seed, device, precision, requested: as in `Source`.
        measures: by what.
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
        """Raise ValueError: there is nothing to draw."""
        raise ValueError(f"{type(self.model).__name__} draws no samples; measured is {', '.join(self.measures)}")


def _listed(values: Sequence[int]) -> str:
    return (str(values[0]) if len(values) == 1 else str(list(values))) if values else "none"
