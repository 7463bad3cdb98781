"""Consistency models (Song et al., arXiv 2303.01469), with the training of Song & Dhariwal (iCT, arXiv 2310.14189)."""

import math

import torch
from einops import reduce
from torch import Tensor

from ddpm.schedules import Time
from ddpm.targets import Denoise

TARGETS = ("v", "flow")  # whose x_0 is x_t itself at t = 0


def consistency(denoise: Denoise, x_t: Tensor, t: Time) -> Tensor:
    r"""Return the consistency function f(x_t, t): the end of the probability flow through x_t, (B, *).

    .. math:: f(x_t, t) = f(x_s, s) \text{ along the flow}, \quad f(x_0, 0) = x_0 \qquad \text{[CM (boundary)]}

    It is the predicted x_0 of a network of target v or flow, or with EDM's preconditioning, which at t = 0 is x_t
    whatever the network outputs: c_skip is 1 there, and c_out 0. (With v they are those of EDM for data of variance 1.)

    Args:
        denoise: the network's prediction, not clipped.
        t: numbers or (B,), in [0, T].
    """
    return denoise(x_t, t).x_0


def pseudo_huber(x: Tensor, y: Tensor, c: float = 0.00054) -> Tensor:
    r"""Return a distance that is quadratic for close x and y, and grows linearly for distant ones.

    .. math:: d(x, y) = \sqrt{\|x - y\|_2^2 + c^2} - c, \quad c = 0.00054 \sqrt d \qquad \text{[iCT (pseudo-Huber)]}

    Args:
        x, y: (B, *), of d numbers a row.
        c: per square root of d.
    Returns:
        (B,).
    """
    squared, c = reduce((x - y) ** 2, "b ... -> b", "sum"), c * math.sqrt(x[0].numel())
    return (squared + c**2).sqrt() - c


def curriculum(progress: float, s_0: int, s_1: int) -> int:
    r"""Return the number of steps between noise and data, doubled at even intervals of training.

    .. math:: N(k) = \min\left(s_0 2^{\lfloor k / K' \rfloor}, s_1\right), \quad
        K' = \left\lfloor \frac{K}{\log_2 \lfloor s_1 / s_0 \rfloor + 1} \right\rfloor \qquad \text{[iCT (curriculum)]}

    Args:
        progress: k / K, 0..1.
        s_0, s_1: steps in the beginning and in the end.
    """
    doublings = math.floor(progress * (math.log2(s_1 // s_0) + 1))
    return min(s_0 * 2**doublings, s_1)


def lognormal(sigma: Tensor, P_mean: float = -1.1, P_std: float = 2.0) -> Tensor:
    r"""Return the probability of training each pair of neighbouring noise levels: a lognormal density, binned.

    .. math:: p(\sigma_i) \propto \operatorname{erf}\frac{\log \sigma_{i+1} - P_\text{mean}}{\sqrt 2 P_\text{std}}
        - \operatorname{erf}\frac{\log \sigma_i - P_\text{mean}}{\sqrt 2 P_\text{std}} \qquad \text{[iCT (lognormal)]}

    Args:
        sigma: rising levels, (N + 1,), > 0.
    Returns:
        (N,), which add up to 1.
    """
    p = torch.erf((sigma.log() - P_mean) / (math.sqrt(2) * P_std)).diff()
    return p / p.sum()
