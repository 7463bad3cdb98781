"""The pictures of a run, one PNG file each: labelled rows and columns of images, and the loss."""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.textpath import TextPath
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter
from torch import Tensor

from ddpm import images

DPI = 110
WIDTH = 880  # pixels that a figure's images fill together, about
LARGEST = 160  # pixels that the longer side of one image is enlarged to, at most about
GAP = 3  # pixels between two images
SIZE = 9  # points of a label

History = Sequence[tuple[int, float | None]]  # (step, loss); None or NaN where the loss was not finite


def forward_process(path: str | Path, x: Tensor, t: Sequence[int], alpha_bar: Sequence[float]) -> None:
    """One image on its way into noise.

    Args:
        path: the PNG file to write.
        x: the images x_t (k, C, H, W), in [-1, 1] or beyond.
        t: their k times.
        alpha_bar: alpha_bar_t at these times; its root is what is left of the image.
    """
    if not len(x) == len(t) == len(alpha_bar):
        raise ValueError(f"as many images as times: not {len(x)} images, {len(t)} t and {len(alpha_bar)} alpha_bar")
    kept = (rf"$\sqrt{{\bar{{\alpha}}_t}} = {math.sqrt(value):.3f}$" for value in alpha_bar)
    labels = [f"$t = {time}$\n{label}" for time, label in zip(t, kept, strict=True)]
    _tiles(path, [("", [x])], columns=labels)


def preview(path: str | Path, rows: Sequence[tuple[int, Tensor, Tensor]]) -> None:
    """Samples from the same noise over training: raw weights on the left, EMA weights on the right.

    Args:
        path: the PNG file to write.
        rows: (step, samples of the raw weights (n, C, H, W), samples of the EMA weights (n, C, H, W)), in order.
    """
    steps, raw, ema = zip(*rows, strict=True) if rows else ((), (), ())
    _tiles(path, [("raw weights", raw), ("EMA weights", ema)], rows=[f"step {step:,}" for step in steps])


def labelled_rows(path: str | Path, rows: Sequence[tuple[str, Tensor]], title: str | None = None) -> None:
    """Images (n, C, H, W) in rows, each with its label on the left."""
    _tiles(path, [("", [x for _, x in rows])], rows=[label for label, _ in rows], title=title)


def labelled_columns(path: str | Path, columns: Sequence[tuple[str, Tensor]], title: str | None = None) -> None:
    """Images (n, C, H, W) in columns, each with its label on top: image i of every column makes row i."""
    _same_shape([x for _, x in columns])
    rows = rearrange([x for _, x in columns], "column n c h w -> n column c h w")
    _tiles(path, [("", list(rows))], columns=[label for label, _ in columns], title=title)


def loss(path: str | Path, train: History, held_out: History) -> None:
    """The loss over training: every logged value, their moving average, and the EMA weights' loss on held-out images.

    Args:
        path: the PNG file to write.
        train: (step, loss) in order of steps.
        held_out: the same for the held-out part; may be empty.
    """
    figure = Figure(figsize=(WIDTH / DPI, 0.45 * WIDTH / DPI), dpi=DPI, layout="constrained")
    axes = figure.add_subplot()
    (steps, values), (held_out_steps, held_out_values) = _arrays(train), _arrays(held_out)
    line = "-" if len(steps) > 1 else "o"  # a line through one point would not be seen
    axes.plot(steps, values, color="tab:blue", alpha=0.25, linewidth=0.8)
    axes.plot(steps, _moving_average(values), line, color="tab:blue", linewidth=1.8, label="training (moving average)")
    if len(held_out_steps):
        axes.plot(held_out_steps, held_out_values, "o-", color="tab:red", markersize=4, label="held out, EMA weights")

    shown = np.concatenate([values, held_out_values])
    finite = shown[np.isfinite(shown)]
    if len(finite) and 0 < 10 * finite.min() < finite.max():
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.yaxis.set_major_formatter("{x:g}")
    missing = len(shown) - len(finite)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    axes.set_xlabel("training step" + (f"   ({missing} non-finite values not shown)" if missing else ""))
    axes.set_ylabel("loss")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="upper right")
    _save(figure, path)


def _arrays(history: History) -> tuple[np.ndarray, np.ndarray]:
    """Steps and losses (n,), NaN where a loss is not finite."""
    steps = np.array([step for step, _ in history], dtype=float)
    losses = np.array([math.nan if value is None else value for _, value in history], dtype=float)
    return steps, np.where(np.isfinite(losses), losses, math.nan)


