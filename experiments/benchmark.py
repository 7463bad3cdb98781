"""Time and memory of training and sampling, compared with diffusers' U-Net with the same weights: one table, one JSON.

    pip install -c constraints.txt -e '.[peers]'
    python experiments/benchmark.py
    python experiments/benchmark.py --configs cifar10 --what training,memory --ours bf16 --peers default,bf16 --rounds 3

In every round each setting takes its turn, so that a busy machine slows all of them: medians over rounds, and ratios
within rounds. A step is the loss, backward, clipping, AdamW and the average of the weights, on data that are on the
device. "ours" is what a user gets. "peer default" is diffusers as it comes: float32, contiguous, AdamW and EMAModel as
they are by default; the other peers have channels_last, fused AdamW and EMAModel(foreach=True) too. A multiply-add is 2
FLOP. What another run found with the same machine, torch and threads stays in the table of the same --out.

`--what text` times text-conditional U-Nets, and the text encoder, beside UNet2DConditionModel of diffusers
and CLIPTextModel of transformers with the same weights: the forward pass, and with the backward pass. Where a library
is not installed, ours is timed alone.
"""

import argparse
import contextlib
import functools
import importlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn import functional as F

from ddpm.data.batch import Condition
from ddpm.diffusion import GaussianDiffusion
from ddpm.runs.files import read_json, replacing, shortened
from ddpm.runs.precision import computing, resolve
from ddpm.samplers import DDIM
from ddpm.schedules import linear
from ddpm.training.cost import flops, machine, peak, seconds
from ddpm.training.ema import EMA
from ddpm.training.graph import WARM_UP, graph_on
from models import kernels
from models.pretrained import save_text_encoder, save_unet
from models.pretrained.unet import describe
from models.text import TextEncoder
from models.unet import UNet

Network = dict[str, Any]  # arguments of `UNet`, which say what images look like, too
Forward = Callable[..., Any]

FIXED = {"dropout": 0.0, "time_offset": -1}  # t as the peer counts it: ours(x, t) == peer(x, t - 1)
CONFIGS: dict[str, Network] = {
    "devanagari": FIXED | {"image_size": 32, "in_channels": 1, "channels": 128, "channel_mults": (1, 1, 2, 2, 4, 4),
                           "blocks": 1, "attention_resolutions": (2,), "head_channels": 8},
    "cifar10": FIXED | {"image_size": 32, "in_channels": 3, "channels": 128, "channel_mults": (1, 2, 2, 2),
                        "blocks": 2, "attention_resolutions": (16,), "heads": 1},
    "class_mnist": FIXED | {"image_size": 28, "in_channels": 1, "channels": 32, "channel_mults": (1, 2, 2),
                            "blocks": 2, "attention_resolutions": (14, 7), "head_channels": 8, "num_classes": 10},
    "butterflies": FIXED | {"image_size": 32, "in_channels": 3, "channels": 64, "channel_mults": (1, 2, 2, 4),
                            "blocks": 2, "attention_resolutions": (8, 4), "head_channels": 8},
    "cars": FIXED | {"image_size": 64, "in_channels": 3, "channels": 64, "channel_mults": (1, 2, 4, 4),
                     "blocks": 2, "attention_resolutions": (16, 8), "head_channels": 32},
}  # fmt: skip
BATCHES = {"devanagari": 32, "cifar10": 16, "class_mnist": 128, "butterflies": 8, "cars": 16}
BATCHES_CUDA = BATCHES | {"cifar10": 128}
SMALL = FIXED | {"image_size": 32, "in_channels": 3, "channels": 32, "channel_mults": (1, 2), "blocks": 1, "groups": 8,
                 "attention_resolutions": (), "middle_attention": False}  # fmt: skip
SMALL_BATCH = 8
SAMPLING_STEPS = "sampling steps"
GROWTH: dict[str, Sequence[int]] = {  # sizes of SMALL, its batch and its process
    "batch": (8, 16, 32, 64, 128),
    "image_size": (16, 32, 64, 128),
    "channels": (16, 32, 64, 128),
    SAMPLING_STEPS: (10, 20, 50, 100),
    "T": (100, 250, 1000, 2000, 4000),
}
WHAT = ("training", "sampling", "memory", "limits", "growth", "text")
BY_DEFAULT = WHAT[:4]
LATENT = FIXED | {"in_channels": 4, "norm_eps": 1e-5, "flip_sin_to_cos": True, "freq_shift": 0, "groups": 16}
TEXT_CONDITIONAL: dict[str, Network] = {  # as in latent diffusion: attention on all levels but the last
    "words_32": LATENT | {"image_size": 32, "channels": 32, "channel_mults": (1, 2, 4), "blocks": 1,
                          "attention_resolutions": (32, 16), "heads": 8, "token_channels": 128},
    "words_64": LATENT | {"image_size": 64, "channels": 32, "channel_mults": (1, 2, 2, 2), "blocks": 1,
                          "attention_resolutions": (64, 32, 16), "heads": 4, "token_channels": 128},
}  # fmt: skip
ENCODER = {"vocabulary": 49408, "length": 77, "channels": 256, "layers": 4, "heads": 4}
TOLD_BATCH, TEXTS = 2, 4  # latents of a step, and texts


class Setting(NamedTuple):
    """A way to run one of the contenders of BUILD."""

    contender: str
    precision: str  # "auto" for what a user gets
    compiled: bool = False
    without: str = ""  # which of WITHOUT
    checkpointing: bool = False
    graph: bool = False


