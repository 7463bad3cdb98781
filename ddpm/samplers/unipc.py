"""Unified predictor-corrector sampling: UniPC (Zhao et al., arXiv 2302.04867)."""

from collections.abc import Sequence
from math import sqrt

import numpy as np
from torch import Tensor

from ddpm.checks import check_one_of
from ddpm.samplers.base import Sampler, Step, alpha_bars, check_order, with_signal
from ddpm.samplers.dpm_solver import exp_minus_h, h_of
from ddpm.schedules import NoiseSchedule
from ddpm.targets import Prediction


class UniPC(Sampler):
    r"""The UniPC sampler: UniP-p predicts x_s; UniC-p corrects it with the prediction at s, which the next step needs.

    With h = lambda_s - lambda_t, other points u_m, r_m = (lambda_{u_m} - lambda_t) / h and
    D_m = x_{0,theta}(u_m) - x_{0,theta}(t),

    .. math:: x_s = \sqrt{\frac{1 - \bar\alpha_s}{1 - \bar\alpha_t}}\, x_t - \sqrt{\bar\alpha_s}\, (e^{-h} - 1)\,
        x_{0,\theta}(t) + \sqrt{\bar\alpha_s}\, B(h) \sum_m \frac{a_m}{r_m} D_m
        \qquad \text{[UniPC (data prediction)]}

    The predictor's points are the p - 1 predictions before t; the corrector has s besides. The order of accuracy is
    p + 1, for one evaluation a step.

    Args:
        steps, spacing, grid, times: as in `Sampler`.
        order: p, 1 to 3, at most the number of steps. Where history is missing it is lowered accordingly.
        variant: B(h) is h for "bh1", 1 - e^{-h} for "bh2".
        corrector: False leaves UniP alone; with "bh2" that is DPM-Solver++.
    Raises:
        ValueError: another order, one that the number of steps never reaches, or an unknown variant.
    """

    def __init__(
        self,
        steps: int | None = 20,
        order: int = 2,
        variant: str = "bh2",
        corrector: bool = True,
        spacing: str = "uniform",
        grid: str = "integer",
        times: Sequence[int | float] | None = None,
    ):
        super().__init__(steps, spacing, grid, times)
        check_order(order, (1, 2, 3), self.steps)
        check_one_of("variant", variant, ("bh1", "bh2"))
        self.order, self.variant, self.corrector, self.history = order, variant, corrector, order

    def step(self, step: Step) -> Tensor:
        """Take a step, see `Sampler.step`: x_t is corrected first, then x_s predicted from it.

        Predictor and corrector of a step differ in their sum alone, so x before that step need not be stored.
        """
        schedule, _, x_t, t, s, pred, past, _ = step
        past = with_signal(schedule, past)
        alpha_bar_t, alpha_bar_s = alpha_bars(schedule, t, s)
        if past and self.corrector:
            *earlier, (u, pred_u) = past
            predicted = self._sum(schedule, u, t, pred_u, earlier)
            corrected = self._sum(schedule, u, t, pred_u, [*earlier, (t, pred)])
            x_t = x_t + sqrt(alpha_bar_t) * (corrected - predicted)
        x_s = sqrt((1 - alpha_bar_s) / (1 - alpha_bar_t)) * x_t
        x_s = x_s - sqrt(alpha_bar_s) * (exp_minus_h(schedule, t, s) - 1) * pred.x_0
        before = past[max(0, len(past) - self.order + 1) :]
        return x_s + sqrt(alpha_bar_s) * self._sum(schedule, t, s, pred, before)

    def _sum(
        self,
        schedule: NoiseSchedule,
        t: int | float,
        s: int | float,
        pred: Prediction,
        points: list[tuple[int | float, Prediction]],
    ) -> Tensor | float:
        r"""Return B(h) times the sum over points of a_m D_m / r_m, with n = len(points) coefficients that solve

        .. math:: \sum_m r_m^{k-1} a_m = \frac{1}{B(h)} \int_0^1 h\, e^{-(1 - u) h} u^k\, \mathrm du, \quad k = 1..n
            \qquad \text{[UniPC (coefficients)]}

        and a_1 = 1/2 where n = 1, which solves it to the order that counts.
        """
        if not points:
            return 0.0
        h, e = h_of(schedule, t, s), exp_minus_h(schedule, t, s)
        B = h if self.variant == "bh1" else 1 - e
        r = np.array([h_of(schedule, t, u) / h for u, _ in points])
        a = np.array([0.5])
        if len(points) > 1:
            integrals = [1 - e]
            for k in range(1, len(points) + 1):
                integrals.append(1 - k / h * integrals[-1])  # by parts
            a = np.linalg.solve(np.vander(r, increasing=True).T, np.array(integrals[1:]) / B)
        D = (pred_m.x_0 - pred.x_0 for _, pred_m in points)
        return sum(float(B * a_m / r_m) * D_m for a_m, r_m, D_m in zip(a, r, D, strict=True))
