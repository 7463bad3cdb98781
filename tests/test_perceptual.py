"""ddpm/latent/perceptual.py and models/lpips.py: the distance by hand, the features layer by layer, files."""

import math
from collections import OrderedDict

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from ddpm.latent.perceptual import Perceptual
from ddpm.latent.reconstruction import Reconstruction, squared
from models.classifier import Classifier
from models.lpips import LPIPSNetwork, load_lpips


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Slices(nn.Module):
    """Two maps: x itself, and its sums over pairs of columns in three channels."""

    map_channels = (2, 3)

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Parameter(drawn(3, 2, seed=7))

    def maps(self, x: Tensor) -> list[Tensor]:
        return [x, torch.einsum("oc,bchw->bohw", self.mix, x.unflatten(3, (-1, 2)).sum(4))]


# ---------------------------------------------------------------------------------------------------- the distance


@pytest.mark.equation("LPIPS (1)")
def test_the_distance_by_loops_over_places():
    network, weights = Slices(), [drawn(2).abs(), drawn(3, seed=1).abs()]
    distance, picture, x = Perceptual(network, weights), drawn(2, 2, 2, 4, seed=2), drawn(2, 2, 2, 4, seed=3)
    for row, got in enumerate(distance(picture, x)):
        by_hand = 0.0
        for a, b, w in zip(network.maps(picture), network.maps(x), weights, strict=True):
            _, _, height, width = a.shape
            for i in range(height):
                for j in range(width):
                    one, other = a[row, :, i, j], b[row, :, i, j]
                    e = w.sqrt() * (one / one.norm() - other / other.norm())
                    by_hand += e.square().sum().item() / (height * width)
        assert got.item() == pytest.approx(by_hand, rel=1e-9)


@pytest.mark.equation("LPIPS (1)")
def test_without_weights_it_is_of_the_angle_alone():
    angle = 0.3
    x = torch.tensor([1.0, 0.0], dtype=torch.float64)[None, :, None, None].expand(1, 2, 3, 4)
    picture = 5 * torch.tensor([math.cos(angle), math.sin(angle)], dtype=torch.float64)[None, :, None, None]

    class Same(nn.Module):
        map_channels = (2,)

        def maps(self, x: Tensor) -> list[Tensor]:
            return [x]

    expected = torch.tensor([2 * (1 - math.cos(angle))], dtype=torch.float64)
    torch.testing.assert_close(Perceptual(Same())(picture.expand(1, 2, 3, 4), x), expected)


def networks() -> list[nn.Module]:
    torch.manual_seed(0)
    return [Classifier((32, 36), 1, channels=4).double(), LPIPSNetwork("alex").double()]


@pytest.mark.parametrize("network", networks(), ids=["classifier", "alex"])
def test_equal_pictures_are_equal_rows_are_apart_and_the_gradient_goes_to_the_first(network):
    distance, picture, x = Perceptual(network), drawn(3, 1, 32, 36).tanh(), drawn(3, 1, 32, 36, seed=1).tanh()
    assert distance(x, x).tolist() == [0, 0, 0]
    picture, x = picture.requires_grad_(), x.requires_grad_()
    whole = distance(picture, x)
    assert whole.shape == (3,) and (whole > 0).all()
    torch.testing.assert_close(distance(picture[1:2], x[1:2]), whole[1:2])
    whole[0].backward()
    assert x.grad is None and picture.grad[0].abs().sum() > 0 and not picture.grad[1:].any()
    assert all(p.grad is None for p in network.parameters())


def test_it_is_frozen_and_stays_in_evaluation_mode():
    network = Classifier(8, channels=4).train()
    distance = Perceptual(network)
    before = {name: x.clone() for name, x in network.state_dict().items()}
    distance.train()
    distance(drawn(4, 1, 8, 8).float(), drawn(4, 1, 8, 8, seed=1).float())
    assert not network.training and not any(p.requires_grad for p in distance.parameters())
    assert all(torch.equal(x, before[name]) for name, x in network.state_dict().items())  # and its statistics


def test_where_no_feature_is_active_the_gradient_is_finite():
    network = Slices()
    picture = torch.zeros(1, 2, 2, 2, dtype=torch.float32, requires_grad=True)
    distance = Perceptual(network.float())
    distance(picture, torch.zeros(1, 2, 2, 2)).sum().backward()
    assert picture.grad.isfinite().all()


