"""Linear multistep in the noise level, an Adams-Bashforth method: the LMS sampler of k-diffusion (Crowson)."""

from math import sqrt

import numpy as np
from torch import Tensor

from ddpm.forward import q_sample
from ddpm.samplers.base import AdamsBashforth, Step, alpha_bars, with_signal
from ddpm.samplers.edm import sigma_of


class LMS(AdamsBashforth):
    r"""The LMS sampler: integrate the polynomial in sigma through the last predictions of eps, one evaluation a step.

    With x_t = sqrt(alpha_bar_t) (x_0 + sigma eps), predictions j = 0 (at t), 1, 2, ... (the steps before) and k their
    number,

    .. math:: x_s = \sqrt{\bar\alpha_s} \left(\frac{x_t}{\sqrt{\bar\alpha_t}} + \sum_{j<k} c_j \epsilon_j\right), \quad
        c_j = \int_{\sigma_t}^{\sigma_s} \prod_{m \ne j} \frac{\sigma - \sigma_m}{\sigma_j - \sigma_m} \mathrm d\sigma
        \qquad \text{[k-diffusion (LMS)]}

    Where history is missing the order is lowered accordingly; order 1 is DDIM.

    Args:
        steps, spacing, grid, times: as in `Sampler`.
        order: 1 to 4, at most the number of steps.
    Raises:
        ValueError: another order, or one that the number of steps never reaches.
    Source: Hairer, Norsett, Wanner, Solving Ordinary Differential Equations I, chapter III.
    """

    def step(self, step: Step) -> Tensor:
        """Take a step, see `Sampler.step`; the c_j add up to sigma_s - sigma_t, so Euler's step is split off."""
        schedule, _, _, t, s, pred, past, _ = step
        x_s = q_sample(schedule, pred.x_0, s, pred.eps)
        past = with_signal(schedule, past)[::-1]  # newest first
        if not past:
            return x_s
        c = adams_bashforth([sigma_of(schedule, u) for u in (t, *(u for u, _ in past))], sigma_of(schedule, s))
        change = sum(c_j * (pred_j.eps - pred.eps) for c_j, (_, pred_j) in zip(c[1:], past, strict=True))
        return x_s + sqrt(alpha_bars(schedule, s)[0]) * change


def adams_bashforth(nodes: list[float], end: float) -> list[float]:
    """Return the integrals from nodes[0] to `end` of the Lagrange polynomials of 1 to 4 nodes, by exact quadrature."""
    points, weights = np.polynomial.legendre.leggauss(2)  # exact up to degree 3
    sigma, half = (nodes[0] + end) / 2 + (end - nodes[0]) / 2 * points, (end - nodes[0]) / 2
    lagrange = [
        np.prod([(sigma - other) / (node - other) for m, other in enumerate(nodes) if m != j], axis=0, initial=1.0)
        for j, node in enumerate(nodes)
    ]
    return [float(half * np.sum(weights * basis)) for basis in lagrange]
