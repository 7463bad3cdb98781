"""Is what was asked for heard in samples of sound? A classifier reads them after they were sounds."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ddpm.data.sound import AT_ONCE, Clips
from ddpm.data.spectrogram import Mel, spectral_convergence
from ddpm.figures.images import to_float, to_uint8
from ddpm.metrics.intervals import wilson
from ddpm.metrics.quality import Real, Result

MOST_FOR_CURVE = 64  # clips


class Ceiling(NamedTuple):
    """What a classifier reads right of held-out sounds, each share in 0..1: no sample can do much better."""

    seen: float  # of their pictures
    heard: float  # of pictures of the sounds that were made of these

    @classmethod
    def of(cls, data: Clips, real: Real) -> "Ceiling":
        """Of the held-out part, as the features' classifier reads it."""
        batch = data.batch(data.held_out)
        if batch.y is None:
            raise ValueError(f"{data.name} has no labels, and this measure needs them")
        seen, heard = (named(x, real) == batch.y.cpu() for x in (batch.x, through_sound(batch.x, data.mel)))
        return cls(seen.float().mean().item(), heard.float().mean().item())


def through_sound(x: Tensor, mel: Mel) -> Tensor:
    """Pictures (n, 1, bands, frames) in [-1, 1] of the sounds that are made of such pictures."""
    parts = [mel.encode(mel.decode(to_uint8(part)))[0] for part in x.cpu().split(AT_ONCE)]
    return to_float(torch.cat(parts)) if parts else x


def named(x: Tensor, real: Real) -> Tensor:
    """The class (n,) that the classifier takes each picture for.

    Raises: ValueError for other features than a classifier's, and for pictures that hold NaN or infinity.
    """
    features: Any = real.features
    if not hasattr(features, "probabilities"):
        raise ValueError(f"sounds are read by features=classifier, not {features.name}")
    classes: Tensor = features.probabilities(features(x)).argmax(1)
    return classes


def as_heard(x: Tensor, y: Tensor | None, data: Clips, real: Real, ceiling: Ceiling) -> Result:
    """The share of samples that the classifier names as what was asked for, after they were sounds.

    Args:
        x: samples (n, 1, bands, frames) in [-1, 1].
        y: the classes (n,) that were asked for.
        ceiling: what it reads of real ones. The share is told relative to it, too.
    Raises: ValueError without classes, or for samples that hold NaN or infinity.
    """
    if y is None:
        raise ValueError("no classes were asked for, so that nothing is right or wrong")
    seen, heard = (named(part, real) == y.cpu() for part in (x, through_sound(x, data.mel)))
    value, n = heard.float().mean().item(), len(x)
    low, high = wilson(int(heard.sum()), n)
    more = {
        "seen": seen.float().mean().item(),
        "ceiling": ceiling.heard,
        "relative": value / ceiling.heard if ceiling.heard else None,
    }
    words = (
        f"heard as what was asked for: {value:.1%} of the samples (95%: {low:.1%} to {high:.1%}), {more['seen']:.1%} "
        f"before they were sounds; real sounds {ceiling.seen:.1%}, through their spectrograms {ceiling.heard:.1%}"
    )
    return Result(value, ceiling.seen, words, low, high, more, "wilson")


def convergence_curve(mel: Mel, y: Tensor, rounds: list[int], momentum: float = 0.99) -> list[tuple[int, float]]:
    """(rounds of Griffin-Lim, mean spectral convergence) of sounds float (n, slice_size) made of their magnitudes."""
    S = mel.transform(y[:MOST_FOR_CURVE]).abs()
    curve = []
    for n_iter in rounds:
        found = mel.transform(mel.griffin_lim(S, n_iter, momentum)).abs()
        curve.append((n_iter, spectral_convergence(S, found).mean().item()))
    return curve
