"""Cheap measures for the end of a run: recognition of samples, class balance and distance to training images."""

import math
from dataclasses import dataclass, replace

import torch
from einops import rearrange
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from ddpm.figures import images
from ddpm.metrics.neighbours import nearest

MOST_LISTED = 10  # classes up to which all shares are printed


class Recogniser:
    """Logistic regression on pixels in [0, 1].

    Args:
        C: inverse strength of scikit-learn's L2 penalty.
        max_iter: iterations of its solver; 1,437 digits of 8x8 need about 40.
    """

    def __init__(self, C: float = 1.0, max_iter: int = 2000):
        self.model = LogisticRegression(C=C, max_iter=max_iter)

    def fit(self, x: Tensor, y: Tensor) -> "Recogniser":
        """Fit to images (n, C, H, W) in [-1, 1] and their classes (n,)."""
        self.model.fit(_pixels(x), y.cpu().numpy())
        return self

    @property
    def classes(self) -> list[int]:
        """The classes in the order of the columns of `probabilities`."""
        return self.model.classes_.tolist()

    def probabilities(self, x: Tensor) -> Tensor:
        """Return the probability of every class (n, K), float64, for images (n, C, H, W) in [-1, 1]."""
        return torch.from_numpy(self.model.predict_proba(_pixels(x)))


@dataclass(frozen=True)
class Recognition:
    """Results of a recogniser; every share is in 0..1."""

    threshold: float
    recognised: float  # share of the samples with a probability of at least the threshold
    held_out_recognised: float  # the same of held-out images
    classes: list[int]
    class_shares: list[float]  # of each class among the recognised samples; zeros if there are none
    class_entropy: float  # of those shares, in bits; log2 K if all K classes are equally frequent
    class_accuracy: list[float | None] | None = None  # share of each class's samples classified so, where requested
    accuracy: float = math.nan  # of all the samples, where classes were requested
    distance_ratio: float | None = None  # mean distance to the nearest training image: samples' over held-out images'

    def __str__(self) -> str:
        shares = [f"{name}: {share:.1%}" for name, share in zip(self.classes, self.class_shares, strict=True)]
        most, K = math.log2(len(self.classes)), len(self.classes)
        listed = f" {'  '.join(shares)};" if K <= MOST_LISTED else ""
        lines = [
            f"recognised with probability >= {self.threshold:g}: {self.recognised:.1%} of the samples, "
            f"{self.held_out_recognised:.1%} of held-out images",
            f"classes of the recognised samples:{listed} {min(self.class_shares):.1%} to {max(self.class_shares):.1%} "
            f"each, entropy {self.class_entropy:.2f} of {most:.2f} bits",
        ]
        if self.class_accuracy is not None:
            known = [
                (right, name)
                for right, name in zip(self.class_accuracy, self.classes, strict=True)
                if right is not None
            ]
            right, name = min(known)
            lines.append(f"of the requested class: {self.accuracy:.1%}; the worst, {name}: {right:.1%}")
        if self.distance_ratio is not None:
            lines.append(
                f"nearest training image: samples are {self.distance_ratio:.3f} times as far from it as held-out "
                "images (well below 1 would be memorising)"
            )
        return "\n".join(lines)


def recognised(
    probability: Tensor,
    held_out_probability: Tensor,
    classes: list[int],
    requested: Tensor | None = None,
    threshold: float = 0.9,
) -> Recognition:
    """Return the recognition of samples and of held-out images by a recogniser's probabilities.

    Args:
        probability: (n, K), of the samples.
        held_out_probability: (m, K).
        classes: the K classes.
        requested: the class (n,) that each sample is conditioned on, where the network has classes.
        threshold: the least probability with which an image counts as recognised.
    """
    (p, label), (held_out_p, _) = probability.max(1), held_out_probability.max(1)
    counts = torch.bincount(label[p >= threshold], minlength=len(classes)).double()
    shares = counts / counts.sum().clamp(min=1)
    of_class, right = None, torch.tensor(math.nan)
    if requested is not None:
        named = torch.tensor(classes)[label] == requested
        right = named.double().mean()
        of_class = [named[requested == k].double().mean().item() if (requested == k).any() else None for k in classes]
    return Recognition(
        threshold=threshold,
        recognised=(p >= threshold).double().mean().item(),
        held_out_recognised=(held_out_p >= threshold).double().mean().item(),
        classes=classes,
        class_shares=shares.tolist(),
        class_entropy=abs(torch.xlogy(shares, shares).sum().item()) / math.log(2),
        class_accuracy=of_class,
        accuracy=right.item(),
    )


def recognition(
    samples: Tensor,
    train_x: Tensor,
    train_y: Tensor,
    held_out_x: Tensor,
    threshold: float = 0.9,
    requested: Tensor | None = None,
) -> Recognition:
    """Compare samples with held-out images by a logistic regression and by nearest-neighbour distances.

    Args:
        samples: images (n, C, H, W) in [-1, 1]; values outside are clipped, as they are in files.
        train_x: the training part (N, C, H, W) in [-1, 1].
        train_y: its classes (N,), two or more.
        held_out_x: held-out images (m, C, H, W) in [-1, 1].
        threshold, requested: as in `recognised`.
    Raises: ValueError if samples hold NaN or infinity, or a part is empty or of another shape.
    """
    if len({x.shape[1:] for x in (samples, train_x, held_out_x)}) != 1 or not len(samples) or not len(held_out_x):
        shapes = ", ".join(str(tuple(x.shape)) for x in (samples, train_x, held_out_x))
        raise ValueError(f"samples, training and held-out images have one (C, H, W) and n >= 1, not {shapes}")
    if broken := (~samples.isfinite().flatten(1).all(1)).sum():
        raise ValueError(f"{broken} of {len(samples)} samples hold NaN or infinity: nothing to recognise")
    recogniser = Recogniser().fit(train_x, train_y)
    probability, of_held_out = (recogniser.probabilities(x) for x in (samples, held_out_x))
    result = recognised(probability, of_held_out, recogniser.classes, requested, threshold)
    pixels = _pixels(train_x)
    distance, held_out_distance = (nearest(_pixels(x), pixels)[0].mean() for x in (samples, held_out_x))
    return replace(result, distance_ratio=(distance / held_out_distance).item())


def _pixels(x: Tensor) -> Tensor:
    """Return images (n, C, H, W) in [-1, 1], quantised as in files, as rows (n, C H W) in [0, 1], float64, CPU."""
    return rearrange(images.to_uint8(x).cpu().double() / 255, "n c h w -> n (c h w)")
