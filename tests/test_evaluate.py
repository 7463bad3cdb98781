"""`ddpm-evaluate`, from the words that are typed to evaluation.json and the figures; what is refused or kept."""

import json
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import scipy.stats
import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf
from PIL import Image
from torch import Tensor, nn

from ddpm import cli, config
from ddpm.commands.evaluate import evaluating
from ddpm.commands.train import training
from ddpm.data import ImageData
from ddpm.metrics import quality
from ddpm.metrics.features import PCA, Features, Judge
from ddpm.runs import results
from ddpm.sources.trained import TrainedSampler

TINY = [
    "model.channels=8", "model.channel_mults=[1]", "model.groups=4", "model.blocks=1", "model.middle_attention=false",
    "model.attention_resolutions=[]", "schedule.T=10", "sampler.steps=2", "data.validation=0.02", "trainer.steps=4",
    "trainer.seconds=null", "trainer.batch_size=8", "trainer.warmup=0", "trainer.previews=0", "recognition=false",
    "trainer.checkpoint_every=2", "device=cpu",
]  # fmt: skip
POINTS = [
    "experiment=points", "data.count=60", "model.width=16", "model.depth=1", "schedule.T=10", "sampler.steps=2",
    "trainer.steps=4", "trainer.batch_size=8", "trainer.warmup=0", "trainer.previews=0", "device=cpu",
]  # fmt: skip
PCA4 = ["features=pca", "pca=4"]
SMALL_JUDGE = ["features=classifier", "judge.channels=4", "judge.features=4"]
KEYS = {"value", "low", "high", "n", "seeds", "real_vs_real", "weights", "sampler", "steps", "commit", "checkpoint"}


class Result(NamedTuple):
    code: int
    out: str
    err: str


Evaluate = Callable[..., Result]


def train(runs: Path, *words: str, base: list[str] = TINY) -> Path:
    """A run of a few steps; `words` over those of `base`."""
    changed = {word.partition("=")[0] for word in words}
    words = (*(word for word in base if word.partition("=")[0] not in changed), *words)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "_draw_results", lambda *arguments: None)  # which takes longer than such a run
        patch.setattr(sys, "argv", ["train", *words, f"runs={runs}"])
        cli.train()
    (run,) = (runs / "default").iterdir()
    return run


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """Digits, 36 of which are held out; two checkpoints. Tests take a copy."""
    return train(tmp_path_factory.mktemp("trained"))


@pytest.fixture
def run(trained, tmp_path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "there" / "default" / trained.name))


@pytest.fixture
def typed(monkeypatch, capsys) -> Evaluate:
    """`ddpm-evaluate WORDS` in this process, without what Hydra does besides; two steps unless told otherwise."""
    composed: list[Any] = []

    def compose(name: str, overrides: list[str]) -> object:
        composed[:] = [config.compose(name, overrides)]
        task = {"hydra": {"mode": "RUN", "overrides": {"task": list(overrides)}}}
        monkeypatch.setattr(HydraConfig.instance(), "cfg", OmegaConf.create(task))
        return composed[0]

    def typed(run: Path, *words: object) -> Result:
        job: list[Any] = []
        given = [f"run={run}", "sampler.steps=2", *map(str, words)]
        with monkeypatch.context() as patch:
            patch.setattr(sys, "argv", ["evaluate", *given])
            patch.setattr(cli, "_check_composition", lambda name, argv: job.append(compose(name, argv)))
            patch.setattr(cli.hydra, "main", lambda **where: lambda guarded: lambda: guarded(job[0]))
            capsys.readouterr()
            try:
                cli.evaluate()
                code = 0
            except SystemExit as end:
                code = end.code or 0
            return Result(code, *capsys.readouterr())

    return typed


@pytest.fixture(autouse=True)
def learned(monkeypatch) -> list[int]:
    """No judge is trained here; the numbers of images that one would have been trained on."""
    counts: list[int] = []

    def train_judge(judge: nn.Module, x: Tensor, y: Tensor, epochs: int) -> nn.Module:
        counts.append(len(x))
        return judge.eval()

    monkeypatch.setattr(quality, "train_judge", train_judge)
    return counts


@pytest.fixture
def draws(monkeypatch) -> list[tuple[int, int]]:
    """(seed, number of the first) of all samples that are drawn, batch by batch."""
    noted: list[tuple[int, int]] = []
    draw = TrainedSampler.draw

    def note(self: TrainedSampler, numbers: range | list[int], *arguments: Any) -> Tensor:
        noted.append((self.seed, numbers[0]))
        print("drawn")
        return draw(self, numbers, *arguments)

    monkeypatch.setattr(TrainedSampler, "draw", note)
    return noted


