"""metric=augmentation: which images are taken, what is learned from them, what is recorded, what is refused."""

import json
from types import SimpleNamespace

import pytest
import torch
from omegaconf import OmegaConf
from scipy import stats
from test_cli import Call, call, typed  # noqa: F401
from test_vae_cli import made
from torch import nn

from ddpm import cli
from ddpm.commands.evaluate.augmentation import measure_augmentation
from ddpm.config import InvalidInput
from ddpm.metrics.augmentation import Learned, few, in_words, learned, must_have_enough, record
from ddpm.metrics.intervals import wilson


def right(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.bool)


def test_few_images_are_of_each_class_and_among_more_of_the_same_seed():
    y = torch.tensor([2, 0, 2, 0, 0, 2, 5, 5, 5, 0])
    two, three = few(y, 2, seed=0), few(y, 3, seed=0)
    assert y[two].bincount().tolist() == [2, 0, 2, 0, 0, 2] and y[three].bincount().tolist() == [3, 0, 3, 0, 0, 3]
    assert set(two.tolist()) < set(three.tolist()) and torch.equal(two, few(y, 2, seed=0))
    assert any(not torch.equal(two, few(y, 2, seed)) for seed in range(1, 5))
    must_have_enough(y, [0, 2, 5], [1, 3], "some")
    with pytest.raises(ValueError, match="of some 3 images of class 2 are trained on; allowed: at most 3"):
        must_have_enough(y, [0, 2, 5], [1, 4], "some")


@pytest.mark.equation("Augmentation (gain)")
def test_the_gain_is_paired_by_seed_or_by_image():
    one = record({4: Learned(right(1, 0, 0, 1), right(1, 1, 1, 0))})
    each = torch.tensor([0.0, 1, 1, -1])
    half = 1.959963984540054 * each.std().item() / 2
    assert (one["value"], one["low"], one["high"]) == pytest.approx((0.25, 0.25 - half, 0.25 + half))
    assert one["interval"] == "images" and one["without"] == 0.5 and one["with_generated"] == 0.75
    assert one["without_intervals"] == [list(wilson(2, 4))] and one["with_generated_intervals"] == [list(wilson(3, 4))]

    by_seed = {
        0: Learned(right(1, 0), right(1, 1)),
        1: Learned(right(0, 0), right(0, 0)),
        2: Learned(*[right(1, 1)] * 2),
    }
    several, gains = record(by_seed), [0.5, 0.0, 0.0]
    low, high = stats.t.interval(0.95, 2, sum(gains) / 3, stats.sem(gains))
    assert (several["value"], several["low"], several["high"]) == pytest.approx((1 / 6, low, high))
    assert several["values"] == gains and several["seeds"] == [0, 1, 2] and several["interval"] == "seeds"
    assert several["without_by_seed"] == [0.5, 0, 1] and several["with_generated_by_seed"] == [1, 0, 1]
    assert "3 real images a class: 50.00% of held-out" in in_words(several, 3, 10) and "3 seeds" in in_words(
        several, 3, 1
    )


class Counting(nn.Module):
    """A linear classifier of two classes, which counts its steps and what it sees in them."""

    def __init__(self, seed: int):
        super().__init__()
        torch.manual_seed(seed)
        self.layer, self.steps, self.images = nn.Linear(16, 2), 0, 0
        self.first = self.layer.weight.detach().clone()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            self.steps, self.images = self.steps + 1, self.images + len(x)
        return self.layer(x.flatten(1))


def test_generated_images_outweigh_few_real_ones_in_as_many_steps():
    """Of the few real ones the wrong class is light."""
    made: list[Counting] = []

    def make(seed: int) -> nn.Module:
        made.append(Counting(seed))
        return made[-1]

    y = torch.arange(300) % 2
    light = (2.0 * y - 1)[:, None, None, None].expand(300, 1, 4, 4)
    real = light[:10], 1 - y[:10]
    found = learned(make, real, (light, y), (light[:50], y[:50]), seed=3, steps=60)
    assert found.with_generated.all() and not found.without.any()
    assert [judge.steps for judge in made] == [60, 60] and [judge.images for judge in made] == [60 * 10, 60 * 128]
    assert torch.equal(made[0].first, made[1].first)


# ---------------------------------------------------------------------------------------------- through the command


def of(condition_data: object = None, labels: object = None, **settings: object) -> SimpleNamespace:
    """What is evaluated, as far as it is looked at before anything is drawn."""
    config = {"n": None, "seed": 0, "augmentation": {"real": [2], "times": 1, "steps": 1} | settings}
    held_out = torch.arange(5)
    data = SimpleNamespace(name="some", units="images", labels=labels, train=torch.arange(5, 20), held_out=held_out)
    source = SimpleNamespace(
        sampler=None, condition_data=condition_data, classes=lambda numbers: torch.zeros(1), evaluations=1
    )
    return SimpleNamespace(config=OmegaConf.create(config), source=source, data=data, seeds=[0])


TWO = torch.arange(20) % 2


@pytest.mark.parametrize(
    ("context", "message"),
    [
        (of(labels=TWO, real=[0]), r"augmentation.real=\[0\] must be whole numbers >= 1"),
        (of(labels=TWO, real=[]), "must be whole numbers"),
        (of(labels=TWO, real=[True]), "must be whole numbers"),
        (of(labels=TWO, real=[2, 8]), "of some 7 images of class 0 are trained on; allowed: at most 7"),
        (of(labels=TWO, times=0), "times=0 must be an integer >= 1"),
        (of(labels=TWO, steps=0), "steps=0 must be an integer >= 1"),
        (of(), "some has no labels"),
        (of(labels=torch.zeros(20, dtype=torch.long)), "one class only"),
        (of(labels=TWO, condition_data=object()), "are made from held-out images"),
    ],
)
def test_what_cannot_be_augmented_is_refused(context, message):
    with pytest.raises(InvalidInput, match=message):
        measure_augmentation(context)
    assert measure_augmentation(of(labels=TWO, real=[7], times=3)).evaluations == 7 * 3 * 2


@pytest.mark.slow
def test_samples_of_no_class_are_named_by_the_judge(call, tmp_path):  # noqa: F811
    run = made(call, tmp_path, "experiment=vae")
    words = ["n=20", "judge.channels=2", "judge.features=4", "augmentation.real=[3,2]", "augmentation.times=2"]
    result = call(cli.evaluate, f"run={run}", "metric=augmentation", "augmentation.steps=2", "seeds=2", *words)
    assert result.code == 0 and "whose classes the classifier names" in result.out, result
    found = json.loads((run / "evaluation.json").read_text())
    assert found.keys() == {"augmentation_2x2_20_held_out", "augmentation_3x2_20_held_out"}
    for values in found.values():
        gains = [b - a for a, b in zip(values["without_by_seed"], values["with_generated_by_seed"], strict=True)]
        assert (
            values["values"] == pytest.approx(gains) and values["seeds"] == [0, 1] and values["labelled_by"] == "judge"
        )
