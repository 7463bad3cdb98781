"""ddpm/data/augment.py: known maps, bounds at every pixel, draws that stay apart; and what training makes of it."""

import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf
from test_trainer import CPU, Fit, assert_same, drawn_by, network, some, stop_at
from torch import Tensor

from ddpm.commands.train import prepare, training
from ddpm.config import InvalidInput, compose, resolved, science
from ddpm.data import Digits, ImageData
from ddpm.data.augment import Augment, inverse_of, warp
from ddpm.data.splines import basis, field
from ddpm.randomness import generator
from ddpm.runs import checkpoint
from ddpm.runs.directory import science_hash
from ddpm.training.interrupt import Interrupted
from ddpm.training.trainer import Trainer

ALL = {"rotation": 180.0, "scale": 1.0, "translation": 0.5, "elastic": 9.0, "brightness": 1.0, "contrast": 1.0}
SOME = {"rotation": 30.0, "scale": 0.3, "translation": 0.1, "elastic": 2.0, "brightness": 0.2, "contrast": 0.4}
EACH = [*([name, value] for name, value in SOME.items()), ["vertical_flip", True]]
STILL = torch.zeros(1, 2, 1, 1)


def images(b: int = 5, c: int = 3, height: int = 12, width: int = 8, most: float = 1.0) -> Tensor:
    """Noise, uniform in +-most."""
    return most * (2 * torch.rand(b, c, height, width, generator=torch.Generator().manual_seed(1)) - 1)


def seeded(seed: int = 0) -> torch.Generator:
    return generator(seed, "augment", 1)


def turned(degrees: float, factor: float = 1.0) -> Tensor:
    return inverse_of(torch.tensor([degrees]), torch.tensor([factor]))


