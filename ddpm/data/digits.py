"""The 1,797 handwritten digits, 8x8, that scikit-learn carries: real data without a network."""

from collections.abc import Sequence

import numpy as np
import torch
from einops import rearrange

from ddpm.data.dataset import ImageData, check_options


class Digits(ImageData):
    """scikit-learn's `load_digits`: 1,797 images of 8x8 with 17 gray levels, labels 0..9 (Alpaydin & Kaynak, UCI 1998).

    Args: image_size, channels, validation, flip as in `ImageData`; split is "auto", which is all of them.

    Raises: ValueError for another split, or for options outside their ranges.
    """

    def __init__(
        self,
        image_size: int | Sequence[int] = 8,
        channels: int = 1,
        split: str = "auto",
        validation: float = 0.2,
        flip: bool = False,
    ):
        if split != "auto":
            raise ValueError(f"split={split!r}: digits has no published split; use auto, which is all 1,797 images")
        check_options(image_size, channels, validation)
        from sklearn.datasets import load_digits  # takes a second to import, so only where it is used

        digits = load_digits()
        levels = torch.from_numpy(np.round(digits.images * 255 / 16).astype(np.uint8))  # (1797, 8, 8), from 0..16
        super().__init__(
            "digits",
            "all",
            rearrange(levels, "n h w -> n 1 h w"),
            torch.from_numpy(digits.target),
            [str(digit) for digit in digits.target_names],
            image_size=image_size,
            channels=channels,
            validation=validation,
            flip=flip,
        )
