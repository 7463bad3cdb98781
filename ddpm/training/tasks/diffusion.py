"""Diffusion training: a network learns to separate noise from data, at a random time."""

import contextlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ddpm.data.batch import Batch, Condition, takes
from ddpm.data.dataset import Dataset
from ddpm.diffusion import GaussianDiffusion
from ddpm.latent.reconstruction import OF_PICTURES
from ddpm.losses import offset
from ddpm.randomness import Keyed
from ddpm.samplers import DDIM, Sampler
from ddpm.schedules import concerns
from ddpm.sources.trained import TrainedSampler
from ddpm.times import TimeSampler
from ddpm.training.task import Drawn, Losses, Task, must_take, shape_of

PREVIEW_STEPS = 20  # of DDIM: a preview is cheap
OWN = "diffusion"  # the part of the loss that `GaussianDiffusion` computes
PARTS = (OWN, *OF_PICTURES)


@dataclass(frozen=True, kw_only=True)
class Noised(Drawn):
    """Data with the time and the noise at which the network sees them.

    Args:
        x_0: data, (B, *).
        condition: the condition of the network, null in the rows that were dropped.
        t: integers (B,) in 1..T.
        eps: standard normal noise, (B, *).
    """

    x_0: Tensor
    condition: Condition
    t: Tensor
    eps: Tensor


def noised_evenly(batch: Batch, T: int, random: Keyed) -> Noised:
    """Return each sample at one of T evenly spread times, with noise that is always the same."""
    n, device, together = len(batch), batch.x.device, random("held out")
    t = torch.linspace(1, T, n, device=device).round().long()
    eps = torch.randn(batch.x.shape, generator=together, device=device)
    t = t[torch.randperm(n, generator=together, device=device)]
    return Noised(x_0=batch.x, condition=batch.condition, t=t, eps=eps)


def preserving(weight: Tensor | None, of_prior: Tensor | None, prior: float) -> Tensor | None:
    r"""Return the loss weights (B,) of rows, some of them pictures of a subject, the others of its class (the prior).

    .. math:: L = E\left[w_t\, \ell(x, c) + \lambda\, w_{t'}\, \ell(x_{pr}, c_{pr})\right]
        \qquad \text{[DreamBooth (2)]}

    for the loss l of a subject's picture x with its caption c, and of one of its class, x_pr with c_pr, each at its own
    t and noise. As rows of both alternate, the mean over rows is half of it.

    Args:
        weight: of t, (B,); None for 1.
        of_prior: true for the rows of the class, (B,); None where there are none.
        prior: lambda.
    Source: DreamBooth (arXiv 2208.12242), section 3.3.
    """
    if of_prior is None:
        return weight
    of_rows = torch.where(of_prior, prior, 1.0)
    return of_rows if weight is None else weight * of_rows


