"""The U-Net of Ho et al. (arXiv 2006.11239, appendix B), with the options of later networks."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

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
    encoded,
    image_like,
    parts_of,
    tokens_like,
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
from models.text import TextEncoder
from models.transformer import SpatialTransformer
from models.unet_checks import (
    RESAMPLES,
    check,
    check_size,
    check_together,
    fitted_attention_resolutions,
    fitted_channel_mults,
    per_level,
    resolutions_of,
)


class Conditioning(NamedTuple):
    """The inputs of blocks: the embedding of t and of the condition (B, E), after SiLU; tokens and their mask."""

    emb: Tensor
    tokens: Tensor | None = None
    mask: Tensor | None = None


class Stage(nn.Module):
    """One resolution: residual blocks, each followed by attention or nothing, and resampling to the next, if any."""

    resample: nn.Module | None

    def __init__(self) -> None:
        super().__init__()
        self.residual, self.attention, self.resample = nn.ModuleList(), nn.ModuleList(), None


class Ladder(NamedTuple):
    """The settings of a U-Net's layers, which builds them in the order of their first random weights.

    Args:
        embedding: E, the size of the embedding that conditions the blocks.
        dropout, groups, norm_eps, scale_shift, magnitude_preserving, downsample_padding: as in `UNet`.
        by_block: whether levels are joined by residual blocks that resample; else by convolutions.
        attention, token_channels, linear_projection: as in `UNet`.
        attended: whether a level's residual blocks are followed by attention, one a level.
        heads, head_channels, transformer_layers, only_cross: as in `UNet`, one a level.
    """

    embedding: int
    dropout: float
    groups: int
    norm_eps: float
    scale_shift: bool
    magnitude_preserving: bool
    downsample_padding: int
    by_block: bool
    attention: str
    token_channels: int
    linear_projection: bool
    attended: Sequence[bool]
    heads: Sequence[int | None]
    head_channels: Sequence[int | None]
    transformer_layers: Sequence[int]
    only_cross: Sequence[bool]

    @property
    def conv(self) -> type[nn.Conv2d]:
        """The class of its convolutions."""
        return MPConv2d if self.magnitude_preserving else nn.Conv2d

    def residual(
        self, c_in: int, c_out: int, encoder: bool = True, by: nn.Module | None = None
    ) -> ResidualBlock | MPResidualBlock:
        """Return a residual block from c_in channels to c_out, of encoder or decoder, that may resample by a layer."""
        if self.magnitude_preserving:
            return MPResidualBlock(c_in, c_out, self.embedding, self.dropout, encoder)
        return ResidualBlock(
            c_in, c_out, self.embedding, self.dropout, self.groups, self.norm_eps, self.scale_shift, by
        )

    def attention_at(self, c: int, level: int | None = None) -> nn.Module:
        """Return attention, a transformer or nothing, after a residual block of c channels; level None: the middle."""
        if level is not None and not self.attended[level]:
            return nn.Identity()
        only_cross = level is not None and self.only_cross[level]
        level = -1 if level is None else level  # the middle has the last level's heads
        heads, width = self.heads[level], self.head_channels[level]
        if self.token_channels:
            layers = self.transformer_layers[level]
            return SpatialTransformer(
                c, self.token_channels, heads, width, layers, self.linear_projection, only_cross, self.groups
            )
        if self.magnitude_preserving:
            return MPAttention(c, heads, width, self.attention)
        return Attention(c, heads, width, self.attention, self.groups, self.norm_eps)

    def down(self, channels: int, widths: Sequence[int], blocks: Sequence[int]) -> tuple[nn.ModuleList, list[int]]:
        """Return the encoder's stages, and the channels of the skips that they leave, the first convolution's first.

        Args:
            channels: of the input.
            widths, blocks: channels and residual blocks, one a level.
        """
        c, skips, stages = channels, [channels], nn.ModuleList()
        for level, width in enumerate(widths):
            stage = Stage()
            for _ in range(blocks[level]):
                stage.residual.append(self.residual(c, width))
                stage.attention.append(self.attention_at(width, level))
                c = width
                skips.append(c)
            if level < len(widths) - 1:
                by = nn.AvgPool2d(2) if self.by_block else None
                stage.resample = self.residual(c, c, by=by) if by else Downsample(c, self.downsample_padding, self.conv)
                skips.append(c)
            stages.append(stage)
        return stages, skips

    def up(self, skips: Sequence[int], widths: Sequence[int], blocks: Sequence[int]) -> nn.ModuleList:
        """Return the decoder's stages, with one residual block more a level, which take the skips from the last on."""
        c, skips, stages = widths[-1], list(skips), nn.ModuleList()
        for level in reversed(range(len(widths))):
            stage = Stage()
            for _ in range(blocks[level] + 1):
                stage.residual.append(self.residual(c + skips.pop(), widths[level], encoder=False))
                stage.attention.append(self.attention_at(widths[level], level))
                c = widths[level]
            if level > 0:
                by = nn.Upsample(scale_factor=2.0, mode="nearest") if self.by_block else None
                stage.resample = self.residual(c, c, by=by) if by else Upsample(c, self.conv)
            stages.append(stage)
        return stages


