"""ddpm/commands/train/stacking.py: the runs of a sweep that are trained at once, as they are typed."""

import json
import signal
from pathlib import Path

import numpy as np
import pytest
from test_cli import TINY, assert_refused, status, typed, without_pictures, words  # noqa: F401
from test_stack import assert_runs_alike
from test_sweeps import states

from ddpm import cli, config
from ddpm.commands.evaluate import evaluating
from ddpm.commands.train import stacking
from ddpm.runs.directory import Run
from ddpm.sources.stacked import StackedSampler
from ddpm.training.stack import Stack

MEASURED = (
    'evaluation=["metric=frechet features=pca pca=4 n=20 seeds=2 sampler.steps=2 guidance=classifier_free",'
    '"metric=kernel features=pixels n=8 sampler=ancestral sampler.steps=3"]'
)
BASE = ["model.num_classes=10", "task.drop=0.1"]


@pytest.fixture(scope="module")
def form():
    return stacking._form(config.compose("train", BASE))


@pytest.mark.parametrize(
    "typed_too, alike",
    [
        (["seed=3", "optimizer.lr=1e-3", "optimizer.weight_decay=0.1", "optimizer.betas=[0.8,0.9]"], True),
        (["trainer.ema_decay=0.5", "trainer.ema_warmup=4", "task.drop=0.3"], True),
        (["task.drop=0"], False),  # whose network has no learned null
        (["trainer.batch_size=16"], False),
        (["trainer.steps=5"], False),
    ],
)
def test_what_stacks(form, typed_too, alike):
    assert (stacking._form(config.compose("train", [*BASE, *typed_too])) == form) == alike


def test_another_stack_is_refused(typed, tmp_path):  # noqa: F811
    assert_refused(typed(cli.train, *TINY, f"runs={tmp_path / 'runs'}", "stack=all"), "allowed: null, seed")


@pytest.mark.slow
def test_a_stacked_sweep_leaves_what_a_sweep_leaves(typed, tmp_path, without_pictures):  # noqa: F811
    """Names, words, metrics, weights; and it goes on with one more seed, and with what was interrupted elsewhere."""
    sweep = [*TINY, "seed=0,1"]
    together = typed(cli.train, "-m", *sweep, "stack=seed", f"runs={tmp_path / 'together'}")
    assert together.code == 0 and "2 runs at once" in together.out
    assert typed(cli.train, "-m", *sweep, f"runs={tmp_path / 'alone'}").code == 0
    assert states(tmp_path / "together" / "default") == states(tmp_path / "alone" / "default")
    for name in states(tmp_path / "alone" / "default"):
        one, other = (Run(tmp_path / where / "default" / name) for where in ("together", "alone"))
        assert_runs_alike(one, other, 4)
        assert one.status()["job"] == other.status()["job"] and one.status()["stacked"] == 2
        of_one, of_other = (set(run.status()["overrides"]) for run in (one, other))
        assert of_one - of_other == {"stack=seed", f"runs={tmp_path / 'together'}"}
    more = [*TINY, "seed=0,1,2", "stack=seed", f"runs={tmp_path / 'together'}"]
    again = typed(cli.train, "-m", *more)
    assert again.code == 0 and "at once" not in again.out and again.out.count("is done already") == 2


@pytest.mark.slow
def test_a_signal_ends_a_stack_and_the_same_command_goes_on(
    typed,  # noqa: F811
    tmp_path,
    without_pictures,  # noqa: F811
    monkeypatch,
):
    step_of, sweep = Stack.step, ["-m", *TINY, "stack=seed", "seed=0,1,2", f"runs={tmp_path}"]

    def interrupted(self, step, progress):
        if step == 3:
            signal.raise_signal(signal.SIGTERM)
        return step_of(self, step, progress)

    with monkeypatch.context() as patch:
        patch.setattr(Stack, "step", interrupted)
        assert typed(cli.train, *sweep[:-2], "seed=0,1", sweep[-1]).code == 143
    assert set(states(tmp_path / "default").values()) == {"INTERRUPTED"}
    ended = typed(cli.train, *sweep)
    assert ended.code == 0 and "2 runs at once" in ended.out and "no other run is at step 0" in ended.out
    assert list(states(tmp_path / "default").values()) == ["DONE"] * 3


@pytest.mark.slow
def test_an_arm_that_breaks_fails_alone(typed, tmp_path, without_pictures):  # noqa: F811
    """And is not tried once more by the command in which it failed."""
    sweep = [*TINY, "trainer.max_skipped=1", "seed=0,1", "stack=seed"]
    result = typed(cli.train, "-m", *sweep, "retry=true", "optimizer.lr=1e-3,1e30", f"runs={tmp_path}")
    assert result.code == 1 and result.out.count("retry=true tries it again") == 4
    assert sorted(states(tmp_path / "default").values()) == ["DONE"] * 2 + ["FAILED"] * 2
    for name in states(tmp_path / "default"):
        path = tmp_path / "default" / name
        assert (status(path)["state"] == "FAILED") == (path / "autopsy").is_dir()


