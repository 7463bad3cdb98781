"""What a network is told besides the image: the time, as a vector."""

import math

import torch
from torch import Tensor, nn


class SinusoidalEmbedding(nn.Module):
    r"""Sines and cosines of t at geometrically spaced frequencies.

    .. math:: \omega_k = 10000^{-k / (d/2 - \text{freq\_shift})}, \quad k = 0 .. d/2 - 1, \quad
        (\sin \omega_0 t, \ldots, \cos \omega_0 t, \ldots)

    Args:
        dim: length d of the vector; an odd one is padded with a zero.
        flip_sin_to_cos: put the cosines first.
        freq_shift: 1 makes the last frequency 1/10000 exactly (Ho et al.), 0 is that of Vaswani et al.
    Source: DDPM (arXiv 2006.11239), appendix B; Attention Is All You Need (arXiv 1706.03762), section 3.5.
    """

    omega: Tensor

    def __init__(self, dim: int, flip_sin_to_cos: bool = False, freq_shift: float = 1):
        super().__init__()
        half = dim // 2
        if half <= freq_shift:
            raise ValueError(
                f"an embedding of {dim} channels is too narrow for freq_shift = {freq_shift:g}; allowed: "
                f"at least {2 * (math.floor(freq_shift) + 1)}"
            )
        self.dim, self.flip_sin_to_cos = dim, flip_sin_to_cos
        omega = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float64) / (half - freq_shift))
        self.register_buffer("omega", omega.float(), persistent=False)

    def forward(self, t: Tensor) -> Tensor:
        """t: (B,), integer or real -> (B, dim)."""
        angle = t[:, None].to(self.omega.dtype) * self.omega
        parts = [angle.cos(), angle.sin()] if self.flip_sin_to_cos else [angle.sin(), angle.cos()]
        return nn.functional.pad(torch.cat(parts, dim=1), (0, self.dim % 2))


class TimeEmbedding(nn.Sequential):
    """t (B,) -> (B, out): the sinusoidal embedding of size `channels`, through a two-layer MLP."""

    def __init__(self, channels: int, out: int, flip_sin_to_cos: bool = False, freq_shift: float = 1):
        super().__init__(
            SinusoidalEmbedding(channels, flip_sin_to_cos, freq_shift),
            nn.Linear(channels, out),
            nn.SiLU(),
            nn.Linear(out, out),
        )
