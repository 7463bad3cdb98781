"""ddpm/score: every objective against its closed form, exactly: expectations are finite sums, nothing is drawn.

A grid of Gauss-Hermite nodes integrates polynomials against a Gaussian, all sign vectors average what is quadratic in a
direction; what remains is rounding.
"""

import itertools
import math
import re
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ddpm.diffusion import GaussianDiffusion
from ddpm.forward import q_sample
from ddpm.oracle import JointMixture
from ddpm.schedules import NoiseSchedule, cosine, geometric, linear, sigmas
from ddpm.score import (
    PROJECTIONS,
    denoising,
    denoising_ladder,
    explicit,
    finite_difference_sliced,
    finite_difference_sliced_vr,
    implicit,
    noise_level,
    score_at_sigma,
    sliced,
    sliced_vr,
)

d = 3
MEAN = torch.tensor([0.3, -0.7, 0.5], dtype=torch.float64)
COVARIANCE = torch.tensor([[0.8, 0.3, -0.1], [0.3, 0.6, 0.2], [-0.1, 0.2, 0.5]], dtype=torch.float64)
PRECISION = torch.linalg.inv(COVARIANCE)
SIGMA = 0.7
NOISED = COVARIANCE + SIGMA**2 * torch.eye(d, dtype=torch.float64)
CLOSE = {"rtol": 1e-11, "atol": 1e-11}


def normal_grid(dims: int, n: int) -> tuple[Tensor, Tensor]:
    """Nodes (n^dims, dims) and weights that integrate polynomials below degree 2n in each variable against N(0, I)."""
    nodes, weights = (torch.tensor(a) for a in np.polynomial.hermite_e.hermegauss(n))
    points = torch.cartesian_prod(*[nodes] * dims).reshape(-1, dims)
    weight = torch.cartesian_prod(*[weights / weights.sum()] * dims).reshape(-1, dims).prod(1)
    return points, weight


def signs(dims: int) -> Tensor:
    """All 2^dims vectors of -1 and 1: the whole law of `rademacher`."""
    return torch.tensor(list(itertools.product([-1.0, 1.0], repeat=dims)), dtype=torch.float64)


