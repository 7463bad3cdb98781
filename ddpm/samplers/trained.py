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
from ddpm.targets import Denoise


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
            all K classes of a network that has any. Of several labels the next one is the same for a whole turn.
        guidance: how predictions are guided; None for not.
        data: of which a network that is told of an image takes it: sample number i is told of what held-out sample i
            (modulo their number) has as condition, its class too; of those of the classes that are asked for.
    Raises:
        ValueError: classes that the network does not have, guidance that it was not trained for; no data, or none of
            these classes, for a network that is told of an image.
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
    ):
        guidance = guidance or Guidance()
        classes = classes_of(model) or guidance.num_classes
        if asked is not None and classes is None:
            raise ValueError(f"class = {_listed(asked)}: the network was trained without classes")
        if asked is not None and not (asked and all(0 <= y < (classes or 0) for y in asked)):
            raise ValueError(f"class = {_listed(asked)}: the network has the classes 0..{(classes or 0) - 1}")
        self.told = None if "image" not in takes(model) else _of_classes(data, asked)
        self.precision, self.asked, self.guidance = precision, asked, guidance
        self.guidance.check(diffusion, model)
        self.diffusion, self.sampler = diffusion, sampler
        self.model: nn.Module = model.to(device, memory_format=torch.channels_last).eval()  # type: ignore[call-overload]
        self.shape, self.seed, self.device = shape, seed, device
        self.range = Range()

    def draw(self, numbers: range | list[int], callback: Callback | None = None) -> Tensor:
        """The samples of these numbers, (n, *shape), on the CPU."""
        noise = SampleNoise(self.seed, numbers)
        x_T = noise.x_T(self.shape, self.device)
        denoise = self.denoiser(self.condition(numbers))
        with computing(self.device, self.precision):
            x_0 = self.sampler(self.diffusion.schedule, denoise, x_T, generator=noise, callback=callback).cpu()
        self.range.note(x_0)
        return x_0

    def predictor(self, condition: Condition) -> Denoise:
        """The network, told of a condition on its device: its raw prediction, guided."""
        return self.guidance(self.diffusion, self.model, condition)

    def denoiser(self, condition: Condition) -> Denoise:
        """The same as a sampler consumes it: clipped."""
        return self.diffusion.clipped(self.predictor(condition))

    def condition(self, numbers: range | list[int]) -> Condition:
        """What there is to tell the network of the samples of these numbers, on its device."""
        if self.told is not None:
            return self.told.batch(self.told.shown(numbers), self.device).condition
        y = self.classes(numbers)
        if y is None:
            return Condition()
        labels, others = [y], labels_of(self.model)[1:]
        turn = torch.tensor(list(numbers)) // len(self.asked or range(self.num_classes or 1))
        for count in others:
            labels.append(turn % count)
            turn = turn // count
        return Condition(classes=(torch.stack(labels, dim=1) if others else y).to(self.device))

    def pictures_told(self, numbers: range | list[int]) -> Tensor | None:
        """What is to be seen of the images that the samples of these numbers are told of, (n, *shape), on the CPU."""
        image = self.condition(numbers).image if self.told is not None else None
        return None if image is None else shown(image, self.shape[0]).cpu()

    @property
    def num_classes(self) -> int | None:
        """The number of classes that may be asked for, of the network or of its guidance; None for none."""
        return classes_of(self.model) or self.guidance.num_classes

    def classes(self, numbers: range | list[int]) -> Tensor | None:
        """The classes (n,) of the samples of these numbers, on the CPU; None where network and guidance have none."""
        if self.num_classes is None:
            return None
        if self.told is not None and self.told.labels is not None:
            return self.told.labels.cpu()[self.told.shown(numbers)]
        asked = torch.arange(self.num_classes) if self.asked is None else torch.tensor(self.asked)
        return asked[torch.tensor(list(numbers)) % len(asked)]

    def using(self, sampler: Sampler) -> "TrainedSampler":
        """The same with another sampler."""
        other = copy.copy(self)
        other.sampler = sampler
        return other

    def guided_by(self, guidance: Guidance) -> "TrainedSampler":
        """The same with another guidance; ValueError for one that the network was not trained for."""
        guidance.check(self.diffusion, self.model)
        other = copy.copy(self)
        other.guidance = guidance
        return other

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
        seen: list[tuple[int | float, Tensor]] = []
        x_0 = self.draw(range(n), lambda i, t, s, x_t, pred: seen.append((t, x_t.cpu())))
        seen.append((0, x_0))
        chosen = torch.linspace(0, len(seen) - 1, min(pictures, len(seen))).round().long().tolist()
        return [seen[i] for i in chosen]


def _of_classes(data: Dataset | None, asked: Sequence[int] | None) -> Dataset:
    """The data of which a network is told, with their classes that are asked for."""
    if data is None:
        raise ValueError("the network is told of an image beside x_t, and there are no data to take it from")
    told = data if asked is None else data.of_classes(asked)
    told.shown([0])  # of which there must be some
    return told


def _listed(classes: Sequence[int]) -> str:
    return str(classes[0]) if len(classes) == 1 else str(list(classes))
