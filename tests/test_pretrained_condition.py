"""models/pretrained/: the published U-Net of a text written out from its weights, its config, and its counts."""

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_pretrained import files, reconfigured, write
from torch import Tensor, nn
from torch.nn import functional as F

from ddpm.data.batch import Condition
from models.pretrained import CONFIG, WEIGHTS, load_unet, published_name, save_unet
from models.pretrained import unet_2d_condition as form
from models.pretrained.unet import arguments
from models.unet import UNet

D, L, B = 6, 5, 2
PLAIN, CROSS = ("DownBlock2D", "UpBlock2D"), ("CrossAttnDownBlock2D", "CrossAttnUpBlock2D")


def tiny(attended: tuple = (1, 0), **options) -> dict:
    """A config as published."""
    kinds = [CROSS if a else PLAIN for a in attended]
    return {
        "_class_name": "UNet2DConditionModel",
        "_diffusers_version": "0.6.0",
        "act_fn": "silu",
        "attention_head_dim": 2,
        "block_out_channels": [8, 16],
        "center_input_sample": False,
        "cross_attention_dim": D,
        "down_block_types": [down for down, _ in kinds],
        "downsample_padding": 1,
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "in_channels": 4,
        "layers_per_block": 1,
        "mid_block_scale_factor": 1,
        "norm_eps": 1e-05,
        "norm_num_groups": 4,
        "out_channels": 4,
        "sample_size": 8,
        "up_block_types": [up for _, up in reversed(kinds)],
    } | options


VERSION_1 = {
    "_class_name": "UNet2DConditionModel",
    "act_fn": "silu",
    "attention_head_dim": 8,
    "block_out_channels": [320, 640, 1280, 1280],
    "center_input_sample": False,
    "cross_attention_dim": 768,
    "down_block_types": [*[CROSS[0]] * 3, PLAIN[0]],
    "downsample_padding": 1,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "in_channels": 4,
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-05,
    "norm_num_groups": 32,
    "out_channels": 4,
    "sample_size": 64,
    "up_block_types": [PLAIN[1], *[CROSS[1]] * 3],
}
VERSION_2 = VERSION_1 | {
    "attention_head_dim": [5, 10, 20, 20],
    "cross_attention_dim": 1024,
    "dual_cross_attention": False,
    "num_class_embeds": None,
    "only_cross_attention": False,
    "sample_size": 96,
    "upcast_attention": True,
    "use_linear_projection": True,
}


# --- The published network, by hand


