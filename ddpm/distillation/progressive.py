"""Progressive distillation (Salimans & Ho, arXiv 2202.00512): a student takes one step where its teacher takes two."""

import torch
from torch import Tensor

from ddpm.forward import q_sample
from ddpm.schedules import NoiseSchedule, Time, at
from ddpm.targets import Denoise


@torch.no_grad()
def one_step_for_two(schedule: NoiseSchedule, teacher: Denoise, x_t: Tensor, t: Time, u: Time, s: Time) -> Tensor:
    r"""Return the x_0 by which one DDIM step from t arrives where two of the teacher do, from t to u and from u to s.

    .. math:: \tilde x = \frac{x_s - (b_s / b_t)\, x_t}{a_s - (b_s / b_t)\, a_t}, \quad
        a = \sqrt{\bar\alpha}, \quad b = \sqrt{1 - \bar\alpha} \qquad \text{[PD (Algorithm 2)]}

    where x_s is the teacher's. Along DDIM x / b moves by x_0 times the change of a / b, so this is a mean of the
    teacher's two predictions, which is accurate even where the three times lie close together:

    .. math:: \tilde x = w\, x_0(x_t, t) + (1 - w)\, x_0(x_u, u), \quad
        w = \frac{e^{\lambda_u} - e^{\lambda_t}}{e^{\lambda_s} - e^{\lambda_t}}, \quad e^\lambda = \frac ab
        \qquad \text{[PD (mean of two)]}

    Args:
        teacher: its prediction, clipped where its own steps are.
        x_t: (B, *).
        t, u, s: numbers or (B,), integer or real, 0 <= s < u < t <= T.
    Returns:
        (B, *).
    """
    first = teacher(x_t, t)
    second = teacher(q_sample(schedule, first.x_0, u, first.eps), u)
    ratio_t, ratio_u, ratio_s = (schedule.lambda_at(time).exp() for time in (t, u, s))
    w = at((ratio_u - ratio_t) / (ratio_s - ratio_t), ..., x_t)
    return w * first.x_0 + (1 - w) * second.x_0
