"""models/kernels.py: the compiled loops give what the formulas give, and PyTorch's own operations without them."""

import copy
import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models import kernels
from models.unet import UNet

REPOSITORY = Path(__file__).parents[1]
ROUNDING = {torch.float32: 3e-6, torch.bfloat16: 1e-2}  # of the largest value
compiled = pytest.mark.skipif(not kernels.available(), reason=f"no compiled kernels: {kernels.why_not()}")
both = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


def randn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Noise, which as images is channels-last."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)
    return x.to(memory_format=torch.channels_last) if len(shape) == 4 else x


def with_gradients(function, inputs: list[Tensor], d_out: Tensor) -> list[Tensor]:
    """What a function gives, and its gradients by all inputs."""
    inputs = [x.detach().clone().requires_grad_() for x in inputs]
    out = function(*inputs)
    return [out, *torch.autograd.grad(out, inputs, d_out.to(out.dtype))]


def assert_alike(function, formula, inputs: list[Tensor], d_out: Tensor, tolerance: float) -> None:
    """The function agrees with a formula in float64, and so do all gradients, within a share of the largest value."""
    found = with_gradients(function, inputs, d_out)
    exact = with_gradients(formula, [x.double() for x in inputs], d_out.double())
    for a, b in zip(found, exact, strict=True):
        assert a.shape == b.shape
        torch.testing.assert_close(a.double(), b, rtol=0, atol=tolerance * b.abs().max().clamp(min=0.1).item())


@compiled
@both
@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize(
    "shape, groups", [((3, 64, 8, 8), 32), ((1, 96, 7, 5), 8), ((2, 30, 5, 5), 3), ((2, 512, 1, 1), 32)]
)
def test_group_norm(shape, groups, silu, dtype):
    x, (weight, bias) = randn(*shape, dtype=dtype) * 2 + 3, (randn(shape[1]) + 2, randn(shape[1] + 1)[1:])

    def formula(x, weight, bias):
        h = F.group_norm(x, groups, weight, bias, 1e-6)
        return h * torch.sigmoid(h) if silu else h

    def function(x, weight, bias):
        return kernels.group_norm(x, groups, weight, bias, 1e-6, silu)

    assert_alike(function, formula, [x, weight, bias], randn(*shape, dtype=dtype), ROUNDING[dtype])


@compiled
def test_group_norm_of_large_values_that_hardly_differ():
    """E x^2 - (E x)^2 would have nothing left here."""
    x = 1000 + randn(2, 32, 8, 8)
    found = kernels.group_norm(x, 4, torch.ones(32), torch.zeros(32), 1e-6, False)
    torch.testing.assert_close(found.double(), F.group_norm(x.double(), 4, eps=1e-6), rtol=0, atol=1e-4)


@pytest.mark.equation("Lavin (2x2, 3x3)")
@compiled
@both
@pytest.mark.parametrize(
    "c_in, c_out, height, width", [(64, 32, 8, 8), (40, 48, 7, 5), (33, 70, 2, 2), (64, 32, 1, 1), (32, 96, 9, 14)]
)
@pytest.mark.parametrize("shifted", [False, True])
def test_convolution_by_winograds_algorithm(c_in, c_out, height, width, shifted, dtype, monkeypatch):
    """Also cut into chunks of images, with edges that are no whole tile, and channels that are no whole lanes."""
    monkeypatch.setattr(kernels, "WIDE_ENOUGH", dict.fromkeys(kernels.WIDE_ENOUGH, 1))
    monkeypatch.setattr(kernels, "CHUNK", 2 * 4 * height * width * (c_in + c_out) * dtype.itemsize)
    inputs = [randn(5, c_in, height, width, dtype=dtype), randn(c_out, c_in, 3, 3), randn(c_out)]
    inputs += [randn(5, c_out)] if shifted else []

    def function(x, weight, bias, shift=None):
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            return kernels.convolution(x, weight, bias, shift)

    def formula(x, weight, bias, shift=None):
        y = F.conv2d(x, weight, bias, padding=1)
        return y if shift is None else y + shift[:, :, None, None]

    assert_alike(function, formula, inputs, randn(5, c_out, height, width, dtype=dtype), ROUNDING[dtype])


