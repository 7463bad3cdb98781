"""ddpm/metrics/transport.py: against closed forms, quadrature and sums pair by pair; intervals against resampling."""

import itertools
import math

import numpy as np
import pytest
import scipy.integrate
import scipy.stats
import torch
from torch import Tensor

from ddpm.metrics.transport import _coupling, _potential, directions, energy_distance, sliced_wasserstein

LINE = directions(1)
Z = 1.959963984540054  # of a standard normal distribution 95 % lie within


def normal(n: int, d: int, seed: int = 0) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def quantiles(mean: float, std: float, n: int) -> Tensor:
    """Points (n, 1) in the middle of n equal shares of a normal distribution."""
    u = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    return (mean + std * torch.special.ndtri(u))[:, None]


# ------------------------------------------------------------------------------------------------- sliced Wasserstein


@pytest.mark.parametrize(("d", "count"), [(1, 1), (2, 128), (3, 128), (16, 40)])
def test_directions_are_unit_vectors_and_always_the_same(d, count):
    theta = directions(d, count)
    assert theta.shape == (count, d) and torch.equal(theta, directions(d, count))
    assert torch.allclose(theta.norm(dim=1), torch.ones(count, dtype=torch.float64))
    second = theta.T @ theta / count  # uniform on the sphere: I / d
    assert torch.allclose(second, torch.eye(d, dtype=torch.float64) / d, atol=1e-12 if d < 3 else 0.12)


@pytest.mark.equation("SW (distance)")
@pytest.mark.parametrize("d", [1, 2, 5])
def test_translated_points_are_as_far_as_they_were_moved(d):
    x, v, theta = normal(50, d), torch.arange(1.0, d + 1).double(), directions(d)
    found = sliced_wasserstein(x, x + v, theta)
    assert found.value == pytest.approx((theta @ v).square().mean().sqrt().item(), rel=1e-12)
    if d < 3:
        assert found.value == pytest.approx(v.norm().item() / math.sqrt(d), rel=1e-12)


@pytest.mark.equation("SW (distance)")
@pytest.mark.parametrize(("n", "m"), [(20_000, 20_000), (20_000, 7_000)])
def test_of_normal_distributions_it_is_the_difference_of_means_and_deviations(n, m):
    found = sliced_wasserstein(quantiles(0.3, 1.0, n), quantiles(-0.5, 2.0, m), LINE).value
    assert found == pytest.approx(math.hypot(0.8, 1.0), rel=1e-3)


def test_of_normal_distributions_in_the_plane():
    theta, scale = directions(2), torch.tensor([2.0, 0.5], dtype=torch.float64)
    x, y = normal(40_000, 2), normal(40_000, 2, seed=1) * scale + torch.tensor([0.0, 1.0])
    std = (theta * scale).norm(dim=1)
    expected = ((theta[:, 1]).square() + (1 - std).square()).mean().sqrt().item()
    assert sliced_wasserstein(x, y, theta).value == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize(("n", "m"), [(2, 3), (5, 5), (6, 4), (7, 12), (12, 2)])
def test_any_two_numbers_of_points_are_compared_exactly(n, m):
    """As if every point of one set were repeated as often as there are points in the other."""
    x, y = normal(n, 2), normal(m, 2, seed=1) + 0.5
    repeated = [part.repeat_interleave(times, 0) @ LINE_2.T for part, times in ((x, m), (y, n))]
    along_x, along_y = (part.sort(0).values for part in repeated)
    expected = (along_x - along_y).square().mean(0).mean().sqrt().item()
    assert sliced_wasserstein(x, y, LINE_2).value == pytest.approx(expected, rel=1e-12)
    assert sliced_wasserstein(y, x, LINE_2).value == pytest.approx(expected, rel=1e-12)
    assert sliced_wasserstein(x, x.repeat(3, 1), LINE_2).value == 0
    below, above, share = _coupling(n, m)
    assert share.sum().item() == pytest.approx(1) and below.unique().numel() == n and above.unique().numel() == m


LINE_2 = directions(2, 7)


@pytest.mark.equation("SW (standard error)")
@pytest.mark.parametrize(("n", "m"), [(9, 14), (6, 6), (5, 15)])
def test_the_potential_is_how_the_distance_changes_with_a_weight(n, m):
    """Of one more copy of a point among many of each: from both sides where the derivative has a step."""
    x, y = normal(n, 1).sort(0).values, normal(m, 1, seed=1).sort(0).values * 1.5 + 0.4
    h, many = _potential(x[:, 0], y[:, 0]), 4000
    of_all = sliced_wasserstein(x, y, LINE).value ** 2
    for i in range(n):
        counts = torch.full((n,), many)
        slopes = []
        for one in (1, -1):
            counts[i] = many + one
            moved = sliced_wasserstein(x.repeat_interleave(counts, 0), y, LINE).value ** 2
            slopes.append((moved - of_all) * int(counts.sum()) / one)
        assert (h - h.mean())[i].item() == pytest.approx(sum(slopes) / 2, abs=2e-3)


@pytest.mark.equation("SW (standard error)")
def test_the_interval_of_normal_distributions():
    """phi(z) = z^2 - s z^2 - 2 (m - s m_x) z for the map m + s (z - m_x): its variance under the first is known."""
    n, mean, s = 20_000, 0.7, 1.6
    found = sliced_wasserstein(quantiles(0.0, 1.0, n), quantiles(mean, s, n), LINE)
    variance = 2 * (1 - s) ** 2 + 4 * mean**2
    half = Z * math.sqrt(variance / n)
    assert found.high**2 - found.value**2 == pytest.approx(half, rel=0.01)
    assert found.value**2 - found.low**2 == pytest.approx(half, rel=0.01)


