"""Do generated images teach? A classifier learns from few real images, with generated ones beside them and without."""

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
    """Which held-out images (n,) a classifier names rightly that learned from real images, and from generated too."""

    without: Tensor
    with_generated: Tensor


def must_have_enough(y: Tensor, classes: Sequence[int], real: Sequence[int], name: str) -> None:
    """Refuse numbers of real images a class that training images of classes y (n,) do not have; ValueError.

    Args:
        classes: that are looked at.
        real: how many of each are asked for.
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
    """Places of k images of each class of y (n,), those of fewer among those of more; chosen by the seed."""
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

    Both begin with the same weights.

    Args:
        make: seed -> an untrained classifier, images to logits.
        real, generated, held_out: images and their classes.
        seed: of weights, order, shifts and dropout.
        steps: of training, of at most 128 images each; about, for an epoch is not left halfway.
        device: where they compute.
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
    r"""The record of what classifiers learned with several seeds: accuracies, and their difference paired by seed.

    .. math:: \Delta = \frac1S \sum_s (a_s^\text{with} - a_s^\text{without}) \qquad \text{[Augmentation (gain)]}

    With several seeds its interval is Student's over them; with one it is over the held-out images, which both
    classifiers were tested on: of the difference of right and wrong, image by image. Each accuracy has Wilson's, over
    the images.
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
    """The record of k real images a class, and `times` as many generated ones, in words."""
    between = "" if values["low"] is None else f" ({values['low']:+.2%} to {values['high']:+.2%}"
    over = f", 95% over {len(values['seeds'])} seeds)" if values["interval"] == "seeds" else ", 95% over images)"
    return (
        f"{k} real images a class: {values['without']:.2%} of held-out images named rightly; with {times} generated "
        f"ones for each {values['with_generated']:.2%}: {values['value']:+.2%}{between}{over if between else ''}"
    )