def in_precision(dtype: torch.dtype) -> torch.autocast:
    return torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16)


packed = pytest.mark.skipif(not kernels._packs(), reason="PyTorch cannot pack bfloat16 kernels here")


@compiled
@packed
@pytest.mark.parametrize("c_in, c_out, height, width", [(64, 32, 8, 8), (3, 48, 7, 5), (33, 1, 2, 2), (64, 32, 1, 1)])
@pytest.mark.parametrize("shifted", [False, True])
def test_packed_kernels_give_the_same_convolution(c_in, c_out, height, width, shifted, monkeypatch):
    """Where tiles are multiplied no convolution in bfloat16 is by Winograd's algorithm; another batch may follow."""
    monkeypatch.setattr(kernels, "WIDE_ENOUGH", dict.fromkeys(kernels.WIDE_ENOUGH, 1))
    monkeypatch.setattr(kernels, "_multiplies_tiles", lambda: True)
    monkeypatch.setattr(kernels, "_call", lambda *arguments: pytest.fail("a kernel was called"))
    weight, bias = randn(c_out, c_in, 3, 3), randn(c_out)
    with torch.no_grad(), in_precision(torch.bfloat16), kernels.frozen():
        for B in (5, 5, 2):
            x, shift = randn(B, c_in, height, width, dtype=torch.bfloat16), randn(B, c_out)
            y = kernels.convolution(x, weight, bias, shift if shifted else None)
            exact = F.conv2d(x.double(), weight.double(), bias.double(), padding=1)
            exact += shift[:, :, None, None] if shifted else 0
            atol = ROUNDING[torch.bfloat16] * exact.abs().max().item()
            torch.testing.assert_close(y.double(), exact, rtol=0, atol=atol)


@pytest.fixture(params=[True, False], ids=["tiles", "no tiles"])
def on_any_cpu(request, monkeypatch) -> list[str]:
    """All convolutions are wide, the CPU multiplies tiles or not; what is made of weights, in turn."""
    made: list[str] = []
    monkeypatch.setattr(kernels, "WIDE_ENOUGH", dict.fromkeys(kernels.WIDE_ENOUGH, 1))
    monkeypatch.setattr(kernels, "_multiplies_tiles", lambda: request.param)
    for name in ("_pack", "_transformed"):
        make = getattr(kernels, name)
        monkeypatch.setattr(kernels, name, lambda *how, make=make, name=name: (made.append(name), make(*how))[1])
    return made


def small(seed: int) -> tuple[UNet, list[Tensor]]:
    """A network of random weights, in evaluation mode, and (x, t)."""
    torch.manual_seed(seed)
    model = UNet(4, 1, channels=8, channel_mults=[1, 2], blocks=1, attention_resolutions=[], groups=4)
    for p in model.parameters():
        nn.init.normal_(p, std=0.3)
    return model.eval().to(memory_format=torch.channels_last), [randn(2, 1, 4, 4), torch.tensor([1, 500])]


