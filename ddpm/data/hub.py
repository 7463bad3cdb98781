"""Any image data set of the Hugging Face hub, or of local Parquet or Arrow files, by its name and column."""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ddpm.data.dataset import ImageData, check_choice, check_options
from ddpm.data.folder import decode_all
from ddpm.runs.files import Origin, shortened

READERS = {".parquet": "parquet", ".arrow": "arrow"}  # of a single file
EXAMPLE = "huggan/smithsonian_butterflies_subset"
ON_THE_HUB = re.compile(r"\w[\w.-]*/\w[\w.-]*", re.ASCII)  # "parquet" alone would read the working directory
DISCRETE = re.compile(r"u?int\d+|bool|(large_)?string")  # types of a column's values that can be classes
LONGEST = 500  # characters of a message of the library


class Hub(ImageData):
    """A data set read by Hugging Face's library `datasets`, decoded into memory.

    Images are of the formats of `Folder`, and treated as those: turned as their EXIF data say, transparent ones laid on
    white, scaled and cropped; broken ones, and those that PIL takes for decompression bombs, are named, counted and
    left out.
    No code of a data set is run: since its version 4 the library has no way to.

    Args:
        name: on the hub, such as "huggan/smithsonian_butterflies_subset"; or a local folder of Parquet, Arrow or image
            files, or one .parquet or .arrow file.
        config: which of the data set's configurations; None for its default.
        column: the one with the images; "auto" for the only one that is of images.
        label: the one with the labels: classes, or integers, truth values or texts, of which each distinct one, in
            order, is a class. "auto" for the only one of classes, if there is one; None for no labels.
        split: "auto" for "train" if there is one, else the only one; or a split's name.
        revision: branch, tag or commit on the hub; None for its main branch.
        root: the folder of data sets. The library's converted files go to root/hub, its downloads to where
            its variable HF_HOME says.
        image_size, channels, validation, flip, condition: as in `ImageData`.

    Raises: FileNotFoundError if there is no such data set, or none that may be read; ConnectionError if the hub cannot
        be reached; ValueError if the library is missing or cannot load the data, they have no such column or split, no
        image can be read, or options are outside their ranges.
    """

    def __init__(
        self,
        name: str,
        config: str | None = None,
        column: str = "auto",
        label: str | None = "auto",
        split: str = "auto",
        revision: str | None = None,
        root: str | Path = "data",
        image_size: int | Sequence[int] = 32,
        channels: int = 3,
        validation: float = 0.1,
        flip: bool = False,
        condition: str | None = None,
    ):
        check_options(image_size, channels, validation, condition)
        local, cache = find_local(name), Path(root).expanduser() / "hub"
        if local is not None:
            check_apart(local, cache)
            self.origin = Origin(partial(_looked_at, local))
        half, rows = load(name, local, config, split, revision, cache)
        images_in = choose_column(name, column, rows.features)
        labels, classes = read_labels(name, label, rows)
        images, whole = decode_column(name, images_in, rows, image_size, channels)
        super().__init__(
            title(name, local),
            half,
            images,
            None if labels is None else labels[whole],
            classes,
            validation=validation,
            flip=flip,
            condition=condition,
        )


def find_local(name: str) -> Path | None:
    """Return the path of a local folder or file, or None for a name on the hub; FileNotFoundError if it is neither."""
    path = Path(name).expanduser()
    if name and (path.is_dir() or (path.is_file() and path.suffix in READERS)):
        return path
    if not ON_THE_HUB.fullmatch(name) or path.suffix in READERS or path.is_file():
        raise FileNotFoundError(
            f"name={shortened(repr(name))}: give a name on the hub, such as {EXAMPLE}, a local folder, or a local file "
            f"*{' or *'.join(READERS)}"
        )
    return None


def title(name: str, local: Path | None) -> str:
    """Return the data set's name: the last part of its path, of a file without its ending."""
    if local is None:
        return name.rpartition("/")[2]
    return local.resolve().stem if local.is_file() else local.resolve().name


def check_apart(local: Path, cache: Path) -> None:
    """Raise ValueError if the library would find its own files among the data."""
    if cache.resolve().is_relative_to(local.resolve()):
        raise ValueError(f"root={cache.parent}: the cache {cache} would lie among the data, in {local}; set another")


def _looked_at(local: Path) -> Iterator[Path]:
    """Yield every path that a local data set is read from."""
    yield local.resolve()  # whose name the data have
    yield from sorted(local.rglob("*"))


