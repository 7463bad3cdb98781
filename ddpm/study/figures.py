"""Figures of findings: estimates and differences, effects, fronts, curves, and a summary of a whole study."""

import html
import io
import math
import re
import textwrap
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter
from matplotlib.transforms import blended_transform_factory
from PIL import Image

from ddpm.figures.plots import DPI, SIZE
from ddpm.study import formatting
from ddpm.study.findings import Curve, Effect, Findings, Front, Interaction, Measure, TradeOff
from ddpm.study.statistics import BETTER, HIGHER, LOWER, NEITHER, NOT_DECIDED, WORSE, Estimate

INK, MUTED, LINE, BAND, PAPER = "#1c2027", "#68707b", "#dfe3e8", "#f5f6f8", "#fefefe"  # a page may replace them
BLUE, GOOD, BAD = "#1f77b4", "#00795a", "#c04a12"  # distinguishable to the colour-blind
VARIABLES = {INK: "ink", MUTED: "muted", LINE: "line", BAND: "band", PAPER: "paper", GOOD: "better", BAD: "worse"}
COLOURS = {BETTER: GOOD, WORSE: BAD, HIGHER: INK, LOWER: INK}
WIDTH = 10.8  # inches of a figure
ROW = 0.27  # inches of an arm
ROWS = 25  # arms in a figure, the baseline among them
LINES = 12  # curves of a figure that have a colour
NAMED = 12  # arms on a front that have a number
NARROW = 36  # characters of a line in a legend
LABEL = 52  # characters of a label on one line
SUMMARY = 1000  # pixels that the summary is wide
ROOM = 140  # width in pixels of a panel in which words and numbers do not overlap
SUMMARY_BYTES = 190_000
TILE, SCATTER = 58, 74  # height in pixels of an arm's samples, or of the picture of its points, in the summary
SMALL = 44  # the largest of both where there are more than FEW arms
FEW = 10  # arms of a summary, the baseline among them, unless they are compared in blocks
TEXT: dict[str, Any] = {"fontsize": SIZE, "color": INK}

Style = Mapping[str, Any]


def chosen(findings: Findings, most: int = ROWS) -> tuple[str, ...]:
    """Return the arms in figures: all in the study's order, or the baseline and the best by the first measure.

    With blocks, the baseline and the best of each, in the study's order.

    Args:
        findings: of the study.
        most: largest number of arms, including the baseline.
    """
    labels = [arm.label for arm in findings.arms]
    if len(labels) <= most:
        return tuple(labels)
    against = findings.against
    others = [label for label in labels if label != against[label]]
    if findings.measures:
        first = findings.measures[0]
        sign = 1 if first.better == LOWER else -1
        others.sort(key=lambda label: _rank(first.arms.get(label), sign))
    if findings.blocks is None:
        return (findings.baseline, *others[: most - 1])
    places: dict[str, int] = {}  # rank of an arm in its block: the first brings its baseline
    for label in others:
        places[label] = 1 + sum(against[other] == against[label] for other in places)
    best = set(sorted(labels, key=lambda label: places.get(label, 1))[:most])
    return tuple(label for label in labels if label in best)


def styles(labels: Iterable[str], against: Mapping[str, str] | None = None) -> dict[str, Style]:
    """Return colour and line style of each label, the same in every figure of a study; baselines have the ink's colour.

    Args:
        labels: of the curves.
        against: label -> the arm that it is compared with, see `Findings.against`.
    """
    chosen: dict[str, Style] = {}
    places = {True: 0, False: 0}
    for label in labels:
        base = (against or {}).get(label) == label
        i, places[base] = places[base], places[base] + 1
        chosen[label] = {"color": INK if base else f"C{i % 10}", "linestyle": ("-", "--", "-.", ":")[i % 4]}
    return chosen


def measure(result: Measure, labels: Sequence[str], against: Mapping[str, str]) -> Figure:
    """Plot arms in rows: seeds, mean and interval on the left, differences to the baseline on the right.

    Args:
        result: the measure.
        labels: the arms, from the top; those without the measure are left out.
        against: label -> the arm that it is compared with, see `Findings.against`.
    """
    rows = [label for label in labels if label in result.arms]
    wide = any(label in result.differences for label in rows)
    names = [_two_lines(name, 38) for name in shortened(rows, 74).values()]
    row = ROW if all("\n" not in name for name in names) else 1.35 * ROW
    figure = Figure(figsize=(WIDTH, 0.85 + row * max(len(rows), 2)), dpi=DPI, layout="constrained")
    panels = figure.subplots(1, 2 if wide else 1, sharey=True, squeeze=False)[0]
    _bands(panels, rows, against)
    estimates(panels[0], result, rows, against)
    panels[0].set_yticks([])
    at_left = blended_transform_factory(panels[0].transAxes, panels[0].transData)
    for y, (label, name) in enumerate(zip(rows, names, strict=True)):
        weight = "bold" if against.get(label) == label else "normal"
        lines = name.split("\n")  # each separately: a browser aligns them with its own font
        for line, text in enumerate(lines):
            at = y + 0.4 * (line - (len(lines) - 1) / 2)
            panels[0].text(-0.015, at, text, transform=at_left, ha="right", va="center", weight=weight, **TEXT)
    if wide:
        differences(panels[1], result, rows, against)
    for axes in panels:
        axes.tick_params(axis="y", length=0)
        axes.grid(axis="y", visible=False)
    return figure


