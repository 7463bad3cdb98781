"""The published form of UNet2DModel, the networks of Ho et al. and of Dhariwal and Nichol."""

from pathlib import Path
from typing import Any

from models.layers import Attention, ResidualBlock
from models.pretrained.folder import (
    LARGEST,
    LAYERS,
    Rule,
    a_count,
    a_list,
    a_number,
    a_size,
    checked,
    odd_widths,
    only,
    other_lengths,
    some_widths,
)
from models.unet import UNet

# Blocks without attention, with it, and without it but resampled by residual blocks.
DOWN = ("DownBlock2D", "AttnDownBlock2D", "ResnetDownsampleBlock2D")
UP = ("UpBlock2D", "AttnUpBlock2D", "ResnetUpsampleBlock2D")
ATTENDED = 1

KEYS: dict[str, Rule] = {
    "_class_name": only("UNet2DModel", "UNet2DConditionModel"),
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
    "downsample_type": only("conv", "resnet"),
    "upsample_type": only("conv", "resnet"),
    "dropout": a_number(0.0, 0, 1),
    "act_fn": only("silu", "swish"),  # two names of one function
    "attention_head_dim": a_count(8, null=True),
    "norm_num_groups": a_count(32),
    "attn_norm_num_groups": a_count(None, null=True),
    "norm_eps": a_number(1e-5, 0, 1),
    "resnet_time_scale_shift": only("default", "scale_shift"),
    "add_attention": only(True, False),
    "class_embed_type": only(None),
    "num_class_embeds": a_count(None, null=True),
    "num_train_timesteps": a_count(None, null=True),  # the size of learned time embeddings, so without effect on ours
}


def arguments(path: Path) -> dict[str, Any]:
    """Return the arguments of `UNet` that a config.json describes; ValueError with all that cannot be represented."""
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
        "attention_resolutions": [
            longer >> i for i, kind in enumerate(config["down_block_types"]) if kind == DOWN[ATTENDED]
        ],
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
        "scale_shift": config["resnet_time_scale_shift"] == "scale_shift",
        "resample": next(iter(_resampling(config)), "conv"),
    }


def contradictions(config: dict[str, Any]) -> list[str]:
    """Return messages about values that contradict each other."""
    widths, down, up = config["block_out_channels"], config["down_block_types"], config["up_block_types"]
    groups, embedding = config["norm_num_groups"], 4 * widths[0]
    wrong = other_lengths(config)
    for level, (going_down, going_up) in enumerate(zip(down, reversed(up), strict=False)):
        if (going_down == DOWN[ATTENDED]) != (going_up == UP[ATTENDED]):
            wrong.append(
                f"level {level} has {going_down} in down_block_types and {going_up} in up_block_types (allowed: "
                "attention on both ways or on none)"
            )
    wrong += odd_widths(widths)
    if config["time_embedding_dim"] not in (None, embedding):
        wrong.append(f"time_embedding_dim = {config['time_embedding_dim']} (allowed: null or {embedding})")
    if config["attn_norm_num_groups"] not in (None, groups):
        wrong.append(f"attn_norm_num_groups = {config['attn_norm_num_groups']} (allowed: null or {groups})")
    without_norm = config["attn_norm_num_groups"] is None and config["resnet_time_scale_shift"] != "default"
    if without_norm and config["add_attention"]:
        wrong.append(
            "attn_norm_num_groups = null is, with scale_shift, attention without a norm in the middle (allowed: "
            f"{groups})"
        )
    if len(_resampling(config)) > 1:
        wrong.append(
            "levels are joined both by convolutions and by residual blocks, see downsample_type, upsample_type, "
            f"{DOWN[2]} and {UP[2]} (allowed: one of both everywhere)"
        )
    return wrong


def _resampling(config: dict[str, Any]) -> set[str]:
    """Return how levels are joined, "conv" or "resnet", without the last block of each way, which joins nothing."""
    kinds = set()
    for way, types in (("down", DOWN), ("up", UP)):
        by_type = dict(zip(types, ("conv", config[f"{way}sample_type"], "resnet"), strict=True))
        kinds |= {by_type[kind] for kind in config[f"{way}_block_types"][:-1]}
    return kinds


