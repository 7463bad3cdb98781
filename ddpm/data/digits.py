"""The 1,797 handwritten digits, 8x8, that scikit-learn carries: real data without a network."""

from collections.abc import Sequence
from importlib.metadata import distribution

import numpy as np
import torch
from einops import rearrange
from numpy.typing import NDArray

from ddpm.data.dataset import ImageData, check_options
from ddpm.runs.files import Origin


class Digits(ImageData):
    """scikit-learn's `load_digits`: 1,797 images of 8x8 with 17 gray levels, labels 0..9 (Alpaydin & Kaynak, UCI 1998).

    Args: image_size, channels, validation, flip, condition as in `ImageData`; split is "auto", which is all of them.

    Raises: ValueError for another split, or for options outside their ranges.
    """

    def __init__(
        self,
        image_size: int | Sequence[int] = 8,
        channels: int = 1,
        split: str = "auto",
        validation: float = 0.2,
        flip: bool = False,
        condition: str | None = None,
    ):
        if split != "auto":
            raise ValueError(f"split={split!r}: digits has no published split; use auto, which is all 1,797 images")
        check_options(image_size, channels, validation, condition)
        self.origin = Origin(tuple)  # nothing that changes while a process runs
        table = _table()
        levels = torch.from_numpy(np.round(table[:, :-1] * 255.0 / 16).astype(np.uint8))  # (1797, 64), from 0..16
        super().__init__(
            "digits",
            "all",
            rearrange(levels, "n (h w) -> n 1 h w", h=8),
            torch.from_numpy(table[:, -1].copy()),
            [str(digit) for digit in range(10)],
            image_size=image_size,
            channels=channels,
            validation=validation,
            flip=flip,
            condition=condition,
        )


def _table() -> NDArray[np.int64]:
    """Return a row per digit (1797, 65): its 64 gray levels in 0..16, and its label.

    It is read from scikit-learn's own file, where that still lies in its place: to import it takes most of a second.
    """
    try:
        file = distribution("scikit-learn").locate_file("sklearn/datasets/data/digits.csv.gz")
        return np.loadtxt(str(file), dtype=np.int64, delimiter=",")
    except (OSError, ImportError):
        from sklearn.datasets import load_digits

        digits = load_digits()
        return np.column_stack([digits.data, digits.target]).astype(np.int64)
