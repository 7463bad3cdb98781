"""Augmentation of training images that leaves their content recognisable, applied to a whole batch on its device."""

from dataclasses import replace

import torch
from einops import rearrange, reduce
from torch import Tensor
from torch.nn import functional as F

from ddpm.checks import check_one_of, is_whole
from ddpm.data.batch import Batch
from ddpm.data.splines import field

LARGEST = {"rotation": 180, "scale": 1, "translation": 0.5, "elastic": 100, "brightness": 1, "contrast": 1}
MOST_NODES = 32
PADDINGS = ("border", "reflection")


class Augment:
    """Bend, move, turn and scale every image by its own random draws, in one interpolation, then change its light.

    A strength of 0 changes nothing. Mirroring left to right is not among them: it is `flip` of the data, and is done
    before.

    Args:
        rotation: degrees, 0..180; images turn about their centre by -rotation..rotation.
        scale: 0..1; images grow by a factor in 1 / (1 + scale)..1 + scale, its logarithm uniform.
        translation: share of each side, 0..0.5; images move by -translation..translation, before they turn and grow.
        elastic: pixels, 0..100; the largest displacement along each side by a smooth random field. Below a quarter of
            the shorter side over `elastic_nodes` the field folds nothing.
        elastic_nodes: 1..32; the field is cubic in each of this many equal parts of a side.
        brightness: 0..1; -brightness..brightness is added to [-1, 1].
        contrast: 0..1; the distance from the image's mean is multiplied by 1 / (1 + contrast)..1 + contrast.
        vertical_flip: mirror half of the images top to bottom.
        padding: what lies beyond an edge: "border", the pixel there, or "reflection".
    Raises:
        ValueError: an argument out of range.
    """

    def __init__(
        self,
        rotation: float = 0.0,
        scale: float = 0.0,
        translation: float = 0.0,
        elastic: float = 0.0,
        elastic_nodes: int = 4,
        brightness: float = 0.0,
        contrast: float = 0.0,
        vertical_flip: bool = False,
        padding: str = "border",
    ):
        strengths = (rotation, scale, translation, elastic, brightness, contrast)
        for (name, largest), value in zip(LARGEST.items(), strengths, strict=True):
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if not number or not 0 <= value <= largest:
                raise ValueError(f"{name} = {value!r} must be a number from 0 to {largest}")
        if not is_whole(elastic_nodes, 1, MOST_NODES):
            raise ValueError(f"elastic_nodes = {elastic_nodes!r} must be an integer from 1 to {MOST_NODES}")
        if not isinstance(vertical_flip, bool):
            raise ValueError(f"vertical_flip = {vertical_flip!r} must be true or false")
        check_one_of("padding", padding, PADDINGS)
        self.rotation, self.scale, self.translation = rotation, scale, translation
        self.elastic, self.elastic_nodes = elastic, elastic_nodes
        self.brightness, self.contrast = brightness, contrast
        self.vertical_flip, self.padding = vertical_flip, padding

    @property
    def _warps(self) -> bool:
        return any((self.rotation, self.scale, self.translation, self.elastic))

    @property
    def active(self) -> bool:
        """Whether it changes anything."""
        return self._warps or any((self.brightness, self.contrast, self.vertical_flip))

    def of(self, batch: Batch, generator: torch.Generator) -> Batch:
        """Return the batch with its images augmented by draws of a generator on their device."""
        return replace(batch, x=self(batch.x, generator))

    def __call__(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """Return the images (B, C, H, W), float32 in [-1, 1], augmented by draws of a generator on their device.

        Called outside of autocast, as the trainer does: half precision would round the pixels' places.
        """
        if not self.active:
            return x
        # every kind draws, used or not: switching one on leaves what the others draw
        coin, turn, growth, right, down, light, spread = rearrange(_draw(x, generator, 7), "b n -> n b 1 1 1")
        nodes = _draw(x, generator, 2, self.elastic_nodes + 3, self.elastic_nodes + 3)
        if self.vertical_flip:
            x = torch.where(coin < 0, x.flip(-2), x)
        if self._warps:
            height, width = x.shape[2:]
            matrix = inverse_of(self.rotation * turn.flatten(), (1 + self.scale) ** growth.flatten())
            move = self.translation * torch.cat([width * right, height * down], 1)
            x = warp(x, matrix, field(self.elastic * nodes, height, width) - move, self.padding)
        if self.contrast:
            mean = reduce(x, "b c h w -> b 1 1 1", "mean")
            x = mean + (x - mean) * (1 + self.contrast) ** spread
        if self.brightness:
            x = x + self.brightness * light
        return x.clamp(-1, 1)


def warp(x: Tensor, matrix: Tensor, shift: Tensor, padding: str) -> Tensor:
    """Return images that show at p what x shows at matrix @ p + shift(p), bilinearly interpolated.

    Args:
        x: (B, C, H, W).
        matrix: (B, 2, 2); p is (right, down), in pixels from the centre.
        shift: pixels, (B, 2, H, W), or (B, 2, 1, 1) for the same everywhere.
        padding: "border" or "reflection".
    Returns: (B, C, H, W).
    """
    height, width = x.shape[2:]
    right = torch.arange(width, dtype=x.dtype, device=x.device) - (width - 1) / 2  # (W,)
    down = rearrange(torch.arange(height, dtype=x.dtype, device=x.device) - (height - 1) / 2, "h -> h 1")
    a, b, c, d = rearrange(matrix, "b i j -> (i j) b 1 1")  # no matrix product, whose factors a GPU may round
    of_x = torch.stack([a * right + b * down, c * right + d * down], 1) + shift  # (B, 2, H, W)
    grid = torch.stack([of_x[:, 0] * 2 / width, of_x[:, 1] * 2 / height], -1)  # -1 and 1 are the outer edges
    return F.grid_sample(x, grid, mode="bilinear", padding_mode=padding, align_corners=False)


def inverse_of(angle: Tensor, factor: Tensor) -> Tensor:
    """Return the matrix (B, 2, 2) of `warp` that turns counter-clockwise by angle (B,) and enlarges by factor (B,).

    Args: angle in degrees; factor > 0.
    """
    cos, sin = angle.deg2rad().cos() / factor, angle.deg2rad().sin() / factor
    return rearrange(torch.stack([cos, -sin, sin, cos], -1), "b (i j) -> b i j", i=2)


def _draw(x: Tensor, generator: torch.Generator, *shape: int) -> Tensor:
    """Return uniform numbers (B, *shape) in [-1, 1), one row for each row of x."""
    return 2 * torch.rand(len(x), *shape, generator=generator, device=x.device, dtype=x.dtype) - 1
