"""Colour emoji, rendered from the bitmaps of a font, with their names as captions."""

import difflib
import hashlib
import io
import json
from collections.abc import Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import uharfbuzz as hb
from einops import rearrange
from numpy import asarray
from PIL import Image, ImageColor
from torch import Tensor

from ddpm.data.dataset import ImageData, check_choice, check_options, check_room, height_width
from ddpm.data.image_files import read_image
from ddpm.randomness import generator
from ddpm.runs.files import Origin
from ddpm.runs.tensor_cache import load_tensor, save_tensor

# The groups of Unicode's emoji-test.txt (UTS #51, Emoji 15.1) by the first character, whose number is hexadecimal.
# Between the ends of a range lie only emoji of its group, and characters that are none.
RANGES = {
    "smileys": (
        "2620 2639-263A 2763-2764 1F479-1F47B 1F47D-1F480 1F48B-1F48C 1F493-1F49F 1F4A2 1F4A4-1F4A6 1F4A8-1F4A9 "
        "1F4AB-1F4AD 1F4AF 1F573 1F5A4 1F5E8-1F5EF 1F600-1F644 1F648-1F64A 1F90D-1F90E 1F910-1F917 1F920-1F925 "
        "1F927-1F92F 1F970-1F976 1F978-1F97A 1F9D0 1F9E1 1FA75-1FA77 1FAE0-1FAE5 1FAE8"
    ),
    "people": (
        "261D 26F7 26F9 270A-270D 1F385 1F3C2-1F3C4 1F3C7 1F3CA-1F3CC 1F440-1F450 1F463-1F478 1F47C 1F481-1F483 "
        "1F485-1F487 1F48F 1F491 1F4AA 1F574-1F575 1F57A 1F590-1F596 1F5E3 1F645-1F647 1F64B-1F64F 1F6A3 1F6B4-1F6B6 "
        "1F6C0 1F6CC 1F90C 1F90F 1F918-1F91F 1F926 1F930-1F93E 1F977 1F9B4-1F9B9 1F9BB 1F9BE-1F9BF 1F9CC-1F9CF "
        "1F9D1-1F9E0 1FAC0-1FAC5 1FAE6 1FAF0-1FAF8"
    ),
    "animals": (
        "2618 1F331-1F335 1F337-1F33C 1F33E-1F344 1F3F5 1F400-1F43F 1F490 1F4AE 1F54A 1F577-1F578 1F940 1F981-1F98F "
        "1F992-1F99D 1F99F-1F9A9 1F9AB-1F9AE 1FAB0-1FAB4 1FAB6-1FABF 1FACE-1FACF"
    ),
    "food": (
        "2615 1F32D-1F330 1F336 1F33D 1F345-1F37F 1F382 1F3FA 1F52A 1F942-1F944 1F950-1F96F 1F980 1F990-1F991 1F99E "
        "1F9AA 1F9C0-1F9CB 1FAD0-1FADB"
    ),
    "travel": (
        "231A-231B 23F0-23F3 2600-2604 2614 2668 2693 26A1 26C4-26C8 26E9-26F2 26F4-26F5 26FA-26FD 2708 2744 2B50 "
        "1F300-1F32C 1F3A0-1F3A2 1F3AA 1F3CD-1F3CE 1F3D4-1F3E6 1F3E8-1F3ED 1F3EF-1F3F0 1F488 1F492 1F4A7 1F4BA 1F525 "
        "1F54B-1F54D 1F550-1F567 1F570 1F5FA-1F5FE 1F680-1F6A2 1F6A4-1F6A8 1F6B2 1F6CE 1F6D1 1F6D5-1F6D6 1F6DD-1F6DF "
        "1F6E2-1F6F6 1F6F8-1F6FC 1F9BC-1F9BD 1F9ED 1F9F1 1F9F3 1FA82 1FA90 1FAA8 1FAB5"
    ),
    "activities": (
        "265F-2666 26BD-26BE 26F3 26F8 2728 1F004-1F0CF 1F380-1F381 1F383-1F384 1F386-1F38B 1F38D-1F391 1F396-1F397 "
        "1F39F 1F3A3 1F3A8 1F3AB 1F3AD-1F3B4 1F3BD-1F3C0 1F3C5-1F3C6 1F3C8-1F3C9 1F3CF-1F3D3 1F3F8 1F52B 1F52E 1F579 "
        "1F5BC 1F6F7 1F93F 1F945-1F94F 1F9E7-1F9E9 1F9F5-1F9F6 1F9F8 1FA80-1FA81 1FA84-1FA86 1FAA1-1FAA2 1FAA9"
    ),
    "objects": (
        "2328 260E 2692 2694 2696-2699 26B0-26B1 26CF-26D3 2702 2709 270F-2712 1F392-1F393 1F399-1F39E 1F3A4-1F3A5 "
        "1F3A7 1F3A9 1F3AC 1F3B5-1F3BC 1F3EE 1F3F7 1F3F9 1F451-1F462 1F484 1F489-1F48A 1F48D-1F48E 1F4A1 1F4A3 1F4B0 "
        "1F4B3-1F4B9 1F4BB-1F4DA 1F4DC-1F4F2 1F4F7-1F4FF 1F507-1F517 1F526-1F529 1F52C-1F52D 1F56F 1F576 1F587-1F58D "
        "1F5A5-1F5B2 1F5C2-1F5E1 1F5F3 1F5FF 1F6AA 1F6AC 1F6BD 1F6BF 1F6C1 1F6CB 1F6CD 1F6CF 1F6D2 1F6D7 1F6E0-1F6E1 "
        "1F941 1F97B-1F97F 1F9AF 1F9BA 1F9E2-1F9E6 1F9EA-1F9EC 1F9EE-1F9F0 1F9F2 1F9F4 1F9F7 1F9F9-1FA74 1FA78-1FA7C "
        "1FA83 1FA87-1FA88 1FA91-1FAA0 1FAA3-1FAA7 1FAAA-1FAAE 1FAE7"
    ),
    "symbols": (
        "23-21AA 23CF-23EF 23F8-25FE 2611 2622-2638 2640-2653 267B-267F 2695 269B-26A0 26A7-26AB 26CE 26D4 2705 "
        "2714-2721 2733-2734 2747-2757 2795-2B1C 2B55-3299 1F170-1F19A 1F201-1F251 1F3A6 1F3E7 1F4A0 1F4B1-1F4B2 "
        "1F4DB 1F4F3-1F4F6 1F500-1F506 1F518-1F524 1F52F-1F549 1F54E 1F6AB 1F6AD-1F6B1 1F6B3 1F6B7-1F6BC 1F6BE "
        "1F6C2-1F6C5 1F6D0 1F6DC 1F7E0-1F7F0 1FAAF"
    ),
    "flags": "1F1E6-1F1FF 1F38C 1F3C1 1F3F3-1F3F4 1F6A9",
}

