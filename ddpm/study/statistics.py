"""Means over seeds, differences between arms, and how sure they are."""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ddpm.metrics.intervals import LEVEL, student

ENOUGH = 5  # pairs: with fewer the points are shown, and nothing is decided

BETTER, WORSE, NO_DIFFERENCE, NOT_DECIDED = "better", "worse", "no difference shown", "not decided"
HIGHER, LOWER, NEITHER = "higher", "lower", "neither"  # verdicts too, of measures of which neither way is better


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds with its interval; low and high are None where one seed says nothing about others."""

    mean: float
    low: float | None
    high: float | None
    points: Mapping[int, float]  # seed -> value


@dataclass(frozen=True)
class Comparison:
    """An arm against its baseline: the mean of the differences, paired by seed, and its interval."""

    mean: float
    low: float | None
    high: float | None
    p: float | None  # by the paired t-test, corrected by Holm over the arms of the measure
    points: Mapping[int, float]  # seed -> arm - its baseline
    verdict: str


def estimate(points: Mapping[int, float], level: float = LEVEL) -> Estimate:
    """The mean of a measure over seeds."""
    return Estimate(*student(list(points.values()), level), dict(points))


def holm(p: Sequence[float]) -> list[float]:
    r"""p-values corrected for their number m by Holm's step-down method, in the order given.

    $$ \tilde p_{(i)} = \max_{j \le i} \min(1, (m - j + 1) \, p_{(j)}) \qquad \text{[Holm (step-down)]} $$

    Source: Holm 1979, "A simple sequentially rejective multiple test procedure".
    """
    corrected, largest = [0.0] * len(p), 0.0
    for rank, i in enumerate(sorted(range(len(p)), key=lambda i: p[i])):
        largest = max(largest, min(1.0, (len(p) - rank) * p[i]))
        corrected[i] = largest
    return corrected


def p_of_no_difference(differences: Sequence[float]) -> float:
    """Two-sided p-value of the paired t-test: how often so large a mean difference comes where there is none.

    1 for differences that are not all finite, of which nothing can be shown; the sign test's for equal ones.
    """
    if not all(map(math.isfinite, differences)):
        return 1.0
    mean, n = math.fsum(differences) / len(differences), len(differences)
    s = float(np.std(differences, ddof=1))
    if s <= 1e-9 * abs(mean):  # equal differences say no more than that they have one sign
        return 1.0 if mean == 0 else 2.0 ** (1 - n)
    from scipy import stats  # which takes a second, and commands that report nothing do without

    return float(2 * stats.t.sf(abs(mean) / (s / math.sqrt(n)), n - 1))


def compare(
    arms: Mapping[str, Mapping[int, float]],
    baselines: Mapping[str, Mapping[int, float]],
    better: str,
    level: float = LEVEL,
    survivors: Collection[str] = (),
) -> dict[str, Comparison]:
    """Every arm against its baseline, paired by seed, corrected by Holm over those that can be decided.

    An interval is Student's at the level at which Holm's method tests the arm, so that it excludes zero exactly where
    the arm is marked: the smallest of m p-values at 1 - alpha / m, the next at 1 - alpha / (m - 1), and so on; from the
    first that is not significant on, all at the level of that one. So the marks are right together, with probability
    `level`; the intervals are meant one by one, and do not cover all true differences at once as often.

    Args:
        arms: label -> seed -> value, without the baselines.
        baselines: label of each of these arms -> seed -> value of what it is compared with.
        better: "lower" or "higher"; "neither" for a measure that says what arms are like, and not which is better.
        survivors: arms of which seeds failed: those that are left are the lucky ones, and decide nothing.
    """
    paired = {
        label: {seed: value - baselines[label][seed] for seed, value in values.items() if seed in baselines[label]}
        for label, values in arms.items()
    }
    decided = [
        label
        for label, points in paired.items()
        if len(points) >= ENOUGH and label not in survivors and all(map(math.isfinite, points.values()))
    ]
    p = {label: p_of_no_difference(list(paired[label].values())) for label in decided}
    corrected = dict(zip(decided, holm([p[label] for label in decided]), strict=True))
    levels, divisor = {}, len(decided)
    for label in sorted(decided, key=lambda label: p[label]):
        levels[label] = 1 - (1 - level) / divisor
        if corrected[label] <= 1 - level:  # else the arms after it are tested no more
            divisor -= 1
    comparisons = {}
    for label, points in paired.items():
        if not points:
            continue
        mean, low, high = student(list(points.values()), levels.get(label, level))
        if label not in decided:
            verdict = NOT_DECIDED
        elif corrected[label] > 1 - level:
            verdict = NO_DIFFERENCE
        else:
            verdict = LOWER if mean < 0 else HIGHER
            if better != NEITHER:
                verdict = BETTER if verdict == better else WORSE
        comparisons[label] = Comparison(mean, low, high, corrected.get(label), points, verdict)
    return comparisons


def front(points: Mapping[str, tuple[float, float]], better: str) -> tuple[str, ...]:
    """Labels of the points (cost, quality) that no other beats, by cost.

    Beaten is what costs no less than another and is no better, unless they are the same in both.

    Args: better: "lower" or "higher".
    """
    sign = 1 if better == LOWER else -1
    signed = {label: (cost, sign * quality) for label, (cost, quality) in points.items() if math.isfinite(quality)}
    best, on_front = (math.inf, math.inf), []
    for label in sorted(signed, key=signed.__getitem__):
        if signed[label][1] < best[1]:
            best = signed[label]
        if signed[label] == best:
            on_front.append(label)
    return tuple(on_front)
