"""The record of training, step by step: metrics, a line of progress, previews, checkpoints."""

import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from ddpm.data.dataset import Dataset
from ddpm.figures.images import as_pictures, plane_of
from ddpm.runs import checkpoint, snapshots
from ddpm.runs.directory import Metrics, Run, Stopwatch
from ddpm.runs.files import replacing
from ddpm.training.step import Taken, Training
from ddpm.training.task import Task

PREVIEWED, MANY_POINTS = 8, 1000  # samples of a preview; points are one picture together
PREVIEW_ROWS = 12  # of the strip at most, evenly chosen, so that a long run's picture does not grow


class Record:
    """The record of a run's training, written and displayed by the process that owns the run directory.

    Args:
        run: the run directory.
        training: the steps; `step`, `clock` and `fraction` are its progress.
        frozen: checksums of the modules that are not trained.
        batch_size, previews, keep, keep_every, ema_snapshots: see `ddpm.training.trainer.Trainer`.
        resumed: the checkpoint that training goes on from, of this run or of the one that it extends; None for none.
        held_out: measures the averaged weights on held-out data, see `Trainer.held_out_losses`.
        watch: see `Trainer.fit`.
        shown, limit: see `ProgressBar`.
    """

    def __init__(
        self,
        run: Run,
        training: Training,
        frozen: dict[str, str],
        step: int,
        clock: Stopwatch,
        fraction: float,
        *,
        batch_size: int,
        previews: int,
        keep: int,
        keep_every: int | None,
        ema_snapshots: int,
        resumed: Path | None,
        held_out: Callable[[], dict[str, float | None] | None],
        watch: Callable[[int, float | None], None] | None,
        shown: bool = True,
        limit: float | None = None,
    ):
        self.run, self.training, self.frozen, self.clock = run, training, frozen, clock
        self.batch_size, self.held_out, self.watch = batch_size, held_out, watch
        self.keep, self.keep_every = keep, keep_every
        self.skipped = training.skipped
        self.eager: str | None = None  # the last reported reason
        checkpoint.drop_after(run.checkpoints, step)
        self.averages, self.ema_snapshots = run.path / snapshots.FOLDER, ema_snapshots
        self.snapshots = int(fraction * ema_snapshots)  # taken so far
        snapshots.drop_after(self.averages, step)
        if resumed is not None and ema_snapshots:
            snapshots.inherit(self.averages, resumed.parent.parent / snapshots.FOLDER, step)
        self.previews = Previews(run.path, training.data, training.seed, training.precision, previews, step, fraction)
        self.metrics = Metrics(run.path, step)
        self.bar = ProgressBar(step, clock.seconds, batch_size, training.data.units, shown, limit)
        run.write_status("RUNNING", precision=training.precision, device=str(training.device))

    def __enter__(self) -> "Record":
        self.bar.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self.bar.__exit__(*error)
        self.metrics.close()

    def trained(self, step: int, seconds: float, fraction: float, taken: Taken) -> None:
        """Write a line of metrics, and of progress, for a step that was taken."""
        training = self.training
        values = {"loss": taken.loss.item(), "grad_norm": taken.grad_norm.item(), "lr": training.lr}
        values |= {f"loss_{name}": part.item() for name, part in taken.parts.items()}
        skipped = training.skipped
        self.metrics.write(step, "train", images=step * self.batch_size, seconds=seconds, **values, skipped=skipped)
        self.bar.show(step, values["loss"], seconds, fraction)
        if skipped > self.skipped:
            self.bar.say(f"step {step:,}: {skipped} steps skipped so far, whose loss or gradient was not finite")
        self.skipped = skipped
        if training.eager != self.eager:
            self.bar.say(f"steps are taken without a CUDA graph: {training.eager}")
        self.eager = training.eager

    def preview(self, step: int, fraction: float) -> None:
        """Draw a preview, if one is due."""
        if self.previews.due(fraction):
            self.previews.take(step, self.training.task, self.training.averaged)

    def snapshot(self, step: int, fraction: float) -> None:
        """Save the tracked averages, if another 1 / `ema_snapshots` of the budget has been used since the last time."""
        before, self.snapshots = self.snapshots, int(fraction * self.ema_snapshots)
        if self.training.tracked and self.snapshots > before:
            snapshots.save(self.averages, step, self.training.tracked.state_dict())

    def save(self, step: int, measuring: bool) -> None:
        """Write a checkpoint; `measuring` computes the loss on held-out data first."""
        loss = n = None
        if measuring:
            losses = self.held_out() or {"loss": None}
            loss, n = losses["loss"], losses.get("n")
            self.metrics.write(step, "held_out", images=step * self.batch_size, seconds=self.clock.seconds, **losses)
        self.metrics.flush()  # all lines are on disk before the checkpoint that implies them
        state = {"step": step, "seconds": self.clock.seconds} | self.training.state_dict()
        task, averaged = self.training.task, self.training.averaged
        checkpoint.save(self.run.checkpoints, step, task.modules, averaged.modules, state, loss, self.frozen, n)
        checkpoint.rotate(self.run.checkpoints, self.keep, self.keep_every)
        self.run.write_status("RUNNING", step=step, seconds=round(self.clock.seconds, 2))
        if self.watch is not None and measuring:
            self.watch(step, loss)


