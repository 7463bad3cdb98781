"""The Devanagari Handwritten Character Dataset: 92,000 PNG files of 32x32, in an archive that is read where it lies."""

import hashlib
import io
import re
import struct
import zipfile
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import torch
from einops import rearrange, repeat
from PIL import Image
from torch import Tensor

from ddpm.data.dataset import ImageData, check_choice, check_options
from ddpm.data.devanagari import CHARACTERS, CLASSES, GLYPHS
from ddpm.data.download import download as fetch
from ddpm.data.download import matches_record
from ddpm.data.image_files import read_image
from ddpm.runs.files import Origin, regular_size, shortened
from ddpm.runs.tensor_cache import load_tensor, save_tensor

URLS = (  # the first one holds what the second one is
    "https://archive.ics.uci.edu/static/public/389/devanagari+handwritten+character+dataset.zip",
    "https://archive.ics.uci.edu/ml/machine-learning-databases/00389/DevanagariHandwrittenCharacterDataset.zip",
)
FOLDER = "DevanagariHandwrittenCharacterDataset"
ARCHIVES = (f"{FOLDER}.zip", "devanagari+handwritten+character+dataset.zip")
HALVES = {"train": "Train", "test": "Test"}
PUBLISHED = {"train": 1700, "test": 300}  # images of each class
SIDE = 32
LARGEST = 1 << 28  # bytes of the archive, and of all the images that are read from it
LARGEST_IMAGE = 1 << 16  # bytes of a PNG file; 32x32 pixels as they are have 1,024
MOST_MEMBERS = 250_000  # of the archive: all the images, each with its macOS resource file, and some more
NAMED = 5  # missing classes that are named; the rest are counted

IMAGE = re.compile(
    rf"(?P<folder>(?:{FOLDER}/)?(?P<half>Train|Test)/(?P<kind>character|digit)_(?P<number>[0-9]{{1,9}})(?:_[^/]*)?)/"
    r"[^/.][^/]*\.(?i:png)"
)
LABELS = {  # ("character", 1) -> 0 and so on: a folder is known by its number, for names are spelled in many ways
    (kind, int(number)): label for label, folder, _ in CHARACTERS for kind, number in [folder.split("_")[:2]]
}


class DHCD(ImageData):
    """The Devanagari Handwritten Character Dataset (Acharya, Pant & Gyawali 2015): 46 classes, 32x32, grayscale.

    It has 1,700 images of each class in the train half and 300 in the test half. A folder with Train and Test in it, or
    the archive DevanagariHandwrittenCharacterDataset.zip, is looked for in root/dhcd, then in root. The archive is read
    without extracting it, also as UCI packs it, inside another one. Its images, once decoded, are cached in root/dhcd.

    There is no published checksum: that of the archive is recorded next to it when it is downloaded, and matched later.

    Args:
        root: the folder of data sets.
        split: "train", "test", or "auto", which is the train half.
        image_size, channels, validation, flip, condition: as in `ImageData`.
        download: fetch a missing archive to root/dhcd.

    Raises: FileNotFoundError if it is missing and not to be downloaded; ConnectionError if it cannot be;
        ValueError for damaged or other files than these, or options outside their ranges.
    """

    glyphs = GLYPHS

    def __init__(
        self,
        root: str | Path = "data",
        split: str = "auto",
        image_size: int | Sequence[int] = SIDE,
        channels: int = 1,
        validation: float = 0.1,
        flip: bool = False,
        download: bool = True,
        condition: str | None = None,
    ):
        check_choice("split", split, ("auto", *HALVES))
        check_options(image_size, channels, validation, condition)
        half, root = "train" if split == "auto" else split, Path(root).expanduser()
        source = _locate(root, download)
        self.origin = Origin(partial(_looked_at, root, half))
        images = read_folder(source, half) if source.is_dir() else read_archive(source, half, root / "dhcd")
        count = len(images) // len(CLASSES)
        if count != PUBLISHED[half]:
            print(f"dhcd: {source} has {count:,} images of each class in its {half} half, not {PUBLISHED[half]:,}")
        super().__init__(
            "dhcd",
            half,
            rearrange(images, "n h w -> n 1 h w"),
            labels_of(images),
            CLASSES,
            image_size=image_size,
            channels=channels,
            validation=validation,
            flip=flip,
            condition=condition,
        )


def _sources(root: Path) -> list[Path]:
    """Return where the extracted folder or the archive may lie, in order of search."""
    return [path for at in (root / "dhcd", root) for path in (at, at / FOLDER, *(at / name for name in ARCHIVES))]


def _is_extracted(folder: Path) -> bool:
    return all((folder / name).is_dir() for name in HALVES.values())


def _looked_at(root: Path, half: str) -> Iterator[Path]:
    """Yield all files and folders that determine what a half is read from."""
    for source in _sources(root):
        if source.name in ARCHIVES:
            yield from (source, _record(source))
        else:
            yield from (source / name for name in HALVES.values())
        if _is_extracted(source):
            yield from _inside(source / HALVES[half])


