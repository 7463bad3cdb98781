"""Runs that teach a trained run of words a subject, in a few pictures: with its network, and with its class beside."""

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

OF_RUN = ("model", "text", "tokenizer", "schedule", "diffusion")  # groups that are those of the run that is tuned
FROZEN = ("init_text", "init_codec", "codec")  # and what it may have from others
ADAPTER = "models.adapters.adapt"
SETTINGS = ("word", "like", "of", "beside", "pictures", "steps", "w", "run", "data")  # the last two are found out
PICTURES = ("data", "drawn")  # where those of the class come from
BEGIN = "models.adapters.begin"
PUT_IN = (".lora_A", ".lora_B", ".added")  # ends of names of parameters that a run without adapters lacks
CACHE = "beside"  # of the folder of all runs
MOST = 10_000  # pictures of the class


def tuned_of(config: DictConfig) -> DictConfig:
    """The configuration of a run that tunes `init`: with that run's network and mathematics, told in its words.

    Raises: InvalidInput for an `init` that is no run of words, or tuned itself, for a word that cannot be learned, and
        for what such a run does not choose.
    """
    asked = config.subject
    if not isinstance(asked, DictConfig):
        raise InvalidInput(f"subject={plain(asked)} must hold settings, such as subject.word=sks")
    named, which = split_step(str(config.get("init")))
    path = Path(named)
    if config.get("init") is None or not (path / "config.yaml").is_file():
        raise InvalidInput(f"init={config.get('init')}: a subject is taught to a run; name one of words with init=RUN")
    base = read_config(path / "config.yaml")
    tokenizer: Any = tokenizer_of(path)
    if tokenizer is None or any(not isinstance(base.get(group), DictConfig) for group in OF_RUN):
        raise InvalidInput(f"init={path}: it was trained without words; take a run of experiment=text_scenes")
    if base.get("adapter") is not None:
        raise InvalidInput(f"init={path}: it is tuned itself; take the run that it began with, {base.get('init')}")
    _must_be_sound(config)
    from ddpm.runs.directory import Run

    if isinstance(which, str) and Run(path).status().get("state") in UNFINISHED:
        say(f"warning: init={path} is not finished: when it is, the same command trains anew")
    typed = {word.partition("=")[0].lstrip("+~") for word in overrides()}
    for key in sorted(typed):
        if key.partition(".")[0] in (*OF_RUN, *FROZEN):
            raise InvalidInput(f"{key}: a run that is tuned keeps its network; only subject, tuning, adapter, data, "
                               "task, optimizer, trainer, sampler and augment may be changed")  # fmt: skip
    tuned = config.copy()
    OmegaConf.set_struct(tuned, False)  # for groups that its recipe does not have
    for group in OF_RUN:
        tuned[group] = base[group]
    _keep_frozen(tuned, base, path)
    tuned.task.drop = base.model.get("drop", 0.0)
    for key in ("image_size", "channels"):
        if f"data.{key}" not in typed and key in tuned.data and key in base.data:
            tuned.data[key] = base.data[key]
    at = str(config.init).removeprefix(named)  # a checkpoint that is named
    tuned.subject.run, tuned.subject.data = f"{os.path.abspath(path)}{at}", base.data
    if word_of(tuned) is not None:
        _fill(tuned.adapter, tokenizer, asked)
    return tuned


def _keep_frozen(tuned: DictConfig, base: DictConfig, run: Path) -> None:
    """Take over what the run that is tuned has from other runs, as it keeps it: autoencoder and encoder of texts.

    They stay as they are. Beside adapters all else is frozen anyhow, and the encoder's weights come with the network's;
    it gets no adapters of low rank, but may learn a word, in the run's own copy of its table.
    """
    if base.get("init_codec") is not None:
        tuned.init_codec, tuned.codec = os.path.abspath(run / codec.FOLDER), base.codec
    if base.get("init_text") is None:
        return
    if tuned.get("adapter") is None:
        tuned.init_text = os.path.abspath(run / text_encoder.FOLDER)
    elif tuned.adapter.get("_target_") == ADAPTER:
        tuned.adapter.without = [*(tuned.adapter.get("without") or []), "text.*"]


def _must_be_sound(config: DictConfig) -> None:
    """Refuse settings of a subject that mean nothing."""
    asked = config.subject
    if unknown := sorted(set(map(str, asked)) - set(SETTINGS)):
        raise InvalidInput(f"subject.{unknown[0]} is not known; allowed: {', '.join(SETTINGS[:-2])}")
    for key in ("word", "like", "of"):
        value = asked.get(key)
        if not (value is None and key != "word") and not (isinstance(value, str) and re.fullmatch(r"[^\W\d_]+", value)):
            raise InvalidInput(
                f"subject.{key}={value} must be one word of letters" + ("" if key == "word" else ", or null")
            )
    must_be_whole(config, "subject.beside", least=0)
    if asked.beside > MOST:
        raise InvalidInput(f"subject.beside={asked.beside} must be at most {MOST:,}")
    must_be_one_of(config, "subject.pictures", PICTURES)
    must_be_whole(config, "subject.steps", least=1)
    if isinstance(asked.w, bool) or not isinstance(asked.w, int | float):
        raise InvalidInput(f"subject.w={asked.w} must be a number")
    if asked.beside and asked.of is None:
        raise InvalidInput("subject.of=WORD is needed, the class of the subject, such as sphere; or subject.beside=0")


