"""models/pretrained/: the published network written out from its weights, names and counts, files that do not fit."""

import json
import math
import os
import pickle
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from models.pretrained import CONFIG, WEIGHTS, load_unet, published_name, save_unet
from models.pretrained import unet_2d as form
from models.pretrained.folder import short
from models.unet import UNet

PLAIN, ATTENTION = ("DownBlock2D", "UpBlock2D"), ("AttnDownBlock2D", "AttnUpBlock2D")


def config_of(size: int | list[int], widths: list[int], attended: list[int], **options) -> dict:
    """A config as published; `attended` holds 1 for each level with attention."""
    kinds = [ATTENTION if a else PLAIN for a in attended]
    return {
        "_class_name": "UNet2DModel",
        "_diffusers_version": "0.0.4",
        "act_fn": "silu",
        "attention_head_dim": None,
        "block_out_channels": widths,
        "center_input_sample": False,
        "down_block_types": [down for down, _ in kinds],
        "downsample_padding": 0,
        "flip_sin_to_cos": False,
        "freq_shift": 1,
        "in_channels": 3,
        "layers_per_block": 2,
        "mid_block_scale_factor": 1,
        "norm_eps": 1e-06,
        "norm_num_groups": 32,
        "out_channels": 3,
        "sample_size": size,
        "time_embedding_type": "positional",
        "up_block_types": [up for _, up in reversed(kinds)],
    } | options


def tiny(size: int | list[int] = 8, widths: tuple = (8, 16), attended: tuple = (0, 1), **options) -> dict:
    return config_of(size, list(widths), list(attended), **{"norm_num_groups": 4, "layers_per_block": 1} | options)


CIFAR = config_of(32, [128, 256, 256, 256], [0, 1, 0, 0])
CHURCH = config_of(256, [128, 128, 256, 256, 512, 512], [0, 0, 0, 0, 1, 0])


# --- The published network, by hand: names and shapes from a config, the forward pass from the weights


def shapes_of(config: dict) -> dict[str, tuple[int, ...]]:
    """Every parameter of the published network."""
    shapes, widths, layers = {}, config["block_out_channels"], config["layers_per_block"]
    embedding = 4 * widths[0]

    def add(name: str, *shape: int):
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = shape, shape[:1]

    def resnet(name: str, c_in: int, c: int):
        add(f"{name}.norm1", c_in)
        add(f"{name}.conv1", c, c_in, 3, 3)
        add(f"{name}.time_emb_proj", c, embedding)
        add(f"{name}.norm2", c)
        add(f"{name}.conv2", c, c, 3, 3)
        if c_in != c:
            add(f"{name}.conv_shortcut", c, c_in, 1, 1)

    def attention(name: str, c: int):
        add(f"{name}.group_norm", c)
        for part in ("to_q", "to_k", "to_v", "to_out.0"):
            add(f"{name}.{part}", c, c)

    add("conv_in", widths[0], config["in_channels"], 3, 3)
    add("time_embedding.linear_1", embedding, widths[0])
    add("time_embedding.linear_2", embedding, embedding)
    if config.get("num_class_embeds"):
        shapes["class_embedding.weight"] = (config["num_class_embeds"], embedding)
    c, skips = widths[0], [widths[0]]
    for i, (width, kind) in enumerate(zip(widths, config["down_block_types"], strict=True)):
        for j in range(layers):
            resnet(f"down_blocks.{i}.resnets.{j}", c, width)
            if kind == ATTENTION[0]:
                attention(f"down_blocks.{i}.attentions.{j}", width)
            c = width
            skips.append(c)
        if i < len(widths) - 1:
            add(f"down_blocks.{i}.downsamplers.0.conv", c, c, 3, 3)
            skips.append(c)
    resnet("mid_block.resnets.0", c, c)
    if config.get("add_attention", True):
        attention("mid_block.attentions.0", c)
    resnet("mid_block.resnets.1", c, c)
    for i, (width, kind) in enumerate(zip(reversed(widths), config["up_block_types"], strict=True)):
        for j in range(layers + 1):
            resnet(f"up_blocks.{i}.resnets.{j}", c + skips.pop(), width)
            if kind == ATTENTION[1]:
                attention(f"up_blocks.{i}.attentions.{j}", width)
            c = width
        if i < len(widths) - 1:
            add(f"up_blocks.{i}.upsamplers.0.conv", c, c, 3, 3)
    add("conv_norm_out", c)
    add("conv_out", config["out_channels"], c, 3, 3)
    return shapes


