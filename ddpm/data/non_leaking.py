"""Non-leaking augmentation: the network is conditioned on the random changes of images, so that samples lack them."""

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from einops import rearrange
from torch import Tensor

from ddpm.checks import check_one_of
from ddpm.data.augment import PADDINGS, inverse_of, warp
from ddpm.data.batch import Batch

KINDS = ("horizontal_flip", "vertical_flip", "scale", "rotation", "stretch", "translation")
PARAMETERS = 9  # numbers that describe the augmentation of an image
LARGEST = {"scale": 1, "rotation": 180, "stretch": 1, "translation": 0.5}


class NonLeaking:
    r"""Augment images at random and condition the network on how: nine numbers, all 0 for an unchanged image.

    .. math:: a = (i_x,\ i_y,\ z_s,\ \cos\theta - 1,\ \sin\theta,\ z_r \cos 2\varphi,\ z_r \sin 2\varphi,\ z_x,\ z_y)
        \qquad \text{[EDM (augmentation parameters)]}

    with z normal, theta and phi uniform, and i 0 or 1. The image is mirrored by i, stretched by 2^(stretch z_r) in the
    direction of phi and shrunk as much across, turned counter-clockwise by theta, grown by 2^(scale z_s), and moved by
    translation z_x and z_y times its sides. Each kind is done with probability p; else its numbers are 0. A network
    conditioned on zeros generates images without augmentation. The paper conditions on phi where this uses twice phi:
    a half turn of the direction is the same stretch.

    Args:
        p: the probability of each kind, 0..1; the paper has 0.12 for CIFAR-10 and 0.15 for faces.
        kinds: which are done, of "horizontal_flip", "vertical_flip", "scale", "rotation", "stretch", "translation". One
            that turns an image into another class, as mirroring does with digits, belongs to no labelled data.
        scale, stretch: standard deviation of the logarithm to base 2 of the factor, 0..1.
        rotation: degrees, 0..180; theta is uniform in -rotation..rotation.
        translation: standard deviation as a share of each side, 0..0.5.
        padding: what lies beyond an edge: "border", the pixel there, or "reflection".
    Raises:
        ValueError: an argument out of range, an unknown kind or one that is named twice.
    Source: Karras et al., Elucidating the Design Space of Diffusion-Based Generative Models (arXiv 2206.00364),
        appendix F.2, whose strengths are the defaults; the idea is that of Jun et al. (ICML 2020).
    Attributes:
        tells: how many numbers the network is conditioned on.
    """

    tells = PARAMETERS

    def __init__(
        self,
        p: float = 0.12,
        kinds: Sequence[str] = ("scale", "rotation", "stretch", "translation"),
        scale: float = 0.2,
        rotation: float = 180.0,
        stretch: float = 0.2,
        translation: float = 0.125,
        padding: str = "border",
    ):
        most = {"p": 1, **LARGEST}
        for (name, largest), value in zip(most.items(), (p, scale, rotation, stretch, translation), strict=True):
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if not number or not 0 <= value <= largest:
                raise ValueError(f"{name} = {value!r} must be a number from 0 to {largest}")
        for kind in kinds:
            if kind not in KINDS:
                raise ValueError(f"kinds has {kind!r}, which is not known; allowed: {', '.join(KINDS)}")
        if len(set(kinds)) < len(kinds):
            raise ValueError(f"kinds = {list(kinds)} names one twice")
        check_one_of("padding", padding, PADDINGS)
        self.p, self.kinds, self.padding = p, tuple(kinds), padding
        self.scale, self.rotation, self.stretch, self.translation = scale, rotation, stretch, translation

    @property
    def active(self) -> bool:
        """Whether it changes anything."""
        return bool(self.p and self.kinds)

    def of(self, batch: Batch, generator: torch.Generator) -> Batch:
        """Return the batch with its images augmented by draws of a generator on their device, and conditioned on it."""
        a = self.draw(batch.x, generator)
        return replace(batch, x=self.applied(batch.x, a), condition=replace(batch.condition, augment=a))

    def draw(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """Draw the parameters a (B, 9) for images (B, C, H, W), independent of their values."""
        # every kind draws, used or not: switching one on leaves what the others draw
        device, dtype = x.device, x.dtype
        coins = torch.rand(len(x), len(KINDS), generator=generator, device=device, dtype=dtype) < self.p
        uniform = torch.rand(len(x), 4, generator=generator, device=device, dtype=dtype)
        z_s, z_r, z_x, z_y = torch.randn(len(x), 4, generator=generator, device=device, dtype=dtype).unbind(1)
        i_x, i_y = (uniform[:, :2] < 0.5).to(dtype).unbind(1)
        theta, phi = (2 * uniform[:, 2] - 1) * math.radians(self.rotation), math.pi * uniform[:, 3]
        done = dict(zip(KINDS, (coins & torch.tensor([k in self.kinds for k in KINDS], device=device)).T, strict=True))
        a = {
            "horizontal_flip": [i_x],
            "vertical_flip": [i_y],
            "scale": [z_s],
            "rotation": [theta.cos() - 1, theta.sin()],
            "stretch": [z_r * (2 * phi).cos(), z_r * (2 * phi).sin()],
            "translation": [z_x, z_y],
        }
        return torch.stack([torch.where(done[kind], number, 0) for kind in KINDS for number in a[kind]], 1)

    def applied(self, x: Tensor, a: Tensor) -> Tensor:
        """Return images (B, C, H, W) augmented by parameters (B, 9); those with all parameters 0 are unchanged."""
        i_x, i_y, z_s, cos, sin, *direction, z_x, z_y = a.unbind(1)
        x = torch.where(_per_image(i_x > 0), x.flip(-1), x)
        x = torch.where(_per_image(i_y > 0), x.flip(-2), x)
        theta = torch.atan2(sin, cos + 1).rad2deg()
        grown = inverse_of(theta, 2 ** (self.scale * z_s))
        matrix = _product(_stretched(-self.stretch * torch.stack(direction, 1)), grown)
        height, width = x.shape[2:]
        move = self.translation * torch.stack([width * z_x, height * z_y], 1)
        shift = -_product(matrix, move[:, :, None])
        moved = warp(x, matrix, shift[:, :, :, None], self.padding)
        return torch.where(_per_image((a[:, 2:] != 0).any(1)), moved, x)


def _stretched(d: Tensor) -> Tensor:
    r"""Return the symmetric matrices (B, 2, 2) that stretch by 2^|d| in a direction and shrink as much across.

    .. math:: \exp\left(\ln 2 \begin{pmatrix} d_1 & d_2 \\ d_2 & -d_1 \end{pmatrix}\right), \quad
        d = |d| (\cos 2\varphi, \sin 2\varphi) \qquad \text{[EDM (anisotropic scaling)]}

    Args: d (B, 2).
    """
    size = math.log(2) * d.norm(dim=1)[:, None, None]
    d_1, d_2 = d.unbind(1)
    unit = rearrange(torch.stack([d_1, d_2, d_2, -d_1], 1), "b (i j) -> b i j", i=2) * math.log(2)
    grown = torch.where(size > 0, size.sinh() / size.clamp_min(torch.finfo(d.dtype).tiny), 1)
    return size.cosh() * torch.eye(2, dtype=d.dtype, device=d.device) + grown * unit


def _product(A: Tensor, B: Tensor) -> Tensor:
    """Return the product of (B, 2, 2) and (B, 2, n) in full precision, which a GPU's own product may not have."""
    return (A[:, :, :, None] * B[:, None]).sum(2)


def _per_image(where: Tensor) -> Tensor:
    return rearrange(where, "b -> b 1 1 1")
