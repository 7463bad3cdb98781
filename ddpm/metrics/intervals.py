"""Confidence intervals: normal and Student's of a mean, and Wilson's of a proportion."""

import math
from collections.abc import Sequence
from statistics import NormalDist

LEVEL = 0.95


def half_width(error: float, level: float = LEVEL) -> float:
    r"""Return half the width of the interval of a normally distributed estimate, from its standard error.

    $$ z\, \sigma, \qquad z = \Phi^{-1}((1 + level) / 2) \qquad \text{[Normal (interval)]} $$

    so that 95 % of such estimates lie within z = 1.96 standard errors of the truth.
    """
    return NormalDist().inv_cdf((1 + level) / 2) * error


def student(values: Sequence[float], level: float = LEVEL) -> tuple[float, float | None, float | None]:
    r"""Return the mean of n values and its interval by Student's t with n - 1 degrees of freedom.

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


def wilson(k: int, n: int, level: float = LEVEL) -> tuple[float, float]:
    r"""Return Wilson's score interval (low, high) of a share p = k / n, of k cases among n.

    $$ \Big( p + \frac{z^2}{2n} \pm z \sqrt{\frac{p (1 - p)}{n} + \frac{z^2}{4 n^2}} \Big) \Big/
       \Big( 1 + \frac{z^2}{n} \Big), \qquad z = \Phi^{-1}((1 + level) / 2) \qquad \text{[Wilson (interval)]} $$

    It lies in [0, 1] and has a width where k is 0 or n. Wilson 1927, "Probable inference, the law of succession, and
    statistical inference".

    Raises: ValueError unless 0 <= k <= n and n >= 1.
    """
    if not 0 <= k <= n or n < 1:
        raise ValueError(f"k = {k} of n = {n}: a share needs 0 <= k <= n and n >= 1")
    p, z = k / n, half_width(1.0, level)
    half = z * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    low, high = ((p + z**2 / (2 * n) + side * half) / (1 + z**2 / n) for side in (-1, 1))
    return 0.0 if k == 0 else low, 1.0 if k == n else high  # exact, despite rounding


def share_in_words(k: int, n: int) -> str:
    """Format the share k / n with its 95 % interval, such as "3 of 4, 75.0% (95%: 30.1% to 95.4%)"."""
    low, high = wilson(k, n)
    return f"{k:,} of {n:,}, {k / n:.1%} (95%: {low:.1%} to {high:.1%})"


def _quantile(p: float, n: int) -> float:
    """Return the p-quantile, p >= 1/2, of Student's t with n degrees of freedom.

    scipy's own has only nine digits in some versions. n / (n + t^2) has a beta distribution with n / 2 and 1 / 2.
    """
    from scipy import special  # takes a second to import

    x = special.betaincinv(n / 2, 0.5, 2 * (1 - p))
    return math.sqrt(n * (1 / x - 1))
