"""Our U-Nets against those of the library in which they are published, whose outputs are kept in published/unets.npz.

`python tests/test_published.py` writes that file; it needs the extra `peers`. Weights and inputs are not kept: both
sides make them from a seed, in the order of their names, so that a name of ours that differs shows in the output.
"""

import hashlib
import importlib
import importlib.util
import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from ddpm.data.batch import Condition
from models.pretrained import CONFIG, WEIGHTS, load_unet, published_name
from models.pretrained.unet import arguments
from models.unet import UNet

KEPT = Path(__file__).parent / "published" / "unets.npz"
D, L, B = 6, 5, 2  # of tokens; rows

TEXT = {
    "_class_name": "UNet2DConditionModel",
    "sample_size": 16,
    "block_out_channels": [8, 16, 16, 16],
    "norm_num_groups": 4,
    "layers_per_block": 1,
    "cross_attention_dim": D,
    "attention_head_dim": 2,
}
THREE = TEXT | {  # levels
    "block_out_channels": [8, 16, 16],
    "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
}
VERSION_2 = THREE | {"attention_head_dim": [1, 2, 4], "use_linear_projection": True}
IMAGES = {
    "_class_name": "UNet2DModel",
    "sample_size": 8,
    "block_out_channels": [8, 16],
    "norm_num_groups": 4,
    "layers_per_block": 1,
    "attention_head_dim": 4,
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
}
CASES: dict[str, tuple[dict, tuple[int, int]]] = {  # configs, and sizes of x_t
    "version 1": (TEXT, (8, 16)),
    "version 1, odd sizes": (THREE, (7, 10)),
    "version 2": (VERSION_2 | {"upcast_attention": True}, (9, 6)),
    "inpainting": (THREE | {"in_channels": 9, "sample_size": [15, 20]}, (15, 20)),
    "depth": (VERSION_2 | {"in_channels": 5, "transformer_layers_per_block": [1, 2, 2]}, (8, 8)),
    # the library lets the first attention look at tokens that the mask leaves out, ours does not: so no mask here
    "cross-attention alone": (THREE | {"only_cross_attention": [False, True, False], "layers_per_block": 2}, (8, 8)),
    "classes, a mask": (THREE | {"num_class_embeds": 3, "resnet_time_scale_shift": "scale_shift"}, (8, 8)),
    "variance learned": (THREE | {"out_channels": 8, "freq_shift": 1, "flip_sin_to_cos": False}, (8, 8)),
    "images": (IMAGES | {"downsample_padding": 0}, (8, 8)),
    "images, scale and shift": (
        IMAGES
        | {
            "resnet_time_scale_shift": "scale_shift",
            "attn_norm_num_groups": 4,
            "num_class_embeds": 3,
            "downsample_type": "resnet",
            "upsample_type": "resnet",
            "down_block_types": ["ResnetDownsampleBlock2D", "AttnDownBlock2D"],
            "up_block_types": ["AttnUpBlock2D", "ResnetUpsampleBlock2D"],
        },
        (8, 8),
    ),
}


def drawn(shapes: dict[str, tuple[int, ...]], seed: int) -> dict[str, Tensor]:
    """Normal numbers, the same with every version of numpy and torch."""
    random = np.random.RandomState(seed)  # whose stream is frozen
    return {name: torch.from_numpy(random.standard_normal(shapes[name])).float() for name in sorted(shapes)}