class UNet(nn.Module):
    """The U-Net: residual blocks at several resolutions, with skips from every encoder block and downsampling.

    Args:
        image_size: pixels, one number or (H, W); each divisible by 2 ** (levels - 1), unless any_size.
        in_channels: channels of the image.
        out_channels: channels of the output; None for as many as the image has.
        channels: width of the first level; the time embedding has four times as many.
        channel_mults: width of each level in units of `channels`; one entry a level, each level has half the resolution
            of the one before. None for those that fit image_size: `fitted_channel_mults`.
        blocks: residual blocks a level on the way down (one more on the way up), one number or one a level.
        attention_resolutions: resolutions in pixels (the longer side) whose residual blocks are followed by attention;
            [] for none; None for those that fit image_size: `fitted_attention_resolutions`.
        attention: "full" or "linear".
        heads: attention heads; head_channels: or the width of one head, which takes precedence. Each one number or one
            a level, of which the middle has the last.
        middle_attention: attention between the two middle blocks.
        dropout: inside residual blocks, in [0, 1).
        groups: groups of every group norm; must divide every width.
        num_classes: classes that may be given as y; of several labels at once those of each, such as [46, 11]; None
            for an unconditional network.
        patch: side of the squares of pixels that are folded into channels before the first level and unfolded after
            the last; 1 is the network of Ho et al., with 2 nothing is computed at full resolution and the resolutions
            start at half the image's size.
        norm_eps, downsample_padding, flip_sin_to_cos, freq_shift: details that differ between published weights.
        time_offset: added to t; -1 for weights that were trained with t counted from 0.
        checkpointing: in training, discard the activations inside of residual blocks, attention and upsampling, and
            recompute them in the backward pass: less memory, more time, the same output and gradients.
        drop: share of conditions that training nulls, in [0, 1). More than 0 gives the network a learned null for each
            part that it takes: a vector in place of the class, a constant a channel in place of the image.
        condition_channels: channels C' of an image that is given as part of the condition and concatenated to x_t; 0
            for none.
        class_channels: length of a learned vector for each class that is spread over the image and concatenated to
            x_t, as so many further channels, in place of being added to the time embedding; 0 adds it there.
        augment_dim: the number of parameters of an image's augmentation in training, see
            `ddpm.data.non_leaking`; they are added to the time embedding by a linear layer without bias, 0 at first.
            Without them, as in sampling, nothing is added. 0 for none.
        magnitude_preserving: layers that keep the magnitude of what goes through them, of `models.magnitude`, with
            weights that the trainer renormalises after each step (EDM2, configuration G, with this ladder of levels).
            A learned gain, 0 at first, scales the output; groups and norm_eps are without effect. x_t of about unit
            variance is best: diffusion.preconditioning=edm makes it so. Learning rates are larger, 1e-2 or more.
        token_channels: D of tokens (B, L, D), such as an encoder's output, that are given as part of the condition.
            More than 0 replaces attention by transformers that attend to them (`models.transformer`). With `drop` > 0
            a learned null token stands at each position of null rows. 0 for none, or for the width of `text`.
        text: encoder of texts, ids (B, L) -> (B, L, D), that is trained with the network: it then takes ids as tokens
            too. None for none.
        transformer_layers: blocks of each transformer, one number or one a level; the middle has the last.
        linear_projection: their projections are linear layers, and not 1x1 convolutions.
        only_cross_attention: their first attention is to the tokens too, one or one a level; not that in the middle.
        any_size: x_t may have any size: a map of odd size is halved to the next larger whole number, and is upsampled
            to the size of the skip that comes next. image_size then only determines where attention is.
        scale_shift: residual blocks are conditioned on the time by a scale and a shift (ADM), see `models.layers`.
        resample: "conv": levels are joined by convolutions; "resnet": by residual blocks that resample, by average
            pooling and nearest neighbour (ADM).
    Attributes:
        takes: the parts of a condition that the network takes, of "classes", "tokens" and "image", in this order.
    Raises:
        ValueError: a size, width or resolution that does not fit, with the nearest legal values.
    """

    null_image: nn.Parameter | None
    null_tokens: nn.Parameter | None
    gain_out: nn.Parameter | None
    frozen = staticmethod(kernels.frozen)  # a context in which the weights do not change

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
        heads: int | Sequence[int] | None = 1,
        head_channels: int | Sequence[int] | None = None,
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
        token_channels: int = 0,
        transformer_layers: int | Sequence[int] = 1,
        linear_projection: bool = False,
        only_cross_attention: bool | Sequence[bool] = False,
        any_size: bool = False,
        scale_shift: bool = False,
        resample: str = "conv",
        text: TextEncoder | None = None,
    ):
        super().__init__()
        if text is not None:
            token_channels = token_channels or text.channels
            if token_channels != text.channels:
                raise ValueError(f"token_channels = {token_channels}, but text makes tokens of {text.channels}")
        image_size = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
        one_of("attention", attention, ATTENTION_KINDS)  # also where no such layer is built
        one_of("downsample_padding", downsample_padding, PADDINGS)
        one_of("resample", resample, RESAMPLES)
        check_size(image_size, patch)
        if channel_mults is None:
            channel_mults = fitted_channel_mults(image_size, patch)
        levels = len(channel_mults)
        if attention_resolutions is None:
            attention_resolutions = fitted_attention_resolutions(image_size, levels, patch)
        blocks = [blocks] * levels if isinstance(blocks, int) else list(blocks)
        out_channels = in_channels if out_channels is None else out_channels
        if num_classes is not None and not isinstance(num_classes, int):  # one label is one, however it is written
            num_classes = num_classes[0] if len(num_classes) == 1 else tuple(num_classes)
        unit = 1 if any_size else patch * 2 ** (levels - 1)
        check(
            size=image_size, in_channels=in_channels, out_channels=out_channels, channels=channels,
            channel_mults=channel_mults, blocks=blocks, attention_resolutions=attention_resolutions, dropout=dropout,
            num_classes=num_classes, patch=patch, norm_eps=norm_eps, drop=drop, condition_channels=condition_channels,
            class_channels=class_channels, augment_dim=augment_dim, token_channels=token_channels, unit=unit,
        )  # fmt: skip
        check_together(
            plain={"token_channels": token_channels, "scale_shift": scale_shift, "resample": resample != "conv"},
            magnitude_preserving=magnitude_preserving, attention=attention, any_size=any_size, patch=patch,
            downsample_padding=downsample_padding, by_conv=resample == "conv",
        )  # fmt: skip
        embedding = 4 * channels
        ladder = Ladder(
            embedding=embedding, dropout=dropout, groups=groups, norm_eps=norm_eps, scale_shift=scale_shift,
            magnitude_preserving=magnitude_preserving, downsample_padding=downsample_padding,
            by_block=resample == "resnet", attention=attention, token_channels=token_channels,
            linear_projection=linear_projection,
            attended=[n in attention_resolutions for n in resolutions_of(image_size, levels, patch)],
            heads=per_level("heads", heads, levels),
            head_channels=per_level("head_channels", head_channels, levels),
            transformer_layers=per_level("transformer_layers", transformer_layers, levels),
            only_cross=per_level("only_cross_attention", only_cross_attention, levels),
        )  # fmt: skip
        self.image_size, self.in_channels, self.out_channels = image_size, in_channels, out_channels
        self.num_classes, self.patch = num_classes, patch
        self.freq_shift, self.time_offset, self.checkpointing = freq_shift, time_offset, checkpointing
        self.drop, self.condition_channels, self.class_channels = drop, condition_channels, class_channels
        self.magnitude_preserving, self.augment_dim = magnitude_preserving, augment_dim
        self.token_channels, self.any_size, self.text = token_channels, any_size, text
        self._sum: Callable[[Tensor, Tensor], Tensor] = mp_sum if magnitude_preserving else torch.add
        self._join: Callable[[Tensor, Tensor], Tensor] = mp_cat if magnitude_preserving else _cat
        self._silu: Callable[[Tensor], Tensor] = mp_silu if magnitude_preserving else F.silu
        options = {"classes": num_classes is not None, "tokens": token_channels > 0, "image": condition_channels > 0}
        self.takes: tuple[str, ...] = tuple(name for name, taken in options.items() if taken)

        times: Callable[..., nn.Sequential] = MPTimeEmbedding if magnitude_preserving else TimeEmbedding
        self.time_embedding = times(channels, embedding, flip_sin_to_cos, freq_shift)
        self.class_embedding: nn.Module | None = None
        if num_classes is not None:
            kinds: tuple[Callable[..., nn.Module], ...] = ClassEmbedding, LabelEmbeddings
            if magnitude_preserving:
                kinds = MPClassEmbedding, MPLabelEmbeddings
            kind = kinds[0] if isinstance(num_classes, int) else kinds[1]
            self.class_embedding = kind(num_classes, class_channels or embedding, drop > 0)

        further = class_channels + condition_channels
        ones = int(magnitude_preserving)  # a channel of them, in place of biases
        self.conv_in = ladder.conv((in_channels + further) * patch**2 + ones, channels, 3, padding=1)
        widths = [channels * m for m in channel_mults]
        self.down, skips = ladder.down(channels, widths, blocks)
        c = widths[-1]
        self.middle_1 = ladder.residual(c, c)
        self.middle_attention = ladder.attention_at(c) if middle_attention else nn.Identity()
        self.middle_2 = ladder.residual(c, c)
        self.up = ladder.up(skips, widths, blocks)

        c = widths[0]
        self.norm_out = None if magnitude_preserving else group_norm(c, groups, norm_eps)
        self.conv_out = ladder.conv(c, out_channels * patch**2, 3, padding=1)
        if not magnitude_preserving:
            zeroed(self.conv_out)
        self.register_parameter("gain_out", nn.Parameter(torch.zeros(())) if magnitude_preserving else None)

        self.augment_embedding = zeroed(nn.Linear(augment_dim, embedding, bias=False)) if augment_dim else None

        null = drop > 0 and condition_channels > 0
        self.register_parameter("null_image", nn.Parameter(torch.zeros(condition_channels)) if null else None)
        null = drop > 0 and token_channels > 0
        self.register_parameter("null_tokens", nn.Parameter(torch.zeros(token_channels)) if null else None)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape (in_channels, H, W) of one x_t; with any_size that of image_size."""
        return self.in_channels, *self.image_size

    def forward(self, x_t: Tensor, t: Tensor, y: Tensor | Condition | None = None) -> Tensor:
        """Return the network's output at time t.

        Args:
            x_t: (B, in_channels, H, W), of the network's size, unless any_size.
            t: (B,), integer or real, in 0..T.
            y: classes, integers (B,) or, of K labels, (B, K), if that is all that the network takes; or a condition
                with exactly the parts that it takes, of classes, tokens (B, L, token_channels), or ids (B, L) where it
                has a text encoder, with a mask (B, L) of those to attend to, and an image
                (B, condition_channels, H, W), which is concatenated after x_t; and with augment (B, augment_dim) for
                augmented images. Tokens and image take the type of x_t. Rows that are null have the
                learned null instead; with `drop` = 0 there is none.
        Returns:
            (B, out_channels, H, W).
        Raises:
            ValueError: x_t or an image of another shape than the network's, a part of a condition given to one that
                does not take it (or the reverse), null rows given to one without a learned null.
        """
        h, conditioning, skips = self.encode(x_t, t, y)
        for stage in self.up:
            assert isinstance(stage, Stage)
            for residual, attention in zip(stage.residual, stage.attention, strict=True):
                h = self._run(partial(self._block, residual, attention, conditioning), h, skips.pop())
            if stage.resample is not None:
                h = self._run(partial(self._resampled, stage.resample, conditioning, skips[-1].shape[2:]), h)

        if self.norm_out is None:
            h = self.conv_out(h, self.gain_out)
        else:
            h = self.conv_out(normed(self.norm_out, h, silu=True))
        return rearrange(h, "b (c p q) h w -> b c (h p) (w q)", p=self.patch, q=self.patch)

    def encode(
        self, x_t: Tensor, t: Tensor, y: Tensor | Condition | None = None
    ) -> tuple[Tensor, Conditioning, list[Tensor]]:
        """Run the encoder and the middle; arguments and errors as in `forward`.

        Returns:
            The features of the last level, (B, C', H', W'); the conditioning of the blocks; the skips for the decoder,
            the last ones last.
        """
        x_t, conditioning = self._conditioning(x_t, t, y)
        h = rearrange(x_t, "b c (h p) (w q) -> b (c p q) h w", p=self.patch, q=self.patch)
        if self.magnitude_preserving:
            h = torch.cat([h, torch.ones_like(h[:, :1])], dim=1)
        h = self.conv_in(h)
        skips = [h]
        for stage in self.down:
            assert isinstance(stage, Stage)
            for residual, attention in zip(stage.residual, stage.attention, strict=True):
                h = self._run(partial(self._block, residual, attention, conditioning), h)
                skips.append(h)
            if stage.resample is not None:
                h = self._resampled(stage.resample, conditioning, None, h)
                skips.append(h)

        h = self._run(partial(self._block, self.middle_1, self.middle_attention, conditioning), h)
        return self._run(self.middle_2, h, conditioning.emb), conditioning, skips

    def _conditioning(self, x_t: Tensor, t: Tensor, y: Tensor | Condition | None) -> tuple[Tensor, Conditioning]:
        """Return x_t with the channels of the condition, and the conditioning of blocks; arguments as in `forward`."""
        if x_t.ndim != 4 or (tuple(x_t.shape[1:]) != self.shape and not (self.any_size and self._fits(x_t))):
            height, width = ("H", "W") if self.any_size else self.image_size
            raise ValueError(
                f"x_t has shape {tuple(x_t.shape)}; this network takes (B, {self.in_channels}, {height}, {width})"
            )
        y = y if self.text is None else encoded(y, self.text)
        parts = parts_of(y, self.num_classes, self.condition_channels, self.drop, self.token_channels)
        emb = self.time_embedding(t + self.time_offset)
        channels = [x_t]
        if self.class_embedding is not None:
            of_class = self.class_embedding(*parts["classes"])
            if self.class_channels:
                channels.append(of_class.to(x_t.dtype)[:, :, None, None].expand(-1, -1, *x_t.shape[2:]))
            else:
                emb = self._sum(emb, of_class)
        augment = augment_of(y, self.augment_dim)
        if augment is not None and self.augment_embedding is not None:
            emb = emb + self.augment_embedding(augment)
        emb = self._silu(emb)
        if "image" in parts:
            channels.append(image_like(x_t, self.condition_channels, *parts["image"], self.null_image))
        conditioning = Conditioning(emb)
        if "tokens" in parts:
            mask = None if y is None or isinstance(y, Tensor) else y.mask
            conditioning = Conditioning(emb, *tokens_like(x_t, *parts["tokens"], self.null_tokens, mask))
        return torch.cat(channels, dim=1) if len(channels) > 1 else x_t, conditioning

    def _fits(self, x_t: Tensor) -> bool:
        """Whether x_t has the network's channels, and pixels."""
        return x_t.shape[1] == self.in_channels and min(x_t.shape[2:]) > 0

    def _block(self, residual: nn.Module, attention: nn.Module, conditioning: Conditioning, *h: Tensor) -> Tensor:
        """Run a residual block over the channels of h, or of two, and what follows it; (B, C, H, W) -> the same."""
        inner = residual(h[0] if len(h) == 1 else self._join(*h), conditioning.emb)
        if isinstance(attention, SpatialTransformer):
            return attention(inner, conditioning.tokens, conditioning.mask)
        return attention(inner)

    def _resampled(self, layer: nn.Module, conditioning: Conditioning, size: Sequence[int] | None, h: Tensor) -> Tensor:
        """Return h resampled to the next level's size, which the decoder gives, (H, W)."""
        if isinstance(layer, ResidualBlock | MPResidualBlock):
            return layer(h, conditioning.emb)
        return layer(h, tuple(size)) if self.any_size and size is not None else layer(h)

    def _run(self, layer: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        """Return the layer's output, of which, with checkpointing, only the inputs are stored for the backward pass."""
        if self.checkpointing and self.training and torch.is_grad_enabled():
            return checkpoint(layer, *inputs, use_reentrant=False)
        return layer(*inputs)


def _cat(a: Tensor, b: Tensor) -> Tensor:
    """Return the concatenated channels of both."""
    return torch.cat([a, b], dim=1)
