"""Published weights: folders of config.json and diffusion_pytorch_model.safetensors, read and written.

The forms are those of two classes of the diffusers library. UNet2DModel, in which the networks of Ho et al. were
published (arXiv 2006.11239: CIFAR-10 at 32x32, CelebA-HQ and LSUN bedroom, cat, church at 256x256), is our `UNet`;
AutoencoderKL, in which those of latent diffusion were (arXiv 2112.10752), is our `AutoencoderKL`. What differs:

* Their t is counted from 0, ours from 1: a loaded network has time_offset = -1, so ours(x, t) == published(x, t - 1).
* They place attention by the types of the blocks, we by resolution: level i of size n has the resolution n >> i.
* `attention_head_dim` is the width of one head, or null for one head.
* `sample_size` of an autoencoder is the size that it was trained at, and no other is refused, here as there.
* Names: the tables below. Older files call the maps of attention query, key, value and proj_attn, and may store them as
  1x1 convolutions.
"""

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from models.autoencoder_kl import AutoencoderKL
from models.embeddings import SinusoidalEmbedding
from models.layers import Attention
from models.unet import UNet

CONFIG, WEIGHTS = "config.json", "diffusion_pytorch_model.safetensors"
PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".pkl")
CONFIG_BYTES, LARGEST, LEVELS, LAYERS = 2**20, 2**16, 16, 64  # above these a config is no network but a mistake
DOWN, UP = ("DownBlock2D", "AttnDownBlock2D"), ("UpBlock2D", "AttnUpBlock2D")  # without attention, with it
ENCODER, DECODER = "DownEncoderBlock2D", "UpDecoderBlock2D"  # of an autoencoder

NAMES = [  # ours -> published, each applied in turn
    (r"^time_embedding\.1\.", "time_embedding.linear_1."),
    (r"^time_embedding\.3\.", "time_embedding.linear_2."),
    (r"\bmiddle(\.residual)?_1\.", "mid_block.resnets.0."),
    (r"\bmiddle(\.residual)?_2\.", "mid_block.resnets.1."),
    (r"\bmiddle[._]attention\.", "mid_block.attentions.0."),
    (r"\bnorm_out\.", "conv_norm_out."),
    (r"\b(down|up)\.(\d+)\.residual\.", r"\1_blocks.\2.resnets."),
    (r"\b(down|up)\.(\d+)\.attention\.", r"\1_blocks.\2.attentions."),
    (r"\b(down|up)\.(\d+)\.resample\.", r"\1_blocks.\2.\1samplers.0."),
    (r"(\.resnets\.\d+\.)(norm|conv)_(\d)\.", r"\1\2\3."),
    (r"(\.resnets\.\d+\.)embedding\.", r"\1time_emb_proj."),
    (r"(\.resnets\.\d+\.)shortcut\.", r"\1conv_shortcut."),
    (r"(\.attentions\.\d+\.)norm\.", r"\1group_norm."),
    (r"(\.attentions\.\d+\.)to_out\.", r"\1to_out.0."),
]
SAME = {"image_size": "sample_size", "groups": "norm_num_groups", "head_channels": "attention_head_dim"}
FORMERLY = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}  # old published -> published


# --- What a config may say

Rule = tuple[Any, Callable[[Any], bool], str]  # of a key: what it means when missing, a value's test, the test in words


def _only(*values: object) -> Rule:
    """One of these values; the first is the default. JSON's true is not 1 here."""
    return values[0], lambda v: (type(v), v) in [(type(a), a) for a in values], " or ".join(map(json.dumps, values))


def _count(default: object, top: int = LARGEST, null: bool = False) -> Rule:
    """An integer in 1..top, or null where that has a meaning."""
    words = f"an integer in 1..{top}" + (" or null" if null else "")
    return default, lambda v: (null and v is None) or (type(v) is int and 1 <= v <= top), words


def _number(default: float, low: float, high: float) -> Rule:
    """A number, the upper bound excluded."""
    return default, lambda v: type(v) in (int, float) and low <= v < high, f"a number in [{low}, {high})"


