"""The text encoder of CLIP (arXiv 2103.00020): a causal transformer over tokens."""

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from models.layers import check_counts, heads_of, one_of

ACTIVATIONS = ("quick_gelu", "gelu")
MOST, MOST_LAYERS = 2**20, 100  # of any count: beyond it are slips, which would take all memory or no end of time


def quick_gelu(x: Tensor) -> Tensor:
    r"""Return GELU with a logistic function for the normal distribution's; any shape.

    .. math:: x\, \sigma(1.702\, x) \qquad \text{[GELU (sigmoid)]}

    Source: Gaussian Error Linear Units (arXiv 1606.08415), section 2.
    """
    return x * torch.sigmoid(1.702 * x)


class CausalAttention(nn.Module):
    r"""Causal attention: a token attends to itself and those before it.

    .. math:: y_i = \sum_{j \le i} a_{ij} v_j, \quad
        a_{ij} = \frac{\exp(q_i^T k_j / \sqrt d)}{\sum_{l \le i} \exp(q_i^T k_l / \sqrt d)}
        \qquad \text{[CLIP (causal)]}

    in each head, of width d; then a linear map of all heads together.

    Args:
        channels: D, of a token.
        heads: of the attention; divides D.
    Source: CLIP (arXiv 2103.00020), section 2.4, which masks as GPT-2 does.
    """

    def __init__(self, channels: int, heads: int):
        super().__init__()
        self.heads = heads
        self.to_q, self.to_k, self.to_v, self.to_out = (nn.Linear(channels, channels) for _ in range(4))

    def forward(self, h: Tensor) -> Tensor:
        """(B, L, D) -> (B, L, D)."""
        q, k, v = (rearrange(to(h), "b l (e d) -> b e l d", e=self.heads) for to in (self.to_q, self.to_k, self.to_v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.to_out(rearrange(y, "b e l d -> b l (e d)"))


class Block(nn.Module):
    r"""Causal attention, then an MLP on each token; the norm comes before both.

    .. math:: h \leftarrow h + \mathrm{Attention}(\mathrm{LN}_1(h)), \quad
        h \leftarrow h + W_2\, \phi(W_1 \mathrm{LN}_2(h) + b_1) + b_2 \qquad \text{[CLIP (block)]}

    Args:
        channels: D, of a token.
        heads: of the attention; divides D.
        hidden: of the MLP.
        activation: phi, "quick_gelu" or "gelu".
        norm_eps: added to the variance in layer norms.
    Source: CLIP (arXiv 2103.00020), section 2.4: the transformer of GPT-2 (Radford et al. 2019), section 2.3.
    """

    def __init__(self, channels: int, heads: int, hidden: int, activation: str, norm_eps: float):
        super().__init__()
        self.activation = activation
        self.norm_1, self.norm_2 = (nn.LayerNorm(channels, eps=norm_eps) for _ in range(2))
        self.attention = CausalAttention(channels, heads)
        self.linear_1, self.linear_2 = nn.Linear(channels, hidden), nn.Linear(hidden, channels)

    def forward(self, h: Tensor) -> Tensor:
        """(B, L, D) -> (B, L, D)."""
        phi = quick_gelu if self.activation == "quick_gelu" else F.gelu
        h = h + self.attention(self.norm_1(h))
        return h + self.linear_2(phi(self.linear_1(self.norm_2(h))))


class TextEncoder(nn.Module):
    r"""The text encoder: tokens as vectors, each depending on those before it.

    .. math:: h^0_i = e_{c_i} + p_i, \quad h^n = \mathrm{Block}_n(h^{n-1}), \quad y = \mathrm{LN}(h^N)
        \qquad \text{[CLIP (text)]}

    for tokens c_1..c_L. Tokens after it, such as padding, do not change its vector.

    Args:
        vocabulary: number of tokens.
        length: most tokens of a text, those of start and end included.
        channels: D, length of the vectors, divisible by heads.
        layers: blocks N.
        heads: of each block's attention.
        activation: of the MLPs: "quick_gelu", that of CLIP; or "gelu", that of OpenCLIP and of Stable Diffusion 2.
        feed_forward: width of the MLPs' hidden layer; None for 4 D.
        norm_eps: added to the variance in layer norms, > 0.
    Raises:
        ValueError: an argument out of range, or heads that do not divide the channels, with the nearest that do.
    Source: CLIP (arXiv 2103.00020), section 2.4, whose base has the widths that are the defaults here. In Stable
        Diffusion 1 (the text half of ViT-L/14) channels are 768, layers 12, heads 12; in 2 they are 1024, 23, 16.
    """

    def __init__(
        self,
        vocabulary: int,
        length: int = 77,
        channels: int = 512,
        layers: int = 12,
        heads: int = 8,
        activation: str = "quick_gelu",
        feed_forward: int | None = None,
        norm_eps: float = 1e-5,
    ):
        super().__init__()
        feed_forward = 4 * channels if feed_forward is None else feed_forward
        check_counts(MOST, vocabulary=vocabulary, length=length, channels=channels, feed_forward=feed_forward)
        check_counts(MOST_LAYERS, layers=layers)
        one_of("activation", activation, ACTIVATIONS)
        if not 0 < norm_eps < 1:
            raise ValueError(f"norm_eps = {norm_eps:g} must lie in (0, 1)")
        self.vocabulary, self.length, self.channels, self.activation = vocabulary, length, channels, activation
        self.token_embedding = nn.Embedding(vocabulary, channels)
        self.position_embedding = nn.Embedding(length, channels)
        heads = heads_of(channels, heads, None)
        self.blocks = nn.ModuleList(Block(channels, heads, feed_forward, activation, norm_eps) for _ in range(layers))
        self.norm_out = nn.LayerNorm(channels, eps=norm_eps)
        self._initialise()

    def _initialise(self) -> None:
        """Initialise as CLIP: the more blocks there are, the smaller the contribution of each."""
        D, N = self.channels, len(self.blocks)
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        nn.init.normal_(self.position_embedding.weight, std=0.01)
        for block in self.blocks:
            assert isinstance(block, Block)
            maps = block.attention
            stds = {maps.to_q: D**-0.5, maps.to_k: D**-0.5, maps.to_v: D**-0.5, maps.to_out: (2 * N * D) ** -0.5}
            stds |= {block.linear_1: (2 * D) ** -0.5, block.linear_2: (2 * N * D) ** -0.5}
            for layer, std in stds.items():
                nn.init.normal_(layer.weight, std=std)
                nn.init.zeros_(layer.bias)

    def forward(self, ids: Tensor) -> Tensor:
        """Return the vector of each token, after the last norm.

        Args:
            ids: integers (B, L) in 0..vocabulary-1, with 1 <= L <= length.
        Returns:
            (B, L, D).
        Raises:
            ValueError: ids of another shape or type; an id beyond the vocabulary (checked on the CPU only, as it would
                synchronise a GPU).
        """
        self._check(ids)
        h = self.token_embedding(ids) + self.position_embedding.weight[: ids.shape[1]]
        for block in self.blocks:
            h = block(h)
        return self.norm_out(h)

    def pooled(self, ids: Tensor, end: int | Tensor) -> Tensor:
        """Return one vector a text: that of its first end token, which has attended to all of the text.

        Args:
            ids: (B, L), as in `forward`.
            end: id of the token that ends a text; or those of each text, (B, 1).
        Returns:
            (B, D).
        Raises:
            ValueError: as `forward`; a text without that token (checked on the CPU only).
        """
        is_end = ids == end
        if is_end.device.type == "cpu" and not is_end.any(1).all():
            rows = (~is_end.any(1)).nonzero().flatten().tolist()
            raise ValueError(f"the texts in rows {rows[:10]} have no token {end}, at which a text is pooled")
        return self(ids)[torch.arange(len(ids), device=ids.device), is_end.int().argmax(1)]

    def _check(self, ids: Tensor) -> None:
        """Raise ValueError for ids that this network cannot take."""
        if ids.ndim != 2 or not 1 <= ids.shape[1] <= self.length or ids.dtype not in (torch.int64, torch.int32):
            raise ValueError(
                f"ids are {ids.dtype} of shape {tuple(ids.shape)}; this network takes integers (torch.int64 or "
                f"torch.int32) of shape (B, L), L from 1 to {self.length}"
            )
        if ids.device.type == "cpu" and ids.numel():
            low, high = (int(bound) for bound in ids.aminmax())
            if low < 0 or high >= self.vocabulary:
                wrong = low if low < 0 else high
                raise ValueError(
                    f"ids hold {wrong}, beyond the {self.vocabulary:,} tokens that this network knows; allowed: 0 to "
                    f"{self.vocabulary - 1}. The tokenizer belongs to another network"
                )