def records(run: Path) -> dict[str, dict[str, Any]]:
    path = run / "evaluation.json"
    return json.loads(path.read_text(), parse_constant=pytest.fail) if path.exists() else {}


def assert_refused(result: Result, *told: str) -> None:
    """Exit code 2 and one line that says what is allowed."""
    lines = result.err.strip().splitlines()
    assert result.code == 2 and len(lines) == 1 and lines[0].startswith("error: "), result
    assert "Traceback" not in result.err + result.out
    assert not [word for word in told if word not in lines[0]], lines[0]


def shows_something(path: Path) -> bool:
    picture = np.asarray(Image.open(path).convert("L"))
    return picture.std() > 5 and min(picture.shape) > 100


def pictures(folder: Path, *counts: int) -> list[str]:
    """Grey pictures of noise, so many in each class; returns the words that name them."""
    for y, count in enumerate(counts):
        (folder / str(y)).mkdir(parents=True)
        for i in range(count):
            pixels = np.random.default_rng(100 * y + i).integers(0, 256, (8, 8), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / str(y) / f"{i}.png")
    return ["data=folder", f"data.root={folder}", "data.image_size=8", "data.channels=1", "data.validation=0.25"]


# --------------------------------------------------------------------------------------------------------- all measures


def test_every_measure_of_samples_leaves_its_record_and_its_figure(run, typed, draws):
    metrics = f"metric=[recognition,{','.join((*evaluating.OF_FEATURES, *evaluating.OF_ANY))}]"
    result = typed(run, metrics, "n=16", "batch=7", *PCA4, "frechet.bias=true")
    assert result.code == 0, result
    found = records(run)
    (pca,) = {name.split("_")[1] for name in found if name.startswith("frechet_")}
    assert pca.startswith("pca4-") and found.keys() == {
        "recognition_logistic_16_train",
        *(f"{name}_{pca}_16_train" for name in ("frechet", "kernel", "memorisation", *evaluating.OF_ANY)),
        *(f"{name}_{pca}_16_train" for name in ("precision-k3", "recall-k3", "density-k5", "coverage-k5")),
    }
    for name, record in found.items():
        assert record.keys() >= KEYS and name in result.out
        told = {key: record[key] for key in ("n", "seeds", "weights", "sampler", "steps", "evaluations", "checkpoint")}
        assert told == {
            "n": 16, "seeds": [0], "weights": "ema", "sampler": "DDIM", "steps": 2, "evaluations": 2, "checkpoint": 4
        }  # fmt: skip
        assert record["real_vs_real"] is not None and record["sampler_settings"]["steps"] == 2
    assert found[f"kernel_{pca}_16_train"]["low"] < found[f"kernel_{pca}_16_train"]["high"]
    assert draws == [(0, 0), (0, 7), (0, 14)]  # once for all of them
    assert shows_something(run / "memorisation.png") and shows_something(run / "frechet_bias.png")
    for name in ("memorisation.png", "frechet_bias.png"):
        assert f"wrote {run / name}" in result.out
    assert not (run.parent.parent / "judges").exists()


def test_every_measure_by_a_judge(run, typed, learned):
    metrics = "metric=[recognition,frechet,kernel,precision_recall,density_coverage,memorisation,variety]"
    result = typed(run, metrics, "n=30", *SMALL_JUDGE, "recogniser=classifier")
    assert result.code == 0 and learned == [1761], result
    found = records(run)
    assert len(found) == 9 and {name.split("_")[0] for name in found} >= {"recognition", "frechet", "recall-k3"}
    (name,) = {name.split("_")[1] for name in found}
    assert name.startswith("classifier-") and {record["judge_accuracy"] for record in found.values()} != {None}
    judged = found[f"recognition_{name}_30_train"]
    assert len(judged["class_shares"]) == 10 and "class_accuracy" not in judged


