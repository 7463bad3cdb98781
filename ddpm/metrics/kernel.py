"""Kernel distance (KID) between two sets of features, whose mean does not depend on the number of samples."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ddpm.metrics.checks import finite_features
from ddpm.metrics.intervals import half_width


@dataclass(frozen=True)
class KernelDistance:
    """A kernel distance and its 95 % interval; the estimate of a small distance may be below 0."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"kernel distance {self.value:.4g} (95%: {self.low:.4g} to {self.high:.4g})"


def kernel_distance(samples: Tensor, real: Tensor, chunk: int = 512) -> KernelDistance:
    r"""Return the unbiased squared MMD under a cubic kernel (Binkowski et al., arXiv 1801.01401).

    .. math::
        \mathrm{KID} = \frac{\sum_{i \ne j} k(x_i, x_j)}{n (n - 1)} + \frac{\sum_{i \ne j} k(y_i, y_j)}{m (m - 1)}
        - \frac{2 \sum_{i, j} k(x_i, y_j)}{n m}, \qquad k(x, y) = \left(\frac{x \cdot y}{D} + 1\right)^3
        \qquad \text{[KID (unbiased)]}

    The interval is 1.96 standard errors to both sides. Their square is that of the jackknife, which leaves out every
    sample once and every real image once:

    .. math::
        \sigma^2 = \frac{n - 1}{n} \sum_i (\mathrm{KID}_{-x_i} - \overline{\mathrm{KID}_{-x}})^2
        + \frac{m - 1}{m} \sum_j (\mathrm{KID}_{-y_j} - \overline{\mathrm{KID}_{-y}})^2

    Where both distributions are the same, no term is linear in a single row, and the jackknife's error is about
    sqrt(2) times too large: the interval then holds 0 in more than 95 % of all draws. Between that and distributions
    that are far apart, it holds the truth in somewhat fewer if the rows are few, such as 91 % with 60.

    Args:
        samples: features x (n, D) of the samples.
        real: features y (m, D) of real images.
        chunk: rows of a kernel matrix in memory at a time; does not change the result.
    Raises: ValueError for features that cannot be compared, or fewer than 3 rows: the jackknife must leave 2.
    """
    x, y = finite_features(samples=samples, real=real, least=3)
    xx, yy = (_row_sums(z, z, chunk) - _kernel(z.square().sum(1), z) for z in (x, y))  # (n,), (m,); without i = j
    value, half = discrepancy(xx, yy, _row_sums(x, y, chunk), _row_sums(y, x, chunk))
    return KernelDistance(value, value - half, value + half)


def discrepancy(xx: Tensor, yy: Tensor, xy: Tensor, yx: Tensor) -> tuple[float, float]:
    """Return the unbiased squared discrepancy of two sets under any kernel, and half its interval by the jackknife.

    Args:
        xx: sums (n,) of k(x_i, x_j) over j, without j = i.
        yy: the same (m,) of the other set.
        xy, yx: sums (n,) of k(x_i, y_j) over j, and (m,) over i.
    """
    n, m = len(xx), len(yy)
    sum_xx, sum_yy, sum_xy = xx.sum(), yy.sum(), xy.sum()
    value = _statistic(sum_xx, sum_yy, sum_xy, n, m).item()
    # a row that is left out takes its row and its column with it
    without_x = _statistic(sum_xx - 2 * xx, sum_yy, sum_xy - xy, n - 1, m)  # (n,)
    without_y = _statistic(sum_xx, sum_yy - 2 * yy, sum_xy - yx, n, m - 1)  # (m,)
    variance = sum((len(left) - 1) * left.var(correction=0).item() for left in (without_x, without_y))
    return value, half_width(math.sqrt(variance))


def _statistic(xx: Tensor, yy: Tensor, xy: Tensor, n: int, m: int) -> Tensor:
    """Return the estimator from sums of the kernel over pairs of n and m rows."""
    return xx / (n * (n - 1)) + yy / (m * (m - 1)) - 2 * xy / (n * m)


def _row_sums(x: Tensor, y: Tensor, chunk: int) -> Tensor:
    """Return the sums (n,) of k(x_i, y_j) over j."""
    return torch.cat([_kernel(part @ y.mT, y).sum(1) for part in x.split(chunk)])


def _kernel(product: Tensor, features: Tensor) -> Tensor:
    """Return k from the scalar products of features (n, D)."""
    return (product / features.shape[1] + 1) ** 3
