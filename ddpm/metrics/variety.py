"""Diversity of samples within a class."""

import torch
from torch import Tensor


def variety_within(features: Tensor, y: Tensor, classes: int) -> list[float | None]:
    r"""Return the mean distance of two samples of a class, in features, for each class.

    .. math:: V_k = \frac{2}{n_k (n_k - 1)} \sum_{i < j,\, y_i = y_j = k} \| f_i - f_j \|
        \qquad \text{[Variety (within a class)]}

    Args:
        features: (n, D); y: the class of each, integers (n,) in 0..classes-1.
    Returns:
        V_k for each of the classes; None for one with fewer than two samples.
    """
    found: list[float | None] = []
    for k in range(classes):
        of_class = features[y == k].double()
        found.append(torch.pdist(of_class).mean().item() if len(of_class) > 1 else None)
    return found
