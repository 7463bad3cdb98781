"""Training losses: the mean squared error, its weightings, and the terms of the variational bound.

Every loss is a mean over the dimensions of x, one number an image; the terms of the bound are in bits per dimension.
"""

import math
from collections.abc import Callable

import torch
from einops import reduce
from torch import Tensor

from ddpm.forward import q_posterior, q_sample
from ddpm.reverse import mu_theta, variance
from ddpm.schedules import NoiseSchedule, Time, at
from ddpm.targets import Prediction

BINS = 256  # of a pixel


def L_simple(output: Tensor, target: Tensor) -> Tensor:
    r"""Return the mean squared error of the network's output, in the coordinate that it is trained in; for eps

    .. math:: L_\text{simple} = E_{t, x_0, \epsilon} \left\| \epsilon -
        \epsilon_\theta(\sqrt{\bar\alpha_t}\, x_0 + \sqrt{1 - \bar\alpha_t}\, \epsilon, t) \right\|^2
        \qquad \text{[DDPM (14)]}

    as a mean, not a sum, over the dimensions of x.

    Args:
        output, target: (B, *).
    Returns:
        (B,).
    """
    return reduce((target - output) ** 2, "b ... -> b", "mean")


def min_snr(snr: Tensor, gamma: float = 5.0) -> Tensor:
    r"""Return the SNR, clamped from above, so that nearly clean images do not dominate the gradient.

    .. math:: w_t = \min\{\text{SNR}(t), \gamma\} \qquad \text{[Min-SNR (weight)]}

    Source: Efficient Diffusion Training via Min-SNR Weighting Strategy (arXiv 2303.09556), section 3.4.
    """
    return snr.clamp(max=gamma)


def p2(snr: Tensor, k: float = 1.0, gamma: float = 1.0) -> Tensor:
    r"""Return a weight that is lower where noise is so low that only imperceptible detail is left to learn.

    .. math:: \lambda'_t = \frac{\lambda_t}{(k + \text{SNR}(t))^\gamma} \qquad \text{[P2 (weight)]}

    where lambda_t is the weight of L_simple of eps: SNR(t), for the squared error of x_0.

    Source: Perception Prioritized Training of Diffusion Models (arXiv 2204.00227), section 3.
    """
    return snr / (k + snr) ** gamma


def truncated_snr(snr: Tensor) -> Tensor:
    r"""Return the SNR, clamped to at least 1, so that errors count at pure noise, too.

    .. math:: w_t = \max\{\text{SNR}(t), 1\} \qquad \text{[PD (truncated SNR)]}

    Source: Progressive Distillation (Salimans & Ho, arXiv 2202.00512), section 4.
    """
    return snr.clamp(min=1)


def snr_plus_one(snr: Tensor) -> Tensor:
    r"""Return the weight with which the squared error of x_0 is the squared error of v.

    .. math:: w_t = \text{SNR}(t) + 1: \quad (\text{SNR}(t) + 1) \left\| x_0 - x_{0,\theta} \right\|^2 =
        \left\| v - v_\theta \right\|^2 \qquad \text{[PD (SNR + 1)]}

    Source: as `truncated_snr`.
    """
    return snr + 1


WEIGHTINGS: dict[str, Callable[..., Tensor]] = {
    "x_0": torch.ones_like,
    "snr": lambda snr: snr,
    "min_snr": min_snr,
    "truncated_snr": truncated_snr,
    "snr_plus_one": snr_plus_one,
    "p2": p2,
}
"""w(SNR), the factor of the squared error of x_0; the squared error of eps is SNR times that of x_0."""

OF_ERRORS = ("simple", *WEIGHTINGS)  # squared errors of a network's prediction
LOSSES = (*OF_ERRORS, "vlb", "hybrid")


def weighted(
    schedule: NoiseSchedule, weighting: str, pred: Prediction, x_0: Tensor, t: Time, **options: float
) -> Tensor:
    r"""Return w(SNR(t)) times the squared error of x_0, whatever the network's target is.

    .. math:: w(\text{SNR}(t)) \left\| x_0 - x_{0,\theta} \right\|^2, \quad
        \text{SNR}(t) = \frac{\bar\alpha_t}{1 - \bar\alpha_t} \qquad \text{[VDM (SNR)]}

    Args:
        weighting: a name of `WEIGHTINGS`.
        x_0: (B, *).
        options: of the weighting: gamma of min_snr, k and gamma of p2.
    Returns:
        (B,).
    Source: the SNR after Variational Diffusion Models (arXiv 2107.00630), section 3.
    """
    alpha_bar_t = schedule.alpha_bar_at(t)
    snr = alpha_bar_t / (1 - alpha_bar_t)
    return WEIGHTINGS[weighting](snr, **options).to(x_0.dtype) * L_simple(pred.x_0, x_0)


