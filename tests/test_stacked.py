"""ddpm/sources/stacked.py: samples that are drawn of several networks at once are those of each alone."""

import pytest
import torch
from test_trainer import unet
from torch import Tensor, nn

from ddpm.data.batch import Condition
from ddpm.diffusion import GaussianDiffusion
from ddpm.guidance import Auto, ByClassifier, ClassifierFree, ClassifierOf, Guidance, Trained
from ddpm.randomness import SampleNoise
from ddpm.samplers import DDIM, Ancestral, AnnealedLangevin, DPMSolverPP, Heun, Sampler
from ddpm.schedules import cosine, sigmoid
from ddpm.sources import stacked as module
from ddpm.sources.stacked import Shared, SharingSampler, StackedSampler
from ddpm.sources.trained import TrainedSampler
from models.mlp import MLP
from models.noisy_classifier import NoisyClassifier

S, T, SHAPE, CPU = 3, 20, (1, 8, 8), torch.device("cpu")
ROUNDING = 2e-5  # of values up to 1, after a few steps
CLASSES = {"num_classes": 3, "drop": 0.1, "channels": 8}
SMALL = {"channel_mults": (1,), "attention_resolutions": (), "middle_attention": False}


def network(s: int, **options: object) -> nn.Module:
    """With random weights everywhere: a fresh one answers zero."""
    model = unet(s, **{**SMALL, **options})
    for p in model.parameters():
        nn.init.normal_(p, std=0.1)
    return model


def source(model: nn.Module, sampler: Sampler | None = None, seed: int = 0, **changed: object) -> TrainedSampler:
    diffusion = changed.pop("diffusion", None) or GaussianDiffusion(cosine(T))
    return TrainedSampler(diffusion, model, sampler or DDIM(2), changed.pop("shape", SHAPE), seed, CPU, **changed)


def sources(sampler: Sampler | None = None, seeds: tuple[int, ...] = (5, 0), **changed: object):
    options = changed.pop("options", {})
    return [source(network(s, **options), sampler, seed, **changed) for s, seed in enumerate(seeds)]


def sharing(alone: list[TrainedSampler], told: list[str] | None = None) -> list[SharingSampler]:
    shared = Shared(alone, (told if told is not None else []).append)
    return [SharingSampler(one, shared, s) for s, one in enumerate(alone)]


def assert_as_alone(alone: list[TrainedSampler], numbers: list[int] = [4, 0, 7]) -> Tensor:  # noqa: B006  # read alone
    """Rows of all, which are those of each."""
    together = StackedSampler(alone).draw(numbers).unflatten(0, (len(alone), -1))
    each = torch.stack([one.draw(numbers) for one in alone])
    torch.testing.assert_close(together, each, rtol=0, atol=ROUNDING)
    assert min((a - b).abs().max() for s, a in enumerate(each) for b in each[:s]) > 1e-2
    return together


@pytest.mark.parametrize(
    "sampler",
    [
        DDIM(3),
        DDIM(3, eta=1.0),
        Ancestral(3),
        DPMSolverPP(4, order=2),
        DPMSolverPP(2, order=2, kind="singlestep", grid="continuous"),
        Heun(2, churn=0.5, grid="continuous"),
        AnnealedLangevin(2, moves=1, predictor=True),
    ],
    ids=lambda sampler: type(sampler).__name__,
)
def test_samples_are_those_of_each_alone(sampler):
    """Of two networks with one seed and one with another; of v, whose x_0 is no quotient by sqrt(alpha_bar_T)."""
    assert_as_alone(sources(sampler, seeds=(5, 0, 5), diffusion=GaussianDiffusion(cosine(T), target="v")))


@pytest.mark.parametrize(
    ("asked", "guidance"),
    [
        (None, None),
        ([], None),
        (None, ClassifierFree(2.0)),
        ([2, 0], ClassifierFree(2.0, rescale=0.7, interval=(-4.0, 3.0))),
    ],
    ids=["all", "none", "guided", "some, guided in an interval"],
)
def test_classes_and_guidance_are_those_of_each_alone(asked, guidance):
    """Guidance puts rows without classes behind those with: each network still has its own."""
    assert_as_alone(sources(DPMSolverPP(3), requested=asked, guidance=guidance, options=CLASSES))


