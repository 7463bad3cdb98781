"""The published form of AutoencoderKL, the autoencoders of latent diffusion, read and written as ours."""

from pathlib import Path
from typing import Any

from torch import nn

from models.autoencoder_kl import AutoencoderKL
from models.layers import Attention
from models.pretrained.folder import (
    CONFIG,
    LARGEST,
    LAYERS,
    Rule,
    a_count,
    a_list,
    a_size,
    both_present,
    checked,
    loaded,
    odd_widths,
    only,
    other_lengths,
    published_weights,
    short,
    some_widths,
    write,
)

ENCODER, DECODER = "DownEncoderBlock2D", "UpDecoderBlock2D"  # of an autoencoder

KEYS: dict[str, Rule] = {
    "_class_name": only("AutoencoderKL"),
    "sample_size": a_size(32),
    "in_channels": a_count(3),
    "out_channels": a_count(3),
    "latent_channels": a_count(4),
    "down_block_types": a_list([ENCODER], (ENCODER,).__contains__, f"a list of {ENCODER}"),
    "up_block_types": a_list([DECODER], (DECODER,).__contains__, f"a list of {DECODER}"),
    "block_out_channels": some_widths([64]),
    "layers_per_block": a_count(1, top=LAYERS),
    "act_fn": only("silu", "swish"),
    "norm_num_groups": a_count(32),
    "mid_block_add_attention": only(True, False),
    "use_quant_conv": only(True, False),
    "use_post_quant_conv": only(True, False),
    "scaling_factor": (0.18215, lambda v: type(v) in (int, float) and 0 < v < LARGEST, f"a number in (0, {LARGEST})"),
    "shift_factor": (
        None,
        lambda v: v is None or (type(v) in (int, float) and -LARGEST < v < LARGEST),
        f"a number in ({-LARGEST}, {LARGEST}) or null",
    ),
    "latents_mean": only(None),  # of a diffusion of latents, channel by channel
    "latents_std": only(None),
    "force_upcast": only(True, False),  # in half precision use float32, as ours is
}


def load_autoencoder(folder: str | Path, variant: str | None = None) -> AutoencoderKL:
    """Load the autoencoder in a folder of published weights, on the CPU, in float32 and in evaluation mode.

    Args:
        folder, variant: as in `load_unet`.
    Returns: the autoencoder, whose scaling_factor and shift_factor are the config's; null as a shift is 0.
    Raises:
        ValueError: as `load_unet`.
    """
    folder = Path(folder)
    weights = both_present(folder, "vae", variant)
    config = checked(folder / CONFIG, KEYS, "this autoencoder", contradictions)
    model = loaded(weights, AutoencoderKL, arguments(config))
    model.scaling_factor, model.shift_factor = float(config["scaling_factor"]), float(config["shift_factor"] or 0)
    return model


def arguments(config: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of `AutoencoderKL` that a config describes."""
    widths = config["block_out_channels"]
    return {
        "image_size": config["sample_size"],
        "in_channels": config["in_channels"],
        "latent_channels": config["latent_channels"],
        "channels": widths[0],
        "channel_mults": [width // widths[0] for width in widths],
        "blocks": config["layers_per_block"],
        "groups": config["norm_num_groups"],
        "middle_attention": config["mid_block_add_attention"],
        "quant_conv": config["use_quant_conv"],
    }


def contradictions(config: dict[str, Any]) -> list[str]:
    """Return messages about values of an autoencoder's config that contradict each other."""
    wrong = other_lengths(config) + odd_widths(config["block_out_channels"])
    for key, like in (("out_channels", "in_channels"), ("use_post_quant_conv", "use_quant_conv")):
        if config[key] != config[like]:
            wrong.append(f"{key} = {short(config[key])} (allowed: {short(config[like])}, as {like})")
    return wrong


def save_autoencoder(model: AutoencoderKL, folder: str | Path) -> None:
    """Write an autoencoder as config.json and diffusion_pytorch_model.safetensors; `load_autoencoder` reads it back.

    A learned scale (`log_scale`) is no part of the form and is left out: it belongs to a loss, and changes neither
    half.

    Args:
        model: any `AutoencoderKL` that the published form can describe; parameters keep their dtype.
        folder: as in `save_unet`.
    Raises: ValueError for one that the published form cannot describe, before anything is written.
    """
    config, weights = describe(model), published_weights(model)
    weights.pop("log_scale", None)
    write(Path(folder), config, weights)


def describe(model: AutoencoderKL) -> dict[str, Any]:
    """Return the config.json of an autoencoder; ValueError if there is none."""
    stages: list[Any] = [*model.encoder.down]
    widths = [stage.residual[0].conv_1.out_channels for stage in stages]
    scaling, shift = float(model.scaling_factor), float(model.shift_factor)
    obstacles = odd_widths(widths)
    if model.patch != 1:
        obstacles.append(f"patch = {model.patch} (allowed: 1)")
    if not 0 < scaling < LARGEST:
        obstacles.append(f"scaling_factor = {scaling:g} (allowed: a number in (0, {LARGEST}))")
    if not -LARGEST < shift < LARGEST:
        obstacles.append(f"shift_factor = {shift:g} (allowed: a number in ({-LARGEST}, {LARGEST}))")
    if obstacles:
        raise ValueError(f"the published form cannot describe this network: {'; '.join(obstacles)}")
    channels, height, width = model.shape
    quant_conv = isinstance(model.quant_conv, nn.Conv2d)
    return {
        "_class_name": "AutoencoderKL",
        "sample_size": height if height == width else [height, width],
        "in_channels": channels,
        "out_channels": channels,
        "latent_channels": model.latent_shape[0],
        "down_block_types": [ENCODER] * len(widths),
        "up_block_types": [DECODER] * len(widths),
        "block_out_channels": widths,
        "layers_per_block": len(stages[0].residual),
        "act_fn": "silu",
        "norm_num_groups": model.encoder.norm_out.num_groups,
        "mid_block_add_attention": isinstance(model.encoder.middle.attention, Attention),
        "use_quant_conv": quant_conv,
        "use_post_quant_conv": quant_conv,
        "scaling_factor": scaling,
        "shift_factor": shift or None,
        "latents_mean": None,
        "latents_std": None,
        "force_upcast": True,
    }
