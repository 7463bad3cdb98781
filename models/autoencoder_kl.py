"""The autoencoder of latent diffusion: a convolutional encoder and decoder with maps of latents."""

from collections.abc import Sequence
from functools import partial

from torch import Tensor, nn
from torch.nn import functional as F

from models.embeddings import Condition, parts_of
from models.layers import Attention, Downsample, ResidualBlock, Upsample, check_counts, group_norm, normed, size_of
from models.unet import Stage
from models.vae import LOG_VARIANCE, MOST, MOST_BLOCKS, log_parameter

NORM_EPS = 1e-6  # of every group norm, as published


class AutoencoderKL(nn.Module):
    """An autoencoder of images with maps of latents, each normally distributed.

    Nothing in it depends on the size of an image: trained at one, it encodes and decodes others too, as long as
    `factor` divides their sides. Published weights are used so, and `encode` and `decode` check no more than that.

    Args:
        image_size: pixels, one number or (H, W), of the images that it is trained on; divisible by the factor.
        in_channels: channels of the image.
        latent_channels: channels of a latent.
        channels: width of the first level.
        channel_mults: width of each level in units of `channels`; each level has half the resolution of the one before.
        blocks: residual blocks a level, of the encoder; the decoder has one more.
        groups: of every group norm.
        middle_attention: attention between the two residual blocks at the smallest resolution, of both halves.
        quant_conv: a 1x1 convolution after the encoder and one before the decoder.
        patch: side of the squares of pixels that are folded into channels before the first level and unfolded after
            the last, so that nothing is computed at full resolution; 1, as published, for none.
        scale: the decoder's standard deviation at first, for parts of a loss that have one; it is learned. None for
            none.
    Attributes:
        shape: (in_channels, H, W), of one x.
        factor: f = patch * 2 ** (levels - 1), pixels of a side for each of a latent's.
        latent_shape: (latent_channels, H/f, W/f), of one z.
        log_scale: log of the scale, a scalar parameter, or None.
        scaling_factor, shift_factor: a diffusion of latents takes (z - shift_factor) * scaling_factor. Two numbers that
            come with published weights and are saved with them; they are not used here.
    Raises:
        ValueError: a count out of range, a size that the levels do not divide, with the nearest that they do.
    Source: High-Resolution Image Synthesis with Latent Diffusion Models (arXiv 2112.10752), appendix G; in the form of
        its published weights.
    """

    log_scale: nn.Parameter | None
    num_classes, takes = None, ()
    scaling_factor, shift_factor = 0.18215, 0.0  # those of Stable Diffusion, and the published form's defaults

    def __init__(
        self,
        image_size: int | Sequence[int],
        in_channels: int = 3,
        latent_channels: int = 4,
        channels: int = 128,
        channel_mults: Sequence[int] = (1, 2, 4, 4),
        blocks: int = 2,
        groups: int = 32,
        middle_attention: bool = True,
        quant_conv: bool = True,
        patch: int = 1,
        scale: float | None = None,
    ):
        super().__init__()
        check_counts(MOST, in_channels=in_channels, latent_channels=latent_channels, channels=channels, patch=patch)
        check_counts(MOST_BLOCKS, blocks=blocks)
        check_counts(MOST, **{f"channel_mults[{level}]": m for level, m in enumerate(channel_mults)})
        if not 1 <= len(channel_mults) <= MOST.bit_length():
            raise ValueError(
                f"channel_mults = {list(channel_mults)} has {len(channel_mults)} levels; allowed: 1 to "
                f"{MOST.bit_length()}"
            )
        self.factor, self.patch = patch * 2 ** (len(channel_mults) - 1), patch
        levels = f"{len(channel_mults)} levels" + (f" with patch = {patch}" if patch > 1 else "")
        height, width = size_of(image_size, self.factor, levels)
        self.shape = in_channels, height, width
        self.latent_shape = latent_channels, height // self.factor, width // self.factor

        widths = [channels * m for m in channel_mults]
        folded = in_channels * patch**2
        self.encoder = Encoder(folded, 2 * latent_channels, widths, blocks, groups, middle_attention)
        self.quant_conv = nn.Conv2d(2 * latent_channels, 2 * latent_channels, 1) if quant_conv else nn.Identity()
        self.post_quant_conv = nn.Conv2d(latent_channels, latent_channels, 1) if quant_conv else nn.Identity()
        self.decoder = Decoder(latent_channels, folded, widths, blocks + 1, groups, middle_attention)
        self.register_parameter("log_scale", log_parameter(scale))

    @property
    def last_layer(self) -> Tensor:
        """The weights of the decoder's last layer."""
        return self.decoder.conv_out.weight

    def encode(self, x: Tensor, y: Tensor | Condition | None = None) -> tuple[Tensor, Tensor]:
        """Return mean and log variance of q(z given x), each (B, *latent_shape); the log variance in [-30, 20].

        Args:
            x: (B, *shape), in [-1, 1], or of another size that `factor` divides; y: None, as no class is taken.
        Raises:
            ValueError: x with other channels, of a size that `factor` does not divide, classes.
        """
        parts_of(y, None)
        if x.ndim != 4 or x.shape[1] != self.shape[0] or x.shape[2] % self.factor or x.shape[3] % self.factor:
            raise ValueError(
                f"x has shape {tuple(x.shape)}; this network takes (B, {', '.join(map(str, self.shape))}), or another "
                f"height and width that {self.factor} divides"
            )
        mean, log_variance = self.quant_conv(self.encoder(F.pixel_unshuffle(x, self.patch))).float().chunk(2, dim=1)
        return mean, log_variance.clamp(*LOG_VARIANCE)

    def decode(self, z: Tensor, y: Tensor | Condition | None = None) -> Tensor:
        """Return the images (B, *shape) of latents.

        Args:
            z: (B, *latent_shape), or of another height and width; y: None, as no class is taken.
        Raises:
            ValueError: z with other channels, classes.
        """
        parts_of(y, None)
        if z.ndim != 4 or z.shape[1] != self.latent_shape[0]:
            raise ValueError(
                f"z has shape {tuple(z.shape)}; this network takes (B, {', '.join(map(str, self.latent_shape))}), or "
                "another height and width"
            )
        x = F.pixel_shuffle(self.decoder(self.post_quant_conv(z)), self.patch)
        return x.float()


