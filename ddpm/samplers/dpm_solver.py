"""Exponential integrators in log-SNR: DPM-Solver++ (Lu et al., arXiv 2211.01095)."""

from collections.abc import Sequence
from math import log, sqrt

from torch import Tensor

from ddpm.checks import check_one_of
from ddpm.samplers.base import Sampler, Step, alpha_bars, check_order, evaluate, with_signal
from ddpm.schedules import NoiseSchedule
from ddpm.targets import Denoise, Prediction

ORDERS = {"multistep": (1, 2, 3), "singlestep": (1, 2), "sde": (1, 2)}


class DPMSolverPP(Sampler):
    r"""The DPM-Solver++ sampler: solve for x in lambda, where the linear part is exact and only x_0 is extrapolated.

    The paper's alpha_t and sigma_t are our sqrt(alpha_bar_t) and sqrt(1 - alpha_bar_t). With h = lambda_s - lambda_t
    every deterministic kind is

    .. math:: x_s = \sqrt{\frac{1 - \bar\alpha_s}{1 - \bar\alpha_t}}\, x_t - \sqrt{\bar\alpha_s}\, (e^{-h} - 1)\, D
        \qquad \text{[DPM-Solver++ (order 1)]}

    with D = x_{0,theta} in order 1, which is DDIM; the kinds differ in D:

    - "multistep" extrapolates from the steps before (2M, 3M), one evaluation a step. Where history is missing the order
      is lowered accordingly.
    - "singlestep" evaluates the network once more, in the middle of the step (2S).
    - "sde" is 1 or 2M for the reverse stochastic equation; in order 1 it is ancestral sampling with beta_tilde:

    .. math:: x_s = \sqrt{\frac{1 - \bar\alpha_s}{1 - \bar\alpha_t}}\, e^{-h} x_t
        + \sqrt{\bar\alpha_s}\, (1 - e^{-2h})\, D + \sqrt{1 - \bar\alpha_s} \sqrt{1 - e^{-2h}}\, z
        \qquad \text{[DPM-Solver++ (SDE)]}

    The last step, to 0, is of first order in each (lower_order_final in other libraries). If beta_T = 1 then
    e^{-h} = 0 in the first step, which is of order 1 and exact for its D.

    Args:
        steps, spacing, grid, times: as in `Sampler`.
        order: 1, 2, or, for "multistep" only, 3; at most the number of steps.
        kind: "multistep", "singlestep" or "sde".
    Raises:
        ValueError: an unknown kind, or an order that it does not have or that the steps never reach.
    """

    def __init__(
        self,
        steps: int | None = 20,
        order: int = 2,
        kind: str = "multistep",
        spacing: str = "uniform",
        grid: str = "integer",
        times: Sequence[int | float] | None = None,
    ):
        super().__init__(steps, spacing, grid, times)
        check_one_of("kind", kind, ORDERS)
        check_order(order, ORDERS[kind], self.steps)
        self.order, self.kind, self.stochastic = order, kind, kind == "sde"
        self.history = 0 if kind == "singlestep" else order - 1

    def step(self, step: Step) -> Tensor:
        """Take a step, see `Sampler.step`."""
        schedule, denoise, x_t, t, s, pred, past, noise = step
        alpha_bar_t, alpha_bar_s = alpha_bars(schedule, t, s)
        D = pred.x_0
        if self.kind == "singlestep":
            D = self._singlestep(schedule, denoise, x_t, t, s, pred)
        elif past := with_signal(schedule, past):
            D = (self._2M if len(past) == 1 else self._3M)(schedule, t, s, pred, past)
        e = exp_minus_h(schedule, t, s)
        noise_ratio = sqrt((1 - alpha_bar_s) / (1 - alpha_bar_t))
        if self.kind == "sde":
            x_s = noise_ratio * e * x_t + sqrt(alpha_bar_s) * (1 - e**2) * D
            return x_s + sqrt(1 - alpha_bar_s) * sqrt(1 - e**2) * noise
        return noise_ratio * x_t - sqrt(alpha_bar_s) * (e - 1) * D

    def calls(self, schedule: NoiseSchedule, t: int | float, s: int | float) -> int:
        """Return the evaluations of a step, see `Sampler.calls`."""
        return 1 if self._middle(schedule, t, s) is None else 2

    def _middle(self, schedule: NoiseSchedule, t: int | float, s: int | float) -> int | float | None:
        """Return the time of 2S between t and s, on the sampler's own grid; None where the step is of order 1."""
        if self.kind != "singlestep" or self.order == 1 or alpha_bars(schedule, t)[0] == 0:
            return None
        m = (t + s) / 2 if isinstance(t, float) or isinstance(s, float) else (t + s) // 2
        return m if s < m < t else None

    def _singlestep(
        self, schedule: NoiseSchedule, denoise: Denoise, x_t: Tensor, t: int | float, s: int | float, pred: Prediction
    ) -> Tensor:
        r"""Return D from a second evaluation at a time m between t and s.

        .. math:: r = \frac{\lambda_m - \lambda_t}{h}, \quad
            u = \sqrt{\frac{1 - \bar\alpha_m}{1 - \bar\alpha_t}}\, x_t
                - \sqrt{\bar\alpha_m}\, (e^{-rh} - 1)\, x_{0,\theta}(x_t, t) \\
            D = \left(1 - \frac{1}{2r}\right) x_{0,\theta}(x_t, t) + \frac{1}{2r} x_{0,\theta}(u, m)
            \qquad \text{[DPM-Solver++ (Algorithm 1)]}

        m is halfway in t; on the integer grid a step to t - 1 has no room for it, and is of order 1.
        """
        m = self._middle(schedule, t, s)
        if m is None:
            return pred.x_0
        alpha_bar_t, alpha_bar_m = alpha_bars(schedule, t, m)
        r = h_of(schedule, t, m) / h_of(schedule, t, s)
        u = sqrt((1 - alpha_bar_m) / (1 - alpha_bar_t)) * x_t
        u = u - sqrt(alpha_bar_m) * (exp_minus_h(schedule, t, m) - 1) * pred.x_0
        return (1 - 1 / (2 * r)) * pred.x_0 + 1 / (2 * r) * evaluate(denoise, u, m).x_0

    def _2M(
        self,
        schedule: NoiseSchedule,
        t: int | float,
        s: int | float,
        pred: Prediction,
        past: list[tuple[int | float, Prediction]],
    ) -> Tensor:
        r"""Return D from this prediction and the one before, at t_1 > t.

        .. math:: r = \frac{\lambda_t - \lambda_{t_1}}{h}, \quad
            D = \left(1 + \frac{1}{2r}\right) x_{0,\theta}(t) - \frac{1}{2r} x_{0,\theta}(t_1)
            \qquad \text{[DPM-Solver++ (Algorithm 2)]}
        """
        [(t_1, pred_1)] = past
        r = h_of(schedule, t_1, t) / h_of(schedule, t, s)
        return (1 + 1 / (2 * r)) * pred.x_0 - 1 / (2 * r) * pred_1.x_0

    def _3M(
        self,
        schedule: NoiseSchedule,
        t: int | float,
        s: int | float,
        pred: Prediction,
        past: list[tuple[int | float, Prediction]],
    ) -> Tensor:
        r"""Return D from the parabola in lambda through this prediction and the two before, at t_2 > t_1 > t.

        With D_1 and D_2 the parabola's first and second derivative at lambda_t, times h and h squared,

        .. math:: D = x_{0,\theta}(t) + \frac{\varphi_2 D_1 + \varphi_3 D_2}{1 - e^{-h}}, \quad
            \varphi_2 = 1 - \frac{1 - e^{-h}}{h}, \quad \varphi_3 = \frac12 - \frac{\varphi_2}{h}
            \qquad \text{[DPM-Solver++ (3M)]}

        Here D_2 is *twice* the second divided difference; with that difference itself the order would fall to 2.
        """
        (t_2, pred_2), (t_1, pred_1) = past
        h, e = h_of(schedule, t, s), exp_minus_h(schedule, t, s)
        r_1, r_2 = h_of(schedule, t_1, t) / h, h_of(schedule, t_2, t_1) / h
        slope_1 = (pred.x_0 - pred_1.x_0) / r_1
        slope_2 = (pred_1.x_0 - pred_2.x_0) / r_2
        D_2 = 2 * (slope_1 - slope_2) / (r_1 + r_2)
        D_1 = slope_1 + r_1 / 2 * D_2
        phi_2 = 1 - (1 - e) / h
        phi_3 = 1 / 2 - phi_2 / h
        return pred.x_0 + (phi_2 * D_1 + phi_3 * D_2) / (1 - e)


def exp_minus_h(schedule: NoiseSchedule, t: int | float, s: int | float) -> float:
    """Return e^{-h} for h = lambda_s - lambda_t, from the ratio of alpha_bars: 0 where lambda_t is -infinity."""
    alpha_bar_t, alpha_bar_s = alpha_bars(schedule, t, s)
    return sqrt(alpha_bar_t * (1 - alpha_bar_s) / ((1 - alpha_bar_t) * alpha_bar_s))


def h_of(schedule: NoiseSchedule, t: int | float, s: int | float) -> float:
    """Return h = lambda_s - lambda_t, for alpha_bar_t > 0."""
    return -log(exp_minus_h(schedule, t, s))
