"""Points in the plane, drawn from formulas: data on which training takes seconds and every sample can be seen."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ddpm.data.batch import Batch
from ddpm.data.dataset import InMemory, check_options
from ddpm.randomness import generator as keyed
from ddpm.runs.files import Origin

LEAST, MOST = 2, 10_000_000  # points: fewer have no spread, more are a slip
NOISIEST = 100.0  # standard deviation of the noise, beyond which nothing is left of any of these shapes
LEVEL = 1e-9  # standard deviation below which a coordinate, before it is standardised, does not vary


class Points(InMemory):
    r"""Points in the plane, with labels or without, of which a fixed part is held out.

    Each coordinate is standardised by itself, with the mean and the standard deviation of all N points (those of the
    population, divided by N), in float64:

    .. math:: x_i = \frac{p_i - m}{s}, \quad m = \frac 1 N \sum_i p_i, \quad s^2 = \frac 1 N \sum_i (p_i - m)^2

    Args:
        name, validation: as in `Dataset`.
        points: p, real numbers (N, 2), N >= 2.
        labels: whole numbers (N,) in 0..num_classes-1, or None.
        classes: the classes' names; without them, labels name themselves.
    Attributes:
        mean, std: m and s, float64 (2,), by which `x * std + mean` is what was given.
    Raises: ValueError for arguments outside these ranges, and for a coordinate that does not vary.
    """

    units = "points"

    def __init__(
        self,
        name: str,
        points: Tensor,
        labels: Tensor | None = None,
        classes: Sequence[str] = (),
        *,
        validation: float = 0.2,
    ):
        check_options(None, None, validation)
        if not points.is_floating_point() or points.ndim != 2 or points.shape[1] != 2 or len(points) < LEAST:
            raise ValueError(f"{name}: points are floats (N, 2), N >= 2, not {points.dtype} {tuple(points.shape)}")
        p = points.double()
        self.mean, self.std = p.mean(0), p.std(0, correction=0)
        if not (self.std > LEVEL).all():  # nor for NaN
            raise ValueError(
                f"{name}: the coordinates have the standard deviations {self.std.tolist()}, and both must vary to be "
                "standardised; where noise is added, choose noise > 0"
            )
        super().__init__(name, "all", ((p - self.mean) / self.std).float(), labels, classes, validation)

    @property
    def points(self) -> Tensor:
        """The samples: x, float32 (N, 2)."""
        return self.samples

    def batch(
        self, indices: Tensor, device: torch.device | str = "cpu", generator: torch.Generator | None = None
    ) -> Batch:
        """Points as the network sees them.

        Args:
            indices: their numbers (B,), whole numbers in 0..N-1.
            device: where the result goes.
            generator: without effect, for nothing is drawn anew.

        Returns: x float32 (B, 2), and as condition the classes int64 (B,) of labelled data.
        """
        return self._taken(indices, device)


class SwissRoll(Points):
    r"""A spiral of one and a half turns without classes: scikit-learn's `make_swiss_roll` seen along its axis.

    .. math:: p = (t \cos t,\ t \sin t) + \text{noise} \cdot n, \quad t = \tfrac{3\pi}{2} (1 + 2u), \quad
        u \sim \mathcal U[0, 1), \quad n \sim \mathcal N(0, I)

    Its turns lie 2 pi apart. The points are drawn once and for all, whatever the run's seed, and then standardised
    (see `Points`).

    Args:
        count: number N of points, 2 <= count <= 10,000,000.
        noise: standard deviation of what is added to each coordinate, before the points are standardised; 0 <= noise <=
            100.
        split: "auto", which is all of them: there is no published split.
        validation: the held-out fraction, 0 <= validation < 1.
    Raises: ValueError for arguments outside these ranges.
    """

    def __init__(self, count: int = 10_000, noise: float = 0.5, split: str = "auto", validation: float = 0.2):
        _check("swiss_roll", count, noise, split, validation)
        self.origin = Origin(tuple)  # nothing that changes while a process runs
        t = 1.5 * math.pi * (1 + 2 * _uniform("swiss_roll", count))
        roll = torch.stack([t * t.cos(), t * t.sin()], dim=1)
        super().__init__("swiss_roll", roll + noise * _normal("swiss_roll", count), validation=validation)


class Moons(Points):
    r"""Two half circles that reach into each other, each a class: scikit-learn's `make_moons`.

    .. math:: p = \begin{cases} (\cos\theta,\ \sin\theta) & y = 0 \\
        (1 - \cos\theta,\ \tfrac 1 2 - \sin\theta) & y = 1 \end{cases} + \text{noise} \cdot n, \quad
        \theta = \pi u, \quad u \sim \mathcal U[0, 1), \quad n \sim \mathcal N(0, I)

    Point i is of class y = i mod 2. The points are drawn once and for all, whatever the run's seed, and then
    standardised (see `Points`).

    Args: count, noise, split, validation as in `SwissRoll`.

    Raises: ValueError for arguments outside these ranges.
    """

    def __init__(self, count: int = 10_000, noise: float = 0.05, split: str = "auto", validation: float = 0.2):
        _check("moons", count, noise, split, validation)
        self.origin = Origin(tuple)  # nothing that changes while a process runs
        y, theta = torch.arange(count) % 2, math.pi * _uniform("moons", count)
        upper = torch.stack([theta.cos(), theta.sin()], dim=1)
        moons = torch.where(y[:, None] == 0, upper, torch.tensor([1, 0.5], dtype=torch.float64) - upper)
        noisy = moons + noise * _normal("moons", count)
        super().__init__("moons", noisy, y, ("upper", "lower"), validation=validation)


class Gaussians(Points):
    r"""A mixture of round Gaussians, evenly spaced on the unit circle, each a class: its density is known exactly.

    .. math:: p = (\cos\tfrac{2\pi y}{\text{modes}},\ \sin\tfrac{2\pi y}{\text{modes}}) + \text{noise} \cdot n, \quad
        n \sim \mathcal N(0, I)

    Point i is of class y = i mod modes, counted counter-clockwise from the right. The points are drawn once and for
    all, whatever the run's seed, and then standardised (see `Points`); with one mode they are standard normal.

    Args:
        count, noise, split, validation: as in `SwissRoll`. With one or two modes, which lie on a line, noise > 0.
        modes: Gaussians, 1 <= modes <= count.
    Raises: ValueError for arguments outside these ranges.
    """

    def __init__(
        self,
        count: int = 10_000,
        noise: float = 0.1,
        modes: int = 8,
        split: str = "auto",
        validation: float = 0.2,
    ):
        _check("gaussians", count, noise, split, validation)
        if isinstance(modes, bool) or not isinstance(modes, int) or not 1 <= modes <= count:
            raise ValueError(f"modes={modes!r}: a whole number, 1 <= modes <= count = {count:,}")
        self.origin = Origin(tuple)  # nothing that changes while a process runs
        y = torch.arange(count) % modes
        angle = 2 * math.pi * y.double() / modes
        circle = torch.stack([angle.cos(), angle.sin()], dim=1)
        noisy = circle + noise * _normal("gaussians", count)
        super().__init__("gaussians", noisy, y, [str(mode) for mode in range(modes)], validation=validation)


def _check(name: str, count: int, noise: float, split: str, validation: float) -> None:
    """Raise ValueError, with what is allowed, for options that no source of points admits; before any is drawn."""
    if isinstance(count, bool) or not isinstance(count, int) or not LEAST <= count <= MOST:
        raise ValueError(f"count={count!r}: a whole number of points, {LEAST} <= count <= {MOST:,}")
    if isinstance(noise, bool) or not isinstance(noise, int | float) or not 0 <= noise <= NOISIEST:
        raise ValueError(f"noise={noise!r}: the standard deviation of the noise lies in 0 <= noise <= {NOISIEST:g}")
    if split != "auto":
        raise ValueError(f"split={split!r}: {name} has no published split; use auto, which is all its points")
    check_options(None, None, validation)


def _uniform(name: str, count: int) -> Tensor:
    """Numbers (count,) in [0, 1), float64: the same in every run, so that all are judged on the same points."""
    return torch.rand(count, generator=keyed(0, f"points/{name}/place"), dtype=torch.float64)


def _normal(name: str, count: int) -> Tensor:
    """Standard normal numbers (count, 2), float64, likewise."""
    return torch.randn(count, 2, generator=keyed(0, f"points/{name}/noise"), dtype=torch.float64)
