"""Measures of features: closed forms, brute force, independent implementations, and data whose answer is known."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from sklearn.neighbors import NearestNeighbors
from torch import Tensor

from ddpm.metrics.checks import finite_features
from ddpm.metrics.frechet import finite_sample_bias, frechet_distance, moments
from ddpm.metrics.kernel import KernelDistance, kernel_distance
from ddpm.metrics.memorisation import memorisation
from ddpm.metrics.neighbours import density_coverage, nearest, precision_recall


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# --- kernel distance


def by_loops(x: Tensor, y: Tensor) -> float:
    """The estimator, pair by pair."""

    def mean(a: np.ndarray, b: np.ndarray, same: bool) -> float:
        pairs = [(i, j) for i in range(len(a)) for j in range(len(b)) if not (same and i == j)]
        return sum((float(np.dot(a[i], b[j])) / a.shape[1] + 1) ** 3 for i, j in pairs) / len(pairs)

    a, b = x.double().numpy(), y.double().numpy()
    return mean(a, a, True) + mean(b, b, True) - 2 * mean(a, b, False)


@pytest.mark.equation("KID (unbiased)")
def test_kernel_distance_pair_by_pair():
    x, y = normal(9, 4), normal(13, 4, seed=1) * 1.5 + 0.3
    assert kernel_distance(x, y).value == pytest.approx(by_loops(x, y), rel=1e-12)
    assert kernel_distance(y, x).value == pytest.approx(by_loops(x, y), rel=1e-12)


def test_the_interval_is_that_of_the_jackknife():
    x, y = normal(7, 3), normal(10, 3, seed=1) + 0.5
    found = kernel_distance(x, y)
    without_x = np.array([by_loops(torch.cat([x[:i], x[i + 1 :]]), y) for i in range(7)])
    without_y = np.array([by_loops(x, torch.cat([y[:j], y[j + 1 :]])) for j in range(10)])
    half = 1.959963984540054 * math.sqrt(6 * without_x.var() + 9 * without_y.var())
    assert (found.low, found.high) == pytest.approx((found.value - half, found.value + half), rel=1e-9)


@pytest.mark.parametrize("chunk", [1, 4, 1000])
def test_chunks_change_no_kernel_distance(chunk):
    x, y = normal(9, 4), normal(13, 4, seed=1)
    one, other = kernel_distance(x, y, chunk=chunk), kernel_distance(x, y)
    assert (one.value, one.low, one.high) == pytest.approx((other.value, other.low, other.high), abs=1e-12)


def expected(first: Callable[[int], float], second: Callable[[int], float]) -> float:
    """The kernel distance of two distributions in one dimension, from their raw moments."""
    return sum(math.comb(3, j) * (first(j) - second(j)) ** 2 for j in range(4))


def gaussian(mean: float, std: float) -> Callable[[int], float]:
    return lambda j: (1.0, mean, mean**2 + std**2, mean**3 + 3 * mean * std**2)[j]


def uniform(low: float, high: float) -> Callable[[int], float]:
    return lambda j: (high ** (j + 1) - low ** (j + 1)) / ((j + 1) * (high - low))


@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (0.5, 1.2)], ids=["same", "other"])
def test_kernel_distance_has_no_bias(mean, std):
    """Over many draws of few samples, against the closed form of two normal distributions."""
    draws = normal(1500, 30, 1)
    values = torch.tensor([kernel_distance(mean + std * d[:12], d[12:]).value for d in draws])
    truth = expected(gaussian(mean, std), gaussian(0, 1))
    assert (truth == 0) == (mean == 0)
    assert abs(values.mean().item() - truth) < 4 * values.std().item() / math.sqrt(len(values))


def test_kernel_distance_tends_to_the_closed_form():
    found = kernel_distance(0.5 + 0.8 * normal(4000, 1), normal(3000, 1, seed=1))
    assert found.low < expected(gaussian(0.5, 0.8), gaussian(0, 1)) < found.high < 2 * found.value


def test_the_interval_holds_the_truth_in_about_95_of_100_draws():
    draws = torch.rand(300, 120, 1, generator=torch.Generator().manual_seed(0))
    truth = expected(uniform(0.5, 1.5), uniform(0, 1))
    intervals = [kernel_distance(0.5 + d[:60], d[60:]) for d in draws]
    assert 0.90 < sum(found.low <= truth <= found.high for found in intervals) / 300 < 0.99


def test_kernel_distance_reads_well():
    assert str(KernelDistance(0.01234567, 0.01, 0.015)) == "kernel distance 0.01235 (95%: 0.01 to 0.015)"


# --- neighbours


def clouds() -> tuple[Tensor, Tensor]:
    """Samples (70, 3) and real features (90, 3) that overlap in part."""
    return normal(70, 3) * 1.3 + 0.6, normal(90, 3, seed=1)


def by_scikit_learn(samples: Tensor, real: Tensor, k: int) -> tuple[float, float, float, float]:
    y, x = samples.double().numpy(), real.double().numpy()
    r_x, r_y = (NearestNeighbors(n_neighbors=k).fit(z).kneighbors()[0][:, -1] for z in (x, y))  # without itself
    hits = [np.linalg.norm(y - x[i], axis=1) <= r_x[i] for i in range(len(x))]
    hits_of_y = [np.linalg.norm(x - y[j], axis=1) <= r_y[j] for j in range(len(y))]
    precision, recall = np.any(hits, axis=0).mean(), np.any(hits_of_y, axis=0).mean()
    return precision, recall, np.sum(hits) / (k * len(y)), np.any(hits, axis=1).mean()


@pytest.mark.equation("Kynkaanniemi (precision, recall)")
@pytest.mark.equation("Naeem (density, coverage)")
@pytest.mark.parametrize("k", [1, 3, 5])
def test_neighbours_against_scikit_learn(k):
    samples, real = clouds()
    found = *precision_recall(samples, real, k), *density_coverage(samples, real, k)
    assert found == pytest.approx(by_scikit_learn(samples, real, k), abs=1e-12)
    assert min(found) > 0.1 and max(found[0], found[3]) < 0.99  # neither none nor all


def test_the_same_set_and_a_far_one():
    _, real = clouds()
    assert precision_recall(real, real) == (1, 1)
    assert density_coverage(real, real) == pytest.approx((1, 1))
    assert precision_recall(real + 100, real) == density_coverage(real + 100, real) == (0, 0)


def test_balls_on_a_line():
    """Real images at 0, 1, 3, 7: with k = 1, radii 1, 1, 2, 4. Samples at 3.5, 10, 11, 30."""
    real, samples = torch.tensor([[0.0], [1], [3], [7]]), torch.tensor([[3.5], [10], [11], [30]])
    # samples' radii are 6.5, 1, 1, 19: 30 - 19 = 11 reaches no real image; 3.5 reaches all of them
    assert precision_recall(samples, real, k=1) == (0.75, 1)  # 11 lies on the rim of the last ball, which belongs to it
    assert density_coverage(samples, real, k=1) == (0.75, 0.5)  # 3.5 in two balls, 10 in one; 11 on the rim in none


def test_a_lost_mode_lowers_recall_and_coverage_and_stray_samples_precision_and_density():
    modes = torch.tensor([[0.0, 0], [20, 0], [0, 20], [20, 20]])
    real, samples = (normal(4, 100, 2, seed=s) + modes[:, None] for s in (0, 1))
    everything, lost = samples.flatten(0, 1), samples[:2].flatten(0, 1)
    stray = torch.cat([everything, normal(400, 2, seed=2) + 300])
    real = real.flatten(0, 1)
    precision, recall = precision_recall(everything, real)
    density, coverage = density_coverage(everything, real)
    assert min(precision, recall, coverage) > 0.9 and density == pytest.approx(1, abs=0.1)
    less_recall, less_coverage = precision_recall(lost, real)[1], density_coverage(lost, real)[1]
    assert less_recall == pytest.approx(0.5, abs=0.03) and less_coverage == pytest.approx(0.5, abs=0.05)
    assert precision_recall(lost, real)[0] > 0.9
    assert precision_recall(stray, real)[0] == pytest.approx(precision / 2)
    assert density_coverage(stray, real) == pytest.approx((density / 2, coverage))


@pytest.mark.parametrize("chunk", [1, 16, 1000])
def test_chunks_change_nothing_about_neighbours(chunk):
    samples, real = clouds()
    assert precision_recall(samples, real, chunk=chunk) == precision_recall(samples, real)
    assert density_coverage(samples, real, chunk=chunk) == density_coverage(samples, real)
    for one, other in zip(nearest(samples, real, chunk), nearest(samples, real), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("offset", [0.0, 1e6])
def test_nearest(offset):
    x, reference = normal(40, 5).double() + offset, normal(60, 5, seed=1).double() + offset
    x[3] = reference[17]
    distance, index = nearest(x, reference)
    all_of_them = (x[:, None] - reference).square().sum(2).sqrt()
    assert torch.equal(index, all_of_them.argmin(1)) and index[3] == 17 and distance[3] == 0
    torch.testing.assert_close(distance, all_of_them.amin(1))


# --- memorisation


def test_fresh_images_are_no_copies():
    train, held_out, fresh = normal(500, 3), normal(1999, 3, seed=1), normal(10_000, 3, seed=2)
    found = memorisation(fresh, train, held_out)
    assert found.ratio == pytest.approx(1, abs=0.05) and found.share_closer == pytest.approx(0.01, abs=0.005)
    assert found.relative.median().item() == pytest.approx(1, abs=0.05)
    assert found.index.shape == found.distance.shape == found.relative.shape == (10_000,)


def test_copies_are_found_with_their_originals():
    train, held_out = normal(500, 3), normal(300, 3, seed=1)
    copied = torch.randperm(500, generator=torch.Generator().manual_seed(0))[:50]
    found = memorisation(train[copied], train, held_out)
    assert (found.ratio, found.share_closer) == (0, 1) and torch.equal(found.index, copied)
    half = memorisation(torch.cat([train[copied], held_out[:50]]), train, held_out)
    assert half.share_closer == pytest.approx(0.5, abs=0.03) and (half.relative == 0).sum() == 50
    lines = str(half).splitlines()
    assert len(lines) == 3 and f"{half.ratio:.3f} times" in lines[0] and f"{half.share_closer:.2%}" in lines[1]
    assert "0.000 times" in lines[2]


@pytest.mark.parametrize("m", [99, 149, 199])
def test_one_percent_of_fresh_images_is_close_for_any_number_of_held_out_ones(m):
    """In the mean over many draws: a plain quantile of few distances would count up to twice as many."""
    train = torch.zeros(2, 1)
    shares = [
        memorisation(draw[:400], train, draw[400:]).share_closer for draw in normal(300, 400 + m, 1, seed=m).unbind()
    ]
    assert np.mean(shares) == pytest.approx(0.01, abs=4 * np.std(shares) / math.sqrt(len(shares)))


def test_held_out_rows_that_were_trained_on_are_no_yardstick():
    train = normal(20, 3)
    with pytest.raises(ValueError, match="6 of 10 held-out rows equal a training row"):
        memorisation(normal(5, 3, seed=1), train, torch.cat([train[:6], normal(4, 3, seed=2)]))


# --- bias of the Frechet distance


def test_the_bias_falls_with_the_number_of_images():
    """Of n normal features: the mean alone adds D / n."""
    features, reference = normal(3000, 8), normal(20_000, 8, seed=1)
    curve = finite_sample_bias(features, reference, [50, 200, 800, 3000])
    values = [value for _, value in curve]
    assert [n for n, _ in curve] == [50, 200, 800, 3000] and values == sorted(values, reverse=True)
    assert values[0] > 8 / 50 and values[-1] < 0.02
    assert curve == finite_sample_bias(features, reference, [50, 200, 800, 3000])
    assert curve[1:2] == finite_sample_bias(features, reference, [200])  # whatever the other sizes
    assert finite_sample_bias(features, reference, [50], seed=1) != curve[:1]


def test_the_bias_is_the_mean_over_disjoint_subsets():
    features, reference = normal(100, 3), normal(500, 3, seed=1)
    whole = frechet_distance(*moments(features), *moments(reference))
    assert finite_sample_bias(features, reference, [100]) == [(100, pytest.approx(whole))]
    parts = 1000.0 * torch.eye(2).repeat_interleave(10, 0) + normal(20, 2)  # two heaps: halves that share rows differ
    ((_, halves),) = finite_sample_bias(parts, parts, [10])
    ((_, one),) = finite_sample_bias(parts, parts, [10], subsets=1)
    assert halves != one


def test_fewer_images_than_features_only_where_asked_for():
    features, reference = normal(40, 8), normal(100, 8, seed=1)
    few = "8 samples are too few for the covariance of 8 features: at least 9"
    with pytest.raises(ValueError, match=few):
        moments(features[:8])
    with pytest.raises(ValueError, match=few):
        finite_sample_bias(features, reference, [20, 8])
    with pytest.raises(ValueError, match=few):
        finite_sample_bias(features, reference[:8], [20])
    assert moments(features[:9])[1].shape == moments(features[:8], singular=True)[1].shape == (8, 8)
    (_, large), (_, small) = finite_sample_bias(features, reference, [4, 20], singular=True)
    assert large > small


@pytest.mark.parametrize("size", [0, 1, 41])
def test_subsets_that_there_are_none_of(size):
    with pytest.raises(ValueError, match=rf"size {size}: subsets of 40 images have sizes in 2\.\.40"):
        finite_sample_bias(normal(40, 3), normal(50, 3), [20, size])


# --- what no measure takes


def broken(bad: int, n: int = 12) -> Tensor:
    features = normal(n, 3)
    features[:bad, 1] = torch.nan
    features[0, 2] = torch.inf
    return features


GOOD = normal(12, 3)
MEASURES = {
    "kernel_distance": (kernel_distance, 3),
    "precision_recall": (precision_recall, 4),
    "density_coverage": (density_coverage, 6),
    "nearest": (nearest, 1),
    "memorisation": (lambda samples, real: memorisation(samples, real, GOOD), 2),
    "finite_sample_bias": (lambda features, reference: finite_sample_bias(features, reference, [6]), 2),
}


@pytest.mark.parametrize("name", MEASURES)
@pytest.mark.parametrize("place", [0, 1])
def test_features_that_cannot_be_measured(name, place):
    measure, least = MEASURES[name]

    def told(features: Tensor, words: str) -> None:
        with pytest.raises(ValueError, match=words):
            measure(*((features, GOOD) if place == 0 else (GOOD, features)))

    told(normal(12, 3, 2), rf"must be \(n, D\) of at least {least} samples, not \(12, 3, 2\)")
    told(normal(12), r"not \(12,\)")
    told(normal(least - 1, 3), rf"at least {least} samples, not \({least - 1}, 3\)")
    told(normal(12, 0), r"not \(12, 0\)")
    told(broken(3), "3 of 12 samples have features that are not finite")
    told(normal(12, 4), r"one size D, not (3 \(\w+\), 4|4 \(\w+\), 3) \(\w+\)")


def test_the_third_set_of_memorisation_is_checked_too():
    with pytest.raises(ValueError, match="held_out: 2 of 12"):
        memorisation(GOOD, GOOD, broken(2))


@pytest.mark.parametrize("measure", [precision_recall, density_coverage])
def test_neighbours_are_counted_from_one(measure):
    with pytest.raises(ValueError, match=r"k = 0: .*k >= 1"):
        measure(GOOD, GOOD, k=0)


def test_features_are_measured_in_float64_and_without_gradients():
    whole = torch.arange(6).reshape(3, 2)
    (same,) = finite_features(features=whole)
    assert same.dtype == torch.float64 and torch.equal(same, whole.double())
    grad = normal(12, 3).requires_grad_()
    assert kernel_distance(grad, GOOD).value == kernel_distance(grad.detach(), GOOD).value
    assert not memorisation(grad, normal(9, 3, seed=1), GOOD).distance.requires_grad