CLASSES = tuple(RANGES)
ELSEWHERE = {"👁️‍🗨️": "smileys"}  # the only sequence in another group than its first character, an eye
FONT = "NotoColorEmoji.ttf"
PLACES = (  # of installed fonts; matplotlib knows them too, but its import takes longer than reading the cache
    *("~/.local/share/fonts", "~/.fonts", "~/Library/Fonts"),
    *("/usr/local/share/fonts", "/usr/share/fonts", "/Library/Fonts"),
)
TONES = "🏻🏼🏽🏾🏿"  # of skin, lightest first
EMOJI_STYLE = "\ufe0f"  # requests a picture where a character has two forms; a tone stands in its place
DRAWING = 1  # raised by every change that draws other pictures: part of the cache file's name
SMALLEST = 8  # pixels


class Named(NamedTuple):
    """An emoji, of one character or of several that are drawn as one, with its caption."""

    text: str
    caption: str
    label: int  # in CLASSES
    version: float  # of Unicode Emoji, that it came with


class Emoji(ImageData):
    """Colour emoji with captions: 3,771 pictures, if drawn from Debian's Noto Color Emoji 2.042.

    Of each emoji that Unicode recommends (fully qualified ones) the picture is the font's bitmap, scaled onto a ground
    of one colour; the caption its name in the package `emoji` ("grinning face", "waving hand dark skin tone", of a flag
    "France"); and the class its group in Unicode's list, one of nine. Samples lie in the order of their characters.

    Left out, and counted, are emoji that the font does not draw as one picture, or as nothing; of several with the same
    picture, such as the flags of France and of Clipperton Island, all but the one that Unicode had first (of the same
    age: the one with the shorter name); and those that begin with a character newer than Emoji 15.1, of unknown group.

    The skin tones of an emoji are all held out or all trained on: its picture in another tone would give it away.
    Exceptions are those of `without`, which test the composition of a tone and an emoji that were only seen apart.

    Args:
        root: the folder of data sets; the pictures are cached in root/emoji.
        font: a file with colour bitmaps (tables CBDT or sbix); None for the NotoColorEmoji.ttf that is installed.
        image_size, channels, validation, flip, condition: as in `ImageData`; drawn at that size, cropped if not square.
        background: a colour that CSS knows by name, or as "#rrggbb".
        skin_tones: include the variants of people and hands in five skin tones, half of all pictures.
        split: "auto", which is all of them.
        without: emoji with one tone of skin that are held out besides, by their captions, such as "nurse dark skin
            tone"; or how many, of as many different ones, each in one of its tones. Their other tones are trained on.

    Attributes:
        captions: the caption of each sample, by its number; no two are alike.
        composed: the numbers of the held-out samples of `without`, sorted.
        texts: the characters of each sample.
        left_out: how many emoji are not among the samples, by the reason.

    Raises: FileNotFoundError without the font; ValueError for a font without bitmaps, or options outside their ranges.
    """

    def __init__(
        self,
        root: str | Path = "data",
        font: str | Path | None = None,
        image_size: int | Sequence[int] = 64,
        channels: int = 3,
        background: str = "white",
        skin_tones: bool = True,
        split: str = "auto",
        validation: float = 0.1,
        flip: bool = False,
        condition: str | None = None,
        without: int | Sequence[str] = (),
    ):
        check_choice("split", split, ("auto",))
        check_options(image_size, channels, validation, condition)
        side, ground = max(height_width(image_size)), colour(background)
        if side < SMALLEST:
            raise ValueError(f"image_size={image_size!r}: emoji are drawn at {SMALLEST} pixels and more")
        if not isinstance(skin_tones, bool):
            raise ValueError(f"skin_tones={skin_tones!r}: choose true or false")
        if isinstance(without, bool) or (isinstance(without, int) and without < 0):
            raise ValueError(f"without={without!r}: give captions, or how many emoji, an integer >= 0")
        if without and not skin_tones:
            raise ValueError(f"without={without!r} holds emoji in tones of skin out; set skin_tones=true")
        path = located(font)
        self.origin = Origin(partial(_files, font))
        emoji, newer = recommended(skin_tones)
        check_room(len(emoji), side, 3)
        drawn, twice = distinct(emoji, bitmaps(path, [one.text for one in emoji]))
        lacking = len(emoji) - twice - len(drawn)
        images = _cached(list(drawn.values()), side, ground, Path(root).expanduser() / "emoji", path)
        inked = (images != torch.tensor(ground, dtype=torch.uint8)[:, None, None]).flatten(1).any(1)
        visible = [one for one, there in zip(drawn, inked.tolist(), strict=True) if there]
        if not visible:
            raise ValueError(f"{path} draws no emoji; data.font must be a font such as {FONT}")
        self.left_out = {"not in the font": lacking, "same picture": twice}
        self.left_out |= {"nothing to see": len(drawn) - len(visible), "of unknown group": newer}
        self.captions = tuple(one.caption for one in visible)
        self.texts = tuple(one.text for one in visible)
        families = [family(text) for text in self.texts]
        numbers = {name: number for number, name in enumerate(dict.fromkeys(families))}
        self._family, self._without = torch.tensor([numbers[name] for name in families]), without
        super().__init__(
            "emoji",
            "all",
            images[inked],
            torch.tensor([one.label for one in visible]),
            CLASSES,
            image_size=image_size,
            channels=channels,
            validation=validation,
            flip=flip,
            condition=condition,
        )

    def _divide(self, count: int, validation: float) -> tuple[Tensor, Tensor]:
        """Return the sorted training and held-out indices; the held-out part has whole skin-tone families.

        The samples of `without` are held out too, while their families are trained on.
        """
        named = [] if isinstance(self._without, int) else self._numbers_of(self._without)
        train, held_out = self._families(count, validation, self._family[named])
        self.composed = (
            self._some(train, self._without) if isinstance(self._without, int) else torch.tensor(named).long()
        )
        held_out = torch.cat([held_out, self.composed]).unique()
        return train[~torch.isin(train, self.composed)], held_out

    def _families(self, count: int, validation: float, trained: Tensor) -> tuple[Tensor, Tensor]:
        """Divide by whole families; the families `trained` are never held out."""
        if validation == 0:
            return super()._divide(count, validation)
        sizes = torch.bincount(self._family)
        if len(sizes) == 1:
            raise ValueError(f"{self.name}: one {self.texts[0]} leaves none to hold out; set validation=0")
        shuffled = torch.randperm(len(sizes), generator=generator(0, "held_out"))
        shuffled = shuffled[~torch.isin(shuffled, trained)]
        held_out = int((sizes[shuffled].cumsum(0) <= round(validation * count)).sum())
        chosen = torch.isin(self._family, shuffled[: min(max(held_out, 1), len(sizes) - 1)])
        return (~chosen).nonzero()[:, 0], chosen.nonzero()[:, 0]

    def _in_one_tone(self) -> list[int]:
        """Return the samples with one skin tone whose family has several such samples."""
        toned = [n for n, text in enumerate(self.texts) if sum(letter in TONES for letter in text) == 1]
        several = torch.bincount(self._family[toned], minlength=int(self._family.max()) + 1) > 1
        return [n for n in toned if several[self._family[n]]]

    def _numbers_of(self, captions: Sequence[str]) -> list[int]:
        """Return the indices of these captions, sorted; ValueError with the nearest match."""
        known = {self.captions[n]: n for n in self._in_one_tone()}
        for name in [captions] if isinstance(captions, str) else captions:
            if name not in known:
                near = difflib.get_close_matches(str(name), known, 1)
                hint = f"; did you mean {near[0]!r}?" if near else ""
                raise ValueError(f"without has {name!r}: give emoji in one tone, such as 'nurse dark skin tone'{hint}")
        return sorted({known[name] for name in ([captions] if isinstance(captions, str) else captions)})

    def _some(self, train: Tensor, most: int) -> Tensor:
        """Return `most` samples of different families of the training part, sorted, cycling through the tones."""
        there, families = set(train.tolist()), dict[int, list[int]]()
        for n in self._in_one_tone():
            if n in there:
                families.setdefault(int(self._family[n]), []).append(n)
        if most > len(families):
            raise ValueError(
                f"without={most}: {len(families)} emoji that are trained on have tones; allowed: 0 to {len(families)}"
            )
        order = torch.randperm(len(families), generator=generator(0, "without")).tolist()[:most]
        every = list(families.values())
        chosen = [every[place][turn % len(every[place])] for turn, place in enumerate(order)]
        return torch.tensor(sorted(chosen)).long()

    def identity(self) -> dict[str, Any]:
        """Return what identifies the data: the captions of `without` too, if there are any."""
        names = [self.captions[n] for n in self.composed.tolist()]
        return super().identity() | ({"without": names} if names else {})


