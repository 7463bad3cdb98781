"""ddpm/study/lr_range.py on curves that are known, and `ddpm-study lr-range` from its words to its files."""

import csv
import math

import pytest
import torch
from PIL import Image
from test_cli import words

from ddpm.commands.study import lr_range
from ddpm.commands.train.prepare import planned
from ddpm.config import InvalidInput, compose
from ddpm.study.lr_range import RangeTest, rates, suggestion
from ddpm.training.ranks import Ranks

# ------------------------------------------------------------------------------------------------- the mathematics


def test_rates_grow_by_the_same_factor_from_the_first_to_the_last():
    walk = rates(1e-6, 1.0, 7)
    assert walk == pytest.approx([10.0**n for n in range(-6, 1)])


@pytest.mark.parametrize("wrong", [(0.0, 1.0, 5), (1.0, 1.0, 5), (1e-3, math.inf, 5), (1e-3, 1.0, 1), (1e-3, 1.0, 2.5)])
def test_rates_that_do_not_grow_are_refused(wrong):
    with pytest.raises(ValueError, match=r"start = |steps = "):
        rates(*wrong)


@pytest.mark.parametrize("wrong", [{"beta": 1.0}, {"beta": -0.1}, {"stop": 1.0}, {"stop": math.inf}])
def test_a_test_without_sense_is_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        RangeTest(**wrong)


def test_the_average_of_equal_losses_is_that_loss_from_the_first_step_on():
    test = RangeTest(beta=0.9)
    for rate in rates(1e-3, 1.0, 10):
        test.add(rate, 3.0)
    assert test.smoothed == pytest.approx([3.0] * 10) and test.ended is None


def test_the_average_weighs_losses_by_their_age():
    test = RangeTest(beta=0.5)
    for rate, loss in zip(rates(1e-3, 1.0, 3), (4.0, 2.0, 1.0), strict=True):
        test.add(rate, loss)
    assert test.smoothed == pytest.approx([4.0, (4 + 2 * 2) / 3, (4 + 2 * 2 + 4 * 1) / 7])


def descended(curvature: float, walk: list[float], beta: float = 0.0) -> RangeTest:
    """Gradient descent on curvature / 2 * w^2, which diverges at rates beyond 2 / curvature."""
    test, w = RangeTest(beta=beta), 1.0
    for rate in walk:
        test.add(rate, curvature / 2 * w**2)
        w -= rate * curvature * w
        if test.ended:
            break
    return test


@pytest.mark.parametrize("curvature", [0.5, 1.0, 40.0])
def test_a_quadratic_is_lowest_where_its_descent_begins_to_diverge(curvature):
    walk = rates(1e-3 / curvature, 100 / curvature, 200)
    test = descended(curvature, walk)
    found, ratio = test.suggestion(), walk[1] / walk[0]
    assert 2 / curvature <= found.minimum <= ratio * 2 / curvature
    assert found.below_minimum == found.minimum / 10
    assert "4 times its lowest" in test.ended and test.rates[-1] < 100 / curvature
    assert found.steepest < 1 / curvature and found.note == ""


def test_the_steepest_fall_of_a_sigmoid_in_log_rate_is_its_middle():
    walk = rates(1e-6, 1.0, 201)
    falling = [1 / (1 + math.exp(3 * (math.log(rate) - math.log(1e-3)))) for rate in walk]
    found = suggestion(walk, falling, half=5)
    assert found.steepest == pytest.approx(1e-3) and found.minimum is None
    assert "still falls at the end: raise range.end" in found.note


@pytest.mark.parametrize("later", [math.nan, math.inf, 100.0])
def test_divergence_at_once_suggests_nothing(later):
    test = RangeTest(beta=0.9)
    for rate, loss in zip(rates(1.0, 10.0, 3), (1.0, later, later), strict=True):
        test.add(rate, loss)
        if test.ended:
            break
    assert len(test.rates) == 2 and test.ended
    found = test.suggestion()
    assert (found.steepest, found.minimum, found.below_minimum) == (None, None, None)
    assert "lower range.start" in found.note


def test_a_loss_that_was_never_finite_suggests_nothing():
    found = suggestion([1.0, 2.0], [math.nan, math.nan])
    assert found.steepest is None and "not finite from the first step on" in found.note


def test_noise_around_a_constant_is_no_fall():
    walk = rates(1e-6, 1.0, 50)
    found = suggestion(walk, [1 + 0.01 * math.sin(7 * i) for i in range(50)])
    assert found.steepest is None and "raise range.end" in found.note