@pytest.mark.slow
def test_every_measure_of_held_out_images_of_steps_and_of_cost(run, typed):
    typed(run, "metric=recognition", "n=16")
    before = records(run)
    words = ["bits_per_dim.steps=2", "log_likelihood.steps=1", "steps.samplers=[ddim,heun]", "steps.steps=[1,3]"]
    words += ["cost.samplers=[dpmpp_2m,ancestral]", "cost.steps=[2]", "batch=8", *PCA4]
    result = typed(run, "metric=[bits_per_dim,log_likelihood,loss_by_snr,steps,cost]", "n=8", *words)
    assert result.code == 0, result
    found = records(run)
    assert found.items() > before.items()
    new = {name: record for name, record in found.items() if name not in before}
    assert not [name for name, record in new.items() if not record.keys() >= KEYS or name not in result.out]
    assert all(record["checkpoint"] == 4 for record in new.values())
    kinds = {name.split("_")[0]: record for name, record in new.items()}
    assert len(new) == 5 and kinds.keys() == {"bits", "loss", "steps", "cost"}

    assert kinds["loss"]["seeds"] == [] and kinds["loss"]["n"] == 8 and len(kinds["loss"]["eps"]) == 20
    assert kinds["loss"]["sampler"] is None and kinds["loss"]["steps"] == kinds["loss"]["evaluations"] > 0
    assert (run / "loss_by_snr.csv").read_text().startswith("log_snr,x_0_mse,eps_mse\n")

    cells = kinds["steps"]["cells"]
    assert [(c["sampler"], c["steps"], c["spacing"]) for c in cells] == [
        ("ddim", 1, "uniform"), ("ddim", 3, "uniform"), ("heun", 1, "uniform"), ("heun", 3, "uniform")
    ]  # fmt: skip
    assert [c["evaluations"] for c in cells] == [1, 3, 1, 5] and kinds["steps"]["seeds"] == [0]
    assert kinds["steps"]["value"] == min(c["value"] for c in cells) and kinds["steps"]["real_vs_real"] > 0

    cost = kinds["cost"]
    assert (cost["n"], cost["seeds"], cost["sampler"], cost["steps"]) == (8, [], "dpmpp_2m 2", 2)
    assert cost["evaluations"] == {"dpmpp_2m 2": 2, "ancestral 2": 2} and cost["value"] > 0
    assert cost["training_batch"] == 8 and cost["machine"]["device"] == "cpu" and cost["peak_memory_bytes"] > 0
    for name in ("bits_per_dim.png", "loss_by_snr.png", "steps.png"):
        assert shows_something(run / name) and f"wrote {run / name}" in result.out


def test_pixels_are_features_too_and_more_samples_than_held_out_images_are_measured(run, typed):
    result = typed(run, "metric=[frechet,kernel]", "n=65", "features=pixels")
    assert result.code == 0 and "36 images are held out" in result.out, result
    found = records(run)
    assert found.keys() == {"frechet_pixels_65_train", "kernel_pixels_65_train"}
    assert all(record["n"] == 65 and record["real_n"] == 36 for record in found.values())


@pytest.mark.slow
def test_points_are_measured_by_their_coordinates(tmp_path, typed, draws):
    run = train(tmp_path / "runs", base=POINTS)
    both = "metric=[sliced_wasserstein,energy_distance]"
    result = typed(run, both, "n=16", "seeds=2")
    assert result.code == 0 and [seed for seed, _ in draws] == [0, 1], result
    assert "16 samples, seeds 0 to 1, DDIM with 2 steps; features of them and of 60 points by coordinates" in result.out
    assert "held-out points" in result.out and "12 of them" in result.out
    found = records(run)
    assert found.keys() == {f"{name}_coordinates_16_train" for name in evaluating.OF_ANY}
    for record in found.values():
        assert record.keys() >= KEYS and record["real_n"] == 12 and record["seeds"] == [0, 1]
        assert record["interval"] == "seeds" and record["low"] < record["value"] < record["high"]
    assert typed(run, both).code == 0
    for name in evaluating.OF_ANY:
        record = records(run)[f"{name}_coordinates_12_train"]
        assert record["interval"] == "jackknife" and record["low"] < record["value"] < record["high"]
    assert_refused(typed(run, "metric=frechet"), "metric=frechet needs pictures", "sliced_wasserstein, energy_distance")
    assert_refused(typed(run, "metric=energy_distance", "n=2"), "n = 2", "at least 3")
    words = ["data=gaussians", "model.num_classes=8", "data.count=80", "data.validation=0.5"]
    by_class = train(tmp_path / "classes", *words, base=POINTS)
    assert typed(by_class, both, "n=6", "class=3", "seeds=2").code == 0
    assert records(by_class).keys() == {f"{name}_coordinates_6_train_class3" for name in evaluating.OF_ANY}


def test_what_is_asked_for_twice_is_measured_once(run, typed, draws):
    assert typed(run, "metric=[kernel,recognition,kernel]", "n=8", *PCA4).code == 0
    assert len(draws) == 1 and not [record for record in records(run).values() if "values" in record]


