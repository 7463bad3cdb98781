"""The mathematics bound to one schedule, one target and one variance. Holds no network."""

from collections.abc import Callable

import torch
from torch import Tensor

from ddpm.forward import q_sample
from ddpm.losses import L_simple
from ddpm.reverse import VARIANCES
from ddpm.schedules import NoiseSchedule
from ddpm.targets import TARGETS, Prediction, eps_from_x_0, from_prediction, to_prediction

Denoise = Callable[[Tensor, int | Tensor], Prediction]
"""(x_t (B, *), t: int or (B,)) -> Prediction: all that a sampler knows of a network."""


class GaussianDiffusion:
    """A noise schedule, what the network predicts, and the variance of the reverse process.

    Args:
        schedule: the constants.
        target: what the network's output is: "eps" (DDPM), "x_0" or "v".
        variance: sigma_t squared of the reverse process: "beta" or "beta_tilde".
        clip_x_0: clip the predicted x_0 to [-1, 1] and derive eps from it anew, so that the pair stays consistent.
    Raises:
        ValueError: an unknown target or variance, with those that are known.
    """

    def __init__(self, schedule: NoiseSchedule, target: str = "eps", variance: str = "beta", clip_x_0: bool = True):
        if target not in TARGETS:
            raise ValueError(f"target = {target!r} is not known; allowed: {', '.join(TARGETS)}")
        if variance not in VARIANCES:
            raise ValueError(f"variance = {variance!r} is not known; allowed: {', '.join(VARIANCES)}")
        self.schedule, self.target, self.variance, self.clip_x_0 = schedule, target, variance, clip_x_0

    def denoiser(self, model: Callable[..., Tensor], y: Tensor | None = None) -> Denoise:
        """Bind a network, and classes if it takes any, to what a sampler consumes.

        Args:
            model: (x_t, t) or (x_t, t, y) -> (B, *), in evaluation mode.
            y: class of each sample, integers (B,).
        """

        def denoise(x_t: Tensor, t: int | Tensor) -> Prediction:
            t = torch.as_tensor(t, device=x_t.device).expand(len(x_t))
            output = (model(x_t, t) if y is None else model(x_t, t, y)).to(x_t.dtype)
            pred = to_prediction(self.schedule, self.target, output, x_t, t, VARIANCES[self.variance])
            if self.clip_x_0:
                x_0 = pred.x_0.clamp(-1, 1)
                pred = Prediction(eps_from_x_0(self.schedule, x_t, t, x_0), x_0, pred.frac)
            return pred

        return denoise

    def loss(
        self,
        model: Callable[..., Tensor],
        x_0: Tensor,
        y: Tensor | None = None,
        *,
        t: Tensor | None = None,
        eps: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """L_simple of each image, at its own t and eps; draws only what it is not given.

        Args:
            x_0: data, (B, *), in [-1, 1].
            y: class of each image, integers (B,).
            t: integers (B,) in 1..T; drawn uniformly if None.
            eps: standard normal noise, (B, *); drawn if None.
            generator: on x_0's device, for what is drawn.
        Returns:
            (B,).
        """
        if t is None:
            t = torch.randint(1, self.schedule.T + 1, (len(x_0),), device=x_0.device, generator=generator)
        if eps is None:
            eps = torch.randn(x_0.shape, dtype=x_0.dtype, device=x_0.device, generator=generator)
        schedule = self.schedule.to(x_0.device)
        x_t = q_sample(schedule, x_0, t, eps)
        output = model(x_t, t) if y is None else model(x_t, t, y)
        return L_simple(output.to(x_0.dtype), from_prediction(schedule, self.target, Prediction(eps, x_0), t))
