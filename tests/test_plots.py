"""ddpm/plots.py: readable PNG files of a sane size, whose images are where they belong and not resampled."""

import importlib
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from ddpm import plots


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


@pytest.mark.parametrize("parts", [[], [torch.zeros(2, 1, 8, 8), torch.zeros(3, 1, 8, 8)], [torch.zeros(0, 1, 8, 8)]])
def test_rows_of_unequal_shapes_are_refused(tmp_path, parts):
    for draw in (plots.labelled_rows, plots.labelled_columns):
        with pytest.raises(ValueError, match="of one shape"):
            draw(tmp_path / "a.png", [("label", x) for x in parts])
    with pytest.raises(ValueError, match="of one shape"):
        plots.preview(tmp_path / "a.png", [(1, x, x) for x in parts])


BLUE, RED = np.array([31, 119, 180]), np.array([214, 39, 40])


def drawn(picture: np.ndarray, colour: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows and columns of the pixels of a colour, outside the legend."""
    there = (abs(picture.astype(int) - colour) <= 8).all(2)
    there[:70, 600:] = False
    return np.nonzero(there)


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


def test_pyplot_and_its_global_state_stay_out(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)  # importing it fails from here on
    importlib.reload(plots)
    plots.loss(tmp_path / "loss.png", [(1, 1.0)], [])
    plots.labelled_rows(tmp_path / "rows.png", [("row", constant(2, 99))])
