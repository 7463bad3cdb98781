"""models/autoencoder_kl.py and its published form: the network written out from its weights, names, counts."""

import json
import math
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_pretrained import files, old, reconfigured, write
from torch import Tensor, nn
from torch.nn import functional as F

from ddpm.data import Digits
from ddpm.data.batch import Condition
from ddpm.training.task import must_take
from models.autoencoder_kl import AutoencoderKL
from models.pretrained import CONFIG, WEIGHTS, load_autoencoder, published_name, save_autoencoder
from models.pretrained import autoencoder as form

SMALL = {"channels": 8, "channel_mults": (1, 2), "blocks": 1, "groups": 4}


def small(image_size: int | tuple[int, int] = 8, **options) -> AutoencoderKL:
    """Every parameter random: residual branches begin as nothing."""
    net = AutoencoderKL(**{"image_size": image_size, "in_channels": 1, "latent_channels": 2} | SMALL | options)
    for name, p in net.named_parameters():
        if name != "log_scale":
            nn.init.normal_(p, std=0.3)
    return net


# --- The network


@pytest.mark.parametrize(
    ("size", "mults", "factor", "latent"),
    [(8, (1, 2), 2, (2, 4, 4)), ((8, 12), (1, 1, 2), 4, (2, 2, 3)), (7, (2,), 1, (2, 7, 7)),
     (28, (1, 2, 2), 4, (2, 7, 7))],
)  # fmt: skip
@torch.no_grad()
def test_shapes_of_images_and_latents(size, mults, factor, latent):
    net = small(size, channel_mults=mults)
    x = torch.randn(2, *net.shape)
    mean, log_variance = net.encode(x)
    assert net.factor == factor and net.latent_shape == latent
    assert mean.shape == log_variance.shape == (2, *latent) and net.decode(mean).shape == x.shape
    assert not torch.equal(mean, log_variance)


@torch.no_grad()
def test_log_variances_are_clamped_and_means_are_not():
    net = small()
    net.quant_conv.weight.mul_(1e4)
    mean, log_variance = net.encode(torch.randn(4, *net.shape))
    assert log_variance.min() == -30 and log_variance.max() == 20
    assert mean.abs().max() > 30


@torch.no_grad()
def test_other_sizes_are_taken_where_the_factor_divides_them():
    net = small(8, middle_attention=False, channel_mults=(1, 1), in_channels=3)
    x = torch.randn(1, 3, 12, 20)
    mean, _ = net.encode(x)
    assert mean.shape == (1, 2, 6, 10) and net.decode(mean).shape == x.shape
    with pytest.raises(
        ValueError, match=r"x has shape \(1, 3, 11, 20\); this network takes \(B, 3, 8, 8\), or another .* 2 div"
    ):
        net.encode(x[:, :, 1:])
    with pytest.raises(ValueError, match=r"x has shape \(1, 3, 12, 19\)"):
        net.encode(x[..., 1:])
    with pytest.raises(ValueError, match=r"x has shape \(1, 2, 12, 20\)"):
        net.encode(x[:, 1:])
    with pytest.raises(ValueError, match=r"z has shape \(1, 1, 6, 10\); this network takes \(B, 2, 4, 4\)"):
        net.decode(mean[:, 1:])


def test_it_is_told_of_no_class_and_takes_its_data():
    data, net = Digits(), small()
    must_take(net, data)
    with pytest.raises(ValueError, match="the model takes images of"):
        must_take(small(16), data)
    x = torch.randn(2, *net.shape)
    assert torch.equal(net.encode(x, Condition())[0], net.encode(x)[0])
    for call in (
        lambda: net.encode(x, torch.tensor([0, 1])),
        lambda: net.decode(net.encode(x)[0], torch.tensor([0, 1])),
    ):
        with pytest.raises(ValueError, match="y must be given exactly when the network has classes"):
            call()


def test_a_scale_is_a_parameter_and_none_is_none():
    assert small().log_scale is None
    assert small(scale=0.5).log_scale.item() == pytest.approx(math.log(0.5))


