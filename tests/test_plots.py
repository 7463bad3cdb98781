"""ddpm/figures/plots.py: readable PNG files of a sane size, whose images are where they belong and not resampled."""

import importlib
import io
import sys

import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgb
from PIL import Image

from ddpm.figures import plots
from ddpm.schedules import NoiseSchedule, cosine, linear, sigmoid, zero_terminal_snr


def constant(n: int, value: int, size: tuple[int, int] = (8, 8), channels: int = 1) -> torch.Tensor:
    return torch.full((n, channels, *size), value, dtype=torch.uint8)


def read(path) -> np.ndarray:
    """The picture (H, W) or (H, W, 3), after the checks that every picture passes."""
    picture = np.asarray(Image.open(path))
    height, width = picture.shape[:2]
    assert 100 < width < 1400 and 60 < height < 1400 and path.stat().st_size < 150_000
    assert (picture == 255).any() and picture.std() > 5  # white paper, and something on it
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    return picture


def box(picture: np.ndarray, value: int) -> tuple[int, int, int, int]:
    """Top, left, height and width of what has the value, in rows and columns of at least 20 such pixels (no text)."""
    rows, columns = (np.nonzero((picture == value).sum(axis) >= 20)[0] for axis in (1, 0))
    return rows[0], columns[0], len(rows), len(columns)


def test_forward_process(tmp_path):
    path = tmp_path / "forward.png"
    plots.forward_process(path, torch.cat([constant(1, 40 + 30 * i) for i in range(5)]), list(range(5)), [1.0] * 5)
    picture = read(path)
    side = 160  # 8 pixels, enlarged by 20
    top, left, height, width = zip(*(box(picture, 40 + 30 * i) for i in range(5)), strict=True)
    assert height == width == (side,) * 5 and len(set(top)) == 1
    assert np.diff(left).tolist() == [side + plots.GAP] * 4  # in order, side by side


def test_forward_process_shows_its_times(tmp_path):
    def labels(t: list[int], alpha_bar: list[float]) -> np.ndarray:
        plots.forward_process(tmp_path / "forward.png", constant(2, 99), t, alpha_bar)
        return read(tmp_path / "forward.png")

    reference = labels([0, 500], [1.0, 0.25])
    assert np.array_equal(reference, labels([0, 500], [1.0, 0.25]))
    assert not np.array_equal(reference, labels([0, 501], [1.0, 0.25]))
    assert not np.array_equal(labels([0, 500], [1.0, 1e-4]), labels([0, 500], [1.0, 4e-4]))  # the root: 0.010, 0.020
    with pytest.raises(ValueError, match="2 images, 1 t and 2 alpha_bar"):
        labels([0], [1.0, 0.25])


def test_preview_has_raw_weights_left_and_ema_weights_right(tmp_path):
    path = tmp_path / "preview.png"
    plots.preview(path, [(500, constant(4, 50), constant(4, 150)), (1000, constant(4, 90), constant(4, 200))])
    picture = read(path)
    (y_1, x_1), (y_2, x_2), (y_3, x_3), (y_4, x_4) = (box(picture, value)[:2] for value in (50, 150, 90, 200))
    assert y_1 == y_2 < y_3 == y_4 and x_1 == x_3 < x_2 == x_4


def corner(picture: np.ndarray, block: np.ndarray) -> tuple[int, int]:
    """Row and column of the one place where the picture holds the block, pixel for pixel."""
    height, width = block.shape
    windows = np.lib.stride_tricks.sliding_window_view(picture, block.shape)[:, :, :: height - 1, :: width - 1]
    candidates = np.argwhere((windows == block[:: height - 1, :: width - 1]).all((2, 3)))
    (place,) = [(y, x) for y, x in candidates if np.array_equal(picture[y : y + height, x : x + width], block)]
    return place


