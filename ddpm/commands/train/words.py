"""Runs whose samples are told in words: captions as tokens, by a tokenizer that each of them keeps; prompts."""

import json
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from ddpm.config import InvalidInput, build, plain, targets
from ddpm.runs import schema

FILE = "tokenizer.json"  # of a run's folder
READER = "models.tokenizer.BytePairs.from_dict"
LEARNER = "models.adapters.with_words"  # what learns a new word of the tokenizer


def word_of(config: DictConfig) -> str | None:
    """The word that a run learns, see `models.adapters.with_words`; None for a run that learns none."""
    adapter = config.get("adapter")
    learns = isinstance(adapter, DictConfig) and adapter.get("_target_") == LEARNER
    return config.subject.word if learns and isinstance(config.get("subject"), DictConfig) else None


def in_words(data: Any, config: DictConfig, trust: list[str], kept: Path | None = None, known: Any = None) -> Any:
    """Data with the tokens of their captions, by a tokenizer that is learned from those that are trained on.

    The same where a run has no tokenizer.

    Args:
        kept: the folder of a run whose tokenizer is taken in its place, if it keeps one.
        known: or this tokenizer; None for none.
    Raises: InvalidInput for data without captions, and for captions that are no text.
    """
    if config.get("tokenizer") is None:
        return data
    if len(data.captions) != len(data):
        raise InvalidInput(f"tokenizer: {data.name} has no captions; data=scenes, emoji and captioned have some")
    tokenizer: Any = tokenizer_of(kept) if known is None and kept is not None else known
    if tokenizer is None:
        captions = [data.captions[i] for i in data.train.tolist()]
        tokenizer = build(config.tokenizer, "tokenizer", trust, captions=captions)
    if (word := word_of(config)) is not None and word not in tokenizer.added:
        try:
            tokenizer = tokenizer.with_words([word])
        except ValueError as error:
            raise InvalidInput(f"subject.word: {error}") from error
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        try:
            told = data.in_words(tokenizer)
        except ValueError as error:  # a caption that has no bytes
            raise InvalidInput(f"tokenizer: {error}") from error
    if seen:
        print(f"warning: {len(seen):,} captions are longer than tokenizer.length={config.tokenizer.length} and are cut")
    return told


def must_have_a_reader(config: DictConfig, trust: list[str]) -> None:
    """Refuse a network that takes no encoder of texts, of a run that is told in words: before its data are drawn.

    Raises: InvalidInput.
    """
    model = plain(config.get("model"))
    target = model.get("_target_") if isinstance(model, dict) else None
    if config.get("tokenizer") is None or target not in targets()["model"] | set(trust):  # which building refuses
        return
    if "text" not in schema.accepted(target):
        raise InvalidInput(
            f"tokenizer: {target} reads no words; allowed: model=unet, or of task=contrastive model=dual_encoder"
        )


def must_read(task: Any, data: Any, config: DictConfig) -> None:
    """Refuse networks that read no words, of data that are told in them.

    Raises: InvalidInput.
    """
    if data.tokens is None:
        return
    encoders = [network.text for network in task.modules.values() if getattr(network, "text", None) is not None]
    if not encoders:
        advice = "add +text=transformer" if config.get("text") is None else "allowed: model=unet"
        raise InvalidInput(f"tokenizer: the network reads no words; {advice}")
    needed, length = data.tokenizer.vocabulary, data.tokens.shape[1]
    for text in encoders:
        if text.vocabulary < needed or text.length < length:
            raise InvalidInput(
                f"text.vocabulary = {text.vocabulary}, text.length = {text.length}: the captions have {needed} tokens, "
                f"{length} in a row; leave both out, to take them from tokenizer"
            )


def keep(tokenizer: Any, run: Path) -> None:
    """Put a tokenizer into a run's folder, so that prompts need no data."""
    from ddpm.runs.files import replacing

    with replacing(run / FILE) as temporary:
        temporary.write_text(json.dumps(tokenizer.to_dict(), indent=1))


def tokenizer_of(run: Path) -> Callable[[Sequence[str]], Any] | None:
    """The tokenizer that a run keeps; None for a run that is told of no words.

    Raises: InvalidInput for a file that holds none.
    """
    from ddpm.runs.files import read_json

    if not (run / FILE).is_file():
        return None
    try:
        said = read_json(run / FILE)
    except ValueError as error:
        raise InvalidInput(str(error)) from error
    return build({"_target_": READER, "said": said}, str(run / FILE), [READER])


def prompts_of(config: DictConfig, run: Path, key: str, said: Callable[[str], None]) -> Any | None:
    """The ids of what `prompt=` or `negative=` says, int64 (n, L); None where it says nothing.

    Args:
        said: is told what is cut.
    Raises: InvalidInput for what is no text, or a run that is told of none.
    """
    given = plain(config.get(key))
    if given is None or (key == "negative" and given == ""):
        return None
    if key == "negative" and isinstance(given, list):
        raise InvalidInput(f"negative={given} must be one text, for all prompts")
    texts = given if isinstance(given, list) else [given]
    if not texts or not all(isinstance(text, str | int | float) and not isinstance(text, bool) for text in texts):
        raise InvalidInput(f"{key}={given} must be a text, or a list of texts")
    tokenizer = tokenizer_of(run)
    if tokenizer is None:
        raise InvalidInput(f"{key}={given}: the run was trained without words; train one with experiment=text_scenes")
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        try:
            ids = tokenizer([str(text) for text in texts])
        except ValueError as error:  # a text that has no bytes
            raise InvalidInput(f"{key}: {error}") from error
    for warning in seen:
        said(f"warning: {key}: {warning.message}")
    return ids
