"""Sample quality against real images: every measure under a name that states its features and reference.

A measure takes the samples of one seed and the real images, and returns one result or several. The results of several
seeds become a mean and its interval.
"""

import functools
import hashlib
import json
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from filelock import FileLock
from torch import Tensor, nn

from ddpm.data import ImageData
from ddpm.data.dataset import spread
from ddpm.metrics.features import Features, Judge, Pixels
from ddpm.metrics.frechet import finite_sample_bias, frechet_distance, frechet_error, moments
from ddpm.metrics.intervals import half_width, student, wilson
from ddpm.metrics.judge import accuracy, passes, train_judge
from ddpm.metrics.kernel import kernel_distance
from ddpm.metrics.memorisation import Memorisation, memorisation
from ddpm.metrics.neighbours import density_coverage, precision_recall
from ddpm.metrics.recognition import Recognition, recognised, recognition
from ddpm.metrics.transport import Distance, directions, energy_distance, sliced_wasserstein
from ddpm.metrics.variety import variety_within
from ddpm.randomness import SampleNoise
from ddpm.runs import checkpoint
from ddpm.runs.tensor_cache import load_tensor, save_tensor

MOST_IN_KERNEL = 10_000  # training images for unbiased distances, whose mean does not depend on their number
PRECISION_K, DENSITY_K = 3, 5  # neighbours, as in the papers
MOST_PIXELS, MOST_VALUES = 4096, 50_000_000  # of an image and in all, that logistic regression fits in minutes
ENOUGH_HELD_OUT = 1000  # images that estimate the distance of the closest 1 %


class Result(NamedTuple):
    """The result of a measure for the samples of one seed."""

    value: float
    real_vs_real: float | None  # the same measure of held-out images
    words: str
    low: float | None = None  # of its own 95 % interval, where it has one
    high: float | None = None
    more: Mapping[str, Any] = MappingProxyType({})  # further numbers, or lists of them
    interval: str | None = None  # method of the interval
    detail: Any = None  # for figures; not part of the record


class Samples(NamedTuple):
    """Samples of one seed."""

    x: Tensor  # (n, C, H, W) in [-1, 1], or of another shape
    features: Tensor  # (n, D)
    y: Tensor | None  # the requested classes (n,)


class Real:
    """Features of the real images by one extractor: of the training part and of the held-out part.

    Args:
        data: with a held-out part.
        features: the extractor.
        cache: folder in which features of all images are cached under the checksum of the data; None for none.
    Raises: ValueError for data without a held-out part.
    """

    def __init__(self, data: ImageData, features: Features, cache: Path | None = None):
        if len(data.held_out) == 0:
            raise ValueError(f"{data.name} has no held-out part (data.validation=0), and this measure needs one")
        self.data, self.features = data, features
        self.noise = functools.cache(self._noise)
        every = self._cached(cache) if cache is not None else self._computed()
        self.train, self.held_out = every[data.train.cpu()], every[data.held_out.cpu()]  # (N, D), (M, D)

    def _computed(self) -> Tensor:
        parts = torch.arange(len(self.data)).split(2048)
        return torch.cat([self.features(self.data.batch(part).x.cpu()) for part in parts])

    def _cached(self, cache: Path) -> Tensor:
        """Return features (N + M, D) of all images, read from the cache or computed."""
        path = cache / f"{str(self.data.identity()['sha256'])[:12]}-{self.features.name}.safetensors"
        every = load_tensor(path, torch.float32, (len(self.data), self.features.size))
        if every is None:
            every = self._computed().float()
            save_tensor(every, path)
        return every

    def protocol(self, measure: str, n: int) -> str:
        """Return the protocol name of a measure of n samples."""
        return f"{measure}_{self.features.name}_{n}_train"

    def like(self, n: int) -> Tensor:
        """Return at most n rows of the held-out part, evenly spaced."""
        return self.held_out[spread(len(self.held_out), n)]

    def some(self, n: int) -> Tensor:
        """Return at most n rows of the training part, evenly spaced."""
        return self.train[spread(len(self.train), n)]

    @functools.cached_property
    def moments(self) -> tuple[Tensor, Tensor]:
        """Mean and covariance of the training part."""
        return moments(self.train)

    def _noise(self, n: int) -> Tensor:
        """Return the features (n, D) of n images of Gaussian noise."""
        return self.features(SampleNoise(0, range(n)).x_T(self.data.shape))


