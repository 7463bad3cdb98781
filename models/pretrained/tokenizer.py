"""The published form of CLIPTokenizer, read and written as our `BytePairs`: a folder of vocabulary, merges, settings.

vocab.json and merges.txt hold what was learned; where they are missing, tokenizer.json does, in which newer versions of
the library that publishes them write all in one. tokenizer_config.json and special_tokens_map.json define which tokens
start, end and pad a text, and how long it may be. Where the two differ (Stable Diffusion 2: one pads with the end, the
other with "!"), the second counts, unless the first lists its added tokens: so does the library.
"""

import json
import os
from pathlib import Path
from typing import Any

from models.pretrained.folder import Rule, a_count, checked, only, short
from models.pretrained.weights import read_object
from models.tokenizer import END, START, BytePairs

VOCABULARY, MERGES, WHOLE = "vocab.json", "merges.txt", "tokenizer.json"
SETTINGS, SPECIAL = "tokenizer_config.json", "special_tokens_map.json"
HEADER = "#version: 0.2"
FILE_BYTES = 2**26  # no vocabulary is larger
TOKENS = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": END}  # and their defaults
OURS = {"bos_token": "start", "eos_token": "end", "pad_token": "padding", "unk_token": "unknown"}
FLAGS = ("lstrip", "rstrip", "single_word")  # of a token, in a text: each must be false


def is_token(value: object) -> bool:
    """Whether a value is a special token that is matched in a text literally."""
    if isinstance(value, dict):
        value = None if any(value.get(flag) for flag in FLAGS) else value.get("content")
    return isinstance(value, str) and value != ""


def is_list_of_tokens(value: object) -> bool:
    """Whether a value maps ids to special tokens, each in its long form."""
    return isinstance(value, dict) and all(
        k.isdecimal() and isinstance(t, dict) and is_token(t) for k, t in value.items()
    )


anything: Rule = None, lambda v: True, "anything"
a_token: Rule = None, lambda v: v is None or is_token(v), f"a string, or its form with {', '.join(FLAGS)} false"
nothing: Rule = None, lambda v: not v, "nothing"
KEYS: dict[str, Rule] = {
    **dict.fromkeys(TOKENS, a_token),
    "tokenizer_class": only("CLIPTokenizer", "CLIPTokenizerFast", None),
    "model_max_length": a_count(77),
    "do_lower_case": only(True),
    "add_prefix_space": only(False),
    "errors": only("replace"),
    "padding_side": only("right"),
    "truncation_side": only("right"),
    "split_special_tokens": only(False),
    "added_tokens_decoder": (
        None,
        lambda v: v is None or is_list_of_tokens(v),
        f"an object of ids and tokens with {', '.join(FLAGS)} false",
    ),
    "additional_special_tokens": nothing,
    "extra_special_tokens": nothing,
    # Without effect on the ids:
    "clean_up_tokenization_spaces": anything,
    "name_or_path": anything,
    "special_tokens_map_file": anything,
    "tokenizer_file": anything,
    "processor_class": anything,
    "model_input_names": anything,
    "use_fast": anything,
    "backend": anything,
    "is_local": anything,
    "local_files_only": anything,
}
SPECIAL_KEYS: dict[str, Rule] = {**dict.fromkeys(TOKENS, a_token), "additional_special_tokens": nothing}

SPLIT = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
WAYS: dict[tuple[str | int, ...], list[Any]] = {  # places in tokenizer.json that define its algorithm; allowed values
    ("model", "type"): ["BPE", None],
    ("model", "end_of_word_suffix"): ["</w>"],
    ("model", "dropout"): [None],
    ("model", "ignore_merges"): [None, False],
    ("normalizer", "normalizers"): [
        [
            {"type": "NFC"},
            {"type": "Replace", "pattern": {"Regex": r"\s+"}, "content": " "},
            {"type": "Lowercase"},
        ]
    ],
    ("pre_tokenizer", "pretokenizers", 0, "pattern", "Regex"): [  # of older versions, and of newer ones
        SPLIT,
        rf"<\|startoftext\|>|<\|endoftext\|>|{SPLIT}",
    ],
}