class Diffusion(Task):
    r"""Train a denoising network by DDPM's Algorithm 1, with the loss and the target of a `GaussianDiffusion`.

    Further parts compare the x_0 that the network predicts, not clipped, with data:

    .. math:: L = w_0 L_\text{diffusion} + \sum_i w_i\, \frac{\bar\alpha_t}{d}\, \ell_i(x_{0,\theta}(x_t, t), x_0)
        \qquad \text{[Parts (x_0)]}

    with the distances l_i of `ddpm.latent.reconstruction`, sums over the d dimensions of x, which become means as the
    loss of the diffusion is one. At large t x_t determines x_0 poorly, whose error is that of eps times
    sqrt((1 - alpha_bar_t) / alpha_bar_t), without bound; with the factor alpha_bar_t the squared error of x_0 is
    (1 - alpha_bar_t) times that of eps. Parts are logged with the factor, and without their weight.

    Args:
        model: (x_t, t) or (x_t, t, condition) -> (B, *), see `ddpm.data.batch.Condition.for_network`.
        diffusion: the mathematics.
        drop: the share of conditions that are nulled, each part of each row by itself, so that the network also learns
            to do without: classifier-free guidance needs both. The network then needs a learned null.
        time_sampling: how t is drawn, "uniform", "stratified", "loss_aware" or "lognormal", see
            `ddpm.times.TimeSampler`; "loss_aware" by the sum of all parts.
        offset_noise: strength of the random shift of a channel in eps, see `ddpm.losses.offset`.
        only: as in `Task`.
        parts: name -> weight, 0 (or left out) for a part that is not computed: "diffusion", and of x_0 "squared",
            "absolute", "huber", "ssim" (of images); None for diffusion alone.
        prior: the weight of prior-preservation pictures, see `preserving`.
    Raises: ValueError for an argument out of range, or a learned variance that the loss does not train.
    Source: DDPM (arXiv 2006.11239), Algorithm 1; Classifier-Free Guidance (arXiv 2207.12598), Algorithm 1.
    """

    replayable = True
    trains_variance = True
    """Whether a learned variance must be trained by the loss."""

    def __init__(
        self,
        model: nn.Module,
        diffusion: GaussianDiffusion,
        drop: float = 0.0,
        time_sampling: str = "uniform",
        offset_noise: float = 0.0,
        only: Sequence[str] | None = None,
        parts: dict[str, float] | None = None,
        prior: float = 1.0,
    ):
        self.parts = {OWN: 1.0} if parts is None else _checked(parts)
        alone = self.parts.keys() == {OWN}
        super().__init__({"model": model}, weights={"loss": self.parts[OWN]} if alone else self.parts, only=only)
        if not 0 <= drop < 1:
            raise ValueError(f"drop = {drop:g} must lie in [0, 1)")
        if not 0 <= offset_noise < math.inf:
            raise ValueError(f"offset_noise = {offset_noise:g} must be >= 0")
        if not 0 <= prior < math.inf:
            raise ValueError(f"prior = {prior:g} must be >= 0 and finite")
        self.diffusion, self.drop, self.offset_noise, self.prior = diffusion, drop, offset_noise, prior
        self.times = TimeSampler(time_sampling, diffusion.schedule)
        self.discrete = True  # whether the data are bytes, see `check`

    @property
    def model(self) -> nn.Module:
        return self.modules["model"]

    def concerns(self) -> list[str]:
        """Return known problems of the schedule."""
        return concerns(self.diffusion.schedule, self.diffusion.target)

    def draw(self, batch: Batch, random: Keyed, progress: float) -> Noised:
        """Draw t, eps, and which conditions are nulled, for a step's whole batch."""
        x_0, together = batch.x, random("t and eps")
        t, weight = self.times.draw(len(x_0), together)
        eps = torch.randn(x_0.shape, device=x_0.device, generator=together)
        if self.offset_noise:
            eps = offset(eps, torch.randn(x_0.shape[:2], device=x_0.device, generator=together), self.offset_noise)
        condition = batch.condition.dropped(self.drop, random("condition")) if self.drop else batch.condition
        weight = preserving(weight, batch.of_prior, self.prior)
        return Noised(x_0=x_0, condition=condition, t=t, eps=eps, weight=weight)

    def losses(self, drawn: Noised, progress: float) -> Losses:  # type: ignore[override]  # its own draws
        """Return the parts by name, each (B,); the diffusion loss alone is called "loss"."""
        y = drawn.condition.for_network(self.model)
        draws: dict[str, Any] = {"t": drawn.t, "eps": drawn.eps, "discrete": self.discrete}
        if self.parts.keys() == {OWN}:
            return {"loss": self.diffusion.loss(self.model, drawn.x_0, y, **draws)}
        loss, pred = self.diffusion.loss_and_prediction(self.model, drawn.x_0, y, **draws)
        return ({OWN: loss} if OWN in self.parts else {}) | self._of_x_0(pred.x_0, drawn)

    def _of_x_0(self, x_0_theta: Tensor, drawn: Noised) -> Losses:
        """Return the parts that compare a predicted x_0, (B, *), with data, each (B,)."""
        x_0, schedule = drawn.x_0, self.diffusion.schedule.to(drawn.x_0.device)
        factor = (schedule.alpha_bar_at(drawn.t) / x_0[0].numel()).to(x_0.dtype)
        return {name: factor * OF_PICTURES[name](x_0_theta, x_0) for name in self.parts if name != OWN}

    def after_step(self, drawn: Noised, losses: Losses) -> None:  # type: ignore[override]
        """Update the time sampler with the losses, of all parts."""
        self.times.update(drawn.t, self.total(losses))

    def facts(self, drawn: Noised) -> dict[str, Tensor]:  # type: ignore[override]
        """Return the times."""
        return {"t": drawn.t}

    def draw_held_out(self, batch: Batch, random: Keyed) -> Noised:
        """Return t evenly spread over the schedule, and eps always the same; no condition is nulled."""
        return noised_evenly(batch, self.diffusion.schedule.T, random)

    @property
    def preview_sampler(self) -> Sampler:
        """The sampler of previews."""
        return DDIM(min(PREVIEW_STEPS, self.diffusion.schedule.T))

    def source(
        self,
        data: Dataset | None,
        seed: int,
        device: torch.device,
        precision: str = "fp32",
        requested: Sequence[int] | None = None,
        sampler: Sampler | None = None,
    ) -> TrainedSampler:
        """Return the source of samples by a sampler; `preview_sampler` where none is given."""
        shape = (shape_of(self.model) or ()) if data is None else data.shape
        drawing = (self.diffusion, self.model, sampler or self.preview_sampler, shape, seed, device, precision)
        return TrainedSampler(*drawing, requested, data=data)

    def preview(self, n: int, data: Dataset, seed: int, precision: str) -> Tensor | None:
        """Return a preview by `preview_sampler`, see `Task.preview`."""
        compiled = getattr(self.model, "_compiled_call_impl", None) is not None
        # a few pictures are not worth compiling the other mode
        with torch.compiler.set_stance("force_eager") if compiled else contextlib.nullcontext():
            return super().preview(n, data, seed, precision)

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        """Return the state that the time sampler has learned."""
        times = self.times.state_dict()
        return {"times": times} if times else {}

    def load_state_dict(self, state: dict[str, dict[str, Tensor]]) -> None:
        """Restore `state_dict`."""
        self.times.load_state_dict(state.get("times", {}))

    def to(self, device: torch.device) -> "Diffusion":
        """Move the network, and the losses that the time sampler stores, to a device."""
        super().to(device)
        self.times.to(device)
        return self

    def check(self, data: Dataset) -> None:
        """Raise ValueError where the loss does not train the variance, or network, mathematics and data do not fit."""
        if self.trains_variance:
            self._variance_must_be_trained()
        must_take(self.model, data)
        if "latents" in data.holds and self.diffusion.clip_x_0:
            raise ValueError(
                "clip_x_0 = true clips to [-1, 1], and latents have no such range; set diffusion.clip_x_0=false"
            )
        if "ssim" in self.parts and "pictures" not in data.holds:
            others = ", ".join(name for name in PARTS if name != "ssim")
            raise ValueError(f"parts.ssim needs pictures, and {data.name} holds none; allowed for it: {others}")
        if self.prior != 1 and not data.prior_count:
            raise ValueError(
                f"task.prior = {self.prior:g} weighs class pictures against those of a subject, and {data.name} has "
                "none; set task.prior=1, or subject.beside=N in experiment=subject"
            )
        self.discrete = "bytes" in data.holds
        variance, channels = self.diffusion.variance, data.shape[0]
        needed = channels * (2 if variance == "learned" else 1)
        if getattr(self.model, "out_channels", needed) != needed:
            key = "out_channels" if len(data.shape) == 3 else "out_features"
            raise ValueError(
                f"model.{key} = {self.model.out_channels}, but diffusion.variance={variance} with {channels} "
                f"{key.removeprefix('out_')} of the data takes model.{key}={needed}"
            )
        if self.drop and (not takes(self.model) or not getattr(self.model, "drop", 0)):
            lacks = "has no null condition" if takes(self.model) else "takes no condition"
            raise ValueError(f"task.drop = {self.drop:g} nulls conditions, but the network {lacks}")

    def _variance_must_be_trained(self) -> None:
        """Raise ValueError if a learned variance would not be trained."""
        self.diffusion.must_be_trainable()
        if self.diffusion.variance == "learned" and OWN not in self.parts:
            raise ValueError(f"variance = 'learned' is trained by parts.{OWN} alone; set it to 1")


def _checked(parts: Mapping[str, float]) -> dict[str, float]:
    """Return the parts of nonzero weight, in the order of `PARTS`; ValueError for unknown parts or weights."""
    for name, weight in parts.items():
        if name not in PARTS:
            raise ValueError(
                f"parts: {name!r} is no part of the loss of a diffusion, whose prediction is x_0 itself, without "
                f"logits or a scale; allowed: {', '.join(PARTS)}"
            )
        if isinstance(weight, bool) or not 0 <= weight < math.inf:
            raise ValueError(f"parts.{name} = {weight!r} must be >= 0 and finite")
    nonzero = {name: parts[name] for name in PARTS if parts.get(name)}
    if not nonzero:
        raise ValueError(f"parts: all are 0, and nothing is trained; set one of {', '.join(PARTS)} to 1")
    return nonzero
