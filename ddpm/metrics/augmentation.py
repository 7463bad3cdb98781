"""Usefulness of generated images as training data: a classifier trained on few real images, with and without them."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ddpm.metrics.denoising import interval
from ddpm.metrics.intervals import student, wilson
from ddpm.metrics.judge import in_batches, train_judge
from ddpm.randomness import generator

BATCH = 128  # images of a step
Labelled = tuple[Tensor, Tensor]
"""Images (n, C, H, W) in [-1, 1], and their classes (n,)."""


class Learned(NamedTuple):
    """Correctness on held-out images (n,) of classifiers trained on real images, without and with generated ones."""

    without: Tensor
    with_generated: Tensor


def must_have_enough(y: Tensor, classes: Sequence[int], real: Sequence[int], name: str) -> None:
    """Raise ValueError if the training images, of classes y (n,), have fewer real images per class than requested.

    Args:
        classes: the classes to check.
        real: requested numbers of images of each.
        name: of the data.
    """
    counts = y.bincount(minlength=max(classes) + 1)
    fewest = min(int(counts[k]) for k in classes)
    if max(real) > fewest:
        rarest = next(k for k in classes if counts[k] == fewest)
        raise ValueError(
            f"real={list(real)}: of {name} {fewest} images of class {rarest} are trained on; allowed: at most {fewest}"
        )


def few(y: Tensor, k: int, seed: int) -> Tensor:
    """Choose indices of k images of each class of y (n,) by the seed; those for a smaller k are a subset."""
    order = torch.randperm(len(y), generator=generator(seed, "augmentation"))
    chosen = [order[y[order] == c][:k] for c in y.unique().tolist()]
    return torch.cat(chosen).sort().values


def learned(
    make: Callable[[int], nn.Module],
    real: Labelled,
    generated: Labelled,
    held_out: Labelled,
    seed: int,
    steps: int,
    device: torch.device | str = "cpu",
) -> Learned:
    """Train one classifier on real images and another on these and generated ones, for as many steps, and test both.

    Both start from the same weights.

    Args:
        make: seed -> an untrained classifier, images to logits.
        real, generated, held_out: images and their classes.
        seed: of weights, order, shifts and dropout.
        steps: about how many training steps, of at most 128 images each; epochs are completed.
        device: the device of both classifiers.
    """
    every = tuple(torch.cat(pair) for pair in zip(real, generated, strict=True))
    right = []
    for x, y in (real, every):
        epochs = max(1, round(steps / max(1, len(x) // BATCH)))
        size = min(BATCH, len(x))
        judge = train_judge(make(seed).to(device), x.to(device), y.to(device), seed, epochs, size)
        named = in_batches(lambda part, judge=judge: judge(part.to(device)).argmax(1).cpu(), held_out[0])  # type: ignore[misc]
        right.append(named == held_out[1])
    return Learned(*right)


def record(by_seed: Mapping[int, Learned]) -> dict[str, Any]:
    r"""Return the record over several seeds: accuracies of the classifiers, and their difference paired by seed.

    .. math:: \Delta = \frac1S \sum_s (a_s^\text{with} - a_s^\text{without}) \qquad \text{[Augmentation (gain)]}

    With several seeds its interval is Student's over them; with one it is the paired interval over the held-out images,
    of the image-by-image difference in correctness. Each accuracy has Wilson's interval over the images.
    """
    gains = {seed: each.with_generated.double() - each.without.double() for seed, each in by_seed.items()}
    first, values = next(iter(gains.values())), [gain.mean().item() for gain in gains.values()]
    of_images = interval(first, "images")
    found: dict[str, Any] = {"value": statistics.fmean(values), "low": of_images["low"], "high": of_images["high"]}
    found |= {"interval": "images", "real_vs_real": None, "seeds": list(by_seed)}
    if len(values) > 1:
        _, low, high = student(values)
        found |= {"low": low, "high": high, "interval": "seeds", "values": values}
    for name in Learned._fields:
        rights = [getattr(each, name) for each in by_seed.values()]
        found[name] = statistics.fmean(right.double().mean().item() for right in rights)
        found[f"{name}_by_seed"] = [right.double().mean().item() for right in rights]
        found[f"{name}_intervals"] = [list(wilson(int(right.sum()), len(right))) for right in rights]
    return found


def in_words(values: Mapping[str, Any], k: int, times: int) -> str:
    """Format the record of k real images a class, and `times` as many generated ones."""
    between = "" if values["low"] is None else f" ({values['low']:+.2%} to {values['high']:+.2%}"
    over = f", 95% over {len(values['seeds'])} seeds)" if values["interval"] == "seeds" else ", 95% over images)"
    return (
        f"{k} real images a class: {values['without']:.2%} of held-out images named correctly; with {times} generated "
        f"ones for each {values['with_generated']:.2%}: {values['value']:+.2%}{between}{over if between else ''}"
    )
