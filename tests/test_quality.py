"""ddpm/metrics/quality.py: measures beside real images and noise, several seeds together, what is kept."""

import contextlib
import functools
import json
import math
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import scipy.stats
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ddpm.data import ImageData
from ddpm.data.batch import Batch
from ddpm.data.dataset import InMemory
from ddpm.metrics import quality
from ddpm.metrics.features import PCA, Coordinates, Features, Judge, Pixels
from ddpm.metrics.frechet import moments
from ddpm.metrics.judge import accuracy, passes, train_judge
from ddpm.metrics.memorisation import memorisation
from ddpm.metrics.quality import MEASURES, Real, Result, Samples, bias_curve, copies, in_words, judge_of, together
from ddpm.runs.tensor_cache import save_tensor
from models.classifier import Classifier


def pictures(n: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Bytes (n, 1, 8, 8) of three classes that are easy to tell apart: a bright third of the rows, with noise."""
    draw = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % 3
    x = torch.randint(0, 90, (n, 1, 8, 8), generator=draw)
    for label in range(3):
        x[y == label, :, 2 * label : 2 * label + 3] += 150
    return x.to(torch.uint8), y


def data(
    n: int = 240, labels: bool = True, validation: float = 0.25, seed: int = 0, name: str = "stripes"
) -> ImageData:
    x, y = pictures(n, seed)
    return ImageData(name, "all", x, y if labels else None, validation=validation)


def real(n: int) -> Tensor:
    """Samples as good as they get."""
    return pictures(n, seed=5)[0].float() / 127.5 - 1


def noise(n: int) -> Tensor:
    return torch.randn(n, 1, 8, 8, generator=torch.Generator().manual_seed(3))


def classifier(seed: int = 0, **options: int) -> nn.Module:
    torch.manual_seed(seed)
    return Classifier(
        **{"image_size": (8, 8), "in_channels": 1, "num_classes": 3, "channels": 8, "features": 16, **options}
    )


def train_shortly(judge: nn.Module, x: Tensor, y: Tensor, epochs: int) -> nn.Module:
    """The few images here take fewer passes than the photographs and characters that a judge is made for."""
    assert epochs >= 3
    return train_judge(judge, x, y, epochs=40, batch_size=45, shift=0)


def untrained(judge: nn.Module, x: Tensor, y: Tensor, epochs: int) -> nn.Module:
    return judge.eval()


def silent(line: str) -> None:
    pass


@pytest.fixture
def quick(monkeypatch) -> None:
    monkeypatch.setattr(quality, "train_judge", train_shortly)


@pytest.fixture(scope="module")
def judge(tmp_path_factory) -> Judge:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quality, "train_judge", train_shortly)
        return judge_of(data(), classifier(), tmp_path_factory.mktemp("judges"), "cpu", silent)[0]


@pytest.fixture(scope="module")
def seen(judge) -> Callable[[str], Real]:
    """The data by some extractor, made once for each."""

    @functools.cache
    def seen(name: str) -> Real:
        pca = PCA(data().batch(data().train).x, 6, "stripes")
        return Real(data(), {"pca": pca, "pixels": Pixels((1, 8, 8)), "classifier": judge}[name])

    return seen


def drawn(x: Tensor, of: Real, y: Tensor | None = None) -> Samples:
    return Samples(x, of.features(x), y)


# ------------------------------------------------------------------------------------------------------------- measures

N = 70  # more than pixels, of which a covariance is taken; more than the 60 that are held out
NEAR_AND_FAR: dict[str, Callable[[Result, Result], bool]] = {  # of real images that are new, and of noise
    "frechet": lambda good, bad: abs(good.more["relative"]) < 0.1 and bad.more["relative"] > 0.5,
    "kernel": lambda good, bad: abs(good.value) < 0.1 * bad.low and good.low < good.value < good.high,
    "precision-k3": lambda good, bad: abs(good.value - good.real_vs_real) < 0.15 and bad.value < 0.1,
    "recall-k3": lambda good, bad: abs(good.value - good.real_vs_real) < 0.15,  # the balls of noise may hold all
    "density-k5": lambda good, bad: abs(good.value - good.real_vs_real) < 0.3 and bad.value < 0.1,
    "coverage-k5": lambda good, bad: abs(good.value - good.real_vs_real) < 0.15 and bad.value < 0.1,
    "recognition": lambda good, bad: good.value > 0.9 < good.real_vs_real and bad.value < 0.1,
    "memorisation": lambda good, bad: good.value == pytest.approx(1, abs=0.1) and bad.value > 2,
    "variety": lambda good, bad: good.value == pytest.approx(good.real_vs_real, rel=0.25) != bad.value,
    "sliced_wasserstein": lambda good, bad: good.low < good.real_vs_real < good.high < bad.low < bad.value,
    "energy_distance": lambda good, bad: abs(good.value) < 0.1 * bad.low and good.low < good.value < good.high,
}


@pytest.mark.parametrize("features", ["pca", "pixels", "classifier"])
@pytest.mark.parametrize("name", MEASURES)
def test_a_measure_puts_images_near_real_ones_and_noise_far(name, features, seen):
    of = seen(features)
    if name in ("recognition", "variety") and features != "classifier":
        with pytest.raises(ValueError, match=f"{name} needs features=classifier.*not {of.features.name}"):
            MEASURES[name](drawn(real(N), of), of)
        return
    good, bad = (MEASURES[name](drawn(x, of), of) for x in (real(N), noise(N)))
    assert good.keys() == bad.keys()
    for measure in good:
        assert NEAR_AND_FAR[measure](good[measure], bad[measure]), (measure, good[measure], bad[measure])
        assert good[measure].real_vs_real == bad[measure].real_vs_real
        record = together([good[measure]], [0])
        assert record["value"] == good[measure].value and record["real_vs_real"] == good[measure].real_vs_real
        assert json.loads(json.dumps(record, allow_nan=False)) == record
        assert f"{good[measure].value:.3f}"[:4] in good[measure].words or name not in (
            "frechet",
            "memorisation",
            "precision_recall",
            "density_coverage",
        )


def test_protocols_name_the_measure_the_extractor_the_number_and_what_is_compared_with(seen, judge):
    assert seen("pca").protocol("frechet", 70) == "frechet_pca6-stripes_70_train"
    assert seen("classifier").protocol("precision-k3", 9) == f"precision-k3_{judge.name}_9_train"


def test_fewer_held_out_images_than_samples_are_told_and_so_is_how_many(seen):
    of = seen("pca")
    more, as_many = (quality.frechet(drawn(real(n), of), of)["frechet"] for n in (N, 60))
    assert more.more["real_n"] == as_many.more["real_n"] == 60 and more.real_vs_real == as_many.real_vs_real
    assert "60 images are held out" in more.words and "are held out" not in as_many.words
    # the place between held-out images and noise is that of equal numbers
    assert more.more["relative"] == pytest.approx(as_many.more["relative"]) and more.value != as_many.value
    few = quality.frechet(drawn(real(20), of), of)["frechet"]
    assert few.more["real_n"] == 20 and few.real_vs_real > as_many.real_vs_real
    for name in ("kernel", "precision_recall", "density_coverage", "sliced_wasserstein", "energy_distance"):
        assert {f.more["real_n"] for f in MEASURES[name](drawn(real(20), of), of).values()} == {20}


def test_a_covariance_needs_more_samples_than_features(seen):
    with pytest.raises(ValueError, match="64 samples are too few for the covariance of 64 features"):
        quality.frechet(drawn(real(64), seen("pixels")), seen("pixels"))


def test_points_are_compared_by_their_coordinates():
    """Of any dimension, as they are: not clipped, not quantised."""
    for d in (1, 2, 5):
        x = 40 * torch.randn(300, d, generator=torch.Generator().manual_seed(d))
        of = Real(cast(ImageData, Cloud(x)), Coordinates((d,)))
        assert of.protocol("energy_distance", 9) == "energy_distance_coordinates_9_train"
        assert torch.equal(of.train, x[of.data.train]) and torch.equal(of.held_out, x[of.data.held_out])
        for name in ("sliced_wasserstein", "energy_distance"):
            (good,), (far,) = (MEASURES[name](drawn(part, of), of).values() for part in (of.held_out, of.held_out + 99))
            assert good.value == good.real_vs_real == far.real_vs_real < far.low < far.value < far.high
            assert "; held-out points " in good.words and "of them" not in good.words and good.more["real_n"] == 60
            (more,) = MEASURES[name](drawn(of.train, of), of).values()
            assert more.words.endswith(", 60 of them)") and more.value < good.value + 1
        with pytest.raises(ValueError, match="1 of 300 samples hold NaN or infinity"):
            of.features(torch.where(torch.arange(300)[:, None] == 7, torch.inf, x))


class Cloud(InMemory):
    """Points in as many dimensions as they have."""

    units = "points"

    def __init__(self, x: Tensor):
        super().__init__("cloud", "all", x, None, (), 0.2)

    def batch(self, indices: Tensor, device: Any = "cpu", generator: Any = None) -> Batch:
        return self._taken(indices, device)


class Blind(Features):
    """Sees nothing."""

    name, size = "blind", 2

    def _of(self, images: Tensor) -> Tensor:
        return torch.zeros(len(images), 2)


def test_features_that_see_no_difference_put_samples_nowhere():
    of = Real(data(), Blind())
    found = quality.frechet(drawn(real(9), of), of)["frechet"]
    assert found.value == found.more["noise"] == 0 and found.more["relative"] is None
    assert json.loads(json.dumps(together([found, found], [0, 1]), allow_nan=False))["relative"] is None


@pytest.mark.parametrize("name", MEASURES)
def test_samples_that_are_not_finite_are_counted(name, seen):
    samples = real(N)
    samples[3], samples[7, 0, 1, 1] = torch.nan, torch.inf
    of = seen("classifier")
    with pytest.raises(ValueError, match=f"2 of {N} samples hold NaN or infinity"):
        MEASURES[name](drawn(samples, of), of)
    with pytest.raises(ValueError, match=f"2 of {N} samples hold NaN or infinity"):
        quality.by_regression(Samples(samples, torch.zeros(N, 0), None), data())


def test_what_is_taken_of_many_images_is_spread_over_all_of_them():
    """Images may lie in the order of their classes: the first ones alone would be of one class."""
    x, y = pictures(90)
    order = y.argsort(stable=True)
    of = Real(ImageData("sorted", "all", x[order], y[order], validation=0.5), Pixels((1, 8, 8)))
    for part, rows in ((of.data.held_out, of.like(9)), (of.data.train, of.some(9))):
        expected = part[torch.linspace(0, len(part) - 1, 9).round().long()]
        assert torch.equal(rows, of.features(of.data.batch(expected).x))
        assert of.data.labels[part[:9]].max() == 0 and of.data.labels[expected].bincount().min() >= 2
    assert len(of.like(100)) == len(of.some(100)) == 45
    assert torch.equal(of.like(45), of.held_out) and torch.equal(of.some(45), of.train)


def test_data_without_a_held_out_part():
    with pytest.raises(ValueError, match="stripes has no held-out part"):
        Real(data(validation=0), Pixels((1, 8, 8)))


# ---------------------------------------------------------------------------------------------------------- recognition


def test_the_classes_that_were_asked_for_are_looked_for(seen, judge):
    of, x, y = seen("classifier"), real(30), pictures(30)[1]
    found = quality.by_classifier(drawn(x, of, y), of)["recognition"]
    assert found.more["class_accuracy"] == [1, 1, 1] and found.more["accuracy"] == 1
    wrong = y.clone()
    wrong[:6] = (y[:6] + 1) % 3  # two of each class are called the next one
    found = quality.by_classifier(drawn(x, of, wrong), of)["recognition"]
    assert found.more["class_accuracy"] == pytest.approx([0.8] * 3) and found.more["accuracy"] == pytest.approx(0.8)
    assert "80.0%" in found.words

    never = quality.by_classifier(drawn(x[y != 1], of, y[y != 1]), of)["recognition"]
    assert never.more["class_accuracy"] == [1, None, 1] and never.more["accuracy"] == 1
    record = together([never, never], [0, 1])
    assert record["class_accuracy"] == [1, None, 1]
    json.dumps(record, allow_nan=False)
    unasked = quality.by_classifier(drawn(x, of), of)["recognition"]
    assert not {"class_accuracy", "accuracy"} & unasked.more.keys()


def test_both_recognisers_count_classes_and_their_entropy(seen):
    of, x, y = seen("classifier"), real(30), pictures(30)[1]
    for chosen, shares, entropy in ((y >= 0, [1 / 3] * 3, math.log2(3)), (y == 2, [0, 0, 1], 0)):
        by_pixels = quality.by_regression(Samples(x[chosen], x.new_zeros(0, 0), None), of.data)
        by_judge = quality.by_classifier(drawn(x[chosen], of), of)["recognition"]
        for found in (by_pixels, by_judge):
            assert found.value > 0.9 and found.more["class_shares"] == pytest.approx(shares, abs=0.05)
            assert found.more["class_entropy"] == pytest.approx(entropy, abs=0.02)
    assert by_judge.more["class_entropy"] == 0


def test_the_relative_frechet_distance_runs_from_held_out_images_to_noise():
    rng = torch.Generator().manual_seed(0)
    real, held_out, other = torch.randn(3, 4000, 5, generator=rng)
    noise = 4 * torch.randn(4000, 5, generator=rng) + 3
    reference = SimpleNamespace(
        data=SimpleNamespace(units="images"),
        moments=moments(real),
        like=lambda n: held_out[:n],
        noise=lambda n: noise[:n],
    )

    def of(features: Tensor) -> Result:
        return quality.frechet(Samples(features, features, None), reference)["frechet"]

    assert of(held_out).more["relative"] == 0 and of(noise).more["relative"] == 1
    assert of(other).more["relative"] == pytest.approx(0, abs=1e-3)
    # half-way in the roots of the distances: mean 1.5, deviation 2.5, a quarter of the distance
    between = of(2.5 * other + 1.5)
    assert between.more["relative"] == pytest.approx(0.25, abs=0.02)
    assert between.more["noise"] == pytest.approx(5 * (9 + 9), rel=0.05)
    assert f"{between.more['relative']:.2%} of the way" in between.words


def test_intervals_hold_what_other_samples_give(seen):
    """Of draws of 70 samples, in nine cases of ten at least: of 95 %."""
    of = seen("pca")
    found = [quality.frechet(drawn(x, of), of)["frechet"] for x in noise(70 * 60).split(70)]
    middle = np.mean([one.value for one in found])
    assert np.mean([one.low <= middle <= one.high for one in found]) >= 0.9


def test_recognition_by_regression_tells_images_from_noise():
    found, bad = (quality.by_regression(Samples(x, x.new_zeros(0, 0), None), data()) for x in (real(60), noise(60)))
    assert found.value > 0.9 and found.real_vs_real > 0.9
    assert bad.low <= bad.value <= bad.high < found.low < found.value <= found.high
    p, z = found.value, 1.959964
    wilson = (p + z**2 / 120 - z * math.sqrt(p * (1 - p) / 60 + (z / 120) ** 2)) / (1 + z**2 / 60)  # of n = 60
    assert found.low == pytest.approx(wilson, abs=1e-6) and found.interval == "wilson"
    assert found.more["distance_ratio"] == pytest.approx(1, abs=0.1) and bad.more["distance_ratio"] > 1.5
    assert bad.real_vs_real == found.real_vs_real
    asked = quality.by_regression(Samples(real(60), torch.zeros(0, 0), pictures(60)[1]), data())
    assert asked.more["accuracy"] == 1 and asked.value == found.value


def test_held_out_images_that_are_copies_have_no_distance_to_compare_with():
    x, y = pictures(12)
    copied = ImageData("copied", "all", x.repeat(8, 1, 1, 1), y.repeat(8), validation=0.1)
    found = quality.by_regression(Samples(real(6), torch.zeros(0, 0), None), copied)
    assert "distance_ratio" not in found.more
    json.dumps(together([found], [0]), allow_nan=False)


def test_logistic_regression_is_for_few_small_images():
    assert quality.fits_regression(data())
    assert not quality.fits_regression(ImageData("large", "all", torch.zeros(2, 3, 64, 64, dtype=torch.uint8)))


def test_one_class_is_nothing_to_tell_apart():
    x, _ = pictures(20)
    assert quality.has_classes(data()) and not quality.has_classes(data(labels=False))
    assert not quality.has_classes(ImageData("one", "all", x, torch.ones(20), classes=("a", "b")))
    rare = torch.zeros(20)
    rare[data(20).held_out[0]] = 1  # seen by nobody who learns
    assert not quality.has_classes(ImageData("rare", "all", x, rare, validation=0.25))


# -------------------------------------------------------------------------------------------------------- memorisation


@pytest.mark.parametrize("features", ["pca", "classifier", "pixels"])
def test_copies_are_found_with_their_originals(features, seen):
    of = seen(features)
    chosen = torch.tensor([3, 30, 100, 7])
    x = of.data.batch(of.data.train[chosen]).x
    found = copies(drawn(torch.cat([x, real(4)]), of), of)
    results = found["memorisation"].detail
    assert results.keys() == {of.features.name, "pixels"}
    assert torch.equal(results["pixels"].index[:4], chosen) and results["pixels"].distance[:4].max() == 0
    more = found["memorisation"].more
    assert more["smallest"] < 1e-6 and more["pixel_share_closer"] >= 0.5 and more["pixel_ratio"] < 0.6
    assert found["memorisation"].value < 1 and "by pixels" in found["memorisation"].words
    new = copies(drawn(real(30), of), of)
    assert new["memorisation"].more["pixel_ratio"] == pytest.approx(1, abs=0.1)
    assert MEASURES["memorisation"] is copies


def test_distances_of_memorisation_are_those_of_the_features(seen):
    of = seen("pca")
    results = copies(drawn(real(9), of), of)["memorisation"].detail
    expected = memorisation(of.features(real(9)), of.train, of.held_out)
    assert torch.equal(results["pca6-stripes"].distance, expected.distance)
    assert results["pca6-stripes"].ratio == expected.ratio


# ------------------------------------------------------------------------------------------------------- bias


def test_the_bias_of_real_images_falls_with_their_number(seen):
    of = seen("pca")
    curve = bias_curve(of)
    sizes, values = zip(*curve, strict=True)
    assert sizes[0] == 7 and sizes[-1] == 60 and list(sizes) == sorted(set(sizes)) and len(sizes) == 8
    assert values[0] > 2 * values[-1] and np.polyfit(np.log(sizes), np.log(values), 1)[0] < -0.5
    assert values[-1] == pytest.approx(quality.frechet(drawn(real(60), of), of)["frechet"].real_vs_real)
    with pytest.raises(ValueError, match="60 held-out images are too few for the covariance of 64 features"):
        bias_curve(seen("pixels"))


# ------------------------------------------------------------------------------------------------------------- together


def found(value: float, **more: Any) -> Result:
    return Result(value, 0.5, f"found {value}", value - 1, value + 1, more)


def test_one_seed_keeps_the_interval_of_the_measure():
    record = together([found(2.0, share=0.25)], [7])
    expected = {"value": 2.0, "low": 1.0, "high": 3.0, "real_vs_real": 0.5, "seeds": [7], "share": 0.25}
    assert record == expected | {"interval": None}
    assert in_words([found(2.0)], record) == "found 2.0"
    assert together([Result(2.0, None, "")], [0]) == {
        "value": 2.0, "low": None, "high": None, "real_vs_real": None, "seeds": [0], "interval": None
    }  # fmt: skip


@pytest.mark.parametrize("values", [[1.0, 2.0, 4.0], [0.1, 0.5], [3.0, 3.0, 3.0], [5.0, -1.0, 0.5, 2.0, 2.0]])
def test_several_seeds_have_a_mean_and_an_interval_of_students(values):
    record = together([found(value) for value in values], list(range(len(values))))
    sem = np.std(values, ddof=1) / math.sqrt(len(values))
    low, high = np.mean(values) + sem * scipy.stats.t.ppf([0.025, 0.975], len(values) - 1)
    assert [record[key] for key in ("value", "low", "high")] == pytest.approx([np.mean(values), low, high])
    if sem > 0:
        assert (low, high) == pytest.approx(scipy.stats.t.interval(0.95, len(values) - 1, np.mean(values), sem))
    assert record["values"] == values and record["seeds"] == list(range(len(values)))
    told = in_words([found(value) for value in values], record)
    assert f"95% over {len(values)} seeds" in told and told.endswith(f"found {values[0]}")


def test_other_numbers_are_averaged_place_by_place():
    record = together(
        [found(0.0, a=1.0, b=[1.0, None], n=36, c=None), found(0.0, a=2.0, b=[2.0, 4.0], n=36, c=1.0)], [0, 1]
    )
    assert (record["a"], record["b"], record["c"]) == (1.5, [1.5, None], None)
    assert record["n"] == 36 and type(record["n"]) is int


# ------------------------------------------------------------------------------------------------------- kept features


class Counted(Pixels):
    """Pixels that count the images they are given."""

    def __init__(self, name: str = "counted"):
        super().__init__((1, 8, 8))
        self.name, self.count = name, 0

    def __call__(self, x: Tensor, batch_size: int = 500) -> Tensor:
        self.count += len(x)
        return super().__call__(x, batch_size)


def test_features_are_computed_once_and_kept_for_the_same_data(tmp_path):
    first, again = Counted(), Counted()
    one = Real(data(), first, tmp_path / "cache")
    (kept,) = (tmp_path / "cache").iterdir()
    assert first.count == 240 and kept.name == f"{data().identity()['sha256'][:12]}-counted.safetensors"
    assert load_file(kept)["kept"].shape == (240, 64)
    other = Real(data(validation=0.5), again, tmp_path / "cache")  # another division, the same images
    assert again.count == 0 and len(other.train) == 120
    assert torch.equal(one.train, Real(data(), Counted()).train)
    assert torch.equal(one.held_out, one.features(data().batch(data().held_out).x))
    same = Real(data(name="elsewhere"), again, tmp_path / "cache")  # under another name
    assert again.count == 0 and torch.equal(same.held_out, one.held_out)


def test_other_images_labels_or_extractors_are_kept_apart(tmp_path):
    for source, extractor in (
        (data(), Counted()),
        (data(seed=1), Counted()),
        (data(labels=False), Counted()),
        (data(), Counted("another")),
    ):
        Real(source, extractor, tmp_path)
        assert extractor.count == 240
    assert len(list(tmp_path.iterdir())) == 4


DAMAGE: dict[str, Callable[[Path], Any]] = {
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-5]),
    "garbage": lambda path: path.write_bytes(b"garbage"),
    "empty": lambda path: path.write_bytes(b""),
    "another name": lambda path: save_file({"other": torch.zeros(240, 64)}, path),
    "fewer images": lambda path: save_tensor(torch.zeros(239, 64), path),
    "fewer features": lambda path: save_tensor(torch.zeros(240, 63), path),
    "one axis": lambda path: save_tensor(torch.zeros(240 * 64), path),
    "a number": lambda path: path.write_bytes(path.read_bytes()[:-9] + b"\x01" + path.read_bytes()[-8:]),
    "another type": lambda path: save_tensor(torch.zeros(240, 64, dtype=torch.float64), path),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_kept_features_that_are_damaged_are_computed_anew(damage, tmp_path, capsys):
    expected = Real(data(), Counted(), tmp_path).train
    (kept,) = tmp_path.iterdir()
    before = kept.read_bytes()
    DAMAGE[damage](kept)
    extractor = Counted()
    assert torch.equal(Real(data(), extractor, tmp_path).train, expected)
    told = capsys.readouterr().out.splitlines()
    assert extractor.count == 240 and told[0].startswith(f"{kept} is damaged and will be made again: ")
    if damage == "a folder":  # which nobody here has made, and which is not removed
        assert len(told) == 2 and told[1].startswith(f"{kept} cannot be saved: ")
    else:
        assert kept.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == [kept.name] and len(told) == 1


def test_without_a_folder_nothing_is_kept(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    extractor = Counted()
    Real(data(), extractor)
    assert extractor.count == 240 and list(tmp_path.iterdir()) == []


def test_images_are_read_in_parts_and_in_their_order():
    x = torch.randint(0, 256, (5000, 1, 2, 2), dtype=torch.uint8)
    source = ImageData("many", "all", x, validation=0.5)
    of = Real(source, Pixels((1, 2, 2)))
    assert torch.equal(of.train, x[source.train].flatten(1) / 255)
    assert torch.equal(of.held_out, x[source.held_out].flatten(1) / 255)


# ------------------------------------------------------------------------------------------------------------ the judge


def test_the_judge_is_trained_once_and_kept(tmp_path, monkeypatch, quick):
    told: list[str] = []
    first, right = judge_of(data(), classifier(), tmp_path / "judges", "cpu", told.append)
    (kept,) = (tmp_path / "judges").glob("*.safetensors")
    assert kept.name.startswith("stripes-")
    assert any("once" in line and str(kept) in line for line in told) and any("%" in line for line in told)

    monkeypatch.setattr(quality, "train_judge", lambda *arguments, **options: pytest.fail("trained again"))
    told.clear()
    again, as_right = judge_of(data(), classifier(seed=9), tmp_path / "judges", "cpu", told.append)
    assert again.name == first.name and as_right == right and not any("training" in line for line in told)
    assert torch.equal(again(real(9)), first(real(9)))
    assert float(told[-1].split("%")[0].split()[-1]) == pytest.approx(100 * right, abs=0.01) and right > 0.8


def test_of_runs_that_end_together_one_trains_the_judge(tmp_path, monkeypatch):
    """On a GPU each would get another one, and call it by the checksum of the one that was kept last."""
    trained, another = [], threading.Barrier(2)

    def watched(judge: nn.Module, x: Tensor, y: Tensor, epochs: int) -> nn.Module:
        trained.append(judge)
        with contextlib.suppress(threading.BrokenBarrierError):
            another.wait(timeout=0.5)  # for one that trains at the same time
        return judge.eval()

    monkeypatch.setattr(quality, "train_judge", watched)
    others = [classifier(seed) for seed in range(4)]
    with ThreadPoolExecutor(4) as runs:
        found = list(runs.map(lambda untrained: judge_of(data(), untrained, tmp_path, "cpu", silent)[0], others))
    assert len(trained) == 1 and len({judge.name for judge in found}) == 1
    assert all(torch.equal(judge(real(9)), found[0](real(9))) for judge in found)


@pytest.mark.slow
def test_the_name_of_a_judge_is_the_checksum_of_its_weights(tmp_path, quick):
    names = [judge_of(data(), classifier(seed), tmp_path / str(seed), "cpu", silent)[0].name for seed in (0, 1)]
    for seed, name in enumerate(names):
        (kept,) = (tmp_path / str(seed)).glob("*.safetensors")
        assert name == f"classifier-{quality.checkpoint.sha256(kept)[:6]}"
    assert names[0] != names[1]


CHANGES: dict[str, tuple[dict, dict]] = {
    "pixels": ({"seed": 1}, {}),
    "number": ({"n": 243}, {}),
    "judge": ({}, {"features": 8}),
    "training part": ({"validation": 0.5}, {}),
}


@pytest.mark.parametrize("change", CHANGES)
def test_another_judge_or_another_training_part_has_another_name(change, tmp_path, monkeypatch):
    """A judge that has seen the images which another run holds out would flatter them."""
    monkeypatch.setattr(quality, "train_judge", lambda j, x, y, epochs: train_judge(j, x, y, epochs=1))
    protocols = set()
    for of_data, of_judge in (({}, {}), CHANGES[change]):
        source = data(**of_data)
        judge, _ = judge_of(source, classifier(**of_judge), tmp_path, "cpu", silent)
        protocols.add(Real(source, judge).protocol("frechet", 70))
    assert len(protocols) == 2 and len(list(tmp_path.glob("*.safetensors"))) == 2


def test_what_else_depends_on_the_training_part_has_another_name_with_another():
    keys = [quality.data_key(data(**change)) for change in ({}, {"seed": 1}, {"n": 243}, {"validation": 0.5})]
    assert len(set(keys)) == 4 and quality.data_key(data()) == keys[0]


def test_the_judge_learns_from_the_training_part_alone(tmp_path, monkeypatch):
    calls = []

    def watched(judge: nn.Module, x: Tensor, y: Tensor, epochs: int) -> nn.Module:
        calls.append((x, y, epochs))
        return judge.eval()

    monkeypatch.setattr(quality, "train_judge", watched)
    source = data()
    judge_of(source, classifier(), tmp_path, "cpu", silent)
    ((x, y, epochs),) = calls
    expected_x, expected_y = source.batch(source.train).x, source.batch(source.train).y
    assert torch.equal(x, expected_x) and torch.equal(y, expected_y) and epochs == passes(len(x)) == 60


def test_the_judge_is_worth_its_name(tmp_path, quick):
    """The classifier that is kept is the trained one, and its accuracy is that of the held-out part."""
    source, network = data(), classifier()
    held_out = source.batch(source.held_out)
    before = accuracy(network, held_out.x, held_out.y)
    judge, right = judge_of(source, network, tmp_path, "cpu", silent)
    assert right == accuracy(network, held_out.x, held_out.y) > max(0.8, before)
    assert judge.classifier is network and not network.training


def test_samples_are_judged_as_files_would_hold_them(seen):
    """Bytes: what lies outside [-1, 1] or between two levels is no merit and no fault."""
    of = seen("classifier")
    shifted = real(60) + 0.3 / 127.5
    shifted[shifted > 1] = 7.0
    for name, measure in MEASURES.items():
        of_shifted, of_real = (
            {key: found._replace(detail=None) for key, found in measure(drawn(x, of), of).items()}
            for x in (shifted, real(60))
        )
        assert of_shifted == of_real, name
    one, other = (quality.by_regression(Samples(x, x.new_zeros(0, 0), None), data()) for x in (real(60), shifted))
    assert one == other


def test_a_damaged_judge_is_no_riddle(tmp_path, monkeypatch):
    monkeypatch.setattr(quality, "train_judge", untrained)
    judge_of(data(), classifier(), tmp_path, "cpu", silent)
    (kept,) = tmp_path.glob("*.safetensors")
    kept.write_bytes(b"damaged")
    with pytest.raises(ValueError, match="stripes-"):
        judge_of(data(), classifier(), tmp_path, "cpu", silent)


def test_data_without_labels_have_no_judge(tmp_path):
    with pytest.raises(ValueError, match="stripes has no labels, and this measure needs them"):
        judge_of(data(labels=False), classifier(), tmp_path, "cpu", silent)
    with pytest.raises(ValueError, match="stripes has no labels, and this measure needs them"):
        quality.by_regression(Samples(real(9), torch.zeros(0, 0), None), data(labels=False))
    assert list(tmp_path.iterdir()) == []


def test_data_on_another_device_are_measured_all_the_same(tmp_path, quick):
    """Training leaves images and labels where the network was."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device here")
    moved = data().to("cuda")
    of = Real(moved, judge_of(moved, classifier(), tmp_path, "cuda", silent)[0], tmp_path / "features")
    assert of.train.device.type == "cpu" and quality.has_classes(moved)
    for measure in MEASURES.values():
        measure(drawn(real(70), of, pictures(70)[1]), of)
