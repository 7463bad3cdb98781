"""models/transformer.py: closed forms, what tokens do, and the U-Net that is told of them."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from ddpm.data.batch import Condition
from ddpm.training.cost import gflop
from models.layers import ResidualBlock
from models.transformer import GatedFeedForward, SpatialTransformer, TokenAttention, TransformerBlock
from models.unet import UNet

C, D, L, B, N = 8, 6, 5, 2, 4


def randomised(net: nn.Module) -> nn.Module:
    for p in net.parameters():
        nn.init.normal_(p, std=0.3)
    return net.eval()


def unet(**options) -> UNet:
    small = {"image_size": 8, "in_channels": 2, "channels": 8, "channel_mults": (1, 2), "blocks": 1, "groups": 4}
    return randomised(UNet(**small | {"attention_resolutions": [8, 4], "token_channels": D} | options))


def tokens() -> torch.Tensor:
    return torch.randn(B, L, D)


def inputs(height: int = 8, width: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(B, 2, height, width), torch.tensor([1, 30])


# --- The layers


@pytest.mark.equation("LDM (cross-attention)")
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("across", [False, True])
def test_attention_is_a_mean_of_values_by_softmax(masked, across):
    layer, h = randomised(TokenAttention(C, 2, D if across else None)), torch.randn(B, N, C)
    source = tokens() if across else h
    mask = torch.rand(B, source.shape[1]) < 0.6
    mask[:, 0] = True
    q, k, v = h @ layer.to_q.weight.T, source @ layer.to_k.weight.T, source @ layer.to_v.weight.T
    expected = torch.empty(B, N, C)
    for b in range(B):
        for head in (slice(0, 4), slice(4, 8)):
            for n in range(N):
                weights = torch.exp(k[b, :, head] @ q[b, n, head] / math.sqrt(4)) * (mask[b] if masked else 1)
                expected[b, n, head] = weights / weights.sum() @ v[b, :, head]
    expected = expected @ layer.to_out.weight.T + layer.to_out.bias
    taken = layer(h, source if across else None, mask if masked else None)
    torch.testing.assert_close(taken, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.equation("GLU (5)")
def test_a_gated_unit_multiplies_by_gelu():
    layer, x = randomised(GatedFeedForward(2)), torch.randn(1, 3, 2)
    V, W = layer.gated.weight[:8], layer.gated.weight[8:]
    c, b = layer.gated.bias[:8], layer.gated.bias[8:]
    gate, value = x @ W.T + b, x @ V.T + c
    inner = gate * (1 + torch.erf(gate / math.sqrt(2))) / 2 * value
    torch.testing.assert_close(layer(x), inner @ layer.back.weight.T + layer.back.bias)


@pytest.mark.equation("ADM (AdaGN)")
def test_scale_and_shift_are_those_of_the_second_norm():
    block = randomised(ResidualBlock(4, 4, 3, 0.0, 2, 1e-6, scale_shift=True))
    x, emb = torch.randn(B, 4, 3, 3), torch.randn(B, 3)
    y_s, y_b = (block.embedding(emb)[:, half, None, None] for half in (slice(0, 4), slice(4, 8)))
    h = block.conv_1(F.silu(block.norm_1(x)))
    expected = x + block.conv_2(F.silu((1 + y_s) * block.norm_2(h) + y_b))
    torch.testing.assert_close(block(x, emb), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("only_cross_attention", [False, True])
def test_a_block_adds_attention_to_itself_to_tokens_and_a_feed_forward(only_cross_attention):
    block, h, told = randomised(TransformerBlock(C, 2, D, only_cross_attention)), torch.randn(B, N, C), tokens()
    first = block.self_attention(block.norm_1(h), told if only_cross_attention else None)
    second = block.cross_attention(block.norm_2(h + first), told)
    expected = h + first + second + block.feed_forward(block.norm_3(h + first + second))
    torch.testing.assert_close(block(h, told), expected)
    assert (block.self_attention.to_k.in_features == D) == only_cross_attention


def test_both_projections_are_one_linear_map_of_each_pixel():
    by_conv = randomised(SpatialTransformer(C, D, 2, layers=2, groups=4))
    linear = SpatialTransformer(C, D, 2, layers=2, linear_projection=True, groups=4).eval()
    state = by_conv.state_dict()
    linear.load_state_dict({k: v.flatten(1) if v.ndim == 4 else v for k, v in state.items()})
    x, told = torch.randn(B, C, 3, 2), tokens()
    torch.testing.assert_close(linear(x, told), by_conv(x, told), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(by_conv(x, told), x) and by_conv.norm_in.eps == 1e-6
    fresh = SpatialTransformer(C, D, 2, groups=4)
    assert torch.equal(fresh(x, told), x)  # at first


def test_pixels_are_in_their_places():
    """Neither the norm nor attention knows where a pixel is, so a map that is turned gives one that is turned."""
    layer, x, told = randomised(SpatialTransformer(C, D, 2, groups=4)), torch.randn(B, C, 2, 3), tokens()
    torch.testing.assert_close(layer(x, told), layer(x.mT, told).mT, rtol=1e-5, atol=1e-5)


# --- The U-Net that is told of tokens


def test_tokens_are_attended_to_on_levels_with_attention_and_in_the_middle():
    net = unet(attention_resolutions=[4], heads=[1, 2], transformer_layers=[1, 3], only_cross_attention=[False, True])
    there = {name: m for name, m in net.named_modules() if isinstance(m, SpatialTransformer)}
    assert there.keys() == {"down.1.attention.0", "up.0.attention.0", "up.0.attention.1", "middle_attention"}
    assert {(m.heads, len(m.blocks)) for m in there.values()} == {(2, 3)}
    only = {name for name, m in there.items() if m.blocks[0].only_cross_attention}
    assert only == there.keys() - {"middle_attention"} and net.takes == ("tokens",)
    assert unet(num_classes=3, condition_channels=1).takes == ("classes", "tokens", "image")
    assert not unet(middle_attention=False).middle_attention.state_dict()


@pytest.mark.parametrize("only_cross_attention", [False, True])
@torch.no_grad()
def test_order_of_tokens_and_what_a_mask_leaves_out_do_not_matter(only_cross_attention):
    net, (x, t), told = unet(only_cross_attention=only_cross_attention), inputs(), tokens()
    mask = torch.tensor([[True, True, False, True, False], [True] * L])
    out = net(x, t, Condition(tokens=told, mask=mask))
    order = torch.tensor([3, 0, 4, 1, 2])
    torch.testing.assert_close(
        net(x, t, Condition(tokens=told[:, order], mask=mask[:, order])), out, rtol=1e-4, atol=1e-4
    )
    other = torch.where(mask[..., None], told, 9.0)
    torch.testing.assert_close(net(x, t, Condition(tokens=other, mask=mask)), out)
    short = net(x[:1], t[:1], Condition(tokens=told[:1, [0, 1, 3]]))
    torch.testing.assert_close(short, out[:1], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(net(x, t, Condition(tokens=told)), out, atol=1e-3)
    none = net(x, t, Condition(tokens=told, mask=torch.zeros_like(mask)))  # counts: all do
    torch.testing.assert_close(none, net(x, t, Condition(tokens=told)), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_null_rows_have_the_learned_token_at_each_position():
    net, (x, t), told = unet(drop=0.1), inputs(), tokens()
    mask = torch.zeros(B, L, dtype=torch.bool)
    mask[:, 0] = True
    condition = Condition(tokens=told, mask=mask).nulled(torch.tensor([True, False]))
    null = net.null_tokens.expand(L, D)
    by_hand = Condition(tokens=torch.stack([null, told[1]]), mask=torch.stack([torch.ones_like(mask[0]), mask[1]]))
    torch.testing.assert_close(net(x, t, condition), net(x, t, by_hand))
    all_null = net(x, t, Condition(tokens=told).nulled())
    torch.testing.assert_close(all_null, net(x, t, Condition(tokens=torch.stack([null, null]))))
    assert net.null_tokens.shape == (D,) and "null_tokens" not in unet().state_dict()
    assert not UNet(8, channels=8, groups=4, attention_resolutions=[], token_channels=D, drop=0.1).null_tokens.any()


@pytest.mark.slow
def test_the_cost_of_tokens_is_counted():
    with torch.device("meta"):
        one, three = (UNet(8, 2, channels=8, groups=4, attention_resolutions=[], channel_mults=(1,), token_channels=D,
                           transformer_layers=n) for n in (1, 3))  # fmt: skip
    q_k_v_out, scores = 2 * 64 * 8 * 8 * 4, 2 * 64 * 64 * 8 * 2  # of attention to itself, over 64 pixels
    across = 2 * (64 * 8 * 8 * 2 + 77 * D * 8 * 2 + 64 * 77 * 8 * 2)
    feed_forward = 2 * 64 * 8 * (64 + 32)
    more = [gflop(net, (2, 8, 8), backward=False) * 1e9 for net in (one, three)]
    assert more[1] - more[0] == pytest.approx(2 * (q_k_v_out + scores + across + feed_forward))


def test_gradients_reach_the_null_token_with_checkpointing_too():
    told, (x, t) = Condition(tokens=tokens()).nulled(torch.tensor([True, False])), inputs()
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        net = unet(drop=0.1, checkpointing=checkpointing, dropout=0.0).train()
        net(x, t, told).square().sum().backward()
        gradients.append([p.grad for p in net.parameters()])
        assert net.null_tokens.grad.abs().min() > 0
    for plain, again in zip(*gradients, strict=True):
        torch.testing.assert_close(again, plain)


def told_of(*shape: int, mask: torch.Tensor | None = None, dtype: torch.dtype = torch.float32) -> Condition:
    return Condition(tokens=torch.zeros(shape, dtype=dtype), mask=mask)


@pytest.mark.parametrize(
    ("options", "condition", "message"),
    [
        ({}, None, "tokens must be given exactly when .*: token_channels = 6, tokens are missing"),
        ({}, told_of(B, L, dtype=torch.long), r"are ids, .* no text encoder; it takes embeddings \(B, L, 6\)"),
        ({}, told_of(B, L, 7), r"tokens of shape \(2, 5, 7\) .*; this network takes embeddings \(B, L, 6\)"),
        ({}, told_of(B, 6), r"tokens of shape \(2, 6\) are given; this network takes emb"),
        ({}, told_of(B, 0, D), "with L >= 1"),
        ({}, told_of(1, L, D), "tokens have 1 rows, but x_t has 2"),
        ({}, told_of(B, L, D, mask=torch.ones(B, L)), r"is torch.float32 .*; allowed: torch.bool of shape \(2, 5\)"),
        ({}, told_of(B, L, D, mask=torch.ones(B, 4) > 0), r"of shape \(2, 4\); allowed: torch.bool of shape \(2, 5\)"),
        ({}, told_of(B, L, D).nulled(), "trained with drop = 0"),
        ({"token_channels": 0}, told_of(B, L, D), "this network takes none"),
    ],
)
def test_tokens_that_are_refused(options, condition, message):
    with pytest.raises(ValueError, match=message):
        unet(**options)(*inputs(), condition)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"token_channels": -1}, "token_channels = -1 must be an integer >= 0"),
        ({"token_channels": 2.5}, "token_channels = 2.5 must be an integer >= 0"),
        ({"transformer_layers": 0}, "transformer_layers = 0 must be an integer >= 1, and at most 100"),
        ({"transformer_layers": [1]}, "transformer_layers has 1 entries, but channel_mults has 2 levels"),
        ({"only_cross_attention": [True] * 3}, "only_cross_attention has 3 entries, but channel_mults has 2 levels"),
        ({"heads": [1, 2, 3]}, "heads has 3 entries, but channel_mults has 2 levels"),
        ({"heads": [1, 5]}, "heads = 5 does not divide the 16 channels"),
        ({"head_channels": [4]}, "head_channels has 1 entries"),
        ({"attention": "linear"}, "attention = 'linear' with token_channels"),
        ({"magnitude_preserving": True}, "token_channels and magnitude_preserving = true exclude each other"),
        ({"magnitude_preserving": True, "token_channels": 0, "scale_shift": True}, "scale_shift and magnitude_pres"),
        ({"magnitude_preserving": True, "token_channels": 0, "resample": "resnet"}, "resample and magnitude_pres"),
        ({"resample": "fir"}, "resample = 'fir' is not known; allowed: conv, resnet"),
        ({"any_size": True, "patch": 2, "attention_resolutions": []}, "any_size = true needs patch = 1"),
        ({"any_size": True, "resample": "resnet", "downsample_padding": 0}, "needs downsample_padding = 1, resample"),
    ],
    ids=str,
)
def test_arguments_that_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        unet(**options)


# --- Any size


def test_any_size_is_taken_and_given_back():
    net = unet(
        any_size=True,
        channel_mults=(1, 1, 1),
        attention_resolutions=[8],
        num_classes=3,
        class_channels=2,
        condition_channels=1,
    )
    for height, width in ((5, 7), (1, 1), (6, 3)):
        x, t = inputs(height, width)
        y = Condition(tokens=tokens(), classes=torch.tensor([0, 2]), image=torch.randn(B, 1, height, width))
        assert net(x, t, y).shape == x.shape
    for x in (torch.randn(B, 3, 5, 7), torch.randn(B, 2, 5), torch.randn(B, 2, 0, 5)):
        with pytest.raises(ValueError, match=r"this network takes \(B, 2, H, W\)"):
            net(x, t, y)


@torch.no_grad()
def test_where_all_levels_halve_any_size_changes_nothing():
    (x, t), told = inputs(), Condition(tokens=tokens())
    fixed, free = unet(), unet(any_size=True)
    free.load_state_dict(fixed.state_dict())
    assert torch.equal(free(x, t, told), fixed(x, t, told))
    with pytest.raises(ValueError, match=r"this network takes \(B, 2, 8, 8\)"):
        fixed(x[:, :, :6], t, told)


def test_latents_of_480_by_640_pixels_have_four_levels():
    net = unet(image_size=(60, 80), channel_mults=(1,) * 4, any_size=True, attention_resolutions=[40, 20, 10])
    out = net(torch.zeros(1, 2, 60, 80), torch.zeros(1), Condition(tokens=torch.zeros(1, L, D)))
    assert out.shape == (1, 2, 60, 80)
    assert [isinstance(stage.attention[0], SpatialTransformer) for stage in net.down] == [False, True, True, True]
    with pytest.raises(ValueError, match="60 is not divisible by 8; nearest legal sizes: 56, 64"):
        unet(image_size=(60, 80), channel_mults=(1,) * 4)
    with pytest.raises(ValueError, match="has the resolutions 15, 8, 4"):  # halved to the next larger
        unet(image_size=15, channel_mults=(1, 1, 1), any_size=True, attention_resolutions=[7])


# --- Levels that are joined by residual blocks


@torch.no_grad()
def test_residual_blocks_resample_both_of_their_ways():
    x, emb = torch.randn(B, 4, 4, 6), torch.randn(B, 3)
    for resample, by_hand in (
        (nn.AvgPool2d(2), lambda z: z.unflatten(2, (2, 2)).mean(3).unflatten(3, (3, 2)).mean(4)),
        (nn.Upsample(scale_factor=2.0), lambda z: z.repeat_interleave(2, 2).repeat_interleave(2, 3)),
    ):
        block = randomised(ResidualBlock(4, 4, 3, 0.0, 2, 1e-6, resample=resample))
        h = block.conv_1(by_hand(F.silu(block.norm_1(x)))) + block.embedding(emb)[:, :, None, None]
        expected = by_hand(x) + block.conv_2(F.silu(block.norm_2(h)))
        torch.testing.assert_close(block(x, emb), expected, rtol=1e-5, atol=1e-5)


def test_levels_that_are_joined_by_residual_blocks():
    net = unet(token_channels=0, resample="resnet", scale_shift=True)
    blocks = [stage.resample for way in (net.down, net.up) for stage in way if stage.resample is not None]
    assert [type(block.resample) for block in blocks] == [nn.AvgPool2d, nn.Upsample]
    assert all(m.scale_shift for m in net.modules() if isinstance(m, ResidualBlock))
    x, t = inputs()
    out = net(x, t)
    assert out.shape == x.shape and not torch.allclose(net(x, t + 1), out)
    assert not {"null_tokens", "resample"} & {name.rpartition(".")[2] for name in net.state_dict()}