def test_a_loss_that_becomes_infinite_has_its_minimum_before():
    walk = rates(1e-3, 1.0, 8)
    found = suggestion(walk, [8.0, 7.0, 6.0, 5.0, 4.0, 3.0, math.inf, 1.0])
    assert found.minimum == walk[5]


# ----------------------------------------------------------------------------------------------------- the command


def small(tmp_path, *changes: str) -> list[str]:
    return words(f"runs={tmp_path}", "range.steps=12", *changes)


def test_it_writes_a_figure_and_the_numbers_and_no_run(tmp_path, capsys):
    lr_range.lr_range(small(tmp_path, "study=s", "range.start=1e-4", "range.beta=0.5"))
    told = capsys.readouterr().out
    assert sorted(path.name for path in (tmp_path / "s").iterdir()) == ["lr_range.csv", "lr_range.png"]
    assert Image.open(tmp_path / "s" / "lr_range.png").width > 500
    header, *rows = csv.reader((tmp_path / "s" / "lr_range.csv").open())
    assert header == ["step", "lr", "loss", "smoothed"] and float(rows[0][1]) == pytest.approx(1e-4)
    assert f"{len(rows)} of 12 steps of 8 images" in told
    assert ("optimizer.lr=" in told) != ("no learning rate is suggested" in told)


@pytest.mark.slow
def test_a_suggestion_is_told_with_the_words_that_use_it(tmp_path, capsys):
    typed = ["experiment=digits_short", "device=cpu", f"runs={tmp_path}", "optimizer.lr=7", "range.steps=60"]
    lr_range.lr_range([*typed, "trainer.batch_size=16", f"range.out={tmp_path}/a.png"])
    told = capsys.readouterr().out
    command = next(line for line in told.splitlines() if "train" in line and "optimizer.lr=" in line)
    assert "experiment=digits_short" in command and "range." not in command and "lr=7" not in command
    rate = float(command.rpartition("=")[2])
    assert 1e-4 < rate < 1e-1
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_file()) == ["a.csv", "a.png"]


@pytest.mark.slow
def test_the_steps_are_those_of_training(tmp_path):
    """To the bit: at a constant rate the losses are those that a run logs, with dropout."""
    typed = small(tmp_path, "model.dropout=0.3", "trainer.lr_schedule=constant", "optimizer.lr=3e-3", "trainer.steps=4")
    test, cpu = RangeTest(beta=0.0), torch.device("cpu")
    lr_range._walk(planned(compose("lr_range", typed), cpu, marking=False), [3e-3] * 4, test)
    plan = planned(compose("lr_range", typed), cpu, marking=False)
    plan.run.path.mkdir(parents=True)
    parts = plan.parts
    parts.trainer.fit(plan.run, parts.task, plan.data, parts.optimizer, seed=0, device=cpu, ranks=Ranks())
    from ddpm.runs.directory import read_metrics

    assert test.losses == [line["loss"] for line in read_metrics(plan.run.path) if line["split"] == "train"]


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ("range.start=0", "0 < start < end"),
        ("range.start=2", "0 < start < end"),
        ("range.end=inf", "range.end=inf must be a finite number"),
        ("range.steps=9", "range.steps=9 must be an integer >= 10"),
        ("range.steps=20.5", "range.steps=20.5 must be an integer"),
        ("range.beta=1", "beta = 1 must lie in"),
        ("range.stop=1", "stop = 1 must be"),
        ("range.out=a.pdf", "must be the name of a .png file"),
        ("range.out=nowhere/a.png", "the folder nowhere does not exist"),
        ("range.until=1", "range.until is no key of this configuration; range has: beta, end, out"),
        ("range.beta=${range.nothing}", "range.nothing"),
        ("range=null", "range=None must hold settings"),
        ("extend=runs/default/abc", "init=runs/default/abc"),
        ("trainer.batch_size=0", "batch_size = 0"),
        ("optimizer.lr=1,2", "optimizer.lr"),
    ],
)
def test_wrong_input_is_refused_in_one_line(tmp_path, monkeypatch, wrong, told):
    monkeypatch.setattr(lr_range, "_walk", lambda *arguments: pytest.fail("it began"))
    with pytest.raises(InvalidInput, match=r"^[^\n]*$") as raised:
        lr_range.lr_range(small(tmp_path, wrong))
    assert told in str(raised.value)
    assert list(tmp_path.iterdir()) == []
