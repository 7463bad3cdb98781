"""Images that are given to be edited, and their masks: read, checked, and brought to the network's size."""

import re
import warnings
from functools import partial
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from ddpm.commands.console import say
from ddpm.commands.load import data_of
from ddpm.config import InvalidInput, plain

HELD_OUT = "held_out:"
GAP = re.compile(r"(\d+(?:\.\d+)?):(\d+(?:\.\d+)?)s")  # of a sound, in seconds
SOUNDS = (".wav", ".flac", ".ogg", ".mp3")
FITS = {"crop": "cropped and scaled", "pad": "scaled and padded", "error": ""}


def image_of(
    config: DictConfig, trained: DictConfig, shape: tuple[int, int, int], mel: Any = None
) -> tuple[Any, str, list[int]]:
    """The image, (1, C, H, W) in [-1, 1]; the size that it had; its labels, if it is a held-out one that has any.

    Args:
        mel: of a run of sounds, of which a sound file is given too.
    """
    from ddpm.figures.images import to_float

    given = plain(config.image)
    if not isinstance(given, str) or not given:
        raise InvalidInput(f"image={given} must be an image file, or such as held_out:5")
    if mel is not None and Path(given).suffix.lower() in SOUNDS:
        x = to_float(_sound(given, mel))
        return x, _size(x), []
    if not given.startswith(HELD_OUT):
        pixels = _read(given, "image", shape[0])
        size = _size(pixels)
        return to_float(_fitted(pixels, shape, config.fit, f"image={given}")), size, []
    data, number = data_of(config, trained), given.removeprefix(HELD_OUT)
    if not (number.isascii() and number.isdigit() and int(number) < len(data.held_out)):
        raise InvalidInput(f"image={given}: held-out {data.units} have the numbers 0..{len(data.held_out) - 1}")
    batch = data.batch(data.held_out[[int(number)]])
    if tuple(batch.x.shape[1:]) != shape:
        raise InvalidInput(f"image={given} is {_size(batch.x)}, but {shape[2]}x{shape[1]} is needed")
    labels = batch.condition.classes
    return batch.x, _size(batch.x), [] if labels is None else labels.flatten().tolist()


def _sound(path: str, mel: Any) -> Any:
    """The picture uint8 (1, 1, H, W) of the beginning of a sound file; a shorter one is padded with silence."""
    from ddpm.data.sound import FULL, cut, must_have_libraries, read_sound

    try:
        must_have_libraries(f"image={path}")
        read = read_sound(Path(path).expanduser(), mel.sample_rate)
    except FileNotFoundError as error:
        raise InvalidInput(f"image={path}: no such file (that is {Path(path).expanduser().absolute()})") from error
    except (ValueError, OSError, RuntimeError) as error:
        raise InvalidInput(f"image={path} cannot be read: {' '.join(str(error).split())}") from error
    clip = cut(read.sound, mel.slice_size, pad=True)[:1]
    if not clip.any():
        raise InvalidInput(f"image={path} is silent for the {mel.seconds:.2f} s of a clip")
    if len(read.sound) != mel.slice_size:
        say(f"image={path} lasts {read.seconds:.2f} s: cut, or padded, to a clip of {mel.seconds:.2f} s")
    return mel.encode(clip.float() / FULL)[0]


def _gap(given: str, mel: Any) -> Any:
    """The mask (1, 1, H, W) of a gap in a sound, START:ENDs; None if that is not what is given."""
    import torch

    found = GAP.fullmatch(given)
    if found is None:
        return None
    start, end = float(found[1]), float(found[2])
    if mel is None:
        raise InvalidInput(f"mask={given} is a gap in a sound, and the run draws none; give an image file")
    if not 0 <= start < end <= mel.seconds + 0.005:
        raise InvalidInput(f"mask={given}: a gap begins before it ends, within 0:{mel.seconds:.2f}s")
    first, last = mel.columns(start, end)
    mask = torch.zeros(1, 1, mel.n_mels, mel.frames, dtype=torch.bool)
    mask[..., min(first, mel.frames - 1) : last] = True
    return mask


def mask_of(config: DictConfig, source: Any, size: str, mel: Any = None) -> Any:
    """True where pixels are drawn anew, (1, 1, H, W); `mel` is that of a run of sounds."""
    given = plain(config.mask)
    if not isinstance(given, str) or not given:
        raise InvalidInput(f"mask={given} must be an image file, or of a sound a gap such as 0.2:0.4s")
    if (gap := _gap(given, mel)) is not None:
        return gap
    pixels = _read(given, "mask", 1)
    _, height, width = source.decoded_shape
    if _size(pixels) not in (size, f"{width}x{height}"):
        network = "" if size == f"{width}x{height}" else f", or of the network's images, {width}x{height}"
        raise InvalidInput(f"mask={given} is {_size(pixels)}; it must have the size of the image, {size}{network}")
    mask = _fitted(pixels, (1, height, width), config.fit, None) >= 128
    if not mask.any():
        raise InvalidInput(f"mask={given} is black everywhere; what is white is drawn anew")
    return mask


def depth_of(config: DictConfig, source: Any) -> Any:
    """The depth of each pixel, near things light, (1, 1, H, W)."""
    given = plain(config.depth)
    if not isinstance(given, str) or not given:
        raise InvalidInput(f"depth={given} must be an image file")
    _, height, width = source.decoded_shape
    return _fitted(_read(given, "depth", 1), (1, height, width), config.fit, f"depth={given}").float()


def _size(images: Any) -> str:
    """Width and height of images (n, C, H, W), as they are told."""
    return f"{images.shape[-1]}x{images.shape[-2]}"


def _read(path: str, key: str, channels: int) -> Any:
    """The pixels of a file, uint8 (1, C, H, W)."""
    from PIL import Image

    from ddpm.data.folder import read_pixels
    from ddpm.data.image_files import UnreadableImage, read_image

    file = Path(path).expanduser()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            pixels, _ = read_image(f"{key}={path}", partial(read_pixels, file, channels))
            return pixels
    except UnreadableImage as error:
        if isinstance(error.__cause__, FileNotFoundError):
            raise InvalidInput(f"{key}={path}: no such file (that is {file.absolute()})") from error
        raise InvalidInput(str(error)) from error


def _fitted(images: Any, shape: tuple[int, int, int], how: str, name: str | None) -> Any:
    """uint8 (1, C, H, W) of another size: `name` is told so; masks have none, and are padded with black."""
    import numpy as np
    import torch
    from PIL import Image, ImageOps

    from ddpm.data.dataset import fit

    channels, height, width = shape
    if tuple(images.shape[-2:]) == (height, width):
        return images
    needed = f"{width}x{height}"
    if how == "error":
        raise InvalidInput(
            f"{name or 'the mask'} is {_size(images)}, but {needed} is needed; fit=crop and fit=pad fit it"
        )
    if name is not None:
        say(f"{name} is {_size(images)}: {FITS[how]} to {needed}")
    if how == "crop":
        return fit(images, (height, width), channels)
    pixels = images[0].movedim(0, -1).numpy()
    picture = Image.fromarray(pixels[..., 0] if channels == 1 else pixels)
    colour: Any = 0 if name is None else picture.getpixel((0, 0))
    padded = np.asarray(ImageOps.pad(picture, (width, height), Image.Resampling.BICUBIC, colour))
    return torch.from_numpy(padded.reshape(height, width, channels).copy()).movedim(-1, 0)[None]
