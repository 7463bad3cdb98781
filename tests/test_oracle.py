"""ddpm/oracle.py: exact answers, held against quadrature, autograd and one another."""

import math

import pytest
import torch

from ddpm.oracle import GaussianOracle, JointGaussian, MixtureOracle, PointsOracle
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


def joint(d: int = 5) -> JointGaussian:
    root = torch.randn(d, d, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    return JointGaussian(SCHEDULE, torch.linspace(-1, 1, d, dtype=torch.float64), root @ root.T / d)


@pytest.mark.parametrize("t", [*TIMES, torch.tensor([3, 700, 1000])])
def test_a_joint_gaussian_denoises_by_its_covariance_and_eps_is_the_score(t):
    oracle, x_t = joint(4), torch.randn(3, 1, 2, 2, dtype=torch.float64, requires_grad=True)
    alpha_bar = SCHEDULE.alpha_bar_at(t).reshape(-1, 1, 1, 1)
    covariance = alpha_bar[..., 0] * oracle.covariance + (1 - alpha_bar[..., 0]) * torch.eye(4)
    law = torch.distributions.MultivariateNormal(alpha_bar[..., 0, 0].sqrt() * oracle.mean, covariance)
    [score] = torch.autograd.grad(law.log_prob(x_t.flatten(1)).sum(), x_t)
    pred = oracle.denoise(x_t, t)
    assert torch.allclose(pred.eps, -(1 - alpha_bar).sqrt() * score)
    assert torch.allclose(alpha_bar.sqrt() * pred.x_0 + (1 - alpha_bar).sqrt() * pred.eps, x_t)


def test_pixels_of_a_joint_gaussian_that_do_not_depend_on_each_other_are_gaussians():
    alone, t = GaussianOracle(SCHEDULE, 0.3, 0.2), torch.tensor([1, 500, 1000])
    oracle, x_t = JointGaussian(SCHEDULE, torch.full((4,), 0.3), 0.2 * torch.eye(4)), torch.randn(3, 4)
    assert torch.allclose(oracle.denoise(x_t, t).x_0, alone.denoise(x_t, t).x_0)
    assert torch.allclose(oracle.denoise(x_t, t).eps, alone.denoise(x_t, t).eps)


@pytest.mark.parametrize("sigma_y", [0.0, 0.3])
def test_the_posterior_of_a_joint_gaussian_is_that_of_its_precision(sigma_y):
    """Told of without noise is the limit of little noise: the precisions of what is known add up."""
    oracle, generator = joint(), torch.Generator().manual_seed(2)
    A = torch.randn(2, 5, dtype=torch.float64, generator=generator)
    y = torch.tensor([0.4, -1.0], dtype=torch.float64)
    precision = torch.linalg.inv(oracle.covariance) + A.T @ A / max(sigma_y, 1e-5) ** 2
    covariance = torch.linalg.inv(precision)
    mean = oracle.mean + covariance @ A.T @ (y - A @ oracle.mean) / max(sigma_y, 1e-5) ** 2
    found = oracle.posterior(A, y, sigma_y)
    assert torch.allclose(found.mean, mean, atol=1e-5) and torch.allclose(found.covariance, covariance, atol=1e-5)
