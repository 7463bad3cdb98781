"""ddpm/training/ema.py: the weight of every past step in closed form."""

import math

import pytest
import torch
from torch import nn

from ddpm.training.ema import EMA


def network(value: float = 0.0) -> nn.Module:
    model = nn.Linear(2, 1, dtype=torch.float64)
    for p in model.parameters():
        nn.init.constant_(p, value)
    return model


def averaged(values: list[float], start: float, **options: float) -> float:
    """The average after seeing a weight that takes these values."""
    model = network(start)
    ema = EMA(model, **options)
    for value in values:
        for p in model.parameters():
            nn.init.constant_(p, value)
        ema.update(model)
    assert ema.updates == len(values) and torch.equal(ema.model.weight, ema.model.bias.expand(1, 2))
    return ema.model.bias.item()


def weights(n: int, **options: float) -> list[float]:
    """Weight of the start and of each of n steps, read off by letting one value at a time be 1."""
    start = averaged([0.0] * n, 1.0, **options)
    return [start, *(averaged([float(r == k) for r in range(n)], 0.0, **options) for k in range(n))]


@pytest.mark.parametrize(("decay", "warmup"), [(0.9, 0.0), (0.9, 9.0), (0.9999, 9.0), (0.6, 1.0), (0.0, 5.0)])
def test_the_weight_of_each_step_is_the_product_formula(decay, warmup):
    n = 40
    d = [decay if warmup == 0 else min(decay, (r - 1) / (r - 1 + warmup)) for r in range(1, n + 1)]
    expected = [math.prod(d), *((1 - d[r]) * math.prod(d[r + 1 :]) for r in range(n))]
    ours = weights(n, decay=decay, warmup=warmup)
    assert ours == pytest.approx(expected, rel=1e-12, abs=1e-15) and sum(ours) == pytest.approx(1, rel=1e-14)


def test_without_warm_up_it_is_the_plain_exponential_average():
    assert weights(10, decay=0.5, warmup=0.0) == [2.0**-10, *(2.0 ** -(10 - r) for r in range(10))]


def test_while_it_warms_up_it_looks_back_over_a_fixed_share_of_the_training():
    """w_r = warmup G(n) G(r + warmup - 1) / (G(r) G(n + warmup)) (G = Gamma): mean age n / (warmup + 1), no start."""
    n, warmup, g = 60, 9.0, math.lgamma
    ours = weights(n, warmup=warmup)
    expected = [warmup * math.exp(g(n) + g(r + warmup - 1) - g(r) - g(n + warmup)) for r in range(1, n + 1)]
    assert ours[0] == 0 and ours[1:] == pytest.approx(expected, rel=1e-10)
    assert sum(w * (n - r) for r, w in enumerate(ours)) / n == pytest.approx(1 / (warmup + 1), rel=0.02)


def test_decay_rises_to_its_cap():
    ema = EMA(network(), decay=0.5, warmup=9)
    assert [ema.decay_at(n) for n in (1, 2, 9, 10, 11, 1000)] == [0, 1 / 10, 8 / 17, 0.5, 0.5, 0.5]
    default = EMA(network())
    assert default.decay == 0.9999 and default.decay_at(80000) < 0.9999 == default.decay_at(90001)


def test_constant_weights_stay_to_the_bit():
    model = nn.Linear(5, 5)
    ema = EMA(model)
    for _ in range(20):
        ema.update(model)
    assert all(torch.equal(a, b) for a, b in zip(ema.model.parameters(), model.parameters(), strict=True))


def test_it_starts_at_the_weights_and_the_first_update_takes_the_new_ones():
    model = nn.Linear(2, 2)
    ema = EMA(model)
    assert torch.equal(ema.model.weight, model.weight)
    before = model.weight.detach().clone()
    nn.init.normal_(model.weight)
    assert torch.equal(ema.model.weight, before)  # a copy, not a view
    ema.update(model)
    assert torch.equal(ema.model.weight, model.weight)


def test_buffers_are_copied_and_the_average_takes_no_gradients():
    model = nn.Sequential(nn.Conv2d(1, 3, 1), nn.BatchNorm2d(3))
    ema = EMA(model)
    for _ in range(3):
        model(torch.randn(4, 1, 2, 2))
        ema.update(model)
    assert ema.model[1].num_batches_tracked == 3 and torch.equal(ema.model[1].running_mean, model[1].running_mean)
    assert not ema.model.training and model.training
    assert not any(p.requires_grad for p in ema.model.parameters()) and all(p.requires_grad for p in model.parameters())
    nn.init.zeros_(model[1].running_mean)
    assert ema.model[1].running_mean.abs().sum() > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_it_keeps_the_dtype(dtype):
    model = nn.Linear(2, 2, dtype=dtype)
    ema = EMA(model, decay=0.5, warmup=0)
    first = model.weight.detach().clone()
    nn.init.ones_(model.weight)
    ema.update(model)
    assert ema.model.weight.dtype == dtype
    torch.testing.assert_close(ema.model.weight, (first + 1) / 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"decay": 1.0}, r"ema decay = 1 must lie in \[0, 1\)"),
        ({"decay": -0.1}, "ema decay = -0.1"),
        ({"warmup": -1.0}, "ema warmup = -1 must be >= 0"),
    ],
)
def test_arguments_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        EMA(network(), **options)
