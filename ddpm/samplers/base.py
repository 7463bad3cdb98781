"""The only sampling loop, and the spacings of its times."""

import copy
import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from ddpm.checks import check_one_of, is_whole
from ddpm.forward import q_step
from ddpm.randomness import SampleNoise, normal
from ddpm.schedules import MOST, NoiseSchedule, is_integer
from ddpm.targets import Denoise, Prediction

Callback = Callable[[int, int | float, int | float, Tensor, Prediction], None]
"""(i, t, s, x_t, pred): called before step i, from t to s."""
Before = Callable[[int, int | float, Tensor], Tensor]
"""(i, t, x_t) -> x_t, (B, *): the point from which step i is taken instead."""

SPACINGS = ("uniform", "trailing", "quadratic", "log_snr", "karras")
GRIDS = ("integer", "continuous")
RHO = 7.0  # of EDM (5): how much more finely low noise is resolved than high noise


class Step(NamedTuple):
    """The arguments of a method's step from t to s, 0 < s < t; Langevin dynamics also moves at s = t."""

    schedule: NoiseSchedule
    """On x_t's device."""
    denoise: Denoise
    """For methods that evaluate more than one point of a step."""
    x_t: Tensor
    """(B, *)."""
    t: int | float
    s: int | float
    pred: Prediction
    """denoise(x_t, t)."""
    past: Sequence[tuple[int | float, Prediction]] = ()
    """The last `history` pairs (t, prediction) before this one, newest last."""
    noise: Any = None
    """Standard normal (B, *) if the method is `stochastic`, else None."""


