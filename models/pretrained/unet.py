"""U-Nets in their published forms, unconditional and text-conditional, read and written as our `UNet`."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from models.embeddings import SinusoidalEmbedding
from models.pretrained import unet_2d, unet_2d_condition
from models.pretrained.folder import CONFIG, both_present, loaded, published_weights, write
from models.pretrained.weights import read_object
from models.unet import UNet


def load_unet(folder: str | Path, variant: str | None = None) -> UNet:
    """Load the network in a folder of published weights, on the CPU, in float32 and in evaluation mode.

    Args:
        folder: with config.json (at most 1 MB) and diffusion_pytorch_model.safetensors, or the shards of its index, or
            a pickle .bin, of which nothing but plain tensors is read; of full precision where it has several.
        variant: the word in diffusion_pytorch_model.VARIANT.safetensors, such as "fp16", to read that file.
    Returns: the U-Net, with time_offset = -1: called with t in 1..T it equals the published one at t - 1. One
        conditioned on text is called as unet(x_t, t, Condition(tokens=(B, L, D))), with x_t of any size; the further
        channels that the published one takes after those of x_t are here the image of the condition.
    Raises:
        ValueError: a missing or damaged file; a config that says what this U-Net cannot do, with the key, its value and
            what is allowed; weights that do not fit the config, with the names that are missing, unexpected or of
            another shape. All is checked before any weight is read.
    """
    folder = Path(folder)
    weights = both_present(folder, "unet", variant)
    return loaded(weights, UNet, arguments(folder / CONFIG))


def arguments(path: Path) -> dict[str, Any]:
    """Return the arguments of `UNet` that a config.json describes; ValueError with all that cannot be represented."""
    conditional = read_object(path, "the network's configuration").get("_class_name") == unet_2d_condition.CLASS
    return unet_2d_condition.arguments(path) if conditional else unet_2d.arguments(path)


def save_unet(model: UNet, folder: str | Path) -> None:
    """Write a network as config.json and diffusion_pytorch_model.safetensors; `load_unet` reads it back.

    A network with another time_offset than -1 is written exactly, up to rounding, too: see `_counted_from_0`.

    Args:
        model: any `UNet` that the published form can describe; parameters keep their dtype.
        folder: made if it is missing. Both files are on the disk before either takes its name, and config.json takes it
            last: whatever interrupts this, the folder holds the old network, the new one, or none, never a mixture.
    Raises: ValueError for a network that the published form cannot describe, before anything is written.
    """
    config, weights = describe(model), published_weights(model)
    first, embedding = "time_embedding.linear_1.weight", model.time_embedding[0]
    assert isinstance(embedding, SinusoidalEmbedding)
    weights[first] = _counted_from_0(
        weights[first], embedding.omega.cpu(), model.time_offset, embedding.flip_sin_to_cos
    )
    write(Path(folder), config, weights)


def describe(model: UNet) -> dict[str, Any]:
    """Return the config.json of a network; ValueError if there is none."""
    return unet_2d_condition.describe(model) if model.token_channels else unet_2d.describe(model)


def _counted_from_0(weight: Tensor, omega: Tensor, time_offset: int, flip: bool) -> Tensor:
    r"""Return the first layer after the sines and cosines, converted to a network that takes u = t - 1.

    Ours embeds t + time_offset = u + d with d = time_offset + 1. That turns each pair of sine and cosine by an angle,

    .. math:: \sin \omega (u + d) = \sin \omega u \cos \omega d + \cos \omega u \sin \omega d, \quad
        \cos \omega (u + d) = \cos \omega u \cos \omega d - \sin \omega u \sin \omega d,

    and the layer, which is linear in them, takes the turn over.

    Args:
        weight: (E, C); omega: (C // 2,), as in `models.embeddings`; flip: whether the cosines come first.
    """
    if time_offset == -1:
        return weight
    half, angle = len(omega), omega.double() * (time_offset + 1)
    first, second, rest = weight.double().split([half, half, weight.shape[1] - 2 * half], dim=1)
    of_sin, of_cos = (second, first) if flip else (first, second)
    of_sin, of_cos = of_sin * angle.cos() - of_cos * angle.sin(), of_sin * angle.sin() + of_cos * angle.cos()
    return torch.cat([*((of_cos, of_sin) if flip else (of_sin, of_cos)), rest], dim=1).to(weight.dtype)
