"""Perceptual distance of pictures, by the features of a trained network (LPIPS)."""

from collections.abc import Sequence
from typing import Any, Protocol, Self

import torch
from einops import rearrange, reduce
from torch import Tensor, nn

EPS = 1e-10  # added to norms, which are 0 where all features are 0


class Maps(Protocol):
    """The protocol of a network whose features can be compared."""

    @property
    def map_channels(self) -> tuple[int, ...]:
        """The channels of each map."""

    def maps(self, x: Tensor) -> list[Tensor]:
        """Return features of pictures (B, C, H, W), from the first layer to the last: (B, C', H', W') each."""


class Perceptual(nn.Module):
    r"""The perceptual distance of two pictures, by the features of a frozen network.

    .. math:: d(x, x_0) = \sum_l \frac{1}{H_l W_l} \sum_{h,w} \left\| w_l \odot
        (\hat y^l_{hw} - \hat y^l_{0hw}) \right\|_2^2 \qquad \text{[LPIPS (1)]}

    with y-hat the features of layer l, divided at each place by their norm over the channels. With w = 1 that is twice
    one minus the cosine. It is a number of about 0 to 1, and not a sum over the dimensions of x: it has to be
    multiplied by x[0].numel() to be added to parts that are, as SSIM is.

    Args:
        network: with `maps`, a module: the classifier that judges samples (`models.classifier`), or a network of
            published weights (`models.lpips`). It is frozen, in evaluation mode for good.
        weights: for each map the weights of its channels, w^2, (C',), >= 0: as published; None for 1.
    Raises: ValueError for weights that are not those of the maps, or below 0.
    Source: The Unreasonable Effectiveness of Deep Features as a Perceptual Metric (arXiv 1801.03924).
    """

    network: Any

    def __init__(self, network: Maps, weights: Sequence[Tensor] | None = None):
        super().__init__()
        channels = network.map_channels
        weights = [torch.ones(n) for n in channels] if weights is None else list(weights)
        shapes = [tuple(w.shape) for w in weights]
        if shapes != [(n,) for n in channels]:
            raise ValueError(
                f"weights of the channels have the shapes {shapes}, and the maps {list(channels)} channels"
            )
        if any(not (w >= 0).all() for w in weights):
            raise ValueError("weights of the channels must be >= 0: else two pictures could be nearer than equal ones")
        self.network, self.names = network, [f"weight_{i}" for i in range(len(weights))]
        for name, weight in zip(self.names, weights, strict=True):
            self.register_buffer(name, weight.detach().clone())
        self.eval().requires_grad_(False)

    def train(self, mode: bool = True) -> Self:
        """Do nothing: the module stays in evaluation mode."""
        return super().train(False)

    def must_take(self, shape: tuple[int, ...]) -> None:
        """Raise ValueError for pictures of a shape, (C, H, W), for which the network has no features."""
        at = next(self.network.parameters()).device
        with torch.no_grad():
            self.network.maps(torch.zeros(1, *shape, device=at))

    def forward(self, picture: Tensor, x: Tensor) -> Tensor:
        """Return the distance of each pair, (B,).

        Args:
            picture, x: in [-1, 1], (B, C, H, W); the gradient goes to the first.
        """
        with torch.no_grad():
            of_x = self.network.maps(x)
        distances = []
        for name, ours, theirs in zip(self.names, self.network.maps(picture), of_x, strict=True):
            difference = _directions(ours.to(x.dtype)) - _directions(theirs.to(x.dtype))
            weighted = rearrange(getattr(self, name).to(x.dtype), "c -> c 1 1") * difference.square()
            distances.append(reduce(reduce(weighted, "b c h w -> b h w", "sum"), "b h w -> b", "mean"))
        return torch.stack(distances).sum(0)


def _directions(y: Tensor) -> Tensor:
    """Return features (B, C, H, W) divided by their norm over the channels, with a finite gradient where all are 0."""
    return y / (reduce(y.square(), "b c h w -> b 1 h w", "sum") + EPS**2).sqrt()
