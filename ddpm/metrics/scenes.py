"""Are the things that a prompt names right in what is drawn? Scenes are read by a network and compared with words."""

import math
from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from ddpm.data.raycast import SHAPES
from ddpm.data.scenes import PAIRS, Scene
from ddpm.metrics.intervals import share_in_words, wilson
from ddpm.metrics.quality import Result
from ddpm.metrics.reader import Reading, relation_between, seen

NAME = "scenes"
WORDS = {  # what is counted, in words
    "all": "all that the prompt says",
    "pairs": "all colours and shapes",
    "size": "size of a solid that is there",
    "material": "material of a solid that is there",
    "relation": "relation of two solids that are there",
}


class Judged(NamedTuple):
    """The parts of a prompt that are right in one picture."""

    all: bool  # whatever the prompt says
    pairs: bool  # the picture has the prompt's pairs of a colour and a shape
    size: tuple[bool, ...]  # of the solids whose pair is there, where the prompt says one
    material: tuple[bool, ...]  # likewise
    relation: tuple[bool, ...]  # of the first solid to each other one, where both pairs are there


def judged(reading: Reading, row: int, prompt: Scene) -> Judged:
    """The parts of a prompt that are right in one of the pictures that were read.

    A picture of a prompt of n solids is read as its n most probable pairs, so that one solid too many goes unnoticed
    if it is seen less clearly than those; one too few never does.
    """
    found = seen(reading, row, len(prompt.solids))
    asked = [solid.colour * len(SHAPES) + solid.shape for solid in prompt.solids]
    at = [found.pair.index(pair) if pair in found.pair else None for pair in asked]
    there = [(solid, i) for solid, i in zip(prompt.solids, at, strict=True) if i is not None]
    size = tuple(found.size[i] == solid.size for solid, i in there if solid.size is not None)
    material = tuple(found.material[i] == solid.material for solid, i in there if solid.material is not None)
    relation = tuple(
        int(relation_between(found.place[at[0]], found.place[i])) == r
        for r, i in zip(prompt.relations, at[1:], strict=True)
        if at[0] is not None and i is not None
    )
    pairs = set(asked) == set(found.pair)
    return Judged(pairs and all((*size, *material, *relation)), pairs, size, material, relation)


def judge_all(reading: Reading, prompts: Sequence[Scene]) -> list[Judged]:
    """Judge every picture that was read by its prompt: picture i has prompt i modulo their number."""
    return [judged(reading, i, prompts[i % len(prompts)]) for i in range(len(reading.presence))]


def cases(pictures: Sequence[Judged]) -> dict[str, list[bool]]:
    """Right or wrong, case by case, by what is counted; a picture is one case, or each solid or relation of it."""
    found: dict[str, list[bool]] = {}
    for what in WORDS:
        of_each = [getattr(picture, what) for picture in pictures]
        found[what] = [case for value in of_each for case in (value if isinstance(value, tuple) else (value,))]
    return found


def chance_of_pairs(prompts: Sequence[Scene]) -> float:
    r"""The share of pictures that have all colours and shapes of their prompt by chance, knowing its n solids alone.

    .. math:: P = \binom{K}{n}^{-1} \qquad \text{[Chance (pairs)]}

    of K pairs of a colour and a shape, n different ones evenly drawn; the mean over the prompts.
    """
    return sum(1 / math.comb(PAIRS, len(prompt.solids)) for prompt in prompts) / len(prompts)


def results(drawn: Sequence[Judged], real: Sequence[Judged], chance: float) -> dict[str, Result]:
    """Shares that are right among samples, by name, with Wilson's interval, beside those of real pictures, the ceiling.

    Nothing is said of what no prompt says, and of solids where none is there.

    Args:
        drawn, real: samples, and held-out pictures of the same captions, as the same network reads them.
        chance: of all colours and shapes.
    """
    found, of_real = cases(drawn), cases(real)
    return {what: _result(what, found[what], of_real[what], chance) for what in WORDS if found[what]}


def _result(what: str, right: list[bool], real: list[bool], chance: float) -> Result:
    """A share of cases beside that of real pictures."""
    k, n = sum(right), len(right)
    low, high = wilson(k, n)
    between = (None, None) if not real else wilson(sum(real), len(real))
    ceiling = sum(real) / len(real) if real else None
    more = {"cases": n, "real_n": len(real), "real_low": between[0], "real_high": between[1]}
    more |= {"chance": chance} if what == "pairs" else {}
    of_real = share_in_words(sum(real), len(real)) if real else "none"
    words = f"{WORDS[what]}: {share_in_words(k, n)}; of held-out pictures, the ceiling: {of_real}"
    words += f"; by chance {chance:.2%}" if what == "pairs" else ""
    return Result(k / n, ceiling, words, low, high, more, "wilson")


def parts_of(held_out: Tensor, composed: Tensor) -> dict[str, Tensor]:
    """The held-out samples by what their captions name, sorted; parts without any are left out.

    Args:
        held_out, composed: numbers of samples; composed ones show a pair that no training scene does.
    Returns: "seen" and "composed" -> numbers.
    """
    held_out, barred = held_out.cpu(), set(composed.tolist())
    is_composed = [number in barred for number in held_out.tolist()]
    parts = {name: held_out[[c == (name == "composed") for c in is_composed]] for name in ("seen", "composed")}
    return {name: numbers for name, numbers in parts.items() if len(numbers)}
