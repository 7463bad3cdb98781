"""A discriminator of patches, which classifies each part of an image as real or generated."""

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F

from models.embeddings import Condition, parts_of
from models.layers import check_counts, group_norm, size_of

MOST, MOST_LAYERS = 2**20, 10
PUBLISHED = 3  # layers, for 256 pixels
SLOPE = 0.2  # of every leaky ReLU below 0


class PatchDiscriminator(nn.Module):
    r"""PatchGAN: strided convolutions whose every output depends on one patch of the image.

    4x4 convolutions of stride 2, `layers` of them, then two of stride 1. An output's patch has a side of

    .. math:: r = 1 + 3 (1 + 2 + \cdots + 2^{L-1}) + 2 \cdot 3 \cdot 2^L = 9 \cdot 2^L - 2
        \qquad \text{[PatchGAN (patch)]}

    pixels with L layers: 16, 34, 70. The published networks have batch normalisation. Here a row's outputs depend on no
    other row, so that neither micro-batches nor ranks change a result: the norms are group norms, which still compare a
    patch with the rest of its image, or there are none, and then a patch is judged by itself.

    Args:
        in_channels: channels of the image.
        channels: width of the first layer; each further one has twice as many, up to eight times.
        layers: L. None for the most, of 1 to 3, with a patch no larger than the image's shorter side, and 1 for the
            smallest; image_size must be given then.
        groups: of the group norms; None for no norms.
        image_size: pixels, one number or (H, W), of the images that it judges; None leaves the size open.
    Attributes:
        shape: (in_channels, H, W), of one x; None where the size is open.
        patch: r, pixels of a side.
    Raises:
        ValueError: a count out of range, layers that a size is too small for, with how many it allows.
    Source: Image-to-Image Translation with Conditional Adversarial Networks (arXiv 1611.07004), section 3.2.2 and
        appendix 6.1.2; of autoencoders, arXiv 2112.10752.
    """

    num_classes, takes = None, ()
    shape: tuple[int, int, int] | None

    def __init__(
        self,
        in_channels: int = 3,
        channels: int = 64,
        layers: int | None = PUBLISHED,
        groups: int | None = 8,
        image_size: int | Sequence[int] | None = None,
    ):
        super().__init__()
        check_counts(MOST, in_channels=in_channels, channels=channels)
        size = None if image_size is None else size_of(image_size)
        if layers is None and size is None:
            raise ValueError("layers = None is fitted to an image_size, which is missing; or set layers")
        layers = fitted_layers(min(size)) if layers is None and size is not None else layers
        assert layers is not None
        check_counts(MOST_LAYERS, layers=layers)
        self.in_channels, self.layers, self.patch = in_channels, layers, 9 * 2**layers - 2
        self.shape = None if size is None else (in_channels, *size)
        if size is not None:
            _check_size(size, layers)

        widths = [channels * min(2**i, 8) for i in range(layers + 1)]
        convolutions: list[nn.Module] = [nn.Conv2d(in_channels, channels, 4, stride=2, padding=1)]
        norms: list[nn.Module] = [nn.Identity()]  # none after the first
        for i, width in enumerate(widths[1:], start=1):
            stride = 2 if i < layers else 1
            convolutions.append(nn.Conv2d(widths[i - 1], width, 4, stride, padding=1, bias=groups is None))
            norms.append(nn.Identity() if groups is None else group_norm(width, groups, 1e-6))
        self.convolutions, self.norms = nn.ModuleList(convolutions), nn.ModuleList(norms)
        self.conv_out = nn.Conv2d(widths[-1], 1, 4, padding=1)
        initialised(self)

    def forward(self, x: Tensor, y: Tensor | Condition | None = None) -> Tensor:
        """Return logits (B, 1, h, w), larger for data: one a patch, with h = H // 2 ** layers - 2, and w likewise.

        Args:
            x: (B, in_channels, H, W); y: None, as no class is taken.
        Raises:
            ValueError: x of another shape, or too small; classes.
        """
        parts_of(y, None)
        taken = (self.in_channels, "H", "W") if self.shape is None else self.shape
        if x.ndim != 4 or tuple(x.shape[1:]) != (self.shape or (self.in_channels, *x.shape[2:])):
            raise ValueError(f"x has shape {tuple(x.shape)}; this network takes (B, {', '.join(map(str, taken))})")
        _check_size(x.shape[2:], self.layers)
        h = x
        for convolution, norm in zip(self.convolutions, self.norms, strict=True):
            h = F.leaky_relu(norm(convolution(h)), SLOPE)
        return self.conv_out(h).float()


def fitted_layers(shorter: int) -> int:
    """Return the most of 1 to 3 layers whose patch is no larger than `shorter` pixels; 1 if none is."""
    return max([layers for layers in range(1, PUBLISHED + 1) if 9 * 2**layers - 2 <= shorter], default=1)


def initialised(network: nn.Module) -> None:
    """Initialise weights so that a leaky ReLU preserves the scale of its inputs (He et al., arXiv 1502.01852).

    Without norms nothing else does; the last layer, too, so that logits are of order 1 at first. Biases are 0.
    """
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(layer.weight, a=SLOPE)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


def _check_size(size: Sequence[int], layers: int) -> None:
    """Raise ValueError for an image that is smaller than a patch allows."""
    if (shorter := min(size)) // 2**layers < 3:
        most = (shorter // 3).bit_length() - 1
        least = f"images of at least {3 * 2 ** (layers if most > 0 else 1)} pixels a side"
        raise ValueError(
            f"layers = {layers} leaves nothing of an image of {size[0]}x{size[1]} pixels; allowed: "
            + (f"layers of at most {most}, or {least}" if most > 0 else least)
        )
