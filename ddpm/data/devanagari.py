"""Devanagari characters: the 46 classes, and any number of images of them, rendered from the installed fonts."""

import hashlib
import itertools
import json
import math
import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import einsum, rearrange
from torch import Tensor

from ddpm.checks import is_whole
from ddpm.data.dataset import ImageData, check_choice, check_options, check_room, height_width
from ddpm.data.splines import field
from ddpm.randomness import generator
from ddpm.runs.files import Origin
from ddpm.runs.tensor_cache import load_tensor, save_tensor


class Character(NamedTuple):
    """A class: its label, its folder in the Devanagari Handwritten Character Dataset, and its character."""

    label: int
    folder: str
    glyph: str


FOLDERS = (  # of the data set (Acharya, Pant & Gyawali 2015); those of the ten digits follow
    "character_1_ka", "character_2_kha", "character_3_ga", "character_4_gha", "character_5_kna", "character_6_cha",
    "character_7_chha", "character_8_ja", "character_9_jha", "character_10_yna", "character_11_taamatar",
    "character_12_thaa", "character_13_daa", "character_14_dhaa", "character_15_adna", "character_16_tabala",
    "character_17_tha", "character_18_da", "character_19_dha", "character_20_na", "character_21_pa", "character_22_pha",
    "character_23_ba", "character_24_bha", "character_25_ma", "character_26_yaw", "character_27_ra", "character_28_la",
    "character_29_waw", "character_30_motosaw", "character_31_petchiryakha", "character_32_patalosaw",
    "character_33_ha", "character_34_chhya", "character_35_tra", "character_36_gya",
)  # fmt: skip
GLYPHS = (*"कखगघङचछजझञटठडढणतथदधनपफबभमयरलवशषसह", "क्ष", "त्र", "ज्ञ", *"०१२३४५६७८९")
CHARACTERS = tuple(
    Character(label, folder, glyph)
    for label, (folder, glyph) in enumerate(
        zip((*FOLDERS, *(f"digit_{digit}" for digit in range(10))), GLYPHS, strict=True)
    )
)
CLASSES = tuple(character.folder for character in CHARACTERS)

DRAWING = 1  # raised by every change that draws other images: part of the cache file's name
MOST = 1_000_000  # images
BLOCK = 1000  # images whose variations are drawn together, so that the first n are the same whatever `count` is
MARGIN = 1 / 16  # of the side that stays black all round, 2 pixels of 32 as in the data set
STROKE = (-0.015, 0.03)  # what is added to half a stroke's width; a letter is 1.1 units long
SLANT, ROTATION = 0.25, 10.0  # largest tangent; largest angle in degrees
STRETCH, SMALLEST = 1.15, 0.8  # largest ratio of width to height, or back; shortest letter, as a share of the room
BENDING, NODES = 0.08, 4  # largest displacement of the elastic field, in units; its nodes a side


class Devanagari(ImageData):
    """Any number of images of the 46 Devanagari characters, drawn from fonts with random variations.

    White on black, with a margin of 1/16 of the side. The classes are those of `DHCD`, equally frequent; font, stroke
    width, slant, rotation within 10 degrees, proportions, size, place and elastic deformation are drawn for each image.
    Which fonts there are decides what is drawn: another machine with other fonts has other data, and other runs.

    Args:
        root: the folder of data sets; the images are cached in root/devanagari.
        count: how many images, at most a million.
        seed: of the variations.
        fonts: a folder of .ttf and .otf files; None for the fonts that are installed.
        split: "train", "test" with other variations, or "auto", which is "train".
        image_size, channels, validation, flip, condition: as in `ImageData`; drawn at that size, cropped if not square.
        labels: the labels of an image: [class], or [class, style], whose style is its font's number;
            `styles` are the fonts' names, those of their files.

    Raises: FileNotFoundError where no font draws all 46 characters; ValueError for options outside their ranges.
    """

    glyphs = GLYPHS

    def __init__(
        self,
        root: str | Path = "data",
        count: int = 92_000,
        seed: int = 0,
        fonts: str | Path | None = None,
        image_size: int | Sequence[int] = 32,
        channels: int = 1,
        split: str = "auto",
        validation: float = 0.1,
        flip: bool = False,
        condition: str | None = None,
        labels: Sequence[str] = ("class",),
    ):
        check_choice("split", split, ("auto", "train", "test"))
        check_options(image_size, channels, validation, condition)
        if list(labels) not in (["class"], ["class", "style"]):
            raise ValueError(f"labels={list(labels)!r}: choose [class] or [class, style]")
        for key, value, least in (("count", count, 1), ("seed", seed, 0)):
            if not is_whole(value, least):
                raise ValueError(f"{key}={value!r} must be an integer >= {least}")
        if count > MOST:
            raise ValueError(
                f"count={count} must be at most {MOST:,}: these take minutes to draw, and more is likely a typo"
            )
        side, half = max(height_width(image_size)), "train" if split == "auto" else split
        if side < 8:
            raise ValueError(f"image_size={image_size!r}: characters are drawn at 8 pixels and more")
        check_room(count, side, channels)
        folder = None if fonts is None else Path(fonts).expanduser()
        found = _fonts(folder)
        self.origin = Origin(partial(_fonts, folder))
        facts = [DRAWING, half, count, seed, side, [hashlib.sha256(path.read_bytes()).hexdigest() for path in found]]
        key = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:12]
        place = Path(root).expanduser() / "devanagari" / f"{half}-{key}.safetensors"
        images = load_tensor(place, torch.uint8, (count, 1, side, side))
        if images is None:
            print(f"drawing {count:,} characters from {len(found)} fonts, once: they are saved as {place}", flush=True)
            images = draw(found, count, side, seed, half)
            save_tensor(images, place)
        super().__init__(
            "devanagari",
            half,
            images,
            torch.arange(count) % len(CHARACTERS),
            CLASSES,
            image_size=image_size,
            channels=channels,
            validation=validation,
            flip=flip,
            condition=condition,
        )
        if "style" in labels:
            self.further_labels = styles(len(found), count, seed, half)[:, None]
            self.further_counts = (len(found),)
            self.styles = names_of(found)


