"""Points from a mixture of Gaussians whose density is known exactly, in any number of dimensions."""

import hashlib
import math
from collections.abc import Sequence
from itertools import product
from typing import Any, Self

import torch
from torch import Tensor

from ddpm.checks import is_whole
from ddpm.data.batch import Batch, Condition, on
from ddpm.data.dataset import check_options
from ddpm.data.points import LEAST, LEVEL, MOST, Points
from ddpm.randomness import generator as keyed
from ddpm.runs.files import Origin

Vector = Sequence[float]
Matrix = Sequence[Vector]
GRID, SPACING, STD = (5, 5), 1.0, 0.2  # defaults
MOST_COMPONENTS, MOST_NUMBERS = 10_000, 100_000_000  # K, and K d^2: beyond them are slips
CONDITION = 1e-12  # of a covariance: its smallest eigenvalue as a share of the largest, beneath which it is flat
FARTHEST = 1e12  # largest absolute value of any argument
LEFT_OVER = 1e-6  # by which weights may miss 1: the rounding of decimals


class Mixture(Points):
    r"""A mixture of K weighted Gaussians, each a class, whose density is known exactly.

    .. math:: p \sim \sum_k w_k\, \mathcal N(m_k, C_k), \quad m = \sum_k w_k m_k, \quad
        s^2 = \operatorname{diag} \sum_k w_k \left(C_k + (m_k - m)(m_k - m)^T\right), \quad x = \frac{p - m}{s}

    The network sees x, each coordinate standardised with the mixture's own mean and standard deviation, not those of
    the N points, so that x is a mixture that is known exactly too. The N points are drawn once and for all, whatever
    the run's seed.

    Args:
        grid: points a side of a lattice around 0, one number a dimension, where the means lie; None for 5 x 5 of them,
            unless means are given.
        spacing: of the grid, > 0.
        means: m_k, (K, d), in the place of a grid.
        std: standard deviation of every component in every direction, or one number a component, > 0; None for 0.2,
            unless covariances are given.
        covariances: C_k, (K, d, d), symmetric and positive definite, in the place of std.
        weights: w_k > 0, (K,), which add up to 1; None for 1 / K each.
        count: number N of points that are drawn once, 2 <= count <= 10,000,000.
        fresh: draw every training batch anew from the density, by the generator that `batch` is given; what is held out
            stays as it is, and is what is given without a generator.
        standardise: false shows the network p itself: m = 0, s = 1.
        split: "auto", which is all of them: there is no published split.
        validation: the held-out fraction of the N points, 0 <= validation < 1.
    Attributes:
        weights, means, covariances: of x, float64 (K,), (K, d) and (K, d, d).
        mean, std: m and s, float64 (d,), by which `x * std + mean` is p.
    Raises: ValueError for arguments outside these ranges, and shapes that disagree.
    """

    def __init__(
        self,
        grid: Sequence[int] | None = None,
        spacing: float = SPACING,
        means: Matrix | None = None,
        std: float | Vector | None = None,
        covariances: Sequence[Matrix] | None = None,
        weights: Vector | None = None,
        count: int = 10_000,
        fresh: bool = False,
        standardise: bool = True,
        split: str = "auto",
        validation: float = 0.2,
    ):
        _check(count, split, validation)
        m = _means(grid, spacing, means)
        C, w = _covariances(std, covariances, *m.shape), _weights(weights, len(m))
        mean, std_of = torch.zeros_like(m[0]), torch.ones_like(m[0])
        if standardise:
            mean = w @ m
            std_of = (w @ (C.diagonal(dim1=1, dim2=2) + (m - mean).square())).sqrt()
        self.weights, self.means = w, (m - mean) / std_of
        self.covariances = C / torch.outer(std_of, std_of)
        self._factors = torch.linalg.cholesky(self.covariances)
        self.fresh, self.origin = fresh, Origin(tuple)  # nothing that changes while a process runs
        x, y = self._draw(count, keyed(0, "points/mixture/component"), keyed(0, "points/mixture/noise"))
        names = [str(k) for k in range(len(m))]
        super().__init__("mixture", x, y, names, validation=validation, standardise=False)
        self.mean, self.std = mean, std_of

    def batch(
        self, indices: Tensor, device: torch.device | str = "cpu", generator: torch.Generator | None = None
    ) -> Batch:
        """Return points as the network sees them, with their components as classes.

        Args:
            indices: their indices (B,), whole numbers in 0..N-1; of fresh points only how many there are matters.
            device: where the result goes.
            generator: draws fresh points, if the data are fresh; None, as in evaluation, draws none.

        Returns: x float32 (B, d), and as condition the classes int64 (B,).
        """
        if not self.fresh or generator is None:
            return self._taken(indices, device)
        x, y = self._draw(len(indices), generator, generator)
        return Batch(x.float(), Condition(classes=y)).to(device)

    def identity(self) -> dict[str, Any]:
        """Return what identifies the data: also the density itself, and whether points are fresh."""
        parts = (self.weights, self.means, self.covariances)
        density = hashlib.sha256(b"".join(part.numpy().astype("<f4").tobytes() for part in parts)).hexdigest()
        return super().identity() | {"density": density, "fresh": self.fresh}

    def of_classes(self, classes: Sequence[int]) -> Self:
        """Return the points of these classes as they were drawn once, none of them fresh."""
        other = super().of_classes(classes)
        other.fresh = False
        return other

    def _draw(self, n: int, component: torch.Generator, noise: torch.Generator) -> tuple[Tensor, Tensor]:
        """Draw n points from the density, float64 (n, d), and their components (n,), on the generators' device."""
        weights, means, factors = (on(noise.device, part) for part in (self.weights, self.means, self._factors))
        y = torch.multinomial(weights, n, replacement=True, generator=component)
        z = torch.randn(n, means.shape[1], generator=noise, dtype=torch.float64, device=noise.device)
        return means[y] + (factors[y] @ z[..., None])[..., 0], y


