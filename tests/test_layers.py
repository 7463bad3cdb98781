"""models/layers.py: each layer against its formula, written out."""

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.layers import Attention, Downsample, ResidualBlock, Upsample, group_norm, zeroed

HEADS = [(1, None), (2, None), (None, 4), (5, 2)]  # heads, head_channels; the last one: head_channels decides


def randomised(layer: nn.Module) -> nn.Module:
    """Every parameter normal, in float64: no zero hides a term."""
    layer.double()
    for p in layer.parameters():
        nn.init.normal_(p, std=0.5)
    return layer


def attention(kind: str = "full", heads: int | None = 2, head_channels: int | None = None) -> Attention:
    return randomised(Attention(8, heads, head_channels, kind, groups=4, norm_eps=1e-6))


def normalised(x: Tensor, norm: nn.GroupNorm) -> Tensor:
    """Group norm of (B, C, H, W), written out."""
    grouped = x.reshape(len(x), norm.num_groups, -1)
    mean = grouped.mean(2, keepdim=True)
    variance = ((grouped - mean) ** 2).mean(2, keepdim=True)
    unit = ((grouped - mean) / (variance + norm.eps).sqrt()).reshape(x.shape)
    return unit * norm.weight[:, None, None] + norm.bias[:, None, None]


def silu(x: Tensor) -> Tensor:
    return x / (1 + (-x).exp())


# --- Attention


def by_hand(layer: Attention, x: Tensor, heads: int) -> Tensor:
    """Attention (C, H, W) -> (C, H, W) by a loop over heads and pixels."""
    c, height, width = x.shape
    d = c // heads
    pixels = normalised(x[None], layer.norm)[0].reshape(c, -1).mT  # (N, C), row by row
    q, k, v = (pixels @ to.weight.mT + to.bias for to in (layer.to_q, layer.to_k, layer.to_v))
    out = torch.zeros_like(q)
    for e in range(heads):
        own = slice(e * d, (e + 1) * d)
        for i in range(len(pixels)):
            if layer.kind == "full":
                score = torch.stack([q[i, own] @ k[j, own] / math.sqrt(d) for j in range(len(pixels))]).exp()
                weight = score / score.sum()
            else:  # softmax of q over the width of the head, of k over the pixels
                row = q[i, own].exp() / q[i, own].exp().sum()
                weight = k[:, own].exp() / k[:, own].exp().sum(0) @ row
            assert weight.sum().item() == pytest.approx(1, rel=1e-12)
            out[i, own] = weight @ v[:, own]
    return x + (out @ layer.to_out.weight.mT + layer.to_out.bias).mT.reshape(c, height, width)