def _moving_average(values: np.ndarray) -> np.ndarray:
    """Centred mean over a twentieth of the values (n,), over less towards both ends; NaN is left out and stays."""
    i = np.arange(len(values))
    half = np.minimum(len(values) // 40, np.minimum(i, i[::-1]))
    there = np.isfinite(values)

    def window_sum(x: np.ndarray) -> np.ndarray:
        total = np.concatenate([[0.0], np.cumsum(x)])
        return total[i + half + 1] - total[i - half]

    mean = window_sum(np.where(there, values, 0)) / np.maximum(window_sum(there), 1)
    return np.where(there, mean, math.nan)


def _same_shape(parts: Sequence[Tensor]) -> None:
    shapes = sorted({tuple(x.shape) for x in parts})
    if len(shapes) != 1 or len(shapes[0]) != 4 or 0 in shapes[0]:
        raise ValueError(f"a figure needs rows or columns of one shape (n, C, H, W), not {shapes or 'none'}")


def _tiles(
    path: str | Path,
    blocks: Sequence[tuple[str, Sequence[Tensor]]],
    rows: Sequence[str] = (),
    columns: Sequence[str] = (),
    title: str | None = None,
) -> None:
    """Blocks of images side by side, with labels. The layout is in whole pixels, so that no image is resampled.

    Args:
        blocks: (heading, rows of images (n, C, H, W)), with as many rows and images everywhere.
        rows: labels on the left, one a row.
        columns: labels on top of every block, one a column.
    """
    _same_shape([x for _, block in blocks for x in block])
    n, _, height, width = blocks[0][1][0].shape
    across = n * len(blocks)
    scale = max(1, round(min(LARGEST / max(height, width), (WIDTH / across - GAP) / width)))
    pictures = [images.grid(torch.cat(list(block)), n, GAP, scale, background=255) for _, block in blocks]

    tall, wide = pictures[0].shape[:2]
    pitch = scale * width + GAP
    size = SIZE * min([1.0, *((pitch - GAP) / _text_width(line) for label in columns for line in label.split("\n"))])
    line = round(1.5 * SIZE * DPI / 72)
    heading = line if any(name for name, _ in blocks) else 0
    lines = max((label.count("\n") + 1 for label in columns), default=0)
    left = 12 + math.ceil(max((_text_width(label) + 8 for label in rows), default=0))
    top = 12 + (line if title else 0) + heading + lines * line
    space = 18  # between two blocks and at the right
    total_wide, total_tall = left + len(blocks) * (wide + space), top + tall + 12

    figure = Figure(figsize=(total_wide / DPI, total_tall / DPI), dpi=DPI)

    def text(x: float, y: float, label: str, **style: object) -> None:
        figure.text(x / total_wide, 1 - y / total_tall, label, **{"fontsize": SIZE, **style})

    for b, ((name, _), picture) in enumerate(zip(blocks, pictures, strict=True)):
        start = left + b * (wide + space)
        colour = np.broadcast_to(picture, (tall, wide, 3))  # a colour map would change greys by one
        figure.figimage(colour, start, total_tall - top - tall, origin="upper")
        text(start + wide / 2, top - lines * line - 4, name, ha="center", va="bottom", weight="bold")
        for i, label in enumerate(columns):
            text(start + GAP / 2 + (i + 0.5) * pitch, top - 2, label, ha="center", va="bottom", fontsize=size)
    for i, label in enumerate(rows):
        text(left - 8, top + GAP / 2 + (i + 0.5) * (scale * height + GAP), label, ha="right", va="center")
    if title:
        text(left + (total_wide - space - left) / 2, 8, title, ha="center", va="top", weight="bold")
    _save(figure, path)


def _text_width(label: str) -> float:
    """Pixels of one line at the size of labels."""
    return TextPath((0, 0), label, size=SIZE).get_extents().width * DPI / 72


def _save(figure: Figure, path: str | Path) -> None:
    """Draw with Agg and write a small file: no alpha, and one channel where there is no colour."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    picture = np.asarray(canvas.buffer_rgba())[..., :3]
    grey = (picture == picture[..., :1]).all()
    images.save_png(path, np.ascontiguousarray(picture[..., :1] if grey else picture))
