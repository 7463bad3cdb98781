"""Plots of a run, one PNG file each: labelled rows and columns of images, points, losses and curves of measures."""

import io
import math
import tempfile
import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import hsv_to_rgb
from matplotlib.figure import Figure
from matplotlib.offsetbox import AnnotationBbox, OffsetImage
from matplotlib.textpath import TextPath
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from ddpm.figures import images
from ddpm.schedules import NoiseSchedule, report

DPI = 110
WIDTH = 880  # approximate width in pixels of a figure's images together
LARGEST = 160  # approximate largest pixels of the longer side of one enlarged image
GAP = 3  # pixels between two images
SIZE = 9  # points of a label
LINE = 30  # characters of a prompt in a line
WRONG = (0.85, 0.1, 0.1)  # red, green and blue of the frame around pictures that do not match their prompt
THUMBNAIL, FRAME = 28, 2  # approximate pixels of the longer side of a picture among dots; of its frame

History = Sequence[tuple[int, float | None]]  # (step, loss); None or NaN where the loss was not finite


def forward_process(
    path: str | Path, x: Tensor, t: Sequence[int], alpha_bar: Sequence[float], title: str | None = None
) -> None:
    """Plot an image at several times of the forward process.

    Args:
        path: the PNG file to write.
        x: the images x_t (k, C, H, W), in [-1, 1] or beyond.
        t: their k times.
        alpha_bar: alpha_bar_t at these times; its root is the remaining share of the image.
        title: of the figure.
    """
    if not len(x) == len(t) == len(alpha_bar):
        raise ValueError(f"as many images as times: not {len(x)} images, {len(t)} t and {len(alpha_bar)} alpha_bar")
    shares = (rf"$\sqrt{{\bar{{\alpha}}_t}} = {math.sqrt(value):.3f}$" for value in alpha_bar)
    labels = [f"$t = {time}$\n{label}" for time, label in zip(t, shares, strict=True)]
    _tiles(path, [("", [x])], columns=labels, title=title)


def preview(path: str | Path, rows: Sequence[tuple[int, Tensor, Tensor]], title: str | None = None) -> None:
    """Plot samples from the same noise over training: raw weights on the left, EMA weights on the right.

    Args:
        path: the PNG file to write.
        rows: (step, samples of the raw weights (n, C, H, W), samples of the EMA weights (n, C, H, W)), in order.
        title: of the figure.
    """
    steps, raw, ema = zip(*rows, strict=True) if rows else ((), (), ())
    _tiles(path, [("raw weights", raw), ("EMA weights", ema)], rows=[f"step {step:,}" for step in steps], title=title)


def labelled_rows(path: str | Path, rows: Sequence[tuple[str, Tensor]], title: str | None = None) -> None:
    """Plot images (n, C, H, W) in rows, each with its label on the left."""
    _tiles(path, [("", [x for _, x in rows])], rows=[label for label, _ in rows], title=title)


