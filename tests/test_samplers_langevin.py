"""ddpm/samplers/langevin.py: on Gaussian data every move is affine, and all moments are exact."""

import math

import pytest
import torch
from conftest import GaussianOracle, MixtureOracle, propagate

from ddpm.randomness import SampleNoise
from ddpm.samplers import DDIM, AnnealedLangevin, integrate
from ddpm.schedules import linear, sigmas, zero_terminal_snr

SIGMAS = [0.05, 0.2, 0.8, 3.0]


@pytest.mark.equation("NCSN (Algorithm 1)")
@pytest.mark.parametrize("r", [0.05, 0.2, 1.0])
def test_the_moments_of_every_move_are_those_of_the_recursion(r):
    """In x = x_t / sqrt(alpha_bar): mean and variance by x + h/2 s + sqrt(h) z with s = (m - x) / v, level by level."""
    m, c2 = 0.7, 0.25
    oracle, sampler = GaussianOracle(sigmas(SIGMAS), m, c2), AnnealedLangevin(moves=5, r=r)
    found = propagate(sampler, oracle)
    sigma = [0.0, *SIGMAS]
    mean, variance = 0.0, 1 + sigma[4] ** 2  # x_T = N(0, 1), in x
    walk = iter(found)
    for t in (4, 3, 2, 1):
        v, h = c2 + sigma[t] ** 2, r * sigma[t] ** 2
        for move in range(5):
            k = 1 - h / (2 * v)
            mean, variance = m + k * (mean - m), k**2 * variance + h
            s, at_s, variance_s = next(walk)
            assert s == (t - 1 if move == 4 and t > 1 else t)
            a2 = 1 / (1 + sigma[s] ** 2)
            assert at_s == pytest.approx(math.sqrt(a2) * mean, rel=1e-10)
            assert variance_s == pytest.approx(a2 * variance, rel=1e-10)
    s, at_0, variance_0 = next(walk)  # D(x_1, 1): shrunk to the mean
    shrink = c2 / (c2 + sigma[1] ** 2)
    assert s == 0 and at_0 == pytest.approx(m + shrink * (mean - m), rel=1e-10)
    assert variance_0 == pytest.approx(shrink**2 * variance, rel=1e-10)
    assert next(walk, None) is None


@pytest.mark.parametrize("r", [0.05, 0.2, 1.0])
def test_a_level_converges_to_its_variance_up_to_a_bias_of_first_order(r):
    sigma, c2 = 0.8, 0.25
    oracle, v = GaussianOracle(sigmas([sigma]), 0.0, c2), c2 + sigma**2
    *_, (_, mean, variance), _ = propagate(AnnealedLangevin(moves=700, r=r), oracle)
    assert variance * (1 + sigma**2) == pytest.approx(v / (1 - r * sigma**2 / (4 * v)), rel=1e-8)
    assert mean == pytest.approx(0, abs=1e-12)


def test_the_predictor_is_ddims_step():
    schedule = linear(50)
    oracle = MixtureOracle(schedule, [0.3, 0.7], [-0.8, 0.6], [0.04, 0.01])
    x_T, sampler = torch.randn(6, 1, dtype=torch.float64), AnnealedLangevin(moves=1, predictor=True)
    noise = SampleNoise(0, range(6))
    walk = []
    sampler(
        schedule, oracle.denoise, x_T, generator=noise, callback=lambda i, t, s, x_t, pred: walk.append((t, s, x_t))
    )
    assert [(t, s) for t, s, _ in walk[:5]] == [(50, 50), (50, 49), (49, 49), (49, 48), (48, 48)]
    for (t, s, x_t), (_, _, x_s) in zip(walk[1::2], walk[2::2], strict=False):
        torch.testing.assert_close(x_s, integrate(DDIM(), schedule, oracle.denoise, x_t, [t, s]), rtol=0, atol=1e-12)


def test_samples_of_a_mixture_by_one_level_are_of_its_shares():
    oracle = MixtureOracle(sigmas([0.5]), [0.3, 0.7], [-0.5, 0.5], [0.04, 0.01])
    n = 4000
    sampler, generator = AnnealedLangevin(moves=200, r=0.2), torch.Generator().manual_seed(0)
    seen = []
    sampler(
        oracle.schedule,
        oracle.denoise,
        torch.randn(n, 1, dtype=torch.float64, generator=generator),
        generator=generator,
        callback=lambda i, t, s, x_t, pred: seen.append(x_t),
    )
    x = seen[-1][:, 0]
    distance = (oracle.cdf(x.sort().values, 1) - (torch.arange(n) + 0.5) / n).abs().max()  # Kolmogorov and Smirnov's
    assert distance < 1.95 / math.sqrt(n) + 0.01  # 0.1 %, and the bias of the step


@pytest.mark.parametrize(
    ("sampler", "evaluations"),
    [
        (AnnealedLangevin(moves=3), 13),
        (AnnealedLangevin(moves=3, predictor=True), 16),
        (AnnealedLangevin(steps=2, moves=1), 3),
        (AnnealedLangevin(times=[3, 1], moves=2), 5),
    ],
)
def test_what_it_costs(sampler, evaluations):
    calls, oracle = [], GaussianOracle(sigmas(SIGMAS))
    assert sampler.evaluations(oracle.schedule) == evaluations
    x = sampler(oracle.schedule, lambda x_t, t: calls.append(t) or oracle.denoise(x_t, t), torch.zeros(2, 1))
    assert len(calls) == evaluations and x.shape == (2, 1)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"moves": 0}, "moves = 0: the moves at a level must be an integer >= 1"),
        ({"moves": 2.0}, "moves = 2.0"),
        ({"moves": 10_000_000}, "moves = 10000000: the moves at a level must be an integer >= 1, at most 100,000"),
        ({"r": 0}, r"r = 0 must lie in \(0, 4\)"),
        ({"r": 4.0}, r"r = 4.0 must lie in \(0, 4\)"),
        ({"r": math.nan}, "r = nan"),
        ({"predictor": 1}, "predictor = 1 must be true or false"),
    ],
)
def test_what_is_refused(options, words):
    with pytest.raises(ValueError, match=words):
        AnnealedLangevin(**options)
    with pytest.raises(ValueError, match="needs a finite noise level at T, but beta_T = 1"):
        AnnealedLangevin().times(zero_terminal_snr(linear(50)))