class Previews:
    """Samples from fixed noise at intervals over training, by the raw weights and by the averaged ones.

    The rows are stored in previews.pt, so that a resumed run goes on with its strip.
    """

    def __init__(
        self, folder: Path, data: Dataset, seed: int, precision: str, previews: int, step: int, fraction: float
    ):
        self.folder, self.data = folder, data
        self.seed, self.precision = seed, precision
        self.previews, self.number = previews, int(fraction * previews) if step > 0 or not previews else -1
        self.rows = [row for row in self._stored() if row[0] <= step] if step > 0 else []

    def _stored(self) -> list[tuple[int, Tensor, Tensor]]:
        """Return the rows stored by earlier processes; none, with a message, if they cannot be read."""
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
        """Return whether another 1 / previews of the budget has been used since the last call; true first."""
        before, self.number = self.number, int(fraction * self.previews)
        return self.number > before

    def take(self, step: int, raw: Task, averaged: Task) -> None:
        """Sample with both weights, and draw preview.png; nothing for a task without samples."""
        n = PREVIEWED if len(self.data.original.shape) == 3 else MANY_POINTS
        of_raw, of_averaged = (task.preview(n, self.data, self.seed, self.precision) for task in (raw, averaged))
        if of_raw is None or of_averaged is None:
            return
        from ddpm.figures import plots  # imported late, as matplotlib would delay the first step

        self.rows.append((step, of_raw, of_averaged))
        with replacing(self.folder / "previews.pt") as temporary:
            torch.save(self.rows, temporary)
        selected = torch.linspace(0, len(self.rows) - 1, min(PREVIEW_ROWS, len(self.rows))).round().long().tolist()
        chosen = [(step, as_pictures(one), as_pictures(other)) for step, one, other in (self.rows[i] for i in selected)]
        shape = self.data.original.shape
        plots.preview(self.folder / "preview.png", chosen, plane_of(shape[0]) if len(shape) == 1 else None)


class ProgressBar:
    """A progress line: step, loss, samples per second, time left. Without a terminal, printed every ten seconds.

    Args:
        step, seconds: used before; speed and time left are estimated from there.
        batch_size, units: samples of a step, and what they are called.
        shown: whether anything is displayed.
        limit: seconds after which training ends, if that comes before the budget in steps; None for no such.
    """

    def __init__(
        self,
        step: int,
        seconds: float,
        batch_size: int,
        units: str,
        shown: bool = True,
        limit: float | None = None,
    ):
        self.limit = limit
        self.step, self.seconds, self.batch_size, self.units, self.shown = step, seconds, batch_size, units, shown
        self.terminal, self.printed = shown and sys.stderr.isatty(), seconds

    def __enter__(self) -> "ProgressBar":
        self.bar = tqdm(
            total=1.0, bar_format="{percentage:3.0f}% |{bar:24}| {desc}", dynamic_ncols=True, disable=not self.terminal
        )
        return self

    def show(self, step: int, loss: float, seconds: float, fraction: float) -> None:
        """Display the loss after a step, with speed and time left as estimated from the time since the start."""
        if not self.shown:
            return
        fraction = fraction if self.limit is None else min(1.0, max(fraction, seconds / self.limit))
        speed = (step - self.step) * self.batch_size / max(seconds - self.seconds, 1e-9)
        left = int(seconds * (1 - fraction) / max(fraction, 1e-9))
        line = f"step {step:,}  loss {loss:.4f}  {speed:,.0f} {self.units}/s  ETA {left // 60}:{left % 60:02}"
        self.bar.set_description_str(line, refresh=False)
        self.bar.update(fraction - self.bar.n)
        if not self.terminal and (fraction == 1 or seconds - self.printed >= 10):
            self.printed = seconds
            print(f"{fraction:4.0%}  {line}", file=sys.stderr, flush=True)

    def say(self, message: str) -> None:
        """Print a message above the bar."""
        self.bar.write(message, file=sys.stderr)

    def __exit__(self, *error: object) -> None:
        self.bar.close()
