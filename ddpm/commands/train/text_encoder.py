"""Frozen text encoders that runs take from another run, `init_text`, and store in their own folder."""

import json
from pathlib import Path
from typing import Any, NamedTuple

from omegaconf import DictConfig, OmegaConf

from ddpm.commands.launch import overrides
from ddpm.commands.load import TEXT, load_into, task_of
from ddpm.commands.train.codec import taken_from
from ddpm.commands.train.words import keep as keep_tokenizer
from ddpm.commands.train.words import tokenizer_of
from ddpm.commands.validate import trusted
from ddpm.config import InvalidInput, build, plain, read_config

FOLDER = "text"  # subfolder of a run: the encoder of its prompts
WEIGHTS, STATE = "model.safetensors", "text.json"


class Found(NamedTuple):
    """A text encoder with its tokenizer."""

    encoder: Any
    settings: dict[str, Any]  # that it was built with
    tokenizer: Any
    sha256: str  # of its weights


def text_of(config: DictConfig) -> Found | None:
    """Return the text encoder and tokenizer that `init_text` names, or None.

    It may name a run that trained an encoder, or one that stores a frozen one. Its settings are written into `config`.

    Raises: InvalidInput for a run without text encoder, and if this one has no text conditioning or other settings.
    """
    named = config.get("init_text")
    if named is None:
        return None
    if config.get("tokenizer") is None or config.get("text") is None:
        raise InvalidInput(
            f"init_text={named}: this run is not conditioned on words; take experiment=text_emoji or text_scenes"
        )
    if typed := [word for word in overrides() if word.lstrip("+").startswith(("text.", "tokenizer."))]:
        raise InvalidInput(f"{typed[0]}: encoder and tokenizer come from init_text={named}; leave it out")
    found = _found(config, str(named), trusted(config))
    config.text = OmegaConf.create(found.settings)
    return found


def _found(config: DictConfig, named: str, trust: list[str]) -> Found:
    from ddpm.training.task import checksum

    for folder in (Path(named) / FOLDER, Path(named)):
        if (folder / STATE).is_file():
            return stored_in(folder, trust)
    run, files = taken_from(config, "init_text")
    trained = read_config(run.path / "config.yaml")
    task, tokenizer = task_of(trained, trust), tokenizer_of(run.path)
    encoder = getattr(task.modules.get("model"), "text", None)
    if encoder is None or tokenizer is None:
        raise InvalidInput(
            f"init_text={named}: {type(task).__name__} was trained without words there; train one with "
            "experiment=contrastive_emoji"
        )
    load_into(task.model, files["model"])
    return Found(encoder, plain(trained.text), tokenizer, checksum(encoder))


def stored_in(folder: Path, trust: list[str]) -> Found:
    """Load the text encoder in a run's folder."""
    from ddpm.training.task import checksum

    try:
        known = json.loads((folder / STATE).read_text())
        encoder = build(known["text"], str(folder), trust)
        load_into(encoder, folder / WEIGHTS)
        if known["sha256"] != checksum(encoder):
            raise ValueError("its weights have changed since training: their checksum differs")
        return Found(encoder, known["text"], tokenizer_of(folder), known["sha256"])
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise InvalidInput(f"{folder} cannot be read: {error}") from error


def put(task: Any, found: Found) -> None:
    """Load another run's weights into the frozen text encoder of a task's network.

    Raises: InvalidInput if nothing is left to train.
    """
    task.frozen[TEXT].load_state_dict(found.encoder.state_dict())
    if not any(p.requires_grad for module in task.modules.values() for p in module.parameters()):
        raise InvalidInput(
            "task.only names parameters of the text encoder alone, which init_text freezes; null trains all others"
        )


def keep(found: Found, run: Path) -> None:
    """Write a text encoder and its tokenizer into a run's folder, from where other runs can take it too."""
    from ddpm.runs import checkpoint
    from ddpm.runs.files import replacing

    folder = run / FOLDER
    folder.mkdir(exist_ok=True)
    checkpoint.save_weights(found.encoder, folder / WEIGHTS)
    keep_tokenizer(found.tokenizer, folder)
    with replacing(folder / STATE) as temporary:
        temporary.write_text(json.dumps({"sha256": found.sha256, "text": found.settings}, indent=1))
