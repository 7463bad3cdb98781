"""ddpm/schedules.py: golden numbers, definitions term by term, the gather, and every refusal."""

import gc
import itertools
import math
import re
import weakref

import numpy as np
import pytest
import torch
from conftest import GaussianOracle

from ddpm.forward import q_sample
from ddpm.samplers import DDIM
from ddpm.schedules import (
    REMEMBERED,
    NoiseSchedule,
    at,
    concerns,
    constant,
    cosine,
    geometric,
    linear,
    report,
    respace,
    scaled_linear,
    sigmas,
    sigmoid,
    zero_terminal_snr,
)

SCHEDULES = {  # alpha_bar_T to three digits, 1 / sqrt(alpha_bar_T)
    "linear 1000": (lambda: linear(1000), "4.04e-05", pytest.approx(157, abs=0.5)),
    "linear 100, literal": (lambda: linear(100, rescale=False), "0.364", pytest.approx(1.66, abs=0.005)),
    "linear 200, literal": (lambda: linear(200, rescale=False), "0.132", pytest.approx(2.75, abs=0.005)),
    "linear 100": (lambda: linear(100), "2.04e-05", pytest.approx(221.5, abs=0.1)),
    "cosine 1000": (lambda: cosine(1000), "2.43e-09", pytest.approx(20291, abs=0.5)),
    "cosine 100": (lambda: cosine(100), "2.43e-07", pytest.approx(2029, abs=0.5)),
    "sigmoid 1000": (lambda: sigmoid(1000), "3e-07", pytest.approx(1825, abs=0.5)),
    "scaled linear 1000": (lambda: scaled_linear(1000), "0.00466", pytest.approx(14.6, abs=0.05)),
    "geometric 10": (lambda: geometric(), "0.0099", pytest.approx(101**0.5, rel=1e-12)),
    "three noise levels": (lambda: sigmas([0.1, 1, 30]), "0.00111", pytest.approx(901**0.5, rel=1e-12)),
    "constant 100": (lambda: constant(100), "2.66e-05", pytest.approx(0.9**-50, rel=1e-12)),
}


@pytest.fixture(params=SCHEDULES, scope="module")
def any_schedule(request) -> NoiseSchedule:
    return SCHEDULES[request.param][0]()


@pytest.mark.parametrize("t", [torch.tensor([3, -1]), torch.tensor([21, 3]), torch.tensor([3.0, math.nan]), -1, 20.5])
def test_a_time_outside_the_schedule_is_refused_on_the_cpu_and_never_wraps_around(t):
    schedule = cosine(20)
    for read in (schedule.alpha_bar_at, schedule.lambda_at):
        with pytest.raises(ValueError, match=r"t = (-1|21|nan|20.5) lies outside 0\.\.20"):
            read(t)


@pytest.mark.parametrize("kind", [np.float32, np.float64, np.int64, np.int32, np.array])
def test_times_are_numbers_of_any_library(kind):
    schedule = cosine(20)
    assert schedule.alpha_bar_at(kind(3)) == schedule.alpha_bar[3]
    assert q_sample(schedule, torch.ones(1, 1), kind(3), torch.zeros(1, 1)) == schedule.alpha_bar[3].sqrt().float()
    between = schedule.alpha_bar_at(np.float32(3.5))
    assert between == schedule.alpha_bar_at(3.5) and schedule.alpha_bar[4] < between < schedule.alpha_bar[3]


def test_betas_that_leave_nothing_of_the_data_are_refused():
    """0.1^308 is the last that a double holds in full; beyond, ratios of two alpha_bar are 0 / 0."""
    with pytest.raises(
        ValueError, match=r"betas of up to 0\.9 leave nothing of x_0: alpha_bar_t underflows at t = 308"
    ):
        constant(1000, 0.9)
    with pytest.raises(ValueError, match="underflows at t = 917"):
        linear(1000, 1e-4, 0.999)
    assert constant(300, 0.9, rescale=False).alpha_bar.isfinite().all()


def test_a_schedule_that_is_no_longer_used_is_no_longer_kept():
    schedule = cosine(50)
    DDIM(5)(schedule, GaussianOracle(schedule, 0.0, 1.0).denoise, torch.zeros(1, 1))
    assert schedule.alpha_bar_of(50) == schedule.alpha_bar[50]
    gone = weakref.ref(schedule)
    del schedule
    gc.collect()
    assert gone() is None


