"""A folder of published weights: rules of its config, names of its weights, reading and writing."""

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from safetensors.torch import save
from torch import Tensor, device, nn

from models.pretrained.weights import KINDS, PICKLES, WEIGHTS, Piece, names, opened, read_object, weights_in

CONFIG = "config.json"
LARGEST, LEVELS, LAYERS = 2**16, 16, 64  # above these a config is no network but a mistake

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
    (r"(\.(?:resnets|\w+samplers)\.\d+\.)(norm|conv)_(\d)\.", r"\1\2\3."),
    (r"(\.(?:resnets|\w+samplers)\.\d+\.)embedding\.", r"\1time_emb_proj."),
    (r"(\.resnets\.\d+\.)shortcut\.", r"\1conv_shortcut."),
    (r"(\.attentions\.\d+\.)norm\.", r"\1group_norm."),
    (r"(\.attentions\.\d+\.)norm_in\.", r"\1norm."),  # of a transformer
    (r"(\.attentions\.\d+\.)blocks\.", r"\1transformer_blocks."),
    (r"(\.transformer_blocks\.\d+\.)norm_(\d)\.", r"\1norm\2."),
    (r"(\.transformer_blocks\.\d+\.)self_attention\.", r"\1attn1."),
    (r"(\.transformer_blocks\.\d+\.)cross_attention\.", r"\1attn2."),
    (r"(\.transformer_blocks\.\d+\.)feed_forward\.gated\.", r"\1ff.net.0.proj."),
    (r"(\.transformer_blocks\.\d+\.)feed_forward\.back\.", r"\1ff.net.2."),
    (r"(\.attentions\.\d+\.(?:transformer_blocks\.\d+\.attn\d\.)?)to_out\.", r"\1to_out.0."),
]
SAME = {  # our arguments' names in a config
    "image_size": "sample_size",
    "groups": "norm_num_groups",
    "head_channels": "attention_head_dim",
    "heads": "attention_head_dim",
}
FORMERLY = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}  # old published -> published


# --- Rules of a config

Rule = tuple[Any, Callable[[Any], bool], str]  # of a key: its default, a value's test, the test in words


def only(*values: object) -> Rule:
    """Return the rule for one of these values; the first is the default. JSON's true is not 1 here."""
    return values[0], lambda v: (type(v), v) in [(type(a), a) for a in values], " or ".join(map(json.dumps, values))


def a_count(default: object, top: int = LARGEST, null: bool = False) -> Rule:
    """Return the rule for an integer in 1..top, or null where that has a meaning."""
    words = f"an integer in 1..{top}" + (" or null" if null else "")
    return default, lambda v: (null and v is None) or (type(v) is int and 1 <= v <= top), words


def a_number(default: float, low: float, high: float) -> Rule:
    """Return the rule for a number, the upper bound excluded."""
    return default, lambda v: type(v) in (int, float) and low <= v < high, f"a number in [{low}, {high})"


def a_list(default: list[str] | list[int], test: Callable[[Any], bool], words: str) -> Rule:
    """Return the rule for a list with one entry a level."""
    return default, lambda v: isinstance(v, list) and 1 <= len(v) <= LEVELS and all(map(test, v)), words


def each_level(rule: Rule) -> Rule:
    """Return the rule for one value for all levels, or a list with one a level."""
    default, legal, words = rule
    many = a_list([], legal, "")[1]
    return default, lambda v: many(v) if isinstance(v, list) else legal(v), f"{words}, or a list of them, one a level"


_, is_count, COUNT = a_count(None)


def a_size(default: int | None) -> Rule:
    """Return the rule for a size in pixels, or two."""
    words = f"{COUNT}, or two of them [height, width]"
    return default, lambda v: is_count(v) or (isinstance(v, list) and len(v) == 2 and all(map(is_count, v))), words


def some_widths(default: list[int]) -> Rule:
    """Return the rule for the channels of each level."""
    return a_list(default, is_count, f"a list of up to {LEVELS}, each {COUNT}")


def checked(
    path: Path, keys: dict[str, Rule], network: str, contradictions: Callable[[dict[str, Any]], list[str]]
) -> dict[str, Any]:
    """Return the settings of a config.json, defaults included; ValueError with all that the network cannot do.

    Args:
        keys: the rule of each key; network: its name in words; contradictions: see `contradictions`.
    """
    stated = read_object(path, "the network's configuration")
    config = {key: default for key, (default, *_) in keys.items()} | stated
    wrong = [
        f"{key} = {short(config[key])} (allowed: {words})"
        for key, (_, legal, words) in keys.items()
        if not legal(config[key])
    ]
    wrong += [
        f"{short(key)} = {short(value)} is not a known key (allowed: to leave it out, if that changes nothing)"
        for key, value in stated.items()
        if key not in keys and not key.startswith("_")
    ]
    wrong = wrong or contradictions(config)
    if wrong:
        raise ValueError(f"{path} describes what {network} cannot do: {listed(wrong)}")
    return config


def other_lengths(config: dict[str, Any], *optional: str) -> list[str]:
    """Return messages about lists that have no entry for each level.

    Args:
        optional: keys that may have one value for all levels instead.
    """
    levels = ("block_out_channels", "down_block_types", "up_block_types")
    lengths = [len(config[key]) for key in levels]
    if len(set(lengths)) > 1:
        return [
            "block_out_channels, down_block_types and up_block_types have {}, {} and {} entries (allowed: as many of "
            "each)".format(*lengths)
        ]
    return [
        f"{key} has {len(config[key])} entries (allowed: one value, or {lengths[0]} entries, as block_out_channels)"
        for key in optional
        if isinstance(config[key], list) and len(config[key]) != lengths[0]
    ]


