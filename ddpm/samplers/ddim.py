"""Denoising diffusion implicit models: DDIM (Song et al., arXiv 2010.02502)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ddpm.checks import is_whole
from ddpm.forward import q_sample, transition
from ddpm.samplers.base import Sampler, Step, evaluate, integrate
from ddpm.schedules import NoiseSchedule, at
from ddpm.targets import Denoise


class DDIM(Sampler):
    r"""The DDIM sampler, of a non-Markovian reverse process; its alpha_t is our alpha_bar_t.

    .. math::
        x_s = \sqrt{\bar\alpha_s}\, x_{0,\theta} + \sqrt{1 - \bar\alpha_s - \sigma_t^2}\, \epsilon_\theta + \sigma_t z
            \qquad \text{[DDIM (12)]} \\
        \sigma_t = \eta \sqrt{\frac{1 - \bar\alpha_s}{1 - \bar\alpha_t}} \sqrt{1 - \frac{\bar\alpha_t}{\bar\alpha_s}}
            \qquad \text{[DDIM (16)]}

    Args:
        steps, spacing, grid, times: as in `Sampler`.
        eta: 0 is the deterministic ODE, 1 is ancestral sampling with beta_tilde.
    Raises:
        ValueError: eta outside [0, 1].
    """

    def __init__(
        self,
        steps: int | None = 50,
        eta: float = 0.0,
        spacing: str = "uniform",
        grid: str = "integer",
        times: Sequence[int | float] | None = None,
    ):
        super().__init__(steps, spacing, grid, times)
        if not 0 <= eta <= 1:
            raise ValueError(f"eta = {eta:g} must lie in [0, 1]: 0 is the ODE, 1 is ancestral sampling")
        self.eta, self.stochastic = eta, eta > 0

    def step(self, step: Step) -> Tensor:
        """Take a step, see `Sampler.step`; with eta = 0 also from t up to s > t."""
        schedule, _, x_t, t, s, pred, _, noise = step
        alpha_bar_t, alpha_bar_s, _, beta = transition(schedule, t, s)
        sigma_t = self.eta * ((1 - alpha_bar_s) / (1 - alpha_bar_t)).sqrt() * beta.clamp(min=0).sqrt()
        x_s = (
            at(alpha_bar_s.sqrt(), ..., x_t) * pred.x_0
            + at((1 - alpha_bar_s - sigma_t**2).clamp(min=0).sqrt(), ..., x_t) * pred.eps
        )
        return x_s if noise is None else x_s + at(sigma_t, ..., x_t) * noise

    @torch.no_grad()
    def encode(self, schedule: NoiseSchedule, denoise: Denoise, x_0: Tensor) -> Tensor:
        r"""Encode an image to its x_T: integrate the sampler's own times upwards.

        .. math:: \mathrm d\bar x = \epsilon_\theta\, \mathrm d\sigma, \quad \bar x = \frac{x_t}{\sqrt{\bar\alpha_t}},
            \quad \sigma = \sqrt{\frac{1 - \bar\alpha_t}{\bar\alpha_t}} \qquad \text{[DDIM (14)]}

        by Euler steps from low to high noise. At t = 0 there is no noise to predict: the first step takes eps_theta at
        the lowest time t > 0, where x_0 is scaled to sqrt(alpha_bar_t) x_0. `self(schedule, denoise, x_T)` gives the
        image back, up to an error of first order in the step.

        Args:
            denoise: without clipping: a clipped prediction is no longer the flow's.
            x_0: images, (B, *).
        Returns:
            x_T, (B, *).
        Raises:
            ValueError: eta > 0, which has no inverse.
        Source: DDIM, sections 4.3 and 5.4.
        """
        if self.eta > 0:
            raise ValueError(f"eta = {self.eta:g}: only the ODE, eta = 0, can be walked back to x_T")
        _, *times = reversed(self.times(schedule))
        t, schedule = times[0], schedule.to(x_0.device)
        eps = evaluate(denoise, q_sample(schedule, x_0, t, torch.zeros_like(x_0)), t).eps
        return integrate(self, schedule, denoise, q_sample(schedule, x_0, t, eps), times)


def interpolate(x_a: Tensor, x_b: Tensor, k: int) -> Tensor:
    r"""Return k latents on the arc from x_a to x_b, for interpolation between two images.

    .. math:: x_T^{(a)} = \frac{\sin((1 - a)\theta)}{\sin\theta} x_T^{(0)} + \frac{\sin(a\theta)}{\sin\theta} x_T^{(1)},
        \quad \theta = \arccos\frac{x_T^{(0)} \cdot x_T^{(1)}}{\|x_T^{(0)}\| \|x_T^{(1)}\|}
        \qquad \text{[DDIM (App. D.5)]}

    A straight line would pass through points of too small a norm, which no normal noise has. Latents in the same or in
    opposite directions have no arc of their own, and are joined by the line.

    Args:
        x_a, x_b: one latent each, (*).
        k: the number of latents, both ends included, >= 2.
    Returns:
        (k, *), a batch for a sampler.
    Raises:
        ValueError: shapes that differ, or k < 2.
    """
    if x_a.shape != x_b.shape:
        raise ValueError(f"latents of shapes {tuple(x_a.shape)} and {tuple(x_b.shape)} cannot be interpolated")
    if not is_whole(k, 2):
        raise ValueError(f"k = {k!r}: an interpolation has at least 2 latents, its ends")
    a = torch.linspace(0, 1, k, dtype=torch.float64, device=x_a.device)
    one, other = x_a.double().flatten(), x_b.double().flatten()
    theta = torch.arccos((one @ other / (one.norm() * other.norm())).clamp(-1, 1))
    arc = theta.sin() > 1e-6
    w_a = torch.where(arc, ((1 - a) * theta).sin() / theta.sin(), 1 - a)
    w_b = torch.where(arc, (a * theta).sin() / theta.sin(), a)
    return at(w_a, ..., x_a[None]) * x_a + at(w_b, ..., x_b[None]) * x_b
