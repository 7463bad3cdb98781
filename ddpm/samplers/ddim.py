"""Denoising diffusion implicit models: DDIM (Song et al., arXiv 2010.02502)."""

from torch import Tensor

from ddpm.diffusion import Denoise
from ddpm.forward import transition
from ddpm.samplers.base import Sampler
from ddpm.schedules import NoiseSchedule, at
from ddpm.targets import Prediction


class DDIM(Sampler):
    r"""The non-Markovian reverse process; its alpha_t is our alpha_bar_t.

    .. math::
        x_s = \sqrt{\bar\alpha_s}\, x_{0,\theta} + \sqrt{1 - \bar\alpha_s - \sigma_t^2}\, \epsilon_\theta + \sigma_t z
            \qquad \text{[DDIM (12)]} \\
        \sigma_t = \eta \sqrt{\frac{1 - \bar\alpha_s}{1 - \bar\alpha_t}} \sqrt{1 - \frac{\bar\alpha_t}{\bar\alpha_s}}
            \qquad \text{[DDIM (16)]}

    Args:
        steps: number of steps, 1 <= steps <= T.
        eta: 0 is the deterministic ODE, 1 is ancestral sampling with beta_tilde.
    Raises:
        ValueError: eta outside [0, 1].
    """

    def __init__(self, steps: int | None = 50, eta: float = 0.0):
        super().__init__(steps)
        if not 0 <= eta <= 1:
            raise ValueError(f"eta = {eta:g} must lie in [0, 1]: 0 is the ODE, 1 is ancestral sampling")
        self.eta, self.stochastic = eta, eta > 0

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
        """As `Sampler.step`."""
        alpha_bar_t, alpha_bar_s, _, beta = transition(schedule, t, s)
        sigma_t = self.eta * ((1 - alpha_bar_s) / (1 - alpha_bar_t)).sqrt() * beta.sqrt()
        x_s = (
            at(alpha_bar_s.sqrt(), ..., x_t) * pred.x_0
            + at((1 - alpha_bar_s - sigma_t**2).clamp(min=0).sqrt(), ..., x_t) * pred.eps
        )
        return x_s if noise is None else x_s + at(sigma_t, ..., x_t) * noise
