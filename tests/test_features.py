"""ddpm/metrics/features.py: what each extractor sees, its name, and the weights of Inception, good and bad."""

import hashlib
import pickle
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import sklearn.decomposition
import torch
from torch import Tensor, nn

from ddpm.figures.images import to_float, to_uint8
from ddpm.metrics import features
from ddpm.metrics.features import PCA, Inception, Judge, Pixels
from models.classifier import Classifier


def images(n: int, channels: int = 1, size: int = 6, seed: int = 0) -> Tensor:
    """Pictures (n, C, H, W) in [-1, 1] whose pixels have to do with one another, as bytes hold them."""
    draw = torch.Generator().manual_seed(seed)
    coarse = (
        torch.rand(n, channels, 2, 2, generator=draw).repeat_interleave(size // 2, 2).repeat_interleave(size // 2, 3)
    )
    return to_float(((0.8 * coarse + 0.2 * torch.rand(n, channels, size, size, generator=draw)) * 255).to(torch.uint8))


# ------------------------------------------------------------------------------------------------------ what all share


class Bytes(features.Features):
    """The bytes themselves; notes how many it is given at a time."""

    name, size = "bytes", 4

    def __init__(self) -> None:
        self.batches: list[int] = []

    def _of(self, images: Tensor) -> Tensor:
        assert images.dtype == torch.uint8 and not torch.is_grad_enabled()
        self.batches.append(len(images))
        return images.flatten(1)


def test_images_are_seen_as_files_would_hold_them():
    """Bytes: what lies outside [-1, 1] or between two levels is neither lost nor gained."""
    x = images(5, size=2)
    extractor = Bytes()
    expected = to_uint8(x).flatten(1)
    assert torch.equal(extractor(x), expected)
    moved = x + 0.3 / 127.5
    moved[x == 1] = 7.0
    assert torch.equal(extractor(moved), expected)


def test_features_do_not_depend_on_the_batch():
    extractor, x = Bytes(), images(7, size=2)
    assert torch.equal(extractor(x, batch_size=3), extractor(x)) and extractor.batches == [3, 3, 1, 7]


def test_images_that_are_not_finite_are_counted_and_named():
    x = images(5, size=2)
    x[1, 0, 0, 0], x[4] = torch.nan, torch.inf
    with pytest.raises(ValueError, match=r"^2 of 5 samples hold NaN or infinity$"):
        Bytes()(x)


# ------------------------------------------------------------------------------------------------------ pixels and PCA


@pytest.mark.parametrize("channels", [1, 3])
def test_pixels_are_the_bytes_in_0_to_1(channels):
    x, extractor = images(4, channels), Pixels((channels, 6, 6))
    found = extractor(x)
    assert extractor.name == "pixels" and found.shape == (4, extractor.size) == (4, channels * 36)
    torch.testing.assert_close(found, to_uint8(x).flatten(1) / 255)
    assert found.min() >= 0 and found.max() <= 1


@pytest.mark.parametrize("channels", [1, 3])
def test_principal_components_are_those_of_scikit_learn_up_to_their_sign(channels):
    x, others = images(60, channels), images(20, channels, seed=1)
    extractor = PCA(x, 4, "abc")
    theirs = sklearn.decomposition.PCA(4, svd_solver="full").fit((to_uint8(x).flatten(1) / 255).double().numpy())
    expected = theirs.transform((to_uint8(others).flatten(1) / 255).double().numpy())
    found = extractor(others).numpy()
    assert found.shape == (20, 4) and extractor.size == 4 and extractor.name == "pca4-abc"
    signs = np.sign((found * expected).sum(0))
    np.testing.assert_allclose(found, signs * expected, atol=1e-6)  # the largest first
    of_their_own = extractor(x)
    assert abs(of_their_own.mean(0)).max() < 1e-6
    np.testing.assert_allclose(of_their_own.var(0), theirs.explained_variance_, rtol=1e-6)


def test_as_many_components_as_there_are_pixels_keep_all_distances():
    x, others = images(60), images(9, seed=1)
    torch.testing.assert_close(
        torch.cdist(PCA(x, 36, "a")(others), PCA(x, 36, "a")(others)),
        torch.cdist(Pixels((1, 6, 6))(others).double(), Pixels((1, 6, 6))(others).double()),
    )


@pytest.mark.parametrize("components", [0, 37, -1, True, 2.0, "3", None])
def test_components_that_there_are_not(components):
    with pytest.raises(ValueError, match=r"pca = .*: components of 60 images are an integer from 1 to 36"):
        PCA(images(60), components, "a")


def test_fewer_images_than_pixels_have_fewer_components():
    assert PCA(images(9), 8, "a")(images(3)).shape == (3, 8)
    with pytest.raises(ValueError, match="9 images are an integer from 1 to 8"):
        PCA(images(9), 9, "a")


# ------------------------------------------------------------------------------------------------------------ the judge


def test_features_and_probabilities_of_a_judge_are_those_of_the_classifier():
    classifier = Classifier(6, num_classes=3, channels=4, features=5).eval()
    judge, x = Judge(classifier, "abc123"), images(7)
    found = judge(x)
    assert judge.name == "classifier-abc123" and found.shape == (7, judge.size) == (7, 5)
    with torch.no_grad():
        torch.testing.assert_close(found, classifier.features(x))
        torch.testing.assert_close(judge.probabilities(found), classifier(x).softmax(1))
    assert not found.requires_grad


# ------------------------------------------------------------------------------------------------------------ Inception


class Published(nn.Module):
    """Takes and gives what torch-fidelity's network does, of a mean colour; notes what it was made of and given."""

    made: list[tuple] = []  # noqa: RUF012
    given: list[Tensor] = []  # noqa: RUF012

    def __init__(
        self,
        name: str,
        features_list: list[str],
        feature_extractor_weights_path: str | None = None,
        feature_extractor_internal_dtype: str | None = None,
        **kwargs: object,
    ):
        super().__init__()
        self.made.append((name, features_list, feature_extractor_weights_path))
        self.fc = nn.Linear(3, 2048)
        self.load_state_dict(torch.load(feature_extractor_weights_path))
        self.requires_grad_(False).eval()

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        assert torch.is_tensor(x) and x.dtype == torch.uint8 and x.ndim == 4 and x.shape[1] == 3
        self.given.append(x)
        return (self.fc(x.float().mean((2, 3)) / 255),)


@pytest.fixture
def published(monkeypatch) -> type[Published]:
    """torch-fidelity is installed, it seems."""
    module = types.ModuleType("torch_fidelity.feature_extractor_inceptionv3")
    module.FeatureExtractorInceptionV3 = Published
    monkeypatch.setitem(sys.modules, "torch_fidelity", types.ModuleType("torch_fidelity"))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(Published, "made", [])
    monkeypatch.setattr(Published, "given", [])
    return Published


def save_weights(path: Path, seed: int = 0, zipped: bool = True) -> str:
    """Write weights that fit; returns their checksum."""
    torch.manual_seed(seed)
    torch.save(nn.Linear(3, 2048).state_dict(prefix="fc."), path, _use_new_zipfile_serialization=zipped)
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def standard(tmp_path, monkeypatch) -> Path:
    """The standard weights where they are downloaded from; torch's cache, which is empty, is tmp_path / "hub".

    They are as old as the published ones: no zip file.
    """
    path = tmp_path / "published" / "weights-standard.pth"
    path.parent.mkdir()
    monkeypatch.setattr(features, "INCEPTION_SHA256", save_weights(path, zipped=False))
    monkeypatch.setattr(features, "INCEPTION", path.as_uri())
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    return path


def cached(tmp_path: Path) -> Path:
    return tmp_path / "hub" / "checkpoints" / "weights-standard.pth"


def test_the_published_weights_are_named_by_their_checksum():
    """The name that they are published under tells how it begins."""
    assert len(features.INCEPTION_SHA256) == 64
    assert features.INCEPTION.endswith(f"-{features.INCEPTION_SHA256[:8]}.pth")


def test_features_of_inception_are_those_of_the_published_network(published, tmp_path):
    checksum = save_weights(tmp_path / "w.pth")
    extractor = Inception(tmp_path / "w.pth")
    assert published.made == [("inception", ["2048"], str(tmp_path / "w.pth"))]
    assert extractor.name == f"inception-{checksum[:8]}" and extractor.size == 2048
    x = images(120, channels=3)
    found = extractor(x)
    assert found.shape == (120, 2048) and [len(part) for part in published.given] == [50, 50, 20]
    assert torch.equal(torch.cat(published.given), to_uint8(x))
    torch.testing.assert_close(found, extractor.network.fc(to_uint8(x).float().mean((2, 3)) / 255))
    save_weights(tmp_path / "other.pth", seed=1)
    assert Inception(str(tmp_path / "other.pth")).name != extractor.name


def test_grey_images_are_repeated_to_three_channels(published, tmp_path):
    save_weights(tmp_path / "w.pth")
    x = images(4)
    Inception(tmp_path / "w.pth")(x)
    (given,) = published.given
    assert given.shape == (4, 3, 6, 6) and all(torch.equal(given[:, c], to_uint8(x)[:, 0]) for c in range(3))


def test_the_standard_weights_are_downloaded_once_and_kept(published, standard, tmp_path):
    first = Inception()
    assert cached(tmp_path).read_bytes() == standard.read_bytes()
    assert published.made[0][2] == str(cached(tmp_path))
    assert first.name == f"inception-{features.INCEPTION_SHA256[:8]}"
    standard.unlink()
    assert torch.equal(Inception()(images(2)), first(images(2)))


def test_the_standard_weights_may_lie_in_another_place(published, standard, tmp_path):
    """Old as their format is: their checksum is known."""
    moved = standard.rename(tmp_path / "inception.pt")
    assert Inception(moved).name == f"inception-{features.INCEPTION_SHA256[:8]}"
    assert not (tmp_path / "hub").exists()


def test_standard_weights_that_are_damaged_are_refused_before_they_are_loaded(published, standard, tmp_path):
    Inception()
    cached(tmp_path).write_bytes(cached(tmp_path).read_bytes()[:-1])
    published.made.clear()
    with pytest.raises(ValueError, match=r"weights-standard.pth is damaged: .* remove it to download it again"):
        Inception()
    assert not published.made


def test_a_download_that_is_another_file_leaves_nothing_behind(published, standard, tmp_path):
    save_weights(standard, seed=1)
    with pytest.raises(ConnectionError, match="cannot be downloaded"):
        Inception()
    assert list((tmp_path / "hub" / "checkpoints").iterdir()) == [] and not published.made


def test_without_a_network_it_is_said_what_to_do(published, standard, tmp_path):
    standard.unlink()
    with pytest.raises(ConnectionError) as raised:
        Inception()
    told = str(raised.value)
    assert f"put weights-standard.pth into {cached(tmp_path).parent} by hand" in told and told.isprintable()
    assert "inception.weights=FILE" in told and "features=classifier needs no download" in told
    assert not published.made and list((tmp_path / "hub" / "checkpoints").iterdir()) == []


def test_without_the_package_it_is_said_how_to_install_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    monkeypatch.setattr(torch.hub, "download_url_to_file", lambda *arguments, **options: pytest.fail("downloaded"))
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(ImportError, match=r"pip install 'ddpm-ablations\[fid\]'"):
        Inception()


class Trap:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder: Path):
        self.folder = folder

    def __reduce__(self) -> tuple:
        return Path.mkdir, (self.folder,)


