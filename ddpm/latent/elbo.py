r"""The evidence lower bound of variational autoencoders: posterior q(z given x), its KL, and tighter bounds.

The prior is p(z) = N(0, I), the posterior q(z given x) = N(mu, sigma^2) with a variance for each coding. All is in
nats.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ddpm.latent.reconstruction import Reconstruction


def reparametrised(mean: Tensor, log_variance: Tensor, eps: Tensor) -> Tensor:
    r"""Return a draw of the posterior, through which gradients reach its parameters.

    .. math:: z = \mu + \sigma \odot \epsilon, \quad \epsilon \sim \mathcal N(0, I)
        \qquad \text{[VAE (reparametrisation)]}

    Args:
        mean, log_variance: of q(z given x), (B, *); eps: standard normal, (B, *) or (k, B, *).
    Source: Auto-Encoding Variational Bayes (arXiv 1312.6114), section 2.4.
    """
    return mean + (log_variance / 2).exp() * eps


def kl(mean: Tensor, log_variance: Tensor) -> Tensor:
    r"""Return the KL divergence of the posterior of each coding from the prior.

    .. math:: D_\text{KL}(q(z_j \mid x) \| p(z_j)) = -\tfrac12 \left(1 + \log \sigma_j^2 - \mu_j^2 - \sigma_j^2\right)
        \qquad \text{[VAE (KL)]}

    Args:
        mean, log_variance: (B, *).
    Returns:
        Of each coding, not summed, (B, *).
    Source: Auto-Encoding Variational Bayes (arXiv 1312.6114), appendix B.
    """
    return -(1 + log_variance - mean.square() - log_variance.exp()) / 2


def with_free_bits(kl: Tensor, least: float) -> Tensor:
    r"""Return the KL of codings, each counted as `least` nats where it is less on average.

    .. math:: \sum_j \max\{\lambda, E_{x \in \mathcal M}[D_\text{KL}(q(z_j \mid x) \| p(z_j))]\}
        \qquad \text{[IAF (free bits)]}

    Args:
        kl: of each coding, (B, d); the expectation is over its rows.
        least: lambda, in nats a coding.
    Returns:
        Rows whose mean is the above, (B,).
    Source: Improving Variational Inference with Inverse Autoregressive Flow (arXiv 1606.04934), appendix
        C.8.
    """
    paid = kl.mean(0) > least
    return torch.where(paid, kl, least).sum(1)


def iwae(log_w: Tensor) -> Tensor:
    r"""Return the importance-weighted bound on log p(x), by k draws of the posterior; with k = 1 it is the ELBO.

    .. math:: \mathcal L_k = E_{z_1 \ldots z_k \sim q(z \mid x)} \left[ \log \frac1k \sum_{i=1}^k
        \frac{p(x, z_i)}{q(z_i \mid x)} \right] \le \log p(x) \qquad \text{[IWAE (bound)]}

    Args:
        log_w: log p(x, z_i) - log q(z_i given x), (k, B).
    Returns:
        The bound with these draws, (B,).
    Source: Importance Weighted Autoencoders (arXiv 1509.00519), section 3.
    """
    return log_w.logsumexp(0) - math.log(len(log_w))


def log_weight(log_p_x: Tensor, z: Tensor, mean: Tensor, log_variance: Tensor, eps: Tensor) -> Tensor:
    r"""Return the log of the importance weight of draws z = mu + sigma eps of the posterior.

    .. math:: \log w = \log p(x \mid z) + \log p(z) - \log q(z \mid x), \quad
        \log p(z) - \log q(z \mid x) = \tfrac12 \sum_j \left(\epsilon_j^2 - z_j^2 + \log \sigma_j^2\right)
        \qquad \text{[IWAE (weight)]}

    Args:
        log_p_x: log p(x given z), (k, B); z, eps: (k, B, d); mean, log_variance: (B, d).
    Returns:
        (k, B).
    """
    return log_p_x + (eps.square() - z.square() + log_variance).sum(-1) / 2


def active_units(mean: Tensor, least: float = 0.01) -> Tensor:
    r"""Return which codings are active: those whose posterior mean varies with x.

    .. math:: A_j = \operatorname{Var}_x\left(E_{q(z \mid x)}[z_j]\right) > 0.01 \qquad \text{[IWAE (active units)]}

    Args:
        mean: posterior means of many x, (n, d).
    Returns:
        True for the active ones, (d,).
    Source: Importance Weighted Autoencoders (arXiv 1509.00519), section 5.
    """
    return mean.var(0) > least


@torch.no_grad()
def importance_weighted(
    model: Any,
    reconstruction: Reconstruction,
    x: Tensor,
    y: Any,
    k: int,
    noise: Callable[[int], Tensor],
    callback: Callable[[int], None] | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the importance-weighted bound on log p(x) with k draws, and their ELBO, in nats, each (B,).

    Args:
        model: with `encode(x, y)` -> (mean, log variance), each (B, d), `decode(z, y)` -> (B, *), and `log_scale`.
        x: (B, *), as it is modelled; y: the network's condition, classes (B,) or None.
        noise: i -> standard normal draws (k', B, d) for the i-th part of all draws; k' may be any number.
        callback: called with the number of draws decoded since the last call.
    Raises: ValueError where the reconstruction is no likelihood.
    """
    name, (mean, log_variance), log_w, done = reconstruction.likelihood, model.encode(x, y), list[Tensor](), 0
    while done < k:
        eps = noise(len(log_w))[: k - done]
        z, draws = reparametrised(mean, log_variance, eps), len(eps)
        output = model.decode(z.flatten(0, 1), None if y is None else y.repeat(draws))
        repeated = x.expand(draws, *x.shape).flatten(0, 1)
        log_p_x = -reconstruction(output, repeated, model.log_scale)[name].double().unflatten(0, (draws, -1))
        log_w.append(log_weight(log_p_x, z.double(), mean.double(), log_variance.double(), eps.double()))
        done += draws
        if callback:
            callback(draws * len(x))
    together = torch.cat(log_w)
    return iwae(together), together.mean(0)
