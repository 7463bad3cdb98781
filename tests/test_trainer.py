"""ddpm/training/trainer.py: the loop repeats itself to the bit, stops where it should, and learns."""

import functools
import itertools
import json
import math
import shutil
import signal
import threading
from collections.abc import Container
from pathlib import Path

import pytest
import torch
from torch import nn

from ddpm.data import Digits, ImageData
from ddpm.data.augment import Augment
from ddpm.diffusion import GaussianDiffusion
from ddpm.runs import checkpoint
from ddpm.runs.directory import Run, read_metrics
from ddpm.runs.precision import resolve
from ddpm.samplers import DDIM, Sampler
from ddpm.schedules import cosine
from ddpm.times import TIME_SAMPLINGS, TimeSampler
from ddpm.training import trainer as trainer_module
from ddpm.training.interrupt import Interrupted, signals
from ddpm.training.record import Previews, ProgressBar
from ddpm.training.step import Training
from ddpm.training.tasks.diffusion import Diffusion
from ddpm.training.trainer import Trainer
from models.unet import UNet

CPU = torch.device("cpu")
T = 20


@pytest.fixture(scope="module")
def digits() -> Digits:
    return Digits()


@pytest.fixture
def data(digits: Digits) -> ImageData:
    """200 real digits, 40 of them held out."""
    return some(digits)


def some(digits: Digits, n: int = 200, **options: object) -> ImageData:
    return ImageData(
        "digits", "all", digits.images[:n], digits.labels[:n], digits.classes, **{"validation": 0.2} | options
    )


