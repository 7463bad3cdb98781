"""ddpm/samplers/base.py: which times are visited, what that costs, and what is refused."""

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from conftest import GaussianOracle

from ddpm.samplers import DDIM, LMS, PLMS, Ancestral, DPMSolverPP, Euler, Heun, UniPC, integrate
from ddpm.samplers.base import GRIDS, SPACINGS
from ddpm.schedules import NoiseSchedule, cosine, linear, zero_terminal_snr

IN_LOG_SNR = ("log_snr", "karras")


def of_length(T: int) -> NoiseSchedule:
    return NoiseSchedule([0.01] * T)


def test_times_are_even_strictly_decreasing_and_end_at_0():
    """round(linspace(T, 0, steps + 1)) in exact arithmetic, halves to even: the same on every machine."""
    for T in [*range(1, 41), 100, 1000]:
        schedule = of_length(T)
        for steps in range(1, T + 1) if T <= 100 else [1, 3, 7, 16, 50, 333, 512, 600, 976, 999, 1000]:
            times = DDIM(steps).times(schedule)
            assert times == [round(Fraction(T * (steps - i), steps)) for i in range(steps + 1)], (T, steps)
            assert len(times) == steps + 1 and times[0] == T and times[-1] == 0
            assert all(type(t) is int for t in times) and all(t > s for t, s in itertools.pairwise(times))
    assert Ancestral().times(of_length(4)) == [4, 3, 2, 1, 0]


@pytest.mark.parametrize("make", [linear, cosine])
@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("spacing", SPACINGS)
def test_every_spacing_falls_strictly_from_T_to_0_on_both_grids(spacing, grid, make):
    for T, steps in itertools.product([40, 1000], [1, 2, 3, 10, 33, 40]):
        schedule = make(T)
        times = DDIM(steps, spacing=spacing, grid=grid).times(schedule)
        assert times[0] == T and times[-1] == 0 and all(t > s for t, s in itertools.pairwise(times))
        assert all(type(t) is (int if grid == "integer" else float) for t in times)
        assert min(times[:-1]) >= 1  # no network is trained between 0 and 1
        assert len(times) == steps + 1 if spacing in IN_LOG_SNR and grid == "continuous" else len(times) <= steps + 1


def test_trailing_times_are_those_of_lin_et_al_and_the_uniform_ones():
    """Their table 2: round(flip(arange(T, 0, -T / steps)))."""
    for T, steps in [(1000, 10), (1000, 8), (100, 8), (40, 40), (1000, 64)]:
        times = DDIM(steps, spacing="trailing").times(of_length(T))
        assert times[:-1] == np.round(np.arange(T, 0, -T / steps)).astype(int).tolist()
        assert times == DDIM(steps).times(of_length(T))


def test_quadratic_times():
    assert DDIM(5, spacing="quadratic").times(of_length(100)) == [100, 64, 36, 16, 4, 0]
    assert DDIM(4, spacing="quadratic", grid="continuous").times(of_length(100)) == [100, 56.25, 25, 6.25, 0]
    times = DDIM(50, spacing="quadratic").times(of_length(1000))
    assert times[-4:] == [4, 2, 1, 0] and len(times) == 51  # 3.6, 1.6, 0.4: the last would round to 0
    assert DDIM(100, spacing="quadratic").times(of_length(1000))[-4:] == [4, 2, 1, 0]  # 3.6, 2.5, 1.6, 0.9, ...


@pytest.mark.parametrize("make", [linear, cosine])
def test_log_snr_times_are_even_in_lambda(make):
    schedule = make(1000)
    times = DDIM(20, spacing="log_snr", grid="continuous").times(schedule)
    lambda_ = schedule.lambda_at(torch.tensor(times[:-1], dtype=torch.float64))
    step = (schedule.lambda_[1] - schedule.lambda_[1000]) / 19
    torch.testing.assert_close(lambda_.diff(), step.expand(19), rtol=0, atol=1e-9)
    assert times[-2] == 1
    rounded = DDIM(20, spacing="log_snr").times(schedule)
    assert rounded == list(dict.fromkeys(round(t) for t in times))


