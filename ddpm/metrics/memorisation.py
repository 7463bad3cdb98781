"""Memorisation: distances of samples to the training images, compared with those of held-out images."""

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from ddpm.metrics.checks import finite_features
from ddpm.metrics.neighbours import nearest


@dataclass(frozen=True)
class Memorisation:
    """Distances of n samples to their nearest training images, relative to those of held-out images."""

    ratio: float  # mean distance to the nearest training image: of samples over that of held-out images
    share_closer: float  # of samples that are as close as the closest 1 % of held-out images; in 0..1
    index: Tensor  # (n,), the nearest training row of each sample
    distance: Tensor  # (n,), to it
    relative: Tensor  # (n,), distance over the median of the held-out distances
    held_out_relative: Tensor  # (m,), of the held-out rows themselves

    def __str__(self) -> str:
        return (
            f"nearest training image: samples are {self.ratio:.3f} times as far from it as held-out images "
            "(well below 1 would be memorising)\n"
            f"as close to it as the closest 1% of held-out images: {self.share_closer:.2%} of the samples "
            "(well above 1% would be memorising)\n"
            f"the closest sample is {self.relative.min().item():.3f} times as far as the median held-out image, the "
            f"closest held-out image {self.held_out_relative.min().item():.3f} times"
        )


def memorisation(samples: Tensor, train: Tensor, held_out: Tensor) -> Memorisation:
    """Compare distances to the nearest training row, of samples and of held-out rows.

    Fresh images of the data's distribution have a ratio of about 1, and 1 % of them are as close as the closest 1 %.
    With fewer than 99 held-out rows their smallest distance stands for that quantile.

    Args:
        samples: features (n, D) of the samples.
        train: features (N, D) of the training part.
        held_out: features (m, D) of held-out images.
    Raises: ValueError for features that cannot be compared, or if half of the held-out rows are training rows.
    """
    samples, train, held_out = finite_features(samples=samples, train=train, held_out=held_out)
    distance, index = nearest(samples, train)
    held_out_distance, _ = nearest(held_out, train)
    median = held_out_distance.quantile(0.5)
    if median == 0:
        copies = (held_out_distance == 0).sum()
        raise ValueError(f"{copies} of {len(held_out)} held-out rows equal a training row: most must be new to compare")
    # the rank 0.01 (m + 1): a fresh row falls below it with probability 1 %, whatever m
    close = np.quantile(held_out_distance.cpu().numpy(), 0.01, method="weibull").item()
    return Memorisation(
        ratio=(distance.mean() / held_out_distance.mean()).item(),
        share_closer=(distance <= close).double().mean().item(),
        index=index,
        distance=distance,
        relative=distance / median,
        held_out_relative=held_out_distance / median,
    )
