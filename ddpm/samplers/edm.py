"""Euler and Heun steps in the noise level, with churn: EDM (Karras et al., arXiv 2206.00364)."""

from collections.abc import Sequence
from math import inf, log, sqrt

from torch import Tensor

from ddpm.forward import q_sample, transition
from ddpm.samplers.base import Sampler, Step, alpha_bars, evaluate
from ddpm.schedules import NoiseSchedule, at


class Euler(Sampler):
    r"""EDM's samplers without second-order correction; their noise level is sigma = sqrt((1 - alpha_bar)/alpha_bar).

    The paper's x is our x_t / sqrt(alpha_bar_t) = x_0 + sigma eps, and its dx / dt = (x - D) / t is eps. Without churn
    this is DDIM: both are Euler's method in sigma.

    Args:
        steps, spacing, grid, times: as in `Sampler`. The paper's own spacing, "karras", is made for its noise levels,
            sigma <= 80: see `Heun`.
        churn: S_churn >= 0, how much noise is added before a step; 0 is the deterministic algorithm 1, more is
            algorithm 2. It needs the continuous grid, as it raises t to a time between the sampling times.
        S_min, S_max: churn only at noise levels sigma in [S_min, S_max]; None is no upper bound.
        S_noise: standard deviation of the noise that churn adds, > 0; slightly above 1 makes up for lost detail.
    Raises:
        ValueError: an argument out of range; churn on the integer grid, or with beta_T = 1.
    """

    def __init__(
        self,
        steps: int | None = 50,
        churn: float = 0.0,
        S_min: float = 0.0,
        S_max: float | None = None,
        S_noise: float = 1.0,
        spacing: str = "log_snr",
        grid: str = "continuous",
        times: Sequence[int | float] | None = None,
    ):
        super().__init__(steps, spacing, grid, times)
        if not 0 <= churn < inf:
            raise ValueError(f"churn = {churn:g} must be >= 0 and finite; 0 adds no noise")
        if churn > 0 and grid == "integer":
            raise ValueError(f"churn = {churn:g} raises t to times between integers; it needs grid=continuous")
        if not 0 <= S_min < (inf if S_max is None else S_max):
            raise ValueError(f"S_min = {S_min} and S_max = {S_max}: 0 <= S_min < S_max is needed, or S_max = None")
        if not 0 < S_noise < inf:
            raise ValueError(f"S_noise = {S_noise:g} must be > 0 and finite; 1 is the exact process")
        self.churn, self.S_min, self.S_max, self.S_noise = churn, S_min, S_max, S_noise
        self.stochastic = churn > 0

    def times(self, schedule: NoiseSchedule) -> list[int] | list[float]:
        """Return the sampling times, see `Sampler.times`."""
        if self.churn > 0 and alpha_bars(schedule, schedule.T)[0] == 0:
            raise ValueError(f"churn = {self.churn:g} needs a finite noise level at T, but beta_T = 1 here")
        return super().times(schedule)

    def perturb(
        self, schedule: NoiseSchedule, x_t: Tensor, t: int | float, noise: Tensor, steps: int
    ) -> tuple[Tensor, int | float]:
        r"""Raise the noise level of x_t.

        .. math:: \hat\sigma = \sigma_t + \gamma \sigma_t, \quad
            \gamma = \min\left(\frac{S_\text{churn}}{N}, \sqrt2 - 1\right) \text{ for } \sigma_t \in
                [S_\text{min}, S_\text{max}], \text{ else } 0 \\
            \hat x = x + \sqrt{\hat\sigma^2 - \sigma_t^2}\, S_\text{noise}\, z \qquad \text{[EDM (Algorithm 2)]}

        For x_t this is the forward process q(x_{\hat t} | x_t). The level at T is never exceeded.
        """
        sigma = sigma_of(schedule, t)
        churned = self.S_min <= sigma <= (inf if self.S_max is None else self.S_max)
        gamma = min(self.churn / steps, sqrt(2) - 1) if churned else 0.0
        t_hat = schedule.to("cpu").t_at(-log(sigma + gamma * sigma)).item()
        if t_hat <= t:
            return x_t, t
        _, _, alpha, beta = transition(schedule, t_hat, t)
        return at(alpha.sqrt(), ..., x_t) * x_t + at(beta.sqrt(), ..., x_t) * self.S_noise * noise, t_hat

    def step(self, step: Step) -> Tensor:
        r"""Return x_s = sqrt(alpha_bar_s) (x_t / sqrt(alpha_bar_t) + (sigma_s - sigma_t) eps_theta), t (churned) to s.

        Computed as sqrt(alpha_bar_s) (x_{0,theta} + sigma_s eps_theta), which also holds at alpha_bar_t = 0.
        """
        schedule, _, _, _, s, pred, _, _ = step
        return q_sample(schedule, pred.x_0, s, pred.eps)


