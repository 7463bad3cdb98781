"""Variational autoencoders, with or without classes."""

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ddpm.data.batch import Batch
from ddpm.data.dataset import Dataset
from ddpm.latent.codec import Continuous
from ddpm.latent.elbo import kl, reparametrised, with_free_bits
from ddpm.randomness import Keyed
from ddpm.sources.base import Source
from ddpm.sources.decoded import Decoded
from ddpm.sources.reconstructed import Reconstructed
from ddpm.training.task import Losses
from ddpm.training.tasks.autoencoder import SHOWN, Autoencoder, Seen

SIDE = 20  # pictures of a side of the map of two codings
TRAVERSED = 8  # codings that are traversed, at most
REACH = 3.0  # range of traversals around zero, in standard deviations of the prior


@dataclass(frozen=True, kw_only=True)
class Coded(Seen):
    """Data, with the noise that samples their latents.

    Args:
        eps: standard normal noise, (B, *latent_shape).
    """

    eps: Tensor


class VAE(Autoencoder):
    r"""Train an encoder and a decoder by the evidence lower bound, or by other parts of a loss in its place.

    .. math:: \log p_\theta(x) \ge -L, \quad L = -E_{q_\phi(z \mid x)}[\log p_\theta(x \mid z)] +
        D_\text{KL}(q_\phi(z \mid x) \| p(z)) \qquad \text{[VAE (3)]}

    with parts = {likelihood: 1, "kl": 1}; the expectation is over one draw of z. A weight other than 1 of kl is beta.

    Args:
        model: with `encode(x, y)` -> (mean, log variance), each (B, *latent_shape), `decode(z, y)` -> (B, *),
            `latent_shape`, and `log_scale` where a part has a scale.
        parts: name -> weight, 0 for a part that is not computed; of `ddpm.latent.reconstruction.PARTS`, and kl.
        binarise: of the Bernoulli likelihood: draw black or white for each pixel, with its brightness as probability,
            anew in each step; held-out data once for all. False takes grey as it is, of which there is no likelihood.
        warmup: the share of the budget over which the weight of kl rises from 0, in [0, 1]; kl is logged as weighted.
        free_bits: nats for each coding that cost nothing, see `ddpm.latent.elbo.with_free_bits`.
        only: as in `Task`.
    Raises: ValueError for parts that are not known, or that interpret the decoder's output differently.
    Source: Auto-Encoding Variational Bayes (arXiv 1312.6114); beta-VAE (Higgins et al. 2017).
    """

    def __init__(
        self,
        model: nn.Module,
        parts: Mapping[str, float],
        binarise: bool = True,
        warmup: float = 0.0,
        free_bits: float = 0.0,
        only: Sequence[str] | None = None,
    ):
        super().__init__(model, parts, ["kl"], binarise, only)
        beta = parts.get("kl", 0)
        if isinstance(beta, bool) or not 0 <= beta < math.inf:
            raise ValueError(f"parts.kl = {beta!r} must be >= 0 and finite")
        if isinstance(warmup, bool) or not 0 <= warmup <= 1:
            raise ValueError(f"warmup = {warmup!r} must lie in [0, 1]")
        if isinstance(free_bits, bool) or not 0 <= free_bits < math.inf:
            raise ValueError(f"free_bits = {free_bits!r} must be >= 0")
        self.beta, self.warmup, self.free_bits = beta, warmup, free_bits
        self.couples_batch = free_bits > 0
        self.replayable = warmup == 0

    # -------------------------------------------------------------------------------------------------- training

    def draw(self, batch: Batch, random: Keyed, progress: float) -> Coded:
        """Draw eps for a step's whole batch, and which pixels are white."""
        shape, device = (len(batch), *self.model.latent_shape), batch.x.device
        eps = torch.randn(shape, device=device, generator=random("eps"))
        uniform = functools.partial(torch.rand, batch.x.shape, device=device, generator=random("binarise"))
        return Coded(x=self.reconstruction.drawn(batch.x, uniform), condition=batch.condition, eps=eps)

    def output(self, drawn: Coded) -> Tensor:
        """Return the decoder's output (B, *) for a draw of the posterior."""
        y = drawn.condition.for_network(self.model)
        mean, log_variance = self.model.encode(drawn.x, y)
        output: Tensor = self.model.decode(reparametrised(mean, log_variance, drawn.eps), y)
        return output

    def losses(self, drawn: Coded, progress: float) -> Losses:  # type: ignore[override]  # its own draws
        """Return the parts by name, each (B,)."""
        y = drawn.condition.for_network(self.model)
        mean, log_variance = self.model.encode(drawn.x, y)
        output = self.model.decode(reparametrised(mean, log_variance, drawn.eps), y)
        parts = self.compared(output, drawn, progress)
        if self.beta:
            of_codings = kl(mean, log_variance).flatten(1)
            whole = with_free_bits(of_codings, self.free_bits) if self.free_bits else of_codings.sum(1)
            parts["kl"] = whole * min(1.0, progress / self.warmup) if self.warmup else whole
        return parts

    # ------------------------------------------------------------------------------------------------ evaluation

    @property
    def draws_of_data(self) -> bool:  # type: ignore[override]  # by the network
        """Whether samples are reconstructions: where latents are maps."""
        return self.maps

    @property
    def maps(self) -> bool:
        """Whether the latents are maps, (c, h, w), for latent diffusion; else flat codings."""
        return len(self.model.latent_shape) == 3

    def codec(self) -> Continuous | None:
        """Return the codec between data and latents; None for flat codings, which have no spatial layout."""
        return Continuous(self.model, self.reconstruction.picture) if self.maps else None

    def source(
        self,
        data: Dataset | None,
        seed: int,
        device: torch.device,
        precision: str = "fp32",
        requested: Sequence[int] | None = None,
    ) -> Source:
        """Return the source of decoded prior samples; of reconstructions where latents are maps with a poor prior."""
        codec = self.codec()
        if codec is not None and data is not None:
            return Reconstructed(codec, data, seed, device, precision, requested)
        return Decoded(self.model, self.reconstruction, self.model.shape, seed, device, precision, requested)

    @torch.no_grad()
    def draw_results(self, folder: Path, data: Dataset) -> None:
        """Draw figures of the codings: reconstructions, traversals, interpolations, a map of two codings."""
        if "pictures" not in data.holds:
            return
        from ddpm.figures import images, plots

        model, batch = self.model.eval(), self.figure_batch(data)
        device = batch.x.device
        seen = self.draw(batch, Keyed(0, device=device), 1.0).x
        mean, log_variance = model.encode(seen, batch.condition.for_network(model))

        def decoded(z: Tensor, of: Tensor) -> Tensor:
            """Return pictures of codings z (n, *latent_shape), decoded under the conditions of these data (n,)."""
            condition = batch.condition.rows(lambda x: x[of]).for_network(model)
            return self.reconstruction.picture(model.decode(z, condition)).cpu()

        every, first = torch.arange(len(mean)), torch.zeros(SHOWN, dtype=torch.long)
        rows = [("held out", batch.x.cpu()), ("as seen", seen.cpu()), ("reconstructed", decoded(mean, every))]
        plots.labelled_rows(folder / "reconstructions.png", rows if self.reconstruction.binarise else rows[::2])
        if self.maps:
            return

        rows, at = [], torch.linspace(-REACH, REACH, SHOWN, device=device)
        for j in kl(mean, log_variance).mean(0).argsort(descending=True)[:TRAVERSED].tolist():  # the most informative
            z = mean[first].index_copy(1, torch.tensor([j], device=device), at[:, None])
            rows.append((f"$z_{{{j}}}$", decoded(z, first)))
        plots.labelled_rows(
            folder / "traversals.png", rows, f"one coding from {-REACH:g} to {REACH:g}, the others fixed"
        )

        ways, share = [], torch.linspace(0, 1, SHOWN, device=device)[:, None]
        for i in range(0, len(mean) - 1, 2):
            nearer = i + (share[:, 0] > 0.5).long().cpu()
            ways.append((f"{i} to {i + 1}", decoded(mean[i] + share * (mean[i + 1] - mean[i]), nearer)))
        plots.labelled_rows(folder / "interpolations.png", ways, "straight lines between the codings of two images")
        if model.codings == 2:
            quantile = (torch.arange(SIDE, device=device) + 0.5) / SIDE
            side = math.sqrt(2) * torch.erfinv(2 * quantile - 1)  # of the prior: the map shows equal shares of it
            z = torch.cartesian_prod(-side, side).flip(1)
            images.save_samples(folder / "latent_map.png", decoded(z, first[:1].expand(len(z))), SIDE)