# ----------------------------------------------------------------------------------------------------------- measures


def frechet(drawn: Samples, real: Real) -> dict[str, Result]:
    """Measure the Frechet distance to the training part, with its interval over the choice of samples.

    `relative` is its place between held-out images (0) and noise (1). The distance depends on the number of images, so
    n samples are compared with n held-out images; if there are fewer, `relative` is that of as many samples. It is
    None where noise is no further than held-out images.

    Raises: ValueError for fewer samples than features, whose covariance is singular.
    """
    held_out = real.like(len(drawn.features))
    m = len(held_out)
    value = frechet_distance(*moments(drawn.features), *real.moments)
    half = half_width(frechet_error(drawn.features, *real.moments))
    of_held_out, of_noise, of_as_many = (
        frechet_distance(*moments(features, singular=True), *real.moments)
        for features in (held_out, real.noise(m), drawn.features[:m])
    )
    relative = (of_as_many - of_held_out) / (of_noise - of_held_out) if of_noise > of_held_out else None
    units = real.data.units
    words = f"Frechet distance {value:.3f} ± {half:.3f} (held-out {units} {of_held_out:.3f}, noise {of_noise:.3f})"
    if relative is not None:
        words += f": {relative:.2%} of the way from held-out {units} to noise"
    if m < len(drawn.features):
        words += f"; {m} {units} are held out, and their distance is larger because they are fewer"
    more = {"noise": of_noise, "relative": relative, "real_n": m}
    return {"frechet": Result(value, of_held_out, words, value - half, value + half, more, "jackknife")}


def kernel(drawn: Samples, real: Real) -> dict[str, Result]:
    """Measure the kernel distance (KID) to the training part."""
    reference, held_out = real.some(MOST_IN_KERNEL), real.like(len(drawn.features))
    of_samples, of_held_out = kernel_distance(drawn.features, reference), kernel_distance(held_out, reference)
    words = f"{of_samples}; held-out images {of_held_out.value:.4g}"
    return {
        "kernel": Result(
            of_samples.value,
            of_held_out.value,
            words,
            of_samples.low,
            of_samples.high,
            {"real_n": len(held_out)},
            "jackknife",
        )
    }


def transport(drawn: Samples, real: Real) -> dict[str, Result]:
    """Measure the sliced Wasserstein distance to the training part; it falls with the number of samples."""
    lines, held_out = directions(real.features.size), real.like(len(drawn.features))
    of_samples, of_held_out = (sliced_wasserstein(x, real.train, lines) for x in (drawn.features, held_out))
    return {"sliced_wasserstein": _distance("sliced Wasserstein distance", of_samples, of_held_out, drawn, real)}


def energy(drawn: Samples, real: Real) -> dict[str, Result]:
    """Measure the energy distance to the training part."""
    reference, held_out = real.some(MOST_IN_KERNEL), real.like(len(drawn.features))
    of_samples, of_held_out = (energy_distance(x, reference) for x in (drawn.features, held_out))
    return {"energy_distance": _distance("energy distance", of_samples, of_held_out, drawn, real)}


def _distance(name: str, of_samples: Distance, of_held_out: Distance, drawn: Samples, real: Real) -> Result:
    """Return the result of a distance to the training part, with that of as many held-out samples, or of all."""
    (value, low, high), m = of_samples, len(real.like(len(drawn.features)))
    words = f"{name} {value:.4g} (95%: {low:.4g} to {high:.4g}; held-out {real.data.units} {of_held_out.value:.4g}"
    fewer = f", {m} of them" if m < len(drawn.features) else ""
    return Result(value, of_held_out.value, f"{words}{fewer})", low, high, {"real_n": m}, "jackknife")


