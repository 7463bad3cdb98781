"""A blind reading sheet: samples mixed among held-out images, and how a person read them and told them apart.

The sheet's reader sees pictures alone. Which of them are samples stands in its key, by which answers are scored.
"""

import hashlib
import json
import re
import unicodedata
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from ddpm.metrics.intervals import share_in_words, wilson
from ddpm.metrics.quality import Result
from ddpm.randomness import generator

NAME = "reading_sheet"  # of the measure; how its protocols begin
SHEET = re.compile("[0-9a-f]{64}")
LONGEST_TEXT = 1000  # characters that are said of one picture; the name of a class may be long
NEEDED = {"n": int, "seeds": list}  # of a key's settings, which else are what a record says of how samples were drawn


class Item(NamedTuple):
    """The truth about a picture, which its reader does not know."""

    sample: bool  # or a held-out image
    number: int  # of the sample, or of the image in its data
    label: int | None  # the class that was asked for, or that of the image


class Answer(NamedTuple):
    """A reader's answer about a picture; None where nothing was said."""

    read: str | None  # what was typed, "" for no character
    real: bool | None  # taken for a real image, or for a sample


class Key(NamedTuple):
    """The key that a sheet is scored by."""

    sheet: str  # its id, see `identified`
    protocol: str  # how its results are called
    settings: dict[str, Any]  # the part of a record that says how the samples were drawn
    classes: list[list[str]]  # of each class, the texts that are right
    items: list[Item]  # in the order of the pictures

    def as_json(self) -> dict[str, Any]:
        """Plain data, which `from_json` reads."""
        return self._asdict() | {"items": [item._asdict() for item in self.items]}

    @classmethod
    def from_json(cls, found: Any) -> Self:
        """Raises: ValueError for what is no key."""
        try:
            items = [Item(**item) for item in found["items"]]
            key = cls(**{name: found[name] for name in cls._fields if name != "items"}, items=items)
        except (KeyError, TypeError) as error:
            raise ValueError("it is not the key of a reading sheet") from error
        sound = isinstance(key.sheet, str) and isinstance(key.settings, dict) and isinstance(key.classes, list)
        sound = sound and isinstance(key.protocol, str) and bool(re.fullmatch(rf"{NAME}_[\w-]+", key.protocol))
        sound = sound and all(isinstance(key.settings.get(name), kind) for name, kind in NEEDED.items())
        sound = sound and all(
            isinstance(texts, list) and all(isinstance(t, str) for t in texts) for texts in key.classes
        )
        if not sound or not all(_is_item(item, len(key.classes)) for item in items):
            raise ValueError("it is not the key of a reading sheet")
        return key


def _is_item(item: Item, classes: int) -> bool:
    labelled = item.label is None or (type(item.label) is int and 0 <= item.label < classes)
    return isinstance(item.sample, bool) and type(item.number) is int and labelled


def mixed(count: int, seed: int) -> Tensor:
    """The order (count,) in which so many pictures are shown: a function of the seed."""
    return torch.randperm(count, generator=generator(seed, NAME))


def identified(pictures: Tensor, classes: Sequence[Sequence[str]]) -> str:
    """The id of a sheet: a checksum of what its reader sees, and of nothing else.

    Args:
        pictures: bytes (N, C, H, W), in their order.
        classes: of each class, the texts that may be typed.
    """
    digest = hashlib.sha256(json.dumps([tuple(pictures.shape), classes]).encode())
    digest.update(pictures.cpu().contiguous().numpy().data)
    return digest.hexdigest()


# ------------------------------------------------------------------------------------------------------------- answers


def sheet_of(found: Any) -> str:
    """The id of the sheet that answers belong to.

    Raises: ValueError for what holds no answers.
    """
    sheet = found.get("sheet") if isinstance(found, dict) else None
    if not isinstance(sheet, str) or not SHEET.fullmatch(sheet) or not isinstance(found.get("answers"), list):
        raise ValueError('it holds no answers: {"sheet": ID, "answers": [...]} is what a reading sheet saves')
    return sheet


def answers_of(found: Any, key: Key) -> list[Answer]:
    """The answers that a sheet saved, as plain data.

    Args:
        found: {"sheet": ID, "answers": [{"read": TEXT or null, "real": true, false or null}, ...]}, one a picture.
        key: of the sheet.
    Raises: ValueError for answers of another sheet, or of another shape, and where no sample is answered.
    """
    if sheet_of(found) != key.sheet:
        raise ValueError(f"it answers sheet {found['sheet'][:12]}, not {key.sheet[:12]}")
    if len(found["answers"]) != len(key.items):
        raise ValueError(f"it has {len(found['answers'])} answers, but the sheet has {len(key.items)} pictures")
    answers = [_answer(i, answer) for i, answer in enumerate(found["answers"], 1)]
    if not any(item.sample and answer != (None, None) for item, answer in zip(key.items, answers, strict=True)):
        raise ValueError("nothing is answered of any sample: there is nothing to score")
    return answers