def _list(default: list[str] | list[int], test: Callable[[Any], bool], words: str) -> Rule:
    """One entry a level."""
    return default, lambda v: isinstance(v, list) and 1 <= len(v) <= LEVELS and all(map(test, v)), words


_, is_count, COUNT = _count(None)


def _size(default: int | None) -> Rule:
    """A size in pixels, or two."""
    words = f"{COUNT}, or two of them [height, width]"
    return default, lambda v: is_count(v) or (isinstance(v, list) and len(v) == 2 and all(map(is_count, v))), words


def _widths(default: list[int]) -> Rule:
    """The channels of each level."""
    return _list(default, is_count, f"a list of up to {LEVELS}, each {COUNT}")


KEYS: dict[str, Rule] = {
    "_class_name": _only("UNet2DModel"),
    "sample_size": _size(None),
    "in_channels": _count(3),
    "out_channels": _count(3),
    "center_input_sample": _only(False),
    "time_embedding_type": _only("positional"),
    "time_embedding_dim": _count(None, null=True),
    "freq_shift": _number(0, -LARGEST, LARGEST),
    "flip_sin_to_cos": _only(True, False),
    "down_block_types": _list([DOWN[0], *[DOWN[1]] * 3], DOWN.__contains__, f"a list of {' and '.join(DOWN)}"),
    "mid_block_type": _only("UNetMidBlock2D"),
    "up_block_types": _list([*[UP[1]] * 3, UP[0]], UP.__contains__, f"a list of {' and '.join(UP)}"),
    "block_out_channels": _widths([224, 448, 672, 896]),
    "layers_per_block": _count(2, top=LAYERS),
    "mid_block_scale_factor": _only(1, 1.0),
    "downsample_padding": _only(1, 0),
    "downsample_type": _only("conv"),
    "upsample_type": _only("conv"),
    "dropout": _number(0.0, 0, 1),
    "act_fn": _only("silu", "swish"),  # two names of one function
    "attention_head_dim": _count(8, null=True),
    "norm_num_groups": _count(32),
    "attn_norm_num_groups": _count(None, null=True),
    "norm_eps": _number(1e-5, 0, 1),
    "resnet_time_scale_shift": _only("default"),
    "add_attention": _only(True, False),
    "class_embed_type": _only(None),
    "num_class_embeds": _count(None, null=True),
    "num_train_timesteps": _count(None, null=True),  # the size of learned time embeddings, so without effect on ours
}
AUTOENCODER_KEYS: dict[str, Rule] = {
    "_class_name": _only("AutoencoderKL"),
    "sample_size": _size(32),
    "in_channels": _count(3),
    "out_channels": _count(3),
    "latent_channels": _count(4),
    "down_block_types": _list([ENCODER], (ENCODER,).__contains__, f"a list of {ENCODER}"),
    "up_block_types": _list([DECODER], (DECODER,).__contains__, f"a list of {DECODER}"),
    "block_out_channels": _widths([64]),
    "layers_per_block": _count(1, top=LAYERS),
    "act_fn": _only("silu", "swish"),
    "norm_num_groups": _count(32),
    "mid_block_add_attention": _only(True, False),
    "use_quant_conv": _only(True, False),
    "use_post_quant_conv": _only(True, False),
    "scaling_factor": (0.18215, lambda v: type(v) in (int, float) and 0 < v < LARGEST, f"a number in (0, {LARGEST})"),
    "shift_factor": (
        None,
        lambda v: v is None or (type(v) in (int, float) and -LARGEST < v < LARGEST),
        f"a number in ({-LARGEST}, {LARGEST}) or null",
    ),
    "latents_mean": _only(None),  # of a diffusion of latents, channel by channel
    "latents_std": _only(None),
    "force_upcast": _only(True, False),  # in half precision use float32, as ours is
}


# --- Reading


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
    _both_present(folder, "unet")
    return _loaded(folder, UNet, _arguments(folder / CONFIG))