def precision(drawn: Samples, real: Real) -> dict[str, Result]:
    """Measure improved precision and recall against as many training images as there are samples, or all of them.

    They depend on these numbers: held-out images, where fewer, are compared with as many training images.
    """
    return _pair(("precision", "recall"), precision_recall, PRECISION_K, drawn, real)


def density(drawn: Samples, real: Real) -> dict[str, Result]:
    """Measure density and coverage against as many training images as there are samples, or all; see `precision`."""
    return _pair(("density", "coverage"), density_coverage, DENSITY_K, drawn, real)


def _pair(
    names: tuple[str, str], measure: Callable[..., tuple[float, float]], k: int, drawn: Samples, real: Real
) -> dict[str, Result]:
    """Return the results of a measure with two values, for samples and for held-out images."""
    held_out = real.like(len(drawn.features))
    values = measure(drawn.features, real.some(len(drawn.features)), k)
    of_held_out = measure(held_out, real.some(len(held_out)), k)
    fewer = f", {len(held_out)} of them" if len(held_out) < len(drawn.features) else ""
    return {
        f"{name}-k{k}": Result(
            value, other, f"{name} {value:.3f} (held-out images {other:.3f}{fewer})", more={"real_n": len(held_out)}
        )
        for name, value, other in zip(names, values, of_held_out, strict=True)
    }


def by_classifier(drawn: Samples, real: Real) -> dict[str, Result]:
    """Measure the share of samples that the classifier recognises, and their classes.

    Raises: ValueError for other features than a classifier's.
    """
    if not isinstance(real.features, Judge):
        raise ValueError(f"recognition needs features=classifier, not {real.features.name}")
    of_samples, of_held_out = (real.features.probabilities(f) for f in (drawn.features, real.held_out))
    result = recognised(of_samples, of_held_out, list(range(of_samples.shape[1])), drawn.y)
    return {"recognition": _recognition(result, len(drawn.x))}


def fits_regression(data: ImageData) -> bool:
    """Whether images are few and small enough for a logistic regression on pixels to be fitted in minutes."""
    pixels = math.prod(data.shape)
    return pixels <= MOST_PIXELS and pixels * len(data.train) <= MOST_VALUES


def by_regression(drawn: Samples, data: ImageData, held_out: Tensor | None = None) -> Result:
    """Measure recognition by a logistic regression on pixels, for small images, and distances to training images.

    Args:
        held_out: indices of the held-out images to compare with; None for all.
    """
    (train_x, train_y), (held_out_x, _) = parts(data)
    held_out_x = held_out_x if held_out is None else data.batch(held_out).x
    return _recognition(recognition(drawn.x.float(), train_x, train_y, held_out_x, requested=drawn.y), len(drawn.x))


def _recognition(result: Recognition, n: int) -> Result:
    """Return the result of recognising n samples, with Wilson's interval of the share."""
    low, high = wilson(round(result.recognised * n), n)
    ratio = result.distance_ratio
    more = {
        "class_shares": result.class_shares,
        "class_entropy": result.class_entropy,
        "distance_ratio": ratio if ratio is not None and math.isfinite(ratio) else None,  # held-out copies: none
        "class_accuracy": result.class_accuracy,
        "accuracy": None if result.class_accuracy is None else result.accuracy,
    }
    return Result(
        result.recognised,
        result.held_out_recognised,
        str(result),
        low,
        high,
        {name: value for name, value in more.items() if value is not None},
        "wilson",
    )


