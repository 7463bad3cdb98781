"""Post-hoc EMA: averages of the weights whose length is chosen after training.

Two averages of known profiles are tracked, snapshots of them are saved from time to time, and any other profile is put
together from these. Karras et al., Analyzing and Improving the Training Dynamics of Diffusion Models, arXiv 2312.02696,
section 3 and appendix C.
"""

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

WIDTHS = (0.05, 0.10)  # sigma_rel of the averages that are tracked
NARROWEST = 0.001  # of a width: far below what two tracked averages can represent
WIDEST = 1 / math.sqrt(12)  # sigma_rel of gamma = 0, the plain mean of all steps
WELL_MATCHED = 0.05  # of a profile's norm: larger errors are visible in the weights (a few thousandths of theirs)
Averages = Mapping[str, Tensor]  # "WIDTH/MODULE/PARAMETER" -> the average
Profile = tuple[float, float]  # t and gamma of a power function


def width(gamma: float) -> float:
    r"""Return the relative width of a power function: its standard deviation as a share of the steps so far.

    .. math:: \sigma_{rel} = (\gamma + 1)^{1/2}\, (\gamma + 2)^{-1}\, (\gamma + 3)^{-1/2}
        \qquad \text{[EDM2 (sigma_rel)]}
    """
    return math.sqrt(gamma + 1) / (gamma + 2) / math.sqrt(gamma + 3)


def exponent(sigma_rel: float) -> float:
    r"""Return the gamma of a relative width: the largest real root of its cubic.

    .. math:: (\gamma + 2)^2 (\gamma + 3) = \sigma_{rel}^{-2} (\gamma + 1) \qquad \text{[EDM2 (gamma)]}

    Args:
        sigma_rel: from `NARROWEST` to below `WIDEST`, where gamma = 0; wider ones weigh early steps most.
    Raises: ValueError for a width out of range.
    """
    if not NARROWEST <= sigma_rel < WIDEST:
        raise ValueError(
            f"the width {sigma_rel:g} must be at least {NARROWEST:g} and below {WIDEST:.4f}, which is that of the "
            "plain mean of all steps"
        )
    s = sigma_rel**-2
    roots = np.roots([1, 7, 16 - s, 12 - s])
    return float(max(root.real for root in roots if abs(root.imag) <= 1e-9 * abs(root)))


def decay(gamma: float, t: int) -> float:
    r"""Return the factor of the earlier average in step t.

    .. math:: \beta_\gamma(t) = (1 - 1 / t)^{\gamma + 1} \qquad \text{[EDM2 (beta_gamma)]}
    """
    return (1 - 1 / t) ** (gamma + 1)


def inner_product(a: Profile, b: Profile) -> float:
    r"""Return the inner product of two power functions p_{gamma, t}, the weight profiles of averages taken at t.

    .. math:: p_{\gamma, t}(\tau) = \frac{\gamma + 1}{t^{\gamma + 1}}\, \tau^\gamma \text{ on } [0, t], \quad
        \langle p_{\gamma_a, t_a}, p_{\gamma_b, t_b} \rangle
        = \frac{(\gamma_a + 1)(\gamma_b + 1)\, (t_a / t_b)^{\gamma_b}}{(\gamma_a + \gamma_b + 1)\, t_b}
        \text{ for } t_a \le t_b \qquad \text{[EDM2 (inner product)]}
    """
    (t_a, gamma_a), (t_b, gamma_b) = sorted([a, b])
    return (gamma_a + 1) * (gamma_b + 1) * (t_a / t_b) ** gamma_b / ((gamma_a + gamma_b + 1) * t_b)


def coefficients(stored: Sequence[Profile], wanted: Profile) -> tuple[np.ndarray, float]:
    r"""Return the coefficients with which stored averages best combine to the wanted profile, by least squares.

    .. math:: A x = b, \quad A_{ij} = \langle p_i, p_j \rangle, \quad b_i = \langle p_i, p \rangle
        \qquad \text{[EDM2 (least squares)]}

    The coefficients are constrained to add up to 1, by a Lagrange multiplier: constant weights then stay
    what they are, and the error is smaller for it, from few snapshots by an order of magnitude.

    Returns: x, one number for each of `stored`; and the norm of the profile's error, as a share of the profile's own
        norm.
    """
    scaled = [(t / wanted[0], gamma) for t, gamma in stored]
    p, n = (1.0, wanted[1]), len(stored)
    A, b = np.ones((n + 1, n + 1)), np.ones(n + 1)
    A[:n, :n] = [[inner_product(p_i, p_j) for p_j in scaled] for p_i in scaled]
    b[:n] = [inner_product(p_i, p) for p_i in scaled]
    A[n, n] = 0
    x = np.linalg.lstsq(A, b, rcond=None)[0][:n]
    norm = inner_product(p, p)
    missed = float(norm - 2 * x @ b[:n] + x @ A[:n, :n] @ x)
    return x, math.sqrt(max(0.0, missed) / norm)