def plain_norm(x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float, silu: bool) -> Tensor:
    """`models.kernels.group_norm` by PyTorch's own operations."""
    h = F.group_norm(x, groups, weight, bias, eps)
    return F.silu(h) if silu else h


# of models.kernels, what is not compiled where it is measured what that gains: attribute and value
WITHOUT: dict[str, tuple[str, Any]] = {
    "kernels": ("available", lambda: False),
    "norm": ("group_norm", plain_norm),
    "winograd": ("WIDE_ENOUGH", {}),
    "attention": ("NARROW", ()),
}
OTHER = "denoising-diffusion-pytorch"
SETTINGS = {
    "ours": Setting("ours", "auto"),
    "ours fp32": Setting("ours", "fp32"),
    "ours bf16": Setting("ours", "bf16"),
    "ours compiled": Setting("ours", "bf16", compiled=True),
    "ours graph": Setting("ours", "auto", graph=True),
    "ours checkpointing": Setting("ours", "auto", checkpointing=True),
    **{f"ours without {means}": Setting("ours", "auto", without=means) for means in WITHOUT},
    "peer default": Setting("peer", "fp32"),
    "peer bf16": Setting("tuned peer", "bf16"),
    "peer fp32 channels_last": Setting("tuned peer", "fp32"),
    "peer compiled fp32": Setting("tuned peer", "fp32", compiled=True),
    "peer compiled bf16": Setting("tuned peer", "bf16", compiled=True),
    OTHER: Setting("other", "fp32"),
}
OURS = {name: f"ours {name}" for name in ("fp32", "bf16", "compiled", "graph", "checkpointing")}  # beside "ours"
OURS |= {f"no_{means}": f"ours without {means}" for means in WITHOUT}
PEERS = {"default": "peer default", "bf16": "peer bf16", "fp32": "peer fp32 channels_last",
         "compiled_fp32": "peer compiled fp32", "compiled_bf16": "peer compiled bf16", "other": OTHER}  # fmt: skip
TUNED = ["bf16", "fp32", "compiled_fp32", "compiled_bf16"]  # among which the best peer is sought
IN_MEMORY = ("ours", "ours bf16", "ours checkpointing", "peer default", "peer bf16")  # each needs a process of its own

TOLERANCE = 1e-4  # between the outputs of the two networks
AT_LEAST = 0.3  # seconds that a turn of training lasts: of a small network so many steps are timed at once
SIZES, COPIED = (1024, 2048, 4096), 2**28  # of the matrices whose product is timed; bytes that are copied
JSON, TABLE, CURVES = "benchmark.json", "benchmark.md", "growth.png"


# ------------------------------------------------------------------------------------------------------- contenders


class Contender:
    """A network, its optimizer and its average. Subclasses write what its users write:

    loss(forward): the mean squared error of the predicted noise, at t and eps that are drawn;
    sample(forward, steps): as many images as the batch has, by steps of DDIM, on the CPU.
    There `forward` is the network, or what it was compiled to. Tuned are channels_last and fused AdamW.
    """

    ema: Any

    def __init__(self, model: nn.Module, network: Network, batch: int, device: torch.device, tuned: bool):
        self.model = model.train().to(device, memory_format=torch.channels_last if tuned else torch.preserve_format)
        self.parameters = list(self.model.parameters())
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-4, fused=True if tuned else None)
        self.x_0, self.y = (None if values is None else values.to(device) for values in images(network, batch))

    def average(self) -> None:
        """Take the weights into their average."""
        self.ema.update(self.model)


class Ours(Contender):
    """Ours, as `ddpm.training.trainer.Trainer.fit` and `ddpm.sources.trained.TrainedSampler` run it."""

    def __init__(self, network: Network, batch: int, device: torch.device, T: int = 1000):
        super().__init__(built(network), network, batch, device, tuned=True)
        self.diffusion, self.ema = GaussianDiffusion(linear(T).to(device)), EMA(self.model)

    def loss(self, forward: Forward) -> Tensor:
        t = torch.randint(1, self.diffusion.schedule.T + 1, (len(self.x_0),), device=self.x_0.device)
        return self.diffusion.loss(forward, self.x_0, self.y, t=t, eps=torch.randn_like(self.x_0)).mean()

    def sample(self, forward: Forward, steps: int) -> Tensor:
        denoise = self.diffusion.denoiser(forward, self.y)
        with self.model.frozen():
            return DDIM(steps)(self.diffusion.schedule, denoise, torch.randn_like(self.x_0)).cpu()


class Peer(Contender):
    """UNet2DModel with diffusers' own schedulers, average and pipeline."""

    def __init__(self, model: nn.Module, network: Network, batch: int, device: torch.device, tuned: bool):
        super().__init__(model, network, batch, device, tuned)
        self.library = peers()
        self.x_0 = self.x_0.to(memory_format=torch.channels_last) if tuned else self.x_0
        self.ema = self.library.training_utils.EMAModel(self.parameters, foreach=tuned)
        self.ema.to(device)
        self.scheduler = self.library.DDPMScheduler()

    def loss(self, forward: Forward) -> Tensor:
        T, eps = self.scheduler.config.num_train_timesteps, torch.randn_like(self.x_0)
        t = torch.randint(0, T, (len(self.x_0),), device=self.x_0.device)
        return F.mse_loss(forward(self.scheduler.add_noise(self.x_0, eps, t), t, class_labels=self.y).sample, eps)

    def average(self) -> None:
        self.ema.step(self.parameters)

    @torch.no_grad()
    def sample(self, forward: Forward, steps: int) -> object:
        scheduler = self.library.DDIMScheduler()
        if self.y is None:
            pipeline = self.library.DDIMPipeline(forward, scheduler)
            pipeline.set_progress_bar_config(disable=True)
            return pipeline(batch_size=len(self.x_0), num_inference_steps=steps, output_type="np").images
        x_t = torch.randn_like(self.x_0)  # the pipeline takes no classes: here is its loop with them
        scheduler.set_timesteps(steps)
        for t in scheduler.timesteps:
            x_t = scheduler.step(forward(x_t, t, class_labels=self.y).sample, t, x_t).prev_sample
        return x_t.cpu()


