"""Muon: an optimizer whose steps change every direction of a weight matrix by the same amount."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.adamw import adamw

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # not towards 1 but fast into 0.7 to 1.2, which serves as well
ITERATIONS, TINY = 5, 1e-7
RMS = 0.2  # of a step of AdamW in units of the rate, about: so that rates for AdamW serve


def orthogonalised(G: Tensor) -> Tensor:
    r"""Return approximately U V^T of G = U S V^T: the nearest matrix with orthogonal rows or columns.

    .. math:: X_0 = G / \lVert G \rVert_F, \quad
        X_{k + 1} = a X_k + b\, (X_k X_k^T) X_k + c\, (X_k X_k^T)^2 X_k \qquad \text{[Muon (Newton-Schulz)]}

    With (a, b, c) = (3.4445, -4.7750, 2.0315) and five iterations singular values from 0.01 of the norm on end between
    0.68 and 1.13.

    Args:
        G: (*, m, n).
    Returns: (*, m, n).
    Source: Jordan et al., Muon: an optimizer for hidden layers in neural networks (2024).
    """
    tall = G.shape[-2] > G.shape[-1]
    X = G.mT if tall else G
    X = X / X.norm(dim=(-2, -1), keepdim=True).clamp(min=TINY)
    a, b, c = NEWTON_SCHULZ
    for _ in range(ITERATIONS):
        A = X @ X.mT
        X = a * X + (b * A + c * A @ A) @ X
    return X.mT if tall else X


class Muon(Optimizer):
    r"""The Muon optimizer: orthogonalised momentum for matrices and convolutions; AdamW for all other parameters.

    .. math:: M_n = \mu M_{n - 1} + (1 - \mu)\, G_n, \quad O_n = \text{orthogonalised}(\mu M_n + (1 - \mu)\, G_n), \quad
        W_n = (1 - \eta \lambda) W_{n - 1} - 0.2\, \eta \sqrt{\max(m, n)}\; O_n \qquad \text{[Muon (step)]}

    The kernel of a convolution is the matrix of its outputs by its receptive field. The factor makes a step as
    large as AdamW's, so that one rate serves both.

    Args:
        params: parameters, or groups of them.
        lr: the rate eta, >= 0.
        momentum: mu, in [0, 1).
        betas, eps: of AdamW, for biases, gains and narrow matrices.
        weight_decay: lambda, >= 0.
        least: the least number of rows and columns of a matrix; with fewer (the last layer of a U-Net, vectors of a
            few classes) AdamW serves.
    Raises:
        ValueError: an argument out of range.
    Source: Jordan et al. 2024, as above; the factor: Liu et al., Muon is Scalable for LLM Training (arXiv 2502.16982).
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, object]],
        lr: float = 1e-3,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.99),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        least: int = 16,
    ):
        rates = {"momentum": momentum, "betas[0]": betas[0], "betas[1]": betas[1]}
        for name, value in rates.items():
            if not 0 <= value < 1:
                raise ValueError(f"{name} = {value:g} must lie in [0, 1)")
        for name, value in {"lr": lr, "eps": eps, "weight_decay": weight_decay}.items():
            if not value >= 0:
                raise ValueError(f"{name} = {value:g} must be >= 0")
        if least < 1:
            raise ValueError(f"least = {least} must be >= 1")
        defaults = {
            "lr": lr, "momentum": momentum, "betas": tuple(betas), "eps": eps, "weight_decay": weight_decay,
            "least": least,
        }  # fmt: skip
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update the parameters by their gradients."""
        for group in self.param_groups:
            alike, others = dict[tuple[int, int], list[Tensor]](), list[Tensor]()
            for p in group["params"]:
                shape = (len(p), p[0].numel()) if p.ndim > 1 else (1, p.numel())
                if p.grad is not None:
                    (alike.setdefault(shape, []) if min(shape) >= group["least"] else others).append(p)
            for shape, matrices in alike.items():
                self._step_matrices(group, shape, matrices)
            if others:
                self._step_others(group, others)

    def _step_matrices(self, group: dict[str, Any], shape: tuple[int, int], parameters: list[Tensor]) -> None:
        """Update parameters of one shape by Muon, all at once."""
        for p in parameters:
            if not self.state[p]:
                self.state[p]["momentum"] = torch.zeros_like(p)
        eta, mu, gradients = group["lr"], group["momentum"], gradients_of(parameters)
        M = [self.state[p]["momentum"] for p in parameters]
        torch._foreach_lerp_(M, gradients, 1 - mu)
        G = torch.stack([x.reshape(shape) for x in torch._foreach_lerp(gradients, M, mu)])
        O_n = orthogonalised(G).mul_(RMS * eta * max(shape) ** 0.5)
        torch._foreach_mul_(parameters, 1 - eta * group["weight_decay"])
        torch._foreach_sub_(parameters, [o.view(p.shape) for o, p in zip(O_n, parameters, strict=True)])

    def _step_others(self, group: dict[str, Any], parameters: list[Tensor]) -> None:
        """Update the other parameters by AdamW."""
        for p in parameters:
            if not self.state[p]:
                self.state[p].update(
                    exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p),
                    step=torch.zeros((), dtype=torch.float32, device=p.device),
                )  # fmt: skip
        exp_avg, exp_avg_sq, step = (
            [self.state[p][name] for p in parameters] for name in ("exp_avg", "exp_avg_sq", "step")
        )
        adamw(
            parameters, gradients_of(parameters), exp_avg, exp_avg_sq, [], step, fused=True, amsgrad=False,
            beta1=group["betas"][0], beta2=group["betas"][1], lr=group["lr"], weight_decay=group["weight_decay"],
            eps=group["eps"], maximize=False,
        )  # fmt: skip


def gradients_of(parameters: list[Tensor]) -> list[Tensor]:
    """Return the gradients of the parameters that have one."""
    return [p.grad for p in parameters if p.grad is not None]
