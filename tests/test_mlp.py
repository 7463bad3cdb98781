"""models/mlp.py: the forward pass written out, what it is told, and every refusal."""

import math

import pytest
import torch
from test_layers import silu
from torch import Tensor, nn

from ddpm.data.batch import Condition, takes
from ddpm.diffusion import GaussianDiffusion
from ddpm.samplers import DDIM
from ddpm.schedules import linear
from models.mlp import MLP


def randomised(net: MLP) -> MLP:
    """No parameter is zero, so every path matters."""
    for p in net.parameters():
        nn.init.normal_(p, std=0.3)
    return net


def small(features: int = 2, **options) -> MLP:
    return MLP(features, **{"width": 8, "depth": 2} | options)


X, T = torch.randn(5, 2, generator=torch.Generator().manual_seed(0)), torch.tensor([1.0, 20.0, 300.0, 7.5, 0.0])
Y = torch.tensor([2, 0, 1, 2, 1])
NULL = torch.tensor([True, False, False, True, False])

# --- The whole, by hand


def forward_by_hand(w: dict[str, Tensor], x: Tensor, t: list[float], of_class: Tensor | float, depth: int) -> Tensor:
    """Straight from the weights."""

    def linear(name: str, h: Tensor) -> Tensor:
        return h @ w[f"{name}.weight"].mT + w[f"{name}.bias"]

    half = w["linear_in.weight"].shape[0] // 2
    angles = [[n * 10000 ** (-k / (half - 1)) for k in range(half)] for n in t]
    emb = torch.tensor([[*map(math.sin, a), *map(math.cos, a)] for a in angles], dtype=x.dtype)
    emb = silu(linear("time_embedding.3", silu(linear("time_embedding.1", emb))) + of_class)
    h = linear("linear_in", x)
    for i in range(depth):
        inner = linear(f"residual.{i}.linear_1", h) + linear(f"residual.{i}.embedding", emb)
        h = h + linear(f"residual.{i}.linear_2", silu(inner))
    return linear("linear_out", silu(h))


@pytest.mark.parametrize(("features", "out_features"), [(2, None), (2, 4), (5, 3), (1, None)])
def test_the_network_is_the_formula(features, out_features):
    net = small(features, width=10, depth=3, num_classes=4, dropout=0.4, out_features=out_features)
    net = randomised(net).double().eval()
    x, w = torch.randn(5, features).double(), net.state_dict()
    expected = forward_by_hand(w, x, T.tolist(), w["class_embedding.weight"][Y], 3)
    found = net(x, T, Y)
    assert found.shape == (5, out_features or features) and expected.abs().mean() > 0.1
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)  # the frequencies are float32
    without = randomised(small(features, width=10)).double()
    torch.testing.assert_close(
        without(x, T), forward_by_hand(without.state_dict(), x, T.tolist(), 0.0, 2), rtol=1e-4, atol=1e-4
    )


def test_how_many_parameters_there_are():
    """Of the time's two layers, three of each block, and the first and the last."""
    width, depth = 128, 3
    square = width * width + width
    found = sum(p.numel() for p in MLP().parameters())
    assert found == 2 * square + 3 * depth * square + (2 * width + width) + (width * 2 + 2) == 182_274


def test_zero_output_at_first_and_gradients_to_every_parameter():
    net = small(num_classes=3, drop=0.1, out_features=4)
    condition = Condition(classes=Y, null={"classes": NULL})
    assert torch.equal(net(X, T, condition), torch.zeros(5, 4))
    randomised(net)(X, T, condition).square().mean().backward()
    for name, p in net.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all() and p.grad.abs().max() > 0, name


def test_what_diffusion_asks_of_it():
    net = MLP(3, width=8, num_classes=4, drop=0.2)
    assert (net.shape, net.out_channels, net.num_classes, net.drop) == ((3,), 3, 4, 0.2)
    assert takes(net) == net.takes == ("classes",) and takes(small()) == ()
    assert small(out_features=4).out_channels == 4 and small().num_classes is None


def test_dropout_is_for_training_alone():
    net = randomised(small(dropout=0.5))
    assert not torch.equal(net(X, T), net(X, T)) and torch.equal(net.eval()(X, T), net(X, T))


# --- What it is told


def test_rows_are_independent_and_time_and_class_matter():
    net = randomised(small(num_classes=3)).double()
    x = X.double()
    out = net(x, T, Y)
    torch.testing.assert_close(net(x[1:2], T[1:2], Y[1:2]), out[1:2], rtol=1e-9, atol=1e-9)
    for changed in (net(x, T + 1, Y), net(x, T, (Y + 1) % 3), net(x + 0.1, T, Y)):
        assert ((changed - out).abs() > 1e-6).any(1).all()
    assert torch.equal(net(x, torch.tensor([3, 999, 1, 2, 5]), Y), net(x, torch.tensor([3.0, 999, 1, 2, 5]), Y))


