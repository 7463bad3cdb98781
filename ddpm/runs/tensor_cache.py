"""A tensor that took long to make, kept in a file: read back as it was, or made again."""

import zlib
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from ddpm.runs.files import regular_size, replacing, shortened

LARGEST = 1 << 32  # bytes of such a file


def save_tensor(x: Tensor, path: Path) -> None:
    """Write a tensor; where that is not possible, say so and go on."""
    x = x.cpu().contiguous()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            temporary.write_bytes(save({"kept": x, "crc32": _crc32(x)}))
    except OSError as error:
        print(f"{path} cannot be kept: {error.strerror or error}")


def load_tensor(path: Path, dtype: torch.dtype, shape: Sequence[int | None]) -> Tensor | None:
    """The tensor that `save_tensor` wrote; None if there is none, or, with a printed line, if it is damaged or another.

    Args:
        dtype, shape: that it must have; None for any size >= 1.
    """
    try:
        size = regular_size(path, LARGEST)
        with path.open("rb") as file:
            tensors = load(file.read(size))
        x, crc32 = tensors["kept"], tensors["crc32"]
        sizes = [one or 1 if asked is None else asked for one, asked in zip(x.shape, shape, strict=True)]
        if x.dtype != dtype or list(x.shape) != sizes:
            raise ValueError(f"it holds {x.dtype} {tuple(x.shape)}")
        if not torch.equal(crc32, _crc32(x)):
            raise ValueError("its checksum is wrong")
        return x
    except FileNotFoundError:
        return None
    except (OSError, ValueError, LookupError, RuntimeError, SafetensorError) as error:
        print(f"{path} is damaged and will be made again: {shortened(str(error))}")
        return None


def _crc32(x: Tensor) -> Tensor:
    return torch.tensor(zlib.crc32(x.numpy().data))
