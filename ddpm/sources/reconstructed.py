"""Held-out data, encoded and decoded by an autoencoder: the quality limit of latent models."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ddpm.data.dataset import Dataset
from ddpm.latent.codec import Codec
from ddpm.runs.precision import computing
from ddpm.samplers import Callback
from ddpm.sources.base import Source


class Reconstructed(Source):
    """The source of reconstructions: sample number i is that of held-out sample i, modulo their number.

    Args:
        codec: the autoencoder.
        data: with held-out samples, or, if none are held out, training samples.
        seed, device, precision, requested: as in `Source`; nothing is random.
    Raises: ValueError for labels, which such a network does not have.
    """

    evaluations = 1
    walk = "held-out images, encoded and decoded"
    measures = ("reconstruction",)

    def __init__(
        self,
        codec: Codec,
        data: Dataset,
        seed: int,
        device: torch.device,
        precision: str = "fp32",
        requested: Sequence[int] | None = None,
    ):
        super().__init__(codec.model, codec.of, seed, device, precision, requested)
        self.autoencoder, self.condition_data = codec, data

    def draw(self, numbers: range | list[int], callback: Callback | None = None) -> Tensor:
        """Return the reconstructions of these numbers, (n, *shape), on the CPU."""
        x = self._originals(numbers)
        with computing(self.device, self.precision):
            x = self.autoencoder.reconstructed(x).float().cpu()
        self.range.note(x)
        return x

    def classes(self, numbers: range | list[int]) -> Tensor | None:
        """Return the classes (n,) of the originals; None for data without labels."""
        return self.condition_data.batch(self.condition_data.condition_rows(numbers)).y

    def condition_images(self, numbers: range | list[int]) -> Tensor:
        """Return the originals of the reconstructions, (n, *shape), on the CPU."""
        return self._originals(numbers).cpu()

    def _originals(self, numbers: range | list[int]) -> Tensor:
        x: Tensor = self.condition_data.batch(self.condition_data.condition_rows(numbers), self.device).x
        return x
