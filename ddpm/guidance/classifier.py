"""Classifier guidance."""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from ddpm.guidance.classifier_free import must_be_settings
from ddpm.schedules import NoiseSchedule, Time, at
from ddpm.targets import Denoise, Prediction, x_0_from_eps


def classifier(
    schedule: NoiseSchedule, denoise: Denoise, log_prob: Callable[[Tensor, Time], Tensor], w: float
) -> Denoise:
    r"""Return the prediction shifted by the gradient of a classifier's log probability at x_t.

    .. math:: \hat\epsilon(x_t) = \epsilon_\theta(x_t)
        - w \sqrt{1 - \bar\alpha_t}\, \nabla_{x_t} \log p_\phi(y \mid x_t) \qquad \text{[ADM (14)]}

    For the exact p(y | x_t), w = 1 is the exact conditional prediction, and any w the same as `classifier_free`. Where
    alpha_bar_t = 0, x_t does not depend on y, nor eps on x_0: there the prediction is unchanged.

    Args:
        denoise: a raw prediction, before the clip.
        log_prob: (x_t (B, *), t) -> log p(y | x_t), (B,), of the requested class of each row; differentiable.
        w: the weight, any finite number; 0 is `denoise` itself.
    Returns:
        A raw prediction.
    Raises:
        ValueError: a w that is not finite.
    Source: Diffusion Models Beat GANs on Image Synthesis (Dhariwal & Nichol, arXiv 2105.05233), algorithm 2.
    """
    must_be_settings(w)
    if w == 0:
        return denoise

    def guide(x_t: Tensor, t: Time) -> Prediction:
        pred = denoise(x_t, t)
        with torch.enable_grad():
            x = x_t.detach().requires_grad_()
            (gradient,) = torch.autograd.grad(log_prob(x, t).sum(), x)
        alpha_bar = schedule.alpha_bar_at(t).to(x_t.device)
        eps = pred.eps - w * at((1 - alpha_bar).sqrt(), ..., x_t) * gradient
        x_0 = x_0_from_eps(schedule, x_t, t, eps)
        known = at(alpha_bar > 0, ..., x_t).bool()
        return replace(pred, eps=eps.where(known, pred.eps), x_0=x_0.where(known, pred.x_0))

    return guide