class Small(nn.Module):
    """Two convolutions that know the time: enough wherever the loop and not the network is in question."""

    def __init__(self, dropout: float = 0.0):
        super().__init__()
        self.conv_in, self.conv_out = nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 1, 3, padding=1)
        self.time, self.dropout = nn.Linear(1, 8), nn.Dropout(dropout)

    def forward(self, x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        h = self.conv_in(x_t) + self.time(t[:, None] / T)[:, :, None, None]
        return self.conv_out(self.dropout(torch.nn.functional.silu(h)))


def network(seed: int = 0, dropout: float = 0.0) -> Small:
    torch.manual_seed(seed)
    return Small(dropout)


def unet(seed: int = 0, **options: object) -> UNet:
    torch.manual_seed(seed)
    settings = {"channels": 8, "channel_mults": (1, 2), "blocks": 1, "attention_resolutions": (4,), "groups": 4}
    return UNet(8, 1, **{**settings, "dropout": 0.0, **options})


def options(**changed: object) -> dict:
    """Of a short, quiet trainer."""
    short = {"steps": 6, "batch_size": 16, "log_every": 1, "checkpoint_every": 3, "previews": 0, "precision": "fp32"}
    return short | changed


class Fit:
    """One call of `Trainer.fit` on digits, and what it left."""

    def __init__(
        self,
        path: Path,
        data: ImageData,
        *,
        seed: int = 0,
        model: nn.Module | None = None,
        augment: Augment | None = None,
        resume: Path | None = None,
        optimizer: str = "AdamW",
        lr: float = 2e-3,
        target: str = "eps",
        **changed: object,
    ):
        self.run, self.model = Run(path), network() if model is None else model
        path.mkdir(parents=True, exist_ok=True)
        self.trainer = Trainer(**options(**changed))
        self.diffusion = GaussianDiffusion(cosine(T), target)
        self.task = task_of(self.trainer, self.model, self.diffusion)
        fused = {} if optimizer == "SGD" else {"fused": True}  # as in conf/optimizer

        def make(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
            self.optimizer = getattr(torch.optim, optimizer)(parameters, lr, **fused)
            return self.optimizer

        self.ended, averaged = self.trainer.fit(
            self.run, self.task, data, make, seed=seed, device=CPU, augment=augment, resume=resume
        )
        self.ema: nn.Module = averaged.modules["model"]

    @property
    def state(self) -> dict[str, torch.Tensor]:
        """Weights, averaged weights and the optimizer's state, by name."""
        moments = {
            f"{n}.{k}": v for n, values in self.optimizer.state_dict()["state"].items() for k, v in values.items()
        }
        return {**self.model.state_dict(), **{f"ema.{k}": v for k, v in self.ema.state_dict().items()}, **moments}

    def metrics(self, split: str | None = None) -> list[dict]:
        """The lines of metrics.jsonl without the time used."""
        lines = [{k: v for k, v in line.items() if k != "seconds"} for line in read_metrics(self.run.path)]
        return [line for line in lines if split in (None, line["split"])]

    def steps(self) -> list[int]:
        return sorted(int(path.name) for path in self.run.checkpoints.iterdir())

    def saved(self, step: int, name: str) -> dict[str, torch.Tensor]:
        return checkpoint.load_weights(self.run.checkpoints / str(step) / f"{name}.safetensors")


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    different = [k for k in one.keys() | other.keys() if not torch.equal(one[k], other[k])]
    assert not different


def task_of(trainer: Trainer, model: nn.Module, diffusion: GaussianDiffusion) -> Diffusion:
    return Diffusion(model, diffusion, time_sampling=trainer.time_sampling, offset_noise=trainer.offset_noise)


def drawn_by(
    data: ImageData,
    seed: int,
    step: int,
    *,
    times: TimeSampler | None = None,
    augment: Augment | None = None,
    **changed: object,
) -> list[tuple[torch.Tensor | None, ...]]:
    """x_0, y, t, weight and eps of each micro-batch of a step."""
    trainer = Trainer(**options(**changed))
    task = task_of(trainer, network(), GaussianDiffusion(cosine(T)))
    task.times = times or task.times
    training = Training(trainer, task, data, torch.optim.AdamW, seed=seed, device=CPU, augment=augment)
    parts = training.micro_batches(training.draw(step))
    return [(part.x_0, part.condition.classes, part.t, part.weight, part.eps) for part in parts]


def stop_at(monkeypatch: pytest.MonkeyPatch, step: int, signum: int = signal.SIGTERM) -> None:
    """Let a signal arrive in the middle of a step, once."""
    original, pending = Training.draw, [step]

    def draw(self, step, *others):
        if step in pending:
            pending.clear()
            signal.raise_signal(signum)
        return original(self, step, *others)

    monkeypatch.setattr(Training, "draw", draw)


class Clock:
    """A stopwatch that an action of the loop moves on, and not the time."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, per_step: float = 0.0, per_read: float = 0.0):
        self.now, self.per_step, self.per_read = 0.0, per_step, per_read
        original, clock = Training.draw, self

        def draw(self, *arguments):
            clock.now += clock.per_step
            return original(self, *arguments)

        class Stopwatch:
            def __init__(self, before: float = 0.0):
                self.start = clock.now - before

            @property
            def seconds(self) -> float:
                clock.now += clock.per_read
                return clock.now - self.start

        monkeypatch.setattr(Training, "draw", draw)
        monkeypatch.setattr(trainer_module, "Stopwatch", Stopwatch)


# ---------------------------------------------------------------------------------------------- again and again


@pytest.mark.slow
@pytest.mark.parametrize(
    "changed",
    [
        {"network": unet},
        {"accumulate": 2, "dropout": 0.3, "flip": True},
        {"precision": "bf16"},
        {"precision": "fp16", "dropout": 0.3},
        {"optimizer": "SGD", "lr_schedule": "linear", "warmup": 4, "batch_size": 50},
        {"time_sampling": "loss_aware", "batch_size": 160},
        {"time_sampling": "loss_aware", "batch_size": 160, "accumulate": 2, "precision": "fp16", "offset_noise": 0.1},
    ],
    ids=[
        "a U-Net", "accumulation, dropout and flips", "bf16", "fp16", "SGD across epochs", "loss-aware times",
        "loss-aware times, accumulation, fp16 and offset noise",
    ],
)  # fmt: skip
def test_a_run_that_was_stopped_ends_like_one_that_was_not(changed, digits, tmp_path, monkeypatch):
    changed = dict(changed)
    make, dropout, flip = changed.pop("network", network), changed.pop("dropout", 0.0), changed.pop("flip", False)
    undisturbed = Fit(tmp_path / "whole", some(digits, flip=flip), model=make(dropout=dropout), **changed)

    stop_at(monkeypatch, 3)
    with pytest.raises(Interrupted, match="SIGTERM") as stopped:
        Fit(tmp_path / "parts", some(digits, flip=flip), model=make(dropout=dropout), **changed)
    assert stopped.value.signum == signal.SIGTERM
    last = checkpoint.last_whole(tmp_path / "parts" / "checkpoints")
    assert last.name == "3" and Run(tmp_path / "parts").status()["step"] == 3
    torch.manual_seed(999)
    model = make(seed=5, dropout=dropout)  # other initial weights: all must come from the checkpoint
    resumed = Fit(tmp_path / "parts", some(digits, flip=flip), model=model, resume=last, **changed)

    assert_same(resumed.state, undisturbed.state)
    assert resumed.metrics() == undisturbed.metrics() and len(resumed.metrics("train")) == 6
    assert resumed.steps() == undisturbed.steps() == [3, 6]
    assert_same(resumed.saved(6, "ema"), undisturbed.saved(6, "ema"))
    before, after, whole = (
        checkpoint.load_state(fit.run.checkpoints / step)["task"].get("times")
        for fit, step in ((undisturbed, "3"), (resumed, "6"), (undisturbed, "6"))
    )
    if changed.get("time_sampling") == "loss_aware":
        assert before["count"][1:].min() >= 10  # from there on the losses do steer
        assert torch.equal(after["count"], whole["count"]) and after["count"].sum() == 6 * 160
        assert torch.equal(after["losses"][1:], whole["losses"][1:])
    else:
        assert before is after is whole is None


def test_a_stop_between_two_checkpoints_writes_one_and_changes_nothing(data, tmp_path, monkeypatch):
    whole = Fit(tmp_path / "whole", data)
    stop_at(monkeypatch, 2, signal.SIGINT)
    with pytest.raises(Interrupted, match="SIGINT"):
        Fit(tmp_path / "parts", data)
    resume = checkpoint.last_whole(tmp_path / "parts" / "checkpoints")
    assert resume.name == "2"
    parts = Fit(tmp_path / "parts", data, model=network(seed=1), resume=resume)
    assert_same(parts.state, whole.state)
    assert parts.metrics("train") == whole.metrics("train")
    assert parts.metrics("held_out") == whole.metrics("held_out")


def test_a_signal_in_the_last_step_loses_nothing(data, tmp_path, monkeypatch):
    stop_at(monkeypatch, 6)
    with pytest.raises(Interrupted):
        Fit(tmp_path, data)
    again = Fit(tmp_path, data, resume=checkpoint.last_whole(tmp_path / "checkpoints"))
    assert again.ended == "steps" and again.steps() == [3, 6] and len(again.metrics("train")) == 6


def test_the_same_seed_gives_the_same_run_and_another_another(data, tmp_path):
    first, again, other = (
        Fit(tmp_path / name, data, seed=seed, steps=3) for name, seed in (("a", 4), ("b", 4), ("c", 5))
    )
    assert_same(first.state, again.state)
    assert first.metrics() == again.metrics()
    assert first.metrics()[0]["loss"] != other.metrics()[0]["loss"]
    assert not torch.equal(first.state["conv_in.weight"], other.state["conv_in.weight"])


def test_what_happens_outside_the_loop_does_not_matter(data, tmp_path):
    """Previews, checkpoints and logging draw nothing that training would miss; the global generator is no source."""
    plain = Fit(tmp_path / "a", data, model=network(dropout=0.3))
    model = network(dropout=0.3)
    torch.manual_seed(77)
    busy = Fit(tmp_path / "b", data, model=model, previews=3, checkpoint_every=1, log_every=4, keep=1)
    assert_same(plain.state, busy.state)


def sampler_of_times(kind: str) -> TimeSampler:
    """With a history that makes late times likely, where it counts."""
    times = TimeSampler(kind, cosine(T))
    for _ in range(10):
        times.update(torch.arange(1, T + 1), torch.arange(1.0, T + 1))
    return times


@pytest.mark.parametrize("kind", TIME_SAMPLINGS)
@pytest.mark.parametrize("flip", [False, True])
def test_micro_batches_are_a_pure_function_of_seed_and_step(flip, kind, digits):
    data, times = some(digits, flip=flip), sampler_of_times(kind)

    def drawn(seed: int, step: int, accumulate: int = 1) -> list[torch.Tensor]:
        parts = drawn_by(data, seed, step, times=times, accumulate=accumulate)
        assert len(parts) == accumulate
        assert {len(x) for part in parts for x in part if x is not None} == {16 // accumulate}
        assert all((part[3] is None) == (kind != "loss_aware") for part in parts)
        return [torch.cat(column) for column in zip(*parts, strict=True) if column[0] is not None]

    reference = drawn(3, 7)
    x_0, y, t, *weight, eps = reference
    if weight:
        torch.testing.assert_close(weight[0], 10.5 / t.float())
    assert x_0.shape == eps.shape == (16, 1, 8, 8) and y.shape == t.shape == (16,)
    assert x_0.min() >= -1 and x_0.max() <= 1 and t.min() >= 1 and t.max() <= T
    torch.manual_seed(123)
    for accumulate in (1, 2, 16):
        assert all(map(torch.equal, drawn(3, 7, accumulate), reference))
    for seed, step in ((3, 8), (4, 7)):
        assert not any(map(torch.equal, drawn(seed, step), reference))


def test_t_covers_its_range_evenly_and_eps_is_standard_normal(data):
    [(_, _, t, weight, eps)] = drawn_by(data, 0, 1, batch_size=2000)
    assert weight is None
    assert torch.bincount(t, minlength=T + 1)[1:].sub(100).abs().max() < 45 and t.min() == 1 and t.max() == T
    assert abs(eps.mean()) < 0.01 and abs(eps.std() - 1) < 0.01


def test_accumulation_is_one_batch_but_for_rounding(data, tmp_path):
    one, four = (
        Fit(tmp_path / str(n), data, accumulate=n, steps=4, optimizer="SGD", lr=0.1, clip=None) for n in (1, 4)
    )
    for k, v in one.state.items():
        torch.testing.assert_close(four.state[k], v, rtol=1e-4, atol=1e-6)
    for a, b in zip(one.metrics("train"), four.metrics("train"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)
    start = network().state_dict()
    assert any((one.state[k] - start[k]).abs().max() > 1e-4 for k in start)  # it moved at all


def test_offset_noise_shifts_whole_channels_and_nothing_else(data):
    def drawn(strength: float) -> list[torch.Tensor]:
        return drawn_by(data, 0, 1, batch_size=1000, offset_noise=strength)[0]

    plain, shifted = drawn(0.0), drawn(0.3)
    assert all(torch.equal(plain[i], shifted[i]) for i in (0, 1, 2))
    shift = shifted[4] - plain[4]
    torch.testing.assert_close(shift, shift.mean((2, 3), keepdim=True).expand_as(shift), rtol=0, atol=1e-6)
    assert shift[:, 0, 0, 0].std().item() == pytest.approx(0.3, rel=4.5 / 2000**0.5)


def test_the_weights_of_times_scale_the_loss_and_its_history_does_not_know_them(data, tmp_path, monkeypatch):
    """Weight 2 at half the rate is weight 1, to the bit; what is remembered are the losses themselves."""
    draw, seen = TimeSampler.draw, []

    def fit(name: str, weight: float, lr: float) -> Fit:
        monkeypatch.setattr(TimeSampler, "draw", lambda self, B, g: (draw(self, B, g)[0], torch.full((B,), weight)))
        monkeypatch.setattr(TimeSampler, "update", lambda self, t, loss: seen.append(loss))
        return Fit(tmp_path / name, data, optimizer="SGD", lr=lr, clip=None, accumulate=2)

    one, two = fit("one", 1.0, 0.1), fit("two", 2.0, 0.05)
    assert_same({k: v for k, v in one.state.items() if "." in k}, {k: v for k, v in two.state.items() if "." in k})
    losses = [[line["loss"] for line in fit.metrics("train")] for fit in (one, two)]
    assert losses[1] == pytest.approx([2 * loss for loss in losses[0]], rel=1e-6)
    assert len(seen) == 12 and all(torch.equal(*pair) for pair in zip(seen[:6], seen[6:], strict=True))
    assert not any(loss.requires_grad for loss in seen)


# ---------------------------------------------------------------------------------------------- how long


@pytest.mark.parametrize(
    ("budget", "steps", "ended"),
    [
        ({"steps": 5}, 5, "steps"),
        ({"epochs": 1}, 4, "epochs"),  # 160 images in batches of 50: 3.2
        ({"epochs": 0.5}, 2, "epochs"),
        ({"epochs": 0.001}, 1, "epochs"),
        ({"seconds": 30}, 3, "seconds"),
        ({"seconds": 25}, 3, "seconds"),
        ({"steps": 2, "seconds": 30}, 2, "steps"),
        ({"steps": 5, "seconds": 30}, 3, "seconds"),
        ({"steps": 3, "epochs": 1}, 3, "steps"),
        ({"steps": 9, "epochs": 1, "seconds": 1000}, 4, "epochs"),
    ],
)
def test_the_first_budget_that_is_reached_ends_the_run(budget, steps, ended, data, tmp_path, monkeypatch):
    Clock(monkeypatch, per_step=10)
    fit = Fit(tmp_path, data, batch_size=50, **({"steps": None} | budget))
    assert fit.ended == ended
    assert [line["step"] for line in fit.metrics("train")] == list(range(1, steps + 1))
    assert fit.steps()[-1] == steps and fit.run.status()["step"] == steps
    assert fit.metrics("train")[-1]["images"] == 50 * steps


@pytest.mark.parametrize("seconds", range(20, 26))
def test_whenever_the_time_is_up_the_last_step_is_logged_shown_and_kept(seconds, data, tmp_path, monkeypatch):
    """All decisions of a step must see one time: here every look at the clock takes a second."""
    Clock(monkeypatch, per_read=1)
    monkeypatch.setattr(Trainer, "held_out_losses", lambda *arguments: {"loss": 1.0})
    taken = []
    monkeypatch.setattr(Previews, "take", lambda self, step, raw, ema: taken.append(step))
    fit = Fit(
        tmp_path, data, steps=None, seconds=seconds, batch_size=1, checkpoint_every=100, log_every=100, previews=1
    )
    last = fit.optimizer.state[fit.model.conv_in.weight]["step"]
    assert fit.ended == "seconds" and fit.steps() == [last] and taken == [0, last]
    assert [line["step"] for line in fit.metrics("train")] == [last]


def test_the_time_used_is_carried_over(data, tmp_path, monkeypatch):
    Clock(monkeypatch, per_step=10)
    first = Fit(tmp_path, data, steps=2)
    assert checkpoint.load_state(tmp_path / "checkpoints" / "2")["seconds"] == 20
    second = Fit(tmp_path, data, steps=None, seconds=40, resume=first.run.checkpoints / "2")
    assert second.metrics("train")[-1]["step"] == 4 and read_metrics(tmp_path)[-1]["seconds"] == 40


# ---------------------------------------------------------------------------------------------- the learning rate


@pytest.mark.parametrize("fraction", [0.0, 0.2, 0.5, 0.9, 1.0])
@pytest.mark.parametrize(
    ("name", "closed_form"),
    [
        ("constant", lambda f: 1.0),
        ("cosine", lambda f: math.cos(math.pi * f / 2) ** 2),
        ("linear", lambda f: 1 - f),
        ("triangular", lambda f: min(2 * f, 2 - 2 * f)),
    ],
)
def test_lr_factor_in_closed_form(name, closed_form, fraction):
    trainer = Trainer(**options(lr_schedule=name))
    assert trainer.lr_factor(100, fraction, 0) == pytest.approx(closed_form(fraction), abs=1e-12)
    for step in (1, 3, 4, 5):
        rise = min(1, step / 4)
        assert trainer.lr_factor(step, fraction, 4) == pytest.approx(rise * closed_form(fraction), abs=1e-12)


def test_a_rate_that_begins_anew_is_that_of_each_part_of_the_budget():
    for name in ("cosine", "linear", "triangular"):
        once, thrice = (Trainer(**options(lr_schedule=name, lr_cycles=n)) for n in (1, 3))
        for fraction in (0.0, 0.1, 0.25, 0.99):
            for cycle in range(3):
                found = thrice.lr_factor(9, (cycle + fraction) / 3, 0)
                assert found == pytest.approx(once.lr_factor(9, fraction, 0), abs=1e-12)
        assert thrice.lr_factor(9, 1.0, 0) == once.lr_factor(9, 1.0, 0) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("budget", [{"steps": 8}, {"steps": None, "epochs": 2}, {"steps": None, "seconds": 80}])
@pytest.mark.parametrize("warmup", [{"warmup": 4}, {"warmup_epochs": 1}])  # an epoch is 4 steps
def test_the_rates_of_a_run(budget, warmup, data, tmp_path, monkeypatch):
    """The rate of step n follows what was used of the budget before it, whatever the budget is counted in."""
    Clock(monkeypatch, per_step=10)
    fit = Fit(tmp_path, data, batch_size=40, lr=1e-3, **budget, **warmup)
    expected = [1e-3 * min(1, n / 4) * 0.5 * (1 + math.cos(math.pi * (n - 1) / 8)) for n in range(1, 9)]
    assert [line["lr"] for line in fit.metrics("train")] == pytest.approx(expected, rel=1e-9)


def test_every_parameter_group_keeps_its_own_rate(data, tmp_path):
    rates = []

    def make(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        first, *others = parameters
        optimizer = torch.optim.SGD([{"params": [first], "lr": 0.5}, {"params": others, "lr": 0.1}])
        step = optimizer.step
        optimizer.step = lambda *a, **k: (rates.append([g["lr"] for g in optimizer.param_groups]), step(*a, **k))[1]
        return optimizer

    trainer = Trainer(**options(steps=2, lr_schedule="linear"))
    task = Diffusion(network(), GaussianDiffusion(cosine(T)))
    trainer.fit(Run(tmp_path), task, data, make, seed=0, device=CPU)
    assert rates == [pytest.approx([0.5, 0.1]), pytest.approx([0.25, 0.05])]


# ---------------------------------------------------------------------------------------------- what is learned


@pytest.mark.slow
def test_training_lowers_the_loss_on_images_it_never_sees(data, tmp_path):
    model, diffusion = unet(channel_mults=(1,), attention_resolutions=()), GaussianDiffusion(cosine(T), "v")
    before = Trainer(**options()).held_out_losses(Diffusion(model, diffusion), data, CPU)["loss"]
    assert before == pytest.approx(1.0, abs=0.3)  # the network begins as zero: the mean square of its target
    fit = Fit(tmp_path, data, model=model, target="v", steps=50, lr=5e-3, checkpoint_every=50, ema_warmup=2)
    after = fit.metrics("held_out")[-1]["loss"]
    assert after < 0.65 * before
    assert after == fit.trainer.held_out_losses(Diffusion(fit.ema, diffusion), data, CPU)["loss"]
    assert fit.metrics("train")[-1]["loss"] < 0.75 * fit.metrics("train")[0]["loss"]


def test_the_checkpoint_holds_the_closed_form_of_the_average(data, tmp_path):
    fit = Fit(tmp_path, data, checkpoint_every=1, keep=6, ema_decay=0.6, ema_warmup=3.0)
    d = [min(0.6, (n - 1) / (n - 1 + 3.0)) for n in range(1, 7)]
    for last in (1, 4, 6):
        averaged = {k: torch.zeros_like(v) for k, v in fit.saved(1, "model").items()}
        for n in range(1, last + 1):
            weight = (1 - d[n - 1]) * math.prod(d[n:last])
            averaged = {k: v + weight * fit.saved(n, "model")[k] for k, v in averaged.items()}
        for k, v in fit.saved(last, "ema").items():
            torch.testing.assert_close(v, averaged[k], rtol=1e-5, atol=1e-6)
    assert_same(fit.saved(6, "model"), fit.model.state_dict())
    assert_same(fit.saved(6, "ema"), fit.ema.state_dict())


def test_clipping_bounds_the_update(data, tmp_path):
    def moved(name: str, clip: float | None) -> tuple[float, dict]:
        fit = Fit(tmp_path / name, data, steps=1, optimizer="SGD", lr=1.0, lr_schedule="constant", clip=clip)
        start = network().state_dict()
        norm = torch.cat([(v - start[k]).flatten() for k, v in fit.model.state_dict().items()]).norm().item()
        return norm, fit.metrics("train")[0]

    free, log = moved("free", None)
    assert free == pytest.approx(log["grad_norm"], rel=1e-4) and free > 0.2
    clipped, log = moved("clipped", 0.1)
    assert clipped == pytest.approx(0.1, rel=1e-3) and log["grad_norm"] == pytest.approx(free, rel=1e-4)
    wide, _ = moved("wide", 1000.0)
    assert wide == pytest.approx(free, rel=1e-5)


def in_order_of_classes(classes: int, of_each: int) -> ImageData:
    """Images that lie in the order of their classes, and whose pixels say which."""
    labels = torch.arange(classes).repeat_interleave(of_each)
    images = (5 * labels).to(torch.uint8)[:, None, None, None].expand(-1, 1, 8, 8).contiguous()
    return ImageData("sorted", "all", images, labels, validation=0.5)


@pytest.mark.parametrize("couples", [False, True])
def test_the_held_out_loss_is_of_all_classes_in_whatever_order_images_lie(couples, monkeypatch):
    data, asked = in_order_of_classes(46, 50), list[torch.Tensor]()
    batch = data.batch
    monkeypatch.setattr(data, "batch", lambda numbers, device: asked.append(numbers) or batch(numbers, device))
    task = Diffusion(network(), GaussianDiffusion(cosine(T)))
    monkeypatch.setattr(task, "couples_batch", couples)
    losses = Trainer(**options()).held_out_losses(task, data, CPU)
    (numbers,) = asked
    assert losses["n"] == len(numbers) == len(numbers.unique()) == 512 and len(data.held_out) == 1150
    counts = data.labels[numbers].bincount(minlength=46)
    there = data.labels[data.held_out].bincount(minlength=46)
    assert (counts - there * 512 / 1150).abs().max() < 2


def test_rows_of_a_coupled_loss_that_are_left_over_are_not_all_of_the_last_classes(monkeypatch):
    data, asked = in_order_of_classes(10, 20), list[torch.Tensor]()
    batch = data.batch
    monkeypatch.setattr(data, "batch", lambda numbers, device: asked.append(numbers) or batch(numbers, device))
    task = Diffusion(network(), GaussianDiffusion(cosine(T)))
    monkeypatch.setattr(task, "couples_batch", True)
    assert Trainer(**options()).held_out_losses(task, data, CPU)["n"] == len(asked[0]) == 64
    assert set(data.labels[asked[0]].tolist()) == set(range(10))


def test_how_many_samples_were_measured_stands_beside_the_loss(tmp_path, monkeypatch):
    monkeypatch.setattr(trainer_module, "HELD_OUT", 16)
    fit = Fit(tmp_path, in_order_of_classes(4, 25))
    line = fit.metrics("held_out")[-1]
    manifest = json.loads((fit.run.checkpoints / str(line["step"]) / "manifest.json").read_text())
    assert (line["n"], manifest["n"], manifest["held_out"]) == (16, 16, line["loss"])


def test_held_out_loss_repeats_itself_and_needs_a_held_out_part(digits, data):
    trainer, model = Trainer(**options()), network()
    task = Diffusion(model, GaussianDiffusion(cosine(T)))
    nn.init.normal_(model.conv_out.weight)
    model.eval()
    first = trainer.held_out_losses(task, data, CPU)
    torch.manual_seed(5)
    assert trainer.held_out_losses(task, data, CPU) == first and first.keys() == {"loss"}
    small = Trainer(**options(batch_size=3))
    assert small.held_out_losses(task, data, CPU) == pytest.approx(first, rel=1e-5)
    assert trainer.held_out_losses(task, some(digits, validation=0), CPU) is None
    assert not any(p.grad is not None for p in model.parameters())


def test_without_a_held_out_part_the_last_checkpoint_is_the_best(digits, tmp_path):
    fit = Fit(tmp_path, some(digits, validation=0), keep=1)
    assert [line["loss"] for line in fit.metrics("held_out")] == [None, None]
    assert fit.steps() == [6] and checkpoint.best(fit.run.checkpoints) == 6


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_learns_about_the_same(precision, data, tmp_path):
    full, half = Fit(tmp_path / "fp32", data), Fit(tmp_path / precision, data, precision=precision)
    losses = [[line["loss"] for line in fit.metrics("train")] for fit in (full, half)]
    assert losses[0] == pytest.approx(losses[1], rel=0.05) and losses[0] != losses[1]
    assert half.run.status()["precision"] == precision
    assert {p.dtype for p in half.model.parameters()} == {torch.float32}
    scale = checkpoint.load_state(half.run.checkpoints / "6")["phases"]["all"]["scaler"]
    assert bool(scale) == (precision == "fp16")


def test_precision_is_recorded_and_kept(data, tmp_path):
    assert resolve("auto", CPU, 10) == "fp32" and resolve("bf16", CPU, 10) == "bf16"
    first = Fit(tmp_path / "a", data, steps=3, precision="bf16")
    kept = Fit(tmp_path / "b", data, precision="auto", resume=first.run.checkpoints / "3")
    assert kept.run.status()["precision"] == "bf16"


def test_a_precision_that_is_asked_for_by_name_is_used_where_a_run_is_extended(data, tmp_path):
    first = Fit(tmp_path / "a", data, steps=3, precision="fp32")
    asked = Fit(tmp_path / "b", data, precision="bf16", resume=first.run.checkpoints / "3")
    assert asked.run.status()["precision"] == "bf16"


@pytest.mark.slow
def test_classes_reach_a_network_that_takes_them(digits, tmp_path):
    few = digits.labels[:600] < 5
    data = ImageData("digits", "all", digits.images[:600][few], digits.labels[:600][few], digits.classes)
    model = unet(num_classes=10)
    start = model.class_embedding.weight.clone()
    Fit(tmp_path, data, model=model, optimizer="Adam", previews=2)
    moved = (model.class_embedding.weight != start).any(1)
    assert moved.tolist() == [True] * 5 + [False] * 5
    assert len(torch.load(tmp_path / "previews.pt", weights_only=True)) == 3


def test_a_network_without_classes_gets_none(data, tmp_path):
    given = []
    model = network()
    model.register_forward_pre_hook(lambda module, arguments: given.append(len(arguments)))
    Fit(tmp_path, data, model=model, steps=1)
    assert set(given) == {2}


# ---------------------------------------------------------------------------------------------- what goes wrong


class Breaks(nn.Module):
    """Says NaN, or another number, in some training steps; counted from 1."""

    def __init__(self, steps: Container[int], says: float = math.nan):
        super().__init__()
        self.inner, self.step, self.steps, self.says = network(), 0, steps, says

    def forward(self, x_t, t):
        self.step += self.training
        return self.inner(x_t, t) * (self.says if self.step in self.steps and self.training else 1.0)


def from_step(n: int) -> range:
    return range(n, 1000)


def test_losses_that_are_not_finite_end_the_run(data, tmp_path):
    with pytest.raises(FloatingPointError, match=r"in 1 steps in a row, up to step 4 \(loss nan.*max_skipped = 0"):
        Fit(tmp_path, data, model=Breaks(from_step(4)), max_skipped=0)
    lines = read_metrics(tmp_path)
    assert lines[-1]["step"] == 4 and lines[-1]["loss"] is None and lines[-1]["skipped"] == 1
    assert "NaN" not in (tmp_path / "metrics.jsonl").read_text()


@pytest.mark.parametrize("optimizer", ["AdamW", "SGD"])
@pytest.mark.parametrize("says", [math.nan, math.inf, 1e30])
def test_a_step_whose_numbers_are_broken_changes_nothing_but_the_average(says, optimizer, data, tmp_path):
    """The square of 1e30 is infinite; the fused optimizers skip by themselves, SGD is not asked."""
    model = Breaks({2, 4}, says)
    before: dict[int, dict[str, torch.Tensor]] = {}

    def keep(module: nn.Module, arguments: tuple) -> None:
        before.setdefault(module.step + 1, {k: v.clone() for k, v in module.state_dict().items()})

    handle = model.register_forward_pre_hook(keep)
    fit = Fit(tmp_path, data, model=model, optimizer=optimizer, steps=5, checkpoint_every=5, log_every=1)
    handle.remove()
    for broken in (2, 4):
        assert_same(before[broken], before[broken + 1])
    assert not torch.equal(before[3]["inner.conv_in.weight"], before[4]["inner.conv_in.weight"])
    assert all(value.isfinite().all() for value in fit.state.values())
    assert [line["skipped"] for line in fit.metrics("train")] == [0, 1, 1, 2, 2]
    if optimizer == "AdamW":
        assert {v.item() for k, v in fit.state.items() if k.endswith(".step")} == {3}
    assert checkpoint.load_state(fit.run.checkpoints / "5")["ema_updates"] == {"model": 5}


def test_skipped_steps_are_told_and_no_autopsy_is_made(data, tmp_path, capsys):
    Fit(tmp_path, data, model=Breaks({2, 3, 5}), max_skipped=2)
    told = capsys.readouterr().err
    assert "step 3: 2 steps skipped so far, whose loss or gradient was not finite" in told
    assert "step 4:" not in told and "step 5: 3 steps" in told and not (tmp_path / "autopsy").exists()


@pytest.mark.parametrize("log_every", [1, 100])
def test_a_row_that_is_too_long_is_found_between_two_lines_of_metrics_too(log_every, data, tmp_path):
    with pytest.raises(FloatingPointError, match="in 3 steps in a row"):
        Fit(tmp_path, data, model=Breaks({4, 5, 6}), max_skipped=2, log_every=log_every, steps=50, checkpoint_every=50)


def test_the_autopsy_says_what_the_last_steps_were_computed_from(data, tmp_path):
    with pytest.raises(FloatingPointError):
        Fit(tmp_path, data, model=Breaks(from_step(9)), max_skipped=1, steps=50, accumulate=2, keep=1, seed=3)
    report = json.loads((tmp_path / "autopsy" / "report.json").read_text())
    assert report["reason"].startswith("loss or gradient not finite in 2 steps in a row, up to step 6")
    assert report["seed"] == 3
    assert [told["step"] for told in report["steps"]] == [4, 5, 6]
    for told in report["steps"]:
        assert told["images"] == data.order(3, told["step"], 16).tolist()
        assert told["t"] == torch.cat([t for _, _, t, _, _ in drawn_by(data, 3, told["step"], accumulate=2)]).tolist()
        broken = told["step"] >= 5
        assert all((loss == "nan") == broken for loss in (*told["losses"], told["loss"], told["grad_norm"]))
        assert len(told["losses"]) == 16
    kept = tmp_path / "autopsy" / "checkpoint" / "3"
    assert checkpoint.verify(kept) is None
    checkpoint.rotate(tmp_path / "checkpoints", 1), shutil.rmtree(tmp_path / "checkpoints")
    assert checkpoint.verify(kept) is None, "and nothing that happens to the others deletes it"


def test_checkpoints_are_sound_even_if_they_are_written_while_steps_are_skipped(data, tmp_path):
    with pytest.raises(FloatingPointError):
        Fit(tmp_path, data, model=Breaks(from_step(3)), max_skipped=5, checkpoint_every=2, steps=50, keep=8)
    last = checkpoint.last_whole(tmp_path / "checkpoints")
    assert int(last.name) >= 4
    for name in ("model", "ema"):
        assert all(v.isfinite().all() for v in checkpoint.load_weights(last / f"{name}.safetensors").values())


def test_a_run_that_goes_on_knows_the_row_that_it_is_in(data, tmp_path, monkeypatch):
    stop_at(monkeypatch, 3)
    with pytest.raises(Interrupted):
        Fit(tmp_path, data, model=Breaks({2, 3}), max_skipped=3)
    model = Breaks({1, 2})  # of this process: steps 4 and 5
    with pytest.raises(FloatingPointError, match="in 4 steps in a row, up to step 5"):
        Fit(tmp_path, data, model=model, max_skipped=3, resume=checkpoint.last_whole(tmp_path / "checkpoints"))


def test_a_broken_loss_does_not_break_loss_aware_times(data, tmp_path):
    fit = Fit(tmp_path, data, model=Breaks({4}), time_sampling="loss_aware", batch_size=160, log_every=100)
    assert fit.ended == "steps" and fit.metrics("train")[-1]["skipped"] == 1


@pytest.mark.parametrize("steps", [4, 50])
def test_a_loss_scale_that_collapses_is_named(steps, data, tmp_path, monkeypatch):
    scaler = torch.amp.GradScaler
    monkeypatch.setattr(
        torch.amp, "GradScaler", lambda device, enabled: scaler(device, init_scale=4.0, enabled=enabled)
    )
    model = Breaks(())
    for parameter in model.parameters():
        parameter.register_hook(lambda grad: grad * math.inf)
    with pytest.raises(
        FloatingPointError, match=r"loss scale of fp16 has collapsed to 0\.[25]+ at step .*bf16 or fp32"
    ):
        Fit(tmp_path, data, model=model, precision="fp16", steps=steps, max_skipped=100)
    assert (tmp_path / "autopsy" / "report.json").is_file()


def test_an_infinite_gradient_in_fp16_is_skipped_and_not_an_error(data, tmp_path, monkeypatch):
    """Loss scaling begins too high on purpose: the step is left out, the scale is halved."""
    scaler = torch.amp.GradScaler
    monkeypatch.setattr(
        torch.amp, "GradScaler", lambda device, enabled: scaler(device, init_scale=2.0**40, enabled=enabled)
    )
    fit = Fit(tmp_path, data, steps=40, precision="fp16", checkpoint_every=1, keep=40)
    assert fit.metrics("train")[0]["grad_norm"] is None and fit.metrics("train")[0]["loss"] is not None
    assert_same(fit.saved(1, "model"), network().state_dict())
    assert checkpoint.load_state(fit.run.checkpoints / "2")["phases"]["all"]["scaler"]["scale"] < 2.0**40
    assert fit.metrics("train")[-1]["grad_norm"] is not None


def test_a_run_whose_every_step_was_skipped_has_learned_nothing_and_failed(data, tmp_path):
    with pytest.raises(FloatingPointError, match="nothing was learned: loss or gradient not finite in each of the 3"):
        Fit(tmp_path / "all", data, model=Breaks(from_step(1)), steps=3, max_skipped=10)
    assert (tmp_path / "all" / "autopsy" / "report.json").exists()
    assert Fit(tmp_path / "but one", data, model=Breaks(from_step(2)), steps=3, max_skipped=10).ended == "steps"


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"steps": None}, "no budget: set trainer.steps, trainer.epochs or trainer.seconds"),
        ({"steps": 0}, "steps = 0 must be an integer >= 1"),
        ({"steps": 2.5}, "steps = 2.5 must be an integer"),
        ({"steps": True}, "steps = True must be an integer"),
        ({"steps": None, "epochs": 0}, "epochs = 0 must be a number > 0"),
        ({"epochs": True}, "epochs = True must be a number > 0"),
        ({"epochs": math.inf}, "epochs = inf must be"),
        ({"seconds": -1}, "seconds = -1 must be a number > 0"),
        ({"seconds": math.inf}, "seconds = inf must be"),
        ({"seconds": math.nan}, "seconds = nan must be"),
        ({"batch_size": 0}, "batch_size = 0 must be an integer >= 1"),
        ({"accumulate": 0}, "accumulate = 0 must be an integer >= 1"),
        ({"accumulate": 3}, "accumulate = 3 does not divide batch_size = 16; nearest that does: [24]"),
        ({"warmup": -1}, "warmup = -1 must be an integer >= 0"),
        ({"warmup_epochs": 0}, "warmup_epochs = 0 must be a number > 0"),
        ({"warmup": 5, "warmup_epochs": 1}, "warmup = 5 and warmup_epochs = 1 exclude each other"),
        ({"clip": 0}, "clip = 0 must be a number > 0, or null"),
        ({"log_every": 0}, "log_every = 0 must be an integer >= 1"),
        ({"checkpoint_every": 0}, "checkpoint_every = 0 must be an integer >= 1"),
        ({"keep": 0}, "keep = 0 must be an integer >= 1"),
        ({"max_skipped": -1}, "max_skipped = -1 must be an integer >= 0"),
        ({"previews": -1}, "previews = -1 must be an integer >= 0"),
        ({"precision": "fp8"}, "precision = 'fp8' is not known; allowed: auto, fp32, bf16, fp16"),
        ({"lr_schedule": "step"}, "lr_schedule = 'step' is not known; allowed: constant, cosine, linear, triangular"),
        ({"lr_cycles": 0}, "lr_cycles = 0"),
        ({"keep_every": 0}, "keep_every = 0 must be an integer >= 1"),
        ({"keep_every": 15, "checkpoint_every": 10}, "no multiple of checkpoint_every = 10; nearest that are: 10, 20"),
        ({"keep_every": 4, "checkpoint_every": 10}, "no multiple of checkpoint_every = 10; nearest that are: 10"),
        ({"lr_cycles": 2, "lr_schedule": "constant"}, "lr_cycles = 2: a constant rate has no cycles"),
        ({"time_sampling": "even"}, "'even' is not known; allowed: uniform, stratified, loss_aware"),
        ({"offset_noise": -0.1}, "offset_noise = -0.1 must be >= 0"),
        ({"offset_noise": math.nan}, "offset_noise = nan must be >= 0"),
        ({"ema_decay": 1.0}, r"ema_decay = 1 must lie in \[0, 1\)"),
        ({"ema_warmup": -1.0}, "ema_warmup = -1 be >= 0"),
        ({"ema_warmup": math.nan}, "ema_warmup = nan"),
    ],
)
def test_arguments_that_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        Trainer(**options(**wrong))


# ---------------------------------------------------------------------------------------------- previews, checkpoints


def test_previews_are_of_the_same_noise_at_even_shares_of_the_budget(data, tmp_path, monkeypatch):
    started = []

    def watched(self, schedule, denoise, x_T, **options):
        started.append(x_T.clone())
        return Sampler.__call__(self, schedule, denoise, x_T, **options)

    monkeypatch.setattr(DDIM, "__call__", watched)
    stop_at(monkeypatch, 4)
    with pytest.raises(Interrupted):
        Fit(tmp_path, data, steps=9, previews=3, lr=1e-2)
    resume = checkpoint.last_whole(tmp_path / "checkpoints")
    Fit(tmp_path, data, steps=9, previews=3, lr=1e-2, resume=resume)
    assert len(started) == 8 and all(torch.equal(x_T, started[0]) for x_T in started)  # raw and EMA, four times
    rows = torch.load(tmp_path / "previews.pt", weights_only=True)
    assert [row[0] for row in rows] == [0, 3, 6, 9] and (tmp_path / "preview.png").stat().st_size > 0
    for step, raw, ema in rows:
        assert raw.shape == ema.shape == (8, 1, 8, 8) and torch.equal(raw, ema) == (step == 0)
    assert not torch.equal(rows[1][1], rows[2][1])


@pytest.mark.parametrize(("when", "step"), [("preview", 3), ("preview", 9), ("save", 9)])
def test_a_signal_beside_the_steps_is_neither_lost_nor_answered_without_a_checkpoint(
    when, step, data, tmp_path, monkeypatch
):
    place, name = (Previews, "take") if when == "preview" else (checkpoint, "save")
    original, pending = getattr(place, name), [step]

    def interrupted(first: object, number: int, *arguments: object, **options: object) -> object:
        if number in pending:
            pending.clear()
            signal.raise_signal(signal.SIGTERM)
        return original(first, number, *arguments, **options)

    monkeypatch.setattr(place, name, interrupted)
    with pytest.raises(Interrupted):
        Fit(tmp_path, data, steps=9, previews=3, checkpoint_every=100)
    last = checkpoint.last_whole(tmp_path / "checkpoints")
    assert last is not None and int(last.name) in (step, step + 1)
    assert Run(tmp_path).status()["step"] == int(last.name)
    whole, again = Fit(tmp_path / "whole", data, steps=9), Fit(tmp_path, data, steps=9, previews=3, resume=last)
    assert_same(again.state, whole.state)
    assert [row[0] for row in torch.load(tmp_path / "previews.pt", weights_only=True)] == [0, 3, 6, 9]


def test_a_run_without_previews_draws_none(data, tmp_path):
    Fit(tmp_path, data, steps=1)
    assert not list(tmp_path.glob("preview*"))


def test_the_last_checkpoints_and_the_best_are_kept(data, tmp_path, monkeypatch):
    losses = iter([5.0, 1.0, 4.0, 3.0, 2.0, 6.0])
    monkeypatch.setattr(Trainer, "held_out_losses", lambda *arguments: {"loss": next(losses)})
    fit = Fit(tmp_path, data, checkpoint_every=1, keep=2)
    assert fit.steps() == [2, 5, 6] and checkpoint.best(fit.run.checkpoints) == 2
    assert [line["loss"] for line in fit.metrics("held_out")] == [5.0, 1.0, 4.0, 3.0, 2.0, 6.0]


def test_stages_stay_whatever_comes_after_them_and_change_no_number(data, tmp_path, monkeypatch):
    losses = itertools.chain([5.0, 1.0, 4.0, 3.0, 2.0, 6.0, 7.0] * 2)
    monkeypatch.setattr(Trainer, "held_out_losses", lambda *arguments: {"loss": next(losses)})
    staged = Fit(tmp_path / "staged", data, steps=7, checkpoint_every=1, keep=1, keep_every=3)
    plain = Fit(tmp_path / "plain", data, steps=7, checkpoint_every=1, keep=1)
    assert staged.steps() == [2, 3, 6, 7] and plain.steps() == [2, 7]
    assert [staged.trainer.keeps(step, 1000) for step in range(1, 8)] == [n in (3, 6, 7) for n in range(1, 8)]
    assert_same(staged.state, plain.state)


def test_going_back_behind_a_damaged_checkpoint_keeps_what_is_written_then(data, tmp_path):
    """The damaged one is newer than all that follows; it must neither stop the run nor push new ones out."""
    Fit(tmp_path, data, steps=6, checkpoint_every=2, keep=3)
    (tmp_path / "checkpoints" / "6" / "manifest.json").write_text("{")
    resume = checkpoint.last_whole(tmp_path / "checkpoints")
    assert resume.name == "4"
    whole = Fit(tmp_path / "whole", data, steps=6, checkpoint_every=1, keep=1)
    again = Fit(tmp_path, data, steps=6, checkpoint_every=1, keep=1, resume=resume)
    assert 6 in again.steps() and checkpoint.verify(again.run.checkpoints / "6") is None
    assert_same(again.state, whole.state)


def test_a_checkpoint_written_after_going_back_is_not_deleted_at_once(data, tmp_path, monkeypatch):
    losses = itertools.count(1.0)
    monkeypatch.setattr(Trainer, "held_out_losses", lambda *arguments: {"loss": next(losses)})
    Fit(tmp_path, data, steps=6, checkpoint_every=2, keep=3)
    (tmp_path / "checkpoints" / "6" / "model.safetensors").write_bytes(b"damaged")
    stop_at(monkeypatch, 5)
    with pytest.raises(Interrupted):
        Fit(tmp_path, data, steps=9, keep=1, resume=tmp_path / "checkpoints" / "4")
    assert checkpoint.last_whole(tmp_path / "checkpoints").name == "5"


def test_the_progress_bar_counts_down_to_the_budget_that_ends_first(capsys):
    for limit, expected in ((None, " 10%  step 10  loss 0.5000  16 images/s  ETA 7:30"), (60, " 83%"), (500, " 10%")):
        with ProgressBar(0, 0.0, 80, "images", limit=limit) as bar:
            bar.show(10, 0.5, 50.0, 0.1)
        assert capsys.readouterr().err.strip("\n").startswith(expected)


def test_the_progress_bar_says_where_it_is(data, tmp_path, capsys):
    fit = Fit(tmp_path, data)
    loss = fit.metrics("train")[-1]["loss"]
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith(f"100%  step 6  loss {loss:.4f}") and "images/s" in line and line.endswith("ETA 0:00")


# ---------------------------------------------------------------------------------------------- signals


def test_the_first_signal_is_noted_and_the_second_has_its_usual_effect():
    def handler(signum, frame):
        raise RuntimeError("the usual effect")

    before = signal.signal(signal.SIGTERM, handler)
    of_shell = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored, where tests run in the background
    try:
        with signals() as received:
            signal.raise_signal(signal.SIGTERM)
            assert received == [signal.SIGTERM]
            with pytest.raises(RuntimeError, match="the usual effect"):
                signal.raise_signal(signal.SIGTERM)
        assert signal.getsignal(signal.SIGTERM) is handler
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGTERM, before)
        signal.signal(signal.SIGINT, of_shell)


def test_notice_by_sigusr2_is_taken_only_where_somebody_waits_for_it(data, tmp_path, monkeypatch):
    """As submitit does on a cluster, to start the job anew; without it the signal has its usual effect, which kills."""
    assert signal.getsignal(signal.SIGUSR2) is signal.SIG_DFL
    with signals():
        assert signal.getsignal(signal.SIGUSR2) is signal.SIG_DFL
    before = signal.signal(signal.SIGUSR2, lambda signum, frame: pytest.fail("before the checkpoint was written"))
    try:
        stop_at(monkeypatch, 2, signal.SIGUSR2)
        with pytest.raises(Interrupted, match="SIGUSR2"):
            Fit(tmp_path, data)
    finally:
        signal.signal(signal.SIGUSR2, before)
    assert checkpoint.last_whole(tmp_path / "checkpoints").name == "2"


def test_outside_the_main_thread_there_are_no_signals_to_collect(data, tmp_path):
    ended = []
    thread = threading.Thread(target=lambda: ended.append(Fit(tmp_path, data, steps=2).ended))
    thread.start()
    thread.join()
    assert ended == ["steps"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_gpu_repeats_itself_and_resumes(precision, digits, tmp_path, monkeypatch):
    def fit(name: str, resume: Path | None = None) -> list[float]:
        model = unet(seed=1 if resume else 0, dropout=0.1).to("cuda")
        optimizer = functools.partial(torch.optim.AdamW, lr=2e-3, fused=True)
        trainer = Trainer(**options(precision=precision, previews=2))
        task = Diffusion(model, GaussianDiffusion(cosine(T)))
        arguments = (Run(tmp_path / name), task, some(digits, flip=True), optimizer)
        (tmp_path / name).mkdir(exist_ok=True)
        trainer.fit(*arguments, seed=0, device=torch.device("cuda"), resume=resume)
        return [line["loss"] for line in read_metrics(tmp_path / name) if line["split"] == "train"]

    whole = fit("whole")
    stop_at(monkeypatch, 3)
    with pytest.raises(Interrupted):
        fit("parts")
    assert fit("parts", checkpoint.last_whole(tmp_path / "parts" / "checkpoints")) == pytest.approx(whole, rel=1e-3)
