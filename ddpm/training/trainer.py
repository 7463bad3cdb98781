"""The training loop."""

import contextlib
import math
from collections.abc import Callable, Generator, Sequence
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ddpm.checks import check_one_of, check_whole
from ddpm.data.augment import Augment
from ddpm.data.dataset import Dataset, spread
from ddpm.data.non_leaking import NonLeaking
from ddpm.randomness import Keyed
from ddpm.runs import checkpoint
from ddpm.runs.directory import Run, Stopwatch
from ddpm.runs.precision import PRECISIONS
from ddpm.times import TIME_SAMPLINGS
from ddpm.training.graph import Graph
from ddpm.training.interrupt import Interrupted, signals
from ddpm.training.nonfinite import write_autopsy
from ddpm.training.ranks import Ranks
from ddpm.training.record import Record
from ddpm.training.step import Taken, Training
from ddpm.training.task import Losses, Optimizer, Task, checksum

LR_SCHEDULES = ("constant", "cosine", "linear", "triangular")
LARGEST_BATCH, MOST = 10**6, 10**12  # of images; of steps, epochs and seconds: beyond are slips of the keyboard
MOST_SNAPSHOTS = 256  # more take longer to combine than they are worth
HELD_OUT = 512  # the most samples measured at each checkpoint
COUPLED = 64  # of them at a time, where the loss couples the batch


class Begun(NamedTuple):
    """A run that is ready to take its next step."""

    run: Run
    training: Training
    record: Record | None  # of the process that writes
    step: int  # the last step taken
    clock: Stopwatch
    seconds: float  # used so far, agreed on by all processes


Loop = Generator[tuple[int, float], Taken, tuple[str, Task]]


