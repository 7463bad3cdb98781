"""ddpm/reverse.py: both forms of the mean over all t, and the variance from end to end."""

import math

import pytest
import torch

from ddpm.forward import q_posterior, q_sample
from ddpm.reverse import VARIANCES, mu_theta, variance
from ddpm.schedules import NoiseSchedule, cosine, linear
from ddpm.targets import Prediction, x_0_from_eps

t = torch.arange(1, 1001)


@pytest.mark.equation("DDPM (11)")
@pytest.mark.parametrize("make", [linear, cosine])
def test_both_forms_of_the_mean_agree_over_all_t(make):
    schedule = make(1000)
    x_t, eps = torch.randn(2, 1000, 5, dtype=torch.float64)
    x_0 = x_0_from_eps(schedule, x_t, t, eps)
    first = q_posterior(schedule, x_0, x_t, t)[0]
    beta, alpha, alpha_bar = (c[1:, None] for c in (schedule.beta, schedule.alpha, schedule.alpha_bar))
    second = 1 / alpha.sqrt() * (x_t - beta / (1 - alpha_bar).sqrt() * eps)
    ours = mu_theta(schedule, Prediction(eps, x_0), x_t, t)
    torch.testing.assert_close(ours, first, rtol=0, atol=0)
    torch.testing.assert_close(ours, second, rtol=2e-12, atol=1e-11 if make is cosine else 1e-12)


