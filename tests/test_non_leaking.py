"""ddpm/data/non_leaking.py: maps that are known and undone, what is told of them, and what training makes of it."""

import math

import pytest
import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf
from test_augment import CPU, named
from test_trainer import Fit, assert_same, some, stop_at, task_of, unet
from torch import Tensor, nn

from ddpm.commands.train import prepare
from ddpm.config import InvalidInput, compose, resolved
from ddpm.data import Digits, ImageData
from ddpm.data.batch import Batch, Condition
from ddpm.data.non_leaking import KINDS, PARAMETERS, NonLeaking, _stretched
from ddpm.diffusion import GaussianDiffusion
from ddpm.randomness import generator
from ddpm.runs import checkpoint
from ddpm.samplers import DDIM
from ddpm.schedules import cosine
from ddpm.sources.trained import TrainedSampler
from ddpm.training.interrupt import Interrupted
from ddpm.training.step import Training
from ddpm.training.trainer import Trainer

ALWAYS = NonLeaking(p=1.0, kinds=KINDS)
COLUMNS = {  # of a
    "horizontal_flip": [0], "vertical_flip": [1], "scale": [2], "rotation": [3, 4], "stretch": [5, 6],
    "translation": [7, 8],
}  # fmt: skip


def seeded(step: int = 1) -> torch.Generator:
    return generator(0, "augment", step)


def images(n: int = 6, height: int = 16, width: int = 12) -> Tensor:
    return 2 * torch.rand(n, 2, height, width) - 1


def blobs(n: int, size: int, off: tuple[float, float]) -> Tensor:
    """Smooth images in double precision: a Gaussian that is wider than high, off the centre by so many pixels."""
    at = torch.arange(size, dtype=torch.float64) - size // 2
    right, down = at[None, :] - off[0], at[:, None] - off[1]
    return (-(right**2) / 32 - down**2 / 18).exp().expand(n, 1, -1, -1)


def told(n: int = 1, **numbers: list[float]) -> Tensor:
    """Parameters in double precision, 0 but for those of the kinds that are named."""
    a = torch.zeros(n, PARAMETERS, dtype=torch.float64)
    for kind, values in numbers.items():
        a[:, COLUMNS[kind]] = torch.tensor(values, dtype=torch.float64)
    return a


