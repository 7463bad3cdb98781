"""Rendered scenes of a few solids on a ground, with captions that state exactly what is visible, and where."""

import difflib
import hashlib
import json
import math
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from ddpm.checks import is_whole
from ddpm.data import raycast
from ddpm.data.batch import Batch
from ddpm.data.conditions import KINDS, SOLIDS
from ddpm.data.dataset import ImageData, check_choice, check_options, check_room, height_width
from ddpm.data.raycast import SHAPES, View, projected, surfaces
from ddpm.randomness import generator
from ddpm.runs.files import Origin
from ddpm.runs.tensor_cache import load_tensor, save_tensor

COLOURS = {  # red, green and blue, in [0, 1]
    "red": (0.86, 0.08, 0.08),
    "orange": (1.0, 0.52, 0.05),
    "yellow": (0.98, 0.9, 0.1),
    "green": (0.08, 0.6, 0.14),
    "cyan": (0.15, 0.85, 0.9),
    "blue": (0.1, 0.2, 0.86),
    "purple": (0.52, 0.1, 0.62),
    "white": (0.84, 0.84, 0.84),
}
SIZES = {"small": 0.48, "large": 0.8}  # radius of a sphere
MATERIALS = ("matt", "shiny")
RELATIONS = ("left of", "right of", "in front of", "behind")
NAMES = (tuple(COLOURS), SHAPES, tuple(SIZES), MATERIALS)  # of the values of the attributes, in the order of `Solid`
WORDINGS = ("all", "size", "colour")  # material, size, colour and shape; without the material; without the size too
PAIRS = len(COLOURS) * len(SHAPES)  # of a colour and a shape, of which a scene has each once at most

DRAWING = 1  # raised by every change that draws other pictures: part of the cache file's name
MOST = 1_000_000  # scenes
SMALLEST = 8  # pixels
BLOCK = 1000  # scenes that are drawn together, so that the first n are the same whatever `count` is
TRIES = 64  # candidate places drawn at once for each scene of a block
ATTEMPTS = 10  # batches of tries, before other relations are drawn
ROUNDS = 200  # rounds of attempts, before given relations are reported to have no room
ASIDE = math.radians(28.0)  # largest angle between the line from one solid to another and the axis of their relation
APART = (0.8, 3.4)  # distances of solids that are related, in units of the world
SIDEWAYS, DEEP = 2.4, 2.9  # largest |x| of the first solid, and |z| of all
GAP = 0.08  # between the circles that two solids stand in
REACH = 1.12  # radius of the circle that a solid stands in, and of the ball that it lies in, as a share of its radius
FOOT = 1.32  # how far below its middle a solid ends in the picture, as a share of its radius there
UNHIDDEN = 0.72  # least distance of two solids in the picture, as a share of the sum of their radii there
NEAR, FAR = 8.0, 19.0  # depths that map to 1 and -1 in the conditioning image


class Solid(NamedTuple):
    """The attributes of a solid, as indices in `NAMES`; None where a caption leaves them open."""

    colour: int
    shape: int
    size: int | None = None
    material: int | None = None


class Scene(NamedTuple):
    """Two to four solids, and where each of the others is seen from the first."""

    solids: tuple[Solid, ...]
    relations: tuple[int, ...]  # of the first solid to each of the others, one fewer; indices in `RELATIONS`
    places: tuple[tuple[float, float, float], ...] | None = None  # x, z and the angle that each is turned by


