"""Inpainting by replacement, and RePaint (Lugmayr et al., arXiv 2201.09865)."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ddpm.checks import check_whole
from ddpm.forward import q_sample
from ddpm.randomness import SampleNoise, normal
from ddpm.samplers import Sampler, integrate
from ddpm.schedules import NoiseSchedule
from ddpm.targets import Denoise


def inpaint(
    sampler: Sampler,
    schedule: NoiseSchedule,
    denoise: Denoise,
    x_0: Tensor,
    mask: Tensor,
    *,
    resamples: int = 1,
    jump: int = 1,
    generator: torch.Generator | SampleNoise | None = None,
) -> Tensor:
    r"""Draw part of an image anew, so that it fits the rest.

    Before each step the known pixels are put into x_t, noised to t; the step then sees all of the image.

    .. math:: x_t = m \odot x_t^{\text{unknown}} + (1 - m) \odot \left(\sqrt{\bar\alpha_t}\, x_0
        + \sqrt{1 - \bar\alpha_t}\, \epsilon\right) \qquad \text{[RePaint (8)]}

    (The paper's m is 1 where pixels are known, ours where they are not.) With resamples = 1 that is replacement, and
    it is biased: at high noise the unknown pixels depend little on the known ones, and later steps build on
    them. Of two pixels with correlation 0.9, one known to lie 2 standard deviations above its mean, the other's mean is
    drawn 0.55 standard deviations too near to that of all data, with 1.62 times the exact variance (ancestral sampling,
    T = 1000, cosine). RePaint passes each stretch of `jump` steps `resamples` times, going up again by adding noise, so
    that both parts can come to agree: with 10 resamples the same mean is off by 0.04, and the variance is right.

    Args:
        sampler: whose times are used. RePaint needs one with noise, such as ancestral sampling.
        x_0: images, (B, *), in [-1, 1]; their content where the mask is 1 is ignored.
        mask: 1 (or true) where pixels are drawn anew, 0 where they are preserved; broadcasts against x_0.
        resamples: how often each stretch is passed, r in the paper's code; 1 is replacement.
        jump: how many steps a stretch has, the paper's jump length j.
        generator: of the noise, as in `Sampler.__call__`. Keyed noise for the known pixels is of the stream "known".
    Returns:
        (B, *), whose preserved pixels are x_0's bit for bit.
    Raises:
        ValueError: a mask with other values, or of a shape that does not broadcast; resamples or jump below 1.
    Source: RePaint, algorithm 1 and appendix B (jumps); replacement: Song et al. (arXiv 2011.13456), appendix I.2.
    """
    drawn = _checked(mask, x_0)
    times = [sampler.times(schedule)[n] for n in walk(len(sampler.times(schedule)) - 1, resamples, jump)]
    schedule = schedule.to(x_0.device)
    known = generator.of("known") if isinstance(generator, SampleNoise) else generator

    def put_back(i: int, t: int | float, x_t: Tensor) -> Tensor:
        return torch.where(drawn, x_t, q_sample(schedule, x_0, t, normal(known, i + 1, x_0)))

    x_T = normal(generator, 0, x_0)
    x = integrate(sampler, schedule, denoise, x_T, times, generator=generator, before=put_back, renoise=True)
    return torch.where(drawn, x, x_0)


def mask_of_latents(mask: Tensor, size: Sequence[int]) -> Tensor:
    """Return which latents are drawn anew: those of which any pixel is.

    Args:
        mask: true where pixels are drawn anew, (B, 1, H, W).
        size: (h, w) of a map of latents.
    Returns:
        Booleans (B, 1, h, w). A latent that is preserved depends on more than the pixels in its place, as convolutions
        overlap; so the hole should be blanked in the autoencoder's input.
    """
    return F.adaptive_max_pool2d(mask.float(), tuple(size)).bool()


def walk(steps: int, resamples: int, jump: int) -> list[int]:
    """Return the indices of a sampler's times that RePaint visits in turn: from 0 (t = T) to `steps` (t = 0).

    Time rises, by `jump` steps and resamples - 1 times, from the last time above 0 and from every `jump`-th before it
    that has as many steps above it. A jump longer than the walk has no effect, and t = 0 is visited once.

    Raises:
        ValueError: resamples or jump below 1, or no integers.
    """
    for name, value in (("resamples", resamples), ("jump", jump)):
        check_whole(name, value, 1)
    left = {place: resamples - 1 for place in range(steps - 1, jump - 1, -jump)}
    place, visited = 0, [0]
    while place < steps:
        place += 1
        visited.append(place)
        if left.get(place, 0) > 0:
            left[place] -= 1
            place -= jump
            visited.append(place)
    return visited


def _checked(mask: Tensor, x_0: Tensor) -> Tensor:
    """Return the mask as booleans, broadcast to the images' shape."""
    if mask.dtype != torch.bool and not ((mask == 0) | (mask == 1)).all():
        raise ValueError("a mask holds 1 where pixels are drawn anew and 0 where they are kept, and nothing between")
    try:
        return torch.broadcast_to(mask.to(x_0.device, torch.bool), x_0.shape)
    except RuntimeError as error:
        shapes = f"a mask of shape {tuple(mask.shape)} does not broadcast to images {tuple(x_0.shape)}"
        raise ValueError(shapes) from error