class Encoder(nn.Module):
    """Residual blocks at decreasing resolutions, without skips; (B, C, H, W) -> (B, C', H/f, W/f).

    Args:
        in_channels, out_channels: of the image, and of the latent's mean and log variance.
        widths: of the levels, from the image on.
        blocks: residual blocks a level.
    """

    def __init__(
        self, in_channels: int, out_channels: int, widths: Sequence[int], blocks: int, groups: int, attention: bool
    ):
        super().__init__()
        self.conv_in = nn.Conv2d(in_channels, widths[0], 3, padding=1)
        self.down, c = nn.ModuleList(), widths[0]
        for level, width in enumerate(widths):
            resample = Downsample(width, padding=0) if level < len(widths) - 1 else None
            self.down.append(_stage(c, width, blocks, groups, resample))
            c = width
        self.middle = Middle(c, groups, attention)
        self.norm_out = group_norm(c, groups, NORM_EPS)
        self.conv_out = nn.Conv2d(c, out_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, C, H, W) -> (B, C', H/f, W/f)."""
        h = self.middle(_through(self.down, self.conv_in(x)))
        return self.conv_out(normed(self.norm_out, h, silu=True))


class Decoder(nn.Module):
    """The encoder's mirror image; (B, C', h, w) -> (B, C, f h, f w).

    Args:
        in_channels, out_channels: of the latent, and of the image.
        widths: of the levels, from the image on, as the encoder's.
        blocks: residual blocks a level.
    """

    def __init__(
        self, in_channels: int, out_channels: int, widths: Sequence[int], blocks: int, groups: int, attention: bool
    ):
        super().__init__()
        c = widths[-1]
        self.conv_in = nn.Conv2d(in_channels, c, 3, padding=1)
        self.middle = Middle(c, groups, attention)
        self.up = nn.ModuleList()
        for level, width in reversed(list(enumerate(widths))):
            self.up.append(_stage(c, width, blocks, groups, Upsample(width) if level else None))
            c = width
        self.norm_out = group_norm(c, groups, NORM_EPS)
        self.conv_out = nn.Conv2d(c, out_channels, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        """z (B, C', h, w) -> (B, C, f h, f w)."""
        h = _through(self.up, self.middle(self.conv_in(z)))
        return self.conv_out(normed(self.norm_out, h, silu=True))


class Middle(nn.Module):
    """Residual block, attention with one head or nothing, residual block; (B, C, h, w) -> (B, C, h, w)."""

    def __init__(self, channels: int, groups: int, attention: bool):
        super().__init__()
        self.residual_1, self.residual_2 = (
            ResidualBlock(channels, channels, None, 0.0, groups, NORM_EPS) for _ in range(2)
        )
        attend = partial(Attention, channels, 1, None, "full", groups, NORM_EPS)
        self.attention: nn.Module = attend() if attention else nn.Identity()

    def forward(self, h: Tensor) -> Tensor:
        """h (B, C, h, w)."""
        return self.residual_2(self.attention(self.residual_1(h)))


def _stage(c_in: int, c_out: int, blocks: int, groups: int, resample: nn.Module | None) -> Stage:
    """Return one resolution: residual blocks without attention, and the resampling to the next."""
    stage = Stage()
    for c in [c_in, *[c_out] * (blocks - 1)]:
        stage.residual.append(ResidualBlock(c, c_out, None, 0.0, groups, NORM_EPS))
    stage.resample = resample
    return stage


def _through(stages: nn.ModuleList, h: Tensor) -> Tensor:
    """Return the output of stages, one after the other, for h (B, C, h, w)."""
    for stage in stages:
        assert isinstance(stage, Stage)
        for residual in stage.residual:
            h = residual(h)
        h = h if stage.resample is None else stage.resample(h)
    return h
