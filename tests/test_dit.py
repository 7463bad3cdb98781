"""models/dit.py: a block and the whole written out, first values, what it is told, and every refusal."""

import math

import pytest
import torch
from test_layers import silu
from torch import Tensor, nn

from ddpm.data.batch import Condition, takes
from ddpm.diffusion import GaussianDiffusion
from ddpm.runs.checkpoint import load_weights, save_weights
from ddpm.samplers import DDIM
from ddpm.schedules import linear
from ddpm.training.task import shape_of
from models.dit import Block, DiT, position_embedding


def randomised(net: nn.Module, std: float = 0.3) -> nn.Module:
    """In float64, and no parameter is zero, so every path matters."""
    net.double()
    for p in net.parameters():
        nn.init.normal_(p, std=std)
    return net


def small(image_size: int | tuple[int, int] = (4, 6), **options) -> DiT:
    return DiT(image_size, **{"in_channels": 1, "width": 8, "depth": 2, "heads": 2} | options)


X = torch.randn(3, 1, 4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
T, Y = torch.tensor([1.0, 300.0, 7.5]), torch.tensor([2, 0, 1])
NULL = torch.tensor([True, False, False])

# --- By hand


def normalised(h: Tensor) -> Tensor:
    """Layer norm of (n, W), written out."""
    mean = h.mean(1, keepdim=True)
    return (h - mean) / ((h - mean).square().mean(1, keepdim=True) + 1e-6).sqrt()


def gelu(x: Tensor) -> Tensor:
    """By the hyperbolic tangent, which replaces the Gaussian's distribution function."""
    return x / 2 * (1 + (math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)).tanh())


