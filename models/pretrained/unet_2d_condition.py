"""The published form of UNet2DConditionModel, the text-conditional U-Nets of latent diffusion.

Those of versions 1.4 and 1.5 have 8 heads on each level and 1x1 convolutions around their transformers, those of 2.0
and 2.1 have heads of 64 channels and linear layers, those for inpainting and depth take further channels after x_t.
"""

from pathlib import Path
from typing import Any

from models.pretrained.folder import (
    LARGEST,
    LAYERS,
    Rule,
    a_count,
    a_list,
    a_number,
    a_size,
    checked,
    each_level,
    odd_widths,
    only,
    other_lengths,
    short,
    some_widths,
)
from models.pretrained.unet_2d import common, refuse
from models.transformer import SpatialTransformer
from models.unet import UNet
from models.unet_checks import resolutions_of

CLASS = "UNet2DConditionModel"
DOWN, UP = ("DownBlock2D", "CrossAttnDownBlock2D"), ("UpBlock2D", "CrossAttnUpBlock2D")  # without transformers, with
EACH = ("only_cross_attention", "layers_per_block", "transformer_layers_per_block", "attention_head_dim")

KEYS: dict[str, Rule] = {
    "_class_name": only(CLASS),
    "sample_size": a_size(None),
    "in_channels": a_count(4),
    "out_channels": a_count(4),
    "center_input_sample": only(False),
    "flip_sin_to_cos": only(True, False),
    "freq_shift": a_number(0, -LARGEST, LARGEST),
    "down_block_types": a_list([*[DOWN[1]] * 3, DOWN[0]], DOWN.__contains__, f"a list of {' and '.join(DOWN)}"),
    "mid_block_type": only("UNetMidBlock2DCrossAttn"),
    "up_block_types": a_list([UP[0], *[UP[1]] * 3], UP.__contains__, f"a list of {' and '.join(UP)}"),
    "only_cross_attention": each_level(only(False, True)),
    "block_out_channels": some_widths([320, 640, 1280, 1280]),
    "layers_per_block": each_level(a_count(2, top=LAYERS)),
    "downsample_padding": only(1),
    "mid_block_scale_factor": only(1, 1.0),
    "dropout": a_number(0.0, 0, 1),
    "act_fn": only("silu", "swish"),
    "norm_num_groups": a_count(32),
    "norm_eps": a_number(1e-5, 0, 1),
    "cross_attention_dim": a_count(1280),
    "transformer_layers_per_block": each_level(a_count(1, top=LAYERS)),
    "reverse_transformer_layers_per_block": only(None),
    "encoder_hid_dim": only(None),  # a projection of the tokens
    "encoder_hid_dim_type": only(None),
    "attention_head_dim": each_level(a_count(8)),  # which is the number of heads there
    "num_attention_heads": only(None),  # as above
    "dual_cross_attention": only(False),
    "use_linear_projection": only(False, True),
    "class_embed_type": only(None),
    "num_class_embeds": a_count(None, null=True),
    "addition_embed_type": only(None),  # what else is added to the embedding of the time
    "addition_time_embed_dim": only(None),
    "addition_embed_type_num_heads": a_count(64),  # of an addition_embed_type, so without effect on ours
    "projection_class_embeddings_input_dim": only(None),
    "class_embeddings_concat": only(False),
    "upcast_attention": only(False, True),  # in half precision use float32, as ours is
    "resnet_time_scale_shift": only("default", "scale_shift"),
    "resnet_skip_time_act": only(False),
    "resnet_out_scale_factor": only(1.0, 1),
    "time_embedding_type": only("positional"),
    "time_embedding_dim": a_count(None, null=True),
    "time_embedding_act_fn": only(None),
    "timestep_post_act": only(None),
    "time_cond_proj_dim": only(None),
    "conv_in_kernel": only(3),
    "conv_out_kernel": only(3),
    "attention_type": only("default"),
    "mid_block_only_cross_attention": only(None, False),
    "cross_attention_norm": only(None),
}