def estimates(axes: Axes, result: Measure, rows: Sequence[str], against: Mapping[str, str]) -> None:
    """Plot each row's seeds as small dots beneath its mean and interval; held-out images as a dashed line."""
    every = []
    for y, label in enumerate(rows):
        if (of := result.arms.get(label)) is None:
            continue
        colour = INK if against.get(label) == label else BLUE
        every += _row(axes, y, of.mean, of.low, of.high, list(of.points.values()), colour)
    if result.real is not None:
        finite = [value for value in every if math.isfinite(value)]
        low, high = (min(finite), max(finite)) if finite else (result.real, result.real)
        near = low - (high - low) / 2 <= result.real <= high + (high - low) / 2  # else it would compress the arms
        if near:
            axes.axvline(result.real, color=MUTED, linestyle="--", linewidth=1, zorder=1)
            every.append(result.real)
        text = (
            f"dashed: real, {formatting.number(result.real)}"
            if near
            else f"real: {formatting.number(result.real)}, not shown"
        )
        axes.set_title(text, fontsize=SIZE - 1, color=MUTED)
    positive = [value for value in every if math.isfinite(value)]
    if positive and 0 < 20 * min(positive) < max(positive):
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.xaxis.set_major_formatter("{x:g}")
    _looks(axes, plain(shorten(formatting.heading(result), 48)), "")


def differences(axes: Axes, result: Measure, rows: Sequence[str], against: Mapping[str, str]) -> None:
    """Plot each row's difference to the baseline, with a line at zero; only the seeds of an undecided arm."""
    axes.axvline(0, color=INK, linewidth=1, zorder=1)
    compared = [result.differences[label] for label in rows if label in result.differences]
    reaches = [_reach([of.mean, *of.points.values()]) for of in compared]
    limit = 4 * float(np.median(reaches))
    far = 0 < 2 * limit < max(reaches)  # one arm that failed to learn would compress all others into the zero line
    at_edge = blended_transform_factory(axes.transAxes, axes.transData)
    for y, label in enumerate(rows):
        if (of := result.differences.get(label)) is None:
            if against.get(label) == label:
                axes.text(1.02, y, "baseline", transform=at_edge, va="center", **TEXT)
            continue
        undecided = of.verdict == NOT_DECIDED
        colour = COLOURS.get(of.verdict, MUTED)
        weight = "bold" if of.verdict in COLOURS else "normal"
        axes.text(1.02, y, of.verdict, transform=at_edge, va="center", fontsize=SIZE, color=colour, weight=weight)
        points = list(of.points.values())
        if far and not abs(of.mean) <= limit:
            right = of.mean > 0
            axes.plot(0.985 if right else 0.015, y, ">" if right else "<", color=colour, transform=at_edge)
            place: dict[str, Any] = {"ha": "right" if right else "left", "va": "center", "transform": at_edge}
            axes.text(
                0.96 if right else 0.04,
                y,
                formatting.number(of.mean, signed=True),
                **place,
                fontsize=SIZE,
                color=colour,
            )
        elif undecided:
            axes.plot(points, [y] * len(points), "o", markersize=4, markerfacecolor="none", color=MUTED)
        else:
            _row(axes, y, of.mean, of.low, of.high, points, colour)
    if far:
        axes.set_xlim(-1.5 * limit, 1.5 * limit)
    if result.better != NEITHER:
        sides = ("← better", "worse →") if result.better == LOWER else ("← worse", "better →")
        axes.set_title(sides[0], loc="left", fontsize=SIZE - 1, color=MUTED)
        axes.set_title(sides[1], loc="right", fontsize=SIZE - 1, color=MUTED)
    _looks(axes, "difference to the baseline", "")