def _inside(folder: Path) -> Iterator[Path]:
    """Yield the subfolders of a folder and the content of each, in sorted order."""
    for path in sorted(folder.iterdir()):
        if path.is_dir():
            yield path
            yield from sorted(path.iterdir())


def _record(archive: Path) -> Path:
    """Return the path of the file that records an archive's checksum."""
    return archive.with_name(f"{archive.name}.sha256")


def _locate(root: Path, download: bool) -> Path:
    """Return the path of the extracted folder or the archive, downloading it if necessary."""
    for source in _sources(root):
        if _is_extracted(source) or (source.name in ARCHIVES and source.is_file()):
            return source
    if not download:
        raise FileNotFoundError(
            f"dhcd: no {FOLDER}/ with {' and '.join(HALVES.values())} in it and no {ARCHIVES[0]} in {root / 'dhcd'} or "
            f"{root}; put one there, point root elsewhere, or set download=true"
        )
    cache = root / "dhcd"
    path = cache / ARCHIVES[0]
    return fetch(URLS, path, record=_record(path), inspect=partial(_inspect, cache=cache), limit=LARGEST)


def _inspect(path: Path, cache: Path) -> None:
    """Raise ValueError unless every image of both halves of an archive can be read; then cache them."""
    content = _content(path)
    print(f"dhcd: decoding both halves, once: their images will be saved in {cache}", flush=True)
    images = {half: decode_archive(content, half, path) for half in HALVES}
    for half in HALVES:
        save_tensor(_by_class(images[half]), _cache_path(cache, half, hashlib.sha256(content).hexdigest()))


def _cache_path(cache: Path, half: str, checksum: str) -> Path:
    """Return the cache file of the decoded images of a half of the archive with this sha256."""
    return cache / f"{half}-{checksum[:12]}.safetensors"


def _content(path: Path) -> bytes:
    """Return the bytes of an archive, read at once, so that what is decoded is what was checked."""
    size = regular_size(path, LARGEST)
    with path.open("rb") as file:
        return file.read(size)


def read_folder(folder: Path, half: str) -> Tensor:
    """Return the images of a half from an extracted folder, as `decode_characters` does.

    Raises: ValueError naming the file that is wrong, or what is missing.
    """

    def read(name: str) -> bytes:
        size = regular_size(folder / name, LARGEST_IMAGE)
        with open(folder / name, "rb") as file:
            return file.read(size)

    names = (path.relative_to(folder).as_posix() for path in _inside(folder / HALVES[half]))
    return decode_characters(arrange(names, half, folder), read, folder)


def read_archive(path: Path, half: str, cache: Path) -> Tensor:
    """Return the images of a half from the archive, as `decode_characters` does; decoded once and cached.

    Raises: ValueError naming the archive if it is damaged, lacks something, or has another checksum than the recorded.
    """
    content = _content(path)
    checksum = hashlib.sha256(content).hexdigest()
    matches_record(checksum, _record(path), path)
    place = _cache_path(cache, half, checksum)
    by_class = load_tensor(place, torch.uint8, (len(CLASSES), None, SIDE, SIDE))
    if by_class is None:
        print(f"dhcd: decoding the {half} half of {path}, once: its images will be saved as {place}", flush=True)
        by_class = _by_class(decode_archive(content, half, path))
        save_tensor(by_class, place)
    return rearrange(by_class, "k n h w -> (k n) h w")


def _by_class(images: Tensor) -> Tensor:
    """Return images in the order of `arrange` as (46, N / 46, 32, 32)."""
    return rearrange(images, "(k n) h w -> k n h w", k=len(CLASSES))


