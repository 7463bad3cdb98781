"""Nearest-neighbour measures of features: precision and recall, density and coverage."""

from collections.abc import Iterator

import torch
from torch import Tensor

from ddpm.metrics.checks import finite_features


def precision_recall(samples: Tensor, real: Tensor, k: int = 3, chunk: int = 256) -> tuple[float, float]:
    r"""Return improved precision and recall: shares of samples and of real images inside the other set's manifold.

    .. math::
        \mathrm{precision} = \frac1n \sum_j 1[\exists i: |y_j - x_i| \le r_k(x_i)], \qquad
        \mathrm{recall} = \frac1m \sum_i 1[\exists j: |x_i - y_j| \le r_k(y_j)]
        \qquad \text{[Kynkaanniemi (precision, recall)]}

    y are samples, x real images and r_k the distance to the k-th neighbour in the same set, itself not counted.

    Args:
        samples: features (n, D) of the samples.
        real: features (m, D) of real images.
        k: the neighbour that a ball's radius reaches to; 3 in the paper.
        chunk: rows whose distances are in memory at a time; does not change the result.

    Returns: precision and recall, both in 0..1.
    Raises: ValueError for features that cannot be compared, k < 1, or fewer than k + 1 rows.
    Source: Kynkaanniemi et al. 2019, arXiv 1904.06991.
    """
    y, x = finite_features(samples=samples, real=real, least=_least(k))
    return _share_inside(y, x, k, chunk), _share_inside(x, y, k, chunk)


def density_coverage(samples: Tensor, real: Tensor, k: int = 5, chunk: int = 256) -> tuple[float, float]:
    r"""Return density and coverage: how many real balls contain a sample, and the share that contain any.

    .. math::
        \mathrm{density} = \frac{1}{k n} \sum_{i, j} 1[|y_j - x_i| < r_k(x_i)], \qquad
        \mathrm{coverage} = \frac1m \sum_i 1[\exists j: |y_j - x_i| < r_k(x_i)]
        \qquad \text{[Naeem (density, coverage)]}

    y are samples, x real images and r_k the distance to the k-th neighbour among the real ones, itself not counted.

    Args:
        samples: features (n, D) of the samples.
        real: features (m, D) of real images.
        k: the neighbour that a ball's radius reaches to; 5 in the paper.
        chunk: rows whose distances are in memory at a time; does not change the result.

    Returns: density, which is 1 on average for samples that are like the real images and may be more, and coverage,
    in 0..1.
    Raises: ValueError for features that cannot be compared, k < 1, or fewer than k + 1 rows.
    Source: Naeem et al. 2020, arXiv 2002.09797.
    """
    y, x = finite_features(samples=samples, real=real, least=_least(k))
    radii, inside = _radii(x, k, chunk), 0
    covered = torch.zeros(len(x), dtype=torch.bool, device=x.device)
    for d in distances(y, x, chunk):
        hits = d < radii  # open, as in the authors' code: the density of a set in itself is 1
        inside += int(hits.sum())
        covered |= hits.any(0)
    return inside / (k * len(y)), covered.double().mean().item()


def nearest(x: Tensor, reference: Tensor, chunk: int = 256) -> tuple[Tensor, Tensor]:
    """Find the nearest row of the reference for each row of x.

    Args:
        x: (n, D).
        reference: (N, D).
        chunk: rows of x whose distances are in memory at a time; does not change the result.

    Returns: Euclidean distances (n,), float64, exactly 0 for copies; and indices (n,) into the reference.
    Raises: ValueError for features that cannot be compared.
    """
    x, reference = finite_features(x=x, reference=reference, least=1)
    centre = reference.mean(0)  # products of rows far from 0 lose the digits of their distance
    rows = reference - centre
    index = torch.cat([torch.cdist(part - centre, rows).argmin(1) for part in x.split(chunk)])  # fast: by products
    return (x - reference[index]).norm(dim=1), index


def _least(k: int) -> int:
    """Return the least number of rows for k neighbours each."""
    if k < 1:
        raise ValueError(f"k = {k}: a ball reaches to the k-th neighbour, k >= 1")
    return k + 1


def _share_inside(x: Tensor, centres: Tensor, k: int, chunk: int) -> float:
    """Return the share of the rows x that lie in at least one ball around the centres."""
    radii = _radii(centres, k, chunk)
    return torch.cat([(d <= radii).any(1) for d in distances(x, centres, chunk)]).double().mean().item()


def _radii(x: Tensor, k: int, chunk: int) -> Tensor:
    """Return distances (n,) to the k-th neighbour in the same set; the first is each row's distance to itself."""
    return torch.cat([d.kthvalue(k + 1, dim=1).values for d in distances(x, x, chunk)])


def distances(x: Tensor, reference: Tensor, chunk: int) -> Iterator[Tensor]:
    """Yield Euclidean distances (chunk, N), some rows at a time.

    Not by matrix products: a distance to itself is exactly 0, and the same pair gives the same bits, so that comparing
    it with a radius does not depend on rounding.
    """
    for part in x.split(chunk):
        yield torch.cdist(part, reference, compute_mode="donot_use_mm_for_euclid_dist")
