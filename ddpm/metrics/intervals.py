"""How sure a mean of few numbers is."""

import math
from collections.abc import Sequence

LEVEL = 0.95


def student(values: Sequence[float], level: float = LEVEL) -> tuple[float, float | None, float | None]:
    r"""Mean of n values, and its interval by Student's t with n - 1 degrees of freedom.

    $$ \bar x \pm t_{n-1,\, (1 + level) / 2} \; s / \sqrt n \qquad \text{[Student (interval)]} $$

    Returns: (mean, low, high); without an interval for a single value, and for values that are not all finite.
    """
    if not all(map(math.isfinite, values)):
        return math.nan, None, None
    mean, n = math.fsum(values) / len(values), len(values)
    if n < 2:
        return mean, None, None
    s = math.sqrt(math.fsum((x - mean) ** 2 for x in values) / (n - 1))
    half = _quantile((1 + level) / 2, n - 1) * s / math.sqrt(n)
    return mean, mean - half, mean + half


def _quantile(p: float, n: int) -> float:
    """Of Student's t with n degrees of freedom, p >= 1/2; scipy's own has but nine digits in some versions.

    n / (n + t^2) has a beta distribution with n / 2 and 1 / 2.
    """
    from scipy import special  # takes a second to import

    x = special.betaincinv(n / 2, 0.5, 2 * (1 - p))
    return math.sqrt(n * (1 / x - 1))
