"""ddpm/samplers/accuracy.py: it counts every evaluation, and measures an error that is known in closed form."""

import math

import pytest
import torch

from ddpm.oracle import GaussianOracle, MixtureOracle
from ddpm.samplers import DDIM, DPMSolverPP, Euler, Heun, integrate
from ddpm.samplers.accuracy import flow_error
from ddpm.schedules import constant, cosine, linear, scaled_linear, sigmoid, zero_terminal_snr

ORACLE = GaussianOracle(linear(1000), 0.7, 0.25)
X_T = torch.tensor([[-1.0], [0.5], [2.0]], dtype=torch.float64)


@pytest.mark.parametrize(
    "sampler", [DDIM(10), Heun(10), DPMSolverPP(10, kind="singlestep"), Heun(12, spacing="karras", grid="continuous")]
)
def test_evaluations_are_those_that_the_sampler_announces(sampler):
    assert flow_error(sampler, ORACLE, X_T)[0] == sampler.evaluations(ORACLE.schedule)
    assert flow_error(sampler, ORACLE, X_T, last_step=False)[0] == sampler.evaluations(ORACLE.schedule) - 1


def test_the_error_of_one_step_to_0():
    """One step returns E[x_0 | x_T], the flow ends at m + c (x_T - a m) / sqrt(var_T)."""
    alpha_bar = ORACLE.schedule.alpha_bar[-1].item()
    a, var_T = math.sqrt(alpha_bar), alpha_bar * 0.25 + 1 - alpha_bar
    z = X_T - a * 0.7
    expected = ((a * 0.25 / var_T - 0.5 / math.sqrt(var_T)) * z).square().mean().sqrt().item()
    assert flow_error(DDIM(1), ORACLE, X_T) == (1, pytest.approx(expected, rel=1e-9))


def test_without_the_last_step_the_error_falls_with_the_order():
    errors = [flow_error(Heun(n, spacing="log_snr", grid="continuous"), ORACLE, X_T, False)[1] for n in (41, 81)]
    assert math.log2(errors[0] / errors[1]) == pytest.approx(2, abs=0.1)


SHIPPED = {
    "linear": linear(1000), "cosine": cosine(1000), "sigmoid": sigmoid(1000), "scaled_linear": scaled_linear(1000),
    "constant": constant(1000), "zero_terminal_snr": zero_terminal_snr(linear(1000)),
}  # fmt: skip


@pytest.mark.parametrize("name", SHIPPED)
@pytest.mark.parametrize(("make", "most"), [(Heun, 0.06), (Euler, 0.07)])
def test_the_defaults_of_edms_samplers_suit_every_schedule_that_is_shipped(name, make, most):
    """RMS of x_1 on a mixture, in units of the data; the spacing of EDM's paper has 0.18 with Heun on cosine."""
    schedule, sampler = SHIPPED[name], make()
    oracle = MixtureOracle(schedule, [0.3, 0.7], [-0.8, 0.5], [0.01, 0.04])
    x_T = torch.randn(1000, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    times = sampler.times(schedule)[:-1]
    assert times[-1] == 1
    x_1 = integrate(sampler, schedule, oracle.denoise, x_T, times)
    assert (x_1 - oracle.exact_ode(x_T, schedule.T, 1)).square().mean().sqrt() < most
