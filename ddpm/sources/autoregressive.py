"""The source of samples that are drawn code by code."""

import copy
import math
from collections.abc import Sequence
from typing import Any, Self

import torch
from torch import Tensor

from ddpm.randomness import generator
from ddpm.runs.precision import computing
from ddpm.samplers import Callback
from ddpm.sources.base import Source


class Autoregressive(Source):
    """Samples of an autoregressive model: grids of codes, each drawn given those before it, decoded by a codec.

    Args:
        model: with `sample(u, y, temperature)`, as in `models.pixelcnn.PixelCNN`.
        seed, device, precision, requested: as in `Source`.
        temperature: of the distribution of a code, >= 0: 1 for the learned one, less for more likely codes.
    Raises: ValueError as there, for no class of a network with classes, and for an invalid temperature.
    """

    walk = "codes drawn one by one"
    model: Any
    measures = ("codes",)

    def __init__(
        self,
        model: Any,
        seed: int,
        device: torch.device,
        precision: str = "fp32",
        requested: Sequence[int] | None = None,
        temperature: float = 1.0,
    ):
        super().__init__(model, model.shape, seed, device, precision, requested)
        if requested is not None and not requested:
            raise ValueError("class = none: the network was never trained without its classes")
        self.temperature = temperature

    @property
    def evaluations(self) -> int:
        """One: features that no code changes are computed once, so that all codes take one pass over the grid."""
        return 1

    def at(self, temperature: float) -> Self:
        """Return a copy of this source at another temperature.

        Raises: ValueError for an invalid one.
        """
        number = isinstance(temperature, int | float) and not isinstance(temperature, bool)
        if not (number and 0 <= temperature < math.inf):
            raise ValueError(f"temperature={temperature!r} must be a number >= 0; 1 for the learned distribution")
        other = copy.copy(self)
        other.temperature = temperature
        return other

    @torch.no_grad()
    def draw(self, numbers: range | list[int], callback: Callback | None = None) -> Tensor:
        """Return the samples of these numbers, decoded, (n, *), on the CPU."""
        x = self.decode(self.codes(numbers)).float()
        self.range.note(x)
        return x

    def codes(self, numbers: range | list[int]) -> Tensor:
        """Return the codes of the samples of these numbers, int64 (n, h, w), on the device."""
        u = torch.stack([torch.rand(self.shape, generator=generator(self.seed, "codes", i)) for i in numbers])
        labels = self.classes(numbers)
        with computing(self.device, self.precision):
            y = None if labels is None else labels.to(self.device)
            codes: Tensor = self.model.sample(u.to(self.device), y, self.temperature)
        return codes