def random_weights(config: dict) -> dict[str, Tensor]:
    """Weights that keep activations near one, none of them zero, so that every path matters."""
    weights = {}
    for name, shape in shapes_of(config).items():
        w = torch.randn(shape)
        if len(shape) > 1:
            weights[name] = w / math.sqrt(math.prod(shape[1:]))
        else:
            weights[name] = 0.3 * w + ("norm" in name and name.endswith("weight"))
    return weights


def published(w: dict[str, Tensor], config: dict, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
    """The published forward pass; t from 0."""

    def conv(name: str, h: Tensor, **options) -> Tensor:
        return F.conv2d(h, w[f"{name}.weight"], w[f"{name}.bias"], **options)

    def linear(name: str, h: Tensor) -> Tensor:
        return F.linear(h, w[f"{name}.weight"], w[f"{name}.bias"])

    def norm(name: str, h: Tensor) -> Tensor:
        return F.group_norm(
            h, config["norm_num_groups"], w[f"{name}.weight"], w[f"{name}.bias"], eps=config["norm_eps"]
        )

    def resnet(name: str, h: Tensor) -> Tensor:
        inner = conv(f"{name}.conv1", F.silu(norm(f"{name}.norm1", h)), padding=1)
        inner = inner + linear(f"{name}.time_emb_proj", F.silu(emb))[:, :, None, None]
        inner = conv(f"{name}.conv2", F.silu(norm(f"{name}.norm2", inner)), padding=1)
        return inner + (conv(f"{name}.conv_shortcut", h) if f"{name}.conv_shortcut.weight" in w else h)

    def attend(name: str, h: Tensor) -> Tensor:
        if f"{name}.to_q.weight" not in w:
            return h
        c = h.shape[1]
        d = config["attention_head_dim"] or c
        pixels = norm(f"{name}.group_norm", h).flatten(2).transpose(1, 2)
        q, k, v = (linear(f"{name}.to_{p}", pixels) for p in "qkv")
        heads = []
        for i in range(0, c, d):
            score = q[:, :, i : i + d] @ k[:, :, i : i + d].transpose(1, 2) / math.sqrt(d)
            heads.append(score.softmax(-1) @ v[:, :, i : i + d])
        return h + linear(f"{name}.to_out.0", torch.cat(heads, -1)).transpose(1, 2).reshape(h.shape)

    half = config["block_out_channels"][0] // 2
    omega = torch.exp(-math.log(10000) * torch.arange(half) / (half - config["freq_shift"]))
    angle = t[:, None] * omega
    emb = torch.cat([angle.cos(), angle.sin()] if config["flip_sin_to_cos"] else [angle.sin(), angle.cos()], 1)
    emb = linear("time_embedding.linear_2", F.silu(linear("time_embedding.linear_1", emb)))
    if y is not None:
        emb = emb + w["class_embedding.weight"][y]

    h = conv("conv_in", x, padding=1)
    skips, levels = [h], len(config["block_out_channels"])
    for i in range(levels):
        for j in range(config["layers_per_block"]):
            h = attend(f"down_blocks.{i}.attentions.{j}", resnet(f"down_blocks.{i}.resnets.{j}", h))
            skips.append(h)
        if i < levels - 1:
            padding = config["downsample_padding"]
            h = conv(
                f"down_blocks.{i}.downsamplers.0.conv",
                h if padding else F.pad(h, (0, 1, 0, 1)),
                stride=2,
                padding=padding,
            )
            skips.append(h)
    h = attend("mid_block.attentions.0", resnet("mid_block.resnets.0", h))
    h = resnet("mid_block.resnets.1", h)
    for i in range(levels):
        for j in range(config["layers_per_block"] + 1):
            h = resnet(f"up_blocks.{i}.resnets.{j}", torch.cat([h, skips.pop()], 1))
            h = attend(f"up_blocks.{i}.attentions.{j}", h)
        if i < levels - 1:
            h = h.repeat_interleave(2, 2).repeat_interleave(2, 3)
            h = conv(f"up_blocks.{i}.upsamplers.0.conv", h, padding=1)
    return conv("conv_out", F.silu(norm("conv_norm_out", h)), padding=1)


# --- Folders


def write(folder: Path, config: dict, weights: dict[str, Tensor]) -> Path:
    folder.mkdir(exist_ok=True, parents=True)
    (folder / CONFIG).write_text(json.dumps(config))
    save_file({k: v.contiguous() for k, v in weights.items()}, folder / WEIGHTS, metadata={"format": "pt"})
    return folder


@pytest.fixture
def folder(tmp_path) -> Path:
    return write(tmp_path / "net", tiny(), random_weights(tiny()))


def reconfigured(folder: Path, **options) -> Path:
    config = json.loads((folder / CONFIG).read_text()) | options
    (folder / CONFIG).write_text(json.dumps(config))
    return folder


def inputs(config: dict, ts: tuple = (1, 2, 30)) -> tuple[Tensor, Tensor, Tensor | None]:
    size = config["sample_size"]
    height, width = (size, size) if isinstance(size, int) else size
    y = torch.tensor([2, 0, 1]) if config.get("num_class_embeds") else None
    return torch.randn(len(ts), config["in_channels"], height, width), torch.tensor(ts), y


@torch.no_grad()
def difference(net: UNet, weights: dict[str, Tensor], config: dict, ts: tuple = (1, 2, 30)) -> float:
    """Largest |ours(x, t) - published(x, t - 1)|."""
    x, t, y = inputs(config, ts)
    ours, theirs = net(x, t, y), published(weights, config, x, t - 1, y)
    assert ours.shape == theirs.shape == (len(ts), config["out_channels"], *x.shape[2:])
    assert 0.3 < theirs.std() < 10
    return (ours - theirs).abs().max().item()


# --- Ours is the published network


@pytest.mark.parametrize(
    "config",
    [
        tiny(),
        tiny(downsample_padding=1),
        tiny(flip_sin_to_cos=True),
        tiny(freq_shift=0),
        tiny(freq_shift=0, flip_sin_to_cos=True, downsample_padding=1, norm_eps=1e-2),
        tiny(attention_head_dim=4),
        tiny(attention_head_dim=8, attended=(1, 1)),
        tiny(attended=(0, 0)),
        tiny(attended=(0, 0), add_attention=False),
        tiny(attended=(1, 0), add_attention=False),
        tiny(16, (8, 16, 8), (1, 0, 1)),
        tiny(16, (8, 8, 16, 24), (0, 1, 0, 1), layers_per_block=2),
        tiny(16, (8, 8, 16), (0, 1, 0), attention_head_dim=2, norm_num_groups=2),
        tiny(4, (16,), (1,), norm_num_groups=16),
        tiny([8, 12], (8, 16), (0, 1)),
        tiny([12, 8], (8, 16), (1, 0)),
        tiny(in_channels=1, out_channels=2, widths=(12, 24)),
        tiny(num_class_embeds=3),
        tiny(act_fn="swish", dropout=0.3, attn_norm_num_groups=4, time_embedding_dim=32, num_train_timesteps=1000),
    ],
    ids=lambda c: " ".join(f"{k}={v}" for k, v in c.items() if v != tiny().get(k)) or "plain",
)
def test_ours_at_t_is_the_published_network_at_t_minus_1(tmp_path, config):
    weights = random_weights(config)
    net = load_unet(write(tmp_path, config, weights))
    assert difference(net, weights, config) < 1e-5
    assert net.time_offset == -1 and not net.training and all(p.requires_grad for p in net.parameters())
    assert {p.dtype for p in net.parameters()} == {torch.float32}


def test_large_t(tmp_path):
    """The published frequencies were rounded on the way, so at t = 1000 the angles agree to about 1e-4 only."""
    weights = random_weights(tiny())
    assert difference(load_unet(write(tmp_path, tiny(), weights)), weights, tiny(), (999, 1000)) < 1e-3


@pytest.mark.parametrize(
    "change",
    [
        {"downsample_padding": 1},
        {"flip_sin_to_cos": True},
        {"freq_shift": 0},
        {"norm_eps": 0.1},
        {"norm_num_groups": 2},
        {"attention_head_dim": 2},
    ],
    ids=str,
)
def test_every_detail_that_fits_all_weights_matters(folder, change):
    weights = load_file(folder / WEIGHTS)
    assert difference(load_unet(reconfigured(folder, **change)), weights, tiny()) > 1e-3


def test_what_a_config_leaves_out_is_the_default_of_the_published_class(tmp_path):
    left_out = {
        "attention_head_dim": 8,
        "downsample_padding": 1,
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "in_channels": 3,
        "layers_per_block": 2,
        "norm_eps": 1e-5,
        "out_channels": 3,
    }
    config = tiny(widths=(8, 16, 16, 16), attended=(0, 1, 1, 1), **left_out)
    weights = random_weights(config)
    kept = ("sample_size", "block_out_channels", "norm_num_groups")
    net = load_unet(write(tmp_path, {key: config[key] for key in kept}, weights))
    assert difference(net, weights, config) < 1e-5
    assert net.norm_out.eps == 1e-5 and net.middle_1.dropout.p == 0
    assert form.KEYS["block_out_channels"][0] == [224, 448, 672, 896] and form.KEYS["norm_num_groups"][0] == 32


FORMERLY = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}