class Other(Contender):
    """The Unet of denoising-diffusion-pytorch in our training step: another network, of other cost."""

    def __init__(self, network: Network, batch: int, device: torch.device):
        super().__init__(other(network), network, batch, device, tuned=False)
        self.ema, self.alpha_bar = EMA(self.model), linear(1000).alpha_bar.float().to(device)

    def loss(self, forward: Forward) -> Tensor:
        eps, t = torch.randn_like(self.x_0), torch.randint(0, 1000, (len(self.x_0),), device=self.x_0.device)
        alpha_bar_t = self.alpha_bar[t + 1][:, None, None, None]
        return F.mse_loss(forward(alpha_bar_t.sqrt() * self.x_0 + (1 - alpha_bar_t).sqrt() * eps, t), eps)


BUILD: dict[str, Callable[[Network, int, torch.device], Contender]] = {
    "ours": Ours,
    "peer": lambda network, *where: Peer(twin(network), network, *where, tuned=False),
    "tuned peer": lambda network, *where: Peer(twin(network), network, *where, tuned=True),
    "other": Other,
}


def images(network: Network, batch: int) -> tuple[Tensor, Tensor | None]:
    """Random images in [-1, 1], always the same, and their classes where the network has any, on the CPU."""
    shape, classes = (batch, network["in_channels"], *[network["image_size"]] * 2), network.get("num_classes")
    x_0 = torch.rand(shape, generator=torch.Generator("cpu").manual_seed(0), device="cpu") * 2 - 1
    return x_0, None if classes is None else torch.arange(batch, device="cpu") % classes


def built(network: Network) -> UNet:
    """Our network, always with the same weights; none are zero, else outputs would agree whatever they come from."""
    torch.manual_seed(0)
    model = UNet(**network)
    for p in model.parameters():
        if not p.any():
            nn.init.normal_(p, std=0.02)
    return model


