"""The U-Net of Ho et al. (arXiv 2006.11239, appendix B)."""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from models import kernels
from models.embeddings import (
    ClassEmbedding,
    Condition,
    LabelEmbeddings,
    TimeEmbedding,
    augment_of,
    image_like,
    parts_of,
)
from models.layers import (
    ATTENTION_KINDS,
    PADDINGS,
    Attention,
    Downsample,
    ResidualBlock,
    Upsample,
    group_norm,
    normed,
    one_of,
    zeroed,
)
from models.magnitude import (
    MPAttention,
    MPClassEmbedding,
    MPConv2d,
    MPLabelEmbeddings,
    MPResidualBlock,
    MPTimeEmbedding,
    mp_cat,
    mp_silu,
    mp_sum,
)

MOST, MOST_BLOCKS = 2**20, 100  # of any count: beyond it are slips, which would take all memory or no end of time
# Of networks that are fitted to a size: pixels of a side, at least and at most; of the last level's shorter side, at
# least, and of its whole, at most; of a whole with attention, at most; and the channel_mults by the number of levels.
FITTED, DEEPEST, LARGEST_DEEPEST, ATTENDED = (16, 128), 8, 32 * 32, 16 * 16
WIDTHS = {2: (1, 2), 3: (1, 2, 3), 4: (1, 2, 3, 4), 5: (1, 1, 2, 3, 4)}
LEAST_EPS = 1e-12  # float32 has nothing left of less beside a variance, and divides a constant group by 0


class Stage(nn.Module):
    """One resolution: residual blocks, each followed by attention or nothing, and the way to the next if any."""

    resample: nn.Module | None

    def __init__(self) -> None:
        super().__init__()
        self.residual, self.attention, self.resample = nn.ModuleList(), nn.ModuleList(), None


