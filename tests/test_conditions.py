"""ddpm/data/conditions.py: images that are told beside x_t, and their way from data to network to samples."""

import pytest
import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf
from torch import Tensor, nn

from ddpm import config
from ddpm.commands.sample import sampling
from ddpm.commands.train import training
from ddpm.config import compose, resolved
from ddpm.data import Digits, ImageData
from ddpm.data.augment import Augment
from ddpm.data.conditions import HOLE, KINDS, channels_of, edges, gray, image_of, low_resolution, mask, with_channels
from ddpm.diffusion import GaussianDiffusion
from ddpm.randomness import generator
from ddpm.samplers import DDIM
from ddpm.schedules import cosine
from ddpm.sources.trained import TrainedSampler
from ddpm.training.step import Training
from ddpm.training.task import must_take
from models.unet import UNet

CPU = torch.device("cpu")


def pictures(n: int = 12, channels: int = 3, validation: float = 0.5, **options) -> ImageData:
    images = torch.randint(256, (n, channels, 8, 8), generator=generator(0, "pictures")).byte()
    return ImageData("toy", "train", images, torch.arange(n) % 3, validation=validation, **options)


def uniform(n: int) -> Tensor:
    return torch.rand(n, 4, generator=generator(0, "uniform"))


# --- One function a kind


def test_the_hole_is_where_it_is_drawn():
    x = torch.full((2, 1, 4, 8), 0.5)
    told = mask(x, torch.tensor([[0.5, 0.5, 0.0, 0.0], [0.0, 0.999, 0.999, 0.999]]))
    assert told.shape == (2, 2, 4, 8)
    first, second = torch.zeros(4, 8), torch.zeros(4, 8)
    first[:2, :4] = 1  # half of each side
    second[3:, 2:] = 1  # a quarter of the height and three quarters of the width, at the lower right
    assert torch.equal(told[:, 1], torch.stack([first, second]))
    assert torch.equal(told[:, :1], x * (1 - told[:, 1:]))


@pytest.mark.parametrize("size", [(8, 8), (1, 1), (3, 20)])
def test_every_hole_is_a_rectangle_inside_of_the_image(size):
    told = mask(torch.ones(500, 3, *size), uniform(500))
    assert told.shape == (500, 4, *size)
    hole = told[:, 3].bool()
    for axis, side in ((2, size[0]), (1, size[1])):
        length = hole.any(axis).sum(1)
        low, high = (max(1, round(share * side)) for share in HOLE)
        assert length.min() == low and length.max() == high
        assert hole.any(axis)[:, 0].any() and hole.any(axis)[:, -1].any()  # it reaches the border
    assert torch.equal(hole.sum((1, 2)), hole.any(1).sum(1) * hole.any(2).sum(1))


def test_low_resolution_is_the_mean_of_squares():
    x = torch.arange(2.0 * 3 * 8 * 12).reshape(2, 3, 8, 12)
    low = low_resolution(x)
    for row, column in ((0, 0), (4, 8), (7, 3)):
        top, left = row // 4 * 4, column // 4 * 4
        torch.testing.assert_close(low[..., row, column], x[..., top : top + 4, left : left + 4].mean((2, 3)))
    tiny = torch.arange(6.0).reshape(1, 1, 2, 3)
    assert torch.equal(low_resolution(tiny), torch.full((1, 1, 2, 3), 2.5))


def test_gray_is_luma():
    pure = torch.eye(3)[:, :, None, None].expand(3, 3, 2, 2)
    assert gray(pure)[:, 0, 0, 0].tolist() == pytest.approx([0.299, 0.587, 0.114])
    assert torch.equal(gray(pure[:, :1]), pure[:, :1])
    torch.testing.assert_close(gray(torch.ones(1, 3, 2, 2)), torch.ones(1, 1, 2, 2))


def test_edges_of_a_step_a_slope_and_nothing():
    step = -torch.ones(1, 3, 6, 6)
    step[..., 3:] = 1
    assert torch.allclose(edges(step), torch.tensor([-1.0, -1, 1, 1, -1, -1]).expand(1, 1, 6, 6), atol=1e-6)
    assert torch.allclose(edges(step.mT), edges(step).mT)
    slope = torch.linspace(-1, 1, 9).expand(1, 1, 9, 9)  # 1/8 of the way from black to white each pixel
    assert torch.allclose(edges(slope)[..., 1:-1], torch.full((1, 1, 9, 7), 2 * 2 / 8 - 1), atol=1e-6)
    assert torch.equal(edges(torch.full((1, 1, 5, 5), 0.3)), -torch.ones(1, 1, 5, 5))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("channels", [1, 3])
def test_channels_are_counted_and_values_stay_in_their_range(kind, channels):
    x = torch.rand(5, channels, 8, 12) * 2 - 1
    told = image_of(kind, x, torch.arange(5), generator(0, "flip"))
    assert told.shape == (5, channels_of(kind, channels), 8, 12) and told.abs().max() <= 1 + 1e-6
    assert with_channels(told, channels).shape == x.shape
    assert channels_of(None, channels) == 0


