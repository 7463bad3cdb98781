"""The diffusion transformer of Peebles and Xie (arXiv 2212.09748): patches as tokens, adaptive layer norm."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from models import kernels
from models.embeddings import (
    ClassEmbedding,
    Condition,
    LabelEmbeddings,
    SinusoidalEmbedding,
    TimeEmbedding,
    image_like,
    parts_of,
)
from models.layers import zeroed

FREQUENCIES = 256  # length of the sinusoids of t, whatever the width
MOST, MOST_DEPTH = 2**20, 100  # of any count: beyond it are slips, which would take all memory or no end of time
NORM_EPS = 1e-6


def position_embedding(height: int, width: int, dim: int) -> Tensor:
    r"""Return a fixed vector for each place of a grid: sinusoids of its column, then of its row.

    .. math:: p_{ij} = (s(j), s(i)), \quad s(n) = (\sin \omega_0 n, \ldots, \cos \omega_0 n, \ldots), \quad
        \omega_k = 10000^{-k / (d/4)}, \quad k = 0 .. d/4 - 1 \qquad \text{[DiT (position embedding)]}

    Args:
        height, width: of the grid.
        dim: length d of the vectors, divisible by 4.
    Returns:
        (height * width, d), row by row.
    Source: DiT (arXiv 2212.09748), section 3.2; in two dimensions as in MAE (arXiv 2111.06377).
    """
    s = SinusoidalEmbedding(dim // 2, freq_shift=0)
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.cat([s(columns.flatten()), s(rows.flatten())], dim=1)


def modulated(h: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Return the unweighted layer norm, scaled and shifted; h (B, n, W), shift and scale (B, W) -> (B, n, W)."""
    return F.layer_norm(h, h.shape[-1:], eps=NORM_EPS) * (1 + scale[:, None]) + shift[:, None]


class Block(nn.Module):
    r"""Attention over all tokens, then an MLP on each; the conditioning shifts, scales and gates both.

    .. math:: h \leftarrow h + \alpha_1\, \mathrm{Attention}\big((1 + \gamma_1)\, \mathrm{LN}(h) + \beta_1\big), \quad
        h \leftarrow h + \alpha_2\, \mathrm{MLP}\big((1 + \gamma_2)\, \mathrm{LN}(h) + \beta_2\big), \quad
        (\beta_1, \gamma_1, \alpha_1, \beta_2, \gamma_2, \alpha_2) = A\, \mathrm{SiLU}(c) + a
        \qquad \text{[DiT (adaLN-Zero)]}

    With A = 0 and a = 0, as training begins, a block is the identity. (beta and alpha are not those of a schedule.)

    Args:
        width: W, of tokens and of the embedding c.
        heads: of the attention; divides W.
        hidden: of the MLP.
    Source: DiT (arXiv 2212.09748), section 3.2 and figure 3.
    """

    def __init__(self, width: int, heads: int, hidden: int):
        super().__init__()
        self.heads = heads
        self.to_qkv, self.to_out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU(approximate="tanh"), nn.Linear(hidden, width))
        self.modulation = nn.Linear(width, 6 * width)

    def forward(self, h: Tensor, emb: Tensor) -> Tensor:
        """h (B, n, W), emb (B, W), after SiLU -> (B, n, W)."""
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = self.modulation(emb).chunk(6, dim=1)
        h = h + gate_1[:, None] * self.attention(modulated(h, shift_1, scale_1))
        return h + gate_2[:, None] * self.mlp(modulated(h, shift_2, scale_2))

    def attention(self, h: Tensor) -> Tensor:
        """(B, n, W) -> (B, n, W)."""
        q, k, v = self.to_qkv(h).chunk(3, dim=2)
        out: Tensor = self.to_out(kernels.attention(q, k, v, self.heads))
        return out


