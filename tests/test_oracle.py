"""ddpm/oracle.py: exact answers, held against quadrature, autograd and one another."""

import math

import pytest
import torch

from ddpm.oracle import GaussianOracle, JointGaussian, JointMixture, MixtureOracle, PointsOracle
from ddpm.schedules import linear
from ddpm.score import eps_from_score, score_from_eps

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


# --- mixtures of joint Gaussians


def mixture(K: int = 3, d: int = 2, seed: int = 0) -> JointMixture:
    generator = torch.Generator().manual_seed(seed)
    roots = 0.3 * torch.randn(K, d, d, dtype=torch.float64, generator=generator)
    weights = torch.rand(K, dtype=torch.float64, generator=generator)
    means = torch.randn(K, d, dtype=torch.float64, generator=generator)
    covariances = roots @ roots.mT + 0.02 * torch.eye(d, dtype=torch.float64)
    return JointMixture(SCHEDULE, weights / weights.sum(), means, covariances)


def law(oracle: JointMixture, alpha_bar: torch.Tensor) -> torch.distributions.MixtureSameFamily:
    """q(x_t) as torch has it."""
    eye = torch.eye(oracle.means.shape[1], dtype=torch.float64)
    components = torch.distributions.MultivariateNormal(
        alpha_bar.sqrt() * oracle.means, alpha_bar * oracle.covariances + (1 - alpha_bar) * eye
    )
    return torch.distributions.MixtureSameFamily(torch.distributions.Categorical(oracle.weights), components)