def test_holes_are_keyed_and_each_image_has_its_own_where_nothing_is_drawn():
    x, numbers = torch.ones(6, 1, 16, 16), torch.arange(6)
    drawn = [image_of("mask", x, numbers, generator(1, "flip", step)) for step in (1, 1, 2)]
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
    own = image_of("mask", x, numbers)
    assert torch.equal(own[[4, 2]], image_of("mask", x[:2], torch.tensor([4, 2]))) and len(own.unique(dim=0)) > 4


# --- Data


def test_batches_tell_of_the_images_as_they_are_mirrored():
    for kind in KINDS:
        data = pictures(condition=kind, flip=True)
        batch = data.batch(torch.arange(12), generator=generator(0, "flip", 1))
        assert batch.condition.parts == ("classes", "image")
        assert not torch.equal(batch.x, data.batch(torch.arange(12)).x)
        if kind != "mask":
            assert torch.equal(batch.condition.image, image_of(kind, batch.x, torch.arange(12)))
        else:
            hole = batch.condition.image[:, 3:]
            assert torch.equal(batch.condition.image[:, :3], batch.x * (1 - hole))
        plain = pictures(flip=True).batch(torch.arange(12), generator=generator(0, "flip", 1))
        assert torch.equal(plain.x, batch.x) and plain.condition.image is None


def test_of_changed_images_something_else_is_told():
    data, numbers = pictures(condition="gray"), torch.arange(4)
    batch = data.batch(numbers)
    changed = data.conditioned(type(batch)(-batch.x, batch.condition), numbers)
    torch.testing.assert_close(changed.condition.image, -batch.condition.image)
    assert torch.equal(changed.y, batch.y)
    assert pictures().conditioned(batch, numbers) is batch


def test_identity_is_of_the_images_and_samples_are_told_of_held_out_ones():
    data = pictures(condition="mask")
    assert data.identity() == pictures().identity()
    assert data.condition_rows([0, 1, 7]).tolist() == [data.held_out[i].item() for i in (0, 1, 7 % 6)]
    everything = pictures(validation=0, condition="mask")
    assert everything.condition_rows([3, 12]).tolist() == [3, 0]
    with pytest.raises(ValueError, match="toy has no images of these labels"):
        data.of_classes([7]).condition_rows([0])


def test_conditions_that_data_do_not_have():
    with pytest.raises(ValueError, match="condition='depth': choose one of mask, low_resolution, gray, edges"):
        pictures(condition="depth")
    for options in ({"channels": 1}, {"channels": 1, "image_size": 4}, {}):
        with pytest.raises(ValueError, match="condition='gray' gives away all of a gray image; set channels=3"):
            pictures(**{"channels": 1} | options, condition="gray")


# --- Configuration


@pytest.mark.parametrize(
    ("words", "channels"),
    [
        ([], 0),
        (["data.condition=mask"], 2),
        (["data.condition=edges"], 1),
        (["data=cifar10", "data.condition=mask"], 4),
        (["data=cifar10", "data.condition=low_resolution"], 3),
        (["data=cifar10", "data.condition=gray"], 1),
        (["data.condition=mask", "model.condition_channels=5"], 5),
        (["data.condition=nothing"], 0),
        (["data.condition=[1]"], 0),
        (["data.condition=mask", "data.channels=abc"], 0),
    ],
    ids=str,
)
def test_the_network_follows_the_data(words, channels):
    assert resolved(compose("train", words))["model"]["condition_channels"] == channels


def test_data_that_know_of_no_condition_have_none():
    composed = compose("train", [])
    OmegaConf.set_struct(composed, False)
    del composed.data["condition"]
    assert resolved(composed)["model"]["condition_channels"] == 0


def test_a_run_is_named_by_its_condition_and_as_ever_without():
    settings = {kind: resolved(compose("train", [f"data.condition={kind}"])) for kind in ("null", *KINDS)}
    facts = {kind: config.science(one, {}, {}, 1) for kind, one in settings.items()}
    assert facts["null"]["data"] == {"validation": 0.2, "flip": False}
    assert "condition_channels" not in facts["null"]["model"] and "class_channels" not in facts["null"]["model"]
    assert facts["mask"]["data"]["condition"] == "mask" and facts["mask"]["model"]["condition_channels"] == 2
    assert len({str(one) for one in facts.values()}) == 5


def test_a_network_of_other_channels_is_refused_with_the_number_that_is_needed():
    digits = Digits(condition="mask")
    model = {"image_size": 8, "in_channels": 1, "channels": 8, "channel_mults": (1,), "blocks": 1, "groups": 4}
    model |= {"attention_resolutions": ()}
    must_take(UNet(**model, condition_channels=2), digits)
    for channels in (0, 1, 3):
        message = rf"condition_channels = {channels}, but .* has 2; set model.condition_channels=2"
        with pytest.raises(ValueError, match=message):
            must_take(UNet(**model, condition_channels=channels), digits)
    with pytest.raises(ValueError, match=r"set model.condition_channels=0, or data.condition"):
        must_take(UNet(**model, condition_channels=1), Digits())


