"""Measures of one network, of its samples or of held-out images, under names that say what was measured."""

import csv
import hashlib
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ddpm import checkpoint
from ddpm.data import ImageData
from ddpm.diffusion import Denoise
from ddpm.files import read_json, replacing
from ddpm.images import to_float, to_uint8
from ddpm.likelihood import Bound, bits_of_bytes, bits_per_dim, dequantised, log_likelihood, rademacher
from ddpm.metrics.frechet import RelativeFrechet, relative_frechet
from ddpm.metrics.judge import accuracy, in_batches, train_judge
from ddpm.metrics.recognition import Recognition, recognition
from ddpm.randomness import SampleNoise
from ddpm.sampling import Source


def measure_recognition(samples: Tensor, data: ImageData) -> tuple[str, Recognition, dict[str, Any]]:
    """Protocol name, result and record of `ddpm.metrics.recognition`, against the training and the held-out part.

    Args:
        samples: (n, C, H, W) in [-1, 1].
        data: labelled.
    Raises: ValueError for data without labels or without a held-out part.
    """
    must_be_measurable(data, ["recognition"], len(samples))
    (train_x, train_y), (held_out_x, _) = _parts(data)
    found = recognition(samples.float(), train_x, train_y, held_out_x)
    record = {
        "value": found.recognised,
        "real_vs_real": found.held_out_recognised,
        "class_shares": found.class_shares,
        "distance_ratio": found.distance_ratio,
    }
    return f"recognition_logistic_{len(samples)}_train", found, record


def measure_frechet(
    samples: Tensor, data: ImageData, classifier: nn.Module, cache: Path, say: Callable[[str], None] = print
) -> tuple[str, RelativeFrechet, dict[str, Any]]:
    """Protocol name, result and record of the Frechet distance in the features of a classifier trained on the data.

    The classifier is trained once per data set and kept.

    Args:
        samples: (n, C, H, W) in [-1, 1]; quantised to bytes before they are judged, as files would be.
        data: labelled.
        classifier: maps images to logits and has `features`; untrained.
        cache: folder of trained classifiers.
        say: told what the classifier is worth.
    Raises: ValueError for data without labels or with fewer held-out images than samples.
    """
    n = len(samples)
    must_be_measurable(data, ["frechet"], n)
    (train_x, train_y), (held_out_x, held_out_y) = _parts(data)
    facts = [data.identity(), len(data.held_out), str(classifier)]
    key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:6]
    path = cache / f"{data.name}-{key}.safetensors"
    if path.exists():
        checkpoint.load_into(classifier, path)
        classifier.eval()
    else:
        say(f"training the judge of {data.name}, once: it will be kept as {path}")
        train_judge(classifier, train_x, train_y)
        checkpoint.save_weights(classifier, path)
    say(f"the judge names {accuracy(classifier, held_out_x, held_out_y):.2%} of the held-out images correctly")

    noise = SampleNoise(0, range(n)).x_T(data.shape)
    penultimate: Any = classifier.features  # a method, which torch's stubs take for a tensor or a module
    features = [in_batches(penultimate, to_float(to_uint8(x))) for x in (samples, train_x, held_out_x[:n], noise)]
    found = relative_frechet(*features)
    record = {"value": found.samples, "real_vs_real": found.held_out, "noise": found.noise, "relative": found.relative}
    return f"frechet_classifier-{key}_{n}_train", found, record


