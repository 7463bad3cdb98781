"""The held-out loss by log-SNR: what it is for an exact denoiser, and that no schedule, target or seed changes it."""

import csv
import itertools
import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from ddpm.data import ImageData
from ddpm.diffusion import GaussianDiffusion
from ddpm.figures import plots
from ddpm.losses import errors_at_snr
from ddpm.metrics.denoising import LOG_SNR_BINS, measure_loss_by_snr, snr_bins, write_loss_by_snr
from ddpm.oracle import GaussianOracle
from ddpm.samplers import DDIM
from ddpm.schedules import NoiseSchedule, cosine, linear, sigmoid, zero_terminal_snr
from ddpm.sources.trained import TrainedSampler
from ddpm.targets import from_prediction

MEAN, VARIANCE, N, DIMS = 0.1, 0.04, 60, 64


class Exact(nn.Module):
    """The exact denoiser of Gaussian data, as a network; notes the times that it is asked for."""

    def __init__(self, schedule: NoiseSchedule, target: str):
        super().__init__()
        self.oracle, self.target, self.asked = GaussianOracle(schedule, MEAN, VARIANCE), target, []

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        self.asked.append(t)
        return from_prediction(self.oracle.schedule, self.target, self.oracle.denoise(x_t, t), t)


def data() -> ImageData:
    """Gaussian pixels as bytes, 60 of whose images are held out."""
    x = MEAN + math.sqrt(VARIANCE) * torch.randn(4 * N, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    return ImageData("gaussian", "all", ((x + 1) * 127.5).round().clamp(0, 255).to(torch.uint8), None, validation=0.25)


def source(schedule: NoiseSchedule, target: str = "v", seed: int = 0, **options: Any) -> TrainedSampler:
    diffusion = GaussianDiffusion(schedule, target, **options)
    return TrainedSampler(diffusion, Exact(schedule, target), DDIM(1), (1, 8, 8), seed, torch.device("cpu"))


def measured(schedule: NoiseSchedule, target: str = "v", batch: int = N, n: int = N, **options: Any) -> dict[str, Any]:
    return measure_loss_by_snr(source(schedule, target, **options), data(), n, batch)[2]


def same(one: dict[str, Any], other: dict[str, Any], rel: float) -> None:
    """Equal in the bins that both have measured, of which there are many."""
    for name in ("x_0", "eps"):
        pairs = [(a, b) for a, b in zip(one[name], other[name], strict=True) if a is not None and b is not None]
        assert len(pairs) >= 10
        assert [a for a, _ in pairs] == pytest.approx([b for _, b in pairs], rel=rel)


@pytest.mark.parametrize("schedule", [linear(1000), cosine(50), zero_terminal_snr(linear(1000))], ids=repr)
@pytest.mark.equation("VDM (errors)")
def test_errors_of_the_exact_denoiser_are_the_posterior_variance(schedule):
    log_snr = torch.linspace(-8, 5, 14, dtype=torch.float64).repeat_interleave(50)
    x_0, eps = torch.randn(2, len(log_snr), DIMS, dtype=torch.float64)
    x_0 = MEAN + math.sqrt(VARIANCE) * x_0
    oracle = GaussianOracle(schedule, MEAN, VARIANCE)
    x_0_error, eps_error = errors_at_snr(schedule, oracle.denoise, x_0, log_snr, eps)
    torch.testing.assert_close(eps_error, log_snr.exp() * x_0_error)
    expected = VARIANCE / (VARIANCE * log_snr.exp() + 1)  # v (1 - alpha_bar) / (v alpha_bar + 1 - alpha_bar)
    z = (x_0_error / expected - 1).reshape(14, 50).mean(1) * math.sqrt(50 * DIMS / 2)
    assert z.abs().max() < 4


def test_the_measure_averages_over_each_bin():
    values = measured(linear(1000))
    for low, x_0, eps in zip(LOG_SNR_BINS, values["x_0"], values["eps"], strict=True):
        if low == 9:  # the log-SNR of t = 1 is 9.2
            assert x_0 is None and eps is None
            continue
        snr = torch.linspace(low, low + 1, 1001, dtype=torch.float64).exp()
        expected = VARIANCE / (VARIANCE * snr + 1)
        allowed = 4 * math.sqrt(2 / DIMS / N) + 2 / N  # chance, and the even places that stand for all of the bin
        assert x_0 == pytest.approx(expected.mean().item(), rel=allowed)
        assert eps == pytest.approx((snr * expected).mean().item(), rel=allowed)
    assert values["log_snr"] == [low + 0.5 for low in range(-10, 10)]


def test_one_number_and_its_interval():
    calls: list[int] = []
    protocol, found, values, curve = measure_loss_by_snr(source(cosine(1000)), data(), N, 25, calls.append)
    assert protocol == "loss_by_snr_w1_60_held_out" and sum(calls) == N * len(snr_bins(cosine(1000))) == 20 * N
    assert values["value"] == pytest.approx(sum(values["eps"][5:15]) / 10) and values["value_log_snr"] == [-5, 5]
    assert values["low"] < values["value"] < values["high"] and values["real_vs_real"] is None and values["n"] == N
    assert f"{values['value']:.4f} mean squared error of eps" in found and "-5 to 5" in found and "-10 to 10" in found
    assert curve == (values["log_snr"], values["x_0"], values["eps"])
    json.dumps(values, allow_nan=False)
    assert measured(cosine(1000), n=1)["low"] is None


def test_schedules_and_targets_share_one_scale():
    reference = measured(linear(1000))
    for other in (cosine(1000), linear(100), sigmoid(1000), zero_terminal_snr(linear(1000))):
        same(reference, measured(other), rel=1e-4)
    for target in ("eps", "x_0"):
        same(reference, measured(linear(1000), target), rel=1e-3)


def test_seed_batch_and_clipping_change_nothing():
    reference = measured(linear(100))
    assert measured(linear(100), seed=7) == reference
    assert measured(linear(100), clip_x_0=False) == reference
    assert measured(linear(100), dynamic_threshold=0.9) == reference
    same(reference, measured(linear(100), batch=7), rel=1e-5)


def test_only_noise_of_the_training_is_asked_for():
    schedule, values = linear(100), measured(linear(100))  # log-SNR 6.9 at t = 1
    assert [value is None for value in values["eps"]] == [low >= 6 for low in LOG_SNR_BINS]
    network = source(schedule)
    measure_loss_by_snr(network, data(), N, N)
    t = torch.stack(network.model.asked)
    assert t.min() >= 1 and t.max() <= 100 and network.diffusion.clip_x_0
    log_snr = (2 * schedule.lambda_at(t.flatten())).reshape(t.shape).sort(1).values
    gaps = log_snr.diff(dim=1)
    assert gaps.max() < 3 / N and (log_snr[:, -1] - log_snr[:, 0]).min() > 1 - 6 / N  # even over the whole bin

    literal = linear(200, rescale=False)  # log-SNR -1.9 at T
    values = measured(literal)
    low = math.ceil(2 * literal.lambda_[-1].item())
    assert values["value_log_snr"] == [low, 5] and values["eps"][: low + 10] == [None] * (low + 10)


def test_what_cannot_be_measured(monkeypatch):
    with pytest.raises(ValueError, match="n = 61 images, but gaussian holds out 60"):
        measured(linear(100), n=61)
    for schedule in (NoiseSchedule([0.5]), NoiseSchedule([0.3, 1.0]), NoiseSchedule([1.0])):
        with pytest.raises(ValueError, match="no whole bin of width 1 between -5 and 5"):
            measured(schedule)
    monkeypatch.setattr(Exact, "forward", lambda self, x_t, t: x_t * math.nan)
    with pytest.raises(ValueError, match="60 of 60 images have errors that are not finite"):
        measured(linear(100))


@pytest.mark.slow
def test_the_files(tmp_path):
    curve = measure_loss_by_snr(source(linear(100)), data(), 10, 10)[3]
    write_loss_by_snr(tmp_path / "loss_by_snr.csv", curve)
    with open(tmp_path / "loss_by_snr.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["log_snr"]) for row in rows] == curve[0] and rows[-1]["eps_mse"] == rows[-1]["x_0_mse"] == ""
    assert [float(row["eps_mse"]) for row in rows[:16]] == curve[2][:16]

    better = (curve[0], *([None if e is None else e / 3 for e in errors] for errors in curve[1:]))
    pictures = []
    for runs in ({"one": curve}, {"one": better}, {"one": curve, "other": better}):
        plots.loss_by_snr(tmp_path / "a.png", runs)
        pictures.append(np.asarray(Image.open(tmp_path / "a.png")))
    assert not any(np.array_equal(a, b) for a, b in itertools.combinations(pictures, 2))
