"""Subject-driven tuning of a trained text-conditional run on a few pictures, with prior preservation of its class."""

import hashlib
import json
import os
import re
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from ddpm.commands.console import say
from ddpm.commands.launch import overrides
from ddpm.commands.load import must_walk, open_run_at, split_step
from ddpm.commands.train import codec, text_encoder
from ddpm.commands.train.teacher import UNFINISHED
from ddpm.commands.train.words import in_words, tokenizer_of, word_of
from ddpm.commands.validate import must_be_one_of, must_be_whole
from ddpm.config import InvalidInput, build, build_data, compose, plain, read_config

OF_RUN = ("model", "text", "tokenizer", "schedule", "diffusion")  # groups taken from the run that is tuned
FROZEN = ("init_text", "init_codec", "codec")  # and what that run may have from others
ADAPTER = "models.adapters.adapt"
SETTINGS = ("word", "like", "of", "beside", "pictures", "steps", "w", "run", "data")  # the last two are filled in
PICTURES = ("data", "drawn")  # sources of the class's pictures
BEGIN = "models.adapters.begin"
PUT_IN = (".lora_A", ".lora_B", ".added")  # suffixes of parameters of adapters
CACHE = "beside"  # subfolder of the folder of all runs
MOST = 10_000  # pictures of the class at most


def tuned_of(config: DictConfig) -> DictConfig:
    """Return the configuration of a run that tunes `init`: with that run's network, diffusion and tokenizer.

    Raises: InvalidInput for an `init` that is not conditioned on text, or is tuned itself, for a word that cannot be
        learned, and for settings that such a run cannot choose.
    """
    subject = config.subject
    if not isinstance(subject, DictConfig):
        raise InvalidInput(f"subject={plain(subject)} must hold settings, such as subject.word=sks")
    named, which = split_step(str(config.get("init")))
    path = Path(named)
    if config.get("init") is None or not (path / "config.yaml").is_file():
        raise InvalidInput(
            f"init={config.get('init')}: a subject is taught to an existing run; name one conditioned "
            "on words with init=RUN"
        )
    base = read_config(path / "config.yaml")
    tokenizer: Any = tokenizer_of(path)
    if tokenizer is None or any(not isinstance(base.get(group), DictConfig) for group in OF_RUN):
        raise InvalidInput(f"init={path}: it was trained without words; take a run of experiment=text_scenes")
    if base.get("adapter") is not None:
        raise InvalidInput(
            f"init={path}: it was tuned to a subject itself; take the run that it started from, {base.get('init')}"
        )
    _check(config)
    from ddpm.runs.directory import Run

    if isinstance(which, str) and Run(path).status().get("state") in UNFINISHED:
        say(f"warning: init={path} is not finished: once it is, the same command trains anew")
    typed = {word.partition("=")[0].lstrip("+~") for word in overrides()}
    for key in sorted(typed):
        if key.partition(".")[0] in (*OF_RUN, *FROZEN):
            raise InvalidInput(f"{key}: a run that is tuned keeps its network; only subject, tuning, adapter, data, "
                               "task, optimizer, trainer, sampler and augment may be changed")  # fmt: skip
    tuned = config.copy()
    OmegaConf.set_struct(tuned, False)  # to add groups that its experiment lacks
    for group in OF_RUN:
        tuned[group] = base[group]
    _take_frozen(tuned, base, path)
    tuned.task.drop = base.model.get("drop", 0.0)
    for key in ("image_size", "channels"):
        if f"data.{key}" not in typed and key in tuned.data and key in base.data:
            tuned.data[key] = base.data[key]
    at = str(config.init).removeprefix(named)  # the suffix @STEP, if any
    tuned.subject.run, tuned.subject.data = f"{os.path.abspath(path)}{at}", base.data
    if word_of(tuned) is not None:
        _fill(tuned.adapter, tokenizer, subject)
    return tuned