def measure_bits_per_dim(
    source: Source, data: ImageData, n: int, times: list[int], batch: int, callback: Callable[[int], None] | None = None
) -> tuple[str, str, dict[str, Any], Bound]:
    """Protocol name, result in words, record and terms of the variational bound, on held-out images.

    Args:
        source: the network; its seed keys the noise by (image number, t).
        data: bytes, n of whose held-out images are taken, evenly spaced.
        times: that are evaluated, rising; all of 1..T, or fewer for the bound of a shorter chain.
        batch: images at a time; changes no result.
        callback: called with the number of images after each evaluation of the network.
    Raises: ValueError where the bound of an image is not finite.
    """
    schedule, parts = source.diffusion.schedule, []
    for numbers, x_0, denoise in _held_out(source, data, n, batch):
        noise = SampleNoise(source.seed, numbers, "bits_per_dim")
        parts.append(
            bits_per_dim(schedule, denoise, x_0, noise, times=_unless_all(times, schedule.T), callback=callback)
        )
    bound = Bound(
        tuple(times),
        *(torch.cat([getattr(p, f).double().cpu() for p in parts]) for f in ("L_T", "terms", "x_0_mse", "eps_mse")),
    )
    values = _interval(bound.total) | {name: getattr(bound, name).mean().item() for name in ("L_T", "L_t_1", "L_0")}
    share = bound.terms.mean(0).cumsum(0) >= bound.terms.mean(0).sum() / 2
    found = (
        f"{_in_words(values)} = L_T {values['L_T']:.4g} + sum of L_{{t-1}} {values['L_t_1']:.4g} + "
        f"L_0 {values['L_0']:.4g}\nhalf of the bits lie at t <= {times[int(share.int().argmax())]} of {schedule.T}"
    )
    return f"bits_per_dim_vlb_{len(times)}of{schedule.T}_{n}_held_out", found, values, bound


def measure_log_likelihood(
    source: Source,
    data: ImageData,
    n: int,
    steps: int,
    probes: int,
    start: float,
    batch: int,
    callback: Callable[[int], None] | None = None,
) -> tuple[str, str, dict[str, Any]]:
    """Protocol name, result in words and record of the probability flow's bits per dimension, on held-out images.

    Args:
        steps, start: of `log_likelihood`.
        probes: of Hutchinson's estimator, signs, drawn for each image.
        source, data, n, batch, callback: as in `measure_bits_per_dim`.
    Raises: ValueError where the likelihood of an image is not finite.
    """
    schedule, parts = source.diffusion.schedule, []
    for numbers, x_0, denoise in _held_out(source, data, n, batch):
        noise = SampleNoise(source.seed, numbers, "log_likelihood")
        x = dequantised(x_0, noise(0, data.shape, x_0.device))
        e = torch.stack([rademacher(noise(k, data.shape, x_0.device)) for k in range(1, probes + 1)])
        log_p = log_likelihood(schedule, denoise, x, e, steps=steps, start=start, callback=callback)
        parts.append(bits_of_bytes(log_p, math.prod(data.shape)).cpu())
    values = _interval(torch.cat(parts)) | {"solver": "rk4", "ode_steps": steps, "probes": probes, "start": start}
    protocol = f"bits_per_dim_flow_rk4_{steps}_t{start:g}_probes{probes}_{n}_held_out"
    return protocol, f"{_in_words(values)}, of dequantised bytes, by the probability flow from t = {start:g}", values


def bound_times(T: int, steps: int | None) -> list[int]:
    """The times of a bound of so many terms, rising to T, evenly spaced and rounded; ValueError unless in 1..T."""
    if steps is None:
        return list(range(1, T + 1))
    if isinstance(steps, bool) or not isinstance(steps, int) or not 1 <= steps <= T:
        raise ValueError(f"steps = {steps!r}: the number of terms of the bound must be an integer in 1..{T}")
    return [round(T * i / steps) for i in range(1, steps + 1)]


def write_terms(path: Path, bound: Bound) -> None:
    """A CSV file: for each t the mean over images of the bound's term, and of the errors of x_0 and eps."""
    rows = torch.stack([bound.terms.mean(0), bound.x_0_mse.mean(0), bound.eps_mse.mean(0)], dim=1).tolist()
    with replacing(path) as temporary, open(temporary, "w", newline="") as file:
        csv.writer(file).writerows([("t", "bits", "x_0_mse", "eps_mse")])
        csv.writer(file).writerows((t, *row) for t, row in zip(bound.times, rows, strict=True))


