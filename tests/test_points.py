"""ddpm/data/points.py: the formulas in closed form, moments, identity, and every refusal."""

import math
from pathlib import Path

import pytest
import torch
import yaml
from torch import Tensor

from ddpm.data import Gaussians, Moons, Points, SwissRoll
from ddpm.runs.schema import check

CONF = Path(__file__).parents[1] / "conf" / "data"
SOURCES = {"swiss_roll": SwissRoll, "moons": Moons, "gaussians": Gaussians}
every = pytest.mark.parametrize("source", SOURCES.values(), ids=SOURCES)


def as_drawn(d: Points) -> Tensor:
    """The points before they were standardised, float64 (N, 2)."""
    return d.points.double() * d.std + d.mean


def close(found: Tensor, expected: Tensor, atol: float = 1e-5):
    torch.testing.assert_close(found, expected.expand_as(found).to(found), rtol=0, atol=atol)


def toy(n: int = 50, **options: object) -> Points:
    """Labelled points that lie evenly on a parabola."""
    x = torch.linspace(-2, 3, n)
    return Points("toy", torch.stack([x, x**2], 1), torch.arange(n) % 3, **options)


# ---------------------------------------------------------------------------------------------- formulas


@every
def test_each_coordinate_has_mean_0_and_standard_deviation_1(source):
    x = source().points
    assert x.dtype == torch.float32 and x.shape == (10_000, 2)
    close(x.double().mean(0), torch.zeros(2), 1e-7)
    close(x.double().square().mean(0), torch.ones(2), 1e-6)


def test_standardising_is_undone_by_mean_and_std():
    x = torch.tensor([[1.0, -3.0], [3.0, 5.0], [2.0, 4.0]], dtype=torch.float64)
    d = Points("toy", x)
    close(d.mean, torch.tensor([2.0, 2.0]), 1e-12)
    close(d.std.square(), torch.tensor([2 / 3, 38 / 3]).double(), 1e-6)
    close(d.points, (x - d.mean) / d.std, 1e-6)
    close(as_drawn(d), x)


def test_the_swiss_roll_is_a_spiral_of_one_and_a_half_turns():
    p = as_drawn(SwissRoll(20_000, noise=0.0))
    t = p.norm(dim=1)  # |(t cos t, t sin t)| = t
    assert t.min() > 1.5 * math.pi - 1e-5 and t.max() < 4.5 * math.pi + 1e-5
    close(p, torch.stack([t * t.cos(), t * t.sin()], 1), 1e-4)
    u = (t / (1.5 * math.pi) - 1) / 2
    quantiles = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    close(u.quantile(quantiles), quantiles, 0.015)  # t is uniform


def test_moons_are_two_half_circles():
    d = Moons(1001, noise=0.0)
    p, upper = as_drawn(d), d.labels == 0
    assert d.labels.bincount().tolist() == [501, 500] and d.labels[:4].tolist() == [0, 1, 0, 1]
    close((p[upper]).norm(dim=1), torch.ones(1))
    close((p[~upper] - torch.tensor([1, 0.5])).norm(dim=1), torch.ones(1))
    assert (p[upper, 1] > -1e-6).all() and (p[~upper, 1] < 0.5 + 1e-6).all()
    for x in (p[upper, 0], 1 - p[~upper, 0]):  # cos of a uniform angle
        close(x.clamp(-1, 1).acos().mean(), torch.tensor(math.pi / 2), 0.15)


@pytest.mark.parametrize("modes", [3, 8])
def test_gaussians_are_evenly_spaced_on_a_circle(modes):
    d = Gaussians(16_000, noise=0.0, modes=modes)
    p = as_drawn(d)
    close(p.norm(dim=1), torch.ones(1))
    angle = torch.atan2(p[:, 1], p[:, 0]) % (2 * math.pi)
    close((angle - 2 * math.pi * d.labels / modes + 1) % (2 * math.pi), torch.ones(1))
    assert (d.labels.bincount() - 16_000 / modes).abs().max() < 1
    noisy = as_drawn(Gaussians(16_000, noise=0.2, modes=modes))
    for y in range(modes):
        own = noisy[d.labels == y]
        close(own.mean(0), p[d.labels == y][0], 5 * 0.2 / len(own) ** 0.5)
        close(own.std(0), torch.tensor([0.2]), 0.02)