def old(name: str) -> str:
    for new, before in FORMERLY.items():
        name = name.replace(f".{new}.", f".{before}.")
    return name


@pytest.mark.parametrize("rename", [str, old], ids=["new names", "old names"])
@pytest.mark.parametrize("as_convolution", [False, True])
def test_both_forms_of_attention_are_read(tmp_path, rename, as_convolution):
    config = tiny(16, (8, 16, 8), (0, 1, 1), attention_head_dim=4)
    weights = random_weights(config)
    stored = {}
    for name, w in weights.items():
        is_map = re.search(r"\.to_(q|k|v|out\.0)\.weight$", name)
        stored[rename(name)] = w[:, :, None, None] if as_convolution and is_map else w
    assert (stored.keys() == weights.keys()) == (rename is str)
    assert difference(load_unet(write(tmp_path, config, stored)), weights, config) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_floating_types_become_float32(tmp_path, dtype):
    weights = {k: v.to(dtype) for k, v in random_weights(tiny()).items()}
    net = load_unet(write(tmp_path, tiny(), weights))
    assert {p.dtype for p in net.parameters()} == {torch.float32}
    assert torch.equal(net.conv_in.weight, weights["conv_in.weight"].float())


# --- Names and counts of the networks that were published


@pytest.mark.parametrize(("config", "count"), [(CIFAR, 35_746_307), (CHURCH, 113_673_219)], ids=["CIFAR-10", "256 px"])
def test_names_shapes_and_counts_of_published_networks(tmp_path, config, count):
    (tmp_path / CONFIG).write_text(json.dumps(config))
    arguments = form.arguments(tmp_path / CONFIG)
    with torch.device("meta"):
        ours = UNet(**arguments).state_dict()
    assert {published_name(k): tuple(v.shape) for k, v in ours.items()} == shapes_of(config)
    assert sum(v.numel() for v in ours.values()) == count
    assert arguments["attention_resolutions"] == [16] and arguments["head_channels"] is None


