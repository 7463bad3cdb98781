"""Multistep consistency sampling: Consistency Models (Song et al., arXiv 2303.01469)."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ddpm.forward import q_sample
from ddpm.samplers.base import Sampler, Step, karras_sigmas
from ddpm.schedules import NoiseSchedule

SIGMA_MIN, SIGMA_MAX = 0.002, 80.0  # of EDM, and of consistency models


class Consistency(Sampler):
    r"""Multistep consistency sampling: each step predicts x_0, and all but the last add fresh noise.

    .. math:: x \leftarrow f_\theta(x_{\tau_n}, \tau_n), \quad
        x_{\tau_{n+1}} = \sqrt{\bar\alpha_{\tau_{n+1}}}\, x + \sqrt{1 - \bar\alpha_{\tau_{n+1}}}\, z
        \qquad \text{[CM (Algorithm 1)]}

    in our coordinates, from the time whose noise is sigma_max on. The times are those of training with this number of
    steps, see `levels`.

    Args:
        steps: evaluations of the network.
        sigma_max: the noise level of the first time, as in training.
        times: as in `Sampler`.
    Raises:
        ValueError: an argument out of range.
    """

    stochastic = True

    def __init__(self, steps: int = 2, sigma_max: float = SIGMA_MAX, times: Sequence[int | float] | None = None):
        super().__init__(steps, grid="continuous", times=times)
        if not 0 < sigma_max < math.inf:
            raise ValueError(f"sigma_max = {sigma_max!r} must be > 0")
        self.sigma_max = sigma_max

    def times(self, schedule: NoiseSchedule) -> list[int] | list[float]:
        """Return the sampling times, see `Sampler.times`."""
        if self.fixed_times is not None or self.steps is None:
            return super().times(schedule)
        times, _ = levels(schedule, self.steps, sigma_max=self.sigma_max)
        return times.flip(0).tolist()

    def step(self, step: Step) -> Tensor:
        """Take a step, see `Sampler.step`."""
        return q_sample(step.schedule, step.pred.x_0, step.s, step.noise)


def levels(
    schedule: NoiseSchedule, N: int, sigma_min: float = SIGMA_MIN, sigma_max: float = SIGMA_MAX
) -> tuple[Tensor, Tensor]:
    """Return times (N + 1,) from data to noise in N steps, by EDM (5), and their sigma (N + 1,), rising, float64.

    The lowest level is data: time 0, whose sigma is given as the sigma_min that its step is counted from. Levels that
    the schedule does not reach are clamped to those that it does, and none lies below t = 1.

    Raises:
        ValueError: sigma_min is not below sigma_max, on this schedule.
    """
    finite = schedule.to("cpu").with_finite_lambda()
    low = max(sigma_min, math.exp(-finite.lambda_[1].item()))
    high = min(sigma_max, math.exp(-finite.lambda_[-1].item()))
    if not low < high:
        raise ValueError(f"the schedule's noise between {sigma_min:g} and {sigma_max:g} leaves no steps to take")
    sigma = karras_sigmas(high, low, N + 1).flip(0)
    times = finite.t_at(-sigma.log())
    return torch.cat([times.new_zeros(1), times[1:]]), sigma
