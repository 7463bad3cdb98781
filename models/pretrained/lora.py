"""Published low-rank adapters: one file of safetensors for a U-Net, and perhaps its text encoder, read and written.

Four spellings of a layer's matrices A and B are read, which differ in names alone:

* `unet.NAME.lora_A.weight`, `unet.NAME.lora_B.weight`, as diffusers and peft write them today, and `save_lora`;
* `unet.NAME.lora.down.weight`, `unet.NAME.lora.up.weight`, as they did before;
* `NAME.processor.to_q_lora.down.weight` and up, the oldest;
* `lora_unet_NAME.lora_down.weight`, `lora_unet_NAME.lora_up.weight`, with _ for each point of NAME, as Kohya's scripts.

NAME is the published name of the layer, see the tables in folder.py and text.py. Those of a text encoder begin with
`text_encoder.` or `lora_te_`. A number `.alpha` beside them is the strength; without one it is the rank.
"""

import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from models.adapters import adapt_layer, adapted, merge, must_take
from models.pretrained.folder import published_name, short
from models.pretrained.text import published_name as published_text_name
from models.pretrained.weights import opened

ENDS = (  # of a key: which of the matrices it holds, after the name of its layer
    (re.compile(r"\.(?:lora_A(?:\.\w+)?|lora\.down|lora_down|lora_linear_layer\.down)\.weight$"), "A"),
    (re.compile(r"\.(?:lora_B(?:\.\w+)?|lora\.up|lora_up|lora_linear_layer\.up)\.weight$"), "B"),
    (re.compile(r"\.alpha$"), "alpha"),
)
OLDEST = re.compile(r"\.processor\.(to_[qkv]|to_out)_lora\.(down|up)\.weight$")


class Low(NamedTuple):
    """The low-rank change of one layer."""

    network: nn.Module
    name: str  # of the layer in it, ours
    A: Tensor
    B: Tensor
    alpha: float


def load_lora(model: nn.Module, path: str | Path, scale: float = 1.0, encoder: nn.Module | None = None) -> list[str]:
    """Add a published adapter to a network loaded by `load_unet`, and to its text encoder, in place.

    All else of the networks stays as it is, and frozen; `models.adapters.merge` makes them plain again, so that
    several adapters can be added one after the other.

    Args:
        model: the U-Net.
        path: the file.
        scale: multiplies the strength.
        encoder: the text encoder, for adapters that are of one too.
    Returns: the names of the layers, ours.
    Raises: ValueError for an unreadable file, or no adapter; a layer that the networks do not have, or one of another
        width, one that is adapted already, or changed twice: with the first that does not fit; a scale that is no
        number. Then nothing is changed.
    """
    if not math.isfinite(scale):
        raise ValueError(f"scale = {scale} must be a finite number")
    changes = _read(Path(path), {"unet": model} | ({} if encoder is None else {"text_encoder": encoder}))
    seen = set[tuple[int, str]]()
    for low in changes:
        _must_fit(Path(path), low)
        if (place := (id(low.network), low.name)) in seen:  # by two of its names
            raise ValueError(f"{path} changes {low.name} twice")
        seen.add(place)
    for low in changes:
        layer = adapt_layer(low.network, low.name, len(low.A), scale * low.alpha)
        layer.put(low.A, low.B)
    for network in {id(low.network): low.network for low in changes}.values():
        for name, p in network.named_parameters():
            p.requires_grad_(name.endswith(("lora_A", "lora_B")))
    return [low.name for low in changes]


def with_lora(model: nn.Module, path: str | Path, scale: float = 1.0, encoder: nn.Module | None = None) -> nn.Module:
    """Add an adapter as `load_lora` does, and merge it, so that cost is unchanged; returns the network."""
    load_lora(model, path, scale, encoder)
    for network in (model, encoder):
        if network is not None:
            merge(network).requires_grad_(False)
    return model


def save_lora(model: nn.Module, path: str | Path, encoder: nn.Module | None = None) -> None:
    """Write the adapters that `models.adapters` added to a network in the published form; `load_lora` reads them.

    As a file without alpha has the rank as strength, B includes the factor alpha / r.

    Args:
        model: an adapted U-Net; of one with an encoder as its `text`, that is written as a text encoder.
        path: the file; its folder must be there.
        encoder: an adapted text encoder to save with it.
    Raises: ValueError for networks without adapters.
    """
    parts = [("unet", published_name, model)] + (
        [] if encoder is None else [("text_encoder", published_text_name, encoder)]
    )
    tensors: dict[str, Tensor] = {}
    for prefix, published, network in parts:
        for name, layer in adapted(network):
            kind, naming, own = prefix, published, name
            if prefix == "unet" and name.startswith("text."):
                kind, naming, own = "text_encoder", published_text_name, name.removeprefix("text.")
            key = f"{kind}.{naming(f'{own}.weight').removesuffix('.weight')}"
            B = layer.lora_B.detach() * (layer.alpha / layer.r)
            tensors[f"{key}.lora_A.weight"] = layer.lora_A.detach().cpu().contiguous()
            tensors[f"{key}.lora_B.weight"] = B.cpu().contiguous()
    if not tensors:
        raise ValueError("the network has no low-rank adapters to write; models.adapters.adapt puts some in")
    save_file(tensors, path, metadata={"format": "pt"})


