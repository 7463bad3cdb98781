"""Measures of one network's samples, under names that say what was measured."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ddpm import checkpoint
from ddpm.data import ImageData
from ddpm.images import replacing, to_float, to_uint8
from ddpm.metrics.frechet import RelativeFrechet, relative_frechet
from ddpm.metrics.judge import accuracy, in_batches, train_judge
from ddpm.metrics.recognition import Recognition, recognition
from ddpm.randomness import SampleNoise


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
    features = [
        in_batches(classifier.features, to_float(to_uint8(x))) for x in (samples, train_x, held_out_x[:n], noise)
    ]
    found = relative_frechet(*features)
    record = {"value": found.samples, "real_vs_real": found.held_out, "noise": found.noise, "relative": found.relative}
    return f"frechet_classifier-{key}_{n}_train", found, record


def record(folder: Path, protocol: str, values: dict[str, Any]) -> None:
    """Put a result into the run's evaluation.json, beside those of other protocols."""
    path = folder / "evaluation.json"
    known = json.loads(path.read_text()) if path.exists() else {}
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(known | {protocol: values}, indent=1))


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


def _parts(data: ImageData) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """(x, y) of the training part and of the held-out part, on the CPU."""
    with torch.no_grad():
        return data.batch(data.train), data.batch(data.held_out)
