"""Blind reading sheet: samples mixed with held-out images, which a person reads and classifies as real or not.

The reader sees pictures alone. The key states which of them are samples, and answers are scored by it.
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

NAME = "reading_sheet"  # of the measure; prefix of its protocols
SHEET = re.compile("[0-9a-f]{64}")
LONGEST_TEXT = 1000  # characters of one answer; the name of a class may be long
NEEDED = {"n": int, "seeds": list}  # required settings of a key; the others describe how samples were drawn


class Item(NamedTuple):
    """Ground truth of a picture, hidden from its reader."""

    sample: bool  # or a held-out image
    number: int  # of the sample, or of the image in its data
    label: int | None  # the requested class, or that of the image


class Answer(NamedTuple):
    """A reader's answer about a picture; None where it is missing."""

    read: str | None  # the typed text, "" for no character
    real: bool | None  # judged a real image, or a sample


class Key(NamedTuple):
    """The key that a sheet is scored by."""

    sheet: str  # its id, see `identified`
    protocol: str  # name of its results
    settings: dict[str, Any]  # the part of a record that describes how the samples were drawn
    classes: list[list[str]]  # of each class, the correct texts
    items: list[Item]  # in the order of the pictures

    def as_json(self) -> dict[str, Any]:
        """Return plain data for `from_json`."""
        return self._asdict() | {"items": [item._asdict() for item in self.items]}

    @classmethod
    def from_json(cls, found: Any) -> Self:
        """Parse a key; ValueError for anything else."""
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
    """Return the order (count,) in which pictures are presented, a function of the seed."""
    return torch.randperm(count, generator=generator(seed, NAME))


def identified(pictures: Tensor, classes: Sequence[Sequence[str]]) -> str:
    """Return the id of a sheet: a checksum of what its reader sees, and of nothing else.

    Args:
        pictures: bytes (N, C, H, W), in their order.
        classes: of each class, the accepted texts.
    """
    digest = hashlib.sha256(json.dumps([tuple(pictures.shape), classes]).encode())
    digest.update(pictures.cpu().contiguous().numpy().data)
    return digest.hexdigest()


# ------------------------------------------------------------------------------------------------------------- answers


def sheet_of(found: Any) -> str:
    """Return the id of the sheet that answers belong to.

    Raises: ValueError for data without answers.
    """
    sheet = found.get("sheet") if isinstance(found, dict) else None
    if not isinstance(sheet, str) or not SHEET.fullmatch(sheet) or not isinstance(found.get("answers"), list):
        raise ValueError('it holds no answers: {"sheet": ID, "answers": [...]} is what a reading sheet saves')
    return sheet


def answers_of(found: Any, key: Key) -> list[Answer]:
    """Parse the answers that a sheet saved.

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
        raise ValueError("no sample has an answer: there is nothing to score")
    return answers


def _answer(i: int, found: Any) -> Answer:
    """Parse answer number i, from 1."""
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
    """Return shares of the samples with Wilson's intervals, and those of held-out images, over the answers given.

    Returns: by name, those with an answer for any sample:
        "read": something was typed, and not "no character";
        "right": the typed text is the requested class, or the label of an image; where classes were requested;
        "real": judged a real image.
    """
    measures: dict[str, tuple[str, Callable[[Item, Answer], bool | None]]] = {
        "read": ("read", lambda item, answer: None if answer.read is None else answer.read != ""),
        "right": ("read as the requested class", lambda item, answer: _is_right(item, answer, key)),
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
    """Normalise text for comparison: case, surrounding space and Unicode composition."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", text).strip().casefold())


def _result(words: str, of_samples: list[bool], of_held_out: list[bool]) -> Result:
    """Return the result of a share of the samples, with that of held-out images if any is answered."""
    low, high = wilson(sum(of_samples), len(of_samples))
    real, of_real = None, "none is answered"
    more: dict[str, Any] = {"answered": len(of_samples), "real_n": len(of_held_out)}
    if of_held_out:
        real, of_real = sum(of_held_out) / len(of_held_out), share_in_words(sum(of_held_out), len(of_held_out))
        more |= dict(zip(("real_low", "real_high"), wilson(sum(of_held_out), len(of_held_out)), strict=True))
    words = f"samples {words}: {share_in_words(sum(of_samples), len(of_samples))}; held-out images: {of_real}"
    return Result(sum(of_samples) / len(of_samples), real, words, low, high, more, "wilson")


def remarks(key: Key, answers: Sequence[Answer]) -> list[str]:
    """Return remarks on answers: missing ones, texts that match no class, how labels were read."""
    lines = []
    unread, unjudged = sum(answer.read is None for answer in answers), sum(answer.real is None for answer in answers)
    if unread or unjudged:
        lines.append(
            f"of {len(answers)} pictures {unread} were not read and {unjudged} not judged real or "
            "generated: they are left out"
        )
    known = {same(text) for texts in key.classes for text in texts}
    unknown = dict.fromkeys(a.read for a in answers if known and a.read and same(a.read) not in known)
    if unknown:
        lines.append(f"no class is called {', '.join(map(repr, unknown))}")
    pairs = list(zip(key.items, answers, strict=True))
    named = [hit for item, answer in pairs if not item.sample and (hit := _is_right(item, answer, key)) is not None]
    if named and not any(item.sample and item.label is not None for item in key.items):  # else `score` reports it
        lines.append(f"held-out images read as their label: {share_in_words(sum(named), len(named))}")
    return lines


def _is_right(item: Item, answer: Answer, key: Key) -> bool | None:
    """Whether the typed text matches the picture's class; None where it has none, or was not read."""
    if answer.read is None or item.label is None:
        return None
    return same(answer.read) in {same(text) for text in key.classes[item.label]}
