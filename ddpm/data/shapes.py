"""Points in the plane, drawn from formulas: data on which training takes seconds and every sample can be plotted."""

import math

import torch
from torch import Tensor

from ddpm.checks import is_whole
from ddpm.data.dataset import check_options
from ddpm.data.points import LEAST, MOST, Points
from ddpm.randomness import generator as keyed
from ddpm.runs.files import Origin

NOISIEST = 100.0  # standard deviation of the noise, beyond which nothing is left of any of these shapes
MOST_TURNS = 100.0  # of a spiral
MOST_SQUARES = 64  # a side of the checkerboard, beyond which 10,000,000 points do not fill it


class Shape(Points):
    """Points from a formula, with labels or without: the same whatever the run's seed.

    Args: as in `Points`.
    """

    origin = Origin(tuple)  # nothing that changes while a process runs


class SwissRoll(Shape):
    r"""A spiral of one and a half turns without classes: scikit-learn's `make_swiss_roll` seen along its axis.

    .. math:: p = (t \cos t,\ t \sin t) + \text{noise} \cdot n, \quad t = \tfrac{3\pi}{2} (1 + 2u), \quad
        u \sim \mathcal U[0, 1), \quad n \sim \mathcal N(0, I)

    Its turns lie 2 pi apart. The points are drawn once and for all, whatever the run's seed, and then standardised
    (see `Points`).

    Args:
        count: number N of points, 2 <= count <= 10,000,000.
        noise: standard deviation of the noise added to each coordinate, before the points are standardised; 0 <= noise
            <= 100.
        split: "auto", which is all of them: there is no published split.
        validation: the held-out fraction, 0 <= validation < 1.
    Raises: ValueError for arguments outside these ranges.
    """

    def __init__(self, count: int = 10_000, noise: float = 0.5, split: str = "auto", validation: float = 0.2):
        _check("swiss_roll", count, noise, split, validation)
        t = 1.5 * math.pi * (1 + 2 * _uniform("swiss_roll", count))
        roll = torch.stack([t * t.cos(), t * t.sin()], dim=1)
        super().__init__("swiss_roll", roll + noise * _normal("swiss_roll", count), validation=validation)


class Moons(Shape):
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
        y, theta = torch.arange(count) % 2, math.pi * _uniform("moons", count)
        upper = torch.stack([theta.cos(), theta.sin()], dim=1)
        moons = torch.where(y[:, None] == 0, upper, torch.tensor([1, 0.5], dtype=torch.float64) - upper)
        noisy = moons + noise * _normal("moons", count)
        super().__init__("moons", noisy, y, ("upper", "lower"), validation=validation)


class Gaussians(Shape):
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
        _check_whole("modes", modes, 1, count, "count")
        y = torch.arange(count) % modes
        angle = 2 * math.pi * y.double() / modes
        circle = torch.stack([angle.cos(), angle.sin()], dim=1)
        noisy = circle + noise * _normal("gaussians", count)
        super().__init__("gaussians", noisy, y, _numbers(modes), validation=validation)