def load_autoencoder(folder: str | Path) -> AutoencoderKL:
    """The autoencoder in a folder of published weights, on the CPU, in float32 and in evaluation mode.

    Args:
        folder: as in `load_unet`.
    Returns: the autoencoder, whose scaling_factor and shift_factor are the config's; null as a shift is 0.
    Raises:
        ValueError: as `load_unet`.
    """
    folder = Path(folder)
    _both_present(folder, "vae")
    config = _checked(folder / CONFIG, AUTOENCODER_KEYS, "this autoencoder", _autoencoder_contradictions)
    model = _loaded(folder, AutoencoderKL, _autoencoder_arguments(config))
    model.scaling_factor, model.shift_factor = float(config["scaling_factor"]), float(config["shift_factor"] or 0)
    return model


Network = TypeVar("Network", bound=nn.Module)


def _loaded(folder: Path, network: Callable[..., Network], arguments: dict[str, Any]) -> Network:
    """The network in a folder, made of the arguments that its config.json describes; its weights are checked first."""
    try:
        with torch.device("meta"):
            on_paper = network(**arguments)
    except ValueError as error:
        message = str(error)
        for ours, published in SAME.items():
            message = message.replace(f"{ours} = ", f"{published} = ")
        raise ValueError(f"{folder / CONFIG} describes a network that cannot be: {message}") from error
    weights = _read(folder / WEIGHTS, {name: tuple(p.shape) for name, p in on_paper.state_dict().items()})
    model = network(**arguments)
    model.load_state_dict(weights)
    return model.eval()


def _both_present(folder: Path, part: str) -> None:
    """Raise ValueError, with what there is instead, unless the folder has both files.

    Args:
        part: name of the folder in which a published pipeline has such a network.
    """
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise ValueError(_without(folder, name, part))


def _without(folder: Path, name: str, part: str) -> str:
    """What is said of a folder that lacks a file."""
    if not folder.is_dir():
        return f"{folder} is no folder; published weights are a folder with {CONFIG} and {WEIGHTS}"
    pickles = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLES)
    hint = ""
    if (folder / part / name).is_file():
        hint = f"; {folder / part} has one"
    elif name == WEIGHTS and pickles:
        hint = (
            f"; it has {', '.join(pickles[:3])}, but pickles are not read, since they can run code: "
            "take the safetensors file, or convert the weights"
        )
    return f"{folder} has no {name}{hint}"


def _arguments(path: Path) -> dict[str, Any]:
    """The arguments of `UNet` that a config.json describes; ValueError with all that cannot be represented."""
    config = _checked(path, KEYS, "this U-Net", _contradictions)
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


def _autoencoder_arguments(config: dict[str, Any]) -> dict[str, Any]:
    """The arguments of `AutoencoderKL` that a config describes."""
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


def _checked(
    path: Path, keys: dict[str, Rule], network: str, contradictions: Callable[[dict[str, Any]], list[str]]
) -> dict[str, Any]:
    """What a config.json says, defaults included; ValueError with all that the network cannot do.

    Args:
        keys: the rule of each key; network: its name in words; contradictions: see `_contradictions`.
    """
    given = _read_config(path)
    config = {key: default for key, (default, *_) in keys.items()} | given
    wrong = [
        f"{key} = {_short(config[key])} (allowed: {words})"
        for key, (_, legal, words) in keys.items()
        if not legal(config[key])
    ]
    wrong += [
        f"{_short(key)} = {_short(value)} is not a known key (allowed: to leave it out, if that changes nothing)"
        for key, value in given.items()
        if key not in keys and not key.startswith("_")
    ]
    wrong = wrong or contradictions(config)
    if wrong:
        raise ValueError(f"{path} describes what {network} cannot do: {_listed(wrong)}")
    return config


