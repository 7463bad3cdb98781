"""Variational autoencoders: an encoder to the parameters of q(z given x), and a decoder."""

from collections.abc import Sequence

import torch
from einops import rearrange
from torch import Tensor, nn

from models.embeddings import ClassEmbedding, Condition, parts_of
from models.layers import Downsample, ResidualBlock, Upsample, check_counts, group_norm, normed

MOST, MOST_BLOCKS = 2**20, 100  # of any count: beyond it are slips, which would take all memory or no end of time
SMALLEST = 3  # pixels of the last level's shorter side, where the levels are fitted to a size
LOG_VARIANCE = (-30.0, 20.0)  # of the posterior: beyond it is only overflow


class VAE(nn.Module):
    """A convolutional encoder and decoder, with flat codings z (B, codings) between them.

    Args:
        image_size: pixels, one number or (H, W).
        in_channels: channels of the image.
        codings: length d of z.
        channels: width of the first level.
        channel_mults: width of each level in units of `channels`; each level has half the resolution of the one before.
            None for as many levels as the size can be halved, down to 3 pixels, of widths 1, 2, 2, ...
        blocks: residual blocks a level, of the encoder and of the decoder each.
        dropout: inside residual blocks, in [0, 1).
        groups: of every group norm.
        patch: side of the squares of pixels that are folded into channels before the first level and unfolded after
            the last.
        num_classes: classes on which encoder and decoder are conditioned, in every residual block; None for none.
        beside_z: whether the decoder's first layer takes the class in addition to z. Without it z enters first, and the
            class only later.
        scale: the decoder's standard deviation at first, for parts of the loss that have one (`gaussian`, `logistic`);
            it is learned. None for none.
    Attributes:
        shape: (in_channels, H, W), of one x; latent_shape: (codings,), of its z.
        log_scale: log of the scale, a scalar parameter, or None.
    Raises:
        ValueError: a size that the levels do not divide, with what does.
    """

    log_scale: nn.Parameter | None

    def __init__(
        self,
        image_size: int | Sequence[int],
        in_channels: int = 1,
        codings: int = 32,
        channels: int = 32,
        channel_mults: Sequence[int] | None = None,
        blocks: int = 1,
        dropout: float = 0.0,
        groups: int = 8,
        patch: int = 1,
        num_classes: int | None = None,
        scale: float | None = None,
        beside_z: bool = False,
    ):
        super().__init__()
        height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
        counts = {"image_size[0]": height, "image_size[1]": width, "in_channels": in_channels, "patch": patch}
        check_counts(MOST, **counts, codings=codings, channels=channels)
        check_counts(MOST, **({} if num_classes is None else {"num_classes": num_classes}))
        check_counts(MOST_BLOCKS, blocks=blocks)
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout = {dropout:g} must lie in [0, 1)")
        if height % patch or width % patch:
            raise ValueError(f"patch = {patch} does not divide the image size {height}x{width}")
        if channel_mults is None:
            channel_mults = fitted_mults(min(height, width) // patch, max(height, width) // patch)
        if not channel_mults or min(channel_mults) < 1:
            raise ValueError(f"channel_mults = {list(channel_mults)} must be one or more numbers >= 1")
        halvings = 2 ** (len(channel_mults) - 1)
        if height % (patch * halvings) or width % (patch * halvings):
            most = _levels(height // patch, width // patch)
            raise ValueError(
                f"{len(channel_mults)} levels halve an image of {height}x{width} pixels with patch = {patch} where it "
                f"is odd; allowed: at most {most} channel_mults"
            )
        self.shape, self.patch, self.num_classes = (in_channels, height, width), patch, num_classes
        self.codings, self.latent_shape = codings, (codings,)
        widths, embedding = [channels * m for m in channel_mults], None if num_classes is None else 4 * channels
        self.class_embedding: nn.ModuleList | None = None  # of the encoder and of the decoder
        if num_classes is not None:
            self.class_embedding = nn.ModuleList(ClassEmbedding(num_classes, 4 * channels) for _ in range(2))

        def residuals(c_in: int, c_out: int) -> list[nn.Module]:
            ins = [c_in, *[c_out] * (blocks - 1)]
            return [ResidualBlock(c, c_out, embedding, dropout, groups, 1e-6) for c in ins]

        self.conv_in = nn.Conv2d(in_channels * patch**2, channels, 3, padding=1)
        self.down, c = nn.ModuleList(), channels
        for level, w in enumerate(widths):
            self.down.extend([*residuals(c, w), *([Downsample(w, 1)] if level < len(widths) - 1 else [])])
            c = w
        self.norm_z = group_norm(c, groups, 1e-6)
        self.last = (c, height // (patch * halvings), width // (patch * halvings))
        self.to_z = nn.Linear(c * self.last[1] * self.last[2], 2 * codings)

        self.from_z = nn.Linear(codings, c * self.last[1] * self.last[2])
        class_width = embedding if beside_z else None
        self.from_y = None if class_width is None else nn.Linear(class_width, self.from_z.out_features, bias=False)
        self.up = nn.ModuleList()
        for level, w in reversed(list(enumerate(widths))):
            self.up.extend([*residuals(c, w), *([Upsample(w)] if level else [])])
            c = w
        self.norm_out = group_norm(c, groups, 1e-6)
        self.conv_out = nn.Conv2d(c, in_channels * patch**2, 3, padding=1)
        self.register_parameter("log_scale", log_parameter(scale))

    def encode(self, x: Tensor, y: Tensor | Condition | None = None) -> tuple[Tensor, Tensor]:
        """Return mean and log variance of q(z given x), each (B, codings).

        Args:
            x: (B, *shape); y: classes (B,), given exactly when the network has any.
        Raises:
            ValueError: x of another shape, classes that are missing or given to a network without.
        """
        if tuple(x.shape[1:]) != self.shape:
            raise ValueError(f"x has shape {tuple(x.shape)}; this network takes (B, {', '.join(map(str, self.shape))})")
        emb = self._embedded(y, 0)
        h = rearrange(x, "b c (h p) (w q) -> b (c p q) h w", p=self.patch, q=self.patch)
        h = _through(self.down, self.conv_in(h), emb)
        mean, log_variance = self.to_z(normed(self.norm_z, h, silu=True).flatten(1)).float().chunk(2, dim=1)
        return mean, log_variance.clamp(*LOG_VARIANCE)

    def decode(self, z: Tensor, y: Tensor | Condition | None = None) -> Tensor:
        """Return the decoder's output (B, *shape) for codings: logits or a picture, as the loss interprets it.

        Args:
            z: (B, codings); y: as in `encode`.
        """
        emb = self._embedded(y, 1)
        h = self.from_z(z) if self.from_y is None else self.from_z(z) + self.from_y(emb)
        h = h.unflatten(1, self.last).contiguous(memory_format=torch.channels_last)
        h = self.conv_out(normed(self.norm_out, _through(self.up, h, emb), silu=True))
        return rearrange(h, "b (c p q) h w -> b c (h p) (w q)", p=self.patch, q=self.patch).float()

    def _embedded(self, y: Tensor | Condition | None, half: int) -> Tensor | None:
        """Return the embedding of classes for the encoder (0) or the decoder (1), (B, E); None without classes."""
        parts = parts_of(y, self.num_classes)
        if self.class_embedding is None:
            return None
        embedded: Tensor = self.class_embedding[half](*parts["classes"])
        return nn.functional.silu(embedded)


class LinearVAE(nn.Module):
    r"""The linear Gaussian VAE, whose likelihood is known: at its optimum that of probabilistic PCA.

    .. math:: q(z \mid x) = \mathcal N(V (x - \mu), D), \quad p(x \mid z) = \mathcal N(W z + \mu, \sigma^2 I)
        \qquad \text{[PPCA (model)]}

    Args:
        features: of a point x; codings: length d of z; scale: sigma at first.
    Source: Don't Blame the ELBO! (arXiv 1911.02469), section 4.
    """

    num_classes = None

    def __init__(self, features: int, codings: int = 1, scale: float = 1.0):
        super().__init__()
        if not 1 <= codings <= features:
            raise ValueError(f"codings = {codings} must lie in 1..{features}, the features of a point")
        self.shape, self.codings, self.latent_shape = (features,), codings, (codings,)
        self.mu = nn.Parameter(torch.zeros(features))
        self.V = nn.Parameter(torch.randn(codings, features) / features**0.5)
        self.log_D = nn.Parameter(torch.zeros(codings))
        self.W = nn.Parameter(torch.randn(features, codings) / features**0.5)
        self.log_scale = log_parameter(scale)

    def encode(self, x: Tensor, y: None = None) -> tuple[Tensor, Tensor]:
        """Return mean and log variance of q(z given x (B, features)), each (B, codings)."""
        mean = (x - self.mu) @ self.V.T
        return mean, self.log_D.clamp(*LOG_VARIANCE).expand_as(mean)

    def decode(self, z: Tensor, y: None = None) -> Tensor:
        """Return the mean of p(x given z (B, codings)), (B, features)."""
        return z @ self.W.T + self.mu


def _through(layers: nn.ModuleList, h: Tensor, emb: Tensor | None) -> Tensor:
    for layer in layers:
        h = layer(h, emb) if isinstance(layer, ResidualBlock) else layer(h)
    return h


def log_parameter(scale: float | None) -> nn.Parameter | None:
    """Return the logarithm of a scale as a parameter; None for none, ValueError for a scale that is not > 0."""
    if scale is None:
        return None
    if not 0 < scale < float("inf"):
        raise ValueError(f"scale = {scale:g} must be > 0, or None")
    return nn.Parameter(torch.tensor(scale).log())


def _levels(height: int, width: int) -> int:
    """Return the largest number of levels."""
    levels = 1
    while height % 2 == width % 2 == 0:
        height, width, levels = height // 2, width // 2, levels + 1
    return levels


def fitted_mults(shorter: int, longer: int) -> list[int]:
    """Return channel_mults for as many levels as halve a size evenly, while the last one has `SMALLEST` pixels."""
    levels = 1
    while shorter % 2 == longer % 2 == 0 and shorter // 2 >= SMALLEST:
        shorter, longer, levels = shorter // 2, longer // 2, levels + 1
    return [1, *[2] * (levels - 1)]