@pytest.mark.slow
def test_only_so_many_times_are_remembered():
    schedule = cosine(20)
    for i in range(2 * REMEMBERED + 1):
        schedule.alpha_bar_of(20 * i / (2 * REMEMBERED))
    assert len(schedule._numbers) <= REMEMBERED


@pytest.mark.parametrize("name", SCHEDULES)
def test_golden_numbers(name):
    make, alpha_bar_T, stretch = SCHEDULES[name]
    last = make().alpha_bar[-1].item()
    assert (f"{last:.3g}", last**-0.5) == (alpha_bar_T, stretch)


# --- The constants


def test_constants_are_float64_tables_with_data_at_entry_0(any_schedule):
    T = any_schedule.T
    first = {"beta": 0.0, "alpha": 1.0, "alpha_bar": 1.0, "beta_tilde": 0.0, "lambda_": math.inf}
    for name, value in first.items():
        table = getattr(any_schedule, name)
        assert table.dtype == torch.float64 and table.shape == (T + 1,) and table[0] == value, name
        assert not table.isnan().any(), name


def test_constants_follow_their_definitions(any_schedule):
    beta = any_schedule.beta.tolist()
    log_alpha_bar = [0.0, *itertools.accumulate(math.log1p(-b) for b in beta[1:])]
    for t in range(1, any_schedule.T + 1):
        noise, noise_before = (-math.expm1(log_alpha_bar[r]) for r in (t, t - 1))  # 1 - alpha_bar, no cancellation
        expected = {
            "alpha": 1 - beta[t],
            "alpha_bar": math.exp(log_alpha_bar[t]),
            "beta_tilde": noise_before / noise * beta[t],
            "lambda_": 0.5 * (log_alpha_bar[t] - math.log(noise)),
        }
        for name, value in expected.items():
            assert getattr(any_schedule, name)[t].item() == pytest.approx(value, rel=4e-12, abs=4e-15), (name, t)


def test_signal_falls_and_beta_tilde_stays_below_beta(any_schedule):
    assert (any_schedule.alpha_bar.diff() < 0).all() and (any_schedule.lambda_.diff() < 0).all()
    assert any_schedule.beta_tilde[1] == 0 and (any_schedule.beta_tilde[2:] > 0).all()
    assert (any_schedule.beta_tilde[1:] < any_schedule.beta[1:]).all()


def test_a_list_of_betas_is_taken_as_given():
    schedule = NoiseSchedule([0.5, 0.2, 1.0])
    assert schedule.T == 3 and schedule.beta.tolist() == [0.0, 0.5, 0.2, 1.0]
    assert schedule.alpha_bar.tolist() == pytest.approx([1, 0.5, 0.4, 0])
    assert schedule.beta_tilde.tolist() == pytest.approx([0, 0, 0.5 / 0.6 * 0.2, 0.6])
    assert schedule.lambda_.tolist() == pytest.approx([math.inf, 0, 0.5 * math.log(0.4 / 0.6), -math.inf])
    assert repr(schedule) == "NoiseSchedule(T=3, alpha_bar_T=0)"


def test_float32_betas_become_float64():
    assert NoiseSchedule(torch.tensor([0.25, 0.5])).alpha_bar.tolist() == [1, 0.75, 0.375]
    assert NoiseSchedule(torch.tensor([0.25])).beta.dtype == torch.float64


