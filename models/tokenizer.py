r"""Tokenization of texts: the byte-pair encoding of CLIP (arXiv 2103.00020), and learning its merges.

A text is normalised (`tidied`), split into words (`words`), and a word is the characters of its UTF-8 bytes, the last
of which carries the mark of an end. From these, pairs of neighbours are merged into one token, in the order in which
the merges were learned (Sennrich et al., arXiv 1508.07909).

Published are two tokenizers of the same vocabulary, which differ on odd text. Ours is token for token the one of the
tokenizers library, which pipelines use today: NFC, white space collapsed, lower case. The older one, written in Python,
without ftfy takes control characters away (zero-width joiners too) and splits Chinese characters from each other; with
ftfy, as OpenAI's, it also repairs wrongly decoded text, and HTML entities such as &amp; are what they stand for.
"""

import unicodedata
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import regex
import torch
from torch import Tensor

from models.layers import check_counts

Pair = tuple[str, str]
START, END = "<|startoftext|>", "<|endoftext|>"
MARK = "</w>"  # at the end of the last token of a word
WORD = regex.compile(r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+")
SPACE = regex.compile(r"\s+")
MOST, MOST_LENGTH = 2**20, 2**16  # tokens of a vocabulary, of a text
LONGEST_QUOTE = 80  # characters of a text in a message


def byte_characters() -> list[str]:
    """Return a printable character for each byte, as in GPT-2: its own if printable, else one from U+0100 on."""
    seen = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    unseen = [byte for byte in range(256) if byte not in seen]
    return [chr(byte) if byte in seen else chr(256 + unseen.index(byte)) for byte in range(256)]


CHARACTERS = byte_characters()
BYTES = {character: byte for byte, character in enumerate(CHARACTERS)}
# The tokens that every vocabulary has, in the published order: printable bytes before the others.
FIRST = sorted(CHARACTERS)
FIRST = FIRST + [character + MARK for character in FIRST]


def tidied(text: str) -> str:
    """Return a text in Unicode's composed form (NFC), white space collapsed to single spaces, and in lower case."""
    text = SPACE.sub(" ", unicodedata.normalize("NFC", text))
    return "".join(character.lower() for character in text)  # one by one: a sigma at the end of a word is like others


def words(text: str) -> list[tuple[str, ...]]:
    """Return the words of a tidied text, each as the characters of its bytes, the last with the end mark.

    A word is a run of letters, one digit, a run of what is neither (punctuation, emoji), or what follows an apostrophe
    in English ('s, 't, 're, 've, 'm, 'll, 'd).
    """
    found = []
    for word in WORD.findall(text):
        found += ["<|", word[2:-2], "|>"] if word in (START, END) else [word]  # written out: no run extends into them
    return [(*(CHARACTERS[byte] for byte in word[:-1]), CHARACTERS[word[-1]] + MARK) for word in map(str.encode, found)]


def merged(word: Sequence[str], ranks: Mapping[Pair, int]) -> list[str]:
    r"""Return the tokens of a word, merging the pair that was learned first first.

    .. math:: i = \arg\min_i r(w_i, w_{i+1}), \quad w \leftarrow w_1 .. w_{i-1},\; w_i w_{i+1},\; w_{i+2} .. w_n
        \qquad \text{[BPE (encode)]}

    the leftmost of equal ranks r, until no pair of neighbours has one.

    Args:
        word: its characters, as from `words`.
        ranks: pair -> index in the list of merges.
    Source: Sennrich et al. (arXiv 1508.07909), section 3.2.
    """
    w, never = list(word), len(ranks)
    r = [ranks.get(pair, never) for pair in pairwise(w)]
    while r and (lowest := min(r)) < never:
        i = r.index(lowest)
        w[i : i + 2] = [w[i] + w[i + 1]]
        del r[i]
        for j in (i - 1, i):  # its new neighbours
            if 0 <= j < len(r):
                r[j] = ranks.get((w[j], w[j + 1]), never)
    return w


def learned(counts: Mapping[tuple[str, ...], int], most: int) -> list[Pair]:
    r"""Learn merges from words: each joins the pair of neighbours that is most frequent by then.

    .. math:: (a, b) = \arg\max_{a, b} \sum_w n_w\, \#\{i : w_i = a, w_{i+1} = b\} \qquad \text{[BPE (learn)]}

    and every a b becomes one token, from the left. Of equally frequent pairs it is the first in the order of Unicode; a
    pair that is found once only is not merged. Counts are updated incrementally, for words that change.

    Args:
        counts: n_w of each word, as from `words`.
        most: number of merges; fewer are learned where no pair is left that is found twice.
    Source: Sennrich et al. (arXiv 1508.07909), section 3.2 and algorithm 1.
    """
    split, n = [list(word) for word in counts], list(counts.values())
    frequency: Counter[Pair] = Counter()
    where: defaultdict[Pair, set[int]] = defaultdict(set)  # words that have a pair, or had it once

    def count(k: int, sign: int) -> None:
        for pair in pairwise(split[k]):
            frequency[pair] += sign * n[k]
            where[pair].add(k)
            if not frequency[pair]:
                del frequency[pair]

    for k in range(len(split)):
        count(k, 1)
    merges: list[Pair] = []
    while len(merges) < most and frequency and (top := max(frequency.values())) >= 2:
        merges.append(min(pair for pair, times in frequency.items() if times == top))
        for k in where.pop(merges[-1]):
            count(k, -1)
            split[k] = joined(split[k], merges[-1])
            count(k, 1)
    return merges


def joined(word: Sequence[str], pair: Pair) -> list[str]:
    """Return a word with each occurrence of a pair of neighbours merged into one token, from the left."""
    out: list[str] = []
    for token in word:
        if out and (out[-1], token) == pair:
            out[-1] += token
        else:
            out.append(token)
    return out


class BytePairs:
    """A byte-pair tokenizer, which turns texts into ids and back.

    Args:
        merges: pairs of tokens, the first learned first.
        ids: token -> id; None for the published order: the bytes, the bytes at the end of a word, the merges, start
            and end.
        length: tokens of a row of ids, start and end included, from 2.
        start, end: the tokens before and after a text; in a text they stand for themselves.
        padding: the token after the end; None for `end`. It stands for itself in a text too: with "!", as published
            with Stable Diffusion 2, an exclamation mark is a padding token.
        unknown: the token for a byte that the vocabulary lacks; None where it lacks none.
        folded: those of the above tokens that are matched in upper case too.
        added: words that were added later, each one token; their ids follow the others in this order, see `with_words`.
    Attributes:
        start, end, padding: their ids.
        vocabulary: number of ids, one more than the largest: an argument of `models.text.TextEncoder`.
    Raises:
        ValueError: invalid or repeated merges or ids; merges whose parts or result have no id;
            bytes without one, unless there is an unknown token; a token named above without one; a length out of range.
    Source: Sennrich et al. (arXiv 1508.07909); of bytes, GPT-2 (Radford et al. 2019), section 2.2; CLIP (arXiv
        2103.00020), section 2.4.
    """

    def __init__(
        self,
        merges: Iterable[Sequence[str]],
        ids: Mapping[str, int] | None = None,
        length: int = 77,
        start: str = START,
        end: str = END,
        padding: str | None = None,
        unknown: str | None = None,
        folded: Sequence[str] = (),
        added: Sequence[str] = (),
    ):
        check_counts(MOST_LENGTH, length=length)
        if length < 2:
            raise ValueError(f"length = {length} has no room for start and end; allowed: 2 to {MOST_LENGTH:,}")
        self.merges = _pairs(merges)
        published = [*FIRST, *("".join(pair) for pair in self.merges), start, end]
        self._own_ids = None if ids is None else dict(ids)
        self.ids = _unique(published) if ids is None else dict(ids)
        self.length, self.folded = length, tuple(folded)
        self._names = {"start": start, "end": end, "padding": end if padding is None else padding}
        self._names |= {} if unknown is None else {"unknown": unknown}
        _check(self.ids, self.merges, self._names)
        self.start, self.end, self.padding = (self.ids[self._names[name]] for name in ("start", "end", "padding"))
        self.vocabulary = 1 + max(self.ids.values())
        self._ranks = {pair: rank for rank, pair in enumerate(self.merges)}
        self._tokens = {number: token for token, number in self.ids.items()}
        self._known: dict[tuple[str, ...], list[int]] = {}  # ids of words that were encoded
        named = set(self._names.values())
        self._special = _alternatives({token: token for token in named - set(folded)})
        self._special_folded = _alternatives({tidied(token): token for token in named & set(folded)})
        self.added: tuple[str, ...] = ()
        for word in added:
            self._add(word)

    def with_words(self, added: Sequence[str]) -> "BytePairs":
        """Return a tokenizer with further words as single tokens; all other texts have the same ids.

        The first of them has the id `vocabulary`, the next the one after it.

        Raises:
            ValueError: anything but one word, such as "two words" or "x1"; a word that is one token already.
        """
        return BytePairs.from_dict(self.to_dict() | {"added": [*self.added, *added]})

    def _add(self, word: str) -> None:
        """Add a word as the token with the next id."""
        pieces = words(tidied(_text(word)))
        if len(pieces) != 1:
            raise ValueError(f"{_short(word)} is {len(pieces)} words, but a token is one word; allowed: letters only")
        if len(self._of_word(pieces[0])) == 1:
            raise ValueError(f"{_short(word)} is one token already, and cannot be added; take another word")
        self._known[pieces[0]], self._tokens[self.vocabulary] = [self.vocabulary], "".join(pieces[0])
        self.added, self.vocabulary = (*self.added, word), self.vocabulary + 1

    @classmethod
    def train(cls, captions: Iterable[str], vocabulary: int = 1024, length: int = 77, **options: Any) -> "BytePairs":
        """Learn a vocabulary from texts; the same texts, in whatever order, give the same one.

        Args:
            captions: the texts.
            vocabulary: most ids, at least 514: 512 for the bytes, two for start and end, and the rest are merges. Texts
                with fewer pairs give a smaller one.
            length: tokens of a row of ids.
            options: further arguments of `BytePairs`.
        Raises:
            ValueError: a vocabulary or length out of range; captions that are one string, or none at all.
        """
        least = len(FIRST) + 2
        check_counts(MOST, vocabulary=vocabulary)
        if vocabulary < least:
            raise ValueError(f"vocabulary = {vocabulary} has no room for all bytes; allowed: {least} to {MOST:,}")
        counts = Counter(word for caption in _several(captions) for word in words(tidied(_text(caption))))
        if not counts:
            raise ValueError("there are no words to learn a vocabulary from")
        return cls(learned(counts, vocabulary - least), length=length, **options)

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text, without start and end, however many.

        Raises:
            ValueError: not a string; half of a surrogate pair.
        """
        found: list[int] = []
        for plain, special in _split(self._special, _text(text)):
            for tidy, folded in _split(self._special_folded, tidied(plain)):
                for word in words(tidy):
                    found += self._of_word(word)
                found += [self.ids[folded]] if folded else []
            found += [self.ids[special]] if special else []
        return found

    def whole_words(self) -> list[str]:
        """Return the words of letters that are one token, by their ids."""
        ends = [number for number, token in sorted(self._tokens.items()) if token.endswith(MARK)]
        texts = [(number, self.decode([number])) for number in ends]
        return [text for number, text in texts if text.isalpha() and self.encode(text) == [number]]

    def _of_word(self, word: tuple[str, ...]) -> list[int]:
        """Return the ids of a word, cached."""
        if word not in self._known:
            unknown = self.ids.get(self._names.get("unknown", ""), -1)
            self._known[word] = [self.ids.get(token, unknown) for token in merged(word, self._ranks)]
        return self._known[word]

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of ids, as far as it is known: in lower case, each word and each run of punctuation apart.

        Args:
            ids: a sequence or a tensor (L,); start, end, padding and unknown are left out.
        Raises:
            ValueError: an id that no token has.
        """
        left_out, out = {self.ids[token] for token in self._names.values()}, bytearray()
        for number in map(int, ids):
            if number not in self._tokens:
                raise ValueError(f"no token has the id {number}; allowed: 0 to {self.vocabulary - 1}")
            if number not in left_out:
                token = self._tokens[number]
                out += _bytes(token.removesuffix(MARK)) + b" " * token.endswith(MARK)
        return out.decode(errors="replace").strip()

    def __call__(self, texts: Iterable[str]) -> Tensor:
        """Return a row of ids a text: start, the text, end, padding. A text that is too long is cut, with a warning.

        Args:
            texts: B strings.
        Returns:
            (B, length), int64.
        Raises:
            ValueError: one string instead of several; else as `encode`.
        """
        rows = []
        for text in _several(texts):
            found, room = self.encode(text), self.length - 2
            if len(found) > room:
                warnings.warn(
                    f"a text has {len(found)} tokens, and {room} fit between start and end; cut: "
                    f"{_short(self.decode(found[room:]))}",
                    stacklevel=2,
                )
            row = [self.start, *found[:room], self.end]
            rows.append(row + [self.padding] * (self.length - len(row)))
        return torch.tensor(rows, dtype=torch.int64).reshape(len(rows), self.length)

    def to_dict(self) -> dict[str, Any]:
        """Return all settings as a dict for JSON; `from_dict` reads it back."""
        settings = {"merges": [list(pair) for pair in self.merges], "length": self.length, "folded": list(self.folded)}
        settings |= {"added": list(self.added)} if self.added else {}
        return settings | self._names | ({} if self._own_ids is None else {"ids": self._own_ids})

    @classmethod
    def from_dict(cls, said: Mapping[str, Any]) -> "BytePairs":
        """Return the tokenizer that `to_dict` described.

        Raises:
            ValueError: unknown or missing keys; else as the class.
        """
        allowed = {"merges", "ids", "length", "start", "end", "padding", "unknown", "folded", "added"}
        if "merges" not in said or set(said) - allowed:
            raise ValueError(
                f"a tokenizer is described by the keys {', '.join(sorted(allowed))}, and merges is required; "
                f"given: {', '.join(sorted(map(str, said))) or 'none'}"
            )
        return cls(**said)


def _bytes(token: str) -> bytes:
    """Return the bytes of a token; of one that is not made of bytes, its UTF-8 encoding."""
    return bytes(BYTES[c] for c in token) if all(c in BYTES for c in token) else token.encode()


def _text(text: object) -> str:
    """Return the text; ValueError if it is no string, or has half a surrogate pair."""
    if not isinstance(text, str):
        raise ValueError(f"a text is a string, not {type(text).__name__}: {_short(text)}")
    if not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text):
        raise ValueError(f"a text holds half of a surrogate pair, which is no character: {_short(text)}")
    return text


