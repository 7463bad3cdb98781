"""ddpm/images.py: exact scales, exact layouts, whole files."""

import numpy as np
import pytest
import torch
from PIL import Image

from ddpm import images

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


def test_what_cannot_be_written_as_a_picture_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"the folder .*nowhere does not exist"):
        images.save_samples(tmp_path / "nowhere" / "a.png", torch.zeros(1, 1, 4, 4))
    with pytest.raises(ValueError, match="a picture is uint8"):
        images.save_png(tmp_path / "a.png", np.zeros((4, 4, 2), dtype=np.uint8))
