"""models/unet.py: the forward pass written out, the counts of parameters, where attention is, and every refusal."""

import math
import re

import pytest
import torch
from test_layers import normalised, silu
from torch import Tensor, nn
from torch.nn import functional as F

from models.layers import Attention
from models.unet import UNet, fitted_attention_resolutions, fitted_channel_mults

SMALL = {"in_channels": 1, "channels": 8, "groups": 4, "attention_resolutions": ()}


def small(image_size=8, **options) -> UNet:
    return UNet(image_size, **{**SMALL, "channel_mults": (1, 2), "blocks": 1} | options)


def randomised(net: UNet) -> UNet:
    """No parameter is zero, so every path matters."""
    for p in net.parameters():
        nn.init.normal_(p, std=0.3)
    return net


# --- The whole, by hand


def forward_by_hand(w: dict[str, Tensor], x: Tensor, t: list[float], y: Tensor, heads: int, eps: float) -> Tensor:
    """A U-Net of two levels, one block each, attention at the lower one, straight from the weights."""

    def conv(name: str, h: Tensor, stride: int = 1) -> Tensor:
        return F.conv2d(h, w[f"{name}.weight"], w[f"{name}.bias"], stride, padding=w[f"{name}.weight"].shape[-1] // 2)

    def linear(name: str, h: Tensor) -> Tensor:
        return h @ w[f"{name}.weight"].mT + w[f"{name}.bias"]

    def norm(name: str, h: Tensor) -> Tensor:
        layer = nn.GroupNorm(4, h.shape[1], eps)
        layer.weight, layer.bias = (nn.Parameter(w[f"{name}.{p}"]) for p in ("weight", "bias"))
        return normalised(h, layer)

    def residual(name: str, h: Tensor) -> Tensor:
        inner = conv(f"{name}.conv_1", silu(norm(f"{name}.norm_1", h)))
        inner = inner + linear(f"{name}.embedding", silu(emb))[:, :, None, None]
        inner = conv(f"{name}.conv_2", silu(norm(f"{name}.norm_2", inner)))
        return inner + (conv(f"{name}.shortcut", h) if f"{name}.shortcut.weight" in w else h)

    def attention(name: str, h: Tensor) -> Tensor:
        b, c = h.shape[:2]
        pixels = norm(f"{name}.norm", h).flatten(2).mT
        q, k, v = (linear(f"{name}.to_{n}", pixels).reshape(b, -1, heads, c // heads) for n in "qkv")
        weight = torch.einsum("bihd,bjhd->bhij", q, k).div(math.sqrt(c // heads)).exp()
        weight = weight / weight.sum(-1, keepdim=True)
        out = torch.einsum("bhij,bjhd->bihd", weight, v).reshape(b, -1, c)
        return h + linear(f"{name}.to_out", out).mT.reshape(h.shape)

    channels = w["conv_in.weight"].shape[0]
    angles = [[n * 10000 ** (-k / (channels // 2 - 1)) for k in range(channels // 2)] for n in t]
    emb = torch.tensor([[*map(math.sin, a), *map(math.cos, a)] for a in angles], dtype=x.dtype)
    emb = linear("time_embedding.3", silu(linear("time_embedding.1", emb))) + w["class_embedding.weight"][y]

    a = conv("conv_in", x)
    b = residual("down.0.residual.0", a)
    c = conv("down.0.resample.conv", b, stride=2)
    d = attention("down.1.attention.0", residual("down.1.residual.0", c))
    h = residual("middle_2", attention("middle_attention", residual("middle_1", d)))
    h = attention("up.0.attention.0", residual("up.0.residual.0", torch.cat([h, d], 1)))
    h = attention("up.0.attention.1", residual("up.0.residual.1", torch.cat([h, c], 1)))
    h = conv("up.0.resample.conv", h.repeat_interleave(2, 2).repeat_interleave(2, 3))
    h = residual("up.1.residual.0", torch.cat([h, b], 1))
    h = residual("up.1.residual.1", torch.cat([h, a], 1))
    return conv("conv_out", silu(norm("norm_out", h)))


def test_the_network_is_the_formula():
    net = small((8, 12), attention_resolutions=[6], heads=2, num_classes=5, dropout=0.4, norm_eps=1e-3, out_channels=2)
    net = randomised(net).double().eval()
    x, y, t = torch.randn(3, 1, 8, 12).double(), torch.tensor([4, 0, 2]), [0.0, 1.0, 20.0]
    expected = forward_by_hand(net.state_dict(), x, t, y, heads=2, eps=1e-3)
    ours = net(x, torch.tensor(t), y)
    assert ours.shape == (3, 2, 8, 12) and expected.abs().mean() > 0.1
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)  # the frequencies are float32


# --- Counts and shapes


def parameters(**options) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in UNet(**options).parameters())


def test_parameter_counts_of_published_networks():
    assert parameters(image_size=32) == 35_746_307  # CIFAR-10: all defaults
    widths = {"channels": 128, "channel_mults": (1, 1, 2, 2, 4, 4), "blocks": 1}
    attention = {"attention_resolutions": [2], "head_channels": 8}
    assert parameters(image_size=32, in_channels=1, **widths, **attention) == 77_357_825


@pytest.mark.parametrize(
    "options",
    [
        {"image_size": 8},
        {"image_size": (12, 20), "channel_mults": (1, 2, 1), "attention_resolutions": [5, 20]},
        {"image_size": 6, "channel_mults": (2,)},
        {"image_size": (7, 5), "channel_mults": (1,), "middle_attention": False},
        {"image_size": 16, "channel_mults": [3, 1, 2, 1], "blocks": [1, 3, 2, 1]},
        {"image_size": (12, 8), "patch": 2, "attention_resolutions": [3]},
        {"image_size": 8, "attention": "linear", "attention_resolutions": [8, 4]},
        {"image_size": [4, 8], "out_channels": 2, "downsample_padding": 0, "flip_sin_to_cos": True, "freq_shift": 0},
    ],
    ids=str,
)
@pytest.mark.parametrize("in_channels", [1, 3, 5])
def test_shapes_zero_output_at_first_and_gradients_to_every_parameter(options, in_channels):
    net = small(**options, in_channels=in_channels, num_classes=3)
    size = options["image_size"]
    height, width = (size, size) if isinstance(size, int) else size
    out_channels = options.get("out_channels", in_channels)
    x, t, y = torch.randn(2, in_channels, height, width), torch.tensor([1, 1000]), torch.tensor([0, 2])
    assert torch.equal(net(x, t, y), torch.zeros(2, out_channels, height, width))

    randomised(net)(x, t, y).square().mean().backward()
    for name, p in net.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all(), name
        size = p.grad.abs().max().item()
        if name.endswith("to_k.bias"):  # one number added to every key of a softmax changes nothing
            assert size < 1e-3 * net.conv_out.weight.grad.abs().max(), name
        else:
            assert size > 0, name


def test_patches_are_channels():
    """patch = 2 is the network on pixel_unshuffle(x), channel by channel, with its output shuffled back."""
    net = randomised(small((8, 12), in_channels=3, out_channels=2, patch=2, attention_resolutions=[3])).eval()
    plain = randomised(small((4, 6), in_channels=12, out_channels=8, attention_resolutions=[3])).eval()
    plain.load_state_dict(net.state_dict())
    x, t = torch.randn(2, 3, 8, 12), torch.tensor([1, 70])
    assert torch.equal(net(x, t), F.pixel_shuffle(plain(F.pixel_unshuffle(x, 2), t), 2))


# --- Attention is where it was asked for


def attended(net: UNet) -> list[tuple[int, int]]:
    """Height and width of what each attention sees, in order of the forward pass."""
    seen = []
    for module in net.modules():
        if isinstance(module, Attention):
            module.register_forward_pre_hook(lambda _, args: seen.append(tuple(args[0].shape[2:])))
    net(torch.zeros(1, net.in_channels, *net.image_size), torch.ones(1))
    assert len(seen) == sum(isinstance(m, Attention) for m in net.modules())
    return seen


@pytest.mark.parametrize(
    ("size", "blocks", "resolutions", "middle", "expected"),
    [
        (16, 2, [], False, []),
        (16, 2, [], True, [(4, 4)]),
        (16, 2, [8], True, [(8, 8)] * 2 + [(4, 4)] + [(8, 8)] * 3),
        (16, 1, [16, 4], False, [(16, 16)] + [(4, 4)] * 3 + [(16, 16)] * 2),
        (16, [1, 2, 3], [8, 4], True, [(8, 8)] * 2 + [(4, 4)] * 8 + [(8, 8)] * 3),
        ((12, 20), 1, [10], True, [(6, 10), (3, 5), (6, 10), (6, 10)]),
        ((20, 12), 1, [20], False, [(20, 12)] * 3),
    ],
)
def test_attention_follows_the_blocks_of_its_resolutions(size, blocks, resolutions, middle, expected):
    options = {"blocks": blocks, "attention_resolutions": resolutions, "middle_attention": middle}
    assert attended(small(size, channel_mults=(1, 2, 1), **options)) == expected


def test_kind_and_heads_reach_every_attention():
    def all_of(**options) -> list[Attention]:
        net = small(8, attention_resolutions=[8, 4], **options)
        return [m for m in net.modules() if isinstance(m, Attention)]

    assert len(all_of()) == 7
    assert {m.kind for m in all_of()} == {"full"} and {m.kind for m in all_of(attention="linear")} == {"linear"}
    assert {m.heads for m in all_of()} == {1} and {m.heads for m in all_of(heads=4)} == {4}
    by_width = all_of(head_channels=4, heads=3)  # 8 and 16 channels: 2 and 4 heads of width 4
    assert sorted(m.heads for m in by_width) == [2, 2, 2, 4, 4, 4, 4]
    assert all(m.norm.num_channels // m.heads == 4 for m in by_width)


def test_full_and_linear_attention_have_the_same_weights_and_different_outputs():
    full, linear = (randomised(small(attention=kind)) for kind in ("full", "linear"))
    linear.load_state_dict(full.state_dict())
    x, t = torch.randn(2, 1, 8, 8), torch.tensor([3, 4])
    assert not torch.allclose(full.eval()(x, t), linear.eval()(x, t), atol=1e-3)


# --- A network fitted to a size

LEVELS = [  # of squares; runs store null for them, so no size may ever get others
    *[(n, 2) for n in range(16, 32, 2)],
    *[(n, 2 + (n % 4 == 0)) for n in range(32, 64, 2)],
    *[(n, 3 + (n % 8 == 0)) for n in range(64, 128, 4)],
    (128, 5),
]
MULTS = {2: (1, 2), 3: (1, 2, 3), 4: (1, 2, 3, 4), 5: (1, 1, 2, 3, 4)}


def fitted(size, **options) -> UNet:
    with torch.device("meta"):
        return small(size, channel_mults=None, attention_resolutions=None, **options)


@pytest.mark.parametrize(("side", "levels"), LEVELS)
def test_a_network_fits_every_size_that_is_allowed(side, levels):
    net = fitted(side)
    widths = [stage.residual[-1].conv_2.out_channels for stage in net.down]
    assert tuple(width // 8 for width in widths) == fitted_channel_mults((side, side)) == MULTS[levels]
    deepest = side >> levels - 1
    assert 8 <= deepest <= 31 and (deepest < 16 or deepest % 2)
    resolutions = fitted_attention_resolutions((side, side), levels)
    assert resolutions == tuple(n for n in (side >> level for level in range(levels)) if n <= 16)
    attention = {side >> level for level, stage in enumerate(net.down) if isinstance(stage.attention[0], Attention)}
    assert attention == set(resolutions)
    x, t = torch.empty(2, 1, side, side, device="meta"), torch.ones(2, device="meta")
    assert net(x, t).shape == x.shape


def test_all_other_squares_are_refused_with_the_nearest_that_are_allowed():
    allowed = [side for side, _ in LEVELS]
    assert allowed == [n for n in range(16, 129) if n % 2 == 0 and (n <= 64 or n % 4 == 0)]
    for side in set(range(1, 200)) - set(allowed):
        with pytest.raises(ValueError, match=f"image_size = {side}x{side} .* sides of 16 to 128 pixels") as error:
            fitted(side)
        near = [int(n) for n in re.findall(r"(\d+)x\1", str(error.value).partition("nearest legal sizes: ")[2])]
        distances = sorted(abs(n - side) for n in allowed)[:2]
        assert set(near) <= set(allowed) and [abs(n - side) for n in near] == distances, side


@pytest.mark.parametrize(
    ("size", "patch", "levels", "resolutions"),
    [
        ((32, 48), 1, 3, (12,)),
        ((48, 32), 1, 3, (12,)),
        ((16, 128), 1, 2, ()),
        ((20, 16), 1, 2, (10,)),
        ((16, 16), 1, 2, (16, 8)),
        ((64, 128), 1, 4, (16,)),
        ((128, 128), 1, 5, (16, 8)),
        ((64, 64), 2, 3, (16, 8)),
        ((256, 256), 2, 5, (16, 8)),
        ((36, 84), 2, 2, (21,)),
    ],
)
def test_sizes_that_are_no_squares_and_patches(size, patch, levels, resolutions):
    net = fitted(size, patch=patch)
    assert len(net.down) == len(fitted_channel_mults(size, patch)) == levels
    assert fitted_attention_resolutions(size, levels, patch) == resolutions
    x, t = torch.empty(1, 1, *size, device="meta"), torch.ones(1, device="meta")
    assert net(x, t).shape == x.shape


@pytest.mark.parametrize(
    ("size", "patch", "message"),
    [
        ((32, 51), 1, "32x51 with patch = 1: .* nearest legal sizes: 32x50, 32x52; for others set channel_mults$"),
        ((62, 128), 1, "halved to 32x32 or less; nearest legal sizes: 60x128, 64x128; "),
        ((16, 129), 1, "sides of 16 to 128 pixels .* nearest legal sizes: 16x128, 16x126; "),
        ((16, 16), 2, "16x16 with patch = 2: .* sides of 32 to 256 pixels .* nearest legal sizes: 32x32, 36x36; "),
        ((2**20, 1), 2**20, "nearest legal sizes: "),
        ((8, 0), 1, r"image_size = \(8, 0\) must be"),
        ((8, 8, 8), 1, r"image_size = \(8, 8, 8\) must be"),
        ((8, 8), 0, "patch = 0 must be an integer >= 1"),
        ((8, 8), True, "patch = True must be an integer >= 1"),
    ],
)
def test_sizes_that_no_network_is_fitted_to(size, patch, message):
    with pytest.raises(ValueError, match=message):
        fitted(size, patch=patch)


def test_either_can_be_fitted_alone():
    assert attended(small(32, channel_mults=(1, 1), attention_resolutions=None)) == [(16, 16)] * 4
    assert attended(small(32, channel_mults=None, attention_resolutions=[])) == [(8, 8)]
    with pytest.raises(ValueError, match=r"has 4, which never occurs; a 32x32 .* resolutions 32, 16, 8$"):
        small(32, channel_mults=None, attention_resolutions=[4])


# --- t, y, dropout, the details in which published weights differ


def test_time_offset_shifts_t():
    ours, published = (randomised(small(time_offset=offset)).eval() for offset in (-1, 0))
    ours.load_state_dict(published.state_dict())
    x, t = torch.randn(3, 1, 8, 8), torch.tensor([1, 2, 500])
    assert torch.equal(ours(x, t), published(x, t - 1))
    assert not torch.allclose(ours(x, t), published(x, t))


def test_integer_and_real_t_agree_and_every_image_has_its_own():
    net = randomised(small()).eval()
    x, t = torch.randn(3, 1, 8, 8), torch.tensor([1, 50, 1000])
    assert torch.equal(net(x, t), net(x, t.float()))
    alone = torch.cat([net(x[i : i + 1], t[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(net(x, t), alone, rtol=1e-4, atol=1e-4)
    assert (net(x, t + 1) - net(x, t)).abs().amax((1, 2, 3)).min() > 1e-6


def test_classes_shift_the_embedding():
    net = randomised(small(num_classes=4)).eval()
    x, t = torch.randn(1, 1, 8, 8).expand(4, -1, -1, -1), torch.full((4,), 7)
    out = net(x, t, torch.arange(4))
    assert len({round(v, 4) for v in out.abs().mean((1, 2, 3)).tolist()}) == 4
    assert net.class_embedding.weight.shape == (4, 32)
    plain = randomised(small()).eval()
    plain.load_state_dict({k: v for k, v in net.state_dict().items() if k != "class_embedding.weight"})
    nn.init.zeros_(net.class_embedding.weight)
    torch.testing.assert_close(net(x, t, torch.arange(4)), plain(x, t))


def test_dropout_acts_in_training_only():
    net, x, t = randomised(small(dropout=0.5)), torch.randn(2, 1, 8, 8), torch.tensor([3, 4])
    assert not torch.equal(net(x, t), net(x, t))
    net.eval()
    assert torch.equal(net(x, t), net(x, t))
    assert {m.p for m in net.modules() if isinstance(m, nn.Dropout)} == {0.5}
    none = randomised(small(dropout=0.0))
    assert torch.equal(none(x, t), none(x, t))


def test_details_reach_their_layers():
    net = small(norm_eps=0.01, groups=2, flip_sin_to_cos=True, freq_shift=0, downsample_padding=0)
    norms = [m for m in net.modules() if isinstance(m, nn.GroupNorm)]
    assert {(m.eps, m.num_groups) for m in norms} == {(0.01, 2)}
    assert len(norms) == 2 * 8 + 1 + 1  # the residual blocks, the attention, the end
    embedding = net.time_embedding[0]
    assert embedding(torch.zeros(1)).tolist() == [[1, 1, 1, 1, 0, 0, 0, 0]]
    assert embedding.omega.tolist() == pytest.approx([1, 0.1, 0.01, 0.001])
    assert net.down[0].resample.padding == 0


# --- Refusals


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"attention_resolutions": [8, 5]}, "has 5, which never occurs; a 8x8 image .* resolutions 8, 4$"),
        ({"attention_resolutions": [8], "patch": 2}, "has 8, .* patch = 2 has the resolutions 4, 2$"),
        ({"image_size": (8, 20), "attention_resolutions": [8]}, "has 8, which never occurs; .* resolutions 20, 10$"),
        ({"image_size": (10, 30), "channel_mults": (1, 1, 1)}, "10x30 with 3 levels .*: 10 is not .* by 4; .*: 8, 12$"),
        ({"image_size": (8, 2), "channel_mults": (1, 1, 1)}, "8x2 .*: 2 is not divisible by 4; nearest .*: 4$"),
        ({"image_size": (8, 10), "patch": 2}, "8x10 .* patch = 2: 10 is not divisible by 4; .*: 8, 12$"),
        ({"image_size": 7}, "7 is not divisible by 2; nearest legal sizes: 6, 8$"),
        ({"patch": 0}, "patch = 0 must be an integer >= 1"),
        ({"image_size": 0}, "image_size = .* must be one integer >= 1"),
        ({"image_size": (8, 8, 8)}, r"image_size = \(8, 8, 8\) must be"),
        ({"image_size": (8.0, 8)}, "image_size = .* must be"),
        ({"groups": 3}, "groups = 3 does not divide 8 channels of a group norm; nearest that do: 1, 2, 4"),
        ({"groups": 0}, "groups = 0 "),
        ({"channels": 12, "groups": 8}, "groups = 8 does not divide 12 .*: 4, 6, 12"),
        ({"heads": 3}, "heads = 3 does not divide the 16 channels of an attention block; nearest that do: 1, 2, 4"),
        ({"head_channels": 5}, "head_channels = 5 does not divide the 16 channels .*: 2, 4, 8"),
        ({"attention": "none"}, "attention = 'none' is not known; allowed: full, linear"),
        ({"downsample_padding": 2}, "downsample_padding = 2 "),
        ({"channel_mults": ()}, "channel_mults is empty"),
        ({"channel_mults": (1, 0)}, r"channel_mults\[1\] = 0 must be an integer >= 1"),
        ({"channel_mults": (1, 1.5)}, r"channel_mults\[1\] = 1.5 must"),
        ({"blocks": 0}, r"blocks\[0\] = 0 must"),
        ({"blocks": [1, 1, 1]}, "blocks has 3 entries, but channel_mults has 2 levels"),
        ({"channels": 0}, "channels = 0 must"),
        ({"channels": 2}, "2 channels is too narrow"),
        ({"in_channels": True}, "in_channels = True must"),
        ({"out_channels": 0}, "out_channels = 0 must"),
        ({"num_classes": 0}, "num_classes = 0 must"),
        ({"dropout": 1.0}, r"dropout = 1 must lie in \[0, 1\)"),
        ({"dropout": -0.1}, "dropout = -0.1 must"),
        ({"dropout": math.nan}, "dropout = nan must"),
        ({"drop": 1}, r"drop = 1 must lie in \[0, 1\)"),
        ({"condition_channels": -1}, "condition_channels = -1 must be an integer >= 0"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused_with_what_would(options, message):
    with pytest.raises(ValueError, match=message):
        small(**options)


@pytest.mark.parametrize(("options", "unit"), [({"channel_mults": (1, 1, 1)}, 4), ({"patch": 3}, 6), ({"patch": 2}, 4)])
def test_suggested_sizes_are_legal_and_none_is_nearer(options, unit):
    for size in (1, 5, 7, 11, 13, 21):
        with pytest.raises(ValueError, match="nearest legal sizes") as error:
            small((unit, size), **options)
        near = [int(n) for n in str(error.value).split(": ")[-1].split(", ")]
        assert near == [n for n in range(1, 30) if n % unit == 0 and abs(n - size) < unit]
        for legal in near:
            small((unit, legal), **options)


@pytest.mark.parametrize("shape", [(2, 1, 8, 4), (2, 1, 4, 8), (2, 3, 8, 8), (1, 8, 8)])
def test_images_of_another_shape_are_refused(shape):
    with pytest.raises(ValueError, match=r"x_t has shape .*; this network takes \(B, 1, 8, 8\)"):
        small()(torch.zeros(shape), torch.ones(2))


def test_classes_must_be_given_exactly_when_the_network_has_them():
    x, t, y = torch.zeros(2, 1, 8, 8), torch.ones(2), torch.zeros(2, dtype=torch.long)
    with pytest.raises(ValueError, match="num_classes = 3, y is missing"):
        small(num_classes=3)(x, t)
    with pytest.raises(ValueError, match="num_classes = None, y is given"):
        small()(x, t, y)


# --- Checkpointing


@pytest.mark.parametrize("attention", ["full", "linear"])
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_checkpointing_changes_neither_the_output_nor_a_gradient_nor_what_is_drawn_after(attention, precision):
    options = {"attention_resolutions": [4], "attention": attention, "dropout": 0.1, "num_classes": 3, "blocks": 2}
    plain, saving = small(**options), small(**options, checkpointing=True)
    saving.load_state_dict(randomised(plain).state_dict())
    x, t, y, ends = torch.randn(5, 1, 8, 8), torch.arange(1, 6), torch.tensor([0, 1, 2, 0, 1]), []
    for net in (plain, saving):
        net.train().to(memory_format=torch.channels_last)
        images = x.clone().requires_grad_()
        torch.manual_seed(7)
        with torch.autocast("cpu", precision, enabled=precision != torch.float32):
            out = net(images, t, y)
            loss = out.float().square().mean()
        loss.backward()
        ends.append([out, images.grad, *(p.grad for p in net.parameters()), torch.rand(3)])
    for one, other in zip(*ends, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def saved_bytes(net: UNet) -> int:
    """Of all that autograd keeps of a forward pass."""
    storages = {}

    def pack(x: Tensor) -> Tensor:
        storages[x.untyped_storage().data_ptr()] = x.untyped_storage()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        out = net(torch.zeros(8, 1, 8, 8), torch.ones(8))  # noqa: F841  # its graph holds what is counted
    own = {p.untyped_storage().data_ptr() for p in net.parameters()}
    return sum(storage.nbytes() for address, storage in storages.items() if address not in own)


def test_checkpointing_keeps_the_inputs_of_blocks_alone_and_only_in_training():
    options = {"attention_resolutions": [4, 8], "blocks": 2}
    plain, saving = small(**options), small(**options, checkpointing=True)
    assert saved_bytes(saving.train()) < saved_bytes(plain.train()) / 3
    assert saved_bytes(saving.eval()) == saved_bytes(plain.eval())  # likelihoods take derivatives of these
    assert saving.state_dict().keys() == plain.state_dict().keys()
    with torch.no_grad():
        assert saved_bytes(saving.train()) == 0
