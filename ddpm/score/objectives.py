"""Score matching objectives, which train a function s to be the gradient of log p for unknown p.

Every objective is half a squared norm, one number a row of x. Averaged over x ~ p, each is the explicit one plus a
number that does not depend on s; its minimiser is the score. Noise and projections are arguments.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ddpm.likelihood import rademacher
from ddpm.schedules import at

Score = Callable[[Tensor], Tensor]
"""x (B, *) -> s(x), (B, *); row i of it depends on row i of x alone. A network without batch statistics is one."""

PROJECTIONS: dict[str, Callable[[Tensor], Tensor]] = {"rademacher": rademacher, "gaussian": lambda eps: eps}
"""Directions v of mean 0 and covariance I, computed from standard normal noise, (B, *)."""


def explicit(score: Score, x: Tensor, target: Tensor) -> Tensor:
    r"""Return half the squared distance of s from a known score.

    .. math:: \tfrac12 \left\| s(x) - \nabla_x \log p(x) \right\|^2 \qquad \text{[Hyvarinen (explicit)]}

    Args:
        score: s.
        x: (B, *).
        target: the score of p at x, (B, *).
    Returns:
        (B,).
    Raises:
        ValueError: shapes that differ, or x without features.
    Source: Estimation of Non-Normalized Statistical Models by Score Matching (Hyvarinen, JMLR 2005).
    """
    _must_have_features(x)
    _must_fit("target", target, x)
    return half_square(_answer(score(x), x) - target)


def implicit(score: Score, x: Tensor) -> Tensor:
    r"""Return the implicit score matching objective: the explicit one by partial integration, without the score of p.

    .. math:: \operatorname{tr} \frac{\partial s}{\partial x} + \tfrac12 \| s(x) \|^2
        \qquad \text{[Hyvarinen (implicit)]}

    On average over x ~ p it is the explicit one minus E || grad log p ||^2 / 2. The trace is exact: one derivative of s
    in forward mode for each dimension of x, which only few dimensions allow.

    Args:
        score: s, differentiable.
        x: (B, *).
    Returns:
        (B,).
    Raises:
        ValueError: x without features.
    Source: Hyvarinen, JMLR 2005.
    """
    _must_have_features(x)
    trace = x.new_zeros(len(x))
    for e in torch.eye(x.shape[1:].numel(), dtype=x.dtype, device=x.device):
        s, ds = _along(score, x, e.reshape(x.shape[1:]).expand_as(x))
        trace = trace + ds.flatten(1) @ e
    return trace + half_square(s)


def sliced(score: Score, x: Tensor, v: Tensor) -> Tensor:
    r"""Return the sliced objective: the implicit one along one direction, by a single derivative in any dimension.

    .. math:: v^T \frac{\partial s}{\partial x} v + \tfrac12 \left( v^T s(x) \right)^2
        \qquad \text{[SSM (objective)]}

    For v of mean 0 and covariance I its mean over v is `implicit`, at every x.

    Args:
        score: s, differentiable.
        x: (B, *).
        v: (B, *), from one of `PROJECTIONS`.
    Returns:
        (B,).
    Raises:
        ValueError: v of another shape than x, or x without features.
    Source: Sliced Score Matching (Song et al., arXiv 1905.07088), section 3.
    """
    _must_fit("v", v, x)
    s, ds = _along(score, x, v)
    return dot(v, ds) + 0.5 * dot(v, s) ** 2


def sliced_vr(score: Score, x: Tensor, v: Tensor) -> Tensor:
    r"""Return `sliced`, with its second term replaced by the mean of that term over v.

    .. math:: v^T \frac{\partial s}{\partial x} v + \tfrac12 \| s(x) \|^2 \qquad \text{[SSM (VR)]}

    The same mean over v, and mostly less variance: on N(0, P^{-1}) and its score, with v of random signs, the variances
    are the sums over i != j of 2 P_ij^2 here and of (P_ii P_jj + 2 P_ij^2) / 2 there. Dimensions that depend on each
    other more than 2 P_ij^2 = P_ii P_jj turn it round.

    Args, returns and errors as in `sliced`.
    """
    _must_fit("v", v, x)
    s, ds = _along(score, x, v)
    return dot(v, ds) + half_square(s)


def finite_difference_sliced(score: Score, x: Tensor, v: Tensor, step: float | Tensor = 0.1) -> Tensor:
    r"""Return `sliced` by finite differences: two evaluations of s, which may run in parallel, and no derivative.

    .. math:: \frac{v^T (s_+ - s_-)}{2 h} + \tfrac18 \left( v^T (s_+ + s_-) \right)^2, \quad s_\pm = s(x \pm h v)
        \qquad \text{[FD-SSM (score networks)]}

    The error is of second order in h, and none where s is affine. Rounding is magnified by 1 / h: in float32 a step
    below a hundredth of the data's own scale loses more digits than it gains.

    Args:
        score: s; it needs no derivative in x.
        x: (B, *).
        v: (B, *), from one of `PROJECTIONS`.
        step: h > 0, in units of x, a number or (B,).
    Returns:
        (B,).
    Raises:
        ValueError: as `sliced`; step <= 0.
    Source: Efficient Learning of Generative Models via Finite-Difference Score Matching (Pang et al., arXiv
        2007.03317). There v itself has the length of the step, and the objective is h^2 times as large.
    """
    above, below, h = _on_both_sides(score, x, v, step)
    return dot(v, above - below) / (2 * h) + dot(v, above + below) ** 2 / 8


def finite_difference_sliced_vr(score: Score, x: Tensor, v: Tensor, step: float | Tensor = 0.1) -> Tensor:
    r"""Return `sliced_vr` by finite differences.

    .. math:: \frac{v^T (s_+ - s_-)}{2 h} + \tfrac18 \| s_+ + s_- \|^2 \qquad \text{[FD-SSM (VR)]}

    Args, returns, errors and source as in `finite_difference_sliced`.
    """
    above, below, h = _on_both_sides(score, x, v, step)
    return dot(v, above - below) / (2 * h) + half_square(above + below) / 4


def denoising(score: Score, x: Tensor, sigma: float | Tensor, eps: Tensor) -> Tensor:
    r"""Return the denoising score matching objective, from the noise that was added, without derivatives.

    .. math:: \tfrac12 \left\| s(\tilde x) + \frac{\tilde x - x}{\sigma^2} \right\|^2
        = \tfrac12 \left\| s(x + \sigma \epsilon) + \frac{\epsilon}{\sigma} \right\|^2 \qquad \text{[NCSN (5)]}

    On average over x and eps it is the explicit one of the noised density p_sigma, plus half of
    d / sigma^2 - E || grad log p_sigma ||^2: its minimiser is the score of p_sigma, not of p.

    Args:
        score: s; its argument is x + sigma eps.
        x: data, (B, *).
        sigma: > 0 in units of x, a number or (B,).
        eps: standard normal noise, (B, *).
    Returns:
        (B,).
    Raises:
        ValueError: sigma <= 0, eps of another shape than x, or x without features.
    Source: A Connection Between Score Matching and Denoising Autoencoders (Vincent, 2011); NCSN (arXiv 1907.05600).
    """
    _must_fit("eps", eps, x)
    sigma = of_rows("sigma", sigma, x)
    return half_square(_answer(score(x + sigma * eps), x) + eps / sigma)


def denoising_ladder(
    score: Callable[[Tensor, Tensor], Tensor], x: Tensor, sigma: float | Tensor, eps: Tensor
) -> Tensor:
    r"""Return `denoising` at many noise levels, weighted so that all of them count alike.

    .. math:: \mathcal L = \frac1L \sum_{i=1}^L \lambda(\sigma_i)\, \ell(\theta; \sigma_i), \quad
        \lambda(\sigma) = \sigma^2 \qquad \text{[NCSN (6)]}

    The mean over rows, with sigma drawn uniformly from the levels, estimates it. With s = -eps_theta / sigma it is half
    the squared error of eps: DDPM's loss.

    Args:
        score: (x + sigma eps (B, *), sigma (B,)) -> (B, *).
        x, sigma, eps: as in `denoising`.
    Returns:
        (B,).
    Raises:
        ValueError: as `denoising`.
    Source: NCSN (arXiv 1907.05600), section 4.2.
    """
    levels = torch.as_tensor(sigma, dtype=x.dtype, device=x.device).expand(len(x))
    return levels**2 * denoising(lambda x_tilde: score(x_tilde, levels), x, levels, eps)


def dot(y: Tensor, z: Tensor) -> Tensor:
    """Return the inner product of each row, (B,)."""
    return (y * z).flatten(1).sum(1)


def half_square(y: Tensor) -> Tensor:
    """Return half the squared norm of each row, (B,)."""
    return 0.5 * dot(y, y)


def of_rows(name: str, value: float | Tensor, x: Tensor) -> Tensor:
    """Return a number, or one for each row, shaped to broadcast against x.

    Raises:
        ValueError: anything else, or a value that is not above 0, where it is a number or on the CPU; on a GPU that
            would synchronise.
    """
    values = value if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.float64)
    if values.shape not in ((), (len(x),)):
        raise ValueError(f"{name} of shape {tuple(values.shape)} for {len(x)} rows: a number, or one a row, is needed")
    if values.device.type == "cpu" and not ((values > 0) & (values < math.inf)).all():
        raise ValueError(f"{name} = {value} must be > 0")
    return at(values, ..., x)


def _along(score: Score, x: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Return s(x) and its derivative along v, (ds/dx) v, both (B, *), by forward-mode differentiation."""
    s, ds = torch.func.jvp(score, (x.contiguous(),), (v.contiguous(),))[:2]
    return _answer(s, x), ds


def _on_both_sides(score: Score, x: Tensor, v: Tensor, step: float | Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return s at x + step v and at x - step v, each (B, *), and the step of each row, (B,) or (1,)."""
    _must_fit("v", v, x)
    h = of_rows("step", step, x)
    return _answer(score(x + h * v), x), _answer(score(x - h * v), x), h.flatten()


def _must_have_features(x: Tensor) -> None:
    if x.ndim < 2 or x.shape[1:].numel() == 0:
        raise ValueError(f"x of shape {tuple(x.shape)} has no features: rows (B, d) with d >= 1 are needed")


def _must_fit(name: str, y: Tensor, x: Tensor) -> None:
    _must_have_features(x)
    if y.shape != x.shape:
        raise ValueError(f"{name} of shape {tuple(y.shape)} must have the shape of x, {tuple(x.shape)}")


def _answer(s: Tensor, x: Tensor) -> Tensor:
    """Return s, or raise ValueError if it would be broadcast against x."""
    if s.shape != x.shape:
        raise ValueError(f"the score has shape {tuple(s.shape)}, but it must have that of x, {tuple(x.shape)}")
    return s
