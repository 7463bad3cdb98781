"""A convolutional generator and discriminator of images, with or without classes."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.discriminator import SLOPE, initialised
from models.embeddings import ClassEmbedding, Condition, parts_of
from models.layers import Upsample, check_counts, group_norm, normed, size_of
from models.vae import MOST, SMALLEST, fitted_mults

WIDEST = 4  # of any level, in units of channels


class Generator(nn.Module):
    """The generator, from codings to images: a linear map to the smallest level, then upsampling and convolutions.

    The size is halved as often as it is even, down to 3 pixels; the first has `channels`, each smaller one
    twice as many, up to four times.

    Args:
        image_size: pixels, one number or (H, W).
        in_channels: channels of the image.
        codings: length d of z.
        channels: width of the first level.
        num_classes: classes of its condition; None for none.
        groups: of every group norm.
    Attributes:
        shape: (in_channels, H, W), of one x.
        last: (C, h, w), of the smallest level.
        takes: the parts of a condition that it takes.
    Raises:
        ValueError: a count out of range, groups that do not divide a width.
    Source: Generative Adversarial Nets (arXiv 1406.2661), as a network of convolutions (DCGAN, arXiv 1511.06434), with
        group in place of batch normalisation and nearest upsampling in place of transposed convolutions.
    """

    def __init__(
        self,
        image_size: int | Sequence[int],
        in_channels: int = 1,
        codings: int = 64,
        channels: int = 64,
        num_classes: int | None = None,
        groups: int = 8,
    ):
        super().__init__()
        height, width = size_of(image_size)
        check_counts(MOST, in_channels=in_channels, codings=codings, channels=channels)
        self.shape, self.codings, self.num_classes = (in_channels, height, width), codings, num_classes
        of_class = 0 if num_classes is None else min(num_classes, codings)  # no more numbers than classes
        self.class_embedding, self.takes = _class_embedding(num_classes, of_class)
        levels = len(fitted_mults(min(height, width), max(height, width)))
        widths = [channels * min(2**level, WIDEST) for level in range(levels)]
        self.last = (widths[-1], height >> (levels - 1), width >> (levels - 1))
        self.from_z = nn.Linear(codings + of_class, widths[-1] * self.last[1] * self.last[2])
        self.norms = nn.ModuleList(group_norm(w, groups, 1e-6) for w in reversed(widths))
        self.up = nn.ModuleList(Upsample(widths[i], out_channels=widths[i - 1]) for i in reversed(range(1, levels)))
        self.conv_out = nn.Conv2d(channels, in_channels, 3, padding=1)

    def decode(self, z: Tensor, y: Tensor | Condition | None = None) -> Tensor:
        """Return images (B, *shape) in (-1, 1).

        Args:
            z: (B, codings), standard normal; y: classes (B,), given exactly when the network has any.
        Raises:
            ValueError: z of another shape, classes that are missing or given to a network without.
        """
        if z.ndim != 2 or z.shape[1] != self.codings:
            raise ValueError(f"z has shape {tuple(z.shape)}; this network takes (B, {self.codings})")
        parts = parts_of(y, self.num_classes)
        if self.class_embedding is not None:
            z = torch.cat([z, self.class_embedding(*parts["classes"]).to(z.dtype)], dim=1)
        h = self.from_z(z).unflatten(1, self.last).contiguous(memory_format=torch.channels_last)
        first, *norms = map(_as_norm, self.norms)
        h = normed(first, h, silu=True)
        for up, norm in zip(self.up, norms, strict=True):
            h = normed(norm, up(h), silu=True)
        return torch.tanh(self.conv_out(h).float())

    forward = decode


class Discriminator(nn.Module):
    r"""The discriminator, from images to one logit each, larger for data; strided convolutions, without norms.

    With phi(x) the features before the last layer, it is conditioned on classes y by projection:

    .. math:: f(x, y) = y^\top V \varphi(x) + \psi(\varphi(x)) \qquad \text{[cGAN (projection)]}

    where y is one-hot, V a learned vector for each class and psi linear; without classes it is psi(phi(x)) alone. A
    row's logit depends on no other row, and it can be differentiated twice, as penalties on its gradient need.

    Args:
        image_size: pixels, one number or (H, W).
        in_channels: channels of the image.
        channels: width of the first level, which is as large as the image; each next one has half the side, rounded
            down, while that is at least 3 pixels, and from the third level on twice the width, up to four times.
        num_classes: classes of its condition; None for none.
    Attributes:
        shape: (in_channels, H, W), of one x.
        takes: the parts of a condition that it takes.
    Raises:
        ValueError: a count out of range.
    Source: cGANs with Projection Discriminator (arXiv 1802.05637), section 3; DCGAN (arXiv 1511.06434).
    """

    def __init__(
        self, image_size: int | Sequence[int], in_channels: int = 1, channels: int = 64, num_classes: int | None = None
    ):
        super().__init__()
        height, width = size_of(image_size)
        check_counts(MOST, in_channels=in_channels, channels=channels)
        self.shape, self.num_classes = (in_channels, height, width), num_classes
        self.class_embedding, self.takes = _class_embedding(num_classes, WIDEST * channels)
        self.convolutions, c = nn.ModuleList([nn.Conv2d(in_channels, channels, 3, padding=1)]), channels
        while min(height, width) // 2 >= SMALLEST:
            wider = channels * min(2 ** (len(self.convolutions) - 1), WIDEST)
            self.convolutions.append(nn.Conv2d(c, wider, 4, stride=2, padding=1))
            c, height, width = wider, height // 2, width // 2
        self.to_features = nn.Linear(c * height * width, WIDEST * channels)
        self.psi = nn.Linear(WIDEST * channels, 1)
        initialised(self)
        if self.class_embedding is not None:
            nn.init.normal_(self.class_embedding.weight, std=(WIDEST * channels) ** -0.5)

    def features(self, x: Tensor) -> Tensor:
        """Return phi(x), (B, 4 * channels).

        Args:
            x: (B, *shape).
        Raises:
            ValueError: x of another shape.
        """
        if tuple(x.shape[1:]) != self.shape:
            raise ValueError(f"x has shape {tuple(x.shape)}; this network takes (B, {', '.join(map(str, self.shape))})")
        h = x
        for convolution in self.convolutions:
            h = F.leaky_relu(convolution(h), SLOPE)
        return F.leaky_relu(self.to_features(h.flatten(1)), SLOPE)

    def forward(self, x: Tensor, y: Tensor | Condition | None = None) -> Tensor:
        """Return logits (B,).

        Args:
            x: (B, *shape); y: classes (B,), given exactly when the network has any.
        Raises:
            ValueError: x of another shape, classes that are missing or given to a network without.
        """
        parts = parts_of(y, self.num_classes)
        phi = self.features(x).float()
        f = self.psi(phi)[:, 0]
        if self.class_embedding is not None:
            f = (self.class_embedding(*parts["classes"]) * phi).sum(1) + f
        return f.float()


def _as_norm(layer: nn.Module) -> nn.GroupNorm:
    """Return a layer of a list of group norms, typed as one, as torch's containers are untyped."""
    assert isinstance(layer, nn.GroupNorm)
    return layer


def _class_embedding(num_classes: int | None, out: int) -> tuple[ClassEmbedding | None, tuple[str, ...]]:
    """Return the embedding of classes, and the parts of a condition that a network with it takes."""
    if num_classes is None:
        return None, ()
    check_counts(MOST, num_classes=num_classes)
    return ClassEmbedding(num_classes, out), ("classes",)