@pytest.mark.slow
def test_the_plan_is_told_before_anything_is_done(run, typed, draws):
    words = ["bits_per_dim.steps=2", "steps.samplers=[ddim]", "steps.steps=[1,3]", *PCA4]
    result = typed(run, "metric=[recognition,kernel,bits_per_dim,steps]", "n=8", "seeds=2", *words)
    plan, _, done = result.out.partition("drawn")
    assert result.code == 0 and plan.startswith("plan:\n") and len(plan.splitlines()) == 5 and "train:" in done
    assert "recognition, kernel: 8 samples, seeds 0 to 1, DDIM with 2 steps; features of them and of 1,797" in plan
    assert "bits_per_dim: 8 held-out images, 16 evaluations" in plan
    assert "steps: 8 samples, seeds 0 to 1, in each of 2 ways" in plan
    assert f"{2 * 8 * 2 + 16 + 2 * 8 * 4} evaluations, counted by image; about 0:0" in plan
    assert len(draws) == 2 + 2 * 2


def test_no_larger_batch_is_timed_for_the_plan_than_is_drawn(run, typed, monkeypatch):
    asked: list[int] = []
    monkeypatch.setattr("ddpm.training.cost.evaluation_seconds", lambda source, batch: asked.append(batch) or 1.0)
    typed(run, "metric=recognition", "n=3", "sampler.steps=1")
    typed(run, "metric=recognition", "n=30", "batch=5", "sampler.steps=1")
    typed(run, "metric=recognition", "n=260", "sampler.steps=1")
    assert asked == [3, 5, 256]


# --------------------------------------------------------------------------------------------------------------- seeds


def test_several_seeds_give_a_mean_and_its_interval(run, typed, draws):
    result = typed(run, "metric=[recognition,frechet,memorisation]", "n=8", "seed=5", "seeds=3", *PCA4)
    assert result.code == 0 and [seed for seed, _ in draws] == [5, 6, 7], result
    for name, record in records(run).items():
        values = record["values"]
        assert record["seeds"] == [5, 6, 7] and len(values) == 3 and record["value"] == pytest.approx(np.mean(values))
        if len(set(values)) > 1:
            interval = scipy.stats.t.interval(0.95, 2, np.mean(values), scipy.stats.sem(values))
            assert (record["low"], record["high"]) == pytest.approx(interval)
            assert f"95% over 3 seeds: {interval[0]:.4g} to {interval[1]:.4g}" in result.out
        if name.startswith("frechet"):
            each = values
    alone = typed(run, "metric=frechet", "n=8", "seed=6", *PCA4)
    (record,) = (record for name, record in records(run).items() if name.startswith("frechet"))
    assert alone.code == 0 and record["value"] == each[1] and "values" not in record
    assert record["low"] < record["value"] < record["high"] and record["interval"] == "jackknife"


def test_the_protocols_compose():
    full, quick = (config.compose("evaluate", ["run=x", *words]) for words in (["protocol=full"], []))
    assert (full.n, full.seeds, quick.n, quick.seeds) == (10000, 3, None, 1)
    assert {*full.metric, "variety"} == set(evaluating.OF_SAMPLES) and list(quick.metric) == ["recognition", "frechet"]
    changed = config.compose("evaluate", ["run=x", "protocol=full", "n=100", "metric=kernel"])
    assert (changed.n, changed.seeds, changed.metric) == (100, 3, "kernel")


# ---------------------------------------------------------------------------------------------------- what is kept


def test_a_second_call_trains_no_judge_and_computes_no_features_again(run, typed, learned, monkeypatch):
    counted: list[int] = []
    of = Judge._of
    monkeypatch.setattr(Judge, "_of", lambda self, images: counted.append(len(images)) or of(self, images))
    words = ["metric=kernel", "n=8", *SMALL_JUDGE]
    assert typed(run, *words).code == 0
    assert learned == [1761] and sum(counted) == 1797 + 8
    before = records(run)
    counted.clear()
    result = typed(run, *words)
    assert result.code == 0 and learned == [1761] and sum(counted) == 8 and "training the judge" not in result.out
    assert records(run) == before
    (kept,) = (run.parent.parent / "judges" / "features").iterdir()
    kept.write_bytes(kept.read_bytes()[:-1])
    counted.clear()
    result = typed(run, *words)
    assert result.code == 0 and sum(counted) == 1805 and f"{kept} is damaged and will be made again" in result.out
    assert records(run) == before


