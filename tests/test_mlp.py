"""models/mlp.py: the forward pass written out, what it is told, and every refusal."""

import math

import pytest
import torch
from test_layers import silu
from torch import Tensor, nn

from ddpm.data.batch import Condition, takes
from ddpm.diffusion import GaussianDiffusion
from ddpm.runs.preflight import activations
from ddpm.samplers import DDIM
from ddpm.schedules import linear
from ddpm.training.ema import EMA
from models.mlp import MLP, with_octaves


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


# --- How it is told the time


@pytest.mark.parametrize("options", [{}, {"time": "fourier"}, {"time": "none"}, {"energy": True}], ids=str)
def test_parameters_that_a_form_has(options):
    def shapes(**options) -> dict[str, torch.Size]:
        return {name: p.shape for name, p in small(num_classes=3, drop=0.1, **options).state_dict().items()}

    found, default = shapes(**options), shapes()
    added = {"time_embedding.0.b": torch.Size([4])} if options.get("time") == "fourier" else {}
    lacking = (
        {name for name in default if name.startswith("time_embedding")} if options.get("time") == "none" else set()
    )
    assert found == {name: shape for name, shape in default.items() if name not in lacking} | added


def test_first_values_are_those_of_the_network_before_it_had_forms():
    """Seeded, and summed up; so old runs are begun as they were."""
    torch.manual_seed(1)
    state = MLP(num_classes=3, drop=0.1).state_dict()
    assert sum(float(p.double().sum()) for p in state.values()) == pytest.approx(17.499549722605366, rel=1e-6)


def test_fourier_features_are_the_formula_and_are_kept():
    torch.manual_seed(0)
    net = randomised(small(time="fourier", fourier_scale=0.5)).double()
    w, x = net.state_dict(), X.double()
    angles = 2 * math.pi * T.double()[:, None] * w["time_embedding.0.b"]
    features = torch.cat([angles.sin(), angles.cos()], 1)

    def linear(name: str, h: Tensor) -> Tensor:
        return h @ w[f"{name}.weight"].mT + w[f"{name}.bias"]

    emb, h = silu(linear("time_embedding.3", silu(linear("time_embedding.1", features)))), linear("linear_in", x)
    for i in range(2):
        inner = linear(f"residual.{i}.linear_1", h) + linear(f"residual.{i}.embedding", emb)
        h = h + linear(f"residual.{i}.linear_2", silu(inner))
    torch.testing.assert_close(net(x, T.double()), linear("linear_out", silu(h)))
    other = small(time="fourier", fourier_scale=0.5).double()
    assert not torch.equal(other(x, T), net(x, T))
    other.load_state_dict(w)
    assert torch.equal(other(x, T), net(x, T))
    assert "time_embedding.0.b" not in dict(net.named_parameters())


def test_without_a_time_t_has_no_effect_and_no_layer_waits_for_it():
    net = randomised(small(time="none"))
    assert torch.equal(net(X, T), net(X, T + 5)) and not any("embedding" in name for name in net.state_dict())
    net(X, T).square().sum().backward()
    assert all(p.grad is not None for p in net.parameters())
    told = randomised(small(time="none", num_classes=3))
    assert torch.equal(told(X, T, Y), told(X, T + 5, Y)) and not torch.equal(told(X, T, Y), told(X, T, (Y + 1) % 3))


# --- Sines and cosines of the coordinates


@pytest.mark.equation("NeRF (4)")
def test_each_octave_adds_a_sine_and_a_cosine_of_every_coordinate():
    for n, row in zip(X.tolist(), with_octaves(X.double(), 3).tolist(), strict=True):
        waves = [f(math.pi / 4 * 2**k * p) for k in range(3) for f in (math.sin, math.cos) for p in n]
        assert row == pytest.approx([*n, *waves], rel=1e-12)
    assert with_octaves(X, 0) is X


def test_octaves_stand_before_the_first_layer_and_all_else_stays():
    net = randomised(small(octaves=4, num_classes=4)).double()
    w = net.state_dict()
    expected = forward_by_hand(w, with_octaves(X.double(), 4), T.tolist(), w["class_embedding.weight"][Y], 2)
    torch.testing.assert_close(net(X.double(), T, Y), expected)
    assert net.shape == (2,) and w["linear_in.weight"].shape == (8, 2 * (1 + 2 * 4))


# --- The gradient of an energy


def jacobian(net: MLP, *told: Tensor) -> Tensor:
    """Of each row's output with respect to the row, (B, F, F)."""

    def row(x: Tensor, t: Tensor, *y: Tensor) -> Tensor:
        return net(x[None], t[None], *(one[None] for one in y))[0]

    return torch.func.vmap(torch.func.jacrev(row))(X3, T, *told)


