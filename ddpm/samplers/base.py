"""The only sampling loop."""

import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor

from ddpm.diffusion import Denoise
from ddpm.randomness import SampleNoise
from ddpm.schedules import NoiseSchedule
from ddpm.targets import Prediction

Callback = Callable[[int, int, int, Tensor, Prediction], None]


class Sampler(ABC):
    """Walks from x_T to x_0 over pairs (t, s), s < t, that end at 0; a method defines `step` and nothing else.

    Args:
        steps: number of steps, 1 <= steps <= T; None for every one of the T.
    Raises:
        ValueError: steps out of range, once T is known.
    """

    stochastic = False  # whether `step` consumes noise
    history = 0  # how many earlier predictions `step` consumes

    def __init__(self, steps: int | None = None):
        if steps is not None and (isinstance(steps, bool) or not isinstance(steps, int) or steps < 1):
            raise ValueError(f"steps = {steps!r}: the number of sampling steps must be an integer >= 1")
        self.steps = steps

    def times(self, T: int) -> list[int]:
        """The steps + 1 times from T down to 0, evenly spaced and rounded; the steps need not divide T."""
        steps = T if self.steps is None else self.steps
        if steps > T:
            raise ValueError(f"steps = {steps} is more than the schedule's T = {T}; allowed: 1..{T}")
        return [round(T * (steps - i) / steps) for i in range(steps + 1)]

    @abstractmethod
    def step(
        self,
        schedule: NoiseSchedule,
        denoise: Denoise,
        x_t: Tensor,
        t: int,
        s: int,
        pred: Prediction,
        past: list[tuple[int, Prediction]],
        noise: Tensor | None,
    ) -> Tensor:
        """x_s from x_t, for 0 < s < t.

        Args:
            schedule: on x_t's device.
            denoise: for methods that look at more than one point of a step.
            x_t: (B, *).
            pred: denoise(x_t, t).
            past: the last `history` pairs (t, prediction) before this one, newest last.
            noise: standard normal (B, *) if the method is `stochastic`, else None.
        Returns:
            (B, *).
        """

    @torch.no_grad()
    def __call__(
        self,
        schedule: NoiseSchedule,
        denoise: Denoise,
        x_T: Tensor,
        *,
        generator: torch.Generator | SampleNoise | None = None,
        callback: Callback | None = None,
    ) -> Tensor:
        """Draw samples.

        Args:
            schedule: the constants.
            denoise: the network, with whatever it depends on already bound.
            x_T: starting noise, (B, *).
            generator: the source of step noise: a torch generator on x_T's device, or noise keyed by sample number;
                None for torch's global one.
            callback: called as callback(i, t, s, x_t, pred) before each step, i = 0, 1, ...
        Returns:
            x_0, (B, *).
        """
        schedule, x_t, past = schedule.to(x_T.device), x_T, []
        times = self.times(schedule.T)
        for i, (t, s) in enumerate(itertools.pairwise(times)):
            pred = denoise(x_t, torch.full((len(x_t),), t, device=x_t.device))
            if callback is not None:
                callback(i, t, s, x_t, pred)
            if s == 0:
                return pred.x_0  # the mean of the last step, for every method: no noise is added to a result
            noise = _noise(generator, i, x_t) if self.stochastic else None
            x_t = self.step(schedule, denoise, x_t, t, s, pred, past, noise)
            past = [*past, (t, pred)][-self.history :] if self.history else past


def _noise(generator: torch.Generator | SampleNoise | None, i: int, x_t: Tensor) -> Tensor:
    if isinstance(generator, SampleNoise):
        if len(generator.indices) != len(x_t):
            raise ValueError(f"noise keyed for {len(generator.indices)} samples, but x_t has {len(x_t)}")
        return generator(i + 1, x_t.shape[1:], x_t.device).to(x_t.dtype)
    return torch.randn(x_t.shape, dtype=x_t.dtype, device=x_t.device, generator=generator)
