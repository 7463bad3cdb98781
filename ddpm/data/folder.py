"""Any folder of image files, with a subfolder a class or without."""

import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange
from PIL import Image, ImageOps
from PIL.TiffImagePlugin import TiffImageFile
from torch import Tensor

from ddpm.data.dataset import ImageData, check_choice, check_name, check_options, check_room, fit
from ddpm.data.image_files import KINDS, UnreadableImage, read_image
from ddpm.runs.files import Origin, regular_size, shortened

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF")  # whose decoders in PIL are tried, and no others
LARGEST = 1 << 28  # bytes of an image, more than all its pixels have: PIL looks through a JPEG's zeros one by one
NAMED = 5  # broken images, and suffixes of other files, that are named; the rest are counted
BITS, COMPRESSION, PHOTOMETRIC, PLANES, TILE, SAMPLE_FORMAT = 258, 259, 262, 284, (322, 323), 339  # tags of TIFF
UNCOMPRESSED, WHITE_IS_ZERO, SEPARATE, UNSIGNED = 1, 0, 2, 1  # and values of theirs


class Folder(ImageData):
    """The PNG, JPEG, WebP, BMP and TIFF files of a folder, in sorted order.

    If images lie directly in the folder, they have no labels; otherwise each subfolder with images, one level deep, is
    a class. Images are turned as their EXIF data say, transparent ones laid on white, 16-bit ones brought to 8 bits,
    scaled and cropped (see `fit`). Of an animation, or of several pages, the first is read. Broken images, such as PIL
    takes for decompression bombs, and TIFF files of signed or floating-point pixels, of which nothing says what is
    white, are named, counted and left out; files with other suffixes are counted.

    Args:
        root: the folder.
        image_size, channels, validation, flip, condition: as in `ImageData`.
        split: "auto", which is everything. In a folder with the subfolders train and test (in any case) it is the train
            one, and "train" and "test" are allowed.
        name: the data set's name; None for the folder's name.

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
        condition: str | None = None,
    ):
        check_choice("split", split, ("auto", "train", "test"))
        check_options(image_size, channels, validation, condition)
        check_name(name or "")
        root = Path(root).expanduser()
        try:
            half, folder = choose_half(root, split)
            self.origin = Origin(partial(looked_at, root, split))
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
            condition=condition,
        )


def visible(folder: Path) -> list[Path]:
    """Return the content of a folder, in sorted order, without hidden files such as macOS's ._ ones."""
    return sorted((path for path in folder.iterdir() if not path.name.startswith(".")), key=lambda path: path.name)


def files_in(folder: Path, suffixes: Sequence[str] = SUFFIXES) -> tuple[list[Path], list[Path]]:
    """Return the images (or files with `suffixes`) directly in a folder, and its other files, in sorted order."""
    files = [path for path in visible(folder) if path.is_file()]
    images = [path for path in files if path.suffix.lower() in suffixes]
    return images, [path for path in files if path.suffix.lower() not in suffixes]


def _counted(files: Sequence[Path]) -> str:
    """Return counts of files by suffix, such as "9 .gif, 3 .txt", the most frequent first."""
    counts = Counter(path.suffix.lower() for path in files).most_common()
    words = [f"{n:,} {shortened(suffix, 20) or 'without a suffix'}" for suffix, n in counts[:NAMED]]
    rest = sum(n for _, n in counts[NAMED:])
    return ", ".join(words + [f"{rest:,} others"] * (rest > 0))


def choose_half(root: Path, split: str, units: str = "images") -> tuple[str, Path]:
    """Return the split's resolved name and its folder; `units` is the word for its content in messages."""
    if not root.exists():
        raise FileNotFoundError(f"no folder {root} (that is {root.absolute()}); point root at a folder of {units}")
    if not root.is_dir():
        raise NotADirectoryError(f"{root} is a file; point root at a folder of {units}")
    halves = {path.name.lower(): path for path in visible(root) if path.is_dir()}
    if "train" in halves and "test" in halves:
        half = "train" if split == "auto" else split
        return half, halves[half]
    if split != "auto":
        raise ValueError(f"split={split!r}: {root} has no subfolders train and test, so only auto is possible")
    return "all", root


def looked_at(root: Path, split: str) -> Iterator[Path]:
    """Yield every path that a split is read from: the images, and all else in its folder and subfolders."""
    yield root.resolve()  # whose name the data have
    for path in visible(choose_half(root, split)[1]):
        yield path
        if path.is_dir():
            yield from visible(path)


