"""models/classifier.py: shapes for every size, and gradients everywhere."""

import pytest
import torch

from models.classifier import Classifier


@pytest.mark.parametrize("size", [8, 28, (8, 20), (33, 17), 64, 1])
@pytest.mark.parametrize("in_channels", [1, 3])
def test_shapes(size, in_channels):
    height, width = (size, size) if isinstance(size, int) else size
    classifier = Classifier(size, in_channels, num_classes=7, channels=8, features=11)
    x = torch.randn(5, in_channels, height, width)
    assert classifier(x).shape == (5, 7) and classifier.features(x).shape == (5, 11)


@pytest.mark.parametrize(("size", "side"), [(8, 4), (28, 4), (32, 4), (33, 3), (64, 4)])
def test_the_last_level_has_at_most_four_pixels(size, side):
    assert Classifier(size, channels=8).body(torch.zeros(1, 1, size, size)).shape[2:] == (side, side)


def test_gradients_reach_every_parameter():
    torch.manual_seed(0)
    classifier = Classifier((8, 12), channels=8)
    classifier(torch.randn(16, 1, 8, 12)).square().sum().backward()
    assert [name for name, p in classifier.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0] == []


def test_logits_are_the_last_layer_of_the_features_and_in_evaluation_images_do_not_interact():
    torch.manual_seed(0)
    classifier = Classifier(8, channels=8, dropout=0.5)
    x = torch.randn(6, 1, 8, 8)
    assert not torch.equal(classifier(x), classifier(x))  # dropout
    classifier.eval()
    features = classifier.features(x)
    assert (features >= 0).all() and (features > 0).any()
    torch.testing.assert_close(classifier(x), features @ classifier.classify[1].weight.mT + classifier.classify[1].bias)
    torch.testing.assert_close(classifier(x[2:3]), classifier(x)[2:3])


def test_wrong_sizes_are_named():
    with pytest.raises(ValueError, match=r"\(1, 8, 8\), not \(1, 8, 9\)"):
        Classifier(8)(torch.zeros(2, 1, 8, 9))
    with pytest.raises(ValueError, match="at least 1"):
        Classifier(8, channels=0)