@pytest.mark.parametrize("t", [0, 0.25, *TIMES])
@pytest.mark.parametrize(("K", "d"), [(1, 2), (3, 2), (25, 2), (4, 6)])
def test_a_joint_mixture_is_that_of_torch_and_its_score_the_gradient(K, d, t):
    oracle = mixture(K, d)
    x_t = 1.5 * torch.randn(9, d, dtype=torch.float64, requires_grad=True)
    expected = law(oracle, SCHEDULE.alpha_bar_at(t)).log_prob(x_t)
    [score] = torch.autograd.grad(expected.sum(), x_t)
    assert torch.allclose(oracle.log_prob(x_t, t), expected, rtol=1e-10, atol=1e-10)
    assert torch.allclose(oracle.score(x_t, t), score, rtol=1e-8, atol=1e-9)
    [own] = torch.autograd.grad(oracle.log_prob(x_t, t).sum(), x_t)
    assert torch.allclose(own, score, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("t", TIMES)
def test_a_joint_mixture_denoises_as_quadrature_says(t):
    """E[x_0 | x_t] by Bayes' rule on a grid of the plane, and its shares by the components alone."""
    oracle, axis = mixture(), torch.linspace(-5, 5, 1001, dtype=torch.float64)
    x_0 = torch.cartesian_prod(axis, axis)
    alpha_bar = SCHEDULE.alpha_bar_at(t)
    x_t = alpha_bar.sqrt() * oracle.means + 0.3 * (1 - alpha_bar).sqrt()
    prior = law(oracle, torch.tensor(1.0, dtype=torch.float64)).log_prob(x_0)
    prior = prior - torch.cdist(x_t, alpha_bar.sqrt() * x_0) ** 2 / (2 * (1 - alpha_bar))
    pred = oracle.denoise(x_t, t)
    assert torch.allclose(pred.x_0, prior.softmax(1) @ x_0, atol=1e-9)
    assert torch.allclose(alpha_bar.sqrt() * pred.x_0 + (1 - alpha_bar).sqrt() * pred.eps, x_t)
    marginal = law(oracle, alpha_bar)
    each = marginal.component_distribution.log_prob(x_t[:, None]) + oracle.weights.log()
    assert torch.allclose(oracle.shares(x_t, t), (each - marginal.log_prob(x_t)[:, None]).exp())


@pytest.mark.equation("Tweedie (score from eps)")
@pytest.mark.parametrize("t", [*TIMES, torch.tensor([1, 40, 1000]), torch.tensor([0.5, 33.25, 999.5])])
def test_the_score_of_a_joint_mixture_is_its_eps(t):
    oracle, x_t = mixture(), torch.randn(3, 2, dtype=torch.float64)
    score, eps = oracle.score(x_t, t), oracle.denoise(x_t, t).eps
    assert torch.allclose(score_from_eps(SCHEDULE, eps, t), score)
    assert torch.allclose(eps_from_score(SCHEDULE, score, t), eps)


def test_a_time_for_each_row_of_a_joint_mixture():
    oracle, x_t = mixture(), torch.randn(3, 2, dtype=torch.float64)
    for times in (torch.tensor([0, 40, 1000]), torch.tensor([0.5, 300.25, 1000.0])):
        for function in (oracle.log_prob, oracle.score, oracle.shares, lambda x, t: oracle.denoise(x, t).x_0):
            rows = torch.cat([function(x_t[i : i + 1], times[i].item()) for i in range(3)])
            assert torch.allclose(function(x_t, times), rows, rtol=1e-12, atol=1e-12)


def test_components_along_the_axes_are_independent_pixels():
    """A product of two mixtures is a mixture of all pairs."""
    means, variances = (torch.cartesian_prod(of_one, of_one) for of_one in (MIXTURE.m, MIXTURE.c2))
    oracle = JointMixture(SCHEDULE, torch.outer(MIXTURE.w, MIXTURE.w).flatten(), means, torch.diag_embed(variances))
    x_t = torch.randn(20, 2, dtype=torch.float64)
    for t in TIMES:
        assert torch.allclose(oracle.denoise(x_t, t).eps, MIXTURE.denoise(x_t, t).eps)
        assert torch.allclose(oracle.log_prob(x_t, t), MIXTURE.log_prob(x_t, t).sum(1))


def test_draws_of_a_joint_mixture_have_its_moments_and_repeat():
    oracle, n = mixture(25), 100_000
    x_0 = oracle.sample(n, torch.Generator().manual_seed(3))
    assert torch.equal(x_0[:10], oracle.sample(n, torch.Generator().manual_seed(3))[:10])
    mean = oracle.weights @ oracle.means
    second = torch.einsum("k,kij->ij", oracle.weights, oracle.covariances)
    second = second + torch.einsum("k,ki,kj->ij", oracle.weights, oracle.means, oracle.means)
    products = x_0[:, :, None] * x_0[:, None]
    assert ((x_0.mean(0) - mean).abs() < 4 * x_0.std(0) / n**0.5).all()
    assert ((products.mean(0) - second).abs() < 4 * products.std(0) / n**0.5).all()
    assert oracle.score(x_0, 10).shape == x_0.shape and oracle.shares(x_0, 10).sum(1) == pytest.approx(1)


def test_pictures_and_float32_keep_their_shape_and_type():
    oracle, x_t = mixture(2, 4), torch.randn(3, 1, 2, 2)
    pred = oracle.denoise(x_t, torch.tensor([1, 500, 1000]))
    for part in (pred.x_0, pred.eps, oracle.score(x_t, 5)):
        assert part.shape == x_t.shape and part.dtype == torch.float32
    assert oracle.log_prob(x_t, 5).shape == (3,)


@pytest.mark.parametrize(
    ("weights", "means", "covariances", "message"),
    [
        ([1.0], torch.zeros(2, 2), torch.eye(2)[None], r"shapes \(1,\), \(2, 2\), \(1, 2, 2\): \(K,\), \(K, d\)"),
        ([1.0], torch.zeros(1, 2), torch.eye(3)[None], r"are needed"),
        ([0.5, 0.4], torch.zeros(2, 2), torch.eye(2).expand(2, 2, 2), "must be >= 0 and add up to 1"),
        ([-1.0, 2.0], torch.zeros(2, 2), torch.eye(2).expand(2, 2, 2), "must be >= 0 and add up to 1"),
        ([1.0], torch.zeros(1, 2), torch.tensor([[[1.0, 0.5], [0.2, 1.0]]]), "must be symmetric"),
        ([1.0], torch.zeros(1, 2), torch.tensor([[[1.0, 2.0], [2.0, 1.0]]]), "without negative eigenvalues"),
    ],
)
def test_mixtures_that_are_none(weights, means, covariances, message):
    with pytest.raises(ValueError, match=message):
        JointMixture(SCHEDULE, weights, means, covariances)
