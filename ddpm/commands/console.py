"""What commands tell: on the terminal, in figures and in evaluation.json."""

import sys
from collections.abc import Sequence
from typing import Any

from omegaconf import DictConfig

from ddpm.commands.load import NONE, noted_names
from ddpm.config import plain


def say(message: str) -> None:
    """Print a message at once, into a file or a pipe too; what files of others say in it does not steer a terminal."""
    print("\n".join(map(in_one_line, message.split("\n"))), flush=True)


def in_one_line(text: str) -> str:
    """Text for a terminal: what was typed, and is told again, neither breaks the line nor steers."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def warn_of_range(source: Any) -> None:
    """Say if samples that were drawn are not finite, or lie outside [-1, 1]."""
    if concern := str(source.range):
        say(f"warning: {concern}")


def with_bar(batches: Any, n: int) -> Any:
    """The batches, while a progress bar counts their samples."""
    with progress_bar(n) as bar:
        for numbers, x in batches:
            yield numbers, x
            bar.update(len(x))


def progress_bar(total: int) -> Any:
    """A progress bar that counts images, or evaluations of the network by image."""
    from tqdm import tqdm

    return tqdm(total=total, unit="image", disable=not sys.stderr.isatty())


def schedule_name(config: DictConfig) -> str:
    """What a figure calls a schedule: the function that makes it."""
    name = str(config._target_).rpartition(".")[2]
    return "betas" if name == "NoiseSchedule" else name


def how_drawn(
    n: int, config: DictConfig, weights: str, sampler: Any, schedule: Any, commit: str | None
) -> dict[str, Any]:
    """The part of a record in evaluation.json that says how its samples were drawn, if any were: with a sampler."""
    walked = sampler is not None
    guidance = plain(config.guidance) if "guidance" in config else {}
    guided = {k: v for k, v in guidance.items() if k != "_target_"}
    return {
        "low": None,
        "high": None,
        "n": n,
        "seeds": [config.seed],
        "weights": weights,
        "sampler": type(sampler).__name__ if walked else None,
        "sampler_settings": {k: v for k, v in plain(config.sampler).items() if k != "_target_"} if walked else None,
        "steps": len(sampler.times(schedule)) - 1 if walked else None,
        "evaluations": sampler.evaluations(schedule) if walked else None,
        "commit": commit,
        **({"guidance": guided | {"kind": guidance["_target_"].rpartition(".")[2]}} if guided else {}),
    }


def how_walked(source: Any, run: Any, step: int, config: DictConfig, evaluations: int | None = None) -> str:
    """What samples are drawn from, and how: a line for the terminal."""
    walked = source.walk if source.sampler is None else type(source.sampler).__name__
    cost = walked + ("" if evaluations is None or source.sampler is None else f", {evaluations} evaluations")
    several = len(source.turns) > 1 and source.condition_data is None  # else what is left out needs no word
    names = dict(enumerate((noted_names("styles", run) if several else None) or ()))
    labels = ""
    for label, (one, asked) in enumerate((("class", source.requested), ("style", source.styles))):
        called = [f"{y} ({names[y]})" if label and y in names else str(y) for y in asked or ()]
        if asked is not None:
            labels += f", {one} {', '.join(called) or NONE}"
        elif several:
            labels += f", each {one} in turn"
    guidance = f", {source.guidance}" if str(source.guidance) else ""
    return f"{run.path}, step {step:,}, {config.weights} weights, {cost}, seed {config.seed}{labels}{guidance}"


def table(rows: Sequence[Sequence[str]]) -> str:
    """Columns side by side; numbers to the right, the last one as it is."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]) - 1)]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *(row[i].rjust(widths[i]) for i in range(1, len(widths))), row[-1]])
        for row in rows
    )
