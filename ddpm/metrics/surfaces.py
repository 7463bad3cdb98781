"""Fidelity to a requested depth map or solid masks: a network predicts them from samples."""

from collections.abc import Sequence

from einops import reduce
from torch import Tensor

from ddpm.metrics.intervals import student
from ddpm.metrics.quality import Result

KINDS = {"depth": ("error", "correlation"), "masks": ("overlap",)}  # kind of image -> its measures
WORDS = {
    "error": "mean absolute error of the depth",
    "correlation": "correlation of the depth with the requested one, both minus the mean depth",
    "overlap": "intersection over union of where any solid is",
}
SOLID = 0.5  # the least probability with which a pixel counts as part of a solid


def error(y: Tensor, requested: Tensor, unit: float = 1.0) -> Tensor:
    r"""Return the mean absolute error of depths over each image.

    .. math:: e = \frac u d \sum_i |y_i - a_i| \qquad \text{[Depth (error)]}

    Args:
        y, requested: predicted depths y and requested depths a, (N, *).
        unit: u, the length that a depth difference of 1 stands for.
    Returns: (N,).
    """
    return unit * reduce((y - requested).abs(), "n ... -> n", "mean")


def correlation(y: Tensor, requested: Tensor, usual: Tensor) -> Tensor:
    r"""Return the anomaly correlation of predicted and requested depth: both minus the mean depth of each pixel.

    .. math:: r = \frac{\sum_i (y_i - m_i)(a_i - m_i)}{\sqrt{\sum_i (y_i - m_i)^2 \sum_i (a_i - m_i)^2}}
        \qquad \text{[Depth (correlation)]}

    with the mean m over scenes at each pixel. Raw depths of any two scenes correlate, for all have the same ground.

    Args:
        y, requested: (N, *); usual: m, (*).
    Returns: (N,), in [-1, 1]; 0 where one of them equals the mean everywhere.
    Source: the anomaly correlation of weather forecasts (Miyakoda et al. 1972).
    """
    y, requested = y - usual, requested - usual
    products = (y * requested, y * y, requested * requested)
    both, one, other = (reduce(product, "n ... -> n", "sum") for product in products)
    norm = (one * other).sqrt()
    return (both / norm.clamp(min=1e-12)).where(norm > 1e-12, 0.0)


def solid(y: Tensor) -> Tensor:
    r"""Return where any solid is: the union of the masks of all solids.

    .. math:: p = \sum_s \frac{y_s + 1}{2} \ge \frac12 \qquad \text{[Masks (union)]}

    No pixel belongs to two solids, so probabilities add up; and a network that cannot know the order of the solids, and
    predicts the mean over orders, still predicts p.

    Args:
        y: masks (N, S, H, W), 1 where a solid is and -1 elsewhere, or a mean of masks.
    Returns: bool (N, H, W).
    """
    return reduce((y + 1) / 2, "n s h w -> n h w", "sum") >= SOLID


def overlap(y: Tensor, requested: Tensor) -> Tensor:
    r"""Return the intersection over union of the predicted and requested solid masks.

    .. math:: \text{IoU} = \frac{|Y \cap A|}{|Y \cup A|} \qquad \text{[Masks (IoU)]}

    Args:
        y, requested: (N, S, H, W), see `solid`.
    Returns: (N,), in [0, 1]; 1 where neither has any.
    """
    Y, A = solid(y), solid(requested)
    both, either = ((reduce(z.double(), "n h w -> n", "sum")) for z in (Y & A, Y | A))
    return (both / either.clamp(min=1)).where(either > 0, 1.0)


def measured(what: str, y: Tensor, requested: Tensor, usual: Tensor, unit: float) -> Tensor:
    """Return one of the measures `WORDS` for each image, (N,)."""
    if what == "error":
        return error(y, requested, unit)
    return correlation(y, requested, usual) if what == "correlation" else overlap(y, requested)


def results(
    kind: str, drawn: Tensor, real: Tensor, requested: Tensor, rows: Sequence[int], unit: float = 1.0
) -> dict[str, Result]:
    """Return the mean measures of a kind over samples, by name, with those of held-out pictures (ceiling) and a floor.

    The floor is the measure of held-out pictures of other scenes than the requested ones.

    Args:
        kind: one of `KINDS`.
        drawn: predictions from samples, (n, C', H, W).
        real: predictions from held-out pictures of the requested scenes, (M, C', H, W), M >= 2.
        requested: the requested depths or masks, (M, C', H, W).
        rows: which of the M each sample is conditioned on, n indices.
        unit: see `error`.
    """
    usual, found = requested.mean(0), {}
    for what in KINDS[kind]:
        reference = (usual, unit)
        values = measured(what, drawn, requested[list(rows)], *reference).tolist()
        ceiling = student(measured(what, real, requested, *reference).tolist())
        floor = student(measured(what, real.roll(1, 0), requested, *reference).tolist())
        value, low, high = student(values)
        between = "" if low is None else f" (95%: {low:.4g} to {high:.4g})"
        words = f"{WORDS[what]}: {value:.4g}{between}; of held-out pictures, the ceiling: {ceiling[0]:.4g}; "
        words += f"of pictures of other scenes, the floor: {floor[0]:.4g}"
        more = {"real_low": ceiling[1], "real_high": ceiling[2], "floor": floor[0], "real_n": len(real)}
        found[what] = Result(value, ceiling[0], words, low, high, more, "samples")
    return found