@pytest.mark.parametrize("kind", ["full", "linear"])
@pytest.mark.parametrize(("heads", "head_channels"), HEADS)
def test_attention_is_the_loop_over_heads(kind, heads, head_channels):
    layer, x = attention(kind, heads, head_channels), torch.randn(2, 8, 3, 2, dtype=torch.float64)
    expected = torch.stack([by_hand(layer, image, 8 // head_channels if head_channels else heads) for image in x])
    torch.testing.assert_close(layer(x), expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("kind", ["full", "linear"])
def test_attention_weights_sum_to_1_over_the_pixels(kind):
    """Values that are the same at every pixel come out as they are, whatever queries and keys say."""
    layer, x = attention(kind), torch.randn(2, 8, 4, 4, dtype=torch.float64)
    nn.init.zeros_(layer.to_v.weight)
    added = layer.to_v.bias @ layer.to_out.weight.mT + layer.to_out.bias
    torch.testing.assert_close(layer(x), x + added[:, None, None], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", ["full", "linear"])
def test_equal_keys_average_the_values(kind):
    layer, x = attention(kind), torch.randn(2, 8, 4, 4, dtype=torch.float64)
    nn.init.zeros_(layer.to_k.weight)
    mean = normalised(x, layer.norm).mean((2, 3)) @ layer.to_v.weight.mT + layer.to_v.bias
    added = mean @ layer.to_out.weight.mT + layer.to_out.bias
    torch.testing.assert_close(layer(x), x + added[:, :, None, None], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", ["full", "linear"])
def test_permuted_pixels_come_out_permuted(kind):
    layer, x, order = attention(kind), torch.randn(2, 8, 3, 4, dtype=torch.float64), torch.randperm(12)

    def permuted(image: Tensor) -> Tensor:
        return image.flatten(2)[:, :, order].reshape(image.shape)

    torch.testing.assert_close(layer(permuted(x)), permuted(layer(x)), rtol=1e-11, atol=1e-11)
    assert not torch.allclose(permuted(x), x)


@pytest.mark.parametrize(
    ("heads", "head_channels", "message"),
    [
        (3, None, "heads = 3 does not divide the 8 channels .* that do: 1, 2, 4"),
        (7, None, "heads = 7 .* that do: 2, 4, 8"),
        (0, None, "heads = 0 "),
        (-2, None, "heads = -2 "),
        (None, None, "heads = None "),
        (1, 3, "head_channels = 3 does not divide the 8 channels .* that do: 1, 2, 4"),
        (1, 0, "head_channels = 0 "),
    ],
)
def test_heads_that_do_not_divide(heads, head_channels, message):
    with pytest.raises(ValueError, match=message):
        Attention(8, heads, head_channels, "full", groups=4, norm_eps=1e-6)


def test_unknown_kind():
    with pytest.raises(ValueError, match="attention = 'sparse' is not known; allowed: full, linear"):
        Attention(8, 1, None, "sparse", groups=4, norm_eps=1e-6)


# --- ResidualBlock


@pytest.mark.parametrize("out_channels", [8, 12])
def test_a_residual_block_starts_as_its_shortcut(out_channels):
    block = ResidualBlock(8, out_channels, 16, dropout=0.5, groups=4, norm_eps=1e-6)
    x, emb = torch.randn(2, 8, 4, 6), torch.randn(2, 16)
    expected = x
    if out_channels != 8:
        weight, bias = block.shortcut.weight[:, :, 0, 0], block.shortcut.bias[:, None, None]
        expected = torch.einsum("oi,bihw->bohw", weight, x) + bias
    torch.testing.assert_close(block(x, emb), expected, rtol=1e-5, atol=1e-6)
    layer = Attention(8, 2, None, "full", groups=4, norm_eps=1e-6)
    assert torch.equal(layer(x), x)


@pytest.mark.parametrize("out_channels", [8, 12])
@pytest.mark.parametrize("training", [False, True])
def test_a_residual_block_is_its_formula(out_channels, training):
    block = randomised(ResidualBlock(8, out_channels, 16, dropout=0.3, groups=4, norm_eps=1e-2)).train(training)
    x, emb = torch.randn(2, 8, 4, 6, dtype=torch.float64), torch.randn(2, 16, dtype=torch.float64)
    torch.manual_seed(1)
    ours = block(x, silu(emb))

    torch.manual_seed(1)
    h = F.conv2d(silu(normalised(x, block.norm_1)), block.conv_1.weight, block.conv_1.bias, padding=1)
    h = h + (silu(emb) @ block.embedding.weight.mT + block.embedding.bias)[:, :, None, None]
    h = F.dropout(silu(normalised(h, block.norm_2)), 0.3, training)
    h = F.conv2d(h, block.conv_2.weight, block.conv_2.bias, padding=1)
    torch.testing.assert_close(ours, block.shortcut(x) + h, rtol=1e-11, atol=1e-11)


# --- Resampling


def test_downsample_keeps_every_second_output_of_a_full_convolution():
    """Padding 1 on all sides keeps the even ones, padding on the right and bottom only the odd ones."""
    x = torch.randn(2, 3, 6, 8, dtype=torch.float64)
    for padding, first in ((1, 0), (0, 1)):
        layer = randomised(Downsample(3, padding))
        full = F.conv2d(x, layer.conv.weight, layer.conv.bias, padding=1)
        assert layer(x).shape == (2, 3, 3, 4)
        torch.testing.assert_close(layer(x), full[:, :, first::2, first::2], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("padding", [2, -1, "same"])
def test_unknown_padding(padding):
    with pytest.raises(ValueError, match=f"downsample_padding = {padding!r} is not known; allowed: 0, 1"):
        Downsample(4, padding)


def test_upsample_repeats_every_pixel_then_convolves():
    layer, x = randomised(Upsample(3)), torch.randn(2, 3, 2, 5, dtype=torch.float64)
    repeated = x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    expected = F.conv2d(F.pad(repeated, (1, 1, 1, 1)), layer.conv.weight, layer.conv.bias)
    assert expected.shape == (2, 3, 4, 10)
    torch.testing.assert_close(layer(x), expected, rtol=1e-12, atol=1e-12)


# --- Norm and zeros


@pytest.mark.parametrize(
    ("channels", "groups", "near"), [(20, 32, "5, 10, 20"), (30, 8, "5, 6, 10"), (16, 3, "1, 2, 4")]
)
def test_groups_that_do_not_divide_name_the_nearest_that_do(channels, groups, near):
    with pytest.raises(ValueError, match=f"groups = {groups} does not divide {channels} channels .* that do: {near}$"):
        group_norm(channels, groups, 1e-6)


@pytest.mark.parametrize("groups", [0, -4])
def test_groups_below_1_are_refused(groups):
    with pytest.raises(ValueError, match=f"groups = {groups} .* nearest that do: 1, 2, 4"):
        group_norm(16, groups, 1e-6)


def test_group_norm_has_its_eps():
    norm, x = group_norm(8, 4, 0.5).double(), torch.randn(2, 8, 3, 3, dtype=torch.float64)
    torch.testing.assert_close(norm(x), normalised(x, norm), rtol=1e-12, atol=1e-12)
    assert norm.eps == 0.5 and norm.num_groups == 4


def test_zeroed_returns_the_layer_with_every_parameter_zero():
    layer = nn.Conv2d(2, 3, 3)
    assert zeroed(layer) is layer and all((p == 0).all() for p in layer.parameters())
