"""Statistics over seeds: means, paired differences between arms, intervals and tests."""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ddpm.metrics.intervals import LEVEL, student

ENOUGH = 5  # pairs: with fewer the points are listed, and nothing is decided

BETTER, WORSE, NO_DIFFERENCE, NOT_DECIDED = "better", "worse", "no difference shown", "not decided"
HIGHER, LOWER, NEITHER = "higher", "lower", "neither"  # also verdicts, of measures where neither way is better


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds with its interval; low and high are None for a single seed."""

    mean: float
    low: float | None
    high: float | None
    points: Mapping[int, float]  # seed -> value


@dataclass(frozen=True)
class Comparison:
    """Comparison of an arm with its baseline: the mean difference, paired by seed, and its interval."""

    mean: float
    low: float | None
    high: float | None
    p: float | None  # by the paired t-test, corrected by Holm over the arms of the measure
    points: Mapping[int, float]  # seed -> arm - its baseline
    verdict: str


def estimate(points: Mapping[int, float], level: float = LEVEL) -> Estimate:
    """Return the mean of a measure over seeds with its interval."""
    return Estimate(*student(list(points.values()), level), dict(points))


def holm(p: Sequence[float]) -> list[float]:
    r"""Return p-values corrected for their number m by Holm's step-down method, in the order given.

    $$ \tilde p_{(i)} = \max_{j \le i} \min(1, (m - j + 1) \, p_{(j)}) \qquad \text{[Holm (step-down)]} $$

    Source: Holm 1979, "A simple sequentially rejective multiple test procedure".
    """
    corrected, largest = [0.0] * len(p), 0.0
    for rank, i in enumerate(sorted(range(len(p)), key=lambda i: p[i])):
        largest = max(largest, min(1.0, (len(p) - rank) * p[i]))
        corrected[i] = largest
    return corrected


def p_of_no_difference(differences: Sequence[float]) -> float:
    """Return the two-sided p-value of the paired t-test of the hypothesis of no difference.

    1 for differences that are not all finite; the sign test's p-value for equal ones.
    """
    if not all(map(math.isfinite, differences)):
        return 1.0
    mean, n = math.fsum(differences) / len(differences), len(differences)
    s = float(np.std(differences, ddof=1))
    if s <= 1e-9 * abs(mean):  # equal differences: only their common sign is evidence
        return 1.0 if mean == 0 else 2.0 ** (1 - n)
    from scipy import stats  # takes a second to import

    return float(2 * stats.t.sf(abs(mean) / (s / math.sqrt(n)), n - 1))


def compare(
    arms: Mapping[str, Mapping[int, float]],
    baselines: Mapping[str, Mapping[int, float]],
    better: str,
    level: float = LEVEL,
    survivors: Collection[str] = (),
) -> dict[str, Comparison]:
    """Compare every arm with its baseline, paired by seed, corrected by Holm over those that can be decided.

    An interval is Student's at the level at which Holm's method tests the arm, so that it excludes zero exactly where
    the arm is marked: the smallest of m p-values at 1 - alpha / m, the next at 1 - alpha / (m - 1), and so on; from the
    first that is not significant on, all at the level of that one. So all marks are right together with probability
    `level`; the intervals hold individually, and cover all true differences simultaneously less often.

    Args:
        arms: label -> seed -> value, without the baselines.
        baselines: label of each of these arms -> seed -> value of what it is compared with.
        better: "lower" or "higher"; "neither" for a measure that describes arms without ranking them.
        survivors: arms with failed seeds: the remaining seeds are a biased selection, and decide nothing.
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
    """Return the labels of the Pareto-optimal points (cost, quality), by cost.

    A point is dominated if it costs no less than another and is no better, unless they are equal in both.

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