def _check(count: int, split: str, validation: float) -> None:
    """Raise ValueError for options that no source of points admits, before anything is drawn."""
    if not is_whole(count, LEAST, MOST):
        raise ValueError(f"count={count!r}: a whole number of points, {LEAST} <= count <= {MOST:,}")
    if split != "auto":
        raise ValueError(f"split={split!r}: mixture has no published split; use auto, which is all its points")
    check_options(None, None, validation)


def _means(grid: Sequence[int] | None, spacing: float, means: Matrix | None) -> Tensor:
    """Return the given means (K, d), or those of a grid around 0; ValueError for both, or invalid ones."""
    if means is not None:
        if grid is not None:
            raise ValueError("grid and means both set where the components are; give one of them")
        return _tensor("means", means, "K components of d numbers, (K, d)", 2)
    grid = GRID if grid is None else tuple(grid)
    if not grid or not all(is_whole(side, 1) for side in grid):
        raise ValueError(f"grid={list(grid)}: whole numbers >= 1, one a dimension, such as [5, 5]")
    if math.prod(grid) > MOST_COMPONENTS:
        raise ValueError(f"grid={list(grid)} has {math.prod(grid):,} components; at most {MOST_COMPONENTS:,}")
    if not 0 < spacing < math.inf:
        raise ValueError(f"spacing={spacing!r}: the distance of neighbours in the grid is > 0")
    axes = ([spacing * (i - (side - 1) / 2) for i in range(side)] for side in grid)
    return _tensor("grid", list(product(*axes)), "means of the spacing that is given", 2)


def _covariances(std: float | Vector | None, covariances: Sequence[Matrix] | None, K: int, d: int) -> Tensor:
    """Return the given covariances (K, d, d), or those of round components; ValueError for any that is invalid."""
    if K > MOST_COMPONENTS or K * d * d > MOST_NUMBERS:
        raise ValueError(
            f"{K:,} components in {d:,} dimensions: at most {MOST_COMPONENTS:,}, and K d^2 <= {MOST_NUMBERS:,}"
        )
    if covariances is None:
        spread = _tensor("std", STD if std is None else std, f"one number, or one a component, ({K},)", 0, 1)
        if spread.ndim and len(spread) != K:
            raise ValueError(f"std has {len(spread)} numbers, but there are {K} components")
        if not (spread > LEVEL).all():
            raise ValueError(f"std={spread.tolist()}: the standard deviation of a component is > {LEVEL:g}")
        return spread.expand(K).square()[:, None, None] * torch.eye(d, dtype=torch.float64)
    if std is not None:
        raise ValueError("std and covariances both set how wide the components are; give one of them")
    C = _tensor("covariances", covariances, f"a matrix a component, ({K}, {d}, {d})", 3)
    if C.shape != (K, d, d):
        raise ValueError(f"covariances have the shape {tuple(C.shape)}, but {K} means of {d} take {(K, d, d)}")
    for k, one in enumerate(C):
        if not torch.allclose(one, one.T, rtol=1e-9, atol=0):
            raise ValueError(f"covariance {k} is not symmetric: {one.tolist()}")
        values = torch.linalg.eigvalsh(one)  # ascending
        if not max(LEVEL**2, CONDITION * float(values[-1])) < values[0]:
            raise ValueError(f"covariance {k} is not positive definite: its eigenvalues are {values.tolist()}")
    return (C + C.mT) / 2


def _weights(weights: Vector | None, K: int) -> Tensor:
    """Return the weights (K,), which add up to 1 in float64; ValueError for any others."""
    if weights is None:
        return torch.full((K,), 1 / K, dtype=torch.float64)
    w = _tensor("weights", weights, "one number a component, (K,)", 1)
    if len(w) != K:
        raise ValueError(f"weights has {len(w)} numbers, but there are {K} components")
    if not (w > 0).all():
        raise ValueError(f"weights={w.tolist()}: each is > 0; leave out a component that never occurs")
    if abs(float(w.sum()) - 1) > LEFT_OVER:
        raise ValueError(f"weights={w.tolist()} add up to {float(w.sum()):.7g}, not to 1")
    return w / w.sum()


def _tensor(key: str, values: Any, wanted: str, *ndim: int) -> Tensor:
    """Return nested lists as float64; ValueError unless they are finite numbers, of equal lengths, and `ndim` deep."""
    try:
        x = torch.as_tensor(values, dtype=torch.float64)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{key}: {wanted}, and each list as long as the others") from error
    if x.ndim not in ndim or x.numel() == 0 or not (x.abs() <= FARTHEST).all():  # nor for NaN
        raise ValueError(f"{key} of shape {tuple(x.shape)}: {wanted}, of numbers up to {FARTHEST:g}")
    return x
