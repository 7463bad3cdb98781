"""ddpm/schedules.py: golden numbers, definitions term by term, the gather, and every refusal."""

import itertools
import math
import re

import pytest
import torch

from ddpm.schedules import NoiseSchedule, at, cosine, linear

SCHEDULES = {  # alpha_bar_T to three digits, 1 / sqrt(alpha_bar_T)
    "linear 1000": (lambda: linear(1000), "4.04e-05", pytest.approx(157, abs=0.5)),
    "linear 100, literal": (lambda: linear(100, rescale=False), "0.364", pytest.approx(1.66, abs=0.005)),
    "linear 200, literal": (lambda: linear(200, rescale=False), "0.132", pytest.approx(2.75, abs=0.005)),
    "linear 100": (lambda: linear(100), "2.04e-05", pytest.approx(221.5, abs=0.1)),
    "cosine 1000": (lambda: cosine(1000), "2.43e-09", pytest.approx(20291, abs=0.5)),
    "cosine 100": (lambda: cosine(100), "2.43e-07", pytest.approx(2029, abs=0.5)),
}


@pytest.fixture(params=SCHEDULES, scope="module")
def any_schedule(request) -> NoiseSchedule:
    return SCHEDULES[request.param][0]()


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


@pytest.mark.parametrize("beta_T", [0.02, 0.011, 0.0135, 0.028, 0.0285, 0.057, 0.29, 0.7, 0.999])
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


@pytest.mark.parametrize("make", [linear, cosine])
@pytest.mark.parametrize("T", [0, -1, 2.5, True])
def test_T_must_be_a_positive_integer(make, T):
    with pytest.raises(ValueError, match=rf"T = {T}: the number of steps must be an integer >= 1"):
        make(T)


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
