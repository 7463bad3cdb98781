"""ddpm/metrics/variety.py: distances within classes by hand, and as a measure of samples."""

import math

import pytest
import torch

from ddpm.metrics import quality
from ddpm.metrics.features import Judge, Pixels
from ddpm.metrics.variety import variety_within


@pytest.mark.equation("Variety (within a class)")
def test_distances_of_pairs_within_a_class_alone_count():
    features = torch.tensor([[0.0, 0], [3, 4], [100, 100], [0, 0], [101, 100], [-5, -5]])
    found = variety_within(features, torch.tensor([0, 0, 1, 0, 1, 3]), 4)
    assert found == [pytest.approx((5 + 0 + 5) / 3), pytest.approx(1.0), None, None]


class Quadrants(Judge):
    """Names points of the plane by the sign of their first coordinate."""

    name, size = "quadrants", 2

    def __init__(self) -> None:
        pass

    def probabilities(self, features: torch.Tensor) -> torch.Tensor:
        left = (features[:, :1] < 0).double()
        return torch.cat([left, 1 - left], dim=1)


class Of:
    """What a measure looks at of real images."""

    features = Quadrants()
    held_out = torch.tensor([[-1.0, 0], [-1, 4], [1, 0], [1, 2]])


def test_the_measure_stands_beside_that_of_held_out_images():
    x = torch.tensor([[-1.0, 0], [-1, 1], [2, 0], [2, 1]])
    found = quality.variety(quality.Samples(x, x, None), Of())["variety"]
    assert found.value == 1 and found.real_vs_real == 3 and found.more["relative"] == pytest.approx((1 / 4 + 1 / 2) / 2)
    assert found.more["of_classes"] == [1, 1] and "37.5% of it" in found.words
    collapsed = quality.variety(quality.Samples(x, x[[0, 0, 1]], None), Of())["variety"]  # one class is never drawn
    assert collapsed.real_vs_real == 3 and collapsed.more["of_classes"][1] is None
    assert math.isclose(collapsed.value, 2 / 3) and math.isclose(collapsed.more["relative"], 1 / 6)


def test_what_names_no_classes_and_too_few_samples_are_refused():
    x = torch.zeros(2, 2)
    real = Of()
    with pytest.raises(ValueError, match="are of one class"):
        quality.variety(quality.Samples(x, torch.tensor([[-1.0, 0], [1, 0]]), None), real)
    real.features = Pixels((1, 1, 2))
    with pytest.raises(ValueError, match="features=classifier"):
        quality.variety(quality.Samples(x, x, None), real)