def colour(name: str) -> tuple[int, int, int]:
    """Return red, green and blue, in 0..255, of a colour's name or number; ValueError with what is allowed."""
    try:
        red, green, blue, *alpha = ImageColor.getrgb(name)
        if alpha:
            raise ValueError(f"{name} is no opaque colour")
        return red, green, blue
    except (ValueError, TypeError, AttributeError):
        near = difflib.get_close_matches(str(name), ImageColor.colormap, 1)
        hint = f"; did you mean {near[0]}?" if near else ""
        message = f"background={name!r}: give a colour by its name, such as white or black, or as '#rrggbb'{hint}"
        raise ValueError(message) from None


def _files(font: str | Path | None) -> list[Path]:
    """Return where the font lies, or would be looked for."""
    if font is not None:
        return [Path(font).expanduser()]
    return [found for place in PLACES for found in sorted(Path(place).expanduser().rglob(FONT))]


def located(font: str | Path | None) -> Path:
    """Return the font file, a given one or the first that is installed; FileNotFoundError with what to install."""
    found = [path for path in _files(font) if path.is_file()]
    if not found:
        raise FileNotFoundError(
            f"no {FONT} is installed{'' if font is None else f', and there is no file {font}'}; Debian's and Ubuntu's "
            "package fonts-noto-color-emoji has it; or set data.font=FILE, a font with colour bitmaps"
        )
    return found[0]


