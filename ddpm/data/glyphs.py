"""Letters of the installed fonts as distance fields, from which strokes of any width are drawn.

A text is shaped before it is drawn (HarfBuzz), so that a conjunct is the ligature that a reader expects.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import uharfbuzz as hb
from matplotlib.backends.backend_agg import RendererAgg
from matplotlib.font_manager import findSystemFonts
from matplotlib.path import Path as Outline
from matplotlib.transforms import Affine2D
from scipy.ndimage import distance_transform_edt
from torch import Tensor

SIDE = 96  # pixels of a distance field
FINER = 4  # times finer is the picture from which the distances are measured
LETTER = 0.56  # share of the side that the longer side of a letter fills; the rest is room to turn and bend it


class Pen:
    """Collect a glyph's outline for matplotlib, in the font's units; its methods are called by HarfBuzz."""

    def __init__(self) -> None:
        self.points: list[tuple[float, float]] = []
        self.codes: list[int] = []

    def _add(self, code: Any, *points: tuple[float, float]) -> None:
        self.points += points
        self.codes += [code] * len(points)

    def moveTo(self, p: tuple[float, float]) -> None:
        self._add(Outline.MOVETO, p)

    def lineTo(self, p: tuple[float, float]) -> None:
        self._add(Outline.LINETO, p)

    def qCurveTo(self, *points: tuple[float, float]) -> None:
        self._add(Outline.CURVE3, *points)

    def curveTo(self, *points: tuple[float, float]) -> None:
        self._add(Outline.CURVE4, *points)

    def closePath(self) -> None:
        self._add(Outline.CLOSEPOLY, self.points[-1])


def fonts_with(texts: Sequence[str], fonts: Iterable[Path]) -> list[Path]:
    """Return the fonts that draw each of these texts as one glyph, with ink; sorted by file name."""
    return sorted((path for path in fonts if _glyphs(path, texts) is not None), key=lambda path: (path.name, path))


def installed() -> list[Path]:
    """Return the font files that the system knows."""
    return [Path(path) for path in findSystemFonts()]


def font_files(folder: Path) -> list[Path]:
    """Return the .ttf and .otf files of a folder, however deep; FileNotFoundError if there is no such folder."""
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder {folder}; fonts must be a folder of .ttf or .otf files")
    return [path for path in folder.rglob("*") if path.suffix.lower() in (".ttf", ".otf") and path.is_file()]


def glyph_of(font: hb.Font, text: str) -> int | None:
    """Return the index of the single glyph that a font draws a text by; None if it takes several, or is missing."""
    buffer = hb.Buffer()
    buffer.add_str(text)
    buffer.guess_segment_properties()
    hb.shape(font, buffer)
    glyphs = [info.codepoint for info in buffer.glyph_infos]
    return glyphs[0] if len(glyphs) == 1 and glyphs[0] != 0 else None  # 0 is the glyph for what is missing


def _glyphs(path: Path, texts: Sequence[str]) -> list[Outline] | None:
    """Return the outline of each text in a font's first face; None unless each is one glyph."""
    face = hb.Face(hb.Blob.from_file_path(str(path)))
    if not {ord(letter) for text in texts for letter in text} <= set(face.unicodes):
        return None
    font, outlines = hb.Font(face), []
    for text in texts:
        glyph = glyph_of(font, text)
        if glyph is None:  # a conjunct that falls apart, say
            return None
        pen = Pen()
        font.draw_glyph_with_pen(glyph, pen)
        if not pen.points:
            return None
        outlines.append(Outline(pen.points, pen.codes))
    return outlines


def distances(path: Path, texts: Sequence[str]) -> Tensor:
    """Return each text, drawn by a font, as signed distances to its edge: (n, SIDE, SIDE), positive in the ink.

    The unit is half the side, as in `grid_sample`; every letter is centred and `LETTER` of the side long.

    Raises: ValueError for a font that `fonts_with` would not name.
    """
    outlines = _glyphs(path, texts)
    if outlines is None:
        raise ValueError(f"{path} does not draw each of these texts as one glyph")
    return torch.stack([_distance(outline) for outline in outlines])


def _distance(outline: Outline) -> Tensor:
    """Return the signed distance (SIDE, SIDE) of one outline."""
    size = SIDE * FINER
    box = outline.get_extents()
    fit = Affine2D().translate(-(box.x0 + box.x1) / 2, -(box.y0 + box.y1) / 2)
    fit = fit.scale(LETTER * size / max(box.width, box.height)).translate(size / 2, size / 2)
    renderer = RendererAgg(size, size, 72)
    pen = renderer.new_gc()
    pen.set_linewidth(0)
    renderer.draw_path(pen, outline, fit, (0, 0, 0, 1))
    ink = np.asarray(renderer.buffer_rgba())[..., 3] > 127  # its rows run downwards, as an image's do
    signed = distance_transform_edt(ink) - distance_transform_edt(~ink)
    coarse = torch.from_numpy(signed).float().reshape(SIDE, FINER, SIDE, FINER).mean((1, 3))
    return coarse * 2 / size
