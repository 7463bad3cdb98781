"""ddpm/training/cost.py: counts against counts by hand, times by a clock that the network itself moves."""

import functools
import json
import mmap
import sys
import types

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ddpm.data import ImageData
from ddpm.diffusion import GaussianDiffusion
from ddpm.runs.directory import Run
from ddpm.samplers import DDIM, Ancestral, Heun
from ddpm.schedules import cosine
from ddpm.sources.trained import TrainedSampler
from ddpm.training import cost
from ddpm.training.cost import flops, measure_cost
from ddpm.training.step import Training
from ddpm.training.tasks.diffusion import Diffusion
from ddpm.training.trainer import Trainer

CPU = torch.device("cpu")
SHAPE = (1, 4, 4)
SAMPLERS = {"ddim": DDIM(5), "heun": Heun(4), "all": Ancestral()}
adam = functools.partial(torch.optim.AdamW, lr=1e-2, fused=True)


class Tiny(nn.Module):
    """Two convolutions with 2 channels between them, which say when they are called; each call takes a second."""

    calls: list[tuple[str, bool, int]] = []  # noqa: RUF012  # of all copies: device, training, images
    error: Exception | None = None  # raised in evaluation

    def __init__(self, num_classes: int | None = None):
        super().__init__()
        self.first, self.second = nn.Conv2d(1, 2, 3, padding=1), nn.Conv2d(2, 1, 3, padding=1)
        self.num_classes = num_classes

    def forward(self, x_t: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        assert (y is None) == (self.num_classes is None) and len(t) == len(x_t)
        self.calls.append((x_t.device.type, self.training, len(x_t)))
        if self.error and not self.training and x_t.device == CPU:
            raise self.error
        return self.second(self.first(x_t))


@pytest.fixture(autouse=True)
def calls(monkeypatch) -> list[tuple[str, bool, int]]:
    """Of this test; the clock tells their number, and nothing is collected, for that takes longer than all else."""
    found: list[tuple[str, bool, int]] = []
    monkeypatch.setattr(Tiny, "calls", found)
    monkeypatch.setattr(cost, "time", types.SimpleNamespace(perf_counter=lambda: float(len(found))))
    monkeypatch.setattr(cost, "gc", types.SimpleNamespace(collect=lambda: 0))
    return found


@pytest.fixture
def data() -> ImageData:
    return ImageData("noise", "all", torch.randint(0, 256, (20, *SHAPE), dtype=torch.uint8), torch.arange(20) % 3)


def source(num_classes: int | None = None) -> TrainedSampler:
    return TrainedSampler(GaussianDiffusion(cosine(20)), Tiny(num_classes), DDIM(5), SHAPE, 0, CPU)


def task(evaluated: TrainedSampler, **options: object) -> Diffusion:
    return Diffusion(evaluated.model, evaluated.diffusion, **options)


def of(evaluated: TrainedSampler) -> tuple[TrainedSampler, Diffusion]:
    return evaluated, task(evaluated)


def trainer(**changed: object) -> Trainer:
    return Trainer(**{"steps": 3, "batch_size": 6, "precision": "fp32", "previews": 0} | changed)


# ------------------------------------------------------------------------------------------------------- instruments


def test_flops_of_two_convolutions_are_those_counted_by_hand():
    """2 -> 4 -> 3 channels, 3x3, three images of 5x5: the first needs no gradient of its input."""
    with torch.device("meta"):
        network = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(4, 3, 3, padding=1))
        first, second = (2 * 3 * 25 * 9 * c for c in (2 * 4, 4 * 3))
        x = torch.zeros(3, 2, 5, 5)
        assert flops(network, x, backward=False) == first + second
        assert flops(network, x) == 2 * first + 3 * second


