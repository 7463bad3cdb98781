"""File cache of tensors that are expensive to compute, with a checksum."""

import zlib
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from ddpm.runs.files import regular_size, replacing, shortened

LARGEST = 1 << 32  # bytes of a file


def save_tensor(x: Tensor, path: Path) -> None:
    """Write a tensor to a file; print a message and go on if that fails."""
    x = x.cpu().contiguous()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            temporary.write_bytes(save({"kept": x, "crc32": _crc32(x)}))
    except OSError as error:
        print(f"{path} cannot be saved: {error.strerror or error}")


def load_tensor(path: Path, dtype: torch.dtype, shape: Sequence[int | None]) -> Tensor | None:
    """Return the tensor that `save_tensor` wrote; None if missing, or (with a message) damaged or different.

    Args:
        dtype, shape: required of it; a size of None matches any size >= 1.
    """
    try:
        size = regular_size(path, LARGEST)
        with path.open("rb") as file:
            tensors = load(file.read(size))
        x, crc32 = tensors["kept"], tensors["crc32"]
        sizes = [one or 1 if wanted is None else wanted for one, wanted in zip(x.shape, shape, strict=True)]
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
