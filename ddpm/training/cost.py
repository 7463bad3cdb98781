"""The cost of a network: parameters, floating point operations, time and memory, on the machine at hand."""

import contextlib
import copy
import ctypes
import functools
import gc
import itertools
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ddpm.data.augment import Augment
from ddpm.data.batch import Condition, labels_of
from ddpm.data.dataset import Dataset
from ddpm.data.non_leaking import NonLeaking
from ddpm.randomness import SampleNoise
from ddpm.runs import preflight
from ddpm.runs.precision import computing
from ddpm.samplers import Sampler
from ddpm.sources.base import Source
from ddpm.sources.trained import TrainedSampler
from ddpm.training.step import Training
from ddpm.training.task import Optimizer, Task
from ddpm.training.trainer import Trainer

# ------------------------------------------------------------------------------------------------------- instruments


def flops(model: nn.Module, *inputs: Any, backward: bool = True) -> int:
    """Return the FLOPs of a forward pass and, unless `backward` is false, a backward pass; a multiply-add is two.

    Give it the meta device: nothing is computed there, the plain path runs, and attention is two products of matrices,
    which are counted; the CPU's own attention is not.
    """
    with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(backward):
        output = model(*inputs)
        if backward:
            output.sum().backward()
    return counter.get_total_flops()