class Sampler(ABC):
    r"""Base of samplers: integrate from x_T to x_0 over pairs (t, s), s < t, that end at 0; a method defines `step`.

    With N steps the times t_0 = T > t_1 > ... > t_N = 0 are, for i < N,

    - "uniform": T (N - i) / N.
    - "trailing": T, T - T / N, T - 2 T / N, ... of Lin et al. (arXiv 2305.08891, table 2). That is "uniform" by another
      name: here t = T is the last step of the process and t = 0 is data, so even times from T to 0 never miss T.
    - "quadratic": T ((N - i) / N)^2, DDIM (arXiv 2010.02502, appendix D.2): more steps where there is little noise.
    - "log_snr": even in lambda, from lambda_T to lambda_1.
    - "karras": in the noise level sigma = sqrt((1 - alpha_bar) / alpha_bar), from sigma_max at T to sigma_min at t = 1,
      by `karras_sigmas`.

    If beta_T = 1, the log-SNR at T is infinite, and for the last two T is followed by these times from T - 1 on.

    No network is trained on 0 < t < 1, so a time there becomes 1. On the integer grid times are rounded, halves to
    even. Equal times are taken once: `times` lists those that remain, `evaluations` counts their cost.

    Args:
        steps: number N of steps, 1 <= steps, and <= T on the integer grid; None for T.
        spacing: one of the above.
        grid: "integer" uses only the times of training; "continuous" uses real ones, through
            `NoiseSchedule.t_at` and `lambda_at`.
        times: the times themselves, falling, from at most T down to 0 (0 is added if it is left out). They are used
            unchanged, and `steps` and `spacing` are then ignored.
    Raises:
        ValueError: an argument out of range; on use, more steps than T on the integer grid.
    """

    stochastic = False  # whether `step` or `perturb` consumes noise
    order = 1  # of the method: also the fewest steps it needs
    history = 0  # how many earlier predictions `step` consumes
    end = 0  # the last time: data, unless changed by `ending_at`

    def __init__(
        self,
        steps: int | None = None,
        spacing: str = "uniform",
        grid: str = "integer",
        times: Sequence[int | float] | None = None,
    ):
        if steps is not None and not is_whole(steps, 1, MOST):
            raise ValueError(f"steps = {steps!r}: the number of sampling steps must be an integer >= 1, up to {MOST:,}")
        check_one_of("spacing", spacing, SPACINGS)
        check_one_of("grid", grid, GRIDS)
        self.spacing, self.grid = spacing, grid
        self.fixed_times = None if times is None else _checked_times(times, grid)
        self.steps = steps if self.fixed_times is None else len(self.fixed_times) - 1

    def times(self, schedule: NoiseSchedule) -> list[int] | list[float]:
        """Return the sampling times, strictly falling from T (or the first of `times`) to 0, or to `end`.

        Returns:
            Integers on the integer grid, floats on the continuous one.
        Raises:
            ValueError: times that do not exist on this schedule.
        """
        T, steps = schedule.T, self.steps
        if self.fixed_times is not None:
            if self.fixed_times[0] > T:
                raise ValueError(
                    f"times = {self.fixed_times} start at {self.fixed_times[0]}, above the schedule's T = {T}"
                )
            return self._ended(self.fixed_times)
        steps = T if steps is None else steps
        if self.grid == "integer" and steps > T:
            raise ValueError(
                f"steps = {steps} is more than the schedule's T = {T}; allowed: 1..{T}, or any with grid=continuous"
            )
        real = [max(t, 1) for t in _spaced(schedule, self.spacing, steps)] + [0]
        times = list(dict.fromkeys(map(round, real) if self.grid == "integer" else map(float, real)))
        if len(times) - 1 < self.order:
            raise ValueError(
                f"order = {self.order} needs at least {self.order} steps, but on T = {T} only {len(times) - 1} are left"
            )
        return self._ended(times)

    def ending_at(self, end: int) -> Self:
        """Return a copy that ends at a time t = end >= 0 in place of data, by an ordinary step of its own.

        Published pipelines with set_alpha_to_one = false end so, at t = 1, where some noise is left.

        Raises: ValueError for an end that is no integer >= 0.
        """
        if not is_whole(end, 0):
            raise ValueError(f"end = {end!r} must be an integer >= 0; 0 is data")
        other = copy.copy(self)
        other.end = end
        return other

    def _ended(self, times: list[int] | list[float]) -> list[int] | list[float]:
        """Return times that fall to 0, or only as far as `end`; ValueError where none is above it."""
        if self.end == 0:
            return times
        above = [t for t in times if t > self.end]
        if not above:
            raise ValueError(f"times = {times} hold none above the end of the walk, {self.end}")
        return [*above, self.end]

    def evaluations(self, schedule: NoiseSchedule) -> int:
        """Return how often the network is evaluated for one batch."""
        pairs = itertools.pairwise(self.times(schedule))
        return sum(self.calls(schedule, t, s) if s > 0 else 1 for t, s in pairs)

    def calls(self, schedule: NoiseSchedule, t: int | float, s: int | float) -> int:
        """Return the evaluations of the network for the step from t to s > 0, that at (x_t, t) included."""
        return 1

    def perturb(
        self, schedule: NoiseSchedule, x_t: Tensor, t: int | float, noise: Tensor, steps: int
    ) -> tuple[Tensor, int | float]:
        """Return (x_t, t) to take a step from instead, for methods that add noise first; `steps` is the total."""
        return x_t, t

    @abstractmethod
    def step(self, step: Step) -> Tensor:
        """Return x_s from x_t, for 0 < s < t, (B, *)."""

    def __call__(
        self,
        schedule: NoiseSchedule,
        denoise: Denoise,
        x_T: Tensor,
        *,
        generator: torch.Generator | SampleNoise | None = None,
        callback: Callback | None = None,
        before: Before | None = None,
    ) -> Tensor:
        """Draw samples: `integrate` over this sampler's own `times`.

        Args:
            schedule: the constants.
            denoise: the network, with its condition and guidance already bound.
            x_T: starting noise, (B, *).
            generator: the source of step noise: a torch generator on x_T's device, or noise keyed by sample number;
                None for torch's global one.
            callback: called as callback(i, t, s, x_t, pred) before each step, i = 0, 1, ...
            before: called as before(i, t, x_t) at the start of each step: the x_t that it returns is evaluated, passed
                to the callback and stepped from. So known pixels, noised to t, can be put back in. t is the time that
                `perturb` returned; a second evaluation within a step, if the method has one, is not preceded by it.
        Returns:
            x_0, (B, *).
        """
        times = self.times(schedule)
        return integrate(self, schedule, denoise, x_T, times, generator=generator, callback=callback, before=before)