def odd_widths(widths: list[int]) -> list[str]:
    """Return messages about widths that the first does not divide."""
    odd = [width for width in widths if width % widths[0]]
    return [f"block_out_channels has {odd[0]} (allowed: multiples of the first, {widths[0]})"] if odd else []


def short(value: object) -> str:
    """Return a value of a file as JSON, cut where it becomes long."""
    try:
        text = json.dumps(value)
    except RecursionError:
        return "(nested too deeply to show)"
    return text if len(text) <= 200 else f"{text[:200]}..."


def listed(items: list[str], between: str = "; ", most: int = 10) -> str:
    """Return the items, joined, or the first of many."""
    return between.join(items[:most]) + (f"{between}... ({len(items) - most} more)" if len(items) > most else "")


# --- Reading


Network = TypeVar("Network", bound=nn.Module)


def loaded(weights: Path, network: Callable[..., Network], arguments: dict[str, Any]) -> Network:
    """Build the network that a config describes, with weights of a file, which are checked first."""
    try:
        with device("meta"):
            on_paper = network(**arguments)
    except ValueError as error:
        message = str(error)
        for ours, published in SAME.items():
            message = message.replace(f"{ours} = ", f"{published} = ")
        raise ValueError(f"{weights.parent / CONFIG} describes an impossible network: {message}") from error
    tensors = fitting(weights, {name: tuple(p.shape) for name, p in on_paper.state_dict().items()})
    model = network(**arguments)
    model.load_state_dict(tensors)
    return model.eval()


def both_present(folder: Path, part: str, variant: str | None = None) -> Path:
    """Return the file of weights of a folder that has a config too; else ValueError, with what there is instead.

    Args:
        part: name of the folder in which a published pipeline has such a network.
        variant: see `models.pretrained.weights.weights_in`.
    """
    weights = weights_in(folder, variant)
    if not (folder / CONFIG).is_file():
        raise ValueError(_without(folder, CONFIG, part, (folder / part / CONFIG).is_file()))
    if weights is None:
        raise ValueError(_without(folder, names(variant)[0], part, weights_in(folder / part, variant) is not None))
    return weights


def _without(folder: Path, name: str, part: str, below: bool) -> str:
    """Return a message about a folder that lacks a file, which may be in a subfolder."""
    if not folder.is_dir():
        return f"{folder} is no folder; published weights are a folder with {CONFIG} and {WEIGHTS}"
    there = sorted(path.name for path in folder.iterdir() if path.suffix in (".safetensors", *PICKLES))
    hint = ""
    if below:
        hint = f"; {folder / part} has one"
    elif name != CONFIG and there:
        hint = f"; it has {', '.join(there[:3])}, but read are only {WEIGHTS}, its shards, variants and .bin"
    return f"{folder} has no {name}{hint}"


def published_name(name: str) -> str:
    """Return the published name of a parameter, given ours."""
    for ours, published in NAMES:
        name = re.sub(ours, published, name)
    return name


def current_name(name: str) -> str:
    """Return the current published name, given one of any version."""
    return re.sub(r"(?<=\.)(query|key|value|proj_attn)(?=\.)", lambda m: FORMERLY[m[0]], name)


def fitting(
    path: Path,
    shapes: dict[str, tuple[int, ...]],
    published: Callable[[str], str] = published_name,
    current: Callable[[str], str | None] = current_name,
) -> dict[str, Tensor]:
    """Return the weights of a published file under our names, given our names and shapes.

    Args:
        published: our name -> the published one.
        current: a name in a file of any version -> the published one; None for a name without meaning.
    Raises: ValueError that lists what is missing, unexpected, and of another shape or type.
    """
    ours = {published(name): name for name in shapes}
    found: dict[str, Piece] = {}
    unexpected, wrong = [], []
    with opened(path) as pieces:
        for name, piece in pieces.items():
            there = current(name)
            if there is None:
                continue
            mine = ours.get(there)
            if mine is None or mine in found:
                unexpected.append(short(name))
                continue
            found[mine], shape = piece, shapes[mine]
            as_convolution = (*shape, 1, 1) if "attention" in mine and len(shape) == 2 else shape
            if piece.shape not in (shape, as_convolution):
                wrong.append(f"{name} {piece.shape}, the config's is {shape}")
            elif piece.kind not in KINDS.values():
                wrong.append(f"{name} of type {piece.kind}, not F64, F32, F16 or BF16")
        missing = [published(name) for name in shapes if name not in found]
        problems = {"missing": missing, "unexpected": unexpected, "of another shape or type": wrong}
        if any(problems.values()):
            message = "; ".join(f"{len(v)} {k}: {listed(v, ', ')}" for k, v in problems.items() if v)
            raise ValueError(f"{path} does not fit its {CONFIG}: {message}")
        return {mine: piece.read().reshape(shapes[mine]) for mine, piece in found.items()}


# --- Writing


def published_weights(model: nn.Module) -> dict[str, Tensor]:
    """Return the weights of a network under their published names."""
    return {published_name(name): p.detach().cpu().contiguous() for name, p in model.state_dict().items()}


def write(folder: Path, config: dict[str, Any], weights: dict[str, Tensor], name: str = WEIGHTS) -> None:
    """Write both files of a folder, which is made if it is missing; `name` is that of the weights."""
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    folder.mkdir(parents=True, exist_ok=True)
    _replace(folder, {name: save(weights, metadata={"format": "pt"}), CONFIG: text.encode()})


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
