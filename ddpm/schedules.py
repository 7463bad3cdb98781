"""Noise schedules: the constants beta, alpha, alpha_bar of the forward process, and the common choices of beta.

The paper's index is the array's index: every constant has T + 1 entries, t runs over 1..T, and t = 0 is data.
"""

import itertools
import math
import numbers
import sys
from collections.abc import Callable, Sequence
from types import EllipsisType
from typing import TypeGuard

import torch
from torch import Tensor

from ddpm.checks import is_whole

MOST = 10**6  # steps of a schedule that is made by formula; its constants then take 64 MB
LEVELS = (1e-5, 1e5)  # of sigma: beyond, alpha_bar in float64 has fewer than six digits of it
REMEMBERED = 4096  # times of a schedule whose alpha_bar is cached as a number
Time = int | float | Tensor
"""A moment of the process: integer, or real in [0, T]; one for all, or one for each sample, (B,)."""


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
        ValueError: no betas, one outside its range, or so many large ones that alpha_bar underflows.
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
        vanished = (self.alpha_bar < sys.float_info.min) & (self.alpha > 0)
        if vanished.any():
            t = int(vanished.int().argmax())
            raise ValueError(
                f"betas of up to {beta.max().item():g} leave nothing of x_0: alpha_bar_t underflows at t = {t} of "
                f"{len(beta)}; take smaller betas, or fewer steps"
            )
        self.beta_tilde = torch.zeros_like(self.beta)
        self.beta_tilde[1:] = (1 - self.alpha_bar[:-1]) / (1 - self.alpha_bar[1:]) * self.beta[1:]
        self.lambda_ = 0.5 * (self.alpha_bar.log() - (1 - self.alpha_bar).log())
        self.clipped = 0  # betas that were clipped when the schedule was made
        self._copies = {self.beta.device: self}
        self._numbers: dict[int | float, float] = {}  # alpha_bar_t by t

    def lambda_at(self, t: Time) -> Tensor:
        r"""Return lambda at integer or real t in [0, T], monotone, and exact at integers.

        Between two integers lambda is interpolated linearly. Where one end is infinite its exponential is:
        e^{-2 lambda} is proportional to t in (0, 1) and, if beta_T = 1, e^{2 lambda} to T - t in (T - 1, T).

        Args:
            t: a number, or (B,).
        Returns:
            () or (B,), float64, on t's device.
        """
        lambda_ = self.following(t).lambda_
        if is_integer(t):
            return lambda_[t]
        t = torch.as_tensor(t, dtype=torch.float64, device=lambda_.device)
        k = t.floor().long().clamp(0, self.T - 1)
        low, high, f = lambda_.take(k), lambda_.take(k + 1), t - k
        from_data, to_noise = low == math.inf, high == -math.inf
        ends = torch.lerp(low.where(~from_data, high), high.where(~to_noise, low), f).where(~(from_data & to_noise), 0)
        inside = ends - 0.5 * f.log().where(from_data, 0) + 0.5 * (1 - f).log().where(to_noise, 0)
        return torch.where(f == 0, low, torch.where(f == 1, high, inside))

    def alpha_bar_at(self, t: Time) -> Tensor:
        """Return alpha_bar at integer or real t in [0, T], by `lambda_at`: () or (B,), float64, exact at integers.

        Raises: ValueError for a time outside, if it is a number or on the CPU; on a GPU times are not checked, and the
            result is undefined.
        """
        alpha_bar = self.following(t).alpha_bar
        if is_integer(t):
            return alpha_bar[t]
        t = torch.as_tensor(t, dtype=torch.float64, device=alpha_bar.device)
        nearest = t.round()
        return torch.where(t == nearest, alpha_bar.take(nearest.long()), torch.sigmoid(2 * self.lambda_at(t)))

    def t_at(self, lambda_: float | Tensor) -> Tensor:
        """Return the real t in [0, T] that has this lambda: the inverse of `lambda_at`, float64, of the same shape.

        Values beyond lambda_T give T. ValueError where beta_T = 1: lambda_T is then -infinity.
        """
        if self.alpha_bar[-1] == 0:
            raise ValueError("beta_T = 1 puts lambda_T at -infinity: times cannot be chosen by log-SNR")
        lambda_ = torch.as_tensor(lambda_, dtype=torch.float64, device=self.lambda_.device)
        table = self.lambda_[1:]
        k = torch.searchsorted(-table, -lambda_.contiguous(), right=True).clamp(1, max(self.T - 1, 1))
        if self.T == 1:
            return torch.exp(2 * (table[0] - lambda_)).clamp(max=1)
        between = k + (lambda_ - table[k - 1]) / (table[k] - table[k - 1])
        return torch.where(lambda_ > table[0], torch.exp(2 * (table[0] - lambda_)), between).clamp(0, self.T)

    def with_finite_lambda(self) -> "NoiseSchedule":
        """Return the schedule of the steps whose lambda is finite: all, or where beta_T = 1 all but the last.

        Raises: ValueError where that is the only one.
        """
        if self.alpha_bar[-1] != 0:
            return self
        if self.T == 1:
            raise ValueError("beta_1 = 1 makes x_1 pure noise: no time has a finite log-SNR")
        return NoiseSchedule(self.beta[1:-1])

    @property
    def T(self) -> int:
        """The number of steps."""
        return len(self.beta) - 1

    def to(self, device: torch.device | str) -> "NoiseSchedule":
        """Return this schedule with its constants on a device; the copy is made once."""
        if device in self._copies:
            return self._copies[device]
        device = torch.empty(0, device=device).device  # "cuda" names the current one
        if device not in self._copies:
            copy = object.__new__(NoiseSchedule)
            copy.__dict__.update({k: v.to(device) if isinstance(v, Tensor) else v for k, v in self.__dict__.items()})
            self._copies[device] = copy
        return self._copies[device]

    def following(self, t: Time) -> "NoiseSchedule":
        """Return this schedule on t's device; itself for a number. ValueError outside 0..T, unless t is on a GPU."""
        if not isinstance(t, Tensor):
            if not 0 <= t <= self.T:
                raise ValueError(f"t = {t} lies outside 0..{self.T}")
            return self
        if t.device.type == "cpu" and t.numel() and not (t.min() >= 0 and t.max() <= self.T):
            outside = t[~((t >= 0) & (t <= self.T))].flatten()[0].item()
            raise ValueError(f"t = {outside} lies outside 0..{self.T}")
        return self.to(t.device)

    def alpha_bar_of(self, t: int | float) -> float:
        """Return alpha_bar at one time as a number, read on the CPU so that no device has to wait."""
        if t not in self._numbers:
            if len(self._numbers) >= REMEMBERED:
                self._numbers.clear()
            self._numbers[t] = self.to("cpu").alpha_bar_at(t).item()
        return self._numbers[t]

    def __repr__(self) -> str:
        return f"NoiseSchedule(T={self.T}, alpha_bar_T={self.alpha_bar[-1].item():.3g})"


