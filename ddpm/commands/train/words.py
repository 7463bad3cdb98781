"""Text conditioning of runs: captions and prompts as token ids, by a tokenizer in the run's folder."""

import json
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from ddpm.config import InvalidInput, build, plain, targets
from ddpm.runs import schema

FILE = "tokenizer.json"  # file in a run's folder
READER = "models.tokenizer.BytePairs.from_dict"
LEARNER = "models.adapters.with_words"  # the adapter that learns a new word of the tokenizer


def word_of(config: DictConfig) -> str | None:
    """Return the word that a run learns, see `models.adapters.with_words`, or None."""
    adapter = config.get("adapter")
    learns = isinstance(adapter, DictConfig) and adapter.get("_target_") == LEARNER
    return config.subject.word if learns and isinstance(config.get("subject"), DictConfig) else None


def in_words(data: Any, config: DictConfig, trust: list[str], run: Path | None = None, known: Any = None) -> Any:
    """Return data with token ids of their captions, by a tokenizer learned from the training captions.

    Data of a run without a tokenizer are returned unchanged.

    Args:
        run: a run's folder; its tokenizer, if there is one, is used instead.
        known: a tokenizer to use instead, or None.
    Raises: InvalidInput for data without captions, and for captions that cannot be encoded as bytes.
    """
    if config.get("tokenizer") is None:
        return data
    if len(data.captions) != len(data):
        raise InvalidInput(f"tokenizer: {data.name} has no captions; data=scenes, emoji and captioned have some")
    tokenizer: Any = tokenizer_of(run) if known is None and run is not None else known
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
            encoded = data.in_words(tokenizer)
        except ValueError as error:  # a caption that cannot be encoded as bytes
            raise InvalidInput(f"tokenizer: {error}") from error
    if seen:
        print(f"warning: {len(seen):,} captions are longer than tokenizer.length={config.tokenizer.length} and are cut")
    return encoded


def must_have_a_reader(config: DictConfig, trust: list[str]) -> None:
    """Raise InvalidInput if a text-conditional run's network takes no text encoder; called before its data are built.

    Raises: InvalidInput.
    """
    model = plain(config.get("model"))
    target = model.get("_target_") if isinstance(model, dict) else None
    if config.get("tokenizer") is None or target not in targets()["model"] | set(trust):  # building it reports that
        return
    if "text" not in schema.accepted(target):
        raise InvalidInput(
            f"tokenizer: {target} reads no words; allowed: model=unet, or for task=contrastive model=dual_encoder"
        )


def must_read(task: Any, data: Any, config: DictConfig) -> None:
    """Raise InvalidInput if data have token ids and the networks do not fit them.

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
    """Write a tokenizer into a run's folder, so that prompts need no data."""
    from ddpm.runs.files import replacing

    with replacing(run / FILE) as temporary:
        temporary.write_text(json.dumps(tokenizer.to_dict(), indent=1))


def tokenizer_of(run: Path) -> Callable[[Sequence[str]], Any] | None:
    """Load the tokenizer in a run's folder; None for a run without text conditioning.

    Raises: InvalidInput for a file that is no tokenizer.
    """
    from ddpm.runs.files import read_json

    if not (run / FILE).is_file():
        return None
    try:
        settings = read_json(run / FILE)
    except ValueError as error:
        raise InvalidInput(str(error)) from error
    return build({"_target_": READER, "said": settings}, str(run / FILE), [READER])


def prompts_of(config: DictConfig, run: Path, key: str, log: Callable[[str], None]) -> Any | None:
    """Return the token ids of `prompt=` or `negative=`, int64 (n, L); None if it is not set.

    Args:
        log: receives warnings about texts that are cut.
    Raises: InvalidInput for values that are no text, or a run without text conditioning.
    """
    value = plain(config.get(key))
    if value is None or (key == "negative" and value == ""):
        return None
    if key == "negative" and isinstance(value, list):
        raise InvalidInput(f"negative={value} must be one text, for all prompts")
    texts = value if isinstance(value, list) else [value]
    if not texts or not all(isinstance(text, str | int | float) and not isinstance(text, bool) for text in texts):
        raise InvalidInput(f"{key}={value} must be a text, or a list of texts")
    tokenizer = tokenizer_of(run)
    if tokenizer is None:
        raise InvalidInput(f"{key}={value}: the run was trained without words; train one with experiment=text_scenes")
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        try:
            ids = tokenizer([str(text) for text in texts])
        except ValueError as error:  # a text that cannot be encoded as bytes
            raise InvalidInput(f"{key}: {error}") from error
    for warning in seen:
        log(f"warning: {key}: {warning.message}")
    return ids
