"""ddpm/targets.py: eps, x_0, v and u are one thing in four coordinates, over all t."""

import math

import pytest
import torch

from ddpm.forward import q_sample
from ddpm.samplers import DDIM, Step
from ddpm.schedules import NoiseSchedule, cosine, linear, zero_terminal_snr
from ddpm.targets import (
    TARGETS,
    Prediction,
    eps_from_u,
    eps_from_v,
    eps_from_x_0,
    from_prediction,
    straight_path,
    to_prediction,
    velocity,
    x_0_from_eps,
    x_0_from_u,
    x_0_from_v,
)

T = 1000
t = torch.arange(1, T + 1)


@pytest.fixture(params=[linear, cosine])
def case(request):
    """schedule, x_0, eps, x_t (T, 5) in float64, one row a t, and how much dividing by sqrt(alpha_bar) amplifies."""
    schedule = request.param(T)
    x_0, eps = torch.randn(2, T, 5, dtype=torch.float64)
    return schedule, x_0, eps, q_sample(schedule, x_0, t, eps), schedule.alpha_bar[1:, None] ** -0.5


@pytest.mark.equation("DDPM (15)")
def test_x_0_from_eps_undoes_q_sample(case):
    schedule, x_0, eps, x_t, stretch = case
    assert ((x_0_from_eps(schedule, x_t, t, eps) - x_0).abs() <= 1e-14 * stretch).all()
    by_hand = (0.3 - math.sqrt(1 - schedule.alpha_bar[500].item()) * 2) / math.sqrt(schedule.alpha_bar[500].item())
    x = torch.tensor([0.3], dtype=torch.float64)
    assert x_0_from_eps(schedule, x, 500, torch.full_like(x, 2)).item() == pytest.approx(by_hand, rel=1e-14)


def test_eps_from_x_0_undoes_q_sample(case):
    schedule, x_0, eps, x_t, _ = case
    torch.testing.assert_close(eps_from_x_0(schedule, x_t, t, x_0), eps, rtol=0, atol=2e-13)


