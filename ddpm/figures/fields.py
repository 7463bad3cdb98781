"""Figures of the plane: densities, vector fields over them, trajectories, and moving points.

All take values computed beforehand, on the grid of `plane`. Blue is density, ink is a field, orange is points.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import BoundaryNorm, LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from ddpm.figures import images
from ddpm.figures.plots import DPI, SIZE, WIDTH, rendered

INK, MUTED, ORANGE, GREY = (
    "#1c2027",
    "#5a6470",
    "#d55e00",
    "#c8c8c8",
)  # distinguishable to the colour-blind, also from blue
DENSITY = LinearSegmentedColormap.from_list("density", ["#ffffff", "#d6e4f3", "#9cc1e2", "#5f9bcb"])
ERROR = LinearSegmentedColormap.from_list("error", ["#ffffff", "#fbe3cf", "#f3ba8b", "#e08b4a"])
BANDS = 16  # colour bands of a density, spaced so that a normal distribution has equally wide rings
DEPTH = 8  # nats below its maximum at which a density turns white: four standard deviations of a normal one
ACROSS = 4  # panels in a row
COLOURS = 160  # of a palette: with fewer, dots would take the colour of their surroundings
ARROWS, LONGEST = 19, 1.4  # arrows in a row of a frame; their largest length over their distance


class Field(NamedTuple):
    """Density and vector field over a rectangle of the plane: values on a grid, row i at y[i] and column j at x[j]."""

    x: Tensor  # (W,), ascending and evenly spaced
    y: Tensor  # (H,), likewise
    log_density: Tensor | None = None  # (H, W), in nats, up to a constant
    vectors: Tensor | None = None  # (H, W, 2)


def plane(limit: float = 3.0, size: int = 81) -> tuple[Tensor, Tensor, Tensor]:
    """Return the grid of a square around 0.

    Args:
        limit: half its side, > 0.
        size: of the grid, points a side, >= 2.

    Returns: x (size,), y (size,), and the points (size, size, 2) in the order of a `Field`; flatten them to (B, 2) for
    a network.
    """
    line = torch.linspace(-limit, limit, size)
    return line, line, torch.stack(torch.meshgrid(line, line, indexing="xy"), dim=-1)


def vector_field(path: str | Path, panels: Mapping[str, Field], title: str | None = None) -> None:
    """Plot streamlines of fields, side by side, over the density or over the length of the vectors.

    Over a density only directions are visible. A panel without one, such as the difference of two fields, is shaded by
    the length of its vectors, with a colour bar; beyond their 98 % quantile the colour stays the same.

    Args:
        path: the PNG file to write.
        panels: title -> a field with vectors; with `log_density` or without.
        title: of the figure.
    Raises: ValueError for no panels, a field without vectors, or values of another shape than the grid.
    """
    _must_have(panels, vectors=True)
    figure, grid = _panels(len(panels), title, bar=True)
    for axes, (name, field) in zip(grid, panels.items(), strict=False):
        _shade(figure, axes, field)
        _streamlines(axes, field)
        _looks(axes, field, name)
    _save(figure, path)


def density_map(
    path: str | Path,
    panels: Mapping[str, Field],
    points: Mapping[str, Tensor] | None = None,
    title: str | None = None,
) -> None:
    """Plot densities side by side, in nats below their maxima, with or without points over them.

    Args:
        path: the PNG file to write.
        panels: title -> a field with `log_density`.
        points: title of a panel -> points (n, 2) to plot in it.
        title: of the figure.
    Raises: ValueError for no panels, a field without density, or values of another shape than the grid.
    """
    _must_have(panels, log_density=True)
    figure, grid = _panels(len(panels), title, bar=True)
    for axes, (name, field) in zip(grid, panels.items(), strict=False):
        _shade(figure, axes, field)
        if points and name in points:
            _dots(axes, points[name])
        _looks(axes, field, name)
    _save(figure, path)


def chains(path: str | Path, panels: Mapping[str, tuple[Field, Tensor]], title: str | None = None) -> None:
    """Plot trajectories through a density, of a Markov chain or along a flow: from rings to dots.

    Args:
        path: the PNG file to write.
        panels: title -> a field with `log_density`, and walks (k, n, 2): the k successive points of n trajectories.
        title: of the figure.
    Raises: ValueError for no panels, walks of another shape, and fields as in `density_map`.
    """
    _must_have({name: field for name, (field, _) in panels.items()}, log_density=True)
    if wrong := [tuple(walks.shape) for _, walks in panels.values() if walks.ndim != 3 or walks.shape[2] != 2]:
        raise ValueError(f"walks are (k, n, 2), not {wrong}")
    figure, grid = _panels(len(panels), title)
    for axes, (name, (field, walks)) in zip(grid, panels.items(), strict=False):
        _shade(None, axes, field)
        x, y = walks.detach().cpu().double().numpy().transpose(2, 0, 1)  # (k, n) each
        axes.plot(x, y, color=ORANGE, linewidth=0.8, alpha=min(0.8, max(0.25, 4 / math.sqrt(x.shape[1]))), zorder=2)
        axes.plot(x[0], y[0], "o", color=INK, markerfacecolor="white", markersize=4, markeredgewidth=0.8, zorder=3)
        axes.plot(x[-1], y[-1], "o", color=INK, markersize=3.5, markeredgewidth=0, zorder=4)
        _looks(axes, field, name)
    _save(figure, path)


def panels_of_points(
    path: str | Path,
    rows: Sequence[tuple[str, Sequence[Tensor]]],
    columns: Sequence[str],
    behind: Tensor | None = None,
    title: str | None = None,
) -> None:
    """Plot points at several times in rows, such as a process forward and back, all within the same limits.

    The limits are the same on both axes, around 0: 1.1 times the 99 % quantile of the coordinates, of the widest panel.

    Args:
        path: the PNG file to write.
        rows: label on the left -> points (n, 2) of each column.
        columns: labels on top.
        behind: points (n, 2) to plot in grey behind those of every panel, such as the data.
        title: of the figure.
    Raises: ValueError for rows of another length than the columns, and for panels that are not points.
    """
    every = [x for _, panels in rows for x in panels]
    if not every or any(len(panels) != len(columns) for _, panels in rows):
        raise ValueError(f"rows of {[len(panels) for _, panels in rows]} panels, but {len(columns)} labels of columns")
    if wrong := [tuple(x.shape) for x in every if x.ndim != 2 or x.shape[1] != 2 or len(x) == 0]:
        raise ValueError(f"panels hold one or more points (n, 2), not {wrong}")
    limit = 1.1 * max([_reach(x) for x in every], default=0.0) or 1.0
    side = min(260.0, (WIDTH - 30) / len(columns))
    tall = len(rows) * side + 44 + (22 if title else 0)
    figure = Figure(figsize=((30 + len(columns) * side) / DPI, tall / DPI), dpi=DPI)
    figure.set_layout_engine("constrained", w_pad=0.02, h_pad=0.02, wspace=0.02, hspace=0.02)
    grid = figure.subplots(len(rows), len(columns), sharex=True, sharey=True, squeeze=False)
    for i, (label, panels) in enumerate(rows):
        for j, x in enumerate(panels):
            axes = grid[i, j]
            if behind is not None:
                _dots(axes, behind, GREY, side / 260)
            _dots(axes, x, size=side / 260)
            axes.set(xlim=(-limit, limit), ylim=(-limit, limit), aspect="equal")
            axes.xaxis.set_major_locator(MaxNLocator(3, steps=[1, 2, 5]))
            axes.yaxis.set_major_locator(MaxNLocator(3, steps=[1, 2, 5]))
            axes.tick_params(labelsize=SIZE - 2, length=2, color=GREY, labelcolor="0.35")
            axes.spines[:].set_color(GREY)
            if i == 0:
                axes.set_title(columns[j], fontsize=SIZE - (side < 120))
        grid[i, 0].set_ylabel(label, fontsize=SIZE)
    if title:
        figure.suptitle(title, fontsize=SIZE + 1)
    _save(figure, path)


def field_animation(
    path: str | Path,
    frames: Sequence[tuple[str, Tensor, Field]],
    seconds_per_frame: float = 0.12,
    behind: Tensor | None = None,
) -> None:
    """Animate moving points, with the field and the density at each time, as a GIF.

    An arrow has the field's direction, and the root of its length: within a frame lengths differ by powers of ten.

    Args:
        path: the GIF file to write.
        frames: (title such as "t = 40", points (n, 2), the field of that time, with vectors or density or both).
        seconds_per_frame: duration of a frame; the last stays for two seconds.
        behind: points (n, 2) to plot in grey in every frame, such as the data.
    Raises: ValueError for no frames, and for fields as in `vector_field`.
    """
    _must_have({f"frame {i}": field for i, (_, _, field) in enumerate(frames)})
    images.save_gif(path, [_frame(*frame, behind) for frame in frames], seconds_per_frame, colours=COLOURS)


def _frame(title: str, points: Tensor, field: Field, behind: Tensor | None) -> np.ndarray:
    """Return one frame of an animation, uint8 (H, W, 3)."""
    figure = Figure(figsize=(360 / DPI, 380 / DPI), dpi=DPI)
    axes = figure.add_axes((0.02, 0.02, 0.96, 0.96 * 360 / 380))
    if field.log_density is not None:
        _shade(None, axes, field)
    if behind is not None:
        _dots(axes, behind, GREY)
    if field.vectors is not None:
        rows, columns = (np.linspace(0, len(line) - 1, ARROWS).round().astype(int) for line in (field.y, field.x))
        u, v = _numpy(field.vectors)[np.ix_(rows, columns)].transpose(2, 0, 1)
        root = np.sqrt(np.hypot(u, v))
        u, v = (np.divide(part, root, out=np.zeros_like(part), where=root > 0) for part in (u, v))
        x, y = _numpy(field.x)[columns], _numpy(field.y)[rows]
        longest, room = root[np.isfinite(root)].max(initial=0.0) or 1.0, LONGEST * (x[1] - x[0])
        style: dict[str, Any] = {"angles": "xy", "scale_units": "xy", "pivot": "mid", "width": 0.003, "headwidth": 4}
        axes.quiver(x, y, u, v, color=MUTED, scale=longest / room, **style)
    _dots(axes, points)
    _looks(axes, field, title)
    axes.set(xticks=[], yticks=[])
    return rendered(figure)


def _must_have(panels: Mapping[str, Field], vectors: bool = False, log_density: bool = False) -> None:
    """Raise ValueError for fields without the required values, or with values that do not fit their grid."""
    if not panels:
        raise ValueError("a figure needs one or more panels")
    for name, field in panels.items():
        shape = (len(field.y), len(field.x))
        for key, there, needed, expected in (
            ("log_density", field.log_density, log_density, shape),
            ("vectors", field.vectors, vectors, (*shape, 2)),
        ):
            if there is None and needed:
                raise ValueError(f"{name}: the field has no {key}, which is to be drawn")
            if there is not None and there.shape != expected:
                raise ValueError(f"{name}: {key} has the shape {tuple(there.shape)}, and its grid {expected}")


def _panels(count: int, title: str | None, bar: bool = False) -> tuple[Figure, Sequence[Axes]]:
    """Return a figure of `count` square panels, four in a row, with room for a colour bar beneath each."""
    columns, rows = min(ACROSS, count), math.ceil(count / ACROSS)
    side = min(400, WIDTH / columns)
    size = (columns * side / DPI, (rows * (side + (72 if bar else 24)) + (24 if title else 0)) / DPI)
    figure = Figure(figsize=size, dpi=DPI, layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False).flatten()
    for axes in grid[count:]:
        axes.set_axis_off()
    if title:
        figure.suptitle(title, fontsize=SIZE + 2)
    return figure, list(grid)


def _shade(figure: Figure | None, axes: Axes, field: Field) -> None:
    """Plot the density in nats below its maximum, or the length of the vectors; a colour bar needs the figure."""
    if field.log_density is not None:
        values = _numpy(field.log_density)
        values = values - (values[np.isfinite(values)].max() if np.isfinite(values).any() else 0.0)
        levels = -DEPTH * np.linspace(1, 0, BANDS + 1) ** 2
        ticks, colours, label = list(levels[:: BANDS // 4]), DENSITY, "log density below its maximum"
    else:
        values = np.hypot(*_numpy(field.vectors).transpose(2, 0, 1))
        finite = values[np.isfinite(values)]
        top = float(np.quantile(finite, 0.98) if finite.size else 0.0) or 1.0  # nothing may be finite
        ticks = list(MaxNLocator(4, steps=[1, 2, 2.5, 5, 10]).tick_values(0, top))
        levels, colours, label = np.linspace(0, ticks[-1], BANDS + 1), ERROR, "length of the vectors"
    values = np.nan_to_num(values, nan=levels[0] - 1, neginf=levels[0] - 1)
    end: Any = "max" if colours is ERROR else "min"  # the end that the bar cuts off
    norm = BoundaryNorm(list(levels), colours.N, extend=end)  # a colour for each band, however narrow
    style: dict[str, Any] = {"levels": levels, "cmap": colours, "norm": norm, "extend": end}
    shade = axes.contourf(_numpy(field.x), _numpy(field.y), values, **style)
    if figure is not None:
        bar = figure.colorbar(shade, ax=axes, orientation="horizontal", fraction=0.05, pad=0.02, aspect=30)
        bar.set_ticks(ticks, labels=[f"{tick + 0.0:g}" for tick in ticks])
        bar.ax.tick_params(labelsize=SIZE - 2, length=2)
        bar.ax.minorticks_off()
        bar.outline.set_linewidth(0.4)
        bar.set_label(label, fontsize=SIZE - 1)


def _streamlines(axes: Axes, field: Field) -> None:
    u, v = _numpy(field.vectors).transpose(2, 0, 1)
    axes.streamplot(
        _numpy(field.x),
        _numpy(field.y),
        u,
        v,
        density=1.3,
        minlength=0.06,
        color=INK,
        linewidth=0.6,
        arrowsize=0.6,
        zorder=2,
    )


def _dots(axes: Axes, points: Tensor, colour: str = ORANGE, size: float = 1.0) -> None:
    """Plot points (n, 2), the smaller and fainter the more there are; grey ones lie behind and are not faint."""
    x = _numpy(points)
    n, front = len(x), colour != GREY
    alpha = min(0.85, max(0.2, 18 / math.sqrt(n))) if front else 1.0
    area = size * min(9, max(1.5, 4000 / n))
    axes.scatter(x[:, 0], x[:, 1], color=colour, linewidths=0, s=area, alpha=alpha, zorder=3 if front else 1)


def _looks(axes: Axes, field: Field, title: str) -> None:
    """Apply the style that all panels share: the grid's limits, equal axes, few ticks."""
    (left, right), (bottom, top) = (_numpy(line)[[0, -1]] for line in (field.x, field.y))
    axes.set(xlim=(left, right), ylim=(bottom, top), aspect="equal")
    axes.set_title(title, fontsize=SIZE + 1)
    axes.xaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 5]))
    axes.yaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 5]))
    axes.tick_params(labelsize=SIZE - 2, length=2, color=GREY, labelcolor="0.35")
    axes.spines[:].set_color(GREY)


def _reach(x: Tensor) -> float:
    """Return the 99 % quantile of the finite absolute coordinates of points (n, 2)."""
    size = abs(_numpy(x))
    size = size[np.isfinite(size).all(1)]
    return float(np.quantile(size, 0.99)) if size.size else 0.0


def _numpy(x: Tensor | None) -> np.ndarray:
    assert x is not None  # see `_must_have`
    return x.detach().cpu().double().numpy()


def _save(figure: Figure, path: str | Path) -> None:
    """Write a small file: shades and lines have few colours."""
    images.save_png(path, rendered(figure), COLOURS)