def _contradictions(config: dict[str, Any]) -> list[str]:
    """What is wrong with values that are legal one by one."""
    widths, down, up = config["block_out_channels"], config["down_block_types"], config["up_block_types"]
    groups, embedding = config["norm_num_groups"], 4 * widths[0]
    wrong = _other_lengths(config)
    for level, (going_down, going_up) in enumerate(zip(down, reversed(up), strict=False)):
        if DOWN.index(going_down) != UP.index(going_up):
            wrong.append(
                f"level {level} has {going_down} in down_block_types and {going_up} in up_block_types (allowed: "
                "attention on both ways or on none)"
            )
    wrong += _odd_widths(widths)
    if config["time_embedding_dim"] not in (None, embedding):
        wrong.append(f"time_embedding_dim = {config['time_embedding_dim']} (allowed: null or {embedding})")
    if config["attn_norm_num_groups"] not in (None, groups):
        wrong.append(f"attn_norm_num_groups = {config['attn_norm_num_groups']} (allowed: null or {groups})")
    return wrong


def _autoencoder_contradictions(config: dict[str, Any]) -> list[str]:
    """The same, of an autoencoder."""
    wrong = _other_lengths(config) + _odd_widths(config["block_out_channels"])
    for key, like in (("out_channels", "in_channels"), ("use_post_quant_conv", "use_quant_conv")):
        if config[key] != config[like]:
            wrong.append(f"{key} = {_short(config[key])} (allowed: {_short(config[like])}, as {like})")
    return wrong


def _other_lengths(config: dict[str, Any]) -> list[str]:
    """What is wrong with lists that have an entry for each level."""
    lists = [config[key] for key in ("block_out_channels", "down_block_types", "up_block_types")]
    lengths = [len(entries) for entries in lists]
    if len(set(lengths)) == 1:
        return []
    return [
        "block_out_channels, down_block_types and up_block_types have {}, {} and {} entries (allowed: as many of "
        "each)".format(*lengths)
    ]


def _odd_widths(widths: list[int]) -> list[str]:
    """What is wrong with widths that the first does not divide."""
    odd = [width for width in widths if width % widths[0]]
    return [f"block_out_channels has {odd[0]} (allowed: multiples of the first, {widths[0]})"] if odd else []


def _read_config(path: Path) -> dict[str, Any]:
    """The JSON object in a file of bounded size; ValueError if it is none."""
    with open(path, "rb") as file:
        text = file.read(CONFIG_BYTES + 1)
    if len(text) > CONFIG_BYTES:
        raise ValueError(f"{path} is larger than {CONFIG_BYTES} bytes, which no config of a network is")
    try:
        config = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path} holds a JSON {type(config).__name__}, not an object with the network's configuration")
    return config