# --- Samples


class Echo(nn.Module):
    """Of target x_0: what it is told, and the class as a shift where it takes one."""

    def __init__(self, classes: int | None = None):
        super().__init__()
        self.num_classes, self.seen = classes, []
        self.takes = ("image",) if classes is None else ("classes", "image")

    def forward(self, x_t: Tensor, t: Tensor, y: object) -> Tensor:
        self.seen.append(y)
        return y.image if y.classes is None else y.image / 2 + y.classes[:, None, None, None] / 10


def source(network: nn.Module, data: ImageData | None, asked: list[int] | None = None) -> TrainedSampler:
    diffusion = GaussianDiffusion(cosine(20), target="x_0")
    return TrainedSampler(diffusion, network, DDIM(2), (1, 8, 8), 0, CPU, requested=asked, data=data)


def test_sample_i_is_told_of_held_out_image_i():
    data = pictures(channels=1, condition="low_resolution")
    told = data.batch(data.held_out).condition.image
    drawing = source(Echo(), data)
    torch.testing.assert_close(drawing.draw(range(8)), told[[0, 1, 2, 3, 4, 5, 0, 1]])
    torch.testing.assert_close(drawing.draw([4, 2]), told[[4, 2]])  # whatever is drawn beside it
    assert torch.equal(drawing.condition_images([4, 2]), told[[4, 2]]) and drawing.classes(range(3)) is None


def test_its_class_is_that_of_the_image_and_of_those_that_are_asked_for():
    data = pictures(24, channels=1, condition="edges")
    for asked in (None, [1], [2, 0]):
        chosen = data.held_out if asked is None else data.of_classes(asked).held_out
        drawing = source(Echo(3), data, asked)
        classes = drawing.classes(range(4))
        assert torch.equal(classes, data.labels[chosen[torch.arange(4) % len(chosen)]])
        assert asked is None or set(classes.tolist()) <= set(asked)
        drawing.draw(range(4))
        assert all(torch.equal(y.classes, classes) for y in drawing.model.seen)


def test_a_network_that_is_told_of_images_needs_some():
    with pytest.raises(ValueError, match="there are no data to take it from"):
        source(Echo(), None)
    with pytest.raises(ValueError, match="no images of these labels"):
        source(Echo(4), pictures(condition="edges", channels=1), [3])


def test_between_two_images_the_nearer_one_is_told_of():
    data = pictures(channels=1, condition="edges")
    ends = data.batch(data.held_out[:2])
    way = source(Echo(), data).between(ends.x, ends.condition, 5)
    torch.testing.assert_close(way, ends.condition.image[[0, 0, 0, 1, 1]])


@pytest.mark.slow
def test_a_run_is_trained_and_sampled_with_its_images(tmp_path, monkeypatch):
    words = [
        "data.condition=mask", "model.channels=8", "model.groups=4", "augment=script", "trainer.steps=2",
        "trainer.batch_size=4", "trainer.previews=1", "schedule.T=4", "sampler.steps=2", "recognition=false",
        "device=cpu", f"runs={tmp_path}", "trainer.seconds=null",
        "evaluation=['metric=cost cost.samplers=[ddim] cost.steps=[1]','metric=loss_by_snr n=8']",
    ]  # fmt: skip
    task = {"hydra": {"mode": "RUN", "overrides": {"task": words}}}
    monkeypatch.setattr(HydraConfig.instance(), "cfg", OmegaConf.create(task))
    training.train(compose("train", words))
    (run,) = (tmp_path / "default").iterdir()
    assert {"preview.png", "samples.png", "samples_conditions.png", "evaluation.json"} <= {
        p.name for p in run.iterdir()
    }
    for word in ("n=4", "steps_strip=[1,2]", "process=2", "between=[0,1]"):
        drawn = [f"run={run}", "device=cpu", "sampler.steps=2", word, f"out={tmp_path / 'picture.png'}"]
        sampling.sample(compose("sample", drawn))
        (tmp_path / "picture.png").unlink()


def test_training_is_told_of_images_as_they_are_augmented():
    class Seen(Exception):
        pass

    data = pictures(condition="gray", flip=True)

    class Watching:
        def draw(self, batch, random, progress):
            torch.testing.assert_close(batch.condition.image, gray(batch.x))
            raise Seen

    step = object.__new__(Training)
    step.seed, step.device, step.data, step.task = 0, CPU, data, Watching()
    step.settings, step.augment = type("Settings", (), {"batch_size": 4}), Augment(rotation=30, brightness=0.2)
    with pytest.raises(Seen):
        step.draw(1)
