"""ddpm/metrics/denoising.py and ddpm/runs/results.py: what is measured of held-out data, by which name, and kept."""

import csv
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
from test_quality import data
from torch import Tensor, nn

from ddpm import cli
from ddpm.commands.train import training
from ddpm.diffusion import GaussianDiffusion
from ddpm.metrics import denoising
from ddpm.metrics.denoising import bound_times, measure_bits_per_dim, measure_log_likelihood, must_hold_out
from ddpm.runs.results import record
from ddpm.samplers import DDIM
from ddpm.schedules import linear
from ddpm.sources.trained import TrainedSampler


def test_results_are_merged_by_protocol(tmp_path):
    record(tmp_path, "one", {"value": 1.0, "n": 5})
    record(tmp_path, "two", {"value": 2.0})
    record(tmp_path, "one", {"value": 3.0})
    assert json.loads((tmp_path / "evaluation.json").read_text()) == {"one": {"value": 3.0}, "two": {"value": 2.0}}
    assert {path.name for path in tmp_path.iterdir()} == {"evaluation.json", "evaluation.lock"}


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


def source(seed: int = 0, **options: object) -> TrainedSampler:
    return TrainedSampler(
        GaussianDiffusion(linear(50)), Shrinks(**options), DDIM(2), (1, 8, 8), seed, torch.device("cpu")
    )


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
    half = 1.959963984540054 * total.std().item() / math.sqrt(10)
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
    function = denoising.bits_per_dim
    monkeypatch.setattr(denoising, "bits_per_dim", lambda *a, **k: seen.append(a[2:]) or function(*a, **k))
    measure_bits_per_dim(source(), given, 7, [1, 50], 100)
    ((x_0, noise),) = seen
    chosen = given.held_out[torch.tensor([0, 10, 20, 30, 39, 49, 59])]
    assert noise.indices == chosen.tolist() and noise.stream == "bits_per_dim"
    assert torch.equal(x_0, given.batch(chosen).x)


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
                patch.setattr(training, "_draw_results", lambda *arguments: None)
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


@pytest.mark.slow
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
    assert "360 evaluations" in out and "288 evaluations, 576 derivatives of the network" in out
    assert "648 evaluations, counted by image" in out
    assert out.index("plan:") < out.index("360 evaluations") < out.index(bound) and "sum of L_{t-1}" in out

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
        (["metric=bits"], ["metric=bits", "recognition, frechet, kernel", "bits_per_dim, log_likelihood, loss_by_snr"]),
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


@pytest.mark.slow
def test_data_without_a_held_out_part_and_schedules_without_a_flow(trained, evaluate):
    code, _, err = evaluate(f"run={trained('data.validation=0')}", "metric=bits_per_dim")
    assert code == 2 and "has no held-out part" in err and len(err.strip().splitlines()) == 1
    run = trained("schedule=zero_terminal_snr", "schedule.schedule.T=100", "diffusion.target=v")
    code, _, err = evaluate(f"run={run}", "metric=log_likelihood")
    assert code == 2 and "beta_T = 1" in err and len(err.strip().splitlines()) == 1