def test_the_mean_of_a_stride(schedule):
    """The second form holds for t -> s too, with alpha_bar_t / alpha_bar_s for alpha_t."""
    x_t, eps = torch.randn(2, 1000, 5, dtype=torch.float64)
    pred = Prediction(eps, x_0_from_eps(schedule, x_t, t, eps))
    for s in (t // 2, t // 10, (t - 20).clamp(min=0), 0.3 * t, t - 0.75):
        bar_t, bar_s = (schedule.alpha_bar_at(time)[:, None] for time in (t, s))
        expected = (bar_s / bar_t).sqrt() * (x_t - (1 - bar_t / bar_s) / (1 - bar_t).sqrt() * eps)
        torch.testing.assert_close(mu_theta(schedule, pred, x_t, t, s), expected, rtol=2e-12, atol=1e-12)


def test_the_mean_of_a_step_to_0_is_the_predicted_x_0(schedule):
    x_t, eps, x_0 = torch.randn(3, 4, 5, dtype=torch.float64)
    for start in (1, 20, 1000):
        torch.testing.assert_close(mu_theta(schedule, Prediction(eps, x_0), x_t, start, 0), x_0, rtol=1e-15, atol=0)


def test_the_mean_holds_where_x_T_is_pure_noise():
    schedule = NoiseSchedule([0.1, 0.2, 1.0])
    x_t, x_0 = torch.randn(2, 4, 5, dtype=torch.float64)
    expected = math.sqrt(0.9 * 0.8) * x_0  # nothing of x_T is kept
    torch.testing.assert_close(mu_theta(schedule, Prediction(x_t, x_0), x_t, 3), expected)


# --- variance


def pred(frac) -> Prediction:
    return Prediction(torch.zeros(()), torch.zeros(()), frac)


@pytest.mark.equation("iDDPM (15)")
@pytest.mark.parametrize("make", [linear, cosine])
def test_variance_between_beta_tilde_and_beta(make):
    schedule = make(1000)
    x_t = torch.zeros(1000, 1, dtype=torch.float64)
    beta, beta_tilde = schedule.beta[1:], schedule.beta_tilde[[2, *range(2, 1001)]]  # beta_tilde_2 for the 0 at t = 1
    close = {"rtol": 2e-12 if make is linear else 1e-11, "atol": 0}
    assert VARIANCES == {"beta_tilde": 0.0, "beta": 1.0}
    torch.testing.assert_close(variance(schedule, pred(0.0), x_t, t)[:, 0], beta_tilde, **close)
    torch.testing.assert_close(variance(schedule, pred(1.0), x_t, t)[:, 0], beta, **close)
    torch.testing.assert_close(variance(schedule, pred(0.5), x_t, t)[:, 0], (beta * beta_tilde).sqrt(), **close)
    quarter = (0.25 * beta.log() + 0.75 * beta_tilde.log()).exp()
    torch.testing.assert_close(variance(schedule, pred(0.25), x_t, t)[:, 0], quarter, **close)


def test_variance_of_a_stride(schedule):
    x_t = torch.zeros(1, dtype=torch.float64)
    for start, s in [(1000, 980), (500, 1), (60, 0), (1, 0), (700.5, 3.25), (1.5, 0.5), (0.5, 0)]:
        bar_t, bar_s = schedule.alpha_bar_at(start).item(), schedule.alpha_bar_at(s).item()
        beta = 1 - bar_t / bar_s
        beta_tilde = (1 - bar_s) / (1 - bar_t) * beta if s else schedule.beta_tilde[2].item()
        for frac in (0.0, 0.3, 1.0):
            expected = beta**frac * beta_tilde ** (1 - frac)
            assert variance(schedule, pred(frac), x_t, start, s).item() == pytest.approx(expected, rel=1e-13)


def test_the_variance_of_the_only_step_is_its_beta():
    assert variance(NoiseSchedule([0.25]), pred(0.3), torch.zeros(1, dtype=torch.float64), 1).item() == 0.25


def test_one_frac_for_each_pixel(schedule):
    frac = torch.rand(3, 2, 4, 4)
    steps = torch.tensor([2, 500, 1000])
    out = variance(schedule, pred(frac), torch.zeros(3, 2, 4, 4), steps)
    assert out.shape == (3, 2, 4, 4)
    for i in range(3):
        beta, beta_tilde = schedule.beta[steps[i]].item(), schedule.beta_tilde[steps[i]].item()
        expected = beta ** frac[i] * beta_tilde ** (1 - frac[i])
        torch.testing.assert_close(out[i], expected, rtol=1e-6, atol=0)
        assert (out[i] <= beta * 1.000001).all() and (out[i] >= beta_tilde * 0.999999).all()


def test_beta_tilde_is_exact_for_a_single_point_and_beta_for_unit_variance_data(schedule):
    """Var[x_{t-1} | x_t] of the data's own reverse process: the reason for both choices (DDPM, section 3.2)."""
    for start in (2, 300, 1000):
        bar_t, bar_s = schedule.alpha_bar[[start, start - 1]].tolist()
        for data_variance, frac in ((0.0, 0.0), (1.0, 1.0)):
            var_s, var_t = (bar * data_variance + 1 - bar for bar in (bar_s, bar_t))
            covariance = math.sqrt(bar_t / bar_s) * var_s
            exact = var_s - covariance**2 / var_t
            ours = variance(schedule, pred(frac), torch.zeros(1, dtype=torch.float64), start).item()
            assert ours == pytest.approx(exact, rel=1e-9)


def test_both_follow_x_to_its_device(schedule, device):
    x = torch.zeros(2, 3, device=device)
    for steps in (torch.tensor([5, 9], device=device), torch.tensor([5, 9]), torch.tensor([5.5, 9.0])):
        for s in (None, 0, 3, steps // 2):
            assert mu_theta(schedule, Prediction(x, x), x, steps, s).device.type == device
            sigma2 = variance(schedule, Prediction(x, x, 0.5), x, steps, s)
            assert sigma2.shape == (2, 1) and sigma2.device.type == device


def test_an_int_and_a_tensor_of_t_agree(schedule):
    x_t, x_0 = torch.randn(2, 3, 4)
    steps = torch.tensor([1, 400, 1000])
    whole = mu_theta(schedule, Prediction(x_t, x_0), q_sample(schedule, x_0, steps, x_t), steps)
    for i, step in enumerate(steps.tolist()):
        x = q_sample(schedule, x_0[i : i + 1], step, x_t[i : i + 1])
        assert torch.equal(mu_theta(schedule, Prediction(x, x_0[i : i + 1]), x, step), whole[i : i + 1])
        assert variance(schedule, pred(0.5), x, step) == variance(schedule, pred(0.5), x_t, steps)[i]