def peers() -> ModuleType:
    """diffusers: found by name, for no installation requires it, and kept from looking anything up online."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    importlib.import_module("diffusers.training_utils")
    return importlib.import_module("diffusers")


def twin(network: Network) -> nn.Module:
    """UNet2DModel with the weights of ours; RuntimeError unless ours(x, t) is peer(x, t - 1), up to rounding."""
    ours = built(network).eval().to(memory_format=torch.channels_last)  # as it is timed
    with tempfile.TemporaryDirectory() as folder:
        save_unet(ours, folder)
        peer = peers().UNet2DModel.from_pretrained(folder, use_safetensors=True, low_cpu_mem_usage=False).eval()
    (x_t, y), t = images(network, 2), torch.tensor([1, 700])
    for training in (True, False):  # what computes may depend on whether gradients will be asked for
        with torch.set_grad_enabled(training):
            must_agree(ours(x_t, t, y), peer(x_t, t - 1, class_labels=y).sample)
    return peer


def must_agree(ours: Tensor, peer: Tensor) -> None:
    """Raise RuntimeError unless two outputs are the same, up to rounding."""
    difference = ((ours - peer).abs().max() / peer.abs().max().clamp(min=1)).item()
    if not difference <= TOLERANCE:
        raise RuntimeError(
            f"ours and the peer have the same weights, but their outputs differ by {difference:.2g}; allowed: "
            f"{TOLERANCE:g}. The speeds of two networks that compute different things cannot be compared"
        )


def other(network: Network) -> nn.Module:
    """The Unet of denoising-diffusion-pytorch for such images; RuntimeError where it is not installed.

    Its package imports torchvision, for its own trainer alone. Where that cannot be imported, empty modules stand in
    for it during this import.
    """
    if find_spec("denoising_diffusion_pytorch") is None:
        raise RuntimeError("not installed")
    names = ["torchvision", "torchvision.transforms", "torchvision.utils"]
    try:
        importlib.import_module(names[0])
        names = []
    except Exception:  # beside another torch than its own it fails in many ways
        sys.modules.update({name: ModuleType(name) for name in names})
    try:
        unet = importlib.import_module("denoising_diffusion_pytorch.denoising_diffusion_pytorch").Unet
    finally:
        for name in names:
            del sys.modules[name]
    return unet(dim=64, dim_mults=(1, 2, 4, 8), channels=network["in_channels"])


class Way:
    """A contender in one of its settings."""

    def __init__(self, contender: Contender, setting: Setting, device: torch.device):
        self.contender, self.setting, self.device = contender, setting, device
        self.precision = users_precision(contender.model, device) if setting.precision == "auto" else setting.precision
        self.autocast = computing(device, self.precision, cache=not setting.graph)

    @functools.cached_property
    def forward(self) -> Forward:
        """The network; compiled at first use, where that can be timed and may fail."""
        return torch.compile(self.contender.model) if self.setting.compiled else self.contender.model

    @contextlib.contextmanager
    def as_set(self) -> Iterator[None]:
        """For a while some of the compiled loops are not used, or the network checkpoints."""
        means, model = self.setting.without, self.contender.model
        with contextlib.ExitStack() as changes:
            if means:
                changes.enter_context(mock.patch.object(kernels, *WITHOUT[means]))
            if self.setting.checkpointing:
                changes.enter_context(mock.patch.object(model, "checkpointing", True))
            yield

    def _gradients(self) -> None:
        self.contender.optimizer.zero_grad()
        with self.autocast, self.as_set():
            loss = self.contender.loss(self.forward)
        loss.backward()

    @functools.cached_property
    def gradients(self) -> Callable[[], None]:
        """Return what computes the gradients; a graph is recorded at first use, as `ddpm.training.graph` does it."""
        if not self.setting.graph:
            return self._gradients
        graph, parameters = graph_on(self.device), self.contender.parameters
        if graph is None:
            raise RuntimeError("only a GPU has CUDA graphs")
        for _ in range(WARM_UP):
            graph.warm_up(self._gradients)
        graph.capture(self._gradients)
        recorded = [p.grad for p in parameters]

        def replay() -> None:
            graph.replay()
            for p, gradient in zip(parameters, recorded, strict=True):  # where other settings had theirs in between
                p.grad = gradient

        return replay

    def step(self) -> None:
        """A training step."""
        contender = self.contender
        self.gradients()
        nn.utils.clip_grad_norm_(contender.parameters, 1.0)
        contender.optimizer.step()
        contender.average()

    def sample(self, steps: int) -> None:
        """A batch of images."""
        with self.autocast, self.as_set():
            self.contender.sample(self.forward, steps)


def users_precision(model: nn.Module, device: torch.device) -> str:
    """Return the precision that trainer.precision=auto selects for this network."""
    return resolve("auto", device, sum(p.numel() for p in model.parameters()))


# ------------------------------------------------------------------------------------------------------------- time


def summary(values: list[float]) -> dict[str, float]:
    """The median and the ends of the range."""
    return {"median": statistics.median(values), "low": min(values), "high": max(values)}


def reason(error: Exception) -> str:
    """In one line, why something failed."""
    return shortened(str(error).strip().partition("\n")[0] or type(error).__name__)


def in_turns(
    runs: dict[str, Callable[[], object]],
    rounds: int,
    device: torch.device,
    warm: dict[str, Callable[[], object]] | None = None,
) -> dict[str, dict[str, Any]]:
    """Seconds of each run: one call to begin with, then a turn in every round. What fails at first has no turns.

    Args:
        warm: shorter runs to begin with; a turn is then one run. Else it is as many as last AT_LEAST seconds.
    Returns: for each {median, low, high, rounds, first}, or {failed: why}.
    """
    results: dict[str, dict[str, Any]] = {}
    repeat, times = {}, {}
    for name, run in runs.items():
        try:
            results[name] = {"first": seconds((warm or runs)[name], device)}
            repeat[name] = 1 if warm else max(1, round(AT_LEAST / seconds(run, device)))
            times[name] = []
        except Exception as error:  # no compiler, no memory: the others go on
            results[name] = {"failed": reason(error)}
        print(f"  {name}: {results[name].get('failed', 'begins')}", file=sys.stderr, flush=True)
    for _ in range(rounds):
        for name, values in times.items():
            values.append(seconds(runs[name], device, repeat[name]))
    for name, values in times.items():
        results[name] |= {**summary(values), "rounds": values}
    return results


def compared(settings: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The settings; the time of each in units of ours, round by round; and the fastest peer."""
    timed = {name: what for name, what in settings.items() if "rounds" in what}
    ratios = {
        name: summary([a / b for a, b in zip(what["rounds"], timed["ours"]["rounds"], strict=True)])
        for name, what in timed.items()
        if "ours" in timed
    }
    medians = {what["median"]: name for name, what in timed.items() if name.startswith("peer")}
    return {"settings": settings, "ratios": ratios, "best_peer": medians[min(medians)] if medians else None}


def on_paper(make: Callable[[], nn.Module], network: Network, batch: int) -> dict[str, Any]:
    """The parameters of a network, and what a step and an image of it cost."""
    with torch.device("meta"):
        model, (x_t, y), t = make(), images(network, batch), torch.ones(batch)
    given = [x_t.to("meta"), t] + ([y.to("meta")] if y is not None and isinstance(model, UNet) else [])
    return {  # outside: what is imported at first use makes tensors of its own, and needs their values
        "parameters": sum(p.numel() for p in model.parameters()),
        "gflop_step": flops(model, *given) / 1e9,
        "gflop_image_forward": flops(model, *(v[:1] for v in given), backward=False) / 1e9,
    }


