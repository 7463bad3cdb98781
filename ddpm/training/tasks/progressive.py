"""Progressive distillation: a student learns to take one step where its teacher takes two."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import nn

from ddpm.checks import is_whole
from ddpm.data.batch import Batch
from ddpm.diffusion import GaussianDiffusion
from ddpm.distillation import one_step_for_two
from ddpm.forward import q_sample
from ddpm.losses import OF_ERRORS
from ddpm.randomness import Keyed
from ddpm.samplers import Sampler, Student
from ddpm.training.task import Losses
from ddpm.training.tasks.diffusion import Diffusion, Noised, noised_evenly


class Progressive(Diffusion):
    r"""Train a student of N steps: its prediction at x_t shall match two steps of its teacher.

    .. math:: L = w(\text{SNR}(t))\, \| \tilde x - x_{0,\theta}(x_t, t) \|^2, \quad t = \tfrac{i}{N} T, \quad
        i \sim \mathcal U\{1, \ldots, N\} \qquad \text{[PD (student)]}

    with x~ of `ddpm.distillation.one_step_for_two`. With target v and loss "simple" the weight is SNR + 1. Times are
    real, so that N need not divide T. In the draws t is i, the number of the student's step.

    Args:
        model: the student; it begins with the weights of the teacher.
        diffusion: of teacher and student: target v, x_0 or flow, as eps does not determine x_0 where all is noise.
        teacher: the network that is distilled, whose steps are 2 N.
        steps: N, up to T / 2.
        drop, only: as in `Diffusion`.
    Raises: ValueError for an argument out of range.
    Source: Progressive Distillation for Fast Sampling of Diffusion Models (arXiv 2202.00512), algorithm 2.
    """

    trains_variance = False

    def __init__(
        self,
        model: nn.Module,
        diffusion: GaussianDiffusion,
        teacher: nn.Module,
        steps: int = 1,
        drop: float = 0.0,
        only: Sequence[str] | None = None,
    ):
        super().__init__(model, diffusion, drop, only=only)
        if diffusion.target == "eps":
            raise ValueError("target = 'eps' does not determine x_0 where all is noise, so it cannot draw in few "
                             "steps; distil a run with diffusion.target=v")  # fmt: skip
        T = diffusion.schedule.T
        if not is_whole(steps, 1, T // 2):
            raise ValueError(f"steps = {steps!r} of the student must be an integer in 1..{T // 2}, half of T = {T}")
        if diffusion.loss_name not in OF_ERRORS:
            raise ValueError(
                f"diffusion.loss = {diffusion.loss_name!r} has no effect on distillation; allowed: "
                f"{', '.join(OF_ERRORS)}"
            )
        self.frozen["teacher"] = teacher.eval().requires_grad_(False)
        self.steps = steps

    @property
    def preview_sampler(self) -> Sampler:
        """The sampler that takes the student's own steps."""
        return Student(self.steps)

    def draw(self, batch: Batch, random: Keyed, progress: float) -> Noised:
        """Draw the number of a step, eps, and which conditions are nulled, for a step's whole batch."""
        drawn = super().draw(batch, random, progress)
        i = torch.randint(1, self.steps + 1, drawn.t.shape, device=drawn.t.device, generator=random("steps"))
        return replace(drawn, t=i)

    def losses(self, drawn: Noised, progress: float) -> Losses:  # type: ignore[override]  # its own draws
        """Return one part, "loss", (B,)."""
        schedule, stride = self.diffusion.schedule.to(drawn.x_0.device), self.diffusion.schedule.T / self.steps
        t, s = drawn.t.double() * stride, (drawn.t.double() - 1) * stride
        x_t = q_sample(schedule, drawn.x_0, t, drawn.eps)
        teacher = self.diffusion.denoiser(self.frozen["teacher"], drawn.condition.for_network(self.frozen["teacher"]))
        x_0 = one_step_for_two(schedule, teacher, x_t, t, t - stride / 2, s)
        return {"loss": self.diffusion.loss_towards(self.model, x_0, x_t, t, drawn.condition.for_network(self.model))}

    def draw_held_out(self, batch: Batch, random: Keyed) -> Noised:
        """Return draws as `Diffusion.draw_held_out` does, with the steps of the student evenly spread."""
        return noised_evenly(batch, self.steps, random)
