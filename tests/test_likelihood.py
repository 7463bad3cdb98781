"""ddpm/likelihood.py: every term of the bound has its closed expectation, and the flow the exact density.

Two nodes m +- c of x_0 and +-1 of eps average squares exactly, so that four rows of one pixel are the expectation over
Gaussian data: nothing in the tests of the bound is left to chance.
"""

import itertools
import math

import numpy as np
import pytest
import torch
from conftest import GaussianOracle, MixtureOracle
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from ddpm.forward import q_posterior, q_sample
from ddpm.likelihood import (
    Bound,
    bits_lost,
    bits_of_bytes,
    bits_per_dim,
    dequantised,
    divergence,
    flow_times,
    log_likelihood,
    rademacher,
)
from ddpm.losses import L_0, L_T, L_t_1, L_vlb, log_bin
from ddpm.randomness import SampleNoise
from ddpm.reverse import mu_theta, variance
from ddpm.schedules import NoiseSchedule, cosine, linear, respace, zero_terminal_snr
from ddpm.targets import Prediction, x_0_from_eps

BITS = 1 / math.log(2)
STEPS_OF_A_CHAIN = [2, 5, 20, 150, 600, 1000]


class Respaced(GaussianOracle):
    """The oracle with a variance for each t: 0 is beta_tilde, 1 is beta, and "best" the one that costs least."""

    def __init__(self, schedule: NoiseSchedule, frac: float | str = 0.0, times: list[int] | None = None):
        super().__init__(schedule, frac=0.0 if frac == "best" else frac)
        self.best, self.times = frac == "best", times or list(range(1, schedule.T + 1))
        self.kept = respace(schedule, self.times) if times else schedule

    def constants(self, t: int) -> tuple[float, float, float]:
        """beta, beta_tilde and c, what x_0 is multiplied by in mu_tilde, of the step from t to the one before."""
        s = ([0, *self.times])[self.times.index(t)]
        ab_t, ab_s = self.schedule.alpha_bar[[t, s]].tolist()
        beta = 1 - ab_t / ab_s
        return beta, beta * (1 - ab_s) / (1 - ab_t), math.sqrt(ab_s) * beta / (1 - ab_t)

    def sigma2(self, t: int) -> tuple[float, float]:
        """sigma_t^2 and beta_tilde_t, where beta_tilde of the second step stands in for that of the first."""
        beta, beta_tilde, c = self.constants(t)
        if self.best:
            return beta_tilde + c**2 * self.x_0_variance(t), beta_tilde
        floor = beta_tilde or self.constants(self.times[1])[1]
        return beta**self.frac * floor ** (1 - self.frac), beta_tilde

    def denoise(self, x_t: Tensor, t: Tensor) -> Prediction:
        pred = super().denoise(x_t, t)
        if not self.best:
            return pred
        (now,) = set(t.tolist())
        beta, beta_tilde, _ = self.constants(now)
        floor = beta_tilde or self.constants(self.times[1])[1]
        return Prediction(pred.eps, pred.x_0, math.log(self.sigma2(now)[0] / floor) / math.log(beta / floor))

    def expected(self, t: int) -> float:
        """The closed expectation of the term of t, in bits."""
        (sigma2, beta_tilde), c = self.sigma2(t), self.constants(t)[2]
        error = c**2 * self.x_0_variance(t) / sigma2
        if t == self.times[0]:
            return BITS * 0.5 * (math.log(2 * math.pi * sigma2) + error)
        return BITS * 0.5 * (beta_tilde / sigma2 - 1 - math.log(beta_tilde / sigma2) + error)

    def expected_L_T(self) -> float:
        ab = self.schedule.alpha_bar[-1].item()
        return BITS * 0.5 * (ab * (self.mean**2 + self.variance) - ab - math.log1p(-ab))

    def nodes(self) -> tuple[Tensor, Tensor]:
        """x_0 and eps, (4, 1): averages over these rows are expectations of whatever is at most cubic."""
        signs = torch.tensor([[1.0, 1], [1, -1], [-1, 1], [-1, -1]], dtype=torch.float64)
        return self.mean + math.sqrt(self.variance) * signs[:, :1], signs[:, 1:]

    def bound(self, **options: object) -> Bound:
        x_0, eps = self.nodes()
        times = None if self.kept is self.schedule else self.times
        noise = lambda t, shape, device: eps  # noqa: E731
        return bits_per_dim(self.schedule, self.denoise, x_0, noise, times=times, discrete=False, **options)