def _answer(i: int, found: Any) -> Answer:
    """Answer number i, from 1."""
    if not isinstance(found, dict) or found.keys() != set(Answer._fields):
        raise ValueError(f'answer {i} is not {{"read": ..., "real": ...}}')
    read, real = found["read"], found["real"]
    if not (read is None or (isinstance(read, str) and len(read) <= LONGEST_TEXT)):
        raise ValueError(f"answer {i}: read must be text of up to {LONGEST_TEXT} characters, or null")
    if not (real is None or isinstance(real, bool)):
        raise ValueError(f"answer {i}: real must be true, false or null")
    return Answer(None if read is None else read.strip(), real)


# -------------------------------------------------------------------------------------------------------------- scores


def score(key: Key, answers: Sequence[Answer]) -> dict[str, Result]:
    """Shares of the samples, each beside that of held-out images, with Wilson's intervals; what lacks is left out.

    Returns: by name, those of which any sample is answered:
        "read": something was typed, and not "no character";
        "right": what was typed is the class that was asked for, of an image its label; where classes were asked for;
        "real": taken for a real image.
    """
    measures: dict[str, tuple[str, Callable[[Item, Answer], bool | None]]] = {
        "read": ("read", lambda item, answer: None if answer.read is None else answer.read != ""),
        "right": ("read as the class that was asked for", lambda item, answer: _is_right(item, answer, key)),
        "real": ("taken for real", lambda item, answer: answer.real),
    }
    results = {}
    for name, (words, measure) in measures.items():
        found = [(item.sample, measure(item, answer)) for item, answer in zip(key.items, answers, strict=True)]
        of_samples = [hit for sample, hit in found if sample and hit is not None]
        of_held_out = [hit for sample, hit in found if not sample and hit is not None]
        if of_samples:
            results[name] = _result(words, of_samples, of_held_out)
    return results


def same(text: str) -> str:
    """Text as it is compared: without regard to case, surrounding space, and how Unicode composes a character."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", text).strip().casefold())


def _result(words: str, of_samples: list[bool], of_held_out: list[bool]) -> Result:
    """A share of the samples, beside that of held-out images if any is answered."""
    low, high = wilson(sum(of_samples), len(of_samples))
    real, told = None, "none is answered"
    more: dict[str, Any] = {"answered": len(of_samples), "real_n": len(of_held_out)}
    if of_held_out:
        real, told = sum(of_held_out) / len(of_held_out), share_in_words(sum(of_held_out), len(of_held_out))
        more |= dict(zip(("real_low", "real_high"), wilson(sum(of_held_out), len(of_held_out)), strict=True))
    told = f"samples {words}: {share_in_words(sum(of_samples), len(of_samples))}; held-out images: {told}"
    return Result(sum(of_samples) / len(of_samples), real, told, low, high, more, "wilson")


def remarks(key: Key, answers: Sequence[Answer]) -> list[str]:
    """Remarks on answers: what is left out, texts that name no class, how labels were read."""
    lines = []
    unread, untold = sum(answer.read is None for answer in answers), sum(answer.real is None for answer in answers)
    if unread or untold:
        lines.append(
            f"of {len(answers)} pictures {unread} were not read and {untold} not told apart: they are left out"
        )
    known = {same(text) for texts in key.classes for text in texts}
    unknown = dict.fromkeys(a.read for a in answers if known and a.read and same(a.read) not in known)
    if unknown:
        lines.append(f"no class is called {', '.join(map(repr, unknown))}")
    pairs = list(zip(key.items, answers, strict=True))
    named = [hit for item, answer in pairs if not item.sample and (hit := _is_right(item, answer, key)) is not None]
    if named and not any(item.sample and item.label is not None for item in key.items):  # else `score` tells it
        lines.append(f"held-out images read as their label: {share_in_words(sum(named), len(named))}")
    return lines


def _is_right(item: Item, answer: Answer, key: Key) -> bool | None:
    """Whether what was typed is the picture's class; None where it has none, or was not read."""
    if answer.read is None or item.label is None:
        return None
    return same(answer.read) in {same(text) for text in key.classes[item.label]}
