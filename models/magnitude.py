r"""Magnitude-preserving layers (EDM2): inputs of unit variance give outputs of unit variance.

The magnitude of a tensor of N independent numbers is the root mean square,

.. math:: M[a] = \sqrt{\frac{1}{N} \sum_i E[a_i^2]}.

Where no layer changes it, neither weights nor features can grow in training, and a learning rate means the same at
every step. There are no biases (the first convolution sees a channel of ones), and no norms with learned scales.

Source: Karras et al., Analyzing and Improving the Training Dynamics of Diffusion Models (arXiv 2312.02696), section 2,
appendix B and its configuration G, from which the balances below are.
"""

import math

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from models.embeddings import LabelEmbeddings, SinusoidalEmbedding
from models.layers import ATTENTION_KINDS, attended, heads_of, one_of

LEAST = 1e-4  # of a magnitude used as divisor
SILU = 0.596  # the magnitude of SiLU of a standard normal number
BALANCE = 0.3  # share of a residual or attention branch in a sum


def normalised(x: Tensor, *dims: int) -> Tensor:
    r"""Return x scaled to unit magnitude over some axes.

    .. math:: \operatorname{normalize}(x) = x \sqrt{N} / \lVert x \rVert_2 \qquad \text{[EDM2 (pixel normalization)]}

    Over axis 1 it normalises each pixel, in place of a group norm. The divisor is at least
    `LEAST`, where the paper's code adds as much to it, so that it is 1 exactly. It is computed in float32 at least.

    Args: x of any shape; dims: the axes, which together have N numbers.
    Returns: of x's shape and type.
    """
    count = math.prod(x.shape[dim] for dim in dims)
    norm = torch.linalg.vector_norm(x, dim=dims, keepdim=True, dtype=torch.promote_types(x.dtype, torch.float32))
    return x / (norm / math.sqrt(count)).clamp_min(LEAST).to(x.dtype)


def mp_silu(x: Tensor) -> Tensor:
    r"""Return SiLU, scaled to preserve the magnitude of standard normal numbers.

    .. math:: \operatorname{MP\text{-}SiLU}(x) = \operatorname{silu}(x) / 0.596 \qquad \text{[EDM2 (81)]}
    """
    return F.silu(x) / SILU


def mp_sum(a: Tensor, b: Tensor, t: float = 0.5) -> Tensor:
    r"""Return a mixture of two independent tensors of unit magnitude.

    .. math:: \operatorname{MP\text{-}Sum}(a, b, t) = \frac{(1 - t)\, a + t\, b}{\sqrt{(1 - t)^2 + t^2}}
        \qquad \text{[EDM2 (88)]}

    Args: a, b of one shape; t: the share of b, 0..1.
    """
    return ((1 - t) * a + t * b) / math.sqrt((1 - t) ** 2 + t**2)


def mp_cat(a: Tensor, b: Tensor, t: float = 0.5) -> Tensor:
    r"""Return the concatenated channels of two tensors of unit magnitude, weighted by t, whatever their numbers.

    .. math:: \operatorname{MP\text{-}Cat}(a, b, t) = \sqrt{\frac{N_a + N_b}{(1 - t)^2 + t^2}}
        \left[ \frac{1 - t}{\sqrt{N_a}}\, a \,\oplus\, \frac{t}{\sqrt{N_b}}\, b \right] \qquad \text{[EDM2 (103)]}

    Args: a (B, N_a, ...), b (B, N_b, ...); t: the share of b, 0..1.
    Returns: (B, N_a + N_b, ...).
    """
    N_a, N_b = a.shape[1], b.shape[1]
    C = math.sqrt((N_a + N_b) / ((1 - t) ** 2 + t**2))
    return torch.cat([C * (1 - t) / math.sqrt(N_a) * a, C * t / math.sqrt(N_b) * b], dim=1)


# --- Layers with weights


