"""CIFAR-10 from its binary archive: records of one label and 3,072 pixels, no pickle."""

import gzip
import tarfile
import zlib
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from ddpm.data.dataset import ImageData, check_choice, check_labels, check_options
from ddpm.data.download import download as fetch
from ddpm.runs.files import Origin, regular_size

URLS = ("https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",)
MD5 = "c32a1d4ab5d03f1284b67883e8d87530"
ARCHIVE, FOLDER = "cifar-10-binary.tar.gz", "cifar-10-batches-bin"
FILES = {"train": [f"data_batch_{n}.bin" for n in range(1, 6)], "test": ["test_batch.bin"]}
CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
RECORD = 1 + 3 * 32 * 32  # bytes: a label, then the red, green and blue plane
MOST_RECORDS = 10_000  # that a published file has
LARGEST = 1 << 28  # bytes of the unpacked archive; the published one has 184,380,000


class CIFAR10(ImageData):
    """CIFAR-10 (Krizhevsky 2009): 32x32 colour photographs, ten classes, 50,000 and 10,000 images.

    The extracted folder cifar-10-batches-bin or the archive cifar-10-binary.tar.gz, which is read without extracting
    it, is looked for in root/cifar10, then in root.

    Args:
        root: the folder of data sets.
        split: "train", "test", or "auto", which is the train half.
        image_size, channels, validation, flip, condition: as in `ImageData`.
        download: fetch a missing archive (170 MB) to root/cifar10.

    Raises: FileNotFoundError if it is missing and not to be downloaded; ConnectionError if it cannot be;
        ValueError for a damaged file or options outside their ranges.
    """

    def __init__(
        self,
        root: str | Path = "data",
        split: str = "auto",
        image_size: int | Sequence[int] = 32,
        channels: int = 3,
        validation: float = 0.1,
        flip: bool = False,
        download: bool = True,
        condition: str | None = None,
    ):
        check_choice("split", split, ("auto", *FILES))
        check_options(image_size, channels, validation, condition)
        half = "train" if split == "auto" else split
        self.origin = Origin(partial(_candidates, Path(root).expanduser(), half))
        source = _locate(Path(root).expanduser(), download)
        files = read_folder(source, FILES[half]) if source.is_dir() else read_archive(source, FILES[half])
        images, labels = zip(*(parse_records(files[name], source / name) for name in FILES[half]), strict=True)
        super().__init__(
            "cifar10",
            half,
            torch.cat(images),
            torch.cat(labels),
            CLASSES,
            image_size=image_size,
            channels=channels,
            validation=validation,
            flip=flip,
            condition=condition,
        )


def _sources(root: Path) -> list[Path]:
    """Return where the extracted folder or the archive may lie, in order of search."""
    return [folder / name for folder in (root / "cifar10", root) for name in (FOLDER, ARCHIVE)]


def _candidates(root: Path, half: str) -> list[Path]:
    """Return all files that a half may be read from."""
    return [path for source in _sources(root) for path in (source, *(source / name for name in FILES[half]))]


def _locate(root: Path, download: bool) -> Path:
    """Return the path of the extracted folder or the archive, downloading it if necessary."""
    for source in _sources(root):
        if source.is_dir() or source.is_file():  # no pipe, say, whose writer never comes
            return source
    if not download:
        raise FileNotFoundError(
            f"cifar10: no {FOLDER}/ or {ARCHIVE} in {root / 'cifar10'} or {root}; "
            "put one there, point root elsewhere, or set download=true"
        )
    return fetch(URLS, root / "cifar10" / ARCHIVE, md5=MD5)


def read_folder(folder: Path, names: Sequence[str]) -> dict[str, bytes]:
    """Return the named files of the extracted folder; FileNotFoundError if one is missing, ValueError if too large."""
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise FileNotFoundError(f"{folder} lacks {', '.join(missing)}; remove the folder to use the archive instead")
    for name in names:
        _check_size((folder / name).stat().st_size, folder / name)
    return {name: (folder / name).read_bytes() for name in names}


def read_archive(path: Path, names: Sequence[str]) -> dict[str, bytes]:
    """Return the named files of the archive, read in one pass without extracting any to disk.

    Only regular files of exactly the published names are read, and only up to the published size, and of the whole only
    `LARGEST` bytes, so an archive can neither place files nor fill the memory.

    Raises: ValueError naming the archive if it is damaged, or lacks a file.
    """
    files = {}
    regular_size(path, LARGEST)  # of zeros after its end, which take no room in a sparse file, gzip reads one by one
    try:
        with gzip.open(path) as unpacked, tarfile.open(fileobj=_Bounded(unpacked), mode="r|") as archive:  # type: ignore[call-overload]  # reads only
            for member in archive:
                folder, _, name = member.name.rpartition("/")
                if folder == FOLDER and name in names and member.isreg():
                    _check_size(member.size, Path(name))
                    files[name] = archive.extractfile(member).read()
    except (tarfile.TarError, EOFError, gzip.BadGzipFile, zlib.error, ValueError, LookupError, RecursionError) as error:
        raise ValueError(f"{path} is a damaged archive: {error}") from error
    missing = [name for name in names if name not in files]
    if missing:
        raise ValueError(f"{path} lacks {', '.join(f'{FOLDER}/{name}' for name in missing)}")
    return files


class _Bounded:
    """A file wrapper that raises after `LARGEST` bytes: tarfile itself reads headers of whatever size they announce."""

    def __init__(self, file: gzip.GzipFile):
        self.file, self.left = file, LARGEST

    def read(self, size: int) -> bytes:
        content = self.file.read(min(size, self.left + 1))
        self.left -= len(content)
        if self.left < 0:
            raise tarfile.ReadError(f"it unpacks to more than {LARGEST:,} bytes")
        return content


def _check_size(size: int, where: Path) -> None:
    """Raise ValueError unless `size` bytes are whole records, and no more than a published file has."""
    if size % RECORD or not 0 < size <= MOST_RECORDS * RECORD:
        raise ValueError(f"{where}: {size:,} bytes are not 1 to {MOST_RECORDS:,} records of {RECORD:,} bytes")


def parse_records(content: bytes, where: Path) -> tuple[Tensor, Tensor]:
    """Return images uint8 (N, 3, 32, 32) and labels uint8 (N,) of one file; ValueError naming `where` if invalid."""
    _check_size(len(content), where)
    records = torch.from_numpy(np.frombuffer(content, np.uint8).reshape(-1, RECORD).copy())
    check_labels(records[:, 0], 10, where)
    return rearrange(records[:, 1:], "n (c h w) -> n c h w", c=3, h=32), records[:, 0]
