"""Score matching: a network learns the gradient of the log density of noised data, by any of the objectives."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ddpm.checks import check_one_of
from ddpm.data.batch import Batch
from ddpm.data.dataset import Dataset
from ddpm.diffusion import GaussianDiffusion
from ddpm.oracle import JointMixture
from ddpm.randomness import Keyed
from ddpm.schedules import at
from ddpm.score import (
    PROJECTIONS,
    denoising,
    explicit,
    finite_difference_sliced,
    finite_difference_sliced_vr,
    implicit,
    noise_level,
    score_at_sigma,
    sliced,
    sliced_vr,
)
from ddpm.training.task import Losses
from ddpm.training.tasks.diffusion import Diffusion, Noised

PROJECTED: dict[str, Callable[..., Tensor]] = {
    "sliced": sliced,
    "sliced_vr": sliced_vr,
    "finite_difference": finite_difference_sliced,
    "finite_difference_vr": finite_difference_sliced_vr,
}
OBJECTIVES = ("denoising", "explicit", "implicit", *PROJECTED)


@dataclass(frozen=True, kw_only=True)
class Projected(Noised):
    """Noised data, with the projection directions of the objectives.

    Args:
        v: of mean 0 and covariance I, (B, *).
    """

    v: Tensor


class Score(Diffusion):
    r"""Train a network to be the score of data with noise, at each level of a schedule.

    What the network predicts of x_t is read as the score of x = x_t / sqrt(alpha_bar_t) = x_0 + sigma eps, so that it
    is sampled from, measured and drawn like any diffusion network. The loss of a row is its objective J(x), in the
    units of the squared error of eps, a mean over the d dimensions:

    .. math:: L = \frac{2 \sigma^2}{d} J(s_\theta; x) + c, \quad s_\theta(x) = -\frac{\epsilon_\theta(x_t, t)}{\sigma}
        \qquad \text{[Score (loss)]}

    With the denoising objective and c = 0 that is DDPM's loss. The others do not use eps; with c = 1, the sigma^2
    E || eps / sigma ||^2 / d by which the denoising objective exceeds them on average, they have the same mean. The
    explicit one, c = 0, is less than all of these by what no network can learn, and 0 at best.

    Args:
        model, diffusion, drop, only: as in `Diffusion`; the loss of the diffusion has to be "simple".
        objective: "denoising", "explicit" (of data whose density is known), "implicit", "sliced", "sliced_vr",
            "finite_difference", "finite_difference_vr", see `ddpm.score`.
        projection: the projection directions of the last four, "rademacher" or "gaussian".
        step: of the finite differences, in units of sigma, > 0.
    Raises: ValueError for an argument that is not known or out of range.
    Source: see `ddpm.score`; a network conditioned on the noise level: NCSN (arXiv 1907.05600).
    """

    def __init__(
        self,
        model: nn.Module,
        diffusion: GaussianDiffusion,
        objective: str = "denoising",
        projection: str = "rademacher",
        step: float = 0.1,
        drop: float = 0.0,
        only: Sequence[str] | None = None,
    ):
        super().__init__(model, diffusion, drop, only=only)
        for name, value, allowed in (("objective", objective, OBJECTIVES), ("projection", projection, PROJECTIONS)):
            check_one_of(name, value, allowed)
        if isinstance(step, bool) or not 0 < step < float("inf"):
            raise ValueError(f"step = {step!r} must be > 0")
        if diffusion.loss_name != "simple":
            raise ValueError(
                f"diffusion.loss = {diffusion.loss_name!r} does not apply to score matching; allowed: simple"
            )
        if diffusion.schedule.alpha_bar[-1] == 0:
            raise ValueError("beta_T = 1 makes the noise level sigma_T infinite, and there is no score at it")
        self.objective, self.projection, self.step = objective, projection, step
        self.replayable = objective != "explicit"  # whose truth is computed on the CPU
        self.truth: JointMixture | None = None  # the data's density, where the objective needs it

    def concerns(self) -> list[str]:
        """Return no concerns: levels of noise need not end in pure noise."""
        return []

    def draw(self, batch: Batch, random: Keyed, progress: float) -> Projected:
        """Draw t, eps, directions, and which conditions are nulled, for a step's whole batch."""
        return self._with_directions(super().draw(batch, random, progress), random)

    def draw_held_out(self, batch: Batch, random: Keyed) -> Projected:
        """Return t evenly spread over the schedule; eps and directions always the same."""
        return self._with_directions(super().draw_held_out(batch, random), random)

    def losses(self, drawn: Projected, progress: float) -> Losses:  # type: ignore[override]  # its own draws
        """Return one part, "loss": the objective, (B,)."""
        schedule, t, x_0 = self.diffusion.schedule.to(drawn.x_0.device), drawn.t, drawn.x_0
        sigma, a = noise_level(schedule, t), at(schedule.alpha_bar.sqrt(), t, x_0)
        predict = self.diffusion.predictor(self.model, drawn.condition.for_network(self.model))

        def score(x: Tensor) -> Tensor:
            return score_at_sigma(predict(a * x, t).eps, sigma)

        x = x_0 + at(sigma, ..., x_0) * drawn.eps
        weight = (2 * sigma**2 / x_0[0].numel()).to(x_0.dtype)
        if self.objective == "denoising":
            return {"loss": weight * denoising(score, x_0, sigma, drawn.eps)}
        if self.objective == "explicit":
            assert self.truth is not None  # see `check`
            x_t = a * x
            of_x_t = x_t if x.is_meta else self.truth.score(x_t.cpu(), t.cpu()).to(x)  # a plan needs shapes alone
            return {"loss": weight * explicit(score, x, a * of_x_t)}
        if self.objective == "implicit":
            return {"loss": weight * implicit(score, x) + 1}
        options = {"step": self.step * sigma} if self.objective.startswith("finite") else {}
        return {"loss": weight * PROJECTED[self.objective](score, x, drawn.v, **options) + 1}

    def check(self, data: Dataset) -> None:
        """Raise ValueError as `Diffusion.check`, and for the explicit objective on data of unknown density."""
        super().check(data)
        if self.objective == "explicit":
            self.truth = JointMixture.of(self.diffusion.schedule, data)

    def _with_directions(self, drawn: Noised, random: Keyed) -> Projected:
        eps = torch.randn(drawn.x_0.shape, device=drawn.x_0.device, generator=random("directions"))
        return Projected(**vars(drawn), v=PROJECTIONS[self.projection](eps))
