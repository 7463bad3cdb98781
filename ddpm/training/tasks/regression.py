"""Regression: a network predicts an image that belongs to a picture, such as its depth."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from einops import rearrange
from torch import Tensor, nn

from ddpm.data.batch import Batch, takes
from ddpm.data.conditions import with_channels
from ddpm.data.dataset import Dataset, spread
from ddpm.latent.reconstruction import absolute, huber, squared
from ddpm.randomness import Keyed
from ddpm.sources.predicted import Predicted, predicted
from ddpm.training.task import Drawn, Losses, Task, must_take_shape

PARTS = {"squared": squared, "absolute": absolute, "huber": huber}
ERROR = "error"  # logged, not trained
CHOSEN_BY_CHANCE = "mask"  # the kind of image that a picture does not determine
SHOWN = 12  # pictures in a figure, next to their predictions


@dataclass(frozen=True, kw_only=True)
class Pair(Drawn):
    """Pictures with the images to predict.

    Args:
        x: (B, C, H, W).
        y: (B, C', H, W).
    """

    x: Tensor
    y: Tensor


class Regression(Task):
    r"""Train a network to predict from a picture x the image y that is its condition (`data.condition`).

    .. math:: L = \frac1d \sum_k w_k\, \ell_k(f(x), y) \qquad \text{[Regression (loss)]}

    with the distances l_k of `ddpm.latent.reconstruction`, sums over the d dimensions of y. The network is one of noisy
    data, always at t = 0: without noise. Besides the parts the mean absolute error is logged, in the units in
    which y was measured, such as lengths of the world of a depth.

    Args:
        model: (x, t) -> (B, C', H, W); without conditions.
        parts: name -> weight, 0 for a part that is not computed: "squared", "absolute", "huber".
        only: as in `Task`.
    Raises: ValueError for parts that are not known, or none.
    """

    replayable = True
    draws_of_data = True

    def __init__(self, model: nn.Module, parts: Mapping[str, float], only: Sequence[str] | None = None):
        for name, weight in parts.items():
            if name not in PARTS:
                raise ValueError(f"parts: {name!r} is not known; allowed: {', '.join(PARTS)}")
            if isinstance(weight, bool) or not 0 <= weight < math.inf:
                raise ValueError(f"parts.{name} = {weight!r} must be >= 0 and finite")
        self.parts = [name for name, weight in parts.items() if weight]
        if not self.parts:
            raise ValueError(f"parts: all are 0, and nothing is trained; set one of {', '.join(PARTS)} to 1")
        super().__init__({"model": model}, weights=dict(parts) | {ERROR: 0.0}, only=only)
        self.unit = 1.0  # of y, see `check`

    @property
    def model(self) -> nn.Module:
        return self.modules["model"]

    def draw(self, batch: Batch, random: Keyed, progress: float) -> Pair:
        """Return the batch; nothing is random."""
        assert batch.condition.image is not None  # of data that were checked
        return Pair(x=batch.x, y=batch.condition.image)

    def losses(self, drawn: Pair, progress: float) -> Losses:  # type: ignore[override]  # its own draws
        """Return the parts by name, and "error", each (B,)."""
        f, d = predicted(self.model, drawn.x), drawn.y[0].numel()
        parts = {name: PARTS[name](f, drawn.y) / d for name in self.parts}
        return parts | {ERROR: self.unit * absolute(f.detach(), drawn.y) / d}

    def source(
        self,
        data: Dataset | None,
        seed: int,
        device: torch.device,
        precision: str = "fp32",
        requested: Sequence[int] | None = None,
    ) -> Predicted | None:
        """Return the source of predictions for held-out pictures."""
        return None if data is None else Predicted(self.model, data, seed, device, precision, requested)

    def preview(self, n: int, data: Dataset, seed: int, precision: str) -> Tensor | None:
        """Return n tiles (n, 3, 3 H, W), on the CPU: a picture, the true image, and the prediction."""
        return rearrange(torch.stack(self._three(n, data)), "three n c h w -> n c (three h) w")

    @torch.no_grad()
    def _three(self, n: int, data: Dataset) -> list[Tensor]:
        """Return n pictures, the true images, and the predictions, each (n, 3, H, W), on the CPU."""
        numbers = data.held_out if len(data.held_out) else data.train
        batch = data.batch(numbers[spread(len(numbers), n)], next(self.model.parameters()).device)
        assert batch.condition.image is not None  # of data that were checked
        y = predicted(self.model.eval(), batch.x)
        return [with_channels(part, 3).cpu() for part in (batch.x, batch.condition.image, y)]

    def draw_results(self, folder: Path, data: Dataset) -> None:
        """Draw predictions.png: pictures, the true images, and the predictions."""
        from ddpm.figures import plots

        labels = ("picture", "true", "predicted")
        plots.labelled_rows(folder / "predictions.png", list(zip(labels, self._three(SHOWN, data), strict=True)))

    def check(self, data: Dataset) -> None:
        """Raise ValueError for data without conditioning image, for a random one, or if the network does not fit."""
        kind, y = getattr(data, "condition", None), data.batch(data.train[:1]).condition.image
        allowed = [name for name in getattr(data, "conditions", ()) if name != CHOSEN_BY_CHANCE]
        if y is None or kind == CHOSEN_BY_CHANCE:
            if not allowed:
                raise ValueError(f"task=regression predicts an image from a picture, and {data.name} has no such image")
            why = (
                "needs the image that data.condition names" if y is None else "is impossible: holes are drawn by chance"
            )
            raise ValueError(f"task=regression with data.condition={_null(kind)} {why}; allowed: {', '.join(allowed)}")
        must_take_shape(self.model, data)
        if taken := takes(self.model):
            raise ValueError(
                f"the model of a regression takes nothing but the picture, not {' and '.join(taken)}; set "
                "model.condition_channels=0 and model.num_classes=null"
            )
        made = getattr(self.model, "out_channels", y.shape[1])
        if made != y.shape[1]:
            raise ValueError(
                f"model.out_channels = {made}, but data.condition={kind} has {y.shape[1]}; set "
                f"model.out_channels={y.shape[1]}"
            )
        self.unit = getattr(data, "condition_unit", 1.0)


def _null(kind: str | None) -> str:
    """Return a kind as it is typed in a configuration."""
    return "null" if kind is None else kind
