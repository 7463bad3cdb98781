"""Smooth random fields of bounded size: uniform cubic B-splines, which are averages of their coefficients."""

import torch
from einops import einsum
from torch import Tensor


def basis(size: int, nodes: int) -> Tensor:
    """Return weights (size, nodes + 3) of the coefficients at the centres of `size` pixels; each row sums to 1.

    Args:
        size: pixels of a side.
        nodes: intervals that the side is divided into.
    """
    at = (torch.arange(size) + 0.5) / size * nodes
    first = at.floor().clamp(max=nodes - 1)
    u = at - first
    weights = torch.stack([(1 - u) ** 3, 3 * u**3 - 6 * u**2 + 4, -3 * u**3 + 3 * u**2 + 3 * u + 1, u**3], 1) / 6
    return torch.zeros(size, nodes + 3).scatter_(1, first[:, None].long() + torch.arange(4), weights)


def field(coefficients: Tensor, height: int, width: int) -> Tensor:
    """Return a smooth field (n, c, height, width) bounded by its coefficients (n, c, nodes + 3, nodes + 3)."""
    nodes = coefficients.shape[-1] - 3
    rows, columns = (basis(side, nodes).to(coefficients) for side in (height, width))
    return einsum(rows, coefficients, columns, "h k, n c k l, w l -> n c h w")