def nll(variance: float = 0.25) -> float:
    """Bits of a number from N(m, variance)."""
    return BITS * 0.5 * math.log(2 * math.pi * math.e * variance)


@pytest.mark.equation("iDDPM (4)")
@pytest.mark.parametrize("frac", [0.0, 1.0, 0.3, "best"])
@pytest.mark.parametrize("times", [None, STEPS_OF_A_CHAIN], ids=["all", "strided"])
def test_every_term_has_its_closed_expectation(schedule, frac, times):
    oracle = Respaced(schedule, frac, times)
    bound = oracle.bound()
    expected = torch.tensor([oracle.expected(t) for t in oracle.times], dtype=torch.float64)
    assert bound.times == tuple(oracle.times) and bound.terms.shape == (4, len(expected))
    torch.testing.assert_close(bound.terms.mean(0), expected, rtol=1e-8, atol=1e-12)
    assert bound.L_T.mean().item() == pytest.approx(oracle.expected_L_T(), rel=1e-8)
    total = bound.total.mean().item()
    assert total == pytest.approx(expected.sum().item() + oracle.expected_L_T(), abs=1e-8) and total > nll()
    torch.testing.assert_close(bound.total, bound.L_0 + bound.L_t_1 + bound.L_T)
    assert bound.L_0.mean().item() == pytest.approx(expected[0].item(), rel=1e-8)

    error = torch.tensor([oracle.x_0_variance(t) for t in oracle.times], dtype=torch.float64)
    snr = torch.exp(2 * schedule.lambda_[oracle.times])
    torch.testing.assert_close(bound.x_0_mse.mean(0), error, rtol=1e-8, atol=0)
    torch.testing.assert_close(bound.eps_mse.mean(0), error * snr, rtol=1e-8, atol=0)


@pytest.mark.equation("VLB (gap)")
@pytest.mark.parametrize("frac", [0.0, 1.0, 0.3])
def test_what_each_step_loses_is_the_divergence_of_two_gaussians_and_adds_up_to_the_gap(frac):
    """Signs for x_0 and for the noise of each step have all second moments, of which these logarithms are made."""
    schedule = NoiseSchedule([0.1, 0.3, 0.5, 0.4])
    signs = torch.tensor(list(itertools.product([-1.0, 1.0], repeat=5)), dtype=torch.float64)
    oracle, perfect = Respaced(schedule, frac), Respaced(schedule, "best")
    x_0, noise = 0.7 + 0.5 * signs[:, :1], lambda t, shape, device: signs[:, t : t + 1]
    prior, steps = bits_lost(schedule, oracle.denoise, lambda x, t: oracle.log_prob(x, t)[:, 0], x_0, noise)
    ratios = torch.tensor([perfect.sigma2(t)[0] / oracle.sigma2(t)[0] for t in range(1, 5)], dtype=torch.float64)
    torch.testing.assert_close(steps.mean(0), BITS / 2 * (ratios - 1 - ratios.log()))
    mean, var = oracle.marginal(4)
    expected = BITS * kl_divergence(Normal(mean, math.sqrt(var)), Normal(0.0, 1.0))
    assert prior.mean().item() == pytest.approx(expected.item())
    bound = bits_per_dim(schedule, oracle.denoise, x_0, noise, discrete=False)
    entropy = 0.5 * math.log2(2 * math.pi * math.e * 0.25)
    assert (bound.total.mean() - entropy).item() == pytest.approx((prior.mean() + steps.sum(1).mean()).item())