def published(
    w: dict[str, Tensor], config: dict, x: Tensor, t: Tensor, tokens: Tensor, y: Tensor | None = None
) -> Tensor:
    """The published forward pass; t from 0. What a block has is told by its weights."""

    def conv(name: str, h: Tensor, **options) -> Tensor:
        return F.conv2d(h, w[f"{name}.weight"], w[f"{name}.bias"], **options)

    def linear(name: str, h: Tensor) -> Tensor:
        return h @ w[f"{name}.weight"].T + w.get(f"{name}.bias", 0)

    def norm(name: str, h: Tensor, eps: float) -> Tensor:
        return F.group_norm(h, config["norm_num_groups"], w[f"{name}.weight"], w[f"{name}.bias"], eps)

    def layer_norm(name: str, h: Tensor) -> Tensor:
        h = (h - h.mean(-1, keepdim=True)) / (h.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
        return h * w[f"{name}.weight"] + w[f"{name}.bias"]

    def resnet(name: str, h: Tensor) -> Tensor:
        inner = conv(f"{name}.conv1", F.silu(norm(f"{name}.norm1", h, config["norm_eps"])), padding=1)
        told = linear(f"{name}.time_emb_proj", F.silu(emb))[:, :, None, None]
        if config.get("resnet_time_scale_shift") == "scale_shift":
            scale, shift = told.chunk(2, dim=1)
            inner = norm(f"{name}.norm2", inner, config["norm_eps"]) * (1 + scale) + shift
        else:
            inner = norm(f"{name}.norm2", inner + told, config["norm_eps"])
        inner = conv(f"{name}.conv2", F.silu(inner), padding=1)
        return inner + (conv(f"{name}.conv_shortcut", h) if f"{name}.conv_shortcut.weight" in w else h)

    def attention(name: str, h: Tensor, source: Tensor, heads: int) -> Tensor:
        if w[f"{name}.to_k.weight"].shape[1] != source.shape[-1]:
            source = tokens  # only_cross_attention
        q, k, v = linear(f"{name}.to_q", h), linear(f"{name}.to_k", source), linear(f"{name}.to_v", source)
        d, taken = h.shape[-1] // heads, []
        for i in range(0, h.shape[-1], d):
            score = q[..., i : i + d] @ k[..., i : i + d].transpose(1, 2) / math.sqrt(d)
            taken.append(score.softmax(-1) @ v[..., i : i + d])
        return linear(f"{name}.to_out.0", torch.cat(taken, -1))

    def transformer(name: str, x: Tensor, level: int) -> Tensor:
        if f"{name}.proj_in.weight" not in w:
            return x
        heads = config["attention_head_dim"]
        heads = heads if isinstance(heads, int) else heads[level]
        by_conv = w[f"{name}.proj_in.weight"].ndim == 4
        h = norm(f"{name}.norm", x, 1e-6)
        h = (conv(f"{name}.proj_in", h) if by_conv else h).flatten(2).transpose(1, 2)
        h = h if by_conv else linear(f"{name}.proj_in", h)
        for i in range(9):
            part = f"{name}.transformer_blocks.{i}"
            if f"{part}.norm1.weight" in w:
                inner = layer_norm(f"{part}.norm1", h)
                h = h + attention(f"{part}.attn1", inner, inner, heads)
                h = h + attention(f"{part}.attn2", layer_norm(f"{part}.norm2", h), tokens, heads)
                value, gate = linear(f"{part}.ff.net.0.proj", layer_norm(f"{part}.norm3", h)).chunk(2, -1)
                h = h + linear(f"{part}.ff.net.2", value * F.gelu(gate))
        h = (h if by_conv else linear(f"{name}.proj_out", h)).transpose(1, 2).reshape(x.shape)
        return x + (conv(f"{name}.proj_out", h) if by_conv else h)

    def enlarged(h: Tensor, height: int, width: int) -> Tensor:
        rows, columns = torch.arange(height) * h.shape[2] // height, torch.arange(width) * h.shape[3] // width
        return h[:, :, rows][..., columns]

    half = config["block_out_channels"][0] // 2
    angle = t[:, None] * torch.exp(-math.log(10000) * torch.arange(half) / (half - config["freq_shift"]))
    emb = torch.cat([angle.cos(), angle.sin()] if config["flip_sin_to_cos"] else [angle.sin(), angle.cos()], 1)
    emb = linear("time_embedding.linear_2", F.silu(linear("time_embedding.linear_1", emb)))
    if y is not None:
        emb = emb + w["class_embedding.weight"][y]

    h = conv("conv_in", x, padding=1)
    skips, levels = [h], len(config["block_out_channels"])
    layers = config["layers_per_block"]
    layers = [layers] * levels if isinstance(layers, int) else layers
    for i in range(levels):
        for j in range(layers[i]):
            h = transformer(f"down_blocks.{i}.attentions.{j}", resnet(f"down_blocks.{i}.resnets.{j}", h), i)
            skips.append(h)
        if i < levels - 1:
            h = conv(f"down_blocks.{i}.downsamplers.0.conv", h, stride=2, padding=1)
            skips.append(h)
    h = transformer("mid_block.attentions.0", resnet("mid_block.resnets.0", h), levels - 1)
    h = resnet("mid_block.resnets.1", h)
    for i in range(levels):
        level = levels - 1 - i
        for j in range(layers[level] + 1):
            h = resnet(f"up_blocks.{i}.resnets.{j}", torch.cat([h, skips.pop()], 1))
            h = transformer(f"up_blocks.{i}.attentions.{j}", h, level)
        if i < levels - 1:
            h = conv(f"up_blocks.{i}.upsamplers.0.conv", enlarged(h, *skips[-1].shape[2:]), padding=1)
    return conv("conv_out", F.silu(norm("conv_norm_out", h, config["norm_eps"])), padding=1)


def random_weights(tmp_path: Path, config: dict) -> dict[str, Tensor]:
    """Of the published names, that keep activations near one. Names and shapes are proven by test_published.py."""
    (tmp_path / CONFIG).write_text(json.dumps(config))
    with torch.device("meta"):
        shapes = {published_name(k): v.shape for k, v in UNet(**arguments(tmp_path / CONFIG)).state_dict().items()}
    weights = {}
    for name, shape in shapes.items():
        w = torch.randn(shape)
        weights[name] = (
            w / math.sqrt(math.prod(shape[1:])) if w.ndim > 1 else 0.3 * w + ("norm" in name and "weight" in name)
        )
    return weights


@pytest.fixture
def folder(tmp_path) -> Path:
    return write(tmp_path / "net", tiny(), random_weights(tmp_path, tiny()))


@torch.no_grad()
def difference(net: UNet, weights: dict[str, Tensor], config: dict, size: tuple[int, int] = (8, 8)) -> float:
    """The largest |ours(x, t) - published(x, t - 1)|, in units of the largest output."""
    x, tokens, t = torch.randn(B, config["in_channels"], *size), torch.randn(B, L, D), torch.tensor([1, 30])
    y = torch.tensor([2, 0]) if config.get("num_class_embeds") else None
    x_t, image = x.tensor_split([net.in_channels], dim=1)
    ours = net(x_t, t, Condition(tokens=tokens, classes=y, image=image if net.condition_channels else None))
    theirs = published(weights, config, x, t - 1, tokens, y)
    assert ours.shape == theirs.shape == (B, config["out_channels"], *size) and 0.1 < theirs.std() < 10
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


def slow(*values: object):
    """As the first ones, of what test_published.py compares with the library too."""
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("config", "size"),
    [
        (tiny(attention_head_dim=[1, 4], use_linear_projection=True, upcast_attention=True), (7, 5)),
        slow(tiny((1, 1), transformer_layers_per_block=[1, 2], only_cross_attention=[True, False]), (3, 8)),
        slow(tiny(), (8, 8)),
        slow(tiny((0, 1), in_channels=9, layers_per_block=[1, 2], num_class_embeds=3), (8, 8)),
        slow(tiny(in_channels=5, resnet_time_scale_shift="scale_shift", freq_shift=1, flip_sin_to_cos=False), (8, 8)),
        slow(tiny((0, 0), out_channels=8, time_embedding_dim=32, mid_block_only_cross_attention=False), (8, 8)),
        slow(tiny((1, 1, 0), block_out_channels=[8, 16, 8], sample_size=[5, 7], only_cross_attention=True), (5, 7)),
    ],
    ids=lambda v: " ".join(f"{k}={x}" for k, x in v.items() if x != tiny().get(k)) if isinstance(v, dict) else str(v),
)
def test_ours_at_t_is_the_published_network_at_t_minus_1(tmp_path, config, size):
    weights = random_weights(tmp_path, config)
    net = load_unet(write(tmp_path, config, weights))
    assert difference(net, weights, config, size) < 1e-5
    assert net.time_offset == -1 and not net.training and net.any_size


