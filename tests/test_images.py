"""ddpm/figures/images.py: exact scales, exact layouts, whole files."""

import numpy as np
import pytest
import torch
from PIL import Image

from ddpm.figures import images

ALL_BYTES = torch.arange(256, dtype=torch.uint8)


def test_scale_spans_minus_one_to_one_and_all_bytes_survive_a_round_trip():
    x = images.to_float(ALL_BYTES)
    assert x.dtype == torch.float32 and x[0] == -1 and x[255] == 1 and (x.diff() > 0).all()
    assert torch.equal(images.to_uint8(x), ALL_BYTES)
    assert torch.equal(images.to_uint8(x + 0.49 / 127.5), ALL_BYTES)  # rounded, not truncated
    assert torch.equal(images.to_uint8(x - 0.49 / 127.5), ALL_BYTES)


def test_to_uint8_clips_and_survives_values_that_are_no_numbers():
    x = torch.tensor([-3.0, 3.0, float("nan"), float("inf"), -float("inf"), 0.0])
    assert images.to_uint8(x).tolist() == [0, 255, 0, 255, 0, 128]
    assert images.to_uint8(x.half()).tolist() == images.to_uint8(x.bfloat16()).tolist() == [0, 255, 0, 255, 0, 128]


def test_wrong_types_and_shapes_are_refused():
    with pytest.raises(ValueError, match=r"uint8 images, not torch\.float32"):
        images.to_float(torch.zeros(2))
    with pytest.raises(ValueError, match=r"floats in \[-1, 1\], not torch\.uint8"):
        images.to_uint8(ALL_BYTES)
    with pytest.raises(ValueError, match=r"not \(8, 8\)"):
        images.to_numpy(torch.zeros(8, 8))


def test_to_numpy_moves_channels_last_for_bytes_and_floats():
    x = torch.arange(2 * 3 * 4 * 5, dtype=torch.uint8).reshape(2, 3, 4, 5)
    for array in (images.to_numpy(x), images.to_numpy(images.to_float(x).requires_grad_())):
        assert array.dtype == np.uint8 and array.shape == (2, 4, 5, 3)
        assert array[1, 2, 3, 0] == x[1, 0, 2, 3] and array[0, 3, 4, 2] == x[0, 2, 3, 4]


def test_grid_layout():
    x = torch.arange(1, 4, dtype=torch.uint8).reshape(3, 1, 1, 1).expand(3, 1, 1, 2)  # three tiles of 1 x 2
    g = images.BACKGROUND
    assert images.grid(x, columns=2, pad=1, scale=1)[..., 0].tolist() == [
        [g, g, g, g, g, g, g],
        [g, 1, 1, g, 2, 2, g],
        [g, g, g, g, g, g, g],
        [g, 3, 3, g, g, g, g],
        [g, g, g, g, g, g, g],
    ]
    assert images.grid(x, columns=3, pad=0, scale=1)[..., 0].tolist() == [[1, 1, 2, 2, 3, 3]]
    assert images.grid(x[:1], pad=1, scale=2, background=9)[..., 0].tolist() == [
        [9, 9, 9, 9, 9, 9],
        [9, 1, 1, 1, 1, 9],
        [9, 1, 1, 1, 1, 9],
        [9, 9, 9, 9, 9, 9],
    ]
    assert images.grid(x).shape == (2 * 24 + 3 * 2, 2 * 48 + 3 * 2, 1)  # nearly square, tiles of 48 pixels
    assert images.grid(torch.zeros(2, 3, 64, 64)).shape == (64 + 2 * 2, 2 * 64 + 3 * 2, 3)  # large enough as it is


@pytest.mark.parametrize("wrong", [{"columns": 0}, {"scale": 0}, {"pad": -1}])
def test_grid_refuses_impossible_layouts(wrong):
    with pytest.raises(ValueError, match="a grid needs"):
        images.grid(torch.zeros(2, 1, 4, 4), **wrong)
    with pytest.raises(ValueError, match="n=0"):
        images.grid(torch.zeros(0, 1, 4, 4))


@pytest.mark.parametrize("shape", [(5, 7), (5, 7, 1), (5, 7, 3)])
def test_png_holds_the_array(tmp_path, shape):
    array = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    images.save_png(tmp_path / "a.png", array)
    assert np.array_equal(np.asarray(Image.open(tmp_path / "a.png")), array.squeeze())


