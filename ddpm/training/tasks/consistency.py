"""Consistency distillation and training: a network learns the end point of the probability flow through x_t."""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ddpm.checks import is_whole
from ddpm.data.batch import Batch
from ddpm.diffusion import GaussianDiffusion
from ddpm.distillation import consistency, curriculum, lognormal, pseudo_huber
from ddpm.distillation.consistency import TARGETS
from ddpm.forward import q_sample
from ddpm.randomness import Keyed
from ddpm.samplers import Consistency as ConsistencySampler
from ddpm.samplers import Sampler
from ddpm.samplers.consistency import SIGMA_MAX, SIGMA_MIN, levels
from ddpm.training.task import Losses
from ddpm.training.tasks.diffusion import Diffusion, Noised

PREVIEW_STEPS = 2
LARGEST = 10**5  # steps of a curriculum


@dataclass(frozen=True, kw_only=True)
class Neighbours(Noised):
    """Noised data, with the next lower time, whose prediction is the target.

    Args:
        t, s: real times (B,), s < t; s = 0 is data.
        delta: the difference of their noise levels sigma, (B,).
    """

    s: Tensor
    delta: Tensor


class Consistency(Diffusion):
    r"""Train the consistency function: its value at x_t shall equal that at x_s, a step further down the flow.

    .. math:: L = \frac{1}{\sigma_t - \sigma_s}\, d\left(f_\theta(x_t, t), f_{\theta^-}(x_s, s)\right), \quad
        \theta^- = \operatorname{stopgrad}(\theta), \quad \sigma = \sqrt{\frac{1 - \bar\alpha}{\bar\alpha}}
        \qquad \text{[iCT (loss)]}

    with d the pseudo-Huber distance. *Distillation*: x_s is where a step of DDIM by a teacher arrives from x_t.
    *Training*, without one: x_s has the same x_0 and eps as x_t. Neighbours t, s are those of
    `ddpm.samplers.consistency.levels` with N steps, where N grows with the progress of training, and each pair is drawn
    as often as a lognormal density says.

    Args:
        model: f, as in `ddpm.distillation.consistency`.
        diffusion: of teacher and student; its loss is not used.
        teacher: the network that is distilled, or None.
        s_0, s_1: N in the beginning and in the end, see `ddpm.distillation.curriculum`.
        sigma_min, sigma_max: the noise levels that bound the steps, where the schedule reaches them.
        P_mean, P_std: mean and standard deviation of log sigma, see `ddpm.distillation.lognormal`.
        c: of the pseudo-Huber distance, per square root of the dimension, > 0.
        drop, only: as in `Diffusion`.
    Raises: ValueError for an argument out of range.
    Source: Consistency Models (arXiv 2303.01469), algorithms 2 and 3; Improved Techniques for Training Consistency
        Models (arXiv 2310.14189), which takes no average for theta^- and every other default here.
    """

    replayable = False  # as the state of dropout's generator is read
    trains_variance = False

    def __init__(
        self,
        model: nn.Module,
        diffusion: GaussianDiffusion,
        teacher: nn.Module | None = None,
        s_0: int = 10,
        s_1: int = 1280,
        sigma_min: float = SIGMA_MIN,
        sigma_max: float = SIGMA_MAX,
        P_mean: float = -1.1,
        P_std: float = 2.0,
        c: float = 0.00054,
        drop: float = 0.0,
        only: Sequence[str] | None = None,
    ):
        super().__init__(model, diffusion, drop, only=only)
        if not all(is_whole(s) for s in (s_0, s_1)) or not 1 <= s_0 <= s_1 <= LARGEST:
            raise ValueError(f"s_0 = {s_0!r} and s_1 = {s_1!r} must be integers, 1 <= s_0 <= s_1 <= {LARGEST:,}")
        for name, value in {"P_std": P_std, "c": c, "sigma_min": sigma_min, "sigma_max": sigma_max}.items():
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
                raise ValueError(f"{name} = {value!r} must be a number > 0")
        if isinstance(P_mean, bool) or not isinstance(P_mean, int | float) or not math.isfinite(P_mean):
            raise ValueError(f"P_mean = {P_mean!r} must be a number")
        if diffusion.target not in TARGETS and diffusion.preconditioning is None:
            raise ValueError(
                f"target = {diffusion.target!r}: f(x, 0) = x holds for the targets {', '.join(TARGETS)} alone, or "
                "with a preconditioning; distil a run with diffusion.target=v"
            )
        if teacher is not None:
            self.frozen["teacher"] = teacher.eval().requires_grad_(False)
        self.s_0, self.s_1, self.sigma_min, self.sigma_max = s_0, s_1, sigma_min, sigma_max
        self.P_mean, self.P_std, self.c = P_mean, P_std, c
        self._levels = functools.cache(self._levels_of)
        for N in (s_0, s_1):  # raises for a schedule without noise between sigma_min and sigma_max
            _, _, p = self._levels(N)
            if not p.isfinite().all():
                raise ValueError(f"P_mean = {P_mean:g} and P_std = {P_std:g} leave no noise of the schedule to train")

    @property
    def preview_sampler(self) -> Sampler:
        """Consistency sampling with two steps."""
        return ConsistencySampler(PREVIEW_STEPS, self.sigma_max)

    def draw(self, batch: Batch, random: Keyed, progress: float) -> Neighbours:
        """Draw a pair of neighbouring times, eps, and which conditions are nulled, for a step's whole batch."""
        drawn, (times, sigma, p) = super().draw(batch, random, progress), self._levels(self._steps(progress))
        n = torch.multinomial(p.to(drawn.t.device), len(batch), replacement=True, generator=random("levels"))
        return _neighbours(drawn, times, sigma, n)

    def draw_held_out(self, batch: Batch, random: Keyed) -> Neighbours:
        """Return the pairs of the last N, evenly spread over their density; eps always the same."""
        drawn, (times, sigma, p) = super().draw_held_out(batch, random), self._levels(self.s_1)
        place = (torch.arange(len(batch), dtype=p.dtype) + 0.5) / len(batch)
        n = torch.searchsorted(p.cumsum(0), place).clamp(max=len(p) - 1)
        order = torch.randperm(len(batch), generator=random("levels"), device=drawn.t.device)
        return _neighbours(drawn, times, sigma, n.to(order.device)[order])

    def losses(self, drawn: Neighbours, progress: float) -> Losses:  # type: ignore[override]  # its own draws
        """Return one part, "loss", (B,)."""
        schedule, t, s = self.diffusion.schedule.to(drawn.x_0.device), drawn.t, drawn.s
        x_t = q_sample(schedule, drawn.x_0, t, drawn.eps)
        f = self.diffusion.predictor(self.model, drawn.condition.for_network(self.model))
        with torch.random.fork_rng([x_t.device] if x_t.is_cuda else []):  # f drops the same units in both
            prediction = consistency(f, x_t, t)
        with torch.no_grad():
            x_0, eps = drawn.x_0, drawn.eps
            if teacher := self.frozen.get("teacher"):
                pred = self.diffusion.denoiser(teacher, drawn.condition.for_network(teacher))(x_t, t)
                x_0, eps = pred.x_0, pred.eps
            x_s = q_sample(schedule, x_0, s, eps)
            goal = consistency(f, x_s, s)
        distance = pseudo_huber(prediction, goal, self.c)
        return {"loss": (1 / drawn.delta).to(distance.dtype) * distance}

    def _steps(self, progress: float) -> int:
        return curriculum(progress, self.s_0, self.s_1)

    def _levels_of(self, N: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return times and sigma (N + 1,) of N steps, and the probability of drawing each step, (N,)."""
        times, sigma = levels(self.diffusion.schedule, N, self.sigma_min, self.sigma_max)
        return times, sigma, lognormal(sigma, self.P_mean, self.P_std)


def _neighbours(drawn: Noised, times: Tensor, sigma: Tensor, n: Tensor) -> Neighbours:
    """Return the draws at the upper end t of the n-th step, with its lower end s."""
    times, sigma = times.to(n.device), sigma.to(n.device)
    known = vars(drawn) | {"t": times[n + 1], "s": times[n], "delta": sigma[n + 1] - sigma[n]}
    return Neighbours(**known)
