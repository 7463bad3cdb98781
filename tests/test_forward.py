"""ddpm/forward.py: the recursion against its closed form, and Bayes' rule by quadrature."""

import math

import pytest
import torch
from torch import Tensor

from ddpm.forward import q_posterior, q_sample, q_step, transition
from ddpm.schedules import NoiseSchedule, cosine, linear

PROBES = torch.eye(2, dtype=torch.float64)  # (1, 0) and (0, 1) read off the two coefficients of an affine map
STRIDES = [(1, 0), (2, 1), (3, 2), (500, 499), (999, 998), (1000, 999), (50, 7), (500, 250), (1000, 1), (1000, 900)]
REAL_STRIDES = [(0.5, 0.25), (1.5, 0.5), (12.5, 11.5), (700.125, 3.25), (1000, 999.5), (999.5, 500), (0.75, 0)]


def normal(x: Tensor, mean: float | Tensor, variance: float) -> Tensor:
    """The density of N(mean, variance) at x."""
    return (-((x - mean) ** 2) / (2 * variance)).exp() / math.sqrt(2 * math.pi * variance)


def chain(schedule: NoiseSchedule, s: float, t: float) -> tuple[float, float]:
    """q(x_t | x_s) = N(scale x_s, variance), one beta at a time; between integers through the log-SNR."""
    if not (isinstance(s, int) and isinstance(t, int)):
        kept = signal(schedule, t) / signal(schedule, s)
        return math.sqrt(kept), 1 - kept
    scale, variance = 1.0, 0.0
    for beta in schedule.beta[s + 1 : t + 1].tolist():
        scale, variance = scale * math.sqrt(1 - beta), (1 - beta) * variance + beta
    return scale, variance


def signal(schedule: NoiseSchedule, t: float) -> float:
    """alpha_bar_t: log-SNRs are interpolated from the table, and 1 / SNR from 0 on the way to t = 1."""
    k, f = int(t), t - int(t)
    low, high = (a / (1 - a) if a < 1 else math.inf for a in schedule.alpha_bar[[k, min(k + 1, 1000)]].tolist())
    snr = low if f == 0 else high / f if k == 0 else low ** (1 - f) * high**f
    return 1.0 if snr == math.inf else snr / (1 + snr)


# --- q_step, q_sample


@pytest.mark.equation("DDPM (2)")
def test_q_step_scales_by_sqrt_1_minus_beta_and_adds_variance_beta(schedule):
    for t in (1, 2, 500, 1000):
        scale, spread = q_step(schedule, PROBES[0], t, PROBES[1]).tolist()
        beta = 1e-4 + (0.02 - 1e-4) * (t - 1) / 999
        assert scale == pytest.approx(math.sqrt(1 - beta), rel=1e-14)
        assert spread == pytest.approx(math.sqrt(beta), rel=1e-12)


@pytest.mark.parametrize(("t", "s"), STRIDES + REAL_STRIDES, ids=str)
def test_a_stride_of_q_step_is_the_chain_of_its_steps(schedule, t, s):
    scale, variance = chain(schedule, s, t)
    kept, spread = q_step(schedule, PROBES[0], t, PROBES[1], s).tolist()
    assert kept == pytest.approx(scale, rel=1e-12) and spread**2 == pytest.approx(variance, rel=1e-10)
    if s == t - 1:
        assert q_step(schedule, PROBES[0], t, PROBES[1]).tolist() == pytest.approx([kept, spread], rel=1e-10)


