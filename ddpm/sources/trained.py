"""Samples of a trained network, by a sampler, and the trajectory from noise to image."""

import contextlib
import copy
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from ddpm.data.batch import Condition, classes_of, takes
from ddpm.data.conditions import with_channels
from ddpm.data.dataset import Dataset
from ddpm.diffusion import GaussianDiffusion
from ddpm.guidance import Guidance
from ddpm.randomness import SampleNoise
from ddpm.runs.precision import computing
from ddpm.samplers import DDIM, Callback, Sampler, interpolate
from ddpm.sources.base import LABELS, Source
from ddpm.targets import Denoise, Prediction


class TrainedSampler(Source):
    """The source of samples of a trained network by a sampler.

    Args:
        diffusion, sampler: the mathematics that the model was trained with, and the sampler.
        model, shape, seed, device, precision, requested, styles: as in `Source`.
        guidance: the guidance of predictions; None for none.
        data: provides the conditions of a network with conditioning images: sample number i takes condition and
            labels of held-out sample i (modulo their number) among those with the requested labels; likewise for a
            network conditioned on text, unless there are prompts.
        prompts: ids (P, L) of the prompts, used in turn, of a network conditioned on text; None for captions of the
            data.
        negative: ids (1, L) of the negative prompt, which classifier-free guidance leads away from; None for none.
    Raises:
        ValueError: labels that the network does not have, or no label where it was never trained without; guidance
            that it was not trained for; no data, or none of these labels, for a network with conditioning images.
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
        requested: Sequence[int] | None = None,
        guidance: Guidance | None = None,
        data: Dataset | None = None,
        styles: Sequence[int] | None = None,
        prompts: Tensor | None = None,
        negative: Tensor | None = None,
    ):
        self.guidance = guidance or Guidance()
        super().__init__(model, shape, seed, device, precision, requested, styles)
        of_data = "image" in takes(model) or ("tokens" in takes(model) and prompts is None)
        self.condition_data = _of_labels(data, requested, styles) if of_data else None
        self.prompts, self.negative = prompts, negative
        self._check(diffusion, model, self.guidance)
        self.diffusion, self.sampler = diffusion, sampler

    @property
    def num_classes(self) -> int | None:
        """The number of classes that can be requested, of the network or of its guidance; None for none."""
        return classes_of(self.model) or self.guidance.num_classes

    @property
    def evaluations(self) -> int:
        """The number of network evaluations per sample."""
        return self.sampler.evaluations(self.diffusion.schedule)

    @property
    def walk(self) -> str:
        """The sampler and its steps, in words."""
        return f"{type(self.sampler).__name__} with {len(self.sampler.times(self.diffusion.schedule)) - 1} steps"

    def draw(self, numbers: range | list[int], callback: Callback | None = None) -> Tensor:
        """Return the samples of these numbers, decoded, (n, *), on the CPU."""
        noise = self.noise(numbers)
        x_T = noise.x_T(self.shape, self.device)
        denoise = self.denoiser(self.condition(numbers))
        with self.computing():
            x_0 = self.sampler(self.diffusion.schedule, denoise, x_T, generator=noise, callback=callback)
        x = self.decode(x_0)
        self.range.note(x)
        return x

    @contextlib.contextmanager
    def computing(self) -> Iterator[None]:
        """The context for all steps of a sampler: its precision, and frozen weights."""
        frozen = getattr(self.model, "frozen", contextlib.nullcontext)  # a network that can use this has a context
        with computing(self.device, self.precision), frozen():
            yield

    def noise(self, numbers: range | list[int]) -> SampleNoise:
        """Return all noise of the samples of these numbers."""
        return SampleNoise(self.seed, numbers)

    def predictor(self, condition: Condition) -> Denoise:
        """Return the network's raw prediction for a condition on its device, guided."""
        return self.guidance(self.diffusion, self.model, condition, self._against(condition))

    def _against(self, condition: Condition) -> Condition | None:
        """Return the condition that guidance leads away from: one with the negative prompt; None for the null one."""
        if self.negative is None:
            return None
        tokens = self.negative.to(self.device).expand(len(condition), -1)
        rest = condition.nulled({name: torch.ones(len(condition), dtype=torch.bool) for name in condition.parts})
        null = {name: rows for name, rows in rest.null.items() if name != "tokens"}
        return replace(rest, tokens=tokens, null=null)

    def denoiser(self, condition: Condition) -> Denoise:
        """Return the guided prediction, clipped, as a sampler takes it."""
        return self.diffusion.clipped(self.predictor(condition))

    def condition(self, numbers: range | list[int]) -> Condition:
        """Return the condition of the samples of these numbers, on the network's device."""
        labels = self.labels(numbers)
        if self.condition_data is not None:
            condition = self.condition_data.batch(self.condition_data.condition_rows(numbers), self.device).condition
        elif not labels:
            condition = Condition()
        else:
            values = [torch.zeros(len(numbers), dtype=torch.long) if y is None else y for y in labels]
            classes = torch.stack(values, dim=1) if len(values) > 1 else values[0]
            condition = Condition(classes=classes.to(self.device))
        if self.prompts is not None:
            turn = torch.tensor(list(numbers)) % len(self.prompts)
            condition = replace(condition, tokens=self.prompts[turn].to(self.device))
        if all(y is not None for y in labels):
            return condition
        without = torch.tensor([y is None for y in labels]).expand(len(numbers), -1)
        return condition.nulled({"classes": without if len(labels) > 1 else without[:, 0]})

    def condition_images(self, numbers: range | list[int]) -> Tensor | None:
        """Return pictures (n, *shape) of these samples' conditioning images, on the CPU; None if there are none."""
        image = self.condition(numbers).image if "image" in takes(self.model) else None
        return None if image is None else with_channels(image, self.shape[0]).cpu()

    def using(self, sampler: Sampler) -> "TrainedSampler":
        """Return a copy with another sampler."""
        other = copy.copy(self)
        other.sampler = sampler
        return other

    def guided_by(self, guidance: Guidance) -> "TrainedSampler":
        """Return a copy with another guidance; ValueError for one that the network was not trained for."""
        self._check(self.diffusion, self.model, guidance)
        other = copy.copy(self)
        other.guidance = guidance
        return other

    def conditioned_on(self, numbers: Tensor) -> "TrainedSampler":
        """Return a copy that takes its conditions from samples (M,) of its data: number i from numbers[i modulo M]."""
        if self.condition_data is None or not len(numbers):
            raise ValueError("the network is not conditioned on the data, or there are no samples to condition it on")
        other = copy.copy(self)
        other.condition_data = copy.copy(self.condition_data)
        other.condition_data.held_out = numbers.to(self.condition_data.held_out.device)
        return other

    def of_data(self, data: Dataset) -> "TrainedSampler":
        """Return a copy that takes its conditions from the held-out part of other data, with the same parts."""
        other = copy.copy(self)
        other.condition_data = _of_labels(data, self.requested, self.styles)
        return other

    def _check(self, diffusion: GaussianDiffusion, model: nn.Module, guidance: Guidance) -> None:
        """Raise ValueError for guidance that does not fit, or a null label that the network was not trained with."""
        guidance.check(diffusion, model)
        for label, ((one, _), chosen) in enumerate(zip(LABELS, (self.requested, self.styles), strict=True)):
            if chosen is None or chosen:
                continue
            try:
                guidance.check_null(label)
            except ValueError as error:
                raise ValueError(f"{one} = none: {error}") from error
            if not getattr(model, "drop", 0):
                raise ValueError(
                    f"{one} = none: the network was never trained without its labels; train one with task.drop=0.1"
                )

    def between(self, x: Tensor, y: Tensor | Condition | None, k: int) -> Tensor:
        """Return k images between two: both encoded to their x_T, which are interpolated and decoded.

        Nothing is clipped, so that the ends come out close to what went in. If the network is conditional, an image
        has the condition of the nearer end.

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
            self.diffusion.predictor(self.model, condition.for_network(self.model)),
        )
        with self.computing():
            x_T = self.sampler.encode(schedule, denoise, self.encode(x))
            ends = torch.linspace(0, 1, k, device=self.device).round().long()
            nearer = condition.rows(lambda part: part[ends]).for_network(self.model)
            denoise = self.diffusion.predictor(self.model, nearer)
            return self.decode(self.sampler(schedule, denoise, interpolate(x_T[0], x_T[1], k)))

    def way(self, n: int, pictures: int) -> list[tuple[int | float, Tensor]]:
        """Return (t, x_t) of the first n samples, decoded, at evenly spaced moments from noise (t = T) to t = 0."""
        moments = len(self.sampler.times(self.diffusion.schedule))
        chosen = set(torch.linspace(0, moments - 1, min(pictures, moments)).round().long().tolist())
        seen: list[tuple[int | float, Tensor]] = []

        def note(i: int, t: int | float, s: int | float, x_t: Tensor, pred: Prediction) -> None:
            if i in chosen:
                seen.append((t, self.decode(x_t)))

        x_0 = self.draw(range(n), note)
        return [*seen, (0, x_0)] if moments - 1 in chosen else seen


def _of_labels(data: Dataset | None, requested: Sequence[int] | None, styles: Sequence[int] | None) -> Dataset:
    """Return the data that provide conditions, restricted to the requested labels."""
    if data is None:
        raise ValueError("the network takes a condition in addition to x_t, and there are no data to take it from")
    restricted = data.of_labels(requested, styles)
    restricted.condition_rows([0])  # raises if there are none
    return restricted