def effects(factors: Sequence[Effect], first: Measure) -> Figure:
    """Plot main effects, a panel a factor: the mean of all runs at each level, with its interval and seeds."""
    across = min(len(factors), 3)
    down = math.ceil(len(factors) / across)
    figure = Figure(figsize=(WIDTH * max(across, 2) / 3, 2.5 * down), dpi=DPI, layout="constrained")
    panels = figure.subplots(down, across, sharey=True, squeeze=False)
    for axes in panels.flat[len(factors) :]:
        axes.set_axis_off()
    for i, effect in enumerate(factors):
        axes = panels.flat[i]
        x = range(len(effect.levels))
        of = list(effect.levels.values())
        axes.plot(x, [_finite(e.mean) for e in of], "-", color=BLUE, alpha=0.35, linewidth=1.2)
        for at, e in zip(x, of, strict=True):
            values = [_finite(value) for value in e.points.values()]
            axes.plot([at + 0.12] * len(values), values, "o", color=BLUE, alpha=0.35, markersize=3, markeredgewidth=0)
            if e.low is not None and e.high is not None:
                axes.plot([at, at], [_finite(e.low), _finite(e.high)], color=BLUE, linewidth=2)
            axes.plot(at, _finite(e.mean), "o", color=BLUE, markersize=6)
        names = [plain(shorten(level, 14 if len(of) < 5 else 9)) for level in effect.levels]
        slanted: dict[str, Any] = (
            {"rotation": 30, "ha": "right", "rotation_mode": "anchor"} if len("".join(names)) > 28 else {}
        )
        axes.set_xticks(x, names, **slanted)
        axes.set_xlim(-0.5, len(of) - 0.5)
        _looks(axes, plain(shorten(effect.factor, 34)), "" if i % across else formatting.heading(first))
        axes.grid(axis="x", visible=False)
    return figure


def interactions(pairs: Sequence[Interaction], first: Measure) -> Figure:
    """Plot a heat map for each pair of factors: the mean in each cell, darker where better; missing cells are blank.

    Where neither way is better, darker is higher.
    """
    longest = max(len(of.column_levels) for of in pairs)
    across = max(1, min(len(pairs), 3 if longest < 5 else 2 if longest < 8 else 1))
    down = math.ceil(len(pairs) / across)
    tall = max(len(of.row_levels) for of in pairs)
    wide = WIDTH * max(across, 2) / 3 if longest < 5 else WIDTH
    figure = Figure(figsize=(wide, (0.95 + 0.34 * tall) * down), dpi=DPI, layout="constrained")
    panels = figure.subplots(down, across, squeeze=False)
    for axes in panels.flat[len(pairs) :]:
        axes.set_axis_off()
    for axes, of in zip(panels.flat, pairs, strict=False):
        _heat(axes, of, first)
    return figure


def _heat(axes: Axes, interaction: Interaction, first: Measure) -> None:
    """Plot one heat map with its numbers."""
    means = np.array([[math.nan if v is None else _finite(v) for v in row] for row in interaction.means], dtype=float)
    there = means[np.isfinite(means)]
    low, high = (there.min(), there.max()) if len(there) else (0.0, 1.0)
    share = (means - low) / ((high - low) or 1.0)
    share = 0.05 + 0.75 * (1 - share if first.better == LOWER else share)
    axes.pcolormesh(np.ma.masked_invalid(share), cmap="Blues", vmin=0, vmax=1, edgecolors=PAPER, linewidth=1.5)
    for (i, j), value in np.ndenumerate(means):
        text, colour = (formatting.MISSING, MUTED)
        if math.isfinite(value):
            text, colour = formatting.digits(value, *_spread(there))[0], "#ffffff" if share[i, j] > 0.5 else "#10151c"
        size = SIZE - (len(interaction.column_levels) > 8) - (len(text) > 6)
        axes.text(j + 0.5, i + 0.5, text, ha="center", va="center", fontsize=size, color=colour)
    columns = [plain(shorten(level, 12)) for level in interaction.column_levels]
    slanted: dict[str, Any] = (
        {"rotation": 30, "ha": "right", "rotation_mode": "anchor"} if len("".join(columns)) > 28 else {}
    )
    axes.set_xticks(np.arange(len(columns)) + 0.5, columns, **slanted)
    axes.set_yticks(
        np.arange(len(interaction.row_levels)) + 0.5, [plain(shorten(level, 16)) for level in interaction.row_levels]
    )
    axes.invert_yaxis()
    _looks(axes, plain(shorten(interaction.columns, 34)), plain(shorten(interaction.rows, 28)))
    axes.grid(visible=False)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)