X3 = torch.randn(5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def conservative(**options) -> MLP:
    return randomised(small(3, energy=True, **options)).double()


def test_the_output_is_minus_the_gradient_of_the_energy():
    net = conservative(num_classes=3)
    default = small(3, num_classes=3).double()
    default.load_state_dict(net.state_dict())
    f, x = default(X3, T, Y), X3.clone().requires_grad_()
    energy = net.energy(x, T, Y)
    torch.testing.assert_close(energy, -(X3 * f).sum(1))
    (gradient,) = torch.autograd.grad(energy.sum(), x)
    out = net(X3, T, Y)
    torch.testing.assert_close(out, -gradient)
    torch.testing.assert_close(out, f + (jacobian(default, Y).mT @ X3[..., None])[..., 0])
    h = 1e-5
    for k in range(3):  # and by differences
        step = h * torch.eye(3, dtype=torch.float64)[k]
        difference = (net.energy(X3 + step, T, Y) - net.energy(X3 - step, T, Y)) / (2 * h)
        torch.testing.assert_close(out[:, k], -difference, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("options", [{}, {"time": "fourier"}, {"time": "none"}], ids=str)
def test_its_jacobian_is_symmetric_and_that_of_the_default_form_is_not(options):
    J = jacobian(conservative(**options))
    torch.testing.assert_close(J, J.mT, rtol=1e-9, atol=1e-11)
    assert (J - J.diagonal(dim1=1, dim2=2).diag_embed()).abs().max() > 0.1
    J = jacobian(randomised(small(3, **options)).double())
    assert (J - J.mT).abs().max() > 0.1


def test_gradients_of_the_gradient_are_right_for_parameters_and_inputs():
    net = conservative()
    names, parameters = zip(*net.named_parameters(), strict=True)

    def loss(x: Tensor, *parameters: Tensor) -> Tensor:
        return torch.func.functional_call(net, dict(zip(names, parameters, strict=True)), (x, T[:2])).square().sum()

    inputs = [X3[:2].clone().requires_grad_(), *(p.detach().clone().requires_grad_() for p in parameters)]
    assert torch.autograd.gradcheck(loss, inputs, fast_mode=True)


def test_it_is_evaluated_without_gradients_and_differentiated_along_a_direction():
    net = conservative().eval()
    out = net(X3, T)
    with torch.no_grad():
        quiet = net(X3, T)
    with torch.inference_mode(), pytest.raises(RuntimeError, match=r"take torch.no_grad\(\)"):
        net(X3, T)
    assert torch.equal(quiet, out) and out.requires_grad and not quiet.requires_grad
    v = torch.randn_like(X3)
    with torch.no_grad():
        again, along = torch.func.jvp(lambda x: net(x, T), (X3,), (v,))
    torch.testing.assert_close(again, out)
    torch.testing.assert_close(along, (jacobian(net) @ v[..., None])[..., 0])


def test_a_copy_of_the_average_and_rows_are_as_of_the_default_form():
    net = conservative(num_classes=3, drop=0.1)
    average = EMA(net).model
    condition = Condition(classes=Y, null={"classes": NULL})
    assert torch.equal(average(X3, T, condition), net(X3, T, condition))
    alone = net(X3[1:2], T[1:2], Condition(classes=Y[1:2], null={"classes": NULL[1:2]}))
    torch.testing.assert_close(alone, net(X3, T, condition)[1:2])
    assert torch.equal(small(3, energy=True)(X3.float(), T), torch.zeros(5, 3))


def test_every_parameter_of_an_energy_learns():
    net = conservative(num_classes=3, drop=0.1)
    net(X3, T, Condition(classes=Y, null={"classes": NULL})).square().mean().backward()
    for name, p in net.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all() and p.grad.abs().max() > 0, name


def test_the_memory_of_a_step_is_counted_of_an_energy_too():
    """Where autograd saves nothing by a hook."""

    def kept(net: MLP, n: int) -> int:
        x, t = torch.ones(n, 2), torch.ones(n)
        return activations(lambda n: net(x[:n], t[:n]).square().mean(), net.parameters(), n)

    plain, gradient = kept(small(), 40), kept(small(energy=True), 40)
    assert plain < gradient < 10 * plain and kept(small(energy=True), 80) == 2 * gradient


# --- Within the mathematics


@pytest.mark.parametrize(
    ("variance", "out_features", "loss", "form"),
    [
        ("beta", None, "simple", {}),
        ("learned", 4, "hybrid", {}),
        ("beta", None, "simple", {"energy": True}),
        ("beta", None, "simple", {"time": "fourier", "energy": True}),
    ],
)
def test_it_is_trained_and_sampled_as_a_denoiser(variance, out_features, loss, form):
    diffusion = GaussianDiffusion(linear(50), "v", variance, clip_x_0=False, loss=loss)
    net = small(out_features=out_features, width=16, **form)
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


def test_forms_that_are_none():
    with pytest.raises(ValueError, match="time = 'cosine' is not known; allowed: sinusoidal, fourier, none"):
        small(time="cosine")
    for scale in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match=f"fourier_scale = {scale:g} must be a number > 0"):
            small(fourier_scale=scale)
    for octaves in (-1, 17, 1.5, True):
        with pytest.raises(ValueError, match=rf"octaves = {octaves} must be an integer in 0\.\.16"):
            small(octaves=octaves)
    with pytest.raises(ValueError, match="out_features = 4: the gradient of an energy has as many numbers as x_t, 2"):
        small(energy=True, out_features=4)
    assert small(energy=True, out_features=2).out_channels == 2
    with pytest.raises(ValueError, match="this network has no energy"):
        small().energy(X, T)
    with pytest.raises(ValueError, match=r"this network takes \(B, 2\)"):
        small(energy=True)(torch.zeros(5, 3), T)