def test_round_trips_between_all_targets():
    """Every chain of conversions returns to where it began, in float64, over all t."""
    schedule, (output, x_t) = linear(T), torch.randn(2, T, 5, dtype=torch.float64)
    for first in TARGETS:
        pred = to_prediction(schedule, first, output, x_t, t)
        torch.testing.assert_close(from_prediction(schedule, first, pred, t), output, rtol=0, atol=1e-12)
        for second in TARGETS:
            value = from_prediction(schedule, second, pred, t)
            again = to_prediction(schedule, second, value, x_t, t)
            torch.testing.assert_close(again.eps, pred.eps, rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(again.x_0, pred.x_0, rtol=1e-11, atol=1e-11)
            torch.testing.assert_close(from_prediction(schedule, first, again, t), output, rtol=0, atol=1e-11)


def test_eps_and_x_0_of_a_prediction_compose_x_t(case):
    schedule, x_0, eps, x_t, stretch = case
    for target in TARGETS:
        true = from_prediction(schedule, target, Prediction(eps, x_0), t)
        pred = to_prediction(schedule, target, true, x_t, t, frac=0.25)
        assert ((pred.x_0 - x_0).abs() <= 1e-14 * stretch).all() and pred.frac == 0.25
        torch.testing.assert_close(pred.eps, eps, rtol=0, atol=2e-13)
        assert torch.equal(from_prediction(schedule, target, pred, t), true) or target in ("v", "flow")


@pytest.mark.parametrize("make", [linear, cosine])
def test_a_prediction_at_real_times(make):
    """Between integers as at them: the true target, in any coordinate, gives back the pair that made x_t."""
    schedule, real = make(T), t.double() - 0.375
    x_0, eps = torch.randn(2, T, 5, dtype=torch.float64)
    x_t, stretch = q_sample(schedule, x_0, real, eps), schedule.alpha_bar_at(real)[:, None] ** -0.5
    for target in TARGETS:
        true = from_prediction(schedule, target, Prediction(eps, x_0), real)
        pred = to_prediction(schedule, target, true, x_t, real)
        assert ((pred.x_0 - x_0).abs() <= 1e-14 * stretch).all()
        torch.testing.assert_close(pred.eps, eps, rtol=0, atol=1e-12)
        one = to_prediction(schedule, target, true[700], x_t[700], real[700].item())
        assert torch.equal(one.eps, pred.eps[700]) and torch.equal(one.x_0, pred.x_0[700])


@pytest.mark.equation("PD (App. D)")
def test_v_is_the_derivative_of_x_t_by_its_angle(case):
    """x_t = cos(phi) x_0 + sin(phi) eps with cos(phi) = sqrt(alpha_bar_t); autograd differentiates it."""
    schedule, x_0, eps, x_t, _ = case
    phi = schedule.alpha_bar[1:, None].sqrt().acos()
    x, v = torch.autograd.functional.jvp(lambda p: p.cos() * x_0 + p.sin() * eps, phi, torch.ones_like(phi))
    torch.testing.assert_close(x, x_t, rtol=0, atol=1e-11)  # acos near 1 amplifies rounding
    torch.testing.assert_close(velocity(schedule, Prediction(eps, x_0), t), v, rtol=0, atol=1e-11)


@pytest.mark.equation("PD (x from v)")
def test_x_0_from_the_true_v(case):
    schedule, x_0, eps, x_t, _ = case
    v = velocity(schedule, Prediction(eps, x_0), t)
    torch.testing.assert_close(x_0_from_v(schedule, x_t, t, v), x_0, rtol=0, atol=1e-14)


@pytest.mark.equation("PD (eps from v)")
def test_eps_from_the_true_v(case):
    schedule, x_0, eps, x_t, _ = case
    v = velocity(schedule, Prediction(eps, x_0), t)
    torch.testing.assert_close(eps_from_v(schedule, x_t, t, v), eps, rtol=0, atol=1e-14)


def test_the_ends_of_v():
    """v turns from eps where x_t is data to -x_0 where it is noise."""
    schedule = cosine(T)
    eps, x_0 = torch.tensor([[2.0]], dtype=torch.float64), torch.tensor([[0.5]], dtype=torch.float64)
    assert velocity(schedule, Prediction(eps, x_0), 0).item() == 2.0
    assert velocity(schedule, Prediction(eps, x_0), T).item() == pytest.approx(-0.5, abs=1e-4)


@pytest.mark.equation("FM (straight path)")
def test_x_t_walks_a_straight_line_whose_velocity_is_u(case):
    schedule, x_0, eps, x_t, _ = case
    x, tau = straight_path(schedule, x_t, t)
    torch.testing.assert_close(x, (1 - tau) * x_0 + tau * eps, rtol=0, atol=1e-14)
    assert ((tau > 0) & (tau < 1)).all() and (tau.diff(dim=0) > 0).all()
    _, u = torch.autograd.functional.jvp(lambda tau: (1 - tau) * x_0 + tau * eps, tau, torch.ones_like(tau))
    torch.testing.assert_close(from_prediction(schedule, "flow", Prediction(eps, x_0), t), u, rtol=0, atol=1e-14)
    for r, end in ((0, 0.0), (T, 1.0)):
        assert straight_path(zero_terminal_snr(schedule), x_t[:1], r)[1].item() == end


@pytest.mark.equation("FM (x from u)")
def test_x_0_from_the_true_u(case):
    schedule, x_0, eps, x_t, _ = case
    torch.testing.assert_close(x_0_from_u(schedule, x_t, t, eps - x_0), x_0, rtol=0, atol=1e-14)


@pytest.mark.equation("FM (eps from u)")
def test_eps_from_the_true_u(case):
    schedule, x_0, eps, x_t, _ = case
    torch.testing.assert_close(eps_from_u(schedule, x_t, t, eps - x_0), eps, rtol=0, atol=1e-14)


@pytest.mark.parametrize("make", [linear, cosine, lambda T: zero_terminal_snr(linear(T))])
@pytest.mark.parametrize(("t", "s"), [(1000, 999), (1000, 1), (700.25, 30.5), (2, 1), (400, 600)])
def test_a_step_of_ddim_is_a_step_of_euler_on_the_straight_path(make, t, s):
    """x moves by (tau_s - tau_t) u, whatever the schedule and however long the step; upwards too."""
    schedule = make(T)
    x_t, u = torch.randn(2, 7, 5, dtype=torch.float64)
    pred = to_prediction(schedule, "flow", u, x_t, t)
    x_s = DDIM().step(Step(schedule, None, x_t, t, s, pred))
    (x, tau_t), (x_end, tau_s) = straight_path(schedule, x_t, t), straight_path(schedule, x_s, s)
    torch.testing.assert_close(x_end, x + (tau_s - tau_t) * u, rtol=0, atol=1e-13)


def test_u_is_finite_at_both_ends_whatever_the_schedule():
    """At t = 0 x_t is x_0, and where alpha_bar_T = 0 it is eps."""
    schedule, (x_t, u) = NoiseSchedule([0.5, 1.0]), torch.randn(2, 3, 5)
    data, noise = (to_prediction(schedule, "flow", u, x_t, t) for t in (0, 2))
    assert torch.equal(data.x_0, x_t) and torch.equal(noise.eps, x_t)
    torch.testing.assert_close(data.eps, x_t + u)
    torch.testing.assert_close(noise.x_0, x_t - u)


def test_an_unknown_target_is_no_v():
    with pytest.raises(KeyError):
        to_prediction(linear(T), "z", torch.zeros(1, 1), torch.zeros(1, 1), 5)


def test_an_int_and_a_tensor_of_t_agree(case):
    schedule, x_0, eps, x_t, _ = case
    for convert in (x_0_from_eps, eps_from_x_0, x_0_from_v, eps_from_v, x_0_from_u, eps_from_u):
        rows = [convert(schedule, x_t[i], int(t[i]), eps[i]) for i in (0, 499, 999)]
        assert torch.equal(convert(schedule, x_t, t, eps)[[0, 499, 999]], torch.stack(rows))
    rows = [velocity(schedule, Prediction(eps[i], x_0[i]), int(t[i])) for i in (0, 499, 999)]
    assert torch.equal(velocity(schedule, Prediction(eps, x_0), t)[[0, 499, 999]], torch.stack(rows))