@pytest.mark.slow
@pytest.mark.parametrize(("frac", "gap"), [(0.0, 0.82224), (1.0, 1.5901e-3), ("best", 1.4265e-5)])
def test_how_far_the_bound_is_from_the_likelihood(schedule, frac, gap):
    """What the best network loses by the variance of its steps, of which it learns beta_tilde_2 or beta_1 in L_0."""
    oracle = Respaced(schedule, frac)
    assert oracle.bound().total.mean().item() - nll() == pytest.approx(gap, rel=1e-3)
    if frac == 0:
        with_beta_1 = oracle.bound().total.mean().item() - oracle.expected(1) + Respaced(schedule, 1.0).expected(1)
        assert with_beta_1 - nll() == pytest.approx(0.65838, rel=1e-4)


def test_a_shorter_chain_costs_more(schedule):
    """But not with the best variance, for then every step of Gaussian data is exactly Gaussian."""
    chains = [[1, 9, 1000], STEPS_OF_A_CHAIN, None]
    gaps = [Respaced(schedule, 1.0, times).bound().total.mean().item() - nll() for times in chains]
    assert gaps[0] > 1.5 * gaps[1] > 15 * gaps[2] > 0
    assert Respaced(schedule, "best", chains[1]).bound().total.mean().item() - nll() < 2e-5


def test_all_times_are_no_stride(schedule):
    short = respace(schedule, list(range(100, 1001, 100)))
    oracle = GaussianOracle(short)
    x_0, noise = torch.randn(3, 2, dtype=torch.float64), SampleNoise(0, range(3))
    every, none = (bits_per_dim(short, oracle.denoise, x_0, noise, times=k) for k in (range(1, 11), None))
    torch.testing.assert_close(every.terms, none.terms)
    assert every.times == none.times == tuple(range(1, 11))


def test_the_network_is_asked_for_its_own_times_and_noise_is_that_of_the_time(schedule, oracle):
    asked, drawn, counted = [], [], []

    def denoise(x_t: Tensor, t: Tensor) -> Prediction:
        asked.append(t.tolist())
        return oracle.denoise(x_t, t)

    def noise(draw: int, shape: tuple[int, ...], device: torch.device) -> Tensor:
        drawn.append((draw, shape))
        return torch.zeros(2, *shape)

    x_0 = torch.zeros(2, 1, 3)
    bits_per_dim(schedule, denoise, x_0, noise, times=[5, 70, 1000], callback=counted.append)
    assert asked == [[5, 5], [70, 70], [1000, 1000]] and counted == [2, 2, 2]
    assert drawn == [(5, (1, 3)), (70, (1, 3)), (1000, (1, 3))]


@pytest.mark.parametrize("times", [[], [0, 1], [3, 2], [5, 5], [1001], [1.0]])
def test_times_that_are_no_chain(schedule, oracle, times):
    with pytest.raises(ValueError, match="times"):
        bits_per_dim(schedule, oracle.denoise, torch.zeros(1, 1), SampleNoise(0, [0]), times=times)


def test_an_image_has_the_same_bound_in_any_batch():
    schedule = linear(20, rescale=False)
    x_0 = (torch.randint(0, 256, (5, 1, 2, 2)) / 127.5 - 1).float()
    oracle = GaussianOracle(schedule)
    whole = bits_per_dim(schedule, oracle.denoise, x_0, SampleNoise(3, range(5)))
    parts = [bits_per_dim(schedule, oracle.denoise, x_0[i], SampleNoise(3, i)) for i in ([0, 1], [4], [2, 3])]
    for name in ("terms", "x_0_mse", "eps_mse", "L_T", "total"):
        parted = torch.cat([getattr(part, name) for part in parts])
        assert torch.equal(getattr(whole, name)[[0, 1, 4, 2, 3]], parted)
    assert whole.terms.dtype == torch.float32