@pytest.mark.parametrize(
    ("options", "words"),
    [({"image_size": 28}, "image_size = 28x28 with 4 levels: 28 is not divisible by 8; nearest legal sizes: 24, 32$"),
     ({"image_size": (8, 4), "channel_mults": (1, 1, 1, 1)}, "8x4 .*: 4 is not divisible by 8; nearest .*: 8$"),
     ({"image_size": (8, 8, 8)}, "must be one integer >= 1, or two"),
     ({"image_size": 0}, r"image_size\[0\] = 0 must be an integer >= 1"),
     ({"image_size": 8, "latent_channels": 0}, "latent_channels = 0 must be"),
     ({"image_size": 8, "blocks": 0}, "blocks = 0 must be"),
     ({"image_size": 8, "channel_mults": ()}, r"channel_mults = \[\] has 0 levels; allowed: 1 to"),
     ({"image_size": 8, "channel_mults": (1, 0)}, r"channel_mults\[1\] = 0 must be"),
     ({"image_size": 8, "groups": 3}, "groups = 3 does not divide"),
     ({"image_size": 8, "scale": -1.0}, "scale = -1 must be > 0")],
)  # fmt: skip
def test_networks_that_cannot_be_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        AutoencoderKL(**({} if options["image_size"] == 28 else SMALL) | options)


# --- The published network, by hand


def config_of(size: int | list[int] = 16, widths: tuple = (8, 16), **options) -> dict:
    """A config as published."""
    return {
        "_class_name": "AutoencoderKL",
        "_diffusers_version": "0.6.0",
        "act_fn": "silu",
        "block_out_channels": list(widths),
        "down_block_types": ["DownEncoderBlock2D"] * len(widths),
        "in_channels": 3,
        "latent_channels": 4,
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "out_channels": 3,
        "sample_size": size,
        "up_block_types": ["UpDecoderBlock2D"] * len(widths),
    } | options


STABLE_DIFFUSION = config_of(512, (128, 256, 512, 512), layers_per_block=2, norm_num_groups=32)


def shapes_of(config: dict) -> dict[str, tuple[int, ...]]:
    """Every parameter of the published network."""
    shapes, widths, latent = {}, config["block_out_channels"], config["latent_channels"]
    layers = config["layers_per_block"]

    def add(name: str, *shape: int):
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = shape, shape[:1]

    def resnet(name: str, c_in: int, c: int):
        add(f"{name}.norm1", c_in)
        add(f"{name}.conv1", c, c_in, 3, 3)
        add(f"{name}.norm2", c)
        add(f"{name}.conv2", c, c, 3, 3)
        if c_in != c:
            add(f"{name}.conv_shortcut", c, c_in, 1, 1)

    def middle(name: str, c: int):
        for i in range(2):
            resnet(f"{name}.resnets.{i}", c, c)
        if config.get("mid_block_add_attention", True):
            add(f"{name}.attentions.0.group_norm", c)
            for part in ("to_q", "to_k", "to_v", "to_out.0"):
                add(f"{name}.attentions.0.{part}", c, c)

    halves = [
        ("encoder", "down", widths, layers, config["in_channels"], 2 * latent),
        ("decoder", "up", widths[::-1], layers + 1, latent, config["out_channels"]),
    ]
    for half, way, ladder, blocks, c_in, c_out in halves:
        add(f"{half}.conv_in", ladder[0], c_in, 3, 3)
        c = ladder[0]
        for i, width in enumerate(ladder):
            for j in range(blocks):
                resnet(f"{half}.{way}_blocks.{i}.resnets.{j}", c, width)
                c = width
            if i < len(ladder) - 1:
                add(f"{half}.{way}_blocks.{i}.{way}samplers.0.conv", c, c, 3, 3)
        middle(f"{half}.mid_block", widths[-1])
        add(f"{half}.conv_norm_out", c)
        add(f"{half}.conv_out", c_out, c, 3, 3)
    if config.get("use_quant_conv", True):
        add("quant_conv", 2 * latent, 2 * latent, 1, 1)
        add("post_quant_conv", latent, latent, 1, 1)
    return shapes


def random_weights(config: dict) -> dict[str, Tensor]:
    """Weights that keep activations near one, none of them zero, so that every path matters."""
    weights = {}
    for name, shape in shapes_of(config).items():
        w = torch.randn(shape)
        scale = 0.3 if len(shape) == 1 else math.prod(shape[1:]) ** -0.5
        weights[name] = scale * w + (len(shape) == 1 and "norm" in name and name.endswith("weight"))
    return weights