class Heun(Euler):
    r"""EDM's Heun sampler: Euler's step corrected by the mean of the slopes at both ends; two evaluations a step.

    .. math::
        x_s' = \sqrt{\bar\alpha_s} \left(\frac{x_t}{\sqrt{\bar\alpha_t}}
            + (\sigma_s - \sigma_t)\, \epsilon_\theta(x_t, t)\right) \\
        x_s = \sqrt{\bar\alpha_s} \left(\frac{x_t}{\sqrt{\bar\alpha_t}} + (\sigma_s - \sigma_t) \left(\tfrac12
            \epsilon_\theta(x_t, t) + \tfrac12 \epsilon_\theta(x_s', s)\right)\right) \qquad \text{[EDM (Algorithm 1)]}

    Of second order. Arguments and errors as in `Euler`. The last step, to 0, is Euler's, as in the paper; so is the
    first if beta_T = 1, where sigma is infinite.

    The correction weighs the slopes by sigma, so the spacing has to follow the schedule's own sigma at T (linear 160,
    sigmoid 1,800, cosine 20,000). Even steps in its logarithm do, whatever the schedule. Of a mixture of Gaussians, 18
    steps to t = 1 with spacing="log_snr" ("karras") have an RMS error of 0.023 (0.021) on linear, 0.031 (0.064) on
    sigmoid and 0.048 (0.18) on cosine, where "uniform" has 0.59. With ten steps or fewer take a solver in lambda, such
    as DPM-Solver++.
    """

    def __init__(
        self,
        steps: int | None = 18,
        churn: float = 0.0,
        S_min: float = 0.0,
        S_max: float | None = None,
        S_noise: float = 1.0,
        spacing: str = "log_snr",
        grid: str = "continuous",
        times: Sequence[int | float] | None = None,
    ):
        super().__init__(steps, churn, S_min, S_max, S_noise, spacing, grid, times)

    def step(self, step: Step) -> Tensor:
        """Take a step from t (churned) to s, see `Sampler.step`."""
        schedule, denoise, _, t, s, pred, _, _ = step
        x_s = q_sample(schedule, pred.x_0, s, pred.eps)
        if self.calls(schedule, t, s) == 1:
            return x_s
        alpha_bar_s, eps_s = alpha_bars(schedule, s)[0], evaluate(denoise, x_s, s).eps
        return x_s + sqrt(alpha_bar_s) * (sigma_of(schedule, s) - sigma_of(schedule, t)) * (eps_s - pred.eps) / 2

    def calls(self, schedule: NoiseSchedule, t: int | float, s: int | float) -> int:
        """Return the evaluations of a step, see `Sampler.calls`."""
        return 1 if alpha_bars(schedule, t)[0] == 0 else 2


def sigma_of(schedule: NoiseSchedule, t: int | float) -> float:
    """Return EDM's noise level sqrt((1 - alpha_bar_t) / alpha_bar_t), for alpha_bar_t > 0."""
    [alpha_bar_t] = alpha_bars(schedule, t)
    return sqrt((1 - alpha_bar_t) / alpha_bar_t)