def test_another_run_on_the_same_data_shares_the_judge_and_the_features(run, typed, learned, monkeypatch):
    other = Path(shutil.copytree(run, run.with_name("other")))
    typed(run, "metric=kernel", "n=8", *SMALL_JUDGE)
    monkeypatch.setattr(quality.Real, "_computed", lambda self: pytest.fail("computed again"))
    assert typed(other, "metric=kernel", "n=8", *SMALL_JUDGE).code == 0 and learned == [1761]
    assert records(other) == records(run)


def test_principal_components_of_another_training_part_have_another_name(run, typed):
    def name() -> str:
        assert typed(run, "metric=kernel", "n=8", *PCA4).code == 0
        return next(iter(records(run)))

    first = name()
    settings = OmegaConf.load(run / "config.yaml")
    settings.data.validation = 0.1
    OmegaConf.save(settings, run / "config.yaml")
    (run / "evaluation.json").unlink()
    assert name() != first


# ---------------------------------------------------------------------------------------------------- steps

GRID = ["metric=steps", "n=6", *PCA4, "steps.samplers=[ddim,heun]", "steps.steps=[1,2]"]


def cells(run: Path) -> list[tuple[str, int]]:
    (record,) = (record for name, record in records(run).items() if name.startswith("steps_frechet_"))
    return [(cell["sampler"], cell["steps"]) for cell in record["cells"]]


@pytest.fixture
def stop(draws, monkeypatch) -> Iterator[Callable[[int, BaseException], None]]:
    """From the given draw on, drawing raises."""
    noted = TrainedSampler.draw

    def stop(after: int, error: BaseException) -> None:
        def draw(self: TrainedSampler, *arguments: Any) -> Tensor:
            if len(draws) == after:
                raise error
            return noted(self, *arguments)

        monkeypatch.setattr(TrainedSampler, "draw", draw)

    yield stop


@pytest.mark.slow
@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("out of memory")], ids=["interrupt", "error"])
def test_a_table_of_steps_that_was_interrupted_is_gone_on_with(error, run, typed, draws, stop, monkeypatch):
    stop(1, error)
    if isinstance(error, KeyboardInterrupt):
        assert typed(run, *GRID).code == 130
    else:
        with pytest.raises(type(error)):
            typed(run, *GRID)
    assert cells(run) == [("ddim", 1)] and len(draws) == 1
    stop(-1, error)
    draws.clear()
    result = typed(run, *GRID)
    assert result.code == 0 and len(draws) == 3, result
    assert cells(run) == [("ddim", 1), ("ddim", 2), ("heun", 1), ("heun", 2)]
    assert "4 combinations" in result.out and shows_something(run / "steps.png")
    once = records(run)
    (run / "evaluation.json").unlink()
    typed(run, *GRID)
    assert records(run) == once


@pytest.mark.slow
def test_a_table_of_steps_grows_and_what_is_there_is_not_drawn_again(run, typed, draws):
    typed(run, *GRID)
    draws.clear()
    assert typed(run, *GRID).code == 0 and draws == []
    assert (
        typed(run, *GRID, "steps.steps=[2,3]", "steps.samplers=[heun]", "steps.spacing=[uniform,quadratic]").code == 0
    )
    assert len(draws) == 3 and len(cells(run)) == 7


@pytest.mark.slow
@pytest.mark.parametrize("change", ["weights=raw", "checkpoint=2", "seed=1"])
def test_another_network_or_seed_starts_the_table_of_steps_anew(change, run, typed, draws):
    typed(run, *GRID)
    before = records(run)
    draws.clear()
    assert typed(run, *GRID[:-1], "steps.steps=[2]", change).code == 0
    assert len(draws) == 2 and cells(run) == [("ddim", 2), ("heun", 2)]
    assert records(run).keys() == before.keys()
    kept = {cell["value"] for record in before.values() for cell in record["cells"]}
    assert not kept & {cell["value"] for record in records(run).values() for cell in record["cells"]}


@pytest.mark.slow
def test_other_numbers_of_samples_and_other_features_have_tables_of_their_own(run, typed):
    for words in ([], ["n=7"], ["pca=3"]):
        assert typed(run, *GRID, "steps.steps=[1]", *words).code == 0
    assert len(records(run)) == 3 and {len(record["cells"]) for record in records(run).values()} == {2}


