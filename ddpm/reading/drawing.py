"""Style of the figures, and their export as SVG in the text colour of the page."""

import io
import re
from collections.abc import Sequence
from html import escape
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure

INK = "#010203"
"""Placeholder for the text colour of the page, which may be dark or light."""
COLOURS = ("#2f7fc1", "#d9772b", "#3c9d6b", "#b0559b", "#8a8f98")
LOOKS: Any = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.prop_cycle": f"cycler('color', {list(COLOURS)})",
    "lines.linewidth": 1.7,
    "legend.frameon": False,
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK),
}


def svg(figure: Figure, name: str) -> str:
    """Return a figure as an SVG element, reproducibly.

    Args:
        name: of the figure, from which the ids within it are derived, as a page may have several.
    """
    file = io.StringIO()
    with rc_context({"svg.hashsalt": name}):
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    text = file.getvalue()
    text = text[text.index("<svg") :].replace(INK, "currentColor")
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r"\d+\.\d{3,}", lambda number: f"{float(number[0]):.2f}", text)  # hundredths of a point are invisible
    text = re.sub(r' id="[A-Za-z0-9.]+_\d+"', "", text)  # unused, and the same in other figures
    kind = ' class="several"' if len(figure.axes) > 1 else ""
    return text.replace("<svg ", f'<svg{kind} role="img" aria-label="{escape(name)}" ', 1)


def axes(n: int, height: float = 3.0, **shared: Any) -> tuple[Figure, Sequence[Any]]:
    """Return a figure with n plots side by side.

    Args:
        height: inches; a plot is 4.6 wide.
        shared: arguments of `Figure.subplots`, such as sharey=True.
    """
    figure = Figure(figsize=(4.6 * n, height), layout="constrained")
    return figure, figure.subplots(1, n, squeeze=False, **shared)[0]