class DiT(nn.Module):
    """A transformer over the patches of an image, with the same number of tokens in every block and no skips.

    The cost of attention is quadratic in the tokens, H W / patch^2; all else is linear in them.

    Args:
        image_size: pixels, one number or (H, W); each divisible by patch.
        in_channels: channels of the image.
        out_channels: channels of the output; None for as many as the image has.
        patch: side of the squares of pixels that are a token each.
        width: length of a token, divisible by heads and by 4.
        depth: blocks.
        heads: of each block's attention.
        mlp_ratio: width of the MLP's hidden layer in units of `width`.
        num_classes: classes that may be given as y; of several labels at once those of each, such as [46, 11]; None
            for an unconditional network.
        drop: share of conditions that training nulls, in [0, 1). More than 0 gives the network a learned null for each
            part that it takes: a vector in place of the class, a constant a channel in place of the image.
        condition_channels: channels C' of an image that is given as part of the condition and concatenated to x_t; 0
            for none.
    Attributes:
        takes: the parts of a condition that the network takes, of "classes" and "image", in this order.
    Raises:
        ValueError: an argument out of range, or a size, width or number of heads that does not fit, with the nearest
            legal values.
    Source: Scalable Diffusion Models with Transformers (arXiv 2212.09748), the variant adaLN-Zero. Its sizes, for
        latents of 32x32x4, with patch 2, 4 or 8: S has width 384, depth 12, heads 6; B 768, 12, 12; L 1024, 24, 16;
        XL 1152, 28, 16.
    """

    positions: Tensor
    null_image: nn.Parameter | None

    def __init__(
        self,
        image_size: int | Sequence[int],
        in_channels: int = 3,
        out_channels: int | None = None,
        patch: int = 2,
        width: int = 384,
        depth: int = 12,
        heads: int = 6,
        mlp_ratio: float = 4.0,
        num_classes: int | Sequence[int] | None = None,
        drop: float = 0.0,
        condition_channels: int = 0,
    ):
        super().__init__()
        size = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
        out_channels = in_channels if out_channels is None else out_channels
        if num_classes is not None and not isinstance(num_classes, int):  # one label is one, however it is written
            num_classes = num_classes[0] if len(num_classes) == 1 else tuple(num_classes)
        _check(
            size, in_channels, out_channels, patch, width, depth, heads, mlp_ratio, num_classes, drop,
            condition_channels,
        )  # fmt: skip
        self.image_size, self.in_channels, self.out_channels = size, in_channels, out_channels
        self.num_classes, self.patch = num_classes, patch
        self.drop, self.condition_channels = drop, condition_channels
        conditional = {"classes": num_classes is not None, "image": condition_channels > 0}
        self.takes: tuple[str, ...] = tuple(name for name, taken in conditional.items() if taken)

        self.time_embedding = TimeEmbedding(FREQUENCIES, width, flip_sin_to_cos=True, freq_shift=0)
        self.class_embedding: ClassEmbedding | LabelEmbeddings | None = None
        if num_classes is not None:
            kind: Callable[..., Any] = ClassEmbedding if isinstance(num_classes, int) else LabelEmbeddings
            self.class_embedding = kind(num_classes, width, drop > 0)
        self.patch_in = nn.Linear((in_channels + condition_channels) * patch**2, width)
        places = position_embedding(size[0] // patch, size[1] // patch, width)
        self.register_buffer("positions", places, persistent=False)
        self.blocks = nn.ModuleList(Block(width, heads, round(mlp_ratio * width)) for _ in range(depth))
        self.modulation_out = nn.Linear(width, 2 * width)
        self.patch_out = nn.Linear(width, out_channels * patch**2)
        null = drop > 0 and condition_channels > 0
        self.register_parameter("null_image", nn.Parameter(torch.zeros(condition_channels)) if null else None)
        self._initialise()

    def _initialise(self) -> None:
        """Initialise as published: every block is the identity, the output zero."""
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                nn.init.xavier_uniform_(layer.weight)
                nn.init.zeros_(layer.bias)
        for embedding in (self.time_embedding, self.class_embedding):
            for name, p in [] if embedding is None else embedding.named_parameters():
                if not name.endswith("bias"):
                    nn.init.normal_(p, std=0.02)
        for block in self.blocks:
            assert isinstance(block, Block)
            zeroed(block.modulation)
        zeroed(self.modulation_out), zeroed(self.patch_out)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape (in_channels, H, W) of one x_t."""
        return self.in_channels, *self.image_size

    def forward(self, x_t: Tensor, t: Tensor, y: Tensor | Condition | None = None) -> Tensor:
        """Return the network's output at time t; zero before training.

        Args:
            x_t: (B, in_channels, H, W).
            t: (B,), integer or real, in 0..T.
            y: classes, integers (B,) or, of K labels, (B, K), if that is all that the network takes; or a condition
                with exactly the parts that it takes, of classes and an image (B, condition_channels, H, W). The image
                takes the type of x_t. Rows that are null have the learned null instead; with `drop` = 0 there is none.
        Returns:
            (B, out_channels, H, W).
        Raises:
            ValueError: x_t or an image of another shape than the network's, a part of a condition given to one that
                does not take it (or the reverse), null rows given to one without a learned null.
        """
        if tuple(x_t.shape[1:]) != self.shape:
            raise ValueError(
                f"x_t has shape {tuple(x_t.shape)}; this network takes (B, {self.in_channels}, "
                f"{self.image_size[0]}, {self.image_size[1]})"
            )
        parts = parts_of(y, self.num_classes, self.condition_channels, self.drop)
        emb = self.time_embedding(t)
        if self.class_embedding is not None:
            emb = emb + self.class_embedding(*parts["classes"])
        emb = F.silu(emb)
        if "image" in parts:
            image = image_like(x_t, self.condition_channels, *parts["image"], self.null_image)
            x_t = torch.cat([x_t, image], dim=1)

        p = self.patch
        h = self.patch_in(rearrange(x_t, "b c (h p) (w q) -> b (h w) (c p q)", p=p, q=p)) + self.positions
        for block in self.blocks:
            h = block(h, emb)
        shift, scale = self.modulation_out(emb).chunk(2, dim=1)
        h = self.patch_out(modulated(h, shift, scale))
        return rearrange(h, "b (h w) (c p q) -> b c (h p) (w q)", h=self.image_size[0] // p, p=p, q=p)


def _check(
    size: Sequence[int],
    in_channels: int,
    out_channels: int,
    patch: int,
    width: int,
    depth: int,
    heads: int,
    mlp_ratio: float,
    num_classes: int | Sequence[int] | None,
    drop: float,
    condition_channels: int,
) -> None:
    """Raise ValueError for arguments of the network that are out of range, or do not fit together."""
    if len(size) != 2:
        raise ValueError(f"image_size = {size} must be one integer >= 1, or two (H, W)")
    counts = {"image_size[0]": size[0], "image_size[1]": size[1], "in_channels": in_channels}
    counts |= {"out_channels": out_channels, "patch": patch, "width": width, "depth": depth, "heads": heads}
    if isinstance(num_classes, Sequence):
        if not num_classes:
            raise ValueError("num_classes is empty: give the number of classes, of several labels a list, or null")
        counts |= {f"num_classes[{i}]": n for i, n in enumerate(num_classes)}
    elif num_classes is not None:
        counts["num_classes"] = num_classes
    counts["condition_channels"] = condition_channels
    for name, value in counts.items():
        least, most = 0 if name == "condition_channels" else 1, MOST_DEPTH if name == "depth" else MOST
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            raise ValueError(f"{name} = {value!r} must be an integer >= {least}, and at most {most:,}")
    if not 1 <= mlp_ratio * width <= MOST:
        raise ValueError(f"mlp_ratio = {mlp_ratio:g} times width = {width} must be at least 1, and at most {MOST:,}")
    if not 0 <= drop < 1:
        raise ValueError(f"drop = {drop:g} must lie in [0, 1)")
    for n in size:
        if n % patch:
            near = sorted({max(patch, n // patch * patch), (n // patch + 1) * patch})
            raise ValueError(
                f"image_size = {size[0]}x{size[1]} with patch = {patch}: {n} is not divisible by {patch}; nearest "
                f"legal sizes: {', '.join(map(str, near))}"
            )
    if width % 4:
        near = sorted({max(4, width // 4 * 4), (width // 4 + 1) * 4})
        raise ValueError(
            f"width = {width} is not divisible by 4, for the sines and cosines of rows and columns; nearest that are: "
            f"{', '.join(map(str, near))}"
        )
    if width % heads:
        legal = [n for n in range(1, width + 1) if width % n == 0]
        near = sorted(sorted(legal, key=lambda n: abs(n - heads))[:3])
        raise ValueError(
            f"heads = {heads} does not divide width = {width}; nearest that do: {', '.join(map(str, near))}"
        )
