"""ddpm/metrics/surfaces.py: errors, correlations and overlaps of maps against numbers that are known."""

import pytest
import torch

from ddpm.metrics.surfaces import correlation, error, overlap, results, solid


@pytest.mark.equation("Depth (error)")
def test_the_error_is_a_mean_of_distances_in_their_unit():
    a = torch.tensor([[[[0.0, 1.0]]], [[[-1.0, 0.5]]]])
    y = torch.tensor([[[[0.5, 1.0]]], [[[1.0, -0.5]]]])
    assert error(y, a, 4.0).tolist() == [4 * 0.25, 4 * 1.5]


@pytest.mark.equation("Depth (correlation)")
def test_the_correlation_is_the_cosine_of_what_is_unusual():
    torch.manual_seed(0)
    a, m = torch.randn(5, 1, 3, 4).double(), torch.randn(1, 3, 4).double()
    assert correlation(m + 3 * (a - m), a, m).tolist() == pytest.approx([1.0] * 5)
    assert correlation(m - (a - m), a, m).tolist() == pytest.approx([-1.0] * 5)
    assert correlation(m.expand(5, -1, -1, -1), a, m).tolist() == [0.0] * 5
    y = torch.randn(5, 1, 3, 4).double()
    cosine = torch.nn.functional.cosine_similarity((y - m).flatten(1), (a - m).flatten(1))
    torch.testing.assert_close(correlation(y, a, m), cosine)


@pytest.mark.equation("Masks (union)")
def test_what_may_be_either_of_two_solids_is_one():
    certain = torch.tensor([1.0, -1.0, -1.0])[None, :, None, None]
    either = torch.tensor([0.0, 0.0, -1.0])[None, :, None, None]  # the mean of 1 and -1, twice
    rather_not = torch.tensor([-0.5, -0.6, -1.0])[None, :, None, None]
    assert [bool(solid(y)) for y in (certain, either, rather_not)] == [True, True, False]


@pytest.mark.equation("Masks (IoU)")
def test_the_overlap_of_rectangles():
    def masks(*columns: tuple[int, int]) -> torch.Tensor:
        y = -torch.ones(1, 2, 5, 10)
        for s, (start, stop) in enumerate(columns):
            y[:, s, :, start:stop] = 1
        return y

    assert overlap(masks((0, 4)), masks((2, 6))).tolist() == pytest.approx([2 / 6])
    assert overlap(masks((0, 2), (2, 4)), masks((0, 4))).tolist() == [1.0]  # whichever solid it is
    assert overlap(masks((0, 2)), masks((5, 6))).tolist() == [0.0] and overlap(masks(), masks()).tolist() == [1.0]


def test_samples_stand_between_the_ceiling_and_the_floor():
    torch.manual_seed(1)
    asked = torch.rand(6, 1, 4, 4) * 2 - 1
    real, drawn = asked + 0.01, asked.repeat(2, 1, 1, 1) + 0.1
    found = results("depth", drawn, real, asked, [i % 6 for i in range(12)], unit=5.5)
    assert found.keys() == {"error", "correlation"}
    e = found["error"]
    assert e.value == pytest.approx(0.55, rel=1e-4) and e.real_vs_real == pytest.approx(0.055, rel=1e-4)
    assert e.more["floor"] == pytest.approx(5.5 * (asked.roll(1, 0) + 0.01 - asked).abs().mean().item(), rel=1e-4)
    assert e.low <= e.value <= e.high and e.more["real_n"] == 6 and e.interval == "samples"
    r = found["correlation"]
    assert r.more["floor"] < 0.3 < 0.9 < r.value < r.real_vs_real <= 1
    masks = torch.where(torch.rand(4, 4, 6, 6) < 0.2, 1.0, -1.0)
    assert results("masks", masks, masks, masks, range(4))["overlap"].value == 1.0