def _take_frozen(tuned: DictConfig, base: DictConfig, run: Path) -> None:
    """Take over the frozen autoencoder and text encoder that the tuned run has from other runs, from its own folder.

    They stay frozen. With adapters all other weights are frozen anyway, and the encoder's weights come with the
    network's; it gets no low-rank adapters, but may learn a word, in the run's own copy of its embedding table.
    """
    if base.get("init_codec") is not None:
        tuned.init_codec, tuned.codec = os.path.abspath(run / codec.FOLDER), base.codec
    if base.get("init_text") is None:
        return
    if tuned.get("adapter") is None:
        tuned.init_text = os.path.abspath(run / text_encoder.FOLDER)
    elif tuned.adapter.get("_target_") == ADAPTER:
        tuned.adapter.without = [*(tuned.adapter.get("without") or []), "text.*"]


def _check(config: DictConfig) -> None:
    """Raise InvalidInput for invalid settings of `subject`."""
    subject = config.subject
    if unknown := sorted(set(map(str, subject)) - set(SETTINGS)):
        raise InvalidInput(f"subject.{unknown[0]} is not known; allowed: {', '.join(SETTINGS[:-2])}")
    for key in ("word", "like", "of"):
        value = subject.get(key)
        if not (value is None and key != "word") and not (isinstance(value, str) and re.fullmatch(r"[^\W\d_]+", value)):
            raise InvalidInput(
                f"subject.{key}={value} must be one word of letters" + ("" if key == "word" else ", or null")
            )
    must_be_whole(config, "subject.beside", least=0)
    if subject.beside > MOST:
        raise InvalidInput(f"subject.beside={subject.beside} must be at most {MOST:,}")
    must_be_one_of(config, "subject.pictures", PICTURES)
    must_be_whole(config, "subject.steps", least=1)
    if isinstance(subject.w, bool) or not isinstance(subject.w, int | float):
        raise InvalidInput(f"subject.w={subject.w} must be a number")
    if subject.beside and subject.of is None:
        raise InvalidInput("subject.of=WORD is needed, the class of the subject, such as sphere; or subject.beside=0")


def _fill(adapter: DictConfig, tokenizer: Any, subject: DictConfig) -> None:
    """Set the token id of the new word, and the tokens whose mean initialises its embedding."""
    try:
        tokenizer.with_words([subject.word])
    except ValueError as error:
        raise InvalidInput(f"subject.word: {error}") from error
    like = [] if subject.like is None else tokenizer.encode(subject.like)
    if len(like) > 1:  # a mean of word pieces resembles no word
        known = tokenizer.whole_words()
        near = get_close_matches(subject.like.lower(), known, 3) or known[:3]
        raise InvalidInput(
            f"subject.like={subject.like} is no word of the run, but {len(like)} pieces to its tokenizer; allowed: a "
            f"word that is one token, such as {', '.join(near)}, or null"
        )
    if adapter.get("words", 1) != 1:
        raise InvalidInput(
            f"adapter.words={plain(adapter.words)}: captions have one new word, subject.word; leave it 1"
        )
    for key, value in (("first", tokenizer.vocabulary), ("like", like)):
        if adapter.get(key) not in (None, value):
            raise InvalidInput(f"adapter.{key}={plain(adapter[key])} is {value} of this run; leave it out")
        adapter[key] = value


def put_in(name: str) -> bool:
    """Whether a parameter belongs to an adapter, which the weights of `init` lack."""
    return name.endswith(PUT_IN)


def begin_adapters(task: Any) -> None:
    """Initialise adapters, after the weights beneath them have been loaded."""
    for module in task.modules.values():
        build({"_target_": BEGIN}, "adapter", [BEGIN], model=module)


