"""MNIST and the data sets that share its format: IDX files, gzipped or not."""

import gzip
import math
import struct
import zlib
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from ddpm.data.dataset import ImageData, check_choice, check_labels, check_options
from ddpm.data.download import download as fetch
from ddpm.runs.files import Origin, regular_size

PREFIX = {"train": "train", "test": "t10k"}  # of the files of each half
LARGEST = 1 << 28  # bytes that a header may announce, five times those of the largest published file


class Published(NamedTuple):
    """Where a data set is published: folders on the web, the MD5 of each file, the classes' names."""

    urls: tuple[str, ...]
    md5: dict[str, str]
    classes: tuple[str, ...]


SOURCES = {
    "mnist": Published(
        ("https://ossci-datasets.s3.amazonaws.com/mnist/", "https://storage.googleapis.com/cvdf-datasets/mnist/"),
        {
            "train-images-idx3-ubyte.gz": "f68b3c2dcbeaaa9fbdd348bbdeb94873",
            "train-labels-idx1-ubyte.gz": "d53e105ee54ea40749a09fcbcd1e9432",
            "t10k-images-idx3-ubyte.gz": "9fb629c4189551a2d022fa330f9573f3",
            "t10k-labels-idx1-ubyte.gz": "ec29112dd5afa0611ce80d1b7f02629c",
        },
        tuple("0123456789"),
    ),
    "fashion_mnist": Published(
        (
            "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
            "https://github.com/zalandoresearch/fashion-mnist/raw/master/data/fashion/",
        ),
        {
            "train-images-idx3-ubyte.gz": "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
            "train-labels-idx1-ubyte.gz": "25c81989df183df01b3e8a0aad5dffbe",
            "t10k-images-idx3-ubyte.gz": "bef4ecab320f06d8554ea6380940ec79",
            "t10k-labels-idx1-ubyte.gz": "bb300cfdad3c16e7a12a480ee83cd310",
        },
        ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
    ),
    "kmnist": Published(
        ("http://codh.rois.ac.jp/kmnist/dataset/kmnist/",),
        {
            "train-images-idx3-ubyte.gz": "bdb82020997e1d708af4cf47b453dcf7",
            "train-labels-idx1-ubyte.gz": "e144d726b3acfaa3e44228e80efcd344",
            "t10k-images-idx3-ubyte.gz": "5c965bf0a639b31b8f53240b1b52f4d7",
            "t10k-labels-idx1-ubyte.gz": "7320c461ea6c1c855c0b718fb2a4b134",
        },
        ("o", "ki", "su", "tsu", "na", "ha", "ma", "ya", "re", "wo"),
    ),
}


class IDX(ImageData):
    """MNIST, Fashion-MNIST or Kuzushiji-MNIST: grayscale, 28x28, ten classes, 60,000 and 10,000 images.

    Files are looked for in root/name, then in root, unpacked or as .gz; the images and labels of a half lie together.

    Args:
        name: "mnist", "fashion_mnist" or "kmnist".
        root: the folder of data sets.
        split: "train" (train-*), "test" (t10k-*), or "auto": the train half if it is there, else the test half with a
            printed line, else the train half is downloaded.
        image_size, channels, validation, flip, condition: as in `ImageData`.
        download: fetch what is missing to root/name.

    Raises: FileNotFoundError if files are missing and not to be downloaded; ConnectionError if they cannot be;
        ValueError for a damaged file or options outside their ranges.
    """

    def __init__(
        self,
        name: str,
        root: str | Path = "data",
        split: str = "auto",
        image_size: int | Sequence[int] = 28,
        channels: int = 1,
        validation: float = 0.1,
        flip: bool = False,
        download: bool = True,
        condition: str | None = None,
    ):
        check_choice("name", name, SOURCES)
        check_choice("split", split, ("auto", *PREFIX))
        check_options(image_size, channels, validation, condition)
        folders = [Path(root).expanduser() / name, Path(root).expanduser()]
        halves = list(PREFIX) if split == "auto" else [split]
        self.origin = Origin(partial(_candidates, folders, halves))
        found = {half: pair for half in halves if (pair := find_half(folders, half))}
        half = next(iter(found), halves[0])
        if not found:
            found[half] = _obtain(name, folders, half, download)
        images, labels = read_half(*found[half])
        if half != halves[0]:
            print(f"{name}: no train half in {folders[0]} or {folders[1]}; using the test half, {len(images):,} images")
        super().__init__(
            name,
            half,
            images,
            labels,
            SOURCES[name].classes,
            image_size=image_size,
            channels=channels,
            validation=validation,
            flip=flip,
            condition=condition,
        )


