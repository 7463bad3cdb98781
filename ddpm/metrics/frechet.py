"""Frechet distance between two sets of features, its standard error, and its finite-sample bias."""

import torch
from torch import Tensor

from ddpm.metrics.checks import finite_features
from ddpm.randomness import generator


def moments(features: Tensor, singular: bool = False) -> tuple[Tensor, Tensor]:
    """Return mean (D,) and unbiased covariance (D, D) of features (n, D), in float64.

    Args:
        features: (n, D), n > D.
        singular: whether to accept 2 <= n <= D: the covariance is then rank deficient, and Frechet distances are far
            too large (see `finite_sample_bias`).
    Raises: ValueError for too few samples, another shape, or features that are not finite.
    """
    (features,) = finite_features(features=features)
    n, d = features.shape
    if n <= d and not singular:
        raise ValueError(f"{n} samples are too few for the covariance of {d} features: at least {d + 1}")
    mean = features.mean(0)
    centred = features - mean
    return mean, centred.mT @ centred / (n - 1)


def frechet_distance(mean_1: Tensor, cov_1: Tensor, mean_2: Tensor, cov_2: Tensor) -> float:
    r"""Return the squared 2-Wasserstein distance of two normal distributions (Heusel et al., arXiv 1706.08500).

    .. math:: F = |\mu_1 - \mu_2|^2 + \operatorname{tr}(C_1 + C_2 - 2 (C_1^{1/2} C_2 C_1^{1/2})^{1/2})
        \qquad \text{[FID (distance)]}

    Both roots are of symmetric matrices, by their eigenvalues, so that rank-deficient covariances (fewer samples than
    features) need no correction.

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
    root = _root(cov_1)
    cross = torch.linalg.eigvalsh(root @ cov_2 @ root).clamp(min=0).sqrt().sum()
    distance = (mean_1 - mean_2).square().sum() + cov_1.trace() + cov_2.trace() - 2 * cross
    return max(0.0, distance.item())  # rounding may leave -1e-15


def frechet_error(features: Tensor, mean_2: Tensor, cov_2: Tensor) -> float:
    r"""Return the standard error of the Frechet distance over the choice of samples, by the infinitesimal jackknife.

    .. math::
        \hat\sigma^2 = \frac{1}{n^2} \sum_i \left(h_i - \bar h\right)^2, \qquad
        h_i = 2 (\mu_1 - \mu_2)^T d_i + d_i^T (I - M) d_i, \qquad d_i = x_i - \mu_1, \qquad
        M = C_2^{1/2} (C_2^{1/2} C_1 C_2^{1/2})^{-1/2} C_2^{1/2} \qquad \text{[FID (standard error)]}

    h is how F changes as weight moves to a sample, and M transports N(mu_1, C_1) to N(mu_2, C_2). The bootstrap gives
    the same error, at the cost of hundreds of distances. The bias of F by the number of samples is in neither; where
    both sets are from one distribution, h vanishes and the error is too small.

    Args:
        features: (n, D) of the samples, n > D.
        mean_2, cov_2: (D,) and (D, D) of the other set, taken as exact.
    Raises: ValueError for features that `moments` refuses.
    Source: Efron 1982, The Jackknife, the Bootstrap and Other Resampling Plans, on the infinitesimal jackknife.
    """
    mean_1, cov_1 = moments(features)
    mean_2, root_2 = mean_2.to(mean_1), _root(cov_2.to(cov_1))
    values, vectors = torch.linalg.eigh(root_2 @ cov_1 @ root_2)
    known = values > values.max() * len(values) * torch.finfo(values.dtype).eps
    inverse_root = vectors[:, known] * values[known].rsqrt() @ vectors[:, known].mT
    M = root_2 @ inverse_root @ root_2
    d = features.to(mean_1) - mean_1
    h = 2 * d @ (mean_1 - mean_2) + (d * (d - d @ M)).sum(1)  # (n,); M is symmetric
    return (h.var(correction=0) / len(h)).sqrt().item()


def _root(cov: Tensor) -> Tensor:
    """Return the symmetric square root of a covariance (D, D)."""
    values, vectors = torch.linalg.eigh(cov)
    return vectors * values.clamp(min=0).sqrt() @ vectors.mT


def finite_sample_bias(
    features: Tensor, reference: Tensor, sizes: list[int], seed: int = 0, subsets: int = 5, singular: bool = False
) -> list[tuple[int, float]]:
    """Return the Frechet distance of n real images to the reference, for several n: the bias due to n alone.

    Args:
        features: (N, D) of real images that are not in the reference.
        reference: (M, D) of the reference, such as the training part.
        sizes: numbers n of images, each in 2..N.
        seed: of the subsets.
        subsets: disjoint random subsets of each size; fewer where N does not suffice.
        singular: whether to accept fewer images than features, as in `moments`.

    Returns: (n, mean distance over the subsets of that size), in the order of the sizes.
    Raises: ValueError for a size outside 2..N, or features that `moments` refuses.
    Source: Chong and Forsyth 2020, arXiv 1911.07023, on the bias.
    """
    features, reference = finite_features(features=features, reference=reference)
    if wrong := [n for n in sizes if not 2 <= n <= len(features)]:
        raise ValueError(f"size {wrong[0]}: subsets of {len(features)} images have sizes in 2..{len(features)}")
    of_reference, curve = moments(reference, singular), []
    for n in sizes:
        order = torch.randperm(len(features), generator=generator(seed, "subsets", n)).to(features.device)
        chosen = [part for part in order.split(n) if len(part) == n][:subsets]
        distances = [frechet_distance(*moments(features[part], singular), *of_reference) for part in chosen]
        curve.append((n, sum(distances) / len(distances)))
    return curve