@compiled
@packed
@both
def test_what_is_made_of_frozen_weights_is_made_once_and_never_stale(dtype, on_any_cpu):
    """After each way to change weights a network answers as it does anew."""
    model, inputs = small(0)
    weight, state = model.middle_1.conv_1.weight, small(1)[0].state_dict()
    steps = [p.clone() for p in model.parameters()]

    def answer() -> Tensor:
        with kernels.frozen():
            return model(*inputs)

    def swap() -> None:
        """As an average takes the place of the weights, and they are written to where they were."""
        held = {name: p.detach().clone() for name, p in model.named_parameters()}
        for name, p in model.named_parameters():
            p.copy_(0.5 * held[name])

    changes = [
        lambda: None,
        lambda: weight.mul_(1.5),
        lambda: torch._foreach_add_(list(model.parameters()), steps),
        swap,
        lambda: model.load_state_dict(state),
        lambda: setattr(weight, "data", 2 * weight),
        lambda: setattr(model.middle_1.conv_1, "weight", nn.Parameter(-weight.detach())),
    ]
    answers = []
    with torch.no_grad(), in_precision(dtype), kernels.frozen():
        model(*inputs)
        for change in changes:
            change()
            torch.clear_autocast_cache()  # which keeps the weights of all other layers
            count = len(on_any_cpu)
            answers.append(model(*inputs))
            assert (len(on_any_cpu) == count) == (not answers[1:])
            again = len(on_any_cpu)
            assert torch.equal(model(*inputs), answers[-1]) and len(on_any_cpu) == again
            assert torch.equal(answer(), answers[-1])
    for a, b in itertools.pairwise(answers):
        assert not torch.equal(a, b)


@compiled
@packed
@both
def test_nothing_is_kept_beyond_its_context_nor_changes_a_gradient(dtype, on_any_cpu):
    (model, inputs), (other, _) = small(0), small(0)
    with in_precision(dtype):
        expected = other(*inputs)
        expected.float().square().mean().backward()
    with pytest.raises(KeyError), torch.no_grad(), in_precision(dtype), kernels.frozen():
        model(*inputs)
        with kernels.frozen():
            assert not kernels._cached.made
        assert kernels._cached.made
        raise KeyError
    assert kernels._cached.made is None
    on_any_cpu.clear()
    with kernels.frozen(), in_precision(dtype):
        found = model(*inputs)
        found.float().square().mean().backward()
    assert set(on_any_cpu) == {"_transformed"}
    assert torch.equal(found, expected)
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)


@compiled
@packed
def test_weights_without_versions_are_never_kept(on_any_cpu):
    x, weight = randn(2, 8, 4, 4, dtype=torch.bfloat16), randn(8, 8, 3, 3)
    with torch.inference_mode(), kernels.frozen():
        weight = weight.clone()
        once = kernels.convolution(x, weight, torch.zeros(8))
        weight.mul_(2)
        assert torch.equal(kernels.convolution(x, weight, torch.zeros(8)), 2 * once)


@compiled
@both
@pytest.mark.parametrize("n, heads, width", [(49, 4, 8), (16, 2, 4), (196, 3, 8), (5, 3, 4), (1, 2, 8), (49, 2, 32)])
def test_attention(n, heads, width, dtype):
    q, k, v, d_out = (randn(2, n, heads * width + i, dtype=dtype)[..., i:].contiguous() for i in range(4))

    def formula(q, k, v):
        q, k, v = (x.unflatten(2, (heads, -1)).transpose(1, 2) for x in (q, k, v))
        return ((q @ k.mT / width**0.5).softmax(-1) @ v).transpose(1, 2).flatten(2)

    assert_alike(lambda q, k, v: kernels.attention(q, k, v, heads), formula, [q, k, v], d_out, ROUNDING[dtype])


@compiled
def test_attention_to_scores_that_would_overflow():
    q, k, v = 100 * randn(1, 20, 8), 100 * randn(1, 20, 9)[..., 1:], randn(1, 20, 10)[..., 2:]
    found = kernels.attention(q, k.contiguous(), v.contiguous(), 1)
    torch.testing.assert_close(found, (q @ k.mT / 8**0.5).softmax(-1) @ v)


@compiled
@both
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_are_not_hidden(bad, dtype, monkeypatch):
    monkeypatch.setattr(kernels, "WIDE_ENOUGH", dict.fromkeys(kernels.WIDE_ENOUGH, 1))
    x = randn(2, 32, 4, 4, dtype=dtype)
    x[1, 3, 2, 2] = bad
    normal = kernels.group_norm(x, 8, torch.ones(32), torch.zeros(32), 1e-6, True)
    assert normal[0].isfinite().all() and not normal[1, :4].isfinite().all()
    y = kernels.convolution(x, randn(32, 32, 3, 3), torch.zeros(32))
    assert y[0].isfinite().all() and not y[1, :, 1:4, 1:4].isfinite().any()
    rows = x[:, :8].flatten(2).mT.contiguous()
    assert not kernels.attention(rows, rows, rows, 1)[1].isfinite().all(1).any()


