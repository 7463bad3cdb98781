"""The form of UNet2DModel, in which the networks of Ho et al. were published, read and written as our `UNet`."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from models.embeddings import SinusoidalEmbedding
from models.layers import Attention
from models.pretrained.folder import (
    CONFIG,
    LARGEST,
    LAYERS,
    Rule,
    a_count,
    a_list,
    a_number,
    a_size,
    both_present,
    checked,
    loaded,
    odd_widths,
    only,
    other_lengths,
    published_weights,
    some_widths,
    write,
)
from models.unet import UNet

DOWN, UP = ("DownBlock2D", "AttnDownBlock2D"), ("UpBlock2D", "AttnUpBlock2D")  # without attention, with it

KEYS: dict[str, Rule] = {
    "_class_name": only("UNet2DModel"),
    "sample_size": a_size(None),
    "in_channels": a_count(3),
    "out_channels": a_count(3),
    "center_input_sample": only(False),
    "time_embedding_type": only("positional"),
    "time_embedding_dim": a_count(None, null=True),
    "freq_shift": a_number(0, -LARGEST, LARGEST),
    "flip_sin_to_cos": only(True, False),
    "down_block_types": a_list([DOWN[0], *[DOWN[1]] * 3], DOWN.__contains__, f"a list of {' and '.join(DOWN)}"),
    "mid_block_type": only("UNetMidBlock2D"),
    "up_block_types": a_list([*[UP[1]] * 3, UP[0]], UP.__contains__, f"a list of {' and '.join(UP)}"),
    "block_out_channels": some_widths([224, 448, 672, 896]),
    "layers_per_block": a_count(2, top=LAYERS),
    "mid_block_scale_factor": only(1, 1.0),
    "downsample_padding": only(1, 0),
    "downsample_type": only("conv"),
    "upsample_type": only("conv"),
    "dropout": a_number(0.0, 0, 1),
    "act_fn": only("silu", "swish"),  # two names of one function
    "attention_head_dim": a_count(8, null=True),
    "norm_num_groups": a_count(32),
    "attn_norm_num_groups": a_count(None, null=True),
    "norm_eps": a_number(1e-5, 0, 1),
    "resnet_time_scale_shift": only("default"),
    "add_attention": only(True, False),
    "class_embed_type": only(None),
    "num_class_embeds": a_count(None, null=True),
    "num_train_timesteps": a_count(None, null=True),  # the size of learned time embeddings, so without effect on ours
}


def load_unet(folder: str | Path) -> UNet:
    """The network in a folder of published weights, on the CPU, in float32 and in evaluation mode.

    Args:
        folder: with config.json (at most 1 MB) and diffusion_pytorch_model.safetensors. Pickled weights are never read.
    Returns: the U-Net, with time_offset = -1: given t in 1..T it answers what the published one does for t - 1.
    Raises:
        ValueError: a missing or damaged file; a config that says what this U-Net cannot do, with the key, its value and
            what is allowed; weights that do not fit the config, with the names that are missing, unexpected or of
            another shape. All is checked before any weight is read.
    """
    folder = Path(folder)
    both_present(folder, "unet")
    return loaded(folder, UNet, arguments(folder / CONFIG))


def arguments(path: Path) -> dict[str, Any]:
    """The arguments of `UNet` that a config.json describes; ValueError with all that cannot be represented."""
    config = checked(path, KEYS, "this U-Net", contradictions)
    size, widths = config["sample_size"], config["block_out_channels"]
    longer = size if isinstance(size, int) else max(size)
    return {
        "image_size": size,
        "in_channels": config["in_channels"],
        "out_channels": config["out_channels"],
        "channels": widths[0],
        "channel_mults": [width // widths[0] for width in widths],
        "blocks": config["layers_per_block"],
        "attention_resolutions": [longer >> i for i, kind in enumerate(config["down_block_types"]) if kind == DOWN[1]],
        "head_channels": config["attention_head_dim"],
        "middle_attention": config["add_attention"],
        "dropout": config["dropout"],
        "groups": config["norm_num_groups"],
        "num_classes": config["num_class_embeds"],
        "norm_eps": config["norm_eps"],
        "downsample_padding": config["downsample_padding"],
        "flip_sin_to_cos": config["flip_sin_to_cos"],
        "freq_shift": config["freq_shift"],
        "time_offset": -1,
    }


def contradictions(config: dict[str, Any]) -> list[str]:
    """What is wrong with values that are legal one by one."""
    widths, down, up = config["block_out_channels"], config["down_block_types"], config["up_block_types"]
    groups, embedding = config["norm_num_groups"], 4 * widths[0]
    wrong = other_lengths(config)
    for level, (going_down, going_up) in enumerate(zip(down, reversed(up), strict=False)):
        if DOWN.index(going_down) != UP.index(going_up):
            wrong.append(
                f"level {level} has {going_down} in down_block_types and {going_up} in up_block_types (allowed: "
                "attention on both ways or on none)"
            )
    wrong += odd_widths(widths)
    if config["time_embedding_dim"] not in (None, embedding):
        wrong.append(f"time_embedding_dim = {config['time_embedding_dim']} (allowed: null or {embedding})")
    if config["attn_norm_num_groups"] not in (None, groups):
        wrong.append(f"attn_norm_num_groups = {config['attn_norm_num_groups']} (allowed: null or {groups})")
    return wrong


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
    """The config.json of a network; ValueError if there is none."""
    stages: list[Any] = [*model.down]  # each a `models.unet.Stage`: torch's containers do not know what they hold
    widths = [stage.residual[0].conv_1.out_channels for stage in stages]
    blocks = [len(stage.residual) for stage in stages]
    attended = [isinstance(stage.attention[0], Attention) for stage in stages]
    attentions = [m for m in model.modules() if isinstance(m, Attention)]
    head_widths = {m.norm.num_channels // m.heads for m in attentions}
    one_head = all(m.heads == 1 for m in attentions)
    obstacles = {
        f"patch = {model.patch} (allowed: 1)": model.patch != 1,
        "attention = linear (allowed: full)": any(m.kind != "full" for m in attentions),
        f"blocks = {blocks} (allowed: as many on each level)": len(set(blocks)) > 1,
        "channel_mults[0] > 1 (allowed: 1)": widths[0] != model.conv_in.out_channels,
        f"heads of widths {sorted(head_widths)} (allowed: one width, or one head)": not one_head
        and len(head_widths) > 1,
        f"condition_channels = {model.condition_channels} (allowed: 0)": model.condition_channels > 0,
        f"num_classes = {model.num_classes} (allowed: one label)": isinstance(model.num_classes, tuple),
        f"class_channels = {model.class_channels} (allowed: 0)": model.class_channels > 0,
        f"augment_dim = {model.augment_dim} (allowed: 0)": model.augment_dim > 0,
        "magnitude_preserving = true (allowed: false)": model.magnitude_preserving,
        f"drop = {model.drop:g} (allowed: 0, since the form has no learned null)": model.drop > 0 and bool(model.takes),
    }
    if any(obstacles.values()):
        message = "; ".join(obstacle for obstacle, there in obstacles.items() if there)
        raise ValueError(f"the published form cannot describe this network: {message}")
    height, width = model.image_size
    norm = model.norm_out
    assert norm is not None  # of a network that does not preserve magnitudes
    return {
        "_class_name": "UNet2DModel",
        "sample_size": height if height == width else [height, width],
        "in_channels": model.in_channels,
        "out_channels": model.out_channels,
        "center_input_sample": False,
        "time_embedding_type": "positional",
        "freq_shift": model.freq_shift,
        "flip_sin_to_cos": model.time_embedding[0].flip_sin_to_cos,
        "down_block_types": [DOWN[a] for a in attended],
        "up_block_types": [UP[a] for a in reversed(attended)],
        "block_out_channels": widths,
        "layers_per_block": blocks[0],
        "mid_block_scale_factor": 1,
        "downsample_padding": stages[0].resample.padding if len(widths) > 1 else 1,
        "dropout": model.middle_1.dropout.p,
        "act_fn": "silu",
        "attention_head_dim": None if one_head else min(head_widths),
        "norm_num_groups": norm.num_groups,
        "norm_eps": norm.eps,
        "resnet_time_scale_shift": "default",
        "add_attention": isinstance(model.middle_attention, Attention),
        "num_class_embeds": model.num_classes,
    }


def _counted_from_0(weight: Tensor, omega: Tensor, time_offset: int, flip: bool) -> Tensor:
    r"""The first layer after the sines and cosines, for a network that is told u = t - 1.

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