class Checkerboard(Shape):
    r"""The dark squares of a board, filled evenly, without classes: a density with edges.

    .. math:: p = (i + u_1,\ j + u_2) - \tfrac S 2 + \text{noise} \cdot n, \quad i + j \text{ even}, \quad
        u \sim \mathcal U[0, 1)^2, \quad n \sim \mathcal N(0, I)

    S squares a side, of length 1; each of the S^2 / 2 dark ones (i, j) is as likely. Standardised as all of these
    shapes.

    Args:
        count, noise, split, validation: as in `SwissRoll`.
        squares: S a side, an even number in 2..64.
    Raises: ValueError for arguments outside these ranges.
    Source: the toy data of FFJORD (arXiv 1810.01367), with S = 4.
    """

    def __init__(
        self,
        count: int = 10_000,
        noise: float = 0.0,
        squares: int = 4,
        split: str = "auto",
        validation: float = 0.2,
    ):
        _check("checkerboard", count, noise, split, validation)
        _check_whole("squares", squares, 2, MOST_SQUARES)
        if squares % 2:
            raise ValueError(f"squares={squares}: an even number, so that as many are dark in every row")
        i = (squares * _uniform("checkerboard", count, "column")).floor()
        j = 2 * (squares // 2 * _uniform("checkerboard", count, "row")).floor() + i % 2
        within = torch.stack([_uniform("checkerboard", count, part) for part in ("place", "height")], dim=1)
        board = torch.stack([i, j], dim=1) + within - squares / 2
        noisy = board + noise * _normal("checkerboard", count)
        super().__init__("checkerboard", noisy, validation=validation)


class Spiral(Shape):
    r"""Arms that wind out from the centre, each a class: they touch nowhere, and no line tells them apart.

    .. math:: p = r\, (\cos\theta,\ \sin\theta) + \text{noise} \cdot n, \quad
        \theta = 2\pi \left(\text{turns} \cdot r + \frac{y}{\text{arms}}\right), \quad r = \sqrt u, \quad
        u \sim \mathcal U[0, 1), \quad n \sim \mathcal N(0, I)

    Point i is of class y = i mod arms. Along a ray the arms lie 1 / (turns arms) apart; by the square root they are
    about as dense without as within. Standardised as all of these shapes.

    Args:
        count, noise, split, validation: as in `SwissRoll`.
        arms: 1 <= arms <= count.
        turns: of an arm from the centre to its end, 0 <= turns <= 100; 0 makes rays, of which more than two, or noise,
            are needed.
    Raises: ValueError for arguments outside these ranges.
    Source: the two spirals of FFJORD's toy data (arXiv 1810.01367), which turn one and a half times.
    """

    def __init__(
        self,
        count: int = 10_000,
        noise: float = 0.03,
        arms: int = 2,
        turns: float = 1.5,
        split: str = "auto",
        validation: float = 0.2,
    ):
        _check("spiral", count, noise, split, validation)
        _check_whole("arms", arms, 1, count, "count")
        if isinstance(turns, bool) or not isinstance(turns, int | float) or not 0 <= turns <= MOST_TURNS:
            raise ValueError(f"turns={turns!r}: a number, 0 <= turns <= {MOST_TURNS:g}")
        y, r = torch.arange(count) % arms, _uniform("spiral", count).sqrt()
        noisy = r[:, None] * _circle(turns * r + y.double() / arms) + noise * _normal("spiral", count)
        super().__init__("spiral", noisy, y, _numbers(arms), validation=validation)


class Rings(Shape):
    r"""Circles around one centre, each a class: shares of the data that no path joins.

    .. math:: p = r\, (\cos 2\pi u,\ \sin 2\pi u) + \text{noise} \cdot n, \quad r = \frac{y + 1}{\text{rings}}, \quad
        u \sim \mathcal U[0, 1), \quad n \sim \mathcal N(0, I)

    Point i is of class y = i mod rings, counted from the innermost. Standardised as all of these shapes.

    Args:
        count, noise, split, validation: as in `SwissRoll`.
        rings: 1 <= rings <= count.
    Raises: ValueError for arguments outside these ranges.
    Source: the rings of FFJORD's toy data (arXiv 1810.01367), which are four.
    """

    def __init__(
        self,
        count: int = 10_000,
        noise: float = 0.03,
        rings: int = 4,
        split: str = "auto",
        validation: float = 0.2,
    ):
        _check("rings", count, noise, split, validation)
        _check_whole("rings", rings, 1, count, "count")
        y = torch.arange(count) % rings
        r = (y + 1).double() / rings
        noisy = r[:, None] * _circle(_uniform("rings", count)) + noise * _normal("rings", count)
        super().__init__("rings", noisy, y, _numbers(rings), validation=validation)


class Pinwheel(Shape):
    r"""Bent arms around a centre, each a class: Gaussians that are long, narrow, and turned the more the farther out.

    .. math:: p = R(\theta)\, a, \quad a = (1 + 0.3\, n_1,\ \text{noise} \cdot n_2), \quad
        \theta = \frac{2\pi y}{\text{arms}} + \tfrac 1 4 e^{a_1}, \quad n \sim \mathcal N(0, I)

    R turns counter-clockwise by an angle. Point i is of class y = i mod arms. Standardised as all of these shapes.

    Args:
        count, split, validation: as in `SwissRoll`.
        noise: standard deviation across an arm, before it is bent; 0 <= noise <= 100.
        arms: 1 <= arms <= count.
    Raises: ValueError for arguments outside these ranges.
    Source: Johnson et al., Composing graphical models with neural networks (arXiv 1603.06277), figure 1; five arms.
    """

    def __init__(
        self,
        count: int = 10_000,
        noise: float = 0.1,
        arms: int = 5,
        split: str = "auto",
        validation: float = 0.2,
    ):
        _check("pinwheel", count, noise, split, validation)
        _check_whole("arms", arms, 1, count, "count")
        y = torch.arange(count) % arms
        n_1, n_2 = _normal("pinwheel", count).T
        along, across = 1 + 0.3 * n_1, noise * n_2
        cos, sin = _circle(y.double() / arms + along.exp() / (8 * math.pi)).T
        bent = torch.stack([cos * along - sin * across, sin * along + cos * across], dim=1)
        super().__init__("pinwheel", bent, y, _numbers(arms), validation=validation)


def _check(name: str, count: int, noise: float, split: str, validation: float) -> None:
    """Raise ValueError, with what is allowed, for options that no source of points admits, before any is drawn."""
    if not is_whole(count, LEAST, MOST):
        raise ValueError(f"count={count!r}: a whole number of points, {LEAST} <= count <= {MOST:,}")
    if isinstance(noise, bool) or not isinstance(noise, int | float) or not 0 <= noise <= NOISIEST:
        raise ValueError(f"noise={noise!r}: the standard deviation of the noise lies in 0 <= noise <= {NOISIEST:g}")
    if split != "auto":
        raise ValueError(f"split={split!r}: {name} has no published split; use auto, which is all its points")
    check_options(None, None, validation)


def _check_whole(key: str, value: int, least: int, most: int, name: str | None = None) -> None:
    """Raise ValueError unless least <= value <= most; `name` is the name of the upper bound in the message, if any."""
    if not is_whole(value, least, most):
        bound = f"{most:,}" if name is None else f"{name} = {most:,}"
        raise ValueError(f"{key}={value!r}: a whole number, {least} <= {key} <= {bound}")


def _uniform(name: str, count: int, what: str = "place") -> Tensor:
    """Draw numbers (count,) in [0, 1), float64: the same in every run, so that all are judged on the same points."""
    return torch.rand(count, generator=keyed(0, f"points/{name}/{what}"), dtype=torch.float64)


def _normal(name: str, count: int) -> Tensor:
    """Draw standard normal numbers (count, 2), float64, the same in every run."""
    return torch.randn(count, 2, generator=keyed(0, f"points/{name}/noise"), dtype=torch.float64)


def _circle(share: Tensor) -> Tensor:
    """Return the places (N, 2) on the unit circle at a share (N,) of a turn, counter-clockwise from the right."""
    angle = 2 * math.pi * share
    return torch.stack([angle.cos(), angle.sin()], dim=1)


def _numbers(count: int) -> list[str]:
    """Return the names of unnamed classes: 0, 1, ..."""
    return [str(y) for y in range(count)]