def synchronize(device: torch.device) -> None:
    """Wait until a device has finished all its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(run: Callable[[], object], device: torch.device, repeat: int = 1) -> float:
    """Return the mean seconds of a run, out of `repeat` in a row."""
    synchronize(device)
    start = time.perf_counter()
    for _ in range(repeat):
        run()
    synchronize(device)
    return (time.perf_counter() - start) / repeat


def peak(device: torch.device, anew: bool = False) -> int:
    """Return the peak memory of this process, or of torch on a GPU, in bytes; `anew` resets the peak first.

    Not ru_maxrss, which a process inherits from the one that started it.
    """
    if anew:
        gc.collect()
    if device.type == "cuda":
        if anew:
            torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.max_memory_allocated(device)
    if sys.platform != "linux":
        raise RuntimeError("the memory of a process is read from /proc/self, which only Linux has")
    if anew:
        Path("/proc/self/clear_refs").write_text("5")
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def machine(device: torch.device) -> dict[str, Any]:
    """Describe the machine that the numbers were measured on."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    cpu = next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.processor())
    return {
        "name": torch.cuda.get_device_name(device) if device.type == "cuda" else f"{cpu}, {os.cpu_count()} cores",
        "device": device.type,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


# ---------------------------------------------------------------------------------------------------- a trained run


def measure_cost(
    source: Source,
    task: Task,
    data: Dataset,
    trainer: Trainer,
    optimizer: Optimizer,
    samplers: dict[str, Sampler],
    batch: int,
    repeat: int = 3,
    *,
    augment: Augment | NonLeaking | None = None,
) -> tuple[str, str, dict[str, Any]]:
    """Measure what training and sampling cost on the source's device; returns protocol name, words and record.

    Times are medians after a run that is not timed. Training is timed by whole steps, in the trainer's precision.
    Sampling is one evaluation of the network for a batch, clipped as the source clips, times the evaluations of each
    sampler: the sampler's own computation between them is left out, and is little unless the network is tiny. Decoding
        latents, once, is added. For a source without a sampler it is one draw of a batch.

    Memory is the peak of training, the data included: measured as torch counts it on a GPU, and as the
    process's growth on a CPU with Linux; elsewhere estimated as `preflight.memory` does, without what kernels use.

    Args:
        source: the network, its device and the precision of sampling.
        task: the task that trained it; copies of its modules are trained, and weights stay as they are.
        data: training data; they stay on their device.
        trainer: batch, micro-batches, precision, clipping and averaging of the steps.
        optimizer: makes one of parameters.
        samplers: name -> sampler, at least one; the record's value, seconds an image, is the first one's. Ignored for
            a source without a sampler.
        batch: images that are sampled at a time.
        repeat: how many steps, and evaluations, are timed.
        augment: as in training.
    Raises:
        ValueError: no sampler, a sampler that does not suit the schedule, or too little memory, with what to lower.
    """
    device, walks = source.device, source.sampler is not None
    if walks and not samplers:
        raise ValueError("samplers is empty: the cost of sampling is that of at least one sampler")
    if walks:
        evaluations = {name: sampler.evaluations(source.diffusion.schedule) for name, sampler in samplers.items()}
    else:
        evaluations = {"samples": source.evaluations}
    images, micro = trainer.batch_size, trainer.batch_size // trainer.accumulate
    parameters, forward = sum(p.numel() for p in source.model.parameters()), gflop_forward(source)
    with _enough_memory(f"training takes {micro} images at a time: raise accumulate, or lower batch_size"):
        data = copy.copy(data).to(device)
        make = functools.partial(
            Training, trainer, data=data, optimizer=optimizer, seed=source.seed, device=device, augment=augment
        )
        step, size, precision, how = _train(lambda: make(task=copy_of(task)), repeat)
    with _enough_memory(f"sampling takes {batch} images at a time: lower batch"):
        evaluation = _median(_evaluate(source, batch), device, repeat)
        decoding = _median(_decode(source, batch), device, repeat) if walks and source.codec is not None else 0.0
    seconds_of = {name: (n * evaluation + decoding) / batch for name, n in evaluations.items()}
    values: dict[str, Any] = {
        "value": next(iter(seconds_of.values())),
        "low": None,
        "high": None,
        "n": batch,
        "seeds": [],
        "real_vs_real": None,
        "parameters": parameters,
        "gflop_image_forward": forward,
        "gflop_image_sampling": {name: n * forward for name, n in evaluations.items()},
        "evaluations": evaluations,
        "training_images_per_s": images / step,
        "peak_memory_bytes": size,
        "peak_memory": how,
        "sampling_images_per_s": {name: 1 / seconds for name, seconds in seconds_of.items()},
        "precision": source.precision,
        "training_precision": precision,
        "sampling_batch": batch,
        "training_batch": images,
        "accumulate": trainer.accumulate,
        "machine": machine(device),
    }
    return f"cost_{device.type}_{source.precision}_b{batch}", _in_words(values, data.units), values


def gflop_forward(source: Source) -> float:
    """Return the GFLOP of the network for one image, counted on the meta device; without a sampler, of one draw."""
    if source.sampler is None:
        with FlopCounterMode(display=False) as counter:
            source.draw([0])
        return counter.get_total_flops() / 1e9
    return gflop(copy.deepcopy(source.model).to("meta"), source.shape, backward=False)


TOKENS = 77  # of a text, as encoders of CLIP give them


def gflop(model: nn.Module, shape: tuple[int, ...], backward: bool = True) -> float:
    """Return the GFLOP of a network on the meta device for one image (C, H, W), forward and backward."""
    x_t, t = torch.empty(1, *shape, device="meta"), torch.ones(1, dtype=torch.long, device="meta")
    image = torch.empty(1, getattr(model, "condition_channels", 0), *shape[1:], device="meta")
    tokens = torch.empty(1, TOKENS, getattr(model, "token_channels", 0), device="meta")
    several = labels_of(model)[1:]
    labels = torch.zeros((1, 1 + len(several)) if several else (1,), dtype=torch.long, device="meta")
    condition = Condition(classes=labels, tokens=tokens, image=image).for_network(model)
    return flops(model, x_t, t, *([] if condition is None else [condition]), backward=backward) / 1e9


def gflop_of_loss(loss: Callable[[int], Tensor]) -> float:
    """Return the GFLOP of training on one sample, forward and backward, given n -> loss on the meta device."""
    with FlopCounterMode(display=False) as counter:
        loss(1).backward()
    return counter.get_total_flops() / 1e9


def copy_of(task: Task) -> Task:
    """Return a copy of a task whose modules can be trained independently; averaged ones get gradients."""
    task = copy.deepcopy(task)
    for module in task.modules.values():
        if not any(p.requires_grad for p in module.parameters()):
            module.requires_grad_(True)
    return task


def _train(make: Callable[[], Training], repeat: int) -> tuple[float, int, str, str]:
    """Measure training: seconds and bytes of a step, its precision, and "measured" or "estimated" for the bytes.

    The estimate comes first: a step beyond the memory of a CPU's machine would end the process. What is loaded at first
    use is then there, and not measured.
    """
    training = make()
    device, precision, needed = training.device, training.precision, training.needs()
    there = preflight.available(device)
    if there is not None and sum(needed) - needed.data - needed.weights - needed.average > there:
        raise MemoryError(f"a step needs {preflight.in_words(sum(needed))} ({needed}) on {device}")
    del training
    _give_back()
    try:
        before = peak(device, anew=True)
    except (RuntimeError, OSError):  # no Linux, or one that does not report memory
        return _median(_steps_of(make()), device, repeat), sum(needed), precision, "estimated"
    step = _median(_steps_of(make()), device, repeat)
    return step, max(0, peak(device) - before) + needed.data, precision, "measured"


def _steps_of(training: Training) -> Callable[[], object]:
    """Return a function that takes the next training step each time."""
    numbers = itertools.count(1)
    return lambda: training.step(next(numbers))


def _decode(source: Source, batch: int) -> Callable[[], object]:
    """Return a function that decodes a batch of latents."""
    z = SampleNoise(source.seed, range(batch)).x_T(source.shape, source.device)
    return lambda: source.decode(z)


def _evaluate(source: Source, batch: int) -> Callable[[], object]:
    """Return a function that evaluates the network once for a batch; without a sampler, one that draws samples."""
    if not isinstance(source, TrainedSampler):
        return lambda: source.draw(range(batch))
    x_T = SampleNoise(source.seed, range(batch)).x_T(source.shape, source.device)
    t = torch.full((batch,), source.diffusion.schedule.T, device=source.device)
    denoise = source.denoiser(source.condition(range(batch)))

    def evaluate() -> None:
        with torch.no_grad(), computing(source.device, source.precision):
            denoise(x_T, t)

    return evaluate


def evaluation_seconds(source: Source, batch: int) -> float:
    """Return the seconds of one network evaluation for a batch, after an untimed one."""
    return _median(_evaluate(source, batch), source.device, 1)


def decoding_seconds(source: Source) -> float:
    """Return the seconds that the source's codec takes to decode one sample, after an untimed one."""
    return _median(_decode(source, 1), source.device, 1)


def _median(run: Callable[[], object], device: torch.device, repeat: int) -> float:
    """Return the median seconds of a run, after an untimed one."""
    run()
    return statistics.median(seconds(run, device) for _ in range(repeat))


def _give_back() -> None:
    """Return freed memory to the system: the C library holds on to it, which would hide later growth."""
    gc.collect()
    if sys.platform == "linux":
        with contextlib.suppress(AttributeError):  # another C library than GNU's
            ctypes.CDLL(None).malloc_trim(0)


@contextlib.contextmanager
def _enough_memory(advice: str) -> Iterator[None]:
    """Turn a lack of memory within the context into a ValueError with advice."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        reason = str(error).strip().partition("\n")[0]
        if not isinstance(error, MemoryError | torch.OutOfMemoryError) and "allocate memory" not in reason:
            raise
        raise ValueError(f"out of memory: {reason}; {advice}") from error


def _in_words(values: dict[str, Any], units: str) -> str:
    """Format the record as a small table; `units` is the word for samples."""
    about, batch = values["machine"], f"batch {values['training_batch']:,}"
    batch += f" in {values['accumulate']:,} parts" if values["accumulate"] > 1 else ""
    rows = [
        ("machine", f"{about['name']}; {about['device']}, {about['threads']} threads, torch {about['torch']}"),
        ("parameters", f"{values['parameters']:,}"),
        ("forward pass", f"{_short(values['gflop_image_forward'])} GFLOP an image"),
        ("training", f"{_short(values['training_images_per_s'])} {units}/s ({batch}, {values['training_precision']})"),
        ("its memory", f"{preflight.in_words(values['peak_memory_bytes'])}, {values['peak_memory']}"),
    ]
    for name, speed in values["sampling_images_per_s"].items():
        gflop, n = values["gflop_image_sampling"][name], values["evaluations"][name]
        cost = f"{n:,} evaluations, {_short(gflop)} GFLOP an image"
        rows.append((name, f"{_short(speed)} {units}/s (batch {values['n']:,}, {values['precision']}): {cost}"))
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:{width}}  {value}" for name, value in rows)


def _short(x: float) -> str:
    """Format a number to three significant digits."""
    return f"{float(f'{x:.3g}'):,g}"