def pairs(x: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Every row of x with every row of v."""
    return x.repeat_interleave(len(v), 0), v.repeat(len(x), 1)


def affine(theta: Tensor) -> Callable[[Tensor], Tensor]:
    """s(x) = c - M x with theta = (M, c), flat."""
    M, c = theta[: d * d].reshape(d, d), theta[d * d :]
    return lambda x: c - x @ M.T


GRID, WEIGHT = normal_grid(d, 2)  # exact for squares
X = MEAN + GRID @ torch.linalg.cholesky(COVARIANCE).T
V = signs(d)


def over_directions(objective: Callable[..., Tensor], theta: Tensor, **options: float) -> Tensor:
    x, v = pairs(X, V)
    return WEIGHT @ objective(affine(theta), x, v, **options).reshape(len(X), len(V)).mean(1)


def over_noise(theta: Tensor) -> Tensor:
    points, weight = normal_grid(2 * d, 2)
    x = MEAN + points[:, :d] @ torch.linalg.cholesky(COVARIANCE).T
    return weight @ denoising(affine(theta), x, SIGMA, points[:, d:])


EXPECTED: dict[str, Callable[[Tensor], Tensor]] = {  # objective -> its expectation over N(MEAN, COVARIANCE)
    "explicit": lambda theta: WEIGHT @ explicit(affine(theta), X, -(X - MEAN) @ PRECISION),
    "implicit": lambda theta: WEIGHT @ implicit(affine(theta), X),
    "sliced": lambda theta: over_directions(sliced, theta),
    "sliced_vr": lambda theta: over_directions(sliced_vr, theta),
    "finite_difference_sliced": lambda theta: over_directions(finite_difference_sliced, theta, step=0.3),
    "finite_difference_sliced_vr": lambda theta: over_directions(finite_difference_sliced_vr, theta, step=0.3),
    "denoising": over_noise,
}


def closed_form(name: str, theta: Tensor) -> Tensor:
    """What the expectation is: polynomials in M and c."""
    M, c = theta[: d * d].reshape(d, d), theta[d * d :]
    if name == "explicit":
        error = (PRECISION - M) @ COVARIANCE @ (PRECISION - M).T
        return 0.5 * (error.trace() + (c - M @ MEAN).square().sum())
    S = NOISED if name == "denoising" else COVARIANCE
    second = (M @ (S + torch.outer(MEAN, MEAN)) @ M.T).trace()
    constant = d / (2 * SIGMA**2) if name == "denoising" else 0.0
    return -M.trace() + 0.5 * (second - 2 * c @ M @ MEAN + c @ c) + constant


@pytest.fixture
def theta() -> Tensor:
    return torch.randn(d * d + d, dtype=torch.float64)


@pytest.mark.equation("Hyvarinen (explicit)")
@pytest.mark.equation("Hyvarinen (implicit)")
@pytest.mark.equation("SSM (objective)")
@pytest.mark.equation("SSM (VR)")
@pytest.mark.equation("FD-SSM (score networks)")
@pytest.mark.equation("FD-SSM (VR)")
@pytest.mark.equation("NCSN (5)")
@pytest.mark.parametrize("name", EXPECTED)
def test_expectation_and_gradient_on_a_gaussian_are_the_closed_form(name, theta):
    found, expected = (
        torch.func.grad_and_value(f)(theta) for f in (EXPECTED[name], lambda theta: closed_form(name, theta))
    )
    torch.testing.assert_close(found, expected, **CLOSE)
    theta.requires_grad_()
    [by_backward] = torch.autograd.grad(EXPECTED[name](theta), theta)
    torch.testing.assert_close(by_backward, expected[0], **CLOSE)


@pytest.mark.parametrize("name", EXPECTED)
def test_the_minimiser_over_affine_scores_is_the_exact_score(name):
    """The normal equations, by autograd's Hessian: positive definite, so there is one minimum."""
    origin = torch.zeros(d * d + d, dtype=torch.float64)
    curvature = torch.autograd.functional.hessian(EXPECTED[name], origin)
    assert torch.linalg.eigvalsh(curvature).min() > 0.05
    theta = torch.linalg.solve(curvature, -torch.func.grad(EXPECTED[name])(origin))
    precision = torch.linalg.inv(NOISED) if name == "denoising" else PRECISION
    torch.testing.assert_close(theta, torch.cat([precision.flatten(), precision @ MEAN]), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", EXPECTED)
def test_the_distance_from_explicit_score_matching_is_a_constant_that_is_computed(name, theta):
    """-E |score|^2 / 2 of the density that is learned, = -tr(S^-1) / 2, and with noise d / (2 sigma^2) besides."""
    S = NOISED if name == "denoising" else COVARIANCE
    P = torch.linalg.inv(S)
    x = MEAN + GRID @ torch.linalg.cholesky(S).T
    distance = EXPECTED[name](theta) - WEIGHT @ explicit(affine(theta), x, -(x - MEAN) @ P)
    constant = {"explicit": 0.0, "denoising": (d / SIGMA**2 - P.trace().item()) / 2}.get(name, -P.trace().item() / 2)
    assert distance.item() == pytest.approx(constant, abs=1e-11)


# --- a curved score, a density with two modes


class Curved(nn.Module):
    """A small network without a symmetric Jacobian: no gradient of anything."""

    def __init__(self, dims: int):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(dims, 8), nn.Tanh(), nn.Linear(8, dims)).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x.flatten(1)).reshape(x.shape)


MODES = JointMixture(
    sigmas([SIGMA]),
    [0.3, 0.7],
    torch.tensor([[-0.8, 0.2], [0.5, -0.3]]),
    torch.tensor([[[0.3, 0.1], [0.1, 0.2]], [[0.2, -0.05], [-0.05, 0.4]]]),
)


def modes_grid(n: int) -> tuple[Tensor, Tensor]:
    """Nodes and weights of the mixture's own expectations."""
    points, weight = normal_grid(2, n)
    roots = torch.linalg.cholesky(MODES.covariances)
    x = torch.cat([m + points @ root.T for m, root in zip(MODES.means, roots, strict=True)])
    return x, torch.cat([w * weight for w in MODES.weights])


def test_on_a_mixture_too_implicit_is_explicit_minus_half_the_squared_score():
    score, (x, weight) = Curved(2), modes_grid(60)
    target = MODES.score(x, 0)
    constant = weight @ (target**2).sum(1) / 2
    with torch.no_grad():
        distance = weight @ (explicit(score, x, target) - implicit(score, x))
    assert distance.item() == pytest.approx(constant.item(), rel=1e-9)