class Layout(NamedTuple):
    """N scenes of up to four solids, as tensors: the first solid is the one that the captions begin with."""

    attributes: Tensor  # int64 (N, 4, 4): of each solid colour, shape, size, material; -1 where there is no solid
    relations: Tensor  # int64 (N, 3): of the first solid to each of the others; -1 likewise
    places: Tensor  # float64 (N, 4, 3): x and z, and the angle that a solid is turned by; 0 likewise

    def rows(self, select: slice | Tensor) -> "Layout":
        """Return some of the scenes."""
        return Layout(*(values[select] for values in self))

    def scene(self, number: int) -> Scene:
        """Return one scene."""
        there = int((self.attributes[number, :, 0] >= 0).sum())
        solids = tuple(Solid(*values) for values in self.attributes[number, :there].tolist())
        places = tuple((x, z, angle) for x, z, angle in self.places[number, :there].tolist())
        return Scene(solids, tuple(self.relations[number, : there - 1].tolist()), places)

    @classmethod
    def of(cls, scenes: Sequence[Scene]) -> "Layout":
        """Return the layout of scenes whose attributes and places are all known; ValueError for others."""
        n = len(scenes)
        layout = cls(
            torch.full((n, SOLIDS, 4), -1), torch.full((n, SOLIDS - 1), -1), torch.zeros(n, SOLIDS, 3).double()
        )
        for row, scene in enumerate(scenes):
            words = caption(scene)
            if scene.places is None or any(value is None for solid in scene.solids for value in solid):
                raise ValueError(f"{words}: to be drawn a scene needs all sizes, materials and places; see `arranged`")
            there = len(scene.solids)
            layout.attributes[row, :there] = torch.tensor(scene.solids)
            layout.relations[row, : there - 1] = torch.tensor(scene.relations)
            layout.places[row, :there] = torch.tensor(scene.places, dtype=torch.float64)
        return layout


