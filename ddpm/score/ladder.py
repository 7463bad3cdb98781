"""Conversions between noise levels sigma and times t, and between score and predicted eps."""

import torch
from torch import Tensor

from ddpm.schedules import NoiseSchedule, Time, at
from ddpm.score.objectives import of_rows


def noise_level(schedule: NoiseSchedule, t: Time) -> Tensor:
    r"""Return the noise in x_t relative to the data that is left in it.

    .. math:: \sigma_t = \sqrt{\frac{1 - \bar\alpha_t}{\bar\alpha_t}} = e^{-\lambda_t}
        \qquad \text{[NCSN (noise level)]}

    Args:
        t: a number or (B,), integer or real, in [0, T].
    Returns:
        () or (B,), float64; 0 at t = 0, infinite where alpha_bar_t = 0.
    """
    return torch.exp(-schedule.lambda_at(t))


def score_from_eps(schedule: NoiseSchedule, eps: Tensor, t: Time) -> Tensor:
    r"""Return the score of q(x_t), given a prediction of the noise in x_t.

    .. math:: \nabla_{x_t} \log q(x_t) = -\frac{E[\epsilon \mid x_t]}{\sqrt{1 - \bar\alpha_t}}
        \qquad \text{[Tweedie (score from eps)]}

    Args:
        eps: predicted at x_t, (B, *).
        t: a number or (B,), integer or real, in (0, T].
    Returns:
        (B, *).
    """
    return -eps / at((1 - schedule.alpha_bar_at(t)).sqrt(), ..., eps)


def eps_from_score(schedule: NoiseSchedule, score: Tensor, t: Time) -> Tensor:
    """Return the noise in x_t, given the score of q(x_t): `score_from_eps`, solved for eps."""
    return -at((1 - schedule.alpha_bar_at(t)).sqrt(), ..., score) * score


def score_at_sigma(eps: Tensor, sigma: float | Tensor) -> Tensor:
    r"""Return the score of data with noise of level sigma, at x_t / sqrt(alpha_bar_t) = x_0 + sigma eps.

    .. math:: \nabla_x \log p_\sigma(x) = -\frac{E[\epsilon \mid x]}{\sigma}, \quad
        x = \frac{x_t}{\sqrt{\bar\alpha_t}} \qquad \text{[Tweedie (score at sigma)]}

    Args:
        eps: predicted at x_t, (B, *).
        sigma: > 0, a number or (B,), as returned by `noise_level`.
    Returns:
        (B, *).
    Raises:
        ValueError: sigma <= 0.
    """
    return -eps / of_rows("sigma", sigma, eps)