class Published:
    """The published forward passes, from the weights."""

    def __init__(self, w: dict[str, Tensor], config: dict):
        self.w, self.config, self.levels = w, config, len(config["block_out_channels"])

    def conv(self, name: str, h: Tensor, **options) -> Tensor:
        if f"{name}.weight" not in self.w:
            return h
        return F.conv2d(h, self.w[f"{name}.weight"], self.w[f"{name}.bias"], **options)

    def norm(self, name: str, h: Tensor) -> Tensor:
        w, b = self.w[f"{name}.weight"], self.w[f"{name}.bias"]
        return F.group_norm(h, self.config["norm_num_groups"], w, b, eps=1e-6)

    def resnet(self, name: str, h: Tensor) -> Tensor:
        inner = self.conv(f"{name}.conv1", F.silu(self.norm(f"{name}.norm1", h)), padding=1)
        inner = self.conv(f"{name}.conv2", F.silu(self.norm(f"{name}.norm2", inner)), padding=1)
        return self.conv(f"{name}.conv_shortcut", h) + inner

    def middle(self, name: str, h: Tensor) -> Tensor:
        h, attention = self.resnet(f"{name}.resnets.0", h), f"{name}.attentions.0"
        if f"{attention}.to_q.weight" in self.w:
            pixels = self.norm(f"{attention}.group_norm", h).flatten(2).transpose(1, 2)
            q, k, v = (
                F.linear(pixels, self.w[f"{attention}.to_{p}.weight"], self.w[f"{attention}.to_{p}.bias"])
                for p in "qkv"
            )
            out = (q @ k.transpose(1, 2) / math.sqrt(h.shape[1])).softmax(-1) @ v
            out = F.linear(out, self.w[f"{attention}.to_out.0.weight"], self.w[f"{attention}.to_out.0.bias"])
            h = h + out.transpose(1, 2).reshape(h.shape)
        return self.resnet(f"{name}.resnets.1", h)

    def out(self, half: str, h: Tensor) -> Tensor:
        return self.conv(f"{half}.conv_out", F.silu(self.norm(f"{half}.conv_norm_out", h)), padding=1)

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.conv("encoder.conv_in", x, padding=1)
        for i in range(self.levels):
            for j in range(self.config["layers_per_block"]):
                h = self.resnet(f"encoder.down_blocks.{i}.resnets.{j}", h)
            if i < self.levels - 1:
                h = self.conv(f"encoder.down_blocks.{i}.downsamplers.0.conv", F.pad(h, (0, 1, 0, 1)), stride=2)
        moments = self.conv("quant_conv", self.out("encoder", self.middle("encoder.mid_block", h)))
        latent = self.config["latent_channels"]
        return moments[:, :latent], moments[:, latent:].clamp(-30, 20)

    def decode(self, z: Tensor) -> Tensor:
        h = self.middle("decoder.mid_block", self.conv("decoder.conv_in", self.conv("post_quant_conv", z), padding=1))
        for i in range(self.levels):
            for j in range(self.config["layers_per_block"] + 1):
                h = self.resnet(f"decoder.up_blocks.{i}.resnets.{j}", h)
            if i < self.levels - 1:
                h = h.repeat_interleave(2, 2).repeat_interleave(2, 3)
                h = self.conv(f"decoder.up_blocks.{i}.upsamplers.0.conv", h, padding=1)
        return self.out("decoder", h)


@torch.no_grad()
def difference(net: AutoencoderKL, weights: dict[str, Tensor], config: dict) -> float:
    """Largest |ours - published| of both halves, with images twice as wide as the config's."""
    by_hand, (height, width) = Published(weights, config), net.latent_shape[1:]
    x = torch.randn(2, config["in_channels"], net.factor * height, net.factor * 2 * width)
    z = torch.randn(2, config["latent_channels"], height, 2 * width)
    pairs = [*zip(net.encode(x), by_hand.encode(x), strict=True), (net.decode(z), by_hand.decode(z))]
    for ours, theirs in pairs:
        assert ours.shape == theirs.shape and 0.2 < theirs.std() < 10
    return max((ours - theirs).abs().max().item() for ours, theirs in pairs)


@pytest.fixture
def folder(tmp_path) -> Path:
    return write(tmp_path / "net", config_of(), random_weights(config_of()))


@pytest.mark.parametrize(
    "config",
    [
        config_of(),
        config_of(8, (8,), norm_num_groups=2, act_fn="swish", force_upcast=False),
        config_of([8, 16], (8, 16, 24), layers_per_block=2, in_channels=1, out_channels=1),
        config_of(8, (8, 8), latent_channels=3, mid_block_add_attention=False, latents_mean=None, latents_std=None),
        config_of(16, (8, 16, 32, 32), latent_channels=16, use_quant_conv=False, use_post_quant_conv=False,
                  scaling_factor=1.5305, shift_factor=0.0609),
    ],
    ids=lambda c: " ".join(f"{k}={v}" for k, v in c.items() if v != config_of().get(k)) or "plain",
)  # fmt: skip
def test_ours_is_the_published_network(tmp_path, config):
    weights = random_weights(config)
    net = load_autoencoder(write(tmp_path, config, weights))
    assert difference(net, weights, config) < 1e-5
    assert not net.training and {p.dtype for p in net.parameters()} == {torch.float32}
    assert net.scaling_factor == config.get("scaling_factor", 0.18215)
    assert net.shift_factor == config.get("shift_factor", 0.0)