@pytest.mark.equation("perceptual (part)")
@pytest.mark.parametrize("logits", [False, True])
def test_as_a_part_of_a_loss_it_is_of_the_picture_times_the_dimensions(logits):
    output, x = drawn(2, 2, 2, 4, seed=2), drawn(2, 2, 2, 4, seed=3)
    distance, other = Perceptual(Slices()), "focal" if logits else "squared"
    parts = Reconstruction({other: 1.0, "perceptual": 0.5}, binarise=False)(output, x, None, distance)
    picture = torch.tanh(output / 2) if logits else output
    torch.testing.assert_close(parts["perceptual"], 16 * distance(picture, x))
    assert set(parts) == {other, "perceptual"}
    if not logits:
        torch.testing.assert_close(parts["squared"], squared(output, x))
    with pytest.raises(ValueError, match=r"parts\.perceptual is computed by a network, and none was given"):
        Reconstruction({other: 1.0, "perceptual": 0.5})(output, x)


@pytest.mark.parametrize(
    ("weights", "words"),
    [
        ([torch.ones(2)], r"shapes \[\(2,\)\], and the maps \[2, 3\] channels"),
        ([torch.ones(2), torch.ones(2)], "shapes"),
        ([torch.ones(2), torch.tensor([1.0, -1.0, 1.0])], "must be >= 0"),
        ([torch.ones(2), torch.tensor([1.0, math.nan, 1.0])], "must be >= 0"),
    ],
)
def test_weights_of_other_channels_are_refused(weights, words):
    with pytest.raises(ValueError, match=words):
        Perceptual(Slices(), weights)


def test_pictures_that_the_network_has_no_features_of_are_refused():
    distance = Perceptual(Classifier((8, 6), 3, channels=4))
    distance.must_take((3, 8, 6))
    with pytest.raises(ValueError, match=r"reads images of shape \(3, 8, 6\), not \(1, 8, 6\)"):
        distance.must_take((1, 8, 6))


# ------------------------------------------------------------------------------------------------- the maps of networks


@pytest.mark.parametrize("size", [8, 28, (33, 17)])
def test_the_maps_of_the_classifier_are_those_of_its_levels(size):
    torch.manual_seed(0)
    height, width = (size, size) if isinstance(size, int) else size
    classifier, x = Classifier(size, 1, channels=4).eval(), torch.rand(2, 1, height, width)
    maps = classifier.maps(x)
    assert tuple(y.shape[1] for y in maps) == classifier.map_channels
    assert [(y.shape[2], y.shape[3]) for y in maps] == [
        (math.ceil(height / 2**n), math.ceil(width / 2**n)) for n in range(1, len(maps) + 1)
    ]
    assert torch.equal(classifier.project(maps[-1].mean((2, 3))), classifier.features(x))
    with pytest.raises(ValueError, match="reads images of shape"):
        classifier.maps(torch.zeros(2, 1, 5, 5))


def published(kind: str) -> dict[str, Tensor]:
    """Random weights under the published names, by a list of shapes that is written out here."""
    shapes = {
        "alex": {0: (64, 3, 11), 3: (192, 64, 5), 6: (384, 192, 3), 8: (256, 384, 3), 10: (256, 256, 3)},
        "vgg": {0: (64, 3, 3), 2: (64, 64, 3), 5: (128, 64, 3), 7: (128, 128, 3), 10: (256, 128, 3),
                12: (256, 256, 3), 14: (256, 256, 3), 17: (512, 256, 3), 19: (512, 512, 3), 21: (512, 512, 3),
                24: (512, 512, 3), 26: (512, 512, 3), 28: (512, 512, 3)},
    }[kind]  # fmt: skip
    lins = {"alex": (64, 192, 384, 256, 256), "vgg": (64, 128, 256, 512, 512)}[kind]
    torch.manual_seed(1)
    weights = {"classifier.1.weight": torch.zeros(3)}  # which is not read
    for n, (out, channels, side) in shapes.items():
        weights[f"features.{n}.weight"] = torch.randn(out, channels, side, side) * (2 / (channels * side**2)) ** 0.5
        weights[f"features.{n}.bias"] = 0.1 * torch.randn(out)
    return weights | {f"lin{i}.model.1.weight": torch.rand(1, n, 1, 1) for i, n in enumerate(lins)}