@pytest.mark.slow
def test_the_walk_that_is_typed_does_not_hinder_what_has_none_or_its_own(run, typed):
    """The default walk is longer than the ten steps of this schedule."""
    words = [
        "bits_per_dim.steps=1",
        "steps.samplers=[ddim]",
        "steps.steps=[1]",
        "cost.samplers=[ddim]",
        "cost.steps=[1]",
    ]
    result = typed(run, "metric=[bits_per_dim,steps,cost]", "sampler.steps=50", "n=6", "batch=4", *words, *PCA4)
    assert result.code == 0 and len(records(run)) == 3, result


# ------------------------------------------------------------------------------------------------------- classes


@pytest.mark.slow
def test_a_network_with_classes_is_asked_for_each_and_judged_by_them(tmp_path, typed):
    run = train(tmp_path / "runs", "model.num_classes=10")
    for recogniser in ("logistic", "classifier"):
        words = ["metric=recognition", "n=12", f"recogniser={recogniser}", *SMALL_JUDGE]
        result = typed(run, *words)
        assert result.code == 0 and "of the requested class" in result.out, result
    assert len(records(run)) == 2
    for record in records(run).values():
        right = record["class_accuracy"]
        assert len(right) == 10 and 0 <= record["accuracy"] <= 1
        assert record["accuracy"] == pytest.approx(sum(r * (2 if k < 2 else 1) for k, r in enumerate(right)) / 12)
    assert typed(run, "metric=recognition", "n=4", "seeds=2").code == 0
    few = records(run)["recognition_logistic_4_train"]
    assert few["class_accuracy"][4:] == [None] * 6 and None not in few["class_accuracy"][:4]


def test_small_images_are_recognised_by_regression_and_others_by_the_judge(run, typed, monkeypatch):
    assert typed(run, "metric=recognition", "n=8", *SMALL_JUDGE).code == 0
    monkeypatch.setattr(evaluating, "FEW_PIXELS", 63)
    assert typed(run, "metric=recognition", "n=8", *SMALL_JUDGE).code == 0
    logistic, judged = records(run)
    assert logistic == "recognition_logistic_8_train" and judged.startswith("recognition_classifier-")


@pytest.mark.slow
def test_pictures_without_classes_are_measured_by_other_features(tmp_path, typed):
    words = pictures(tmp_path / "pictures", 24)
    words[1] += "/0"
    run = train(tmp_path / "runs", *words)
    assert typed(run, "metric=[frechet,kernel,memorisation]", *PCA4).code == 0
    assert {record["n"] for record in records(run).values()} == {6}
    assert_refused(typed(run, "metric=kernel"), "has no labels", "features=inception, pca and pixels do not")
    assert_refused(typed(run, "metric=recognition", *PCA4), "has no labels")


# -------------------------------------------------------------------------------------------------------- wrong input

WRONG = {
    "features=x": ["features=x", "classifier, inception, pca, pixels"],
    "features=x metric=recognition": ["features=x"],  # which regression does not need
    "features=null": ["features=None"],
    "recogniser=x": ["recogniser=x", "auto, classifier, logistic"],
    "recogniser=x metric=kernel": ["recogniser=x"],
    "features=pca pca=0": ["features=pca", "pca = 0", "from 1 to 64"],
    "features=pca pca=1000": ["pca = 1000", "from 1 to 64"],
    "features=pca pca=true": ["pca = True"],
    "seeds=0": ["seeds=0", ">= 1"],
    "seeds=1.5": ["seeds=1.5"],
    "seeds=null": ["seeds=None"],
    "n=-1": ["n=-1"],
    "protocol=nope": ["protocol", "full", "quick"],
    "metric=[]": ["metric="],
    "metric=[frechet,fid]": ["fid", "density_coverage, memorisation"],
    "metric=null": ["metric=None"],
    "metric=steps steps.samplers=[nosuch]": ["nosuch", "ancestral"],
    "metric=steps steps.samplers=ddim": ["steps.samplers=ddim must be a list"],
    "metric=steps steps.samplers=[]": ["steps.samplers=[] must be a list", "[ddim,heun]"],
    "metric=steps steps.steps=[]": ["steps.steps=[] must be a list", "[10,50]"],
    "metric=steps steps.steps=[1,11]": ["steps, ddim", "1..10"],
    "metric=steps steps.steps=[x]": ["steps, ddim", "'x'"],
    "metric=steps steps.spacing=[odd]": ["steps, ddim", "odd"],
    "metric=steps steps.spacing=[]": ["steps.spacing=[] must be a list", "karras"],
    "metric=steps steps.samplers=[ddim] steps.steps=[2] n=4": ["n = 4", "at least 5"],
    "metric=steps steps=null": ["steps=None must hold settings"],
    "metric=cost cost.samplers=[]": ["cost.samplers=[] must be a list"],
    "metric=cost cost.steps=[0]": ["cost, ddim", "0"],
    "metric=cost cost.steps=[99]": ["1..10"],
    "frechet.bias=perhaps": ["frechet.bias=perhaps must be true or false"],
    "frechet.bias=true features=pixels n=65": ["36 held-out images", "64 features", "at least 65"],
    "frechet=null": ["frechet=None must hold settings"],
    "metric=frechet n=4": ["n = 4", "4 features", "at least 5", "metric=kernel"],
    "metric=kernel n=2": ["n = 2", "at least 3"],
    "metric=precision_recall n=3": ["at least 4"],
    "metric=density_coverage n=5": ["at least 6"],
    "metric=memorisation n=1": ["at least 2"],
    "judge.features=0 features=classifier": ["judge"],
    "data.root=/no/such/folder": ["root"],
}