def errors_at_snr(
    schedule: NoiseSchedule, denoise: Callable[[Tensor, Time], Prediction], x_0: Tensor, log_snr: Tensor, eps: Tensor
) -> tuple[Tensor, Tensor]:
    r"""Return mean squared errors of x_0 and of eps at given log-SNRs, which every schedule reaches at its own t.

    .. math:: \| \epsilon - \epsilon_\theta \|^2 = \text{SNR}(t)\, \| x_0 - x_{0,\theta} \|^2, \quad
        \log \text{SNR}(t) = 2 \lambda_t \qquad \text{[VDM (errors)]}

    Args:
        denoise: the network, evaluated at real t.
        x_0: (B, *).
        log_snr: (B,), from that at t = T (at T - 1 where beta_T = 1) to infinity.
        eps: standard normal noise, (B, *).
    Returns:
        The errors of x_0 and of eps, each (B,).
    """
    schedule = schedule.to(x_0.device)
    t = schedule.with_finite_lambda().t_at(log_snr.to(x_0.device) / 2)
    pred = denoise(q_sample(schedule, x_0, t, eps), t)
    return L_simple(pred.x_0, x_0), L_simple(pred.eps, eps)


def normal_kl(mean_1: Tensor, variance_1: Tensor, mean_2: Tensor, variance_2: Tensor) -> Tensor:
    """Return KL(N(mean_1, variance_1) || N(mean_2, variance_2)) of each dimension, in nats, (B, *)."""
    ratio = variance_1 / variance_2
    return 0.5 * (ratio - 1 - ratio.log() + (mean_1 - mean_2) ** 2 / variance_2)


def L_T(schedule: NoiseSchedule, x_0: Tensor) -> Tensor:
    r"""Return the prior term of the bound: the divergence of x_T from pure noise.

    .. math:: L_T = D_\text{KL}(q(x_T \mid x_0) \,\|\, p(x_T)) \qquad \text{[DDPM (5)]}

    Returns:
        (B,), bits per dimension. Always finite; zero where alpha_bar_T = 0.
    """
    alpha_bar_T = schedule.alpha_bar[-1]
    mean, var = at(alpha_bar_T.sqrt(), ..., x_0) * x_0, at(1 - alpha_bar_T, ..., x_0)
    return _bits(normal_kl(mean, var, torch.zeros_like(x_0), torch.ones_like(var)))


def L_t_1(
    schedule: NoiseSchedule, pred: Prediction, x_0: Tensor, x_t: Tensor, t: Time, s: Time | None = None
) -> Tensor:
    r"""Return L_{t-1}, the bound's term of the reverse step from t.

    .. math::
        L_{t-1} = D_\text{KL}(q(x_{t-1} \mid x_t, x_0) \,\|\, p_\theta(x_{t-1} \mid x_t)) \\
        \phantom{L_{t-1}} = E_q\left[ \frac{1}{2 \sigma_t^2} \| \tilde\mu_t(x_t, x_0) - \mu_\theta(x_t, t) \|^2 \right]
            + C \qquad \text{[DDPM (8)]} \\
        \phantom{L_{t-1}} = E_{x_0, \epsilon}\left[ \frac{\beta_t^2}{2 \sigma_t^2 \alpha_t (1 - \bar\alpha_t)}
            \| \epsilon - \epsilon_\theta(x_t, t) \|^2 \right] + C \qquad \text{[DDPM (12)]}

    With C, which is not constant where the variance is learned.

    Args:
        x_0, x_t: (B, *).
        t, s: as in `q_posterior`, with s > 0.
    Returns:
        (B,), bits per dimension.
    """
    mu_tilde, beta_tilde = q_posterior(schedule, x_0, x_t, t, s)
    mu, sigma2 = mu_theta(schedule, pred, x_t, t, s), variance(schedule, pred, x_t, t, s)
    return _bits(normal_kl(mu_tilde, beta_tilde, mu, sigma2))


def L_0(schedule: NoiseSchedule, pred: Prediction, x_0: Tensor, x_1: Tensor, t: Time = 1) -> Tensor:
    r"""Return the reconstruction term of the bound: bytes read out of a Gaussian, cut into one bin a byte.

    .. math::
        p_\theta(x_0 \mid x_1) = \prod_i \int_{\delta_-(x_0^i)}^{\delta_+(x_0^i)}
            \mathcal N(x; \mu_\theta^i(x_1, 1), \sigma_1^2) dx, \quad
        \delta_\pm(x) = x \pm \tfrac{1}{255} \qquad \text{[DDPM (13)]}

    with the first bin open to the left and the last to the right.

    Args:
        x_0: (B, *), bytes k as k / 127.5 - 1.
        x_1: (B, *).
        t: 1, or the first time of a strided sequence.
    Returns:
        (B,), bits per dimension.
    """
    s = torch.zeros_like(t) if isinstance(t, Tensor) else 0
    mu, sigma2 = mu_theta(schedule, pred, x_1, t, s), variance(schedule, pred, x_1, t, s)
    return _bits(-log_bin(x_0, mu, sigma2.sqrt()))


