"""models/magnitude.py: every layer against its formula, and the magnitude of what comes out of it."""

import copy
import math

import pytest
import torch
from test_trainer import Fit, assert_same, some, unet
from torch import Tensor, nn
from torch.linalg import vector_norm
from torch.nn import functional as F

from ddpm.data import Digits
from ddpm.data.batch import Condition
from ddpm.training.step import renormalise
from models.layers import Attention, Downsample, Upsample
from models.magnitude import (
    MPAttention,
    MPClassEmbedding,
    MPConv2d,
    MPLabelEmbeddings,
    MPLinear,
    MPResidualBlock,
    MPTimeEmbedding,
    Normalised,
    mp_cat,
    mp_silu,
    mp_sum,
    normalised,
)
from models.unet import UNet


def magnitude(x: Tensor) -> float:
    return x.double().square().mean().sqrt().item()


def doubled(layer: nn.Module) -> nn.Module:
    return layer.double()


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


# --- Functions


@pytest.mark.equation("EDM2 (pixel normalization)")
def test_each_pixel_has_unit_magnitude_whatever_it_had():
    x = normal(2, 5, 3, 4) * torch.tensor([1e-2, 1e3])[:, None, None, None]
    ours = normalised(x, 1)
    torch.testing.assert_close(ours, x * math.sqrt(5) / x.norm(dim=1, keepdim=True), rtol=1e-12, atol=0)
    torch.testing.assert_close(normalised(3 * x, 1), ours, rtol=1e-12, atol=0)
    rows = normalised(x, 1, 2, 3)
    assert [magnitude(row) for row in rows] == pytest.approx([1, 1], rel=1e-12)
    assert normalised(torch.zeros(1, 3), 1).tolist() == [[0, 0, 0]]
    assert normalised(x.bfloat16(), 1).dtype == torch.bfloat16


def test_the_gradient_of_a_black_pixel_is_finite():
    x = torch.zeros(1, 3, requires_grad=True)
    normalised(x, 1).sum().backward()
    assert x.grad.isfinite().all()


@pytest.mark.equation("EDM2 (81)")
def test_silu_keeps_the_magnitude_of_normal_numbers():
    z = torch.linspace(-12, 12, 100_001, dtype=torch.float64)
    density = (-z.square() / 2).exp() / math.sqrt(2 * math.pi)
    square = torch.trapezoid((z / (1 + (-z).exp())).square() * density, z)
    assert square.sqrt().item() == pytest.approx(0.596, abs=5e-4)
    torch.testing.assert_close(mp_silu(z), z / (1 + (-z).exp()) / 0.596, rtol=1e-12, atol=0)