def load(
    name: str, local: Path | None, config: str | None, split: str, revision: str | None, cache: Path
) -> tuple[str, Any]:
    """Return the split's resolved name and its rows, a `datasets.Dataset`, after the download."""
    try:
        from datasets import load_dataset_builder
    except ImportError as error:
        raise ValueError(f"{shortened(name)} needs the library datasets: pip install 'ddpm-ablations[hub]'") from error
    files = {}
    if local is not None and local.is_file():
        files = {"data_files": str(local.resolve())}
    path = name if local is None else READERS[local.suffix] if files else str(local.resolve())
    with _translated_errors(name, local is None):
        builder = load_dataset_builder(path, config, revision=revision, cache_dir=str(cache), **files)
    half = choose_split(name, split, [str(one) for one in builder.config.data_files or builder.info.splits or ()])
    with _translated_errors(name, local is None):
        builder.download_and_prepare()
        return half, builder.as_dataset(split=half)


@contextmanager
def _translated_errors(name: str, on_hub: bool = False) -> Iterator[None]:
    """Translate the library's exceptions into one of three errors with a one-line message."""
    try:
        yield
    except FileNotFoundError as error:
        hint = "; a gated or private one asks for `hf auth login` first" if on_hub else ""
        raise FileNotFoundError(f"{name}: {_one_line(error)}{hint}") from error
    except ConnectionError as error:
        hint = "without a network, only what was downloaded before, or lies in a local folder, can be read"
        raise ConnectionError(f"{name}: {_one_line(error)}; {hint}") from error
    except Exception as error:  # the library and its many readers have no common one
        raise ValueError(f"{name} cannot be loaded: {_one_line(error.__cause__ or error)}") from error


def _one_line(error: BaseException) -> str:
    return shortened(" ".join(str(error).split()) or type(error).__name__, LONGEST).rstrip(".")


def choose_split(name: str, split: str, there: Sequence[str]) -> str:
    """Return the resolved name of a split; ValueError that lists the available ones."""
    if split == "auto" and ("train" in there or len(there) == 1):
        return "train" if "train" in there else there[0]
    check_choice(f"{name}: split", split, there)
    return split


def choose_column(name: str, column: str, features: Mapping[str, Any]) -> str:
    """Return the resolved name of the images' column; ValueError that lists the columns."""
    found = [one for one in features if _kind(features[one]) == "Image"]
    if column == "auto" and len(found) == 1:
        return found[0]
    if column not in features:
        wrong = f"{len(found)} columns hold images, choose one" if column == "auto" else "no such column"
        raise ValueError(f"{name}: column={column!r}: {wrong}; there are {_listed(features)}")
    return column


def _kind(feature: Any) -> str:
    """Return the type of a column's values: Image, ClassLabel, or a plain one such as int64."""
    kind = type(feature).__name__
    return str(feature.dtype) if kind == "Value" else kind


def _listed(features: Mapping[str, Any]) -> str:
    return shortened(", ".join(f"{column} ({_kind(feature)})" for column, feature in features.items()), LONGEST)


def read_labels(name: str, label: str | None, rows: Any) -> tuple[Tensor | None, list[str]]:
    """Return labels int64 (N,) and the classes' names, or None and no names; ValueError if a column has no labels."""
    features = rows.features
    if label == "auto":
        found = [one for one in features if _kind(features[one]) == "ClassLabel"]
        if len(found) > 1:
            print(
                f"{name}: no labels are read, since several columns have some: {shortened(', '.join(found))}; choose "
                "one with label"
            )
        label = found[0] if len(found) == 1 else None
    if label is None:
        return None, []
    kind = _kind(features[label]) if label in features else ""
    if kind != "ClassLabel" and not DISCRETE.fullmatch(kind):
        raise ValueError(f"{name}: label={label!r} is no column of classes, integers or texts: {_listed(features)}")
    values = list(rows[label])
    missing = [n for n, value in enumerate(values) if value is None or (kind == "ClassLabel" and value < 0)]
    if missing:
        raise ValueError(
            f"{name}: {len(missing):,} of {len(values):,} images, the first one image {missing[0]}, have no label in "
            f"column {label}; set label=null to do without"
        )
    if kind == "ClassLabel":
        return torch.tensor(values), list(features[label].names)
    distinct, labels = np.unique(values, return_inverse=True)
    return torch.from_numpy(labels), [str(value) for value in distinct]


def decode_column(
    name: str, column: str, rows: Any, image_size: int | Sequence[int], channels: int
) -> tuple[Tensor, Tensor]:
    """Return the images of a column and the rows they come from, as `decode_all` does."""
    from datasets import Image

    with _translated_errors(name):
        cells = rows.select_columns([column]).cast_column(column, Image(decode=False))
    names = [f"image {n}" for n in range(len(cells))]
    return decode_all(names, lambda n: _content(cells[n][column]), name, image_size, channels)


def _content(cell: Mapping[str, Any] | None) -> Path | bytes:
    """Return a cell's encoded image, or the path of its file; ValueError if it has neither."""
    for kind, key in ((bytes, "bytes"), (Path, "path")):
        if cell and cell[key]:
            return kind(cell[key])
    raise ValueError("there is none")
