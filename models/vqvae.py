"""The VQ-VAE of van den Oord et al. (arXiv 1711.00937): images as grids of codes."""

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from models.layers import check_counts, one_of, size_of

UPDATES, FACTORS = ("gradient", "average"), (2, 4, 8)
MOST, MOST_BLOCKS = 2**20, 100  # of any count: beyond it are slips, which would take all memory or no end of time


def straight_through(z_e: Tensor, z_q: Tensor) -> Tensor:
    r"""Return z_q, with its gradient passed on to z_e.

    .. math:: \nabla_{z_e} L = \nabla_{z_q} L \qquad \text{[VQ-VAE (straight-through)]}

    Args: z_e, z_q of one shape.
    """
    return z_q.detach() + (z_e - z_e.detach())  # in this order exactly z_q, as 0 is added


class Codebook(nn.Module):
    r"""A codebook of K vectors, each of which represents the vectors that are nearest to it.

    Args:
        codes: K.
        channels: D, length of a vector.
        update: how the vectors are trained: "gradient", by the codebook's part of the loss; "average", by moving
            averages of their assigned vectors, see `update`.
        decay: gamma of the moving averages, in [0, 1).
        eps: of their Laplace smoothing, >= 0.
    Attributes:
        e: the vectors (K, D); a parameter with "gradient".
        N: the number of vectors assigned to each code in a batch, a moving average (K,).
        m: the sums of those vectors, moving averages (K, D); with "average" alone.
    Raises:
        ValueError: a count, decay or eps out of range, another update.
    """

    e: Tensor
    N: Tensor
    m: Tensor | None

    def __init__(self, codes: int, channels: int, update: str = "average", decay: float = 0.99, eps: float = 1e-5):
        super().__init__()
        check_counts(MOST, codes=codes, code_channels=channels)
        one_of("update", update, UPDATES)
        if not 0 <= decay < 1:
            raise ValueError(f"decay = {decay:g} must lie in [0, 1)")
        if not 0 <= eps < math.inf:
            raise ValueError(f"eps = {eps:g} must be a number >= 0")
        self.codes, self.decay, self.eps = codes, decay, eps
        e = torch.empty(codes, channels).uniform_(-1 / codes, 1 / codes)
        if update == "gradient":
            self.e = nn.Parameter(e)
        else:
            self.register_buffer("e", e)
        self.register_buffer("N", torch.ones(codes))
        self.register_buffer("m", e.clone() if update == "average" else None)

    def nearest(self, z_e: Tensor) -> Tensor:
        r"""Return the nearest code of each vector.

        .. math:: q(z = k \mid x) = 1 \text{ for } k = \operatorname{argmin}_j \lVert z_e(x) - e_j \rVert_2
            \text{, and } 0 \text{ else} \qquad \text{[VQ-VAE (1)]}

        Args: z_e (B, D, h, w).
        Returns: (B, h, w), integers in 0..K-1; the first of those that are equally near.
        """
        z = rearrange(z_e.detach(), "b d h w -> b h w d").to(self.e.dtype)
        with torch.autocast(z.device.type, enabled=False):  # in half precision many codes are equally near
            distance = self.e.square().sum(1) - 2 * z @ self.e.mT  # squared, but for |z|^2, the same for all codes
        return distance.argmin(-1)

    def embed(self, codes: Tensor) -> Tensor:
        r"""Return the vectors of codes.

        .. math:: z_q(x) = e_k \qquad \text{[VQ-VAE (2)]}

        Args: codes (B, h, w), integers in 0..K-1.
        Returns: (B, D, h, w).
        """
        return rearrange(F.embedding(codes, self.e), "b h w d -> b d h w")

    def losses(self, z_e: Tensor, z_q: Tensor) -> dict[str, Tensor]:
        r"""Return the last two parts of the loss.

        .. math:: L = \log p(x \mid z_q(x)) + \lVert \operatorname{sg}[z_e(x)] - e \rVert_2^2
            + \beta \lVert z_e(x) - \operatorname{sg}[e] \rVert_2^2 \qquad \text{[VQ-VAE (3)]}

        where sg stops gradients: the first moves codes to their assigned vectors, and may be replaced by averages;
        the second, in the paper with beta = 0.25, keeps the encoder's outputs near codes. (The sign of the first
        part is the paper's; what is minimised has -log p.) Both are means over the numbers of a sample, not sums.

        Args: z_e (B, D, h, w), z_q from `embed` of its codes.
        Returns: "codebook", for a codebook that is trained by its gradient, and "commitment": each (B,), without beta.
        """
        commitment = (z_e - z_q.detach()).square().mean((1, 2, 3))
        if self.m is not None:
            return {"commitment": commitment}
        return {"codebook": (z_e.detach() - z_q).square().mean((1, 2, 3)), "commitment": commitment}

    @torch.no_grad()
    def update(self, z_e: Tensor, codes: Tensor) -> None:
        r"""Update the averages of the vectors assigned to each code, and with "average" move the codes there.

        .. math:: N_i \leftarrow \gamma N_i + (1 - \gamma)\, n_i, \quad
            m_i \leftarrow \gamma m_i + (1 - \gamma) \sum_{j=1}^{n_i} z_{i,j}, \quad
            e_i = \frac{m_i}{\hat N_i} \qquad \text{[VQ-VAE (moving averages)]}

        .. math:: \hat N_i = \frac{N_i + \epsilon}{n + K \epsilon}\, n, \quad n = \sum_i N_i

        where z_{i,j} are the n_i vectors of code i. With N, m and a decay of 0 this is k-means. The smoothing is that
        of the authors' code; a code without assigned vectors does not move.

        Args: z_e (B, D, h, w), codes (B, h, w) of the whole batch.
        """
        of_code = F.one_hot(codes.flatten(), self.codes).to(self.e.dtype)  # (B h w, K)
        self.N.lerp_(of_code.sum(0), 1 - self.decay)
        if self.m is None:
            return
        z = rearrange(z_e, "b d h w -> (b h w) d").to(self.e.dtype)
        self.m.lerp_(of_code.mT @ z, 1 - self.decay)
        n = self.N.sum()
        N_hat = (self.N + self.eps) / (n + self.codes * self.eps) * n
        self.e.copy_(torch.where(self.N[:, None] > 0, self.m / N_hat[:, None], self.e))

    @torch.no_grad()
    def revive(self, z_e: Tensor, chosen: Tensor, least: float = 0.1) -> Tensor:
        """Move dead codes, with next to no assigned vectors, to outputs of the encoder.

        Args:
            z_e: (B, D, h, w).
            chosen: which of its B h w vectors each code takes if it is dead, integers (K,); all chance is in them.
            least: codes with N below this share of the mean of all are dead. A revived one has that mean.
        Returns:
            Which codes were dead, (K,).
        """
        mean = self.N.mean()
        dead = self.N.lt(least * mean)
        taken = rearrange(z_e, "b d h w -> (b h w) d")[chosen].to(self.e.dtype)
        self.N.copy_(torch.where(dead, mean, self.N))
        self.e.copy_(torch.where(dead[:, None], taken, self.e))
        if self.m is not None:
            self.m.copy_(torch.where(dead[:, None], mean * taken, self.m))
        return dead

    def perplexity(self, codes: Tensor) -> Tensor:
        r"""Return the perplexity of codes: K if all are equally frequent, 1 for a single one.

        .. math:: \exp\Big(-\sum_k p_k \log p_k\Big), \quad p_k \text{ the share of code } k

        Args: codes, integers of any shape.
        Returns: a scalar.
        """
        p = F.one_hot(codes.flatten(), self.codes).to(self.e.dtype).mean(0)
        return torch.special.entr(p).sum().exp()