class Normalised(nn.Module):
    r"""A layer whose weights have unit magnitude for each output, both as stored and as used.

    .. math:: \hat w_i = \frac{w_i}{\lVert w_i \rVert_2}, \quad y_i = \hat w_i \cdot x \qquad \text{[EDM2 (47)]}

    .. math:: w_i \leftarrow \sqrt{N}\, \hat w_i \text{ after each step of training} \qquad \text{[EDM2 (66)]}

    where w_i are the N weights of output i. The gradient runs through the first and is orthogonal to w_i, so that a
    step lengthens w_i; the second takes that back, or the rate at which w_i turns would fall of itself. The paper's
    code does it in the forward pass of training, here the trainer calls `renormalise_` after the optimizer: a forward
    pass changes nothing, and may be repeated.

    Attributes:
        weight: N numbers for each output, of unit magnitude; normal at first.
        inputs: the axes of the N numbers.
    """

    weight: Tensor
    inputs: tuple[int, ...] = (1,)

    def reset_parameters(self) -> None:
        """Initialise the weights."""
        nn.init.normal_(self.weight)
        self.renormalise_()

    @torch.no_grad()
    def renormalise_(self) -> None:
        """Give the stored weights unit magnitude, unless they are not trained."""
        if self.weight.requires_grad:
            self.weight.copy_(normalised(self.weight, *self.inputs))

    def unit(self) -> Tensor:
        """Return the weights of unit norm for each output, as they are used: of the stored shape."""
        count = math.prod(self.weight.shape[dim] for dim in self.inputs)
        return normalised(self.weight, *self.inputs) / math.sqrt(count)


class MPLinear(Normalised, nn.Linear):
    """A linear layer without bias; (..., C) -> (..., C')."""

    def __init__(self, in_features: int, out_features: int):
        super().__init__(in_features, out_features, bias=False)

    def forward(self, x: Tensor, gain: Tensor | float = 1.0) -> Tensor:
        """Return the product with the weights times a gain."""
        return F.linear(x, self.unit() * gain)


class MPConv2d(Normalised, nn.Conv2d):
    """A convolution without bias; (B, C, H, W) -> (B, C', H', W')."""

    inputs = (1, 2, 3)

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, stride: int = 1, padding: int = 0):
        super().__init__(in_channels, out_channels, kernel_size, stride, padding, bias=False)

    def forward(self, x: Tensor, gain: Tensor | float = 1.0) -> Tensor:
        """Return the convolution with the weights times a gain."""
        return self._conv_forward(x, self.unit() * gain, None)


class MPClassEmbedding(Normalised):
    """A vector for each class, and optionally a null vector; all of them together have unit magnitude.

    Args:
        num_classes: number of classes.
        out: length E of the vectors.
        null: whether there is a vector for rows without a class; it is the last of `weight`, and no other than those of
            classes.
    """

    inputs = (0,)

    def __init__(self, num_classes: int, out: int, null: bool = False):
        super().__init__()
        self.num_classes = num_classes
        self.weight = nn.Parameter(torch.empty(num_classes + null, out))
        self.reset_parameters()

    def forward(self, classes: Tensor, null: Tensor | None = None) -> Tensor:
        """Return the vectors (B, E) of classes (B,), or the null vector, if there is one, where `null` (B,) is true."""
        rows = classes if null is None else classes.masked_fill(null, self.num_classes)
        return F.embedding(rows, normalised(self.weight, *self.inputs))


class MPLabelEmbeddings(LabelEmbeddings):
    """The sum of an `MPClassEmbedding` for each of K labels, divided by sqrt(K)."""

    embedding = MPClassEmbedding

    def forward(self, labels: Tensor, null: Tensor | None = None) -> Tensor:
        """Return the sum as in `LabelEmbeddings`; (B, K) -> (B, E)."""
        return super().forward(labels, null) / math.sqrt(len(self))