def test_groups_matter_though_all_weights_fit(folder):
    weights = load_file(folder / WEIGHTS)
    assert difference(load_autoencoder(reconfigured(folder, norm_num_groups=2)), weights, config_of()) > 1e-3


@pytest.mark.parametrize("rename", [str, old], ids=["new names", "old names"])
@pytest.mark.parametrize("as_convolution", [False, True])
def test_both_forms_of_attention_are_read(tmp_path, rename, as_convolution):
    weights = random_weights(config_of())
    stored = {}
    for name, w in weights.items():
        is_map = re.search(r"\.to_(q|k|v|out\.0)\.weight$", name)
        stored[rename(name)] = w[:, :, None, None] if as_convolution and is_map else w
    assert (stored.keys() == weights.keys()) == (rename is str)
    assert difference(load_autoencoder(write(tmp_path, config_of(), stored)), weights, config_of()) < 1e-5


def test_names_shapes_and_count_of_the_one_of_stable_diffusion():
    with torch.device("meta"):
        ours = AutoencoderKL(512).state_dict()
    assert {published_name(k): tuple(v.shape) for k, v in ours.items()} == shapes_of(STABLE_DIFFUSION)
    assert sum(v.numel() for v in ours.values()) == 83_653_863
    keys = {key: default for key, (default, *_) in form.KEYS.items()} | STABLE_DIFFUSION
    with torch.device("meta"):
        net = AutoencoderKL(**form.arguments(keys))
    assert net.latent_shape == (4, 64, 64) and {k: v.shape for k, v in net.state_dict().items()} == {
        k: v.shape for k, v in ours.items()
    }


def test_what_a_config_leaves_out_is_the_default_of_the_published_class(tmp_path):
    config = config_of(32, (64,), norm_num_groups=32)
    weights = random_weights(config)
    net = load_autoencoder(write(tmp_path, {"_class_name": "AutoencoderKL"}, weights))
    assert net.shape == (3, 32, 32) and difference(net, weights, config) < 1e-5


# --- Written and read again


@pytest.mark.parametrize(
    "options",
    [{}, {"image_size": (4, 8), "in_channels": 3}, {"channel_mults": (2, 4), "quant_conv": False},
     {"channel_mults": (1,), "blocks": 2, "groups": 2, "middle_attention": False}],
    ids=str,
)  # fmt: skip
@torch.no_grad()
def test_saved_loaded_and_saved_again(tmp_path, options):
    net = small(**options)
    net.scaling_factor, net.shift_factor = 1.25, -0.5
    save_autoencoder(net, tmp_path / "runs" / "a")
    again = load_autoencoder(tmp_path / "runs" / "a")
    assert net.state_dict().keys() == again.state_dict().keys()
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in net.state_dict().items())
    assert (again.shape, again.latent_shape) == (net.shape, net.latent_shape)
    assert (again.scaling_factor, again.shift_factor) == (1.25, -0.5)
    x = torch.randn(2, *net.shape)
    torch.testing.assert_close(again.encode(x), net.encode(x), rtol=0, atol=0)
    save_autoencoder(again, tmp_path / "b")
    assert files(tmp_path / "runs" / "a") == files(tmp_path / "b") and len(files(tmp_path / "b")) == 2


def test_a_saved_network_is_the_published_one(folder, tmp_path):
    """Config and names, against the form written out above."""
    save_autoencoder(load_autoencoder(folder), tmp_path / "saved")
    saved = json.loads((tmp_path / "saved" / CONFIG).read_text())
    new = {
        "force_upcast": True, "latents_mean": None, "latents_std": None, "mid_block_add_attention": True,
        "scaling_factor": 0.18215, "shift_factor": None, "use_post_quant_conv": True, "use_quant_conv": True,
    }  # fmt: skip
    assert saved == {k: v for k, v in config_of().items() if k != "_diffusers_version"} | new
    before, after = load_file(folder / WEIGHTS), load_file(tmp_path / "saved" / WEIGHTS)
    assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)