def _several(texts: Iterable[str]) -> Iterable[str]:
    """Return the texts; ValueError if they are one string, whose characters would be taken for texts."""
    if isinstance(texts, str):
        raise ValueError(f"texts are a list of strings, such as [{_short(texts)}], not one string")
    return texts


def _short(value: object) -> str:
    """Return a value for a message: cut where it is long, in ASCII where it cannot be printed."""
    text = ascii(value) if isinstance(value, str) and not value.isprintable() else repr(value)
    return text if len(text) <= LONGEST_QUOTE else f"{text[:LONGEST_QUOTE]}..."


def _pairs(merges: Iterable[Sequence[str]]) -> list[Pair]:
    """Return the merges as pairs; ValueError for an invalid or repeated one."""
    pairs: dict[Pair, None] = {}
    for k, pair in enumerate(merges):
        two = isinstance(pair, list | tuple) and len(pair) == 2
        if not two or not all(isinstance(part, str) and part for part in pair):
            raise ValueError(f"merge {k} is {_short(pair)}, not two tokens")
        if (pair[0], pair[1]) in pairs:
            raise ValueError(f"merge {k}, {_short(tuple(pair))}, occurs twice")
        pairs[pair[0], pair[1]] = None
    return list(pairs)


def _unique(tokens: Sequence[str]) -> dict[str, int]:
    """Return token -> index; a token that two merges make has the first one's, as there is one vector for it."""
    return {token: k for k, token in enumerate(dict.fromkeys(tokens))}


