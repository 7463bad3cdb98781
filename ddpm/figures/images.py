"""Conversion of images between the network's floats, bytes and files: the only place with the scale [-1, 1] <-> 0..255.

Points in the plane become an image here, so that they can be displayed like images.
"""

import itertools
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from einops import rearrange, repeat
from PIL import Image
from torch import Tensor

from ddpm.runs.files import regular_size, replacing

BACKGROUND = 64  # of grids, mid-dark: distinct from black and from white tiles
TILE = 48  # least pixels of the longer side of a grid's tile, by default
GREYS, COLOURS = 16, 64  # of an animation's palette: noise compresses only by fewer bits
WINDOW = 3.0  # points are drawn in [-3, 3]^2: three standard deviations of standardised data
SIDE, LARGE_SIDE = 160, 480  # pixels of a picture of points: of one among others, of one alone
LARGEST_SAMPLES = 2**26  # bytes of a run's samples.npy
FRAME = 200  # grey value of the frame of a picture of points
INK = 14  # opacity of a dot, times the root of the number of dots
DOTS, OUTLINE = (31, 119, 180), (170, 170, 170)  # colours of samples, and of the data behind them


def to_float(images: Tensor) -> Tensor:
    """Convert bytes 0..255 of any shape to float32 in [-1, 1]."""
    if images.dtype != torch.uint8:
        raise ValueError(f"to_float takes uint8 images, not {images.dtype}")
    return images.float() / 127.5 - 1


def to_uint8(x: Tensor) -> Tensor:
    """Convert floats in [-1, 1] of any shape to the nearest bytes; values outside are clipped and NaN becomes 0."""
    if not x.is_floating_point():
        raise ValueError(f"to_uint8 takes floats in [-1, 1], not {x.dtype}")
    return ((x.float().clamp(-1, 1).nan_to_num(nan=-1) + 1) * 127.5).round().to(torch.uint8)


def to_numpy(x: Tensor) -> np.ndarray:
    """Convert images (n, C, H, W), bytes or floats in [-1, 1], to uint8 (n, H, W, C), the layout of files."""
    if x.ndim != 4:
        raise ValueError(f"images have the shape (n, C, H, W), not {tuple(x.shape)}")
    x = x.detach().cpu()
    return rearrange(x if x.dtype == torch.uint8 else to_uint8(x), "n c h w -> n h w c").contiguous().numpy()


def grid(
    x: Tensor, columns: int | None = None, pad: int = 2, scale: int | None = None, background: int = BACKGROUND
) -> np.ndarray:
    """Tile images row by row into one picture.

    Args:
        x: images (n, C, H, W), bytes or floats in [-1, 1], n >= 1.
        columns: images in a row; None for a nearly square grid. The last row is filled with background.
        pad: pixels of background between and around the enlarged images.
        scale: integer nearest-neighbour enlargement; None for the least that makes a tile's longer side 48 pixels.
        background: its grey value, 0..255.

    Returns: uint8 (H', W', C).
    """
    tiles = to_numpy(x)
    n, height, width, channels = tiles.shape
    columns = math.ceil(math.sqrt(n)) if columns is None else columns
    scale = math.ceil(TILE / max(height, width)) if scale is None else scale
    if n < 1 or columns < 1 or pad < 0 or scale < 1:
        raise ValueError(f"a grid needs n, columns, scale >= 1 and pad >= 0, not {n=}, {columns=}, {scale=}, {pad=}")
    rows = math.ceil(n / columns)
    shape = (rows * columns, scale * height + pad, scale * width + pad, channels)
    board = np.full(shape, background, dtype=np.uint8)  # each tile brings the background above and to the left of it
    board[:n, pad:, pad:] = repeat(tiles, "n h w c -> n (h i) (w j) c", i=scale, j=scale)
    picture = rearrange(board, "(rows columns) h w c -> (rows h) (columns w) c", rows=rows)
    return np.pad(picture, ((0, pad), (0, pad), (0, 0)), constant_values=background)


def in_plane(x: Tensor) -> Tensor:
    """Return points (n, d) as points (n, 2): their first two coordinates; if d = 1, x and the row index in [-1, 1].

    Raises: ValueError for other than floats (n, d), d >= 1.
    """
    if x.ndim != 2 or x.shape[1] < 1 or not x.is_floating_point():
        raise ValueError(f"pictures are made from images (n, C, H, W) or points, floats (n, d), not {_described(x)}")
    if x.shape[1] > 1:
        return x[:, :2]
    return torch.cat([x, torch.linspace(-1, 1, len(x), dtype=x.dtype, device=x.device)[:, None]], dim=1)


