"""Classifier-free guidance and autoguidance: combinations of two predictions."""

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ddpm.schedules import NoiseSchedule, Time, at
from ddpm.targets import Denoise, Pair, Prediction, from_prediction, to_prediction


def classifier_free(
    conditional: Denoise | Pair,
    unconditional: Denoise | None = None,
    w: float = 1.0,
    *,
    schedule: NoiseSchedule | None = None,
    rescale: float = 0.0,
    interval: tuple[float, float] | None = None,
) -> Denoise:
    r"""Return the conditional prediction, extrapolated from the unconditional one by the weight w.

    .. math:: \epsilon_w = \epsilon_\theta(x_t) + w \left(\epsilon_\theta(x_t, y) - \epsilon_\theta(x_t)\right)
        \qquad \text{[CFG (6)]}

    w = 0 and w = 1 are the two predictions themselves, bit for bit. The paper counts from 1: its weight is w - 1. x_0
    and v are affine in eps, with the same coefficients for both, so each is combined in the same way.

    Args:
        conditional: a raw prediction, before the clip; or both, evaluated at once: `GaussianDiffusion.pair`.
        unconditional: the other one; None with a pair.
        w: the weight, any finite number.
        schedule: for `rescale`, and for an interval in log-SNR.
        rescale: phi in [0, 1], how far the standard deviation of the guided prediction over an image, in the network's
            own target, is brought back to that of the conditional one, which a large w exceeds:

            .. math:: y_\phi = \phi\, \frac{\operatorname{std}(y_c)}{\operatorname{std}(y_w)}\, y_w + (1 - \phi)\, y_w
                \qquad \text{[Lin (16)]}
        interval: (low, high) within which it is guided; elsewhere the conditional prediction is used alone, and costs
            half. Of the log-SNR where a schedule is given, else of t.
    Returns:
        A raw prediction. Its frac is that of the conditional one.
    Raises:
        ValueError: an argument out of range, a rescale without a schedule.
    Source: Classifier-Free Diffusion Guidance (Ho & Salimans, arXiv 2207.12598); rescale: Common Diffusion Noise
        Schedules (Lin et al., arXiv 2305.08891), section 3.4; interval: Kynkäänniemi et al., arXiv 2404.07724.
    """
    if isinstance(conditional, Pair) and unconditional is not None:
        raise ValueError("a pair has its own unconditional prediction: give no other")
    pair = conditional if isinstance(conditional, Pair) else _pair(conditional, unconditional)
    must_be_settings(w, rescale, interval)
    if rescale and schedule is None:
        raise ValueError(f"rescale = {rescale:g} acts on the network's own target, and needs the schedule")
    if w == 1 or (w == 0 and interval is None):
        return pair.conditional if w == 1 else pair.unconditional

    def guide(x_t: Tensor, t: Time) -> Prediction:
        inside = torch.ones((), dtype=torch.bool) if interval is None else _inside(interval, schedule, t)
        if not inside.any():
            return pair.conditional(x_t, t)
        if w == 0 and inside.all():
            return pair.unconditional(x_t, t)
        c, u = pair.both(x_t, t)
        eps_w = u.eps + w * (c.eps - u.eps)
        guided = replace(c, eps=eps_w, x_0=u.x_0 + w * (c.x_0 - u.x_0))
        if rescale and schedule is not None:
            guided = _rescaled(schedule, guided, c, x_t, t, rescale)
        return guided if inside.all() else _where(inside, guided, c)

    return guide


def autoguidance(good: Denoise, bad: Denoise, w: float) -> Denoise:
    r"""Return a network's prediction, moved away from that of a worse version of it: smaller, or less trained.

    .. math:: D_w(x; \sigma, c) = w\, D_1(x; \sigma, c) + (1 - w)\, D_0(x; \sigma, c) \qquad \text{[AutoGuidance (4)]}

    Args:
        good, bad: raw predictions for the same condition.
        w: the weight; 1 is `good` and 0 `bad`, bit for bit.
    Returns:
        A raw prediction.
    Raises:
        ValueError: a w that is not finite.
    Source: Guiding a Diffusion Model with a Bad Version of Itself (Karras et al., arXiv 2406.02507).
    """
    return classifier_free(good, bad, w)


def _pair(conditional: Denoise, unconditional: Denoise | None) -> Pair:
    if unconditional is None:
        raise ValueError("the unconditional prediction is missing; a pair of both may be given in place of the two")

    def both(x_t: Tensor, t: Time) -> tuple[Prediction, Prediction]:
        return conditional(x_t, t), unconditional(x_t, t)

    return Pair(conditional, unconditional, both)


def _rescaled(
    schedule: NoiseSchedule, guided: Prediction, c: Prediction, x_t: Tensor, t: Time, rescale: float
) -> Prediction:
    y_c, y_w = (from_prediction(schedule, c.target, pred, t) for pred in (c, guided))
    std_c, std_w = (y.flatten(1).std(1, correction=0) for y in (y_c, y_w))
    ratio = torch.where(std_w > 0, std_c / std_w, 1)  # 0 for a constant picture
    factor = rescale * ratio + (1 - rescale)
    return to_prediction(schedule, c.target, at(factor, ..., y_w) * y_w, x_t, t, c.frac)


def _inside(interval: tuple[float, float], schedule: NoiseSchedule | None, t: Time) -> Tensor:
    """Return whether times lie within the interval, () or (B,)."""
    at_t = torch.as_tensor(t) if schedule is None else 2 * schedule.lambda_at(t)
    return (interval[0] <= at_t) & (at_t <= interval[1])


def _where(inside: Tensor, one: Prediction, other: Prediction) -> Prediction:
    """Return, row by row, one prediction or the other."""
    rows = at(inside, ..., one.eps).bool()
    return replace(one, eps=one.eps.where(rows, other.eps), x_0=one.x_0.where(rows, other.x_0))


def must_be_settings(w: float, rescale: float = 0.0, interval: Sequence[float] | None = None) -> None:
    """Raise ValueError for a weight, a rescale or an interval out of range, see `classifier_free`."""
    if isinstance(w, bool) or not isinstance(w, int | float) or not math.isfinite(w):
        raise ValueError(f"w = {w!r} must be a finite number")
    if not 0 <= rescale <= 1:
        raise ValueError(f"rescale = {rescale!r} must lie in [0, 1]")
    if interval is not None and not (len(interval) == 2 and interval[0] < interval[1]):
        raise ValueError(f"interval = {interval!r} must be (low, high) with low < high")