def fronts(frontiers: Sequence[Front], first: Measure, numbers: Mapping[str, int]) -> Figure:
    """Plot Pareto fronts, a panel a cost: every arm as a dot, and the front as a line through numbered ones.

    Args:
        frontiers: the fronts.
        first: the measure of quality.
        numbers: label -> number of its point, for those on a front.
    """
    across = min(len(frontiers), 2)
    down = math.ceil(len(frontiers) / across)
    figure = Figure(figsize=(WIDTH if across > 1 else 0.6 * WIDTH, 3.0 * down), dpi=DPI, layout="constrained")
    panels = figure.subplots(down, across, squeeze=False)
    for axes in panels.flat[len(frontiers) :]:
        axes.set_axis_off()
    for axes, of in zip(panels.flat, frontiers, strict=False):
        cost, quality = np.array([of.points[label] for label in of.points], dtype=float).reshape(-1, 2).T
        axes.plot(cost, np.where(np.isfinite(quality), quality, math.nan), "o", color=MUTED, alpha=0.5, markersize=5)
        best = np.array([of.points[label] for label in of.best], dtype=float).reshape(-1, 2)
        axes.step(*best.T, where="post", color=BLUE, linewidth=1.5)
        axes.plot(*best.T, "o", color=BLUE, markersize=5, zorder=3)
        for label in named(of):
            x, y = of.points[label]
            axes.plot(x, y, "o", color=BLUE, markersize=13, zorder=4)
            text = str(numbers.get(label, ""))
            axes.text(x, y, text, ha="center", va="center_baseline", fontsize=SIZE - 1, color="#ffffff", zorder=5)
        for axis, values in (("x", cost), ("y", quality)):
            _log_if_wide(axes, axis, values)
        axes.margins(0.09, 0.12)
        _looks(axes, of.cost, formatting.heading(first))
    return figure


def named(front: Front) -> tuple[str, ...]:
    """Return the labels on the front that get a number: all, or some evenly along it with both ends."""
    if len(front.best) <= NAMED:
        return front.best
    return tuple(front.best[round(i)] for i in np.linspace(0, len(front.best) - 1, NAMED))


def trade_offs(pairs: Sequence[TradeOff], styles: Mapping[str, Style]) -> Figure:
    """A panel for each pair of measures: every run as a dot, the mean of each arm as a large one.

    Args:
        pairs: the measures, with the same arms in all.
        styles: label -> the colour of an arm.
    """
    figure = Figure(figsize=(WIDTH, 3.4), dpi=DPI, layout="constrained")
    handles: dict[str, Any] = {}
    for axes, pair in zip(figure.subplots(1, len(pairs), squeeze=False).flat, pairs, strict=True):
        for label, runs in pair.runs.items():
            points, colour = np.array(runs, dtype=float), styles[label]["color"]
            axes.plot(*points.T, "o", color=colour, alpha=0.5, markersize=4)
            (handles[label],) = axes.plot(*points.mean(0), "o", color=colour, markersize=9, zorder=3)
        every = np.concatenate([np.array(runs, dtype=float) for runs in pair.runs.values()])
        for axis, values in zip("xy", every.T, strict=True):
            _log_if_wide(axes, axis, values)
        axes.margins(0.12)
        _looks(axes, pair.x, pair.y)
    _legend(figure, handles, {}, styles)
    return figure


def lines(
    curves: Mapping[str, Curve],
    x_label: str,
    y_label: str,
    styles: Mapping[str, Style],
    *,
    log_x: bool = False,
    log_y: bool | None = None,
    markers: bool = False,
) -> Figure:
    """Plot curves with their ranges over seeds: those with a style in colour, the others in grey behind them.

    Args:
        curves: label -> curve.
        x_label, y_label: of the axes.
        styles: label -> line style.
        log_x, log_y: whether an axis is logarithmic; None where the values span more than a factor of ten.
        markers: whether the points of a curve are marked.
    """
    long = any(len(label) > NARROW for label in styles if label in curves)
    tall = 0.9 + (0.33 if long else 0.2) * sum(label in styles for label in curves)
    figure = Figure(figsize=(WIDTH, max(3.2, tall)), dpi=DPI)
    figure.set_layout_engine("constrained")
    axes = figure.add_subplot()
    handles = draw_lines(axes, curves, styles, log_x=log_x, log_y=log_y, markers=markers)
    _looks(axes, x_label, y_label)
    _legend(figure, handles, curves, styles)
    return figure


