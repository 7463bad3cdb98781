"""Output of the commands: lines for the terminal, names in figures, records for evaluation.json."""

import sys
from collections.abc import Sequence
from typing import Any

from omegaconf import DictConfig

from ddpm.commands.load import NONE, noted_names
from ddpm.config import plain


def say(message: str) -> None:
    """Print a message and flush, into a file or a pipe too; control characters in it are escaped."""
    print("\n".join(map(in_one_line, message.split("\n"))), flush=True)


def in_one_line(text: str) -> str:
    """Return text for one line of a terminal: line breaks and control characters are escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def warn_of_range(source: Any) -> None:
    """Print a warning if samples of a source are not finite, or lie outside [-1, 1]."""
    if concern := str(source.range):
        say(f"warning: {concern}")


def with_bar(batches: Any, n: int) -> Any:
    """Yield the batches, while a progress bar counts their samples."""
    with progress_bar(n) as bar:
        for numbers, x in batches:
            yield numbers, x
            bar.update(len(x))


def progress_bar(total: int) -> Any:
    """Return a progress bar that counts images, or evaluations of the network on one image."""
    from tqdm import tqdm

    return tqdm(total=total, unit="image", disable=not sys.stderr.isatty())


def schedule_name(config: DictConfig) -> str:
    """Return the name of a schedule for a figure: that of the function that builds it."""
    name = str(config._target_).rpartition(".")[2]
    return "betas" if name == "NoiseSchedule" else name


def how_drawn(
    n: int, config: DictConfig, weights: str, sampler: Any, schedule: Any, commit: str | None
) -> dict[str, Any]:
    """Return the part of an evaluation.json record that states how its samples were drawn; nulls without a sampler."""
    sampled = sampler is not None
    guidance = plain(config.guidance) if "guidance" in config else {}
    guided = {k: v for k, v in guidance.items() if k != "_target_"}
    return {
        "low": None,
        "high": None,
        "n": n,
        "seeds": [config.seed],
        "weights": weights,
        "sampler": type(sampler).__name__ if sampled else None,
        "sampler_settings": {k: v for k, v in plain(config.sampler).items() if k != "_target_"} if sampled else None,
        "steps": len(sampler.times(schedule)) - 1 if sampled else None,
        "evaluations": sampler.evaluations(schedule) if sampled else None,
        "commit": commit,
        **({"guidance": guided | {"kind": guidance["_target_"].rpartition(".")[2]}} if guided else {}),
    }


def how_walked(source: Any, run: Any, step: int, config: DictConfig, evaluations: int | None = None) -> str:
    """Return the terminal line that names the run and checkpoint, the sampler, the labels and the guidance."""
    method = source.walk if source.sampler is None else type(source.sampler).__name__
    cost = method + ("" if evaluations is None or source.sampler is None else f", {evaluations} evaluations")
    several = len(source.turns) > 1 and source.condition_data is None  # otherwise the default needs no mention
    names = dict(enumerate((noted_names("styles", run) if several else None) or ()))
    labels = ""
    for label, (one, values) in enumerate((("class", source.requested), ("style", source.styles))):
        called = [f"{y} ({names[y]})" if label and y in names else str(y) for y in values or ()]
        if values is not None:
            labels += f", {one} {', '.join(called) or NONE}"
        elif several:
            labels += f", each {one} in turn"
    guidance = f", {source.guidance}" if str(source.guidance) else ""
    return f"{run.path}, step {step:,}, {config.weights} weights, {cost}, seed {config.seed}{labels}{guidance}"


def table(rows: Sequence[Sequence[str]]) -> str:
    """Return a table as text: first column left-aligned, the others right-aligned, the last one as it is."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]) - 1)]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *(row[i].rjust(widths[i]) for i in range(1, len(widths))), row[-1]])
        for row in rows
    )