def _fonts(folder: Path | None) -> list[Path]:
    """Return the fonts of a folder or of the system that draw all characters; FileNotFoundError if there is none."""
    from ddpm.data import glyphs  # with matplotlib and SciPy, which no other source needs

    found = glyphs.fonts_with(GLYPHS, glyphs.installed() if folder is None else glyphs.font_files(folder))
    if not found:
        raise FileNotFoundError(
            f"no font {'is installed' if folder is None else f'in {folder}'} that draws all 46 Devanagari characters "
            "with their ligatures; Debian's and Ubuntu's package fonts-deva has some, Fedora's "
            "google-noto-sans-devanagari-fonts, Homebrew's font-noto-sans-devanagari; or set data.fonts=FOLDER"
        )
    return found


def names_of(fonts: Sequence[Path]) -> tuple[str, ...]:
    """Return the names of fonts: the stems of their filesas a command line takes them, numbered if alike."""
    names: list[str] = []
    for path in fonts:
        stem = re.sub(r"[^\w.]+", "-", path.stem).strip("-") or "font"
        alike = (f"{stem}-{k}" for k in itertools.count(2))
        names.append(stem if stem not in names else next(name for name in alike if name not in names))
    return tuple(names)


def draw(fonts: Sequence[Path], count: int, side: int, seed: int = 0, stream: str = "train") -> Tensor:
    """Return rendered images, uint8 (count, 1, side, side); image i shows character i modulo 46.

    Image i depends on (seed, stream, i) and the fonts, not on `count`.

    Args:
        fonts: as returned by `glyphs.fonts_with`.
    """
    from ddpm.data import glyphs

    letters = torch.stack([glyphs.distances(path, GLYPHS) for path in fonts])  # (fonts, 46, SIDE, SIDE)
    blocks = []
    for start in range(0, count, BLOCK):
        random = _random(seed, stream, start // BLOCK)
        font = _style(len(fonts), random)
        variation = Variation.drawn(BLOCK, random)
        numbers = torch.arange(min(BLOCK, count - start))
        label = (start + numbers) % len(CHARACTERS)
        blocks.append(vary(letters[font[numbers], label], variation.of(numbers), side))
    return torch.cat(blocks)


def styles(fonts: int, count: int, seed: int = 0, stream: str = "train") -> Tensor:
    """Return the index (count,), in 0..fonts-1, of the font that `draw` renders each image with."""
    blocks = range(math.ceil(count / BLOCK))
    return torch.cat([_style(fonts, _random(seed, stream, block)) for block in blocks])[:count]


def _random(seed: int, stream: str, block: int) -> torch.Generator:
    return generator(seed, f"devanagari {stream}", block)


def _style(fonts: int, random: torch.Generator) -> Tensor:
    """Return the fonts (BLOCK,) of a block of images; they are the block's first random draw."""
    return torch.randint(fonts, (BLOCK,), generator=random)


class Variation(NamedTuple):
    """The random variation of each of n letters."""

    stroke: Tensor  # (n,), added to half the stroke's width
    map: Tensor  # (n, 2, 2), from the place (x, y) of a pixel to that in the letter
    bend: Tensor  # (n, 2, NODES + 3, NODES + 3), coefficients of the displacement's B-splines
    size: Tensor  # (n,), the longer side as a share of the room
    place: Tensor  # (n, 2), in 0..1 of the room that is left

    @classmethod
    def drawn(cls, n: int, random: torch.Generator) -> "Variation":
        """Draw variations for n letters, all uniform within their bounds."""

        def uniform(low: float, high: float, *shape: int) -> Tensor:
            return low + (high - low) * torch.rand(n, *shape, generator=random)

        stroke, slant = uniform(*STROKE), uniform(-SLANT, SLANT)
        turn = uniform(-ROTATION, ROTATION).deg2rad()
        stretch = uniform(-math.log(STRETCH) / 2, math.log(STRETCH) / 2).exp()
        bend = uniform(-BENDING, BENDING, 2, NODES + 3, NODES + 3)
        zero, one = torch.zeros(n), torch.ones(n)
        steps = (  # of the way from the letter to the picture, inverted
            _matrix(1 / stretch, zero, zero, stretch),
            _matrix(one, -slant, zero, one),
            _matrix(turn.cos(), turn.sin(), -turn.sin(), turn.cos()),
        )
        return cls(stroke, steps[0] @ steps[1] @ steps[2], bend, uniform(SMALLEST, 1), uniform(0, 1, 2))

    def of(self, rows: Tensor) -> "Variation":
        """Return the variations of some letters."""
        return Variation(*(values[rows] for values in self))


def _matrix(a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Tensor:
    """Return [[a, b], [c, d]], each (n,), as (n, 2, 2)."""
    return rearrange(torch.stack([a, b, c, d], 1), "n (i j) -> n i j", i=2)


def vary(distance: Tensor, how: Variation, side: int) -> Tensor:
    """Draw letters: bent, turned, brought to their size and place, with strokes of their width.

    Args:
        distance: to the edge of each letter, (n, S, S), see `glyphs.distances`.
        how: the n variations.
        side: pixels of the result.

    Returns: uint8 (n, 1, side, side), white on black.
    """
    S, margin = distance.shape[-1], round(MARGIN * side)
    at = _places(S) * 2 / S - 1  # (S, S, 2), from -1 to 1
    bent = einsum(at, how.map, "h w j, n i j -> n h w i") + rearrange(field(how.bend, S, S), "n i h w -> n h w i")
    distance = F.grid_sample(distance[:, None], bent, padding_mode="border", align_corners=False)

    ink = distance[:, 0] + rearrange(how.stroke, "n -> n 1 1") > 0
    (top, bottom), (left, right) = _extent(ink.any(2)), _extent(ink.any(1))
    corner = torch.stack([left, top], 1)  # (n, 2) as (x, y), in pixels of the S
    extent = torch.stack([right, bottom], 1) - corner
    room = side - 2 * margin
    scale = extent.amax(1) / (how.size * room)  # pixels of the S in one of the result
    place = margin + how.place * (room - extent / scale[:, None])

    fine = _places(2 * side) / 2  # twice as fine as the result
    scale = rearrange(scale, "n -> n 1 1 1")
    at = rearrange(corner, "n i -> n 1 1 i") + (fine - rearrange(place, "n i -> n 1 1 i")) * scale
    distance = F.grid_sample(distance, at * 2 / S - 1, padding_mode="border", align_corners=False)
    pixels = (distance + rearrange(how.stroke, "n -> n 1 1 1")) * S / scale  # of those twice as fine
    white = F.avg_pool2d((pixels + 0.5).clamp(0, 1), 2)
    white = F.pad(white[..., margin : side - margin, margin : side - margin], [margin] * 4)
    return (255 * white).round().to(torch.uint8)


def _places(side: int) -> Tensor:
    """Return the centres (side, side, 2) of pixels, as (x, y) in pixels."""
    at = torch.arange(side) + 0.5
    return torch.stack(torch.meshgrid(at, at, indexing="xy"), -1)


def _extent(inked: Tensor) -> tuple[Tensor, Tensor]:
    """Return the first row or column (n,) with ink, and the one after the last, of (n, S)."""
    S, first = inked.shape[1], inked.int().argmax(1)
    return first, S - inked.flip(1).int().argmax(1)