class Residual(nn.Sequential):
    """x + 1x1 convolution of ReLU of 3x3 convolution of ReLU of x; (B, C, H, W) -> (B, C, H, W)."""

    def __init__(self, channels: int):
        super().__init__(
            nn.ReLU(), nn.Conv2d(channels, channels, 3, padding=1), nn.ReLU(), nn.Conv2d(channels, channels, 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = super().forward(x)
        return x + out


class Coded(NamedTuple):
    """The codes and reconstruction of images x by a VQ-VAE."""

    x: Tensor  # reconstructed, (B, in_channels, H, W)
    codes: Tensor  # (B, h, w)
    z_e: Tensor  # the encoder's output, (B, D, h, w)
    z_q: Tensor  # the vectors of its codes, (B, D, h, w)


class VQVAE(nn.Module):
    """An encoder of strided convolutions and residual blocks, a codebook, and a decoder that mirrors the encoder.

    Args:
        image_size: pixels, one number or (H, W); each divisible by factor.
        in_channels: of the image.
        codes: K, number of codes.
        code_channels: D, length of a code's vector.
        channels: C, width of all hidden layers.
        blocks: residual blocks of the encoder, and of the decoder.
        factor: pixels of a side for each code: 2, 4 or 8.
        update, decay, eps: of the codebook, see `Codebook`.
    Attributes:
        shape: (in_channels, H, W), of one x.
        grid: (h, w) = (H, W) / factor, of one sample's codes.
    Raises:
        ValueError: a count out of range, a size that the factor does not divide, with the nearest that it does.
    Source: Neural Discrete Representation Learning (arXiv 1711.00937), section 4.1, which has C = 256, factor = 4, and
        K = 512 for ImageNet.
    """

    def __init__(
        self,
        image_size: int | Sequence[int],
        in_channels: int = 3,
        codes: int = 128,
        code_channels: int = 64,
        channels: int = 128,
        blocks: int = 2,
        factor: int = 4,
        update: str = "average",
        decay: float = 0.99,
        eps: float = 1e-5,
    ):
        super().__init__()
        one_of("factor", factor, FACTORS)
        size = size_of(image_size, factor, f"factor = {factor}")
        check_counts(MOST, in_channels=in_channels, channels=channels)
        check_counts(MOST_BLOCKS, blocks=blocks)
        self.shape, self.grid = (in_channels, *size), (size[0] // factor, size[1] // factor)

        self.codebook = Codebook(codes, code_channels, update, decay, eps)  # first, to check its arguments
        widths = [in_channels] + [channels] * int(math.log2(factor))
        down: list[nn.Module] = []
        up: list[nn.Module] = []
        for outer, inner in itertools.pairwise(widths):
            down += [nn.Conv2d(outer, inner, 4, stride=2, padding=1), nn.ReLU()]
            up = [nn.ReLU(), nn.ConvTranspose2d(inner, outer, 4, stride=2, padding=1), *up]
        self.encoder = nn.Sequential(
            *down[:-1],  # the residual blocks begin with it
            *(Residual(channels) for _ in range(blocks)),
            nn.ReLU(),
            nn.Conv2d(channels, code_channels, 1),
        )
        self.decoder = nn.Sequential(
            nn.Conv2d(code_channels, channels, 3, padding=1), *(Residual(channels) for _ in range(blocks)), *up
        )

    @property
    def last_layer(self) -> Tensor:
        """The weights of the decoder's last layer."""
        layer = self.decoder[-1]
        assert isinstance(layer, nn.ConvTranspose2d)
        return layer.weight

    def forward(self, x: Tensor) -> Coded:
        """Return all that a loss needs; the gradient of the reconstruction passes straight from z_q to the encoder.

        Args: x (B, in_channels, H, W), in [-1, 1].

        Raises: ValueError for x of another shape.
        """
        z_e = self.z_e(x)
        codes = self.codebook.nearest(z_e)
        z_q = self.codebook.embed(codes)
        return Coded(self.decode(straight_through(z_e, z_q)), codes, z_e, z_q)

    def encode(self, x: Tensor) -> Tensor:
        """Return the codes (B, h, w) of images (B, in_channels, H, W); ValueError for another shape."""
        return self.codebook.nearest(self.z_e(x))

    def embed(self, codes: Tensor) -> Tensor:
        """Return the vectors (B, D, h, w) of codes (B, h, w); ValueError for another shape."""
        if tuple(codes.shape[1:]) != self.grid:
            raise ValueError(
                f"codes have shape {tuple(codes.shape)}; this network takes (B, {self.grid[0]}, {self.grid[1]})"
            )
        return self.codebook.embed(codes)

    def decode(self, z_q: Tensor) -> Tensor:
        """Return the images (B, in_channels, H, W) of the vectors of codes (B, D, h, w)."""
        x: Tensor = self.decoder(z_q)
        return x

    def z_e(self, x: Tensor) -> Tensor:
        """Return the encoder's vectors (B, D, h, w)."""
        if tuple(x.shape[1:]) != self.shape:
            raise ValueError(f"x has shape {tuple(x.shape)}; this network takes (B, {', '.join(map(str, self.shape))})")
        z_e: Tensor = self.encoder(x)
        return z_e