def with_class(data: Any, config: DictConfig, trust: list[str], drawing: bool = True) -> tuple[Any, str | None]:
    """Add pictures of the class to those of a subject, if `subject.beside` requests any; return other data unchanged.

    Args:
        drawing: let the tuned run draw these pictures, unless they are cached; else real ones stand in for them.
    Returns: the data, and a note on what is unknown until the pictures are drawn, or None.
    Raises: InvalidInput if no caption names the subject, or too few name the class.
    """
    subject = config.get("subject")
    if subject is None or not isinstance(subject, DictConfig):
        return data, None
    from ddpm.data.prior_preservation import WithPrior

    named = [
        i for i in data.train.tolist() if i < len(data.captions) and subject.word.lower() in _words(data.captions[i])
    ]
    if not named:
        example = data.captions[int(data.train[0])] if len(data.captions) else "none"
        raise InvalidInput(
            f"subject.word={subject.word}: no caption of {data.name} contains it; one caption is {example!r}"
        )
    if not subject.beside:
        return data, None
    real, captions = _of_class(config, trust)
    images, lacks = (real, None) if subject.pictures == "data" else _draw_class(config, captions, drawing)
    if images is None:
        images = real
    try:
        return WithPrior(data, images, captions), lacks
    except ValueError as error:
        raise InvalidInput(str(error)) from error


def _words(caption: str) -> list[str]:
    return re.findall(r"[^\W\d_]+", caption.lower())


def _of_class(config: DictConfig, trust: list[str]) -> tuple[Any, list[str]]:
    """Return pictures uint8 (M, C, H, W) of the tuned run's data whose captions name the class, and the captions."""
    import torch

    from ddpm.randomness import generator

    subject = config.subject
    data = build_data(plain(subject.data), trust)
    there = [i for i in data.train.tolist() if subject.of.lower() in _words(data.captions[i])]
    if len(there) < subject.beside:
        words = {word for i in data.train.tolist() for word in _words(data.captions[i])}
        near = get_close_matches(subject.of.lower(), sorted(words - {subject.of.lower()}), 3)
        hint = f", perhaps {' or '.join(near)}" if near else ""
        raise InvalidInput(
            f"subject.beside={subject.beside}: {len(there):,} training captions of {data.name} name a "
            f"{subject.of}; allowed: 0 to {len(there)}, or another subject.of{hint}; "
            f"a caption is {data.captions[int(data.train[0])]!r}"
        )
    chosen = torch.randperm(len(there), generator=generator(0, "beside"))[: subject.beside]
    numbers = torch.tensor(there)[chosen]
    captions = [data.captions[i] for i in numbers.tolist()]
    return data.images[numbers].cpu(), captions


def _draw_class(config: DictConfig, captions: Sequence[str], drawing: bool) -> tuple[Any, str | None]:
    """Return pictures uint8 (M, C, H, W) that the tuned run draws of captions, cached below the folder of all runs.

    The second value is None; if they are not cached and `drawing` is false: None, and what is unknown until they are.
    """
    import torch

    from ddpm.commands.sources import source_of
    from ddpm.figures.images import to_uint8
    from ddpm.runs import checkpoint
    from ddpm.runs.tensor_cache import load_tensor, save_tensor

    subject = config.subject
    run, folder = open_run_at(subject.run, "init")
    facts = [checkpoint.sha256(folder / "ema.safetensors"), list(captions), subject.steps, subject.w]
    key = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]
    place = Path(str(config.runs)) / CACHE / f"{key}.safetensors"
    if (cached := load_tensor(place, torch.uint8, (len(captions), None, None, None))) is not None:
        return cached, None
    if not drawing:
        return None, f"its name is known once {subject.run} has drawn the pictures of the class, which happens first"
    words = [f"run='{run.path}'", f"checkpoint={folder.name}", f"sampler.steps={subject.steps}"]
    words += ["guidance=classifier_free", f"guidance.w={subject.w}", f"device={config.device}"]
    request = compose("sample", words)
    request.prompt = list(captions)
    source = source_of(request)[0]
    must_walk(source.sampler, source.diffusion, "subject.steps")
    say(f"{subject.run} draws {len(captions)} pictures of the class, once: they will be stored as {place}")
    images = to_uint8(torch.cat([x for _, x in source.batches(list(range(len(captions))), request.batch)]))
    save_tensor(images, place)
    return images, None


def scenes_of(trained: DictConfig, trust: list[str], run: Path) -> Any:
    """Return the data of the run that a tuned run started from; None for other runs."""
    subject = trained.get("subject")
    data = subject.get("data") if isinstance(subject, DictConfig) else None
    return None if data is None else in_words(build_data(plain(data), trust), trained, trust, run)