def block_by_hand(w: dict[str, Tensor], h: Tensor, emb: Tensor, heads: int) -> Tensor:
    """One sample's tokens (n, W) after a block, by a loop over heads; emb (W,), which SiLU was applied to."""

    def linear(name: str, x: Tensor) -> Tensor:
        return x @ w[f"{name}.weight"].mT + w[f"{name}.bias"]

    width = h.shape[1]
    beta_1, gamma_1, alpha_1, beta_2, gamma_2, alpha_2 = linear("modulation", emb).reshape(6, width)
    q, k, v = linear("to_qkv", (1 + gamma_1) * normalised(h) + beta_1).reshape(-1, 3, width).unbind(1)
    parts = []
    for e in range(heads):
        own = slice(e * width // heads, (e + 1) * width // heads)
        score = (q[:, own] @ k[:, own].mT / math.sqrt(width // heads)).exp()
        parts.append(score / score.sum(1, keepdim=True) @ v[:, own])
    h = h + alpha_1 * linear("to_out", torch.cat(parts, 1))
    return h + alpha_2 * linear("mlp.2", gelu(linear("mlp.0", (1 + gamma_2) * normalised(h) + beta_2)))


def forward_by_hand(net: DiT, x: Tensor, t: float, of_class: Tensor | float) -> Tensor:
    """One sample (C, H, W), straight from the weights; x has all channels that go in."""
    w, p = net.state_dict(), net.patch

    def linear(name: str, h: Tensor) -> Tensor:
        return h @ w[f"{name}.weight"].mT + w[f"{name}.bias"]

    angles = [t * 10000 ** (-k / 128) for k in range(128)]
    emb = torch.tensor([*map(math.cos, angles), *map(math.sin, angles)], dtype=x.dtype)
    emb = silu(linear("time_embedding.3", silu(linear("time_embedding.1", emb))) + of_class)
    places = [(i, j) for i in range(x.shape[1] // p) for j in range(x.shape[2] // p)]
    patches = torch.stack([x[:, i * p : (i + 1) * p, j * p : (j + 1) * p].flatten() for i, j in places])
    width = w["patch_in.weight"].shape[0]
    h = linear("patch_in", patches) + torch.stack([position_by_hand(i, j, width) for i, j in places])
    for number in range(len(net.blocks)):
        prefix = f"blocks.{number}."
        own = {name.removeprefix(prefix): value for name, value in w.items() if name.startswith(prefix)}
        h = block_by_hand(own, h, emb, net.blocks[number].heads)
    beta, gamma = linear("modulation_out", emb).reshape(2, -1)
    out = linear("patch_out", (1 + gamma) * normalised(h) + beta)
    image = x.new_zeros(net.out_channels, *x.shape[1:])
    for (i, j), token in zip(places, out, strict=True):
        image[:, i * p : (i + 1) * p, j * p : (j + 1) * p] = token.reshape(net.out_channels, p, p)
    return image


def position_by_hand(row: int, column: int, dim: int) -> Tensor:
    omega = [10000 ** (-k / (dim / 4)) for k in range(dim // 4)]
    return torch.tensor([f(n * o) for n in (column, row) for f in (math.sin, math.cos) for o in omega])


@pytest.mark.equation("DiT (position embedding)")
def test_positions_are_sinusoids_of_the_column_and_the_row():
    found = position_embedding(3, 5, 12)
    expected = torch.stack([position_by_hand(i, j, 12) for i in range(3) for j in range(5)])
    torch.testing.assert_close(found, expected)
    assert len(found.unique(dim=0)) == 15


@pytest.mark.equation("DiT (adaLN-Zero)")
@pytest.mark.parametrize("heads", [1, 2, 4])
def test_a_block_is_the_formula_and_the_identity_where_its_modulation_is_zero(heads):
    block = randomised(Block(16, heads, 24))
    h, emb = torch.randn(2, 5, 16, dtype=torch.float64), torch.randn(2, 16, dtype=torch.float64)
    expected = torch.stack([block_by_hand(block.state_dict(), *row, heads) for row in zip(h, emb, strict=True)])
    torch.testing.assert_close(block(h, emb), expected, rtol=1e-10, atol=1e-10)
    assert (expected - h).abs().mean() > 0.1
    nn.init.zeros_(block.modulation.weight), nn.init.zeros_(block.modulation.bias)
    assert torch.equal(block(h, emb), h)


@pytest.mark.parametrize("options", [{}, {"patch": 1, "heads": 1}, {"in_channels": 3, "out_channels": 6}], ids=str)
def test_the_network_is_the_formula(options):
    net = randomised(small(num_classes=3, mlp_ratio=2.5, **options))
    x = torch.randn(3, net.in_channels, 4, 6, dtype=torch.float64)
    classes = net.state_dict()["class_embedding.weight"][Y]
    expected = torch.stack([forward_by_hand(net, *row) for row in zip(x, T.tolist(), classes, strict=True)])
    found = net(x, T, Y)
    assert found.shape == (3, net.out_channels, 4, 6) and expected.abs().mean() > 0.1
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)  # frequencies and positions are float32


# --- First values


def test_parameters_of_the_published_small_form():
    """DiT-S/2 on latents of 4 channels, with a learned variance and 1,000 classes: about 33 million, as published.

    The published count has the 256 fixed positions in it, ours has not.
    """
    W, depth, patch, classes = 384, 12, 2, 1000
    told = (256 * W + W) + (W * W + W) + (classes + 1) * W
    attention, mlp, modulation = (
        (3 * W * W + 3 * W) + (W * W + W),
        (4 * W * W + 4 * W) + (4 * W * W + W),
        6 * W * W + 6 * W,
    )
    ends = (4 * patch**2 * W + W) + (2 * W * W + 2 * W) + (W * 8 * patch**2 + 8 * patch**2)
    expected = told + depth * (attention + mlp + modulation) + ends
    assert expected == 32_865_056 and round((expected + 256 * W) / 1e6) == 33
    with torch.device("meta"):
        net = DiT(32, 4, 8, patch, W, depth, 6, num_classes=classes, drop=0.1)
    assert sum(p.numel() for p in net.parameters()) == expected


def test_first_values_are_those_that_were_published():
    torch.manual_seed(0)
    net = DiT(8, 1, width=128, depth=2, heads=2, num_classes=200, drop=0.1)
    for name, p in net.named_parameters():
        if name.endswith("bias") or "modulation" in name or "patch_out" in name:
            assert torch.equal(p, torch.zeros_like(p)), name
        elif "embedding" in name:
            assert p.std().item() == pytest.approx(0.02, rel=0.3 if p.ndim == 1 else 0.03), name
        else:  # uniform, as wide as Glorot and Bengio have it
            bound = math.sqrt(6 / sum(p.shape))
            assert p.abs().max().item() == pytest.approx(bound, rel=0.02) and p.abs().max() <= bound, name
            assert p.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05), name


def test_at_first_the_output_is_zero_and_every_block_the_identity():
    net = small(num_classes=3).double()
    assert torch.equal(net(X, T, Y), torch.zeros_like(X))
    h, emb = torch.randn(3, 6, 8, dtype=torch.float64), torch.randn(3, 8, dtype=torch.float64)
    assert all(torch.equal(block(h, emb), h) for block in net.blocks)


def test_after_two_steps_gradients_reach_every_parameter():
    """The first moves the last layer alone, the second what modulates; the others follow."""
    net = small(num_classes=3, drop=0.1, condition_channels=2).double()
    image, target = torch.randn(3, 2, 4, 6, dtype=torch.float64), torch.randn_like(X)
    condition = Condition(classes=Y, image=image, null={"classes": NULL, "image": NULL})
    optimizer, moved = torch.optim.SGD(net.parameters(), lr=0.1), []
    for _ in range(4):
        optimizer.zero_grad()
        (net(X, T, condition) - target).square().mean().backward()
        moved.append({name for name, p in net.named_parameters() if p.grad is not None and p.grad.abs().max() > 0})
        optimizer.step()
    assert moved[0] == {"patch_out.bias", "patch_out.weight"} and moved[0] < moved[1]
    assert moved[-1] == {name for name, _ in net.named_parameters()}


# --- What it is told


def test_what_the_house_asks_of_it():
    net = small(num_classes=4, drop=0.2, out_channels=2, condition_channels=3)
    assert (net.shape, net.image_size, net.in_channels, net.out_channels) == ((1, 4, 6), (4, 6), 1, 2)
    assert shape_of(net) == (1, 4, 6) and (net.num_classes, net.drop, net.condition_channels) == (4, 0.2, 3)
    assert takes(net) == ("classes", "image") and takes(small()) == () and small(8).shape == (1, 8, 8)
    assert small(num_classes=[5]).num_classes == 5 and small(num_classes=[5, 2]).num_classes == (5, 2)
    assert not any("null" in name for name in small(num_classes=3, condition_channels=1).state_dict())


def test_rows_are_independent_and_time_class_and_place_matter():
    net = randomised(small(num_classes=3))
    out = net(X, T, Y)
    torch.testing.assert_close(net(X[1:2], T[1:2], Y[1:2]), out[1:2], rtol=1e-9, atol=1e-9)
    for changed in (net(X, T + 1, Y), net(X, T, (Y + 1) % 3), net(X.flip(3), T, Y).flip(3)):
        assert ((changed - out).abs() > 1e-6).flatten(1).any(1).all()
    assert torch.equal(net(X, torch.tensor([3, 999, 1]), Y), net(X, torch.tensor([3.0, 999, 1]), Y))
    assert torch.equal(net(X, T, Condition(classes=Y)), out)


def test_without_positions_patches_are_a_set():
    net = randomised(small())
    swapped = torch.cat([X[..., 2:4], X[..., :2], X[..., 4:]], dim=3)
    expected = net(X, T)
    assert not torch.allclose(net(swapped, T)[..., 2:4], expected[..., :2])
    net.positions.zero_()
    expected = net(X, T)
    torch.testing.assert_close(net(swapped, T)[..., 2:4], expected[..., :2])
    torch.testing.assert_close(net(swapped, T)[..., 4:], expected[..., 4:])


def test_null_rows_have_the_learned_nulls_whatever_their_class_and_image():
    net = randomised(small(num_classes=3, drop=0.1, condition_channels=2))
    w, image = net.state_dict(), torch.randn(3, 2, 4, 6, dtype=torch.float64)
    found = net(X, T, Condition(classes=Y, image=image, null={"classes": NULL, "image": NULL}))
    other = net(X, T, Condition(classes=torch.where(NULL, 1, Y), image=image + NULL[:, None, None, None],
                                null={"classes": NULL, "image": NULL}))  # fmt: skip
    assert torch.equal(found, other)
    of_class = torch.where(NULL[:, None], w["class_embedding.null"], w["class_embedding.weight"][Y])
    beside = torch.where(NULL[:, None, None, None], w["null_image"][:, None, None], image)
    rows = zip(torch.cat([X, beside], 1), T.tolist(), of_class, strict=True)
    torch.testing.assert_close(found, torch.stack([forward_by_hand(net, *row) for row in rows]), rtol=1e-4, atol=1e-4)


def test_several_labels_are_added():
    net = randomised(small(num_classes=[3, 2]))
    w, labels = net.state_dict(), torch.stack([Y, torch.tensor([1, 0, 1])], 1)
    of_class = w["class_embedding.0.weight"][labels[:, 0]] + w["class_embedding.1.weight"][labels[:, 1]]
    expected = torch.stack([forward_by_hand(net, *row) for row in zip(X, T.tolist(), of_class, strict=True)])
    torch.testing.assert_close(net(X, T, labels), expected, rtol=1e-4, atol=1e-4)


def test_weights_are_kept_and_the_positions_are_not_among_them(tmp_path):
    net, other = randomised(small(num_classes=3)).float(), small(num_classes=3)
    save_weights(net, tmp_path / "model.safetensors")
    other.load_state_dict(load_weights(tmp_path / "model.safetensors"))
    assert torch.equal(other(X.float(), T, Y), net(X.float(), T, Y)) and "positions" not in net.state_dict()


def test_in_half_precision_it_is_the_same_but_for_rounding():
    net = randomised(small(num_classes=3, width=16)).float()
    expected = net(X.float(), T, Y)
    with torch.autocast("cpu", torch.bfloat16):
        found = net(X.float(), T, Y)
    assert found.dtype == torch.bfloat16 and not torch.equal(found.float(), expected)
    torch.testing.assert_close(found.float(), expected, rtol=0.1, atol=0.1 * expected.abs().max().item())


@pytest.mark.parametrize(("variance", "out_channels", "loss"), [("beta", None, "simple"), ("learned", 2, "hybrid")])
def test_it_is_trained_and_sampled_as_a_denoiser(variance, out_channels, loss):
    torch.manual_seed(0)
    diffusion = GaussianDiffusion(linear(50), "v", variance, loss=loss)
    net = small(out_channels=out_channels)
    optimizer, losses = torch.optim.Adam(net.parameters(), lr=1e-2), []
    x_0 = torch.ones(16, 1, 4, 6)
    for _ in range(30):
        value = diffusion.loss(net, x_0, generator=torch.Generator().manual_seed(0)).mean()
        optimizer.zero_grad(), value.backward(), optimizer.step()
        losses.append(value.item())
    assert losses[-1] < losses[0] / 3
    with torch.no_grad():
        x_0 = DDIM(5)(diffusion.schedule, diffusion.denoiser(net), torch.randn(2, 1, 4, 6))
    assert x_0.shape == (2, 1, 4, 6) and x_0.mean() > 0.5


# --- Refusals


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"image_size": 9, "patch": 4}, ["9x9 with patch = 4", "nearest legal sizes: 8, 12"]),
        ({"image_size": (8, 3)}, ["8x3", "3 is not divisible by 2", "2, 4"]),
        ({"image_size": 1, "patch": 2}, ["nearest legal sizes: 2"]),
        ({"image_size": (8,)}, ["image_size = (8,)", "two (H, W)"]),
        ({"image_size": (8, 0)}, ["image_size[1] = 0", ">= 1"]),
        ({"in_channels": 0}, ["in_channels = 0"]),
        ({"patch": True}, ["patch = True"]),
        ({"width": 10, "heads": 1}, ["width = 10 is not divisible by 4", "8, 12"]),
        ({"width": 2**21}, ["at most 1,048,576"]),
        ({"width": 96, "heads": 7}, ["heads = 7 does not divide width = 96", "6, 8"]),
        ({"depth": 0}, ["depth = 0"]),
        ({"depth": 101}, ["at most 100"]),
        ({"mlp_ratio": 0.0}, ["mlp_ratio = 0"]),
        ({"mlp_ratio": math.nan}, ["mlp_ratio = nan"]),
        ({"mlp_ratio": 1e300}, ["mlp_ratio = 1e+300", "at most"]),
        ({"drop": 1.0}, ["drop = 1 must lie in [0, 1)"]),
        ({"num_classes": []}, ["num_classes is empty"]),
        ({"num_classes": [3, 0]}, ["num_classes[1] = 0"]),
        ({"condition_channels": -1}, ["condition_channels = -1", ">= 0"]),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused_with_what_does(options, words):
    with pytest.raises(ValueError) as error:
        small(**{"image_size": 8} | options)
    for word in words:
        assert word in str(error.value)


def test_inputs_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"x_t has shape \(3, 1, 6, 4\); this network takes \(B, 1, 4, 6\)"):
        small()(X.mT, T)
    with pytest.raises(ValueError, match="num_classes = None, y is given"):
        small()(X, T, Y)
    with pytest.raises(ValueError, match="num_classes = 3, y is missing"):
        small(num_classes=3)(X, T)
    with pytest.raises(ValueError, match="trained with drop = 0"):
        small(num_classes=3)(X, T, Condition(classes=Y, null={"classes": NULL}))
    with pytest.raises(ValueError, match=r"image has shape \(3, 1, 4, 6\); this network takes \(3, 2, 4, 6\)"):
        small(condition_channels=2)(X, T, Condition(image=X))
