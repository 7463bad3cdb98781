"""Ancestral sampling: DDPM (Ho et al., arXiv 2006.11239), Algorithm 2."""

from dataclasses import replace

from torch import Tensor

from ddpm.reverse import mu_theta, variance
from ddpm.samplers.base import Sampler, Step


class Ancestral(Sampler):
    r"""Ancestral sampling: draw from p_theta(x_s | x_t) step by step.

    .. math:: x_{t-1} = \mu_\theta(x_t, t) + \sigma_t z, \quad z \sim \mathcal N(0, I)
        \qquad \text{[DDPM (Algorithm 2)]}

    With fewer steps than T the same step spans a stride, with the posterior of q(x_s | x_t, x_0). The variance is the
    diffusion's (`pred.frac`), between beta_tilde and beta: a learned one that leaves these bounds, within which every
    optimal one lies (DDPM, section 3.2), is clamped to them, since its exponential knows no others. Arguments as in
    `Sampler`.
    """

    stochastic = True

    def step(self, step: Step) -> Tensor:
        """Take a step, see `Sampler.step`; a step to s = 0 would add no noise."""
        schedule, _, x_t, t, s, pred, _, noise = step
        if s == 0:
            return mu_theta(schedule, pred, x_t, t, s)
        frac = pred.frac.clamp(0, 1) if isinstance(pred.frac, Tensor) else min(max(pred.frac, 0.0), 1.0)
        sigma_t = variance(schedule, replace(pred, frac=frac), x_t, t, s).sqrt()
        return mu_theta(schedule, pred, x_t, t, s) + sigma_t * noise
