"""Langevin dynamics: sampling from p by noisy steps along its score."""

from collections.abc import Callable

import torch
from torch import Tensor

from ddpm.score.objectives import Score, half_square, of_rows


def unadjusted(score: Score, x: Tensor, h: float | Tensor, noise: Tensor) -> Tensor:
    r"""Take one step of Langevin dynamics, without a Metropolis correction.

    .. math:: x' = x + \frac h2 \nabla_x \log p(x) + \sqrt h\, z \qquad \text{[Langevin (step)]}

    Repeated, it draws from p for h -> 0 alone: on N(0, s^2) from a Gaussian of variance s^2 / (1 - h / (4 s^2)), for
    h < 4 s^2, and beyond that from nothing.

    Args:
        score: of p.
        x: (B, *).
        h: step > 0, a number or (B,).
        noise: z, standard normal, (B, *).
    Returns:
        x', (B, *).
    Raises:
        ValueError: h <= 0.
    Source: Generative Modeling by Estimating Gradients of the Data Distribution (arXiv 1907.05600), section 2.2.
    """
    h = of_rows("h", h, x)
    return x + h / 2 * score(x) + h.sqrt() * noise


def log_acceptance(
    score: Score, log_prob: Callable[[Tensor], Tensor], x: Tensor, y: Tensor, h: float | Tensor
) -> Tensor:
    r"""Return the log acceptance ratio of a proposed step from x to y.

    .. math:: \log r(x, y) = \log \frac{p(y)\, q(x \mid y)}{p(x)\, q(y \mid x)}, \quad
        q(y \mid x) = \mathcal N\left(y; x + \tfrac h2 \nabla_x \log p(x), h I\right)
        \qquad \text{[MALA (acceptance)]}

    Accepting with probability min(1, r) makes x -> y as frequent as y -> x under p, which then stays as it is.

    Args:
        score, log_prob: of p, (B, *) -> (B, *) and (B,); p need not be normalised.
        x, y: (B, *).
        h: step > 0, a number or (B,).
    Returns:
        log r, (B,).
    Raises:
        ValueError: h <= 0.
    Source: Exponential Convergence of Langevin Distributions (Roberts & Tweedie, 1996).
    """
    h = of_rows("h", h, x)
    back, forth = (x - y - h / 2 * score(y)) / h.sqrt(), (y - x - h / 2 * score(x)) / h.sqrt()
    return log_prob(y) - log_prob(x) + half_square(forth) - half_square(back)


def adjusted(
    score: Score,
    log_prob: Callable[[Tensor], Tensor],
    x: Tensor,
    h: float | Tensor,
    noise: Tensor,
    uniform: Tensor,
) -> tuple[Tensor, Tensor]:
    """Take one step of the Metropolis-adjusted Langevin algorithm, which leaves p unchanged for any h.

    The proposal of `unadjusted`, accepted where the uniform number is below r (`log_acceptance`); elsewhere x stays.

    Args:
        score, log_prob: of p, (B, *) -> (B, *) and (B,); p need not be normalised.
        x: (B, *).
        h: step > 0, a number or (B,).
        noise: standard normal, (B, *).
        uniform: in [0, 1), (B,).
    Returns:
        x', (B, *), and whether the step was accepted, (B,).
    Raises:
        ValueError: h <= 0.
    """
    y = unadjusted(score, x, h, noise)
    accepted = uniform.log() < log_acceptance(score, log_prob, x, y, h)
    return torch.where(accepted.reshape(-1, *[1] * (x.ndim - 1)), y, x), accepted
