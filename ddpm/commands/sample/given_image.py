"""Input images of `ddpm-edit` and their masks: read, checked, and resized for the network."""

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
GAP = re.compile(r"(\d+(?:\.\d+)?):(\d+(?:\.\d+)?)s")  # in a sound, in seconds
SOUNDS = (".wav", ".flac", ".ogg", ".mp3")
FITS = {"crop": "cropped and scaled", "pad": "scaled and padded", "error": ""}


def image_of(
    config: DictConfig, trained: DictConfig, shape: tuple[int, int, int], mel: Any = None
) -> tuple[Any, str, list[int]]:
    """Return the image (1, C, H, W) in [-1, 1], its original size, and the labels of a held-out image, or [].

    Args:
        mel: of a run on sounds, for which the image may be a sound file; else None.
    """
    from ddpm.figures.images import to_float

    name = plain(config.image)
    if not isinstance(name, str) or not name:
        raise InvalidInput(f"image={name} must be an image file, or a held-out one such as held_out:5")
    if mel is not None and Path(name).suffix.lower() in SOUNDS:
        x = to_float(_sound(name, mel))
        return x, _size(x), []
    if not name.startswith(HELD_OUT):
        pixels = _read(name, "image", shape[0])
        size = _size(pixels)
        return to_float(_fitted(pixels, shape, config.fit, f"image={name}")), size, []
    data, number = data_of(config, trained), name.removeprefix(HELD_OUT)
    if not (number.isascii() and number.isdigit() and int(number) < len(data.held_out)):
        raise InvalidInput(f"image={name}: held-out {data.units} have the numbers 0..{len(data.held_out) - 1}")
    batch = data.batch(data.held_out[[int(number)]])
    if tuple(batch.x.shape[1:]) != shape:
        raise InvalidInput(f"image={name} is {_size(batch.x)}, but {shape[2]}x{shape[1]} is needed")
    labels = batch.condition.classes
    return batch.x, _size(batch.x), [] if labels is None else labels.flatten().tolist()


def _sound(path: str, mel: Any) -> Any:
    """Return the spectrogram uint8 (1, 1, H, W) of the first clip of a sound file, padded with silence if short."""
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


def _gap(text: str, mel: Any) -> Any:
    """Return the mask (1, 1, H, W) of a gap in a sound, START:ENDs; None if `text` is not of that form."""
    import torch

    found = GAP.fullmatch(text)
    if found is None:
        return None
    start, end = float(found[1]), float(found[2])
    if mel is None:
        raise InvalidInput(f"mask={text} is a gap in a sound, but the run draws no sounds; give an image file")
    if not 0 <= start < end <= mel.seconds + 0.005:
        raise InvalidInput(f"mask={text}: a gap begins before it ends, within 0:{mel.seconds:.2f}s")
    first, last = mel.columns(start, end)
    mask = torch.zeros(1, 1, mel.n_mels, mel.frames, dtype=torch.bool)
    mask[..., min(first, mel.frames - 1) : last] = True
    return mask


def mask_of(config: DictConfig, source: Any, size: str, mel: Any = None) -> Any:
    """Return the mask (1, 1, H, W), True where pixels are drawn anew; `mel` is that of a run on sounds."""
    name = plain(config.mask)
    if not isinstance(name, str) or not name:
        raise InvalidInput(f"mask={name} must be an image file, or for a sound a gap such as 0.2:0.4s")
    if (gap := _gap(name, mel)) is not None:
        return gap
    pixels = _read(name, "mask", 1)
    _, height, width = source.decoded_shape
    if _size(pixels) not in (size, f"{width}x{height}"):
        network = "" if size == f"{width}x{height}" else f", or of the network's images, {width}x{height}"
        raise InvalidInput(f"mask={name} is {_size(pixels)}; it must have the size of the image, {size}{network}")
    mask = _fitted(pixels, (1, height, width), config.fit, None) >= 128
    if not mask.any():
        raise InvalidInput(f"mask={name} is black everywhere; white pixels are drawn anew")
    return mask


def depth_of(config: DictConfig, source: Any) -> Any:
    """Return the depth of each pixel (1, 1, H, W), light where near."""
    name = plain(config.depth)
    if not isinstance(name, str) or not name:
        raise InvalidInput(f"depth={name} must be an image file")
    _, height, width = source.decoded_shape
    return _fitted(_read(name, "depth", 1), (1, height, width), config.fit, f"depth={name}").float()


def _size(images: Any) -> str:
    """Return the size of images (n, C, H, W) as WIDTHxHEIGHT."""
    return f"{images.shape[-1]}x{images.shape[-2]}"


def _read(path: str, key: str, channels: int) -> Any:
    """Return the pixels of an image file, uint8 (1, C, H, W)."""
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
    """Resize uint8 images (1, C, H, W); prints so under `name`, which is None for masks: they are padded with black."""
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
