"""Cheap figures for the end of a run: are the samples recognised, all classes among them, and not copies?"""

from dataclasses import dataclass

import torch
from einops import rearrange
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from ddpm import images


class Recogniser:
    """Logistic regression on pixels in [0, 1].

    Args:
        C: inverse strength of scikit-learn's L2 penalty.
        max_iter: iterations of its solver; 1,437 digits of 8x8 need about 40.
    """

    def __init__(self, C: float = 1.0, max_iter: int = 2000):
        self.model = LogisticRegression(C=C, max_iter=max_iter)

    def fit(self, x: Tensor, y: Tensor) -> "Recogniser":
        """Learn from images (n, C, H, W) in [-1, 1] and their classes (n,)."""
        self.model.fit(_pixels(x), y.cpu().numpy())
        return self

    @property
    def classes(self) -> list[int]:
        """The classes, in the order of the columns of `probabilities`."""
        return self.model.classes_.tolist()

    def probabilities(self, x: Tensor) -> Tensor:
        """Probability of every class (n, K), float64, for images (n, C, H, W) in [-1, 1]."""
        return torch.from_numpy(self.model.predict_proba(_pixels(x)))


@dataclass(frozen=True)
class Recognition:
    """What `recognition` found; every share is in 0..1."""

    threshold: float
    recognised: float  # share of the samples with a probability of at least the threshold
    held_out_recognised: float  # the same of held-out images
    classes: list[int]
    class_shares: list[float]  # of each class among the recognised samples; zeros if there are none
    distance_ratio: float  # mean distance to the nearest training image: samples' over held-out images'

    def __str__(self) -> str:
        shares = "  ".join(f"{name}: {share:.1%}" for name, share in zip(self.classes, self.class_shares, strict=True))
        return (
            f"recognised with probability >= {self.threshold:g}: {self.recognised:.1%} of the samples, "
            f"{self.held_out_recognised:.1%} of held-out images\n"
            f"classes of the recognised samples: {shares}\n"
            f"nearest training image: samples are {self.distance_ratio:.3f} times as far from it as held-out images "
            "(well below 1 would be memorising)"
        )


def recognition(
    samples: Tensor, train_x: Tensor, train_y: Tensor, held_out_x: Tensor, threshold: float = 0.9
) -> Recognition:
    """Compare samples with held-out images, both as a logistic regression and as their nearest neighbours see them.

    Args:
        samples: images (n, C, H, W) in [-1, 1]; values outside are clipped, as they are in files.
        train_x: the training part (N, C, H, W) in [-1, 1].
        train_y: its classes (N,), two or more.
        held_out_x: images (m, C, H, W) in [-1, 1] that nothing was trained on.
        threshold: the probability from which on an image counts as recognised.
    Raises: ValueError if samples hold NaN or infinity, or a part is empty or of another shape.
    """
    if len({x.shape[1:] for x in (samples, train_x, held_out_x)}) != 1 or not len(samples) or not len(held_out_x):
        shapes = ", ".join(str(tuple(x.shape)) for x in (samples, train_x, held_out_x))
        raise ValueError(f"samples, training and held-out images have one (C, H, W) and n >= 1, not {shapes}")
    if broken := (~samples.isfinite().flatten(1).all(1)).sum():
        raise ValueError(f"{broken} of {len(samples)} samples hold NaN or infinity: nothing to recognise")
    recogniser = Recogniser().fit(train_x, train_y)
    probability, label = recogniser.probabilities(samples).max(1)
    held_out_probability, _ = recogniser.probabilities(held_out_x).max(1)
    counts = torch.bincount(label[probability >= threshold], minlength=len(recogniser.classes)).double()
    return Recognition(
        threshold=threshold,
        recognised=(probability >= threshold).double().mean().item(),
        held_out_recognised=(held_out_probability >= threshold).double().mean().item(),
        classes=recogniser.classes,
        class_shares=(counts / counts.sum().clamp(min=1)).tolist(),
        distance_ratio=(nearest(samples, train_x).mean() / nearest(held_out_x, train_x).mean()).item(),
    )


def nearest(x: Tensor, reference: Tensor, chunk: int = 256) -> Tensor:
    """Euclidean distance (n,) from x (n, C, H, W) to the nearest of reference (N, C, H, W), in pixels of [0, 1]."""
    reference = _pixels(reference)
    return torch.cat([torch.cdist(part, reference).amin(1) for part in _pixels(x).split(chunk)])


def _pixels(x: Tensor) -> Tensor:
    """Images (n, C, H, W) in [-1, 1] as files hold them, in rows (n, C H W) of [0, 1], float64 on the CPU."""
    return rearrange(images.to_uint8(x).cpu().double() / 255, "n c h w -> n (c h w)")