def test_nothing_waits_for_the_device(device, schedule):
    """Values cannot be read on "meta", and reading them on CUDA is an error here."""
    short = respace(schedule, [1, 10, 1000])
    noise = lambda t, shape, where: torch.zeros(2, *shape, device=where)  # noqa: E731
    x_0 = torch.zeros(2, 1, 2, device=device)
    short.to(device)
    if device == "cuda":
        torch.cuda.set_sync_debug_mode("error")
    try:
        bound = bits_per_dim(short, lambda x_t, t: Prediction(x_t, x_t, 0.5), x_0, noise)
    finally:
        if device == "cuda":
            torch.cuda.set_sync_debug_mode("default")
    assert bound.total.device.type == device and bound.terms.shape == (2, 3)


# ------------------------------------------------------------------------------------------------- single terms


def some(schedule: NoiseSchedule, t: int | Tensor, B: int = 4) -> tuple[Tensor, Tensor, Tensor, Prediction]:
    """x_0, eps, x_t and what a bad network says of it, (B, 3, 2)."""
    x_0, eps, eps_theta = torch.randn(3, B, 3, 2, dtype=torch.float64)
    x_t = q_sample(schedule, x_0, t, eps)
    return x_0, eps, x_t, Prediction(eps_theta, x_0_from_eps(schedule, x_t, t, eps_theta), 0.4)


@pytest.mark.equation("DDPM (5)")
def test_L_T_is_the_divergence_from_the_prior(schedule):
    x_0 = torch.randn(4, 3, 2, dtype=torch.float64)
    for chosen in (schedule, linear(1000, beta_T=0.002)):
        alpha_bar = chosen.alpha_bar[-1]
        q = Normal(alpha_bar.sqrt() * x_0, (1 - alpha_bar).sqrt())
        expected = kl_divergence(q, Normal(0.0, 1.0)).flatten(1).mean(1) * BITS
        torch.testing.assert_close(L_T(chosen, x_0), expected, rtol=1e-8, atol=1e-14)
    assert torch.equal(L_T(zero_terminal_snr(schedule), x_0), torch.zeros(4, dtype=torch.float64))


@pytest.mark.equation("DDPM (8)")
@pytest.mark.equation("DDPM (12)")
@pytest.mark.parametrize("t", [2, 3, 50, 700, 1000])
def test_L_t_1_in_its_three_forms(schedule, t):
    x_0, eps, x_t, pred = some(schedule, t)
    term = L_t_1(schedule, pred, x_0, x_t, t)
    (mu_tilde, beta_tilde), mu = q_posterior(schedule, x_0, x_t, t), mu_theta(schedule, pred, x_t, t)
    sigma2 = variance(schedule, pred, x_t, t)

    divergence_of_steps = kl_divergence(Normal(mu_tilde, beta_tilde.sqrt()), Normal(mu, sigma2.sqrt()))
    torch.testing.assert_close(term, divergence_of_steps.flatten(1).mean(1) * BITS, rtol=1e-9, atol=0)

    C = 0.5 * (beta_tilde / sigma2 - 1 - (beta_tilde / sigma2).log()).flatten()
    squares = ((mu_tilde - mu) ** 2).flatten(1).mean(1)
    torch.testing.assert_close(term / BITS, squares / (2 * sigma2.flatten()) + C, rtol=1e-9, atol=0)

    beta, alpha, alpha_bar = (v[t] for v in (schedule.beta, schedule.alpha, schedule.alpha_bar))
    weight = beta**2 / (2 * sigma2.flatten() * alpha * (1 - alpha_bar))
    errors = ((eps - pred.eps) ** 2).flatten(1).mean(1)
    torch.testing.assert_close(term / BITS, weight * errors + C, rtol=1e-9, atol=0)


