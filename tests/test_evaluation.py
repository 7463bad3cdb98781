"""ddpm/evaluation.py: what is measured, under which name, and against what."""

import csv
import functools
import json
import math
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from ddpm import cli, evaluation
from ddpm.data import ImageData
from ddpm.diffusion import GaussianDiffusion
from ddpm.evaluation import (
    bound_times,
    measure_bits_per_dim,
    measure_frechet,
    measure_log_likelihood,
    measure_recognition,
    must_hold_out,
    record,
)
from ddpm.metrics.judge import accuracy, train_judge
from ddpm.samplers import DDIM
from ddpm.sampling import Source
from ddpm.schedules import linear
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
    assert float(told[-1].split("%")[0].split()[-1]) > 80


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
    assert accuracy(judge, *source.batch(source.held_out)) > max(0.8, before)


# ---------------------------------------------------------------------------------------- likelihood of held-out images


class Shrinks(nn.Module):
    """Says of x_t that a share of it is noise, another share for each class if it takes any. Notes what it is asked."""

    def __init__(self, num_classes: int | None = None):
        super().__init__()
        self.num_classes, self.asked = num_classes, []

    def forward(self, x_t: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        assert not self.training
        self.asked.append((t, y))
        return x_t * (0.9 if y is None else 0.8 + 0.05 * y.reshape(-1, 1, 1, 1))


def source(seed: int = 0, **options: object) -> Source:
    return Source(GaussianDiffusion(linear(50)), Shrinks(**options), DDIM(2), (1, 8, 8), seed, torch.device("cpu"))


def flow_bits(n: int, batch: int, seed: int = 0) -> tuple[str, str, dict]:
    return measure_log_likelihood(source(seed), data(), n, 3, 2, 1.0, batch)


def test_bits_per_dim_of_held_out_images():
    counted: list[int] = []
    protocol, found, values, bound = measure_bits_per_dim(
        source(), data(), 10, bound_times(50, None), 4, counted.append
    )
    assert protocol == "bits_per_dim_vlb_50of50_10_held_out" and sum(counted) == 500
    assert bound.terms.shape == (10, 50) and bound.L_T.shape == (10,)
    assert values["value"] == pytest.approx(values["L_T"] + values["L_t_1"] + values["L_0"])
    total = bound.total
    half = 1.96 * total.std().item() / math.sqrt(10)
    assert [values[k] for k in ("value", "low", "high")] == pytest.approx(
        [total.mean().item(), total.mean().item() - half, total.mean().item() + half]
    )
    assert f"{values['value']:.4f} bits/dim" in found and "t <= " in found and values["n"] == 10
    json.dumps(values, allow_nan=False)

    short, _, _, few = measure_bits_per_dim(source(), data(), 10, bound_times(50, 4), 4)
    assert short == "bits_per_dim_vlb_4of50_10_held_out" and few.times == (12, 25, 38, 50)


def test_likelihoods_do_not_depend_on_the_batch_but_on_the_seed():
    terms = [measure_bits_per_dim(source(s), data(), 9, [1, 50], b)[3].terms for s, b in ((0, 9), (0, 2), (1, 9))]
    torch.testing.assert_close(terms[0], terms[1])
    assert not torch.allclose(terms[0], terms[2])
    values = [flow_bits(9, b, s)[2]["value"] for s, b in ((0, 9), (0, 2), (1, 9))]
    assert values[0] == pytest.approx(values[1], rel=1e-6) and abs(values[0] - values[2]) > 1e-6


def test_the_images_are_held_out_and_spread_over_all_of_them(monkeypatch):
    seen, given = [], data()
    function = evaluation.bits_per_dim
    monkeypatch.setattr(evaluation, "bits_per_dim", lambda *a, **k: seen.append(a[2:]) or function(*a, **k))
    measure_bits_per_dim(source(), given, 7, [1, 50], 100)
    ((x_0, noise),) = seen
    chosen = given.held_out[torch.tensor([0, 10, 20, 30, 39, 49, 59])]
    assert noise.indices == chosen.tolist() and noise.stream == "bits_per_dim"
    assert torch.equal(x_0, given.batch(chosen)[0])


def test_classes_are_those_of_the_images():
    given, network = data(), source(num_classes=3)
    measure_bits_per_dim(network, given, 60, [50], 60)
    ((_, y),) = network.model.asked
    assert torch.equal(y, given.labels[given.held_out])
    unconditional = source()
    measure_bits_per_dim(unconditional, given, 60, [50], 60)
    assert unconditional.model.asked[0][1] is None


def test_bits_of_the_flow():
    protocol, found, values = flow_bits(6, 4)
    assert protocol == "bits_per_dim_flow_rk4_3_t1_probes2_6_held_out"
    assert (values["solver"], values["ode_steps"], values["probes"], values["start"], values["n"]) == (
        "rk4",
        3,
        2,
        1.0,
        6,
    )
    assert "dequantised" in found and values["low"] < values["value"] < values["high"]
    json.dumps(values, allow_nan=False)


def test_one_image_has_no_interval():
    values = flow_bits(1, 1)[2]
    assert values["low"] is None and values["high"] is None and math.isfinite(values["value"])


def test_likelihoods_that_are_not_finite_are_told(monkeypatch):
    monkeypatch.setattr(Shrinks, "forward", lambda self, x_t, t, y=None: x_t * math.nan)
    with pytest.raises(ValueError, match="5 of 5 images"):
        measure_bits_per_dim(source(), data(), 5, [1, 50], 5)
    with pytest.raises(ValueError, match="4 of 4 images"):
        flow_bits(4, 2)


def test_times_of_a_bound():
    assert bound_times(10, None) == bound_times(10, 10) == list(range(1, 11))
    assert bound_times(10, 3) == [3, 7, 10] and bound_times(1000, 1) == [1000]
    for steps in (0, 11, 2.0, True, "3"):
        with pytest.raises(ValueError, match=r"steps = .* 1\.\.10"):
            bound_times(10, steps)


def test_images_that_are_not_held_out():
    must_hold_out(data(labels=False), "bits_per_dim", 60)
    with pytest.raises(ValueError, match=r"n = 61 images, but stripes holds out 60"):
        must_hold_out(data(), "bits_per_dim", 61)
    with pytest.raises(ValueError, match="no held-out part"):
        must_hold_out(data(validation=0), "bits_per_dim", 1)


TINY = [
    "model.channels=8", "model.channel_mults=[1]", "model.groups=4", "model.blocks=1", "model.middle_attention=false",
    "model.attention_resolutions=[]", "sampler.steps=2", "data.validation=0.02", "trainer.steps=2",
    "trainer.seconds=null", "trainer.batch_size=8", "trainer.warmup=0", "trainer.previews=0", "recognition=false",
    "device=cpu",
]  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Callable[..., Path]:
    """The run directory of two steps of training with some words, made once for each."""
    made: dict[tuple[str, ...], Path] = {}

    def train(*words: str) -> Path:
        words = words if any(word.startswith("schedule=") for word in words) else ("schedule.T=10", *words)
        if words not in made:
            runs = tmp_path_factory.mktemp("runs")
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(cli, "_draw_results", lambda *arguments: None)
                patch.setattr(sys, "argv", ["train", *TINY, *words, f"runs={runs}"])
                cli.train()
            (made[words],) = (runs / "default").iterdir()
        return made[words]

    return train


@pytest.fixture
def evaluate(monkeypatch, capsys) -> Callable[..., tuple[int, str, str]]:
    """`ddpm-evaluate` with these words: exit code, what it said and what it complained of."""

    def evaluate(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["evaluate", *map(str, words)])
        capsys.readouterr()
        try:
            cli.evaluate()
            code = 0
        except SystemExit as end:
            code = end.code or 0
        return code, *capsys.readouterr()

    return evaluate


def test_the_command_measures_both_likelihoods(trained, evaluate, tmp_path):
    run = Path(shutil.copytree(trained(), tmp_path / "run"))
    flow = ["log_likelihood.steps=2", "log_likelihood.probes=2"]
    code, out, err = evaluate(f"run={run}", "metric=[bits_per_dim,log_likelihood]", "batch=16", *flow)
    assert code == 0, err
    records = json.loads((run / "evaluation.json").read_text())
    bound, flow = "bits_per_dim_vlb_10of10_36_held_out", "bits_per_dim_flow_rk4_2_t1_probes2_36_held_out"
    assert records.keys() == {bound, flow} and bound in out and flow in out
    for values in records.values():
        assert values.keys() >= {"value", "low", "high", "n", "seeds", "weights", "sampler", "steps", "commit"}
        assert (values["n"], values["seeds"], values["weights"], values["clip_x_0"]) == (36, [0], "ema", True)
    assert records[bound]["steps"] == 10 and records[flow]["steps"] == 8
    assert "360 evaluations of the network" in out and "288 evaluations" in out and "576 of its derivatives" in out
    assert out.index("360 evaluations") < out.index(bound) and "sum of L_{t-1}" in out

    with open(run / "bits_per_dim.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["t"]) for row in rows] == list(range(1, 11))
    assert sum(float(row["bits"]) for row in rows) + records[bound]["L_T"] == pytest.approx(records[bound]["value"])
    assert np.asarray(Image.open(run / "bits_per_dim.png")).std() > 5

    code, out, err = evaluate(f"run={run}", "metric=bits_per_dim", "bits_per_dim.steps=3", "n=5", "weights=raw")
    assert code == 0 and "15 evaluations" in out
    records = json.loads((run / "evaluation.json").read_text())
    assert records["bits_per_dim_vlb_3of10_5_held_out"]["weights"] == "raw" and len(records) == 3


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["metric=bits"], ["metric=bits", "recognition, frechet, bits_per_dim, log_likelihood"]),
        (["metric=bits_per_dim", "n=37"], ["n = 37", "36", "bits_per_dim"]),
        (["metric=log_likelihood", "n=0"], ["n=0"]),
        (["metric=bits_per_dim", "bits_per_dim.steps=11"], ["steps = 11", "1..10"]),
        (["metric=log_likelihood", "log_likelihood.steps=0"], ["steps = 0"]),
        (["metric=log_likelihood", "log_likelihood.start=10"], ["start = 10", "(0, 10)"]),
        (["metric=log_likelihood", "log_likelihood.probes=0"], ["probes=0", ">= 1"]),
        (["metric=[recognition,bits_per_dim]", "bits_per_dim.steps=x"], ["steps = 'x'"]),
    ],
)
def test_wrong_input_is_told_before_anything_is_evaluated(words, told, trained, evaluate, monkeypatch):
    run = trained()
    monkeypatch.setattr("ddpm.diffusion.GaussianDiffusion.output", lambda *arguments: pytest.fail("evaluated"))
    code, _, err = evaluate(f"run={run}", "sampler.steps=2", *words)
    (line,) = err.strip().splitlines()
    assert code == 2 and line.startswith("error: ") and not [word for word in told if word not in line], line
    assert not (run / "evaluation.json").exists() and not (run / "bits_per_dim.png").exists()


def test_data_without_a_held_out_part_and_schedules_without_a_flow(trained, evaluate):
    code, _, err = evaluate(f"run={trained('data.validation=0')}", "metric=bits_per_dim")
    assert code == 2 and "has no held-out part" in err and len(err.strip().splitlines()) == 1
    run = trained("schedule=zero_terminal_snr", "schedule.schedule.T=100", "diffusion.target=v")
    code, _, err = evaluate(f"run={run}", "metric=log_likelihood")
    assert code == 2 and "beta_T = 1" in err and len(err.strip().splitlines()) == 1
