"""Codecs: encode data to latents with a frozen autoencoder, and decode them."""

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, Self

import torch
from einops import rearrange
from torch import Tensor


def _itself(x: Tensor) -> Tensor:
    return x


class Codec(ABC):
    """A frozen autoencoder as an encoder of data and decoder of latents.

    Args:
        model: the autoencoder, with `shape` of a sample and `grid` or `latent_shape` of its latents.
        picture: maps its output to a picture.
    Attributes:
        of: the shape of a sample, (C, H, W).
        shape: of its latents, as a network is trained on them.
        kind: their kind: "codes" or "latents".
    """

    kind: str
    of: tuple[int, ...]
    shape: tuple[int, ...]

    def __init__(self, model: Any, picture: Callable[[Tensor], Tensor] = _itself):
        self.model = model
        self.picture, self.of = picture, tuple(self.model.shape)

    @abstractmethod
    def posterior(self, x: Tensor) -> Tensor:
        """Return parameters of q(z | x) of samples (B, *of), as stored, (B, *): mean and log variance, or codes."""

    @abstractmethod
    def sample(self, posterior: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Draw latents (B, *shape) from stored parameters of q(z | x).

        Args:
            generator: draws those that have a distribution; None takes their means.
        """

    @abstractmethod
    def decode(self, z: Tensor) -> Tensor:
        """Decode latents (B, *shape) to samples (B, *of), within the range of data."""

    def reconstructed(self, x: Tensor) -> Tensor:
        """Encode and decode samples (B, *of)."""
        return self.decode(self.sample(self.posterior(x)))

    def fit(self, posterior: Tensor) -> Self:
        """Return a codec whose scale is measured on stored posteriors (N, *); itself for codes, which have no scale."""
        return self

    def state(self) -> dict[str, float]:
        """Return the measured numbers, by name."""
        return {}

    def with_state(self, state: dict[str, float]) -> Self:
        """Return a codec with the numbers of `state`."""
        return self


class Discrete(Codec):
    """The codec of a VQ-VAE: latents are codes, whole numbers of a codebook.

    Args:
        model: with `encode(x)` -> (B, h, w), `embed(codes)`, `decode(z_q)`, `grid` and `codebook.codes`.
        picture: as in `Codec`.
    Attributes:
        codes: K, the size of the codebook.
    """

    kind = "codes"

    def __init__(self, model: Any, picture: Callable[[Tensor], Tensor] = _itself):
        super().__init__(model, picture)
        self.shape, self.codes = tuple(self.model.grid), int(self.model.codebook.codes)

    @torch.no_grad()
    def posterior(self, x: Tensor) -> Tensor:
        """Return the codes of samples, int32 (B, h, w)."""
        codes: Tensor = self.model.encode(x)
        return codes.int()

    def sample(self, posterior: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Return the codes, int64 (B, h, w)."""
        return posterior.long()

    @torch.no_grad()
    def decode(self, z: Tensor) -> Tensor:
        """Decode codes (B, h, w) to pictures (B, *of)."""
        return self.picture(self.model.decode(self.model.embed(z))).clamp(-1, 1)


class Continuous(Codec):
    r"""The codec of an autoencoder with a KL: latents scaled to unit variance.

    .. math:: z = s\,(\mu(x) + \sigma(x)\, \epsilon - m), \quad \epsilon \sim \mathcal N(0, I)
        \qquad \text{[LDM (scaled latents)]}

    with m and s measured on the training data, so that all numbers of z have mean 0 and variance 1.

    Args:
        model: with `encode(x)` -> (mean, log variance), each (B, c, h, w), `decode(z)` and `latent_shape`.
        picture: as in `Codec`.
        scale, shift: s and m.
    Source: High-Resolution Image Synthesis with Latent Diffusion Models (arXiv 2112.10752), appendix G; it has m = 0.
    """

    kind = "latents"

    def __init__(
        self,
        model: Any,
        picture: Callable[[Tensor], Tensor] = _itself,
        scale: float = 1.0,
        shift: float = 0.0,
    ):
        super().__init__(model, picture)
        self.shape, self.scale, self.shift = tuple(self.model.latent_shape), scale, shift

    def of_size(self, height: int, width: int) -> Self:
        """Return a codec of images of another size, which a convolutional autoencoder takes as well.

        Raises: ValueError for sides that its factor does not divide, with the nearest that it does.
        """
        f = self.model.factor
        for side in (height, width):
            if side % f or side < 1:
                near = sorted({max(f, side // f * f), (side // f + 1) * f})
                raise ValueError(
                    f"it encodes squares of {f}x{f} pixels, and {side} of {width}x{height} is not divisible by {f}; "
                    f"nearest that are: {', '.join(map(str, near))}"
                )
        other = copy.copy(self)
        other.of, other.shape = (self.of[0], height, width), (self.shape[0], height // f, width // f)
        return other

    @torch.no_grad()
    def posterior(self, x: Tensor) -> Tensor:
        """Return the mean and the log variance of each number, (B, 2 c, h, w)."""
        return torch.cat(self.model.encode(x), dim=1)

    def sample(self, posterior: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Draw latents (B, c, h, w)."""
        mu, log_variance = posterior.chunk(2, dim=1)
        if generator is not None:
            eps = torch.randn(mu.shape, generator=generator, device=generator.device).to(mu)
            mu = mu + (log_variance / 2).exp() * eps
        return self.scale * (mu - self.shift)

    @torch.no_grad()
    def decode(self, z: Tensor) -> Tensor:
        """Decode latents (B, c, h, w) to pictures (B, *of)."""
        return self.picture(self.model.decode(z / self.scale + self.shift)).clamp(-1, 1)

    def fit(self, posterior: Tensor) -> Self:
        """Return a copy with m and s measured on stored posteriors, (N, 2 c, h, w).

        Raises: ValueError for latents that are all the same.
        """
        mu, log_variance = rearrange(posterior, "n (two c) h w -> two (n c h w)", two=2).double()
        variance = mu.var(correction=0) + log_variance.exp().mean()
        if not 0 < variance < torch.inf:
            raise ValueError(f"the latents have the variance {variance.item():g}, and cannot be scaled to 1")
        return self.with_state({"scale": variance.rsqrt().item(), "shift": mu.mean().item()})

    def state(self) -> dict[str, float]:
        """Return the scale and the shift."""
        return {"scale": self.scale, "shift": self.shift}

    def with_state(self, state: dict[str, float]) -> Self:
        """Return a copy with this scale and shift."""
        other = copy.copy(self)
        other.scale, other.shift = float(state["scale"]), float(state["shift"])
        return other
