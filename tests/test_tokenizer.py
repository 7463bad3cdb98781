"""models/tokenizer.py: merges by hand and by a naive recount, texts there and back, what is refused."""

import json
import random
import warnings
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from models.tokenizer import BYTES, CHARACTERS, FIRST, BytePairs, joined, learned, merged, tidied, words

CAPTIONS = [
    "a red cat",
    "a red dog, and a cat",
    "the lowest of low cats",
    "it's newer; it's the newest!",
    "x 22 33",
] * 3


@pytest.fixture(scope="module")
def pairs() -> BytePairs:
    return BytePairs.train(CAPTIONS, vocabulary=530, length=12)


def spelled(word: str) -> list[str]:
    return [*word[:-1], f"{word[-1]}</w>"]


# --- The parts


def test_every_byte_has_a_character_of_its_own_that_can_be_seen():
    assert len(BYTES) == len(set(CHARACTERS)) == 256 and all(c.isprintable() and not c.isspace() for c in CHARACTERS)
    assert [CHARACTERS[b] for b in b"a~\xff"] == ["a", "~", "ÿ"] and CHARACTERS[0] == "Ā" and CHARACTERS[32] == "Ġ"
    assert len(set(FIRST)) == 512 and FIRST[:2] == ["!", '"'] and FIRST[256] == "!</w>" and FIRST[255] == "Ń"


@pytest.mark.parametrize(
    ("text", "tidy"),
    [
        ("  A\tB \n\u3000c\u00a0", " a b c "),
        ("e\u0301 É", "é é"),
        ("ΣΑΣ", "σασ"),
        ("İ", "i\u0307"),
        ("a\x1cb\x85c", "a\x1cb c"),
    ],
    ids=ascii,
)
def test_texts_are_composed_collapsed_and_in_lower_case(text, tidy):
    assert tidied(text) == tidy


@pytest.mark.parametrize(
    ("text", "split"),
    [
        ("it's we'll 2024!?", ["it", "'s", "we", "'ll", "2", "0", "2", "4", "!?"]),
        ("don''t a.b", ["don", "''", "t", "a", ".", "b"]),
        ("naïve", ["naïve"]),
        ("中文 x", ["中文", "x"]),
        ("x<|endoftext|>!", ["x", "<|", "endoftext", "|>", "!"]),
        ("x<|endoftexts|>!", ["x", "<|", "endoftexts", "|>!"]),
    ],
    ids=ascii,
)
def test_words(text, split):
    bytes_of = [bytes(BYTES[c] for c in "".join(word).removesuffix("</w>")).decode() for word in words(text)]
    assert bytes_of == split and all(word[-1].endswith("</w>") for word in words(text))


@pytest.mark.equation("BPE (encode)")
def test_merges_by_hand():
    """Of "lower": l o w e r; the pair (l, o) is first, then (e, r</w>), then (lo, w); (w, e), learned last, is gone."""
    ranks = {("l", "o"): 0, ("e", "r</w>"): 1, ("lo", "w"): 2, ("w", "e"): 3}
    assert merged(spelled("lower"), ranks) == ["low", "er</w>"]
    assert merged(spelled("lowest"), ranks) == ["low", "e", "s", "t</w>"]
    assert merged(spelled("we"), ranks) == ["w", "e</w>"] and merged(spelled("x"), ranks) == ["x</w>"]
    assert merged(spelled("llow"), ranks) == ["l", "lo", "w</w>"]


def test_one_merge_at_a_time_from_the_left():
    """Of "aaaa": aa a a</w>, with no pair left; what a merge makes is merged before what is left of its kind."""
    assert merged(spelled("aaaa"), {("a", "a"): 0}) == ["aa", "a", "a</w>"]
    ranks = {("xy", "a"): 0, ("x", "y"): 1}
    assert merged(["x", "y", "a", "x", "y"], ranks) == ["xya", "xy"]