def file_stems(half: str) -> tuple[str, str]:
    """Return the file names, without .gz, of the images and of the labels of "train" or "test"."""
    return f"{PREFIX[half]}-images-idx3-ubyte", f"{PREFIX[half]}-labels-idx1-ubyte"


def _candidates(folders: Sequence[Path], halves: Sequence[str]) -> list[Path]:
    """Return all paths of files that `find_half` may choose."""
    stems = [stem for half in halves for stem in file_stems(half)]
    return [folder / f"{stem}{ending}" for folder in folders for stem in stems for ending in ("", ".gz")]


def find_half(folders: Sequence[Path], half: str) -> tuple[Path, Path] | None:
    """Return the image and label files of the first folder that has both, unpacked preferred to .gz; or None."""
    for folder in folders:
        candidates = ([folder / stem, folder / f"{stem}.gz"] for stem in file_stems(half))
        images, labels = (next((path for path in paths if path.is_file()), None) for paths in candidates)
        if images and labels:
            return images, labels
    return None


def _obtain(name: str, folders: Sequence[Path], half: str, download: bool) -> tuple[Path, Path]:
    """Download what root/name lacks of a half, or raise FileNotFoundError that names what is missing."""
    if not download:
        wanted = " and ".join(f"{stem}[.gz]" for stem in file_stems(half))
        raise FileNotFoundError(
            f"{name}: no {wanted} in {folders[0]} or {folders[1]}; "
            "put them there, point root elsewhere, or set download=true"
        )
    for stem in file_stems(half):
        file = f"{stem}.gz"
        if not (folders[0] / stem).is_file() and not (folders[0] / file).is_file():
            fetch([url + file for url in SOURCES[name].urls], folders[0] / file, md5=SOURCES[name].md5[file])
    found = find_half(folders, half)
    assert found is not None  # each file was there or has been fetched
    return found


def read_half(image_file: Path, label_file: Path) -> tuple[Tensor, Tensor]:
    """Return images uint8 (N, 1, H, W) and labels uint8 (N,) in 0..9; ValueError naming the file that is wrong."""
    images, labels = read_idx(image_file, 3), read_idx(label_file, 1)
    if len(images) != len(labels):
        raise ValueError(f"{image_file} holds {len(images):,} images, but {label_file} {len(labels):,} labels")
    check_labels(labels, 10, label_file)
    return rearrange(images, "n h w -> n 1 h w"), labels


def read_idx(path: Path, dims: int) -> Tensor:
    """Return the array of an IDX file of unsigned bytes, gzipped if it ends in .gz.

    Args:
        path: the file.
        dims: the number of dimensions it must have.

    Returns: uint8 tensor with `dims` dimensions, none of them 0.

    Raises: ValueError naming the file, its content and what was expected.
    """
    magic = bytes([0, 0, 8, dims])
    regular_size(path, LARGEST)  # of zeros after its end, which take no room in a sparse file, gzip reads one by one
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
            header = file.read(4 + 4 * dims)
            if header[:4] != magic:
                kind = f"unsigned bytes in {dims} dimension{'s' * (dims > 1)}"
                raise ValueError(f"{path} starts with {header[:4].hex(' ')}; IDX of {kind} with {magic.hex(' ')}")
            if len(header) < 4 + 4 * dims:
                raise ValueError(f"{path} is cut off: {len(header)} bytes, less than its header of {4 + 4 * dims}")
            shape = struct.unpack(f">{dims}I", header[4:])
            size = math.prod(shape)
            if not 0 < size <= LARGEST:
                raise ValueError(f"{path} announces the shape {shape}: empty, or more than {LARGEST:,} bytes")
            body = file.read(size + 1)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path} is a damaged gzip file: {error}") from error
    if len(body) != size:
        found = f"only {len(body):,}" if len(body) < size else "more"
        raise ValueError(f"{path} announces the shape {shape}, {size:,} bytes, and holds {found}")
    return torch.from_numpy(np.frombuffer(body, np.uint8).reshape(shape).copy())
