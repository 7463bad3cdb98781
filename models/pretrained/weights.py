"""Files of weights: safetensors, or pickles of plain tensors, whole or in shards, inspected before they are read."""

import json
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

STEM = "diffusion_pytorch_model"
STEMS = (STEM, STEM)  # of safetensors, and of pickles
WEIGHTS = f"{STEM}.safetensors"
PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".pkl")
JSON_BYTES = 2**20  # of a config or an index of shards; above it is a mistake
KINDS = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}  # of safetensors


class Piece(NamedTuple):
    """A tensor in a file: its shape, its type as safetensors name it, and how to read it."""

    shape: tuple[int, ...]
    kind: str
    read: Callable[[], Tensor]


def names(variant: str | None, stems: tuple[str, str] = STEMS) -> list[str]:
    """Return the names under which weights are published, preferred ones first; see `weights_in`."""
    suffix = f".{variant}" if variant else ""
    kinds = list(zip(stems, ("safetensors", "bin"), strict=True))
    return [name for stem, end in kinds for name in (f"{stem}{suffix}.{end}", f"{stem}.{end}.index{suffix}.json")]


def weights_in(folder: Path, variant: str | None = None, stems: tuple[str, str] = STEMS) -> Path | None:
    """Return the file of a folder's weights, or the index of their shards; None if it has none.

    Safetensors are preferred to pickles, and files without variant to those of half precision ("fp16"), which are
    taken where there are no others.

    Args:
        variant: as in a file's name, diffusion_pytorch_model.VARIANT.safetensors; then no others are looked for.
        stems: how the names of safetensors begin, and those of pickles.
    Raises:
        ValueError: a variant that is no word.
    """
    if variant is not None and not re.fullmatch(r"\w+", variant):
        raise ValueError(f"variant = {variant!r} is no part of a file's name; allowed: a word, such as fp16, or None")
    wanted = names(variant, stems) if variant else [*names(None, stems), *names("fp16", stems)]
    return next((folder / name for name in wanted if (folder / name).is_file()), None)


@contextmanager
def opened(path: Path) -> Iterator[dict[str, Piece]]:
    """Open a file, or the shards of an index, and yield its tensors by name, readable within the context.

    Raises:
        ValueError: a damaged file; a pickle of anything but plain tensors; an index without shards that are there.
    """
    with ExitStack() as stack:
        try:
            yield _of_shards(path, stack) if path.suffix == ".json" else _of_file(path, stack)
        except SafetensorError as error:
            raise ValueError(f"{path} is no whole safetensors file: {error}") from error


def _of_file(path: Path, stack: ExitStack) -> dict[str, Piece]:
    if path.suffix == ".bin":
        return {name: Piece(tuple(x.shape), _kind(x), partial(_itself, x)) for name, x in _unpickled(path).items()}
    try:
        file = stack.enter_context(safe_open(path, framework="pt"))
    except SafetensorError as error:
        raise ValueError(f"{path} is no whole safetensors file: {error}") from error
    slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (it is no dictionary)
    return {
        name: Piece(tuple(piece.get_shape()), piece.get_dtype(), partial(file.get_tensor, name))
        for name, piece in slices.items()
    }


def _kind(x: Tensor) -> str:
    return KINDS.get(x.dtype, str(x.dtype))


def _itself(x: Tensor) -> Tensor:
    return x.detach()


def _unpickled(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a pickle, of which nothing else is unpickled."""
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a malicious file may raise any
        raise ValueError(_no_tensors(path)) from error
    if not isinstance(tensors, dict) or not all(isinstance(name, str) and _is_plain(x) for name, x in tensors.items()):
        raise ValueError(_no_tensors(path))
    return tensors


def _is_plain(x: object) -> bool:
    """Whether a value is a tensor on the CPU with plain strided storage."""
    return type(x) in (Tensor, nn.Parameter) and x.layout == torch.strided and x.device.type == "cpu"  # type: ignore[attr-defined]


def _no_tensors(path: Path) -> str:
    return (
        f"{path} is no whole pickle of plain tensors by name, and nothing else is read, since pickles can run code: "
        "take the safetensors file, or convert the weights"
    )


def _of_shards(index: Path, stack: ExitStack) -> dict[str, Piece]:
    """Return the tensors of an index, from the shards next to it."""
    shard_of = read_object(index, "the shards of weights").get("weight_map")
    if not isinstance(shard_of, dict) or not shard_of or not all(map(_is_name, shard_of.values())):
        raise ValueError(f"{index} has no weight_map from names to files next to it, .safetensors or .bin")
    files = sorted(set(shard_of.values()))
    missing = [name for name in files if not (index.parent / name).is_file()]
    if missing:
        more = f", ... ({len(missing) - 10} more)" if len(missing) > 10 else ""
        raise ValueError(f"{index} names shards that are missing: {', '.join(missing[:10])}{more}")
    read = ((file, _of_file(index.parent / file, stack)) for file in files)
    return {name: piece for file, pieces in read for name, piece in pieces.items() if shard_of.get(name, file) == file}


def _is_name(value: object) -> bool:
    return isinstance(value, str) and re.fullmatch(r"[\w-][\w.-]{,200}\.(safetensors|bin)", value) is not None


def read_object(path: Path, what: str, most: int = JSON_BYTES) -> dict[str, Any]:
    """Return the JSON object in a file of bounded size; ValueError if it is none.

    Args:
        what: its content, in words.
        most: the most bytes.
    """
    with open(path, "rb") as file:
        text = file.read(most + 1)
    if len(text) > most:
        raise ValueError(f"{path} is larger than {most} bytes, which no file with {what} is")
    try:
        config = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path} holds a JSON {type(config).__name__}, not an object with {what}")
    return config
