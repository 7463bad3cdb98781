"""Redrawing: an image is inverted to its latent by DDIM, and decoded by another denoiser."""

from torch import Tensor

from ddpm.editing.img2img import last_steps
from ddpm.samplers import DDIM, Sampler
from ddpm.schedules import NoiseSchedule
from ddpm.targets import Denoise


def redraw(
    sampler: Sampler, schedule: NoiseSchedule, denoise: Denoise, x_0: Tensor, another: Denoise, strength: float = 1.0
) -> Tensor:
    """Return an image decoded from its own inverted noise by another denoiser: another class in the same style.

    The image is encoded by `DDIM.encode`, and decoded from there. With the same denoiser both times it comes back up to
    an error of first order in the step; with less strength the inversion stops earlier and preserves more of it.

    Args:
        sampler: DDIM with eta = 0.
        denoise: encodes the image, such as one of its own class; without clipping.
        x_0: images, (B, *), in [-1, 1].
        another: decodes the image; without clipping, if the image itself is to come back from `denoise`.
        strength: the share of the steps that are taken, as in `img2img`; 0 returns x_0.
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
