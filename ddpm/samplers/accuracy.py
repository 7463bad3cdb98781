"""Accuracy of samplers against the exact probability flow, and its cost."""

from torch import Tensor

from ddpm.oracle import MixtureOracle
from ddpm.samplers import Sampler, integrate
from ddpm.schedules import Time
from ddpm.targets import Prediction


def flow_error(sampler: Sampler, oracle: MixtureOracle, x_T: Tensor, last_step: bool = True) -> tuple[int, float]:
    """Return the evaluations of the denoiser, and the root mean square error against the exact probability flow.

    Args:
        sampler: deterministic; its own times are used.
        x_T: the starting noise, (B, *), in float64 for errors below 1e-6.
        last_step: False stops at the time before 0. With spacing "log_snr" or "karras" that is t = 1 for any number of
            steps, so that the errors of one method form a line whose slope is its order.
    """
    times = sampler.times(oracle.schedule)
    times = times if last_step else times[:-1]
    evaluations = 0

    def denoise(x_t: Tensor, t: Time) -> Prediction:
        nonlocal evaluations
        evaluations += 1
        return oracle.denoise(x_t, t)

    x = integrate(sampler, oracle.schedule, denoise, x_T, times)
    error = x - oracle.exact_ode(x_T, times[0], times[-1])
    return evaluations, error.double().square().mean().sqrt().item()