def test_the_interval_is_that_of_the_bootstrap():
    x, y, draw = normal(300, 2), normal(500, 2, seed=1) * 1.4 + 0.8, torch.Generator().manual_seed(2)
    found = sliced_wasserstein(x, y, LINE_2)
    again = [
        sliced_wasserstein(x[torch.randint(300, (300,), generator=draw)], y, LINE_2).value ** 2 for _ in range(300)
    ]
    assert found.high**2 - found.value**2 == pytest.approx(Z * np.std(again), rel=0.15)
    near = sliced_wasserstein(x, x + 1e-3 * normal(300, 2, seed=3), LINE_2)
    assert 0 <= near.low <= near.value <= near.high


# ------------------------------------------------------------------------------------------------------ energy distance


def by_pairs(x: Tensor, y: Tensor) -> float:
    def mean(pairs: list[tuple[Tensor, Tensor]]) -> float:
        return sum((a - b).norm().item() for a, b in pairs) / len(pairs)

    within = [mean(list(itertools.permutations(z, 2))) for z in (x, y)]
    return 2 * mean(list(itertools.product(x, y))) - sum(within)


@pytest.mark.equation("Energy (unbiased)")
@pytest.mark.parametrize("d", [1, 2, 5])
def test_energy_distance_pair_by_pair(d):
    x, y = normal(7, d), normal(11, d, seed=1) * 1.5 + 0.3
    assert energy_distance(x, y).value == pytest.approx(by_pairs(x, y), rel=1e-12)
    assert energy_distance(y, x).value == pytest.approx(by_pairs(x, y), rel=1e-12)


def test_its_interval_is_that_of_the_jackknife():
    x, y = normal(6, 2), normal(8, 2, seed=1) + 0.5
    found = energy_distance(x, y)
    without_x = np.array([by_pairs(torch.cat([x[:i], x[i + 1 :]]), y) for i in range(6)])
    without_y = np.array([by_pairs(x, torch.cat([y[:j], y[j + 1 :]])) for j in range(8)])
    half = Z * math.sqrt(5 * without_x.var() + 7 * without_y.var())
    assert (found.low, found.high) == pytest.approx((found.value - half, found.value + half), rel=1e-9)


@pytest.mark.equation("Energy (unbiased)")
@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (0.8, 1.5)], ids=["same", "other"])
def test_of_normal_distributions_it_is_twice_the_squared_difference_of_their_cdfs(mean, std):
    """On the line the distance is 2 int (F - G)^2 dx; of few points, over many draws, its mean is that."""
    first, second = scipy.stats.norm(), scipy.stats.norm(mean, std)
    expected = 2 * scipy.integrate.quad(lambda z: (first.cdf(z) - second.cdf(z)) ** 2, -12, 12)[0]
    found = [
        energy_distance(normal(8, 1, seed=2 * k), normal(13, 1, seed=2 * k + 1) * std + mean).value for k in range(1500)
    ]
    assert np.mean(found) == pytest.approx(expected, abs=4 * np.std(found) / math.sqrt(len(found)))
    exact = energy_distance(quantiles(0.0, 1.0, 1500), quantiles(mean, std, 1500)).value
    assert exact == pytest.approx(expected, abs=4e-3)


def test_in_the_plane_it_is_that_of_all_projections():
    """|x| is pi / 2 times the mean of |theta x| over the circle."""
    x, y, theta = normal(40, 2), normal(60, 2, seed=1) * 1.3 + 0.4, directions(2, 2000)
    along = [energy_distance(x @ line[:, None], y @ line[:, None]).value for line in theta[::20]]
    assert energy_distance(x, y).value == pytest.approx(math.pi / 2 * np.mean(along), rel=1e-3)


@pytest.mark.parametrize("chunk", [1, 4, 1000])
def test_chunks_change_no_energy_distance(chunk):
    x, y = normal(9, 3), normal(13, 3, seed=1)
    assert energy_distance(x, y, chunk) == pytest.approx(energy_distance(x, y), abs=1e-12)


# ------------------------------------------------------------------------------------------------------ what both are


@pytest.mark.parametrize("d", [1, 2, 3])
def test_both_scale_with_the_points_and_do_not_see_their_order_or_place(d):
    x, y, theta = normal(20, d), normal(31, d, seed=1) + 1, directions(d)
    for distance in (energy_distance, lambda a, b: sliced_wasserstein(a, b, theta)):
        found = distance(x, y)
        assert distance(3 * x.flip(0) + 5, 3 * y + 5) == pytest.approx(tuple(3 * end for end in found))
        assert found.low < found.value < found.high


def test_what_cannot_be_compared_is_refused():
    x = normal(5, 2)
    for distance in (energy_distance, lambda a, b: sliced_wasserstein(a, b, LINE_2)):
        with pytest.raises(ValueError, match=r"one size D, not 2 \(x\), 3 \(y\)"):
            distance(x, normal(5, 3))
        with pytest.raises(ValueError, match="1 of 5 samples have features that are not finite"):
            distance(x, torch.where(torch.arange(5)[:, None] == 2, torch.nan, x))
        with pytest.raises(ValueError, match="of at least"):
            distance(x[:1], x)
    with pytest.raises(ValueError, match="of at least 3 samples"):
        energy_distance(x[:2], x)
    for wrong in (directions(3), LINE_2[0], LINE_2[:0]):
        with pytest.raises(ValueError, match=r"directions must be \(P, 2\)"):
            sliced_wasserstein(x, x, wrong)
