"""The training loop."""

import contextlib
import math
import signal
import sys
from collections.abc import Callable, Iterator
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ddpm.data.augment import Augment
from ddpm.data.dataset import Dataset
from ddpm.figures.images import as_pictures
from ddpm.randomness import Keyed
from ddpm.runs import checkpoint
from ddpm.runs.directory import Metrics, Run, Stopwatch
from ddpm.runs.files import replacing
from ddpm.runs.precision import PRECISIONS
from ddpm.times import TIME_SAMPLINGS
from ddpm.training.nonfinite import write_autopsy
from ddpm.training.ranks import Ranks
from ddpm.training.step import Training
from ddpm.training.task import Losses, Optimizer, Task, checksum

LR_SCHEDULES = ("constant", "cosine", "linear")
LARGEST_BATCH, MOST = 10**6, 10**12  # of images; of steps, epochs and seconds: beyond are slips of the keyboard
HELD_OUT = 512  # samples: at most so many are measured at each checkpoint
PREVIEWED, MANY_POINTS = 8, 1000  # samples of a preview; points are one picture together
PREVIEW_ROWS = 12  # of the strip at most, evenly chosen: more are not read, and a long run's picture would grow


class Interrupted(Exception):
    """A signal ended training after a checkpoint was written, or what follows training."""

    def __init__(self, signum: int):
        super().__init__(f"interrupted by {signal.Signals(signum).name}")
        self.signum = signum