def arguments(path: Path) -> dict[str, Any]:
    """Return the arguments of `UNet` that a config.json describes; ValueError with all that cannot be represented."""
    config = checked(path, KEYS, "this U-Net", contradictions)
    size, widths, types = config["sample_size"], config["block_out_channels"], config["down_block_types"]
    in_channels, condition_channels = _shared(config["in_channels"], config["out_channels"])
    resolutions = resolutions_of([size] if isinstance(size, int) else size, len(widths))
    return {
        "image_size": size,
        "in_channels": in_channels,
        "condition_channels": condition_channels,
        "out_channels": config["out_channels"],
        "channels": widths[0],
        "channel_mults": [width // widths[0] for width in widths],
        "blocks": config["layers_per_block"],
        "attention_resolutions": [n for n, kind in zip(resolutions, types, strict=True) if kind == DOWN[1]],
        "heads": config["attention_head_dim"],
        "dropout": config["dropout"],
        "groups": config["norm_num_groups"],
        "num_classes": config["num_class_embeds"],
        "norm_eps": config["norm_eps"],
        "flip_sin_to_cos": config["flip_sin_to_cos"],
        "freq_shift": config["freq_shift"],
        "time_offset": -1,
        "token_channels": config["cross_attention_dim"],
        "transformer_layers": config["transformer_layers_per_block"],
        "linear_projection": config["use_linear_projection"],
        "only_cross_attention": config["only_cross_attention"],
        "any_size": True,
        "scale_shift": config["resnet_time_scale_shift"] == "scale_shift",
    }


def _shared(total: int, out: int) -> tuple[int, int]:
    """Return the channels of x_t, at most those of the output, and of the conditioning image, given their total."""
    return min(total, out), max(total - out, 0)


def contradictions(config: dict[str, Any]) -> list[str]:
    """Return messages about values that contradict each other."""
    size, widths, down = config["sample_size"], config["block_out_channels"], config["down_block_types"]
    wrong = other_lengths(config, *EACH) + odd_widths(widths)
    for level, (going_down, going_up) in enumerate(zip(down, reversed(config["up_block_types"]), strict=False)):
        if DOWN.index(going_down) != UP.index(going_up):
            wrong.append(
                f"level {level} has {going_down} in down_block_types and {going_up} in up_block_types (allowed: "
                "transformers on both ways or on none)"
            )
    resolutions = resolutions_of([size] if isinstance(size, int) else size, len(down))
    if len(set(zip(resolutions, down, strict=True))) > len(set(resolutions)):
        wrong.append(
            f"sample_size = {short(size)} has levels of {', '.join(map(str, resolutions))} pixels, of which some are "
            "alike, but not in down_block_types (allowed: larger sizes)"
        )
    if config["time_embedding_dim"] not in (None, 4 * widths[0]):
        wrong.append(f"time_embedding_dim = {config['time_embedding_dim']} (allowed: null or {4 * widths[0]})")
    return wrong


def describe(model: UNet) -> dict[str, Any]:
    """Return the config.json of a network; ValueError if there is none."""
    stages: list[Any] = [*model.down]  # each a `models.unet.Stage`: torch's containers are untyped
    total, out, middle = model.in_channels + model.condition_channels, model.out_channels, model.middle_attention
    allowed = _shared(total, out)
    transformers = [stage.attention[0] for stage in stages]
    attended = [isinstance(transformer, SpatialTransformer) for transformer in transformers]
    refuse(
        model,
        {
            "middle_attention = false (allowed: true)": not isinstance(middle, SpatialTransformer),
            f"in_channels = {model.in_channels} and condition_channels = {model.condition_channels} with out_channels "
            f"= {out} (allowed: {allowed[0]} and {allowed[1]})": model.in_channels != allowed[0],
            "levels joined otherwise than by convolutions with padding 1 (allowed: resample = conv, downsample_padding "
            "= 1)": any(getattr(stage.resample, "padding", 0) != 1 for stage in stages[:-1]),
        },
    )
    assert isinstance(middle, SpatialTransformer)
    # levels without transformers state the middle's values, without effect
    own = [one if there else middle for one, there in zip(transformers, attended, strict=True)]
    only_cross = [
        there and one.blocks[0].only_cross_attention for one, there in zip(transformers, attended, strict=True)
    ]
    return common(model) | {
        "_class_name": CLASS,
        "in_channels": total,
        "down_block_types": [DOWN[a] for a in attended],
        "up_block_types": [UP[a] for a in reversed(attended)],
        "mid_block_type": "UNetMidBlock2DCrossAttn",
        "layers_per_block": _one([len(stage.residual) for stage in stages]),
        "downsample_padding": 1,
        "cross_attention_dim": model.token_channels,
        "transformer_layers_per_block": _one([len(one.blocks) for one in own]),
        "attention_head_dim": _one([one.heads for one in own]),
        "use_linear_projection": middle.linear_projection,
        "only_cross_attention": _one(only_cross),
    }


def _one(values: list[Any]) -> Any:
    """Return the common value of all levels, or the list."""
    return values[0] if len(set(values)) == 1 else values