def plane_of(d: int) -> str | None:
    """Describe which coordinates of d `in_plane` returns; None for two, which are all of them."""
    return {1: "the coordinate, and which sample it is", 2: None}.get(d, f"the first two of {d} coordinates")


def as_pictures(x: Tensor, side: int = SIDE) -> Tensor:
    """Return images unchanged, and points as one picture of all of them.

    Every point is a dark dot on white, the more transparent the more points there are, so that density is visible:
    where dots overlap, transmittances are multiplied. The picture is [-3, 3]^2, with the second coordinate upwards and
    a grey frame. A point outside is drawn at its edge; one that is not finite is not drawn. Points of other dimensions
    than two are projected by `in_plane`.

    Args:
        x: images (n, C, H, W), or points, floats (n, d).
        side: pixels of the picture of points, >= 8.

    Returns: the images themselves, or uint8 (1, 1, side, side).

    Raises: ValueError for another shape or type.
    """
    if x.ndim == 4:
        return x
    x = in_plane(x)
    picture = (255 * _light(x, side, max(1, side / 130))).round().astype(np.uint8)
    return rearrange(torch.from_numpy(_framed(picture)), "h w -> 1 1 h w")


def scatter(x: Tensor, outline: Tensor | None = None, side: int = SIDE) -> np.ndarray:
    """Draw points in colour over others in grey, in the window of `as_pictures`: samples over the data.

    Args:
        x: points, floats (n, 2).
        outline: points, floats (m, 2), or None.
        side: pixels of the picture, >= 8.

    Returns: uint8 (side, side, 3).

    Raises: ValueError for another shape or type.
    """
    picture = np.full((side, side, 3), 255.0)
    for points, colour, ink in ((outline, OUTLINE, INK), (x, DOTS, 2 * INK)):
        if points is not None:
            light = _light(points, side, max(0.8, side / 180), ink)[..., None]
            picture = picture * light + np.array(colour) * (1 - light)
    return _framed(picture.round().astype(np.uint8))


def _light(x: Tensor, side: int, radius: float, ink: float = INK) -> np.ndarray:
    """Return the light (side, side), in 0..1, that dots at points (n, 2) transmit; many dots are fainter."""
    if x.ndim != 2 or x.shape[1] != 2 or not x.is_floating_point():
        raise ValueError(f"pictures are made from images (n, C, H, W) or points, floats (n, 2), not {_described(x)}")
    if side < 8:
        raise ValueError(f"side = {side}: a picture of points has at least 8 pixels a side")
    points = x.detach().cpu().double().numpy()  # many small operations: NumPy does not wait for threads
    points = points[np.isfinite(points).all(1)]
    place = np.stack([WINDOW - points[:, 1], points[:, 0] + WINDOW]) * side / (2 * WINDOW) - 0.5  # row, column
    place = place.clip(1, side - 2)  # inside the frame
    opacity = min(0.9, ink / math.sqrt(max(len(points), 1)))
    light = np.zeros(side * side)  # its logarithm
    reach = range(-math.ceil(radius), math.ceil(radius) + 1)
    for offset in itertools.product(reach, reach):
        pixel = place.round() + np.array(offset)[:, None]
        covered = (radius + 0.5 - np.hypot(*(pixel - place))).clip(0, 1)  # the share of the pixel, nearly
        inside = ((pixel >= 0) & (pixel < side)).all(0)
        row, column = pixel[:, inside].astype(np.int64)
        light += np.bincount(side * row + column, covered[inside] * math.log(1 - opacity), side * side)
    return np.exp(light).reshape(side, side)


def _framed(picture: np.ndarray) -> np.ndarray:
    """Return the picture (H, W, *) with a grey frame."""
    framed = np.full_like(picture, FRAME)
    framed[1:-1, 1:-1] = picture[1:-1, 1:-1]
    return framed


def save_png(path: str | Path, array: np.ndarray, colours: int | None = None) -> None:
    """Write one image, uint8 (H, W), (H, W, 1) or (H, W, 3); reduced to a palette of `colours` for a smaller file."""
    image = _image(array)
    image = image if colours is None else image.quantize(colours, dither=Image.Dither.NONE)
    with replacing(path) as temporary:
        image.save(temporary, format="PNG", optimize=True)


