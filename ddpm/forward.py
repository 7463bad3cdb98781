"""The forward process q, from data to noise, and the posterior of one step."""

import torch
from torch import Tensor

from ddpm.schedules import NoiseSchedule, Time, at, is_integer


def q_step(schedule: NoiseSchedule, x_s: Tensor, t: Time, eps: Tensor, s: Time | None = None) -> Tensor:
    r"""Return x_t after one step of the forward process, from t - 1 to t, or a stride from any earlier s.

    .. math:: q(x_t \mid x_{t-1}) = \mathcal N(x_t; \sqrt{1 - \beta_t}\, x_{t-1}, \beta_t I) \qquad \text{[DDPM (2)]}

    A longer stride has the same form, with alpha_bar_t / alpha_bar_s for 1 - beta_t.

    Args:
        x_s: the starting point, (B, *); x_{t-1} if s is None.
        t, s: as in `transition`.
        eps: standard normal noise, (B, *).
    Returns:
        x_t, (B, *).
    Raises:
        ValueError: as `must_be_a_step`.
    """
    must_be_a_step(t, s)
    if s is None and is_integer(t):
        beta = schedule.following(t).beta
        return at((1 - beta).sqrt(), t, x_s) * x_s + at(beta.sqrt(), t, x_s) * eps
    _, _, alpha, beta = transition(schedule, t, s)
    return at(alpha.sqrt(), ..., x_s) * x_s + at(beta.sqrt(), ..., x_s) * eps


def q_sample(schedule: NoiseSchedule, x_0: Tensor, t: Time, eps: Tensor) -> Tensor:
    r"""Return x_t at any t directly from data.

    .. math:: q(x_t \mid x_0) = \mathcal N(x_t; \sqrt{\bar\alpha_t}\, x_0, (1 - \bar\alpha_t) I)
        \qquad \text{[DDPM (4)]}

    Args:
        x_0: data, (B, *).
        t: a number or (B,), integer or real, in 0..T; t = 0 returns x_0.
        eps: standard normal noise, (B, *).
    Returns:
        x_t, (B, *).
    """
    alpha_bar_t = schedule.alpha_bar_at(t)
    return at(alpha_bar_t.sqrt(), ..., x_0) * x_0 + at((1 - alpha_bar_t).sqrt(), ..., x_0) * eps


def transition(schedule: NoiseSchedule, t: Time, s: Time | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the constants of q(x_t | x_s): one step of the forward process, or a stride of several.

    Args:
        t: a number or (B,), integer or real, in (0, T].
        s: the same, with 0 <= s < t; None for t - 1.
    Returns:
        alpha_bar_t, alpha_bar_s, alpha = alpha_bar_t / alpha_bar_s (alpha_t for s = t - 1) and beta = 1 - alpha, in
        float64, each () or (B,).
    Raises:
        ValueError: times outside 0..T, where they are numbers or on the CPU; on a GPU they
            are not checked, and the result is undefined.
    """
    schedule = schedule.following(t)
    alpha_bar_t, alpha_bar_s = schedule.alpha_bar_at(t), schedule.alpha_bar_at(t - 1 if s is None else s)
    alpha = alpha_bar_t / alpha_bar_s
    return alpha_bar_t, alpha_bar_s, alpha, 1 - alpha


def q_posterior(
    schedule: NoiseSchedule, x_0: Tensor, x_t: Tensor, t: Time, s: Time | None = None
) -> tuple[Tensor, Tensor]:
    r"""Return the mean and variance of q(x_s | x_t, x_0), for s = t - 1 or any earlier s.

    .. math::
        q(x_{t-1} \mid x_t, x_0) = \mathcal N(x_{t-1}; \tilde\mu_t(x_t, x_0), \tilde\beta_t I)
            \qquad \text{[DDPM (6)]} \\
        \tilde\mu_t(x_t, x_0) = \frac{\sqrt{\bar\alpha_{t-1}}\,\beta_t}{1 - \bar\alpha_t} x_0
            + \frac{\sqrt{\alpha_t}(1 - \bar\alpha_{t-1})}{1 - \bar\alpha_t} x_t, \quad
        \tilde\beta_t = \frac{1 - \bar\alpha_{t-1}}{1 - \bar\alpha_t} \beta_t \qquad \text{[DDPM (7)]}

    A longer stride has the same form, with alpha_bar_t / alpha_bar_s for alpha_t and alpha_bar_s for alpha_bar_{t-1}.

    Args:
        x_0, x_t: (B, *).
        t, s: as in `transition`.
    Returns:
        mu_tilde, (B, *), and the variance beta_tilde, which broadcasts against it: (B, 1, ..., 1), or (1, ..., 1) for
        a number t.
    Raises:
        ValueError: as `must_be_a_step`; at t = 0 the posterior is 0 / 0.
    """
    must_be_a_step(t, s)
    alpha_bar_t, alpha_bar_s, alpha, beta = transition(schedule.to(x_t.device), t, s)
    mu_tilde = (
        at(alpha_bar_s.sqrt() * beta / (1 - alpha_bar_t), ..., x_t) * x_0
        + at(alpha.sqrt() * (1 - alpha_bar_s) / (1 - alpha_bar_t), ..., x_t) * x_t
    )
    beta_tilde = at((1 - alpha_bar_s) / (1 - alpha_bar_t) * beta, ..., x_t)
    return mu_tilde, beta_tilde


def must_be_a_step(t: Time, s: Time | None = None) -> None:
    """Raise ValueError unless 0 <= s < t everywhere, where both are numbers or on the CPU; a GPU is not synchronised.

    Args:
        t, s: as in `transition`.
    """
    later, earlier = torch.as_tensor(t), torch.as_tensor(t - 1 if s is None else s)
    if later.device.type == earlier.device.type == "cpu" and not (right := (earlier >= 0) & (earlier < later)).all():
        pairs = torch.stack(torch.broadcast_tensors(later.double(), earlier.double()), -1)
        wrong_t, wrong_s = pairs[~right].flatten()[:2].tolist()
        raise ValueError(f"from s = {wrong_s:g} to t = {wrong_t:g}: 0 <= s < t is needed")