def _check(ids: Mapping[str, int], merges: Sequence[Pair], names: Mapping[str, str]) -> None:
    """Raise ValueError for invalid or repeated ids, and for tokens without one."""
    wrong = [token for token, k in ids.items() if type(k) is not int or not 0 <= k < MOST]
    if wrong:
        raise ValueError(f"the id of {_short(wrong[0])} is {_short(ids[wrong[0]])}; allowed: integers in 0..{MOST - 1}")
    if len(set(ids.values())) < len(ids):
        (number, times), *_ = Counter(ids.values()).most_common(1)
        twice = [token for token, k in ids.items() if k == number]
        raise ValueError(f"{times} tokens have the id {number}, among them {_short(twice[0])} and {_short(twice[1])}")
    for name, token in names.items():
        if token not in ids:
            raise ValueError(f"the vocabulary has no {_short(token)}, which is the token {name}")
    for k, pair in enumerate(merges):
        lacks = [token for token in (*pair, "".join(pair)) if token not in ids]
        if lacks:
            raise ValueError(f"the vocabulary has no {_short(lacks[0])}, which merge {k} {_short(pair)} needs")
    lacks = [token for token in FIRST if token not in ids]
    if lacks and "unknown" not in names:
        raise ValueError(
            f"the vocabulary lacks {len(lacks)} of the {len(FIRST)} tokens of single bytes, such as "
            f"{_short(lacks[0])}, and no unknown token stands for them"
        )


Alternatives = tuple[Any, Mapping[str, str]] | None  # a pattern that matches keys, key -> token


def _alternatives(tokens: Mapping[str, str]) -> Alternatives:
    """Return a pattern that matches these keys in a text, the longest first; None for none."""
    if not tokens:
        return None
    return regex.compile("|".join(map(regex.escape, sorted(tokens, key=len, reverse=True)))), tokens


def _split(special: Alternatives, text: str) -> list[tuple[str, str | None]]:
    """Return the pieces of a text, each with the special token that follows it, None after the last."""
    if special is None:
        return [(text, None)]
    pattern, tokens = special
    pieces, place = [], 0
    for match in pattern.finditer(text):
        pieces.append((text[place : match.start()], tokens[match[0]]))
        place = match.end()
    return [*pieces, (text[place:], None)]


def learn(captions: Iterable[str], vocabulary: int = 1024, length: int = 32) -> BytePairs:
    """Learn a vocabulary from short texts, see `BytePairs.train`.

    Args:
        captions, vocabulary, length: as there.
    """
    return BytePairs.train(captions, vocabulary, length)