@pytest.mark.slow
def test_what_does_not_stack_is_trained_one_by_one(typed, tmp_path, without_pictures):  # noqa: F811
    result = typed(cli.train, "-m", *words("trainer.seconds=60"), "seed=0,1", "stack=seed", f"runs={tmp_path}")
    assert result.code == 0 and result.out.count("one by one, because a budget in seconds") == 1
    assert list(states(tmp_path / "default").values()) == ["DONE"] * 2


def numbers(record: object, place: str = "") -> dict[str, object]:
    """What a record holds, by its place in it."""
    if not isinstance(record, dict | list):
        return {place: record}
    inner = record.items() if isinstance(record, dict) else enumerate(record)
    return {key: value for name, part in inner for key, value in numbers(part, f"{place}/{name}").items()}


def evaluated(runs: Path) -> dict[str, dict[str, object]]:
    """By run what was measured."""
    files = (runs / "default").glob("*/evaluation.json")
    return {file.parent.name: numbers(json.loads(file.read_text())) for file in files}


def assert_measured_alike(runs: Path, others: Path) -> None:
    ours, theirs = evaluated(runs), evaluated(others)
    assert ours.keys() == theirs.keys() and len(ours) > 1
    for name, record in ours.items():
        assert record.keys() == theirs[name].keys()
        for place, value in record.items():
            expected = theirs[name][place]
            assert value == (pytest.approx(expected, rel=1e-3, abs=1e-4) if isinstance(value, float) else expected), (
                place
            )


@pytest.fixture
def drawn(monkeypatch) -> list[int]:
    """How many numbers were drawn of several networks at once, each time."""
    counts, draw = [], StackedSampler.draw

    def counting(self, numbers, callback=None):
        counts.append(len(numbers))
        return draw(self, numbers, callback)

    monkeypatch.setattr(StackedSampler, "draw", counting)
    return counts


@pytest.mark.slow
def test_a_stacked_sweep_draws_and_measures_what_a_sweep_does(typed, tmp_path, drawn):  # noqa: F811
    """Pictures and numbers, drawn once for all."""
    sweep = [*words(*BASE, "trainer.checkpoint_every=4"), "seed=0,1", MEASURED]
    together = typed(cli.train, "-m", *sweep, "stack=seed", f"runs={tmp_path / 'together'}")
    assert together.code == 0 and "one by one" not in together.out
    assert drawn == [64, 32, 20, 20, 8]
    assert typed(cli.train, "-m", *sweep, f"runs={tmp_path / 'alone'}").code == 0 and len(drawn) == 5
    assert_measured_alike(tmp_path / "together", tmp_path / "alone")
    for name in states(tmp_path / "alone" / "default"):
        one, other = (np.load(tmp_path / where / "default" / name / "samples.npy") for where in ("together", "alone"))
        assert np.abs(one.astype(int) - other).max() <= 1 and one.std() > 10


@pytest.mark.slow
def test_measuring_that_was_interrupted_goes_on(typed, tmp_path, without_pictures, monkeypatch, drawn):  # noqa: F811
    """With what is left, drawn at once again; what cannot be measured fails in its own job."""
    sweep, evaluate = (
        ["-m", *words(*BASE), "seed=0,1,2", MEASURED, "stack=seed", f"runs={tmp_path}"],
        evaluating.evaluate,
    )
    calls = []

    def interrupted(asked, opened=None):
        calls.append(asked.run)
        if len(calls) == 3:
            signal.raise_signal(signal.SIGTERM)
        evaluate(asked, opened)

    with monkeypatch.context() as patch:
        patch.setattr(evaluating, "evaluate", interrupted)
        assert typed(cli.train, *sweep).code == 143
    assert list(states(tmp_path / "default").values()) == ["DONE"] * 3 and len(evaluated(tmp_path)) == 1
    assert drawn == [20, 20, 8]

    def refused(asked, opened=None):
        if asked.run == calls[2] and "kernel" in asked.metric:
            raise config.InvalidInput("it is not to be measured")
        evaluate(asked, opened)

    with monkeypatch.context() as patch:
        patch.setattr(evaluating, "evaluate", refused)
        again = typed(cli.train, *sweep)
    assert again.code == 1 and "is trained, but not measured by metric=kernel" in again.out
    assert drawn == 2 * [20, 20, 8]
    protocols = {run: {place.split("/")[1] for place in record} for run, record in evaluated(tmp_path).items()}
    assert sorted(map(len, protocols.values())) == [1, 2, 2] and len(protocols[Path(calls[2]).name]) == 1