def variety(drawn: Samples, real: Real) -> dict[str, Result]:
    """Measure the mean distance of two samples within a class, in features; classes are the classifier's predictions.

    Compared with held-out images, classified likewise; `relative` is the mean over classes of the ratio.

    Raises: ValueError for other features than a classifier's, and where no class has two samples.
    """
    if not isinstance(real.features, Judge):
        raise ValueError(f"variety needs features=classifier, which names the classes, not {real.features.name}")
    of_each = []
    for features in (drawn.features, real.held_out):
        named = real.features.probabilities(features)
        of_each.append(variety_within(features, named.argmax(1), named.shape[1]))
    both = [(ours, theirs) for ours, theirs in zip(*of_each, strict=True) if ours is not None and theirs is not None]
    if not both:
        raise ValueError(f"no two of {len(drawn.features)} samples are of one class, according to the classifier")
    value, of_held_out = (statistics.fmean(v for v in values if v is not None) for values in of_each)
    relative = statistics.fmean(ours / theirs for ours, theirs in both)
    words = f"variety within classes {value:.3f} (held-out images {of_held_out:.3f}), by class {relative:.1%} of it"
    more = {"of_classes": of_each[0], "real_of_classes": of_each[1], "relative": relative}
    return {"variety": Result(value, of_held_out, words, more=more)}


def copies(drawn: Samples, real: Real) -> dict[str, Result]:
    """Measure distances to the nearest training image, in features and in pixels; `detail` has all of them."""
    data, pixels = real.data, Pixels(real.data.shape)
    chosen = spread(len(data.held_out), max(len(drawn.x), ENOUGH_HELD_OUT))
    train_x, held_out_x = (data.batch(numbers).x for numbers in (data.train, data.held_out[chosen]))
    in_features = memorisation(drawn.features, real.train, real.held_out[chosen])
    in_pixels = memorisation(pixels(drawn.x), pixels(train_x), pixels(held_out_x))
    more = {
        "share_closer": in_features.share_closer,
        "pixel_ratio": in_pixels.ratio,
        "pixel_share_closer": in_pixels.share_closer,
        "smallest": in_features.relative.min().item(),
        "smallest_held_out": in_features.held_out_relative.min().item(),
    }
    distances: dict[str, Memorisation] = {real.features.name: in_features, "pixels": in_pixels}
    words = "\n".join(f"by {name}: {result}" for name, result in distances.items())
    return {"memorisation": Result(in_features.ratio, 1.0, words, more=more, detail=distances)}


MEASURES: dict[str, Callable[[Samples, Real], dict[str, Result]]] = {
    "recognition": by_classifier,
    "frechet": frechet,
    "kernel": kernel,
    "precision_recall": precision,
    "density_coverage": density,
    "memorisation": copies,
    "variety": variety,
    "sliced_wasserstein": transport,
    "energy_distance": energy,
}


def bias_curve(real: Real) -> list[tuple[int, float]]:
    """Return (n, Frechet distance) of n held-out images to the training part, for several n up to all of them.

    Raises: ValueError where there are no more held-out images than features.
    """
    most, least = len(real.held_out), real.features.size + 1
    if most < least:
        raise ValueError(f"{most} held-out images are too few for the covariance of {least - 1} features")
    sizes = sorted({round(least * (most / least) ** (i / 7)) for i in range(8)})
    return finite_sample_bias(real.held_out, real.train, sizes)


# ---------------------------------------------------------------------------------------------------------- together


def together(results: Sequence[Result], seeds: Sequence[int]) -> dict[str, Any]:
    """Return the record of a measure over several seeds: means, and the 95 % interval of the value over seeds.

    With one seed the interval is the measure's own, if it has one. With several it is Student's, n - 1 degrees of
    freedom.
    """
    first, values = results[0], [each.value for each in results]
    low, high = first.low, first.high
    record: dict[str, Any] = {"value": sum(values) / len(values), "interval": first.interval}
    if len(values) > 1:
        _, low, high = student(values)
        record |= {"values": values, "interval": "seeds"}
    more = {name: _mean([each.more[name] for each in results]) for name in first.more}
    return record | {"low": low, "high": high, "real_vs_real": first.real_vs_real, "seeds": list(seeds)} | more