class Scenes(ImageData):
    """Rendered scenes of solids at known places, with captions that state what there is and where.

    Each shows spheres, cubes, cylinders and cones of eight colours, two sizes and two materials on a gray ground,
    before one camera and in one light (see `ddpm.data.raycast`). No two solids of a scene agree in colour and shape,
    and none hides another for the most part. The caption is of one solid and how it lies to the others, within 28
    degrees of the axis that the words name: "a small matt red sphere left of a large shiny blue cube" (see `caption`).
    All attributes are drawn uniformly, except for relations among three or four solids that leave no room for them.

    Scene i depends on (seed, i, solids) alone: a larger count begins with the same scenes. `condition=depth` and
    `condition=masks` condition a network on ground truth of the scene, in addition to the kinds computed from its
    picture: depths, from 1 at NEAR to -1 at FAR; and for each of four solids, in the order of the caption, 1 where
    it is visible and -1 elsewhere.

    Args:
        root: the folder of data sets; the pictures are cached in root/scenes.
        count: how many scenes, at most a million.
        image_size, channels, validation, condition: as in `ImageData`, and "depth" and "masks" besides.
        solids: in each scene, 2, 3 or 4; or a list of such numbers, drawn uniformly.
        wording: the detail of captions: "all"; "size", all but the material; "colour", colour and shape alone.
        without: pairs of a colour and a shape, such as "red cube", that none of the scenes shows that are trained on:
            those that do are all held out, beside the fraction `validation` of the others.
        flip: false, for mirrored scenes are not what their captions say.
        seed: of the scenes.
        split: "auto", which is all of them.

    Attributes:
        captions: the caption of each sample, by its number.
        numbers: of solids that a scene may have, sorted.
        layout: what and where its solids are, as integers and places, see `Layout`.
        composed: the numbers of the held-out samples that show a pair of `without`, sorted.

    Raises: ValueError for options outside their ranges.
    """

    conditions = (*KINDS, "depth", "masks")
    measured = ("depth", "masks")

    def __init__(
        self,
        root: str | Path = "data",
        count: int = 20_000,
        image_size: int | Sequence[int] = 32,
        channels: int = 3,
        solids: int | Sequence[int] = 2,
        wording: str = "all",
        without: Sequence[str] = (),
        seed: int = 0,
        split: str = "auto",
        validation: float = 0.1,
        flip: bool = False,
        condition: str | None = None,
    ):
        check_choice("split", split, ("auto",))
        if flip is not False:
            raise ValueError(
                f"flip={flip!r}: a mirror image swaps left of and right of, but its caption does not; set flip=false"
            )
        check_choice("wording", wording, WORDINGS)
        check_options(image_size, channels, validation, condition, self.conditions)
        numbers, self.without = _numbers_of(solids), _pairs(without)
        for key, value, least in (("count", count, 1), ("seed", seed, 0)):
            if not is_whole(value, least):
                raise ValueError(f"{key}={value!r} must be an integer >= {least}")
        if count > MOST:
            raise ValueError(
                f"count={count} must be at most {MOST:,}: these take long to draw, and more is likely a typo"
            )
        self.numbers = numbers
        size = height_width(image_size)
        if min(size) < SMALLEST:
            raise ValueError(f"image_size={image_size!r}: scenes are drawn at {SMALLEST} pixels and more")
        check_room(count, size, 3)
        self.origin = Origin(tuple)  # nothing that changes while a process runs
        self.layout = drawn(count, numbers, seed)
        self.captions = tuple(caption(self.layout.scene(n), wording) for n in range(count))
        super().__init__(
            "scenes",
            "all",
            _cached(self.layout, size, Path(root).expanduser() / "scenes"),
            image_size=image_size,
            channels=channels,
            validation=validation,
            condition=condition,
        )

    def _divide(self, count: int, validation: float) -> tuple[Tensor, Tensor]:
        """Return the sorted indices of the training part and of the held-out part, which contains all of `without`."""
        colour, shape = self.layout.attributes[..., 0], self.layout.attributes[..., 1]
        barred = torch.isin(colour * len(SHAPES) + shape, torch.tensor(self.without).long()) & (colour >= 0)
        self.composed = barred.any(1).nonzero()[:, 0]
        others = (~barred.any(1)).nonzero()[:, 0]
        if not len(others):
            raise ValueError(f"without={self.pairs}: every one of {count:,} scenes shows one of them; name fewer")
        train, held_out = super()._divide(len(others), validation)
        return others[train], torch.cat([others[held_out], self.composed]).sort().values

    @property
    def pairs(self) -> list[str]:
        """The pairs of `without`, in words."""
        return [f"{NAMES[0][pair // len(SHAPES)]} {SHAPES[pair % len(SHAPES)]}" for pair in self.without]

    def to(self, device: torch.device | str) -> Self:
        """Move samples and layout to a device; returns self."""
        self.layout = Layout(*(values.to(device) for values in self.layout))
        return super().to(device)

    def surfaces(self, numbers: Tensor) -> tuple[Tensor, Tensor]:
        """Return the exact depths (B, 1, H, W) and masks (B, 5, H, W) of samples (B,), see `View`; computed anew."""
        chosen = self.layout.rows(numbers.to(self.layout.places.device))
        return surfaces(solids_of(chosen), self.image_size)

    @property
    def condition_unit(self) -> float:
        """The difference that 1 in the conditioning image stands for: for depths in units of the world, else 1."""
        return (FAR - NEAR) / 2 if self.condition == "depth" else 1.0

    def conditioned(self, batch: Batch, indices: Tensor, generator: torch.Generator | None = None) -> Batch:
        """Return the batch with the image of its condition, from the scene or computed from its x."""
        if self.condition not in self.measured:
            return super().conditioned(batch, indices, generator)
        depth, masks = self.surfaces(indices)
        image = 1 - 2 * (depth - NEAR) / (FAR - NEAR) if self.condition == "depth" else 2 * masks[:, 1:].float() - 1
        return replace(batch, condition=replace(batch.condition, image=image.to(batch.x.device)))

    def identity(self) -> dict[str, Any]:
        """Return what identifies the data: the pairs of `without` too, if there are any."""
        return super().identity() | ({"without": self.pairs} if self.without else {})


def _numbers_of(solids: int | Sequence[int]) -> tuple[int, ...]:
    """Return the numbers of solids that a scene may have, sorted; ValueError with what is allowed."""
    numbers = tuple(solids) if isinstance(solids, Sequence) and not isinstance(solids, str) else (solids,)
    allowed = range(2, SOLIDS + 1)
    whole = all(is_whole(n) and n in allowed for n in numbers)
    if not whole or not numbers or len(set(numbers)) < len(numbers):
        raise ValueError(f"solids={solids!r}: give 2, 3 or 4, or a list of them such as [2,3,4]")
    return tuple(sorted(numbers))