def is_integer(t: Time) -> TypeGuard[int | Tensor]:
    """Whether a time is an integer that can index tables, not real."""
    return not t.is_floating_point() if isinstance(t, Tensor) else isinstance(t, numbers.Integral)


def at(values: Tensor, t: int | Tensor | EllipsisType, x: Tensor) -> Tensor:
    """Return values[t] in the dtype and on the device of x, shaped to broadcast against it.

    Args:
        values: a table (T+1,) in float64, so that differences such as 1 - alpha_bar are taken before the cast.
        t: an int, integers (B,), or `...` for values that were read off their tables already.
        x: the tensor (B, *) that the result multiplies.
    Returns:
        (B, 1, ..., 1), or (1, ..., 1) for a number.
    """
    return values.to(x.device)[t].to(x.dtype).reshape(-1, *[1] * (x.ndim - 1))


def linear(T: int = 1000, beta_1: float = 1e-4, beta_T: float = 0.02, rescale: bool = True) -> NoiseSchedule:
    """Return the schedule whose beta rises linearly from beta_1 to beta_T.

    Args:
        T: number of steps, at least 1.
        beta_1, beta_T: the ends, as quoted for T = 1000.
        rescale: multiply the betas by 1000 / T, which leaves alpha_bar_T near its value at T = 1000; False takes them
            literally (with T = 200 x_T then still carries a third of the signal).
    Raises:
        ValueError: a beta outside (0, 1); where T is too small for the rescaled betas, the smallest legal T is named.
    Source: DDPM (arXiv 2006.11239), section 4.
    """
    ends = {"beta_1": beta_1, "beta_T": beta_T}
    return _quoted_for_1000(T, rescale, ends, lambda: torch.linspace(beta_1, beta_T, T, dtype=torch.float64))