class Trainer:
    """How a task is trained: budget, batch, learning rate, precision, averaging, cadence.

    Args:
        steps, epochs, seconds: the budget; at least one. The first that is reached ends the run, after one step at
            least. The learning rate follows the steps (or epochs) where they are given, else the time used; with a time
            budget alone two runs are not comparable step by step.
        batch_size: images in a step, over all micro-batches.
        accumulate: micro-batches that a step is cut into, to save memory; the result is that of one batch but for
            rounding.
        precision: "fp32", "bf16", "fp16" (with loss scaling), or "auto": bf16 where the device computes in it, on a CPU
            for networks of a million parameters or more; else fp32.
        lr_schedule: "constant", "cosine" or "linear", from the optimizer's rate to zero at the end of the budget.
        warmup, warmup_epochs: steps, or epochs, over which the rate rises from zero; at most one of the two.
        clip: bound of the gradient's norm; null for none.
        time_sampling, offset_noise: for `ddpm.training.tasks.diffusion.Diffusion`, which a configuration gives them
            from here; the loop has no use for them.
        ema_decay, ema_warmup: of the averaged weights, see `ddpm.training.ema.EMA`.
        log_every: steps between two lines of metrics.
        checkpoint_every: steps between two checkpoints; one is always written at the end.
        keep: how many of the last checkpoints are kept, besides the best.
        max_skipped: a step whose loss or gradient is not finite is skipped and counted; more than so many in a row end
            the run.
        previews: how often in the run the same noise is turned into images.
    Raises:
        ValueError: an argument out of range.
    """

    def __init__(
        self,
        steps: int | None = None,
        epochs: float | None = None,
        seconds: float | None = None,
        batch_size: int = 128,
        accumulate: int = 1,
        precision: str = "auto",
        lr_schedule: str = "cosine",
        warmup: int = 0,
        warmup_epochs: float | None = None,
        clip: float | None = 1.0,
        time_sampling: str = "uniform",
        offset_noise: float = 0.0,
        ema_decay: float = 0.9999,
        ema_warmup: float = 9.0,
        log_every: int = 20,
        checkpoint_every: int = 1000,
        keep: int = 2,
        previews: int = 6,
        max_skipped: int = 10,
    ):
        budget = {"steps": steps, "epochs": epochs, "seconds": seconds}
        if all(value is None for value in budget.values()):
            raise ValueError("no budget: set trainer.steps, trainer.epochs or trainer.seconds")
        at_least: dict[str, tuple[int, int]] = {
            "batch_size": (batch_size, 1),
            "accumulate": (accumulate, 1),
            "warmup": (warmup, 0),
            "log_every": (log_every, 1),
            "checkpoint_every": (checkpoint_every, 1),
            "keep": (keep, 1),
            "previews": (previews, 0),
            "max_skipped": (max_skipped, 0),
            "steps": (steps if steps is not None else 1, 1),
        }
        for name, (count, least) in at_least.items():
            most = LARGEST_BATCH if name == "batch_size" else MOST
            if isinstance(count, bool) or not isinstance(count, int) or count < least:
                raise ValueError(f"{name} = {count!r} must be an integer >= {least}")
            if count > most:
                raise ValueError(f"{name} = {count} must be at most {most:,}")
        for name, value in {"epochs": epochs, "seconds": seconds, "clip": clip, "warmup_epochs": warmup_epochs}.items():
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if value is not None and not (number and 0 < value < math.inf):
                raise ValueError(f"{name} = {value!r} must be a number > 0, or null")
            if value is not None and value > MOST and name != "clip":
                raise ValueError(f"{name} = {value!r} must be at most {MOST:,}, or null")
        if warmup and warmup_epochs:
            raise ValueError(f"warmup = {warmup} and warmup_epochs = {warmup_epochs:g} exclude each other")
        if batch_size % accumulate:
            near = [n for n in range(1, batch_size + 1) if batch_size % n == 0]
            raise ValueError(
                f"accumulate = {accumulate} does not divide batch_size = {batch_size}; nearest that does: "
                f"{min(near, key=lambda n: abs(n - accumulate))}"
            )
        if precision not in ("auto", *PRECISIONS):
            raise ValueError(f"precision = {precision!r} is not known; allowed: auto, {', '.join(PRECISIONS)}")
        if lr_schedule not in LR_SCHEDULES:
            raise ValueError(f"lr_schedule = {lr_schedule!r} is not known; allowed: {', '.join(LR_SCHEDULES)}")
        if time_sampling not in TIME_SAMPLINGS:
            raise ValueError(f"time_sampling = {time_sampling!r} is not known; allowed: {', '.join(TIME_SAMPLINGS)}")
        if not 0 <= offset_noise < math.inf:
            raise ValueError(f"offset_noise = {offset_noise:g} must be >= 0")
        if not 0 <= ema_decay < 1 or not 0 <= ema_warmup < math.inf:
            raise ValueError(f"ema_decay = {ema_decay:g} must lie in [0, 1) and ema_warmup = {ema_warmup:g} be >= 0")
        self.steps, self.epochs, self.seconds = steps, epochs, seconds
        self.batch_size, self.accumulate, self.precision = batch_size, accumulate, precision
        self.lr_schedule, self.warmup, self.warmup_epochs, self.clip = lr_schedule, warmup, warmup_epochs, clip
        self.time_sampling, self.offset_noise = time_sampling, offset_noise
        self.ema_decay, self.ema_warmup = ema_decay, ema_warmup
        self.log_every, self.checkpoint_every, self.keep, self.previews = log_every, checkpoint_every, keep, previews
        self.max_skipped = max_skipped

    def fit(
        self,
        run: Run,
        task: Task,
        data: Dataset,
        optimizer: Optimizer,
        *,
        seed: int,
        device: torch.device,
        augment: Augment | None = None,
        resume: Path | None = None,
        ranks: Ranks | None = None,
        watch: Callable[[int, float | None], None] | None = None,
    ) -> tuple[str, Task]:
        """Train, from the start or from a checkpoint, until the budget is used.

        Args:
            run: the run directory, locked by the caller.
            task: what is trained, and by which losses.
            optimizer: makes an optimizer of parameters.
            seed: all randomness is keyed by it, and by the step.
            augment: changes the samples that are trained on, and none that are held out; None for as they are.
            resume: a checkpoint, of this run or of the one that it extends.
            ranks: the processes that share every batch; None for this one alone. The first of them writes.
            watch: is told the step and the loss on held-out data whenever it has been measured and saved; what it
                raises ends training.
        Returns:
            what ended the run ("steps", "epochs" or "seconds"), and the task with averaged weights.
        Raises:
            Interrupted: by a signal, after a checkpoint was written.
            FloatingPointError: too many steps in a row whose loss or gradient is not finite, or fp16's loss scale has
                collapsed; the evidence is in the run's folder `autopsy`.
            ValueError: a checkpoint that was trained beside other frozen modules.
        """
        ranks = ranks or Ranks()
        frozen = {name: checksum(module) for name, module in task.frozen.items()}
        if resume:
            checkpoint.must_be_frozen(resume, frozen)
        state: dict[str, Any] = checkpoint.load_state(resume) if resume else {"step": 0, "seconds": 0.0}
        training = Training(
            self, task, data.to(device), optimizer, seed=seed, device=device, augment=augment, ranks=ranks,
            precision=state.get("precision") if self.precision == "auto" else None,
        )  # fmt: skip
        averaged = training.averaged
        if resume:
            for name in task.modules:
                weights, average = checkpoint.files_of(name)
                checkpoint.load_into(task.modules[name], resume / weights)
                checkpoint.load_into(averaged.modules[name], resume / average)
            training.load_state_dict(state)

        step: int = state["step"]
        clock = Stopwatch(state["seconds"])
        budget = self._budget(len(data.train))
        warmup = self.warmup or self._steps(self.warmup_epochs or 0, len(data.train))
        (seconds,) = ranks.largest(clock.seconds)  # a rank that reads another time would learn at another rate
        fraction, ended = self._fraction(budget, step, seconds), self._ended(budget, step, seconds)
        previews = Previews(run.path, data, seed, training.precision, self.previews, step, fraction)
        diary = None
        if ranks.leads:
            checkpoint.drop_after(run.checkpoints, step)
            diary = Diary(run, step, clock.seconds, self.batch_size, training.skipped, data.units)
            run.write_status("RUNNING", precision=training.precision, device=str(device))

        def save(diary: Diary, measuring: bool) -> None:
            held_out = None
            if measuring:
                with training.autocast:
                    losses = self.held_out_losses(averaged, data, device)
                held_out = None if losses is None else losses["loss"]
                diary.measured(step, clock.seconds, losses or {"loss": None})
            diary.flush()
            state = {"step": step, "seconds": clock.seconds} | training.state_dict()
            checkpoint.save(run.checkpoints, step, task.modules, averaged.modules, state, held_out, frozen)
            checkpoint.rotate(run.checkpoints, self.keep)
            run.write_status("RUNNING", step=step, seconds=round(clock.seconds, 2))
            if watch is not None and measuring:
                watch(step, held_out)

        with signals() as received, diary or contextlib.nullcontext():
            while ended is None:
                step += 1
                training.scale_lr(self.lr_factor(step, fraction, warmup))
                taken = training.step(step, fraction)

                seconds, signum = ranks.largest(clock.seconds, max(received, default=0))
                fraction, ended = self._fraction(budget, step, seconds), self._ended(budget, step, seconds)
                logging = step % self.log_every == 0 or ended is not None
                due = step % self.checkpoint_every == 0 or ended is not None
                saving = due or signum > 0  # at a signal unmeasured: soon, and without a line that no other run has
                if diary and logging:
                    told = {"loss": taken.loss.item(), "grad_norm": taken.grad_norm.item(), "lr": training.lr}
                    parts = {f"loss_{name}": part.item() for name, part in taken.parts.items()}
                    diary.trained(step, seconds, fraction, training.skipped, told | parts)
                if logging or saving or step % (self.max_skipped + 1) == 0:
                    self._look(training, run if diary else None)
                if diary and previews.due(fraction):
                    previews.take(step, task, averaged)
                if diary and saving:
                    save(diary, due)
                if signum:
                    raise Interrupted(int(signum))
            (signum,) = ranks.largest(max(received, default=0))  # while the last pictures were drawn, say
            if signum:
                raise Interrupted(int(signum))
        if diary:
            run.write_status("RUNNING", step=step, seconds=round(clock.seconds, 2))
        return ended, averaged

    def _look(self, training: Training, run: Run | None) -> None:
        """Raise FloatingPointError if the numbers are not sound, after an autopsy where this rank has the run."""
        try:
            training.must_be_sound()
        except FloatingPointError as error:
            if run is not None:
                steps = training.report()
                for told in steps:
                    told["images"] = training.data.order(training.seed, told["step"], self.batch_size).tolist()
                last = checkpoint.last_whole(run.checkpoints)
                write_autopsy(run.path / "autopsy", str(error), training.seed, steps, last)
            raise

    @torch.no_grad()
    def held_out_losses(self, task: Task, data: Dataset, device: torch.device) -> dict[str, float | None] | None:
        """The mean loss on held-out data with frozen draws, as "loss", and its parts if there are several.

        None if nothing is held out.
        """
        chosen = data.held_out[:HELD_OUT]
        if len(chosen) == 0:
            return None
        drawn = task.draw_held_out(data.batch(chosen, device), Keyed(0, device=device))
        totals, parts = torch.zeros((), device=device), list[Losses]()
        for part in torch.arange(len(chosen), device=device).split(self.batch_size // self.accumulate):
            losses = task.held_out(drawn.rows(itemgetter(part)))
            totals += task.total(losses).sum()
            parts.append(losses)
        found: dict[str, float | None] = {"loss": totals.item() / len(chosen)}
        if len(parts[0]) > 1:
            found |= {f"loss_{name}": torch.cat([each[name] for each in parts]).mean().item() for name in parts[0]}
        return found

    def lr_factor(self, step: int, fraction: float, warmup: int) -> float:
        """What the learning rate of a step is multiplied by.

        Args:
            step: counts from 1.
            fraction: of the budget that was used before the step, 0..1.
            warmup: steps over which the rate rises from zero.
        """
        rise = min(1.0, step / warmup) if warmup else 1.0
        fall = {"constant": 1.0, "cosine": 0.5 * (1 + math.cos(math.pi * fraction)), "linear": 1 - fraction}
        return rise * fall[self.lr_schedule]

    def _budget(self, images: int) -> dict[str, int]:
        """The budgets that are counted in steps, for so many training images."""
        epochs = None if self.epochs is None else max(1, self._steps(self.epochs, images))
        return {name: n for name, n in {"steps": self.steps, "epochs": epochs}.items() if n is not None}

    def _steps(self, epochs: float, images: int) -> int:
        """Steps in so many passes over so many images."""
        return math.ceil(epochs * images / self.batch_size)

    def _fraction(self, budget: dict[str, int], step: int, seconds: float) -> float:
        """The share of the budget that is used, 0..1."""
        if budget:
            return min(1.0, max(step / n for n in budget.values()))
        assert self.seconds is not None  # for there is a budget
        return min(1.0, seconds / self.seconds)

    def last_step(self, images: int) -> int | None:
        """The step that ends training on so many images, unless time does before; None where only time can."""
        return min(self._budget(images).values(), default=None)

    def keeps(self, step: int, images: int) -> bool | None:
        """Whether a step's checkpoint is there in the end, best or not; None where time may end training."""
        last = self.last_step(images)
        if last is None or self.seconds is not None:
            return None
        number, newest = step // self.checkpoint_every, (last - 1) // self.checkpoint_every
        regular = 0 < step < last and step % self.checkpoint_every == 0
        return step == last or (regular and number > newest - self.keep + 1)

    def is_used_up(self, images: int, step: int, seconds: float) -> bool:
        """Whether nothing is left of the budget after so many steps and seconds, with so many training images."""
        return self._ended(self._budget(images), step, seconds) is not None

    def _ended(self, budget: dict[str, int], step: int, seconds: float) -> str | None:
        """The budget that is used up, if one is."""
        for name, n in budget.items():
            if step >= n:
                return name
        return "seconds" if self.seconds is not None and step > 0 and seconds >= self.seconds else None


class Previews:
    """The same noise turned into samples at intervals over training, by the raw weights and by the averaged ones.

    The rows are kept in previews.pt, so that a resumed run goes on with its strip.
    """

    def __init__(
        self, folder: Path, data: Dataset, seed: int, precision: str, previews: int, step: int, fraction: float
    ):
        self.folder, self.shape = folder, data.shape
        self.seed, self.precision = seed, precision
        self.previews, self.number = previews, int(fraction * previews)
        self.rows = [row for row in self._kept() if row[0] <= step]

    def _kept(self) -> list[tuple[int, Tensor, Tensor]]:
        """The rows of the processes before; none, with a message, if they cannot be read: that is worth no stop."""
        path = self.folder / "previews.pt"
        if not path.exists():
            return []
        try:
            rows = checkpoint.load_plain(path)
            if not all(isinstance(step, int) and raw.shape == ema.shape for step, raw, ema in rows):
                raise ValueError(f"{path} holds other than previews")
        except (ValueError, TypeError, AttributeError) as error:
            print(f"{path} cannot be read ({error}); the strip of previews begins anew")
            return []
        return list(rows)

    def due(self, fraction: float) -> bool:
        """Whether another 1 / previews of the budget has been used since the last call."""
        before, self.number = self.number, int(fraction * self.previews)
        return self.number > before

    def take(self, step: int, raw: Task, averaged: Task) -> None:
        """Sample from both, and draw preview.png; a task that draws nothing has none."""
        n = PREVIEWED if len(self.shape) == 3 else MANY_POINTS
        of_raw, of_averaged = (task.preview(n, self.shape, self.seed, self.precision) for task in (raw, averaged))
        if of_raw is None or of_averaged is None:
            return
        from ddpm.figures import plots  # and matplotlib with it, which the first step does not wait for

        self.rows.append((step, of_raw, of_averaged))
        with replacing(self.folder / "previews.pt") as temporary:
            torch.save(self.rows, temporary)
        shown = torch.linspace(0, len(self.rows) - 1, min(PREVIEW_ROWS, len(self.rows))).round().long().tolist()
        chosen = [(step, as_pictures(one), as_pictures(other)) for step, one, other in (self.rows[i] for i in shown)]
        plots.preview(self.folder / "preview.png", chosen)


class Diary:
    """What is told of the steps: metrics.jsonl, TensorBoard and a line of progress.

    Args:
        run: where it is kept.
        step, seconds: where the run stands.
        skipped: steps that were skipped so far.
        units: what the samples are called.
    """

    def __init__(self, run: Run, step: int, seconds: float, batch_size: int, skipped: int, units: str):
        self.metrics, self.bar = Metrics(run.path, step), ProgressBar(step, seconds, batch_size, units)
        self.batch_size, self.skipped = batch_size, skipped

    def __enter__(self) -> "Diary":
        self.bar.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self.bar.__exit__(*error)
        self.metrics.close()

    def trained(self, step: int, seconds: float, fraction: float, skipped: int, values: dict[str, float]) -> None:
        """A step of training, by its loss and other values, and how many were skipped up to it."""
        told = values | {"skipped": skipped}
        self.metrics.write(step, "train", images=step * self.batch_size, seconds=seconds, **told)
        self.bar.show(step, values["loss"], seconds, fraction)
        if skipped > self.skipped:
            self.bar.say(f"step {step:,}: {skipped} steps skipped so far, whose loss or gradient was not finite")
        self.skipped = skipped

    def measured(self, step: int, seconds: float, losses: dict[str, float | None]) -> None:
        """The loss on held-out data, and its parts if there are several."""
        self.metrics.write(step, "held_out", images=step * self.batch_size, seconds=seconds, **losses)

    def flush(self) -> None:
        """All lines are on disk, before a checkpoint says that they are."""
        self.metrics.flush()


class ProgressBar:
    """One line: step, loss, samples per second, time left. Without a terminal, such a line every ten seconds."""

    def __init__(self, step: int, seconds: float, batch_size: int, units: str):
        self.step, self.seconds, self.batch_size, self.units = step, seconds, batch_size, units
        self.terminal, self.printed = sys.stderr.isatty(), seconds

    def __enter__(self) -> "ProgressBar":
        self.bar = tqdm(
            total=1.0, bar_format="{percentage:3.0f}% |{bar:24}| {desc}", dynamic_ncols=True, disable=not self.terminal
        )
        return self

    def show(self, step: int, loss: float, seconds: float, fraction: float) -> None:
        """After a step: its loss, and what the time since the start says about speed and end."""
        speed = (step - self.step) * self.batch_size / max(seconds - self.seconds, 1e-9)
        left = int(seconds * (1 - fraction) / max(fraction, 1e-9))
        line = f"step {step:,}  loss {loss:.4f}  {speed:,.0f} {self.units}/s  ETA {left // 60}:{left % 60:02}"
        self.bar.set_description_str(line, refresh=False)
        self.bar.update(fraction - self.bar.n)
        if not self.terminal and (fraction == 1 or seconds - self.printed >= 10):
            self.printed = seconds
            print(f"{fraction:4.0%}  {line}", file=sys.stderr, flush=True)

    def say(self, message: str) -> None:
        """A line of its own above the bar."""
        self.bar.write(message, file=sys.stderr)

    def __exit__(self, *error: object) -> None:
        self.bar.close()


@contextlib.contextmanager
def terminable() -> Iterator[None]:
    """Within it SIGTERM raises Interrupted; outside the main thread, where Python cannot catch it, it does not."""

    def end(signum: int, frame: object) -> None:
        raise Interrupted(signum)

    try:
        before = signal.signal(signal.SIGTERM, end)
    except ValueError:
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def signals() -> Iterator[list[int]]:
    """Collects SIGINT, SIGTERM, and a SIGUSR2 that somebody waits for, instead of dying of the first.

    The second has its usual effect. A cluster's launcher gives notice by SIGUSR2 (submitit does, and starts the job
    anew); where it set no handler, that signal is left alone. Outside the main thread, where Python cannot catch any,
    nothing is collected.
    """
    received: list[int] = []

    def note(signum: int, frame: object) -> None:
        received.append(signum)
        signal.signal(signum, before[signum])
        print(f"\n{signal.Signals(signum).name}: writing a checkpoint; once more to stop at once", file=sys.stderr)

    before: dict[int, Any] = {}
    with contextlib.suppress(ValueError):
        for name in ("SIGINT", "SIGTERM", "SIGUSR2"):
            number = getattr(signal, name, None)  # Windows has no SIGUSR2
            if number is not None and (name != "SIGUSR2" or callable(signal.getsignal(number))):
                before[number] = signal.signal(number, note)
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