def reconstruct(
    snapshots: Mapping[int, Callable[[], Averages]], t: int, sigma_rel: float, module: str = "model"
) -> tuple[dict[str, Tensor], float]:
    """Return the average of a module's weights at step t, of any width.

    Args:
        snapshots: step -> a function that reads the averages saved there.
        t: the step at which the average is wanted, at or after the last snapshot.
        sigma_rel: its relative width, see `exponent`.
        module: the name of the module in its task.
    Returns: the parameters by name, float64; and the relative error of the profile, see `coefficients`.
    Raises: ValueError for a width out of range, and snapshots that lack the module or do not fit together.
    """
    profiles = [(step, exponent(one)) for step in snapshots for one in WIDTHS]
    x, missed = coefficients(profiles, (t, exponent(sigma_rel)))
    total: dict[str, Tensor] = {}
    for read, shares in zip(snapshots.values(), x.reshape(-1, len(WIDTHS)), strict=True):
        averages = read()
        if not isinstance(averages, dict) or not all(isinstance(value, Tensor) for value in averages.values()):
            raise ValueError("the averages that were tracked are no tensors")
        for one, share in zip(WIDTHS, shares, strict=True):
            prefix = f"{one:g}/{module}/"
            parts = {name.removeprefix(prefix): value for name, value in averages.items() if name.startswith(prefix)}
            total = total or {name: torch.zeros(value.shape, dtype=torch.float64) for name, value in parts.items()}
            shapes = {name: value.shape for name, value in parts.items()}
            if not parts or shapes != {name: value.shape for name, value in total.items()}:
                raise ValueError(f"the snapshots hold no averages of {module!r}, or of different networks")
            for name, value in parts.items():
                total[name] += share * value.double().cpu()
    return total, missed


def tracked(snapshots: int) -> int:
    """Return how many averages are tracked, given the number of snapshots: none without snapshots."""
    return len(WIDTHS) if snapshots else 0


class PowerAverages:
    r"""The tracked averages of some modules' parameters, one for each of `WIDTHS`.

    .. math:: \hat\theta_\gamma(t) = \frac{\gamma + 1}{t^{\gamma + 1}} \int_0^t \tau^\gamma\, \theta(\tau)\, d\tau,
        \quad \hat\theta_\gamma(t) = \beta_\gamma(t)\, \hat\theta_\gamma(t - 1) + (1 - \beta_\gamma(t))\, \theta(t)
        \qquad \text{[EDM2 (power function)]}

    where theta(tau) is theta(t) between steps t - 1 and t. As in `ddpm.training.ema.EMA`, whose warmup is gamma + 1,
    such an average looks back over a fixed share of the training so far, and the random start is not in it.

    Args:
        modules: the modules to average, by name; buffers are not averaged.
    """

    def __init__(self, modules: Mapping[str, nn.Module]):
        named = {f"{name}/{key}": p for name, module in modules.items() for key, p in module.named_parameters()}
        self._parameters: list[Tensor] = list(named.values())
        self._averages = {one: {name: p.detach().clone() for name, p in named.items()} for one in WIDTHS}
        self._gammas = {one: exponent(one) for one in WIDTHS}

    @torch.no_grad()
    def update(self, t: int) -> None:
        """Update the averages with the weights after step t = 1, 2, ..."""
        for one, averages in self._averages.items():
            torch._foreach_lerp_(list(averages.values()), self._parameters, 1 - decay(self._gammas[one], t))

    def state_dict(self) -> dict[str, Tensor]:
        """Return the averages, by "WIDTH/MODULE/PARAMETER"."""
        return {f"{one:g}/{name}": x for one, averages in self._averages.items() for name, x in averages.items()}

    def load_state_dict(self, state: Averages) -> None:
        """Restore `state_dict`; ValueError for that of other networks."""
        own = self.state_dict()
        if {name: x.shape for name, x in own.items()} != {name: x.shape for name, x in state.items()}:
            raise ValueError("the tracked averages of the checkpoint are those of another network")
        for name, x in own.items():
            x.copy_(state[name])
