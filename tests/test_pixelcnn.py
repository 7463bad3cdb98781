"""models/pixelcnn.py: layers written out, who sees whom, a distribution that sums to one, samples by two roads."""

import itertools
import math
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ddpm.data.batch import Condition, takes
from ddpm.training.task import shape_of
from models.pixelcnn import GatedLayer, PixelCNN, gated, inverse_cdf


def small(size: int | tuple[int, int] = (3, 4), **options) -> PixelCNN:
    """A network in float64 whose logits differ enough for every code to be drawn."""
    net = PixelCNN(**{"codes": 3, "size": size, "channels": 4, "layers": 3} | options).double()
    nn.init.normal_(net.head[-1].weight)
    return net


def grids(net: PixelCNN, n: int = 5) -> Tensor:
    return torch.randint(net.codes, (n, *net.shape))


# --- The layers


@pytest.mark.equation("PixelCNN (2)")
def test_the_activation_is_tanh_gated_by_a_sigmoid():
    a = torch.randn(2, 6, 3, 2, dtype=torch.float64)
    for c, i in itertools.product(range(3), range(2)):
        f, g = a[i, c], a[i, 3 + c]
        expected = (f.exp() - (-f).exp()) / (f.exp() + (-f).exp()) / (1 + (-g).exp())
        torch.testing.assert_close(gated(a)[i, c], expected, rtol=1e-12, atol=1e-12)