def test_on_a_mixture_too_denoising_is_explicit_score_matching_of_the_noised_density():
    """The noised density is a mixture again: the oracle's at t = 1, in x = x_t / sqrt(alpha_bar)."""
    score, a = Curved(2), MODES.schedule.alpha_bar[1].sqrt()
    (x, weight), (eps, of_eps) = modes_grid(14), normal_grid(2, 14)
    x, eps = pairs(x, eps)
    weight = (weight[:, None] * of_eps).flatten()
    x_tilde = x + SIGMA * eps
    target = a * MODES.score(a * x_tilde, 1)
    with torch.no_grad():
        distance = weight @ (denoising(score, x, SIGMA, eps) - explicit(score, x_tilde, target))
    constant = (2 / SIGMA**2 - weight @ (target**2).sum(1)) / 2
    assert distance.item() == pytest.approx(constant.item(), rel=1e-6)
    at_the_score = weight @ explicit(lambda x: a * MODES.score(a * x, 1), x_tilde, target)
    assert at_the_score.item() < 1e-24


def jacobian(score: nn.Module, x: Tensor) -> Tensor:
    """ds/dx of each row, (B, d, d), by reverse mode."""
    x = x.detach().requires_grad_()
    rows = [torch.autograd.grad(column.sum(), x, create_graph=True)[0] for column in score(x).flatten(1).T]
    return torch.stack([row.flatten(1) for row in rows], 1)


OF_JACOBIAN: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {  # (J, s, v) -> objective
    "sliced": lambda J, s, v: torch.einsum("bi,bij,bj->b", v, J, v) + 0.5 * (v * s).sum(1) ** 2,
    "sliced_vr": lambda J, s, v: torch.einsum("bi,bij,bj->b", v, J, v) + 0.5 * (s**2).sum(1),
    "implicit": lambda J, s, v: J.diagonal(dim1=1, dim2=2).sum(1) + 0.5 * (s**2).sum(1),
}
OBJECTIVES = {"sliced": sliced, "sliced_vr": sliced_vr, "implicit": lambda score, x, v: implicit(score, x)}


@pytest.mark.parametrize("shape", [(3,), (1, 2, 2)])
@pytest.mark.parametrize("name", OF_JACOBIAN)
def test_values_and_gradients_of_a_network_are_those_of_its_whole_jacobian(name, shape):
    """Forward mode, and backward through it, against reverse mode twice."""
    x, v = torch.randn(2, 5, *shape, dtype=torch.float64)
    score = Curved(x[0].numel())
    found = OBJECTIVES[name](score, x, v)
    expected = OF_JACOBIAN[name](jacobian(score, x), score(x).flatten(1), v.flatten(1))
    torch.testing.assert_close(found, expected, **CLOSE)
    for one, other in zip(
        *(torch.autograd.grad(loss.sum(), list(score.parameters()), allow_unused=True) for loss in (found, expected)),
        strict=True,
    ):
        torch.testing.assert_close(one, other, **CLOSE)


@pytest.mark.parametrize(
    ("differences", "exact"), [(finite_difference_sliced, sliced), (finite_difference_sliced_vr, sliced_vr)]
)
def test_finite_differences_are_of_second_order(differences, exact):
    """The slope of the error over the step, of the value and of the gradient."""
    score, (x, v) = Curved(3), torch.randn(2, 20, 3, dtype=torch.float64)

    def answers(loss: Tensor) -> Tensor:
        gradients = torch.autograd.grad(loss.sum(), list(score.parameters()), allow_unused=True)
        return torch.cat([loss.detach(), *(g.flatten() for g in gradients if g is not None)])

    true = answers(exact(score, x, v))
    steps = [0.2, 0.1, 0.05, 0.025, 0.0125]
    errors = [(answers(differences(score, x, v, h))[: len(true)] - true).norm().item() for h in steps]
    slope = np.polyfit(np.log(steps), np.log(errors), 1)[0]
    assert slope == pytest.approx(2, abs=0.03) and errors[-1] < 1e-3 * true.norm()


# --- directions


@pytest.mark.parametrize("objective", [sliced, sliced_vr])
def test_the_mean_over_all_sign_vectors_is_implicit_score_matching_at_every_x(objective):
    score, x = Curved(4), torch.randn(6, 4, dtype=torch.float64)
    mean = objective(score, *pairs(x, signs(4))).reshape(6, -1).mean(1)
    torch.testing.assert_close(mean, implicit(score, x), **CLOSE)