def describe(model: UNet) -> dict[str, Any]:
    """Return the config.json of a network; ValueError if there is none."""
    stages: list[Any] = [*model.down]  # each a `models.unet.Stage`: torch's containers are untyped
    attended = [isinstance(stage.attention[0], Attention) for stage in stages]
    attentions = [m for m in model.modules() if isinstance(m, Attention)]
    head_widths = {m.norm.num_channels // m.heads for m in attentions}
    one_head = all(m.heads == 1 for m in attentions)
    blocks = [len(stage.residual) for stage in stages]
    refuse(
        model,
        {
            "attention = linear (allowed: full)": any(m.kind != "full" for m in attentions),
            f"blocks = {blocks} (allowed: as many on each level)": len(set(blocks)) > 1,
            f"heads of widths {sorted(head_widths)} (allowed: one width, or one head)": not one_head
            and len(head_widths) > 1,
            f"condition_channels = {model.condition_channels} (allowed: 0)": model.condition_channels > 0,
            "any_size = true (allowed: false)": model.any_size,
        },
    )
    by_block = any(isinstance(stage.resample, ResidualBlock) for stage in stages)
    plain = 2 if by_block else 0
    config = common(model) | {
        "_class_name": "UNet2DModel",
        "in_channels": model.in_channels,
        "time_embedding_type": "positional",
        "down_block_types": [DOWN[ATTENDED if a else plain] for a in attended],
        "up_block_types": [UP[ATTENDED if a else plain] for a in reversed(attended)],
        "layers_per_block": blocks[0],
        "downsample_padding": getattr(stages[0].resample, "padding", 1),
        "attention_head_dim": None if one_head else min(head_widths),
        "add_attention": isinstance(model.middle_attention, Attention),
    }
    if config["resnet_time_scale_shift"] != "default":
        config["attn_norm_num_groups"] = config["norm_num_groups"]
    return config | ({"downsample_type": "resnet", "upsample_type": "resnet"} if by_block else {})


def widths_of(model: UNet) -> list[int]:
    """Return the channels of each level."""
    stages: list[Any] = [*model.down]
    return [stage.residual[0].conv_1.out_channels for stage in stages]


def refuse(model: UNet, obstacles: dict[str, bool]) -> None:
    """Raise ValueError for a network that no published form can describe, or that a form cannot.

    Args:
        obstacles: the properties that the form cannot describe, in words; true where the network has it.
    """
    classes = model.num_classes
    obstacles = {
        f"patch = {model.patch} (allowed: 1)": model.patch != 1,
        **obstacles,
        "channel_mults[0] > 1 (allowed: 1)": widths_of(model)[0] != model.conv_in.out_channels,
        f"num_classes = {classes} (allowed: one label)": isinstance(classes, tuple),
        f"class_channels = {model.class_channels} (allowed: 0)": model.class_channels > 0,
        f"augment_dim = {model.augment_dim} (allowed: 0)": model.augment_dim > 0,
        "magnitude_preserving = true (allowed: false)": model.magnitude_preserving,
        f"drop = {model.drop:g} (allowed: 0, since the form has no learned null)": model.drop > 0 and bool(model.takes),
    }
    if any(obstacles.values()):
        message = "; ".join(obstacle for obstacle, there in obstacles.items() if there)
        raise ValueError(f"the published form cannot describe this network: {message}")


def common(model: UNet) -> dict[str, Any]:
    """Return the settings of a network that both published forms share."""
    height, width = model.image_size
    norm, middle = model.norm_out, model.middle_1
    assert norm is not None and isinstance(middle, ResidualBlock)  # of a network that does not preserve magnitudes
    return {
        "sample_size": height if height == width else [height, width],
        "out_channels": model.out_channels,
        "center_input_sample": False,
        "freq_shift": model.freq_shift,
        "flip_sin_to_cos": model.time_embedding[0].flip_sin_to_cos,
        "block_out_channels": widths_of(model),
        "mid_block_scale_factor": 1,
        "dropout": middle.dropout.p,
        "act_fn": "silu",
        "norm_num_groups": norm.num_groups,
        "norm_eps": norm.eps,
        "resnet_time_scale_shift": "scale_shift" if middle.scale_shift else "default",
        "num_class_embeds": model.num_classes,
    }