def test_classes_as_a_tensor_or_in_a_condition():
    net = randomised(small(num_classes=3))
    assert torch.equal(net(X, T, Condition(classes=Y)), net(X, T, Y))
    plain = randomised(small())
    assert torch.equal(plain(X, T, Condition()), plain(X, T))


def test_null_rows_have_the_learned_null_whatever_their_class():
    net = randomised(small(num_classes=3, drop=0.1)).double()
    w, x = net.state_dict(), X.double()
    assert w["class_embedding.null"].shape == (8,)
    of_class = torch.where(NULL[:, None], w["class_embedding.null"], w["class_embedding.weight"][Y])
    found = net(x, T, Condition(classes=Y, null={"classes": NULL}))
    torch.testing.assert_close(found, forward_by_hand(w, x, T.tolist(), of_class, 2), rtol=1e-4, atol=1e-4)
    other = torch.where(NULL, (Y + 1) % 3, Y)
    assert torch.equal(net(x, T, Condition(classes=other, null={"classes": NULL})), found)
    assert torch.equal(net(x, T, Condition(classes=Y, null={"classes": NULL & False})), net(x, T, Y))


def test_a_null_is_learned_only_with_drop_and_changes_no_other_first_value():
    def first(**options) -> dict[str, Tensor]:
        torch.manual_seed(0)
        return small(**options).state_dict()

    with_null, without = first(num_classes=3, drop=0.1), first(num_classes=3)
    assert with_null.keys() - without.keys() == {"class_embedding.null"}
    assert all(torch.equal(p, with_null[name]) for name, p in without.items())
    assert not any("null" in name for name in first(drop=0.1))
    with pytest.raises(ValueError, match="null rows, but this network was trained with drop = 0"):
        small(num_classes=3)(X, T, Condition(classes=Y, null={"classes": NULL}))


# --- Within the mathematics


@pytest.mark.parametrize(("variance", "out_features", "loss"), [("beta", None, "simple"), ("learned", 4, "hybrid")])
def test_it_is_trained_and_sampled_as_a_denoiser(variance, out_features, loss):
    diffusion = GaussianDiffusion(linear(50), "v", variance, clip_x_0=False, loss=loss)
    net = small(out_features=out_features, width=16)
    optimizer = torch.optim.Adam(net.parameters(), 1e-2)
    losses = []
    for _ in range(60):
        losses.append(diffusion.loss(net, torch.tensor([2.0, -1.0]).expand(64, 2)).mean())
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert torch.stack(losses[-5:]).mean() < 0.5 * losses[0]
    x = DDIM(10)(diffusion.schedule, diffusion.denoiser(net.eval()), torch.randn(100, 2))
    assert (x.mean(0) - torch.tensor([2.0, -1.0])).abs().max() < 0.5


def test_a_learned_variance_takes_twice_the_features():
    diffusion = GaussianDiffusion(linear(50), variance="learned", clip_x_0=False, loss="hybrid")
    with pytest.raises(ValueError, match=r"output has 2 channels, .* takes 4"):
        diffusion.loss(small(), X)


# --- What is refused


@pytest.mark.parametrize("shape", [(5, 3), (5,), (5, 2, 1), (5, 1, 8, 8)])
def test_other_shapes(shape):
    with pytest.raises(ValueError, match=r"x_t has shape \(5,.*; this network takes \(B, 2\)"):
        small()(torch.zeros(shape), T)


def test_classes_are_given_exactly_when_it_has_them():
    with pytest.raises(ValueError, match="num_classes = None, y is given"):
        small()(X, T, Y)
    with pytest.raises(ValueError, match="num_classes = None, y is given"):
        small()(X, T, Condition(classes=Y))
    for missing in (None, Condition()):
        with pytest.raises(ValueError, match="num_classes = 3, y is missing"):
            small(num_classes=3)(X, T, missing)
    with pytest.raises(ValueError, match="takes none"):
        small(num_classes=3)(X, T, Condition(classes=Y, tokens=torch.zeros(5, 4)))
    with pytest.raises(ValueError, match="one class a row"):
        small(num_classes=3)(X, T, Y[:, None])


@pytest.mark.parametrize("value", [0, -1, 2.0, True, "many", 2**20 + 1])
@pytest.mark.parametrize("name", ["features", "width", "depth", "num_classes", "out_features"])
def test_counts_are_integers_in_a_range(name, value):
    least, most = {"width": (4, "1,048,576"), "depth": (1, "100")}.get(name, (1, "1,048,576"))
    with pytest.raises(ValueError, match=f"{name} = {value!r} must be an integer >= {least}, and at most {most}"):
        MLP(**{name: value})


@pytest.mark.parametrize("value", [-0.1, 1.0, math.nan])
@pytest.mark.parametrize("name", ["dropout", "drop"])
def test_shares_lie_between_0_and_1(name, value):
    with pytest.raises(ValueError, match=rf"{name} = {value:g} must lie in \[0, 1\)"):
        MLP(**{name: value})
