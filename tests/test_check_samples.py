"""ddpm-sample --check: what drawing costs, counted by hand, and said without a picture."""

from types import SimpleNamespace

import pytest
import tiny_pipeline
import torch
from test_cli import assert_refused, call, finished, run_of, same, status, typed, weights  # noqa: F401
from torch import nn

from ddpm import cli
from ddpm.commands.train.checking import _compute, _measured, _networks, _passes
from ddpm.diffusion import GaussianDiffusion
from ddpm.guidance import ClassifierFree
from ddpm.samplers import DDIM, Heun
from ddpm.schedules import cosine
from ddpm.sources.trained import TrainedSampler

CPU = torch.device("cpu")


class Pointwise(nn.Module):
    """A 1x1 convolution of 3 to 3 channels: 2 x 9 FLOP a pixel, and 12 parameters."""

    takes, num_classes, drop = (), None, 0.0

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)

    def forward(self, x_t, t, y=None):
        return self.conv(x_t)


def source(sampler) -> TrainedSampler:
    return TrainedSampler(GaussianDiffusion(cosine(10)), Pointwise(), sampler, (3, 10, 20), 0, CPU)


def test_operations_are_counted_by_hand():
    once = 2 * 9 * 200 / 1e9
    one = source(DDIM(5))
    networks = _networks(one, None)
    assert networks == {"Pointwise": (12, pytest.approx(once))}
    assert _compute(one, networks, 7) == "3.6e-06 GFLOP an evaluation, 5 of them an image; 0.000126 GFLOP for 7"
    assert _compute(source(Heun(5)), networks, 1).startswith("3.6e-06 GFLOP an evaluation, 9 of them an image")
    decoded = networks | {"autoencoder": (5, 2.0)}
    assert _compute(one, decoded, 3).endswith("2 GFLOP to decode one; 6 GFLOP for 3")
    for w, passes in ((0.0, 1), (1.0, 1), (2.0, 2)):
        assert _passes(SimpleNamespace(guidance=ClassifierFree(w))) == passes
    assert _passes(one) == 1


def test_memory_and_time_are_those_of_one_batch(monkeypatch):
    from ddpm.training import cost

    monkeypatch.setattr(cost, "evaluation_seconds", lambda source, batch: 0.25 * batch)
    peaks = iter([1000, 51_000])
    monkeypatch.setattr(cost, "peak", lambda device, anew=False: next(peaks))
    told = _measured(source(DDIM(5)), 48, 10, 4)
    assert told["memory"].startswith("48 B of weights, and 50 kB while 4 are evaluated; ")
    assert told["time"] == "about 15 s for 10 on cpu, 4 at a time"  # three batches of 5 evaluations of 1 s each
    monkeypatch.setattr(cost, "peak", lambda device, anew=False: (_ for _ in ()).throw(RuntimeError))
    assert "evaluated" not in _measured(source(DDIM(5)), 48, 10, 4)["memory"]


@pytest.mark.slow
def test_nothing_is_drawn(call, finished, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.chdir(tmp_path)
    before = sorted(path.name for path in finished.iterdir())
    result = call(cli.sample, "--check", f"run={finished}", "n=4", "sampler.steps=3")
    assert result.code == 0 and [line.split()[0] for line in result.out.splitlines()] == [
        "draws", "networks", "compute", "memory", "time",
    ], result  # fmt: skip
    assert "UNet: " in result.out and "3 of them an image" in result.out
    assert sorted(path.name for path in finished.iterdir()) == before
    folder = tiny_pipeline.write(tmp_path / "pipeline")
    result = call(cli.sample, f"pipeline={folder}", "--check", "sampler=ddim", "sampler.steps=4")
    assert result.code == 0, result
    for said in ("U-Net: ", "text encoder: ", "autoencoder: ", "8 of them an image", "GFLOP a text", "to decode one"):
        assert said in result.out, said
    assert [path.name for path in tmp_path.iterdir()] == ["pipeline"]
    assert_refused(call(cli.sample, "--check", f"run={tmp_path}"), "run=")
    assert_refused(call(cli.sample, "--check", f"run={finished}", "sampler.steps=99"), "steps = 99 is more than")
