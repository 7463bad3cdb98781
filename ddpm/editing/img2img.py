"""Image to image: SDEdit (Meng et al., arXiv 2108.01073)."""

import math

import torch
from torch import Tensor

from ddpm.forward import q_sample
from ddpm.randomness import SampleNoise, normal
from ddpm.samplers import Sampler, integrate
from ddpm.schedules import NoiseSchedule
from ddpm.targets import Denoise


def img2img(
    sampler: Sampler,
    schedule: NoiseSchedule,
    denoise: Denoise,
    x_0: Tensor,
    strength: float,
    generator: torch.Generator | SampleNoise | None = None,
) -> Tensor:
    r"""Return a new image that resembles x_0: x_0 is noised part of the way, and sampled from there.

    .. math:: x_{t_0} = \sqrt{\bar\alpha_{t_0}}\, x_0 + \sqrt{1 - \bar\alpha_{t_0}}\, \epsilon
        \qquad \text{[SDEdit (start)]}

    t_0 is one of the sampler's own times, `last_steps` many steps above 0. Little strength preserves the image,
    much strength less of it: colours and coarse shapes change last, as noise hides them last.

    Args:
        sampler: of whose times the last ones are used.
        denoise: with its condition already bound, such as another class than that of the image.
        x_0: images, (B, *), in [-1, 1].
        strength: the share of the steps that are taken, in [0, 1]. 0 returns x_0, bit for bit; 1, or so much that all
            steps are taken, is sampling: it starts from x_T without any of the image, and equals it bit for bit.
        generator: of the noise, as in `Sampler.__call__`; keyed noise is that of sampling, x_T its first.
    Returns:
        (B, *).
    Raises:
        ValueError: a strength outside [0, 1].
    Source: SDEdit, algorithm 2, which is written for the variance preserving SDE.
    """
    times = sampler.times(schedule)
    steps = last_steps(strength, len(times) - 1)
    if steps == 0:
        return x_0
    eps = normal(generator, 0, x_0)
    start = times[len(times) - 1 - steps :]
    x_t = eps if len(start) == len(times) else q_sample(schedule.to(x_0.device), x_0, start[0], eps)
    return integrate(sampler, schedule, denoise, x_t, start, generator=generator)


def last_steps(strength: float, steps: int) -> int:
    """Return the number of last steps for a strength: the nearest number, and at least one where it is not 0.

    Args:
        strength: in [0, 1].
        steps: of the sampler.
    Raises:
        ValueError: a strength outside [0, 1].
    """
    if isinstance(strength, bool) or not isinstance(strength, int | float) or not 0 <= strength <= 1:
        raise ValueError(f"strength = {strength!r} must be a number in [0, 1]: 0 keeps the image, 1 draws a new one")
    return max(1, math.floor(strength * steps + 0.5)) if strength > 0 else 0