class Trainer:
    """The training loop and its settings: budget, batch, learning rate, precision, averaging, cadence.

    Args:
        steps, epochs, seconds: the budget; at least one. The first that is reached ends the run, after one step at
            least. The learning rate follows the steps (or epochs) where they are given, else the time used; with a time
            budget alone two runs are not comparable step by step.
        batch_size: images in a step, over all micro-batches.
        accumulate: micro-batches that a step is cut into, to save memory; the result is that of one batch but for
            rounding.
        precision: "fp32", "bf16", "fp16" (with loss scaling), or "auto": bf16 where the device computes in it, on a CPU
            for networks of a million parameters or more, of half a million where it has AMX; else fp32.
        lr_schedule: "constant"; "cosine" or "linear", from the optimizer's rate to zero; "triangular", from zero to the
            rate and back (Smith, arXiv 1506.01186).
        lr_cycles: how often that is repeated in the budget; more than 1 are warm restarts (SGDR, arXiv 1608.03983).
        warmup, warmup_epochs: steps, or epochs, over which the rate rises from zero; at most one of the two.
        clip: bound of the gradient's norm; null for none.
        time_sampling, offset_noise: for `ddpm.training.tasks.diffusion.Diffusion`, to which a config passes them
            from here; the loop does not use them.
        ema_decay, ema_warmup: of the averaged weights, see `ddpm.training.ema.EMA`.
        log_every: steps between two lines of metrics.
        checkpoint_every: steps between two checkpoints; one is always written at the end.
        keep: how many of the last checkpoints to keep, besides the best.
        keep_every: steps between two checkpoints that are kept permanently: a multiple of
            checkpoint_every; null for none.
        max_skipped: a step whose loss or gradient is not finite is skipped and counted; more than that in a row end
            the run.
        previews: how often in the run a preview is sampled from the same noise, besides once before the first step.
        ema_snapshots: how often in the run the tracked averages are saved, evenly spread, from which an average of any
            length is computed afterwards (`weights=ema:WIDTH`), see `ddpm.training.post_hoc`; 0 tracks none. 32 suffice
            for widths from 0.02 to 0.25.
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
        lr_cycles: int = 1,
        keep_every: int | None = None,
        ema_snapshots: int = 0,
    ):
        if steps is None and epochs is None and seconds is None:
            raise ValueError("no budget: set trainer.steps, trainer.epochs or trainer.seconds")
        check_whole("batch_size", batch_size, 1, LARGEST_BATCH)
        check_whole("accumulate", accumulate, 1, MOST)
        check_whole("warmup", warmup, 0, MOST)
        check_whole("log_every", log_every, 1, MOST)
        check_whole("checkpoint_every", checkpoint_every, 1, MOST)
        check_whole("keep", keep, 1, MOST)
        check_whole("keep_every", checkpoint_every if keep_every is None else keep_every, 1, MOST)
        check_whole("previews", previews, 0, MOST)
        check_whole("ema_snapshots", ema_snapshots, 0, MOST_SNAPSHOTS)
        check_whole("max_skipped", max_skipped, 0, MOST)
        check_whole("lr_cycles", lr_cycles, 1, MOST)
        check_whole("steps", 1 if steps is None else steps, 1, MOST)
        _must_be_positive("epochs", epochs, MOST)
        _must_be_positive("seconds", seconds, MOST)
        _must_be_positive("clip", clip, math.inf)
        _must_be_positive("warmup_epochs", warmup_epochs, MOST)
        if warmup and warmup_epochs:
            raise ValueError(f"warmup = {warmup} and warmup_epochs = {warmup_epochs:g} exclude each other")
        if batch_size % accumulate:
            near = [n for n in range(1, batch_size + 1) if batch_size % n == 0]
            raise ValueError(
                f"accumulate = {accumulate} does not divide batch_size = {batch_size}; nearest that does: "
                f"{min(near, key=lambda n: abs(n - accumulate))}"
            )
        if keep_every is not None and keep_every % checkpoint_every:
            below = keep_every // checkpoint_every * checkpoint_every
            near = [n for n in (below, below + checkpoint_every) if n > 0]
            raise ValueError(
                f"keep_every = {keep_every} is no multiple of checkpoint_every = {checkpoint_every}; nearest that are: "
                f"{', '.join(map(str, near))}"
            )
        check_one_of("precision", precision, ("auto", *PRECISIONS))
        check_one_of("lr_schedule", lr_schedule, LR_SCHEDULES)
        if lr_cycles > 1 and lr_schedule == "constant":
            raise ValueError(f"lr_cycles = {lr_cycles}: a constant rate has no cycles to restart")
        check_one_of("time_sampling", time_sampling, TIME_SAMPLINGS)
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
        self.max_skipped, self.lr_cycles = max_skipped, lr_cycles
        self.keep_every, self.ema_snapshots = keep_every, ema_snapshots

    def fit(
        self,
        run: Run,
        task: Task,
        data: Dataset,
        optimizer: Optimizer,
        *,
        seed: int,
        device: torch.device,
        augment: Augment | NonLeaking | None = None,
        resume: Path | None = None,
        ranks: Ranks | None = None,
        graph: Graph | None = None,
        watch: Callable[[int, float | None], None] | None = None,
    ) -> tuple[str, Task]:
        """Train, from the start or from a checkpoint, until the budget is used.

        Args:
            run: the run directory, locked by the caller.
            task: the networks and their losses.
            optimizer: makes an optimizer of parameters.
            seed: all randomness is keyed by it, and by the step.
            augment: augmentation of training samples, never of held-out ones; None for none.
            resume: a checkpoint, of this run or of the one that it extends.
            ranks: the processes that share every batch; None for this one alone. The first of them writes.
            graph: replays the gradients of a step; where impossible, the reason is reported and steps are eager.
            watch: called with the step and the loss on held-out data whenever these have been measured and saved; an
                exception that it raises ends training.
        Returns:
            the budget that ended the run ("steps", "epochs" or "seconds"), and the task with averaged weights.
        Raises:
            Interrupted: by a signal, after a checkpoint was written.
            FloatingPointError: too many steps in a row whose loss or gradient is not finite, or fp16's loss scale has
                collapsed; the evidence is in the run's folder `autopsy`.
            ValueError: a checkpoint that was trained with other frozen modules.
        """
        begun = self.begin(
            run, task, data, optimizer, seed=seed, device=device, augment=augment, resume=resume, ranks=ranks,
            graph=graph, watch=watch,
        )  # fmt: skip
        with signals() as received, contextlib.closing(self.loop(begun, received)) as loop:
            try:
                step, fraction = next(loop)
                while True:
                    step, fraction = loop.send(begun.training.step(step, fraction))
            except StopIteration as end:
                ended: tuple[str, Task] = end.value
                return ended

    def begin(
        self,
        run: Run,
        task: Task,
        data: Dataset,
        optimizer: Optimizer,
        *,
        seed: int,
        device: torch.device,
        augment: Augment | NonLeaking | None = None,
        resume: Path | None = None,
        ranks: Ranks | None = None,
        graph: Graph | None = None,
        watch: Callable[[int, float | None], None] | None = None,
        shown: bool = True,
    ) -> "Begun":
        """Prepare a run for its first step, as `fit` does; arguments and errors as there.

        Args:
            shown: whether the progress bar is displayed.
        """
        ranks = ranks or Ranks()
        frozen = {name: checksum(module) for name, module in task.frozen.items()}
        state: dict[str, Any] = {"step": 0, "seconds": 0.0}
        if resume:
            checkpoint.must_be_frozen(resume, frozen)
            state = checkpoint.load_state(resume)
        training = Training(
            self, task, data.to(device), optimizer, seed=seed, device=device, augment=augment, ranks=ranks,
            precision=state.get("precision") if self.precision == "auto" else None, graph=graph,
        )  # fmt: skip
        if resume:
            _load(training, resume, state)

        step: int = state["step"]
        clock = Stopwatch(state["seconds"])
        (seconds,) = ranks.largest(clock.seconds)  # with its own time, each rank would learn at its own rate
        record = None
        if ranks.leads:
            fraction = self._fraction(self._budget(len(data.train)), step, seconds)
            record = Record(
                run, training, frozen, step, clock, fraction, batch_size=self.batch_size, previews=self.previews,
                keep=self.keep, keep_every=self.keep_every, ema_snapshots=self.ema_snapshots, resumed=resume,
                held_out=lambda: self._held_out_losses(training), watch=watch, shown=shown,
                limit=self.seconds,
            )  # fmt: skip
        return Begun(run, training, record, step, clock, seconds)

    def loop(self, begun: "Begun", received: Sequence[int]) -> "Loop":
        """Run the training loop around steps that the caller takes, for one run or for several in lockstep.

        Args:
            begun: the run, as returned by `begin`.
            received: the signals received so far, see `ddpm.training.interrupt.signals`.
        Yields: the step to take, from 1, and the share of the budget that is used before it; its `Taken` is sent back.
        Returns, raises: as `fit`.
        """
        run, training, record, step, clock, seconds = begun
        ranks, images = training.ranks, len(training.data.train)
        budget = self._budget(images)
        warmup = self.warmup or self._steps(self.warmup_epochs or 0, images)
        fraction, ended = self._fraction(budget, step, seconds), self._ended(budget, step, seconds)

        with record or contextlib.nullcontext():
            if record:
                record.preview(step, fraction)  # of the untrained network, at the start
            while ended is None:
                step += 1
                training.scale_lr(self.lr_factor(step, fraction, warmup))
                taken = yield step, fraction

                seconds, signum = ranks.largest(clock.seconds, max(received, default=0))
                fraction, ended = self._fraction(budget, step, seconds), self._ended(budget, step, seconds)
                logging = step % self.log_every == 0 or ended is not None
                due = step % self.checkpoint_every == 0 or ended is not None
                saving = due or signum > 0  # at a signal without measuring: sooner, without an extra line of metrics
                if record and logging:
                    record.trained(step, seconds, fraction, taken)
                if logging or saving or step % (self.max_skipped + 1) == 0:
                    self._must_be_sound(training, run if record else None, last=ended is not None)
                if record:
                    record.preview(step, fraction)
                    record.snapshot(step, fraction)
                if record and saving:
                    record.save(step, measuring=due)
                if signum:
                    raise Interrupted(int(signum))
            (signum,) = ranks.largest(max(received, default=0))  # while the last pictures were drawn, say
            if signum:
                raise Interrupted(int(signum))
        if record:
            run.write_status("RUNNING", step=step, seconds=round(clock.seconds, 2))
        return ended, training.averaged

    def _must_be_sound(self, training: Training, run: Run | None, last: bool) -> None:
        """Raise FloatingPointError if the numbers are not sound, after an autopsy where this rank has the run."""
        try:
            training.must_be_sound(last)
        except FloatingPointError as error:
            if run is not None:
                steps = training.report()
                for row in steps:
                    row["images"] = training.data.order(training.seed, row["step"], self.batch_size).tolist()
                last_checkpoint = checkpoint.last_whole(run.checkpoints)
                write_autopsy(run.path / "autopsy", str(error), training.seed, steps, last_checkpoint)
            raise

    def _held_out_losses(self, training: Training) -> dict[str, float | None] | None:
        """Return the held-out losses of the averaged weights, in the precision of training."""
        with training.autocast:
            return self.held_out_losses(training.averaged, training.data, training.device)

    @torch.no_grad()
    def held_out_losses(self, task: Task, data: Dataset, device: torch.device) -> dict[str, float | None] | None:
        """Return the mean loss on held-out data with frozen draws, as "loss", and its parts if there are several.

        Of more than `HELD_OUT` held-out samples, that many are measured, evenly spread, and "n" is their number, as
        losses of different samples are not comparable. None if nothing is held out.
        """
        there = len(data.held_out)
        if there == 0:
            return None
        n, size = min(HELD_OUT, there), self.batch_size // self.accumulate
        if task.couples_batch:  # whose loss depends on the other rows: a fixed size, whatever the run's batch
            size = min(COUPLED, n)
            n -= n % size
        chosen = data.held_out[spread(there, n)]
        drawn = task.draw_held_out(data.batch(chosen, device), Keyed(0, device=device))
        totals, parts = torch.zeros((), device=device), list[Losses]()
        for part in torch.arange(n, device=device).split(size):
            losses = task.held_out(drawn.rows(itemgetter(part)))
            totals += task.total(losses).sum()
            parts.append(losses)
        means: dict[str, float | None] = {"loss": totals.item() / n}
        if n < there:
            means["n"] = n
        if len(parts[0]) > 1:
            means |= {f"loss_{name}": torch.cat([each[name] for each in parts]).mean().item() for name in parts[0]}
        return means

    def lr_factor(self, step: int, fraction: float, warmup: int) -> float:
        """Return the factor of the learning rate at a step.

        Args:
            step: counts from 1.
            fraction: of the budget that was used before the step, 0..1.
            warmup: steps over which the rate rises from zero.
        """
        rise = min(1.0, step / warmup) if warmup else 1.0
        done = fraction * self.lr_cycles % 1 if fraction < 1 else 1.0  # of the cycle
        factor = {
            "constant": 1.0,
            "cosine": 0.5 * (1 + math.cos(math.pi * done)),
            "linear": 1 - done,
            "triangular": 1 - abs(1 - 2 * done),
        }
        return rise * factor[self.lr_schedule]

    def _budget(self, images: int) -> dict[str, int]:
        """Return the budgets in steps, for a number of training images."""
        epochs = None if self.epochs is None else max(1, self._steps(self.epochs, images))
        return {name: n for name, n in {"steps": self.steps, "epochs": epochs}.items() if n is not None}

    def _steps(self, epochs: float, images: int) -> int:
        """Return the number of steps in `epochs` passes over `images` images."""
        return math.ceil(epochs * images / self.batch_size)

    def _fraction(self, budget: dict[str, int], step: int, seconds: float) -> float:
        """Return the share of the budget that is used, 0..1."""
        if budget:
            return min(1.0, max(step / n for n in budget.values()))
        assert self.seconds is not None  # as there is a budget
        return min(1.0, seconds / self.seconds)

    def last_step(self, images: int) -> int | None:
        """Return the step that ends training on so many images, unless time does before; None where only time can."""
        return min(self._budget(images).values(), default=None)

    def keeps(self, step: int, images: int) -> bool | None:
        """Return whether a step's checkpoint will exist at the end, best or not; None where time may end training."""
        last = self.last_step(images)
        if last is None or self.seconds is not None:
            return None
        number, newest = step // self.checkpoint_every, (last - 1) // self.checkpoint_every
        regular = 0 < step < last and step % self.checkpoint_every == 0
        staged = self.keep_every is not None and step % self.keep_every == 0
        return step == last or (regular and (staged or number > newest - self.keep + 1))

    def is_used_up(self, images: int, step: int, seconds: float) -> bool:
        """Return whether the budget is used up after these steps and seconds, given the number of training images."""
        return self._ended(self._budget(images), step, seconds) is not None

    def _ended(self, budget: dict[str, int], step: int, seconds: float) -> str | None:
        """Return the name of the budget that is used up, or None."""
        for name, n in budget.items():
            if step >= n:
                return name
        return "seconds" if self.seconds is not None and step > 0 and seconds >= self.seconds else None


def _load(training: Training, resume: Path, state: dict[str, Any]) -> None:
    """Load a checkpoint: its modules, their averages, and the training state."""
    there = checkpoint.modules_of(resume)
    if sorted(there) != sorted(training.task.modules):
        own = ", ".join(training.task.modules)
        raise ValueError(
            f"{resume} has the modules {', '.join(there)}, but {type(training.task).__name__} trains {own}"
        )
    for name in training.task.modules:
        weights, average = checkpoint.files_of(name)
        checkpoint.load_into(training.task.modules[name], resume / weights)
        checkpoint.load_into(training.averaged.modules[name], resume / average)
    training.load_state_dict(state)


def _must_be_positive(name: str, value: float | None, most: float) -> None:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if value is not None and not (number and 0 < value < math.inf):
        raise ValueError(f"{name} = {value!r} must be a number > 0, or null")
    if value is not None and value > most:
        raise ValueError(f"{name} = {value!r} must be at most {most:,}, or null")