def test_gif_frames_times_and_content(tmp_path):
    frames = [np.full((6, 4, 1), value, dtype=np.uint8) for value in (0, 90, 255)]
    images.save_gif(tmp_path / "a.gif", frames, seconds_per_frame=0.05, hold=1.5)
    durations = []
    with Image.open(tmp_path / "a.gif") as film:
        assert film.n_frames == 3 and film.info["loop"] == 0 and film.size == (4, 6)
        for i, frame in enumerate(frames):
            film.seek(i)
            durations.append(film.info["duration"])
            assert abs(np.asarray(film.convert("L")).astype(int) - frame[..., 0]).max() <= 4  # the palette is small
    assert durations == [50, 50, 1500]
    with pytest.raises(ValueError, match="at least one frame"):
        images.save_gif(tmp_path / "b.gif", [])


def test_samples_are_written_by_suffix(tmp_path):
    x = torch.linspace(-1, 1, 5 * 3 * 6 * 4).reshape(5, 3, 6, 4)
    images.save_samples(tmp_path / "s.npy", x)
    array = np.load(tmp_path / "s.npy")
    assert array.dtype == np.uint8 and np.array_equal(array, images.to_numpy(x)) and array.shape == (5, 6, 4, 3)
    images.save_samples(tmp_path / "s.png", x)
    assert np.array_equal(np.asarray(Image.open(tmp_path / "s.png")), images.grid(x))
    with pytest.raises(ValueError, match=r"not to '\.jpg'"):
        images.save_samples(tmp_path / "s.jpg", x)


# ---------------------------------------------------------------------------------------------- points


def centre(picture: torch.Tensor) -> tuple[float, float]:
    """Row and column around which the ink lies, inside the line around a picture of points."""
    ink = 255 - picture[0, 0].double()
    ink[[0, -1]] = ink[:, [0, -1]] = 0
    at = torch.arange(len(ink)) + 0.5
    return float(ink.sum(1) @ at.double() / ink.sum()), float(ink.sum(0) @ at.double() / ink.sum())


def test_images_are_pictures_as_they_are():
    for x in (torch.rand(2, 3, 4, 5), torch.zeros(1, 1, 2, 2, dtype=torch.uint8)):
        assert images.as_pictures(x) is x


@pytest.mark.parametrize("side", [60, 160, 480])
def test_points_are_dark_dots_on_white_with_the_second_coordinate_upwards(side):
    for x, y in ((0.0, 0.0), (2.0, -1.0), (-1.5, 2.5), (0.0, 1.0)):
        picture = images.as_pictures(torch.tensor([[x, y]], requires_grad=True), side)
        assert picture.shape == (1, 1, side, side) and picture.dtype == torch.uint8
        row, column = centre(picture)
        assert abs(row - (3 - y) * side / 6) < 0.3 and abs(column - (x + 3) * side / 6) < 0.3
        white = (picture[..., 1:-1, 1:-1] == 255).float().mean()
        assert 0.995 < white < 1 and picture.min() < 100


def test_a_line_is_around_the_points_whatever_they_are():
    many = images.as_pictures(8 * torch.randn(2000, 2))[0, 0]
    none = images.as_pictures(torch.full((3, 2), float("nan")))[0, 0]
    for edge in (0, -1):
        assert (many[edge] == images.FRAME).all() and (many[:, edge] == images.FRAME).all()
    assert (none[1:-1, 1:-1] == 255).all() and torch.equal(none[0], many[0])
    assert torch.equal(images.as_pictures(torch.zeros(0, 2))[0, 0], none)


def test_points_beyond_the_window_are_at_its_edge_and_others_are_not_drawn():
    def one(x: float, y: float) -> torch.Tensor:
        return images.as_pictures(torch.tensor([[x, y], [0.0, 0.0]]))

    assert torch.equal(one(40, 1), one(3, 1)) and torch.equal(one(0.5, -1e9), one(0.5, -3))
    assert not torch.equal(one(40, 1), images.as_pictures(torch.zeros(1, 2)))
    assert torch.equal(one(float("nan"), 1), images.as_pictures(torch.zeros(1, 2)))
    assert torch.equal(one(1, -float("inf")), images.as_pictures(torch.zeros(1, 2)))