class AdamsBashforth(Sampler):
    """Base of linear multistep methods that combine the last predictions of eps, up to four; a method defines `step`.

    Args:
        steps, spacing, grid, times: as in `Sampler`.
        order: how many predictions, 1 to 4, at most the number of steps.
    Raises:
        ValueError: another order, or one that the number of steps never reaches.
    """

    def __init__(
        self,
        steps: int | None = 50,
        order: int = 4,
        spacing: str = "uniform",
        grid: str = "integer",
        times: Sequence[int | float] | None = None,
    ):
        super().__init__(steps, spacing, grid, times)
        check_order(order, (1, 2, 3, 4), self.steps)
        self.order, self.history = order, order - 1


@torch.no_grad()
def integrate(
    sampler: Sampler,
    schedule: NoiseSchedule,
    denoise: Denoise,
    x_t: Tensor,
    times: Sequence[int | float],
    *,
    generator: torch.Generator | SampleNoise | None = None,
    callback: Callback | None = None,
    before: Before | None = None,
    renoise: bool = False,
) -> Tensor:
    """Integrate along any times: the loop of every sampler.

    Times that end at 0 end with D(x_t, t), the mean of the last step, for every method: no noise is added to a
    result, and no solver's order survives that step. To measure an order, end at s > 0.

    With `renoise` times may rise again, as RePaint's does: from t to s > t noise is added by the forward process,
    q(x_s | x_t). That evaluates no network and calls neither `before` nor `callback`, and multistep methods start anew
    after it. Noise is keyed by i, the index of the pair, so each visit of a time has its own. At 0 in the
    middle x_0 is D(x_t, t), and times rise from there.

    Args:
        x_t: the starting point, at times[0], (B, *).
        times: t_0, t_1, ..., strictly falling; rising ones take `DDIM` from data to noise, or add noise.
        renoise: whether rising times add noise; False takes the sampler's own step upwards.
        schedule, denoise, generator, callback, before: as in `Sampler.__call__`.
    Returns:
        x at the last time, (B, *).
    Raises:
        ValueError: with `renoise`, a time that follows itself.
    Source of rising times: RePaint (Lugmayr et al., arXiv 2201.09865), algorithm 1.
    """
    schedule, past = schedule.to(x_t.device), []
    rising = _rising(times) if renoise else set()
    for i, (t, s) in enumerate(itertools.pairwise(times)):
        if i in rising:
            x_t, past = q_step(schedule, x_t, s, _noise(generator, i, x_t), t), []
            continue
        noise = _noise(generator, i, x_t) if sampler.stochastic and s > 0 else None
        if noise is not None:
            x_t, t = sampler.perturb(schedule, x_t, t, noise, len(times) - 1 - len(rising))
        if before is not None:
            x_t = before(i, t, x_t)
        pred = evaluate(denoise, x_t, t)
        if callback is not None:
            callback(i, t, s, x_t, pred)
        if s == 0 and not renoise:
            return pred.x_0
        x_t = pred.x_0 if s == 0 else sampler.step(Step(schedule, denoise, x_t, t, s, pred, past, noise))
        past = [*past, (t, pred)][-sampler.history :] if sampler.history else past
    return x_t


def evaluate(denoise: Denoise, x_t: Tensor, t: int | float) -> Prediction:
    """Return denoise(x_t, t) with t for each sample, (B,): int64, or float64 for real t."""
    dtype = torch.int64 if is_integer(t) else torch.float64
    return denoise(x_t, torch.full((len(x_t),), t, dtype=dtype, device=x_t.device))


def alpha_bars(schedule: NoiseSchedule, *times: int | float) -> list[float]:
    """Return alpha_bar at each time as a number, read on the CPU so that no device has to wait."""
    return [schedule.alpha_bar_of(t) for t in times]


def with_signal(
    schedule: NoiseSchedule, past: Sequence[tuple[int | float, Prediction]]
) -> list[tuple[int | float, Prediction]]:
    """Return `past` without predictions at alpha_bar_t = 0, whose lambda, -infinity, cannot be extrapolated from."""
    return [(t, pred) for t, pred in past if alpha_bars(schedule, t)[0] > 0]


