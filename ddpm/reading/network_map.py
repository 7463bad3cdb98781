"""Diagram of a U-Net as SVG: its stages, level by level, in order of computation."""

import itertools
from collections.abc import Sequence
from html import escape
from typing import NamedTuple


class Stage(NamedTuple):
    """A stage of a network: its name, its kind, and the shape of its output, (B, C, H, W)."""

    name: str
    kind: str
    shape: tuple[int, ...]


BOX, APART, BELOW = (66, 36), 10, 24  # pixels: of a box; between boxes and between levels
MAP_STYLE = """.map text{font:11px system-ui,sans-serif;fill:currentColor;text-anchor:middle}
.map .size{text-anchor:start;opacity:.7}.map .n{opacity:.75}.map rect{fill:none;stroke:currentColor;stroke-opacity:.45}
.map .attention{stroke:#d9772b;stroke-opacity:1}
.map .middle{stroke:#2f7fc1;stroke-opacity:1}.map path{stroke:currentColor;stroke-opacity:.35;fill:none}"""


def of_network(stages: Sequence[Stage]) -> str:
    """Return the diagram of a U-Net in order of computation, a row for each resolution.

    Args:
        stages: of the network; boxes are labelled with the kind and the number of output channels.
    """
    sizes = sorted({stage.shape[-1] for stage in stages}, reverse=True)
    places = [
        (64 + i * (BOX[0] + APART), 12 + sizes.index(s.shape[-1]) * (BOX[1] + BELOW)) for i, s in enumerate(stages)
    ]
    parts = [
        f'<path d="M{x0 + BOX[0]} {y0 + BOX[1] // 2}L{x1} {y1 + BOX[1] // 2}"/>'
        for (x0, y0), (x1, y1) in itertools.pairwise(places)
    ]
    for (x, y), stage in zip(places, stages, strict=True):
        middle = x + BOX[0] // 2
        parts.append(
            f"<g><title>{escape(stage.name)}: (B, {', '.join(map(str, stage.shape[1:]))})</title>"
            f'<rect x="{x}" y="{y}" width="{BOX[0]}" height="{BOX[1]}" rx="6" class="{escape(stage.kind)}"/>'
            f'<text x="{middle}" y="{y + 15}">{escape(stage.kind)}</text>'
            f'<text x="{middle}" y="{y + 28}" class="n">{stage.shape[1]}</text></g>'
        )
    for i, size in enumerate(sizes):
        parts.append(f'<text x="6" y="{12 + i * (BOX[1] + BELOW) + 22}" class="size">{size} px</text>')
    width, height = 70 + len(stages) * (BOX[0] + APART), 20 + len(sizes) * (BOX[1] + BELOW)
    return (
        f'<svg class="map" role="img" aria-label="map of the network" viewBox="0 0 {width} {height}" width="{width}" '
        f'height="{height}" style="max-width:none"><style>{MAP_STYLE}</style>{"".join(parts)}</svg>'
    )