@pytest.mark.parametrize("kind", ["torch.save", "old torch.save", "pickle"])
def test_weights_with_code_are_refused_before_they_are_loaded(kind, published, tmp_path):
    path, folder = tmp_path / "w.pth", tmp_path / "trap"
    if kind == "pickle":
        path.write_bytes(pickle.dumps(Trap(folder)))
    else:
        torch.save({"fc.weight": Trap(folder)}, path, _use_new_zipfile_serialization=kind == "torch.save")
    with pytest.raises(ValueError, match=r"w\.pth"):
        Inception(path)
    assert not folder.exists() and not published.made


def test_code_in_the_place_of_the_standard_weights_is_not_loaded(published, standard, tmp_path):
    cached(tmp_path).parent.mkdir(parents=True)
    torch.save(Trap(tmp_path / "trap"), cached(tmp_path))
    with pytest.raises(ValueError, match="is damaged"):
        Inception()
    assert not (tmp_path / "trap").exists() and not published.made


def test_weights_of_another_network_and_files_that_there_are_not(published, tmp_path):
    torch.save(nn.Linear(2, 2).state_dict(), tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"other\.pth does not hold the weights of Inception-v3") as raised:
        Inception(tmp_path / "other.pth")
    assert str(raised.value).isprintable()
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(ValueError, match=r"list\.pth does not hold the weights"):
        Inception(tmp_path / "list.pth")
    with pytest.raises(FileNotFoundError):
        Inception(tmp_path / "none.pth")
    with pytest.raises(ValueError, match="it is no file"):
        Inception(tmp_path)


def test_weights_of_more_bytes_than_such_a_network_has_are_not_read(published, tmp_path, monkeypatch):
    monkeypatch.setattr(features, "LARGEST", 1000)
    save_weights(tmp_path / "w.pth")
    with pytest.raises(ValueError, match="more than 1,000 bytes"):
        Inception(tmp_path / "w.pth")