def test_attention_is_counted():
    class Attention(nn.Module):
        def forward(self, q: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(q, q, q)

    with torch.device("meta"):
        q = torch.zeros(2, 3, 16, 8, requires_grad=True)
        assert flops(Attention(), q, backward=False) == 2 * 2 * (2 * 3 * 16 * 16 * 8)
        assert flops(Attention(), q) == 3 * 2 * 2 * (2 * 3 * 16 * 16 * 8)


def test_the_machine():
    told = cost.machine(CPU)
    assert told.keys() == {"name", "device", "threads", "torch", "python"}
    assert told["device"] == "cpu" and told["threads"] == torch.get_num_threads() and "cores" in told["name"]


# ---------------------------------------------------------------------------------------------------- a trained run


@pytest.mark.parametrize("num_classes", [None, 3])
def test_parameters_and_operations_are_those_counted_by_hand(data, num_classes):
    _, _, told = measure_cost(*of(source(num_classes)), data, trainer(), adam, SAMPLERS, 2, 1)
    forward = 2 * 16 * 9 * (2 + 2) / 1e9
    assert told["parameters"] == 2 * 9 + 2 + 2 * 9 + 1
    assert told["gflop_image_forward"] == pytest.approx(forward)
    assert told["gflop_image_sampling"] == pytest.approx(
        {"ddim": 5 * forward, "heun": 7 * forward, "all": 20 * forward}
    )


def test_the_evaluated_weights_stay_and_so_do_the_data(data):
    evaluated, images = source(), data.images
    before = {name: x.clone() for name, x in evaluated.model.state_dict().items()}
    bytes_before = images.clone()
    measure_cost(*of(evaluated), data, trainer(), adam, SAMPLERS, 2, 1)
    after = evaluated.model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert not evaluated.model.training and all(p.grad is None for p in evaluated.model.parameters())
    assert data.images is images and torch.equal(images, bytes_before)


def test_averaged_weights_can_be_measured(data):
    evaluated = source()
    evaluated.model.requires_grad_(False)
    assert measure_cost(*of(evaluated), data, trainer(), adam, SAMPLERS, 2, 1)[2]["training_images_per_s"] > 0
    assert not any(p.requires_grad for p in evaluated.model.parameters())


def test_batch_parts_and_repeats_are_those_asked_for(data, calls):
    measure_cost(*of(source()), data, trainer(batch_size=6, accumulate=3), adam, SAMPLERS, 5, repeat=2)
    steps = [("cpu", True, 2)] * 3 * (1 + 2)
    counted = [("meta", False, 1), ("cpu", True, 1), ("cpu", True, 2)]  # operations, and memory
    assert calls == [*counted, *steps, *[("cpu", False, 5)] * (1 + 2)]


def test_times_are_those_of_the_evaluations(data, calls):
    """A step is as long as its parts are many, and a walk as long as the sampler says, and as it really is."""
    evaluated = source(num_classes=3)
    protocol, words, told = measure_cost(*of(evaluated), data, trainer(accumulate=3), adam, SAMPLERS, 4)
    assert protocol == "cost_cpu_fp32_b4"
    assert told["training_images_per_s"] == pytest.approx(6 / 3)
    assert told["sampling_images_per_s"] == pytest.approx({"ddim": 4 / 5, "heun": 4 / 7, "all": 4 / 20})
    assert told["value"] == pytest.approx(5 / 4) and told["n"] == 4
    for name, sampler in SAMPLERS.items():
        calls.clear()
        evaluated.using(sampler).draw(range(4))
        assert len(calls) == told["evaluations"][name]
    lines = dict(line.split("  ", 1) for line in words.splitlines())
    assert lines["parameters"].strip() == "39" and "0.571 images/s (batch 4, fp32): 7 eva" in words
    assert "2 images/s (batch 6 in 3 parts, fp32)" in words


def test_the_record_is_json(data):
    told = measure_cost(*of(source()), data, trainer(precision="auto"), adam, SAMPLERS, 2, 1)[2]
    assert json.loads(json.dumps(told, allow_nan=False)) == told
    assert told["machine"] == cost.machine(CPU) and told["training_precision"] == "fp32"
    assert (told["low"], told["high"], told["seeds"], told["real_vs_real"]) == (None, None, [], None)


@pytest.mark.parametrize(
    "changed",
    [{}, {"accumulate": 2, "clip": None, "offset_noise": 0.1}, {"time_sampling": "loss_aware", "precision": "bf16"}],
    ids=["plain", "in parts", "loss aware"],
)
def test_a_step_is_that_of_the_trainer(data, tmp_path, changed):
    """To the bit: what is timed is what training does."""
    evaluated, how = source(num_classes=3), trainer(lr_schedule="constant", **changed)
    trained = task(evaluated, time_sampling=how.time_sampling, offset_noise=how.offset_noise)
    measured = Training(how, cost.copy_of(trained), data, adam, seed=0, device=CPU)
    for step in (1, 2, 3):
        measured.step(step)
    _, averaged = how.fit(Run(tmp_path), trained, data, adam, seed=0, device=CPU)
    for one, other in ((measured.task.model, trained.model), (measured.averaged.model, averaged.model)):
        assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


# ----------------------------------------------------------------------------------------------------------- memory


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self")
def test_the_peak_holds_what_was_there_for_a_moment():
    before = cost.peak(CPU, anew=True)
    pages = mmap.mmap(-1, 40_000_000, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)  # the heap may keep what is freed
    torch.frombuffer(pages, dtype=torch.uint8).fill_(1)
    pages.close()
    assert 0.9 * 40e6 < cost.peak(CPU) - before < 2 * 40e6
    assert cost.peak(CPU, anew=True) - before < 0.5 * 40e6


def test_memory_is_what_the_process_had_more_and_the_data(data, monkeypatch):
    peaks = iter([1_000, 51_000])
    monkeypatch.setattr(cost, "peak", lambda device, anew=False: next(peaks))
    told = measure_cost(*of(source()), data, trainer(), adam, SAMPLERS, 2, 1)[2]
    assert (told["peak_memory_bytes"], told["peak_memory"]) == (50_000 + 20 * 16, "measured")


def test_memory_is_estimated_where_the_system_does_not_tell(data, monkeypatch):
    """Weights, gradients, average and two moments of 39 parameters, the data, x_0 and eps, and some activations."""

    def silent(device: torch.device, anew: bool = False) -> int:
        raise FileNotFoundError("/proc/self/clear_refs")

    monkeypatch.setattr(cost, "peak", silent)
    told = measure_cost(*of(source()), data, trainer(accumulate=2), adam, SAMPLERS, 2, 1)[2]
    least = 5 * 4 * 39 + 20 * 16 + 2 * (6 + 3) * 16 * 4
    assert told["peak_memory"] == "estimated" and least < told["peak_memory_bytes"] < 2 * least


def test_too_little_memory_is_told_with_what_to_lower(data, monkeypatch):
    monkeypatch.setattr(Tiny, "error", torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nand more"))
    with pytest.raises(ValueError, match=r"2 GiB; sampling takes 2 images at a time: lower batch$"):
        measure_cost(*of(source()), data, trainer(), adam, SAMPLERS, 2, 1)
    monkeypatch.setattr(Tiny, "error", RuntimeError("another"))
    with pytest.raises(RuntimeError, match="another"):
        measure_cost(*of(source()), data, trainer(), adam, SAMPLERS, 2, 1)
    monkeypatch.setattr(cost.preflight, "available", lambda device: 100)
    with pytest.raises(ValueError, match=r"a step needs .* on cpu; training takes 3 images .* raise accumulate"):
        measure_cost(*of(source()), data, trainer(accumulate=2), adam, SAMPLERS, 2, 1)


@pytest.mark.parametrize(
    ("samplers", "told"), [({}, "samplers is empty"), ({"ddim": DDIM(50)}, "steps = 50 is more than")]
)
def test_samplers_that_cannot_be_counted_are_refused_before_anything_runs(data, calls, samplers, told):
    with pytest.raises(ValueError, match=told):
        measure_cost(*of(source()), data, trainer(), adam, samplers, 2, 1)
    assert calls == []
