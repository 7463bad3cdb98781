"""The exponential moving average of the weights."""

import copy

import torch
from torch import Tensor, nn


class EMA:
    r"""An exponential moving average of a network's weights that is unbiased from the first step.

    .. math:: \theta'_n = d_n\, \theta'_{n-1} + (1 - d_n)\, \theta_n, \quad
        d_n = \min\left(\text{decay}, \frac{n - 1}{n - 1 + \text{warmup}}\right)

    While d_n rises, the n-th average weighs step r by about (r / n)^(warmup - 1): it looks back over a fixed share of
    the training so far, whatever its length, and the random start (d_1 = 0) is not in it. Until `decay` caps it this is
    the power function with gamma = warmup - 1, whose relative width `ddpm.training.post_hoc.width` gives: 0.09 for 9.

    Args:
        model: the network; its weights start the average. Buffers are copied, not averaged.
        decay: the largest d_n, in [0, 1).
        warmup: how slowly d_n rises, >= 0; 0 uses `decay` from the first step. 9 looks back over a tenth of the steps.
    Raises:
        ValueError: an argument out of range.
    """

    def __init__(self, model: nn.Module, decay: float = 0.9999, warmup: float = 9.0):
        if not 0 <= decay < 1:
            raise ValueError(f"ema decay = {decay:g} must lie in [0, 1)")
        if warmup < 0:
            raise ValueError(f"ema warmup = {warmup:g} must be >= 0")
        self.decay, self.warmup, self.updates = decay, warmup, 0
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self._parameters: list[Tensor] = list(self.model.parameters())

    def decay_at(self, n: int) -> float:
        """Return d_n of the n-th update, n = 1, 2, ..."""
        return min(self.decay, (n - 1) / (n - 1 + self.warmup)) if self.warmup > 0 else self.decay

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Update the average with the weights after an optimizer step."""
        self.updates += 1
        torch._foreach_lerp_(self._parameters, list(model.parameters()), 1 - self.decay_at(self.updates))
        for a, b in zip(self.model.buffers(), model.buffers(), strict=True):
            a.copy_(b)