def test_terms_of_a_batch_of_times_are_those_of_each_time(schedule):
    t = torch.tensor([1, 2, 60, 1000])
    x_0, _, x_t, pred = some(schedule, t)
    x_0 = (x_0 * 20).round().clamp(-127, 127) / 127.5
    together = L_vlb(schedule, pred, x_0, x_t, t)
    for i, now in enumerate(t.tolist()):
        alone = Prediction(pred.eps[i : i + 1], pred.x_0[i : i + 1], 0.4)
        function = L_0 if now == 1 else L_t_1
        torch.testing.assert_close(
            together[i : i + 1], function(schedule, alone, x_0[i : i + 1], x_t[i : i + 1], now), rtol=1e-12, atol=0
        )


BYTES = torch.arange(256, dtype=torch.float64) / 127.5 - 1


@pytest.mark.equation("DDPM (13)")
@pytest.mark.parametrize("std", [1e-3, 0.0074, 0.1, 1.0, 30.0])
def test_the_bins_of_the_bytes_fill_the_line(std):
    for mean in (-3.0, -1.0, -0.3, 0.0, 0.9999, 1.0, 2.5):
        log_p = log_bin(BYTES, torch.tensor(mean).double(), torch.tensor(std).double())
        assert log_p.logsumexp(0).item() == pytest.approx(0, abs=1e-12) and not log_p.isnan().any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_both_tails_of_the_bins_are_exact(dtype):
    """Far from the mean, left and right: the logarithm of what no float holds, and no difference of two ones."""
    std = torch.tensor(0.01, dtype=dtype)
    for byte, mean in ((140, -1.0), (250, -0.5), (200, 0.55)):
        x, mean = BYTES[byte].to(dtype), torch.tensor(mean, dtype=dtype)
        right, left = log_bin(x, mean, std), log_bin(-x, -mean, std)
        expected = quadrature(*(x.double() + side / 255 for side in (-1, 1)), mean.double(), 0.01, reach=200)
        torch.testing.assert_close(right.double(), expected, rtol=1e-5 if dtype == torch.float32 else 1e-9, atol=0)
        torch.testing.assert_close(right, left, rtol=1e-6, atol=0)


def quadrature(low: Tensor, high: Tensor, mean: Tensor, std: float, reach: float = 14) -> Tensor:
    """log of the integral of N(mean, std^2) from low to high, no further than reach * std, by Gauss-Legendre."""
    nodes, weights = (torch.tensor(a) for a in np.polynomial.legendre.leggauss(60))
    low, high = torch.maximum(low, mean - reach * std), torch.minimum(high, mean + reach * std)
    x = low[..., None] + (high - low)[..., None] * (nodes + 1) / 2
    log_density = Normal(mean[..., None], std).log_prob(x)
    return (log_density + weights.log()).logsumexp(-1) + ((high - low) / 2).log()


def test_L_0_of_bytes_by_quadrature(schedule):
    """For every byte, averaged over its x_1 on Gauss-Hermite nodes."""
    oracle = GaussianOracle(schedule, 0.1, 0.09)
    eps, weights = (torch.tensor(a) for a in np.polynomial.hermite_e.hermegauss(24))
    x_0, noise = (v.reshape(-1, 1) for v in torch.meshgrid(BYTES, eps, indexing="ij"))
    bound = bits_per_dim(schedule, oracle.denoise, x_0, lambda t, shape, device: noise, times=[1, 1000])
    average = (bound.L_0.reshape(256, 24) * weights / weights.sum()).sum(1)

    alpha_bar, beta_tilde = schedule.alpha_bar[1].item(), respace(schedule, [1, 1000]).beta_tilde[2].item()
    x_1 = math.sqrt(alpha_bar) * BYTES[:, None] + math.sqrt(1 - alpha_bar) * eps
    mean = oracle.mean + oracle.x_0_variance(1) * math.sqrt(alpha_bar) / (1 - alpha_bar) * (
        x_1 - math.sqrt(alpha_bar) * oracle.mean
    )  # E[x_0 | x_1], which mu_theta is at t = 1
    low, high = (BYTES[:, None] + side / 255 + 0 * eps for side in (-1, 1))
    low[0], high[-1] = -math.inf, math.inf
    expected = (-BITS * quadrature(low, high, mean, math.sqrt(beta_tilde)) * weights / weights.sum()).sum(1)
    torch.testing.assert_close(average, expected, rtol=1e-6, atol=1e-9)