def test_one_gaussian_is_standard_normal():
    x = Gaussians(20_000, modes=1, noise=3.0).points
    close(x.abs().mean(0), torch.tensor(math.sqrt(2 / math.pi)), 0.02)
    close((x**4).mean(0), torch.tensor(3.0), 0.2)


@pytest.mark.parametrize(("source", "noise"), [(SwissRoll, 0.5), (Moons, 0.05), (Gaussians, 0.1)])
def test_noise_is_added_to_the_same_places(source, noise):
    """It is normal in both coordinates, independent of each other and of the place, and scaled by `noise`."""
    clean = as_drawn(source(20_000, noise=0.0))
    n = (as_drawn(source(20_000)) - clean) / noise
    assert n.mean(0).abs().max() < 0.03 and (n.std(0) - 1).abs().max() < 0.02 and ((n**4).mean(0) - 3).abs().max() < 0.3
    together = torch.corrcoef(torch.cat([n, clean], 1).mT)
    assert together[0, 1].abs() < 0.03 and together[:2, 2:].abs().max() < 0.03
    double = (as_drawn(source(20_000, noise=2 * noise)) - clean) / noise
    close(double, 2 * n, 1e-4)


FIRST = {
    "swiss_roll": [[0.4103706, 0.8269573], [1.0080165, 1.2807037]],
    "moons": [[-1.0676357, 1.3787766], [-0.5411426, 0.2663031]],
    "gaussians": [[1.5949906, 0.0924225], [0.8133206, 1.1251525]],
}


@pytest.mark.parametrize("name", SOURCES)
def test_points_are_the_same_everywhere_and_whatever_the_seed(name):
    d = SOURCES[name]()
    close(d.points[:2], torch.tensor(FIRST[name]), 2e-6)
    torch.manual_seed(5)
    assert torch.equal(SOURCES[name]().points, d.points) and SOURCES[name]().identity() == d.identity()


# ---------------------------------------------------------------------------------------------- a data set


def test_labels_and_their_names():
    roll, moons, gaussians = SwissRoll(100), Moons(100), Gaussians(100, modes=3)
    assert (roll.labels, roll.num_classes, roll.classes, roll.holds) == (None, 0, (), frozenset())
    assert (moons.num_classes, moons.classes, moons.holds) == (2, ("upper", "lower"), {"classes"})
    assert (gaussians.num_classes, gaussians.classes, gaussians.holds) == (3, ("0", "1", "2"), {"classes"})
    assert gaussians.labels.dtype == torch.int64 and toy().classes == ("0", "1", "2")


@every
def test_batch_has_the_points_and_their_classes(source):
    d, indices = source(100), torch.tensor([7, 0, 7, 99])
    batch = d.batch(indices)
    assert d.shape == (2,) and d.nbytes == 800 and len(d) == 100 and d.device.type == "cpu" and len(batch) == 4
    assert batch.x.dtype == torch.float32 and torch.equal(batch.x, d.points[indices])
    if d.labels is None:
        assert batch.y is None and batch.condition.parts == ()
    else:
        assert batch.y.dtype == torch.int64 and torch.equal(batch.y, d.labels[indices])
    assert torch.equal(d.batch(indices, generator=torch.Generator()).x, batch.x)


def test_to_moves_points_and_labels_and_returns_itself():
    d = toy()
    identity = d.identity()
    assert d.to("meta") is d and d.device.type == d.points.device.type == d.labels.device.type == "meta"
    assert d.identity() == identity and d.batch(torch.arange(3), "meta").y.device.type == "meta"
    assert SwissRoll(10).to("meta").labels is None


@every
def test_the_held_out_part_is_fixed_and_the_rest_is_shuffled_each_epoch(source):
    d = source(100)
    assert len(d.held_out) == 20 and sorted([*d.train.tolist(), *d.held_out.tolist()]) == list(range(100))
    assert torch.equal(d.held_out, toy(100).held_out)
    assert len(source(100, validation=0).held_out) == 0
    seen = torch.cat([d.order(3, step, 16) for step in range(1, 11)]).tolist()
    assert sorted(seen[:80]) == sorted(seen[80:]) == d.train.tolist() and seen[:80] != seen[80:]
    assert d.order(3, 4, 16).tolist() == source(100).order(3, 4, 16).tolist() != d.order(4, 4, 16).tolist()


@every
def test_nothing_changes_the_source_while_a_process_runs(source):
    assert source(10).origin is not None and not source(10).origin.changed()