@pytest.mark.equation("PixelCNN (4)")
@pytest.mark.parametrize(("kernel", "mask"), [(3, "A"), (3, "B"), (7, "A"), (5, "B")])
def test_a_layer_is_two_masked_convolutions_gated_and_told_the_class(kernel, mask):
    """Whole kernels, set to zero where the mask hides."""
    layer = GatedLayer(2, kernel, mask, num_classes=3).double()
    v, h, y = *torch.randn(2, 2, 2, 5, 4, dtype=torch.float64), torch.tensor([2, 0])
    w = layer.state_dict()
    rows, columns = torch.zeros(4, 2, kernel, kernel).double(), torch.zeros(4, 2, 1, kernel).double()
    rows[:, :, : layer.n], columns[..., : layer.n] = w["vertical.weight"], w["horizontal.weight"]
    assert layer.n == kernel // 2 + (mask == "B")
    told_v, told_h = w["of_class.weight"][y][:, :, None, None].split(4, 1)

    a = F.conv2d(v, rows, w["vertical.bias"], padding=kernel // 2) + told_v
    b = F.conv2d(h, columns, w["horizontal.bias"], padding=(0, kernel // 2)) + told_h
    b = b + torch.einsum("oi,bihw->bohw", w["to_horizontal.weight"][:, :, 0, 0], a)
    b = b + w["to_horizontal.bias"][:, None, None]
    out = torch.einsum("oi,bihw->bohw", w["out.weight"][:, :, 0, 0], b[:, :2].tanh() * b[:, 2:].sigmoid())
    out = out + w["out.bias"][:, None, None] + (h if mask == "B" else 0)
    torch.testing.assert_close(layer(v, h, y), (a[:, :2].tanh() * a[:, 2:].sigmoid(), out), rtol=1e-11, atol=1e-11)


# --- Who sees whom


@pytest.mark.parametrize("options", [{"size": 7, "layers": 7}, {"size": (4, 6)}, {"size": (6, 3), "num_classes": 2}])
def test_a_code_depends_on_all_before_it_and_on_no_other(options):
    """The Jacobian of all logits to one-hot codes, whose embedding is a product of matrices."""
    net, (height, width) = small(**options, channels=12), small(**options).shape  # no rectifier closes all channels
    z, y = grids(net, 1), torch.tensor([1]) if net.num_classes else None

    def logits(one_hot: Tensor) -> Tensor:  # (H, W, K)
        return net.logits((one_hot @ net.embedding.weight).permute(2, 0, 1)[None], y)[0].flatten(1)

    one_hot = F.one_hot(z[0], 3).double()
    torch.testing.assert_close(logits(one_hot), net(z, y)[0].flatten(1), rtol=1e-12, atol=1e-12)
    J = torch.autograd.functional.jacobian(logits, one_hot, vectorize=True)  # (K, HW, H, W, K)
    depends = (J.reshape(3, height * width, height * width, 3) != 0).any(3).any(0)
    assert torch.equal(depends, torch.ones_like(depends).tril(-1))


def test_it_sees_as_far_as_it_says():
    net = small((1, 12), layers=3)  # 3 + 2 columns to the left
    z = grids(net, 1)
    for c in range(12):
        other = z.clone()
        other[0, 0, c] = (z[0, 0, c] + 1) % 3
        moved = (net(other) != net(z)).any(1)[0, 0]
        assert moved.nonzero().flatten().tolist() == list(range(c + 1, min(12, c + 6)))


def test_gradients_reach_every_parameter():
    net = small(num_classes=3)
    net.log_prob(grids(net, 6), torch.arange(6) % 3).sum().backward()
    assert all(p.grad.abs().max() > 0 for p in net.parameters())


# --- The distribution


@pytest.mark.equation("PixelCNN (1)")
@pytest.mark.equation("PixelCNN (3)")
@pytest.mark.parametrize("y", [None, 0, 1])
def test_probabilities_of_all_grids_sum_to_one_and_are_products(y):
    net = small(2, num_classes=None if y is None else 2)
    z = torch.tensor(list(itertools.product(range(3), repeat=4))).reshape(81, 2, 2)
    classes = None if y is None else torch.full((81,), y)
    found = net.log_prob(z, classes)
    assert found.exp().sum().item() == pytest.approx(1, abs=1e-12) and found.std() > 0.01
    p = net(z, classes).softmax(1)
    for i in (0, 17, 80):
        product = math.prod(p[i, z[i, r, c], r, c].item() for r in range(2) for c in range(2))
        assert found[i].exp().item() == pytest.approx(product, rel=1e-12)


def test_the_class_matters_and_rows_are_independent():
    net = small(num_classes=3)
    z, y = grids(net), torch.tensor([0, 1, 2, 0, 1])
    out = net(z, y)
    assert out.shape == (5, 3, 3, 4) and ((net(z, (y + 1) % 3) - out).abs().amax((1, 2, 3)) > 1e-6).all()
    torch.testing.assert_close(net(z[2:3], y[2:3]), out[2:3], rtol=1e-12, atol=1e-12)
    assert torch.equal(net(z.to(torch.uint8), Condition(classes=y)), out)


# --- Samples


@torch.no_grad()
def naive(net: PixelCNN, u: Tensor, y: Tensor | None = None, temperature: float = 1.0) -> Tensor:
    """The whole network for each code; a loop finds where the distribution function passes u."""
    z = torch.zeros(u.shape, dtype=torch.long)
    for r, c in itertools.product(*map(range, net.shape)):
        logits = net(z, y)[:, :, r, c]
        for i in range(len(u)):
            if temperature == 0:
                z[i, r, c] = max(range(net.codes), key=lambda k: logits[i, k].item())
                continue
            cdf = (logits[i] / temperature).softmax(0).cumsum(0).tolist()
            z[i, r, c] = next((k for k in range(net.codes) if cdf[k] > u[i, r, c]), net.codes - 1)
    return z


@pytest.mark.parametrize("temperature", [1.0, 0.5, 3.0, 0.0])
@pytest.mark.parametrize(
    "options", [{}, {"size": 5, "layers": 5, "num_classes": 4}, {"size": (1, 4), "layers": 1}], ids=str
)
def test_cached_samples_are_those_of_the_whole_network(options, temperature):
    net = small(**options)
    u, y = torch.rand(16, *net.shape), torch.arange(16) % 4 if net.num_classes else None
    found = net.sample(u, y, temperature)
    assert torch.equal(found, naive(net, u, y, temperature))
    assert temperature == 0 or len(found.unique()) == net.codes


def test_cached_sampling_costs_one_pass_and_not_one_for_each_code():
    net, u, products = small((4, 5), num_classes=2), torch.rand(2, 4, 5), 0

    def count(layer: nn.Conv2d, _, out: Tensor) -> None:
        nonlocal products
        products += out.numel() * layer.weight[0].numel()

    def products_of(draw) -> int:
        nonlocal products
        products = 0
        draw(u, torch.tensor([0, 1]))
        return products

    for layer in net.modules():
        if isinstance(layer, nn.Conv2d):
            layer.register_forward_hook(count)
    assert products_of(partial(naive, net)) == 20 * products_of(net.sample) > 0


def test_frequencies_of_samples_are_the_probabilities():
    """Uniform numbers on a lattice: every grid comes up as often as it is likely, but for the lattice's edges."""
    net, n = small((1, 2)), 60
    lattice = (torch.arange(n) + 0.5) / n
    u = torch.cartesian_prod(lattice, lattice)[:, None]
    z = net.sample(u)[:, 0]
    found = torch.bincount(3 * z[:, 0] + z[:, 1], minlength=9) / n**2
    p = net.log_prob(torch.cartesian_prod(torch.arange(3), torch.arange(3))[:, None]).exp()
    torch.testing.assert_close(found.double(), p, rtol=0, atol=2 / n)


def test_uniform_numbers_are_taken_through_the_inverse_distribution_function():
    p = torch.tensor([[0.0, 1, 0, 3, 0]]).expand(5, 5)
    u = torch.tensor([0.0, 0.2499, 0.25, 0.99, 1 - 2**-24])
    assert inverse_cdf(p, u).tolist() == [1, 1, 3, 3, 3]  # never one without probability


def test_temperatures_near_zero_take_the_likeliest_code():
    logits = torch.randn(50, 7)
    for temperature in (0.0, 1e-300, 1e-9):
        assert torch.equal(PixelCNN.drawn(logits, torch.rand(50), temperature), logits.argmax(1))


# --- What the house asks of it, and refusals


def test_what_it_says_of_itself():
    assert small().shape == shape_of(small()) == (3, 4) and small(7).shape == (7, 7)
    assert takes(small()) == () and takes(small(num_classes=2)) == ("classes",)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"codes": 0}, "codes = 0 must be an integer >= 1"),
        ({"codes": True}, "codes = True"),
        ({"size": (4,)}, r"size = \(4,\) must be one integer >= 1, or two"),
        ({"size": (4, 0)}, r"size\[1\] = 0"),
        ({"channels": 2.5}, "channels = 2.5"),
        ({"layers": 0}, "layers = 0 must be an integer >= 1, and at most 100"),
        ({"num_classes": 0}, "num_classes = 0"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused(options, words):
    with pytest.raises(ValueError, match=words):
        small(**options)


def test_inputs_that_do_not_fit_are_refused():
    net, told = small(), small(num_classes=2)
    z, u = grids(net), torch.rand(5, 3, 4)
    refusals = [
        (lambda: net(z.mT), r"int64 of shape \(5, 4, 3\); this network takes integers \(B, 3, 4\)"),
        (lambda: net(z.float()), "float32"),
        (lambda: net(z, torch.zeros(5).long()), "num_classes = None, y is given"),
        (lambda: told(z), "num_classes = 2, y is missing"),
        (lambda: told(z, torch.tensor([1])), "1 classes are given for 5 grids"),
        (lambda: net.sample(u.mT), r"u has shape \(5, 4, 3\)"),
        (lambda: net.sample(u + 0.5), r"u must lie in \[0, 1\)"),
        (lambda: net.sample(u * math.nan), r"u must lie in \[0, 1\)"),
        (lambda: net.sample(u, temperature=-1.0), "temperature = -1 must be a number >= 0"),
        (lambda: net.sample(u, temperature=math.inf), "temperature = inf"),
        (lambda: told.sample(u), "y is missing"),
        (lambda: net.check(z + 1), r"codes are \d..3; this network takes 0..2"),
        (lambda: net.check(z - 5), "codes are -5"),
        (lambda: told.check(z, torch.tensor([0, 2])), "classes are 0..2; this network takes 0..1"),
    ]
    for refused, words in refusals:
        with pytest.raises(ValueError, match=words):
            refused()
    net.check(z), told.check(z, torch.tensor([0, 1]))
