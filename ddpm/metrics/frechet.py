"""The Frechet distance of two sets of features, and its position between held-out images and noise."""

from dataclasses import dataclass

import torch
from torch import Tensor


def moments(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (D,) and unbiased covariance (D, D) of features (n, D), n >= 2, in float64."""
    if features.ndim != 2 or len(features) < 2:
        raise ValueError(f"moments need features (n, D) of at least 2 samples, not {tuple(features.shape)}")
    if broken := (~features.isfinite().all(1)).sum():
        raise ValueError(f"{broken} of {len(features)} samples have features that are not finite")
    features = features.double()
    mean = features.mean(0)
    centred = features - mean
    return mean, centred.mT @ centred / (len(features) - 1)


def frechet_distance(mean_1: Tensor, cov_1: Tensor, mean_2: Tensor, cov_2: Tensor) -> float:
    r"""The squared 2-Wasserstein distance of two normal distributions (Heusel et al., arXiv 1706.08500).

    .. math:: F = |\mu_1 - \mu_2|^2 + \operatorname{tr}(C_1 + C_2 - 2 (C_1^{1/2} C_2 C_1^{1/2})^{1/2})

    Both roots are of symmetric matrices, by their eigenvalues, so that covariances without full rank (fewer samples
    than features) need no correction.

    Args:
        mean_1, mean_2: (D,).
        cov_1, cov_2: (D, D), symmetric and positive semi-definite.
    Raises: ValueError if the sizes differ or a value is not finite.
    """
    mean_1, cov_1, mean_2, cov_2 = parts = [torch.as_tensor(part).double() for part in (mean_1, cov_1, mean_2, cov_2)]
    d = mean_1.numel()
    if [part.shape for part in parts] != [(d,), (d, d)] * 2:
        raise ValueError(f"two means (D,) and covariances (D, D), not {', '.join(str(tuple(p.shape)) for p in parts)}")
    if not all(part.isfinite().all() for part in parts):
        raise ValueError("the Frechet distance needs finite means and covariances; these hold NaN or infinity")
    values, vectors = torch.linalg.eigh(cov_1)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.mT
    cross = torch.linalg.eigvalsh(root @ cov_2 @ root).clamp(min=0).sqrt().sum()
    distance = (mean_1 - mean_2).square().sum() + cov_1.trace() + cov_2.trace() - 2 * cross
    return max(0.0, distance.item())  # rounding may leave -1e-15


@dataclass(frozen=True)
class RelativeFrechet:
    """Frechet distances to the reference, and where the samples stand: 0 is held-out images, 1 is noise."""

    samples: float
    held_out: float
    noise: float

    @property
    def relative(self) -> float:
        return (self.samples - self.held_out) / (self.noise - self.held_out)

    def __str__(self) -> str:
        return (
            f"relative Frechet distance {self.relative:.2%} "
            f"(samples {self.samples:.3f}, held-out images {self.held_out:.3f}, noise {self.noise:.3f})"
        )


def relative_frechet(samples: Tensor, real: Tensor, held_out: Tensor, noise: Tensor) -> RelativeFrechet:
    r"""Where samples stand between real images and noise, whatever the scale of the features.

    .. math:: (F - F_{real}) / (F_{noise} - F_{real})

    F is the Frechet distance to the reference. It depends on the number of samples: take as many held-out images and
    noise images as samples.

    Args:
        samples: features (n, D) of the samples.
        real: features of the reference, such as the training part.
        held_out: features of real images that are not in the reference.
        noise: features of noise.
    """
    reference = moments(real)
    distances = (frechet_distance(*moments(features), *reference) for features in (samples, held_out, noise))
    return RelativeFrechet(*distances)