def timings(network: Network, batch: int, given: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Training and sampling, as far as they are asked for."""
    contenders: dict[str, Contender] = {}
    failed, results = {}, {}
    for label in given.labels:
        name = SETTINGS[label].contender
        try:
            contenders[name] = contenders.get(name) or BUILD[name](network, batch, device)
        except Exception as error:
            if label != OTHER:
                raise
            failed[label] = {"failed": reason(error)}

    def ways(labels: Iterable[str]) -> dict[str, Way]:
        torch.compiler.reset()  # of a function few variants are compiled, and later ones run as they are, unsaid
        return {label: Way(contenders[SETTINGS[label].contender], SETTINGS[label], device) for label in labels}

    if "training" in given.what:
        run = ways(label for label in given.labels if label not in failed)
        settings = in_turns({label: way.step for label, way in run.items()}, given.rounds, device)
        if "rounds" in settings.get(OTHER, {}):
            settings[OTHER] |= on_paper(lambda: other(network), network, batch)
        results["training"] = {"precision": run["ours"].precision, **compared(settings | failed)}
    if "sampling" in given.what:
        run = ways(label for label in given.labels if label != OTHER)
        for contender in contenders.values():
            contender.model.eval()
        whole, warm = ({k: functools.partial(way.sample, n) for k, way in run.items()} for n in (given.ddim, 2))
        settings = in_turns(whole, given.rounds if device.type == "cuda" else min(given.rounds, 3), device, warm)
        results["sampling"] = {"steps": given.ddim, "precision": run["ours"].precision, **compared(settings)}
    return results


# ------------------------------------------------------------------------------------------------------------- text


def text(rounds: int, device: torch.device, note: Callable[[dict[str, Any]], object]) -> None:
    """Seconds of a forward pass, and with the backward pass, of text-conditional networks and of the text encoder.

    In float32 and in bfloat16, ours beside the peer as it comes (with PyTorch's own attention) and in channels_last, or
    alone where the peer's library is not installed.

    Args:
        note: is given all that is known, whenever something is.
    """
    results: dict[str, Any] = {}
    for name in (*TEXT_CONDITIONAL, "encoder"):
        print(name, file=sys.stderr, flush=True)
        networks = encoders(device) if name == "encoder" else text_conditional(TEXT_CONDITIONAL[name], device)
        results[name] = {"parameters": sum(p.numel() for p in networks["ours"][0].parameters())}
        for precision in ("fp32", "bf16"):
            for what, run in (("forward", forward_pass), ("forward and backward", both_passes)):
                turns = {
                    label: functools.partial(run, *network, device, precision) for label, network in networks.items()
                }
                frozen = getattr(
                    networks["ours"][0], "frozen", contextlib.nullcontext
                )  # over all calls, as a sampler's
                with contextlib.nullcontext() if run is both_passes else frozen():
                    results[name][f"{what}, {precision}"] = compared(in_turns(turns, rounds, device))
                note(results)


Called = tuple[nn.Module, Callable[[], Tensor]]  # a network, and what calls it


def text_conditional(network: Network, device: torch.device) -> dict[str, Called]:
    """Our U-Net and its twins; RuntimeError unless ours(x, t) is peer(x, t - 1), up to rounding."""
    random, shape = torch.Generator().manual_seed(0), (TOLD_BATCH, 4, *[network["image_size"]] * 2)
    x_t, tokens = (
        torch.randn(shape, generator=random),
        torch.randn(TOLD_BATCH, 77, network["token_channels"], generator=random),
    )
    x_t, tokens, t = x_t.to(device), tokens.to(device), torch.arange(1, TOLD_BATCH + 1, device=device)
    ours = built(network).to(device, memory_format=torch.channels_last)
    found: dict[str, Called] = {"ours": (ours, lambda: ours(x_t, t, Condition(tokens=tokens)))}
    if find_spec("diffusers") is None:
        return found
    for label, form in (("peer", torch.contiguous_format), ("peer channels_last", torch.channels_last)):
        with tempfile.TemporaryDirectory() as folder:
            save_unet(ours.eval(), folder)
            made = peers().UNet2DConditionModel.from_pretrained(folder, use_safetensors=True, low_cpu_mem_usage=False)
        peer, x = made.to(device, memory_format=form), x_t.to(memory_format=form)
        found[label] = (peer, lambda peer=peer, x=x: peer(x, t - 1, tokens).sample)
        must_agree(found["ours"][1](), found[label][1]())
    return found


def encoders(device: torch.device) -> dict[str, Called]:
    """Our encoder of texts and its twin; RuntimeError unless they agree up to rounding."""
    torch.manual_seed(0)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    ours = TextEncoder(**ENCODER).to(device).eval()
    ids = torch.randint(ENCODER["vocabulary"], (TEXTS, ENCODER["length"])).to(device)
    found: dict[str, Called] = {"ours": (ours, lambda: ours(ids))}
    if find_spec("transformers") is None:
        return found
    library = importlib.import_module("transformers")
    with tempfile.TemporaryDirectory() as folder:
        save_text_encoder(ours, folder)
        peer = library.CLIPTextModel.from_pretrained(folder, attn_implementation="sdpa").to(device).eval()
    must_agree(ours(ids), peer(ids).last_hidden_state)
    return found | {"peer": (peer, lambda: peer(ids).last_hidden_state)}


def forward_pass(network: nn.Module, call: Callable[[], Tensor], device: torch.device, precision: str) -> None:
    """Run a forward pass as in sampling."""
    with torch.no_grad(), computing(device, precision):
        call()


def both_passes(network: nn.Module, call: Callable[[], Tensor], device: torch.device, precision: str) -> None:
    """Run a forward and a backward pass as in training."""
    network.zero_grad()
    with computing(device, precision):
        loss = call().float().square().mean()
    loss.backward()


# ----------------------------------------------------------------------------------------------------------- memory


def memory(network: Network, batch: int, labels: list[str], device: torch.device) -> dict[str, Any]:
    """The peak of training in a process for each, beyond what that had before the network was built."""
    results: dict[str, Any] = {}
    for label in (label for label in IN_MEMORY if label in labels):
        words = json.dumps([label, network, batch, device.type, torch.get_num_threads()])
        paths = filter(None, [str(Path(__file__).resolve().parents[1]), os.environ.get("PYTHONPATH")])
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
        command = [sys.executable, __file__, "--alone", words]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        *_, last = ["it was killed", *(done.stderr if done.returncode else done.stdout).split("\n")[:-1]]
        results[label] = {"failed": shortened(last)} if done.returncode else {"bytes": int(last)}
    return results


def alone(label: str, network: Network, batch: int, device_type: str, threads: int) -> int:
    """Bytes that a network and its first two training steps take at most, in this process."""
    torch.set_num_threads(threads)
    device, setting = torch.device(device_type), SETTINGS[label]

    def way(network: Network, batch: int) -> Way:
        if setting.contender == "ours":
            return Way(Ours(network, batch, device), setting, device)
        with torch.device("meta"):  # the weights do not matter, and copying ours would leave its traces in the peak
            described = describe(UNet(**network))
        peer = peers().UNet2DModel.from_config(described)
        return Way(Peer(peer, network, batch, device, setting.contender == "tuned peer"), setting, device)

    way(SMALL, 1).step()  # loads what is loaded at first use
    before, measured = peak(device, anew=True), way(network, batch)
    for _ in range(2):  # in the second the optimizer's moments are there from the start
        measured.step()
    return max(0, peak(device) - before)


# --------------------------------------------------------------------------------------------------- machine, limits


def versions() -> dict[str, str | None]:
    """Return the versions of the installed peers."""
    found: dict[str, str | None] = {}
    for package in ("diffusers", "transformers", OTHER):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


def limits(device: torch.device) -> dict[str, float]:
    """The fastest product of matrices, GFLOP/s, by precision; the fastest copy, GB/s read and written."""
    results = {"fp32": product(torch.float32, device), "bf16": product(torch.bfloat16, device)}
    if device.type == "cuda":  # of TF32: float32 convolutions are computed in it there, unless that is switched off
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("high")
        results["tf32"] = product(torch.float32, device)
        torch.set_float32_matmul_precision(before)
    source = torch.ones(COPIED // 4, device=device)
    target = torch.empty_like(source)
    return results | {"copy": 2 * COPIED / 1e9 / fastest(lambda: target.copy_(source), device)}


def product(dtype: torch.dtype, device: torch.device) -> float:
    """GFLOP/s, the best of several sizes."""
    matrices = (torch.randn(n, n, device=device).to(dtype) for n in SIZES)
    return max(2 * len(a) ** 3 / 1e9 / fastest(lambda a=a: a @ a, device) for a in matrices)


def fastest(run: Callable[[], object], device: torch.device) -> float:
    """Seconds of a run, the best of several tries; on a GPU it is started often in each, for that is not its work."""
    return min(seconds(run, device, 20 if device.type == "cuda" else 1) for _ in range(5))


# ----------------------------------------------------------------------------------------------------------- growth


def growth(rounds: int, device: torch.device) -> dict[str, Any]:
    """Seconds of a training step, or of sampling, against each size, and the exponent of the power law through them."""
    results = {}
    for axis, values in GROWTH.items():
        runs: dict[str, Callable[[], object]] = {}
        for value in values:
            network = SMALL | ({axis: value} if axis in SMALL else {})
            sizes = {"batch": value if axis == "batch" else SMALL_BATCH, "T": value if axis == "T" else 1000}
            way = Way(Ours(network, device=device, **sizes), SETTINGS["ours"], device)
            runs[str(value)] = functools.partial(way.sample, value) if axis == SAMPLING_STEPS else way.step
        timed = {int(value): what for value, what in in_turns(runs, rounds, device).items() if "median" in what}
        sizes, times = list(timed), [what["median"] for what in timed.values()]
        slope = float(np.polyfit(np.log(sizes), np.log(times), 1)[0]) if len(timed) > 1 else None
        results[axis] = {"values": sizes, "seconds": times, "exponent": slope}
    return results


def draw(results: dict[str, Any], path: Path) -> None:
    """The growth, a panel for each size, on logarithmic axes."""
    units = {"batch": "batch, images", "image_size": "image size, pixels", "channels": "channels of the first level"}
    figure = Figure(figsize=(2.6 * len(results), 2.7), dpi=90, layout="constrained")
    for axes, (axis, curve) in zip(figure.subplots(1, len(results), squeeze=False)[0], results.items(), strict=True):
        axes.loglog(curve["values"], curve["seconds"], "o-")
        axes.set_xlabel(units.get(axis, axis))
        axes.set_ylabel("s per batch of samples" if axis == SAMPLING_STEPS else "s per training step")
        axes.set_xticks(curve["values"], [str(value) for value in curve["values"]], fontsize=7)
        axes.minorticks_off()
        if curve["seconds"]:
            low, high = min(curve["seconds"]), max(curve["seconds"])
            axes.set_ylim(min(low, high / 8) / 1.5, max(high, low * 8) * 1.5)  # noise is not to look like growth
        axes.set_title("" if curve["exponent"] is None else f"exponent {curve['exponent']:.2f}", fontsize=9)
        axes.grid(alpha=0.3)
    figure.savefig(path)


# ------------------------------------------------------------------------------------------------------------ table

LEGEND = """\
Medians over rounds (least to most). x ours: time in units of ours in the same rounds, so that above 1 ours is faster.
Bold: the fastest peer. First: the first call, with what it compiles; of sampling, two steps. A multiply-add is 2 FLOP.
Of the limit: FLOP of a step over its time and the fastest rate above, in its precision (float32 on a GPU: TF32).
Peak: the most that a process takes in two training steps, beyond what it had before the network was built.
"""
HEADS = ["network", "setting", "step, s", "x ours", "first, s", "ms/GFLOP", "of the limit",
         "sampling, images/s", "x ours", "first, s", "peak, MB"]  # fmt: skip


def table(results: dict[str, Any]) -> str:
    """All that was measured, as markdown."""
    about, most = results["machine"], results.get("limits", {})
    text = f"{about['name']}, {about['device']}, {about['threads']} threads, torch {about['torch']}, "
    text += f"diffusers {about.get('diffusers') or 'not installed'}\n"
    if most:
        rates = ", ".join(f"{name} {rate:,.0f} GFLOP/s" for name, rate in most.items() if name != "copy")
        text += f"Fastest product of matrices: {rates}; copy: {most['copy']:.1f} GB/s read and written\n"
    rows = [row for name, entry in results.get("configs", {}).items() for row in _rows(name, entry, most)]
    curves = [
        [f"s per {'batch of samples' if axis == SAMPLING_STEPS else 'training step'} against {axis}",
         *(", ".join(f"{value:.4g}" for value in curve[key]) for key in ("values", "seconds")),
         "-" if curve["exponent"] is None else f"{curve['exponent']:.2f}"]
        for axis, curve in results.get("growth", {}).items()
    ]  # fmt: skip
    text += f"{LEGEND}\n{_markdown(HEADS, rows)}" if rows else ""
    text += "\n" + _markdown(TEXT_HEADS, _text_rows(results["text"])) if "text" in results else ""
    return text + ("\n" + _markdown(["growth", "values", "s", "exponent"], curves) if curves else "")


TEXT_HEADS = ["network", "pass", "ours, s", "peer, s", "x ours", "peer channels_last, s", "x ours"]


def _text_rows(results: dict[str, Any]) -> list[list[str]]:
    """Return the rows of text-conditional networks, one per pass and precision."""
    rows: list[list[str]] = []
    for name, entry in results.items():
        title = f"{name}: {entry['parameters'] / 1e6:.2f} M parameters"
        for what, part in ((what, part) for what, part in entry.items() if what != "parameters"):
            ours, *others = (_cells(part, label, lambda s: s)[:2] for label in ("ours", "peer", "peer channels_last"))
            rows.append([title, what, ours[0], *others[0], *others[1]])
            title = ""
    return rows


def _markdown(heads: list[str], rows: list[list[str]]) -> str:
    return "".join(f"| {' | '.join(row)} |\n" for row in (heads, ["---"] * len(heads), *rows))


def _rows(name: str, entry: dict[str, Any], most: dict[str, float]) -> list[list[str]]:
    """The rows of a configuration, one a setting."""
    training, sampling, peaks = (entry.get(part, {}) for part in ("training", "sampling", "memory"))
    there = {*training.get("settings", {}), *sampling.get("settings", {}), *peaks}
    title = f"{name}: batch {entry['batch']}, {entry['parameters'] / 1e6:.2f} M parameters, GFLOP "
    title += f"{entry['gflop_step']:,.4g} a step, {entry['gflop_image_forward']:.4g} an image forward"
    rows: list[list[str]] = []
    for label in (label for label in SETTINGS if label in there):
        mine, what = peaks.get(label, {}), training.get("settings", {}).get(label, {})
        cost = "-", "-"
        if "median" in what:
            gflop, precision = what.get("gflop_step", entry["gflop_step"]), SETTINGS[label].precision
            precision = training["precision"] if precision == "auto" else precision
            rate = most.get("tf32", most.get("fp32")) if precision == "fp32" else most.get(precision)
            cost = (
                f"{1000 * what['median'] / gflop:.3g}",
                f"{gflop / what['median'] / rate:.0%}" if rate else "-",
            )
        rows.append(
            [
                "" if rows else title,
                f"{label} ({training.get('precision', sampling.get('precision', '?'))})" if label == "ours" else label,
                *_cells(training, label, lambda s: s),
                *cost,
                *_cells(sampling, label, lambda s: entry["batch"] / s),
                f"{mine['bytes'] / 1e6:,.0f}" if "bytes" in mine else mine.get("failed", "-"),
            ]
        )
    return rows


def _cells(part: dict[str, Any], label: str, shown_as: Callable[[float], float]) -> list[str]:
    """Return the cells of a peer: its speed relative to ours, and its first call."""
    what = part.get("settings", {}).get(label, {})
    if "median" not in what:
        return [f"failed: {what['failed']}" if "failed" in what else "-", "-", "-"]
    median, (low, high) = shown_as(what["median"]), sorted(shown_as(what[end]) for end in ("low", "high"))
    mark, ratio = "**" if part["best_peer"] == label else "", part["ratios"].get(label)
    return [
        f"{mark}{median:.3g}{mark} ({low:.3g} to {high:.3g})",
        f"{ratio['median']:.2f} ({ratio['low']:.2f} to {ratio['high']:.2f})" if ratio else "-",
        f"{what['first']:.3g}",
    ]


# ----------------------------------------------------------------------------------------------------- command line


def chosen(option: str, text: str, allowed: Iterable[str]) -> list[str]:
    """The names in a list with commas; ValueError, with those that are allowed, for any other."""
    names, allowed = [name.strip() for name in text.split(",") if name.strip()], list(allowed)
    for name in names:
        if name not in allowed:
            raise ValueError(f"{option} has {name!r}, which is not known; allowed: {', '.join(allowed)}")
    return names


def arguments(words: list[str] | None) -> argparse.Namespace:
    """The command line; ValueError for values that are not allowed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--configs", default=",".join(CONFIGS), help="default: %(default)s")
    parser.add_argument("--what", default=",".join(BY_DEFAULT), help=f"of {','.join(WHAT)}; default: %(default)s")
    parser.add_argument(
        "--ours", default="fp32,bf16,compiled", help=f'in addition to "ours" itself, of {",".join(OURS)}, or none'
    )
    parser.add_argument("--peers", default=",".join(PEERS), help="or best (all tuned), none; default: %(default)s")
    parser.add_argument("--rounds", type=int, default=5, help="on a CPU at most 3 of sampling")
    parser.add_argument("--batch", type=int, help="default: each configuration's own")
    parser.add_argument("--ddim", type=int, default=50, help="steps of sampling")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--threads", type=int, help="of the CPU")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmark"))
    parser.add_argument("--alone", help=argparse.SUPPRESS)  # for the processes in which memory is measured
    given = parser.parse_args(words)
    given.configs, given.what = chosen("--configs", given.configs, CONFIGS), chosen("--what", given.what, WHAT)
    ours = chosen("--ours", given.ours, [*OURS, "none"])
    names = chosen("--peers", given.peers, [*PEERS, "best", "none"])
    names = [name for group in names for name in (TUNED if group == "best" else [group])]
    known = {"none": "ours", **OURS}, {"none": "ours", **PEERS}
    labels = {"ours", *(known[0][name] for name in ours), *(known[1][name] for name in names)}
    given.labels = [label for label in SETTINGS if label in labels]
    for name, most in {"rounds": 10**6, "batch": 10**6, "ddim": 1000, "threads": 10**4}.items():
        value = getattr(given, name)
        if value is not None and not 1 <= value <= most:
            raise ValueError(f"--{name} = {value} must be an integer in 1..{most}")
    if given.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device = cuda, but torch sees no GPU here; allowed: cpu")
    return given