@pytest.mark.parametrize(
    "change", [{"attention_head_dim": 4}, {"norm_eps": 0.1}, {"freq_shift": 1}, {"flip_sin_to_cos": False}], ids=str
)
def test_every_detail_that_fits_all_weights_matters(folder, change):
    assert difference(load_unet(reconfigured(folder, **change)), load_file(folder / WEIGHTS), tiny()) > 1e-3


@pytest.mark.parametrize(("config", "count"), [(VERSION_1, 859_520_964), (VERSION_2, 865_910_724)], ids=["1.5", "2.1"])
def test_counts_of_published_networks(tmp_path, config, count):
    (tmp_path / CONFIG).write_text(json.dumps(config))
    with torch.device("meta"):
        net = UNet(**arguments(tmp_path / CONFIG))
    assert sum(p.numel() for p in net.parameters()) == count
    assert net.takes == ("tokens",) and len(net.middle_attention.blocks) == 1
    names = {published_name(name) for name in net.state_dict()}
    assert "up_blocks.3.attentions.2.transformer_blocks.0.attn2.to_out.0.bias" in names
    assert "mid_block.attentions.0.transformer_blocks.0.ff.net.0.proj.weight" in names
    assert {n for n in names if "proj_in.bias" in n and n.startswith("down")} == {
        f"down_blocks.{i}.attentions.{j}.proj_in.bias" for i in range(3) for j in range(2)
    }


def test_what_a_config_leaves_out_is_the_default_of_the_published_class(tmp_path):
    (tmp_path / CONFIG).write_text(json.dumps({"_class_name": form.CLASS, "sample_size": 64}))
    told = arguments(tmp_path / CONFIG)
    assert told["token_channels"] == 1280 and told["heads"] == 8 and told["attention_resolutions"] == [64, 32, 16]
    (tmp_path / CONFIG).write_text(json.dumps(VERSION_1 | {"cross_attention_dim": 1280}))
    assert told == arguments(tmp_path / CONFIG)


# --- Written and read again