def list_images(folder: Path) -> tuple[list[Path], Tensor | None, list[str]]:
    """Return the images' paths in sorted order, their labels int64 (N,) or None, and the classes' names."""
    direct, others = files_in(folder)
    subfolders = {path: files_in(path) for path in visible(folder) if path.is_dir()}
    classes = {path: images for path, (images, _) in subfolders.items() if images}
    if not direct:
        others += [path for _, more in subfolders.values() for path in more]
    if not direct and not classes:
        found = f"; there are {_counted(others)}" if others else ""
        raise ValueError(f"no {KINDS} file in {folder} or in its subfolders (one level deep){found}")
    if others:
        print(f"{folder}: {len(others):,} other files are not read: {_counted(others)}; read are {', '.join(SUFFIXES)}")
    if direct:
        if classes:
            print(f"{folder}: using the {len(direct):,} images directly in it, not those of {len(classes)} subfolders")
        return direct, None, []
    labels = [label for label, images in enumerate(classes.values()) for _ in images]
    return [path for images in classes.values() for path in images], torch.tensor(labels), [p.name for p in classes]


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
        load: returns the path or the bytes of the image at an index of `names`; several threads call it.
        where: the name of the whole in messages.
        image_size, channels: as in `ImageData`.

    Returns: uint8 (N, channels, H, W), and the indices (N,) in `names` that they come from.

    Raises: ValueError if every image is broken, or memory has no room for them.
    """
    check_room(len(names), image_size, channels)
    with warnings.catch_warnings(), ThreadPoolExecutor() as pool:
        warnings.simplefilter("ignore", UserWarning)  # of damaged metadata
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        attempt = partial(_attempt, load=load, image_size=image_size, channels=channels)
        results = list(pool.map(attempt, range(len(names))))
    whole = {n: result[0] for n, result in enumerate(results) if not isinstance(result, str)}
    broken = [f"{name} ({reason})" for name, reason in zip(names, results, strict=True) if isinstance(reason, str)]
    if not whole:
        raise ValueError(f"{where}: none of its {len(names):,} images can be read: {first_of(broken)}")
    if broken:
        print(f"{where}: skipped {len(broken):,} of {len(names):,} images, which cannot be read: {first_of(broken)}")
    several = [name for name, result in zip(names, results, strict=True) if not isinstance(result, str) and result[1]]
    if several:
        print(
            f"{where}: of {len(several):,} images with several frames or pages the first is read: {first_of(several)}"
        )
    return torch.cat(list(whole.values())), torch.tensor(list(whole))


def first_of(texts: Sequence[str]) -> str:
    """Return the first few of some texts, joined for a terminal."""
    return ", ".join(map(shortened, texts[:NAMED])) + ", ..." * (len(texts) > NAMED)


def _attempt(
    place: int, load: Callable[[int], Path | bytes], image_size: int | Sequence[int], channels: int
) -> tuple[Tensor, bool] | str:
    """Return the result of `decode`, or the reason why it failed."""
    try:
        return read_image(str(place), lambda: decode(load(place), image_size, channels))
    except UnreadableImage as error:
        return error.reason


def decode(source: Path | bytes, image_size: int | Sequence[int], channels: int) -> tuple[Tensor, bool]:
    """Decode one image file, or its bytes, of a format in `FORMATS`.

    Returns: uint8 (1, channels, H, W), and whether it is the first of several frames or pages.

    Raises: what PIL raises; ValueError for refused kinds of TIFF.
    """
    pixels, several = read_pixels(source, channels)
    return fit(pixels, image_size, channels), several


def read_pixels(source: Path | bytes, channels: int) -> tuple[Tensor, bool]:
    """Return the pixels of one image file, or of its bytes, in their own size; returns and raises as `decode`."""
    if isinstance(source, Path):
        regular_size(source, LARGEST)
    elif len(source) > LARGEST:
        raise ValueError(f"it has more than {LARGEST:,} bytes")
    with Image.open(BytesIO(source) if isinstance(source, bytes) else source, formats=FORMATS) as file:
        several = getattr(file, "is_animated", False) and file.format != "MPO"  # a JPEG with previews of itself
        tags = dict(file.tag_v2) if isinstance(file, TiffImageFile) else None
        if tags is not None:
            _check_tiff(tags, file.mode)
        image = _with_bytes(ImageOps.exif_transpose(file), tags)
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        pixels = np.array(image.convert("L" if channels == 1 else "RGB"))
    return rearrange(torch.from_numpy(pixels), "h w ... -> 1 (...) h w"), several


def _check_tiff(tags: Mapping[int, Any], mode: str) -> None:
    """Raise ValueError for TIFF files that PIL would decode to other pixels than are meant, or in tiles too large.

    Args:
        tags: of the file, by number.
        mode: PIL's mode of its pixels.
    Raises: ValueError.
    """
    bits, (width, height) = tags.get(BITS, (1,)), (tags.get(tag, 1) for tag in TILE)
    if mode in ("I", "F") or set(tags.get(SAMPLE_FORMAT, ())) - {UNSIGNED}:
        raise ValueError("its pixels have a sign, 32 bits or floating point; allowed: 1 to 16 unsigned bits")
    raw = tags.get(COMPRESSION, UNCOMPRESSED) == UNCOMPRESSED
    if raw and tags.get(PLANES) == SEPARATE and max(bits[1:], default=0) > 8:
        raise ValueError("its colours of more than 8 bits lie in separate planes; allowed: side by side, or compressed")
    if width * height > (Image.MAX_IMAGE_PIXELS or LARGEST):
        raise ValueError(f"its tiles of {width}x{height} pixels are decompression bombs")


def _with_bytes(image: Image.Image, tags: Mapping[int, Any] | None) -> Image.Image:
    """Return the upper 8 bits of gray images with more, which PIL's convert would clip at 255; others unchanged.

    Args:
        tags: of a TIFF file, by number; None for others.
    """
    if not image.mode.startswith("I"):
        return image
    bits = 16 if tags is None else tags.get(BITS, (16,))[0]
    gray = (np.asarray(image) >> (bits - 8)).astype(np.uint8)
    inverted = tags is not None and tags.get(PHOTOMETRIC, WHITE_IS_ZERO) == WHITE_IS_ZERO
    return Image.fromarray(255 - gray if inverted else gray)