@pytest.mark.equation("EDM2 (88)")
@pytest.mark.parametrize("t", [0.0, 0.3, 0.5, 1.0])
def test_a_sum_keeps_the_magnitude(t):
    a, b = normal(300_000), normal(300_000)
    assert magnitude(mp_sum(a, b, t)) == pytest.approx(1, abs=0.01)
    expected = ((1 - t) * a + t * b) / ((1 - t) ** 2 + t**2) ** 0.5
    torch.testing.assert_close(mp_sum(a, b, t), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.equation("EDM2 (103)")
@pytest.mark.parametrize("t", [0.3, 0.5])
def test_a_concatenation_keeps_the_magnitude_and_its_parts_contribute_by_t(t):
    a, b = normal(20_000, 5), normal(20_000, 35)
    both = mp_cat(a, b, t)
    assert magnitude(both) == pytest.approx(1, abs=0.01)
    share = both[:, 5:].square().sum() / both.square().sum()
    assert share.item() == pytest.approx(t**2 / (t**2 + (1 - t) ** 2), abs=0.01)
    torch.testing.assert_close(both[:, :5] / a, torch.full_like(a, (both[0, 0] / a[0, 0]).item()))
    assert torch.equal(mp_cat(a, a), torch.cat([a, a], 1))


# --- Weights

LAYERS = [lambda: MPLinear(24, 40), lambda: MPConv2d(8, 40, 3, padding=1), lambda: MPClassEmbedding(6, 40, null=True)]


@pytest.mark.equation("EDM2 (47)")
def test_the_weights_of_each_output_have_unit_norm_and_unit_variance_stays():
    linear, conv = doubled(MPLinear(24, 400)), doubled(MPConv2d(8, 400, 3))
    for layer in (linear, conv):
        with torch.no_grad():
            layer.weight *= torch.rand(400, dtype=torch.float64).reshape(-1, *[1] * (layer.weight.ndim - 1)) + 0.1
    x, image = normal(2000, 24), normal(50, 8, 6, 6)
    w = linear.weight / linear.weight.norm(dim=1, keepdim=True)
    torch.testing.assert_close(linear(x), x @ w.mT, rtol=1e-11, atol=1e-11)
    w = conv.weight / conv.weight.flatten(1).norm(dim=1)[:, None, None, None]
    torch.testing.assert_close(conv(image), F.conv2d(image, w), rtol=1e-11, atol=1e-11)
    assert magnitude(linear(x)) == pytest.approx(1, abs=0.02)
    assert magnitude(conv(image)) == pytest.approx(1, abs=0.02)
    torch.testing.assert_close(linear(x, gain=0.25), linear(x) / 4)


@pytest.mark.parametrize("make", LAYERS)
def test_the_gradient_is_orthogonal_to_the_weights_of_each_output(make):
    layer = doubled(make())
    with torch.no_grad():
        layer.weight *= 3
    (layer.unit() * torch.randn_like(layer.weight)).sum().backward()
    along = (layer.weight * layer.weight.grad).sum(layer.inputs)
    size = vector_norm(layer.weight, dim=layer.inputs) * vector_norm(layer.weight.grad, dim=layer.inputs)
    assert (along.abs() < 1e-12 * size).all() and (size > 0).all()


@pytest.mark.equation("EDM2 (66)")
@pytest.mark.parametrize("make", LAYERS)
def test_stored_weights_are_given_their_norm_back_and_compute_the_same(make):
    layer = doubled(make())
    axes, ones = layer.inputs, lambda: torch.ones_like(layer.weight.sum(layer.inputs))
    N = layer.weight.numel() / ones().numel()
    torch.testing.assert_close(vector_norm(layer.weight, dim=axes), math.sqrt(N) * ones(), rtol=1e-6, atol=0)
    with torch.no_grad():
        layer.weight += torch.randn_like(layer.weight)
    stored, used = layer.weight.detach().clone(), layer.unit()
    layer.renormalise_()
    torch.testing.assert_close(layer.weight, stored * math.sqrt(N) / vector_norm(stored, dim=axes, keepdim=True))
    torch.testing.assert_close(layer.unit(), used)


def test_weights_that_are_not_trained_are_left_alone():
    layer = MPLinear(3, 4)
    nn.init.normal_(layer.weight, std=7)
    before = layer.requires_grad_(False).weight.clone()
    renormalise(nn.Sequential(layer))
    assert torch.equal(layer.weight, before)


def test_layers_without_renormalisation_are_left_alone():
    net = nn.Sequential(nn.Linear(3, 4), nn.SiLU())
    before = copy.deepcopy(net.state_dict())
    renormalise(net)
    assert all(torch.equal(net.state_dict()[name], p) for name, p in before.items())


# --- Embeddings


@pytest.mark.equation("EDM2 (75)")
def test_every_time_has_unit_magnitude():
    embed, t = MPTimeEmbedding(64, 1000), torch.tensor([0.0, 1.0, 20.5, 1000.0])
    angles = t[:, None] * 10000 ** (-torch.arange(32) / 31)
    waves = math.sqrt(2) * torch.cat([angles.sin(), angles.cos()], 1)
    torch.testing.assert_close(embed(t), waves @ embed[1].unit().mT, rtol=1e-3, atol=1e-3)
    assert [magnitude(row) for row in waves] == pytest.approx([1] * 4, rel=1e-5)
    assert magnitude(embed(t)) == pytest.approx(1, abs=0.05)


def test_the_vectors_of_all_classes_have_unit_magnitude_and_none_is_one_of_them():
    embed = MPClassEmbedding(3, 50, null=True)
    with torch.no_grad():
        embed.weight *= 5
    null = torch.tensor([False, False, False, True])
    vectors = embed(torch.tensor([0, 1, 2, 2]), null)
    torch.testing.assert_close(vectors.square().mean(0), torch.ones(50))
    assert torch.equal(vectors[:3], embed(torch.arange(3))) and not torch.equal(vectors[3], vectors[2])
    assert MPClassEmbedding(3, 50).weight.shape == (3, 50)


def test_labels_are_summed_to_unit_magnitude():
    embed, labels = MPLabelEmbeddings([4, 3], 500), torch.cartesian_prod(torch.arange(4), torch.arange(3))
    expected = (embed[0](labels[:, 0]) + embed[1](labels[:, 1])) / math.sqrt(2)
    torch.testing.assert_close(embed(labels), expected)
    assert magnitude(embed(labels)) == pytest.approx(1, abs=0.1)


# --- Blocks


@pytest.mark.equation("EDM2 (embedding gain)")
@pytest.mark.parametrize("encoder", [True, False])
@pytest.mark.parametrize("out_channels", [8, 12])
def test_a_residual_block_is_its_formula(encoder, out_channels):
    block = doubled(MPResidualBlock(8, out_channels, 16, dropout=0.3, encoder=encoder)).eval()
    nn.init.constant_(block.gain, 0.7)
    x, emb = normal(2, 8, 4, 6), normal(2, 16)
    carried = x
    if out_channels != 8:
        carried = torch.einsum("oi,bihw->bohw", block.shortcut.unit()[:, :, 0, 0], x)
    if encoder:
        carried = carried * math.sqrt(out_channels) / carried.norm(dim=1, keepdim=True)
    y = F.conv2d(mp_silu(carried if encoder else x), block.conv_1.unit(), padding=1)
    y = y * (1 + 0.7 * emb @ block.embedding.unit().mT)[:, :, None, None]
    y = F.conv2d(mp_silu(y), block.conv_2.unit(), padding=1)
    torch.testing.assert_close(block(x, emb), (0.7 * carried + 0.3 * y) / math.sqrt(0.58), rtol=1e-11, atol=1e-11)


def test_a_residual_block_does_not_hear_the_time_at_first():
    block, x = MPResidualBlock(8, 8, 16, 0.0, True), torch.randn(2, 8, 4, 4)
    assert torch.equal(block(x, torch.randn(2, 16)), block(x, torch.randn(2, 16)))


@pytest.mark.parametrize("encoder", [True, False])
def test_a_residual_block_keeps_the_magnitude(encoder):
    block = MPResidualBlock(48, 64, 16, 0.0, encoder)
    inside = block(torch.randn(8, 48, 16, 16), torch.randn(8, 16))[:, :, 2:-2, 2:-2]  # away from the padding
    assert magnitude(inside) == pytest.approx(1, abs=0.05)


@pytest.mark.equation("EDM2 (cosine attention)")
@pytest.mark.parametrize(("heads", "head_channels", "d"), [(1, None, 8), (2, None, 4), (None, 2, 2)])
def test_attention_is_by_cosines(heads, head_channels, d):
    layer = doubled(MPAttention(8, heads, head_channels, "full"))
    x = normal(2, 8, 3, 2)
    h = x.flatten(2).mT
    q, k, v = (
        (h @ to.unit().mT).reshape(2, 6, 8 // d, d).transpose(1, 2) for to in (layer.to_q, layer.to_k, layer.to_v)
    )
    cosine = F.cosine_similarity(q[:, :, :, None], k[:, :, None], dim=-1)
    values = v * math.sqrt(d) / v.norm(dim=-1, keepdim=True)
    out = ((math.sqrt(d) * cosine).softmax(-1) @ values).transpose(1, 2).flatten(2) @ layer.to_out.unit().mT
    torch.testing.assert_close(
        layer(x), (0.7 * x + 0.3 * out.mT.reshape(x.shape)) / math.sqrt(0.58), rtol=1e-10, atol=1e-10
    )
    torch.testing.assert_close(layer(x)[:, :, 0, 0], layer(x.flip(-1))[:, :, 0, 1], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", ["full", "linear"])
def test_attention_keeps_the_magnitude_of_one_pixel_and_adds_none_to_several(kind):
    layer = MPAttention(64, 2, None, kind)
    one, several = layer(torch.randn(500, 64, 1, 1)), layer(torch.randn(8, 64, 8, 8))
    assert magnitude(one) == pytest.approx(1, abs=0.05) or kind == "linear"  # whose softmax of q has no unit norm
    assert 0.7 / math.sqrt(0.58) - 0.03 < magnitude(several) < 1


def test_heads_and_kinds_are_refused_as_those_of_the_other_attention():
    for arguments in ((8, 3, None, "full"), (8, None, 3, "full"), (8, 1, None, "sparse")):
        messages = []
        for make in (MPAttention, lambda *given: Attention(*given, groups=1, norm_eps=1e-6)):
            with pytest.raises(ValueError, match=r"heads|head_channels|attention") as error:
                make(*arguments)
            messages.append(str(error.value))
        assert messages[0] == messages[1]


@pytest.mark.parametrize("make", [lambda: Downsample(32, 1, MPConv2d), lambda: Upsample(32, MPConv2d)])
def test_resampling_keeps_the_magnitude(make):
    out = make()(torch.randn(16, 32, 16, 16))
    assert magnitude(out[:, :, 2:-2, 2:-2]) == pytest.approx(1, abs=0.05)


# --- The network


def network(**options) -> UNet:
    small = {"in_channels": 2, "channels": 32, "channel_mults": (1, 2), "blocks": 2, "attention_resolutions": [8]}
    return UNet(16, **small | {"dropout": 0.0, "magnitude_preserving": True} | options)


def inputs(n: int = 8) -> tuple[Tensor, Tensor]:
    return torch.randn(n, 2, 16, 16), torch.linspace(1, 1000, n)


def moved(net: UNet) -> UNet:
    """The gains are not 0, so that all of it matters."""
    for name, p in net.named_parameters():
        if "gain" in name or "null" in name:
            nn.init.constant_(p, 0.5)
    return net


@pytest.mark.parametrize("options", [{}, {"patch": 2}, {"num_classes": 5}, {"channel_mults": (1, 1, 2), "blocks": 3}])
def test_the_output_is_zero_at_first_and_features_keep_their_magnitude(options):
    net, (x, t) = network(**options), inputs()
    y, seen = torch.arange(8) % 5 if "num_classes" in options else None, {}
    for name, module in net.named_modules():
        if isinstance(module, MPResidualBlock | Downsample | Upsample) or name in ("time_embedding", "conv_in"):
            module.register_forward_hook(lambda _, given, out, name=name: seen.update({name: magnitude(out)}))
    assert torch.equal(net(x, t, y), torch.zeros_like(x))
    assert len(seen) > 10 and all(0.65 < size < 1.1 for size in seen.values()), seen
    with torch.no_grad():
        net.gain_out.fill_(1)
        out = net(x, t, y)
        assert 0.6 < magnitude(out) < 1.1
        net.gain_out.fill_(2)
        torch.testing.assert_close(net(x, t, y), 2 * out)


def test_it_has_no_biases_no_group_norms_and_a_gain_a_block():
    net = network(num_classes=3, drop=0.1, condition_channels=1)
    scalars = [name for name, p in net.named_parameters() if p.ndim == 0]
    blocks = sum(isinstance(m, MPResidualBlock) for m in net.modules())
    assert len(scalars) == blocks + 1 and all("gain" in name for name in scalars)
    assert not any("bias" in name for name, _ in net.named_parameters())
    assert not any(isinstance(m, nn.GroupNorm) for m in net.modules())
    others = {name for name, p in net.named_parameters() if p.ndim == 1}
    assert others == {"null_image"}
    weights = {m.weight for m in net.modules() if isinstance(m, Normalised)}
    assert len(weights) == sum(p.ndim > 1 for p in net.parameters())


def test_rescaled_weights_are_the_same_network():
    net, (x, t) = moved(network()), inputs(2)
    before = net(x, t)
    with torch.no_grad():
        for layer in net.modules():
            if isinstance(layer, Normalised):
                layer.weight *= 3
        torch.testing.assert_close(net(x, t), before, rtol=1e-4, atol=1e-5)
        renormalise(net)
    assert all(magnitude(m.weight) == pytest.approx(1) for m in net.modules() if isinstance(m, Normalised))


def test_the_plain_network_has_the_parameters_that_it_had():
    plain = network(magnitude_preserving=False)
    assert plain.gain_out is None and not any("gain" in name for name, _ in plain.named_parameters())
    assert isinstance(plain.norm_out, nn.GroupNorm) and plain.conv_in.bias is not None


@pytest.mark.parametrize("classes", [{}, {"class_channels": 4}, {"num_classes": [5, 3]}], ids=str)
def test_it_is_told_of_classes_and_images_and_of_none(classes):
    net = moved(network(**{"num_classes": 5, "drop": 0.1, "condition_channels": 1} | classes)).double()
    x, t = (z.double() for z in inputs(3))
    y = torch.tensor([[0, 2], [4, 1], [2, 0]]) if "num_classes" in classes else torch.tensor([0, 4, 2])
    told = Condition(classes=y, image=normal(3, 1, 16, 16))
    outs = [net(x, t, told), net(x, t, told.nulled(torch.tensor([False, True, False]))), net(x, t, told.nulled())]
    torch.testing.assert_close(outs[1][[0, 2]], outs[0][[0, 2]], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(outs[1][1], outs[2][1], rtol=1e-9, atol=1e-9)
    assert not torch.allclose(outs[0][1], outs[2][1], atol=1e-3)
    outs[1].square().mean().backward()
    for name, p in net.named_parameters():
        assert p.grad.isfinite().all() and p.grad.abs().max() > 0, name


@pytest.mark.parametrize("attention", ["full", "linear"])
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_checkpointing_and_half_precision(attention, precision):
    options = {"attention": attention, "dropout": 0.1, "channels": 8, "blocks": 1}
    plain, saving = moved(network(**options)), network(**options, checkpointing=True)
    saving.load_state_dict(plain.state_dict())
    (x, t), ends = inputs(2), []
    for net in (plain, saving):
        net.train().to(memory_format=torch.channels_last)
        torch.manual_seed(7)
        with torch.autocast("cpu", precision, enabled=precision != torch.float32):
            out = net(x, t)
        out.float().square().mean().backward()
        ends.append([out, *(p.grad for p in net.parameters()), *(p.detach() for p in net.parameters())])
    assert ends[0][0].dtype == precision
    for one, other in zip(*ends, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_half_precision_computes_the_same_but_for_rounding():
    net, (x, t) = moved(network()).eval(), inputs(4)
    with torch.no_grad():
        exact = net(x, t)
        with torch.autocast("cpu", torch.bfloat16):
            rounded = net(x, t)
    assert magnitude(rounded.float() - exact) < 0.03 * magnitude(exact)


# --- Training


def magnitudes(net: nn.Module) -> list[float]:
    return [magnitude(m.weight) for m in net.modules() if isinstance(m, Normalised)]


@pytest.mark.slow
def test_training_keeps_the_weights_at_their_norm_and_resumes_to_the_bit(tmp_path):
    data, settings = some(Digits(), 100), {"lr": 1e-2, "ema_snapshots": 2}
    whole = Fit(tmp_path / "whole", data, model=unet(magnitude_preserving=True), **settings)
    begun, left = unet(magnitude_preserving=True).state_dict(), whole.model.state_dict()
    assert magnitudes(whole.model) == pytest.approx([1] * len(magnitudes(whole.model)), rel=1e-6)
    assert all(0.9 < size < 1 for size in magnitudes(whole.ema))  # of unit vectors that turned
    assert not any(torch.equal(begun[name], left[name]) for name in left)
    assert whole.model.gain_out != 0 and all(math.isfinite(line["loss"]) for line in whole.metrics("train"))

    middle = whole.run.checkpoints / "3"
    again = Fit(tmp_path / "again", data, model=unet(1, magnitude_preserving=True), resume=middle, **settings)
    assert_same(again.state, whole.state)
    assert_same(again.saved(6, "ema"), whole.saved(6, "ema"))


@pytest.mark.slow
def test_micro_batches_and_checkpointing_train_the_same(tmp_path):
    data, ends = some(Digits(), 100), []
    for n, (options, changed) in enumerate([({}, {}), ({"checkpointing": True}, {}), ({}, {"accumulate": 4})]):
        model = unet(magnitude_preserving=True, **options)
        ends.append(Fit(tmp_path / str(n), data, model=model, steps=2, optimizer="SGD", **changed).model.state_dict())
    assert_same(ends[0], ends[1])
    for name, p in ends[0].items():
        torch.testing.assert_close(ends[2][name], p, rtol=1e-4, atol=1e-6)
