"""Samples of a trained network: batch by batch, and the way from noise to image."""

import copy
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from ddpm.data.batch import Condition, classes_of, labels_of, takes
from ddpm.data.conditions import shown
from ddpm.data.dataset import Dataset
from ddpm.diffusion import GaussianDiffusion
from ddpm.guidance import Guidance
from ddpm.randomness import SampleNoise
from ddpm.runs.precision import computing
from ddpm.samplers import DDIM, Callback, Sampler, interpolate
from ddpm.targets import Denoise, Prediction

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
        """What is to be said of it; empty if all is within."""
        concerns = []
        if self.not_finite:
            concerns.append(f"{self.not_finite} of {self.samples} samples hold numbers that are not finite")
        if self.outside:
            share = self.outside / self.values
            concerns.append(f"{share:.2%} of all values lie outside [-1, 1], up to {self.largest:.3g}; shown clipped")
        return "; ".join(concerns)


class TrainedSampler:
    """All that decides a sample but its number.

    Args:
        diffusion, model, sampler: what was trained, and how to draw from it; the model is put into evaluation mode.
        shape: of a sample, such as (C, H, W).
        seed: sample number i is a function of (seed, i) and its class, whatever is drawn beside it.
        device: where the model is.
        precision: in which it computes, one of `ddpm.runs.precision.PRECISIONS`.
        asked: the classes that are drawn, in turn: sample number i is of class asked[i modulo their number]. None for
            all K classes of a network that has any; empty for none of them, the network's learned null.
        styles: the same of the second label of a network that has several: one style is the same for a whole turn of
            the classes. Further labels follow likewise, each with all its values.
        guidance: how predictions are guided; None for not.
        data: of which a network that is told of an image takes it: sample number i is told of what held-out sample i
            (modulo their number) has as condition, its labels too; of those of the labels that are asked for.
    Raises:
        ValueError: labels that the network does not have, or no label where it was never trained without; guidance
            that it was not trained for; no data, or none of these labels, for a network that is told of an image.
    """

    def __init__(
        self,
        diffusion: GaussianDiffusion,
        model: nn.Module,
        sampler: Sampler,
        shape: tuple[int, ...],
        seed: int,
        device: torch.device,
        precision: str = "fp32",
        asked: Sequence[int] | None = None,
        guidance: Guidance | None = None,
        data: Dataset | None = None,
        styles: Sequence[int] | None = None,
    ):
        guidance = guidance or Guidance()
        counts = (classes_of(model) or guidance.num_classes, *labels_of(model)[1:2])
        for (one, several), given, count in zip(LABELS, (asked, styles), (*counts, None), strict=False):
            if given is not None and count is None:
                raise ValueError(f"{one} = {_listed(given)}: the network was trained without {several}")
            if given is not None and not all(0 <= y < (count or 0) for y in given):
                raise ValueError(f"{one} = {_listed(given)}: the network has the {several} 0..{(count or 0) - 1}")
        self.told = None if "image" not in takes(model) else _of_labels(data, asked, styles)
        self.precision, self.asked, self.styles, self.guidance = precision, asked, styles, guidance
        self._check(diffusion, model, guidance)
        self.diffusion, self.sampler = diffusion, sampler
        self.model: nn.Module = model.to(device, memory_format=torch.channels_last).eval()  # type: ignore[call-overload]
        self.shape, self.seed, self.device = shape, seed, device
        self.range = Range()

    def draw(self, numbers: range | list[int], callback: Callback | None = None) -> Tensor:
        """The samples of these numbers, (n, *shape), on the CPU."""
        noise = self.noise(numbers)
        x_T = noise.x_T(self.shape, self.device)
        denoise = self.denoiser(self.condition(numbers))
        with computing(self.device, self.precision):
            x_0 = self.sampler(self.diffusion.schedule, denoise, x_T, generator=noise, callback=callback).cpu()
        self.range.note(x_0)
        return x_0

    def noise(self, numbers: range | list[int]) -> SampleNoise:
        """All noise of the samples of these numbers."""
        return SampleNoise(self.seed, numbers)

    def predictor(self, condition: Condition) -> Denoise:
        """The network, told of a condition on its device: its raw prediction, guided."""
        return self.guidance(self.diffusion, self.model, condition)

    def denoiser(self, condition: Condition) -> Denoise:
        """The same as a sampler consumes it: clipped."""
        return self.diffusion.clipped(self.predictor(condition))

    def condition(self, numbers: range | list[int]) -> Condition:
        """What there is to tell the network of the samples of these numbers, on its device."""
        labels = self.labels(numbers)
        if self.told is not None:
            condition = self.told.batch(self.told.shown(numbers), self.device).condition
        elif not labels:
            return Condition()
        else:
            values = [torch.zeros(len(numbers), dtype=torch.long) if y is None else y for y in labels]
            classes = torch.stack(values, dim=1) if len(values) > 1 else values[0]
            condition = Condition(classes=classes.to(self.device))
        if all(y is not None for y in labels):
            return condition
        without = torch.tensor([y is None for y in labels]).expand(len(numbers), -1)
        return condition.nulled({"classes": without if len(labels) > 1 else without[:, 0]})

    def pictures_told(self, numbers: range | list[int]) -> Tensor | None:
        """What is to be seen of the images that the samples of these numbers are told of, (n, *shape), on the CPU."""
        image = self.condition(numbers).image if self.told is not None else None
        return None if image is None else shown(image, self.shape[0]).cpu()

    @property
    def num_classes(self) -> int | None:
        """The number of classes that may be asked for, of the network or of its guidance; None for none."""
        return classes_of(self.model) or self.guidance.num_classes

    def classes(self, numbers: range | list[int]) -> Tensor | None:
        """The classes (n,) of the samples of these numbers, on the CPU; None where there are none to tell."""
        return next(iter(self.labels(numbers)), None)

    def labels(self, numbers: range | list[int]) -> list[Tensor | None]:
        """Each label (n,) of the samples of these numbers, on the CPU, the class first; None for one that is null.

        Empty where neither the network nor its guidance knows of any.
        """
        turns = self.turns
        if turns and self.told is not None and self.told.labels is not None:
            rows, further = self.told.shown(numbers), self.told.further_labels
            every = [self.told.labels, *(() if further is None else further.unbind(1))][: len(turns)]
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
        given = [self.asked, self.styles, *[None] * len(counts)]
        return [range(count) if values is None else values for count, values in zip(counts, given, strict=False)]

    def using(self, sampler: Sampler) -> "TrainedSampler":
        """The same with another sampler."""
        other = copy.copy(self)
        other.sampler = sampler
        return other

    def guided_by(self, guidance: Guidance) -> "TrainedSampler":
        """The same with another guidance; ValueError for one that the network was not trained for."""
        self._check(self.diffusion, self.model, guidance)
        other = copy.copy(self)
        other.guidance = guidance
        return other

    def _check(self, diffusion: GaussianDiffusion, model: nn.Module, guidance: Guidance) -> None:
        """Raise ValueError for guidance that does not fit, or where what is asked for without a label cannot be."""
        guidance.check(diffusion, model)
        for label, ((one, _), given) in enumerate(zip(LABELS, (self.asked, self.styles), strict=True)):
            if given is None or given:
                continue
            try:
                guidance.check_null(label)
            except ValueError as error:
                raise ValueError(f"{one} = none: {error}") from error
            if not getattr(model, "drop", 0):
                raise ValueError(
                    f"{one} = none: the network was never trained without its labels; train one with task.drop=0.1"
                )

    def with_seed(self, seed: int) -> "TrainedSampler":
        """The same with another seed; what leaves [-1, 1] is counted anew."""
        other = copy.copy(self)
        other.seed, other.range = seed, Range()
        return other

    def batches(self, numbers: list[int], batch: int) -> Iterator[tuple[list[int], Tensor]]:
        """Numbers and samples, `batch` at a time."""
        for start in range(0, len(numbers), batch):
            part = numbers[start : start + batch]
            yield part, self.draw(part)

    def drawn(self, n: int, batch: int = 256) -> Tensor:
        """The first n samples, (n, *shape)."""
        return torch.cat([x for _, x in self.batches(list(range(n)), batch)])

    def between(self, x: Tensor, y: Tensor | Condition | None, k: int) -> Tensor:
        """k images on the way from one image to another: both encoded to their x_T, then interpolated and decoded.

        Nothing is clipped, so that the ends come out close to what went in. Where the network is told of anything, an
        image has the condition of the end that it is nearer to.

        Args:
            x: the two images, (2, C, H, W), in [-1, 1].
            y: their classes, (2,), for a network with classes; or their condition.
        Returns:
            (k, C, H, W), on the CPU.
        Raises:
            ValueError: a sampler without an inverse: anything but DDIM with eta = 0.
        """
        if not isinstance(self.sampler, DDIM):
            raise ValueError(f"{type(self.sampler).__name__} has no inverse; between takes sampler=ddim, sampler.eta=0")
        condition = (y if isinstance(y, Condition) else Condition(classes=y)).to(self.device)
        schedule, denoise = (
            self.diffusion.schedule,
            self.diffusion.predictor(self.model, condition.taken_by(self.model)),
        )
        with computing(self.device, self.precision):
            x_T = self.sampler.encode(schedule, denoise, x.to(self.device))
            ends = torch.linspace(0, 1, k, device=self.device).round().long()
            nearer = condition.rows(lambda part: part[ends]).taken_by(self.model)
            denoise = self.diffusion.predictor(self.model, nearer)
            return self.sampler(schedule, denoise, interpolate(x_T[0], x_T[1], k)).cpu()

    def way(self, n: int, pictures: int) -> list[tuple[int | float, Tensor]]:
        """(t, x_t) of the first n samples at evenly spaced moments from noise (t = T) to image (t = 0)."""
        moments = len(self.sampler.times(self.diffusion.schedule))
        chosen = set(torch.linspace(0, moments - 1, min(pictures, moments)).round().long().tolist())
        seen: list[tuple[int | float, Tensor]] = []

        def note(i: int, t: int | float, s: int | float, x_t: Tensor, pred: Prediction) -> None:
            if i in chosen:
                seen.append((t, x_t.cpu()))

        x_0 = self.draw(range(n), note)
        return [*seen, (0, x_0)] if moments - 1 in chosen else seen


def _of_labels(data: Dataset | None, asked: Sequence[int] | None, styles: Sequence[int] | None) -> Dataset:
    """The data of which a network is told, of the labels that are asked for."""
    if data is None:
        raise ValueError("the network is told of an image beside x_t, and there are no data to take it from")
    told = data.of_labels(asked, styles)
    told.shown([0])  # of which there must be some
    return told


def _listed(values: Sequence[int]) -> str:
    return (str(values[0]) if len(values) == 1 else str(list(values))) if values else "none"
