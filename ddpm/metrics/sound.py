"""Measures of generated sounds by a classifier's features: class accuracy, Frechet distance and memorisation.

The classifier reads spectrograms of mel bands before and after they were turned into sounds: the second include the
loss of Griffin-Lim. Copies are searched for in the first.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ddpm.data.dataset import spread
from ddpm.data.sound import AT_ONCE, Clips
from ddpm.data.spectrogram import Mel, at_peak, spectral_convergence
from ddpm.figures.images import to_float, to_uint8
from ddpm.metrics.frechet import frechet_distance, moments
from ddpm.metrics.intervals import wilson
from ddpm.metrics.quality import Real, Result, Samples, copies, frechet

MOST_FOR_CURVE = 64  # clips


class Judged(NamedTuple):
    """Spectrograms and a classifier's features of them before and after they were turned into sounds."""

    x: Tensor  # (n, 1, bands, frames) in [-1, 1]
    y: Tensor | None  # their classes (n,), or the requested ones
    seen: Tensor  # (n, D), features of the spectrograms
    heard: Tensor  # (n, D), features of the spectrograms of the sounds made from them
    convergence: Tensor  # (n,), distance of these sounds from the magnitudes, see `spectral_convergence`

    @classmethod
    def of(cls, x: Tensor, y: Tensor | None, mel: Mel, real: Real) -> "Judged":
        """Turn spectrograms into sounds, and compute the features of both.

        Raises: ValueError for other features than a classifier's, and for pictures with NaN or infinity.
        """
        if not hasattr(real.features, "probabilities"):
            raise ValueError(f"sounds are read by features=classifier, not {real.features.name}")
        seen, (again, convergence) = real.features(x), through_sound(x, mel)
        return cls(x, None if y is None else y.cpu(), seen, real.features(again), convergence)

    def right(self, features: Tensor, real: Real) -> Tensor:
        """Return which of them (n,) are classified correctly by features; ValueError without classes."""
        if self.y is None:
            raise ValueError("no classes were requested, so nothing is right or wrong")
        extractor: Any = real.features
        named: Tensor = extractor.probabilities(features).argmax(1) == self.y
        return named


def held_out(data: Clips, real: Real) -> Judged:
    """Return the held-out sounds, whose accuracy is a ceiling for samples. ValueError as `Judged.of`."""
    batch = data.batch(data.held_out)
    if batch.y is None:
        raise ValueError(f"{data.name} has no labels, and this measure needs them")
    return Judged.of(batch.x, batch.y, data.mel, real)


def through_sound(x: Tensor, mel: Mel) -> tuple[Tensor, Tensor]:
    """Return spectrograms of the sounds made from (n, 1, bands, frames) in [-1, 1], and their convergence (n,)."""
    pictures, convergence = [], []
    for part in to_uint8(x.cpu()).split(AT_ONCE):
        S = mel.magnitudes(part)
        y = mel.griffin_lim(S, mel.n_iter)
        pictures.append(mel.encode(at_peak(y))[0])
        convergence.append(spectral_convergence(S, mel.transform(y).abs()))
    return (to_float(torch.cat(pictures)), torch.cat(convergence)) if pictures else (x, x.flatten())


def as_heard(drawn: Judged, ceiling: Judged, real: Real) -> Result:
    """Measure the share of samples that are classified as requested, after they were turned into sounds.

    Args:
        ceiling: the held-out sounds. The record also has the share relative to theirs, and the mean spectral
            convergence of both.
    Raises: ValueError without classes.
    """
    of_drawn, of_real = drawn.right(drawn.heard, real), ceiling.right(ceiling.heard, real)
    seen, real_seen = drawn.right(drawn.seen, real), ceiling.right(ceiling.seen, real)
    value, most = of_drawn.float().mean().item(), of_real.float().mean().item()
    low, high = wilson(int(of_drawn.sum()), len(of_drawn))
    more = {
        "seen": seen.float().mean().item(),
        "ceiling": most,
        "relative": value / most if most else None,
        "convergence": drawn.convergence.mean().item(),
        "real_convergence": ceiling.convergence.mean().item(),
    }
    real_vs_real = real_seen.float().mean().item()
    words = (
        f"heard as the requested class: {value:.1%} of the samples (95%: {low:.1%} to {high:.1%}), {more['seen']:.1%} "
        f"before conversion to sound; real sounds {real_vs_real:.1%}, through their spectrograms {most:.1%}; "
        f"spectral convergence {more['convergence']:.3f}, of real sounds {more['real_convergence']:.3f}"
    )
    return Result(value, real_vs_real, words, low, high, more, "wilson")


def distance(drawn: Judged, floor: Judged, real: Real) -> Result:
    """Measure the Frechet distance to the training sounds after samples were turned into sounds; see `quality.frechet`.

    With that of as many held-out sounds as recorded (`real_vs_real`), and after the same conversion (`floor`).

    Args:
        floor: the held-out sounds.
    Raises: ValueError for fewer samples, or training sounds, than features.
    """
    found = frechet(Samples(drawn.x, drawn.heard, drawn.y), real)["frechet"]
    as_many = floor.heard[spread(len(floor.heard), len(drawn.heard))]
    through = frechet_distance(*moments(as_many, singular=True), *real.moments)
    words = f"{found.words}; held-out sounds through their spectrograms {through:.3f}"
    return found._replace(words=words, more={**found.more, "floor": through})


def memorised(drawn: Judged, real: Real) -> Result:
    """Measure memorisation of training sounds as `quality.copies`: by features and bytes of the spectrograms.

    Not of the sounds made from them, whose phases are estimated.
    """
    return copies(Samples(drawn.x, drawn.seen, drawn.y), real)["memorisation"]


def convergence_curve(mel: Mel, S: Tensor, rounds: list[int], momentum: float = 0.99) -> list[tuple[int, float]]:
    """Return (rounds of Griffin-Lim, mean spectral convergence) of sounds made from magnitudes, of 64 clips at most.

    Args:
        S: magnitudes (n, n_fft // 2 + 1, frames): of sounds, or `Mel.magnitudes` of pictures.
    """
    S, curve = S[:MOST_FOR_CURVE], []
    for n_iter in rounds:
        found = mel.transform(mel.griffin_lim(S, n_iter, momentum)).abs()
        curve.append((n_iter, spectral_convergence(S, found).mean().item()))
    return curve