def draw_lines(
    axes: Axes,
    curves: Mapping[str, Curve],
    styles: Mapping[str, Style],
    *,
    log_x: bool = False,
    log_y: bool | None = None,
    markers: bool = False,
) -> dict[str, Any]:
    """Plot as `lines` on existing axes; return label -> line of those in colour."""
    handles, every = {}, []
    faint = min(0.3, 8 / max(1, len(curves)))
    for label, curve in curves.items():
        y = np.array([_finite(value) for value in curve.y], dtype=float)
        if label not in styles:
            few = slice(None, None, max(1, len(y) // 60))
            axes.plot(curve.x[few], y[few], color=MUTED, alpha=faint, linewidth=0.8, zorder=1)
            continue
        low, high = (np.array([_finite(v) for v in ends], dtype=float) for ends in (curve.low, curve.high))
        every.append(y)
        mark: dict[str, Any] = {"marker": "o", "markersize": 3.5} if markers or len(curve.x) == 1 else {}
        (handles[label],) = axes.plot(curve.x, y, linewidth=1.6, zorder=3, **styles[label], **mark)
        if len(low) == len(high) == len(y) and (low < high).any():
            axes.fill_between(
                np.asarray(curve.x), low, high, color=styles[label]["color"], alpha=0.13, linewidth=0, zorder=2
            )
    if log_x:
        axes.set_xscale("log")
        _plain_log(axes.xaxis)
    if log_y is None:
        _log_if_wide(axes, "y", np.concatenate(every) if every else np.array([]))
    elif log_y:
        axes.set_yscale("log")
        _plain_log(axes.yaxis)
    return handles


def summary(path: str | Path, findings: Findings) -> None:
    """Write the summary picture of a study: arms with their differences, and their samples.

    The first measure with its verdicts is on the left; on the right are each arm's samples from the same noise, after
    its schedule where schedules differ, or quality over evaluations where that was measured.

    Args:
        path: the PNG file to write, less than 200 kB.
        findings: of the study.
    """
    labels = chosen(findings, FEW if findings.blocks is None else ROWS)
    for tiles in (8, 6, 4, 3, 2, 1):
        figure, room = _summary(findings, labels, tiles)
        for colours in (256, 64, 24):
            data = _palette(figure, colours)
            if len(data) <= SUMMARY_BYTES and (room >= ROOM or tiles < 4):
                Path(path).write_bytes(data)
                return
    Path(path).write_bytes(data)


def _summary(findings: Findings, labels: Sequence[str], tiles: int) -> tuple[Figure, float]:
    """Return the summary with at most `tiles` samples an arm, and the width in pixels of a panel of numbers."""
    curves = dict(findings.by_steps)
    sampled = [label for label in labels if label in findings.sheet and not curves]
    high, wide = (SCATTER, SCATTER) if findings.sheet_of_points else (TILE, 290 * tiles // 8)
    high = high if len(labels) <= FEW else min(high, SMALL)
    strips = {label: _resized(_strip(findings.sheet[label], tiles), high, wide) for label in sampled}
    head, foot, count = 58, 68, max(len(labels), 1)
    row = max([36, *(strip.shape[0] + 8 for strip in strips.values())])
    row = min(48, max(row, 270 // count)) if curves else row
    tall = head + max(row * count + foot, 320 if curves else 0)
    figure = Figure(figsize=(SUMMARY / DPI, tall / DPI), dpi=DPI)
    every = len(findings.arms)
    title = plain(shorten(findings.study, 90 if every == len(labels) else 55))
    figure.text(12 / SUMMARY, 1 - 18 / tall, title, va="center", weight="bold", fontsize=SIZE + 2, color=INK)
    if every > len(labels):
        first = findings.measures[0] if findings.measures else None
        others = f"{len(labels) - 1} {formatting.foremost(first)}" if first is not None else f"first {len(labels) - 1}"
        left_out = f"the baseline and the {others} of {every} arms"
        left_out = left_out if findings.blocks is None else f"{len(labels)} of {every} arms, with their baselines"
        figure.text(1 - 12 / SUMMARY, 1 - 18 / tall, left_out, ha="right", va="center", fontsize=SIZE, color=MUTED)

    def place(left: float, wide: float, top: float = head, high: float = row * count) -> Axes:
        return figure.add_axes((left / SUMMARY, 1 - (top + high) / tall, wide / SUMMARY, high / tall))

    names = {label: _two_lines(text) for label, text in shortened(labels, 58).items()}
    edge = 16 + max((_pixels(figure, line) for name in names.values() for line in name.split("\n")), default=0)
    for i, (label, name) in enumerate(names.items()):
        weight = "bold" if findings.against.get(label) == label else "normal"
        y = 1 - (head + (i + 0.5) * row) / tall
        figure.text(edge / SUMMARY, y, name, ha="right", va="center", weight=weight, linespacing=1.1, **TEXT)
    right = float(SUMMARY - 12)
    if curves:
        right = 580 + 25 * (8 - tiles)
        _summary_curves(figure, place, findings, right, tall)
    elif strips:
        right -= _summary_strips(place, findings, labels, strips, row, head, right)
    room = float(SUMMARY)
    if findings.measures and labels:
        room = _summary_measure(place, findings, labels, edge + 10, right - edge - 10)
    return figure, room


def _summary_measure(
    place: Callable[..., Axes], findings: Findings, labels: Sequence[str], left: float, wide: float
) -> float:
    """Plot means and, to the right, differences with verdicts, in the columns from `left` on.

    Returns: the width of each in pixels.
    """
    first = findings.measures[0]
    verdicts = [first.differences[label].verdict for label in labels if label in first.differences]
    half = (wide - 8.2 * max(map(len, verdicts)) - 40) / 2 if verdicts else wide
    panels = [place(left, half)] + ([place(left + half + 32, half)] if verdicts else [])
    _bands(panels, labels, findings.against)
    estimates(panels[0], first, labels, findings.against)
    panels[0].set_xlabel(plain(_two_lines(formatting.heading(first), int((half + 40) / 7))), **TEXT)
    if verdicts:
        differences(panels[1], first, labels, findings.against)
        panels[1].set_xlabel("difference", **TEXT)
    for axes in panels:
        axes.set_yticks([])
        _space_ticks(axes)
    return half


def _space_ticks(axes: Axes) -> None:
    """Set as many x ticks as fit without overlap among their labels or with those of a neighbouring panel."""
    log = axes.get_xscale() == "log"
    if not log:
        axes.ticklabel_format(axis="x", style="plain", useOffset=False)
    ends = np.array([])
    for locator in [LogLocator(subs=subs) for subs in ((1, 2, 5), (1,))] if log else map(MaxNLocator, (5, 4, 3, 2)):
        axes.xaxis.set_major_locator(locator)
        low, high = axes.get_xlim()
        ticks = np.array([tick for tick in axes.get_xticks() if low <= tick <= high])
        half = 4.5 * max(map(len, axes.xaxis.get_major_formatter().format_ticks(list(ticks))), default=0)
        at = np.array([axes.transData.transform((tick, 0))[0] for tick in ticks])
        inside = (axes.bbox.x0 + half - 14 <= at) & (at <= axes.bbox.x1 - half + 14)
        ticks, at = ticks[inside], at[inside]
        if len(ticks) > 1 and np.diff(at).min() >= 2 * half + 8:
            axes.set_xticks(ticks)
            return
        if len(ends) < 2:
            ends = ticks[[0, -1]] if len(ticks) and at[-1] - at[0] >= 2 * half + 8 else ticks[:1]
    axes.set_xticks(ends)


def _summary_curves(figure: Figure, place: Callable[..., Axes], findings: Findings, left: float, tall: float) -> None:
    """Plot quality over evaluations in the columns from `left` on, with a legend beneath."""
    named = ranked(findings.by_steps, 8)
    rows = math.ceil(len(named) / 2)
    axes = place(left + 70, SUMMARY - left - 85, 36, tall - 36 - 58 - 17 * rows)
    handles = draw_lines(axes, findings.by_steps, styles(named), log_x=True, markers=True)
    _looks(axes, "evaluations for an image", "Frechet distance")
    _space_ticks(axes)
    texts = [plain(shorten(label, 25)) for label in handles]
    figure.legend(
        list(handles.values()), texts, loc="lower right", ncols=2, frameon=False, fontsize=SIZE - 1.5, borderaxespad=0.3
    )


def _summary_strips(
    place: Callable[..., Axes],
    findings: Findings,
    labels: Sequence[str],
    strips: Mapping[str, np.ndarray],
    row: int,
    head: int,
    right: float,
) -> float:
    """Draw samples at the right end of each row, after the arm's schedule; return the width that they take."""
    wide = max(strip.shape[1] for strip in strips.values())
    curve = 78 if findings.schedules else 0
    for i, label in enumerate(labels):
        top = head + i * row
        if label in strips:
            high = strips[label].shape[0]
            axes = place(right - wide, strips[label].shape[1], top + (row - high) // 2, high)
            axes.imshow(strips[label], interpolation="nearest", aspect="auto")
            axes.set_axis_off()
        if label in findings.schedules:
            axes = place(right - wide - curve, curve - 14, top + 4, row - 8)
            for other, of in findings.schedules.items():
                axes.plot(of.x, of.y, color=BLUE if other == label else LINE, zorder=3 if other == label else 1)
            axes.set(xticks=[], yticks=[], xlim=(0, 1), ylim=(-0.05, 1.05))
            axes.spines[:].set_color(LINE)
    title = place(right - wide - curve, wide + curve, head - 22, 22)
    title.set_axis_off()
    if curve:
        title.text(0, 0.3, "√ᾱ over t/T", fontsize=SIZE - 1, color=MUTED)
    words = "samples" if findings.sheet_of_points else "samples, same noise"
    title.text(curve / (wide + curve), 0.3, words, fontsize=SIZE - 1, color=MUTED)
    return wide + curve + 16


def ranked(curves: Mapping[str, Curve], most: int = LINES) -> list[str]:
    """Return labels of the lowest curves, as many as a figure can colour, in their own order."""
    if len(curves) <= most:
        return list(curves)
    lowest = {label: min(map(_infinite, curve.y), default=math.inf) for label, curve in curves.items()}
    best = set(sorted(curves, key=lambda label: lowest[label])[:most])
    return [label for label in curves if label in best]


def svg(figure: Figure, name: str, title: str) -> str:
    """Return a figure as an inline SVG element in the page's colours and font.

    Args:
        figure: the figure.
        name: unique in the page, for the ids of marks and clips.
        title: text alternative for screen readers.
    """
    file = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": name, "svg.fonttype": "none"}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from")  # the browser has the glyphs
        figure.patch.set_visible(False)
        for axes in figure.axes:
            axes.patch.set_visible(False)
        figure.savefig(file, format="svg")
    return _inline(file.getvalue(), title)


def png(picture: Any) -> bytes:
    """Encode a picture, uint8 (H, W), (H, W, 1) or (H, W, 3), as a small lossless PNG."""
    array = np.asarray(picture)
    array = array[..., 0] if array.ndim == 3 and array.shape[-1] == 1 else array
    if array.ndim == 3 and (array == array[..., :1]).all():
        array = array[..., 0]
    file = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(array)).save(file, format="PNG", optimize=True)
    return file.getvalue()


def shorten(label: str, most: int = LABEL) -> str:
    """Return a label on one line; the middle of a long one is replaced by an ellipsis."""
    line = " ".join(label.split())
    if len(line) <= most:
        return line
    head = most // 2
    return f"{line[:head]}…{line[len(line) - (most - head - 1) :]}"


def shortened(labels: Sequence[str], most: int = LABEL) -> dict[str, str]:
    """Return label -> shortened label for figures, still unique."""
    short = {label: shorten(label, most) for label in labels}
    for i, label in enumerate(labels, 1):
        if list(short.values()).count(short[label]) > 1:
            short[label] = f"{shorten(label, most - 5)} ({i})"
    return {label: plain(text) for label, text in short.items()}


def _two_lines(label: str, wide: int = 30) -> str:
    """Wrap a long label onto two lines."""
    lines = textwrap.wrap(label, wide, break_on_hyphens=False)
    return label if len(lines) < 2 else f"{lines[0]}\n{shorten(' '.join(lines[1:]), wide)}"


def plain(text: str) -> str:
    """Escape text so that matplotlib reads neither a formula nor a hidden label in it."""
    return (" " if text.startswith("_") else "") + text.replace("$", r"\$")


def _inline(text: str, title: str) -> str:
    """Turn an SVG file by matplotlib into an element of an HTML page: without prolog and clashing ids."""
    text = text[text.index("<svg") :].strip()
    size = re.search(r'width="([\d.]+)pt" height="([\d.]+)pt" viewBox="([^"]+)"', text)
    assert size is not None, "matplotlib gives its figures a size"
    body = text[text.index(">") + 1 :]
    for noise in (r"<metadata>.*?</metadata>", r'<style type="text/css">.*?</style>', r"<!--.*?-->"):
        body = re.sub(noise, "", body, flags=re.DOTALL)
    body = re.sub(r' (?:d|x|y)="[^"]*"', lambda match: re.sub(r"(\.\d\d)\d+", r"\1", match[0]), body)  # 0.01 points
    body = re.sub(r'<g id="[^"]*"', "<g", body).replace("xlink:href", "href")
    for colour, variable in VARIABLES.items():
        body = body.replace(colour, f"var(--{variable})")
    pixels = round(float(size[1]) * 4 / 3)
    head = f'<svg viewBox="{size[3]}" style="width:{pixels}px" role="img" aria-label="{html.escape(title)}">'
    return head + re.sub(r"\n\s*", "\n", re.sub(r"\n\s*(?=<)", "", body))


def _row(
    axes: Axes, y: float, mean: float, low: float | None, high: float | None, points: Sequence[float], colour: str
) -> list[float]:
    """Plot a mean with its interval, and its points a little beneath; return the finite values among them."""
    finite = [value for value in (mean, low, high, *points) if value is not None and math.isfinite(value)]
    dots = [_finite(value) for value in points]
    axes.plot(dots, [y + 0.27] * len(dots), "o", color=colour, alpha=0.45, markersize=3, markeredgewidth=0, zorder=2)
    if low is not None and high is not None:
        axes.plot([_finite(low), _finite(high)], [y, y], color=colour, linewidth=2, zorder=3, solid_capstyle="butt")
    hollow: dict[str, Any] = {} if low is not None else {"markerfacecolor": "none"}  # no interval: a single seed
    axes.plot(_finite(mean), y, "o", color=colour, markersize=5.5, zorder=4, **hollow)
    return finite


def _bands(panels: Iterable[Axes], rows: Sequence[str], against: Mapping[str, str]) -> None:
    """Shade every other row, order rows from the top, and draw a line between rows of different baselines."""
    for axes in panels:
        for y in range(0, len(rows), 2):
            axes.axhspan(y - 0.5, y + 0.5, color=BAND, linewidth=0, zorder=0)
        for y, (above, label) in enumerate(pairwise(rows), 1):
            if against.get(above) != against.get(label):
                axes.axhline(y - 0.5, color=MUTED, linewidth=0.8, zorder=1)
        axes.set_ylim(max(len(rows), 1) - 0.5, -0.5)


def _looks(axes: Axes, x_label: str, y_label: str) -> None:
    """Apply the style that all panels share, that of `ddpm.figures.plots`."""
    axes.set_xlabel(x_label, **TEXT)
    axes.set_ylabel(y_label, **TEXT)
    axes.grid(color=LINE, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[:].set_color(MUTED)
    axes.tick_params(colors=MUTED, labelsize=SIZE, labelcolor=INK)


def _legend(
    figure: Figure,
    handles: Mapping[str, Any],
    curves: Mapping[str, Curve],
    styles: Mapping[str, Style],
) -> None:
    """Add a legend of the coloured curves, in the order of the styles, with one entry for all others."""
    names = [label for label in styles if label in handles]
    marks, texts = (
        [handles[label] for label in names],
        [_two_lines(text, NARROW) for text in shortened(names, 2 * NARROW - 4).values()],
    )
    rest = [label for label in curves if label not in styles]
    if rest:
        marks.append(Line2D([], [], color=MUTED, alpha=0.4, linewidth=0.8))
        texts.append(f"{len(rest)} others")
    if len(texts) > 1:
        figure.legend(marks, texts, loc="outside right upper", frameon=False, fontsize=SIZE, labelcolor=INK)


def _log_if_wide(axes: Axes, axis: str, values: np.ndarray) -> None:
    """Make an axis logarithmic where positive values span more than a factor of ten."""
    finite = values[np.isfinite(values)]
    if len(finite) and 0 < 10 * finite.min() < finite.max():
        axes.set(**{f"{axis}scale": "log"})
        _plain_log(axes.xaxis if axis == "x" else axes.yaxis, (1,) if finite.max() > 100 * finite.min() else (1, 2, 5))
        return
    if axis == "x":
        axes.xaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 2.5, 5, 10]))  # 0.0175 is a wide number
    if len(finite) and finite.max() >= 10_000:
        (axes.xaxis if axis == "x" else axes.yaxis).set_major_formatter(_tick)


def _plain_log(axis: Any, subs: Sequence[int] = (1, 2, 5)) -> None:
    """Label a logarithmic axis with plain numbers, not powers."""
    axis.set_major_locator(LogLocator(subs=subs))
    axis.set_minor_formatter(NullFormatter())
    axis.set_major_formatter(_tick)


def _tick(value: float, _: float = 0) -> str:
    """Format the number of a tick: "20 M"."""
    for power, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= max(power, 1e4):
            return f"{value / power:g} {letter}"
    return f"{value:g}"


def _palette(figure: Figure, colours: int) -> bytes:
    """Encode the figure as a PNG with a palette of `colours` colours."""
    canvas = FigureCanvasAgg(figure)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from")
        canvas.draw()
    picture: Image.Image = Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3].copy())
    file = io.BytesIO()
    picture.quantize(colours, dither=Image.Dither.NONE).save(file, format="PNG", optimize=True)
    return file.getvalue()