def check_order(order: int, allowed: Sequence[int], steps: int | None) -> None:
    """Raise ValueError for an order that a method does not have, or that the number of steps never reaches."""
    if isinstance(order, bool) or order not in allowed:
        raise ValueError(f"order = {order!r} is not known here; allowed: {', '.join(map(str, allowed))}")
    if steps is not None and steps < order:
        raise ValueError(
            f"order = {order} needs at least {order} steps, but steps = {steps}; allowed with so few: order <= {steps}"
        )


def karras_sigmas(sigma_max: float, sigma_min: float, N: int) -> Tensor:
    r"""Return N noise levels from sigma_max to sigma_min, (N,), float64.

    .. math:: \sigma_i = \left(\sigma_{\max}^{1/\rho} + \frac{i}{N - 1}
        \left(\sigma_{\min}^{1/\rho} - \sigma_{\max}^{1/\rho}\right)\right)^\rho, \quad \rho = 7 \qquad \text{[EDM (5)]}
    """
    i = torch.arange(N, dtype=torch.float64)
    root_max, root_min = sigma_max ** (1 / RHO), sigma_min ** (1 / RHO)
    return (root_max + i / max(N - 1, 1) * (root_min - root_max)) ** RHO


def _spaced(schedule: NoiseSchedule, spacing: str, N: int) -> list[float]:
    """Return the N real times before 0."""
    T = schedule.T
    if spacing in ("uniform", "trailing"):
        return [T * (N - i) / N for i in range(N)]
    if spacing == "quadratic":
        return [T * (N - i) ** 2 / N**2 for i in range(N)]
    schedule = schedule.to("cpu")
    if schedule.alpha_bar[-1] == 0:
        return [T, *(_spaced(NoiseSchedule(schedule.beta[1:-1]), spacing, N - 1) if T > 1 and N > 1 else [])]
    lambda_T, lambda_1 = schedule.lambda_[-1], schedule.lambda_[1]
    if spacing == "log_snr":
        i = torch.arange(N, dtype=torch.float64)
        lambda_i = lambda_T + i / max(N - 1, 1) * (lambda_1 - lambda_T)
    else:
        lambda_i = -karras_sigmas(math.exp(-lambda_T), math.exp(-lambda_1), N).log()
    inner = schedule.t_at(lambda_i).tolist()[1:-1]
    return [T, *inner, 1][:N]


def _checked_times(times: Sequence[int | float], grid: str) -> list[int] | list[float]:
    """Return the times of a user, checked; 0 is added if it is missing."""
    if isinstance(times, Sequence) and not isinstance(times, str):
        listed = [t.item() if hasattr(t, "item") else t for t in times]
    else:  # an array, say, or one time
        listed = times.tolist() if hasattr(times, "tolist") else times
        listed = listed if isinstance(listed, list) else [listed]
    kinds = int if grid == "integer" else int | float
    for t in listed:
        if isinstance(t, bool) or not isinstance(t, kinds) or not 0 <= t < math.inf:
            need = "integers >= 0 (real times need grid=continuous)" if grid == "integer" else "numbers >= 0"
            raise ValueError(f"times = {times!r} holds {t!r}; allowed: {need}")
    if not any(listed):
        raise ValueError(f"times = {times!r}: at least one time above 0 is needed")
    for t, s in itertools.pairwise(listed):
        if s >= t:
            raise ValueError(f"times = {times!r} must fall strictly, but {s} follows {t}")
    listed = listed if listed[-1] == 0 else [*listed, 0]
    return listed if grid == "integer" else [float(t) for t in listed]


def _rising(times: Sequence[int | float]) -> set[int]:
    """Return the indices i of pairs of times that rise; ValueError where a time repeats."""
    for t, s in itertools.pairwise(times):
        if t == s:
            raise ValueError(f"times = {list(times)} must fall or rise with renoise = True, but {s} follows {t}")
    return {i for i, (t, s) in enumerate(itertools.pairwise(times)) if s > t}


def _noise(generator: torch.Generator | SampleNoise | None, i: int, x_t: Tensor) -> Tensor:
    return normal(generator, i + 1, x_t)