@pytest.mark.parametrize("objective", [sliced, sliced_vr])
@pytest.mark.parametrize("name", PROJECTIONS)
def test_random_directions_are_unbiased(objective, name):
    """10^5 of them, within four standard errors."""
    score, n = Curved(4), 100_000
    x = torch.tensor([[0.5, -1.0, 0.2, 0.8]], dtype=torch.float64)
    v = PROJECTIONS[name](torch.randn(n, 4, dtype=torch.float64))
    with torch.no_grad():
        found, expected = objective(score, x.expand(n, 4), v), implicit(score, x)
    assert abs(found.mean() - expected).item() < 4 * found.std().item() / n**0.5


@pytest.mark.parametrize("name", PROJECTIONS)
def test_directions_have_mean_0_and_covariance_1(name):
    points, weight = normal_grid(1, 20)
    v = PROJECTIONS[name](points[:, 0])
    assert (weight @ v).item() == pytest.approx(0, abs=1e-12) and (weight @ v**2).item() == pytest.approx(1)


@pytest.mark.parametrize(("correlation", "less"), [(0.0, True), (0.4, True), (0.9, False)])
def test_the_variance_over_directions_that_is_reduced_is_computed(correlation, less):
    """Of the exact score of N(0, P^-1), averaged over x; with strong correlation the terms cancel, and it is not."""
    covariance = torch.tensor([[1.0, correlation], [correlation, 1.0]], dtype=torch.float64)
    P = torch.linalg.inv(covariance)
    points, weight = normal_grid(2, 3)  # exact for the fourth powers of a square's variance
    x, v = pairs(points @ torch.linalg.cholesky(covariance).T, signs(2))
    plain, reduced = (
        (weight @ objective(lambda x: -x @ P, x, v).reshape(len(points), -1).var(1, correction=0)).item()
        for objective in (sliced, sliced_vr)
    )
    assert reduced == pytest.approx(2 * 2 * P[0, 1].item() ** 2, abs=1e-12)
    assert plain == pytest.approx(2 * 0.5 * (P[0, 0] * P[1, 1] + 2 * P[0, 1] ** 2).item(), rel=1e-12)
    assert (reduced < plain) == less


# --- noise levels


LADDERS = {"geometric": geometric(), "linear": linear(1000), "cosine": cosine(100)}


@pytest.mark.equation("NCSN (6)")
@pytest.mark.parametrize("name", LADDERS)
def test_denoising_weighted_by_sigma_squared_is_half_the_squared_error_of_eps(name):
    """Row by row at the t of the same signal-to-noise ratio, the network asked at x_t = sqrt(alpha_bar_t) x."""
    schedule, network = LADDERS[name], Curved(4)
    t = torch.linspace(1, schedule.T, 8).round().long()
    x_0, eps = torch.randn(2, 8, 4, dtype=torch.float64)
    sigma, a = noise_level(schedule, t), schedule.alpha_bar[t].sqrt()[:, None]

    def eps_theta(x_t: Tensor, t: Tensor) -> Tensor:
        return network(x_t) + t[:, None] / schedule.T

    ladder = denoising_ladder(lambda x, sigma: score_at_sigma(eps_theta(a * x, t), sigma), x_0, sigma, eps)
    ddpm = GaussianDiffusion(schedule).loss(eps_theta, x_0, t=t, eps=eps)
    torch.testing.assert_close(ladder, 4 / 2 * ddpm, rtol=1e-9, atol=1e-12)
    for i in range(8):  # a level at a time, by a number
        one = denoising_ladder(
            lambda x, sigma, i=i: score_at_sigma(eps_theta(a[i] * x, t[i : i + 1]), sigma),
            x_0[i : i + 1],
            sigma[i].item(),
            eps[i : i + 1],
        )
        torch.testing.assert_close(one, ladder[i : i + 1], **CLOSE)


def test_the_ladder_is_denoising_times_sigma_squared():
    score, (x, eps) = Curved(3), torch.randn(2, 4, 3, dtype=torch.float64)
    sigma = torch.tensor([0.1, 1.0, 3.0, 10.0], dtype=torch.float64)
    found = denoising_ladder(lambda x, sigma: score(x) / sigma[:, None], x, sigma, eps)
    rows = [
        s**2 * denoising(lambda x, s=s: score(x) / s, x[i : i + 1], s, eps[i : i + 1])
        for i, s in enumerate(sigma.tolist())
    ]
    torch.testing.assert_close(found, torch.cat(rows), **CLOSE)