@pytest.mark.parametrize("given", WRONG)
def test_wrong_input_is_told_before_anything_is_drawn_or_trained(given, run, typed, learned, monkeypatch):
    before = [*PCA4, "metric=[kernel,frechet]", "n=8"]
    results.record(run, "kernel_pca_8_train", {"value": 1.0})
    content = (run / "evaluation.json").read_bytes()
    monkeypatch.setattr("ddpm.diffusion.GaussianDiffusion.output", lambda *arguments: pytest.fail("evaluated"))
    changed = {word.partition("=")[0] for word in given.split()}
    base = [word for word in before if word.partition("=")[0] not in changed]
    assert_refused(typed(run, *base, *given.split()), *WRONG[given])
    assert (run / "evaluation.json").read_bytes() == content and learned == []


SMALL: dict[str, tuple[tuple[int, ...], str, list[str]]] = {
    "one class": ((24,), "metric=recognition", ["one class only"]),
    "one class, by the judge": ((24,), "metric=recognition recogniser=classifier features=classifier", ["one class"]),
    "one image held out": ((2, 2), "metric=memorisation", ["1 images are held out", "at least 2"]),
    "two images held out": ((4, 4), "metric=kernel", ["2 images are held out", "at least 3"]),
    "three images held out": ((6, 6), "metric=precision_recall", ["3 images are held out", "at least 4"]),
    "few to train on": ((6, 6), "metric=frechet pca=64", ["pca = 64", "from 1 to 8"]),
    "fewer than features": ((6, 6), "metric=frechet features=pixels", ["9 training images", "64 features", "pca="]),
    "steps of one image": ((2, 2), "metric=steps steps.steps=[2] pca=1", ["1 images are held out", "at least 2"]),
}


@pytest.mark.slow
@pytest.mark.parametrize("which", SMALL)
def test_data_that_are_too_few_are_refused_before_anything_is_drawn(which, tmp_path, typed, monkeypatch):
    counts, words, told = SMALL[which]
    run = train(tmp_path / "runs", *pictures(tmp_path / "pictures", *counts), "trainer.steps=1")
    monkeypatch.setattr("ddpm.diffusion.GaussianDiffusion.output", lambda *arguments: pytest.fail("evaluated"))
    changed = {word.partition("=")[0] for word in words.split()}
    base = [word for word in ("features=pca", "pca=2", "n=70") if word.partition("=")[0] not in changed]
    assert_refused(typed(run, *base, *words.split()), *told)
    assert not (run / "evaluation.json").exists()


@pytest.mark.slow
def test_the_fewest_images_that_will_do(tmp_path, typed):
    run = train(tmp_path / "runs", *pictures(tmp_path / "pictures", 12, 12), "trainer.steps=1")
    metrics = "metric=[recognition,frechet,kernel,precision_recall,density_coverage,memorisation]"
    result = typed(run, metrics, "n=6", *PCA4)
    assert result.code == 0 and len(records(run)) == 8, result
    assert typed(run, "metric=recognition", "n=1").code == 0
    two = train(tmp_path / "two", *pictures(tmp_path / "a", 4, 4), "trainer.steps=1")
    assert typed(two, "metric=[frechet,memorisation]", "features=pca", "pca=2").code == 0
    assert {record["n"] for name, record in records(two).items()} == {3}  # one more than features