def by_hand(kind: str, w: dict[str, Tensor], x: Tensor) -> list[Tensor]:
    """The maps, layer by layer as the names say."""
    mean, std = torch.tensor([-0.030, -0.088, -0.188]), torch.tensor([0.458, 0.448, 0.450])
    x = (x.expand(-1, 3, -1, -1) - mean[:, None, None]) / std[:, None, None]

    def convolved(x: Tensor, n: int, stride: int = 1, padding: int = 1) -> Tensor:
        return F.conv2d(x, w[f"features.{n}.weight"], w[f"features.{n}.bias"], stride, padding).relu()

    if kind == "alex":
        one = convolved(x, 0, 4, 2)
        two = convolved(F.max_pool2d(one, 3, 2), 3, 1, 2)
        three = convolved(F.max_pool2d(two, 3, 2), 6)
        four = convolved(three, 8)
        return [one, two, three, four, convolved(four, 10)]
    found = []
    for numbers in ((0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28)):
        x = F.max_pool2d(x, 2, 2) if found else x
        for n in numbers:
            x = convolved(x, n)
        found.append(x)
    return found


@pytest.mark.equation("LPIPS (1)")
@pytest.mark.parametrize("kind", ["alex", "vgg"])
def test_published_weights_are_read_and_compare_as_they_say(kind, tmp_path):
    weights = published(kind)
    of_channels = {name: x for name, x in weights.items() if name.startswith("lin")}
    of_features = OrderedDict((name, nn.Parameter(x)) for name, x in weights.items() if name not in of_channels)
    torch.save(of_features, tmp_path / "features.pth", _use_new_zipfile_serialization=False)  # as years ago
    if kind == "alex":
        save_file(of_channels, tmp_path / "lin.safetensors")
    else:
        torch.save(OrderedDict(of_channels), tmp_path / "lin.pth")
    lin = next(tmp_path.glob("lin.*"))
    network, lins = load_lpips(kind, [lin, tmp_path / "features.pth"])
    side = 33 if kind == "alex" else 16
    x, y = (drawn(1, 1, side, side + 2, seed=s).tanh().float() for s in (0, 1))
    expected = [by_hand(kind, weights, z) for z in (x, y)]
    for ours, theirs in zip(network.maps(x), expected[0], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    total = torch.zeros(1)
    for i, (a, b) in enumerate(zip(*expected, strict=True)):
        e = (F.normalize(a) - F.normalize(b)).square() * weights[f"lin{i}.model.1.weight"]
        total += e.sum(1).mean((1, 2))
    distance = Perceptual(network, lins)
    torch.testing.assert_close(distance(x, y), total, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(distance(x.expand(-1, 3, -1, -1), y.expand(-1, 3, -1, -1)), distance(x, y))


def test_files_that_are_no_weights_are_refused(tmp_path):
    weights = published("alex")
    (tmp_path / "text.pth").write_text("nothing")
    torch.save({"features.0.weight": 5}, tmp_path / "numbers.pth")
    torch.save(Classifier(8, channels=4), tmp_path / "code.pth")  # which could run code
    spoilt = {
        "lin0.model.1.weight": torch.ones(1, 3, 1, 1),
        "lin1.model.1.weight": torch.full((1, 192, 1, 1), math.nan),
    }
    save_file({k: v for k, v in weights.items() if "10" not in k} | spoilt, tmp_path / "spoilt.safetensors")
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "spoilt.safetensors").read_bytes()[:1000])
    for name, words in {
        "nowhere.pth": "is no file",
        "text.pth": "cannot be read as weights",
        "numbers.pth": "holds no weights by name",
        "code.pth": "cannot be read as weights",
        "cut.safetensors": "cannot be read as weights",
        "spoilt.safetensors": r"missing: features\.10\.weight, features\.10\.bias; of another shape: "
        r"lin0\.model\.1\.weight \(1, 3, 1, 1\) in place of \(1, 64, 1, 1\); not finite: lin1\.model",
    }.items():
        with pytest.raises(ValueError, match=words):
            load_lpips("alex", [tmp_path / name])
    with pytest.raises(ValueError, match="kind = 'squeeze' is not known; allowed: alex, vgg"):
        load_lpips("squeeze", [])


@pytest.mark.parametrize(("kind", "least"), [("alex", 31), ("vgg", 16)])
def test_images_that_nothing_is_left_of_are_refused(kind, least):
    with torch.device("meta"):
        network = LPIPSNetwork(kind)
        assert min(network.maps(torch.zeros(1, 3, least, least))[-1].shape[2:]) >= 1
        for shape in ((1, 3, least - 1, least), (1, 2, least, least), (3, least, least)):
            with pytest.raises(ValueError, match=f"1 or 3 channels and at least {least} x {least} pixels"):
                network.maps(torch.zeros(shape))
        with pytest.raises(RuntimeError):  # it is the least that there is
            network.features(torch.zeros(1, 3, least - 1, least - 1))
