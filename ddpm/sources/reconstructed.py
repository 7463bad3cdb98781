"""Held-out data, encoded and decoded by an autoencoder: the limit of whatever is drawn through it."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ddpm.data.dataset import Dataset
from ddpm.latent.codec import Codec
from ddpm.runs.precision import computing
from ddpm.samplers import Callback
from ddpm.sources.base import Source


class Reconstructed(Source):
    """Held-out data, encoded and decoded: sample number i is made of held-out sample i, modulo their number.

    Args:
        codec: the autoencoder.
        data: of which held-out samples are taken, or, if none are held out, those that are trained on.
        seed, device, precision, requested: as in `Source`; nothing is drawn, whatever the seed.
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
        """The reconstructions of these numbers, (n, *shape), on the CPU."""
        x = self._originals(numbers)
        with computing(self.device, self.precision):
            x = self.autoencoder.reconstructed(x).float().cpu()
        self.range.note(x)
        return x

    def classes(self, numbers: range | list[int]) -> Tensor | None:
        """The classes (n,) of what is reconstructed; None for data without labels."""
        return self.condition_data.batch(self.condition_data.condition_rows(numbers)).y

    def condition_images(self, numbers: range | list[int]) -> Tensor:
        """The originals of the reconstructions, (n, *shape), on the CPU."""
        return self._originals(numbers).cpu()

    def _originals(self, numbers: range | list[int]) -> Tensor:
        x: Tensor = self.condition_data.batch(self.condition_data.condition_rows(numbers), self.device).x
        return x
