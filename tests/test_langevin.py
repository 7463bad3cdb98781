"""ddpm/score/langevin.py: exact moments of the unadjusted walk, detailed balance of the adjusted one."""

import math

import pytest
import torch
from torch import Tensor

from ddpm.oracle import JointMixture
from ddpm.schedules import sigmas
from ddpm.score import adjusted, log_acceptance, unadjusted

MODES = JointMixture(sigmas([1.0]), [0.4, 0.6], torch.tensor([[-1.0], [0.8]]), torch.tensor([[[0.2]], [[0.1]]]))


def score(x: Tensor) -> Tensor:
    return MODES.score(x, 0)


def log_prob(x: Tensor) -> Tensor:
    return MODES.log_prob(x, 0)


# --- unadjusted


@pytest.mark.equation("Langevin (step)")
def test_a_step_by_hand():
    x, z, h = torch.tensor([[0.5, -1], [2, 0]]), torch.tensor([[1.0, 0], [-2, 3]]), torch.tensor([0.25, 1])
    found = unadjusted(lambda x: -x / 4, x.double(), h, z.double())
    expected = torch.tensor([[0.5 - 0.125 * 0.125 + 0.5, -1 + 0.125 * 0.25], [2 - 0.5 * 0.5 - 2, 3]]).double()
    torch.testing.assert_close(found, expected, rtol=1e-14, atol=0)


@pytest.mark.parametrize("h", [1e-4, 0.1, 0.9])
@pytest.mark.parametrize("s2", [0.25, 4.0])
def test_the_stationary_variance_on_a_gaussian(h, s2):
    """s^2 / (1 - h / (4 s^2)): a step is affine, its slopes are read off, and their moments iterated to the end."""
    probes = torch.tensor([[0.0], [1.0], [0.0]]).double()
    base, of_x, of_z = unadjusted(lambda x: (0.7 - x) / s2, probes, h, torch.tensor([[0.0], [0.0], [1.0]]).double())
    slope, spread = (of_x - base).item(), (of_z - base).item()
    mean, variance = 5.0, 9.0
    for _ in range(60):  # each round is twice the steps of the one before
        mean, variance = slope * mean + base.item(), slope**2 * variance + spread**2
        base, spread = base + slope * base, math.hypot(spread, slope * spread)
        slope = slope**2
    assert mean == pytest.approx(0.7, rel=1e-9)
    assert variance == pytest.approx(s2 / (1 - h / (4 * s2)), rel=1e-9)


def test_too_long_a_step_leads_away():
    x, s2 = torch.ones(1, 1).double(), 0.25
    for h, grows in ((3.9 * s2, False), (4.1 * s2, True)):
        assert (unadjusted(lambda x: -x / s2, x, h, torch.zeros_like(x)).abs() > 1).item() == grows


def test_the_stationary_covariance_of_dimensions_that_depend_on_each_other():
    """S (1 - h S^-1 / 4)^-1 is left as it is by a step, exactly: sigma points carry second moments."""
    S, h = torch.tensor([[0.8, 0.3], [0.3, 0.5]]).double(), 0.2
    eye = torch.eye(2).double()
    stationary = S @ torch.linalg.inv(eye - h / 4 * torch.linalg.inv(S))
    root = 2**0.5 * torch.cat([torch.linalg.cholesky(stationary).T, -torch.linalg.cholesky(stationary).T])
    noise = 2**0.5 * torch.cat([eye, -eye])
    x, z = root.repeat_interleave(4, 0), noise.repeat(4, 1)
    assert torch.allclose(x.T @ x / 16, stationary) and torch.allclose(z.T @ z / 16, eye)
    x = unadjusted(lambda x: -x @ torch.linalg.inv(S), x, h, z)
    torch.testing.assert_close(x.T @ x / 16, stationary, rtol=1e-13, atol=1e-14)


# --- adjusted


def proposal(x: Tensor, y: Tensor, h: float) -> Tensor:
    """log q(y | x), (B,)."""
    return torch.distributions.Normal(x + h / 2 * score(x), math.sqrt(h)).log_prob(y).sum(1)


