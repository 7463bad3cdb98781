"""ddpm/oracle.py: exact answers, held against quadrature, autograd and one another."""

import math

import pytest
import torch

from ddpm.oracle import GaussianOracle, MixtureOracle, PointsOracle
from ddpm.schedules import linear

SCHEDULE = linear(1000)
MIXTURE = MixtureOracle(SCHEDULE, [0.3, 0.7], [-0.8, 0.5], [0.01, 0.04])
TIMES = [1, 40, 300, 612.5, 1000]


@pytest.mark.parametrize("t", TIMES)
def test_the_mixture_denoises_as_quadrature_says(t):
    x_0 = torch.linspace(-4, 4, 40_001, dtype=torch.float64)
    prior = MIXTURE.log_prob(x_0, 0).exp()
    alpha_bar = SCHEDULE.alpha_bar_at(t).item()
    x_t = torch.tensor([-1.3, -0.1, 0.4, 2.0], dtype=torch.float64)
    weights = prior * torch.exp(-((x_t[:, None] - math.sqrt(alpha_bar) * x_0) ** 2) / (2 * (1 - alpha_bar)))
    mean = (weights * x_0).sum(1) / weights.sum(1)
    density = weights.sum(1) * (x_0[1] - x_0[0]) / math.sqrt(2 * math.pi * (1 - alpha_bar))
    assert MIXTURE.denoise(x_t, t).x_0 == pytest.approx(mean, abs=1e-9)
    assert MIXTURE.log_prob(x_t, t) == pytest.approx(density.log(), abs=1e-9)


@pytest.mark.parametrize("t", TIMES)
def test_predictions_are_consistent_and_eps_is_the_score(t):
    """x_t = sqrt(alpha_bar) x_0 + sqrt(1 - alpha_bar) eps, and eps = -sqrt(1 - alpha_bar) d log q(x_t) / d x_t."""
    alpha_bar = SCHEDULE.alpha_bar_at(t)
    points = torch.randn(5, 1, 2, 2, dtype=torch.float64)
    for oracle in (MIXTURE, GaussianOracle(SCHEDULE), PointsOracle(SCHEDULE, points, 0.05)):
        x_t = torch.randn(7, 1, 2, 2, dtype=torch.float64, requires_grad=True)
        pred = oracle.denoise(x_t, t)
        assert torch.allclose(alpha_bar.sqrt() * pred.x_0 + (1 - alpha_bar).sqrt() * pred.eps, x_t)
        [score] = torch.autograd.grad(oracle.log_prob(x_t, t).sum(), x_t)
        assert torch.allclose(pred.eps, -(1 - alpha_bar).sqrt() * score)


@pytest.mark.parametrize("t", [1, 300.5, torch.tensor([1, 500, 1000])])
def test_points_in_one_dimension_are_a_mixture(t):
    points = torch.tensor([[-0.9], [0.1], [0.6]], dtype=torch.float64)
    mixture = MixtureOracle(SCHEDULE, [1 / 3] * 3, points[:, 0].tolist(), [0.02] * 3)
    oracle = PointsOracle(SCHEDULE, points, 0.02)
    x_t = torch.tensor([[-0.7], [0.3], [1.5]], dtype=torch.float64)
    assert torch.allclose(oracle.log_prob(x_t, t), mixture.log_prob(x_t, t)[:, 0])
    assert torch.allclose(oracle.denoise(x_t, t).x_0, mixture.denoise(x_t, t).x_0)
    assert torch.allclose(oracle.denoise(x_t, t).eps, mixture.denoise(x_t, t).eps)


def test_points_are_found_at_low_noise_and_averaged_at_high_noise():
    points = torch.rand(10, 1, 4, 4) * 2 - 1
    oracle = PointsOracle(SCHEDULE, points)
    assert torch.allclose(oracle.denoise(points + 0.01 * torch.randn(points.shape), 1).x_0, points, atol=1e-5)
    assert torch.allclose(oracle.denoise(torch.zeros(1, 1, 4, 4), 1000).x_0, points.mean(0, keepdim=True), atol=1e-3)


def test_the_flow_keeps_quantiles_and_of_one_gaussian_is_affine():
    x_T = torch.linspace(-2, 2, 9, dtype=torch.float64)
    x_s = MIXTURE.exact_ode(x_T, 1000, 1)
    assert MIXTURE.cdf(x_s, 1) == pytest.approx(MIXTURE.cdf(x_T, 1000), abs=1e-12)
    gaussian = GaussianOracle(SCHEDULE, 0.7, 0.25)
    assert gaussian.exact_ode(x_T, 1000, 1) == pytest.approx(MixtureOracle.exact_ode(gaussian, x_T, 1000, 1), abs=1e-9)