class UNet(nn.Module):
    """Residual blocks on a ladder of resolutions, with skips from every encoder block and every downsampling.

    Args:
        image_size: pixels, one number or (H, W); each divisible by 2 ** (levels - 1).
        in_channels: channels of the image.
        out_channels: channels of the output; None for as many as the image has.
        channels: width of the first level; the time embedding has four times as many.
        channel_mults: width of each level in units of `channels`; one entry a level, each level has half the resolution
            of the one before. None for those that fit image_size: `fitted_channel_mults`.
        blocks: residual blocks a level on the way down (one more on the way up), one number or one a level.
        attention_resolutions: resolutions in pixels (the longer side) whose residual blocks are followed by attention;
            [] for none; None for those that fit image_size: `fitted_attention_resolutions`.
        attention: "full" or "linear".
        heads: attention heads; head_channels: or the width of one head, which takes precedence.
        middle_attention: attention between the two middle blocks.
        dropout: inside residual blocks, in [0, 1).
        groups: groups of every group norm; must divide every width.
        num_classes: classes that may be given as y; of several labels at once those of each, such as [46, 11]; None
            for an unconditional network.
        patch: side of the squares of pixels that are folded into channels before the first level and unfolded after
            the last; 1 is the network of Ho et al., with 2 nothing is computed at full resolution and the resolutions
            start at half the image's size.
        norm_eps, downsample_padding, flip_sin_to_cos, freq_shift: details in which published weights differ.
        time_offset: added to t; -1 for weights that were trained with t counted from 0.
        checkpointing: in training, forget what is inside of residual blocks, attention and upsampling, and compute it
            once more in the backward pass: less memory, more time, the same output and gradients.
        drop: share of conditions that training nulls, in [0, 1). More than 0 gives the network a learned null for each
            part that it takes: a vector in place of the class, a constant a channel in place of the image.
        condition_channels: channels C' of an image that is given as part of the condition and concatenated to x_t; 0
            for none.
        class_channels: length of a learned vector for each class that is spread over the image and concatenated to
            x_t, as so many further channels, in place of being added to the time embedding; 0 adds it there.
        augment_dim: how many numbers may be told of what was done to an image in training, see
            `ddpm.data.non_leaking`; they are added to the time embedding by a linear layer without bias, 0 at first.
            Without them, as in sampling, nothing is added. 0 for none.
        magnitude_preserving: layers that keep the magnitude of what goes through them, of `models.magnitude`, with
            weights that the trainer renormalises after each step (EDM2, configuration G, with this ladder of levels).
            A learned gain, 0 at first, scales the output; groups and norm_eps are without effect. x_t of about unit
            variance is best: diffusion.preconditioning=edm makes it so. Learning rates are larger, 1e-2 or more.
    Attributes:
        takes: the parts of a condition that the network takes, of "classes" and "image", in this order.
    Raises:
        ValueError: a size, width or resolution that does not fit, with the nearest legal values.
    """

    null_image: nn.Parameter | None
    gain_out: nn.Parameter | None
    frozen = staticmethod(kernels.frozen)  # a context in which the weights stay as they are

    def __init__(
        self,
        image_size: int | Sequence[int],
        in_channels: int = 3,
        out_channels: int | None = None,
        channels: int = 128,
        channel_mults: Sequence[int] | None = (1, 2, 2, 2),
        blocks: int | Sequence[int] = 2,
        attention_resolutions: Sequence[int] | None = (16,),
        attention: str = "full",
        heads: int | None = 1,
        head_channels: int | None = None,
        middle_attention: bool = True,
        dropout: float = 0.1,
        groups: int = 32,
        num_classes: int | Sequence[int] | None = None,
        patch: int = 1,
        norm_eps: float = 1e-6,
        downsample_padding: int = 1,
        flip_sin_to_cos: bool = False,
        freq_shift: float = 1,
        time_offset: int = 0,
        checkpointing: bool = False,
        drop: float = 0.0,
        condition_channels: int = 0,
        class_channels: int = 0,
        magnitude_preserving: bool = False,
        augment_dim: int = 0,
    ):
        super().__init__()
        image_size = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
        one_of("attention", attention, ATTENTION_KINDS)  # also where no such layer is built
        one_of("downsample_padding", downsample_padding, PADDINGS)
        _check_size(image_size, patch)
        if channel_mults is None:
            channel_mults = fitted_channel_mults(image_size, patch)
        levels = len(channel_mults)
        if attention_resolutions is None:
            attention_resolutions = fitted_attention_resolutions(image_size, levels, patch)
        blocks = [blocks] * levels if isinstance(blocks, int) else list(blocks)
        out_channels = in_channels if out_channels is None else out_channels
        if num_classes is not None and not isinstance(num_classes, int):  # one label is one, however it is written
            num_classes = num_classes[0] if len(num_classes) == 1 else tuple(num_classes)
        _check(
            image_size,
            in_channels,
            out_channels,
            channels,
            channel_mults,
            blocks,
            attention_resolutions,
            dropout,
            num_classes,
            patch,
            norm_eps,
            drop,
            condition_channels,
            class_channels,
            augment_dim,
        )
        self.image_size, self.in_channels, self.out_channels = image_size, in_channels, out_channels
        self.num_classes, self.patch = num_classes, patch
        self.freq_shift, self.time_offset, self.checkpointing = freq_shift, time_offset, checkpointing
        self.drop, self.condition_channels, self.class_channels = drop, condition_channels, class_channels
        self.magnitude_preserving, self.augment_dim = magnitude_preserving, augment_dim
        self._sum: Callable[[Tensor, Tensor], Tensor] = mp_sum if magnitude_preserving else torch.add
        self._join: Callable[[Tensor, Tensor], Tensor] = mp_cat if magnitude_preserving else _cat
        self._silu: Callable[[Tensor], Tensor] = mp_silu if magnitude_preserving else F.silu
        given = {"classes": num_classes is not None, "image": condition_channels > 0}
        self.takes: tuple[str, ...] = tuple(name for name, taken in given.items() if taken)

        embedding = 4 * channels
        times: Callable[..., nn.Sequential] = MPTimeEmbedding if magnitude_preserving else TimeEmbedding
        self.time_embedding = times(channels, embedding, flip_sin_to_cos, freq_shift)
        self.class_embedding: nn.Module | None = None
        if num_classes is not None:
            kinds: tuple[Callable[..., nn.Module], ...] = ClassEmbedding, LabelEmbeddings
            if magnitude_preserving:
                kinds = MPClassEmbedding, MPLabelEmbeddings
            kind = kinds[0] if isinstance(num_classes, int) else kinds[1]
            self.class_embedding = kind(num_classes, class_channels or embedding, drop > 0)
        conv: type[nn.Conv2d] = MPConv2d if magnitude_preserving else nn.Conv2d

        def residual(c_in: int, c_out: int, encoder: bool = True) -> ResidualBlock | MPResidualBlock:
            if magnitude_preserving:
                return MPResidualBlock(c_in, c_out, embedding, dropout, encoder)
            return ResidualBlock(c_in, c_out, embedding, dropout, groups, norm_eps)

        def attend(c: int, resolution: int | None = None) -> nn.Module:
            if resolution is not None and resolution not in attention_resolutions:
                return nn.Identity()
            if magnitude_preserving:
                return MPAttention(c, heads, head_channels, attention)
            return Attention(c, heads, head_channels, attention, groups, norm_eps)

        resolutions = [max(image_size) // patch >> level for level in range(levels)]
        widths = [channels * m for m in channel_mults]

        beside = class_channels + condition_channels
        ones = int(magnitude_preserving)  # a channel of them, in place of biases
        self.conv_in = conv((in_channels + beside) * patch**2 + ones, channels, 3, padding=1)
        c, skips = channels, [channels]
        self.down = nn.ModuleList()
        for level, (width, resolution) in enumerate(zip(widths, resolutions, strict=True)):
            stage = Stage()
            for _ in range(blocks[level]):
                stage.residual.append(residual(c, width))
                stage.attention.append(attend(width, resolution))
                c = width
                skips.append(c)
            if level < levels - 1:
                stage.resample = Downsample(c, downsample_padding, conv)
                skips.append(c)
            self.down.append(stage)

        self.middle_1 = residual(c, c)
        self.middle_attention = attend(c) if middle_attention else nn.Identity()
        self.middle_2 = residual(c, c)

        self.up = nn.ModuleList()
        for level in reversed(range(levels)):
            stage = Stage()
            for _ in range(blocks[level] + 1):
                stage.residual.append(residual(c + skips.pop(), widths[level], encoder=False))
                stage.attention.append(attend(widths[level], resolutions[level]))
                c = widths[level]
            stage.resample = Upsample(c, conv) if level > 0 else None
            self.up.append(stage)

        self.norm_out = None if magnitude_preserving else group_norm(c, groups, norm_eps)
        self.conv_out = conv(c, out_channels * patch**2, 3, padding=1)
        if not magnitude_preserving:
            zeroed(self.conv_out)
        self.register_parameter("gain_out", nn.Parameter(torch.zeros(())) if magnitude_preserving else None)

        self.augment_embedding = zeroed(nn.Linear(augment_dim, embedding, bias=False)) if augment_dim else None

        null = drop > 0 and condition_channels > 0
        self.register_parameter("null_image", nn.Parameter(torch.zeros(condition_channels)) if null else None)

    @property
    def shape(self) -> tuple[int, ...]:
        """(in_channels, H, W): of one x_t."""
        return self.in_channels, *self.image_size

    def forward(self, x_t: Tensor, t: Tensor, y: Tensor | Condition | None = None) -> Tensor:
        """The network's output at time t.

        Args:
            x_t: (B, in_channels, H, W).
            t: (B,), integer or real, in 0..T.
            y: classes, integers (B,) or, of K labels, (B, K), if that is all that the network takes; or a condition
                with exactly the parts that it takes, of classes and an image (B, condition_channels, H, W), and with
                augment (B, augment_dim) where something was done to the images. The image takes the type of x_t. Rows
                that are null have the learned null instead; with `drop` = 0 there is none.
        Returns:
            (B, out_channels, H, W).
        Raises:
            ValueError: x_t or an image of another shape than the network's, a part of a condition given to one that
                does not take it (or the reverse), null rows given to one without a learned null.
        """
        h, emb, skips = self.encode(x_t, t, y)
        for stage in self.up:
            assert isinstance(stage, Stage)
            for residual, attention in zip(stage.residual, stage.attention, strict=True):
                h = self._run(partial(self._block, residual, attention), emb, h, skips.pop())
            if stage.resample is not None:
                h = self._run(stage.resample, h)

        if self.norm_out is None:
            h = self.conv_out(h, self.gain_out)
        else:
            h = self.conv_out(normed(self.norm_out, h, silu=True))
        return rearrange(h, "b (c p q) h w -> b c (h p) (w q)", p=self.patch, q=self.patch)

    def encode(
        self, x_t: Tensor, t: Tensor, y: Tensor | Condition | None = None
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        """The way down and the middle; arguments and errors as in `forward`.

        Returns:
            The features of the last level, (B, C', H', W'); the embedding of t and what is added to it, (B, E); the
            features that the way up takes besides, the last ones last.
        """
        if tuple(x_t.shape[1:]) != self.shape:
            raise ValueError(
                f"x_t has shape {tuple(x_t.shape)}; this network takes (B, {self.in_channels}, "
                f"{self.image_size[0]}, {self.image_size[1]})"
            )
        parts = parts_of(y, self.num_classes, self.condition_channels, self.drop)
        emb = self.time_embedding(t + self.time_offset)
        beside = [x_t]
        if self.class_embedding is not None:
            of_class = self.class_embedding(*parts["classes"])
            if self.class_channels:
                beside.append(of_class.to(x_t.dtype)[:, :, None, None].expand(-1, -1, *self.image_size))
            else:
                emb = self._sum(emb, of_class)
        augment = augment_of(y, self.augment_dim)
        if augment is not None and self.augment_embedding is not None:
            emb = emb + self.augment_embedding(augment)
        emb = self._silu(emb)
        if "image" in parts:
            beside.append(image_like(x_t, self.condition_channels, *parts["image"], self.null_image))
        x_t = torch.cat(beside, dim=1) if len(beside) > 1 else x_t

        h = rearrange(x_t, "b c (h p) (w q) -> b (c p q) h w", p=self.patch, q=self.patch)
        if self.magnitude_preserving:
            h = torch.cat([h, torch.ones_like(h[:, :1])], dim=1)
        h = self.conv_in(h)
        skips = [h]
        for stage in self.down:
            assert isinstance(stage, Stage)
            for residual, attention in zip(stage.residual, stage.attention, strict=True):
                h = self._run(partial(self._block, residual, attention), emb, h)
                skips.append(h)
            if stage.resample is not None:
                h = stage.resample(h)
                skips.append(h)

        h = self._run(partial(self._block, self.middle_1, self.middle_attention), emb, h)
        return self._run(self.middle_2, h, emb), emb, skips

    def _block(self, residual: nn.Module, attention: nn.Module, emb: Tensor, *h: Tensor) -> Tensor:
        """A residual block over the channels of h, or of two, and what follows it; (B, E), (B, C, H, W) -> the same."""
        return attention(residual(h[0] if len(h) == 1 else self._join(*h), emb))

    def _run(self, layer: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        """The layer's output, for whose backward pass, with checkpointing, only the inputs are kept."""
        if self.checkpointing and self.training and torch.is_grad_enabled():
            return checkpoint(layer, *inputs, use_reentrant=False)
        return layer(*inputs)


def _cat(a: Tensor, b: Tensor) -> Tensor:
    """The channels of both."""
    return torch.cat([a, b], dim=1)


def fitted_channel_mults(image_size: Sequence[int], patch: int = 1) -> tuple[int, ...]:
    """Levels and their widths for a size: the shorter side is halved until it has 8 to 15 pixels, if both sides can be.

    So end the networks of Dhariwal and Nichol (arXiv 2105.05233) for 64 and 128 pixels, whose widths these are; fewer
    levels have the first of them. Runs store None in place of what this gives, which must therefore stay so.

    Args:
        image_size: (H, W) in pixels: of squares, even ones up to 64 and multiples of 4 beyond; times patch.
        patch: as in `UNet`; what is halved is H / patch and W / patch.

    Returns: channel_mults: 2 levels from 16 pixels on, 3 from 32, 4 from 64, 5 at 128, and fewer where a half would not
        be whole.

    Raises: ValueError, with the nearest sizes that are allowed, for sides outside 16..128 pixels, times patch, that
        cannot be halved, or only to more than 32 x 32 pixels.
    """
    height, width = image_size
    levels = _fitted_levels(height, width, patch)
    if levels == 0:
        least, most = FITTED
        rows, columns = ([min(max(n // patch, least), most) + i for i in range(-4, 5)] for n in image_size)
        sizes = [(h * patch, w * patch) for h in rows for w in columns if height != width or h == w]
        legal = [size for size in sizes if _fitted_levels(*size, patch)]
        near = sorted(legal, key=lambda size: abs(size[0] - height) + abs(size[1] - width))[:2]
        raise ValueError(
            f"image_size = {height}x{width} with patch = {patch}: a network is fitted to sides of {least * patch} to "
            f"{most * patch} pixels that can be halved to 32x32 or less; nearest legal sizes: "
            f"{', '.join(f'{h}x{w}' for h, w in near)}; for others set channel_mults"
        )
    return WIDTHS[levels]


def _fitted_levels(height: int, width: int, patch: int) -> int:
    """The levels that are fitted to a size; 0 where none are."""
    least, most = (side * patch for side in FITTED)
    if min(height, width) < least or max(height, width) > most:
        return 0
    for levels in range((min(height, width) // patch // DEEPEST).bit_length(), 1, -1):
        unit = patch * 2 ** (levels - 1)
        if height % unit == width % unit == 0 and height * width <= LARGEST_DEEPEST * unit**2:
            return levels
    return 0


def fitted_attention_resolutions(image_size: Sequence[int], levels: int, patch: int = 1) -> tuple[int, ...]:
    """The resolutions whose feature maps have at most 16 x 16 pixels, where full attention is cheap.

    Args:
        image_size: (H, W) in pixels.
        levels: of the network.
        patch: as in `UNet`.

    Returns: the longer sides of those feature maps in pixels, from the largest on; none if all are larger.
    """
    sides = [[n // patch >> level for n in image_size] for level in range(levels)]
    return tuple(max(height, width) for height, width in sides if height * width <= ATTENDED)


def _check_size(size: Sequence[int], patch: int) -> None:
    """Raise ValueError for a size or a patch that no network has."""
    if isinstance(patch, bool) or not isinstance(patch, int) or not 1 <= patch <= MOST:
        raise ValueError(f"patch = {patch!r} must be an integer >= 1, and at most {MOST:,}")
    if len(size) != 2 or any(isinstance(n, bool) or not isinstance(n, int) or not 1 <= n <= MOST for n in size):
        raise ValueError(f"image_size = {size} must be one integer >= 1, or two (H, W), and at most {MOST:,}")


def _check(
    size: Sequence[int],
    in_channels: int,
    out_channels: int,
    channels: int,
    channel_mults: Sequence[int],
    blocks: Sequence[int],
    attention_resolutions: Sequence[int],
    dropout: float,
    num_classes: int | Sequence[int] | None,
    patch: int,
    norm_eps: float,
    drop: float,
    condition_channels: int,
    class_channels: int,
    augment_dim: int,
) -> None:
    """Raise ValueError for arguments of the U-Net that do not fit together."""
    levels = len(channel_mults)
    if levels == 0:
        raise ValueError("channel_mults is empty: give one multiple of `channels` a level, such as [1, 2, 2]")
    positive = {"in_channels": in_channels, "out_channels": out_channels, "channels": channels}
    positive |= {f"channel_mults[{i}]": m for i, m in enumerate(channel_mults)}
    positive |= {f"blocks[{i}]": b for i, b in enumerate(blocks)}
    if isinstance(num_classes, Sequence):
        if not num_classes:
            raise ValueError("num_classes is empty: give the number of classes, of several labels a list, or null")
        positive |= {f"num_classes[{i}]": n for i, n in enumerate(num_classes)}
    elif num_classes is not None:
        positive["num_classes"] = num_classes
    for name, value in positive.items():
        most = MOST_BLOCKS if name.startswith("blocks") else MOST
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
            raise ValueError(f"{name} = {value!r} must be an integer >= 1, and at most {most:,}")
    if channels * max(channel_mults) > MOST:
        raise ValueError(f"channel_mults of {max(channel_mults)} times channels = {channels} is more than {MOST:,}")
    if len(blocks) != levels:
        raise ValueError(f"blocks has {len(blocks)} entries, but channel_mults has {levels} levels")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout = {dropout:g} must lie in [0, 1)")
    if not 0 <= drop < 1:
        raise ValueError(f"drop = {drop:g} must lie in [0, 1)")
    beside = {"condition_channels": condition_channels, "class_channels": class_channels, "augment_dim": augment_dim}
    for name, value in beside.items():
        if type(value) is not int or not 0 <= value <= MOST:
            raise ValueError(f"{name} = {value!r} must be an integer >= 0, and at most {MOST:,}")
    if class_channels and num_classes is None:
        raise ValueError(
            f"class_channels = {class_channels} are those of classes: set num_classes, or class_channels = 0"
        )
    if not LEAST_EPS <= norm_eps <= 1:
        raise ValueError(f"norm_eps = {norm_eps:g} must lie in [{LEAST_EPS:g}, 1]")
    unit = patch * 2 ** (levels - 1)
    for n in size:
        if n % unit:
            near = sorted({max(unit, n // unit * unit), (n // unit + 1) * unit})
            raise ValueError(
                f"image_size = {size[0]}x{size[1]} with {levels} levels and patch = {patch}: {n} is not divisible by "
                f"{unit}; nearest legal sizes: {', '.join(map(str, near))}"
            )
    occurring = [max(size) // patch >> level for level in range(levels)]
    for resolution in attention_resolutions:
        if resolution not in occurring:
            raise ValueError(
                f"attention_resolutions has {resolution}, which never occurs; a {size[0]}x{size[1]} image with "
                f"{levels} levels and patch = {patch} has the resolutions {', '.join(map(str, occurring))}"
            )