@pytest.mark.parametrize(
    "options",
    [
        slow({}),
        {"heads": [1, 4], "linear_projection": True, "attention_resolutions": [8, 4], "transformer_layers": [1, 2]},
        {"condition_channels": 5, "num_classes": 3, "only_cross_attention": True, "blocks": [1, 2]},
        slow({"head_channels": 4, "any_size": True, "image_size": (5, 7), "attention_resolutions": [7]}),
        slow({"scale_shift": True, "out_channels": 8, "attention_resolutions": []}),
    ],
    ids=str,
)
@torch.no_grad()
def test_saved_loaded_and_saved_again(tmp_path, options):
    small = {"image_size": 8, "in_channels": 4, "channels": 8, "channel_mults": (1, 2), "blocks": 1, "groups": 4}
    net = UNet(**small | {"attention_resolutions": [8], "token_channels": D, "dropout": 0.25} | options).eval()
    for p in net.parameters():
        nn.init.normal_(p, std=0.2)
    save_unet(net, tmp_path / "a")
    again = load_unet(tmp_path / "a")
    x, t = torch.randn(B, 4, *net.image_size), torch.tensor([1, 90])
    image = torch.randn(B, 5, *net.image_size) if net.condition_channels else None
    y = torch.tensor([0, 2]) if net.num_classes else None
    told = Condition(tokens=torch.randn(B, L, D), image=image, classes=y)
    torch.testing.assert_close(again(x, t, told), net(x, t, told), rtol=1e-4, atol=1e-4)
    save_unet(again, tmp_path / "b")
    assert files(tmp_path / "a") == files(tmp_path / "b") and again.middle_1.dropout.p == 0.25


def test_a_saved_network_is_the_published_one(folder, tmp_path):
    save_unet(load_unet(folder), tmp_path / "saved")
    saved = json.loads((tmp_path / "saved" / CONFIG).read_text())
    new = {
        "dropout": 0.0,
        "mid_block_type": "UNetMidBlock2DCrossAttn",
        "num_class_embeds": None,
        "only_cross_attention": False,
        "resnet_time_scale_shift": "default",
        "transformer_layers_per_block": 1,
        "use_linear_projection": False,
    }
    assert saved == {k: v for k, v in tiny().items() if k != "_diffusers_version"} | new
    before, after = load_file(folder / WEIGHTS), load_file(tmp_path / "saved" / WEIGHTS)
    assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"middle_attention": False}, r"middle_attention = false \(allowed: true\)"),
        ({"out_channels": 3}, r"in_channels = 4 and condition_channels = 0 with out_channels = 3 \(allowed: 3 and 1\)"),
        ({"downsample_padding": 0}, r"levels joined otherwise .*resample = conv, downsample_padding = 1\)"),
        ({"resample": "resnet"}, r"levels joined otherwise"),
        ({"drop": 0.1}, r"drop = 0.1 \(allowed: 0, since the form has no learned null\)"),
        ({"num_classes": [3, 2]}, r"num_classes = \(3, 2\) \(allowed: one label\)"),
        ({"patch": 2, "attention_resolutions": []}, r"patch = 2 \(allowed: 1\)"),
        ({"token_channels": 0, "any_size": True}, r"any_size = true \(allowed: false\)"),
    ],
    ids=str,
)
def test_networks_that_the_form_cannot_describe_are_not_written(tmp_path, options, message):
    small = {"image_size": 8, "in_channels": 4, "channels": 8, "channel_mults": (1, 2), "blocks": 1, "groups": 4}
    with pytest.raises(ValueError, match=f"cannot describe this network: {message}"):
        save_unet(UNet(**small | {"attention_resolutions": [4], "token_channels": D} | options), tmp_path / "new")
    assert not (tmp_path / "new").exists()


# --- Configs that are refused