@pytest.mark.parametrize(
    ("beta", "message"),
    [
        ([], "T >= 1 numbers, got shape (0,)"),
        ([[0.1]], "got shape (1, 1)"),
        ([0.1, 0.0, 0.1], "beta_2 = 0:"),
        ([-0.1, 0.1], "beta_1 = -0.1:"),
        ([0.1, 0.1, 1.1], "beta_3 = 1.1: every beta must lie in (0, 1), or be 1 at t = T = 3"),
        ([0.1, 1.0, 0.1], "beta_2 = 1:"),
        ([0.1, math.nan], "beta_2 = nan:"),
        ([1e-17, 0.1], "beta_1 = 1e-17:"),  # 1 - beta is 1 in float64: no noise, and beta_tilde would be 0 / 0
    ],
)
def test_betas_out_of_range_are_named(beta, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        NoiseSchedule(beta)


# --- linear


def test_linear_rises_evenly_between_its_ends():
    beta = linear(1000).beta[1:]
    assert beta[0].item() == pytest.approx(1e-4, rel=1e-14) and beta[-1].item() == pytest.approx(0.02, rel=1e-14)
    assert beta.diff().tolist() == pytest.approx([(0.02 - 1e-4) / 999] * 999, rel=1e-10)
    assert torch.equal(linear().beta, linear(1000, rescale=False).beta)


def test_rescaled_betas_are_multiplied_by_1000_over_T():
    literal, rescaled = linear(250, 1e-3, 0.01, rescale=False), linear(250, 1e-3, 0.01)
    assert literal.beta[[1, -1]].tolist() == pytest.approx([1e-3, 0.01], rel=1e-14)
    assert rescaled.beta.tolist() == pytest.approx((4 * literal.beta).tolist(), rel=1e-14)
    assert linear(1, 1e-4, 1e-4).beta.tolist() == pytest.approx([0, 0.1])


@pytest.mark.parametrize("beta_T", [0.02, 0.011, 0.0135, 0.028, 0.0285, 0.057, 0.29, 0.7])
@pytest.mark.parametrize("falling", [False, True])
def test_too_few_steps_name_the_smallest_legal_T(beta_T, falling):
    ends = (beta_T, 1e-4) if falling else (1e-4, beta_T)
    with pytest.raises(ValueError, match="T = 3 is too small") as error:
        linear(3, *ends)
    smallest = int(str(error.value).split()[-1])
    assert smallest == 1 + max(T for T in range(1000) if round(1000 * beta_T, 6) >= T)
    assert linear(smallest, *ends).beta.max() < 1
    with pytest.raises(ValueError, match=f"T = {smallest - 1} is too small"):
        linear(smallest - 1, *ends)


@pytest.mark.parametrize(
    ("ends", "message"), [((0.0, 0.1), "beta_1 = 0 must lie in (0, 1)"), ((0.1, 1.0), "beta_T = 1 must lie in (0, 1)")]
)
def test_linear_ends_out_of_range(ends, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        linear(10, *ends, rescale=False)


@pytest.mark.parametrize("make", [linear, cosine, sigmoid, scaled_linear, constant, geometric])
@pytest.mark.parametrize("T", [0, -1, 2.5, True])
def test_T_must_be_a_positive_integer(make, T):
    with pytest.raises(ValueError, match=rf"T = {T}: the number of steps must be an integer >= 1"):
        make(T)


# --- scaled linear, constant


def test_the_roots_of_scaled_linear_betas_rise_evenly():
    beta = scaled_linear(1000).beta[1:]
    assert beta[[0, -1]].tolist() == pytest.approx([0.00085, 0.012], rel=1e-14)
    assert beta.sqrt().diff().tolist() == pytest.approx([(0.012**0.5 - 0.00085**0.5) / 999] * 999, rel=1e-9)
    assert scaled_linear(250).beta.tolist() == pytest.approx((4 * scaled_linear(250, rescale=False).beta).tolist())


def test_constant_betas_are_all_alike():
    assert constant(50, 0.3, rescale=False).beta.tolist() == [0.0, *[0.3] * 50]
    assert constant(250, 0.01).beta[1:].tolist() == pytest.approx([0.04] * 250, rel=1e-15)
    assert constant(7, 0.3, rescale=False).alpha_bar.tolist() == pytest.approx([0.7**t for t in range(8)], rel=1e-14)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: scaled_linear(11), "the smallest legal T is 13"),
        (lambda: constant(5), "the smallest legal T is 11"),
        (lambda: scaled_linear(100, beta_1=-0.1), "beta_1 = -0.1 must lie in (0, 1)"),
        (lambda: scaled_linear(100, beta_T=1.5), "beta_T = 1.5 must lie in (0, 1)"),
        (lambda: constant(100, beta=0.0), "beta = 0 must lie in (0, 1)"),
    ],
)
def test_betas_of_the_others_out_of_range(make, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        make()


# --- cosine


@pytest.mark.equation("iDDPM (17)")
@pytest.mark.parametrize(("T", "s"), [(1000, 0.008), (100, 0.008), (37, 0.1)])
def test_cosine_alpha_bar(T, s):
    schedule = cosine(T, s)
    for t in range(T):  # all but the clipped last one
        f_t, f_0 = (math.cos((r / T + s) / (1 + s) * math.pi / 2) ** 2 for r in (t, 0))
        assert schedule.alpha_bar[t].item() == pytest.approx(f_t / f_0, rel=1e-9)  # the product of T rounded factors


def test_cosine_without_offset_is_half_of_one_plus_cosine():
    T = 50
    expected = [(1 + math.cos(math.pi * t / T)) / 2 for t in range(T)]
    assert cosine(T, s=0.0).alpha_bar[:-1].tolist() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("T", [10, 100, 1000])
def test_cosine_clips_exactly_one_beta(T):
    beta = cosine(T).beta
    assert beta[-1] == 0.999 and (beta[:-1] < 0.999).all()
    assert (cosine(T, beta_max=0.3).beta == 0.3).sum() > 1 and cosine(T, beta_max=0.3).beta.max() == 0.3


@pytest.mark.parametrize(
    ("options", "message"),
    [({"s": -0.1}, "s = -0.1:"), ({"beta_max": 1.0}, "beta_max = 1 must"), ({"beta_max": 0.0}, "beta_max = 0 must")],
)
def test_cosine_arguments_out_of_range(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        cosine(10, **options)


# --- sigmoid


@pytest.mark.equation("Chen (Algorithm 1)")
@pytest.mark.parametrize(("T", "start", "end", "tau"), [(1000, -3, 3, 1.0), (100, -3, 3, 1.0), (50, 0, 3, 0.3)])
def test_sigmoid_alpha_bar(T, start, end, tau):
    def logistic(x: float) -> float:
        return 1 / (1 + math.exp(-x / tau))

    alpha_bar = sigmoid(T, start, end, tau).alpha_bar
    for t in range(T):  # all but the clipped last one
        gone = (logistic(start + (end - start) * t / T) - logistic(start)) / (logistic(end) - logistic(start))
        assert alpha_bar[t].item() == pytest.approx(1 - gone, rel=1e-9, abs=1e-13)


def test_sigmoid_clips_exactly_one_beta_and_counts_it():
    for T in (10, 100, 1000):
        beta = sigmoid(T).beta
        assert beta[-1] == 0.999 and (beta[:-1] < 0.999).all() and sigmoid(T).clipped == 1
    assert sigmoid(100, beta_max=0.2).clipped == (sigmoid(100, beta_max=0.2).beta == 0.2).sum() > 1


def test_a_lower_temperature_spends_more_steps_at_both_ends():
    middle = [((s.alpha_bar > 0.1) & (s.alpha_bar < 0.9)).sum() for s in (sigmoid(100, tau=tau) for tau in (0.5, 1, 2))]
    assert middle == sorted(middle) and middle[0] < middle[1] - 5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"start": 3.0}, "start = 3 must be below end = 3"),
        ({"tau": 0.0}, "tau = 0 must be > 0"),
        ({"beta_max": 1.5}, "beta_max = 1.5 must lie in (0, 1)"),
    ],
)
def test_sigmoid_arguments_out_of_range(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        sigmoid(10, **options)


# --- noise levels


@pytest.mark.equation("NCSN (levels)")
@pytest.mark.parametrize("levels", [[0.5], [0.01, 0.3, 0.31, 7], [1e-5, 1, 1e5]])
def test_noise_levels_are_those_that_are_asked_for(levels):
    schedule = sigmas(levels)
    for t, sigma in enumerate(levels, 1):
        assert schedule.alpha_bar[t].item() == pytest.approx(1 / (1 + sigma**2), rel=1e-14 if sigma < 1e3 else 1e-6)
        x_0, eps = torch.randn(2, 3, 4, dtype=torch.float64)
        x = q_sample(schedule, x_0, t, eps) / schedule.alpha_bar[t].sqrt()
        torch.testing.assert_close(x, x_0 + sigma * eps, rtol=1e-10 if 1e-3 < sigma < 1e3 else 1e-6, atol=1e-15)
    assert torch.equal(sigmas(torch.tensor(levels, dtype=torch.float64)).beta, schedule.beta)


@pytest.mark.equation("NCSN (ladder)")
@pytest.mark.parametrize(("T", "ends"), [(10, (0.01, 10.0)), (2, (0.1, 0.2)), (232, (0.01, 50.0)), (3, (1e-5, 1e5))])
def test_a_ladder_is_a_geometric_sequence(T, ends):
    schedule, (low, high) = geometric(T, *ends), ends
    for t in range(1, T + 1):
        sigma = low * (high / low) ** ((t - 1) / (T - 1))
        assert (-schedule.lambda_[t]).exp().item() == pytest.approx(sigma, rel=1e-9 if 1e-3 < sigma < 1e3 else 1e-6)
    assert schedule.lambda_[1:].diff().tolist() == pytest.approx([-math.log(high / low) / (T - 1)] * (T - 1), rel=1e-5)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: sigmas([]), "sigma must be a list of T >= 1 noise levels, got shape (0,)"),
        (lambda: sigmas(0.5), "got shape ()"),
        (lambda: sigmas([0.1, 0.0]), "sigma holds 0: noise levels must lie in [1e-05, 100000]"),
        (lambda: sigmas([math.nan]), "sigma holds nan"),
        (lambda: sigmas([1e6]), "sigma holds 1e+06"),
        (lambda: sigmas([10, 1, 0.1]), "sigma_2 = 1 follows 10: noise levels must rise, from the least noise at t = 1"),
        (lambda: sigmas([1, 1]), "sigma_2 = 1 follows 1"),
        (lambda: geometric(1), "T = 1: a geometric sequence needs at least two levels; for one, schedule=sigmas"),
        (lambda: geometric(5, 10, 0.1), "sigma_min = 10 must be below sigma_max = 0.1"),
        (lambda: geometric(5, -0.1), "sigma_min = -0.1 must lie in [1e-05, 100000]"),
        (lambda: geometric(5, sigma_max=math.inf), "sigma_max = inf must lie in"),
    ],
)
def test_noise_levels_that_are_refused(make, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        make()


# --- respaced, and ended in pure noise


@pytest.mark.equation("iDDPM (19)")
@pytest.mark.parametrize("make", [linear, cosine, sigmoid, scaled_linear])
@pytest.mark.parametrize("times", [[1000], [1, 1000], range(1, 1001), [7, 8, 500, 993], range(20, 1001, 20)])
def test_a_respaced_schedule_is_the_original_at_the_times_that_are_kept(make, times):
    schedule = make(1000)
    kept = respace(schedule, times)
    assert len(times) == kept.T
    rounding = {"rtol": 1e-12, "atol": 2e-16}  # a beta within rounding of 1 holds no more of its alpha
    torch.testing.assert_close(kept.alpha_bar[1:], schedule.alpha_bar[list(times)], **rounding)


@pytest.mark.parametrize("times", [[], [0, 5], [5, 5], [7, 5], [3, 11], [2.0, 5], [torch.tensor(3)]])
def test_times_to_keep_that_are_refused(times):
    with pytest.raises(ValueError, match=r"integers in 1\.\.10, each larger than the one before"):
        respace(linear(10, rescale=False), times)


@pytest.mark.equation("Lin (Algorithm 1)")
@pytest.mark.parametrize("make", [linear, cosine, sigmoid, scaled_linear, lambda: NoiseSchedule([0.3, 0.2])])
def test_a_zero_terminal_snr(make):
    before = make()
    after = zero_terminal_snr(before)
    assert after.T == before.T and after.alpha_bar[-1] == 0 and after.beta[-1] == 1 and after.lambda_[-1] == -math.inf
    assert after.alpha_bar[1].item() == pytest.approx(before.alpha_bar[1].item(), rel=1e-15)
    a = before.alpha_bar.sqrt().tolist()
    for t in range(1, before.T + 1):
        expected = a[1] * (a[t] - a[-1]) / (a[1] - a[-1])
        assert after.alpha_bar[t].sqrt().item() == pytest.approx(expected, rel=1e-9, abs=1e-15)
    again = zero_terminal_snr(after)  # nothing is left to do
    torch.testing.assert_close(again.alpha_bar, after.alpha_bar, rtol=1e-9, atol=0)


def test_a_zero_terminal_snr_needs_two_steps():
    with pytest.raises(ValueError, match="T = 1: a zero terminal SNR needs at least two steps"):
        zero_terminal_snr(NoiseSchedule([0.3]))


# --- real times


REAL = {
    "linear": lambda: linear(1000),
    "cosine": lambda: cosine(1000),
    "ends in pure noise": lambda: zero_terminal_snr(linear(100)),
    "T = 2": lambda: NoiseSchedule([0.3, 0.6]),
    "T = 1": lambda: NoiseSchedule([0.3]),
    "T = 1 and pure noise": lambda: NoiseSchedule([1.0]),
}


@pytest.fixture(params=REAL)
def real(request) -> NoiseSchedule:
    return REAL[request.param]()


def test_real_times_are_exact_at_integers(real):
    whole = torch.arange(real.T + 1)
    for function, table in ((real.lambda_at, real.lambda_), (real.alpha_bar_at, real.alpha_bar)):
        assert torch.equal(function(whole), table) and torch.equal(function(whole.double()), table)
        assert torch.equal(function(whole.float()), table)
        assert [function(t).item() for t in range(real.T + 1)] == [function(float(t)).item() for t in whole]
        assert function(real.T).shape == function(float(real.T)).shape == ()


def test_lambda_and_alpha_bar_fall_strictly_over_real_times(real):
    t = torch.linspace(0, real.T, 20 * real.T + 1, dtype=torch.float64)
    lambda_, alpha_bar = real.lambda_at(t), real.alpha_bar_at(t)
    assert (lambda_[1:] < lambda_[:-1]).all() and (alpha_bar.diff() < 0).all()
    torch.testing.assert_close(alpha_bar[1:], torch.sigmoid(2 * lambda_[1:]), rtol=1e-9, atol=1e-300)


def test_between_integers_lambda_is_interpolated_linearly(schedule):
    for t in (1.25, 500.5, 998.875):
        k, f = int(t), t - int(t)
        expected = (1 - f) * schedule.lambda_[k] + f * schedule.lambda_[k + 1]
        assert schedule.lambda_at(t).item() == pytest.approx(expected.item(), rel=1e-13)
    both = schedule.lambda_at(torch.tensor([1.25, 7.0, 0.0]))
    assert both.dtype == torch.float64 and both.tolist() == [schedule.lambda_at(t).item() for t in (1.25, 7, 0)]


def test_beside_an_infinite_lambda_its_exponential_is_interpolated():
    """e^{-2 lambda} from 0 at t = 0; e^{2 lambda} to 0 at T where x_T is pure noise; both at once if T = 1."""
    schedule = zero_terminal_snr(linear(100))
    first, last = (2 * schedule.lambda_[[1, 99]]).exp().tolist()
    for f in (1e-9, 0.1, 0.5, 0.9):
        assert (-2 * schedule.lambda_at(f)).exp().item() == pytest.approx(f / first, rel=1e-12)
        assert (2 * schedule.lambda_at(99 + f)).exp().item() == pytest.approx((1 - f) * last, rel=1e-12)
        assert NoiseSchedule([1.0]).alpha_bar_at(f).item() == pytest.approx(1 - f, rel=1e-12)


def test_t_at_is_the_inverse_of_lambda_at(real):
    if real.alpha_bar[-1] == 0:
        with pytest.raises(ValueError, match="beta_T = 1 puts lambda_T at -infinity"):
            real.t_at(0.0)
        return
    t = torch.linspace(0, real.T, 7 * real.T + 1, dtype=torch.float64)
    torch.testing.assert_close(real.t_at(real.lambda_at(t)), t, rtol=1e-9, atol=0)
    grid = t[1:].reshape(-1, 7)  # any shape; a number gives a number
    torch.testing.assert_close(real.t_at(real.lambda_at(t[1:]).reshape(-1, 7)), grid, rtol=1e-9, atol=0)
    assert real.t_at(real.lambda_[-1].item()).item() == pytest.approx(real.T)
    assert real.t_at(-math.inf) == real.t_at(real.lambda_[-1] - 5) == real.T and real.t_at(math.inf) == 0


def test_real_times_follow_the_device_of_t(real, device):
    for t in (torch.zeros(3, device=device), torch.zeros(3, dtype=torch.long, device=device)):
        assert real.lambda_at(t).device.type == real.alpha_bar_at(t).device.type == device


# --- what a schedule is, and what is known to hurt


def test_the_report_of_a_schedule():
    assert report(NoiseSchedule([0.5, 0.2])) == {
        "T": 2,
        "beta_min": 0.2,
        "beta_max": 0.5,
        "betas clipped": 0,
        "log-SNR at 1": pytest.approx(0, abs=1e-15),
        "log-SNR at T": pytest.approx(math.log(0.4 / 0.6)),
        "sqrt(alpha_bar_T)": pytest.approx(0.4**0.5),
        "1 / sqrt(alpha_bar_T)": pytest.approx(0.4**-0.5),
    }
    said = report(cosine(1000))
    assert said["betas clipped"] == 1 and said["beta_max"] == 0.999
    assert round(said["1 / sqrt(alpha_bar_T)"]) == 20291
    ended = report(zero_terminal_snr(linear(1000)))
    assert (ended["log-SNR at T"], ended["sqrt(alpha_bar_T)"], ended["1 / sqrt(alpha_bar_T)"]) == (
        -math.inf,
        0,
        math.inf,
    )


@pytest.mark.parametrize(
    ("make", "target", "told"),
    [
        (lambda: linear(100, rescale=False), "v", ["still carries 60% of the signal (sqrt(alpha_bar_T) = 0.603)"]),
        (lambda: linear(200, rescale=False), "eps", ["with T = 200, take betas rescaled by 1000 / T (rescale=true)"]),
        (lambda: cosine(1000), "eps", ["an error of eps is multiplied by 1 / sqrt(alpha_bar_T) = 20,291 in x_0"]),
        (lambda: sigmoid(1000), "eps", ["= 1,825 in x_0"]),
        (lambda: zero_terminal_snr(linear(1000)), "eps", ["= inf in x_0"]),
        (lambda: cosine(1000), "v", []),
        (lambda: zero_terminal_snr(linear(1000)), "x_0", []),
        (lambda: linear(1000), "eps", []),
        (lambda: linear(100), "eps", []),
        (lambda: scaled_linear(1000), "eps", []),
    ],
)
def test_which_choices_are_warned_of(make, target, told):
    found = concerns(make(), target)
    assert len(found) == len(told) and all(words in line for words, line in zip(told, found, strict=True))


# --- at, to


def test_at_shapes_the_constants_for_broadcasting(schedule):
    x, t = torch.zeros(3, 2, 4, 5), torch.tensor([0, 7, 1000])
    assert at(schedule.beta, t, x).shape == (3, 1, 1, 1) and at(schedule.beta, 7, x).shape == (1, 1, 1, 1)
    assert at(schedule.beta, t, x[:, 0, 0, 0]).shape == (3,)
    assert torch.equal(at(schedule.beta, t, x.double()).flatten(), schedule.beta[[0, 7, 1000]])
    assert torch.equal(at(schedule.beta[t], ..., x), at(schedule.beta, t, x))
    assert torch.equal(at(schedule.beta, t, x)[1:2], at(schedule.beta, 7, x))


def test_differences_are_taken_before_the_cast_to_float32(schedule):
    x, t = torch.zeros(1000, 1), torch.arange(1, 1001)
    table = 1 - schedule.alpha_bar
    assert at(table, t, x).dtype == torch.float32
    rounding = (at(table, t, x)[:, 0].double() / table[1:] - 1).abs()
    assert rounding.max() < 2**-24  # half a unit in the last place
    naive = (1 - schedule.alpha_bar.float()).double() / table
    assert 1.6e-4 < abs(naive[1].item() - 1) < 1.8e-4  # what it costs to do it the other way round


def test_a_copy_on_another_device_is_made_once():
    schedule = linear(10, rescale=False)
    copy = schedule.to("meta")
    assert schedule.to("cpu") is schedule and copy is schedule.to("meta") and copy.to("cpu") is schedule
    assert copy.T == 10
    for name in ("beta", "alpha", "alpha_bar", "beta_tilde", "lambda_"):
        assert getattr(copy, name).device.type == "meta" and getattr(schedule, name).device.type == "cpu"
    assert at(schedule.beta, 3, torch.zeros(2, 1, device="meta")).device.type == "meta"


@pytest.mark.parametrize("t", [-1, 11, -0.5, 10.5])
def test_a_number_outside_the_process_is_refused(t):
    schedule = linear(10, rescale=False)
    for function in (schedule.alpha_bar_at, schedule.lambda_at):
        with pytest.raises(ValueError, match=r"lies outside 0\.\.10"):
            function(t)