def test_labelled_rows_and_columns_put_every_image_in_its_place(tmp_path):
    """Image j of row i is image i of column j, so both pictures hold the same block of images."""
    tiles = torch.randint(20, 230, (3, 4, 1, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    block = np.full((3, 8 * 20 + plots.GAP, 4, 8 * 20 + plots.GAP), 255, dtype=np.uint8)
    block[:, plots.GAP :, :, plots.GAP :] = tiles[:, :, 0].numpy().repeat(20, 2).repeat(20, 3).transpose(0, 2, 1, 3)
    block = block.reshape(3 * 163, 4 * 163)[plots.GAP :, plots.GAP :]
    path = tmp_path / "a.png"
    plots.labelled_rows(path, [(f"{i} steps", tiles[i]) for i in range(3)], title="rows")
    y_rows, x_rows = corner(read(path), block)
    plots.labelled_columns(path, [(f"t={j}", tiles[:, j]) for j in range(4)], title="columns")
    y_columns, x_columns = corner(read(path), block)
    assert x_rows > x_columns + 20 and y_rows < y_columns - 10  # labels on the left, labels on top


def test_colour_size_and_long_labels(tmp_path):
    x = torch.zeros(3, 3, 20, 10)
    x[:, 0] = 1
    path = tmp_path / "colour.png"
    plots.labelled_columns(path, [(f"a rather long label {i}", x) for i in range(12)])
    picture = read(path)
    assert picture.shape[2] == 3 and (picture == [255, 128, 128]).all(2).mean() > 0.4
    plots.labelled_rows(tmp_path / "colour.png", [("one", torch.zeros(1, 1, 8, 8))])
    assert read(path).ndim == 2  # no colour, one channel


def test_each_code_has_a_colour_of_its_own_and_one_that_is_not_there_yet_is_white(tmp_path):
    path, codes = tmp_path / "codes.png", torch.tensor([[[0, 1], [2, -1]]])
    plots.code_maps(path, [("image", torch.full((1, 1, 8, 8), 99 / 127.5 - 1)), ("codes", codes)], codes=3)
    picture = read(path)
    top, left, side, _ = box(picture[..., 0] * (picture == 99).all(2), 99)
    top += side + plots.GAP  # of the row beneath
    middles = [
        picture[top + y, left + x].tolist() for y in (side // 4, 3 * side // 4) for x in (side // 4, 3 * side // 4)
    ]
    assert middles[3] == [255, 255, 255]
    assert len({tuple(colour) for colour in middles}) == 4 and all(max(c) > 2 * min(c) for c in middles[:3])


@pytest.mark.parametrize("parts", [[], [torch.zeros(2, 1, 8, 8), torch.zeros(3, 1, 8, 8)], [torch.zeros(0, 1, 8, 8)]])
def test_rows_of_unequal_shapes_are_refused(tmp_path, parts):
    for draw in (plots.labelled_rows, plots.labelled_columns):
        with pytest.raises(ValueError, match="of one shape"):
            draw(tmp_path / "a.png", [("label", x) for x in parts])
    with pytest.raises(ValueError, match="of one shape"):
        plots.preview(tmp_path / "a.png", [(1, x, x) for x in parts])


BLUE, ORANGE, RED = np.array([31, 119, 180]), np.array([255, 127, 14]), np.array([214, 39, 40])


def drawn(picture: np.ndarray, colour: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows and columns of the pixels of a colour, outside the legend."""
    there = (abs(picture.astype(int) - colour) <= 8).all(2)
    there[:70, 600:] = False
    return np.nonzero(there)


def cloud(n: int, x: float, y: float) -> torch.Tensor:
    return torch.tensor([x, y]) + 0.05 * torch.randn(n, 2, generator=torch.Generator().manual_seed(0))


def coloured(picture: np.ndarray, *colours: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """Rows and columns of what is nearly of each colour, and neither white, grey nor black."""
    hue = picture.astype(int) - picture.max(2, keepdims=True)
    return [np.nonzero((abs(hue - (c - c.max())) <= 25).all(2) & (np.ptp(picture, axis=2) > 60)) for c in colours]


def test_points_have_a_panel_each_with_the_same_limits_upwards_and_to_the_right(tmp_path):
    path = tmp_path / "points.png"
    plots.points(path, {"data": cloud(500, 0, 1), "samples": torch.cat([cloud(250, 1, 0), cloud(250, -1, -1)])}, "both")
    picture = read(path)
    (y_1, x_1), (y_2, x_2) = coloured(picture, BLUE, ORANGE)
    width = picture.shape[1]
    assert x_1.max() < width / 2 < x_2.min()  # in order
    right, left = x_2 > (x_2.min() + x_2.max()) / 2, x_2 < (x_2.min() + x_2.max()) / 2
    unit = (x_2[right].mean() - x_2[left].mean()) / 2
    assert y_2[left].mean() - y_2[right].mean() == pytest.approx(unit, rel=0.05)  # equal axes
    assert y_2[right].mean() - y_1.mean() == pytest.approx(unit, rel=0.05)  # upwards, on the same scale
    assert np.ptp(y_1) == pytest.approx(np.ptp(y_2[right]), rel=0.25)


@pytest.mark.parametrize("panels", [1, 2, 3, 4, 6, 9])
def test_points_four_panels_in_a_row(tmp_path, panels):
    plots.points(tmp_path / "a.png", {f"step {i}": torch.randn(30 * (i + 1), 2) for i in range(panels)})
    height, width = read(tmp_path / "a.png").shape[:2]
    columns, rows = min(4, panels), -(-panels // 4)
    assert width / columns == pytest.approx(height / rows, rel=0.15) and width <= 880


def test_points_far_away_are_counted_and_leave_the_others_large(tmp_path):
    path, x = tmp_path / "points.png", cloud(1000, 1, 1)
    plots.points(path, {"a": x})
    (y, _), *_ = coloured(read(path), BLUE)
    far = x.clone()
    far[:3] = torch.tensor([[500.0, 0.0], [float("nan"), 0.0], [0.0, -float("inf")]])
    plots.points(path, {"a": far})
    (y_far, _), *_ = coloured(picture := read(path), BLUE)
    assert np.ptp(y_far) == pytest.approx(np.ptp(y), rel=0.1)
    plots.points(path, {"a": far[3:]})
    words = (picture != read(path)).any(2)
    assert words[picture.shape[0] * 3 // 4 :, picture.shape[1] // 2 :].sum() > 100  # how many lie outside

    plots.points(path, {"a": torch.zeros(5, 2), "b": torch.full((2, 2), float("nan"))})  # nothing to scale by
    read(path)


def test_points_lie_on_grey_ones_that_every_panel_shows(tmp_path):
    path, data = tmp_path / "points.png", torch.cat([cloud(400, -1, 0), cloud(400, 1, 0)])
    plots.points(path, {"a": cloud(400, 1, 0), "b": cloud(400, -1, 0)}, behind=data)
    picture = read(path)
    grey = (abs(picture.astype(int) - 217) <= 3).all(2)  # 0.85 of white
    half = picture.shape[1] // 2
    for colour, panel, right in ((BLUE, slice(0, half), True), (ORANGE, slice(half, None), False)):
        (_, own), *_ = coloured(picture[:, panel], colour)
        _, below = np.nonzero(grey[40:-60, panel] & (np.arange(grey[:, panel].shape[1]) > 60))
        assert (below.mean() < own.mean() - 50) if right else (below.mean() > own.mean() + 50)
    plots.points(path, {"a": cloud(400, 1, 0)}, behind=3 * data)
    wide, _ = coloured(read(path), BLUE, ORANGE)
    plots.points(path, {"a": cloud(400, 1, 0)})
    assert np.ptp(coloured(read(path), BLUE)[0][1]) > 1.5 * np.ptp(wide[1])  # they count for the limits


@pytest.mark.parametrize("wrong", [{}, {"a": torch.zeros(3, 3)}, {"a": torch.zeros(0, 2)}, {"a": torch.zeros(2)}])
def test_what_are_no_points_is_refused(tmp_path, wrong):
    with pytest.raises(ValueError, match=r"groups of one or more points \(n, 2\), not"):
        plots.points(tmp_path / "a.png", wrong)


def near(picture: np.ndarray, colour: str) -> tuple[float, float]:
    """The mean row and column of what has a colour, left of the legend."""
    rgb = np.array(to_rgb(colour)) * 255
    rows, columns = np.nonzero((abs(picture[:, :690] - rgb) < 50).all(2))
    assert len(rows) > 20
    return rows.mean(), columns.mean()


def test_places_have_the_colours_of_their_classes_and_a_legend(tmp_path):
    xy = torch.tensor([[0.0, 0], [4, 4], [0, 4]])
    plots.places(tmp_path / "places.png", xy, torch.tensor([3, 3, 7]), [f"class {k}" for k in range(9)])
    picture = read(tmp_path / "places.png")
    (middle, right), (top, left) = (
        near(picture, "C0"),
        near(picture, "C1"),
    )  # of the first class that is there; the next
    assert left == pytest.approx(20 + 660 * (0.5 - 2 / 4.32), abs=3) and right == pytest.approx(350, abs=3)
    assert top == pytest.approx(40 + 660 * (0.5 - 2 / 4.32), abs=3) and middle == pytest.approx(370, abs=3)
    assert (abs(picture[:, 700:].astype(int) - picture[0, 0]).sum(2) > 60).any()


def test_pictures_stand_at_places_and_do_not_overlap(tmp_path):
    xy = torch.tensor([[0.0, 0], [0.01, 0], [4, 4], [2, 2]])
    pictures = torch.cat([constant(1, value) for value in (90, 100, 110, 120)])
    plots.places(tmp_path / "places.png", xy, torch.tensor([0, 0, 1, 1]), ["a", "b"], pictures)
    picture = read(tmp_path / "places.png")[..., 0]
    assert not (picture == 100).sum() > 200  # it lies on the first
    for value, (x, y) in ((90, (0, 0)), (110, (4, 4)), (120, (2, 2))):
        top, left, height, width = box(picture, value)
        assert height == width == 32  # 8 pixels, enlarged by 4
        assert left + 16 == pytest.approx(350 + 660 * (x - 2) / 4.32, abs=2)
        assert top + 16 == pytest.approx(370 - 660 * (y - 2) / 4.32, abs=2)


def test_squares_that_are_kept_are_apart_and_no_other_would_be():
    xy = np.random.default_rng(0).uniform(-100, 100, (300, 2))
    kept = plots.apart(xy, 20, 90)
    distance = abs(xy[:, None] - xy[kept]).max(2)  # (300, kept)
    assert (distance[kept] + 1000 * np.eye(len(kept)) >= 20).all() and (abs(xy[kept]) <= 90).all()
    inside = (abs(xy) <= 90).all(1)
    assert (distance[inside].min(1) < 20).all() and kept[0] == np.nonzero(inside)[0][0]


@pytest.mark.parametrize("wrong", [torch.zeros(2, 3), torch.zeros(3, 2), torch.full((2, 2), torch.nan)])
def test_what_are_no_places_is_refused(tmp_path, wrong):
    with pytest.raises(ValueError, match="places are finite"):
        plots.places(tmp_path / "places.png", wrong, torch.tensor([0, 1]), ["a", "b"])


def test_a_colour_for_every_class():
    for count in (10, 20, 46):
        colours = {plots._class_colour(i, count) for i in range(count)}
        assert len(colours) == count and all(0 <= part <= 1 for colour in colours for part in colour)


def test_loss(tmp_path):
    path = tmp_path / "loss.png"
    train = [(step, 0.05 + 0.95 * 0.98**step) for step in range(1000)]
    plots.loss(path, train, [(step, 0.06) for step in (250, 500, 1000)])
    y, x = drawn(picture := read(path), BLUE)
    assert np.ptp(x) > 700 and y[x.argmin()] < 40 and y[x.argmax()] > 250  # falls from the left to the right
    y, x = drawn(picture, RED)
    assert np.ptp(x) > 500 and np.ptp(y) < 15  # level
    plots.loss(path, train, [])
    assert len(drawn(read(path), RED)[0]) == 0


def test_loss_has_a_logarithmic_axis_only_over_a_decade(tmp_path):
    def height_of_the_middle(low: float) -> float:
        middle = low**0.5  # half-way on a logarithmic axis
        plots.loss(tmp_path / "loss.png", [(0, 1.0), (1, middle), (2, low)], [])
        y, x = drawn(read(tmp_path / "loss.png"), BLUE)
        centre = abs(x - (x.min() + x.max()) / 2) < 3
        return (y[centre].mean() - y.min()) / np.ptp(y)

    assert height_of_the_middle(0.01) == pytest.approx(0.5, abs=0.02)
    assert height_of_the_middle(0.25) == pytest.approx(2 / 3, abs=0.02)


@pytest.mark.parametrize(
    "train", [[], [(1, 0.5)], [(1, None)], [(1, None), (2, float("nan"))], [(1, 0.0), (2, 9.0)], [(1, -1.0), (2, 50.0)]]
)
def test_loss_of_short_and_broken_histories(tmp_path, train):
    plots.loss(tmp_path / "loss.png", train, train[:1])
    read(tmp_path / "loss.png")


def test_a_gap_where_the_loss_was_not_finite(tmp_path):
    path = tmp_path / "loss.png"
    plots.loss(path, [(i, None if 40 <= i < 60 else 1 + i / 100) for i in range(100)], [])
    _, x = drawn(read(path), BLUE)
    assert np.diff(np.unique(x)).max() > 0.15 * np.ptp(x)


def test_moving_average():
    values = np.random.default_rng(0).normal(size=200)
    mean = plots._moving_average(values)
    assert mean[0] == pytest.approx(values[0]) and mean[-1] == pytest.approx(values[-1])
    assert mean[100] == pytest.approx(values[95:106].mean()) and mean[2] == pytest.approx(values[:5].mean())
    values[98] = np.nan
    mean = plots._moving_average(values)
    assert np.isnan(mean[98]) and mean[100] == pytest.approx(np.nanmean(values[95:106]))


def test_labelled_table_has_labels_on_both_sides(tmp_path):
    path = tmp_path / "table.png"
    rows = [("first", torch.cat([constant(1, 50), constant(1, 90)])), ("second", constant(2, 150))]
    plots.labelled_table(path, rows, ["left", "right"])
    picture = read(path)
    (y_1, x_1), (y_2, x_2), (y_3, x_3) = (box(picture, value)[:2] for value in (50, 90, 150))
    assert y_1 == y_2 < y_3 and x_1 == x_3 < x_2
    assert (picture[:y_1] < 128).any() and (picture[:, :x_1] < 128).any()
    with pytest.raises(ValueError, match="rows of \\[2, 2\\] images, but 1 labels"):
        plots.labelled_table(path, rows, ["left"])


def test_curves(tmp_path):
    path = tmp_path / "curves.png"
    x = torch.arange(1, 101)
    plots.curves(path, x, {"rising": {"a": x, "b": x / 2}, "level": {"b": [1.0] * 100}}, log=["t", "rising"])
    picture = read(path)
    y, x = drawn(picture, BLUE)
    assert x.max() < 440 and y[x.argmin()] > y[x.argmax()]  # the first panel alone, rising
    y, x = drawn(picture, ORANGE)
    assert x.max() > 500 and np.ptp(y[x > 500]) < 30  # the same colour in the second panel, level
    plots.curves(path, [1, 2], {"with a zero": {"a": [0.0, 1.0]}}, log=["with a zero"])
    read(path)


def test_density(tmp_path):
    path, x = tmp_path / "density.png", torch.linspace(-3, 3, 61)
    log_prob = torch.stack([-(x**2) / (0.1 + t / 10) for t in range(11)])
    walks = torch.stack([torch.full((11,), -2.0), torch.full((11,), 2.0)], dim=1)
    plots.density(path, range(11), x, log_prob, {"one": (range(11), walks), "other": (range(10, -1, -1), walks)})
    picture = read(path)
    y, _ = drawn(picture, RED)
    assert len(np.unique(y)) <= 12 and np.ptp(y) > 100  # two level lines
    shade = picture[150:180].astype(int).sum(2).mean(0)  # across the middle: bluer than paper
    assert shade.min() < 600


@pytest.mark.parametrize("order", [1, 2])
def test_orders_are_slopes(tmp_path, order):
    """A method of order p lies parallel to the grey line of slope p."""
    path, cost = tmp_path / "orders.png", [10, 100, 1000]
    plots.orders(path, {"title": {"a": [(n, 0.1 * float(n) ** -order) for n in cost], "b": [(10, 1.0), (1000, 1e-7)]}})
    y, x = drawn(read(path), BLUE)
    in_axes = y < 370
    (x_0, x_1), (y_0, y_1) = np.quantile(x[in_axes], [0, 1]), np.quantile(y[in_axes], [0, 1])
    decade_x, decade_y = axes_of_orders(path)
    assert (y_1 - y_0) / decade_y / ((x_1 - x_0) / decade_x) == pytest.approx(order, rel=0.1)


def axes_of_orders(path) -> tuple[float, float]:
    """Pixels of a decade in both directions: between the ends of b, two decades of cost and seven of error apart."""
    y, x = drawn(read(path), ORANGE)
    in_axes = y < 370
    return np.ptp(x[in_axes]) / 2, np.ptp(y[in_axes]) / 7


def test_spacings(tmp_path):
    path = tmp_path / "spacings.png"
    plots.spacings(path, {"few": ([10, 5, 0], [-4, 0, float("inf")]), "many": (range(10, -1, -1), range(-5, 6))})
    picture = read(path)
    _, x = drawn(picture, BLUE)
    assert len(np.unique(x[x < 430])) == pytest.approx(6, abs=4) and len(np.unique(x[x > 430])) <= 8
    _, x = drawn(picture, ORANGE)
    assert len(np.unique(x)) > 22


def test_png_is_the_same_picture_in_fewer_colours(tmp_path):
    path, curve = tmp_path / "loss.png", [(i, 1 / (i + 1)) for i in range(50)]
    plots.loss(path, curve, [])
    small = plots.png(plots.loss, curve, [])
    picture = np.asarray(Image.open(io.BytesIO(small)).convert("RGB")).astype(int)
    assert abs(picture - read(path)).max() < 30 and len(small) < path.stat().st_size
    smaller = plots.png(plots.loss, curve, [], colours=16)
    few = np.asarray(Image.open(io.BytesIO(smaller)).convert("RGB")).reshape(-1, 3)
    assert len(np.unique(few, axis=0)) <= 16 and len(smaller) < len(small)
    grey = plots.png(plots.labelled_rows, [("row", constant(2, 99))])
    plots.labelled_rows(tmp_path / "loss.png", [("row", constant(2, 99))])
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(grey))), read(path))


def test_pyplot_and_its_global_state_stay_out(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)  # importing it fails from here on
    importlib.reload(plots)
    plots.loss(tmp_path / "loss.png", [(1, 1.0)], [])
    plots.labelled_rows(tmp_path / "rows.png", [("row", constant(2, 99))])


@pytest.mark.slow
@pytest.mark.parametrize(("times", "n"), [(range(1, 1001), 30), ([250, 500, 1000], 2), ([1], 1)])
def test_bits_per_dim_shows_every_number_that_it_is_given(times, n, tmp_path):
    def drawn(terms: torch.Tensor, L_T: float = 0.1) -> np.ndarray:
        plots.bits_per_dim(tmp_path / "bits.png", times, terms, torch.full((n,), L_T))
        return read(tmp_path / "bits.png")

    terms = torch.tensor([1 / t for t in times]).expand(n, -1)
    picture = drawn(terms)
    assert np.array_equal(picture, drawn(terms))
    assert not np.array_equal(picture, drawn(terms, 0.7))
    for column in {0, len(times) - 1}:
        other = terms.clone()
        other[:, column] += 0.5
        assert not np.array_equal(picture, drawn(other))
    drawn(terms - 1)  # not all above 0: the left axis is linear


def test_copies_have_their_originals_beneath_them(tmp_path):
    path = tmp_path / "copies.png"
    plots.copies(path, {"by a": (constant(3, 50), constant(3, 90), [0.1, 0.2, 0.3], [0.3])})
    picture, wide = read(path), 3 * (8 * 20 + plots.GAP)
    (y_1, x_1, *_), (y_2, x_2, *_) = (box(picture, value) for value in (50, 90))
    assert y_1 < y_2 and x_1 == x_2 and picture.shape[1] > wide + 100  # labels on the left
    both = {
        "by a": (constant(3, 50), constant(3, 90), [0.1, 0.2, 0.3], [0.3]),
        "by pixels": (constant(3, 130), constant(3, 170), [0.4, 0.5, 0.6], [0.3]),
    }
    plots.copies(path, both)
    rows = [box(read(path), value)[0] for value in (50, 90, 130, 170)]
    assert rows == sorted(rows) and len(set(rows)) == 4
    other = {"by a": both["by a"], "by pixels": (*both["by pixels"][:2], [0.4, 0.5, 0.7], [0.3])}
    before = read(path)
    plots.copies(path, other)
    assert not np.array_equal(before, read(path))  # the farthest distance is told
    plots.copies(path, {"by a": (constant(1, 50), constant(1, 90), [0.1], [0.3])})
    read(path)


def places(picture: np.ndarray, colour: np.ndarray, right: float) -> tuple[np.ndarray, np.ndarray]:
    """Rows and columns of the pixels of a colour, outside a legend that lies at the upper right."""
    height, width = picture.shape[:2]
    there = (abs(picture.astype(int) - colour) <= 8).all(2)
    there[: int(0.17 * height), int(right * width) :] = False
    return np.nonzero(there)


def test_the_bias_of_real_images_and_the_samples_beside_it(tmp_path):
    path = tmp_path / "bias.png"
    curve = [(n, 40 / n) for n in (10, 30, 100, 300)]
    plots.bias(path, curve, 100, 2.0)
    picture = read(path)
    y, x = places(picture, BLUE, 0.5)
    assert np.ptp(x) > 250 and y[x.argmin()] < y[x.argmax()] - 100  # falls
    y_samples, x_samples = places(picture, RED, 0.5)
    assert 0 < np.ptp(x_samples) < 20 and np.ptp(y_samples) < 20
    there = abs(x - x_samples.mean()) < 3
    assert y_samples.mean() < y[there].mean() - 50  # above the real images of the same number
    plots.bias(path, [(20, 1.0)], 5000, 3.0)  # one size only, and many more samples
    read(path)


def test_quality_against_steps_has_a_curve_for_each_sampler_and_spacing(tmp_path):
    path = tmp_path / "steps.png"

    def cells(sampler: str, spacing: str, scale: float) -> list[dict[str, object]]:
        return [
            {"sampler": sampler, "spacing": spacing, "steps": n, "evaluations": n, "value": scale / n}
            for n in (50, 5, 20)  # in no order
        ]

    plots.steps_quality(path, cells("ddim", "uniform", 40.0) + cells("heun", "uniform", 10.0), 0.3)
    picture = read(path)
    tops = []
    for colour in (BLUE, ORANGE):
        y, x = places(picture, colour, 0.6)
        assert np.ptp(x) > 300 and y[x.argmin()] < y[x.argmax()] - 100
        tops.append(y.min())
    assert tops[0] < tops[1] - 50
    columns = (abs(picture.astype(int) - BLUE) <= 8).all(2).sum(0)
    assert (columns[:400] > 0).sum() > 200  # a line from left to right, and none back

    def drawn(found: list[dict[str, object]], real: float = 0.3) -> np.ndarray:
        plots.steps_quality(path, found, real)
        return read(path)

    one = drawn(cells("ddim", "uniform", 40.0))
    assert not np.array_equal(one, drawn(cells("ddim", "uniform", 40.0), 0.5))
    assert np.array_equal(one, drawn(cells("ddim", "karras", 40.0)))  # a single spacing is not told
    two = drawn(cells("ddim", "uniform", 40.0) + cells("ddim", "karras", 10.0))
    assert len(places(two, ORANGE, 0.6)[0]) > 100
    drawn(cells("ddim", "uniform", 40.0)[:1])


C = [BLUE, np.array([255, 127, 14]), np.array([44, 160, 44]), RED, np.array([148, 103, 189])]  # of matplotlib's cycle
FIVE = {
    "cosine": cosine(100),
    "linear": linear(100),
    "sigmoid": sigmoid(100),
    "zero_terminal_snr": zero_terminal_snr(linear(100)),
    "linear (literal)": linear(100, rescale=False),
}


@pytest.mark.slow
@pytest.mark.parametrize("n", [1, 2, 5])
def test_schedules_have_a_colour_each_in_every_panel_and_the_table(n, tmp_path):
    plots.schedules(tmp_path / "a.png", dict(list(FIVE.items())[:n]))
    picture = read(tmp_path / "a.png").astype(int)
    lines = 250 + np.arange(5) * 24  # of the panels and, roughly, of the table
    for i, colour in enumerate(C):
        y, x = np.nonzero((abs(picture - colour) <= 40).all(2))
        in_panels, in_table = y < lines[0], (y > lines[0]) & (x < 80)
        parts = [(in_panels & (a <= x) & (x < b)).sum() for a, b in ((0, 300), (300, 600), (600, 880))]
        if i < n:
            assert min(parts) > 30 and in_table.sum() > 20
        else:
            assert not in_table.any()


@pytest.mark.slow
def test_a_figure_of_schedules_shows_what_they_are(tmp_path):
    def drawn(named: dict[str, NoiseSchedule]) -> np.ndarray:
        plots.schedules(tmp_path / "a.png", named)
        return read(tmp_path / "a.png")

    picture, clipped = drawn({"a": cosine(100)}), cosine(100)
    assert np.array_equal(picture, drawn({"a": cosine(100)}))
    clipped.clipped = 0  # the ring at the end of beta, the word of it, and a figure of the table
    y, x = np.nonzero((picture != drawn({"a": clipped})).any(2))
    assert (y < 60).any() and (x[y < 60] > 600).all() and (y > 250).any()
    assert not np.array_equal(picture, drawn({"b": cosine(100)}))
    drawn({"short": NoiseSchedule([0.1, 1.0]), "long": linear(1000)})  # over t / T
    drawn({"one": NoiseSchedule([1.0])})


def test_the_table_of_schedules():
    header, *rows = plots.schedule_table({"cosine": cosine(1000), "ended": zero_terminal_snr(linear(100))})
    assert header == plots.SCHEDULE_COLUMNS
    assert rows == [
        ("cosine", "1,000", "4.13e-05", "0.999", "1", "10.1", "-19.8", "0.0049%", "20,291"),
        ("ended", "100", "0.001", "1", "0", "6.9", "-inf", "0%", "inf"),
    ]
    literal = plots.schedule_table({"literal": linear(100, rescale=False)})[1]
    assert literal[-2:] == ("60%", "1.66")