def recommended(skin_tones: bool = True) -> tuple[list[Named], int]:
    """Return the emoji that Unicode recommends, ordered by their characters, and how many have no known group.

    Args:
        skin_tones: include those with a skin tone.
    """
    from emoji import EMOJI_DATA, STATUS  # its table takes as long to read as all of `ddpm.data`

    found, newer = [], 0
    for text, facts in sorted(EMOJI_DATA.items()):
        if facts["status"] != STATUS["fully_qualified"] or (not skin_tones and set(TONES) & set(text)):
            continue
        label = group(text)
        if label is None:
            newer += 1
        else:
            found.append(Named(text, caption(facts["en"]), label, float(facts["E"])))
    return found, newer


def caption(name: str) -> str:
    """Return a name of the package `emoji` as words: ":grinning_face:" is "grinning face"."""
    return name.strip(":").replace("_", " ")


def group(text: str) -> int | None:
    """Return the index in `CLASSES` of an emoji's group; None for an emoji newer than the table."""
    return CLASSES.index(ELSEWHERE[text]) if text in ELSEWHERE else _labels().get(ord(text[0]))


@cache
def _labels() -> dict[int, int]:
    """Return the index in `CLASSES` of each character in `RANGES`, by code point."""
    labels = {}
    for label, ranges in enumerate(RANGES.values()):
        for span in ranges.split():
            first, _, last = span.partition("-")
            labels.update(dict.fromkeys(range(int(first, 16), int(last or first, 16) + 1), label))
    return labels