def turn(degrees: float) -> list[float]:
    return [math.cos(math.radians(degrees)) - 1, math.sin(math.radians(degrees))]


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (2,) and covariance (2, 2) of (right, down) under an image (1, 1, S, S) as a density."""
    at = torch.arange(x.shape[-1], dtype=x.dtype) - x.shape[-1] // 2
    weight = x[0, 0] / x.sum()
    points = torch.stack(torch.broadcast_tensors(at[None, :], at[:, None]))
    mean = (weight * points).sum((1, 2))
    centred = points - mean[:, None, None]
    return mean, torch.einsum("yx,iyx,jyx->ij", weight, centred, centred)


# --- Maps


def test_parameters_of_zero_leave_the_image_as_it_is():
    x = images()
    a = torch.zeros(6, PARAMETERS)
    assert torch.equal(ALWAYS.applied(x, a), x)
    a[2, 2] = 0.5
    some_changed = ALWAYS.applied(x, a)
    assert torch.equal(some_changed[[0, 1, 3, 4, 5]], x[[0, 1, 3, 4, 5]]) and not torch.equal(some_changed[2], x[2])


def test_flips_are_exact():
    x = images().double()
    assert torch.equal(ALWAYS.applied(x, told(6, horizontal_flip=[1])), x.flip(-1))
    assert torch.equal(ALWAYS.applied(x, told(6, vertical_flip=[1])), x.flip(-2))


def test_a_quarter_turn_is_rot90_and_whole_pixels_are_a_roll():
    x = images(3, 12, 12).double()
    torch.testing.assert_close(ALWAYS.applied(x, told(3, rotation=turn(90))), x.rot90(1, (2, 3)), rtol=0, atol=1e-9)
    moved = NonLeaking(p=1, translation=0.25).applied(x, told(3, translation=[1, -2]))  # 3 pixels right, 6 up
    torch.testing.assert_close(moved[:, :, :6, 3:], x[:, :, 6:, :-3], rtol=0, atol=1e-9)


@pytest.mark.equation("EDM (anisotropic scaling)")
def test_a_stretch_is_the_exponential_of_its_matrix():
    d = torch.tensor([[0.0, 0.0], [0.3, 0.0], [-0.2, 0.5], [0.0, -1.0]], dtype=torch.float64)
    generators = torch.stack([d[:, 0], d[:, 1], d[:, 1], -d[:, 0]], 1).reshape(-1, 2, 2)
    torch.testing.assert_close(_stretched(d), torch.linalg.matrix_exp(math.log(2) * generators), rtol=1e-12, atol=1e-12)
    size, phi = 0.7, 0.4
    axis = torch.tensor([math.cos(phi), math.sin(phi)], dtype=torch.float64)
    across = torch.tensor([-axis[1], axis[0]], dtype=torch.float64)
    matrix = _stretched(size * torch.tensor([[math.cos(2 * phi), math.sin(2 * phi)]], dtype=torch.float64))[0]
    torch.testing.assert_close(matrix @ axis, 2**size * axis, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(matrix @ across, 2**-size * across, rtol=1e-12, atol=1e-12)


def test_a_blob_is_mapped_as_the_parameters_say():
    """Mean and covariance after stretching, turning, growing and moving, in that order, in closed form."""
    augment, size = NonLeaking(p=1, scale=0.2, stretch=0.2, translation=0.1), 65
    a = told(scale=[-0.8], rotation=turn(35), stretch=[0.9, -0.4], translation=[0.6, -0.3])
    A = _stretched(0.2 * a[:, 5:7])[0]
    theta = math.radians(35)  # counter-clockwise, where down is positive
    R = torch.tensor([[math.cos(theta), math.sin(theta)], [-math.sin(theta), math.cos(theta)]], dtype=torch.float64)
    A = 2 ** (0.2 * -0.8) * R @ A
    before, after = moments(blobs(1, size, (3, -2))), moments(augment.applied(blobs(1, size, (3, -2)), a))
    move = 0.1 * size * torch.tensor([0.6, -0.3], dtype=torch.float64)
    torch.testing.assert_close(after[0], A @ before[0] + move, rtol=0, atol=0.02)
    torch.testing.assert_close(after[1], A @ before[1] @ A.T, rtol=0.02, atol=0.3)


@pytest.mark.parametrize(
    ("there", "back"),
    [
        ({"rotation": turn(40)}, {"rotation": turn(-40)}),
        ({"scale": [0.7]}, {"scale": [-0.7]}),
        ({"stretch": [0.3, -0.4]}, {"stretch": [-0.3, 0.4]}),
        ({"translation": [0.4, -0.9]}, {"translation": [-0.4, 0.9]}),
        ({"horizontal_flip": [1], "rotation": turn(40)}, {"horizontal_flip": [1], "rotation": turn(40)}),
    ],
    ids=str,
)
def test_the_parameters_undo_it(there, back):
    x, strong = blobs(1, 65, (2.0, -1.5)), NonLeaking(scale=1, stretch=1)
    changed = strong.applied(x, told(**there))
    error = (strong.applied(changed, told(**back)) - x).abs().max()
    assert error < 0.05 < 0.15 < (changed - x).abs().max()


# --- Draws


@pytest.mark.equation("EDM (augmentation parameters)")
def test_what_is_told_is_what_was_applied_and_has_its_distribution():
    x = images(20_000, 4, 4)
    batch = ALWAYS.of(Batch(x, Condition(classes=torch.arange(20_000))), seeded())
    a = batch.condition.augment
    assert torch.equal(a, ALWAYS.draw(x, seeded())) and torch.equal(batch.x, ALWAYS.applied(x, a))
    assert torch.equal(batch.condition.classes, torch.arange(20_000))
    i, z, cos, sin = a[:, :2], a[:, [2, 7, 8]], a[:, 3] + 1, a[:, 4]
    assert i.unique().tolist() == [0, 1] and i.mean(0).tolist() == pytest.approx([0.5, 0.5], abs=0.02)
    assert z.mean(0).abs().max() < 0.03 and (z.std(0) - 1).abs().max() < 0.03
    torch.testing.assert_close(cos**2 + sin**2, torch.ones(20_000))
    theta = torch.atan2(sin, cos) / math.pi
    assert theta.abs().mean() == pytest.approx(0.5, abs=0.01) and theta.abs().max() <= 1
    assert a[:, 5:7].square().sum(1).mean() == pytest.approx(1, abs=0.04)  # z_r^2
    assert (a.T.corrcoef() - torch.eye(PARAMETERS)).abs().max() < 0.05
    bounded = NonLeaking(p=1, rotation=10).draw(x, seeded())
    assert torch.atan2(bounded[:, 4], bounded[:, 3] + 1).rad2deg().abs().max() == pytest.approx(10, abs=0.01)


def test_each_kind_has_its_probability_and_its_own_coin():
    a = NonLeaking(p=0.3, kinds=KINDS).draw(images(20_000, 2, 2), seeded())
    done = torch.stack([(a[:, COLUMNS[kind]] != 0).any(1) for kind in KINDS], 1).double()
    assert done.mean(0).tolist() == pytest.approx([0.15, 0.15, 0.3, 0.3, 0.3, 0.3], abs=0.02)
    assert (done.T.corrcoef() - torch.eye(6)).abs().max() < 0.03


@pytest.mark.parametrize("kind", KINDS)
def test_a_kind_alone_is_told_alone_and_draws_what_it_draws_among_others(kind):
    x = images()
    alone, all_of_them = NonLeaking(p=1, kinds=[kind]).draw(x, seeded()), ALWAYS.draw(x, seeded())
    others = [n for n in range(PARAMETERS) if n not in COLUMNS[kind]]
    assert (alone[:, others] == 0).all() and torch.equal(alone[:, COLUMNS[kind]], all_of_them[:, COLUMNS[kind]])


def test_without_probability_or_kinds_nothing_is_done():
    x = images()
    for augment in (NonLeaking(p=0), NonLeaking(p=1, kinds=[])):
        batch = augment.of(Batch(x), seeded())
        assert torch.equal(batch.x, x) and not batch.condition.augment.any() and not augment.active
    assert ALWAYS.active


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"p": 1.5}, r"p = 1.5 must be a number from 0 to 1"),
        ({"rotation": 181}, "rotation = 181 must be a number from 0 to 180"),
        ({"translation": True}, "translation = True must be"),
        ({"kinds": ["scale", "flip"]}, "kinds has 'flip', which is not known; allowed: horizontal_flip, vertical_flip"),
        ({"kinds": ["scale", "scale"]}, "names one twice"),
        ({"padding": "zeros"}, "padding = 'zeros' is not known; allowed: border, reflection"),
    ],
    ids=str,
)
def test_wrong_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        NonLeaking(**options)


# --- The condition and the network


def test_rows_of_it_are_taken_and_nothing_nulls_it():
    a = torch.arange(4.0)[:, None].expand(4, PARAMETERS)
    condition = Condition(classes=torch.arange(4), augment=a)
    assert condition.rows(lambda x: x[2:]).augment[:, 0].tolist() == [2, 3] and condition.parts == ("classes",)
    nulled = condition.dropped(0.99, seeded()).nulled()
    assert torch.equal(nulled.augment, a) and nulled.null["classes"].all()


@pytest.mark.parametrize("options", [{}, {"num_classes": 10}, {"num_classes": 10, "drop": 0.1}], ids=str)
def test_it_is_told_to_networks_that_take_it(options):
    taking, others = unet(augment_dim=PARAMETERS, **options), unet(**options)
    classes = torch.tensor([1, 2]) if options else None
    condition = Condition(classes=classes, augment=torch.ones(2, PARAMETERS))
    assert torch.equal(condition.for_network(taking).augment, condition.augment)
    without = condition.for_network(others)
    assert without is classes or torch.equal(without, classes)
    assert Condition(classes=classes).for_network(taking) is classes


@pytest.mark.parametrize("options", [{}, {"magnitude_preserving": True}], ids=str)
def test_told_of_zeros_it_is_the_network_without_and_the_vector_is_added_to_the_time(options):
    telling, plain = unet(augment_dim=PARAMETERS, **options), unet(**options)
    assert telling.state_dict().keys() - plain.state_dict().keys() == {"augment_embedding.weight"}
    assert_same(plain.state_dict(), {k: p for k, p in telling.state_dict().items() if k in plain.state_dict()})
    for p in telling.parameters():
        nn.init.normal_(p, std=0.3)
    plain.load_state_dict({k: p for k, p in telling.state_dict().items() if k in plain.state_dict()})
    x, t, a = torch.randn(3, 1, 8, 8), torch.tensor([1, 5, 9]), torch.randn(3, PARAMETERS)
    assert torch.equal(telling(x, t), plain(x, t))
    assert torch.equal(telling(x, t, Condition(augment=torch.zeros(3, PARAMETERS))), plain(x, t))
    added = a @ telling.augment_embedding.weight.mT
    plain.time_embedding.register_forward_hook(lambda _, given, emb: emb + added)
    torch.testing.assert_close(telling(x, t, Condition(augment=a)), plain(x, t), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(telling(x, t), telling(x, t, Condition(augment=a)), atol=1e-3)


def test_another_number_of_parameters_is_refused():
    x, t = torch.zeros(2, 1, 8, 8), torch.ones(2)
    with pytest.raises(ValueError, match=r"have shape \(2, 8\); this network takes \(B, 9\)"):
        unet(augment_dim=9)(x, t, Condition(augment=torch.zeros(2, 8)))
    with pytest.raises(ValueError, match="this network takes none: augment_dim = 0"):
        unet()(x, t, Condition(augment=torch.zeros(2, 9)))
    with pytest.raises(ValueError, match="augment_dim = -1 must be an integer >= 0"):
        unet(augment_dim=-1)


# --- Training


@pytest.fixture(scope="module")
def data() -> ImageData:
    return some(Digits())


def drawn(data: ImageData, augment: NonLeaking | None, accumulate: int = 1, step: int = 7) -> list[Tensor]:
    trainer = Trainer(steps=9, batch_size=16, accumulate=accumulate, precision="fp32")
    task = task_of(trainer, unet(augment_dim=PARAMETERS), GaussianDiffusion(cosine(20)))
    training = Training(trainer, task, data, torch.optim.AdamW, seed=3, device=CPU, augment=augment)
    parts = list(training.micro_batches(training.draw(step)))
    columns = [[p.x_0 for p in parts], [p.t for p in parts], [p.eps for p in parts]]
    columns += [] if augment is None else [[p.condition.augment for p in parts]]
    return [torch.cat(column) for column in columns]


def test_micro_batches_are_told_their_rows_and_nothing_else_of_a_step_changes(data):
    plain, whole = drawn(data, None), drawn(data, ALWAYS)
    a = ALWAYS.draw(plain[0], generator(3, "augment", 7))
    assert torch.equal(whole[3], a) and torch.equal(whole[0], ALWAYS.applied(plain[0], a))
    assert all(map(torch.equal, plain[1:], whole[1:3]))
    for accumulate in (2, 16):
        assert all(map(torch.equal, drawn(data, ALWAYS, accumulate), whole))
    assert not torch.equal(drawn(data, ALWAYS, step=8)[3], a)
    assert all(map(torch.equal, drawn(data, NonLeaking(p=0)), plain))


@pytest.mark.slow
def test_without_probability_a_run_is_as_one_without_and_otherwise_it_is_resumed_to_the_bit(
    data, tmp_path, monkeypatch
):
    def run(name: str, seed: int = 0, **options: object) -> Fit:
        return Fit(tmp_path / name, data, model=unet(seed, augment_dim=PARAMETERS), steps=4, **options)

    plain, off, on = run("plain"), run("off", augment=NonLeaking(p=0)), run("on", augment=ALWAYS)
    weights = [{k: p for k, p in fit.model.state_dict().items() if "augment" not in k} for fit in (plain, off, on)]
    assert_same(*weights[:2])
    embedding = [fit.model.augment_embedding.weight for fit in (plain, off, on)]
    assert not embedding[0].any() and not embedding[1].any() and embedding[2].any(1).all()

    stop_at(monkeypatch, 2)
    with pytest.raises(Interrupted):
        run("parts", augment=ALWAYS)
    last = checkpoint.last_whole(tmp_path / "parts" / "checkpoints")
    resumed = run("parts", 5, augment=ALWAYS, resume=last)
    assert last.name == "2"
    assert_same(resumed.state, on.state)


def test_samples_are_drawn_as_if_told_of_zeros(data):
    net = unet(augment_dim=PARAMETERS, num_classes=10)
    for p in net.parameters():
        nn.init.normal_(p, std=0.1)
    plain = unet(num_classes=10)
    plain.load_state_dict({k: p for k, p in net.state_dict().items() if k in plain.state_dict()})
    ways = [
        TrainedSampler(GaussianDiffusion(cosine(20)), model, DDIM(3), data.shape, 0, CPU, "fp32", data=data)
        for model in (net, plain)
    ]
    assert torch.equal(*(way.draw(range(2)) for way in ways))


# --- Configurations


@pytest.fixture
def task(monkeypatch):
    hydra = {"hydra": {"mode": "RUN", "overrides": {"task": []}}}
    monkeypatch.setattr(HydraConfig.instance(), "cfg", OmegaConf.create(hydra))


def test_the_network_takes_what_the_augmentation_tells():
    telling = resolved(compose("train", ["augment=non_leaking"]))
    assert telling["model"]["augment_dim"] == PARAMETERS == NonLeaking.tells
    for words in (
        [],
        ["augment=script"],
        ["~augment"],
        ["augment=non_leaking", "model.augment_dim=0"],
    ):
        assert resolved(compose("train", words))["model"]["augment_dim"] == 0
    names = [[], ["augment=non_leaking"], ["augment=non_leaking", "model.augment_dim=0"]]
    names += [["augment=non_leaking", "augment.p=0.5"], ["augment=non_leaking", "augment.kinds=[scale]"]]
    assert len({named(*words) for words in names}) == len(names)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["model.augment_dim=5"],
            "model.augment_dim = 5, but the augmentation gives 9 numbers; set .*=9",
        ),
        (["augment.kinds=[flip]"], "augment: kinds has 'flip'"),
        (["augment.p=2"], "augment: p = 2 must be a number from 0 to 1"),
    ],
    ids=str,
)
def test_wrong_words_are_refused_before_anything_begins(words, message, task, tmp_path):
    with pytest.raises(InvalidInput, match=message.replace("[", r"\[")):
        prepare.planned(compose("train", ["augment=non_leaking", *words, f"runs={tmp_path}"]), CPU)
    assert list(tmp_path.iterdir()) == []