def networks() -> tuple[UNet, UNet, list[Tensor]]:
    """A network with every path, twice, in training mode, and (x, t, y)."""
    torch.manual_seed(0)
    model = UNet(
        12, 3, channels=32, channel_mults=[1, 8, 8], blocks=1, attention_resolutions=[6], head_channels=8, dropout=0.0,
        groups=8, num_classes=4,
    )  # fmt: skip
    for p in model.parameters():
        nn.init.normal_(p, std=0.5 / max(p[0].numel(), 1) ** 0.5) if not p.any() else None
    model = model.to(memory_format=torch.channels_last)
    return model, copy.deepcopy(model), [randn(3, 3, 12, 12), torch.tensor([1, 500, 1000]), torch.tensor([0, 3, 1])]


@compiled
def test_a_step_of_a_network_is_that_of_pytorchs_own_operations(monkeypatch):
    """Output and all gradients, within 1e-5 of the largest value of each."""
    fast, plain, (x, t, y) = networks()
    calls = []
    call = kernels._call
    monkeypatch.setattr(kernels, "_call", lambda name, *rest: (calls.append(name), call(name, *rest)))
    found = fast(x, t, y)
    found.square().mean().backward()
    assert {"norm_backward", "weight_back", "tiles_back", "attend_back"} <= set(calls)
    calls.clear()
    monkeypatch.setattr(kernels, "available", lambda: False)
    expected = plain(x, t, y)
    expected.square().mean().backward()
    assert not calls
    pairs = [(found, expected), *((a.grad, b.grad) for a, b in zip(fast.parameters(), plain.parameters(), strict=True))]
    for a, b in pairs:
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5 * b.abs().max().item() + 1e-9)