COUNT = r"an integer in 1\.\.65536"
REFUSED = [
    ("sample_size", None, COUNT),
    ("in_channels", 0, COUNT),
    ("out_channels", "4", COUNT),
    ("center_input_sample", True, "false"),
    ("flip_sin_to_cos", 1, "true or false"),
    ("freq_shift", None, "a number in"),
    ("down_block_types", ["SimpleCrossAttnDownBlock2D", "DownBlock2D"], "a list of DownBlock2D and Cross"),
    ("mid_block_type", "UNetMidBlock2DSimpleCrossAttn", '"UNetMidBlock2DCrossAttn"'),
    ("mid_block_type", None, '"UNetMidBlock2DCrossAttn"'),
    ("up_block_types", ["UpBlock2D", "AttnUpBlock2D"], "a list of UpBlock2D and Cross"),
    ("only_cross_attention", None, "false or true, or a list"),
    ("only_cross_attention", [1, 0], "false or true, or a list"),
    ("block_out_channels", [8, 0], "a list of up to 16"),
    ("layers_per_block", 65, r"an integer in 1\.\.64, or a list"),
    ("downsample_padding", 0, "1"),
    ("mid_block_scale_factor", 2, "1 or 1.0"),
    ("dropout", 1, r"a number in \[0, 1\)"),
    ("act_fn", "gelu", '"silu" or "swish"'),
    ("norm_num_groups", None, COUNT),
    ("norm_eps", -1, r"a number in \[0, 1\)"),
    ("cross_attention_dim", [6, 6], COUNT),
    ("transformer_layers_per_block", [[1, 1], [1, 1]], r"an integer in 1\.\.64, or a list"),
    ("reverse_transformer_layers_per_block", [1, 1], "null"),
    ("encoder_hid_dim", 8, "null"),
    ("encoder_hid_dim_type", "text_proj", "null"),
    ("attention_head_dim", None, f"{COUNT}, or a list"),
    ("num_attention_heads", 2, "null"),
    ("dual_cross_attention", True, "false"),
    ("use_linear_projection", None, "false or true"),
    ("class_embed_type", "projection", "null"),
    ("num_class_embeds", 0, f"{COUNT} or null"),
    ("addition_embed_type", "text_time", "null"),
    ("addition_time_embed_dim", 256, "null"),
    ("addition_embed_type_num_heads", None, COUNT),
    ("projection_class_embeddings_input_dim", 8, "null"),
    ("class_embeddings_concat", True, "false"),
    ("upcast_attention", None, "false or true"),
    ("resnet_time_scale_shift", "spatial", '"default" or "scale_shift"'),
    ("resnet_skip_time_act", True, "false"),
    ("resnet_out_scale_factor", 1.4, "1.0 or 1"),
    ("time_embedding_type", "fourier", '"positional"'),
    ("time_embedding_dim", 8, "null or 32"),
    ("time_embedding_act_fn", "silu", "null"),
    ("timestep_post_act", "silu", "null"),
    ("time_cond_proj_dim", 256, "null"),
    ("conv_in_kernel", 5, "3"),
    ("conv_out_kernel", 1, "3"),
    ("attention_type", "gated", '"default"'),
    ("mid_block_only_cross_attention", True, "null or false"),
    ("cross_attention_norm", "layer_norm", "null"),
    ("upsample_type", "conv", "to leave it out"),
]


@pytest.fixture(scope="module")
def described(tmp_path_factory) -> Path:
    """A folder whose config is read before its weights are."""
    folder = tmp_path_factory.mktemp("described")
    (folder / WEIGHTS).touch()
    return folder


@pytest.mark.parametrize(("key", "value", "allowed"), REFUSED, ids=lambda v: str(v)[:30])
def test_values_that_this_network_cannot_represent(described, key, value, allowed):
    (described / CONFIG).write_text(json.dumps(tiny(**{key: value})))
    with pytest.raises(ValueError, match=rf"{CONFIG} describes what .*{key}\"? = .*\(allowed: {allowed}") as error:
        load_unet(described)
    assert f" = {json.dumps(value)}" in str(error.value)


def test_every_key_has_a_refused_value_above():
    assert form.KEYS.keys() - {"_class_name"} <= {key for key, *_ in REFUSED}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"up_block_types": [PLAIN[1]] * 2},
            "level 0 has CrossAttnDownBlock2D .* and UpBlock2D .*both ways or on none",
        ),
        ({"attention_head_dim": [1]}, "attention_head_dim has 1 entries .*one value, or 2 entries"),
        ({"only_cross_attention": [True] * 3}, "only_cross_attention has 3 entries"),
        ({"layers_per_block": [1]}, "layers_per_block has 1 entries"),
        ({"transformer_layers_per_block": [1] * 4}, "transformer_layers_per_block has 4 entries"),
        ({"block_out_channels": [8, 16, 16]}, "have 3, 2 and 2 entries"),
        ({"block_out_channels": [8, 12]}, "block_out_channels has 12 .*multiples of the first, 8"),
        ({"sample_size": 1}, "sample_size = 1 has levels of 1, 1 pixels, of which some are alike"),
        ({"attention_head_dim": 3}, "an impossible network: attention_head_dim = 3 does not divide the 8 channels"),
        ({"norm_num_groups": 3}, "an impossible network: norm_num_groups = 3 does not divide"),
    ],
    ids=str,
)
def test_values_that_contradict_each_other(described, options, message):
    (described / CONFIG).write_text(json.dumps(tiny(**options)))
    with pytest.raises(ValueError, match=message):
        load_unet(described)