def test_several_labels_and_attention():
    alone = sources(styles=[1], options={"num_classes": (3, 2), "drop": 0.1, "attention_resolutions": (8,)})
    assert_as_alone(alone)


@pytest.mark.parametrize(
    "settings",
    [
        {"variance": "learned", "target": "v"},
        {"target": "x_0", "clip_x_0": False},
        {"dynamic_threshold": 0.9},
        {"preconditioning": "edm"},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_the_mathematics_is_that_of_each_alone(settings):
    options = {"out_channels": 2 if "variance" in settings else 1}
    assert_as_alone(sources(Ancestral(2), diffusion=GaussianDiffusion(cosine(T), **settings), options=options))


def test_dropout_is_off():
    assert_as_alone(sources(options={"dropout": 0.5}))


def points(s: int) -> TrainedSampler:
    torch.manual_seed(s)
    return source(MLP(2, 16, 2, time="fourier", octaves=2, energy=True), Ancestral(2), s, shape=(2,))


def test_points_by_energies_with_frequencies_that_are_buffers():
    assert_as_alone([points(s) for s in range(S)])


class Told(nn.Module):
    """Says what it is told."""

    takes = ("image",)

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x_t: Tensor, t: Tensor, told: Condition) -> Tensor:
        return self.scale * told.image


def test_each_is_told_what_it_is_told_alone():
    """Conditions may differ from source to source: here images, each source of its own."""
    rows = [torch.full((4, *SHAPE), 0.1 * (s + 1)) for s in range(S)]

    class Images:
        labels = further_labels = None

        def __init__(self, s: int):
            self.s = s

        def of_labels(self, *labels: object) -> "Images":
            return self

        def condition_rows(self, numbers: object) -> Tensor:
            return torch.tensor(list(numbers)) % 4

        def batch(self, indices: Tensor, device: object = None) -> object:
            from ddpm.data.batch import Batch

            return Batch(rows[self.s][indices], Condition(image=rows[self.s][indices]))

    diffusion = GaussianDiffusion(cosine(T), "x_0")
    drawn = assert_as_alone([source(Told(), diffusion=diffusion, data=Images(s)) for s in range(S)])
    torch.testing.assert_close(drawn.mean((1, 2, 3, 4)), torch.tensor([0.1, 0.2, 0.3]))


def test_seeds_move_together():
    alone = sources(Ancestral(3))
    further = StackedSampler(alone).with_seed(alone[0].seed + 2).draw([1])
    each = torch.cat([one.with_seed(one.seed + 2).draw([1]) for one in alone])
    torch.testing.assert_close(further, each, rtol=0, atol=ROUNDING)


def test_noise_has_a_seed_for_each_row():
    mixed = SampleNoise([3, 1, 3], [0, 0, 2])(1, (2,))
    assert torch.equal(mixed, torch.stack([SampleNoise(seed, [n])(1, (2,))[0] for seed, n in ((3, 0), (1, 0), (3, 2))]))


@pytest.mark.parametrize(
    ("one", "other", "told"),
    [
        ({}, {"sampler": DDIM(5)}, "sampler"),
        ({}, {"diffusion": GaussianDiffusion(sigmoid(T))}, "schedule"),
        ({}, {"diffusion": GaussianDiffusion(cosine(T), "v")}, "predicted"),
        ({}, {"precision": "bf16"}, "precision"),
        ({"requested": [1]}, {"requested": [2]}, "requested"),
        ({"guidance": ClassifierFree(2.0)}, {"guidance": ClassifierFree(3.0)}, "guidance"),
        ({"guidance": ClassifierFree(2.0)}, {}, "guidance"),
        ({}, {"options": {"heads": 2}}, "more than weights"),
        ({}, {"options": {"channels": 16}}, "more than weights"),
    ],
)
def test_what_is_not_drawn_at_once(one, other, told):
    def of(settings: dict) -> TrainedSampler:
        options = CLASSES | {"attention_resolutions": (8,)} | settings.get("options", {})
        return source(network(0, **options), **{k: v for k, v in settings.items() if k != "options"})

    with pytest.raises(ValueError, match=told):
        StackedSampler([of(one), of(other)])


def test_guides_that_are_networks_are_drawn_with_one_by_one():
    bad, classifies = network(3, **CLASSES), NoisyClassifier(8, 1, 3, channels=8, groups=4).eval()
    for guidance in (
        Auto(Trained(GaussianDiffusion(cosine(T)), bad)),
        ByClassifier(ClassifierOf(cosine(T), classifies)),
    ):
        with pytest.raises(ValueError, match="network of its own"):
            StackedSampler(sources(guidance=guidance, options=CLASSES))
        one, *_ = sharing(sources(options=CLASSES))
        alone = source(network(0, **CLASSES), seed=5, guidance=guidance).draw([0])
        assert torch.equal(one.guided_by(guidance).draw([0]), alone)


def counted(monkeypatch) -> list[int]:
    """How many rows every walk that is begun has."""
    rows, call = [], DDIM.__call__

    def counting(self, schedule, denoise, x_T, **options):
        rows.append(len(x_T))
        return call(self, schedule, denoise, x_T, **options)

    monkeypatch.setattr(DDIM, "__call__", counting)
    return rows


def test_what_the_first_asks_for_is_drawn_for_all(monkeypatch):
    """Of any batch, seed, sampler and guidance; and each is given its own, once."""
    alone = sources(options=CLASSES)
    requests = [
        lambda one: one.samples(3, batch=2),
        lambda one: one.with_seed(one.seed + 1).samples(2),
        lambda one: one.using(DDIM(3, eta=1.0)).draw([0, 3]),
        lambda one: one.guided_by(ClassifierFree(2.0)).draw([0, 3]),
        lambda one: one.draw([0, 3]),
    ]
    expected = [[request(one) for request in requests] for one in alone]
    rows = counted(monkeypatch)
    together = sharing(alone)
    for one, each in zip(together, expected, strict=True):
        for request, x in zip(requests, each, strict=True):
            torch.testing.assert_close(request(one), x, rtol=0, atol=ROUNDING)
    assert rows == [4, 2, 4, 4, 4, 4]
    assert together[1].draw([0, 3]).shape == (2, *SHAPE) and rows[-1] == 2


def test_ways_are_drawn_for_all(monkeypatch):
    alone = sources()
    expected = [one.way(2, 3) for one in alone]
    rows = counted(monkeypatch)
    for one, way in zip(sharing(alone), expected, strict=True):
        for (t, x_t), (t_alone, alone_x_t) in zip(one.way(2, 3), way, strict=True):
            assert t == t_alone
            torch.testing.assert_close(x_t, alone_x_t, rtol=0, atol=ROUNDING)
    assert rows == [4]


def test_each_knows_how_far_its_own_samples_leave_the_range():
    class Loud(nn.Module):
        def __init__(self, size: float):
            super().__init__()
            self.size = nn.Parameter(torch.tensor(size))

        def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
            return self.size * torch.ones_like(x_t)

    unclipped = GaussianDiffusion(cosine(T), "x_0", clip_x_0=False)
    one, other = sharing([source(Loud(size), diffusion=unclipped) for size in (0.5, 3.0)])
    one.draw([0]), other.draw([0])
    assert str(one.range) == "" and "up to 3" in str(other.range)


def test_what_cannot_be_drawn_at_once_is_drawn_alone(monkeypatch):
    """What torch.vmap cannot do, or memory that there is not: it is said once."""

    class Stern(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))

        def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
            return self.scale * x_t if x_t.mean().item() < 9 else x_t

    told: list[str] = []
    alone = [source(Stern()) for _ in range(2)]
    rows = counted(monkeypatch)
    for one in sharing(alone, told):
        assert torch.equal(one.draw([0, 1]), alone[0].draw([0, 1]))
    assert len(told) == 1 and "vmap" in told[0] and rows == [4, 2, 2, 2, 2]


def test_only_so_much_is_kept(monkeypatch):
    monkeypatch.setattr(module, "MOST_PENDING", 2 * 64 * 4)
    alone = sources(seeds=(0, 1, 2))
    rows = counted(monkeypatch)
    first, second, third = sharing(alone)
    first.samples(3, batch=2)  # which leaves four images
    assert rows == [6, 1]
    second.samples(3, batch=2), third.samples(3, batch=2)
    assert rows == [6, 1, 1, 1]


def test_guidance_of_nothing_is_plain():
    assert not module._holds_more(Guidance())