@pytest.mark.slow
def test_the_bound_on_bytes_is_above_their_entropy():
    """Data are three bytes, whose exact denoiser and entropy are known; with a small beta_1 L_0 can tell them apart."""
    schedule, w, k, n = linear(1000, beta_1=1e-6), [0.2, 0.5, 0.3], [0, 100, 140], 512
    oracle = MixtureOracle(schedule, w, [v / 127.5 - 1 for v in k], [0.0] * 3)
    eps = torch.special.ndtri((torch.arange(n).double() + 0.5) / n).repeat(3).reshape(-1, 1)
    x_0 = oracle.m.repeat_interleave(n).reshape(-1, 1)
    total = bits_per_dim(schedule, oracle.denoise, x_0, lambda t, shape, device: eps).total
    bound = (total.reshape(3, n).mean(1) * oracle.w).sum().item()
    entropy = -sum(p * math.log2(p) for p in w)
    assert entropy < bound < entropy + 0.05


# --------------------------------------------------------------------------------------------- the probability flow


def carried(oracle: MixtureOracle, x_0: Tensor, start: float) -> Tensor:
    """log density of pixels at t = start if noise at T is exactly normal, by the exact flow, (B, *).

    The flow maps q_start to q_T, so its derivative is the ratio of the two; both are known.
    """
    T, root = oracle.schedule.T, oracle.schedule.alpha_bar_at(start).sqrt()
    x_s = root * x_0
    x_T = oracle.exact_ode(x_s, start, T)
    return Normal(0.0, 1.0).log_prob(x_T) + oracle.log_prob(x_s, start) - oracle.log_prob(x_T, T) + root.log()


@pytest.mark.equation("ScoreSDE (39)")
@pytest.mark.parametrize("make", [linear, cosine])
@pytest.mark.parametrize("start", [0.01, 1.0, 20.5])
def test_the_flow_of_gaussian_data_has_their_likelihood(make, start):
    oracle = GaussianOracle(make(1000))
    nodes, weights = (torch.tensor(a) for a in np.polynomial.hermite_e.hermegauss(16))
    x_0 = (oracle.mean + math.sqrt(oracle.variance) * nodes).reshape(-1, 1)
    log_p = log_likelihood(oracle.schedule, oracle.denoise, x_0, start=start)
    torch.testing.assert_close(log_p, carried(oracle, x_0, start).flatten(), rtol=0, atol=2e-5)
    average = -(log_p * weights).sum() / weights.sum() * BITS
    noisy = oracle.variance + math.exp(-2 * oracle.schedule.lambda_at(start))
    cross = nll(noisy) + BITS * 0.5 * (oracle.variance / noisy - 1)  # of data without noise
    assert average.item() == pytest.approx(cross, abs=1e-4)
    assert start > 1 or average.item() == pytest.approx(nll(), abs=1e-4)


@pytest.mark.equation("ScoreSDE (39)")
@pytest.mark.parametrize("make", [linear, cosine])
def test_the_flow_of_a_mixture_has_its_density_and_twice_the_steps_a_sixteenth_of_the_error(make):
    """On Gaussian data the divergence is the same everywhere, so that there no stage of a step can be mistaken."""
    oracle = MixtureOracle(make(1000), [0.3, 0.7], [-0.6, 0.5], [0.01, 0.04])
    x_0 = torch.linspace(-0.9, 1.1, 21, dtype=torch.float64).reshape(-1, 1)
    exact = carried(oracle, x_0, 0.1).flatten()
    few, many = (log_likelihood(oracle.schedule, oracle.denoise, x_0, steps=n, start=0.1) for n in (50, 100))
    torch.testing.assert_close(many, exact, rtol=0, atol=1e-3)
    assert (many - exact).abs().max() < (few - exact).abs().max() / 12
    assert (many - oracle.log_prob(x_0, 0).flatten()).abs().max() < 2e-2  # q_T is not quite the prior