def _fill(adapter: DictConfig, tokenizer: Any, asked: DictConfig) -> None:
    """Say which id the new word has, and of which tokens its vector is the mean at first."""
    try:
        tokenizer.with_words([asked.word])
    except ValueError as error:
        raise InvalidInput(f"subject.word: {error}") from error
    like = [] if asked.like is None else tokenizer.encode(asked.like)
    if len(like) > 1:  # the mean of pieces is like no word
        known = tokenizer.whole_words()
        near = get_close_matches(asked.like.lower(), known, 3) or known[:3]
        raise InvalidInput(
            f"subject.like={asked.like} is no word of the run, but {len(like)} pieces to its tokenizer; allowed: a "
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
    """Whether a parameter is an adapter's, which a run that is not tuned lacks."""
    return name.endswith(PUT_IN)


def begin_adapters(task: Any) -> None:
    """Give adapters their first values, now that the weights beneath them are there."""
    for module in task.modules.values():
        build({"_target_": BEGIN}, "adapter", [BEGIN], model=module)


def with_class(data: Any, config: DictConfig, trust: list[str], drawing: bool = True) -> tuple[Any, str | None]:
    """The pictures of a subject with those of its class beside them, if any are asked for; other data as they are.

    Args:
        drawing: let the run that is tuned draw these pictures, if it has not; else others stand in for them.
    Returns: the data, and what is lacking until the pictures are drawn, or None.
    Raises: InvalidInput for pictures that no caption names the subject of, or none of the class.
    """
    asked = config.get("subject")
    if asked is None or not isinstance(asked, DictConfig):
        return data, None
    from ddpm.data.prior_preservation import WithPrior

    named = [
        i for i in data.train.tolist() if i < len(data.captions) and asked.word.lower() in _words(data.captions[i])
    ]
    if not named:
        example = data.captions[int(data.train[0])] if len(data.captions) else "none"
        raise InvalidInput(f"subject.word={asked.word}: no caption of {data.name} has it; one is {example!r}")
    if not asked.beside:
        return data, None
    real, captions = _of_class(config, trust)
    images, lacks = (real, None) if asked.pictures == "data" else _drawn(config, captions, drawing)
    if images is None:
        images = real
    try:
        return WithPrior(data, images, captions), lacks
    except ValueError as error:
        raise InvalidInput(str(error)) from error


def _words(caption: str) -> list[str]:
    return re.findall(r"[^\W\d_]+", caption.lower())


def _of_class(config: DictConfig, trust: list[str]) -> tuple[Any, list[str]]:
    """Pictures uint8 (M, C, H, W) of the run's own data whose captions name the class, and these."""
    import torch

    from ddpm.randomness import generator

    asked = config.subject
    data = build_data(plain(asked.data), trust)
    there = [i for i in data.train.tolist() if asked.of.lower() in _words(data.captions[i])]
    if len(there) < asked.beside:
        said = {word for i in data.train.tolist() for word in _words(data.captions[i])}
        near = get_close_matches(asked.of.lower(), sorted(said - {asked.of.lower()}), 3)
        beside = f", perhaps {' or '.join(near)}" if near else ""
        raise InvalidInput(
            f"subject.beside={asked.beside}: {len(there):,} captions that {data.name} has for training name a "
            f"{asked.of}; allowed: 0 to {len(there)}, or another subject.of{beside}; "
            f"a caption is {data.captions[int(data.train[0])]!r}"
        )
    chosen = torch.randperm(len(there), generator=generator(0, "beside"))[: asked.beside]
    numbers = torch.tensor(there)[chosen]
    captions = [data.captions[i] for i in numbers.tolist()]
    return data.images[numbers].cpu(), captions


def _drawn(config: DictConfig, captions: Sequence[str], drawing: bool) -> tuple[Any, str | None]:
    """What the run that is tuned draws of captions, once: uint8 (M, C, H, W), kept below the folder of all runs.

    If it has not and is not to draw now: None, and what is lacking.
    """
    import torch

    from ddpm.commands.sources import source_of
    from ddpm.figures.images import to_uint8
    from ddpm.runs import checkpoint
    from ddpm.runs.tensor_cache import load_tensor, save_tensor

    asked = config.subject
    run, folder = open_run_at(asked.run, "init")
    facts = [checkpoint.sha256(folder / "ema.safetensors"), list(captions), asked.steps, asked.w]
    key = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]
    place = Path(str(config.runs)) / CACHE / f"{key}.safetensors"
    if (kept := load_tensor(place, torch.uint8, (len(captions), None, None, None))) is not None:
        return kept, None
    if not drawing:
        return None, f"its name is known when {asked.run} has drawn the pictures of the class, which comes first"
    words = [f"run='{run.path}'", f"checkpoint={folder.name}", f"sampler.steps={asked.steps}"]
    words += ["guidance=classifier_free", f"guidance.w={asked.w}", f"device={config.device}"]
    asking = compose("sample", words)
    asking.prompt = list(captions)
    source = source_of(asking)[0]
    must_walk(source.sampler, source.diffusion, "subject.steps")
    say(f"{asked.run} draws {len(captions)} pictures of the class, once: they will be kept as {place}")
    images = to_uint8(torch.cat([x for _, x in source.batches(list(range(len(captions))), asking.batch)]))
    save_tensor(images, place)
    return images, None


def scenes_of(trained: DictConfig, trust: list[str], run: Path) -> Any:
    """The data that the run was trained on which a run of a subject began with; None for other runs."""
    asked = trained.get("subject")
    data = asked.get("data") if isinstance(asked, DictConfig) else None
    return None if data is None else in_words(build_data(plain(data), trust), trained, trust, run)
