"""`ddpm-study lr-range`: the learning-rate range test, training steps at increasing rates."""

import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from omegaconf import DictConfig

from ddpm.commands.console import progress_bar, say
from ddpm.commands.launch import composed, training_command
from ddpm.commands.train.prepare import Plan, planned
from ddpm.commands.validate import must_be_numbers, must_be_whole, must_be_writable, settings
from ddpm.config import InvalidInput, resolve_device

if TYPE_CHECKING:
    from ddpm.study.lr_range import RangeTest, Suggestion


def lr_range(words: list[str]) -> None:
    """Train at increasing learning rates and suggest one; write a figure and a table of the losses.

    Creates no run directory, and stores no weights.

    Args:
        words: as ddpm-train takes them, and range.KEY=VALUE, see conf/lr_range.yaml.
    Raises: InvalidInput before the first step.
    """
    config = composed("lr_range", words)
    walk, test = _settings_of(config)
    plan = planned(config, resolve_device(config.device), marking=False)
    out = config.range.out
    figure = plan.run.path.parent / "lr_range.png" if out is None else Path(out)
    figure.parent.mkdir(parents=True, exist_ok=True)
    try:
        _walk(plan, walk, test)
    except KeyboardInterrupt:
        say("interrupted; nothing was written")
        sys.exit(130)
    from ddpm.figures import plots

    suggestion, table = test.suggestion(), figure.with_suffix(".csv")
    test.write(table)
    marks = {
        "steepest fall": suggestion.steepest,
        "lowest loss": suggestion.minimum,
        "a tenth of that rate": suggestion.below_minimum,
    }
    plots.lr_range(figure, test.rates, test.losses, test.smoothed, marks)
    _print_suggestion(words, test, suggestion, len(walk), plan.parts.trainer.batch_size)
    say(f"wrote {figure} {table}")


def _settings_of(config: DictConfig) -> tuple[list[float], "RangeTest"]:
    """Return the rate of each step, and the test; raise InvalidInput for invalid settings."""
    from ddpm.study.lr_range import RangeTest, rates

    options = settings(config, "range")
    must_be_numbers(config, "range.start", "range.end", "range.beta", "range.stop")
    must_be_whole(config, "range.steps", least=10)
    if options.out is not None and not str(options.out).endswith(".png"):
        raise InvalidInput(f"range.out={options.out} must be the name of a .png file")
    must_be_writable(options.out)
    try:
        return rates(options.start, options.end, options.steps), RangeTest(options.beta, options.stop)
    except ValueError as error:
        raise InvalidInput(f"range: {error}") from error


def _walk(plan: Plan, walk: list[float], test: "RangeTest") -> None:
    """Train a step at each rate, as a run does, until the test ends."""
    from ddpm.training.step import Training

    parts, device, images = plan.parts, plan.device, plan.parts.trainer.batch_size
    training = Training(
        parts.trainer, parts.task, plan.data.to(device), parts.optimizer,
        seed=plan.config.seed, device=device, augment=parts.augment,
    )  # fmt: skip
    with progress_bar(len(walk) * images) as bar:
        for number, rate in enumerate(walk, 1):
            training.set_lr(rate)
            test.add(rate, training.step(number).loss.item())
            bar.update(images)
            if test.ended:
                break


def _print_suggestion(words: list[str], test: "RangeTest", suggestion: "Suggestion", steps: int, images: int) -> None:
    """Print how the test went, the suggested rates, and the commands to train with them."""
    over = f"; ended because {test.ended}" if test.ended else ""
    first, last = test.rates[0], test.rates[-1]
    say(f"{len(test.rates)} of {steps} steps of {images:,} images, at rates from {first:.3g} to {last:.3g}{over}")
    others = [word for word in words if not re.match(r"[+~]*(range[.=]|optimizer\.lr=)", word)]
    rates = {"steepest fall": suggestion.steepest, "a tenth of the rate of the lowest loss": suggestion.below_minimum}
    lines = [
        f"  {name:40}{rate:.2g}\n    {training_command([*others, f'optimizer.lr={rate:.2g}'])}"
        for name, rate in rates.items()
        if rate is not None
    ]
    if lines:
        say("\n".join(["suggested learning rates, as the peak of the trainer's schedule:", *lines]))
    if suggestion.note:
        say(("note: " if lines else "no learning rate is suggested: ") + suggestion.note)