def ramps(b: int, height: int, width: int) -> Tensor:
    """Images of two channels (b, 2, height, width): how far right of the centre, how far down, 0.01 a pixel."""
    down, right = torch.meshgrid(torch.arange(height) - height // 2, torch.arange(width) - width // 2, indexing="ij")
    return 0.01 * torch.stack([right, down]).float().expand(b, -1, -1, -1)


def jacobians(x: Tensor) -> Tensor:
    """Of what `ramps` became: the matrices (b, 2, 2) of d(right, down) by pixels (right, down), at the centre."""
    row, column = x.shape[2] // 2, x.shape[3] // 2
    return 100 * torch.stack([x[:, :, row, column + 1] - x[:, :, row, column],
                              x[:, :, row + 1, column] - x[:, :, row, column]], 2)  # fmt: skip


# ---------------------------------------------------------------------------------------------- maps that are known


@pytest.mark.parametrize("padding", ["border", "reflection"])
def test_a_quarter_turn_is_rot90(padding):
    x = images(1, height=9, width=9)
    torch.testing.assert_close(warp(x, turned(90), STILL, padding), x.rot90(1, (2, 3)), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("height", "width"), [(6, 10), (11, 5)])
def test_turns_of_images_that_are_not_square(height, width):
    x, side = images(1, height=height, width=width), min(height, width)

    def middle(x: Tensor) -> Tensor:
        top, left = (x.shape[2] - side) // 2, (x.shape[3] - side) // 2
        return x[:, :, top : top + side, left : left + side]

    quarter, half = (warp(x, turned(degrees), STILL, "border") for degrees in (90, 180))
    torch.testing.assert_close(middle(quarter), middle(x.rot90(1, (2, 3))), rtol=0, atol=1e-5)
    torch.testing.assert_close(half, x.flip(2, 3), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("height", "width"), [(8, 8), (9, 12)])
def test_whole_pixels_are_a_roll_and_the_padding_is_what_lies_beyond_the_edge(height, width):
    x = images(1, height=height, width=width)
    right, down = 3, -2
    shift = -torch.tensor([right, down]).float()[None, :, None, None]
    moved, mirrored = (warp(x, turned(0), shift, padding) for padding in ("border", "reflection"))
    rolled = x.roll((down, right), (2, 3))
    for found in (moved, mirrored):
        torch.testing.assert_close(found[:, :, :down, right:], rolled[:, :, :down, right:], rtol=0, atol=1e-5)
    kept = moved[:, :, :down]
    torch.testing.assert_close(kept[..., :right], x[:, :, 2:, :1].expand(-1, -1, -1, right), rtol=0, atol=1e-5)
    torch.testing.assert_close(mirrored[:, :, :down, :right], x[:, :, 2:, :right].flip(-1), rtol=0, atol=1e-5)


@pytest.mark.parametrize("factor", [0.75, 1.5])
def test_a_blob_that_grows_in_closed_form(factor):
    down, right = torch.meshgrid(torch.arange(41.0) - 20, torch.arange(51.0) - 25, indexing="ij")

    def blob(sigma: float) -> Tensor:
        return torch.exp(-(right**2 + down**2) / (2 * sigma**2))[None, None]

    sigma = 6.0  # an interpolation is off by a quarter of the largest curvature, 1 / sigma^2, at most
    grown = warp(blob(sigma), turned(0, factor), STILL, "border")
    torch.testing.assert_close(grown, blob(sigma * factor), rtol=0, atol=1 / (4 * sigma**2))


def test_the_matrix_is_a_turn_over_a_factor():
    torch.testing.assert_close(turned(90, 2), torch.tensor([[[0, -0.5], [0.5, 0]]]), rtol=0, atol=1e-7)
    both = inverse_of(torch.tensor([30.0, -60.0]), torch.tensor([1.0, 4.0]))
    torch.testing.assert_close(torch.linalg.det(both), torch.tensor([1, 1 / 16]))


# ---------------------------------------------------------------------------------------------- the smooth field


@pytest.mark.parametrize(("size", "parts"), [(1, 1), (8, 4), (7, 3), (32, 4), (5, 32)])
def test_splines_are_weights_and_reproduce_what_is_linear(size, parts):
    weights = basis(size, parts)
    assert weights.shape == (size, parts + 3) and weights.min() >= 0
    torch.testing.assert_close(weights.sum(1), torch.ones(size))
    u = (torch.arange(size) + 0.5) * parts / size
    torch.testing.assert_close(weights @ torch.arange(-1.0, parts + 2), u, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("height", "width", "parts"), [(32, 32, 4), (9, 20, 1), (16, 7, 8)])
def test_no_pixel_moves_farther_than_the_bound_and_some_nearly_so_far(height, width, parts):
    corners = 2 * torch.randint(0, 2, (500, 2, parts + 3, parts + 3)).float() - 1  # the extremes
    bent = field(corners, height, width)
    assert bent.shape == (500, 2, height, width) and bent.abs().max() <= 1 + 1e-6 and bent.abs().max() > 0.8
    torch.testing.assert_close(field(torch.ones(1, 2, parts + 3, parts + 3), height, width).amin(), torch.tensor(1.0))


def test_displacements_of_augmented_images_are_bounded_and_differ():
    """Of ramps, whose values say where they are from."""
    x = ramps(200, 24, 40)
    moved = 100 * (Augment(elastic=3, elastic_nodes=2)(x, seeded()) - x)
    assert moved.abs().max() <= 3 + 1e-4 and moved.abs().max() > 2
    assert moved.std(0).min() > 0.3, "of every pixel"


def test_below_a_quarter_of_a_part_nothing_folds():
    parts, side = 4, 48
    corners = 2 * torch.randint(0, 2, (300, 2, parts + 3, parts + 3)).float() - 1
    bent = field(0.25 * side / parts * corners, side, side)
    right, down = bent.diff(dim=3)[:, :, 1:], bent.diff(dim=2)[..., 1:]
    assert (right.abs() + down.abs()).max() < 1, "so x + field(x) is one to one"


# ---------------------------------------------------------------------------------------------- what is drawn


def test_without_strength_the_images_themselves_come_back():
    x, random = images(), seeded()
    before = random.get_state()
    for off in (Augment(), Augment(padding="reflection", elastic_nodes=9)):
        assert not off.active and off(x, random) is x
    assert torch.equal(random.get_state(), before)
    assert all(Augment(**{name: value}).active for name, value in EACH)


@pytest.mark.parametrize("padding", ["border", "reflection"])
@pytest.mark.parametrize("shape", [(3, 1, 8, 8), (4, 3, 5, 17), (1, 1, 1, 1)])
def test_values_stay_within_their_bounds(shape, padding):
    augment = Augment(**ALL, vertical_flip=True, padding=padding)
    for seed in range(50):
        x = images(*shape).sign() if seed % 2 else images(*shape)
        found = augment(x, seeded(seed))
        assert found.shape == x.shape and found.dtype == torch.float32
        assert found.min() >= -1 and found.max() <= 1


@pytest.mark.parametrize("augment", [Augment(**SOME, vertical_flip=True), Augment(elastic=1), Augment(brightness=0.2)])
def test_draws_are_those_of_the_generator_and_each_row_has_its_own(augment):
    x = images(6, most=0.5)
    found = augment(x, seeded())
    assert torch.equal(found, augment(x, seeded())) and not torch.equal(found, augment(x, seeded(1)))
    other = x.clone()
    other[0] = 0
    assert torch.equal(augment(other, seeded())[1:], found[1:])
    same = augment(x[:1].expand(6, -1, -1, -1), seeded())
    assert len({tuple(row.flatten().tolist()) for row in same}) == 6


def test_turns_and_growth_have_the_ranges_that_are_named():
    found = torch.linalg.inv(jacobians(Augment(rotation=40, scale=0.5)(ramps(2000, 32, 48), seeded())))
    factor = torch.linalg.det(found).sqrt()
    angle = torch.atan2(found[:, 0, 1], found[:, 0, 0]).rad2deg()
    for drawn, most in ((angle, 40), (factor.log(), math.log(1.5))):
        assert drawn.abs().max() <= most * 1.001
        assert drawn.mean().abs() < 0.05 * most and drawn.std().item() == pytest.approx(most / 3**0.5, rel=0.05)
    only = torch.linalg.inv(jacobians(Augment(rotation=40)(ramps(2000, 32, 48), seeded())))
    torch.testing.assert_close(torch.linalg.det(only), torch.ones(2000), rtol=0, atol=1e-3)
    torch.testing.assert_close(torch.atan2(only[:, 0, 1], only[:, 0, 0]).rad2deg(), angle, rtol=0, atol=0.05)


def test_images_move_by_shares_of_their_sides():
    moved = -100 * Augment(translation=0.25)(ramps(2000, 16, 48), seeded())[:, :, 8, 24]
    share = moved / torch.tensor([48, 16])
    assert share.abs().max() <= 0.25 + 1e-6 and share.mean(0).abs().max() < 0.01
    torch.testing.assert_close(share.std(0), torch.full((2,), 0.25 / 3**0.5), rtol=0.05, atol=0)
    assert torch.corrcoef(share.T)[0, 1].abs() < 0.1


def test_light():
    x = images(2000, c=2, most=0.2)
    added = Augment(brightness=0.3)(x, seeded()) - x
    torch.testing.assert_close(added, added[:, :1, :1, :1].expand_as(added), rtol=0, atol=1e-6)
    assert 0.29 < added.abs().max() <= 0.3 + 1e-6 and added.mean().abs() < 0.02
    spread = Augment(contrast=0.5)(x, seeded())
    torch.testing.assert_close(spread.mean((1, 2, 3)), x.mean((1, 2, 3)), rtol=0, atol=1e-6)
    factor = (spread.std((1, 2, 3)) / x.std((1, 2, 3))).log()
    assert 0.99 * math.log(1.5) < factor.abs().max() <= 1.001 * math.log(1.5) and factor.mean().abs() < 0.03


def test_half_of_the_images_are_flipped_exactly():
    x = images(400)
    found = Augment(vertical_flip=True)(x, seeded())
    same, flipped = ((found == y).flatten(1).all(1) for y in (x, x.flip(-2)))
    assert (same ^ flipped).all() and 150 < flipped.sum() < 250


@pytest.mark.parametrize(("name", "value"), EACH)
def test_switching_one_on_leaves_what_the_others_draw(name, value):
    """Brightness is then the same number, added to what the other alone makes."""
    x = images(8, most=0.3)
    light = Augment(brightness=0.1)(0 * x, seeded())
    alone = Augment(**{name: value})(x, seeded()) if name != "brightness" else x
    both = Augment(**{"brightness": 0.1, name: value})(x, seeded())
    light = light * (2 if name == "brightness" else 1)
    torch.testing.assert_close(both - alone, light, rtol=0, atol=1e-6)


def test_more_nodes_bend_otherwise_and_change_nothing_else():
    x = torch.full((8, 1, 8, 8), 0.3)
    few, many = (Augment(**SOME, elastic_nodes=n)(x, seeded()) for n in (2, 7))
    torch.testing.assert_close(few, many, rtol=0, atol=1e-6)
    few, many = (Augment(elastic=2, elastic_nodes=n)(images(), seeded()) for n in (2, 7))
    assert (few - many).abs().max() > 0.1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
def test_on_a_gpu_it_is_the_same_map():
    x, matrix = images(2), inverse_of(torch.tensor([20.0, -50.0]), torch.tensor([1.1, 0.8]))
    shift = field(images(2, 2, 7, 7), 12, 8)
    there = warp(x.cuda(), matrix.cuda(), shift.cuda(), "reflection").cpu()
    torch.testing.assert_close(there, warp(x, matrix, shift, "reflection"), rtol=0, atol=1e-4)
    augment, random = Augment(**SOME, vertical_flip=True), generator(0, "augment", 1, device="cuda")
    found = augment(x.cuda(), random)
    assert found.is_cuda and torch.equal(found, augment(x.cuda(), generator(0, "augment", 1, device="cuda")))


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("value", [-0.1, 181, True, math.nan, math.inf, None, "1", [1]])
def test_strengths_out_of_range_name_the_range(name, value):
    most = {"rotation": 180, "translation": 0.5, "elastic": 100}.get(name, 1)
    with pytest.raises(ValueError, match=rf"^{name} = .* must be a number from 0 to {most}$"):
        Augment(**{name: value})
    assert Augment(**{name: most}).active


@pytest.mark.parametrize("value", [0, 33, 4.0, True, None])
def test_nodes_out_of_range(value):
    with pytest.raises(ValueError, match=r"elastic_nodes = .* must be an integer from 1 to 32"):
        Augment(elastic_nodes=value)


def test_other_wrong_values():
    with pytest.raises(ValueError, match="vertical_flip = 1 must be true or false"):
        Augment(vertical_flip=1)
    with pytest.raises(ValueError, match="padding = 'zeros' is not known; allowed: border, reflection"):
        Augment(padding="zeros")


# ---------------------------------------------------------------------------------------------- training

AUGMENT = Augment(rotation=20, scale=0.1, translation=0.1, elastic=0.5, brightness=0.1, contrast=0.1)


@pytest.fixture(scope="module")
def digits() -> Digits:
    return Digits()


@pytest.fixture
def data(digits) -> ImageData:
    return some(digits, flip=True)


@pytest.mark.slow
def test_training_with_it_is_another_run_and_without_strength_the_same(data, tmp_path):
    plain, off, on = (
        Fit(tmp_path / name, data, augment=augment)
        for name, augment in (("plain", None), ("off", Augment()), ("on", AUGMENT))
    )
    assert_same(plain.state, off.state)
    assert plain.metrics() == off.metrics()
    assert not torch.equal(plain.state["conv_in.weight"], on.state["conv_in.weight"])


@pytest.mark.parametrize("accumulate", [1, 2])
def test_an_augmented_run_that_was_stopped_ends_like_one_that_was_not(accumulate, data, tmp_path, monkeypatch):
    settings = {"augment": AUGMENT, "accumulate": accumulate}
    undisturbed = Fit(tmp_path / "whole", data, **settings)
    stop_at(monkeypatch, 2)
    with pytest.raises(Interrupted):
        Fit(tmp_path / "parts", data, **settings)
    last = checkpoint.last_whole(tmp_path / "parts" / "checkpoints")
    resumed = Fit(tmp_path / "parts", data, model=network(seed=5), resume=last, **settings)
    assert last.name == "2"
    assert_same(resumed.state, undisturbed.state)
    assert resumed.metrics() == undisturbed.metrics()


def test_batches_are_augmented_after_the_flip_as_a_whole_and_nothing_else_of_them_changes(data):
    def drawn(augment: Augment | None, accumulate: int = 1, seed: int = 3, step: int = 7) -> list[Tensor]:
        parts = drawn_by(data, seed, step, augment=augment, accumulate=accumulate)
        return [torch.cat(column) for column in zip(*parts, strict=True) if column[0] is not None]

    plain, augmented = drawn(None), drawn(AUGMENT)
    assert torch.equal(augmented[0], AUGMENT(plain[0], generator(3, "augment", 7)))
    assert all(map(torch.equal, plain[1:], augmented[1:]))
    for accumulate in (2, 16):
        assert all(map(torch.equal, drawn(AUGMENT, accumulate), augmented))
    still = Augment(brightness=0.1)
    assert not torch.equal(drawn(still, step=8)[0] - drawn(None, step=8)[0], drawn(still)[0] - plain[0])


def test_held_out_images_are_not_augmented(data, tmp_path):
    """Where no weight moves, their loss is that of a run without."""
    plain, augmented = (Fit(tmp_path / str(a is None), data, augment=a, lr=0.0) for a in (None, AUGMENT))
    assert plain.metrics("held_out") == augmented.metrics("held_out")
    pairs = zip(plain.metrics("train"), augmented.metrics("train"), strict=True)
    assert all(one["loss"] != other["loss"] for one, other in pairs)


# ---------------------------------------------------------------------------------------------- configurations


def named(*words: str) -> str:
    """The hash of a run, whatever its data."""
    settings = resolved(compose("train", list(words)))
    return science_hash(science(settings, {}, {}, 1))


@pytest.mark.slow
def test_a_run_has_the_name_that_its_augmentation_deserves():
    plain = named()
    settings = resolved(compose("train", []))
    del settings["augment"]  # as in runs of earlier versions
    assert plain == science_hash(science(settings, {}, {}, 1))
    for same in (["augment.padding=reflection"], ["augment.elastic_nodes=9"], ["augment.rotation=0"], ["~augment"]):
        assert named(*same) == plain, same
    changed = [["augment=script"], ["augment=photo"], *([f"augment.{name}={value}"] for name, value in EACH)]
    assert len({plain, *(named(*words) for words in changed)}) == 1 + len(changed)


def test_what_an_augmentation_does_not_use_is_not_in_its_runs_name():
    light = named("augment.brightness=0.1")
    assert light == named("augment.brightness=0.1", "augment.padding=reflection", "augment.elastic_nodes=9")
    turn = named("augment.rotation=8")
    assert turn == named("augment.rotation=8", "augment.elastic_nodes=9")
    assert turn != named("augment.rotation=8", "augment.padding=reflection")
    assert named("augment.elastic=1") != named("augment.elastic=1", "augment.elastic_nodes=9")


@pytest.fixture
def task(monkeypatch):
    hydra = {"hydra": {"mode": "RUN", "overrides": {"task": []}}}
    monkeypatch.setattr(HydraConfig.instance(), "cfg", OmegaConf.create(hydra))


def test_the_command_trains_with_what_is_configured(task, tmp_path, monkeypatch):
    given = []

    def fit(*arguments: object, augment: Augment | None, **options: object) -> tuple[str, SimpleNamespace]:
        given.append(augment)
        return "steps", SimpleNamespace(model=None)

    monkeypatch.setattr(Trainer, "fit", fit)
    for name in ("_draw_results", "_print_next"):
        monkeypatch.setattr(training, name, lambda *arguments: None)
    for number, words in enumerate((["augment=script"], [], ["~augment"])):
        training.train(compose("train", [*words, f"runs={tmp_path / str(number)}", "device=cpu"]))
    script, none, nothing = given
    assert (script.rotation, script.elastic, script.vertical_flip) == (8, 1, False)
    assert not none.active and nothing is None


@pytest.mark.parametrize(
    "word", ["augment.rotation=181", "augment.elastic=-1", "augment.padding=zeros", "augment.brightness=true"]
)
def test_wrong_values_are_refused_before_anything_begins(word, task, tmp_path):
    with pytest.raises(InvalidInput, match=rf"^augment: {word.split('=')[0].split('.')[1]} = .*") as raised:
        prepare.planned(compose("train", [word, f"runs={tmp_path}"]), CPU)
    assert "\n" not in str(raised.value) and list(Path(tmp_path).iterdir()) == []


def test_the_choices():
    script, photo = (resolved(compose("train", [f"augment={name}"]))["augment"] for name in ("script", "photo"))
    assert (script["rotation"], script["scale"], script["translation"], script["elastic"]) == (8, 0.1, 0.06, 1)
    assert not script["vertical_flip"] and not photo["vertical_flip"] and photo["padding"] == "reflection"
    assert (photo["scale"], photo["translation"], photo["brightness"], photo["contrast"]) == (0.1, 0.06, 0.1, 0.1)
