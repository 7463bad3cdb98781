"""Images between the network's floats, bytes and files: the only place where the scale [-1, 1] <-> 0..255 exists."""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from einops import rearrange, repeat
from PIL import Image
from torch import Tensor

from ddpm.files import replacing

BACKGROUND = 64  # of grids, mid-dark: neither a black nor a white tile melts into it
TILE = 48  # pixels that the longer side of a grid's tile has at least, unless told otherwise
GREYS, COLOURS = 16, 64  # of an animation's palette: noise does not compress, fewer bits do


def to_float(images: Tensor) -> Tensor:
    """Bytes 0..255 of any shape to float32 in [-1, 1]."""
    if images.dtype != torch.uint8:
        raise ValueError(f"to_float takes uint8 images, not {images.dtype}")
    return images.float() / 127.5 - 1


def to_uint8(x: Tensor) -> Tensor:
    """Floats in [-1, 1] of any shape to the nearest bytes; values outside are clipped and NaN becomes 0."""
    if not x.is_floating_point():
        raise ValueError(f"to_uint8 takes floats in [-1, 1], not {x.dtype}")
    return ((x.float().clamp(-1, 1).nan_to_num(nan=-1) + 1) * 127.5).round().to(torch.uint8)


def to_numpy(x: Tensor) -> np.ndarray:
    """Images (n, C, H, W), bytes or floats in [-1, 1], to uint8 (n, H, W, C), the layout of files."""
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


def save_png(path: str | Path, array: np.ndarray) -> None:
    """Write one image, uint8 (H, W), (H, W, 1) or (H, W, 3)."""
    image = _image(array)
    with replacing(path) as temporary:
        image.save(temporary, format="PNG", optimize=True)


def save_gif(path: str | Path, frames: Sequence[np.ndarray], seconds_per_frame: float = 0.1, hold: float = 2) -> None:
    """Write an animation that loops for ever.

    Args:
        frames: one or more images, uint8 (H, W, 1) or (H, W, 3), all of one shape.
        seconds_per_frame: how long a frame is shown; the format counts in hundredths.
        hold: how long the last frame is shown.
    """
    shapes = {np.shape(frame) for frame in frames}
    if len(shapes) != 1:
        raise ValueError(f"an animation needs at least one frame and one shape, not {len(frames)} frames of {shapes}")
    film = _image(np.concatenate(list(frames)))
    film = film.quantize(GREYS if film.mode == "L" else COLOURS, dither=Image.Dither.NONE)  # one palette for all frames
    width, height = film.width, film.height // len(frames)
    first, *others = (film.crop((0, i * height, width, (i + 1) * height)) for i in range(len(frames)))
    milliseconds = [round(1000 * seconds_per_frame)] * len(others) + [round(1000 * hold)]
    with replacing(path) as temporary:
        first.save(temporary, format="GIF", save_all=True, append_images=others, duration=milliseconds, loop=0)


def save_samples(path: str | Path, x: Tensor) -> None:
    """Write images x (n, C, H, W): `.npy` holds uint8 (n, H, W, C), `.png` shows their grid."""
    match Path(path).suffix:
        case ".npy":
            with replacing(path) as temporary:
                np.save(temporary, to_numpy(x))
        case ".png":
            save_png(path, grid(x))
        case suffix:
            raise ValueError(f"samples are written to a .npy or .png file, not to {suffix!r}: {path}")


def _image(array: np.ndarray) -> Image.Image:
    """uint8 (H, W), (H, W, 1) or (H, W, 3) as an image to save."""
    if array.dtype != np.uint8 or array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[-1] not in (1, 3)):
        raise ValueError(f"a picture is uint8 (H, W), (H, W, 1) or (H, W, 3), not {array.dtype} {array.shape}")
    return Image.fromarray(array[..., 0] if array.ndim == 3 and array.shape[-1] == 1 else array)