def family(text: str) -> str:
    """Return an emoji without its skin tones: the same for all that differ in these alone."""
    return "".join(letter for letter in text if letter not in TONES and letter != EMOJI_STYLE)


def bitmaps(path: Path, texts: Sequence[str]) -> list[bytes | None]:
    """Return the PNG bytes of each text in a font; None where it has none, or does not draw the text as one glyph.

    Raises: ValueError for a file that is no font, or whose glyphs have no bitmaps.
    """
    from ddpm.data.glyphs import glyph_of  # and matplotlib with it, which other data do not wait for

    face = hb.Face(hb.Blob.from_file_path(str(path)))
    if not face.has_color_png:
        raise ValueError(f"{path} has no colour bitmaps (tables CBDT or sbix); data.font must be a font such as {FONT}")
    font, found = hb.Font(face), []
    for text in texts:
        glyph = glyph_of(font, text)
        found.append(None if glyph is None else bytes(font.get_glyph_color_png(glyph).data) or None)
    return found


def distinct(emoji: Sequence[Named], pngs: Sequence[bytes | None]) -> tuple[dict[Named, bytes], int]:
    """Return the emoji that have a picture, each picture once, and how many were dropped as duplicates.

    Of those with the same picture the one stays that Unicode had first, then the one whose name is shorter: so it is
    France that keeps its flag.
    """
    there = [(one, png) for one, png in zip(emoji, pngs, strict=True) if png is not None]
    owner: dict[bytes, Named] = {}
    for one, png in sorted(there, key=lambda pair: (pair[0].version, len(pair[0].caption), pair[0].text)):
        owner.setdefault(png, one)
    drawn = {one: png for one, png in there if owner[png] is one}
    return drawn, len(there) - len(drawn)


def _cached(pngs: Sequence[bytes], side: int, ground: tuple[int, int, int], folder: Path, font: Path) -> Tensor:
    """Return the pictures of `draw`, read from a cache file in a folder, or drawn and saved there."""
    digest = hashlib.sha256(json.dumps([DRAWING, side, ground, [len(png) for png in pngs]]).encode())
    for png in pngs:
        digest.update(png)
    place = folder / f"{digest.hexdigest()[:12]}.safetensors"
    images = load_tensor(place, torch.uint8, (len(pngs), 3, side, side)) if pngs else torch.empty(0, 3, side, side)
    if images is None:
        print(f"drawing {len(pngs):,} emoji of {font}, once: they are saved as {place}", flush=True)
        images = draw(pngs, side, ground)
        save_tensor(images, place)
    return images


def draw(pngs: Sequence[bytes], side: int, ground: tuple[int, int, int]) -> Tensor:
    """Return bitmaps on a ground of one colour, scaled to one size: uint8 (n, 3, side, side).

    Raises: ValueError for one that cannot be decoded.
    """
    images = torch.empty(len(pngs), side, side, 3, dtype=torch.uint8)
    for number, png in enumerate(pngs):
        bitmap = read_image("a bitmap of the font", partial(_decode, png), "PNG")
        picture = squared(bitmap, ground).resize((side, side), Image.Resampling.BICUBIC)
        images[number] = torch.from_numpy(asarray(picture).copy())
    return rearrange(images, "n h w c -> n c h w").contiguous()


def _decode(png: bytes) -> Image.Image:
    """Return the pixels of a bitmap, with alpha; raises what PIL raises."""
    return Image.open(io.BytesIO(png), formats=["PNG"]).convert("RGBA")


def squared(bitmap: Image.Image, ground: tuple[int, int, int]) -> Image.Image:
    """Return a bitmap centred on an opaque square: as small as its shorter side if no ink is lost, else its longer.

    Noto's are 136 pixels wide and 128 high, of which the outer four to the left and right are never used: half of the
    square's 128 pixels are 64, and each pixel of the result comes of the same number of them.
    """
    short = min(bitmap.size)
    left, top = ((length - short) // 2 for length in bitmap.size)
    ink = bitmap.getchannel("A").getbbox() or (left, top, left, top)
    fits = ink[0] >= left and ink[1] >= top and ink[2] <= left + short and ink[3] <= top + short
    side = short if fits else max(bitmap.size)
    square = Image.new("RGB", (side, side), ground)
    square.paste(bitmap, ((side - bitmap.width) // 2, (side - bitmap.height) // 2), bitmap)
    return square
