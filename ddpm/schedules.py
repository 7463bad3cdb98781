"""Noise schedules: the constants beta, alpha, alpha_bar of the forward process, and the choices of beta in use.

The paper's index is the array's index: every constant has T + 1 entries, t runs over 1..T, and t = 0 is data.
"""

import math
from types import EllipsisType

import torch
from torch import Tensor


class NoiseSchedule:
    r"""The constants of the forward process q, in float64, each (T+1,).

    .. math::
        \alpha_t = 1 - \beta_t, \quad
        \bar\alpha_t = \prod_{r=1}^{t} \alpha_r, \quad
        \tilde\beta_t = \frac{1 - \bar\alpha_{t-1}}{1 - \bar\alpha_t} \beta_t, \quad
        \lambda_t = \tfrac12 \log \frac{\bar\alpha_t}{1 - \bar\alpha_t}

    Entry 0 is data: beta 0, alpha 1, alpha_bar 1, beta_tilde 0, lambda +inf. lambda is half the log-SNR.

    Args:
        beta: the T variances beta_1 .. beta_T, each in (0, 1]; 1 is legal at T only (x_T is then pure noise).
    Raises:
        ValueError: no betas, or one outside its range.
    Source: DDPM (arXiv 2006.11239), section 2; lambda after DPM-Solver (arXiv 2206.00927).
    """

    def __init__(self, beta: Tensor | list[float]):
        beta = torch.as_tensor(beta, dtype=torch.float64)
        if beta.ndim != 1 or len(beta) == 0:
            raise ValueError(f"beta must be a list of T >= 1 numbers, got shape {tuple(beta.shape)}")
        legal = (1 - beta < 1) & (beta < 1)  # a beta that vanishes in 1 - beta is no step
        legal[-1] |= beta[-1] == 1
        if not legal.all():
            t = int((~legal).nonzero()[0]) + 1
            raise ValueError(
                f"beta_{t} = {beta[t - 1].item():g}: every beta must lie in (0, 1), or be 1 at t = T = {len(beta)}"
            )
        self.beta = torch.cat([beta.new_zeros(1), beta])
        self.alpha = 1 - self.beta
        self.alpha_bar = self.alpha.cumprod(0)
        self.beta_tilde = torch.zeros_like(self.beta)
        self.beta_tilde[1:] = (1 - self.alpha_bar[:-1]) / (1 - self.alpha_bar[1:]) * self.beta[1:]
        self.lambda_ = 0.5 * (self.alpha_bar.log() - (1 - self.alpha_bar).log())
        self._copies = {self.beta.device: self}

    @property
    def T(self) -> int:
        """The number of steps."""
        return len(self.beta) - 1

    def to(self, device: torch.device | str) -> "NoiseSchedule":
        """The same constants on a device; the copy is made once."""
        device = torch.empty(0, device=device).device
        if device not in self._copies:
            copy = object.__new__(NoiseSchedule)
            copy.__dict__.update({k: v.to(device) if isinstance(v, Tensor) else v for k, v in self.__dict__.items()})
            self._copies[device] = copy
        return self._copies[device]

    def __repr__(self) -> str:
        return f"NoiseSchedule(T={self.T}, alpha_bar_T={self.alpha_bar[-1].item():.3g})"


def at(values: Tensor, t: int | Tensor | EllipsisType, x: Tensor) -> Tensor:
    """values[t] in the dtype and on the device of x, shaped to broadcast against it.

    Args:
        values: a table (T+1,) in float64, so that differences such as 1 - alpha_bar are taken before the cast.
        t: an int, integers (B,), or `...` for values that were read off their tables already.
        x: the tensor (B, *) that the result multiplies.
    Returns:
        (B, 1, ..., 1), or (1, ..., 1) for an int.
    """
    return values.to(x.device)[t].to(x.dtype).reshape(-1, *[1] * (x.ndim - 1))


def linear(T: int = 1000, beta_1: float = 1e-4, beta_T: float = 0.02, rescale: bool = True) -> NoiseSchedule:
    """beta rising linearly from beta_1 to beta_T.

    Args:
        T: number of steps, at least 1.
        beta_1, beta_T: the ends, as quoted for T = 1000.
        rescale: multiply the betas by 1000 / T, which keeps alpha_bar_T near its value at T = 1000; False takes them
            literally (with T = 200 x_T then still carries a third of the signal).
    Raises:
        ValueError: a beta outside (0, 1); where T is too small for the rescaled betas, the smallest legal T is named.
    Source: DDPM (arXiv 2006.11239), section 4.
    """
    return _quoted_for_1000(T, rescale, beta_1, beta_T, lambda: torch.linspace(beta_1, beta_T, T, dtype=torch.float64))


def cosine(T: int = 1000, s: float = 0.008, beta_max: float = 0.999) -> NoiseSchedule:
    r"""alpha_bar falling as a squared cosine.

    .. math:: \bar\alpha_t = \frac{f(t)}{f(0)}, \quad f(t) = \cos\left(\frac{t/T + s}{1 + s} \cdot \frac\pi2\right)^2
        \qquad \text{[iDDPM (17)]}

    and :math:`\beta_t = 1 - \bar\alpha_t / \bar\alpha_{t-1}`, clipped to at most beta_max.

    Args:
        T: number of steps, at least 1.
        s: offset that keeps beta_1 from vanishing, >= 0.
        beta_max: upper bound of beta, in (0, 1).
    Raises:
        ValueError: an argument out of range.
    Source: Improved DDPM (arXiv 2102.09672), section 3.2.
    """
    _check_T(T)
    if s < 0:
        raise ValueError(f"s = {s:g}: the offset of the cosine schedule must be >= 0")
    if not 0 < beta_max < 1:
        raise ValueError(f"beta_max = {beta_max:g} must lie in (0, 1)")
    t = torch.arange(T + 1, dtype=torch.float64)
    f = torch.cos((t / T + s) / (1 + s) * math.pi / 2) ** 2
    alpha_bar = f / f[0]
    return NoiseSchedule((1 - alpha_bar[1:] / alpha_bar[:-1]).clamp(max=beta_max))


def _quoted_for_1000(T, rescale, beta_1, beta_T, betas) -> NoiseSchedule:
    _check_T(T)
    for name, beta in {"beta_1": beta_1, "beta_T": beta_T}.items():
        if not 0 < beta < 1:
            raise ValueError(f"{name} = {beta:g} must lie in (0, 1)")
    scale = 1000 / T if rescale else 1.0
    largest = max(beta_1, beta_T)
    smallest_T = math.floor(1000 * largest) + 1
    if rescale and smallest_T > T:
        raise ValueError(
            f"T = {T} is too small: betas quoted for T = 1000 are multiplied by 1000 / T, and {largest:g} * {scale:g} "
            f"= {scale * largest:g} is not below 1; the smallest legal T is {smallest_T}"
        )
    return NoiseSchedule(betas() * scale)


def _check_T(T: int) -> None:
    if isinstance(T, bool) or not isinstance(T, int) or T < 1:
        raise ValueError(f"T = {T!r}: the number of steps must be an integer >= 1")
