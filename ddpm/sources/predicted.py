"""Predictions of a network for held-out pictures, each a function of one picture."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ddpm.data.conditions import with_channels
from ddpm.data.dataset import Dataset
from ddpm.runs.precision import computing
from ddpm.samplers import Callback
from ddpm.sources.base import Source


def predicted(model: nn.Module, x: Tensor) -> Tensor:
    """Return the prediction (B, C', H, W) of a network of noisy data for x (B, C, H, W) without noise, at t = 0."""
    y: Tensor = model(x, torch.zeros(len(x), dtype=torch.long, device=x.device))
    return y


@torch.no_grad()
def predicted_in_batches(
    model: nn.Module, x: Tensor, device: torch.device, precision: str = "fp32", batch: int = 256
) -> Tensor:
    """Predict for pictures (N, C, H, W), `batch` at a time, in evaluation mode: float32 (N, C', H, W), on the CPU.

    Args:
        device: the network's device.
        precision: of its computation, one of `ddpm.runs.precision.PRECISIONS`.
    """
    model.eval()
    with computing(device, precision):
        return torch.cat([predicted(model, part.to(device)).float().cpu() for part in x.split(batch)])


class Predicted(Source):
    """The source of images that a network predicts: number i is of held-out picture i, modulo their number.

    Args:
        model: (x, t) -> (B, C', H, W).
        data: with held-out pictures, or, if none are held out, training pictures.
        seed, device, precision, requested: as in `Source`; nothing is random.
    Raises: ValueError for labels, which such a network does not have.
    """

    evaluations = 1
    walk = "predicted of held-out pictures"
    like_data = False
    measures = ("cost",)

    def __init__(
        self,
        model: nn.Module,
        data: Dataset,
        seed: int,
        device: torch.device,
        precision: str = "fp32",
        requested: Sequence[int] | None = None,
    ):
        super().__init__(model, (3, *data.shape[1:]), seed, device, precision, requested)
        self.condition_data = data

    def draw(self, numbers: range | list[int], callback: Callback | None = None) -> Tensor:
        """Return the predictions of these numbers for display, (n, 3, H, W), on the CPU."""
        x = self.condition_data.batch(self.condition_data.condition_rows(numbers)).x
        y = with_channels(predicted_in_batches(self.model, x, self.device, self.precision), 3)
        self.range.note(y)
        return y

    def classes(self, numbers: range | list[int]) -> None:
        """Return None: predictions have no classes."""
        return None

    def condition_images(self, numbers: range | list[int]) -> Tensor:
        """Return the pictures that the predictions are made from, (n, C, H, W), on the CPU."""
        x: Tensor = self.condition_data.batch(self.condition_data.condition_rows(numbers)).x
        return x.cpu()