def save_gif(
    path: str | Path,
    frames: Sequence[np.ndarray],
    seconds_per_frame: float = 0.1,
    hold: float = 2,
    colours: int = COLOURS,
) -> None:
    """Write an animated GIF that loops for ever.

    Args:
        frames: one or more images, uint8 (H, W, 1) or (H, W, 3), all of one shape.
        seconds_per_frame: duration of a frame; the format counts in hundredths.
        hold: duration of the last frame, in seconds.
        colours: size of the palette that colour frames share.
    """
    shapes = {np.shape(frame) for frame in frames}
    if len(shapes) != 1:
        raise ValueError(f"an animation needs at least one frame and one shape, not {len(frames)} frames of {shapes}")
    film = _image(np.concatenate(list(frames)))
    film = film.quantize(GREYS if film.mode == "L" else colours, dither=Image.Dither.NONE)  # one palette for all frames
    width, height = film.width, film.height // len(frames)
    first, *others = (film.crop((0, i * height, width, (i + 1) * height)) for i in range(len(frames)))
    milliseconds = [round(1000 * seconds_per_frame)] * len(others) + [round(1000 * hold)]
    with replacing(path) as temporary:
        first.save(temporary, format="GIF", save_all=True, append_images=others, duration=milliseconds, loop=0)


def save_samples(path: str | Path, x: Tensor, columns: int | None = None) -> None:
    """Write samples to a .npy or .png file.

    Args:
        path: `.npy` stores images as uint8 (n, H, W, C), points as float32 (n, d); `.png` is a grid of images, or a
            picture of all points.
        x: images (n, C, H, W), bytes or floats in [-1, 1], or points, floats (n, d).
        columns: images in a row of the grid; None for a nearly square one.

    Raises: ValueError for another suffix or shape.
    """
    pictures = as_pictures(x, LARGE_SIDE)
    match Path(path).suffix:
        case ".npy":
            with replacing(path) as temporary:
                np.save(temporary, to_numpy(x) if x.ndim == 4 else x.detach().cpu().float().numpy())
        case ".png":
            save_png(path, grid(pictures, columns) if x.ndim == 4 else pictures[0, 0].numpy())
        case suffix:
            raise ValueError(f"samples are written to a .npy or .png file, not to {suffix!r}: {path}")


def load_samples(path: Path) -> np.ndarray | None:
    """Load the .npy file of `save_samples`, uint8 (n, H, W, C) or float32 (n, d); None if missing or damaged."""
    try:
        array = load_array(path, LARGEST_SAMPLES)
    except (OSError, ValueError):
        return None
    expected = (np.dtype(np.uint8), 4) if array.dtype == np.uint8 else (np.dtype(np.float32), 2)
    return array if (array.dtype, array.ndim) == expected else None


def load_array(path: Path, largest: int) -> np.ndarray:
    """Load the array of a .npy file, read-only.

    The header is parsed as plain values and checked against the file's size: nothing in it is executed or trusted.

    Args:
        largest: bytes that the file may have.
    Raises: OSError; ValueError for another format, or an array of objects.
    """
    size = regular_size(path, largest)
    headers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    with path.open("rb") as file:
        version = np.lib.format.read_magic(file)
        if version not in headers:
            raise ValueError(f"version {version} of the format is not known")
        shape, fortran_order, dtype = headers[version](file)
        content = file.read(size)
    if dtype.hasobject or len(content) != math.prod(shape) * dtype.itemsize:
        raise ValueError("it holds objects" if dtype.hasobject else "its header does not fit its size")
    return np.frombuffer(content, dtype).reshape(shape, order="F" if fortran_order else "C")


def _described(x: Tensor) -> str:
    return f"{x.dtype} {tuple(x.shape)}"


def _image(array: np.ndarray) -> Image.Image:
    """Convert uint8 (H, W), (H, W, 1) or (H, W, 3) to a PIL image."""
    if array.dtype != np.uint8 or array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[-1] not in (1, 3)):
        raise ValueError(f"a picture is uint8 (H, W), (H, W, 1) or (H, W, 3), not {array.dtype} {array.shape}")
    return Image.fromarray(array[..., 0] if array.ndim == 3 and array.shape[-1] == 1 else array)
