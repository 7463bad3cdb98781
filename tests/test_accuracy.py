"""ddpm/samplers/accuracy.py: it counts every evaluation, and measures an error that is known in closed form."""

import math

import pytest
import torch

from ddpm.oracle import GaussianOracle
from ddpm.samplers import DDIM, DPMSolverPP, Heun
from ddpm.samplers.accuracy import flow_error
from ddpm.schedules import linear

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
