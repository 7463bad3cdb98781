"""The transformer of latent diffusion on feature maps: every pixel attends to the others and to tokens."""

from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from models.layers import attended, check_counts, group_norm, heads_of, normed, zeroed

MOST_LAYERS = 100  # of one transformer: beyond it are slips
NORM_EPS = 1e-6  # of the group norm before it, whatever that of the residual blocks is


class TokenAttention(nn.Module):
    r"""Attention from each of n vectors to the vectors of a source.

    .. math:: \operatorname{Attention}(Q, K, V) = \operatorname{softmax}\left(\frac{Q K^T}{\sqrt d}\right) V, \quad
        Q = W_Q\, h, \; K = W_K\, \tau, \; V = W_V\, \tau \qquad \text{[LDM (cross-attention)]}

    Args:
        channels: C of the vectors, which is also that of q, k and v together.
        heads: H, each of width d = C / H.
        source_channels: D of the source; None for attention of the vectors to each other.
    Source: Latent Diffusion (arXiv 2112.10752), section 3.3.
    """

    def __init__(self, channels: int, heads: int, source_channels: int | None = None):
        super().__init__()
        source = channels if source_channels is None else source_channels
        self.heads = heads
        self.to_q = nn.Linear(channels, channels, bias=False)
        self.to_k, self.to_v = (nn.Linear(source, channels, bias=False) for _ in range(2))
        self.to_out = nn.Linear(channels, channels)

    def forward(self, h: Tensor, source: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """Return the attention of the vectors to the source.

        Args:
            h: (B, n, C).
            source: tau, (B, L, D); None for h itself.
            mask: true for vectors of the source to attend to, (B, L); None for all.
        Returns:
            (B, n, C).
        """
        source = h if source is None else source
        q, k, v = self.to_q(h), self.to_k(source), self.to_v(source)
        if mask is None:
            return self.to_out(attended(q, k, v, self.heads, "full"))
        q, k, v = (rearrange(z, "b n (e d) -> b e n d", e=self.heads) for z in (q, k, v))
        taken = F.scaled_dot_product_attention(q, k, v, attn_mask=rearrange(mask, "b l -> b 1 1 l"))
        return self.to_out(rearrange(taken, "b e n d -> b n (e d)"))


class GatedFeedForward(nn.Module):
    r"""A gated feed-forward network: two linear layers, C to 4C to C, the first with a gate.

    .. math:: \operatorname{GEGLU}(x) = \operatorname{GELU}(x W + b) \otimes (x V + c) \qquad \text{[GLU (5)]}

    Args:
        channels: C.
    Source: GLU Variants Improve Transformer (arXiv 2002.05202).
    """

    def __init__(self, channels: int):
        super().__init__()
        self.gated = nn.Linear(channels, 8 * channels)  # V and c, then W and b
        self.back = nn.Linear(4 * channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        """(B, n, C) -> (B, n, C)."""
        value, gate = self.gated(x).chunk(2, dim=-1)
        return self.back(F.gelu(gate) * value)


class TransformerBlock(nn.Module):
    """Self-attention, attention to tokens, a gated feed-forward; each after a layer norm, its input added.

    Args:
        channels: C.
        heads: of both attentions.
        token_channels: D of the tokens.
        only_cross_attention: the first attention is to the tokens too.
    """

    def __init__(self, channels: int, heads: int, token_channels: int, only_cross_attention: bool = False):
        super().__init__()
        self.only_cross_attention = only_cross_attention
        self.norm_1, self.norm_2, self.norm_3 = (nn.LayerNorm(channels) for _ in range(3))
        self.self_attention = TokenAttention(channels, heads, token_channels if only_cross_attention else None)
        self.cross_attention = TokenAttention(channels, heads, token_channels)
        self.feed_forward = GatedFeedForward(channels)

    def forward(self, h: Tensor, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """h (B, n, C), tokens (B, L, D), mask of tokens (B, L), true for those to attend to -> (B, n, C)."""
        first = (tokens, mask) if self.only_cross_attention else (None, None)
        h = h + self.self_attention(self.norm_1(h), *first)
        h = h + self.cross_attention(self.norm_2(h), tokens, mask)
        return h + self.feed_forward(self.norm_3(h))


class SpatialTransformer(nn.Module):
    """Transformer blocks over the pixels of a feature map, between a group norm and two projections; the map is added.

    Args:
        channels: C of the map.
        token_channels: D of the tokens.
        heads, head_channels: of all attentions, as in `models.layers.Attention`.
        layers: number of blocks.
        linear_projection: the projections are linear layers, and not the 1x1 convolutions that compute the same.
        only_cross_attention: see `TransformerBlock`.
        groups: of the group norm.
    Raises:
        ValueError: heads that do not divide the channels; an invalid count.
    Source: Latent Diffusion (arXiv 2112.10752), appendix E.2.1.
    """

    def __init__(
        self,
        channels: int,
        token_channels: int,
        heads: int | None,
        head_channels: int | None = None,
        layers: int = 1,
        linear_projection: bool = False,
        only_cross_attention: bool = False,
        groups: int = 32,
    ):
        super().__init__()
        check_counts(MOST_LAYERS, transformer_layers=layers)
        self.heads, self.linear_projection = heads_of(channels, heads, head_channels), linear_projection
        self.norm_in = group_norm(channels, groups, NORM_EPS)
        self.proj_in = nn.Linear(channels, channels) if linear_projection else nn.Conv2d(channels, channels, 1)
        self.blocks = nn.ModuleList(
            TransformerBlock(channels, self.heads, token_channels, only_cross_attention) for _ in range(layers)
        )
        self.proj_out = zeroed(nn.Linear(channels, channels) if linear_projection else nn.Conv2d(channels, channels, 1))

    def forward(self, x: Tensor, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """x (B, C, H, W), tokens (B, L, D), mask of tokens (B, L), true for those to attend to -> (B, C, H, W)."""
        height, h = x.shape[2], normed(self.norm_in, x)
        h = rearrange(h if self.linear_projection else self.proj_in(h), "b c h w -> b (h w) c")
        h = self.proj_in(h) if self.linear_projection else h
        for block in self.blocks:
            h = block(h, tokens, mask)
        h = self.proj_out(h) if self.linear_projection else h
        h = rearrange(h, "b (h w) c -> b c h w", h=height)
        return x + (h if self.linear_projection else self.proj_out(h))
