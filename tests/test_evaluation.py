"""ddpm/evaluation.py: what is measured, under which name, and against what."""

import functools
import json

import pytest
import torch
from torch import Tensor, nn

from ddpm import evaluation
from ddpm.data import ImageData
from ddpm.evaluation import measure_frechet, measure_recognition, record
from ddpm.metrics.judge import accuracy, train_judge
from models.classifier import Classifier


def pictures(n: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Bytes (n, 1, 8, 8) of three classes that are easy to tell apart: a bright third of the rows, with noise."""
    draw = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % 3
    x = torch.randint(0, 90, (n, 1, 8, 8), generator=draw)
    for label in range(3):
        x[y == label, :, 2 * label : 2 * label + 3] += 150
    return x.to(torch.uint8), y


def data(n: int = 240, labels: bool = True, validation: float = 0.25, seed: int = 0) -> ImageData:
    x, y = pictures(n, seed)
    return ImageData("stripes", "all", x, y if labels else None, validation=validation)


def real(n: int) -> Tensor:
    """Samples as good as they get."""
    return pictures(n, seed=5)[0].float() / 127.5 - 1


def classifier(seed: int = 0, **options: int) -> nn.Module:
    torch.manual_seed(seed)
    return Classifier(
        **{"image_size": (8, 8), "in_channels": 1, "num_classes": 3, "channels": 8, "features": 16, **options}
    )


@pytest.fixture
def thorough(monkeypatch):
    """Few images need more passes than the thousands that a judge is made for."""
    monkeypatch.setattr(evaluation, "train_judge", functools.partial(train_judge, epochs=20, batch_size=45))


def noise(n: int) -> Tensor:
    return torch.randn(n, 1, 8, 8, generator=torch.Generator().manual_seed(3))


def test_recognition_tells_images_from_noise():
    protocol, found, values = measure_recognition(real(60), data())
    assert protocol == "recognition_logistic_60_train"
    assert values["value"] == found.recognised > 0.9 and values["real_vs_real"] == found.held_out_recognised > 0.9
    assert values["class_shares"] == pytest.approx([1 / 3] * 3, abs=0.1)
    assert values["distance_ratio"] == pytest.approx(1, abs=0.1)
    _, _, bad = measure_recognition(noise(60), data())
    assert bad["distance_ratio"] > 1.5 and bad["real_vs_real"] == values["real_vs_real"]
    json.dumps(values, allow_nan=False)


def test_frechet_puts_images_near_0_and_noise_near_1(tmp_path, thorough):
    protocol, found, values = measure_frechet(real(60), data(), classifier(), tmp_path, lambda line: None)
    assert protocol.startswith("frechet_classifier-") and protocol.endswith("_60_train")
    assert values == {
        "value": found.samples, "real_vs_real": found.held_out, "noise": found.noise, "relative": found.relative
    }  # fmt: skip
    assert abs(values["relative"]) < 0.1 and values["value"] < 0.1 * values["noise"]
    same, _, bad = measure_frechet(noise(60), data(), classifier(), tmp_path, lambda line: None)
    assert same == protocol and bad["relative"] > 0.5
    assert (bad["real_vs_real"], bad["noise"]) == (values["real_vs_real"], values["noise"])
    json.dumps(values, allow_nan=False)


def test_samples_are_judged_as_files_would_hold_them(tmp_path):
    """Bytes: what lies outside [-1, 1] or between two levels is no merit and no fault."""
    plain = measure_frechet(real(60), data(), classifier(), tmp_path, lambda line: None)[2]
    shifted = real(60) + 0.3 / 127.5
    shifted[shifted > 1] = 7.0
    assert measure_frechet(shifted, data(), classifier(), tmp_path, lambda line: None)[2] == plain


def test_the_judge_is_trained_once_and_kept(tmp_path, monkeypatch, thorough):
    told: list[str] = []
    _, _, first = measure_frechet(real(50), data(), classifier(), tmp_path / "judges", told.append)
    (kept,) = (tmp_path / "judges").iterdir()
    assert kept.suffix == ".safetensors" and kept.name.startswith("stripes-")
    assert any("once" in line and str(kept) in line for line in told) and any("%" in line for line in told)

    def never(*arguments: object, **options: object) -> None:
        pytest.fail("trained again")

    monkeypatch.setattr(evaluation, "train_judge", never)
    told.clear()
    _, _, again = measure_frechet(real(50), data(), classifier(seed=9), tmp_path / "judges", told.append)
    assert again == first and not any("training" in line for line in told)
    assert float(told[-1].split("%")[0].split()[-1]) > 90


def untrained(judge: nn.Module, x: Tensor, y: Tensor) -> nn.Module:
    return judge.eval()


@pytest.mark.parametrize(
    "changes",
    [{"data": {"seed": 1}}, {"data": {"n": 243}}, {"judge": {"features": 8}}, {"data": {"validation": 0.5}}],
    ids=["pixels", "number", "judge", "training part"],
)
def test_another_judge_or_another_training_part_has_another_name(changes, tmp_path, monkeypatch):
    """A judge that has seen the images which another run holds out would flatter them."""
    monkeypatch.setattr(evaluation, "train_judge", untrained)
    names = {
        measure_frechet(real(20), data(**d), classifier(**j), tmp_path, lambda line: None)[0]
        for d, j in (({}, {}), (changes.get("data", {}), changes.get("judge", {})))
    }
    assert len(names) == 2 and len(list(tmp_path.iterdir())) == 2


def test_the_judge_learns_from_the_training_part_alone(tmp_path, monkeypatch):
    seen = []

    def watched(judge: nn.Module, x: Tensor, y: Tensor) -> nn.Module:
        seen.append((x, y))
        return judge.eval()

    monkeypatch.setattr(evaluation, "train_judge", watched)
    source = data()
    measure_frechet(real(20), source, classifier(), tmp_path, lambda line: None)
    ((x, y),) = seen
    expected_x, expected_y = source.batch(source.train)
    assert torch.equal(x, expected_x) and torch.equal(y, expected_y)


def test_a_damaged_judge_is_no_riddle(tmp_path):
    measure_frechet(real(20), data(), classifier(), tmp_path, lambda line: None)
    (kept,) = tmp_path.iterdir()
    kept.write_bytes(b"damaged")
    with pytest.raises(ValueError, match="stripes-"):
        measure_frechet(real(20), data(), classifier(), tmp_path, lambda line: None)


@pytest.mark.parametrize("measure", ["recognition", "frechet"])
@pytest.mark.parametrize(
    ("source", "message"),
    [
        (data(labels=False), "stripes has no labels, and this measure needs them"),
        (data(validation=0), "stripes has no held-out part"),
    ],
    ids=["no labels", "no held-out part"],
)
def test_data_that_cannot_be_measured_against(measure, source, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        if measure == "recognition":
            measure_recognition(real(10), source)
        else:
            measure_frechet(real(10), source, classifier(), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_more_samples_than_held_out_images_are_refused_before_a_judge_is_trained(tmp_path):
    with pytest.raises(ValueError, match=r"n = 61 samples need as many held-out images .* holds out 60"):
        measure_frechet(real(61), data(), classifier(), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_samples_that_are_not_finite_are_named():
    samples = real(10)
    samples[3] = torch.nan
    with pytest.raises(ValueError, match="1 of 10 samples"):
        measure_recognition(samples, data())


def test_results_are_merged_by_protocol(tmp_path):
    record(tmp_path, "one", {"value": 1.0, "n": 5})
    record(tmp_path, "two", {"value": 2.0})
    record(tmp_path, "one", {"value": 3.0})
    assert json.loads((tmp_path / "evaluation.json").read_text()) == {"one": {"value": 3.0}, "two": {"value": 2.0}}
    assert [path.name for path in tmp_path.iterdir()] == ["evaluation.json"]


def test_the_judge_is_worth_its_name(tmp_path, thorough):
    """The classifier that is kept is the trained one."""
    source, judge = data(), classifier()
    before = accuracy(judge, *source.batch(source.held_out))
    measure_frechet(real(20), source, judge, tmp_path, lambda line: None)
    assert accuracy(judge, *source.batch(source.held_out)) > max(0.9, before)
