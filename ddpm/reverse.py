"""The reverse process p_theta: its mean, and its variance between beta_tilde and beta."""

import torch
from torch import Tensor

from ddpm.forward import must_be_a_step, q_posterior, transition
from ddpm.schedules import NoiseSchedule, Time, at
from ddpm.targets import Prediction

VARIANCES = {"beta_tilde": 0.0, "beta": 1.0}  # the frac of iDDPM (15) that each name stands for


def mu_theta(schedule: NoiseSchedule, pred: Prediction, x_t: Tensor, t: Time, s: Time | None = None) -> Tensor:
    r"""Return the mean of p_theta(x_s | x_t): that of the forward posterior, at the predicted x_0.

    .. math:: \mu_\theta(x_t, t) = \tilde\mu_t\left(x_t, x_{0,\theta}\right)
        = \frac{1}{\sqrt{\alpha_t}} \left( x_t - \frac{\beta_t}{\sqrt{1 - \bar\alpha_t}} \epsilon_\theta \right)
        \qquad \text{[DDPM (11)]}

    The first form is computed: it also holds where alpha_t = 0.

    Args:
        x_t: (B, *).
        t, s: as in `q_posterior`.
    Returns:
        (B, *).
    """
    mu_tilde, _ = q_posterior(schedule, pred.x_0, x_t, t, s)
    return mu_tilde


def variance(schedule: NoiseSchedule, pred: Prediction, x_t: Tensor, t: Time, s: Time | None = None) -> Tensor:
    r"""Return the variance of p_theta(x_s | x_t), interpolated in the logarithm by frac.

    .. math:: \Sigma_\theta(x_t, t) = \exp(v \log \beta_t + (1 - v) \log \tilde\beta_t) \qquad \text{[iDDPM (15)]}

    Here v is `pred.frac`: 0 is beta_tilde_t, the posterior variance of a single point; 1 is beta_t, that of data with
    unit variance (DDPM, section 3.2). At s = 0, where beta_tilde is 0 and no sampler draws noise, beta_tilde_2 stands
    in for it, so that L_0 is finite.

    Returns:
        sigma_t squared; it broadcasts against x_t, (B, *).
    Raises:
        ValueError: as `ddpm.forward.must_be_a_step`.
    """
    must_be_a_step(t, s)
    schedule = schedule.to(x_t.device).following(t)
    alpha_bar_t, alpha_bar_s, _, beta = transition(schedule, t, s)
    beta_tilde = (1 - alpha_bar_s) / (1 - alpha_bar_t) * beta
    beta_tilde = torch.where(alpha_bar_s == 1, schedule.beta_tilde[2] if schedule.T > 1 else beta, beta_tilde)
    v = pred.frac
    log_ratio = at((beta_tilde / beta).log(), ..., x_t)  # cast last: two logarithms in float32 would lose digits
    return at(beta, ..., x_t) * ((1 - v) * log_ratio).exp()
