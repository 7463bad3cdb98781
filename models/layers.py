"""Layers of the U-Net. Shapes are (B, C, H, W), or (B, E) for the embedding of the time."""

from collections.abc import Sequence
from typing import TypeVar

from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from models import kernels

ATTENTION_KINDS, PADDINGS = ("full", "linear"), (0, 1)


def one_of(name: str, value: object, allowed: tuple[object, ...]) -> None:
    """Raise ValueError, with the allowed values, unless `value` is one of them."""
    if value not in allowed:
        raise ValueError(f"{name} = {value!r} is not known; allowed: {', '.join(map(str, allowed))}")


def check_counts(most: int, **counts: int) -> None:
    """Raise ValueError for a count that is no integer in 1..most."""
    for name, value in counts.items():
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
            raise ValueError(f"{name} = {value!r} must be an integer >= 1, and at most {most:,}")


MOST_PIXELS = 2**20  # of a side


def size_of(image_size: int | Sequence[int], factor: int = 1, because: str = "") -> tuple[int, int]:
    """Return (H, W) of a size in pixels.

    Args:
        image_size: one number, or (H, W).
        factor: a number that must divide both.
        because: what requires the factor, in words.
    Raises:
        ValueError: invalid numbers; sides that the factor does not divide, with the nearest that it does.
    """
    size = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
    if len(size) != 2:
        raise ValueError(f"image_size = {size} must be one integer >= 1, or two (H, W)")
    check_counts(MOST_PIXELS, **{"image_size[0]": size[0], "image_size[1]": size[1]})
    for n in size:
        if n % factor:
            near = sorted({max(factor, n // factor * factor), (n // factor + 1) * factor})
            raise ValueError(
                f"image_size = {size[0]}x{size[1]} with {because}: {n} is not divisible by {factor}; "
                f"nearest legal sizes: {', '.join(map(str, near))}"
            )
    return size[0], size[1]


Layer = TypeVar("Layer", bound=nn.Module)


def zeroed(layer: Layer) -> Layer:
    """Return the layer with its parameters set to zero, so that a residual branch starts as the identity."""
    for p in layer.parameters():
        nn.init.zeros_(p)
    return layer


def group_norm(channels: int, groups: int, eps: float) -> nn.GroupNorm:
    """Return a group norm; ValueError if the groups do not divide the channels, with the nearest numbers that do."""
    if groups < 1 or channels % groups:
        legal = [g for g in range(1, channels + 1) if channels % g == 0]
        near = sorted(sorted(legal, key=lambda g: abs(g - groups))[:3])
        raise ValueError(
            f"groups = {groups} does not divide {channels} channels of a group norm; nearest that do: "
            f"{', '.join(map(str, near))}"
        )
    return nn.GroupNorm(groups, channels, eps)


def normed(norm: nn.GroupNorm, x: Tensor, silu: bool = False) -> Tensor:
    """Apply a group norm, followed by SiLU if `silu`; (B, C, H, W) -> (B, C, H, W)."""
    return kernels.group_norm(x, norm.num_groups, norm.weight, norm.bias, norm.eps, silu)


def convolved(conv: nn.Conv2d, x: Tensor, shift: Tensor | None = None) -> Tensor:
    """Apply a 3x3 convolution with padding 1, plus shift (B, C') if given; (B, C, H, W) -> (B, C', H, W)."""
    if conv.bias is None:  # those of `models.magnitude`, which take no shift
        return conv(x)
    h = kernels.convolution(x, conv.weight, conv.bias, shift)
    low_rank = getattr(conv, "low_rank", None)  # of `models.adapters`
    return h if low_rank is None else h + low_rank(x)


def heads_of(channels: int, heads: int | None, head_channels: int | None) -> int:
    """Return the number of heads of attention.

    Args:
        heads: their number; None together with head_channels, the width of one.
    Raises:
        ValueError: heads that do not divide the channels, with the nearest numbers that do.
    """
    name, value = ("head_channels", head_channels) if head_channels is not None else ("heads", heads)
    if not isinstance(value, int) or value < 1 or channels % value:
        legal = [n for n in range(1, channels + 1) if channels % n == 0]
        near = sorted(sorted(legal, key=lambda n: abs(n - (value or 1)))[:3])
        raise ValueError(
            f"{name} = {value} does not divide the {channels} channels of an attention block; nearest that do: "
            f"{', '.join(map(str, near))}"
        )
    return channels // value if head_channels is not None else value


def attended(q: Tensor, k: Tensor, v: Tensor, heads: int, kind: str) -> Tensor:
    """Return attention of a kind, see `Attention`: q, k and v, each (B, n, heads * d) -> (B, n, heads * d)."""
    if kind == "full":
        return kernels.attention(q, k, v, heads)
    q, k, v = (rearrange(z, "b n (e d) -> b e n d", e=heads) for z in (q, k, v))
    return rearrange(q.softmax(dim=-1) @ (k.softmax(dim=-2).mT @ v), "b e n d -> b n (e d)")


class ResidualBlock(nn.Module):
    r"""Group norm - SiLU - 3x3 convolution, twice, the embedded time added between them; the input added at the end.

    With `scale_shift` the second norm is conditioned on the time instead, by a scale and a shift of each channel:

    .. math:: \operatorname{AdaGN}(h, y) = (1 + y_s) \operatorname{GroupNorm}(h) + y_b \qquad \text{[ADM (AdaGN)]}

    Args:
        in_channels, out_channels: a 1x1 convolution maps the input where they differ.
        embedding: size E of the time embedding; None for a block without one.
        scale_shift: see above; without effect on a block without embedding.
        resample: a layer that resamples both branches, after the first SiLU; None for none.
    Source of both: Diffusion Models Beat GANs on Image Synthesis (arXiv 2105.05233), section 3.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        embedding: int | None,
        dropout: float,
        groups: int,
        norm_eps: float,
        scale_shift: bool = False,
        resample: nn.Module | None = None,
    ):
        super().__init__()
        self.scale_shift, self.resample = scale_shift, resample
        self.norm_1 = group_norm(in_channels, groups, norm_eps)
        self.conv_1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.embedding = None if embedding is None else nn.Linear(embedding, (1 + scale_shift) * out_channels)
        self.norm_2 = group_norm(out_channels, groups, norm_eps)
        self.dropout = nn.Dropout(dropout)
        self.conv_2 = zeroed(nn.Conv2d(out_channels, out_channels, 3, padding=1))
        self.shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()

    def forward(self, x: Tensor, emb: Tensor | None = None) -> Tensor:
        """x (B, C, H, W), emb (B, E), after SiLU -> (B, C', H, W), or as resampled."""
        shift = None if self.embedding is None else self.embedding(emb)
        h = normed(self.norm_1, x, silu=True)
        if self.resample is not None:
            h, x = self.resample(h), self.resample(x)
        if shift is not None and self.scale_shift:
            h = self._scaled(convolved(self.conv_1, h), shift)
        else:
            h = normed(self.norm_2, convolved(self.conv_1, h, shift), silu=True)
        return self.shortcut(x) + convolved(self.conv_2, self.dropout(h))

    def _scaled(self, h: Tensor, modulation: Tensor) -> Tensor:
        """Return SiLU of the second norm, scaled and shifted by (B, 2 C'); (B, C', H, W) -> the same."""
        scale, shift = rearrange(modulation, "b (two c) -> two b c 1 1", two=2)
        h = normed(self.norm_2, h)
        return F.silu((1 + scale.to(h.dtype)) * h + shift.to(h.dtype))


class Attention(nn.Module):
    """Self-attention over the pixels of a feature map, with the input added.

    Args:
        heads: number of heads; None together with head_channels, the width of one.
        kind: "full": softmax(q k^T / sqrt(d)) v, quadratic in the pixels; "linear": softmax(q) (softmax(k)^T v), with
            the softmax of q over the width of the head and that of k over the pixels, linear in the pixels (Efficient
            Attention, arXiv 1812.01243).
    Raises:
        ValueError: heads that do not divide the channels, with the nearest numbers that do; an unknown kind.
    """

    def __init__(
        self, channels: int, heads: int | None, head_channels: int | None, kind: str, groups: int, norm_eps: float
    ):
        super().__init__()
        one_of("attention", kind, ATTENTION_KINDS)
        self.heads, self.kind = heads_of(channels, heads, head_channels), kind
        self.norm = group_norm(channels, groups, norm_eps)
        self.to_q, self.to_k, self.to_v = (nn.Linear(channels, channels) for _ in range(3))
        self.to_out = zeroed(nn.Linear(channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        height = x.shape[2]
        h = rearrange(normed(self.norm, x), "b c h w -> b (h w) c")
        q, k, v = self.to_q(h), self.to_k(h), self.to_v(h)
        h = attended(q, k, v, self.heads, self.kind)
        return x + rearrange(self.to_out(h), "b (h w) c -> b c h w", h=height)


class Downsample(nn.Module):
    """Downsampling: half the resolution by a 3x3 convolution of stride 2.

    Args:
        padding: 1 pads all sides; 0 pads the right and the bottom only.
        conv: the kind of convolution.
    """

    def __init__(self, channels: int, padding: int, conv: type[nn.Conv2d] = nn.Conv2d):
        super().__init__()
        one_of("downsample_padding", padding, PADDINGS)
        self.padding = padding
        self.conv = conv(channels, channels, 3, stride=2, padding=padding)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H/2, W/2); with padding 1 a half is rounded up."""
        return self.conv(x if self.padding else F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Upsampling: twice the resolution by nearest neighbour, then a 3x3 convolution.

    Args:
        out_channels: C'; None for as many as the input.
    """

    def __init__(self, channels: int, conv: type[nn.Conv2d] = nn.Conv2d, out_channels: int | None = None):
        super().__init__()
        self.conv = conv(channels, channels if out_channels is None else out_channels, 3, padding=1)

    def forward(self, x: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        """(B, C, H, W) -> (B, C', 2H, 2W), or to a size (H', W')."""
        if size is not None:
            return convolved(self.conv, F.interpolate(x, size=size, mode="nearest"))
        return convolved(self.conv, F.interpolate(x, scale_factor=2.0, mode="nearest"))
