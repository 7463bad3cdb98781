"""Prediction targets and their conversions: eps, x_0, v and the flow's u are equivalent predictions."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from ddpm.schedules import NoiseSchedule, Time, at

TARGETS = ("eps", "x_0", "v", "flow")


@dataclass(frozen=True)
class Prediction:
    """A denoiser's prediction at x_t.

    Args:
        eps: the noise in x_t, (B, *).
        x_0: the data in x_t, (B, *); x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) eps holds for the pair.
        frac: the reverse variance between beta_tilde (0) and beta (1), the v of iDDPM (15): a number, or (B, *).
        target: the network's own target, one of `TARGETS`.
    """

    eps: Tensor
    x_0: Tensor
    frac: float | Tensor = 0.0
    target: str = "eps"


Denoise = Callable[[Tensor, Time], Prediction]
"""(x_t (B, *), t: a number or (B,)) -> Prediction: the interface of a network to samplers."""


class Pair(NamedTuple):
    """Predictions of the same x_t with a condition and without."""

    conditional: Denoise
    unconditional: Denoise
    both: Callable[[Tensor, Time], tuple[Prediction, Prediction]]
    """Both predictions at once."""


def x_0_from_eps(schedule: NoiseSchedule, x_t: Tensor, t: Time, eps: Tensor) -> Tensor:
    r"""Return the data in x_t, given the noise.

    .. math:: x_0 = \frac{x_t - \sqrt{1 - \bar\alpha_t}\, \epsilon}{\sqrt{\bar\alpha_t}} \qquad \text{[DDPM (15)]}
    """
    alpha_bar_t = schedule.alpha_bar_at(t)
    return (x_t - at((1 - alpha_bar_t).sqrt(), ..., x_t) * eps) / at(alpha_bar_t.sqrt(), ..., x_t)


def eps_from_x_0(schedule: NoiseSchedule, x_t: Tensor, t: Time, x_0: Tensor) -> Tensor:
    r"""Return the noise in x_t, given the data: DDPM (15) solved for eps; t > 0."""
    alpha_bar_t = schedule.alpha_bar_at(t)
    return (x_t - at(alpha_bar_t.sqrt(), ..., x_t) * x_0) / at((1 - alpha_bar_t).sqrt(), ..., x_t)


def velocity(schedule: NoiseSchedule, pred: Prediction, t: Time) -> Tensor:
    r"""Return v, the derivative of x_t with respect to the angle whose cosine is sqrt(alpha_bar_t).

    .. math:: v = \sqrt{\bar\alpha_t}\, \epsilon - \sqrt{1 - \bar\alpha_t}\, x_0 \qquad \text{[PD (App. D)]}

    Source: Progressive Distillation (Salimans & Ho, arXiv 2202.00512), appendix D.
    """
    alpha_bar_t = schedule.alpha_bar_at(t)
    return at(alpha_bar_t.sqrt(), ..., pred.eps) * pred.eps - at((1 - alpha_bar_t).sqrt(), ..., pred.x_0) * pred.x_0


def x_0_from_v(schedule: NoiseSchedule, x_t: Tensor, t: Time, v: Tensor) -> Tensor:
    r"""Return the data in x_t, given v.

    .. math:: x_0 = \sqrt{\bar\alpha_t}\, x_t - \sqrt{1 - \bar\alpha_t}\, v \qquad \text{[PD (x from v)]}
    """
    alpha_bar_t = schedule.alpha_bar_at(t)
    return at(alpha_bar_t.sqrt(), ..., x_t) * x_t - at((1 - alpha_bar_t).sqrt(), ..., x_t) * v


def eps_from_v(schedule: NoiseSchedule, x_t: Tensor, t: Time, v: Tensor) -> Tensor:
    r"""Return the noise in x_t, given v.

    .. math:: \epsilon = \sqrt{1 - \bar\alpha_t}\, x_t + \sqrt{\bar\alpha_t}\, v \qquad \text{[PD (eps from v)]}
    """
    alpha_bar_t = schedule.alpha_bar_at(t)
    return at((1 - alpha_bar_t).sqrt(), ..., x_t) * x_t + at(alpha_bar_t.sqrt(), ..., x_t) * v


def straight_path(schedule: NoiseSchedule, x_t: Tensor, t: Time) -> tuple[Tensor, Tensor]:
    r"""Return x_t rescaled to the straight line from data to noise, and its position on that line.

    .. math:: \frac{x_t}{a + b} = (1 - \tau)\, x_0 + \tau\, \epsilon, \quad \tau = \frac{b}{a + b}, \quad
        a = \sqrt{\bar\alpha_t}, \quad b = \sqrt{1 - \bar\alpha_t} \qquad \text{[FM (straight path)]}

    Its velocity in tau is u = eps - x_0, what a network of flow matching predicts. Every schedule follows this line, at
    its own pace: a step of DDIM is an Euler step along it.

    Args:
        x_t: (B, *).
        t: a number or (B,), integer or real, in [0, T].
    Returns:
        x_t / (a + b), (B, *), and tau in [0, 1], which broadcasts against it.
    Source: Flow Matching (Lipman et al., arXiv 2210.02747); Rectified Flow (Liu et al., arXiv 2209.03003). There t = 1
        is data, and the velocity is x_0 - eps.
    """
    a, b = _a_b(schedule, x_t, t)
    return x_t / (a + b), b / (a + b)


def x_0_from_u(schedule: NoiseSchedule, x_t: Tensor, t: Time, u: Tensor) -> Tensor:
    r"""Return the data in x_t, given the velocity u of the straight path.

    .. math:: x_0 = \frac{x_t - b u}{a + b} \qquad \text{[FM (x from u)]}
    """
    a, b = _a_b(schedule, x_t, t)
    return (x_t - b * u) / (a + b)


def eps_from_u(schedule: NoiseSchedule, x_t: Tensor, t: Time, u: Tensor) -> Tensor:
    r"""Return the noise in x_t, given the velocity u of the straight path.

    .. math:: \epsilon = \frac{x_t + a u}{a + b} \qquad \text{[FM (eps from u)]}
    """
    a, b = _a_b(schedule, x_t, t)
    return (x_t + a * u) / (a + b)


def _a_b(schedule: NoiseSchedule, x_t: Tensor, t: Time) -> tuple[Tensor, Tensor]:
    """Return sqrt(alpha_bar_t) and sqrt(1 - alpha_bar_t), which broadcast against x_t."""
    alpha_bar_t = schedule.alpha_bar_at(t)
    return at(alpha_bar_t.sqrt(), ..., x_t), at((1 - alpha_bar_t).sqrt(), ..., x_t)


def to_prediction(
    schedule: NoiseSchedule, target: str, output: Tensor, x_t: Tensor, t: Time, frac: float | Tensor = 0.0
) -> Prediction:
    """Convert the network's output, which is eps, x_0, v or u by `target`, to a prediction in every coordinate.

    Args:
        target: one of `TARGETS`; "flow" is u.
        output, x_t: (B, *).
        t: a number or (B,), integer or real, in (0, T].
    """
    if target == "eps":
        return Prediction(output, x_0_from_eps(schedule, x_t, t, output), frac, target)
    if target == "x_0":
        return Prediction(eps_from_x_0(schedule, x_t, t, output), output, frac, target)
    eps_from, x_0_from = {"v": (eps_from_v, x_0_from_v), "flow": (eps_from_u, x_0_from_u)}[target]
    return Prediction(eps_from(schedule, x_t, t, output), x_0_from(schedule, x_t, t, output), frac, target)


def from_prediction(schedule: NoiseSchedule, target: str, pred: Prediction, t: Time) -> Tensor:
    """Return the value of `target` in a prediction; for the true (eps, x_0) it is the training target, (B, *)."""
    if target == "v":
        return velocity(schedule, pred, t)
    return {"eps": lambda: pred.eps, "x_0": lambda: pred.x_0, "flow": lambda: pred.eps - pred.x_0}[target]()
