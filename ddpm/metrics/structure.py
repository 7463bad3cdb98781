"""Class structure of an autoencoder's posterior means: neighbour purity, silhouettes, and projections to the plane."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE
from sklearn.metrics import silhouette_samples
from torch import Tensor
from torch.nn import functional as F

from ddpm.data.dataset import Dataset
from ddpm.metrics.checks import finite_features
from ddpm.metrics.codings import held_out
from ddpm.metrics.denoising import chosen, interval
from ddpm.metrics.neighbours import distances
from ddpm.sources.decoded import Decoded

NEIGHBOURS = 10
PERPLEXITY = 30.0  # of t-SNE, or a third of the points if those are fewer
Named = dict[str, tuple[str, dict[str, Any]]]  # protocol -> summary, record


class Means(NamedTuple):
    """Posterior means of held-out data."""

    z: Tensor  # (n, codings)
    y: Tensor  # (n,), the classes
    x: Tensor  # (n, *shape), the encoded data


def purity(features: Tensor, y: Tensor, k: int = NEIGHBOURS, chunk: int = 256) -> Tensor:
    r"""Return the share of the k nearest neighbours of each row that are of its class, itself not counted.

    .. math:: P_i = \frac1k \sum_{j \in N_k(i)} 1[y_j = y_i] \qquad \text{[Purity (neighbours)]}

    Rows at the same distance of which not all fit among the k count in equal parts, so that the order of the rows does
    not matter.

    Args:
        features: (n, D); y: the class of each, integers (n,).
        k: number of neighbours.
        chunk: rows whose distances are in memory at a time; does not change the result.
    Returns: (n,), float64, in 0..1.
    Raises: ValueError for features that are not finite, k < 1, or fewer than k + 1 rows.
    """
    if k < 1:
        raise ValueError(f"k = {k} neighbours: k is at least 1")
    (rows,) = finite_features(features=features, least=k + 1)
    y, shares, start = y.to(rows.device), list[Tensor](), 0
    for d in distances(rows, rows, chunk):
        i = torch.arange(len(d), device=d.device)
        d[i, start + i] = torch.inf  # itself
        of_class = y[start + i, None] == y
        farthest = d.kthvalue(k, dim=1, keepdim=True).values
        nearer, equal = d < farthest, d == farthest
        part = (k - nearer.sum(1)).double() / equal.sum(1)
        shares.append(((nearer & of_class).sum(1) + part * (equal & of_class).sum(1)) / k)
        start += len(d)
    return torch.cat(shares)


def chance(y: Tensor) -> float:
    r"""Return the purity where neighbours are independent of the classes y (n,): the sum of squared class shares.

    .. math:: \sum_k (n_k / n)^2 \qquad \text{[Purity (chance)]}
    """
    shares = y.bincount().double() / len(y)
    return shares.square().sum().item()


def silhouettes(features: Tensor, y: Tensor) -> Tensor:
    r"""Return the silhouette of each row: how much nearer it is to its own class than to the nearest other, in [-1, 1].

    .. math:: s_i = \frac{b_i - a_i}{\max(a_i, b_i)} \qquad \text{[Silhouette (of a point)]}

    with a_i the mean distance to the other rows of its class, b_i the least mean distance to the rows of another class;
    0 for a row that is alone in its class. By scikit-learn.

    Args:
        features: (n, D); y: the class of each, integers (n,).
    Returns: (n,), float64.
    Raises: ValueError for one class, or as many as there are rows.
    Source: Rousseeuw 1987, "Silhouettes: a graphical aid to the interpretation and validation of cluster analysis".
    """
    classes = len(y.unique())
    if not 2 <= classes < len(y):
        raise ValueError(
            f"{len(y)} samples of {classes} classes: a silhouette needs 2 classes, and more samples than classes"
        )
    return torch.from_numpy(silhouette_samples(features.cpu().double().numpy(), y.cpu().numpy())).double()


def must_have_structure(data: Dataset, n: int) -> None:
    """Raise ValueError unless the n held-out samples have labels and enough samples and classes."""
    if data.labels is None:
        raise ValueError(f"{data.name} has no labels, and this measure compares classes")
    if n <= NEIGHBOURS:
        raise ValueError(f"n = {n} samples have no {NEIGHBOURS} neighbours each: n is at least {NEIGHBOURS + 1}")
    classes = len(data.labels.cpu()[chosen(data, n).cpu()].unique())
    if not 2 <= classes < n:
        raise ValueError(
            f"{n} held-out {data.units} of {classes} classes: 2 classes, and fewer than {data.units}, are needed"
        )


@torch.no_grad()
def posterior_means(
    source: Decoded, data: Dataset, n: int, batch: int, callback: Callable[[int], None] | None = None
) -> Means:
    """Return the posterior means of n held-out samples, evenly spaced, with their classes."""
    z, x = list[Tensor](), list[Tensor]()
    for _, inputs, condition in held_out(source, data, n, batch):
        z.append(source.model.encode(inputs, condition)[0].cpu())
        x.append(inputs.cpu())
        if callback:
            callback(len(inputs))
    assert data.labels is not None  # see `must_have_structure`
    return Means(torch.cat(z), data.labels.cpu()[chosen(data, n).cpu()], torch.cat(x))


def measure_structure(means: Means, units: str, codings: int) -> Named:
    """Return purity and silhouette of posterior means by protocol, each with its 95 % interval over the samples.

    Args:
        units: name of the samples in messages.
        codings: the number of codings, for the record.
    Raises: ValueError as `purity` and `silhouettes` do.
    """
    n, level, found = len(means.y), chance(means.y), Named()
    for name, of_each, reference in (
        (f"latent_purity-k{NEIGHBOURS}", purity(means.z, means.y), {"chance": level}),
        ("latent_silhouette", silhouettes(means.z, means.y), {}),
    ):
        of_classes = [of_each[means.y == k].mean().item() for k in means.y.unique().tolist()]
        values = interval(of_each, units, "a place among others")
        values |= reference | {"of_classes": of_classes, "classes": means.y.unique().tolist(), "codings": codings}
        words = f"{values['value']:.3f} (95% over {units}: {values['low']:.3f} to {values['high']:.3f})"
        if reference:
            words = f"{words} of the {NEIGHBOURS} nearest neighbours are of the same class; by chance {level:.3f}"
        else:
            words = f"mean silhouette by class {words}, from -1 to 1"
        found[f"{name}_{n}_held_out"] = (words, values)
    return found


def in_plane(features: Tensor, seed: int = 0) -> dict[str, Tensor]:
    """Project features (n, D) to the plane (n, 2): by their two largest principal components, and by t-SNE.

    One-dimensional features lie on a line in the first.

    Source: t-SNE, van der Maaten & Hinton 2008.
    """
    rows = F.pad(features, (0, max(0, 2 - features.shape[1]))).cpu().double().numpy()
    perplexity = min(PERPLEXITY, (len(rows) - 1) / 3)
    flat = PCA(2, svd_solver="full").fit_transform(rows)
    bent = TSNE(2, perplexity=perplexity, init="pca", random_state=seed).fit_transform(rows)
    return {"pca": torch.from_numpy(flat).double(), "tsne": torch.from_numpy(bent).double()}
