"""ddpm/sources/trained.py: a sample is a function of (seed, number) and of nothing that is drawn beside it."""

import copy
import itertools
import math

import numpy as np
import pytest
import torch
from torch import nn

from ddpm.diffusion import GaussianDiffusion
from ddpm.figures.images import to_numpy
from ddpm.randomness import SampleNoise
from ddpm.samplers import DDIM, Ancestral
from ddpm.schedules import cosine
from ddpm.sources.base import Range
from ddpm.sources.trained import TrainedSampler
from models import kernels
from models.unet import UNet

CPU = torch.device("cpu")
SHAPE = (1, 8, 8)


@pytest.fixture(scope="module")
def model() -> UNet:
    """With random weights everywhere: a fresh one answers zero."""
    torch.manual_seed(1)
    model = UNet(8, 1, channels=8, channel_mults=(1, 2), blocks=1, attention_resolutions=(4,), groups=4, dropout=0.5)
    for p in model.parameters():
        nn.init.normal_(p, std=0.1)
    return model


def source(model: nn.Module, sampler: object = None, seed: int = 0, T: int = 20) -> TrainedSampler:
    return TrainedSampler(GaussianDiffusion(cosine(T)), model, sampler or DDIM(5), SHAPE, seed, CPU)


SAMPLERS = [DDIM(5), DDIM(5, eta=1.0), Ancestral(7)]


@pytest.mark.parametrize("sampler", SAMPLERS, ids=["ddim", "ddim with noise", "ancestral"])
def test_the_batch_never_changes_a_sample(sampler, model):
    """Floats may differ in their last digits, as sums are ordered by the batch; what a file holds may not."""
    reference = source(model, sampler).samples(12)
    assert reference.shape == (12, *SHAPE) and reference.std() > 0.1
    for batch in (1, 5, 11):
        drawn = source(model, sampler).samples(12, batch)
        torch.testing.assert_close(drawn, reference, rtol=0, atol=2e-5)
        assert np.array_equal(to_numpy(drawn), to_numpy(reference))
    numbers = [7, 2, 9]
    torch.testing.assert_close(source(model, sampler).draw(numbers), reference[numbers], rtol=0, atol=2e-5)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_samples_between_steps_of_training_are_those_of_the_weights_as_they_are(precision, model, monkeypatch):
    """What the steps of a sampler keep of the weights is theirs alone; so are samples by the average of the weights."""
    monkeypatch.setattr(kernels, "WIDE_ENOUGH", dict.fromkeys(kernels.WIDE_ENOUGH, 1))
    model = copy.deepcopy(model)
    drawn, ways = [], []
    for _ in range(2):
        for share in (1, 0.9):
            model.load_state_dict({name: share * p for name, p in model.state_dict().items()})
            fresh = copy.deepcopy(model)
            for way in (model, fresh):
                told = TrainedSampler(GaussianDiffusion(cosine(20)), way, DDIM(2), SHAPE, 0, CPU, precision)
                drawn.append(told.draw(range(2)))
            assert torch.equal(*drawn[-2:])
            ways.append(drawn[-1])
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        model(torch.ones(2, *SHAPE), torch.tensor([1, 20])).square().sum().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(ways, 2))


@pytest.mark.parametrize("sampler", SAMPLERS, ids=["ddim", "ddim with noise", "ancestral"])
def test_the_same_seed_repeats_and_another_does_not(sampler, model):
    first = source(model, sampler).draw(range(3))
    torch.manual_seed(99)  # the global generator is no source
    assert torch.equal(source(model, sampler).draw(range(3)), first)
    other = source(model, sampler, seed=1).draw(range(3))
    assert not any(torch.equal(a, b) for a in first for b in other)
    assert not torch.equal(first[0], first[1])


def test_batches_number_what_they_draw(model):
    parts = list(source(model).batches([4, 0, 9, 3, 1], 2))
    assert [numbers for numbers, _ in parts] == [[4, 0], [9, 3], [1]]
    assert [len(x) for _, x in parts] == [2, 2, 1]
    assert list(source(model).batches([], 2)) == []


def test_the_network_is_put_into_evaluation_mode(model):
    model.train()
    assert not source(model).model.training
    assert not any(p.grad is not None for p in model.parameters())