def decode_archive(content: bytes, half: str, path: Path) -> Tensor:
    """Return the images of a half from the bytes of the archive, or of an archive that contains only it.

    Nothing is written, only images in the known folders are read, and only within bounds, so an archive can neither
    place files nor fill the memory.

    Raises: ValueError naming `path` if it is damaged or lacks something.
    """
    with _named(path):
        archive = _open(content)
        inner = [name for name in archive.namelist() if "/" not in name and name.lower().endswith(".zip")]
        if len(inner) == 1 and not any(map(IMAGE.fullmatch, archive.namelist())):
            archive = _open(_read(archive, inner[0], LARGEST))

    def read(name: str) -> bytes:
        with _named(path):
            return _read(archive, name, LARGEST_IMAGE)

    names = arrange(archive.namelist(), half, path)
    if sum(archive.getinfo(name).file_size for name in names) > LARGEST:
        raise ValueError(f"{path} cannot be read: its images have more than {LARGEST:,} bytes")
    return decode_characters(names, read, path)


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Turn the errors of zipfile for damaged archives into a ValueError that names the archive."""
    try:
        yield
    except (zipfile.BadZipFile, zlib.error, struct.error, EOFError, ValueError, OverflowError, RuntimeError) as error:
        raise ValueError(f"{path} cannot be read: {shortened(str(error))}") from error


def _open(content: bytes) -> zipfile.ZipFile:
    """Open the archive in these bytes; ValueError if it has so many members that their list would fill the memory."""
    if content.count(b"PK\1\2") > MOST_MEMBERS:  # with which the entry of each of them begins
        raise ValueError(f"it has more than {MOST_MEMBERS:,} members")
    return zipfile.ZipFile(io.BytesIO(content))


def _read(archive: zipfile.ZipFile, name: str, largest: int) -> bytes:
    """Return a member of an archive; ValueError if it is encrypted, too large, or compressed by an unbounded method."""
    member = archive.getinfo(name)
    if member.flag_bits & 1:
        raise ValueError(f"{name} is encrypted")
    if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise ValueError(f"{name} is neither stored nor deflated")
    if member.file_size > largest:
        raise ValueError(f"{name} has {member.file_size:,} bytes, more than the {largest:,} that are accepted")
    with archive.open(member) as file:
        return file.read(member.file_size)  # of more than it announces, read() would unpack all


def arrange(names: Iterable[str], half: str, where: Path) -> list[str]:
    """Return the names of a half's images, by label and then in natural order, where 10 comes after 2.

    Args:
        names: of all files, with / between folders; what is no image in a class's folder is left out.
        half: "train" or "test".
        where: is named in errors.

    Raises: ValueError for an unknown class, one that is missing, there twice, or of another size than the others.
    """
    folders: defaultdict[str, list[str]] = defaultdict(list)
    labels: dict[str, int] = {}
    for name in names:
        if (match := IMAGE.fullmatch(name)) and match["half"] == HALVES[half]:
            folder, kind, number = match["folder"], match["kind"], int(match["number"])
            if (kind, number) not in LABELS:
                raise ValueError(
                    f"{where}: {shortened(folder)} is no class; they go from {CLASSES[0]} to {CLASSES[-1]}"
                )
            labels[folder] = LABELS[kind, number]
            folders[folder].append(name)
    _check_classes({folder: len(folders[folder]) for folder in labels}, labels, f"{where}: {HALVES[half]}")
    images = [name for folder in sorted(folders, key=labels.__getitem__) for name in sorted(folders[folder], key=_key)]
    if len(set(images)) != len(images):
        raise ValueError(f"{where} holds {shortened(Counter(images).most_common(1)[0][0])} more than once")
    return images


def _check_classes(counts: dict[str, int], labels: dict[str, int], where: str) -> None:
    """Raise ValueError unless each class has one folder, and all folders hold the same number of images."""
    missing = [name for label, name in enumerate(CLASSES) if label not in labels.values()]
    if missing:
        named = ", ".join(missing[:NAMED]) + ", ..." * (len(missing) > NAMED)
        raise ValueError(f"{where} lacks {len(missing)} of the {len(CLASSES)} classes: {named}")
    label, folders = Counter(labels.values()).most_common(1)[0]
    if folders > 1:
        same = " and ".join(shortened(folder) for folder in labels if labels[folder] == label)
        raise ValueError(f"{where} has more than one folder of a class: {same}")
    fewest, most = min(counts, key=counts.__getitem__), max(counts, key=counts.__getitem__)
    if counts[fewest] != counts[most]:
        few, many = f"{counts[fewest]:,} in {shortened(fewest)}", f"{counts[most]:,} in {shortened(most)}"
        raise ValueError(f"{where} must hold the same number of images of each class, but has {few} and {many}")


def _key(name: str) -> tuple[list[str | tuple[int, str]], str]:
    """Return a sort key that orders names by the numbers in them; of any length, which int would not take."""
    parts = re.split("([0-9]+)", name)
    return [(len(part.lstrip("0")), part.lstrip("0")) if n % 2 else part for n, part in enumerate(parts)], name


def decode_characters(names: Sequence[str], read: Callable[[str], bytes], where: Path) -> Tensor:
    """Return decoded images, uint8 (N, 32, 32).

    Args:
        names: as returned by `arrange`.
        read: returns a file's bytes.
        where: is named in errors.

    Raises: ValueError for a file that cannot be decoded, or has another size; what `read` raises.
    """
    images = np.empty((len(names), SIDE, SIDE), np.uint8)
    for n, name in enumerate(names):
        images[n] = read_image(f"{where}: {shortened(name)}", partial(decode, read(name)), "PNG")
    return torch.from_numpy(images)


def decode(content: bytes) -> np.ndarray:
    """Return the gray pixels (32, 32) of a PNG file; ValueError for another size or depth; what PIL raises."""
    with Image.open(io.BytesIO(content), formats=("PNG",)) as image:
        if image.size != (SIDE, SIDE) or image.mode.startswith("I"):  # that is 16 bits
            found = f"{image.width}x{image.height} of mode {image.mode}"
            raise ValueError(f"it is {found}, not {SIDE}x{SIDE} of 8 bits")
        return np.asarray(image.convert("L"))


def labels_of(images: Tensor) -> Tensor:
    """Return the labels (N,) of images (N, ...) in the order of `arrange`."""
    return repeat(torch.arange(len(CLASSES)), "k -> (k n)", n=len(images) // len(CLASSES))
