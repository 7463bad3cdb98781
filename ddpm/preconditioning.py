"""Preconditioning (EDM): scales that keep a network's input and output at unit variance at every noise level."""

from typing import NamedTuple

from torch import Tensor

from ddpm.schedules import LEVELS, NoiseSchedule, Time, at

PRECONDITIONINGS = ("edm",)


class Preconditioning(NamedTuple):
    """The scales of `edm`, each of which broadcasts against x_t."""

    c_in: Tensor
    """The factor of x_t before the network."""
    c_skip: Tensor
    """The factor of x_t in D."""
    c_out: Tensor
    """The factor of the network's output in D."""


def edm(schedule: NoiseSchedule, x_t: Tensor, t: Time, sigma_data: float = 0.5) -> Preconditioning:
    r"""Return the scales of a denoiser D around a network F whose input and target have unit variance at any noise.

    .. math::
        D_\theta(x; \sigma) = c_\text{skip}(\sigma)\, x
            + c_\text{out}(\sigma)\, F_\theta(c_\text{in}(\sigma)\, x; c_\text{noise}(\sigma))
            \qquad \text{[EDM (7)]} \\
        c_\text{skip} = \frac{\sigma_\text{data}^2}{\sigma^2 + \sigma_\text{data}^2}, \quad
        c_\text{out} = \frac{\sigma\, \sigma_\text{data}}{\sqrt{\sigma^2 + \sigma_\text{data}^2}}, \quad
        c_\text{in} = \frac{1}{\sqrt{\sigma^2 + \sigma_\text{data}^2}} \qquad \text{[EDM (table 1)]}

    of x = x_t / sqrt(alpha_bar_t) = x_0 + sigma eps. As factors of x_t, c_in and c_skip include that square
    root, and nothing is infinite where alpha_bar_T = 0:

    .. math::
        c_\text{in}\, x = \frac{x_t}{n}, \quad
        c_\text{skip}\, x = \frac{\sqrt{\bar\alpha_t}\, \sigma_\text{data}^2}{n^2}\, x_t, \quad
        c_\text{out} = \frac{\sqrt{1 - \bar\alpha_t}\, \sigma_\text{data}}{n}, \quad
        n^2 = 1 + \bar\alpha_t\, (\sigma_\text{data}^2 - 1)

    So F is -v of the data in units of sigma_data, and with sigma_data = 1 it is -v itself. c_noise is any number that
    tells noise levels apart: our networks take t, which they embed themselves.

    Args:
        x_t: (B, *).
        t: a number or (B,), integer or real, in [0, T].
        sigma_data: the standard deviation of the data, in their own units.
    Source: Elucidating the Design Space of Diffusion-Based Generative Models (Karras et al., arXiv 2206.00364), section
        5 and appendix B.6.
    """
    alpha_bar_t = schedule.alpha_bar_at(t)
    n2 = 1 + alpha_bar_t * (sigma_data**2 - 1)
    c_in = 1 / n2.sqrt()
    c_skip = alpha_bar_t.sqrt() * sigma_data**2 / n2
    c_out = (1 - alpha_bar_t).sqrt() * sigma_data / n2.sqrt()
    return Preconditioning(at(c_in, ..., x_t), at(c_skip, ..., x_t), at(c_out, ..., x_t))


def must_be_preconditioning(name: str | None, sigma_data: float) -> None:
    """Raise ValueError for a name that is not known, or a sigma_data out of range."""
    if name is not None and name not in PRECONDITIONINGS:
        raise ValueError(f"preconditioning = {name!r} is not known; allowed: null, {', '.join(PRECONDITIONINGS)}")
    if isinstance(sigma_data, bool) or not LEVELS[0] <= sigma_data <= LEVELS[1]:
        raise ValueError(f"sigma_data = {sigma_data!r} must be > 0, within [{LEVELS[0]:g}, {LEVELS[1]:g}]")
