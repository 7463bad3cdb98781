"""Likelihoods of a model: the variational bound term by term, and the density of the probability flow.

Neither draws noise: it is an argument, so that two models are judged on the same draws, in batches of any size.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from einops import reduce
from torch import Tensor

from ddpm.checks import is_whole
from ddpm.forward import q_sample, q_step
from ddpm.losses import BINS, L_0, L_T, L_0_density, L_simple, L_t_1
from ddpm.reverse import mu_theta, variance
from ddpm.schedules import NoiseSchedule, Time, respace
from ddpm.targets import Denoise, velocity

Noise = Callable[[int, tuple[int, ...], torch.device], Tensor]
"""(t, shape of an image, device) -> standard normal (B, *shape), one draw a t; `ddpm.randomness.SampleNoise` is one."""

BIN_WIDTH = 2 / (BINS - 1)  # of a byte, where bytes 0..255 are -1..1


@dataclass(frozen=True)
class Bound:
    """The variational bound of B images, in bits per dimension.

    Args:
        times: the K times S_1 < ... < S_K that were evaluated.
        L_T: (B,).
        terms: (B, K): first L_0, the step from S_1 to data; then L_{t-1} of the step from each S_i to the one before.
        x_0_mse, eps_mse: mean squared errors of the predictions at these times, (B, K).
    """

    times: tuple[int, ...]
    L_T: Tensor
    terms: Tensor
    x_0_mse: Tensor
    eps_mse: Tensor

    @property
    def L_0(self) -> Tensor:
        """The reconstruction term, of the step to data, (B,)."""
        return self.terms[:, 0]

    @property
    def L_t_1(self) -> Tensor:
        """The sum of the terms of all steps but the one to data, (B,)."""
        return self.terms[:, 1:].sum(1)

    @property
    def total(self) -> Tensor:
        """The bound, (B,)."""
        return self.L_T + self.L_t_1 + self.L_0


@torch.no_grad()
def bits_per_dim(
    schedule: NoiseSchedule,
    denoise: Denoise,
    x_0: Tensor,
    noise: Noise,
    *,
    times: Sequence[int] | None = None,
    discrete: bool = True,
    callback: Callable[[int], None] | None = None,
) -> Bound:
    r"""Return the variational bound L_0 + L_1 + ... + L_T on -log p_theta(x_0), with one draw of x_t a term.

    The network is evaluated once a time, for all images; without synchronisation.

    Args:
        schedule: the constants.
        denoise: the network, with its condition and guidance already bound.
        x_0: (B, *), bytes k as k / 127.5 - 1 unless `discrete` is False.
        noise: the eps of x_t; called with each t in turn.
        times: a sub-sequence S_1 < ... < S_K of 1..T, normally with S_K = T; None for all. The bound is then that of
            the shorter chain (`respace`), whose variances are those of its own, longer steps.
        discrete: x_0 are bytes and L_0 is DDPM (13); False: x_0 are real numbers and L_0 is a density, so that the
            bound is on a differential entropy and may be negative.
        callback: called with B after each evaluation of the network.
    Returns:
        Bound.
    Raises:
        ValueError: times that repeat, fall, or lie outside 1..T.
    Source: DDPM (arXiv 2006.11239), section 3; Improved DDPM (arXiv 2102.09672), sections 2 and 4.
    """
    respaced = schedule if times is None else respace(schedule, times)
    respaced = respaced.to(x_0.device)
    times = tuple(range(1, schedule.T + 1)) if times is None else tuple(times)
    last_step = L_0 if discrete else L_0_density
    terms, x_0_mse, eps_mse = [], [], []
    for i, t in enumerate(times, 1):
        eps = noise(t, x_0.shape[1:], x_0.device).to(x_0.dtype)
        x_t = q_sample(respaced, x_0, i, eps)
        pred = denoise(x_t, torch.full((len(x_0),), t, device=x_0.device))
        terms.append((last_step if i == 1 else L_t_1)(respaced, pred, x_0, x_t, i))
        x_0_mse.append(L_simple(pred.x_0, x_0))
        eps_mse.append(L_simple(pred.eps, eps))
        if callback is not None:
            callback(len(x_0))
    return Bound(times, L_T(respaced, x_0), *(torch.stack(part, dim=1) for part in (terms, x_0_mse, eps_mse)))


@torch.no_grad()
def bits_lost(
    schedule: NoiseSchedule,
    denoise: Denoise,
    log_prob: Callable[[Tensor, Time], Tensor],
    x_0: Tensor,
    noise: Noise,
) -> tuple[Tensor, Tensor]:
    r"""Return by how much the bound, with a density as L_0, exceeds the data's own bits, in the prior and each step.

    .. math:: E_q[L_\text{vlb}] - H(q(x_0)) = D_\text{KL}(q(x_T) \,\|\, p(x_T)) + \sum_{t=1}^T
        E_{q(x_t)}\, D_\text{KL}(q(x_{t-1} \mid x_t) \,\|\, p_\theta(x_{t-1} \mid x_t)) \qquad \text{[VLB (gap)]}

    The exact reverse step is known by Bayes' rule, if the density of noised data is:
    q(x_{t-1} | x_t) = q(x_t | x_{t-1}) q(x_{t-1}) / q(x_t). The result is the logarithm of q over p along one
    path x_0, ..., x_T of the process a row, whose mean over data and noise estimates each divergence. A single number
    may be negative.

    Args:
        schedule, denoise: as in `bits_per_dim`.
        log_prob: log q(x_t), (B, *) and t -> (B,) in nats, such as that of `ddpm.oracle.JointMixture`.
        x_0: drawn from that density, (B, *), real numbers.
        noise: called with each t in turn, for the step of the process from t - 1 to t.
    Returns:
        The loss in the prior, (B,), and in the steps from t = 1, ..., T, (B, T); bits per dimension.
    Source: the chain rule of the divergence of the two paths; Sohl-Dickstein et al. (arXiv 1503.03585) have the bound.
    """
    schedule, x_s, log_q_s, lost = schedule.to(x_0.device), x_0, log_prob(x_0, 0), []
    for t in range(1, schedule.T + 1):
        x_t = q_step(schedule, x_s, t, noise(t, x_0.shape[1:], x_0.device).to(x_0.dtype))
        log_q_t, beta = log_prob(x_t, t), schedule.beta[t]
        pred = denoise(x_t, torch.full((len(x_0),), t, device=x_0.device))
        perfect = _log_normal(x_t, (1 - beta).sqrt() * x_s, beta) + log_q_s - log_q_t
        lost.append(perfect - _log_normal(x_s, mu_theta(schedule, pred, x_t, t), variance(schedule, pred, x_t, t)))
        x_s, log_q_s = x_t, log_q_t
    prior = log_q_s - _log_normal(x_s, torch.zeros_like(x_s), torch.ones_like(x_s))
    bits = x_0[0].numel() * math.log(2)
    return prior / bits, torch.stack(lost, dim=1) / bits


def _log_normal(x: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
    """Return log N(x; mean, variance) of each row, (B,), in nats."""
    return -0.5 * reduce((x - mean) ** 2 / variance + (2 * math.pi * variance).log(), "b ... -> b", "sum")


def log_likelihood(
    schedule: NoiseSchedule,
    denoise: Denoise,
    x_0: Tensor,
    probes: Tensor | None = None,
    *,
    steps: int = 100,
    start: float = 1.0,
    callback: Callable[[int], None] | None = None,
) -> Tensor:
    r"""Return log p(x_0), where p is the density that the probability flow carries from noise at T to t = `start`.

    .. math::
        \log p_0(x(0)) = \log p_T(x(T)) + \int_0^T \nabla \cdot \tilde f_\theta(x(t), t)\, dt
            \qquad \text{[ScoreSDE (39)]}

    The variable of integration is lambda, in which the flow is smooth at both ends: with tan(phi) = e^{-lambda} the
    flow is dx / dphi = v, the velocity, hence

    .. math:: \frac{dx}{d\lambda} = -\frac{v_\theta(x, t)}{2 \cosh \lambda}

    Classical Runge-Kutta steps, even in lambda, each with four evaluations of the network and its derivative. The
    result is the density of x_t / sqrt(alpha_bar_t) at t = start, that is of x_0 + sigma eps, at the point x_0;
    at t = 1 that is data with the least noise that the network has seen.

    Args:
        schedule: the constants; the network is evaluated at real t.
        denoise: differentiable with respect to x_t.
        x_0: (B, *), real numbers; bytes are dequantised first (`dequantised`).
        probes: (k, B, *) of mean 0 and covariance 1 for Hutchinson's estimate of the divergence, the same along the
            whole path, which leaves it unbiased; None for the exact trace, which takes as many derivatives as x_0 has
            dimensions.
        steps: number of steps, at least 1.
        start: the t where the density is taken, in (0, T).
        callback: called with B after each evaluation of the network.
    Returns:
        (B,), nats an image, float64.
    Raises:
        ValueError: as `flow_times`.
    Source: Score-Based Generative Modeling through SDEs (arXiv 2011.13456), appendix D.2.
    """
    lambda_, times = flow_times(schedule, steps, start)
    schedule, times = schedule.to(x_0.device), times.to(x_0.device)
    half = (lambda_[1] - lambda_[0]).item()  # of a step; negative, as lambda falls from data to noise
    slope = [-0.5 / math.cosh(value) for value in lambda_.tolist()]

    def flow(x: Tensor, i: int) -> tuple[Tensor, Tensor]:
        """Return dx / dlambda at the i-th half step, (B, *), and its divergence, (B,)."""
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            t = times[i].expand(len(x))
            dx = slope[i] * velocity(schedule, denoise(x, t), t)
        if callback is not None:
            callback(len(x))
        return dx.detach(), divergence(dx, x, probes)

    alpha_bar = torch.sigmoid(2 * lambda_[0]).item()
    x, dims = math.sqrt(alpha_bar) * x_0, x_0[0].numel()
    log_det = x_0.new_zeros(len(x_0), dtype=torch.float64)
    for i in range(0, 2 * steps, 2):
        dx_1, div_1 = flow(x, i)
        dx_2, div_2 = flow(x + half * dx_1, i + 1)
        dx_3, div_3 = flow(x + half * dx_2, i + 1)
        dx_4, div_4 = flow(x + 2 * half * dx_3, i + 2)
        x = x + half / 3 * (dx_1 + 2 * dx_2 + 2 * dx_3 + dx_4)
        log_det = log_det + half / 3 * (div_1 + 2 * div_2 + 2 * div_3 + div_4)
    log_p_T = -0.5 * reduce(x.double() ** 2 + math.log(2 * math.pi), "b ... -> b", "sum")
    return log_p_T + log_det + dims / 2 * math.log(alpha_bar)


def flow_times(schedule: NoiseSchedule, steps: int, start: float) -> tuple[Tensor, Tensor]:
    """Return lambda, even from t = start to T, and the real t that have it, each (2 steps + 1,): ends and middles.

    Raises:
        ValueError: fewer than one step; a start outside (0, T); a schedule with beta_T = 1, whose lambda_T is infinite.
    """
    if not is_whole(steps, 1):
        raise ValueError(f"steps = {steps!r}: the number of steps of the flow must be an integer >= 1")
    if isinstance(start, bool) or not isinstance(start, int | float) or not 0 < start < schedule.T:
        raise ValueError(f"start = {start!r}: the t where the density is taken must lie in (0, {schedule.T})")
    first, last = schedule.lambda_at(float(start)), schedule.lambda_at(schedule.T)
    if last == -math.inf:
        raise ValueError("beta_T = 1 puts lambda_T at -infinity: the flow has no end there, and no likelihood")
    lambda_ = torch.linspace(first.item(), last.item(), 2 * steps + 1, dtype=torch.float64)
    return lambda_, schedule.t_at(lambda_.to(schedule.lambda_.device))


def divergence(y: Tensor, x: Tensor, probes: Iterable[Tensor] | None = None) -> Tensor:
    r"""Return the trace of dy/dx of each sample, by Hutchinson's estimator

    .. math:: \nabla \cdot f = E_{p(e)}[e^T\, \nabla f\, e], \quad E[e] = 0, \quad \text{Cov}[e] = I
        \qquad \text{[ScoreSDE (40)]}

    Args:
        y: (B, *), computed from x, which requires a gradient; row i of y depends on row i of x alone.
        probes: the e, k tensors (B, *), averaged over; None for the unit vectors, summed over: the trace itself.
    Returns:
        (B,), float64.
    """
    e_J_e = [
        reduce(e * torch.autograd.grad(y, x, e, retain_graph=True)[0], "b ... -> b", "sum").double()
        for e in (_unit_vectors(x) if probes is None else probes)
    ]
    return sum(e_J_e) if probes is None else sum(e_J_e) / len(e_J_e)


def _unit_vectors(x: Tensor) -> Iterable[Tensor]:
    for i in range(x[0].numel()):
        e = x.new_zeros(x.shape)
        e.flatten(1)[:, i] = 1
        yield e


def rademacher(eps: Tensor) -> Tensor:
    """Return the signs of normal noise, -1 or 1: of all probes with independent entries those of least variance."""
    return torch.where(eps < 0, -1.0, 1.0).to(eps.dtype)


def dequantised(x_0: Tensor, eps: Tensor) -> Tensor:
    """Return bytes as real numbers, uniform over the bin of each, which is x_0 +- 1/255.

    Args:
        x_0: (B, *), bytes k as k / 127.5 - 1.
        eps: standard normal noise, (B, *), read as uniform through its distribution function.
    """
    return x_0 + BIN_WIDTH * (torch.special.ndtr(eps) - 0.5)


def bits_of_bytes(log_p: Tensor, dims: int) -> Tensor:
    """Return bits per dimension of bytes, from the density of their `dequantised` values.

    A density times the width 2/255 of a bin; its average over the bin bounds -log P(bytes) from above.

    Args:
        log_p: (B,), nats an image of `dims` dimensions.
    """
    return -(log_p / dims + math.log(BIN_WIDTH)) / math.log(2)