def test_pixels_add_up(oracle):
    x_0 = torch.rand(3, 2, 1, 2, dtype=torch.float64)
    together = log_likelihood(oracle.schedule, oracle.denoise, x_0, steps=10)
    apart = log_likelihood(oracle.schedule, oracle.denoise, x_0.reshape(-1, 1), steps=10)
    torch.testing.assert_close(together, apart.reshape(3, -1).sum(1), rtol=1e-12, atol=0)
    assert together.shape == (3,)


@pytest.mark.slow
def test_the_steps_are_of_order_4(oracle):
    x_0 = torch.linspace(-0.5, 2, 6, dtype=torch.float64).reshape(-1, 1)
    exact = carried(oracle, x_0, 1.0).flatten()
    steps = [100, 140, 200, 280]
    errors = [
        (log_likelihood(oracle.schedule, oracle.denoise, x_0, steps=n) - exact).abs().mean().item() for n in steps
    ]
    slope = np.polyfit(np.log(steps), np.log(errors), 1)[0]
    assert -4.15 < slope < -3.85, (slope, errors)


class Correlated:
    """Two pixels of N(0, Sigma), whose denoiser mixes them."""

    def __init__(self, schedule: NoiseSchedule):
        self.schedule = schedule
        self.Sigma = torch.tensor([[0.5, 0.3], [0.3, 0.25]], dtype=torch.float64)

    def denoise(self, x_t: Tensor, t: Tensor) -> Prediction:
        alpha_bar = self.schedule.alpha_bar_at(t)[:, None, None]
        cov = alpha_bar * self.Sigma + (1 - alpha_bar) * torch.eye(2)
        score = torch.linalg.solve(cov, x_t[..., None])
        x_0 = (alpha_bar.sqrt() * self.Sigma @ score)[..., 0]
        return Prediction((1 - alpha_bar[..., 0]).sqrt() * score[..., 0], x_0)


def signs(dims: int) -> Tensor:
    """All vectors of -1 and 1, (2^dims, dims)."""
    return torch.tensor(list(itertools.product((-1.0, 1.0), repeat=dims)), dtype=torch.float64)


@pytest.mark.slow
@pytest.mark.equation("ScoreSDE (40)")
def test_hutchinson_is_unbiased(schedule):
    """All signs, alike likely, have exactly the trace for their mean; one of them alone does not."""
    A = torch.randn(3, 3, dtype=torch.float64)
    x = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    y = torch.sin(x) * x.roll(1, 1) + x @ A
    jacobian = torch.func.vmap(torch.func.jacrev(lambda v: torch.sin(v) * v.roll(1, 0) + v @ A))(x.detach())
    trace = jacobian.diagonal(dim1=1, dim2=2).sum(1)
    torch.testing.assert_close(divergence(y, x), trace)
    torch.testing.assert_close(divergence(y, x, signs(3)[:, None].expand(-1, 5, 3)), trace)
    one = divergence(y, x, signs(3)[:1, None].expand(-1, 5, 3))
    torch.testing.assert_close(one, jacobian.sum((1, 2)))

    data, x_0 = Correlated(schedule), torch.randn(4, 2, dtype=torch.float64) / 2
    exact = log_likelihood(schedule, data.denoise, x_0, steps=60)
    every = log_likelihood(schedule, data.denoise, x_0, signs(2)[:, None].expand(-1, 4, 2), steps=60)
    torch.testing.assert_close(every, exact, rtol=1e-10, atol=0)
    single = log_likelihood(schedule, data.denoise, x_0, signs(2)[:1, None].expand(-1, 4, 2), steps=60)
    assert (single - exact).abs().min() > 0.1
    least_noise = math.exp(-2 * schedule.lambda_at(1)) * torch.eye(2)
    density = torch.distributions.MultivariateNormal(torch.zeros(2).double(), data.Sigma + least_noise)
    torch.testing.assert_close(exact, density.log_prob(x_0), rtol=0, atol=1e-3)