def _pairs(without: Sequence[str]) -> tuple[int, ...]:
    """Return the numbers of pairs of colour and shape, sorted; ValueError with the nearest match."""
    known = [f"{colour} {shape}" for colour in COLOURS for shape in SHAPES]
    names = [without] if isinstance(without, str) else list(without)
    for pair in names:
        if pair not in known:
            near = difflib.get_close_matches(str(pair), known, 1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ValueError(
                f"without has {pair!r}: give pairs such as 'red cube', of {', '.join(COLOURS)} and "
                f"{', '.join(SHAPES)}{hint}"
            )
    return tuple(sorted({known.index(pair) for pair in names}))


def _cached(layout: Layout, size: tuple[int, int], folder: Path) -> Tensor:
    """Return the pictures of `render`, read from a cache file in a folder, or rendered and saved there."""
    count = len(layout.places)
    digest = hashlib.sha256(json.dumps([DRAWING, count, *size]).encode())
    for values in (layout.attributes, (layout.places * 1e6).round().long()):
        digest.update(values.numpy().data)
    place = folder / f"{digest.hexdigest()[:12]}.safetensors"
    images = load_tensor(place, torch.uint8, (count, 3, *size))
    if images is None:
        print(f"drawing {count:,} scenes, once: they are saved as {place}", flush=True)
        images = raycast.seen(solids_of(layout), size).picture
        save_tensor(images, place)
    return images


# ------------------------------------------------------------------------------------------------------ in words


def caption(scene: Scene, wording: str = "all") -> str:
    """Return a scene's caption: "a small matt red sphere left of a large shiny blue cube".

    Of more solids the first is related to each of the others: "a red sphere left of a blue cube, behind a green cone
    and right of a white cube". Unknown attributes are left out.

    Args:
        wording: the detail, see `Scenes`.
    Raises: ValueError for another wording, or numbers of solids and relations that do not fit.
    """
    check_choice("wording", wording, WORDINGS)
    first, *others = (_phrase(solid, wording) for solid in scene.solids)
    if not 1 <= len(others) < SOLIDS or len(others) != len(scene.relations):
        raise ValueError(f"{len(scene.solids)} solids and {len(scene.relations)} relations: 2 to {SOLIDS}, one less")
    parts = [f"{RELATIONS[r]} {phrase}" for r, phrase in zip(scene.relations, others, strict=True)]
    return f"{first} {' and '.join([', '.join(parts[:-1]), parts[-1]] if parts[:-1] else parts)}"


def _phrase(solid: Solid, wording: str) -> str:
    attributes = (
        SIZE_NAMES[solid.size] if solid.size is not None and wording != "colour" else None,
        MATERIALS[solid.material] if solid.material is not None and wording == "all" else None,
        NAMES[0][solid.colour],
        SHAPES[solid.shape],
    )
    words = " ".join(word for word in attributes if word is not None)
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


SIZE_NAMES = NAMES[2]
JOINTS = re.compile(rf"(?:,| and)? ({'|'.join(RELATIONS)}) ")


def parse(text: str) -> Scene:
    """Parse a caption of any wording into a scene without places: the inverse of `caption`.

    Raises: ValueError for text that `caption` would not write, with the first unknown word, if there is one.
    """
    first, *rest = JOINTS.split(text)
    solids = tuple(_solid(phrase) for phrase in (first, *rest[1::2]))
    scene = Scene(solids, tuple(RELATIONS.index(name) for name in rest[::2]))
    if caption(scene) != text:
        raise ValueError(f"{text!r} is no caption of a scene; one like it is {caption(scene)!r}")
    return scene


def _solid(phrase: str) -> Solid:
    """Parse "a small red cube" into a solid; ValueError with the first word that is not an attribute."""
    found: dict[int, int] = {}
    for word in phrase.split()[1:]:
        kind = next((kind for kind, names in enumerate(NAMES) if word in names), None)
        if kind is None or kind in found:
            every = [name for names in NAMES for name in names]
            near = difflib.get_close_matches(word, every, 1)
            hint = f"; did you mean {near[0]}?" if near and near[0] != word else ""
            raise ValueError(
                f"{phrase!r}: {word!r} is not known, or one word too many; known are {', '.join(every)}{hint}"
            )
        found[kind] = NAMES[kind].index(word)
    if not {0, 1} <= found.keys():
        raise ValueError(f"{phrase!r}: a colour and a shape are needed, as in 'a red cube'")
    return Solid(found[0], found[1], found.get(2), found.get(3))


def combinations(solids: int, wording: str = "all") -> int:
    """Return the number of captions of so many solids: of different pairs of colour and shape, in any order."""
    check_choice("wording", wording, WORDINGS)
    free = {"all": len(SIZES) * len(MATERIALS), "size": len(SIZES), "colour": 1}[wording]
    return math.perm(PAIRS, solids) * free**solids * len(RELATIONS) ** (solids - 1)


# ------------------------------------------------------------------------------------------------------ in space


def drawn(count: int, solids: Sequence[int] = (2,), seed: int = 0) -> Layout:
    """Draw scenes, each with one of the numbers of solids; scene i depends on (seed, i, solids).

    Relations that leave no room, of several large solids, are drawn again.
    """
    blocks = []
    for block in range(math.ceil(count / BLOCK)):
        random = generator(seed, "scenes", block)
        there = torch.tensor(solids)[torch.randint(len(solids), (BLOCK,), generator=random)]
        pair = torch.rand(BLOCK, PAIRS, generator=random).argsort(1)[:, :SOLIDS]
        others = torch.randint(2, (BLOCK, SOLIDS, 2), generator=random)  # sizes and materials: two of each
        attributes = torch.cat([(pair // len(SHAPES))[..., None], (pair % len(SHAPES))[..., None], others], -1)
        absent = torch.arange(SOLIDS) >= there[:, None]
        attributes = attributes.masked_fill(absent[..., None], -1)
        relations, places = torch.full((BLOCK, SOLIDS - 1), -1), torch.zeros(BLOCK, SOLIDS, 3, dtype=torch.float64)
        missing = torch.ones(BLOCK, dtype=torch.bool)
        while missing.any():
            again = torch.randint(len(RELATIONS), relations.shape, generator=random).masked_fill(absent[:, 1:], -1)
            relations = torch.where(missing[:, None], again, relations)
            places[missing], missing[missing.clone()] = placed(attributes, relations, random, missing)
        blocks.append(Layout(attributes, relations, places))
    return Layout(*(torch.cat(values)[:count] for values in zip(*blocks, strict=True)))


def arranged(scene: Scene, seed: int = 0) -> Scene:
    """Return the scene with places that its relations allow, and its open sizes and materials filled in, all at random.

    Raises: ValueError where these solids have no room in the picture.
    """
    random = generator(seed, "scenes arranged")
    coins = torch.randint(2, (len(scene.solids), 2), generator=random).tolist()
    solids = tuple(
        Solid(c, s, coin[0] if size is None else size, coin[1] if material is None else material)
        for (c, s, size, material), coin in zip(scene.solids, coins, strict=True)
    )
    layout = Layout.of([Scene(solids, scene.relations, ((0.0, 0.0, 0.0),) * len(solids))])
    for _ in range(ROUNDS):
        places, missing = placed(layout.attributes, layout.relations, random, torch.tensor([True]))
        if not missing:
            return layout._replace(places=places).scene(0)
    raise ValueError(f"no room was found for {caption(scene)}; take fewer or smaller solids, or other relations")


def placed(attributes: Tensor, relations: Tensor, random: torch.Generator, which: Tensor) -> tuple[Tensor, Tensor]:
    """Draw places of solids so that their relations hold, all lie in the picture, and none hides another.

    The first solid is put anywhere, the others `APART` from it in about the direction that its relation says, until all
    is so. Numbers are drawn for all scenes, so that none depends on how long another took.

    Args:
        attributes, relations: of the n scenes of a `Layout`.
        which: the m scenes, bool (n,), that are to have places.
    Returns: the places (m, 4, 3), and which of these scenes (m,) have none.
    """
    there, rows = attributes[which][..., 0] >= 0, which.nonzero()[:, 0]
    places, missing = torch.zeros(len(rows), SOLIDS, 3, dtype=torch.float64), torch.ones(len(rows), dtype=torch.bool)
    for _ in range(ATTEMPTS):
        uniform = torch.rand(len(attributes), TRIES, SOLIDS, 3, generator=random)
        left = missing.nonzero()[:, 0]
        tried = _tried(relations[rows[left]], uniform[rows[left]].double())
        fits = _fitting(tried, _radii(attributes[rows[left]])[:, None], there[left, None])
        found, first = fits.any(1), fits.int().argmax(1)
        places[left[found]], missing[left[found]] = tried[found, first[found]], False
        if found.all():
            break
    return places.masked_fill(~there[..., None], 0), missing


def _tried(relations: Tensor, uniform: Tensor) -> Tensor:
    """Map uniform numbers in [0, 1) to candidate places (n, TRIES, 4, 3), which may not fit."""
    first = (2 * uniform[:, :, :1, :2] - 1) * torch.tensor([SIDEWAYS, DEEP], dtype=torch.float64)
    ahead = torch.tensor([0.0, 1.0, 0.5, -0.5], dtype=torch.float64) * math.pi  # of the other, counter-clockwise from x
    angle = ahead[relations][:, None] + ASIDE * (2 * uniform[:, :, 1:, 0] - 1)
    distance = APART[0] + (APART[1] - APART[0]) * uniform[:, :, 1:, 1]
    others = first + distance[..., None] * torch.stack([angle.cos(), angle.sin()], -1)
    return torch.cat([torch.cat([first, others], 2), math.pi / 2 * uniform[..., 2:]], -1)


def _fitting(places: Tensor, radius: Tensor, there: Tensor) -> Tensor:
    """Return whether solids at places (..., 4, 3) lie in the picture, apart from each other and each visible: (...)."""
    x, z = places[..., 0], places[..., 1]
    a, b, t = projected(torch.stack([x, radius.expand_as(x), z], -1)).unbind(-1)
    size = REACH * radius / (raycast.SPREAD * t)
    inside = (torch.maximum(a.abs(), b) + size <= 1) & (b - FOOT * size >= -1) & (z.abs() <= DEEP)
    fits = (inside | ~there).all(-1)
    for one in range(SOLIDS):
        for other in range(one):
            both = there[..., one] & there[..., other]
            ground = torch.hypot(x[..., one] - x[..., other], z[..., one] - z[..., other])
            apart = ground >= REACH * (radius[..., one] + radius[..., other]) + GAP
            separation = torch.hypot(a[..., one] - a[..., other], b[..., one] - b[..., other])
            seen = separation >= UNHIDDEN * (size[..., one] + size[..., other])
            fits &= (apart & seen) | ~both
    return fits


def _radii(attributes: Tensor) -> Tensor:
    """Return radii (..., 4) of solids; of absent ones any value."""
    return torch.tensor(list(SIZES.values()), dtype=torch.float64, device=attributes.device)[attributes[..., 2]]


def solids_of(layout: Layout) -> raycast.Solids:
    """Return the solids of scenes in the form that the ray caster renders."""
    colours = torch.tensor(list(COLOURS.values()), device=layout.places.device)
    colour, shape, _, material = layout.attributes.unbind(-1)
    return raycast.Solids(
        shape, _radii(layout.attributes).float(), colours[colour], material == 1, layout.places.float()
    )


def render(scenes: Sequence[Scene] | Layout, size: int | Sequence[int] = 32) -> View:
    """Render scenes.

    Args:
        scenes: whose attributes and places are known, see `arranged`.
        size: a side of the pictures or (H, W); of other than squares the longer side shows what a square would.
    Returns: pictures uint8 (N, 3, H, W), depths float32 (N, 1, H, W), and masks bool (N, 5, H, W): of the ground, then
        of the solids in the order of the caption; exact at the centre of each pixel.
    Raises: ValueError for scenes of which something is not known.
    """
    layout = scenes if isinstance(scenes, Layout) else Layout.of(scenes)
    return raycast.seen(solids_of(layout), size)