def test_samples_that_are_not_finite_are_counted_and_nothing_is_written(run, typed, monkeypatch):
    draw = TrainedSampler.draw

    def broken(self: TrainedSampler, *arguments: Any) -> Tensor:
        x = draw(self, *arguments)
        x[:3, 0, 0, 0] = torch.nan
        return x

    monkeypatch.setattr(TrainedSampler, "draw", broken)
    steps = ["steps.samplers=[ddim]", "steps.steps=[1]"]
    for metric in ("recognition", "frechet", "steps"):
        result = typed(run, f"metric={metric}", "n=8", *PCA4, *steps)
        assert_refused(result, f"metric={metric}: 3 of 8 samples hold NaN or infinity")
    assert not (run / "evaluation.json").exists()


def test_a_folder_of_judges_that_cannot_be_written_to_is_told(run, typed):
    (run.parent.parent / "judges").write_text("a file")
    assert_refused(typed(run, "metric=kernel", "n=8", *SMALL_JUDGE), "features=classifier", "judges")


def test_features_that_need_a_package_say_which(run, typed, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    assert_refused(typed(run, "metric=kernel", "n=8", "features=inception"), "pip install 'ddpm-ablations[fid]'")


@pytest.mark.slow
def test_what_is_measured_does_not_depend_on_what_was_measured_before(run, typed, monkeypatch):
    """The data of a process are read once and shared; components are found anew."""
    made: list[PCA] = []
    init = PCA.__init__

    def noted(self: PCA, *arguments: Any) -> None:
        init(self, *arguments)
        made.append(self)

    monkeypatch.setattr(PCA, "__init__", noted)
    words = ["metric=[frechet,memorisation]", "n=8", *PCA4]
    typed(run, *words)
    before = records(run)
    typed(run, "metric=cost", "cost.samplers=[ddim]", "cost.steps=[1]", "batch=4")
    (run / "evaluation.json").unlink()
    typed(run, *words)
    assert records(run) == before and len(made) == 2 and issubclass(PCA, Features)
    assert results.recorded(run / "evaluation.json") == before


def test_a_classifier_recognises_whatever_others_look_at(run, typed):
    result = typed(run, "metric=[recognition,kernel]", "n=16", *SMALL_JUDGE, "recogniser=classifier", "features=pixels")
    assert result.code == 0, result
    names = {name.rpartition("_16_")[0].partition("-")[0] for name in records(run)}
    assert {"recognition_classifier", "kernel_pixels"} <= names


@pytest.mark.slow
def test_results_by_other_settings_are_kept_and_those_of_fewer_seeds_give_way(run, typed):
    for words in ([], ["weights=raw"], ["weights=raw", "seeds=2"], []):
        assert typed(run, "metric=kernel", "n=11", "features=pixels", *words).code == 0
    last = records(run)["kernel_pixels_11_train"]
    assert (last["weights"], last["seeds"]) == ("ema", [0])
    assert [(old["weights"], old["seeds"]) for old in last["before"]] == [("raw", [0, 1])]


def test_other_data_than_those_of_training_are_told_of(run, typed, monkeypatch):
    assert "warning: digits is not what was trained on" not in typed(run, "metric=kernel", "n=5", "features=pixels").out
    identity = ImageData.identity
    monkeypatch.setattr(ImageData, "identity", lambda data: identity(data) | {"sha256": "0" * 64})
    told = typed(run, "metric=kernel", "n=5", "features=pixels").out
    assert "warning: digits is not what was trained on: 1,797 images of sha256 000000000000, not 1797 of" in told


def test_a_measure_that_fails_takes_no_other_with_it(run, typed, monkeypatch):
    def fails(*arguments: object) -> None:
        raise ValueError("copies of copies")

    monkeypatch.setitem(quality.MEASURES, "memorisation", fails)
    result = typed(run, "metric=[memorisation,kernel]", "n=12", "features=pixels")
    assert result.code == 2 and result.err == "error: metric=memorisation: copies of copies\n"
    assert "kernel_pixels_12_train" in records(run)


def test_a_seed_of_which_a_measure_fails_is_not_among_its_seeds(run, typed, monkeypatch):
    kernel, calls = quality.MEASURES["kernel"], []

    def fails_once(*arguments: object) -> object:
        calls.append(1)
        if len(calls) == 2:
            raise ValueError("no luck")
        return kernel(*arguments)

    monkeypatch.setitem(quality.MEASURES, "kernel", fails_once)
    assert typed(run, "metric=kernel", "n=13", "seeds=3", "features=pixels").code == 2
    assert records(run)["kernel_pixels_13_train"]["seeds"] == [0, 2]