# --- Written and read again


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"image_size": (4, 8), "in_channels": 1, "out_channels": 2, "num_classes": 5},
        {"attention_resolutions": [8, 4], "head_channels": 4, "downsample_padding": 0},
        {"attention_resolutions": [], "middle_attention": False, "blocks": 2, "dropout": 0.25},
        {"channel_mults": (1, 3, 2), "attention_resolutions": [8, 2], "freq_shift": 0, "flip_sin_to_cos": True},
        {"channel_mults": (1,), "attention_resolutions": [8], "freq_shift": 0.5, "norm_eps": 1e-3, "groups": 2},
        {"channels": 9, "groups": 3, "attention_resolutions": []},
        {"scale_shift": True, "resample": "resnet"},
        {"scale_shift": True, "resample": "resnet", "attention_resolutions": [8, 4], "middle_attention": False},
    ],
    ids=str,
)
@pytest.mark.parametrize("time_offset", [-1, 0, 3])
@torch.no_grad()
def test_saved_loaded_and_saved_again(tmp_path, options, time_offset):
    """Whatever t our network counts from: the sines and cosines of a shifted t are a rotation of those of t."""
    small = {"image_size": 8, "channels": 8, "channel_mults": (1, 2), "blocks": 1, "groups": 4}
    net = UNet(**small | {"attention_resolutions": [4]} | options, time_offset=time_offset).eval()
    for p in net.parameters():
        nn.init.normal_(p, std=0.2)
    save_unet(net, tmp_path / "runs" / "a")
    again = load_unet(tmp_path / "runs" / "a")
    x = torch.randn(3, net.in_channels, *net.image_size)
    t, y = torch.tensor([1, 2, 90]), torch.tensor([0, 4, 1]) if net.num_classes else None
    torch.testing.assert_close(again(x, t, y), net(x, t, y), rtol=1e-4, atol=1e-4)
    assert again.middle_1.dropout.p == net.middle_1.dropout.p and again.num_classes == net.num_classes
    rotated = {"time_embedding.1.weight"} if time_offset != -1 else set()
    changed = {k for k, v in net.state_dict().items() if not torch.equal(v, again.state_dict()[k])}
    assert changed == rotated
    if rotated:
        net.time_offset = -1
        assert not torch.allclose(again(x, t, y), net(x, t, y), rtol=1e-4, atol=1e-4)

    save_unet(again, tmp_path / "b")
    assert files(tmp_path / "runs" / "a") == files(tmp_path / "b") and len(files(tmp_path / "b")) == 2


