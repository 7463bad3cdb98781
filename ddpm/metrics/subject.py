"""Subject fidelity: similarity of samples to the pictures of a subject, between a floor and a ceiling."""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from ddpm.metrics.intervals import half_width
from ddpm.metrics.quality import Result

NAME = "subject"


def likeness(drawn: Tensor, real: Tensor) -> Tensor:
    r"""Return the mean cosine similarity of each picture's features to those of a subject's pictures.

    .. math:: s_i = \frac 1M \sum_{j=1}^M \frac{f_i \cdot g_j}{|f_i|\, |g_j|} \qquad \text{[DreamBooth (likeness)]}

    Args:
        drawn: f, (n, F); real: g, of the subject's own pictures, (M, F).
    Returns: (n,), in [-1, 1].
    Source: DreamBooth (arXiv 2208.12242), section 4.1, which uses features of DINO and of CLIP.
    """
    return (F.normalize(drawn, dim=1) @ F.normalize(real, dim=1).T).mean(1)


def result(drawn: Tensor, few: Tensor, views: Tensor, others: Tensor | None) -> Result:
    """Return the mean likeness of samples, with that of held-out views of the subject (ceiling) and of others (floor).

    Args:
        drawn: features of samples, (n, F).
        few: features of the training pictures, (M, F), with which all are compared.
        views: features of held-out views, (V, F).
        others: features of the same scenes with another solid in the subject's place; None where there are none.
    Returns: with 95 % by the standard error; `floor`, and `share`, the value's place between floor and ceiling, None
        where these are no further apart than their 95 %.
    """
    (value, error), (ceiling, above) = _mean(likeness(drawn, few)), _mean(likeness(views, few))
    half = half_width(error)
    low, high = value - half, value + half
    words = f"likeness {value:.3f} (95%: {low:.3f} to {high:.3f}) to the pictures it learned from; of held-out views, "
    words += f"the ceiling: {ceiling:.3f}"
    more: dict[str, float | None] = {"real_n": len(views)}
    if others is not None:
        floor, below = _mean(likeness(others, few))
        apart = ceiling - floor > half_width(math.hypot(above, below))  # else a share means nothing
        share = (value - floor) / (ceiling - floor) if apart else None
        more |= {"floor": floor, "share": share}
        words += f"; of other solids, the floor: {floor:.3f}; "
        words += f"{share:.0%} of the way" if share is not None else "too near the ceiling to tell the subject by"
    return Result(value, ceiling, words, low, high, more, "standard error")


def _mean(s: Tensor) -> tuple[float, float]:
    """Return the mean of numbers, (n,), and its standard error; 0 for one."""
    return s.mean().item(), (s.std() / len(s) ** 0.5).item() if len(s) > 1 else 0.0


def seen(presence: Tensor) -> Tensor:
    """Return features (B, PAIRS) of pictures: a reader's probability of each pair of a colour and a shape.

    Args:
        presence: logits, see `ddpm.metrics.reader.Reading`.
    """
    return torch.sigmoid(presence)
