"""Points read from a .npy or .csv file."""

import csv
import warnings
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ddpm.data.dataset import check_name, check_options
from ddpm.data.points import LEAST, Points
from ddpm.figures.images import load_array
from ddpm.runs.files import Origin, regular_size, shortened

LARGEST = 2**32  # bytes


class PointsFile(Points):
    """The rows of a table of numbers as points; its last column may hold their classes.

    A .npy file holds an array (N, d) of real numbers. A .csv file holds N lines of d numbers with commas between them;
    a first line without any number is taken for the columns' names, and what follows a # is left out.

    Args:
        root: the file.
        labelled: whether the last column is a class, a whole number in 0..K-1, and no coordinate.
        standardise: as in `Points`.
        name: the data set's name; None for the file's name without its suffix.
        split: "auto", which is the whole file.
        validation: the held-out fraction, 0 <= validation < 1.
    Raises: FileNotFoundError if there is no such file; ValueError for one that is no table of finite numbers, fewer
        than two rows, a class that is none, or options outside their ranges.
    """

    def __init__(
        self,
        root: str | Path,
        labelled: bool = False,
        standardise: bool = True,
        name: str | None = None,
        split: str = "auto",
        validation: float = 0.2,
    ):
        if split != "auto":
            raise ValueError(f"split={split!r}: a file of points has no published split; use auto, which is all of it")
        check_options(None, None, validation)
        check_name(name or "")
        path = Path(root).expanduser()
        self.origin = Origin(lambda: [path])
        table, labels = _read(path), None
        if labelled:
            table, labels = table[:, :-1], _classes(table[:, -1], path)
            if not table.shape[1]:
                raise ValueError(f"{path}: with its last column as classes no coordinate is left; set labelled=false")
        super().__init__(name or path.stem, table, labels, validation=validation, standardise=standardise)


def _read(path: Path) -> Tensor:
    """Return the numbers of a file, float64 (N, d); FileNotFoundError or ValueError that names it."""
    if path.suffix not in (".npy", ".csv"):
        raise ValueError(f"{path}: points are read from a .npy or a .csv file; point root at one")
    try:
        regular_size(path, LARGEST)
        array = _npy(path) if path.suffix == ".npy" else _csv(path)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"no file {path} ({path.absolute()}); point root at a .npy or .csv file") from error
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or error}") from error
    if array.dtype.kind not in "fiu":
        raise ValueError(f"{path} holds {array.dtype}, and points are real numbers")
    if array.ndim != 2 or len(array) < LEAST or not array.shape[1]:
        raise ValueError(f"{path} has the shape {array.shape}; points are (N, d), N >= {LEAST}, d >= 1")
    x = torch.from_numpy(array.astype(np.float64))
    if not (finite := x.isfinite()).all():
        row, column = (~finite).nonzero()[0].tolist()
        raise ValueError(f"{path}: row {row}, column {column} (both from 0) is {x[row, column]}, no finite number")
    return x


def _npy(path: Path) -> np.ndarray:
    try:
        return load_array(path, LARGEST)
    except ValueError as error:
        raise ValueError(f"{path} is no .npy file of numbers: {shortened(str(error))}") from error


def _csv(path: Path) -> np.ndarray:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            names = not any(map(_is_number, next(csv.reader([file.readline()]), [])))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of a file without rows, whose shape says so
            return np.loadtxt(path, delimiter=",", ndmin=2, skiprows=int(names), encoding="utf-8-sig")
    except (ValueError, csv.Error) as error:
        raise ValueError(f"{path} is no table of numbers with commas between them: {shortened(str(error))}") from error


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True


def _classes(column: Tensor, path: Path) -> Tensor:
    """Return the classes (N,) of a column; ValueError for the first that is no whole number >= 0."""
    wrong = (column != column.round()) | (column < 0) | (column >= len(column))
    if wrong.any():
        row = int(wrong.int().argmax())
        raise ValueError(f"{path}: the class of row {row} (from 0) is {column[row]:g}, no whole number in 0..N-1")
    return column.long()
