"""Conditioning images computed from the training image itself: one function per kind."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from einops import einsum, rearrange
from torch import Tensor

from ddpm.randomness import generator as keyed

HOLE = (0.25, 0.75)  # sides of the hole of a mask, as shares of the image's
FACTOR = 4  # of a side, by which low resolution is lower
LUMA = (0.299, 0.587, 0.114)  # of red, green and blue, by ITU-R 601
SOLIDS = 4  # at most in a scene of `ddpm.data.scenes`
FIXED = 1024  # fixed holes, of which an image's number chooses one where no generator is given


def mask(x_0: Tensor, uniform: Tensor) -> Tensor:
    """Return the image with a rectangular hole, and the hole's mask: for inpainting.

    Its height and width are uniform in 1/4..3/4 of the image's, rounded, at least one pixel; its place is uniform.

    Args:
        x_0: (B, C, H, W), in [-1, 1].
        uniform: in [0, 1): of height, width, top and left, (B, 4).
    Returns:
        (B, C + 1, H, W): the image, 0 in the hole, and a channel that is 1 in the hole and 0 elsewhere.
    """
    sides = torch.tensor(x_0.shape[2:], device=x_0.device)
    low, high = HOLE
    extent = ((low + (high - low) * uniform[:, :2]) * sides).round().long().clamp(min=1)  # (B, 2)
    corner = (uniform[:, 2:] * (sides - extent + 1)).long()
    rows, columns = (
        (torch.arange(int(side), device=x_0.device) - corner[:, i, None]) for i, side in enumerate(x_0.shape[2:])
    )
    inside = [(at >= 0) & (at < extent[:, i, None]) for i, at in enumerate((rows, columns))]
    hole = rearrange(inside[0], "b h -> b 1 h 1") & rearrange(inside[1], "b w -> b 1 1 w")
    return torch.cat([x_0.masked_fill(hole, 0), hole.to(x_0.dtype)], dim=1)


def low_resolution(x_0: Tensor) -> Tensor:
    """Return the image at a quarter of its resolution, rounded down but at least one pixel a side, spread to full size.

    Args:
        x_0: (B, C, H, W).
    Returns:
        (B, C, H, W): means over squares of 4x4 pixels, where 4 divides the sides.
    """
    height, width = x_0.shape[2:]
    pooled = F.adaptive_avg_pool2d(x_0, (max(1, height // FACTOR), max(1, width // FACTOR)))
    return F.interpolate(pooled, size=(height, width), mode="nearest-exact")


def gray(x_0: Tensor) -> Tensor:
    """Return the luma of a colour image, for colourisation; a one-channel image is returned as it is.

    Args:
        x_0: (B, 1 or 3, H, W).
    Returns:
        (B, 1, H, W).
    Source: ITU-R BT.601.
    """
    if x_0.shape[1] == 1:
        return x_0
    return einsum(x_0, x_0.new_tensor(LUMA), "b c h w, c -> b h w")[:, None]


def edges(x_0: Tensor) -> Tensor:
    """Return the gradient magnitude of the luma, by Sobel's operator with replicated borders.

    Args:
        x_0: (B, 1 or 3, H, W), in [-1, 1].
    Returns:
        (B, 1, H, W), in [-1, 1]: -1 where it is even, 1 at a straight edge from black to white and where it is steeper.
    """
    luma = F.pad((gray(x_0) + 1) / 2, [1, 1, 1, 1], mode="replicate")
    right = luma.new_tensor([[-1, 0, 1], [-2, 0, 2], [-1, 0, 1]]) / 4
    slope = F.conv2d(luma, torch.stack([right, right.T])[:, None])  # (B, 2, H, W), to the right and down
    return 2 * slope.square().sum(1, keepdim=True).sqrt().clamp(max=1) - 1


PLAIN: dict[str, Callable[[Tensor], Tensor]] = {"low_resolution": low_resolution, "gray": gray, "edges": edges}
KINDS = ("mask", *PLAIN)
MEASURED = {"depth": 1, "masks": SOLIDS}  # channels of conditions that only rendered scenes have


def channels_of(kind: str | None, channels: int) -> int:
    """Return the number of channels C' of a condition of a kind for images of `channels` channels; 0 for None."""
    if kind is None:
        return 0
    return ({"mask": channels + 1, "low_resolution": channels, "gray": 1, "edges": 1} | MEASURED)[kind]


def image_of(kind: str, x_0: Tensor, numbers: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Return the conditioning images of a kind for images x_0.

    Args:
        kind: one of `KINDS`.
        x_0: (B, C, H, W), in [-1, 1].
        numbers: of the images in their data set, (B,).
        generator: draws the holes of masks; None for the fixed hole that belongs to an image's number.
    Returns:
        (B, C', H, W), on the device of x_0; see `channels_of`.
    """
    if kind != "mask":
        return PLAIN[kind](x_0)
    if generator is None:
        uniform = torch.rand(FIXED, 4, generator=keyed(0, "mask"))[numbers.cpu() % FIXED]
    else:
        uniform = torch.rand(len(x_0), 4, generator=generator, device=generator.device)
    return mask(x_0, uniform.to(x_0.device))


def with_channels(image: Tensor, channels: int) -> Tensor:
    """Return a picture (B, channels, H, W) for display of a conditioning image of any kind, (B, C', H, W)."""
    return image[:, :channels] if image.shape[1] >= channels else image[:, :1].expand(-1, channels, -1, -1)