def naive(counts: dict[tuple[str, ...], int], most: int) -> list[tuple[str, str]]:
    """The merges, all pairs counted anew for each."""
    split, merges = {word: list(word) for word in counts}, []
    for _ in range(most):
        found = Counter()
        for word, n in counts.items():
            for i in range(len(split[word]) - 1):
                found[split[word][i], split[word][i + 1]] += n
        found = {pair: times for pair, times in found.items() if times > 1}
        if not found:
            break
        merges.append(sorted(found, key=lambda pair: (-found[pair], pair))[0])
        split = {word: joined(tokens, merges[-1]) for word, tokens in split.items()}
    return merges


@pytest.mark.equation("BPE (learn)")
def test_learned_merges_are_those_of_a_naive_recount():
    counts = Counter({tuple(spelled("low")): 5, tuple(spelled("lower")): 2, tuple(spelled("newest")): 6})
    assert learned(counts, 3) == [("w", "e"), ("l", "o"), ("e", "we")]  # 8 times, 7, and 6 as three others
    drawn = random.Random(0)
    for _ in range(5):
        texts = ["".join(drawn.choices("aab", k=drawn.randint(1, 12))) for _ in range(30)]
        counts = Counter(tuple(spelled(text)) for text in texts)
        assert learned(counts, 60) == naive(counts, 60)
    assert learned(counts, 10**6) == naive(counts, 10**6)


def test_joined_from_the_left():
    assert joined(["a", "a", "a", "b"], ("a", "a")) == ["aa", "a", "b"]
    assert joined(["a", "b", "a", "b"], ("a", "b")) == ["ab", "ab"]


# --- The whole


def test_training_knows_no_order_and_ends_where_nothing_is_left(pairs):
    again = BytePairs.train(CAPTIONS[::-1], vocabulary=530, length=12)
    assert again.to_dict() == pairs.to_dict() and pairs.vocabulary == 530 == 514 + len(pairs.merges)
    assert (pairs.start, pairs.end, pairs.padding) == (528, 529, 529)
    few = BytePairs.train(["ab ab"], vocabulary=10_000)
    assert few.merges == [("a", "b</w>")] and few.vocabulary == 515 and few.length == 77


def test_ids_are_those_of_the_published_order(pairs):
    assert pairs.encode("!") == [256] and pairs.encode("!a")[0] == 256
    first = pairs.merges[0]
    assert pairs.ids["".join(first)] == 512 and pairs.encode("Cat") == [pairs.ids["cat</w>"]]


@pytest.mark.parametrize("text", ["a red cat", "the lowest of cats", "zebra 2 4", "naïve café", "中文 😀", "a , b", ""])
def test_plain_text_there_and_back(pairs, text):
    assert pairs.decode(pairs.encode(text)) == text
    assert pairs.decode(pairs([text])[0]) == text


@settings(max_examples=50)
@given(st.text(max_size=30))
def test_of_any_text_nothing_but_spaces_is_lost(pairs, text):
    assert pairs.decode(pairs.encode(text)).replace(" ", "") == tidied(text).replace(" ", "").strip()


def test_rows_have_start_end_and_padding(pairs):
    rows = pairs(["a cat", ""])
    a, cat = pairs.ids["a</w>"], pairs.ids["cat</w>"]
    assert rows.dtype == torch.int64 and rows.tolist() == [[528, a, cat, *[529] * 9], [528, *[529] * 11]]
    padded = BytePairs(pairs.merges, length=6, padding="!")
    assert padded(["a cat!"]).tolist() == [[528, a, cat, 0, 529, 0]]  # and in a text it stands for itself
    assert padded.decode([528, a, cat, 0, 529, 0]) == "a cat"
    assert pairs([]).shape == (0, 12)


def test_a_text_that_is_too_long_is_cut_with_a_warning(pairs):
    ten = " ".join(["cat"] * 10)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        full = pairs([ten])
    with pytest.warns(UserWarning, match="a text has 15 tokens, and 10 fit between start and end; cut: 'dog the red'"):
        cut = pairs([f"{ten} dog the red"])
    assert torch.equal(cut, full) and full[0, -1] == pairs.end and full[0, -2] == pairs.ids["cat</w>"]