def load_tokenizer(folder: str | Path) -> BytePairs:
    """Load the tokenizer in a published folder: texts -> ids (B, length), 77 as a rule.

    Args:
        folder: with vocab.json and merges.txt, or tokenizer.json; and, if present, tokenizer_config.json,
            special_tokens_map.json.
    Raises:
        ValueError: a missing or damaged file; merges that have no id; settings that our tokenizer cannot do, with the
            key, its value and what is allowed; added tokens, which our vocabularies do not have.
    Source: CLIP (arXiv 2103.00020), section 2.4.
    """
    folder = Path(folder)
    ids, merges, added = _learned(folder)
    settings = _settings(folder / SETTINGS, KEYS)
    listed = settings["added_tokens_decoder"]
    named = {key: settings[key] for key in TOKENS}
    if listed is None:
        special = _settings(folder / SPECIAL, SPECIAL_KEYS)
        named |= {key: special[key] for key in TOKENS if special[key] is not None}
    added |= listed or {}
    _no_others(folder, ids, added)
    names = {key: default if named[key] is None else _content(named[key]) for key, default in TOKENS.items()}
    flags: dict[str, bool] = {}  # of a token with several names the last one's, in the order of TOKENS
    for key, token in names.items():
        flags[token] = isinstance(named[key], dict) and bool(named[key].get("normalized"))
    flags |= {_content(token): bool(token.get("normalized")) for token in added.values()}
    folded = [token for token in names.values() if flags[token]]
    tokens = {OURS[key]: token for key, token in names.items()}
    try:
        return BytePairs(merges, ids, settings["model_max_length"], **tokens, folded=sorted(set(folded)))
    except ValueError as error:
        raise ValueError(f"{folder} holds no tokenizer of this kind: {error}") from error


def _settings(path: Path, keys: dict[str, Rule]) -> dict[str, Any]:
    """Return the settings of a file, defaults included; the defaults alone where there is no file."""
    if not path.is_file():
        return {key: default for key, (default, *_) in keys.items()}
    return checked(path, keys, "this tokenizer", lambda config: [])


def _content(token: Any) -> str:
    """Return the token itself, from either form."""
    return token["content"] if isinstance(token, dict) else token


def _no_others(folder: Path, ids: dict[str, int], listed: dict[str, Any]) -> None:
    """Raise ValueError for tokens that were added to the learned ones."""
    added = {_content(token): int(k) for k, token in listed.items()}
    if (folder / "added_tokens.json").is_file():
        added |= _object(folder / "added_tokens.json")
    others = [token for token, k in added.items() if ids.get(token) != k]
    if others:
        raise ValueError(
            f"{folder} adds the token {short(others[0])} to its vocabulary; allowed: none that is not there"
        )


Learned = tuple[dict[str, int], list[list[str]], dict[str, Any]]  # ids, merges, and what was added: id -> token


def _learned(folder: Path) -> Learned:
    """Return the vocabulary, merges and added tokens of a folder; ValueError that names what is missing."""
    missing = [name for name in (VOCABULARY, MERGES) if not (folder / name).is_file()]
    if not missing:
        return _object(folder / VOCABULARY), _lines(folder / MERGES), {}
    if (folder / WHOLE).is_file():
        return _whole(folder / WHOLE)
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder; a published tokenizer is a folder with {VOCABULARY} and {MERGES}")
    inner = folder / "tokenizer"
    hint = f"; {inner} has one" if any((inner / name).is_file() for name in (VOCABULARY, WHOLE)) else ""
    raise ValueError(f"{folder} has no {' and no '.join(missing)}, and no {WHOLE} in their place{hint}")


