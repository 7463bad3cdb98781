"""Pictures of one subject: a two-coloured solid that no other data show, named in captions by a word of its own."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ddpm.checks import is_whole
from ddpm.data import raycast
from ddpm.data.dataset import ImageData, check_choice, check_options, height_width
from ddpm.data.raycast import SHAPES, TEXTURES
from ddpm.data.scenes import COLOURS, SIZE_NAMES, SMALLEST, WORDINGS, Layout, Scene, caption, drawn, solids_of
from ddpm.randomness import generator
from ddpm.runs.files import Origin

NAMES = tuple(COLOURS)
FEW, MOST_VIEWS = (3, 10), 1000


class Subject(ImageData):
    """A few pictures of one textured solid next to plain ones, in scenes as in `Scenes`, and held-out views.

    The subject is the first solid of each scene: always of the same shape and texture, small or large, somewhere, and
    turned anyhow. The caption is that of the scene with the subject's word in the place of material and colour: "a
    small sks sphere left of a large shiny blue cube". Another solid of the scene is never of its shape.

    Args:
        root: without effect here, as nothing is read.
        count: pictures to learn from, 3 to 10.
        views: pictures that are held out, 1 to 1000.
        image_size, channels, condition: as in `ImageData`.
        shape: of the subject, one of `SHAPES`.
        texture: "stripes" or "checks".
        colours: the two of them, names of `COLOURS`.
        word: the word that names it in captions.
        wording: of captions, as in `Scenes`.
        seed: of the scenes.
        split: "auto", which is all of them.
        validation: without effect here, as `views` are held out.
        flip: false, as in `Scenes`.

    Attributes:
        captions: the caption of each sample, by its number.
        layout: what and where the solids are, see `ddpm.data.scenes.Layout`; the subject's colour is its first one.

    Raises: ValueError for options outside their ranges.
    """

    def __init__(
        self,
        root: str | None = "data",
        count: int = 5,
        views: int = 32,
        image_size: int | Sequence[int] = 32,
        channels: int = 3,
        shape: str = "sphere",
        texture: str = "stripes",
        colours: Sequence[str] = ("orange", "purple"),
        word: str = "sks",
        wording: str = "all",
        seed: int = 0,
        split: str = "auto",
        validation: float = 0.0,
        flip: bool = False,
        condition: str | None = None,
    ):
        for key, choice, allowed in (
            ("split", split, ("auto",)),
            ("shape", shape, SHAPES),
            ("texture", texture, TEXTURES[1:]),
            ("wording", wording, WORDINGS),
        ):
            check_choice(key, choice, allowed)
        if flip is not False:
            raise ValueError(
                f"flip={flip!r}: a mirror image swaps left of and right of, but its caption does not; set flip=false"
            )
        check_options(image_size, channels, validation, condition)
        for key, value, least, most in (
            ("count", count, *FEW), ("views", views, 1, MOST_VIEWS), ("seed", seed, 0, 2**62),
        ):  # fmt: skip
            if not is_whole(value, least, most):
                raise ValueError(f"{key}={value!r} must be an integer in {least}..{most}")
        if not isinstance(word, str) or not word.isalpha():
            raise ValueError(f"word={word!r} must be one word of letters, such as sks")
        if min(height_width(image_size)) < SMALLEST:
            raise ValueError(f"image_size={image_size!r}: scenes are drawn at {SMALLEST} pixels and more")
        self.count_of_few, self.word, self.kind = count, word, (SHAPES.index(shape), TEXTURES.index(texture))
        self.pair = _two(colours)
        self.layout = _of_subject(count + views, self.kind[0], self.pair[0], seed)
        self.origin = Origin(tuple)  # nothing that changes while a process runs
        self.captions = tuple(_named(self.layout.scene(n), wording, word) for n in range(count + views))
        pictures = raycast.seen(self._solids(), image_size).picture
        super().__init__("subject", "all", pictures, channels=channels, validation=0.0, condition=condition)

    def _divide(self, count: int, validation: float) -> tuple[Tensor, Tensor]:
        """Return the indices of the few training pictures, and of the views."""
        return torch.arange(self.count_of_few), torch.arange(self.count_of_few, count)

    def _solids(self) -> raycast.Solids:
        """Return the solids of the scenes for the ray caster, with the subject's texture."""
        solids = solids_of(self.layout)
        texture = torch.zeros_like(solids.shape)
        texture[:, 0] = self.kind[1]
        second = solids.colour.clone()
        second[:, 0] = torch.tensor(list(COLOURS.values()))[self.pair[1]]
        return solids._replace(second=second, texture=texture)

    def others(self, numbers: Tensor) -> Tensor:
        """Pictures of the scenes of samples (B,) with another solid where the subject is, of a plain colour and of a
        shape that is not its own: uint8 (B, C, H, W)."""
        attributes, random = self.layout.attributes.clone(), generator(0, "not the subject")
        colour = torch.randint(len(NAMES), (len(attributes),), generator=random)
        shape = torch.randint(1, len(SHAPES), (len(attributes),), generator=random)
        attributes[:, 0, 0], attributes[:, 0, 1] = colour, (self.kind[0] + shape) % len(SHAPES)
        layout = self.layout._replace(attributes=attributes).rows(numbers.cpu())
        pictures = raycast.seen(solids_of(layout), self.image_size).picture
        if self.shape[0] == 3:
            return pictures
        return ImageData("others", "all", pictures, channels=1, validation=0.0).images

    def identity(self) -> dict[str, Any]:
        """Return what identifies the data: also how many of them are trained on."""
        return super().identity() | {"few": self.count_of_few}


def _two(colours: Sequence[str]) -> tuple[int, int]:
    """Return the numbers of two different colours; ValueError with what is allowed."""
    names = [] if isinstance(colours, str) else list(colours)
    if len(names) != 2 or not set(names) <= set(NAMES) or names[0] == names[1]:
        raise ValueError(f"colours={colours!r} must be two different ones of {', '.join(NAMES)}")
    return NAMES.index(names[0]), NAMES.index(names[1])


def _of_subject(n: int, shape: int, colour: int, seed: int) -> Layout:
    """Return scenes of two solids, the first of this shape and matt, the other of another shape; turned at random."""
    layout = drawn(n, (2,), seed)
    attributes, places = layout.attributes.clone(), layout.places.clone()
    random = generator(seed, "subject")
    others = (shape + torch.randint(1, len(SHAPES), (n,), generator=random)) % len(SHAPES)
    attributes[:, 0, 0], attributes[:, 0, 1], attributes[:, 0, 3] = colour, shape, 0
    attributes[:, 1, 1] = torch.where(attributes[:, 1, 1] == shape, others, attributes[:, 1, 1])
    places[:, 0, 2] = 2 * torch.pi * torch.rand(n, generator=random).double()
    return layout._replace(attributes=attributes, places=places)


def _named(scene: Scene, wording: str, word: str) -> str:
    """Return a caption that names the first solid by a word, in place of its material and its colour."""
    text, (first, *_) = caption(scene, wording), scene.solids
    size = "" if first.size is None or wording == "colour" else f"{SIZE_NAMES[first.size]} "
    article = "an" if (size or word)[0] in "aeiou" else "a"
    return f"{article} {size}{word} {text[text.index(SHAPES[first.shape]) :]}"