def _strip(picture: Any, tiles: int) -> np.ndarray:
    """Return the first tiles of an arm's row of samples, (H, W, 3); tiles are square, with or without gaps."""
    array = np.asarray(picture)
    array = array[..., None] if array.ndim == 2 else array
    high, wide = array.shape[:2]
    for gap in (2, 0):
        if (wide + gap) % (high + gap) == 0:
            array = array[:, : tiles * (high + gap) - gap]
            break
    return np.broadcast_to(array, (*array.shape[:2], 3))


def _resized(strip: np.ndarray, high: int, wide: int) -> np.ndarray:
    """Resize a strip to fit, by whole pixels where it is enlarged."""
    factor = min(high / strip.shape[0], wide / strip.shape[1])
    if factor >= 1:
        return strip.repeat(int(factor), 0).repeat(int(factor), 1)
    size = (max(1, round(strip.shape[1] * factor)), max(1, round(strip.shape[0] * factor)))
    return np.asarray(Image.fromarray(np.ascontiguousarray(strip)).resize(size, Image.Resampling.LANCZOS))


def _pixels(figure: Figure, text: str) -> float:
    """Return the width of a line of text in pixels."""
    canvas = FigureCanvasAgg(figure)
    drawn = figure.text(0, 0, text, fontsize=SIZE, weight="bold")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from")
        wide = drawn.get_window_extent(canvas.get_renderer()).width
    drawn.remove()
    return float(wide)


def _spread(values: np.ndarray) -> tuple[float, float]:
    """Return the ends of the values, which give all cells of a map two digits of their variation."""
    return float(values.min()), float(values.max())


def _rank(estimate: Estimate | None, sign: int) -> float:
    return math.inf if estimate is None or not math.isfinite(estimate.mean) else sign * estimate.mean


def _reach(values: Iterable[float]) -> float:
    return max((abs(value) for value in values if math.isfinite(value)), default=0.0)


def _finite(value: float) -> float:
    return value if math.isfinite(value) else math.nan


def _infinite(value: float) -> float:
    return value if math.isfinite(value) else math.inf
