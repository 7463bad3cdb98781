"""Nonparametric distances between two sets of points: sliced Wasserstein and energy distance."""

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ddpm.metrics.checks import finite_features
from ddpm.metrics.intervals import half_width
from ddpm.metrics.kernel import discrepancy
from ddpm.randomness import generator

DIRECTIONS = 128


class Distance(NamedTuple):
    """A distance and its 95 % interval over the choice of points."""

    value: float
    low: float
    high: float


def directions(d: int, count: int = DIRECTIONS) -> Tensor:
    """Return unit vectors (P, d), float64, to project points on: the same in every run.

    In one dimension there is one. In the plane they are evenly spaced over a half circle, for opposite ones are
    equivalent. In more dimensions they are a fixed uniform sample of the sphere.

    Args:
        d: dimensions, d >= 1.
        count: P for d > 1, >= 1.
    """
    if d == 1:
        return torch.ones(1, 1, dtype=torch.float64)
    if d == 2:
        angle = math.pi * torch.arange(count, dtype=torch.float64) / count
        return torch.stack([angle.cos(), angle.sin()], dim=1)
    return F.normalize(torch.randn(count, d, generator=generator(0, "directions", d), dtype=torch.float64), dim=1)


def sliced_wasserstein(x: Tensor, y: Tensor, directions: Tensor) -> Distance:
    r"""Return the sliced 2-Wasserstein distance: the root mean square over P directions of that of projections.

    .. math::
        \mathrm{SW}_2^2 = \frac1P \sum_{p=1}^P W_2^2(\theta_p^T x,\ \theta_p^T y), \qquad
        W_2^2(x, y) = \int_0^1 \left(F_x^{-1}(u) - F_y^{-1}(u)\right)^2 du \qquad \text{[SW (distance)]}

    The quantile functions are steps, so that the integral is a finite sum, exact for any two numbers of points. The
    distance of finite sets from one distribution is not 0: compare it with that of as many held-out points.

    The interval is over the choice of x alone, by the infinitesimal jackknife:

    .. math::
        \hat\sigma^2 = \frac{1}{n^2} \sum_i \left(h_i - \bar h\right)^2, \qquad
        h_i = \frac1P \sum_p \varphi_p(\theta_p^T x_i), \qquad
        \varphi(x) = \int^x 2 \left(z - F_y^{-1}(F_x(z))\right) dz \qquad \text{[SW (standard error)]}

    phi, Kantorovich's potential, is how W_2^2 changes as weight moves to a point. The ends of the interval are roots of
    those of SW_2^2. It does not cover the bias: the distance of n points is larger the fewer they are.

    Args:
        x: points (n, d).
        y: points (m, d), taken as exact.
        directions: theta, unit vectors (P, d); see `directions`.
    Raises: ValueError for points that cannot be compared, fewer than 2 in a set, or other directions than those.
    Source: Bonneel et al. 2015, Sliced and Radon Wasserstein barycenters of measures, doi 10.1007/s10851-014-0506-3.
    """
    x, y = finite_features(x=x, y=y)
    if directions.ndim != 2 or len(directions) < 1 or directions.shape[1] != x.shape[1]:
        raise ValueError(f"directions must be (P, {x.shape[1]}) for these points, not {tuple(directions.shape)}")
    rank_x, rank_y, share = _coupling(len(x), len(y))
    squares, h = 0.0, torch.zeros(len(x), dtype=torch.float64)
    for theta in directions.double().cpu():
        along_x, order = (x.cpu() @ theta).sort()
        along_y = (y.cpu() @ theta).sort().values
        squares += (share * (along_x[rank_x] - along_y[rank_y]).square()).sum().item()
        h[order] += _potential(along_x, along_y)
    square, h = squares / len(directions), h / len(directions)
    half = half_width((h.var(correction=0) / len(h)).sqrt().item())
    return Distance(math.sqrt(square), math.sqrt(max(0.0, square - half)), math.sqrt(square + half))


def energy_distance(x: Tensor, y: Tensor, chunk: int = 512) -> Distance:
    r"""Return the energy distance: how much further apart points of two sets are than those of one; 0 only if equal.

    .. math::
        \mathcal E = \frac{2 \sum_{i, j} |x_i - y_j|}{n m} - \frac{\sum_{i \ne j} |x_i - x_j|}{n (n - 1)}
        - \frac{\sum_{i \ne j} |y_i - y_j|}{m (m - 1)} \qquad \text{[Energy (unbiased)]}

    An estimate of a small distance may be below 0, for its mean does not depend on the number of points. It is
    the discrepancy of `kernel_distance` under the kernel -|x - y|, and the interval is the jackknife's as there.

    Args:
        x: points (n, d).
        y: points (m, d).
        chunk: rows of distances in memory at a time; does not change the result.
    Raises: ValueError for points that cannot be compared, or fewer than 3 in a set: the jackknife must leave 2.
    Source: Szekely & Rizzo 2013, Energy statistics, doi 10.1016/j.jspi.2013.03.018.
    """
    x, y = finite_features(x=x, y=y, least=3)
    centre = y.mean(0)  # products of points far from 0 lose the digits of their distance
    x, y = x - centre, y - centre
    (xx, _), (yy, _), (xy, yx) = (_distances(*pair, chunk) for pair in ((x, x), (y, y), (x, y)))
    value, half = discrepancy(-xx, -yy, -xy, -yx)
    return Distance(value, value - half, value + half)


def _coupling(n: int, m: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the pairs of ranks, of n points and of m, that optimal transport couples, and the share of u of each.

    Computed in units of 1 / (n m), in which all steps lie at integers.
    """
    steps = torch.cat([torch.arange(n + 1) * m, torch.arange(1, m) * n]).unique()
    below = steps[:-1]
    return below // m, below // n, steps.diff().double() / (n * m)


def _potential(x: Tensor, y: Tensor) -> Tensor:
    """Return phi at ascending x (n,), up to a constant; y (m,) is ascending too.

    Between two neighbours the integrand has one quantile of y, that at i / n; where it is a step of y, its middle.
    """
    n, m = len(x), len(y)
    steps = torch.arange(1, n) * m
    quantile = (y[(steps - 1) // n] + y[steps // n]) / 2
    rise = x.diff() * (x[1:] + x[:-1] - 2 * quantile)
    return F.pad(rise.cumsum(0), (1, 0))


def _distances(x: Tensor, y: Tensor, chunk: int) -> tuple[Tensor, Tensor]:
    """Return the sums (n,) of |x_i - y_j| over j, and (m,) over i."""
    of_x, of_y = [], torch.zeros_like(y[:, 0])
    for part in x.split(chunk):
        distances = torch.cdist(part, y)  # by products: that of a point to itself is 1e-8 of its size, or 0
        of_x.append(distances.sum(1))
        of_y += distances.sum(0)
    return torch.cat(of_x), of_y