def test_special_tokens_stand_for_themselves_in_a_text(pairs):
    cat = pairs.ids["cat</w>"]
    assert pairs.encode("cat<|endoftext|>Cat<|startoftext|>") == [cat, 529, cat, 528]
    assert 529 not in pairs.encode("<|ENDOFTEXT|>")
    folded = BytePairs(pairs.merges, folded=["<|endoftext|>"])
    assert folded.encode("cat <|EndOfText|>") == [cat, 529] and 528 not in folded.encode("<|StartOfText|>")


def test_a_byte_without_a_token_is_unknown(pairs):
    ids = {"a</w>": 0, "<|startoftext|>": 1, "<|endoftext|>": 2, "<unk>": 5}
    lacking = BytePairs([], ids, unknown="<unk>")
    assert lacking.encode("a ba") == [0, 5, 0] and lacking.vocabulary == 6 and lacking.decode([0, 5, 0]) == "a a"
    with pytest.raises(ValueError, match="lacks 511 of the 512 tokens of single bytes, such as '!', and no unknown"):
        BytePairs([], ids)


def test_kept_and_read_again(pairs):
    for one in (pairs, BytePairs(pairs.merges, {**pairs.ids, "more": 900}, 9, padding="!", folded=["!"])):
        again = BytePairs.from_dict(json.loads(json.dumps(one.to_dict())))
        assert again.to_dict() == one.to_dict() and again.ids == one.ids and again.folded == one.folded
        assert torch.equal(again(["a Red cat!"]), one(["a Red cat!"])) and again.vocabulary == one.vocabulary
    with pytest.raises(ValueError, match=r"merges is required; given: length, merge$"):
        BytePairs.from_dict({"merge": [], "length": 3})
    with pytest.raises(ValueError, match="given: merges, size"):
        BytePairs.from_dict({"merges": [], "size": 3})


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda p: p("a cat"), r"a list of strings, such as \['a cat'\], not one string"),
        (lambda p: p([3]), "a text is a string, not int: 3"),
        (lambda p: p.encode("a\ud800"), r"half of a surrogate pair, which is no character: 'a\\ud800'"),
        (lambda p: p.decode([530]), "no token has the id 530; allowed: 0 to 529"),
        (lambda p: BytePairs.train("a cat"), "not one string"),
        (lambda p: BytePairs.train([" "]), "no words to learn"),
        (lambda p: BytePairs.train(["a"], vocabulary=513), "vocabulary = 513 has no room .*; allowed: 514 to"),
        (lambda p: BytePairs.train(["a"], vocabulary=0), "vocabulary = 0 must be"),
        (lambda p: BytePairs([], length=1), "length = 1 has no room for start and end; allowed: 2 to"),
        (lambda p: BytePairs([("a", "b", "c")]), r"merge 0 is \('a', 'b', 'c'\), not two tokens"),
        (lambda p: BytePairs(["ab"]), "merge 0 is 'ab', not two tokens"),
        (lambda p: BytePairs([("a", "")]), r"merge 0 is \('a', ''\), not two tokens"),
        (lambda p: BytePairs.from_dict({"merges": [3]}), "merge 0 is 3, not two tokens"),
        (lambda p: BytePairs([("a", "b"), ("a", "b")]), r"merge 1, \('a', 'b'\), occurs twice"),
        (lambda p: BytePairs([("a", "bc")]), r"no 'bc', which merge 0 \('a', 'bc'\) needs"),
        (lambda p: BytePairs([("a", "b")], {k: v for k, v in p.ids.items() if k != "ab"}), "no 'ab', which merge 0"),
        (lambda p: BytePairs([], p.ids, padding="<pad>"), "no '<pad>', which is the token padding"),
        (lambda p: BytePairs([], p.ids | {"!": 1}), "2 tokens have the id 1, among them '!' and"),
        (lambda p: BytePairs([], p.ids | {"!": -1}), "the id of '!' is -1; allowed: integers in 0"),
        (lambda p: BytePairs([], p.ids | {"!": True}), "the id of '!' is True"),
    ],
)
def test_what_cannot_be_is_refused(pairs, call, words):
    with pytest.raises(ValueError, match=words):
        call(pairs)