def weights(shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Such that activations stay near one and no part is without effect."""
    made = drawn(shapes, 0)
    for name, w in made.items():
        norm = "norm" in name and name.endswith("weight")
        made[name] = w / math.sqrt(math.prod(w.shape[1:])) if w.ndim > 1 else 0.3 * w + norm
    return made


def told(config: dict, size: tuple[int, int]) -> dict[str, Tensor]:
    """What a network is called with: x with all its channels, t from 0, and what its config asks for."""
    given = drawn({"x": (B, config["in_channels"], *size), "tokens": (B, L, D)}, 1)
    given["t"] = torch.tensor([3, 40])
    if "num_class_embeds" in config:
        given["classes"] = torch.tensor([2, 0])
        given["mask"] = torch.tensor([[True, True, False, True, False], [True] * L])
    return given


def shapes_of(state: dict[str, Tensor], name: Callable[[str], str] = str) -> dict[str, tuple[int, ...]]:
    return {name(key): tuple(x.shape) for key, x in state.items()}


def fingerprint(shapes: dict[str, tuple[int, ...]]) -> str:
    """Of all names and shapes."""
    return hashlib.sha256(json.dumps(sorted(shapes.items())).encode()).hexdigest()


def completed(config: dict) -> dict:
    """With the number of channels, which the two classes do not have the same of by default."""
    channels = 4 if config["_class_name"] == "UNet2DConditionModel" else 3
    return {"in_channels": channels, "out_channels": channels} | config


@torch.no_grad()
def of_the_library(config: dict, size: tuple[int, int]) -> tuple[Tensor, str]:
    """Its output, and the fingerprint of its parameters."""
    config = completed(config)
    settings = {key: value for key, value in config.items() if key != "_class_name"}
    net = getattr(importlib.import_module("diffusers"), config["_class_name"])(**settings).eval()
    shapes = shapes_of(net.state_dict())
    net.load_state_dict(weights(shapes))
    given = told(config, size)
    options = {"class_labels": given["classes"]} if "classes" in given else {}
    if "cross_attention_dim" in config:
        options["encoder_hidden_states"] = given["tokens"]
        if "mask" in given:
            options["encoder_attention_mask"] = given["mask"]
    return net(given["x"], given["t"], **options).sample, fingerprint(shapes)


@torch.no_grad()
def of_ours(folder: Path, config: dict, size: tuple[int, int]) -> tuple[Tensor, str]:
    """The same, of the network that is loaded from a folder."""
    config = completed(config)
    (folder / CONFIG).write_text(json.dumps(config))
    with torch.device("meta"):
        shapes = shapes_of(UNet(**arguments(folder / CONFIG)).state_dict(), published_name)
    save_file(weights(shapes), folder / WEIGHTS)
    net, given = load_unet(folder), told(config, size)
    x_t, image = given["x"].tensor_split([net.in_channels], dim=1)
    assert image.shape[1] == net.condition_channels
    y = given.get("classes")
    if net.token_channels:
        image = image if net.condition_channels else None
        y = Condition(classes=y, tokens=given["tokens"], mask=given.get("mask"), image=image)
    return net(x_t, given["t"] + 1, y), fingerprint(shapes)


def relative(ours: Tensor, theirs: Tensor) -> float:
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


SLOW = {"version 1", "depth", "cross-attention alone", "variance learned", "images"}  # together more than others show


@pytest.mark.parametrize("case", [pytest.param(c, marks=pytest.mark.slow) if c in SLOW else c for c in CASES])
def test_ours_is_the_published_network(case, tmp_path):
    with np.load(KEPT) as kept:
        theirs, parameters = torch.from_numpy(kept[case]), str(kept[f"{case}: parameters"])
    ours, own = of_ours(tmp_path, *CASES[case])
    assert own == parameters
    assert ours.shape == theirs.shape and relative(ours, theirs) < 1e-5


@pytest.mark.skipif(importlib.util.find_spec("diffusers") is None, reason="needs the extra peers")
@pytest.mark.parametrize("case", CASES)
def test_what_is_kept_is_what_the_library_says(case):
    output, parameters = of_the_library(*CASES[case])
    with np.load(KEPT) as kept:
        assert str(kept[f"{case}: parameters"]) == parameters
        assert relative(torch.from_numpy(kept[case]), output) < 1e-5


def write() -> None:
    """All outputs, in float32."""
    made = {}
    for case, (config, size) in CASES.items():
        output, parameters = of_the_library(config, size)
        made |= {case: output.numpy(), f"{case}: parameters": np.array(parameters)}
    KEPT.parent.mkdir(exist_ok=True)
    np.savez_compressed(KEPT, **made)


if __name__ == "__main__":
    write()