@pytest.mark.equation("NCSN (noise level)")
@pytest.mark.parametrize("name", LADDERS)
def test_the_noise_level_of_a_time(name):
    schedule = LADDERS[name]
    t = torch.arange(schedule.T + 1)
    expected = ((1 - schedule.alpha_bar) / schedule.alpha_bar).sqrt()
    torch.testing.assert_close(noise_level(schedule, t), expected, rtol=1e-12, atol=0)
    assert noise_level(schedule, 0) == 0 and noise_level(NoiseSchedule([0.5, 1.0]), 2) == math.inf
    between = noise_level(schedule, 1.5)
    assert between.item() == pytest.approx((expected[1] * expected[2]).sqrt().item(), rel=1e-12)


@pytest.mark.equation("Tweedie (score at sigma)")
@pytest.mark.parametrize("sigma", [0.05, 0.7, 4.0])
def test_eps_is_the_score_of_the_noised_density_at_x_over_its_scale(sigma):
    """Against autograd on the density of x_0 + sigma eps, written down apart."""
    oracle = JointMixture(sigmas([sigma]), MODES.weights, MODES.means, MODES.covariances)
    x = torch.randn(6, 2, dtype=torch.float64, requires_grad=True)
    components = torch.distributions.MultivariateNormal(
        MODES.means, MODES.covariances + sigma**2 * torch.eye(2, dtype=torch.float64)
    )
    law = torch.distributions.MixtureSameFamily(torch.distributions.Categorical(MODES.weights), components)
    [score] = torch.autograd.grad(law.log_prob(x).sum(), x)
    eps = oracle.denoise(q_sample(oracle.schedule, x, 1, torch.zeros_like(x)), 1).eps
    torch.testing.assert_close(score_at_sigma(eps, sigma), score, rtol=1e-8, atol=1e-9)
    torch.testing.assert_close(score_at_sigma(eps, torch.full((6,), sigma)), score, rtol=1e-6, atol=1e-7)


# --- what is refused


x, row = torch.zeros(4, 3), torch.zeros(4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: denoising(torch.clone, x, 0.0, x), "sigma = 0.0 must be > 0"),
        (lambda: denoising(torch.clone, x, -1, x), "sigma = -1 must be > 0"),
        (lambda: denoising(torch.clone, x, math.nan, x), "sigma = nan must be > 0"),
        (lambda: denoising(torch.clone, x, torch.tensor([1.0, 1, 0, 1]), x), "must be > 0"),
        (lambda: denoising(torch.clone, x, torch.ones(3), x), "sigma of shape (3,) for 4 rows: a number, or one a row"),
        (lambda: denoising(torch.clone, x, 1.0, x[:2]), "eps of shape (2, 3) must have the shape of x, (4, 3)"),
        (lambda: denoising_ladder(lambda x, sigma: x, x, 0.0, x), "must be > 0"),
        (lambda: implicit(torch.clone, row), "x of shape (4,) has no features: rows (B, d) with d >= 1 are needed"),
        (lambda: implicit(torch.clone, torch.zeros(4, 0)), "x of shape (4, 0) has no features"),
        (lambda: sliced(torch.clone, row, row), "x of shape (4,) has no features"),
        (lambda: sliced(torch.clone, x, x[:, :2]), "v of shape (4, 2) must have the shape of x, (4, 3)"),
        (lambda: sliced_vr(torch.clone, x, x[:1]), "v of shape (1, 3) must have the shape of x, (4, 3)"),
        (lambda: finite_difference_sliced(torch.clone, x, x[:1]), "v of shape (1, 3) must have the shape of x"),
        (lambda: finite_difference_sliced(torch.clone, x, x, 0.0), "step = 0.0 must be > 0"),
        (lambda: explicit(torch.clone, x, row), "target of shape (4,) must have the shape of x, (4, 3)"),
        (lambda: explicit(lambda x: x[:, :1], x, x), "the score has shape (4, 1), but it must have that of x, (4, 3)"),
        (lambda: implicit(lambda x: x[:, :1], x), "the score has shape (4, 1)"),
        (lambda: score_at_sigma(x, 0.0), "sigma = 0.0 must be > 0"),
    ],
)
def test_what_does_not_fit_is_refused_in_words(call, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        call()
