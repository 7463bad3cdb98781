"""Shared by the tests: data whose exact denoiser, flow and moments are known in closed form, and fixed seeds."""

import itertools
import math
import random

import numpy as np
import pytest
import torch
from torch import Tensor

from ddpm.samplers import Sampler
from ddpm.schedules import NoiseSchedule, linear
from ddpm.targets import Prediction

torch.set_num_threads(min(2, torch.get_num_threads()))


@pytest.fixture(autouse=True)
def _seeds():
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


class MixtureOracle:
    """Data whose pixels are drawn independently from a mixture of Gaussians N(m_k, c_k^2) with weights w_k.

    With a = sqrt(alpha_bar_t), component k of x_t is N(a m_k, a^2 c_k^2 + 1 - a^2), so posteriors are Gaussian sums.
    Written without `ddpm`'s own functions: only `schedule.alpha_bar` is read.
    """

    def __init__(
        self,
        schedule: NoiseSchedule,
        weights: list[float],
        means: list[float],
        variances: list[float],
        frac: float | Tensor = 0.0,
    ):
        self.schedule, self.frac = schedule, frac
        self.w, self.m, self.c2 = (torch.tensor(v, dtype=torch.float64) for v in (weights, means, variances))

    def at(self, t: int | Tensor, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """alpha_bar_t (B or 1, 1, ..., 1), and mean and variance of the components, the same with K at the end."""
        alpha_bar = self.schedule.alpha_bar[t].reshape(-1, *[1] * (x.ndim - 1))
        a2 = alpha_bar[..., None]
        return alpha_bar, a2.sqrt() * self.m, a2 * self.c2 + 1 - a2

    def joint(self, x_t: Tensor, t: int | Tensor) -> Tensor:
        """log w_k N(x_t; component k), (B, *, K)."""
        _, mean, var = self.at(t, x_t)
        return self.w.log() - 0.5 * (2 * math.pi * var).log() - (x_t.double()[..., None] - mean) ** 2 / (2 * var)

    def log_prob(self, x_t: Tensor, t: int | Tensor) -> Tensor:
        """log q(x_t) of each pixel, (B, *)."""
        return self.joint(x_t, t).logsumexp(-1)

    def denoise(self, x_t: Tensor, t: int | Tensor) -> Prediction:
        """E[eps | x_t] and E[x_0 | x_t], (B, *): what a perfect network answers. A `Denoise`."""
        alpha_bar, mean, var = self.at(t, x_t)
        share = self.joint(x_t, t).softmax(-1)
        score = (x_t.double()[..., None] - mean) / var
        x_0 = (share * (self.m + alpha_bar[..., None].sqrt() * self.c2 * score)).sum(-1)
        eps = (1 - alpha_bar).sqrt() * (share * score).sum(-1)
        return Prediction(eps.to(x_t.dtype), x_0.to(x_t.dtype), self.frac)

    def cdf(self, x_t: Tensor, t: int | Tensor) -> Tensor:
        """P(pixel of x_t <= its value), (B, *)."""
        _, mean, var = self.at(t, x_t)
        return (self.w * torch.special.ndtr((x_t[..., None] - mean) / var.sqrt())).sum(-1)

    def exact_ode(self, x_t: Tensor, t: int, s: int) -> Tensor:
        """The probability flow from t to s. In one dimension it keeps the order of points, hence their quantiles."""
        low, high = torch.full_like(x_t, -20.0), torch.full_like(x_t, 20.0)
        target = self.cdf(x_t, t)
        for _ in range(80):
            middle = (low + high) / 2
            below = self.cdf(middle, s) < target
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        return (low + high) / 2


class GaussianOracle(MixtureOracle):
    """Data N(mean, variance): the mixture with one component, where the flow is affine too."""

    def __init__(self, schedule: NoiseSchedule, mean: float = 0.7, variance: float = 0.25, frac: float | Tensor = 0.0):
        super().__init__(schedule, [1.0], [mean], [variance], frac)
        self.mean, self.variance = mean, variance

    def marginal(self, t: int) -> tuple[float, float]:
        """Mean and variance of q(x_t)."""
        alpha_bar = self.schedule.alpha_bar[t].item()
        return math.sqrt(alpha_bar) * self.mean, alpha_bar * self.variance + 1 - alpha_bar

    def x_0_variance(self, t: int) -> float:
        """Var[x_0 | x_t]."""
        return self.variance * (1 - self.schedule.alpha_bar[t].item()) / self.marginal(t)[1]

    def exact_ode(self, x_t: Tensor, t: int, s: int) -> Tensor:
        """The probability flow from t to s."""
        (mean_t, var_t), (mean_s, var_s) = self.marginal(t), self.marginal(s)
        return mean_s + math.sqrt(var_s / var_t) * (x_t - mean_t)


def propagate(
    sampler: Sampler, oracle: MixtureOracle, mean: float = 0.0, variance: float = 1.0
) -> list[tuple[int, float, float]]:
    """Exact (s, mean, variance) of every x_s that a sampler makes of x_T ~ N(mean, variance), no chance involved.

    With Gaussian data a step is affine in (x_t, noise): three probes, at (0, 0), (1, 0) and (0, 1), tell all of it.
    """
    x_t, noise = torch.tensor([[0.0, 1.0, 0.0], [0.0, 0.0, 1.0]], dtype=torch.float64)
    moments = []
    for t, s in itertools.pairwise(sampler.times(oracle.schedule.T)):
        pred = oracle.denoise(x_t, t)
        if s == 0:
            x_s = pred.x_0
        else:
            x_s = sampler.step(
                oracle.schedule, oracle.denoise, x_t, t, s, pred, [], noise if sampler.stochastic else None
            )
        shift, slope, spread = x_s[0].item(), (x_s[1] - x_s[0]).item(), (x_s[2] - x_s[0]).item()
        mean, variance = shift + slope * mean, slope**2 * variance + spread**2
        moments.append((s, mean, variance))
    return moments


@pytest.fixture(params=["meta", "cuda"])
def device(request) -> str:
    """A device that is not the schedule's; shapes and devices can be checked on "meta" without any accelerator."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device here")
    return request.param


@pytest.fixture(scope="session")
def schedule() -> NoiseSchedule:
    """The reference: linear, 1e-4 .. 0.02, T = 1000."""
    return linear(1000)


@pytest.fixture(scope="session")
def oracle(schedule) -> GaussianOracle:
    """Data N(0.7, 0.25) on the reference schedule."""
    return GaussianOracle(schedule, 0.7, 0.25)