def test_another_sampler_starts_from_the_same_noise(model):
    one = source(model, DDIM(5), seed=3)
    other = one.using(Ancestral(4))
    assert other.model is one.model and (other.seed, other.shape) == (one.seed, one.shape)
    (t, x_T), (t_other, x_T_other) = one.way(2, 2)[0], other.way(2, 2)[0]
    assert t == t_other == 20 and torch.equal(x_T, x_T_other)
    assert not torch.equal(one.draw([0]), other.draw([0]))


@pytest.mark.parametrize(("pictures", "steps"), [(2, 5), (4, 5), (6, 5), (40, 5), (8, 20)])
def test_the_way_goes_from_noise_to_the_sample_at_even_moments(pictures, steps, model):
    way = source(model, DDIM(steps), seed=2).way(3, pictures)
    times = [t for t, _ in way]
    assert len(way) == min(pictures, steps + 1) and times[0] == 20 and times[-1] == 0
    assert times == sorted(set(times), reverse=True)
    gaps = [a - b for a, b in itertools.pairwise(times)]
    assert max(gaps) - min(gaps) <= 2 * 20 / steps
    assert torch.equal(way[0][1], SampleNoise(2, range(3)).x_T(SHAPE))
    assert torch.equal(way[-1][1], source(model, DDIM(steps), seed=2).draw(range(3)))


def test_a_network_with_classes_is_given_them_by_number(model):
    """Sample i is of class i mod K, whatever the batch, so that a grid shows every class."""
    torch.manual_seed(2)
    classes = UNet(8, 1, channels=8, channel_mults=(1,), blocks=1, attention_resolutions=(), groups=4, num_classes=3)
    for p in classes.parameters():
        nn.init.normal_(p, std=0.3)
    given = []
    classes.class_embedding.register_forward_pre_hook(lambda module, arguments: given.append(arguments[0].tolist()))
    drawn = source(classes).draw(range(5))
    assert drawn.shape == (5, *SHAPE) and all(y == [0, 1, 2, 0, 1] for y in given)
    torch.testing.assert_close(source(classes).draw([4, 2]), drawn[[4, 2]], rtol=0, atol=2e-5)


class Exact(nn.Module):
    """E[eps | x_t] of data N(0.3, 0.25): a perfect network; `num_classes` makes it note the classes it is given."""

    def __init__(self, schedule: object, num_classes: int | None = None):
        super().__init__()
        self.schedule, self.num_classes, self.seen = schedule, num_classes, []

    def forward(self, x_t: torch.Tensor, t: torch.Tensor, y: torch.Tensor | None = None) -> torch.Tensor:
        self.seen.append(y)
        alpha_bar = self.schedule.alpha_bar[t].float()[:, None, None, None]
        return (1 - alpha_bar).sqrt() * (x_t - alpha_bar.sqrt() * 0.3) / (alpha_bar * 0.25 + 1 - alpha_bar)


def between(sampler: object, y: torch.Tensor | None = None, num_classes: int | None = None) -> tuple:
    schedule = cosine(1000)
    network = Exact(schedule, num_classes)
    x = torch.randn((2, *SHAPE), generator=torch.Generator().manual_seed(3)) * 0.5 + 0.3
    way = TrainedSampler(GaussianDiffusion(schedule), network, sampler, SHAPE, 0, CPU).between(x, y, 5)
    return x, way, network


def test_the_way_between_two_images_begins_and_ends_with_them():
    """Unclipped: some of these pixels lie beyond [-1, 1]."""
    x, way, network = between(DDIM(200))
    assert way.shape == (5, *SHAPE) and x.abs().max() > 1.2 and set(network.seen) == {None}
    errors = {steps: (between(DDIM(steps))[1][[0, -1]] - x).abs().max().item() for steps in (50, 100, 200)}
    assert errors[200] < 0.03 and 1.5 < errors[50] / errors[100] < 2.5 and 1.5 < errors[100] / errors[200] < 2.5


def test_what_lies_between_is_as_likely_as_the_ends():
    """On the arc a latent keeps its norm, so an image in the middle keeps its spread; on a line it would lose it."""
    x, way, _ = between(DDIM(100))
    spread = way.flatten(1).std(1)
    assert spread[2] > 0.85 * x.flatten(1).std(1).mean() and not torch.allclose(way[2], way[[0, -1]].mean(0), atol=0.05)