def test_a_saved_network_is_the_published_one(tmp_path, folder):
    """Config and names, against the form written out above."""
    save_unet(load_unet(folder), tmp_path / "saved")
    saved = json.loads((tmp_path / "saved" / CONFIG).read_text())
    new = {"dropout": 0.0, "resnet_time_scale_shift": "default", "add_attention": True, "num_class_embeds": None}
    assert saved == {k: v for k, v in tiny().items() if k != "_diffusers_version"} | new
    assert list(saved) == sorted(saved)
    before, after = load_file(folder / WEIGHTS), load_file(tmp_path / "saved" / WEIGHTS)
    assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)
    header = (tmp_path / "saved" / WEIGHTS).read_bytes()[8:]
    assert b'"__metadata__":{"format":"pt"}' in header  # without which the library that wrote the others refuses a file


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"patch": 2, "attention_resolutions": [4]}, r"patch = 2 \(allowed: 1\)"),
        ({"attention": "linear"}, r"attention = linear \(allowed: full\)"),
        ({"blocks": [1, 2]}, r"blocks = \[1, 2\] \(allowed: as many on each level\)"),
        ({"channel_mults": (2, 2)}, r"channel_mults\[0\] > 1 \(allowed: 1\)"),
        (
            {"heads": 2, "attention_resolutions": [8, 4]},
            r"heads of widths \[4, 8\] \(allowed: one width, or one head\)",
        ),
        ({"condition_channels": 2}, r"condition_channels = 2 \(allowed: 0\)"),
        ({"num_classes": [3, 2]}, r"num_classes = \(3, 2\) \(allowed: one label\)"),
        ({"magnitude_preserving": True}, r"magnitude_preserving = true \(allowed: false\)"),
        ({"num_classes": 3, "class_channels": 4}, r"class_channels = 4 \(allowed: 0\)"),
        ({"num_classes": 3, "drop": 0.1}, r"drop = 0.1 \(allowed: 0, since the form has no learned null\)"),
    ],
    ids=str,
)
def test_networks_that_the_form_cannot_describe_are_not_written(tmp_path, options, message):
    small = {"image_size": 8, "channels": 8, "channel_mults": (1, 2), "blocks": 1, "groups": 4}
    with pytest.raises(ValueError, match=f"cannot describe this network: {message}$"):
        save_unet(UNet(**small | {"attention_resolutions": [4]} | options), tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_failed_save_leaves_the_old_network(folder, monkeypatch):
    before, net = files(folder), load_unet(folder)
    nn.init.zeros_(net.conv_in.weight)

    def full(_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            save_unet(net, folder)
    assert files(folder) == before
    save_unet(net, folder)
    assert load_unet(folder).conv_in.weight.eq(0).all() and len(files(folder)) == 2


def test_a_save_interrupted_between_its_files_is_no_mixture(folder, monkeypatch):
    net, replaced = load_unet(folder), []

    def once(source, target):
        if replaced:
            raise KeyboardInterrupt
        replaced.append(target)
        source.rename(target)

    monkeypatch.setattr(os, "replace", once)
    with pytest.raises(KeyboardInterrupt):
        save_unet(net, folder)
    assert [path.name for path in replaced] == [*files(folder)] == [WEIGHTS]
    with pytest.raises(ValueError, match=f"has no {CONFIG}$"):
        load_unet(folder)


# --- Configs that are refused

A_COUNT = r"an integer in 1\.\.65536"


@pytest.mark.parametrize(
    ("key", "value", "allowed"),
    [
        ("_class_name", "UNet3DModel", '"UNet2DModel" or "UNet2DConditionModel"'),
        ("sample_size", None, f"{A_COUNT}, or two of them"),
        ("sample_size", [8, 8, 8], f"{A_COUNT}, or two of them"),
        ("sample_size", 8.0, f"{A_COUNT}, or two of them"),
        ("sample_size", 10**9, f"{A_COUNT}, or two of them"),
        ("in_channels", 0, A_COUNT),
        ("in_channels", True, A_COUNT),
        ("out_channels", "3", A_COUNT),
        ("center_input_sample", True, "false"),
        ("time_embedding_type", "fourier", '"positional"'),
        ("time_embedding_type", "learned", '"positional"'),
        ("time_embedding_dim", 64, "null or 32"),
        ("time_embedding_dim", "x", f"{A_COUNT} or null"),
        ("freq_shift", None, "a number in"),
        ("freq_shift", math.nan, "a number in"),
        ("freq_shift", 10**400, "a number in"),
        ("flip_sin_to_cos", 1, "true or false"),
        ("down_block_types", ["DownBlock2D", "SkipDownBlock2D"], "a list of DownBlock2D and AttnDownBlock2D"),
        ("down_block_types", ["DownBlock2D", ["AttnDownBlock2D"]], "a list of DownBlock2D and AttnDownBlock2D"),
        ("down_block_types", "DownBlock2D", "a list of DownBlock2D and AttnDownBlock2D"),
        ("down_block_types", ["DownBlock2D"] * 17, "a list of DownBlock2D and AttnDownBlock2D"),
        ("mid_block_type", None, '"UNetMidBlock2D"'),
        ("up_block_types", ["SkipUpBlock2D", "UpBlock2D"], "a list of UpBlock2D and AttnUpBlock2D"),
        ("up_block_types", [], "a list of UpBlock2D and AttnUpBlock2D"),
        ("block_out_channels", [8, 2**17], f"a list of up to 16, each {A_COUNT}"),
        ("block_out_channels", 8, f"a list of up to 16, each {A_COUNT}"),
        ("layers_per_block", 10**6, r"an integer in 1\.\.64"),
        ("layers_per_block", [1, 2], r"an integer in 1\.\.64"),
        ("mid_block_scale_factor", 2, "1 or 1.0"),
        ("mid_block_scale_factor", math.sqrt(2), "1 or 1.0"),
        ("downsample_padding", 2, "1 or 0"),
        ("downsample_type", "fir", '"conv" or "resnet"'),
        ("upsample_type", "fir", '"conv" or "resnet"'),
        ("dropout", 1, r"a number in \[0, 1\)"),
        ("dropout", "0", r"a number in \[0, 1\)"),
        ("act_fn", "gelu", '"silu" or "swish"'),
        ("attention_head_dim", -1, f"{A_COUNT} or null"),
        ("norm_num_groups", None, A_COUNT),
        ("attn_norm_num_groups", 2, "null or 4"),
        ("norm_eps", -1e-6, r"a number in \[0, 1\)"),
        ("norm_eps", math.inf, r"a number in \[0, 1\)"),
        ("resnet_time_scale_shift", "spatial", '"default" or "scale_shift"'),
        ("add_attention", None, "true or false"),
        ("class_embed_type", "timestep", "null"),
        ("class_embed_type", "identity", "null"),
        ("num_class_embeds", 0, f"{A_COUNT} or null"),
        ("num_train_timesteps", "x", f"{A_COUNT} or null"),
        ("attention_legacy_order", False, "to leave it out"),
        ("cross_attention_dim", None, "to leave it out"),
    ],
    ids=lambda v: str(v)[:40],
)
def test_values_that_this_network_cannot_represent(folder, key, value, allowed):
    with pytest.raises(ValueError, match=rf"{CONFIG} describes what .*{key}\"? = .*\(allowed: {allowed}") as error:
        load_unet(reconfigured(folder, **{key: value}))
    assert f" = {json.dumps(value)[:200]}" in str(error.value) and len(str(error.value)) < 1000


def test_every_key_has_a_refused_value_above():
    tested = {key for key, *_ in test_values_that_this_network_cannot_represent.pytestmark[0].args[1]}
    assert form.KEYS.keys() <= tested


def test_all_that_is_wrong_is_told_at_once_and_of_many_keys_the_first(folder):
    with pytest.raises(ValueError, match=r'act_fn = "relu" .*; "foo" = 1 is not a known key'):
        load_unet(reconfigured(folder, act_fn="relu", foo=1))
    with pytest.raises(ValueError, match=r'"k0" = 0 .*; \.\.\. \(4991 more\)$') as error:
        load_unet(reconfigured(folder, **{f"k{i}": i for i in range(4999)}))
    assert len(str(error.value)) < 2000


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"up_block_types": ["UpBlock2D", "UpBlock2D"]},
            "level 1 has AttnDownBlock2D in down_block_types and UpBlock2D in up_block_types .*both ways or on none",
        ),
        ({"up_block_types": ["AttnUpBlock2D"] * 2}, "level 0 has DownBlock2D .* and AttnUpBlock2D in"),
        ({"up_block_types": ["AttnUpBlock2D", "UpBlock2D", "UpBlock2D"]}, "have 2, 2 and 3 entries .*as many of each"),
        ({"block_out_channels": [8, 16, 16]}, "have 3, 2 and 2 entries"),
        ({"block_out_channels": [8, 12]}, r"block_out_channels has 12 \(allowed: multiples of the first, 8\)"),
        (
            {"resnet_time_scale_shift": "scale_shift"},
            r"attn_norm_num_groups = null is, with scale_shift, attention without a norm in the middle \(allowed: 4\)",
        ),
        (
            {"down_block_types": ["ResnetDownsampleBlock2D", "AttnDownBlock2D"]},
            "levels are joined both by convolutions and by residual blocks",
        ),
        ({"upsample_type": "resnet"}, "levels are joined both by convolutions and by residual blocks"),
        (
            {"sample_size": 9},
            "an impossible network: sample_size = 9x9 .*: 9 is not divisible by 2; nearest legal sizes: 8, 10",
        ),
        ({"norm_num_groups": 3}, "an impossible network: norm_num_groups = 3 does not divide"),
        ({"attention_head_dim": 5}, "an impossible network: attention_head_dim = 5 does not divide the 16 channels"),
        ({"freq_shift": 4}, "an impossible network: an embedding of 8 channels is too narrow for freq_shift = 4"),
    ],
    ids=str,
)
def test_values_that_contradict_each_other(folder, options, message):
    with pytest.raises(ValueError, match=message):
        load_unet(reconfigured(folder, **options))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "is not JSON"),
        (b'{"sample_size": 8', "is not JSON"),
        (b"\xff\xfe\x00", "is not JSON"),
        (b"[" * 100_000, "is not JSON"),
        (b'{"a": 1' + b"0" * 5000 + b"}", "is not JSON"),
        (b"[1, 2]", "holds a JSON list, not an object"),
        (b"null", "holds a JSON NoneType, not an object"),
        (b'{"sample_size": 8}' + b" " * 2**20, "is larger than 1048576 bytes"),
    ],
    ids=lambda v: str(v)[:30],
)
def test_files_that_are_no_config(folder, text, message):
    (folder / CONFIG).write_bytes(text)
    with pytest.raises(ValueError, match=f"{CONFIG} {message}"):
        load_unet(folder)