@pytest.mark.slow
@compiled
def test_half_precision_learns_along_the_same_curve(monkeypatch):
    """With every convolution by Winograd's algorithm; the two curves are as near as those of two seeds are not."""
    monkeypatch.setattr(kernels, "WIDE_ENOUGH", dict.fromkeys(kernels.WIDE_ENOUGH, 1))
    x, t = randn(16, 1, 8, 8).clamp(-1, 1), torch.arange(16)

    def curve(dtype: torch.dtype, seed: int) -> Tensor:
        torch.manual_seed(seed)
        model = UNet(8, 1, channels=32, channel_mults=[1, 2], blocks=1, attention_resolutions=[4], head_channels=8,
                     groups=8, dropout=0.0).to(memory_format=torch.channels_last)  # fmt: skip
        optimizer, losses = torch.optim.Adam(model.parameters(), lr=2e-3), []
        for _ in range(60):
            with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
                loss = (model(x, t).float() - x.flip(-1)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        return torch.stack(losses)

    full, half, other = curve(torch.float32, 0), curve(torch.bfloat16, 0), curve(torch.float32, 1)
    assert full[-10:].mean() < 0.5 * full[0]
    assert (full - half).abs().mean() < 0.5 * (full - other).abs().mean()


@compiled
def test_threads_do_not_change_a_bit():
    threads, results = torch.get_num_threads(), []
    for number in (1, 2):
        torch.set_num_threads(number)
        h = kernels.group_norm(randn(4, 64, 6, 6), 8, torch.ones(64), torch.zeros(64), 1e-6, True)
        results.append(kernels.attention(*(h.flatten(2).mT.contiguous() for _ in range(3)), 8))
    torch.set_num_threads(threads)
    assert torch.equal(*results)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_other_numbers_and_layouts_take_pytorchs_own_operations(dtype):
    x, weight = randn(2, 32, 4, 4, dtype=dtype), randn(32, 32, 3, 3, dtype=dtype)
    assert torch.equal(kernels.convolution(x, weight, weight.new_zeros(32)), F.conv2d(x, weight, padding=1))
    rows, one, zero = torch.randn(2, 32, 4, 4), torch.ones(32), torch.zeros(32)
    found = kernels.group_norm(rows, 4, one, zero, 1e-6, True)
    assert torch.equal(found, F.silu(F.group_norm(rows, 4, one, zero, 1e-6)))


def test_what_does_not_fit_is_refused_and_never_read(monkeypatch):
    """The kernels know addresses alone; PyTorch's own operations compute it, or say what is wrong."""
    monkeypatch.setattr(kernels, "WIDE_ENOUGH", dict.fromkeys(kernels.WIDE_ENOUGH, 1))
    monkeypatch.setattr(kernels, "_call", lambda *arguments: pytest.fail("a kernel was called"))
    x, row = randn(2, 32, 4, 4), torch.ones(32)
    with pytest.raises(RuntimeError, match="weight"):
        kernels.group_norm(x, 4, row[:16], row, 1e-6, True)
    with pytest.raises(RuntimeError, match="divisible"):
        kernels.group_norm(x, 5, row, row, 1e-6, True)
    for weight, bias in ((randn(8, 16, 3, 3), row[:8]), (randn(8, 32, 3, 3), row)):
        with pytest.raises(RuntimeError, match=r"channels|bias"):
            kernels.convolution(x, weight, bias)
    with pytest.raises(RuntimeError, match="must match"):
        kernels.convolution(x, randn(32, 32, 3, 3), row, torch.ones(3, 32))
    assert kernels.attention(randn(2, 4, 8), *(randn(2, 5, 8) for _ in "kv"), 1).shape == (2, 4, 8)
    strided = torch.ones(64)[::2]
    assert torch.equal(kernels.group_norm(x, 4, strided, strided, 1e-6, False), F.group_norm(x, 4, row, row, 1e-6))


@compiled
def test_gradients_of_gradients_are_refused():
    x = randn(2, 32, 4, 4).requires_grad_()
    y = kernels.group_norm(x, 4, torch.ones(32), torch.zeros(32), 1e-6, True)
    with pytest.raises(RuntimeError, match="DDPM_KERNELS=0"):
        torch.autograd.grad(y.sum(), x, create_graph=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    "environment, reason",
    [({"DDPM_KERNELS": "0"}, "DDPM_KERNELS=0"), ({"CXX": "no-such-compiler"}, "no C++"), ({"CXX": "false"}, "failed")],
    ids=str,
)
def test_without_a_compiler_all_goes_on_with_pytorchs_own_operations(environment, reason, tmp_path):
    code = (
        "import torch\nfrom models import kernels\nfrom models.unet import UNet\n"
        "model = UNet(8, 1, channels=32, channel_mults=[1], attention_resolutions=[8], dropout=0.0)\n"
        "model(torch.randn(2, 1, 8, 8).to(memory_format=torch.channels_last), torch.tensor([1, 2])).sum().backward()\n"
        "print(kernels.why_not())"
    )
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path), "PYTHONPATH": str(REPOSITORY)} | environment
    command = [sys.executable, "-c", code]
    told, again = (
        subprocess.run(command, env=environment, capture_output=True, text=True, check=True) for _ in range(2)
    )
    assert reason in told.stdout and reason in again.stdout and not list(tmp_path.rglob("*.so"))
    assert "compiling" not in again.stderr, "what failed once is not tried at every start"


@pytest.mark.slow
@compiled
def test_they_are_compiled_once_for_all_processes(tmp_path):
    code = "from models import kernels\nassert kernels.available(), kernels.why_not()"
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path), "PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, "-c", code]
    told = [subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stderr for _ in "12"]
    assert "compiling" in told[0] and not told[1] and len(list(tmp_path.rglob("*"))) == 2