def test_each_image_on_the_way_has_the_class_of_the_nearer_end():
    *_, network = between(DDIM(4), torch.tensor([7, 2]), num_classes=10)
    assert [y.tolist() for y in network.seen[-2:]] == [[7, 7, 7, 2, 2]] * 2 and network.seen[0].tolist() == [7, 2]


@pytest.mark.parametrize("sampler", [Ancestral(5), DDIM(5, eta=0.5)])
def test_a_sampler_without_an_inverse_cannot_go_between(sampler):
    with pytest.raises(ValueError, match="eta"):
        between(sampler)


@pytest.mark.parametrize(
    ("x", "told"),
    [
        (torch.tensor([[-1.0, 1.0], [0.5, 0.0]]), ""),
        (
            torch.tensor([[-1.5, 1.0], [0.5, 1.25]]),
            "50.00% of all values lie outside [-1, 1], up to 1.5; shown clipped",
        ),
        (torch.tensor([[math.nan, 1.0], [0.5, math.inf]]), "2 of 2 samples hold numbers that are not finite"),
        (
            torch.tensor([[math.nan, 9.0], [0.5, 3.0]]),
            "1 of 2 samples hold numbers that are not finite; 50.00% of all values lie outside [-1, 1], up to 3; shown "
            "clipped",
        ),
    ],
)
def test_values_that_a_picture_cannot_show_are_counted(x, told):
    whole, parts = Range(), Range()
    x = x[:, None, None]  # images of two pixels
    whole.note(x)
    for image in x:
        parts.note(image[None])
    assert str(whole) == str(parts) == told


def test_points_have_no_range_to_leave():
    seen = Range()
    seen.note(torch.tensor([[9.0, 1.0], [0.5, math.nan]]))
    assert str(seen) == "1 of 2 samples hold numbers that are not finite"


def test_a_source_counts_all_that_it_draws():
    class Loud(torch.nn.Module):
        def forward(self, x_t, t):
            return 3 * torch.ones_like(x_t)

    unclipped = GaussianDiffusion(cosine(20), target="x_0", clip_x_0=False)
    loud = TrainedSampler(unclipped, Loud(), DDIM(5), SHAPE, 0, CPU)
    loud.samples(3, batch=2)
    loud.using(DDIM(2)).samples(1)
    assert loud.range.samples == 4 and str(loud.range).startswith("100.00% of all values")
    clipped = TrainedSampler(GaussianDiffusion(cosine(20), target="x_0"), Loud(), DDIM(5), SHAPE, 0, CPU)
    clipped.samples(3)
    assert str(clipped.range) == "" and clipped.range.samples == 3


def test_classes_that_are_asked_for_are_drawn_in_turn():
    torch.manual_seed(1)
    model = UNet(8, 1, channels=8, channel_mults=(1,), blocks=1, attention_resolutions=(), groups=4, num_classes=5)
    for p in model.parameters():
        nn.init.normal_(p, std=0.3)
    diffusion = GaussianDiffusion(cosine(20), "x_0", clip_x_0=False)

    def drawing(asked: list[int] | None) -> TrainedSampler:
        return TrainedSampler(diffusion, model, DDIM(2), SHAPE, 0, CPU, requested=asked)

    every = drawing(None)
    assert every.classes(range(7)).tolist() == [0, 1, 2, 3, 4, 0, 1]
    assert drawing([3]).classes([5, 2]).tolist() == [3, 3] and drawing([4, 0]).classes(range(3)).tolist() == [4, 0, 4]
    torch.testing.assert_close(drawing([3]).draw([3]), every.draw([3]), rtol=0, atol=1e-5)  # sample 3 is of class 3
    assert not torch.allclose(drawing([2]).draw([3]), every.draw([3]), atol=1e-3)
    for asked in ([5], [0, -1]):
        with pytest.raises(ValueError, match=r"class = .*: the network has the classes 0\.\.4"):
            drawing(asked)
    with pytest.raises(ValueError, match=r"class = none: the network was never trained without its labels; .*drop=0.1"):
        drawing([])