def read(path: Path, about: dict[str, Any]) -> dict[str, Any]:
    """Return the stored results; raise ValueError if they are not comparable with those of this run."""
    if not path.exists():
        return {"machine": about}
    results = read_json(path)
    if not isinstance(results, dict) or not isinstance(results.get("machine"), dict):
        raise ValueError(f"{path} is no benchmark: choose another --out")
    for key in ("name", "device", "threads", "torch"):
        if results["machine"].get(key) != about[key]:
            found = f"{key} = {results['machine'].get(key)!r}, not {about[key]!r}"
            raise ValueError(f"{path} was measured with {found}: choose another --out")
    return results | {"machine": about}


def write(out: Path, results: dict[str, Any]) -> str:
    """The JSON, the table and, if there are any, the curves; returns the table."""
    text = table(results)
    for name, content in {JSON: json.dumps(results, indent=1) + "\n", TABLE: text}.items():
        with replacing(out / name) as temporary:
            temporary.write_text(content, encoding="utf-8")
    if "growth" in results:
        draw(results["growth"], out / CURVES)
    return text


def measure(given: argparse.Namespace, device: torch.device, results: dict[str, Any]) -> str:
    """All that is asked for, written whenever something is done; returns the table."""
    if find_spec("diffusers") is None and any(label.startswith("peer") for label in given.labels):
        print("diffusers is not installed, so only ours is timed: pip install -c constraints.txt -e '.[peers]'")
        given.labels = [label for label in given.labels if not label.startswith("peer")]
    if "limits" in given.what:
        results["limits"] = limits(device)
        write(given.out, results)
    for name in given.configs if {"training", "sampling", "memory"} & {*given.what} else ():
        print(name, file=sys.stderr, flush=True)
        network, batch = CONFIGS[name], given.batch or (BATCHES_CUDA if device.type == "cuda" else BATCHES)[name]
        before = results.setdefault("configs", {}).get(name, {})
        entry = before if before.get("batch") == batch else {}  # beside another batch it would be misread
        entry |= {"batch": batch, **on_paper(lambda network=network: UNet(**network), network, batch)}
        if {"training", "sampling"} & {*given.what}:
            entry |= timings(network, batch, given, device)
        if "memory" in given.what:
            entry["memory"] = entry.get("memory", {}) | memory(network, batch, given.labels, device)
        results["configs"][name] = entry
        write(given.out, results)
    if "text" in given.what:
        if missing := [name for name in ("diffusers", "transformers") if not find_spec(name)]:
            print(f"{' and '.join(missing)} not installed: text-conditioned networks are timed without their peers")
        text(given.rounds, device, lambda known: write(given.out, results | {"text": known}))
        results = read(given.out / JSON, results["machine"])
    if "growth" in given.what:
        results["growth"] = growth(given.rounds, device)
    return write(given.out, results)


def main(words: list[str] | None = None) -> int:
    try:
        given = arguments(words)
        if given.alone:
            print(alone(*json.loads(given.alone)))
            return 0
        torch.set_num_threads(given.threads or torch.get_num_threads())
        device = torch.device(given.device)
        results = read(given.out / JSON, machine(device) | versions())
        given.out.mkdir(parents=True, exist_ok=True)
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    print(measure(given, device, results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
