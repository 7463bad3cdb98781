"""Sources of samples that are decoded from codings at once, without a sampler."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ddpm.data.batch import Condition
from ddpm.latent.reconstruction import Reconstruction
from ddpm.randomness import SampleNoise
from ddpm.runs.precision import computing
from ddpm.samplers import Callback
from ddpm.sources.base import Source


class Generated(Source):
    """Samples of a generator: normal codings, decoded.

    Args:
        model: with `codings` and `decode(z, y)`.
        shape, seed, device, precision, requested: as in `Source`.
    Raises: ValueError as there, and for no class of a network with classes.
    """

    evaluations = 1
    walk = "images of normal codings, generated at once"
    model: Any

    def __init__(
        self,
        model: nn.Module,
        shape: tuple[int, ...],
        seed: int,
        device: torch.device,
        precision: str = "fp32",
        requested: Sequence[int] | None = None,
    ):
        super().__init__(model, shape, seed, device, precision, requested)
        if requested is not None and not requested:
            raise ValueError("class = none: the network was never trained without its classes")

    def picture(self, output: Tensor) -> Tensor:
        """Return the picture of the network's output."""
        return output

    @torch.no_grad()
    def draw(self, numbers: range | list[int], callback: Callback | None = None) -> Tensor:
        """Return the samples of these numbers, (n, *shape), on the CPU."""
        z = SampleNoise(self.seed, numbers)(0, (self.model.codings,), self.device)
        labels = self.classes(numbers)
        with computing(self.device, self.precision):
            output = self.model.decode(z, None if labels is None else labels.to(self.device))
        x = self.picture(output).cpu()
        self.range.note(x)
        return x


class Decoded(Generated):
    """Samples of a variational autoencoder: codings of the prior, decoded.

    Args:
        model: with `codings`, `encode(x, y)` and `decode(z, y)`.
        reconstruction: the meaning of the decoder's output.
        shape, seed, device, precision, requested: as in `Generated`.
    Raises: ValueError as there.
    """

    walk = "codings of the prior, decoded"
    measures = ("elbo", "log_likelihood", "latent_structure")

    def __init__(
        self,
        model: nn.Module,
        reconstruction: Reconstruction,
        shape: tuple[int, ...],
        seed: int,
        device: torch.device,
        precision: str = "fp32",
        requested: Sequence[int] | None = None,
    ):
        super().__init__(model, shape, seed, device, precision, requested)
        self.reconstruction = reconstruction

    def picture(self, output: Tensor) -> Tensor:
        """Return the picture of the decoder's output."""
        return self.reconstruction.picture(output)

    @torch.no_grad()
    def between(self, x: Tensor, y: Tensor | Condition | None, k: int) -> Tensor:
        """Return k images decoded between the codings of two, each conditioned on the class of the nearer end.

        Args:
            x: the two images, (2, *shape), in [-1, 1]; y: their classes, (2,), or their condition.
        Returns:
            (k, *shape), on the CPU.
        """
        condition = (y if isinstance(y, Condition) else Condition(classes=y)).to(self.device)
        with computing(self.device, self.precision):
            mean, _ = self.model.encode(x.to(self.device), condition.for_network(self.model))
            share = torch.linspace(0, 1, k, device=self.device)
            nearer = condition.rows(lambda part: part[share.round().long()]).for_network(self.model)
            output = self.model.decode(mean[0] + share[:, None] * (mean[1] - mean[0]), nearer)
        return self.picture(output).cpu()
