"""ddpm/data/points.py, shapes.py and points_file.py: formulas in closed form, moments, identity, every refusal."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from torch import Tensor

from ddpm.data import Checkerboard, Gaussians, Moons, Pinwheel, Points, PointsFile, Rings, Spiral, SwissRoll
from ddpm.runs.schema import check

CONF = Path(__file__).parents[1] / "conf" / "data"
SOURCES = {
    "swiss_roll": SwissRoll,
    "moons": Moons,
    "gaussians": Gaussians,
    "checkerboard": Checkerboard,
    "spiral": Spiral,
    "rings": Rings,
    "pinwheel": Pinwheel,
}
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


@pytest.mark.parametrize("squares", [2, 4, 6])
def test_the_dark_squares_of_a_checkerboard_are_filled_evenly(squares):
    n, half = 20_000, squares / 2
    p = as_drawn(Checkerboard(n, squares=squares)) + half
    assert (p > -1e-6).all() and (p < squares + 1e-6).all()
    inside = p[((p - p.round()).abs() > 1e-5).all(1)]  # not where rounding may move a point over an edge
    square = inside.floor().long()
    assert len(inside) > 0.99 * n and (square.sum(1) % 2 == 0).all()
    each = (square @ torch.tensor([squares, 1])).bincount()
    filled, expected = each[each > 0], n / (squares**2 / 2)
    assert len(filled) == squares**2 // 2 and ((filled - expected).abs() < 5 * expected**0.5).all()
    quantiles = torch.linspace(0.1, 0.9, 9, dtype=torch.float64)
    for coordinate in (inside - square).T:
        close(coordinate.quantile(quantiles), quantiles, 0.015)


@pytest.mark.parametrize(("arms", "turns"), [(1, 0.5), (2, 1.5), (3, 0.75), (2, 3)])
def test_a_spiral_winds_in_proportion_to_the_radius(arms, turns):
    d = Spiral(12_000, noise=0.0, arms=arms, turns=turns)
    p, r = as_drawn(d), as_drawn(d).norm(dim=1)
    angle = 2 * math.pi * (turns * r + d.labels / arms)
    close(p, r[:, None] * torch.stack([angle.cos(), angle.sin()], 1), 2e-5)
    quantiles = torch.linspace(0.1, 0.9, 9, dtype=torch.float64)
    close(r.square().quantile(quantiles), quantiles, 0.02)  # as even as a disc
    assert d.labels.bincount().tolist() == [12_000 // arms] * arms


@pytest.mark.parametrize("rings", [1, 4])
def test_rings_are_circles_around_one_centre(rings):
    d = Rings(4_000, noise=0.0, rings=rings)
    p = as_drawn(d)
    close(p.norm(dim=1), (d.labels + 1) / rings)
    share = (torch.atan2(p[:, 1], p[:, 0]) / (2 * math.pi)) % 1
    quantiles = torch.linspace(0.1, 0.9, 9, dtype=torch.float64)
    close(share.quantile(quantiles), quantiles, 0.03)
    assert d.labels.bincount().tolist() == [4_000 // rings] * rings


@pytest.mark.parametrize("arms", [1, 5])
def test_a_pinwheel_unwinds_into_long_gaussians(arms):
    d = Pinwheel(20_000, noise=0.1, arms=arms)
    p = as_drawn(d)
    clean = as_drawn(Pinwheel(20_000, noise=0.0, arms=arms))
    along = clean.norm(dim=1)  # of an arm without width its length, but for the few beyond the centre
    angle = 2 * math.pi * d.labels / arms + along.exp() / 4
    axes = torch.stack([torch.stack([angle.cos(), angle.sin()], 1), torch.stack([-angle.sin(), angle.cos()], 1)], 1)
    beyond = (clean * axes[:, 0]).sum(1) < along - 1e-4
    assert beyond.double().mean() < 0.002
    a = (axes @ p[..., None])[~beyond, :, 0]
    close(a[:, 0], along[~beyond], 2e-5)
    close(a.mean(0), torch.tensor([1.0, 0.0]), 0.01)
    close(a.std(0), torch.tensor([0.3, 0.1]), 0.005)


def test_points_do_not_depend_on_how_many_there_are_where_nothing_says_so():
    for source in (Checkerboard, Spiral, Rings):
        few, many = as_drawn(source(500, noise=0.0)), as_drawn(source(1000, noise=0.0))
        close(few, many[:500], 1e-5)


ADDED = [
    (SwissRoll, 0.5), (Moons, 0.05), (Gaussians, 0.1), (Checkerboard, 0.05), (Spiral, 0.03), (Rings, 0.03)
]  # fmt: skip


@pytest.mark.parametrize(("source", "noise"), ADDED)
def test_noise_is_added_to_the_same_places(source, noise):
    """It is normal in both coordinates, independent of each other and of the place, and scaled by `noise`."""
    clean = as_drawn(source(20_000, noise=0.0))
    n = (as_drawn(source(20_000, noise=noise)) - clean) / noise
    assert n.mean(0).abs().max() < 0.03 and (n.std(0) - 1).abs().max() < 0.02 and ((n**4).mean(0) - 3).abs().max() < 0.3
    together = torch.corrcoef(torch.cat([n, clean], 1).mT)
    assert together[0, 1].abs() < 0.03 and together[:2, 2:].abs().max() < 0.03
    double = (as_drawn(source(20_000, noise=2 * noise)) - clean) / noise
    close(double, 2 * n, 1e-4)


FIRST = {
    "swiss_roll": [[0.4103706, 0.8269573], [1.0080165, 1.2807037]],
    "moons": [[-1.0676357, 1.3787766], [-0.5411426, 0.2663031]],
    "gaussians": [[1.5949906, 0.0924225], [0.8133206, 1.1251525]],
    "checkerboard": [[-0.1822842, -0.8188844], [-1.7068077, -1.1741158]],
    "spiral": [[-0.9551895, 1.4703634], [-0.3492307, 0.9296606]],
    "rings": [[0.3786631, 0.2072580], [-1.0849924, -0.1545377]],
    "pinwheel": [[0.9855443, 0.8471979], [-0.6420818, 1.2126953]],
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
    assert Checkerboard(100).labels is None
    assert [source(100).num_classes for source in (Spiral, Rings, Pinwheel)] == [2, 4, 5]
    assert Rings(100, rings=2).classes == ("0", "1") and Rings(100).holds == {"classes"}


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
    shaped = {Gaussians: {"modes": 5}, Checkerboard: {"squares": 6}, Spiral: {"arms": 3}, Rings: {"rings": 3}}
    others = [source(101), source(100, noise=0.3), *([source(100, **shaped[source])] if source in shaped else [])]
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


@pytest.mark.parametrize(("source", "key"), [(Spiral, "arms"), (Rings, "rings"), (Pinwheel, "arms")])
@pytest.mark.parametrize("value", [0, -1, 101, 2.5, True])
def test_classes_are_at_least_one_and_have_a_point_each(source, key, value):
    with pytest.raises(ValueError, match=f"{key}={value}: a whole number, 1 <= {key} <= count = 100"):
        source(100, **{key: value})


@pytest.mark.parametrize("squares", [0, 3, 1, 66, 4.0, True])
def test_squares_are_an_even_number(squares):
    with pytest.raises(ValueError, match=f"squares={squares}: (an even number|a whole number, 2 <= squares <= 64)"):
        Checkerboard(100, squares=squares)


@pytest.mark.parametrize("turns", [-1, 101, math.nan, "two", True])
def test_turns_are_a_number(turns):
    with pytest.raises(ValueError, match=f"turns={turns!r}: a number, 0 <= turns <= 100"):
        Spiral(100, turns=turns)


@pytest.mark.parametrize("modes", [1, 2])
def test_points_on_a_line_cannot_be_standardised(modes):
    with pytest.raises(ValueError, match=r"all must vary .* choose noise > 0"):
        Gaussians(100, noise=0.0, modes=modes)
    assert Gaussians(100, noise=1e-3, modes=modes).points.isfinite().all()


@pytest.mark.parametrize("wrong", [torch.zeros(5, 0), torch.zeros(5), torch.zeros(1, 2), torch.zeros(5, 2).long()])
def test_other_tensors_than_points_are_refused(wrong):
    with pytest.raises(ValueError, match=r"points are floats \(N, d\), N >= 2, d >= 1, not torch\..* \("):
        Points("toy", wrong)


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e300])
def test_numbers_that_float32_does_not_hold_are_refused(value):
    x = torch.zeros(5, 3, dtype=torch.float64)
    x[3, 1] = value
    for standardise in (True, False):
        with pytest.raises(ValueError, match="toy: point 3 has a coordinate that is no finite number"):
            Points("toy", x, standardise=standardise)


@pytest.mark.parametrize("d", [1, 3, 8])
def test_points_have_any_number_of_coordinates(d):
    p = 3 + 2 * torch.randn(100, d, dtype=torch.float64)
    x = Points("toy", p)
    assert x.shape == (d,) and x.points.dtype == torch.float32 and x.batch(torch.arange(4)).x.shape == (4, d)
    close(x.points.double().std(0, correction=0), torch.ones(d), 1e-6)
    close(as_drawn(x), p)
    as_they_are = Points("toy", p, standardise=False)
    assert torch.equal(as_they_are.points, p.float()) and torch.equal(as_they_are.mean, torch.zeros(d).double())
    assert torch.equal(as_they_are.std, torch.ones(d).double()) and as_they_are.identity() != x.identity()
    assert len(Points("toy", torch.ones(5, d), standardise=False)) == 5  # without spread, and with none to divide by


def test_other_labels_than_those_of_the_points_are_refused():
    x = torch.randn(3, 2)
    with pytest.raises(ValueError, match=r"3 points but labels of shape \(2,\)"):
        Points("toy", x, torch.arange(2))
    with pytest.raises(ValueError, match=r"label 2 .* is outside 0\.\.1"):
        Points("toy", x, torch.arange(3), ("a", "b"))
    with pytest.raises(ValueError, match="all must vary"):
        Points("toy", x * torch.tensor([1, 0]))
    with pytest.raises(ValueError, match="without / and"):
        Points("a/b", x)


# ---------------------------------------------------------------------------------------------- a file


TABLE = np.array([[1.0, 2.5, 0], [-3, 4e-1, 1], [0.25, 7, 1], [5, -6, 0]])


def saved(path: Path, array: np.ndarray = TABLE) -> Path:
    np.save(path, array) if path.suffix == ".npy" else np.savetxt(path, array, fmt="%.17g", delimiter=",")
    return path


@pytest.mark.parametrize("suffix", ["npy", "csv"])
def test_the_rows_of_a_file_are_points(tmp_path, suffix):
    path = saved(tmp_path / f"mine.{suffix}")
    d = PointsFile(path)
    assert (d.name, d.split, d.shape, d.labels, len(d)) == ("mine", "all", (3,), None, 4)
    assert d.identity() == Points("mine", torch.from_numpy(TABLE)).identity()
    labelled = PointsFile(str(path), labelled=True, standardise=False, name="other")
    assert labelled.shape == (2,) and labelled.labels.tolist() == [0, 1, 1, 0] and labelled.classes == ("0", "1")
    assert labelled.name == "other" and np.array_equal(labelled.points.numpy(), TABLE[:, :2].astype(np.float32))
    assert not d.origin.changed()
    saved(path, 2 * TABLE)
    assert d.origin.changed()


@pytest.mark.parametrize("dtype", ["int16", "uint8", "float32", ">f8"])
def test_real_numbers_of_any_kind(tmp_path, dtype):
    array = np.arange(12).reshape(4, 3)
    d = PointsFile(saved(tmp_path / "a.npy", np.asfortranarray(array.astype(dtype))), standardise=False)
    assert d.points.tolist() == array.tolist()


def test_a_first_line_of_names_and_comments_are_left_out(tmp_path):
    (tmp_path / "a.csv").write_bytes("\ufeffx, y\r\n1, 2\r\n# two\r\n3,4 # more\r\n\r\n".encode())
    assert PointsFile(tmp_path / "a.csv", standardise=False).points.tolist() == [[1, 2], [3, 4]]
    (tmp_path / "b.csv").write_text("5\n6\n")
    assert PointsFile(tmp_path / "b.csv", standardise=False).points.tolist() == [[5], [6]]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("1,2\n3,abc\n", "no table of numbers .* 'abc'"),
        ("1,2\n3\n", "no table of numbers"),
        ("1,2\n3,nan\n", r"row 1, column 1 \(both from 0\) is nan, no finite number"),
        ("1,2\n-inf,3\n", "row 1, column 0 .* is -inf"),
        ("1,2\n", r"has the shape \(1, 2\); points are \(N, d\), N >= 2"),
        ("", r"has the shape \(0, 1\)|no table"),
        ("x,y\n", r"has the shape \(0, 1\)|no table"),
        ("1;2\n3;4\n", "no table of numbers"),
        (b"\xff\xfe1,2\n", "no table of numbers"),
        (b"\x1b[2J,1\n2,\x1b[2J", "no table of numbers"),
    ],
)
def test_a_csv_file_that_holds_no_points(tmp_path, content, message):
    path = tmp_path / "a.csv"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=message) as raised:
        PointsFile(path)
    assert "a.csv" in str(raised.value) and str(raised.value).isprintable()


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros(5), r"shape \(5,\); points are \(N, d\)"),
        (np.zeros((5, 2, 2)), r"shape \(5, 2, 2\)"),
        (np.zeros((1, 2)), r"shape \(1, 2\)"),
        (np.zeros((5, 2), complex), "holds complex128, and points are real numbers"),
        (np.zeros((5, 2), bool), "holds bool"),
        (np.full((5, 2), "1"), "holds <U1"),
        (np.full((5, 2), None), "no .npy file of numbers"),
        (np.full((5, 2), np.inf), "is inf, no finite number"),
        (b"", "no .npy file of numbers"),
        (b"\x93NUMPY garbage", "no .npy file of numbers"),
    ],
)
def test_a_npy_file_that_holds_no_points(tmp_path, array, message):
    path = tmp_path / "a.npy"
    path.write_bytes(array) if isinstance(array, bytes) else np.save(path, array, allow_pickle=True)
    with pytest.raises(ValueError, match=message):
        PointsFile(path)


def test_a_header_is_not_believed_beyond_the_end_of_the_file(tmp_path):
    path = saved(tmp_path / "a.npy")
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(ValueError, match=r"no \.npy file of numbers"):
        PointsFile(path)
    with path.open("wb") as file:
        header = {"descr": "<f8", "fortran_order": False, "shape": (10**12, 3)}
        np.lib.format.write_array_header_1_0(file, header)
        file.write(bytes(96))
    with pytest.raises(ValueError, match=r"no \.npy file of numbers"):
        PointsFile(path)


def test_a_file_that_is_not_there_or_none(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no file .*nowhere.csv .*; point root at a \.npy or \.csv file"):
        PointsFile(tmp_path / "nowhere.csv")
    with pytest.raises(ValueError, match=r"read from a \.npy or a \.csv file"):
        PointsFile(tmp_path / "a.txt")
    (tmp_path / "folder.csv").mkdir()
    with pytest.raises(ValueError, match="it is no file"):
        PointsFile(tmp_path / "folder.csv")


@pytest.mark.parametrize("wrong", [-1, 0.5, 9])
def test_classes_of_a_file_are_whole_numbers(tmp_path, wrong):
    array = TABLE.copy()
    array[2, -1] = wrong
    with pytest.raises(ValueError, match=rf"the class of row 2 \(from 0\) is {wrong:g}, no whole number"):
        PointsFile(saved(tmp_path / "a.npy", array), labelled=True)
    with pytest.raises(ValueError, match="no coordinate is left"):
        PointsFile(saved(tmp_path / "b.npy", TABLE[:, 2:]), labelled=True)


def test_options_of_a_file(tmp_path):
    path = saved(tmp_path / "a.npy")
    with pytest.raises(ValueError, match="no published split"):
        PointsFile(path, split="train")
    with pytest.raises(ValueError, match="0 <= validation < 1"):
        PointsFile(path, validation=1)
    with pytest.raises(ValueError, match="without / and"):
        PointsFile(path, name="a/b")
    keys = yaml.safe_load((CONF / "points_file.yaml").read_text()) | {"root": str(path)}
    check(keys)
    assert PointsFile(**{k: v for k, v in keys.items() if k != "_target_"}).identity() == PointsFile(path).identity()