def test_nested_values_are_refused_at_any_depth(folder):
    """Python's recursion ends the reading from some depth on, or only the showing in the message."""
    for depth in [10, 500, *range(900, 1000)]:
        (folder / CONFIG).write_text(f'{{"deep": {"[" * depth}{"]" * depth}}}')
        with pytest.raises(ValueError, match=r'"deep" = |is not JSON') as error:
            load_unet(folder)
        assert len(str(error.value)) < 1000
    nested = []
    for _ in range(100_000):
        nested = [nested]
    assert short(nested) == "(nested too deeply to show)"


# --- Weights that are refused


def reweighted(folder: Path, change) -> Path:
    weights = load_file(folder / WEIGHTS)
    change(weights)
    return write(folder, tiny(), weights)


def test_missing_unexpected_and_wrong_shapes_are_listed_together(folder):
    def change(w):
        w["conv_in.wait"] = w.pop("conv_in.weight")
        del w["mid_block.attentions.0.to_q.bias"]
        w["conv_out.bias"] = torch.zeros(4)
        w["up_blocks.0.resnets.1.conv1.weight"] = torch.zeros(16, 25, 3, 3)
        w["conv_norm_out.bias"] = torch.zeros(8, dtype=torch.int64)

    with pytest.raises(ValueError) as error:
        load_unet(reweighted(folder, change))
    assert str(error.value) == (
        f"{folder / WEIGHTS} does not fit its {CONFIG}: "
        "2 missing: conv_in.weight, mid_block.attentions.0.to_q.bias; "
        '1 unexpected: "conv_in.wait"; '
        "3 of another shape or type: conv_norm_out.bias of type I64, not F64, F32, F16 or BF16, "
        "conv_out.bias (4,), the config's is (3,), "
        "up_blocks.0.resnets.1.conv1.weight (16, 25, 3, 3), the config's is (16, 24, 3, 3)"
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda w: w.update({"mid_block.attentions.0.key.weight": torch.zeros(16, 16)}),
            '1 unexpected: "mid_block.attentions.0.to_k.weight"$',  # it has both names
        ),
        (
            lambda w: w.update({"mid_block.attentions.0.to_k.weight": torch.zeros(16, 16, 3, 3)}),
            r"1 of .*to_k.weight \(16, 16, 3, 3\), the config's is \(16, 16\)$",
        ),
        (
            lambda w: w.update({"time_embedding.linear_1.weight": torch.zeros(32, 8, 1, 1)}),
            "1 of another shape .*linear_1",
        ),
        (
            lambda w: w.update({"conv_in.weight": torch.zeros(8, 3, 3)}),
            r"conv_in.weight \(8, 3, 3\), the config's is \(8, 3, 3, 3\)",
        ),
        (
            lambda w: w.update({f"x{i:02}": torch.zeros(1) for i in range(50)}),
            r"50 unexpected: .x00., .*x09., \.\.\. \(40 more\)$",
        ),
        (lambda w: w.update({"a\n\x1b[31m" * 100: torch.zeros(1)}), r'unexpected: "a\\n\\u001b.{,200}\.\.\.$'),
        (lambda w: w.clear(), r"missing: time_embedding.linear_1.weight, .*\(134 more\)$"),
    ],
    ids=["both names", "3x3 attention", "convolution elsewhere", "fewer dimensions", "many", "long", "none"],
)
def test_weights_that_do_not_fit(folder, change, message):
    with pytest.raises(ValueError, match=message):
        load_unet(reweighted(folder, change))