def prompted(path: str | Path, rows: Sequence[tuple[str, Sequence[tuple[Tensor, bool]]]]) -> None:
    """Plot a real picture and samples for each prompt; those that do not match the prompt are framed.

    Args:
        path: the PNG file to write.
        rows: (prompt, [(picture (C, H, W), whether it matches the prompt), ...]), with equally many pictures.
    """
    frame = max(2, rows[0][1][0][0].shape[-1] // 16)
    red = 2 * torch.tensor(WRONG)[:, None, None] - 1

    def framed(x: Tensor, right: bool) -> Tensor:
        """Add a margin, in the frame's colour if the picture is wrong."""
        middle = F.pad(x.expand(3, -1, -1), [frame] * 4, value=1.0)
        inside = F.pad(torch.ones_like(x[:1]), [frame] * 4) > 0
        return middle if right else torch.where(inside, middle, red)

    tiles = [torch.stack([framed(x, right) for x, right in pictures]) for _, pictures in rows]
    columns = ["held-out picture", *(f"sample {k + 1}" for k in range(len(tiles[0]) - 1))]
    labels = ["\n".join(textwrap.wrap(prompt, LINE)) for prompt, _ in rows]
    _tiles(path, [("", tiles)], rows=labels, columns=columns, title="framed: does not match the words")


def code_maps(path: str | Path, rows: Sequence[tuple[str, Tensor]], codes: int) -> None:
    """Plot images (n, C, H, W) and grids of codes (n, h, w) in rows of one height, each code in its own colour.

    Args:
        rows: label -> images, or codes in 0..K-1, with -1 (white) for those that are not sampled yet.
        codes: K, the number of codes.
    """
    height, width = next(tuple(x.shape[2:]) for _, x in rows if x.ndim == 4)
    hues = (torch.arange(codes) * 0.618034) % 1  # neighbouring numbers in distant hues
    values = 0.55 + 0.45 * ((torch.arange(codes) * 0.7548777) % 1)
    colours = torch.from_numpy(hsv_to_rgb(torch.stack([hues, torch.full_like(hues, 0.75), values], dim=1).numpy()))
    colours = torch.cat([colours, torch.ones_like(colours[:1])])  # white, for index -1
    pictures = []
    for label, x in rows:
        if x.ndim == 3:
            x = rearrange(2 * colours[x.long()] - 1, "n h w c -> n c h w")
            x = F.interpolate(x, (height, width), mode="nearest")
        pictures.append((label, x.expand(-1, 3, -1, -1)))
    labelled_rows(path, pictures)


def labelled_columns(path: str | Path, columns: Sequence[tuple[str, Tensor]], title: str | None = None) -> None:
    """Plot images (n, C, H, W) in columns, each with its label on top: row i has image i of every column."""
    _same_shape([x for _, x in columns])
    rows = rearrange([x for _, x in columns], "column n c h w -> n column c h w")
    _tiles(path, [("", list(rows))], columns=[label for label, _ in columns], title=title)


def points(
    path: str | Path, groups: Mapping[str, Tensor], title: str | None = None, behind: Tensor | None = None
) -> None:
    """Plot points in the plane, a panel for each group, all with the same limits; dots are smaller the more there are.

    The limits are the same on both axes, around 0: 1.25 times the 99 % quantile of the coordinates, of the widest
    group. A panel states how many of its points lie outside or are not finite.

    Args:
        path: the PNG file to write.
        groups: title of a panel -> points (n, 2), in the order of the panels; four in a row.
        title: of the figure.
        behind: points (n, 2) to plot in grey beneath those of every panel, such as the data; they count for the
            limits as a group does.
    Raises:
        ValueError: no groups, or one that is not one or more points.
    """
    wrong = [tuple(x.shape) for x in groups.values() if x.ndim != 2 or x.shape[1] != 2 or len(x) == 0]
    if wrong or not groups:
        raise ValueError(f"a figure of points needs groups of one or more points (n, 2), not {wrong or 'none'}")
    arrays = {name: x.detach().cpu().double().numpy() for name, x in groups.items()}
    beneath = np.empty((0, 2)) if behind is None else behind.detach().cpu().double().numpy()
    sizes = [abs(x[np.isfinite(x).all(1)]) for x in (*arrays.values(), beneath)]
    limit = 1.25 * max([np.quantile(size, 0.99) for size in sizes if size.size], default=0.0) or 1.0
    columns, rows = min(4, len(arrays)), math.ceil(len(arrays) / 4)
    side = min(400, WIDTH / columns)  # pixels of a panel
    size = (columns * side / DPI, (rows * (side + 28) + (24 if title else 0)) / DPI)
    figure = Figure(figsize=size, dpi=DPI, layout="constrained")
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flatten()
    for i, (axes, (name, x)) in enumerate(zip(grid, arrays.items(), strict=False)):
        n, inside = len(x), x[(abs(x) <= limit).all(1)]  # without NaN
        style = {"s": min(12, max(2.5, 6000 / n)), "alpha": min(0.8, max(0.15, 18 / math.sqrt(n)))}
        axes.scatter(*beneath.T, color="0.85", s=4, linewidths=0)
        axes.scatter(*inside.T, color=f"C{i % 10}", linewidths=0, **style)
        axes.set(xlim=(-limit, limit), ylim=(-limit, limit), aspect="equal")
        _axes(axes, "", "")
        axes.set_axisbelow(True)
        axes.tick_params(labelsize=SIZE - 1, labelbottom=i + columns >= len(arrays))  # only where no panel is beneath
        axes.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
        axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
        axes.set_title(name, fontsize=SIZE + 1)
        if n > len(inside):
            beyond = f"{n - len(inside):,} of {n:,} outside"
            axes.text(0.98, 0.02, beyond, transform=axes.transAxes, ha="right", va="bottom", fontsize=SIZE - 1)
    for axes in grid[len(arrays) :]:
        axes.set_axis_off()
    if title:
        figure.suptitle(title, fontsize=SIZE + 2)
    _save(figure, path)


def places(
    path: str | Path,
    xy: Tensor,
    y: Tensor,
    names: Sequence[str],
    pictures: Tensor | None = None,
    title: str | None = None,
) -> None:
    """Plot samples as dots in the plane, coloured by class with a legend, and some of them as their pictures.

    Pictures are centred at their points, framed in the colour of their class, as many as do not overlap.

    Args:
        path: the PNG file to write.
        xy: the points (n, 2), finite, of arbitrary scale.
        y: the class (n,) of each.
        names: of the classes.
        pictures: (n, C, H, W); None for dots alone.
        title: of the figure.
    Raises: ValueError for places of another shape or number than classes, or that are not finite.
    """
    if xy.ndim != 2 or xy.shape[1] != 2 or not len(xy) == len(y) > 0 or not xy.isfinite().all():
        raise ValueError(f"places are finite, (n, 2), and as many as classes: not {tuple(xy.shape)} and {len(y)}")
    at, there = xy.detach().cpu().double().numpy(), sorted(y.unique().tolist())
    colours = {k: _class_colour(i, len(there)) for i, k in enumerate(there)}
    side, columns = 660, math.ceil(len(there) / 26)  # pixels of the square; of the legend
    wide = side + 50 + columns * math.ceil(50 + max(_text_width(names[k]) for k in there))
    tall = side + 60
    figure = Figure(figsize=(wide / DPI, tall / DPI), dpi=DPI)  # fixed layout: the pixel position of a dot is known
    axes = figure.add_axes((20 / wide, 20 / tall, side / wide, side / tall))
    middle, half = (at.max(0) + at.min(0)) / 2, 0.54 * float(np.ptp(at, axis=0).max()) or 1.0
    axes.set(xlim=middle[0] + np.array([-half, half]), ylim=middle[1] + np.array([-half, half]), xticks=[], yticks=[])
    size = min(30, max(6, 9000 / len(at)))
    for k in there:
        dots = at[(y == k).cpu().numpy()]
        axes.scatter(dots[:, 0], dots[:, 1], s=size, color=[colours[k]], linewidths=0, alpha=0.8, label=names[k])
    if pictures is not None:
        scale = max(1, round(THUMBNAIL / max(pictures.shape[2:])))
        longer = scale * max(pictures.shape[2:]) + 2 * FRAME
        for i in apart((at - middle) / half * side / 2, longer, (side - longer) / 2):
            picture = images.grid(pictures[i : i + 1], 1, FRAME, scale, background=255)
            picture = np.broadcast_to(
                picture[FRAME:-FRAME, FRAME:-FRAME], (*(scale * n for n in pictures.shape[2:]), 3)
            )
            thumbnail = OffsetImage(picture, zoom=1, dpi_cor=False, interpolation="nearest")
            frame = {"edgecolor": colours[int(y[i])], "linewidth": 1.5}
            axes.add_artist(AnnotationBbox(thumbnail, at[i], pad=0, bboxprops=frame))
    figure.legend(
        loc="center left", bbox_to_anchor=((side + 30) / wide, 0.5), ncols=columns, frameon=False, fontsize=SIZE
    )
    if title:
        axes.set_title(title, fontsize=SIZE + 1)
    _save(figure, path)


def apart(xy: np.ndarray, side: float, reach: float) -> list[int]:
    """Choose greedily the points (n, 2) around which squares do not overlap; return their indices.

    Args:
        xy: in pixels from the middle.
        side: of a square.
        reach: largest distance of a square's centre from the middle along either axis.
    """
    chosen: list[int] = []
    for i in np.nonzero((abs(xy) <= reach).all(1))[0].tolist():
        if not chosen or (abs(xy[chosen] - xy[i]).max(1) >= side).all():
            chosen.append(i)
    return chosen


def _class_colour(i: int, of: int) -> tuple[float, ...]:
    """Return the colour of class i: from matplotlib's tables if they suffice, else one of evenly spaced hues."""
    if of <= 20:
        return tuple(colormaps["tab10" if of <= 10 else "tab20"](i)[:3])
    return tuple(hsv_to_rgb((i / of, 0.85, 0.9 if i % 2 else 0.6)).tolist())


def loss(path: str | Path, train: History, held_out: History) -> None:
    """Plot the loss over training: logged values, their moving average, and the EMA weights' held-out loss.

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

    every = np.concatenate([values, held_out_values])
    finite = every[np.isfinite(every)]
    if len(finite) and 0 < 10 * finite.min() < finite.max():
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.yaxis.set_major_formatter("{x:g}")
    missing = len(every) - len(finite)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    axes.set_xlabel("training step" + (f"   ({missing} non-finite values not shown)" if missing else ""))
    axes.set_ylabel("loss")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="upper right")
    _save(figure, path)


def bits_per_dim(path: str | Path, times: Sequence[int], terms: Tensor, L_T: Tensor, units: str = "images") -> None:
    """Plot the bits of the variational bound over t: its term at each t, and their sum from t = 1 upwards.

    Args:
        path: the PNG file to write.
        times: the K times, ascending.
        terms: bits per dimension of n images at these times, (n, K); the first column is L_0.
        L_T: the term of the prior, (n,).
        units: name of the data.
    """
    t, bits = np.array(times), terms.double().cpu().numpy()
    mean, total = bits.mean(0), bits.sum(1).mean() + L_T.double().mean().item()
    figure = Figure(figsize=(WIDTH / DPI, 0.45 * WIDTH / DPI), dpi=DPI, layout="constrained")
    left, right = figure.subplots(1, 2)
    low, high = np.quantile(bits, [0.05, 0.95], axis=0)
    left.fill_between(t, low, high, color="tab:blue", alpha=0.2, linewidth=0, label=f"90% of the {units}")
    left.plot(t, mean, "-" if len(t) > 20 else "o-", color="tab:blue", linewidth=1.6, markersize=4, label="mean")
    left.plot(t[:1], mean[:1], "o", color="tab:red", markersize=5, label=f"$L_0$ = {mean[0]:.3g}")
    if (mean > 0).all():
        left.set_yscale("log")
        left.set_ylim(mean.min() / 2, 2 * max(mean.max(), high.max()))
    left.set_ylabel("bits per dimension of the step from t")
    left.legend(frameon=False, loc="upper right")

    sums = mean.cumsum()
    right.plot(t, sums, "-" if len(t) > 20 else "o-", color="tab:blue", linewidth=1.8, markersize=4)
    right.plot(t[:1], sums[:1], "o", color="tab:red", markersize=5)
    right.axhline(total, color="0.5", linewidth=0.8, linestyle="--")
    parts = {r"$L_0$": mean[0], r"$\Sigma\, L_{t-1}$": mean[1:].sum(), r"$L_T$": L_T.double().mean().item()}
    lines = [f"total {total:.3f}", *(f"{name} {value:.3g}" for name, value in parts.items())]
    right.text(0.97, 0.05, "\n".join(lines), transform=right.transAxes, ha="right", va="bottom", linespacing=1.6)
    right.set_ylim(min(0, sums.min()), 1.05 * max(total, sums.max()))
    right.set_ylabel("bits per dimension, summed from 1 to t")
    for axes in (left, right):
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_xlabel("t")
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    _save(figure, path)


def loss_by_snr(
    path: str | Path,
    runs: Mapping[str, tuple[Sequence[float], Sequence[float | None], Sequence[float | None]]],
) -> None:
    """Plot held-out errors of eps (left) and x_0 (right) over log-SNR, of one run or several.

    Args:
        path: the PNG file to write.
        runs: label -> log-SNR, error of x_0 and error of eps there, as `evaluation.measure_loss_by_snr` returns them;
            None where a run was not measured.
    """
    figure = Figure(figsize=(WIDTH / DPI, 0.45 * WIDTH / DPI), dpi=DPI, layout="constrained")
    left, right = figure.subplots(1, 2)
    for i, (label, (log_snr, x_0, eps)) in enumerate(runs.items()):
        style = ("-", "--", "-.", ":")[i % 4]  # so that coinciding curves are all visible
        for axes, errors in ((left, eps), (right, x_0)):
            values = np.array(errors, dtype=float)  # None becomes NaN, a gap
            axes.semilogy(log_snr, values, f"o{style}", color=f"C{i}", label=label, markersize=3, linewidth=1.6)
    for axes, name in ((left, r"$\epsilon$"), (right, "$x_0$")):
        _axes(axes, "log-SNR (from noise to data)", f"mean squared error of {name}, held out")
    if len(runs) > 1:
        handles, names = left.get_legend_handles_labels()
        columns = min(len(names), 4)
        figure.legend(handles, names, loc="outside lower center", ncols=columns, frameon=False, fontsize=SIZE)
    _save(figure, path)


def labelled_table(path: str | Path, rows: Sequence[tuple[str, Tensor]], columns: Sequence[str]) -> None:
    """Plot images (n, C, H, W) in rows with labels on the left, and a label on top of each of the n columns."""
    if any(len(x) != len(columns) for _, x in rows):
        raise ValueError(f"rows of {[len(x) for _, x in rows]} images, but {len(columns)} labels of columns")
    _tiles(path, [("", [x for _, x in rows])], rows=[label for label, _ in rows], columns=columns)


def curves(
    path: str | Path,
    x: Tensor | Sequence[float],
    panels: Mapping[str, Mapping[str, Tensor | Sequence[float]]],
    x_label: str = "t",
    log: Sequence[str] = (),
) -> None:
    """Plot functions of one variable in panels side by side.

    Args:
        path: the PNG file to write.
        x: (n,).
        panels: label of the vertical axis -> label of a curve -> its values (n,). The same label has the same colour
            in every panel, and a panel with one curve has no legend.
        x_label: of the horizontal axis.
        log: the names of the axes that are logarithmic, x_label among them or not.
    """
    figure = Figure(figsize=(WIDTH / DPI, (0.45 if len(panels) > 1 else 0.4) * WIDTH / DPI), dpi=DPI)
    figure.set_layout_engine("constrained")
    labels = list(dict.fromkeys(label for curve in panels.values() for label in curve))
    for axes, (name, curve) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        for label, y in curve.items():
            i = labels.index(label)
            style = ("-", "--", "-.", ":")[i % 4]  # so that coinciding curves are all visible
            axes.plot(np.asarray(x), np.asarray(y), style, color=f"C{i}", linewidth=1.8, label=label)
        axes.set_xscale("log" if x_label in log else "linear")
        axes.set_yscale("log" if name in log else "linear", **({"nonpositive": "mask"} if name in log else {}))
        _axes(axes, x_label, name)
        if len(curve) > 1:
            axes.legend(frameon=False, fontsize=SIZE)
    _save(figure, path)


def density(
    path: str | Path,
    t: Sequence[float],
    x: Tensor,
    log_prob: Tensor,
    panels: Mapping[str, tuple[Sequence[float], Tensor]],
) -> None:
    """Plot the density q(x_t) of one-dimensional data over time, from data on the left to noise, with trajectories.

    Args:
        path: the PNG file to write.
        t: ascending times (n,).
        x: values (m,), evenly spaced.
        log_prob: log q(x_t) there, (n, m).
        panels: title -> times (k,) of trajectories, ascending or descending, and their values (k, walks).
    """
    figure = Figure(figsize=(WIDTH / DPI, 0.42 * WIDTH / DPI), dpi=DPI, layout="constrained")
    shade = log_prob.exp().double().numpy().T
    shade = (shade / shade.max(0)) ** 0.5  # normalised at each time, or the sharp data would leave the noise white
    for i, (axes, (title, (times, walks))) in enumerate(
        zip(figure.subplots(1, len(panels), squeeze=False, sharey=True)[0], panels.items(), strict=True)
    ):
        axes.contourf(np.asarray(t), x.numpy(), shade, levels=np.linspace(0, 1, 11), cmap="Blues", vmax=1.3)
        axes.plot(np.asarray(times), walks.numpy(), linewidth=0.9, color="tab:red")
        axes.set_ylim(x[0].item(), x[-1].item())
        axes.set_title(title, fontsize=SIZE + 1)
        _axes(axes, "t", "$x_t$" if i == 0 else "")
        axes.grid(False)
    _save(figure, path)


def orders(path: str | Path, panels: Mapping[str, Mapping[str, Sequence[tuple[int, float]]]]) -> None:
    """Plot the error of samplers against their cost, both logarithmic, so that a slope is an order.

    Args:
        path: the PNG file to write.
        panels: title -> sampler -> [(evaluations of the network, error)], ascending in cost. The same sampler has the
            same colour in every panel; grey lines have the slopes 1, 2 and 3.
    """
    figure = Figure(figsize=(WIDTH / DPI, 0.52 * WIDTH / DPI), dpi=DPI, layout="constrained")
    every = [pair for curve in panels.values() for pairs in curve.values() for pair in pairs]
    cost, error = (np.array(values, dtype=float) for values in zip(*every, strict=True))
    left, top, bottom = cost.min(), error.max(), error[error > 0].min()
    labels = list(dict.fromkeys(label for curve in panels.values() for label in curve))
    grid = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
    for i, (axes, (title, curve)) in enumerate(zip(grid, panels.items(), strict=True)):
        ends = np.array([left, cost.max()])
        for order in (1, 2, 3):
            line = top * (ends / left) ** -order
            axes.loglog(ends, line, color="0.75", linewidth=0.8, zorder=0)
            at = min(ends[1], left * (top / bottom) ** (1 / order)) ** 0.9 * left**0.1
            axes.text(at, top * (at / left) ** -order, f" {order}", color="0.5", fontsize=SIZE, va="bottom")
        for label, pairs in curve.items():
            j = labels.index(label)
            marker = "osD^vP*X"[j % 8]
            axes.loglog(
                *zip(*pairs, strict=True), f"{marker}-", color=f"C{j}", label=label, markersize=4, linewidth=1.4
            )
        axes.set_xlim(left / 1.15, cost.max() * 1.15)
        axes.set_ylim(bottom / 2, 3 * top)
        axes.set_title(title, fontsize=SIZE + 1)
        _axes(axes, "evaluations of the network", "root mean square error" if i == 0 else "")
    handles, names = grid[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=min(len(names), 8), frameon=False, fontsize=SIZE)
    _save(figure, path)


def copies(path: str | Path, groups: Mapping[str, tuple[Tensor, Tensor, Sequence[float], Sequence[float]]]) -> None:
    """Plot samples in a row, and beneath each its nearest training image.

    Args:
        path: the PNG file to write.
        groups: kind of distance -> samples (n, C, H, W), training images (n, C, H, W), and n ascending distances,
            over the median distance of held-out images, of the samples and of the closest held-out images.
    """
    rows, labels = [], []
    for name, (samples, real, *distances) in groups.items():
        of_samples, of_held_out = (f"{distance[0]:.2f} to {distance[-1]:.2f}" for distance in distances)
        rows += [samples, real]
        labels += [
            f"samples closest {name}\ndistance {of_samples}",
            f"their nearest training images\n(held-out images' closest: {of_held_out})",
        ]
    _tiles(path, [("", rows)], rows=labels)


def bias(path: str | Path, curve: Sequence[tuple[int, float]], n: int, value: float) -> None:
    """Plot the Frechet distance of real images over their number, which is pure bias, and that of samples.

    Args:
        path: the PNG file to write.
        curve: (number of held-out images, distance), ascending in number.
        n, value: the number of the samples, and their distance.
    """
    figure = Figure(figsize=(0.6 * WIDTH / DPI, 0.42 * WIDTH / DPI), dpi=DPI, layout="constrained")
    axes = figure.add_subplot()
    axes.loglog(*zip(*curve, strict=True), "o-", color="tab:blue", markersize=4, label="held-out images")
    axes.loglog([n], [value], "D", color="tab:red", markersize=6, label="samples")
    _logarithmic(axes)
    _axes(axes, "number of images", "Frechet distance to the training part")
    axes.legend(frameon=False, fontsize=SIZE)
    _save(figure, path)


def steps_quality(path: str | Path, cells: Sequence[Mapping[str, Any]], real_vs_real: float, title: str = "") -> None:
    """Plot quality against the cost of sampling: a curve for each sampler and spacing.

    Args:
        path: the PNG file to write.
        cells: each with sampler, spacing, evaluations and value, and low and high where there are several seeds.
        real_vs_real: the value of held-out images.
        title: of the figure, such as the protocol.
    """
    curves: dict[str, list[tuple[int, float, float, float]]] = {}
    several = len({cell["spacing"] for cell in cells}) > 1
    for cell in cells:
        label = f"{cell['sampler']}, {cell['spacing']}" if several else str(cell["sampler"])
        low, high = (cell["value"] if cell.get(end) is None else cell[end] for end in ("low", "high"))
        curves.setdefault(label, []).append((cell["evaluations"], cell["value"], low, high))
    figure = Figure(figsize=(0.7 * WIDTH / DPI, 0.45 * WIDTH / DPI), dpi=DPI, layout="constrained")
    axes = figure.add_subplot()
    for i, (label, points) in enumerate(curves.items()):
        x, y, low, high = np.array(sorted(points)).T
        marker = "osD^vP*X"[i % 8]
        axes.errorbar(x, y, [y - low, high - y], fmt=f"{marker}-", capsize=3, label=label, markersize=5, linewidth=1.5)
    axes.set_xscale("log")
    axes.set_yscale("log", nonpositive="clip")
    axes.axhline(real_vs_real, color="0.5", linestyle="--", linewidth=1, label="held-out images")
    _logarithmic(axes)
    _axes(axes, "evaluations of the network, an image", "Frechet distance")
    axes.set_title(title, fontsize=SIZE)
    axes.legend(frameon=False, fontsize=SIZE)
    _save(figure, path)


def accuracy(path: str | Path, times: Sequence[int], shares: Sequence[float], chance: float) -> None:
    """Plot the accuracy of a classifier of x_t over t.

    Args:
        path: the PNG file to write.
        times: t, from 0.
        shares: of held-out samples that are classified correctly, in 0..1.
        chance: the share by guessing.
    """
    figure = Figure(figsize=(0.7 * WIDTH / DPI, 0.4 * WIDTH / DPI), dpi=DPI, layout="constrained")
    axes = figure.add_subplot()
    axes.plot(times, shares, "o-", markersize=5, linewidth=1.5, label="held out, EMA weights")
    axes.axhline(chance, color="0.5", linestyle="--", linewidth=1, label="guessing")
    axes.set_ylim(0, 1.02)
    _axes(axes, "t", "named correctly")
    axes.legend(frameon=False, fontsize=SIZE)
    _save(figure, path)


def guidance_sweep(path: str | Path, cells: Sequence[Mapping[str, Any]], real_vs_real: float, title: str = "") -> None:
    """Plot the effect of the guidance weight: distance and shares over the weight, and one against the other.

    Args:
        path: the PNG file to write.
        cells: each with w, value (the Frechet distance), precision and recall, agreement (the share of samples of the
            requested class) where classes were requested, and low and high of the distance where they are known.
        real_vs_real: the distance of held-out images.
        title: of the figure, such as the protocol.
    """
    w, distance = (np.array([cell[key] for cell in cells], dtype=float) for key in ("w", "value"))
    low, high = (
        np.array([cell["value"] if cell.get(end) is None else cell[end] for cell in cells], dtype=float)
        for end in ("low", "high")
    )
    spans = np.stack([distance - low, high - distance]).clip(min=0)
    shares = {"precision": "precision", "recall": "recall", "requested class": "agreement"}
    known = {label: np.array([cell[key] for cell in cells]) for label, key in shares.items() if key in cells[0]}
    label, share = next(reversed(known.items()))

    figure = Figure(figsize=(1.15 * WIDTH / DPI, 0.4 * WIDTH / DPI), dpi=DPI, layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    guided = w >= 1 if (w >= 1).sum() > 1 else w == w  # below 1 the condition is not followed: distant points
    left.errorbar(w, distance, spans, fmt="o-", capsize=3, markersize=5, linewidth=1.5, label="samples")
    right.plot(share[guided], distance[guided], "o-", markersize=5, linewidth=1.5)
    for axes, plotted in ((left, distance), (right, distance[guided])):
        axes.axhline(real_vs_real, color="0.5", linestyle="--", linewidth=1, label="held-out images")
        axes.set_yscale("log", nonpositive="clip")
        axes.set_ylim(0.7 * min(plotted.min(), real_vs_real), 1.5 * plotted.max())
        _logarithmic(axes)
    _axes(left, "weight w", "Frechet distance")
    left.legend(frameon=False, fontsize=SIZE - 1)
    for marker, (name, values) in zip("osD", known.items(), strict=False):
        middle.plot(w, values, f"{marker}-", markersize=5, linewidth=1.5, label=name)
    middle.set_ylim(-0.02, 1.02)
    _axes(middle, "weight w", "share of the samples")
    middle.legend(frameon=False, fontsize=SIZE - 1)
    for x, y, weight in zip(share[guided], distance[guided], w[guided], strict=True):
        right.annotate(f"{weight:g}", (x, y), xytext=(-5, 3), textcoords="offset points", ha="right", fontsize=SIZE - 1)
    right.margins(x=0.2)
    _axes(right, f"{label} (numbers: w)", "")
    figure.suptitle(title, fontsize=SIZE)
    _save(figure, path)


def spacings(path: str | Path, rows: Mapping[str, tuple[Sequence[float], Sequence[float]]]) -> None:
    """Plot the times of samplers: each row's times as marks, over t on the left and over lambda on the right.

    Args:
        path: the PNG file to write.
        rows: label -> times, and lambda at these times; infinite ones (t = 0) are left out.
    """
    figure = Figure(figsize=(WIDTH / DPI, (0.9 + 0.34 * len(rows))), dpi=DPI, layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for i, (times, lambda_) in enumerate(rows.values()):
        left.plot(np.asarray(times), np.full(len(times), i), "|", color=f"C{i}", markersize=13, markeredgewidth=1.6)
        finite = np.asarray(lambda_, dtype=float)
        finite = finite[np.isfinite(finite)]
        right.plot(finite, np.full(len(finite), i), "|", color=f"C{i}", markersize=13, markeredgewidth=1.6)
    left.set_yticks(range(len(rows)), list(rows))
    left.set_ylim(len(rows) - 0.4, -0.6)
    left.invert_xaxis()  # sampling goes from left to right
    _axes(left, "t", "")
    _axes(right, r"$\lambda_t$, half the log-SNR", "")
    for axes in (left, right):
        axes.grid(axis="y", visible=False)
        axes.tick_params(axis="y", length=0)
    _save(figure, path)


def lr_range(
    path: str | Path,
    rates: Sequence[float],
    losses: Sequence[float],
    averaged: Sequence[float],
    marks: Mapping[str, float | None],
) -> None:
    """Plot a learning-rate range test: the loss of every step over its rate, and the suggested rates.

    Args:
        path: the PNG file to write.
        rates, losses, averaged: (n,), see `ddpm.study.lr_range.RangeTest`.
        marks: label -> rate; None where there is none.
    """
    figure = Figure(figsize=(WIDTH / DPI, 0.45 * WIDTH / DPI), dpi=DPI, layout="constrained")
    axes = figure.add_subplot()
    raw, smooth = (np.where(np.isfinite(y), y, np.nan) for y in (losses, averaged))
    axes.plot(rates, raw, color="tab:blue", alpha=0.3, linewidth=0.8, label="loss of a step")
    axes.plot(rates, smooth, color="tab:blue", linewidth=1.8, label="moving average")
    for (label, rate), colour in zip(marks.items(), ("tab:red", "0.5", "tab:green"), strict=False):
        if rate is not None:
            axes.axvline(rate, color=colour, linewidth=1.2, linestyle="--", label=f"{label}: {rate:.2g}")
    axes.set_xscale("log")
    if np.isfinite(smooth).any():
        low, high = np.nanmin(raw), max(np.nanmax(smooth[:1]), np.nanmax(raw[: max(1, len(raw) // 2)]))
        if high > low:  # else the burst would flatten the rest
            axes.set_ylim(low - 0.08 * (high - low), high + 0.15 * (high - low))
    _axes(axes, "learning rate", "loss")
    axes.legend(frameon=False, fontsize=SIZE)
    _save(figure, path)


def search(path: str | Path, trials: Sequence[Any], space: Mapping[str, Any], measure: str, maximise: bool) -> None:
    """Plot a hyperparameter search: the values in the order of trials with the best so far, and over each setting.

    Args:
        path: the PNG file to write.
        trials: Optuna's trials.
        space: key -> Optuna's distribution.
        measure: name of the values.
        maximise: whether larger is better.
    """
    columns, rows = min(4, len(space)), math.ceil(len(space) / 4)
    height = (0.32 + 0.3 * rows) * WIDTH
    figure = Figure(figsize=(WIDTH / DPI, height / DPI), dpi=DPI, layout="constrained")
    grid = figure.add_gridspec(1 + rows, columns, height_ratios=[1.1, *[1] * rows])
    _history(figure.add_subplot(grid[0, :]), trials, measure, maximise)
    done = [t for t in trials if t.state.name == "COMPLETE"]
    values, numbers = [t.value for t in done], [t.number for t in done]
    for i, (key, distribution) in enumerate(space.items()):
        axes, choices = figure.add_subplot(grid[1 + i // columns, i % columns]), getattr(distribution, "choices", None)
        chosen = [t.params[key] for t in done]
        places = [choices.index(choice) for choice in chosen] if choices else chosen
        axes.scatter(places, values, c=numbers, cmap="Blues", vmin=-len(trials) / 2, s=18)  # the darker the later
        if choices:
            axes.set_xticks(range(len(choices)), choices)
            axes.set_xlim(-0.5, len(choices) - 0.5)
        elif distribution.log:
            axes.set_xscale("log")
        _axes(axes, key, measure if i % columns == 0 else "")
    if values and 0 < 5 * min(values) < max(values):
        for axes in figure.axes:
            axes.set_yscale("log")
    _save(figure, path)


def _history(axes: Axes, trials: Sequence[Any], measure: str, maximise: bool) -> None:
    """Plot the value of each trial by its number, and a mark at the bottom for those without one."""
    done = [t for t in trials if t.state.name == "COMPLETE"]
    numbers, values = [t.number for t in done], [t.value for t in done]
    axes.plot(numbers, values, "o", color="tab:blue", markersize=4, label="complete")
    if done:
        best = [*(np.maximum if maximise else np.minimum).accumulate(values)]
        steps = [*numbers, max(t.number for t in trials)], [*best, best[-1]]
        axes.step(*steps, where="post", color="tab:red", linewidth=1.4, label="best so far")
    for state, label, marker, colour in (("PRUNED", "pruned", "|", "0.5"), ("FAIL", "failed", "x", "tab:orange")):
        if places := [t.number for t in trials if t.state.name == state]:
            across = axes.get_xaxis_transform()
            axes.plot(places, [0.03] * len(places), marker, color=colour, transform=across, label=label)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    _axes(axes, "trial", measure)
    axes.legend(frameon=False, fontsize=SIZE, ncols=4, loc="lower right", bbox_to_anchor=(1, 1))  # above the values


def schedules(path: str | Path, named: Mapping[str, NoiseSchedule]) -> None:
    """Plot noise schedules: signal and noise, log-SNR and betas over t, and a table of their properties.

    Args:
        path: the PNG file to write.
        named: name -> schedule, one colour each. Where they differ in T, the horizontal axis is t / T.
    """
    line = 0.24  # inches of a row of the table
    graphs, table = 2.5, line * (len(named) + 1)
    figure = Figure(figsize=(WIDTH / DPI, graphs + table), dpi=DPI, layout="constrained")
    grid = figure.add_gridspec(2, 3, height_ratios=[graphs, table])
    share, snr, beta = panels = [figure.add_subplot(grid[0, i]) for i in range(3)]
    same_T = len({schedule.T for schedule in named.values()}) == 1
    styles: list[dict[str, Any]] = [
        {"color": f"C{i}", "linewidth": max(2.6 - 0.45 * i, 0.8)} for i in range(len(named))
    ]
    for style, schedule in zip(styles, named.values(), strict=True):
        t = np.arange(schedule.T + 1) / (1 if same_T else schedule.T)
        marker = "." if schedule.T < 20 else ""
        share.plot(t, schedule.alpha_bar.sqrt(), marker=marker, **style)
        share.plot(t, (1 - schedule.alpha_bar).sqrt(), marker=marker, linestyle="--", **style)
        log_snr = 2 * schedule.lambda_
        snr.plot(t, log_snr.where(log_snr.isfinite(), math.nan), marker=marker, **style)
        beta.plot(t[1:], schedule.beta[1:], marker=marker, **style)
        clipped = (schedule.beta == schedule.beta.max()) & (schedule.clipped > 0)
        beta.plot(t[clipped], schedule.beta[clipped], "o", markerfacecolor="white", markersize=5, color=style["color"])
    share.set_title(r"$\sqrt{\bar\alpha_t}$ (signal) and $\sqrt{1 - \bar\alpha_t}$ (noise, dashed)", fontsize=SIZE)
    snr.set_title("log-SNR", fontsize=SIZE)
    beta.set_title(
        r"$\beta_t$" + (" (rings: clipped)" if any(s.clipped for s in named.values()) else ""), fontsize=SIZE
    )
    beta.set_yscale("log")
    for axes in panels:
        _axes(axes, "t" if same_T else "t / T", "")
        axes.tick_params(labelsize=SIZE - 1)
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=same_T))

    paper = figure.add_subplot(grid[1, :])
    paper.set_axis_off()
    paper.set(xlim=(0, 1), ylim=(len(named) + 0.5, -0.5))
    cells = schedule_table(named)
    widths = np.array([max(1.1 * _text_width(cell) for cell in column) for column in zip(*cells, strict=True)])
    widths *= (SIZE - 1) / SIZE / (WIDTH - 24)
    ends = 0.045 + widths.cumsum() + np.arange(len(widths)) * (0.955 - widths.sum()) / (len(widths) - 1)
    for row, words in enumerate(cells):
        for column, (x, cell) in enumerate(zip([0.045, *ends[1:]], words, strict=True)):
            weight = "bold" if row == 0 else "normal"
            paper.text(x, row, cell, ha="right" if column else "left", va="center", fontsize=SIZE - 1, weight=weight)
        if row:
            paper.plot([0, 0.035], [row, row], **styles[row - 1])
    _save(figure, path)


SCHEDULE_COLUMNS = (
    "schedule", "T", "min beta", "max beta", "clipped", "log-SNR at 1", "log-SNR at T", "signal left in x_T",
    "1/sqrt(alpha_bar_T)",
)  # fmt: skip


def schedule_table(named: Mapping[str, NoiseSchedule]) -> list[tuple[str, ...]]:
    """Return the table of `ddpm.schedules.report` as text: the columns' names, then one row a schedule."""
    rows: list[tuple[str, ...]] = [SCHEDULE_COLUMNS]
    for name, schedule in named.items():
        r = report(schedule)
        last = r["1 / sqrt(alpha_bar_T)"]
        rows.append(
            (
                name,
                f"{r['T']:,}",
                f"{r['beta_min']:.3g}",
                f"{r['beta_max']:.3g}",
                f"{r['betas clipped']}",
                f"{r['log-SNR at 1']:.1f}",
                f"{r['log-SNR at T']:.1f}",
                f"{100 * r['sqrt(alpha_bar_T)']:.2g}%",
                f"{last:,.0f}" if last >= 100 else f"{last:.3g}",
            )
        )
    return rows


def png(draw: Callable[..., None], *arguments: object, colours: int = 128, **options: object) -> bytes:
    """Return the plot of one of these functions as PNG bytes: `IPython.display.Image(png(loss, train, held_out))`.

    Colours are reduced to a palette of `colours`, which makes a notebook a third of the size; greys are unchanged.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "figure.png"
        draw(path, *arguments, **options)
        picture: Image.Image = Image.open(path)
        picture = picture if picture.mode == "L" else picture.quantize(colours, dither=Image.Dither.NONE)
        file = io.BytesIO()
        picture.save(file, format="PNG", optimize=True)
    return file.getvalue()


def _axes(axes: Axes, x_label: str, y_label: str) -> None:
    """Apply the style that all graphs share."""
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def _logarithmic(axes: Axes) -> None:
    """Label logarithmic axes at 1, 2 and 5 of every decade with plain numbers, not powers."""
    for axis in (axis for axis in (axes.xaxis, axes.yaxis) if axis.get_scale() == "log"):
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_minor_formatter(NullFormatter())
        axis.set_major_formatter("{x:g}")


def _arrays(history: History) -> tuple[np.ndarray, np.ndarray]:
    """Return steps and losses (n,), NaN where a loss is not finite."""
    steps = np.array([step for step, _ in history], dtype=float)
    losses = np.array([math.nan if value is None else value for _, value in history], dtype=float)
    return steps, np.where(np.isfinite(losses), losses, math.nan)


def _moving_average(values: np.ndarray) -> np.ndarray:
    """Return the centred mean over a twentieth of the values (n,), less towards both ends; NaN is ignored and stays."""
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
    """Plot blocks of images side by side, with labels. The layout is in whole pixels, so that no image is resampled.

    Args:
        blocks: (heading, rows of images (n, C, H, W)), all with the same numbers of rows and images.
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
    left = 12 + math.ceil(max((_text_width(line) + 8 for label in rows for line in label.split("\n")), default=0))
    top = 12 + (line if title else 0) + heading + lines * line
    space = 18  # between two blocks and at the right
    total_wide, total_tall = left + len(blocks) * (wide + space), top + tall + 12

    figure = Figure(figsize=(total_wide / DPI, total_tall / DPI), dpi=DPI)

    def text(x: float, y: float, label: str, **style: Any) -> None:
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
    """Return the width in pixels of one line at the size of labels."""
    return TextPath((0, 0), label, size=SIZE).get_extents().width * DPI / 72


def rendered(figure: Figure) -> np.ndarray:
    """Render a figure to pixels, uint8 (H, W, 3), by Agg."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.ascontiguousarray(np.asarray(canvas.buffer_rgba())[..., :3])


def _save(figure: Figure, path: str | Path) -> None:
    """Render with Agg and write a small file: no alpha, and one channel where there is no colour."""
    picture = rendered(figure)
    grey = (picture == picture[..., :1]).all()
    images.save_png(path, np.ascontiguousarray(picture[..., :1]) if grey else picture)