def _names(networks: Mapping[str, nn.Module]) -> dict[str, tuple[nn.Module, str]]:
    """Return the names that a file may have for each layer -> the network, and its own name of the layer."""
    kohya, found = {"unet": "lora_unet", "text_encoder": "lora_te"}, dict[str, tuple[nn.Module, str]]()
    for part, network in networks.items():
        naming: Callable[[str], str] = published_name if part == "unet" else published_text_name
        for name, layer in network.named_modules():
            if isinstance(layer, nn.Linear | nn.Conv2d):
                published = naming(f"{name}.weight").removesuffix(".weight")
                own = {f"{part}.{published}", f"{kohya[part]}_{published.replace('.', '_')}"}
                found |= dict.fromkeys(own | ({published} if part == "unet" else set()), (network, name))
    return found


def _read(path: Path, networks: Mapping[str, nn.Module]) -> list[Low]:
    """Return the changes in a file, layer by layer in its order."""
    names, found = _names(networks), dict[str, dict[str, Tensor]]()
    with opened(path) as pieces:
        for key, piece in pieces.items():
            layer, what = _parted(key)
            if what is None:
                raise ValueError(f"{path} is no low-rank adapter that is read here: {short(key)} is none of its keys")
            found.setdefault(layer, {})[what] = piece.read()
    changes = []
    for layer, tensors in found.items():
        if layer not in names:
            parts = " and ".join(networks)
            raise ValueError(
                f"{path} changes {short(layer)}, which is no layer of this {parts}; it belongs to another network"
            )
        if missing := {"A", "B"} - tensors.keys():
            raise ValueError(f"{path} has no matrix {min(missing)} of {short(layer)}")
        network, name = names[layer]
        changes.append(Low(network, name, tensors["A"].float(), tensors["B"].float(), _strength(path, layer, tensors)))
    if not changes:
        raise ValueError(f"{path} holds nothing")
    return changes


def _strength(path: Path, layer: str, tensors: Mapping[str, Tensor]) -> float:
    """Return alpha of a layer's change: as stated in the file, or else the rank."""
    if not tensors["A"].ndim:
        raise ValueError(f"{path} does not fit: A of {short(layer)} is one number, and no matrix")
    alpha = tensors.get("alpha", torch.tensor(float(len(tensors["A"]))))
    if alpha.numel() != 1 or not alpha.isfinite().all():
        value = alpha.item() if alpha.numel() == 1 else f"a tensor {tuple(alpha.shape)}"
        raise ValueError(f"{path}: alpha of {short(layer)} is {value}; allowed: one finite number")
    return float(alpha)


def _parted(key: str) -> tuple[str, str | None]:
    """Return the name of a layer, and which of its matrices a key holds; None for neither."""
    if old := OLDEST.search(key):
        layer = f"{key[: old.start()]}.{old[1]}{'.0' if old[1] == 'to_out' else ''}"
        return layer, {"down": "A", "up": "B"}[old[2]]
    for pattern, what in ENDS:
        if end := pattern.search(key):
            return key[: end.start()], what
    return key, None


def _must_fit(path: Path, low: Low) -> None:
    """Raise ValueError for matrices that are not of the layer's shape."""
    weight = low.network.get_submodule(low.name).weight
    assert isinstance(weight, Tensor)  # as it is a linear layer or a convolution
    r, into, out = len(low.A), weight[0].numel(), len(weight)
    if low.A.numel() != r * into or low.B.numel() != out * r or low.B.shape[:1] != (out,):
        raise ValueError(
            f"{path} does not fit: {low.name} maps {into} to {out}, but here A is {tuple(low.A.shape)} and B "
            f"{tuple(low.B.shape)}; it belongs to a network of another width"
        )
    if not (torch.isfinite(low.A).all() and torch.isfinite(low.B).all()):
        raise ValueError(f"{path} holds numbers that are not finite, of {low.name}")
    try:
        must_take(low.network, low.name, r)
    except ValueError as error:
        raise ValueError(f"{path} does not fit: {error}") from error