def test_density_shows():
    """A normal cloud is darkest in the middle, and no order of its points matters."""
    x = torch.randn(4000, 2)
    picture = images.as_pictures(x)[0, 0].float()
    rings = [picture[80 - r : 80 + r, 80 - r : 80 + r].mean() for r in (8, 24, 40, 60)]
    assert rings == sorted(rings) and rings[0] < 120 and rings[-1] > 170
    assert torch.equal(images.as_pictures(x.flip(0)), images.as_pictures(x))
    few = images.as_pictures(x[:50])[0, 0]
    assert few.min() < 60 and (few == 255).float().mean() > 0.95  # each can be seen where they are few


def test_what_is_neither_image_nor_point_is_no_picture():
    for wrong in (torch.zeros(4, 0), torch.zeros(2, 4, 4), torch.zeros(4, 2, dtype=torch.int64)):
        with pytest.raises(ValueError, match=r"images \(n, C, H, W\) or points, floats \(n, d\), not torch"):
            images.as_pictures(wrong)
    with pytest.raises(ValueError, match="side = 7"):
        images.as_pictures(torch.zeros(4, 2), 7)


def test_samples_lie_over_the_data_in_the_same_window():
    data, x = torch.tensor([[-1.5, 0.0], [1.5, 1.5]]), torch.tensor([[1.5, 1.5]])
    picture = images.scatter(x, data, 120).astype(int)
    assert picture.shape == (120, 120, 3) and (picture[0] == images.FRAME).all()
    inside = picture[1:-1, 1:-1]
    blue, grey = inside[..., 2] - inside[..., 0] > 90, (inside.max(2) < 230) & (np.ptp(inside, axis=2) < 20)
    for there, (row, column) in ((blue, (30, 90)), (grey, (60, 30))):
        y, x_of = np.nonzero(there)
        assert (y.mean() + 1, x_of.mean() + 1) == pytest.approx((row - 0.5, column - 0.5), abs=1)
    assert np.array_equal(images.scatter(data), images.scatter(data, data[:0]))
    with pytest.raises(ValueError, match=r"points, floats \(n, 2\), not"):
        images.scatter(data, torch.zeros(3, 3))


def test_samples_that_are_points_are_written_by_suffix(tmp_path):
    x = torch.randn(50, 2, dtype=torch.float64, requires_grad=True)
    images.save_samples(tmp_path / "s.npy", x)
    array = np.load(tmp_path / "s.npy")
    assert array.dtype == np.float32 and np.array_equal(array, x.detach().float().numpy())
    images.save_samples(tmp_path / "s.png", x)
    drawn = images.as_pictures(x, images.LARGE_SIDE)[0, 0].numpy()
    assert np.array_equal(np.asarray(Image.open(tmp_path / "s.png")), drawn)
    with pytest.raises(ValueError, match=r"not to '\.gif'"):
        images.save_samples(tmp_path / "s.gif", x)
    with pytest.raises(ValueError, match=r"not torch\.float32 \(4, 0\)"):
        images.save_samples(tmp_path / "s.npy", torch.zeros(4, 0))


@pytest.mark.parametrize("d", [1, 3, 7])
def test_points_of_other_dimensions_than_two_are_kept_whole_and_shown_in_the_plane(tmp_path, d):
    x = torch.randn(50, d)
    images.save_samples(tmp_path / "s.npy", x)
    assert np.array_equal(images.load_samples(tmp_path / "s.npy"), x.numpy())
    beside = x[:, 1] if d > 1 else torch.linspace(-1, 1, 50)
    assert torch.equal(images.in_plane(x), torch.stack([x[:, 0], beside], 1))
    assert torch.equal(images.as_pictures(x), images.as_pictures(images.in_plane(x)))
    said = {1: "the coordinate, and which sample it is", 3: "the first two of 3 coordinates"}
    assert images.plane_of(d) == said.get(d, "the first two of 7 coordinates") and images.plane_of(2) is None


def test_what_cannot_be_written_as_a_picture_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"the folder .*nowhere does not exist"):
        images.save_samples(tmp_path / "nowhere" / "a.png", torch.zeros(1, 1, 4, 4))
    with pytest.raises(ValueError, match="a picture is uint8"):
        images.save_png(tmp_path / "a.png", np.zeros((4, 4, 2), dtype=np.uint8))