def test_weights_of_another_config(folder):
    with pytest.raises(ValueError, match=r"\d+ missing: down_blocks.0.resnets.1.norm1.weight, "):
        load_unet(reconfigured(folder, layers_per_block=2))
    plain = {"down_block_types": ["DownBlock2D"] * 2, "up_block_types": ["UpBlock2D"] * 2}
    with pytest.raises(ValueError, match=r"unexpected: .down_blocks.1.attentions.0.group_norm.bias"):
        load_unet(reconfigured(folder, layers_per_block=1, **plain))


def test_a_large_config_with_small_weights_costs_nothing(folder):
    """The network is compared on paper; one of these sizes would need terabytes."""
    with pytest.raises(ValueError, match=r"conv_in.weight \(8, 3, 3, 3\), the config's is \(65536, 3, 3, 3\)"):
        load_unet(reconfigured(folder, block_out_channels=[65536, 65536], attention_head_dim=8))


@pytest.mark.parametrize("cut", [0, 4, 100, -1])
def test_damaged_weights(folder, cut):
    whole = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(whole[:cut])
    with pytest.raises(ValueError, match=f"{WEIGHTS} is no whole safetensors file"):
        load_unet(folder)


class Bomb:
    """What a pickle may hold."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_pickles_by_other_names_are_never_read(folder, tmp_path):
    (folder / WEIGHTS).unlink()
    (folder / "unet.ckpt").write_bytes(pickle.dumps(Bomb(tmp_path / "exploded")))
    message = f"has no {WEIGHTS}; it has unet.ckpt, but read are only {WEIGHTS}, its shards, variants and .bin"
    with pytest.raises(ValueError, match=message):
        load_unet(folder)
    (folder / "unet.ckpt").rename(folder / WEIGHTS)  # under the right name
    with pytest.raises(ValueError, match="is no whole safetensors file"):
        load_unet(folder)
    assert not (tmp_path / "exploded").exists()


def test_folders_without_the_files(folder, tmp_path):
    with pytest.raises(ValueError, match=f"nowhere is no folder; published weights are a folder with {CONFIG} and"):
        load_unet(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="is no folder"):
        load_unet(folder / CONFIG)
    (folder / CONFIG).unlink()
    with pytest.raises(ValueError, match=f"net has no {CONFIG}$"):
        load_unet(str(folder))
    folder.rename(tmp_path / "unet")
    (tmp_path / "unet" / CONFIG).write_text("{}")
    with pytest.raises(ValueError, match=f"has no {CONFIG}; .*unet has one$"):
        load_unet(tmp_path)