def L_0_density(schedule: NoiseSchedule, pred: Prediction, x_0: Tensor, x_1: Tensor, t: Time = 1) -> Tensor:
    """Return L_0 of real numbers, not bytes: -log N(x_0; mu_theta(x_1, 1), sigma_1^2), (B,), in bits per dimension."""
    s = torch.zeros_like(t) if isinstance(t, Tensor) else 0
    mu, sigma2 = mu_theta(schedule, pred, x_1, t, s), variance(schedule, pred, x_1, t, s)
    return _bits(0.5 * ((2 * math.pi * sigma2).log() + (x_0 - mu) ** 2 / sigma2))


def log_bin(x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Return log P(bin of width 2/255 around x) under N(mean, std^2), the outer bins open; (B, *), in nats."""
    upper, lower = (x + 1 / (BINS - 1) - mean) / std, (x - 1 / (BINS - 1) - mean) / std
    upper = upper.masked_fill(x > 1 - 1 / (BINS - 1), math.inf)
    lower = lower.masked_fill(x < -1 + 1 / (BINS - 1), -math.inf)
    flip = lower > 0  # in the right tail a difference of two numbers near 1 would be lost: use the left one
    upper, lower = torch.where(flip, -lower, upper), torch.where(flip, -upper, lower)
    high, low = _log_ndtr(upper), _log_ndtr(lower)
    return high + torch.log(-torch.expm1(low - high))


def _log_ndtr(x: Tensor) -> Tensor:
    """Return the log of the standard normal's distribution function, with a correct gradient in the left tail."""
    left = x.clamp(max=0)
    tail = torch.log(torch.special.erfcx(-left / math.sqrt(2)) / 2) - left**2 / 2
    return torch.where(x < 0, tail, torch.special.log_ndtr(x.clamp(min=0)))


def L_vlb(
    schedule: NoiseSchedule, pred: Prediction, x_0: Tensor, x_t: Tensor, t: Tensor, discrete: bool = True
) -> Tensor:
    r"""Return the term of the variational bound that belongs to t: L_{t-1} for t > 1, L_0 for t = 1.

    .. math:: L_\text{vlb} = L_0 + L_1 + \ldots + L_{T-1} + L_T \qquad \text{[iDDPM (4)]}

    Args:
        x_0, x_t: (B, *).
        t: integers (B,) in 1..T.
        discrete: x_0 are bytes, read out by `L_0`; False: real numbers, and `L_0_density` is used instead.
    Returns:
        (B,), bits per dimension. T times its mean over t, plus L_T, is the bound.
    """
    last_step = L_0 if discrete else L_0_density
    if schedule.T == 1:
        return last_step(schedule, pred, x_0, x_t, t)
    first = t == 1

    def at_first(x: Tensor) -> Tensor:
        """Return x where t = 1 and 0 elsewhere: far bins have no gradient, and masking their loss would keep NaNs."""
        return x.where(first.reshape(-1, *[1] * (x.ndim - 1)), 0)

    frac = at_first(pred.frac) if isinstance(pred.frac, Tensor) else pred.frac
    safe = Prediction(at_first(pred.eps), at_first(pred.x_0), frac)
    last = last_step(schedule, safe, at_first(x_0), at_first(x_t), t.clamp(max=1))
    return torch.where(first, last, L_t_1(schedule, pred, x_0, x_t, t.clamp(min=2)))


def L_hybrid(
    simple: Tensor,
    schedule: NoiseSchedule,
    pred: Prediction,
    x_0: Tensor,
    x_t: Tensor,
    t: Tensor,
    weight: float = 1e-3,
    *,
    discrete: bool = True,
) -> Tensor:
    r"""Return L_simple for the mean, plus a little of the bound for the variance.

    .. math:: L_\text{hybrid} = L_\text{simple} + \lambda L_\text{vlb} \qquad \text{[iDDPM (16)]}

    L_vlb, estimated by T times the term at t, sends no gradient to the mean.

    Args:
        simple: L_simple, (B,).
        weight: lambda.
        discrete: as in `L_vlb`.
    """
    mean_fixed = Prediction(pred.eps.detach(), pred.x_0.detach(), pred.frac)
    return simple + weight * schedule.T * L_vlb(schedule, mean_fixed, x_0, x_t, t, discrete)


def offset(eps: Tensor, z: Tensor, strength: float) -> Tensor:
    """Return noise with a random shift of each whole channel, so that a network learns to change an image's mean.

    Args:
        eps: standard normal, (B, C, *).
        z: standard normal, (B, C).
        strength: of the shift; 0.1 is customary, 0 returns eps.
    Source: N. Guttenberg, Diffusion with Offset Noise (2023).
    """
    return eps + strength * z.reshape(*z.shape, *[1] * (eps.ndim - 2))


def _bits(nats: Tensor) -> Tensor:
    return reduce(nats, "b ... -> b", "mean") / math.log(2)
