"""Learning-rate range test: geometrically growing rates, the averaged loss, and suggested rates.

Source: Cyclical Learning Rates for Training Neural Networks (arXiv 1506.01186), section 3.3; A disciplined approach to
neural network hyper-parameters (arXiv 1803.09820).
"""

import csv
import math
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ddpm.checks import check_whole
from ddpm.runs.files import replacing

FALL = 0.05  # relative change of the averaged loss, down to its lowest or back up; less counts as noise


def rates(start: float, end: float, steps: int) -> list[float]:
    """Return the learning rate of each step, in geometric progression from `start` to `end`.

    Raises: ValueError unless 0 < start < end < infinity and there are at least two steps.
    """
    if not 0 < start < end < math.inf:
        raise ValueError(f"start = {start:g} and end = {end:g}: 0 < start < end is needed")
    check_whole("steps", steps, 2)
    return [start * (end / start) ** (i / (steps - 1)) for i in range(steps)]


@dataclass
class RangeTest:
    """Record of the steps of a range test.

    Args:
        beta: of the exponential moving average of the loss, in [0, 1).
        stop: the test ends where the average exceeds its lowest value by this factor.
    Raises: ValueError for an argument out of range.
    """

    beta: float = 0.9
    stop: float = 4.0
    rates: list[float] = field(default_factory=list, init=False)
    losses: list[float] = field(default_factory=list, init=False)
    smoothed: list[float] = field(default_factory=list, init=False)
    _sum: float = field(default=0.0, init=False)

    def __post_init__(self) -> None:
        if not 0 <= self.beta < 1:
            raise ValueError(f"beta = {self.beta:g} must lie in [0, 1)")
        if not 1 < self.stop < math.inf:
            raise ValueError(f"stop = {self.stop:g} must be a finite number > 1")

    def add(self, rate: float, loss: float) -> None:
        """Add a step: its rate, and the loss of the weights before it."""
        self._sum = self.beta * self._sum + (1 - self.beta) * loss
        self.rates.append(rate)
        self.losses.append(loss)
        self.smoothed.append(self._sum / (1 - self.beta ** len(self.losses)))  # bias correction, as in Adam

    @property
    def ended(self) -> str | None:
        """The reason why the test has ended, or None."""
        if not self.losses:
            return None
        if not math.isfinite(self.smoothed[-1]):
            return "the loss is not finite"
        best = min(self.smoothed)
        if self.smoothed[-1] > self.stop * best:
            return f"the averaged loss is more than {self.stop:g} times its lowest, {best:.4g}"
        return None

    def suggestion(self) -> "Suggestion":
        """Return the rates that the steps so far suggest."""
        return suggestion(self.rates, self.smoothed, half=max(1, round(1 / (1 - self.beta) / 2)))

    def write(self, path: Path) -> None:
        """Write a CSV file of step, rate, loss and averaged loss."""
        rows = zip(range(1, len(self.rates) + 1), self.rates, self.losses, self.smoothed, strict=True)
        with replacing(path) as temporary, open(temporary, "w", newline="") as file:
            csv.writer(file).writerows([("step", "lr", "loss", "smoothed"), *rows])


@dataclass(frozen=True)
class Suggestion:
    """Suggested learning rates; None where the test gives none, with the reason in `note`."""

    steepest: float | None  # where the averaged loss falls fastest in log rate
    minimum: float | None  # where it is lowest, and beyond which it rises
    note: str = ""

    @property
    def below_minimum(self) -> float | None:
        """A tenth of the rate of the lowest loss."""
        return None if self.minimum is None else self.minimum / 10


def suggestion(rates: list[float], smoothed: list[float], half: int = 1) -> Suggestion:
    """Suggest rates from an averaged loss.

    The lowest loss only counts as a minimum if the loss rises after it; the steepest slope is searched before it. A
    slope is that of the least-squares line through a step and `half` steps on each side: from two neighbours it would
    be noise.

    Args:
        rates, smoothed: (n,), ascending rates and the averaged loss there; values from the first that is not finite on
            are ignored.
    """
    finite = np.isfinite(smoothed)
    n = len(finite) if finite.all() else int(finite.argmin())
    x, y = np.log(rates[:n]), np.array(smoothed[:n])
    if n == 0 or not y.min() < (1 - FALL) * y[0]:
        fall = "not finite from the first step on" if n == 0 else f"never {FALL:.0%} below that of the first step"
        bursts = n < len(finite) or y[-1] > (1 + FALL) * y[0]
        advice = (
            "lower range.start, or take more range.steps" if bursts else "raise range.end, or take more range.steps"
        )
        return Suggestion(None, None, f"the averaged loss is {fall}: {advice}")
    lowest = int(y.argmin())
    slopes = {i: _slope(x[i - half : i + half + 1], y[i - half : i + half + 1]) for i in range(half, lowest - half + 1)}
    steepest = min(slopes, key=lambda i: slopes[i]) if slopes else None
    notes = [] if slopes else [f"the loss falls for {lowest} steps only, too few for a slope: take more range.steps"]
    rises = n < len(finite) or y[-1] > (1 + FALL) * y[lowest]
    if not rises:
        notes.append("the loss still falls at the end: raise range.end")
    return Suggestion(
        None if steepest is None else float(rates[steepest]), float(rates[lowest]) if rises else None, "; ".join(notes)
    )


def _slope(x: np.ndarray, y: np.ndarray) -> float:
    """Return the slope of the least-squares line through (n,) points."""
    centred = x - x.mean()
    return float((centred * y).sum() / (centred**2).sum())