@pytest.mark.equation("EDM (5)")
def test_karras_times_are_even_in_the_seventh_root_of_sigma(schedule):
    times = DDIM(18, spacing="karras", grid="continuous").times(schedule)
    level = [math.sqrt((1 - a) / a) for a in schedule.alpha_bar[[1000, 1]].tolist()]
    a = schedule.alpha_bar_at(torch.tensor(times[:-1], dtype=torch.float64))
    for i, sigma in enumerate(((1 - a) / a).sqrt().tolist()):
        root = level[0] ** (1 / 7) + i / 17 * (level[1] ** (1 / 7) - level[0] ** (1 / 7))
        assert sigma == pytest.approx(root**7, rel=1e-9)
    assert len(times) == 19 and times[-2:] == [1, 0]


def test_more_steps_than_T_only_on_the_continuous_grid(schedule):
    with pytest.raises(ValueError, match=r"steps = 101 .*T = 100; allowed: 1\.\.100, or any with grid=continuous"):
        DDIM(101).times(linear(100))
    for spacing in SPACINGS:
        with pytest.raises(ValueError, match="steps = 101"):
            DDIM(101, spacing=spacing).times(linear(100))
    times = DDIM(200, grid="continuous").times(linear(100))
    assert times[:3] == [100, 99.5, 99] and times[-3:] == [1.5, 1, 0] and len(times) == 200
    assert Ancestral(spacing="log_snr").times(schedule)[0] == 1000  # None is T, of which many fall together
    assert DDIM(1, spacing="karras").times(of_length(1)) == [1, 0]


@pytest.mark.parametrize("spacing", IN_LOG_SNR)
def test_a_spacing_in_log_snr_begins_at_T_minus_1_where_that_of_T_is_infinite(spacing):
    schedule = zero_terminal_snr(linear(100))
    finite = NoiseSchedule(schedule.beta[1:-1])
    for steps in (2, 3, 10):
        sampler, rest = (DDIM(n, spacing=spacing, grid="continuous") for n in (steps, steps - 1))
        assert sampler.times(schedule) == [100, *rest.times(finite)]
    assert DDIM(1, spacing=spacing).times(schedule) == [100, 0]
    assert DDIM(1, spacing=spacing).times(NoiseSchedule([1.0])) == [1, 0]


@pytest.mark.parametrize("times", [np.linspace(20, 0, 5), torch.linspace(20, 0, 5), [np.float32(20), np.float64(5), 0]])
def test_times_may_be_numbers_of_any_library(times):
    listed = [float(t) for t in times]
    assert DDIM(times=times, grid="continuous").times(cosine(20)) == listed
    assert DDIM(times=np.array([20, 3, 0])).times(cosine(20)) == [20, 3, 0]


# --- Times that are typed


def test_times_that_are_given_are_used_as_they_are(schedule):
    assert DDIM(times=[1000, 500, 3, 0]).times(schedule) == [1000, 500, 3, 0]
    sampler = DDIM(50, times=[600, 20], spacing="karras")
    assert sampler.times(schedule) == [600, 20, 0] and sampler.steps == 2 and sampler.evaluations(schedule) == 2
    times = DDIM(times=(1000, 0.25), grid="continuous").times(schedule)
    assert times == [1000, 0.25, 0] and all(type(t) is float for t in times)


@pytest.mark.parametrize(
    ("times", "grid", "message"),
    [
        ([1000, 500, 500, 0], "integer", "must fall strictly, but 500 follows 500"),
        ([1000, 500, 700], "continuous", "must fall strictly, but 700 follows 500"),
        ([10, 0, 0], "integer", "must fall strictly, but 0 follows 0"),
        ([0], "integer", "at least one time above 0"),
        ([], "integer", "at least one time above 0"),
        ([10, 2.5], "integer", r"holds 2\.5; allowed: integers >= 0 \(real times need grid=continuous\)"),
        ([10, -1], "continuous", "holds -1; allowed: numbers >= 0"),
        ([math.nan], "continuous", "holds nan"),
        ([math.inf, 3], "continuous", "holds inf"),
        ([True], "integer", "holds True"),
        ("1000", "integer", "holds '1000'"),
    ],
)
def test_wrong_times_are_refused(times, grid, message):
    with pytest.raises(ValueError, match=message):
        DDIM(times=times, grid=grid)