def cosine(T: int = 1000, s: float = 0.008, beta_max: float = 0.999) -> NoiseSchedule:
    r"""Return the schedule whose alpha_bar falls as a squared cosine.

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
    t = torch.arange(T + 1, dtype=torch.float64)
    f = torch.cos((t / T + s) / (1 + s) * math.pi / 2) ** 2
    return _of_alpha_bar(f / f[0], beta_max)


def sigmoid(
    T: int = 1000, start: float = -3.0, end: float = 3.0, tau: float = 1.0, beta_max: float = 0.999
) -> NoiseSchedule:
    r"""Return the schedule whose alpha_bar falls as a sigmoid.

    .. math:: \bar\alpha_t = \frac{\sigma(e / \tau) - \sigma((t/T\,(e - b) + b) / \tau)}
        {\sigma(e / \tau) - \sigma(b / \tau)} \qquad \text{[Chen (Algorithm 1)]}

    from b = start to e = end, and beta clipped to at most beta_max.

    Args:
        T: number of steps, at least 1.
        start, end: the part of the sigmoid that is used, start < end.
        tau: its temperature, > 0; a lower one spends more steps at very low and very high noise.
        beta_max: upper bound of beta, in (0, 1).
    Raises:
        ValueError: an argument out of range.
    Source: On the Importance of Noise Scheduling for Diffusion Models (arXiv 2301.10972), algorithm 1.
    """
    _check_T(T)
    if not start < end:
        raise ValueError(f"start = {start:g} must be below end = {end:g}")
    if not tau > 0:
        raise ValueError(f"tau = {tau:g} must be > 0")
    t = torch.arange(T + 1, dtype=torch.float64)
    b, e = torch.tensor([start, end], dtype=torch.float64).div(tau).sigmoid()
    return _of_alpha_bar((e - ((t / T * (end - start) + start) / tau).sigmoid()) / (e - b), beta_max)


def scaled_linear(T: int = 1000, beta_1: float = 0.00085, beta_T: float = 0.012, rescale: bool = True) -> NoiseSchedule:
    """Return the schedule of latent diffusion: sqrt(beta) rises linearly. Arguments and errors as in `linear`.

    Source: Latent Diffusion Models (arXiv 2112.10752), published configurations.
    """
    ends = {"beta_1": beta_1, "beta_T": beta_T}
    return _quoted_for_1000(
        T, rescale, ends, lambda: torch.linspace(beta_1**0.5, beta_T**0.5, T, dtype=torch.float64) ** 2
    )


def constant(T: int = 1000, beta: float = 0.01, rescale: bool = True) -> NoiseSchedule:
    """Return the schedule with one beta for all steps. Arguments and errors as in `linear`.

    Source: Deep Unsupervised Learning using Nonequilibrium Thermodynamics (arXiv 1503.03585); DDPM, section 4.
    """
    return _quoted_for_1000(T, rescale, {"beta": beta}, lambda: torch.full((T,), beta, dtype=torch.float64))


def sigmas(sigma: Tensor | list[float]) -> NoiseSchedule:
    r"""Return the schedule with these noise levels: x_t is x_0 + sigma_t eps, scaled to unit noise.

    .. math:: \bar\alpha_t = \frac{1}{1 + \sigma_t^2}, \quad
        \frac{x_t}{\sqrt{\bar\alpha_t}} = x_0 + \sigma_t \epsilon \qquad \text{[NCSN (levels)]}

    Args:
        sigma: sigma_1 < ... < sigma_T in units of x_0, each from 1e-5 to 1e5. NCSN numbers its levels the other way
            round; here t = 1 has the least noise.
    Raises:
        ValueError: no levels, one out of range, or one that does not rise.
    Source: Generative Modeling by Estimating Gradients of the Data Distribution (arXiv 1907.05600), section 4.
    """
    levels = torch.as_tensor(sigma, dtype=torch.float64)
    if levels.ndim != 1 or len(levels) == 0:
        raise ValueError(f"sigma must be a list of T >= 1 noise levels, got shape {tuple(levels.shape)}")
    legal = (levels >= LEVELS[0]) & (levels <= LEVELS[1])
    if not legal.all():
        raise ValueError(
            f"sigma holds {levels[~legal][0].item():g}: noise levels must lie in [{LEVELS[0]:g}, {LEVELS[1]:g}]"
        )
    before = torch.cat([levels.new_zeros(1), levels[:-1]])
    if not (levels > before).all():
        t = int((levels <= before).nonzero()[0]) + 1
        raise ValueError(
            f"sigma_{t} = {levels[t - 1].item():g} follows {before[t - 1].item():g}: noise levels must rise, from the "
            "least noise at t = 1"
        )
    return NoiseSchedule((levels**2 - before**2) / (1 + levels**2))


def geometric(T: int = 10, sigma_min: float = 0.01, sigma_max: float = 10.0) -> NoiseSchedule:
    r"""Return the schedule whose noise levels are a geometric sequence: the ladder of NCSN.

    .. math:: \sigma_t = \sigma_\text{min} \left(\frac{\sigma_\text{max}}{\sigma_\text{min}}\right)^{(t - 1) / (T - 1)}
        \qquad \text{[NCSN (ladder)]}

    Args:
        T: number of levels, at least 2; a single one is `sigmas([sigma])`.
        sigma_min, sigma_max: the levels at t = 1 and at T, in units of x_0; values above 10 for data in [-1, 1] leaves
            less than a tenth of the signal in x_T.
    Raises:
        ValueError: T < 2, or levels as in `sigmas`.
    Source: Generative Modeling by Estimating Gradients of the Data Distribution (arXiv 1907.05600), section 4.
    """
    _check_T(T)
    if T < 2:
        raise ValueError(f"T = {T}: a geometric sequence needs at least two levels; for one, schedule=sigmas")
    for name, sigma in {"sigma_min": sigma_min, "sigma_max": sigma_max}.items():
        if not LEVELS[0] <= sigma <= LEVELS[1]:
            raise ValueError(f"{name} = {sigma:g} must lie in [{LEVELS[0]:g}, {LEVELS[1]:g}]")
    if not sigma_min < sigma_max:
        raise ValueError(f"sigma_min = {sigma_min:g} must be below sigma_max = {sigma_max:g}")
    return sigmas(torch.logspace(math.log10(sigma_min), math.log10(sigma_max), T, dtype=torch.float64).clamp(*LEVELS))


def respace(schedule: NoiseSchedule, times: Sequence[int]) -> NoiseSchedule:
    r"""Return the schedule of a sub-sequence of the steps; alpha_bar is unchanged at every remaining time.

    .. math:: \beta_{S_i} = 1 - \frac{\bar\alpha_{S_i}}{\bar\alpha_{S_{i-1}}} \qquad \text{[iDDPM (19)]}

    Args:
        times: the remaining times S_1 < S_2 < ..., each in 1..T. The network must still be called with S_i, not i.
    Raises:
        ValueError: times that repeat, fall, or lie outside 1..T.
    Source: Improved DDPM (arXiv 2102.09672), section 4.
    """
    remaining = list(times)
    legal = all(isinstance(t, int) and 1 <= t <= schedule.T for t in remaining)
    if not remaining or not legal or any(a >= b for a, b in itertools.pairwise(remaining)):
        raise ValueError(f"times = {remaining}: integers in 1..{schedule.T}, each larger than the one before")
    alpha_bar = schedule.alpha_bar[[0, *remaining]]
    return NoiseSchedule(1 - alpha_bar[1:] / alpha_bar[:-1])


def zero_terminal_snr(schedule: NoiseSchedule) -> NoiseSchedule:
    r"""Return a schedule with sqrt(alpha_bar) shifted to end at exactly 0 and scaled to begin as before; beta_T is 1.

    .. math:: \sqrt{\bar\alpha'_t} = \sqrt{\bar\alpha_1}\,
        \frac{\sqrt{\bar\alpha_t} - \sqrt{\bar\alpha_T}}{\sqrt{\bar\alpha_1} - \sqrt{\bar\alpha_T}}
        \qquad \text{[Lin (Algorithm 1)]}

    Args:
        schedule: of T >= 2 steps.
    Raises:
        ValueError: T = 1.
    Source: Common Diffusion Noise Schedules and Sample Steps are Flawed (arXiv 2305.08891), algorithm 1.
    """
    if schedule.T < 2:
        raise ValueError(f"T = {schedule.T}: a zero terminal SNR needs at least two steps")
    a = schedule.alpha_bar.sqrt()
    a = a[1] * (a - a[-1]) / (a[1] - a[-1])
    a[0] = 1
    return NoiseSchedule(1 - (a[1:] / a[:-1]) ** 2)


def report(schedule: NoiseSchedule) -> dict[str, float | int]:
    """Return figures that describe a schedule.

    Returns:
        T; the smallest and the largest beta, and how many were clipped to it; the log-SNR at t = 1 and T;
        sqrt(alpha_bar_T), the share of the signal that is left in x_T; 1 / sqrt(alpha_bar_T), the factor by which an
        error of eps is amplified in x_0 at T.
    """
    beta, root = schedule.beta[1:], schedule.alpha_bar[-1].sqrt().item()
    return {
        "T": schedule.T,
        "beta_min": beta.min().item(),
        "beta_max": beta.max().item(),
        "betas clipped": schedule.clipped,
        "log-SNR at 1": 2 * schedule.lambda_[1].item(),
        "log-SNR at T": 2 * schedule.lambda_[-1].item(),
        "sqrt(alpha_bar_T)": root,
        "1 / sqrt(alpha_bar_T)": 1 / root if root else math.inf,
    }


SIGNAL_LEFT, EPS_AMPLIFIED = 0.1, 1000.0


def concerns(schedule: NoiseSchedule, target: str) -> list[str]:
    """Return known problems of a schedule with a target, one sentence each."""
    root = schedule.alpha_bar[-1].sqrt().item()
    found = []
    if root > SIGNAL_LEFT:
        found.append(
            f"x_T still carries {root:.0%} of the signal (sqrt(alpha_bar_T) = {root:.3g}), but sampling starts from "
            f"pure noise: with T = {schedule.T}, take betas rescaled by 1000 / T (rescale=true) or a zero terminal SNR"
        )
    if target == "eps" and root < 1 / EPS_AMPLIFIED:
        found.append(
            f"target eps: at T an error of eps is multiplied by 1 / sqrt(alpha_bar_T) = "
            f"{1 / root if root else math.inf:,.0f} in x_0, and only clipping hides it; targets v, x_0 and flow are "
            "safe"
        )
    return found


def _of_alpha_bar(alpha_bar: Tensor, beta_max: float) -> NoiseSchedule:
    if not 0 < beta_max < 1:
        raise ValueError(f"beta_max = {beta_max:g} must lie in (0, 1)")
    beta = 1 - alpha_bar[1:] / alpha_bar[:-1]
    schedule = NoiseSchedule(beta.clamp(max=beta_max))
    schedule.clipped = int((beta > beta_max).sum())
    return schedule


def _quoted_for_1000(T: int, rescale: bool, ends: dict[str, float], betas: Callable[[], Tensor]) -> NoiseSchedule:
    _check_T(T)
    for name, beta in ends.items():
        if not 0 < beta < 1:
            raise ValueError(f"{name} = {beta:g} must lie in (0, 1)")
    scale = 1000 / T if rescale else 1.0
    largest = max(ends.values())
    smallest_T = math.floor(1000 * largest) + 1
    if rescale and smallest_T > T:
        raise ValueError(
            f"T = {T} is too small: betas quoted for T = 1000 are multiplied by 1000 / T, and {largest:g} * {scale:g} "
            f"= {scale * largest:g} is not below 1; the smallest legal T is {smallest_T}"
        )
    return NoiseSchedule(betas() * scale)


def _check_T(T: int) -> None:
    if not is_whole(T, 1, MOST):
        raise ValueError(f"T = {T!r}: the number of steps must be an integer >= 1, and at most {MOST:,}")