@pytest.mark.parametrize("make", [linear, cosine])
def test_a_stride_leads_from_one_marginal_to_another(make):
    """q(x_s | x_0), then q(x_t | x_s), is q(x_t | x_0), for every t and strides of every length."""
    schedule, k = make(1000), torch.arange(1, 1001)
    ones, zeros = torch.ones(1000, 1).double(), torch.zeros(1000, 1).double()
    real = k.double() - 0.375
    for t, s in [(k, k - 1), (k, k // 2), (k, 0 * k), (k, (k - 37).clamp(min=0)), (real, 0.4 * real), (k, 0.4 * real)]:
        kept, spread = q_step(schedule, ones, t, zeros, s), q_step(schedule, zeros, t, ones, s)
        a_s, b_s = q_sample(schedule, ones, s, zeros), q_sample(schedule, zeros, s, ones)
        torch.testing.assert_close(kept * a_s, q_sample(schedule, ones, t, zeros), rtol=1e-12, atol=0)
        variance = q_sample(schedule, zeros, t, ones) ** 2
        torch.testing.assert_close((kept * b_s) ** 2 + spread**2, variance, rtol=1e-11, atol=1e-15)
    x_0, eps = torch.randn(2, 1000, 3)
    assert torch.equal(q_step(schedule, x_0, k, eps, 0 * k), q_sample(schedule, x_0, k, eps))  # from data


@pytest.mark.equation("DDPM (4)")
@pytest.mark.parametrize("make", [linear, cosine])
def test_T_single_steps_make_the_closed_form(make):
    """E[x_t] = scale x_0 and Var[x_t], carried through all T steps by probing the step, equal those of q_sample."""
    schedule = make(1000)
    scale, variance = 1.0, 0.0
    for t in range(1, 1001):
        step_scale, step_spread = q_step(schedule, PROBES[0], t, PROBES[1]).tolist()
        scale, variance = step_scale * scale, step_scale**2 * variance + step_spread**2
        a, b = q_sample(schedule, PROBES[0], t, PROBES[1]).tolist()
        assert a == pytest.approx(scale, rel=1e-12) and b**2 == pytest.approx(variance, rel=2e-12)


def test_q_sample_at_0_is_the_data(schedule):
    x_0, eps = torch.randn(2, 4, 3)
    assert torch.equal(q_sample(schedule, x_0, 0, eps), x_0)
    assert torch.equal(q_sample(schedule, x_0, torch.zeros(4, dtype=torch.long), eps), x_0)


@pytest.mark.parametrize("make", [linear, cosine])
def test_q_sample_at_real_times(make):
    schedule = make(1000)
    times = [0.0, 0.25, 0.999, 1.0, 1.5, 12.75, 500.5, 999.5, 1000.0]
    together = q_sample(
        schedule, PROBES[:1].expand(9, 2), torch.tensor(times, dtype=torch.float64), PROBES[1:].expand(9, 2)
    )
    for t, row in zip(times, together.tolist(), strict=True):
        assert q_sample(schedule, PROBES[0], t, PROBES[1]).tolist() == row
        assert row[0] ** 2 == pytest.approx(signal(schedule, t), rel=1e-12)
        assert row[1] ** 2 == pytest.approx(1 - signal(schedule, t), rel=1e-9, abs=1e-15)


# --- q_posterior


@pytest.fixture(params=STRIDES + REAL_STRIDES, ids=str)
def quadrature(request, schedule):
    """t, s, x_0, x_t, and q(x_s | x_t, x_0) on a grid by Bayes' rule: q(x_t | x_s) q(x_s | x_0), normalised."""
    t, s = request.param
    scale_t, variance_t = chain(schedule, 0, t)
    x_0, x_t = 0.8, scale_t * 0.8 - 0.7 * math.sqrt(variance_t)
    scale_s, variance_s = chain(schedule, 0, s)
    scale, variance = chain(schedule, s, t)
    half = 9 * math.sqrt(variance_s)
    x_s = torch.linspace(scale_s * x_0 - half, scale_s * x_0 + half, 20001, dtype=torch.float64)
    if s == 0:  # x_0 itself: a point mass
        return t, s, x_0, x_t, x_s, None
    density = normal(x_t, scale * x_s, variance) * normal(x_s, scale_s * x_0, variance_s)
    return t, s, x_0, x_t, x_s, density / density.sum()


def posterior(schedule: NoiseSchedule, x_0: float, x_t: float, t: float, s: float) -> tuple[float, float]:
    """q_posterior of numbers; s = t - 1 goes through the default of s."""
    x_0, x_t = torch.tensor([[x_0], [x_t]], dtype=torch.float64)
    mean, variance = q_posterior(schedule, x_0, x_t, t, None if s == t - 1 else s)
    return mean.item(), variance.item()


@pytest.mark.equation("DDPM (6)")
def test_the_posterior_is_the_gaussian_that_bayes_rule_gives(schedule, quadrature):
    t, s, x_0, x_t, x_s, density = quadrature
    mean, variance = posterior(schedule, x_0, x_t, t, s)
    if density is None:
        assert (mean, variance) == (pytest.approx(x_0, rel=1e-15), 0.0)
    else:
        expected = normal(x_s, mean, variance)
        rounding = 2e-11 if t >= 1 else 2e-10  # of 1 - alpha_bar, where it is small
        assert (density - expected / expected.sum()).abs().max() < rounding * density.max()


@pytest.mark.equation("DDPM (7)")
def test_posterior_mean_and_variance_by_quadrature(schedule, quadrature):
    t, s, x_0, x_t, x_s, density = quadrature
    mean, variance = posterior(schedule, x_0, x_t, t, s)
    if density is not None:
        assert mean == pytest.approx((density * x_s).sum().item(), abs=1e-12)
        assert variance == pytest.approx((density * (x_s - mean) ** 2).sum().item(), rel=3e-12)


@pytest.mark.equation("DDPM (7)")
@pytest.mark.parametrize("make", [linear, cosine])
def test_posterior_coefficients_over_all_t(make):
    schedule = make(1000)
    t = torch.arange(1, 1001)
    beta, alpha, alpha_bar, beta_tilde = schedule.beta, schedule.alpha, schedule.alpha_bar, schedule.beta_tilde
    ones, zeros = torch.ones(1000, 1).double(), torch.zeros(1000, 1).double()
    of_x_0, variance = q_posterior(schedule, ones, zeros, t)
    of_x_t, _ = q_posterior(schedule, zeros, ones, t)
    close = {"rtol": 1e-10, "atol": 1e-15}  # beta_t = 1 - alpha_bar_t / alpha_bar_{t-1} loses digits where it is 1e-4
    torch.testing.assert_close(of_x_0[:, 0], alpha_bar[:-1].sqrt() * beta[1:] / (1 - alpha_bar[1:]), **close)
    torch.testing.assert_close(of_x_t[:, 0], alpha[1:].sqrt() * (1 - alpha_bar[:-1]) / (1 - alpha_bar[1:]), **close)
    torch.testing.assert_close(variance[:, 0], beta_tilde[1:], **close)


def test_averaging_the_posterior_over_x_t_gives_back_the_marginal(schedule):
    """E over q(x_t | x_0) of q(x_s | x_t, x_0) is q(x_s | x_0), for every t and strides of every length."""
    k = torch.arange(1, 1001)
    real = k.double() - 0.375
    for t, s in [(k, k - 1), (k, k // 2), (k, 0 * k), (k, (k - 37).clamp(min=0)), (real, 0.4 * real), (k, 0.4 * real)]:
        ones, zeros = torch.ones(1000, 1).double(), torch.zeros(1000, 1).double()
        of_x_0, variance = q_posterior(schedule, ones, zeros, t, s)
        of_x_t, _ = q_posterior(schedule, zeros, ones, t, s)
        bar_t, bar_s = (schedule.alpha_bar_at(time)[:, None] for time in (t, s))
        torch.testing.assert_close(of_x_0 + of_x_t * bar_t.sqrt(), bar_s.sqrt(), rtol=1e-12, atol=0)
        torch.testing.assert_close(of_x_t**2 * (1 - bar_t) + variance, 1 - bar_s, rtol=1e-11, atol=1e-15)


def test_transition_of_a_stride_is_the_chain_of_its_steps(schedule):
    for t, s in STRIDES:
        scale, variance = chain(schedule, s, t)
        alpha_bar_t, alpha_bar_s, alpha, beta = transition(schedule, t, s)
        assert alpha_bar_t == schedule.alpha_bar[t] and alpha_bar_s == schedule.alpha_bar[s]
        assert alpha.item() == pytest.approx(scale**2, rel=1e-12) and beta.item() == pytest.approx(variance, rel=2e-12)
    assert transition(schedule, 7) == transition(schedule, 7, 6)


# --- t as int and tensor, precision, device


def test_an_int_and_a_tensor_of_t_agree(schedule):
    x, eps = torch.randn(2, 3, 2, 4, 4)
    t, s = torch.tensor([1, 500, 1000]), torch.tensor([0, 20, 999])

    def mean(*args) -> Tensor:
        return q_posterior(schedule, *args)[0]

    for whole, one in [
        (q_step(schedule, x, t, eps), lambda i: q_step(schedule, x[i], int(t[i]), eps[i])),
        (q_step(schedule, x, t, eps, s), lambda i: q_step(schedule, x[i], int(t[i]), eps[i], int(s[i]))),
        (q_sample(schedule, x, t, eps), lambda i: q_sample(schedule, x[i], int(t[i]), eps[i])),
        (mean(x, eps, t), lambda i: mean(x[i], eps[i], int(t[i]))),
        (mean(x, eps, t, s), lambda i: mean(x[i], eps[i], int(t[i]), int(s[i]))),
    ]:
        assert torch.equal(whole, torch.stack([one(i) for i in range(3)]))
    assert q_posterior(schedule, x, eps, t)[1].shape == (3, 1, 1, 1)
    assert q_posterior(schedule, x, eps, 5)[1].shape == (1, 1, 1, 1)


@pytest.mark.parametrize("make", [linear, cosine])
def test_float32_is_within_three_roundings_of_float64(make):
    """Coefficient, product, sum: each rounds once, so the error is below 3 * 2^-24 of the sum of the terms' sizes."""
    schedule, t = make(1000), torch.arange(1, 1001)
    x_0, noise = torch.rand(1000, 50) * 2 - 1, torch.randn(1000, 50)
    x_t = q_sample(schedule, x_0, t, noise)
    for low, high, size in [
        (
            x_t,
            q_sample(schedule, x_0.double(), t, noise.double()),
            q_sample(schedule, x_0.double().abs(), t, noise.double().abs()),
        ),
        (
            q_posterior(schedule, x_0, x_t, t)[0],
            q_posterior(schedule, x_0.double(), x_t.double(), t)[0],
            q_posterior(schedule, x_0.double().abs(), x_t.double().abs(), t)[0],
        ),
    ]:
        assert low.dtype == torch.float32
        assert ((low - high).abs() <= 3.01 * 2**-24 * size).all()
    variance, exact = (q_posterior(schedule, x, x, t)[1] for x in (x_0, x_0.double()))
    assert ((variance - exact).abs() <= 2**-24 * exact).all()


def test_everything_follows_x_to_its_device_and_dtype(schedule, device):
    x, there = torch.zeros(2, 3, device=device, dtype=torch.bfloat16), torch.tensor([5, 9], device=device)
    for t in (there, torch.tensor([5, 9]), 5):
        moved = q_step(schedule, x, t, x), q_step(schedule, x, t, x, t - 2), q_sample(schedule, x, t, x)
        for out in (*moved, *q_posterior(schedule, x, x, t, t - 2)):
            assert out.device.type == device and out.dtype == torch.bfloat16
    for t in (there + 0.5, torch.tensor([5.5, 9.5]), 5.5):
        moved = q_step(schedule, x, t, x), q_step(schedule, x, t, x, 2), q_sample(schedule, x, t, x)
        for out in (*moved, *q_posterior(schedule, x, x, t), *q_posterior(schedule, x, x, t, 2)):
            assert out.device.type == device and out.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("t", "s", "words"),
    [
        (torch.tensor([3, 0]), None, "from s = -1 to t = 0"),
        (0, None, "from s = -1 to t = 0"),
        (torch.tensor([3, 2]), torch.tensor([1, 2]), "from s = 2 to t = 2"),
        (2, 5, "from s = 5 to t = 2"),
        (torch.tensor([0.5]), None, "from s = -0.5 to t = 0.5"),
    ],
)
def test_a_step_that_does_not_go_from_an_earlier_time_is_refused_on_the_cpu(t, s, words):
    """Where t is 0 the posterior of t - 1 would be 0 / 0."""
    x = torch.zeros(2, 1)
    for step in (lambda: q_posterior(cosine(20), x, x, t, s), lambda: q_step(cosine(20), x, t, x, s)):
        with pytest.raises(ValueError, match=f"{words}: 0 <= s < t is needed"):
            step()