@pytest.mark.equation("MALA (acceptance)")
@pytest.mark.parametrize("h", [0.01, 0.3, 2.0])
def test_detailed_balance(h):
    """p(x) q(y | x) min(1, r(x, y)) is the same both ways."""
    x, y = torch.randn(2, 50, 1, dtype=torch.float64)

    def flow(x: Tensor, y: Tensor) -> Tensor:
        return log_prob(x) + proposal(x, y, h) + log_acceptance(score, log_prob, x, y, h).clamp(max=0)

    torch.testing.assert_close(flow(x, y), flow(y, x), rtol=1e-11, atol=1e-11)
    expected = log_prob(y) + proposal(y, x, h) - log_prob(x) - proposal(x, y, h)
    torch.testing.assert_close(log_acceptance(score, log_prob, x, y, h), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("h", [0.05, 0.5])
def test_moments_are_left_as_they_are_for_any_step(h):
    """On a grid of starts and ends, over all uniform numbers: E f(x') = E f(x), while unadjusted steps change it."""
    grid = torch.linspace(-6, 6, 601, dtype=torch.float64)
    x, y = grid.repeat_interleave(601)[:, None], grid.repeat(601)[:, None]
    noise = (y - x - h / 2 * score(x)) / math.sqrt(h)
    density = (log_prob(x) + proposal(x, y, h)).exp() * (grid[1] - grid[0]) ** 2
    accept = log_acceptance(score, log_prob, x, y, h).clamp(max=0).exp()
    below, above = (accept * by for by in (1 - 1e-9, 1 + 1e-9))
    moved, yes = adjusted(score, log_prob, x, h, noise, below)
    stayed, no = adjusted(score, log_prob, x, h, noise, above)
    some = density > 1e-12
    assert yes[some].all() and torch.allclose(moved[some], y[some])
    assert not no[some & (accept < 1)].any() and torch.equal(stayed[~no], x[~no])
    assert density.sum().item() == pytest.approx(1, abs=1e-6)
    for f in (lambda x: x, lambda x: x**2, torch.cos):
        change = (density * accept * (f(y) - f(x))[:, 0]).sum().item()
        assert change == pytest.approx(0, abs=1e-12)
    assert abs((density * (y**2 - x**2)[:, 0]).sum().item()) > 1e-3


def test_a_chain_of_adjusted_steps_draws_from_the_mixture():
    """Four standard errors of independent chains, which began as draws: any bias of a step would add up."""
    generator = torch.Generator().manual_seed(0)
    x = MODES.sample(20_000, generator)
    rates = []
    for _ in range(30):
        noise = torch.randn(x.shape, dtype=torch.float64, generator=generator)
        uniform = torch.rand(len(x), dtype=torch.float64, generator=generator)
        x, accepted = adjusted(score, log_prob, x, 0.3, noise, uniform)
        rates.append(accepted.double().mean().item())
    mean = (MODES.weights @ MODES.means).item()
    second = (MODES.weights @ (MODES.covariances[:, 0] + MODES.means**2)).item()
    assert abs(x.mean().item() - mean) < 4 * x.std().item() / len(x) ** 0.5
    assert abs((x**2).mean().item() - second) < 4 * (x**2).std().item() / len(x) ** 0.5
    assert 0.3 < min(rates) <= max(rates) < 0.999


def test_a_step_to_where_there_is_no_density_is_refused():
    def inside(x: Tensor) -> Tensor:
        return torch.where((x.abs() <= 1).flatten(1).all(1), 0.0, -math.inf)

    x = torch.full((3, 1, 2), 0.5)
    noise = torch.stack([torch.zeros(1, 2), torch.full((1, 2), 9.0), torch.full((1, 2), math.nan)])
    moved, accepted = adjusted(torch.zeros_like, inside, x, 0.1, noise, torch.zeros(3))
    assert accepted.tolist() == [True, False, False] and torch.equal(moved, x)


@pytest.mark.parametrize("h", [0, -1.0, math.nan, torch.tensor([1.0, 0.0])])
def test_steps_that_are_none(h):
    x = torch.zeros(2, 1)
    with pytest.raises(ValueError, match=r"h = .* must be > 0"):
        unadjusted(torch.neg, x, h, x)
    with pytest.raises(ValueError, match="h of shape"):
        unadjusted(torch.neg, x, torch.ones(3), x)