def _text(path: Path) -> str:
    """Return the text of a file of bounded size; ValueError if it is none."""
    with open(path, "rb") as file:
        data = file.read(FILE_BYTES + 1)
    if len(data) > FILE_BYTES:
        raise ValueError(f"{path} is larger than {FILE_BYTES} bytes, which no vocabulary is")
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no text in UTF-8: {error}") from error


def _object(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file; ValueError if it holds none."""
    return read_object(path, "tokens", FILE_BYTES)


def _lines(path: Path) -> list[list[str]]:
    """Return the merges of a file, one a line, after a version line; ValueError that names an invalid line."""
    merges = []
    for number, line in enumerate(_text(path).split("\n"), 1):
        if not line.strip() or (number == 1 and line.startswith("#version")):
            continue
        pair = line.rstrip("\r").split(" ")
        if len(pair) != 2 or not all(pair):
            raise ValueError(f"{path}, line {number}: {short(line)} is no merge (allowed: two tokens, a space between)")
        merges.append(pair)
    return merges


def _at(value: Any, *path: str | int) -> Any:
    """Return the value at a place of JSON; None where there is no such place."""
    for key in path:
        try:
            value = value[key]
        except (TypeError, KeyError, IndexError):
            return None
    return value


def _whole(path: Path) -> Learned:
    """Return the vocabulary, merges and added tokens of a tokenizer.json; ValueError if it works differently."""
    whole = _object(path)
    for place, allowed in WAYS.items():
        if _at(whole, *place) not in allowed:
            key, words = ".".join(map(str, place)), " or ".join(short(way) for way in allowed)
            raise ValueError(
                f"{path} is no tokenizer of this kind: {key} = {short(_at(whole, *place))} (allowed: {words})"
            )
    ids, merges, tokens = _at(whole, "model", "vocab"), _at(whole, "model", "merges"), whole.get("added_tokens") or []
    if not isinstance(ids, dict) or not isinstance(merges, list):
        raise ValueError(f"{path} has no model.vocab, an object, and model.merges, a list")
    added = {str(_at(token, "id")): token for token in tokens} if isinstance(tokens, list) else {"": tokens}
    if not is_list_of_tokens(added):
        raise ValueError(f"{path} adds {short(tokens)}; allowed: tokens with ids, {', '.join(FLAGS)} false")
    return ids, [pair.split(" ") if isinstance(pair, str) else pair for pair in merges], added


def save_tokenizer(tokenizer: BytePairs, folder: str | Path) -> None:
    """Write a tokenizer as vocab.json, merges.txt and their settings; `load_tokenizer` reads it back.

    Args:
        folder: made if it is missing. merges.txt takes its name last: a folder without it is none.
    """
    if tokenizer.added:
        raise ValueError(f"the words {', '.join(tokenizer.added)} were added, which the published form does not have")
    folder = Path(folder)
    names = tokenizer.to_dict()
    names.setdefault("unknown", names["end"])  # the library's default
    tokens = {
        key: {"content": names[ours], "normalized": names[ours] in tokenizer.folded} | dict.fromkeys(FLAGS, False)
        for key, ours in OURS.items()
    }
    settings = {"tokenizer_class": "CLIPTokenizer", "model_max_length": tokenizer.length}
    settings |= {"do_lower_case": True, "add_prefix_space": False, "errors": "replace"}
    lines = [HEADER, *(" ".join(pair) for pair in tokenizer.merges)]
    files = {
        VOCABULARY: json.dumps(tokenizer.ids, ensure_ascii=False),
        SETTINGS: json.dumps(settings, indent=2),
        SPECIAL: json.dumps(tokens, indent=2),
        MERGES: "\n".join(lines),
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MERGES).unlink(missing_ok=True)
    for name, text in files.items():
        temporary = folder / f".{name}.{os.getpid()}"
        temporary.write_text(f"{text}\n", encoding="utf-8")
        os.replace(temporary, folder / name)
