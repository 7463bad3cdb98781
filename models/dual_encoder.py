"""A dual encoder (CLIP): pictures and texts are mapped into one space, where matching ones lie close."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.layers import check_counts
from models.noisy_classifier import NoisyClassifier
from models.text import TextEncoder

MOST = 2**16  # of the space's dimensions
FIRST_SCALE, LARGEST_SCALE = 1 / 0.07, 100.0


class DualEncoder(nn.Module):
    r"""Encoders of pictures and of texts to vectors of length 1, with a learned scale of their products.

    .. math:: u = \frac{W_u f(x)}{\|W_u f(x)\|}, \quad v = \frac{W_v g(c)}{\|W_v g(c)\|}, \quad
        s = e^\tau \qquad \text{[CLIP (similarity)]}

    with the encoder of a U-Net as f, at the end averaged over the picture, and as g the encoder's vector of a text's
    end token. That is the token with the highest id, as in a tokenizer of byte pairs.

    Args:
        image_size: side in pixels, or (H, W).
        text: the encoder of texts; it is trained along.
        in_channels: channels of the pictures.
        features: d, of the space.
        channels, channel_mults, blocks, attention_resolutions, heads, head_channels, dropout, groups, patch: of the
            encoder of pictures, as in `models.unet.UNet`.
    Attributes:
        takes: the tokens of a text.
        log_scale: tau, at first the logarithm of 1 / 0.07; `renormalise_` keeps s at 100 or below.
    Raises: ValueError as the U-Net, and for features out of range.
    Source: CLIP (arXiv 2103.00020), sections 2.3 to 2.5.
    """

    takes = ("tokens",)

    def __init__(
        self,
        image_size: int | Sequence[int],
        text: TextEncoder,
        in_channels: int = 3,
        features: int = 128,
        channels: int = 32,
        channel_mults: Sequence[int] | None = (1, 2, 4),
        blocks: int | Sequence[int] = 1,
        attention_resolutions: Sequence[int] | None = (),
        heads: int | None = 1,
        head_channels: int | None = None,
        dropout: float = 0.0,
        groups: int = 8,
        patch: int = 1,
    ):
        super().__init__()
        check_counts(MOST, features=features)
        if features < 2:
            raise ValueError(
                f"features = {features}: in a space of one dimension all is 1 or -1; allowed: 2 to {MOST:,}"
            )
        self.image = NoisyClassifier(
            image_size, in_channels, features, channels, channel_mults, blocks, attention_resolutions, heads,
            head_channels, dropout, groups, patch,
        )  # fmt: skip
        self.text, self.features, self.shape = text, features, self.image.shape
        self.project = nn.Linear(text.channels, features, bias=False)
        self.log_scale = nn.Parameter(torch.tensor(math.log(FIRST_SCALE)))

    def of_pictures(self, x: Tensor) -> Tensor:
        """Return u (B, d), float32, of pictures (B, C, H, W) in [-1, 1]."""
        f = self.image(x, torch.zeros(len(x), dtype=torch.long, device=x.device))  # t = 0: there is no noise
        return F.normalize(f.float(), dim=1)

    def of_texts(self, ids: Tensor) -> Tensor:
        """Return v (B, d), float32, of texts (B, L) as ids."""
        g = self.text.pooled(ids, ids.amax(1, keepdim=True))
        return F.normalize(self.project(g).float(), dim=1)

    def forward(self, x: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Return (u, v), each (B, d), of pictures (B, C, H, W) and texts (B', L)."""
        return self.of_pictures(x), self.of_texts(ids)

    @property
    def scale(self) -> Tensor:
        """The scale s."""
        return self.log_scale.exp()

    @torch.no_grad()
    def renormalise_(self) -> None:
        """Clamp s to at most 100, after a step: larger ones make training unstable."""
        self.log_scale.clamp_(max=math.log(LARGEST_SCALE))
