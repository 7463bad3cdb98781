"""Prompt fidelity of scenes: samples are read by a network and compared with the attributes in their prompts."""

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
WORDS = {  # measure -> description
    "all": "everything in the prompt",
    "pairs": "all colours and shapes",
    "size": "size of a solid that is there",
    "material": "material of a solid that is there",
    "relation": "relation of two solids that are there",
}


class Judged(NamedTuple):
    """Correctness of the parts of a prompt in one picture."""

    all: bool  # everything in the prompt
    pairs: bool  # the picture has the prompt's pairs of a colour and a shape
    size: tuple[bool, ...]  # of the solids whose pair is present, where the prompt states one
    material: tuple[bool, ...]  # likewise
    relation: tuple[bool, ...]  # of the first solid to each other one, where both pairs are present


def judged(reading: Reading, row: int, prompt: Scene) -> Judged:
    """Compare the reading of one picture with its prompt.

    A picture for a prompt of n solids is read as its n most probable pairs, so that an extra solid goes unnoticed if it
    is less probable than those; a missing one never does.
    """
    found = seen(reading, row, len(prompt.solids))
    requested = [solid.colour * len(SHAPES) + solid.shape for solid in prompt.solids]
    at = [found.pair.index(pair) if pair in found.pair else None for pair in requested]
    there = [(solid, i) for solid, i in zip(prompt.solids, at, strict=True) if i is not None]
    size = tuple(found.size[i] == solid.size for solid, i in there if solid.size is not None)
    material = tuple(found.material[i] == solid.material for solid, i in there if solid.material is not None)
    relation = tuple(
        int(relation_between(found.place[at[0]], found.place[i])) == r
        for r, i in zip(prompt.relations, at[1:], strict=True)
        if at[0] is not None and i is not None
    )
    pairs = set(requested) == set(found.pair)
    return Judged(pairs and all((*size, *material, *relation)), pairs, size, material, relation)


def judge_all(reading: Reading, prompts: Sequence[Scene]) -> list[Judged]:
    """Compare every picture that was read with its prompt: picture i has prompt i modulo their number."""
    return [judged(reading, i, prompts[i % len(prompts)]) for i in range(len(reading.presence))]


def cases(pictures: Sequence[Judged]) -> dict[str, list[bool]]:
    """Return measure -> correct or not, case by case; a case is a picture, or each of its solids or relations."""
    found: dict[str, list[bool]] = {}
    for what in WORDS:
        of_each = [getattr(picture, what) for picture in pictures]
        found[what] = [case for value in of_each for case in (value if isinstance(value, tuple) else (value,))]
    return found


def chance_of_pairs(prompts: Sequence[Scene]) -> float:
    r"""Return the share of pictures with all pairs of their prompt by chance, knowing only its number n of solids.

    .. math:: P = \binom{K}{n}^{-1} \qquad \text{[Chance (pairs)]}

    of K pairs of a colour and a shape, n different ones at random; the mean over the prompts.
    """
    return sum(1 / math.comb(PAIRS, len(prompt.solids)) for prompt in prompts) / len(prompts)


def results(drawn: Sequence[Judged], real: Sequence[Judged], chance: float) -> dict[str, Result]:
    """Return the correct shares of samples by measure, with Wilson's interval and those of real pictures, the ceiling.

    Measures without a case, such as an attribute that no prompt states, are left out.

    Args:
        drawn, real: samples, and held-out pictures of the same captions, as the same network reads them.
        chance: the share of pictures with all pairs by chance.
    """
    found, of_real = cases(drawn), cases(real)
    return {what: _result(what, found[what], of_real[what], chance) for what in WORDS if found[what]}


def _result(what: str, right: list[bool], real: list[bool], chance: float) -> Result:
    """Return the result of a share of cases, with that of real pictures."""
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
    """Split held-out samples by whether their captions name a pair that is new; empty parts are left out.

    Args:
        held_out, composed: indices of samples; composed ones have a pair that no training scene has.
    Returns: "seen" and "composed" -> indices.
    """
    held_out, barred = held_out.cpu(), set(composed.tolist())
    is_composed = [number in barred for number in held_out.tolist()]
    parts = {name: held_out[[c == (name == "composed") for c in is_composed]] for name in ("seen", "composed")}
    return {name: numbers for name, numbers in parts.items() if len(numbers)}
