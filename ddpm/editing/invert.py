"""Redrawing: an image is walked up to its latent by DDIM, and down again by another denoiser."""

from torch import Tensor

from ddpm.editing.img2img import last_steps
from ddpm.samplers import DDIM, Sampler
from ddpm.schedules import NoiseSchedule
from ddpm.targets import Denoise


def redraw(
    sampler: Sampler, schedule: NoiseSchedule, denoise: Denoise, x_0: Tensor, another: Denoise, strength: float = 1.0
) -> Tensor:
    """An image drawn anew from its own noise by another denoiser: another class in the same hand.

    The image is encoded by `DDIM.encode`, and decoded from there. With the same denoiser both times it comes back up to
    an error of first order in the step; with less strength the walk turns earlier, and more of the image is kept.

    Args:
        sampler: DDIM with eta = 0.
        denoise: what the image is encoded by, such as one of its own class; without clipping.
        x_0: images, (B, *), in [-1, 1].
        another: what it is decoded by; without clipping, if the image itself is to come back from `denoise`.
        strength: the share of the steps that are walked, as in `img2img`; 0 returns x_0.
    Returns:
        (B, *).
    Raises:
        ValueError: a sampler without an inverse; a strength outside [0, 1].
    Source: DDIM (arXiv 2010.02502), sections 4.3 and 5.4.
    """
    if not isinstance(sampler, DDIM) or sampler.eta > 0:
        eta = f" with eta = {sampler.eta:g}" if isinstance(sampler, DDIM) else ""
        raise ValueError(f"{type(sampler).__name__}{eta} has no inverse; images are encoded by DDIM with eta = 0")
    times = sampler.times(schedule)
    steps = last_steps(strength, len(times) - 1)
    if steps == 0:
        return x_0
    part = DDIM(grid=sampler.grid, times=times[len(times) - 1 - steps :])
    return part(schedule, another, part.encode(schedule, denoise, x_0))