def record(folder: Path, protocol: str, values: dict[str, Any]) -> None:
    """Put a result into the run's evaluation.json, beside those of other protocols.

    A file that holds no such results gives way to the new one, and is kept as evaluation.damaged.json.
    """
    path = folder / "evaluation.json"
    try:
        text = json.dumps(_recorded(path) | {protocol: values}, indent=1)
    except (ValueError, RecursionError) as error:
        aside = path.with_name("evaluation.damaged.json")
        path.replace(aside)
        print(f"{error}; it is kept as {aside}")
        text = json.dumps({protocol: values}, indent=1)
    with replacing(path) as temporary:
        temporary.write_text(text)


def _recorded(path: Path) -> dict[str, Any]:
    """Protocol -> result, of evaluation.json; ValueError if it holds anything else."""
    known = read_json(path) if path.exists() else {}
    if not isinstance(known, dict) or not all(isinstance(values, dict) for values in known.values()):
        raise ValueError(f"{path} holds other than results")
    return known


def must_be_measurable(data: ImageData, metrics: list[str], n: int) -> None:
    """Refuse data that a metric cannot be measured against, before anything is drawn.

    Raises: ValueError for data without labels or held-out part, or with fewer held-out images than Frechet needs.
    """
    if data.labels is None:
        raise ValueError(f"{data.name} has no labels, and this measure needs them")
    if len(data.held_out) == 0:
        raise ValueError(f"{data.name} has no held-out part (data.validation=0), and this measure needs one")
    if "frechet" in metrics and n > len(data.held_out):
        raise ValueError(
            f"n = {n} samples need as many held-out images to compare with, and {data.name} holds out "
            f"{len(data.held_out)} (of {len(data)}): n is at most that for frechet"
        )


def must_hold_out(data: ImageData, metric: str, n: int) -> None:
    """Refuse data that hold out fewer than n images, before anything is evaluated; ValueError."""
    if len(data.held_out) == 0:
        raise ValueError(f"{data.name} has no held-out part (data.validation=0), and this measure needs one")
    if n > len(data.held_out):
        raise ValueError(
            f"n = {n} images, but {data.name} holds out {len(data.held_out)} (of {len(data)}): n is at most that for "
            f"{metric}"
        )


def _held_out(source: Source, data: ImageData, n: int, batch: int) -> Iterator[tuple[list[int], Tensor, Denoise]]:
    """Numbers, x_0 and denoiser of n held-out images, evenly spaced, `batch` at a time."""
    chosen = data.held_out[torch.linspace(0, len(data.held_out) - 1, n, dtype=torch.float64).round().long()]
    for numbers in chosen.split(batch):
        x_0, y = data.batch(numbers, source.device)
        y = y if getattr(source.model, "num_classes", None) is not None else None
        yield numbers.tolist(), x_0, source.diffusion.denoiser(source.model, y)


def _unless_all(times: list[int], T: int) -> list[int] | None:
    return None if len(times) == T else times


def _interval(bits: Tensor) -> dict[str, Any]:
    """Mean of (n,) images, and the 95 % interval of it over images; ValueError for values that are not finite."""
    lost = int((~bits.isfinite()).sum())
    if lost:
        raise ValueError(f"{lost} of {len(bits)} images have bits per dimension that are not finite")
    mean, n = bits.mean().item(), len(bits)
    half = 1.96 * bits.std().item() / math.sqrt(n) if n > 1 else None
    low, high = (None, None) if half is None else (mean - half, mean + half)
    return {"value": mean, "low": low, "high": high, "real_vs_real": None, "n": n}


def _in_words(values: dict[str, Any]) -> str:
    interval = "" if values["low"] is None else f" (95% over images: {values['low']:.4f} to {values['high']:.4f})"
    return f"{values['value']:.4f} bits/dim{interval}"


def _parts(data: ImageData) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """(x, y) of the training part and of the held-out part of labelled data, on the CPU."""
    with torch.no_grad():
        (train_x, train_y), (held_out_x, held_out_y) = data.batch(data.train), data.batch(data.held_out)
    assert train_y is not None and held_out_y is not None  # without labels the data are not measurable
    return (train_x, train_y), (held_out_x, held_out_y)
