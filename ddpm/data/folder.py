"""Any folder of PNG or JPEG files, with a subfolder a class or without."""

import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from ddpm.data.dataset import ImageData, check_choice, check_name, check_options, check_room, fit
from ddpm.runs.files import Origin, regular_size

SUFFIXES = (".png", ".jpg", ".jpeg")
LARGEST = 1 << 28  # bytes of an image, more than all its pixels have: PIL looks through a JPEG's zeros one by one
NAMED = 5  # broken images that are named; the rest are counted


class Folder(ImageData):
    """The PNG and JPEG files of a folder, in sorted order.

    If images lie directly in the folder, they have no labels; otherwise each subfolder with images, one level deep, is
    a class. Images are turned as their EXIF data say, transparent ones laid on white, scaled and cropped (see `fit`).
    Broken images, and such as PIL takes for decompression bombs, are named, counted and left out.

    Args:
        root: the folder.
        image_size, channels, validation, flip: as in `ImageData`.
        split: "auto", which is everything. In a folder with the subfolders train and test (in any case) it is the train
            one, and "train" and "test" are allowed.
        name: what the data are called; None for the folder's name.

    Raises: FileNotFoundError or NotADirectoryError if there is no such folder; PermissionError if it cannot be read;
        ValueError if it has no images, for another split, or options outside their ranges.
    """

    def __init__(
        self,
        root: str | Path,
        image_size: int | Sequence[int] = 32,
        channels: int = 3,
        split: str = "auto",
        validation: float = 0.1,
        flip: bool = False,
        name: str | None = None,
    ):
        check_choice("split", split, ("auto", "train", "test"))
        check_options(image_size, channels, validation)
        check_name(name or "")
        root = Path(root).expanduser()
        try:
            half, folder = _choose_half(root, split)
            self.origin = Origin(partial(_looked_at, root, split))
            paths, labels, classes = list_images(folder)
        except PermissionError as error:
            raise PermissionError(f"cannot read {error.filename or root}: {error.strerror or error}") from error
        names = [str(path.relative_to(folder)) for path in paths]
        images, whole = decode_all(names, paths.__getitem__, folder, image_size, channels)
        super().__init__(
            name or root.resolve().name,
            half,
            images,
            None if labels is None else labels[whole],
            classes,
            validation=validation,
            flip=flip,
        )


def _visible(folder: Path) -> list[Path]:
    """What a folder holds, in sorted order, without hidden files such as macOS's ._ ones."""
    return sorted((path for path in folder.iterdir() if not path.name.startswith(".")), key=lambda path: path.name)


def _images_in(folder: Path) -> list[Path]:
    """The PNG and JPEG files directly in a folder, in sorted order."""
    return [path for path in _visible(folder) if path.suffix.lower() in SUFFIXES and path.is_file()]


def _choose_half(root: Path, split: str) -> tuple[str, Path]:
    """The split's resolved name and its folder."""
    if not root.exists():
        raise FileNotFoundError(f"no folder {root} (that is {root.absolute()}); point root at a folder of PNG or JPEG")
    if not root.is_dir():
        raise NotADirectoryError(f"{root} is a file; point root at a folder of PNG or JPEG files")
    halves = {path.name.lower(): path for path in _visible(root) if path.is_dir()}
    if "train" in halves and "test" in halves:
        half = "train" if split == "auto" else split
        return half, halves[half]
    if split != "auto":
        raise ValueError(f"split={split!r}: {root} has no subfolders train and test, so only auto is possible")
    return "all", root


def _looked_at(root: Path, split: str) -> Iterator[Path]:
    """What a split is read from: the images, and whatever else lies in its folder and its subfolders."""
    yield root.resolve()  # whose name the data have
    for path in _visible(_choose_half(root, split)[1]):
        yield path
        if path.is_dir():
            yield from _visible(path)


def list_images(folder: Path) -> tuple[list[Path], Tensor | None, list[str]]:
    """The images' paths in sorted order, their labels int64 (N,) or None, and the classes' names."""
    subfolders = {path: _images_in(path) for path in _visible(folder) if path.is_dir()}
    classes = [path for path, images in subfolders.items() if images]
    direct = _images_in(folder)
    if direct:
        if classes:
            print(f"{folder}: using the {len(direct):,} images directly in it, not those of {len(classes)} subfolders")
        return direct, None, []
    if not classes:
        raise ValueError(f"no PNG or JPEG file in {folder} or in its subfolders (one level deep)")
    paths = [path for name in classes for path in subfolders[name]]
    labels = [label for label, name in enumerate(classes) for _ in subfolders[name]]
    return paths, torch.tensor(labels), [path.name for path in classes]


def decode_all(
    names: Sequence[str],
    load: Callable[[int], Path | bytes],
    where: object,
    image_size: int | Sequence[int],
    channels: int,
) -> tuple[Tensor, Tensor]:
    """Decode images, naming and leaving out the broken ones.

    Args:
        names: of the images, for messages.
        load: gives the file at a place in `names`, or what it holds; several threads call it.
        where: what messages call all of them.
        image_size, channels: as in `ImageData`.

    Returns: uint8 (N, channels, H, W), and the places (N,) in `names` that they come from.

    Raises: ValueError if every image is broken, or memory has no room for them.
    """
    check_room(len(names), image_size, channels)
    with warnings.catch_warnings(), ThreadPoolExecutor() as pool:
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        attempt = partial(_attempt, load=load, image_size=image_size, channels=channels)
        results = list(pool.map(attempt, range(len(names))))
    whole = {n: result for n, result in enumerate(results) if isinstance(result, Tensor)}
    broken = [_shown(f"{name} ({r})") for name, r in zip(names, results, strict=True) if type(r) is str]
    named = ", ".join(broken[:NAMED]) + ", ..." * (len(broken) > NAMED)
    if not whole:
        raise ValueError(f"{where}: none of its {len(names):,} images can be read: {named}")
    if broken:
        print(f"{where}: skipped {len(broken):,} of {len(names):,} images, which cannot be read: {named}")
    return torch.cat(list(whole.values())), torch.tensor(list(whole))


def _shown(text: str) -> str:
    """Text for a terminal: what a file is called must not steer it."""
    return text if text.isprintable() else repr(text)


def _attempt(
    place: int, load: Callable[[int], Path | bytes], image_size: int | Sequence[int], channels: int
) -> Tensor | str:
    """The decoded image, or the reason why there is none."""
    try:
        return decode(load(place), image_size, channels)
    except UnidentifiedImageError:
        return "not a PNG or JPEG"
    except Exception as error:  # PIL's decoders raise nearly anything on damaged files
        return " ".join(str(error).split()) or type(error).__name__


def decode(source: Path | bytes, image_size: int | Sequence[int], channels: int) -> Tensor:
    """One PNG or JPEG file, or what it holds, as uint8 (1, channels, H, W); raises what PIL raises."""
    return fit(read_pixels(source, channels), image_size, channels)


def read_pixels(source: Path | bytes, channels: int) -> Tensor:
    """The same in the size that the file has."""
    if isinstance(source, Path):
        regular_size(source, LARGEST)
    elif len(source) > LARGEST:
        raise ValueError(f"it has more than {LARGEST:,} bytes")
    with Image.open(BytesIO(source) if isinstance(source, bytes) else source, formats=("PNG", "JPEG")) as file:
        image = ImageOps.exif_transpose(file)
        if image.mode.startswith("I"):  # 16-bit gray, which PIL's convert would clip at 255
            image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        pixels = np.array(image.convert("L" if channels == 1 else "RGB"))
    return rearrange(torch.from_numpy(pixels), "h w ... -> 1 (...) h w")