class MPTimeEmbedding(nn.Sequential):
    r"""The time embedding, t (B,) -> (B, out): sines and cosines of unit magnitude, through a linear layer.

    .. math:: \sqrt 2\, (\sin \omega_0 t, \ldots, \cos \omega_0 t, \ldots) \qquad \text{[EDM2 (75)]}

    The paper draws its frequencies and phases, for a noise level; these are those of `SinusoidalEmbedding`, for t. A
    sine and a cosine of each make the magnitude 1 at every t, not on average.
    """

    def __init__(self, channels: int, out: int, flip_sin_to_cos: bool = False, freq_shift: float = 1):
        super().__init__(SinusoidalEmbedding(channels, flip_sin_to_cos, freq_shift), MPLinear(channels, out))

    def forward(self, t: Tensor) -> Tensor:
        """t: (B,), integer or real -> (B, out)."""
        return self[1](math.sqrt(2) * self[0](t))


class MPResidualBlock(nn.Module):
    r"""SiLU - 3x3 convolution, twice, multiplied by the embedded time between; mixed with the input at the end.

    .. math:: y = W_2 \operatorname{MP\text{-}SiLU}\left( (1 + g\, W_e\, \text{emb}) \odot
        W_1 \operatorname{MP\text{-}SiLU}(x) \right), \quad \operatorname{MP\text{-}Sum}(x, y, 0.3)
        \qquad \text{[EDM2 (embedding gain)]}

    The learned gain g is 0 at first.

    Args:
        in_channels, out_channels: a 1x1 convolution maps the input where they differ.
        embedding: size E of the time embedding.
        encoder: whether it is in the encoder or in the middle: there x is mapped first and normalised in each pixel. In
            the decoder neither, and only the residual path is mapped.
    """

    def __init__(self, in_channels: int, out_channels: int, embedding: int, dropout: float, encoder: bool):
        super().__init__()
        self.encoder = encoder
        self.conv_1 = MPConv2d(out_channels if encoder else in_channels, out_channels, 3, padding=1)
        self.embedding = MPLinear(embedding, out_channels)
        self.gain = nn.Parameter(torch.zeros(()))
        self.dropout = nn.Dropout(dropout)
        self.conv_2 = MPConv2d(out_channels, out_channels, 3, padding=1)
        self.shortcut = MPConv2d(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """x (B, C, H, W), emb (B, E), after SiLU -> (B, C', H, W)."""
        if self.encoder:
            x = normalised(self.shortcut(x), 1)
        y = self.conv_1(mp_silu(x))
        y = y * (1 + self.embedding(emb, self.gain)[:, :, None, None]).to(y.dtype)
        y = self.conv_2(self.dropout(mp_silu(y)))
        return mp_sum(x if self.encoder else self.shortcut(x), y, BALANCE)


class MPAttention(nn.Module):
    r"""Self-attention over the pixels of a feature map by cosine similarity, mixed with the input.

    .. math:: q, k, v \leftarrow \operatorname{normalize}(q, k, v), \quad
        \operatorname{MP\text{-}Sum}\left(x, W \operatorname{softmax}(q k^T / \sqrt d)\, v, 0.3\right)
        \qquad \text{[EDM2 (cosine attention)]}

    Each head of width d is normalised by itself: q k^T / sqrt(d) is sqrt(d) times the cosine of the angle between q and
    k. A mean of values over several pixels has less than unit magnitude.

    Args:
        heads, head_channels, kind: as in `models.layers.Attention`, including errors.
    """

    def __init__(self, channels: int, heads: int | None, head_channels: int | None, kind: str):
        super().__init__()
        one_of("attention", kind, ATTENTION_KINDS)
        self.heads, self.kind = heads_of(channels, heads, head_channels), kind
        self.to_q, self.to_k, self.to_v = (MPLinear(channels, channels) for _ in range(3))
        self.to_out = MPLinear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        height = x.shape[2]
        h = rearrange(x, "b c h w -> b (h w) c")
        q, k, v = (
            normalised(to(h).unflatten(2, (self.heads, -1)), 3).flatten(2) for to in (self.to_q, self.to_k, self.to_v)
        )
        h = attended(q, k, v, self.heads, self.kind)
        return mp_sum(x, rearrange(self.to_out(h), "b (h w) c -> b c h w", h=height), BALANCE)
