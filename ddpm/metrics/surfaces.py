"""Is what is drawn as far away, and in the places, as was asked for? A network reads it off samples."""

from collections.abc import Sequence

from einops import reduce
from torch import Tensor

from ddpm.metrics.intervals import student
from ddpm.metrics.quality import Result

KINDS = {"depth": ("error", "correlation"), "masks": ("overlap",)}  # kind of image -> what is measured of it
WORDS = {
    "error": "mean absolute error of the depth",
    "correlation": "correlation of the depth with that asked for, beside what is usual",
    "overlap": "intersection over union of where any solid is",
}
SOLID = 0.5  # the probability from which a pixel counts as one of a solid


def error(y: Tensor, asked: Tensor, unit: float = 1.0) -> Tensor:
    r"""How far depths are from those asked for, in the mean over an image.

    .. math:: e = \frac u d \sum_i |y_i - a_i| \qquad \text{[Depth (error)]}

    Args:
        y, asked: depths a (N, *) as they are told.
        unit: u, of what they are measured in, that 1 of them is.
    Returns: (N,).
    """
    return unit * reduce((y - asked).abs(), "n ... -> n", "mean")


def correlation(y: Tensor, asked: Tensor, usual: Tensor) -> Tensor:
    r"""Anomaly correlation of predicted and requested depth: both minus the mean depth of each pixel.

    .. math:: r = \frac{\sum_i (y_i - m_i)(a_i - m_i)}{\sqrt{\sum_i (y_i - m_i)^2 \sum_i (a_i - m_i)^2}}
        \qquad \text{[Depth (correlation)]}

    with the mean m over scenes at each pixel. As they are, depths of any two scenes correlate: the ground is below.

    Args:
        y, asked: (N, *); usual: m, (*).
    Returns: (N,), in [-1, 1]; 0 where one of them is as usual everywhere.
    Source: the anomaly correlation of weather forecasts (Miyakoda et al. 1972).
    """
    y, asked = y - usual, asked - usual
    both, one, other = (reduce(product, "n ... -> n", "sum") for product in (y * asked, y * y, asked * asked))
    norm = (one * other).sqrt()
    return (both / norm.clamp(min=1e-12)).where(norm > 1e-12, 0.0)


def solid(y: Tensor) -> Tensor:
    r"""Where any solid is, by the masks of all.

    .. math:: p = \sum_s \frac{y_s + 1}{2} \ge \frac12 \qquad \text{[Masks (union)]}

    No pixel is one of two solids, so probabilities add up; and a network that cannot know which solid is called the
    first, and says the mean of what may be, still says p.

    Args:
        y: masks (N, S, H, W), 1 where a solid is and -1 elsewhere, or the mean of such.
    Returns: bool (N, H, W).
    """
    return reduce((y + 1) / 2, "n s h w -> n h w", "sum") >= SOLID


def overlap(y: Tensor, asked: Tensor) -> Tensor:
    r"""Intersection over union of the predicted and requested solid masks.

    .. math:: \text{IoU} = \frac{|Y \cap A|}{|Y \cup A|} \qquad \text{[Masks (IoU)]}

    Args:
        y, asked: (N, S, H, W), see `solid`.
    Returns: (N,), in [0, 1]; 1 where neither has any.
    """
    Y, A = solid(y), solid(asked)
    both, either = ((reduce(z.double(), "n h w -> n", "sum")) for z in (Y & A, Y | A))
    return (both / either.clamp(min=1)).where(either > 0, 1.0)


def measured(what: str, y: Tensor, asked: Tensor, usual: Tensor, unit: float) -> Tensor:
    """One of `WORDS`, of each image, (N,)."""
    if what == "error":
        return error(y, asked, unit)
    return correlation(y, asked, usual) if what == "correlation" else overlap(y, asked)


def results(
    kind: str, drawn: Tensor, real: Tensor, asked: Tensor, rows: Sequence[int], unit: float = 1.0
) -> dict[str, Result]:
    """Mean measures of a kind over samples, by name, beside that of held-out pictures, the ceiling, and the floor.

    The floor is what is read in held-out pictures of other scenes than were asked for.

    Args:
        kind: one of `KINDS`.
        drawn: what is read in samples, (n, C', H, W).
        real: what is read in the held-out pictures of what was asked for, (M, C', H, W), M >= 2.
        asked: what was asked for, (M, C', H, W).
        rows: which of these each sample was asked for, n numbers.
        unit: see `error`.
    """
    usual, found = asked.mean(0), {}
    for what in KINDS[kind]:
        given = (usual, unit)
        values = measured(what, drawn, asked[list(rows)], *given).tolist()
        ceiling = student(measured(what, real, asked, *given).tolist())
        floor = student(measured(what, real.roll(1, 0), asked, *given).tolist())
        value, low, high = student(values)
        between = "" if low is None else f" (95%: {low:.4g} to {high:.4g})"
        words = f"{WORDS[what]}: {value:.4g}{between}; of held-out pictures, the ceiling: {ceiling[0]:.4g}; "
        words += f"of pictures of other scenes, the floor: {floor[0]:.4g}"
        more = {"real_low": ceiling[1], "real_high": ceiling[2], "floor": floor[0], "real_n": len(real)}
        found[what] = Result(value, ceiling[0], words, low, high, more, "samples")
    return found