def in_words(results: Sequence[Result], record: dict[str, Any]) -> str:
    """Format the mean over all seeds and the result of the first seed."""
    if len(results) == 1:
        return results[0].words
    interval = f"(95% over {len(results)} seeds: {record['low']:.4g} to {record['high']:.4g})"
    return f"{record['value']:.4g} {interval}; with the first one:\n{results[0].words}"


def _mean(values: list[Any]) -> Any:
    """Return the mean of numbers, or elementwise of lists of them; None where a number is missing."""
    if isinstance(values[0], list):
        return [_mean(list(column)) for column in zip(*values, strict=True)]
    if None in values:
        return None
    return values[0] if len(set(values)) == 1 else sum(values) / len(values)  # a number of images stays an integer


# -------------------------------------------------------------------------------------------------------- extractors


def judge_of(
    data: ImageData, classifier: nn.Module, cache: Path, device: torch.device | str, say: Callable[[str], None] = print
) -> tuple[Judge, float]:
    """Return a classifier trained once per data set and cached, as features, and its held-out accuracy.

    Args:
        classifier: maps images to logits and has `features`; untrained.
        cache: folder of trained classifiers.
        device: the device of the classifier.
        say: called with lines that report training and accuracy.
    Raises: ValueError for data without labels.
    """
    path = trained_judge(data, classifier, cache, device, say)
    _, (held_out_x, held_out_y) = parts(data)
    right = accuracy(classifier, held_out_x.to(device), held_out_y.to(device))
    say(f"the judge names {right:.2%} of the held-out images correctly")
    return Judge(classifier, checkpoint.sha256(path)[:6]), right


def trained_judge(
    data: ImageData, classifier: nn.Module, cache: Path, device: torch.device | str, say: Callable[[str], None] = print
) -> Path:
    """Load a classifier's weights, trained once per data set and cached; return the file of the weights.

    Args:
        data, classifier, cache, device, say: as in `judge_of`; the classifier is left in evaluation mode.
    Raises: ValueError for data without labels, and a file that is damaged.
    """
    path = judge_path(data, classifier, cache)
    (train_x, train_y), _ = parts(data)
    if not path.exists():
        with FileLock(path.with_suffix(".lock")):  # of runs that end at the same time one trains it, the others wait
            if not path.exists():
                say(f"training the judge of {data.name}, once: it will be saved as {path}")
                train_judge(classifier.to(device), train_x.to(device), train_y.to(device), epochs=passes(len(train_x)))
                checkpoint.save_weights(classifier, path)
    try:
        checkpoint.load_into(classifier, path)
    except ValueError as error:
        raise ValueError(f"{error}; remove it to have the judge trained anew") from error
    classifier.to(device).eval()
    return path


def judge_path(data: ImageData, classifier: nn.Module, cache: Path) -> Path:
    """Return the path of the cached judge of some data."""
    return cache / f"{data.name}-{data_key(data, str(classifier), passes(len(data.train)))}.safetensors"


def data_key(data: ImageData, *facts: str | int) -> str:
    """Return six hex digits that identify the training data (and `facts`), for names of cache files."""
    identity = json.dumps([data.identity(), len(data.held_out), *facts], sort_keys=True)
    return hashlib.sha256(identity.encode()).hexdigest()[:6]


def has_classes(data: ImageData) -> bool:
    """Whether the training part is labelled with two classes or more."""
    return data.labels is not None and len(data.labels.cpu()[data.train.cpu()].unique()) > 1


def parts(data: ImageData) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Return (x, y) of the training part and of the held-out part of labelled data, on the CPU."""
    with torch.no_grad():
        train, held_out = data.batch(data.train), data.batch(data.held_out)
    if train.y is None or held_out.y is None:
        raise ValueError(f"{data.name} has no labels, and this measure needs them")
    return (train.x, train.y), (held_out.x, held_out.y)
