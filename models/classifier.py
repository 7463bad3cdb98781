"""A small residual classifier of images, for judging samples and for the features of Frechet distances."""

import itertools
import math
from typing import Any

import torch
from einops import reduce
from torch import Tensor, nn


class Residual(nn.Module):
    """x + f(x), with f two 3x3 convolutions, and a 1x1 convolution of x where the channels change.

    Args:
        in_channels, out_channels: channels of the input and of the output.
    """

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(out_channels),
            nn.ReLU(inplace=True),
            nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(out_channels),
        )
        same = in_channels == out_channels
        self.skip = nn.Identity() if same else nn.Conv2d(in_channels, out_channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return (self.skip(x) + self.body(x)).relu()  # (B, out_channels, H, W)


class Classifier(nn.Module):
    """A residual network from images to logits.

    Every level halves the image by pooling, the last one to at most 4 pixels, and has one residual block; the channels
    double from level to level, up to four times. The mean over the image, projected, gives the features.

    Args:
        image_size: side in pixels, or (H, W).
        in_channels: channels of the images.
        num_classes: K.
        channels: of the first level.
        features: size of the penultimate layer.
        dropout: before the last layer.
    Raises: ValueError for a size below 1, and for images of another shape.
    """

    def __init__(
        self,
        image_size: int | tuple[int, int],
        in_channels: int = 1,
        num_classes: int = 10,
        channels: int = 32,
        features: int = 64,
        dropout: float = 0.1,
    ):
        super().__init__()
        height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
        sizes = (height, width, in_channels, num_classes, channels, features)
        if min(sizes) < 1:
            raise ValueError(f"H, W, in_channels, num_classes, channels and features are at least 1, not {sizes}")
        self.image_shape = (in_channels, height, width)
        levels = max(1, math.ceil(math.log2(max(height, width) / 4)))
        widths = [channels * min(4, 2**level) for level in range(levels)]

        half = nn.MaxPool2d(2, ceil_mode=True)
        stem = nn.Conv2d(in_channels, channels, 3, padding=1, bias=False)
        blocks: list[nn.Module] = [Residual(channels, channels)]
        for before, after in itertools.pairwise(widths):
            blocks += [half, Residual(before, after)]
        self.body = nn.Sequential(stem, half, nn.BatchNorm2d(channels), nn.ReLU(), *blocks)
        self.project = nn.Sequential(nn.Linear(widths[-1], features), nn.ReLU())
        self.classify = nn.Sequential(nn.Dropout(dropout), nn.Linear(features, num_classes))
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # a quarter faster; torch leaves it untyped

    @property
    def map_channels(self) -> tuple[int, ...]:
        """The channels of each of `maps`."""
        blocks: list[Any] = [layer for layer in self.body if isinstance(layer, Residual)]
        return tuple(block.body[0].out_channels for block in blocks)

    def maps(self, x: Tensor) -> list[Tensor]:
        """Return features of images (B, C, H, W) in [-1, 1] after each level's block: (B, C', H', W'); not negative."""
        self._must_read(x)
        found = []
        for layer in self.body:
            x = layer(x)
            if isinstance(layer, Residual):
                found.append(x)
        return found

    def _must_read(self, x: Tensor) -> None:
        if x.shape[1:] != self.image_shape:
            raise ValueError(f"this classifier reads images of shape {self.image_shape}, not {tuple(x.shape[1:])}")

    def features(self, x: Tensor) -> Tensor:
        """Return the penultimate layer (B, features) of images (B, C, H, W) in [-1, 1]; not negative."""
        self._must_read(x)
        return self.project(reduce(self.body(x), "b c h w -> b c", "mean"))

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (B, num_classes) of images (B, C, H, W) in [-1, 1]."""
        return self.classify(self.features(x))