def test_the_flow_walks_through_real_times_and_counts(schedule, oracle):
    asked, counted = [], []

    def denoise(x_t: Tensor, t: Tensor) -> Prediction:
        asked.append(t)
        return oracle.denoise(x_t, t)

    with torch.no_grad():
        log_likelihood(schedule, denoise, torch.zeros(2, 1).double(), steps=3, callback=counted.append)
    assert len(asked) == len(counted) == 12 and set(counted) == {2}
    lambda_, times = flow_times(schedule, 3, 1.0)
    assert torch.equal(torch.stack(asked)[:, 0], times[[0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6]])
    assert times[0] == 1 and times[-1] == 1000 and (times.diff() > 0).all()
    torch.testing.assert_close(lambda_, schedule.lambda_at(times))
    torch.testing.assert_close(lambda_.diff(), lambda_.diff()[:1].expand(6))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps = 0"),
        ({"steps": 2.0}, "steps = 2.0"),
        ({"start": 0}, r"start = 0.* \(0, 1000\)"),
        ({"start": 1000}, "start = 1000"),
        ({"start": "1"}, "start = '1'"),
    ],
)
def test_flows_that_cannot_be_walked(schedule, oracle, options, message):
    with pytest.raises(ValueError, match=message):
        log_likelihood(schedule, oracle.denoise, torch.zeros(1, 1), **options)


def test_a_schedule_that_ends_in_pure_noise_has_no_flow(schedule):
    with pytest.raises(ValueError, match="beta_T = 1"):
        flow_times(zero_terminal_snr(schedule), 5, 1.0)


def test_the_flow_runs_on_the_device_of_the_images(device, schedule):
    x_0, e = torch.zeros(2, 1, 2, device=device), torch.ones(3, 2, 1, 2, device=device)
    log_p = log_likelihood(schedule, lambda x_t, t: Prediction(0.1 * x_t, x_t), x_0, e, steps=2)
    assert log_p.device.type == device and log_p.shape == (2,) and log_p.dtype == torch.float64


# --------------------------------------------------------------------------------------------------------- bytes


def test_dequantised_bytes_fill_their_own_bins():
    eps = torch.randn(40_000).double()
    for byte in (0, 77, 255):
        x = dequantised(BYTES[byte].expand(40_000), eps)
        offset = (x - BYTES[byte]) * 255
        assert offset.abs().max() <= 1 and offset.mean().abs() < 0.02
        assert offset.var().item() == pytest.approx(1 / 3, rel=0.03)  # uniform on [-1, 1]


def test_bytes_without_any_order_have_eight_bits():
    """The uniform density over all bins, of three pixels."""
    assert bits_of_bytes(torch.tensor([-3 * math.log(512 / 255)]), 3).item() == pytest.approx(8, rel=1e-6)
    assert bits_of_bytes(torch.tensor([-3 * math.log(512 / 255) + 3 * math.log(4)]), 3).item() == pytest.approx(6)


def test_bits_of_dequantised_bytes_are_those_of_the_bytes():
    """For a density that is smooth over a bin: N(0, 0.2^2) cut into bytes."""
    std = torch.tensor(0.2).double()
    log_P = log_bin(BYTES, torch.zeros(()).double(), std)
    u = torch.special.ndtri((torch.arange(64).double() + 0.5) / 64)
    log_p = Normal(0.0, std).log_prob(dequantised(BYTES[:, None], u))
    bits = (log_P.exp() * bits_of_bytes(log_p, 1).mean(1)).sum()
    entropy = -(log_P.exp() * log_P).sum() * BITS
    assert entropy < bits and bits.item() == pytest.approx(entropy.item(), abs=1e-3)


def test_rademacher_probes_are_signs():
    e = rademacher(torch.tensor([-3.0, -1e-9, 0.0, 2.0]))
    assert e.tolist() == [-1, -1, 1, 1] and e.dtype == torch.float32
    assert rademacher(torch.randn(10_000)).mean().abs() < 0.05
