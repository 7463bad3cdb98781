"""Pseudo linear multistep, Adams-Bashforth in t: PNDM (Liu et al., arXiv 2202.09778)."""

from math import sqrt

from torch import Tensor

from ddpm.forward import q_sample
from ddpm.samplers.base import AdamsBashforth, Step, alpha_bars, evaluate, with_signal
from ddpm.schedules import NoiseSchedule

COEFFICIENTS = ((1,), (3 / 2, -1 / 2), (23 / 12, -16 / 12, 5 / 12), (55 / 24, -59 / 24, 37 / 24, -9 / 24))


class PLMS(AdamsBashforth):
    r"""The PLMS sampler: DDIM steps by a combination of the last predictions of eps, newest first.

    .. math:: \epsilon' = \epsilon_0, \quad \tfrac12 (3 \epsilon_0 - \epsilon_1), \quad
        \tfrac1{12} (23 \epsilon_0 - 16 \epsilon_1 + 5 \epsilon_2), \quad
        \tfrac1{24} (55 \epsilon_0 - 59 \epsilon_1 + 37 \epsilon_2 - 9 \epsilon_3)
        \qquad \text{[PNDM (Adams-Bashforth)]}

    of orders 1 to 4, and x_s = phi(x_t, eps', t, s), see `transfer`. The mixtures are those of equal steps in t; phi
    takes eps to be the same all along a step, so that of orders 2 to 4 the walk is accurate to second order, as the
    paper finds too. Order 1 is DDIM.

    Where history is missing the order is lowered accordingly, but the first step, which has none, is an improved
    Euler's: the network is evaluated at both of its ends and the mean of the two is eps'. That costs one evaluation,
    once. Published PLMS (PNDM with skip_prk_steps, which Stable Diffusion 1 names) does the same by listing its second
    time twice: over the same times, ours gives the same numbers. The paper's own start, three steps of Runge-Kutta
    (prk), is not here.

    Args:
        steps, spacing, grid, times: as in `Sampler`.
        order: 1 to 4, at most the number of steps.
    Raises:
        ValueError: another order, or one that the number of steps never reaches.
    Source: Pseudo Numerical Methods for Diffusion Models on Manifolds (arXiv 2202.09778), section 3.3.
    """

    def step(self, step: Step) -> Tensor:
        """Take a step, see `Sampler.step`; of order 2 and more, the first step evaluates a second time, at s."""
        schedule, denoise, x_t, t, s, pred, past, _ = step
        if alpha_bars(schedule, t)[0] == 0:
            return q_sample(schedule, pred.x_0, s, pred.eps)
        eps = [pred.eps, *(before.eps for _, before in reversed(with_signal(schedule, past)))]
        if len(eps) == 1 and self.order > 1:
            x_s = transfer(schedule, x_t, pred.eps, t, s)
            return transfer(schedule, x_t, (pred.eps + evaluate(denoise, x_s, s).eps) / 2, t, s)
        mixed = sum(c * eps_j for c, eps_j in zip(COEFFICIENTS[len(eps) - 1], eps, strict=True))
        assert isinstance(mixed, Tensor)
        return transfer(schedule, x_t, mixed, t, s)

    def evaluations(self, schedule: NoiseSchedule) -> int:
        """Return the evaluations, see `Sampler.evaluations`: one more than steps, if any but the last has signal."""
        starts = [t for t in self.times(schedule)[:-1] if alpha_bars(schedule, t)[0] > 0]
        last_is_data = self.times(schedule)[-1] == 0
        return super().evaluations(schedule) + (self.order > 1 and len(starts) > last_is_data)


def transfer(schedule: NoiseSchedule, x_t: Tensor, eps: Tensor, t: int | float, s: int | float) -> Tensor:
    r"""Return phi, the step from t to s with constant eps.

    .. math:: \phi(x_t, \epsilon, t, s) = \sqrt{\frac{\bar\alpha_s}{\bar\alpha_t}}\, x_t
        - \frac{\bar\alpha_s - \bar\alpha_t}{\sqrt{\bar\alpha_t} \left(\sqrt{(1 - \bar\alpha_s)\, \bar\alpha_t}
        + \sqrt{(1 - \bar\alpha_t)\, \bar\alpha_s}\right)}\, \epsilon \qquad \text{[PNDM (11)]}

    for alpha_bar_t > 0; with the eps of x_t itself it is DDIM's step.
    """
    a_t, a_s = alpha_bars(schedule, t, s)
    return sqrt(a_s / a_t) * x_t - (a_s - a_t) / (sqrt(a_t) * (sqrt((1 - a_s) * a_t) + sqrt((1 - a_t) * a_s))) * eps