def test_times_above_T_are_refused():
    with pytest.raises(ValueError, match="start at 1000, above the schedule's T = 100"):
        DDIM(times=[1000, 10]).times(linear(100))


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="spacing = 'leading' is not known; allowed: uniform, trailing"):
        DDIM(spacing="leading")
    with pytest.raises(ValueError, match="grid = 'real' is not known; allowed: integer, continuous"):
        Heun(grid="real")


# --- What the network sees, and how often

METHODS = {
    "ancestral": Ancestral,
    "ddim": DDIM,
    "2M": DPMSolverPP,
    "3M": lambda *a, **k: DPMSolverPP(*a, order=3, **k),
    "2S": lambda *a, **k: DPMSolverPP(*a, kind="singlestep", **k),
    "sde": lambda *a, **k: DPMSolverPP(*a, kind="sde", **k),
    "euler": Euler,
    "heun": Heun,
    "lms": LMS,
    "plms": PLMS,
    "unipc": UniPC,
}


@pytest.mark.parametrize("make", [linear, zero_terminal_snr])
@pytest.mark.parametrize("name", METHODS)
def test_evaluations_are_those_that_happen_at_times_of_the_grid(name, make):
    schedule = linear(40) if make is linear else zero_terminal_snr(linear(40))
    oracle = GaussianOracle(schedule)
    spacings = SPACINGS if make is linear else ("uniform", "quadratic")
    for spacing, grid, steps in itertools.product(spacings, GRIDS, (4, 30)):
        sampler, seen = METHODS[name](steps, spacing=spacing, grid=grid), []

        def denoise(x_t, t, seen=seen, grid=grid):
            assert t.shape == (3,) and t.dtype == (torch.int64 if grid == "integer" else torch.float64)
            seen.append(t[0].item())
            return oracle.denoise(x_t, t)

        sampler(schedule, denoise, torch.zeros(3, 1))
        assert sampler.evaluations(schedule) == len(seen)
        assert all(1 <= t <= 40 for t in seen) and set(sampler.times(schedule)[:-1]) <= set(seen)


def test_what_samplers_cost(schedule):
    counts = {name: make(50).evaluations(schedule) for name, make in METHODS.items()}
    twice = {"heun": 99, "2S": 99}
    assert counts == dict.fromkeys(METHODS, 50) | twice
    assert Ancestral().evaluations(schedule) == 1000
    assert METHODS["2S"](1000).evaluations(schedule) == 1000  # no integer lies between t and t - 1
    assert METHODS["2S"](1000, grid="continuous").evaluations(schedule) == 1999
    assert Heun(18, churn=4.0, grid="continuous").evaluations(schedule) == 35
    merged = DDIM(50, spacing="log_snr")
    assert merged.evaluations(schedule) == len(merged.times(schedule)) - 1 < 50


# --- The loop on any times


def test_integrate_is_the_loop_of_every_sampler(oracle):
    x_T = torch.randn(4, 2, dtype=torch.float64)
    for sampler in (DDIM(7), Heun(7), DPMSolverPP(7), LMS(7), PLMS(7), UniPC(7)):
        times = sampler.times(oracle.schedule)
        whole = integrate(sampler, oracle.schedule, oracle.denoise, x_T, times)
        assert torch.equal(whole, sampler(oracle.schedule, oracle.denoise, x_T))
        assert torch.equal(integrate(sampler, oracle.schedule, oracle.denoise, x_T, times[:1]), x_T)
    first = integrate(DDIM(), oracle.schedule, oracle.denoise, x_T, [1000, 600, 300])
    both = integrate(DDIM(), oracle.schedule, oracle.denoise, first, [300, 40, 0])
    assert torch.equal(both, DDIM(times=[1000, 600, 300, 40])(oracle.schedule, oracle.denoise, x_T))


def test_an_order_needs_as_many_steps_even_where_the_schedule_decides_how_many():
    assert len(DPMSolverPP(None, 3).times(cosine(3))) == 4
    with pytest.raises(ValueError, match="order = 3 needs at least 3 steps, but on T = 2 only 2 are left"):
        DPMSolverPP(None, 3).times(cosine(2))