def test_no_class_can_be_asked_of_a_network_without(model):
    with pytest.raises(ValueError, match="class = 3: the network was trained without classes"):
        TrainedSampler(GaussianDiffusion(cosine(20)), model, DDIM(2), SHAPE, 0, CPU, requested=[3])


# --- Several labels at once


class Told(nn.Module):
    """Answers nothing, and notes what it is told."""

    def __init__(self, num_classes: object, drop: float = 0.1):
        super().__init__()
        self.num_classes, self.drop, self.seen = num_classes, drop, []

    def forward(self, x_t: torch.Tensor, t: torch.Tensor, y: object = None) -> torch.Tensor:
        self.seen.append(y)
        return torch.zeros_like(x_t)


def labelled(num_classes: object = (3, 2), drop: float = 0.1, **asked: object) -> TrainedSampler:
    return TrainedSampler(GaussianDiffusion(cosine(4)), Told(num_classes, drop), DDIM(1), SHAPE, 0, CPU, **asked)


@pytest.mark.parametrize(
    ("asked", "styles", "pairs"),
    [
        (None, None, [[0, 0], [1, 0], [2, 0], [0, 1], [1, 1], [2, 1], [0, 0]]),
        ([2, 0], None, [[2, 0], [0, 0], [2, 1], [0, 1], [2, 0], [0, 0], [2, 1]]),
        (None, [1], [[0, 1], [1, 1], [2, 1], [0, 1], [1, 1], [2, 1], [0, 1]]),
        ([1], [1, 0], [[1, 1], [1, 0], [1, 1], [1, 0], [1, 1], [1, 0], [1, 1]]),
        ([2, 0], [1, 0, 1], [[2, 1], [0, 1], [2, 0], [0, 0], [2, 1], [0, 1], [2, 1]]),
    ],
)
def test_every_class_in_one_style_and_then_in_the_next(asked, styles, pairs):
    """Lists of unlike lengths too: it is all pairs, and one label that is left out has all its values."""
    drawing = labelled(requested=asked, styles=styles)
    assert drawing.condition(range(7)).classes.tolist() == pairs and not drawing.condition(range(7)).null
    assert drawing.condition([5, 2]).classes.tolist() == [pairs[5], pairs[2]]
    assert [y.tolist() for y in drawing.labels(range(7))] == [list(one) for one in zip(*pairs, strict=True)]
    drawing.draw([4])
    assert drawing.model.seen[0].tolist() == [pairs[4]]


@pytest.mark.parametrize(("asked", "styles"), [([], None), ([1, 2], []), ([], [])])
def test_each_label_can_be_left_away_by_itself(asked, styles):
    """The others go on as if it had one value."""
    drawing, one = (
        labelled(requested=asked, styles=styles),
        labelled(requested=asked or [0], styles=styles if styles else [0]),
    )
    if styles is None:
        one = labelled(requested=[0])
    told, without = drawing.condition(range(5)), [asked == [], styles == []]
    assert told.null["classes"].tolist() == [without] * 5
    kept = ~told.null["classes"]
    assert torch.equal(told.classes[kept], one.condition(range(5)).classes[kept])
    assert [y is None for y in drawing.labels(range(2))] == without and (drawing.classes([0]) is None) == without[0]
    drawing.draw([0])
    assert drawing.model.seen[0].null["classes"].tolist() == [without]


def test_of_one_label_the_null_is_a_row():
    told = labelled(3, requested=[]).condition(range(2))
    assert told.null["classes"].tolist() == [True, True] and told.classes.shape == (2,)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"styles": [2]}, r"style = 2: the network has the styles 0\.\.1"),
        ({"styles": [0, -1]}, r"style = \[0, -1\]: the network has the styles 0\.\.1"),
        ({"num_classes": 3, "styles": [0]}, "style = 0: the network was trained without styles"),
        ({"num_classes": None, "styles": []}, "style = none: the network was trained without styles"),
        ({"drop": 0.0, "styles": []}, "style = none: the network was never trained without its labels; train one with"),
    ],
)
def test_labels_that_cannot_be(settings, words):
    with pytest.raises(ValueError, match=words):
        labelled(**settings)