@every
def test_identity_is_what_the_data_are(source):
    d = source(100)
    assert d.identity() | {"sha256": ""} == {"name": d.name, "split": "all", "count": 100, "sha256": ""}
    assert len(d.identity()["sha256"]) == 64 and source(100, validation=0.5).identity() == d.identity()
    others = [source(101), source(100, noise=0.3), *([Gaussians(100, modes=5)] if source is Gaussians else [])]
    assert len({d.identity()["sha256"], *(other.identity()["sha256"] for other in others)}) == 1 + len(others)


def test_identity_changes_with_any_value_and_any_label():
    x, y = toy().points, toy().labels
    changed, relabelled = x.clone(), y.clone()
    changed[3, 1] += 1e-3
    relabelled[3] = (relabelled[3] + 1) % 3
    given = [(x, y), (changed, y), (x, relabelled), (x, None), (x.flip(0), y)]
    assert len({Points("toy", *one).identity()["sha256"] for one in given}) == len(given)
    assert Points("toy", x.clone(), y.clone()).identity() == Points("toy", x, y).identity()
    assert Points("other", x, y).identity() == Points("toy", x, y).identity() | {"name": "other"}


@pytest.mark.parametrize("name", SOURCES)
def test_the_configuration_makes_the_defaults(name):
    keys = yaml.safe_load((CONF / f"{name}.yaml").read_text())
    check(keys)
    assert keys.pop("_target_") == f"ddpm.data.{SOURCES[name].__name__}"
    configured = SOURCES[name](**keys)
    assert configured.identity() == SOURCES[name]().identity() and configured.name == name
    assert torch.equal(configured.held_out, SOURCES[name]().held_out)


# ---------------------------------------------------------------------------------------------- what is refused


@every
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"count": 1}, "count=1: .* 2 <= count <= 10,000,000"),
        ({"count": 10**7 + 1}, "count=10000001: .* 2 <= count <= 10,000,000"),
        ({"count": 50.0}, "count=50.0: a whole number"),
        ({"count": True}, "count=True: a whole number"),
        ({"noise": -0.1}, "noise=-0.1: .* 0 <= noise <= 100"),
        ({"noise": 101}, "noise=101: .* 0 <= noise <= 100"),
        ({"noise": math.nan}, "noise=nan: .* 0 <= noise <= 100"),
        ({"noise": "loud"}, "noise='loud': .* 0 <= noise <= 100"),
        ({"split": "train"}, "split='train': .* no published split; use auto"),
        ({"validation": 1.0}, "0 <= validation < 1"),
        ({"validation": -0.1}, "0 <= validation < 1"),
        ({"validation": math.nan}, "0 <= validation < 1"),
    ],
)
def test_options_outside_their_range_name_the_range(source, options, message):
    with pytest.raises(ValueError, match=message):
        source(**options)


@pytest.mark.parametrize("modes", [0, -1, 101, 2.5, True])
def test_modes_are_at_least_one_and_have_a_point_each(modes):
    with pytest.raises(ValueError, match=f"modes={modes}: a whole number, 1 <= modes <= count = 100"):
        Gaussians(100, modes=modes)


@pytest.mark.parametrize("modes", [1, 2])
def test_points_on_a_line_cannot_be_standardised(modes):
    with pytest.raises(ValueError, match=r"both must vary .* choose noise > 0"):
        Gaussians(100, noise=0.0, modes=modes)
    assert Gaussians(100, noise=1e-3, modes=modes).points.isfinite().all()


@pytest.mark.parametrize("wrong", [torch.zeros(5, 3), torch.zeros(5), torch.zeros(1, 2), torch.zeros(5, 2).long()])
def test_other_tensors_than_points_are_refused(wrong):
    with pytest.raises(ValueError, match=r"points are floats \(N, 2\), N >= 2, not torch\..* \("):
        Points("toy", wrong)


def test_other_labels_than_those_of_the_points_are_refused():
    x = torch.randn(3, 2)
    with pytest.raises(ValueError, match=r"3 points but labels of shape \(2,\)"):
        Points("toy", x, torch.arange(2))
    with pytest.raises(ValueError, match=r"label 2 .* is outside 0\.\.1"):
        Points("toy", x, torch.arange(3), ("a", "b"))
    with pytest.raises(ValueError, match="both must vary"):
        Points("toy", x * torch.tensor([1, math.nan]))
    with pytest.raises(ValueError, match="without / and"):
        Points("a/b", x)