def test_a_learned_scale_stays_out_of_the_form(tmp_path):
    net = small(scale=0.1)
    save_autoencoder(net, tmp_path)
    again = load_autoencoder(tmp_path)
    assert again.log_scale is None and torch.equal(again.quant_conv.weight, net.quant_conv.weight)


@pytest.mark.parametrize(
    ("options", "attributes", "message"),
    [({"channel_mults": (2, 3)}, {}, r"block_out_channels has 24 \(allowed: multiples of the first, 16\)$"),
     ({}, {"scaling_factor": math.nan}, r"scaling_factor = nan \(allowed: a number in \(0, 65536\)\)$"),
     ({}, {"shift_factor": math.inf}, r"shift_factor = inf \(allowed: a number in")],
)  # fmt: skip
def test_networks_that_the_form_cannot_describe_are_not_written(tmp_path, options, attributes, message):
    net = small(**options)
    for name, value in attributes.items():
        setattr(net, name, value)
    with pytest.raises(ValueError, match=f"cannot describe this network: {message}"):
        save_autoencoder(net, tmp_path / "new")
    assert not (tmp_path / "new").exists()


# --- What is refused

A_COUNT = r"an integer in 1\.\.65536"


@pytest.mark.parametrize(
    ("key", "value", "allowed"),
    [
        ("_class_name", "VQModel", '"AutoencoderKL"'),
        ("sample_size", None, f"{A_COUNT}, or two of them"),
        ("in_channels", 0, A_COUNT),
        ("out_channels", True, A_COUNT),
        ("out_channels", 4, "3, as in_channels"),
        ("latent_channels", "4", A_COUNT),
        ("down_block_types", ["DownEncoderBlock2D", "AttnDownEncoderBlock2D"], "a list of DownEncoderBlock2D"),
        ("down_block_types", ["DownEncoderBlock2D", 1], "a list of DownEncoderBlock2D"),
        ("up_block_types", ["UpDecoderBlock2D", "AttnUpDecoderBlock2D"], "a list of UpDecoderBlock2D"),
        ("up_block_types", ["UpDecoderBlock2D"], "as many of each"),
        ("block_out_channels", [8, 12], "multiples of the first, 8"),
        ("block_out_channels", [], f"a list of up to 16, each {A_COUNT}"),
        ("layers_per_block", 65, r"an integer in 1\.\.64"),
        ("act_fn", "relu", '"silu" or "swish"'),
        ("norm_num_groups", None, A_COUNT),
        ("mid_block_add_attention", 1, "true or false"),
        ("use_quant_conv", None, "true or false"),
        ("use_post_quant_conv", False, "true, as use_quant_conv"),
        ("use_post_quant_conv", 0, "true or false"),
        ("scaling_factor", 0, r"a number in \(0, 65536\)"),
        ("scaling_factor", math.nan, r"a number in \(0, 65536\)"),
        ("shift_factor", "x", r"a number in \(-65536, 65536\) or null"),
        ("latents_mean", [0.0] * 4, "null"),
        ("latents_std", [1.0] * 4, "null"),
        ("force_upcast", None, "true or false"),
        ("block_types", None, "to leave it out"),
    ],
    ids=lambda v: str(v)[:40],
)  # fmt: skip
def test_values_that_this_network_cannot_represent(folder, key, value, allowed):
    words = f'{CONFIG} describes what this autoencoder cannot do: .*{key}"? .*\\(allowed: {allowed}'
    with pytest.raises(ValueError, match=words):
        load_autoencoder(reconfigured(folder, **{key: value}))


def test_every_key_has_a_refused_value_above():
    tested = {key for key, *_ in test_values_that_this_network_cannot_represent.pytestmark[0].args[1]}
    assert form.KEYS.keys() <= tested


def test_networks_and_folders_that_cannot_be(folder, tmp_path):
    with pytest.raises(
        ValueError, match=r"an impossible network: sample_size = 9x9 .*: 9 is not divisible by 2; .*: 8, 10"
    ):
        load_autoencoder(reconfigured(folder, sample_size=9))
    with pytest.raises(ValueError, match="an impossible network: norm_num_groups = 3 does not divide"):
        load_autoencoder(reconfigured(folder, sample_size=8, norm_num_groups=3))
    with pytest.raises(ValueError, match=r"conv_in.weight \(16, 4, 3, 3\), the config's is \(65536, 4, 3, 3\)"):
        load_autoencoder(reconfigured(folder, norm_num_groups=4, block_out_channels=[65536, 65536]))
    folder.rename(tmp_path / "vae")
    with pytest.raises(ValueError, match=f"has no {CONFIG}; .*vae has one$"):
        load_autoencoder(tmp_path)