def _read(path: Path, shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """The weights under our names, from a published file; our names and shapes are given.

    Raises: ValueError that lists what is missing, unexpected, and of another shape or type.
    """
    ours = {published_name(name): name for name in shapes}
    found, unexpected, wrong = {}, [], []
    try:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (it is no dictionary)
                mine = ours.get(re.sub(r"(?<=\.)(query|key|value|proj_attn)(?=\.)", lambda m: FORMERLY[m[0]], name))
                if mine is None or mine in found:
                    unexpected.append(_short(name))
                    continue
                found[mine] = name
                piece, shape = file.get_slice(name), shapes[mine]
                as_convolution = (*shape, 1, 1) if "attention" in mine and len(shape) == 2 else shape
                if tuple(piece.get_shape()) not in (shape, as_convolution):
                    wrong.append(f"{name} {tuple(piece.get_shape())}, the config's is {shape}")
                elif piece.get_dtype() not in ("F64", "F32", "F16", "BF16"):
                    wrong.append(f"{name} of type {piece.get_dtype()}, not F64, F32, F16 or BF16")
            missing = [published_name(name) for name in shapes if name not in found]
            problems = {"missing": missing, "unexpected": unexpected, "of another shape or type": wrong}
            if any(problems.values()):
                message = "; ".join(f"{len(v)} {k}: {_listed(v, ', ')}" for k, v in problems.items() if v)
                raise ValueError(f"{path} does not fit its {CONFIG}: {message}")
            return {mine: file.get_tensor(name).reshape(shapes[mine]) for mine, name in found.items()}
    except SafetensorError as error:
        raise ValueError(f"{path} is no whole safetensors file: {error}") from error


def published_name(name: str) -> str:
    """Our name of a parameter -> the published one."""
    for ours, published in NAMES:
        name = re.sub(ours, published, name)
    return name


def _short(value: object) -> str:
    """What a file says, as JSON, cut where it becomes long."""
    try:
        text = json.dumps(value)
    except RecursionError:
        return "(nested too deeply to show)"
    return text if len(text) <= 200 else f"{text[:200]}..."


def _listed(items: list[str], between: str = "; ", most: int = 10) -> str:
    """The items, or the first of many."""
    return between.join(items[:most]) + (f"{between}... ({len(items) - most} more)" if len(items) > most else "")


# --- Writing


def save_unet(model: UNet, folder: str | Path) -> None:
    """Write a network as config.json and diffusion_pytorch_model.safetensors; `load_unet` reads it back.

    A network with another time_offset than -1 is written exactly, up to rounding, too: see `_counted_from_0`.

    Args:
        model: any `UNet` that the published form can describe; parameters keep their dtype.
        folder: made if it is missing. Both files are on the disk before either takes its name, and config.json takes it
            last: whatever interrupts this, the folder holds the old network, the new one, or none, never a mixture.
    Raises: ValueError for a network that the published form cannot describe, before anything is written.
    """
    config, weights = _describe(model), _published(model)
    first, embedding = "time_embedding.linear_1.weight", model.time_embedding[0]
    assert isinstance(embedding, SinusoidalEmbedding)
    weights[first] = _counted_from_0(
        weights[first], embedding.omega.cpu(), model.time_offset, embedding.flip_sin_to_cos
    )
    _write(Path(folder), config, weights)


def save_autoencoder(model: AutoencoderKL, folder: str | Path) -> None:
    """Write an autoencoder as config.json and diffusion_pytorch_model.safetensors; `load_autoencoder` reads it back.

    A learned scale (`log_scale`) is no part of the form and is left out: it belongs to a loss, and changes neither
    half.

    Args:
        model: any `AutoencoderKL` that the published form can describe; parameters keep their dtype.
        folder: as in `save_unet`.
    Raises: ValueError for one that the published form cannot describe, before anything is written.
    """
    config, weights = _describe_autoencoder(model), _published(model)
    weights.pop("log_scale", None)
    _write(Path(folder), config, weights)


def _published(model: nn.Module) -> dict[str, Tensor]:
    """The weights of a network under their published names."""
    return {published_name(name): p.detach().cpu().contiguous() for name, p in model.state_dict().items()}


def _write(folder: Path, config: dict[str, Any], weights: dict[str, Tensor]) -> None:
    """Both files of a folder, which is made if it is missing."""
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    folder.mkdir(parents=True, exist_ok=True)
    _replace(folder, {WEIGHTS: save(weights, metadata={"format": "pt"}), CONFIG: text.encode()})


def _describe_autoencoder(model: AutoencoderKL) -> dict[str, Any]:
    """The config.json of an autoencoder; ValueError if there is none."""
    stages: list[Any] = [*model.encoder.down]
    widths = [stage.residual[0].conv_1.out_channels for stage in stages]
    scaling, shift = float(model.scaling_factor), float(model.shift_factor)
    obstacles = _odd_widths(widths)
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


def _describe(model: UNet) -> dict[str, Any]:
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


def _replace(folder: Path, files: dict[str, bytes]) -> None:
    """Write files under temporary names, flush them to disk, and only then give them theirs, in this order."""
    temporary = {name: folder / f".{name}.{os.getpid()}" for name in files}
    try:
        for name, data in files.items():
            with open(temporary[name], "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        (folder / CONFIG).unlink(missing_ok=True)  # from here to the end the folder is refused, rather than misread
        for name in files:
            os.replace(temporary[name], folder / name)
    finally:
        for path in temporary.values():
            path.unlink(missing_ok=True)
