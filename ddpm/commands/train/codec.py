"""Codecs of runs that train on latents or codes: found, fitted, and copied into each run's folder."""

import hashlib
import json
import os
import shlex
import shutil
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from omegaconf import DictConfig, OmegaConf

from ddpm.commands.console import say
from ddpm.commands.load import data_of, load_into, open_run_at, task_of
from ddpm.commands.train.teacher import UNFINISHED
from ddpm.commands.validate import trusted
from ddpm.config import InvalidInput, build, compose, plain, read_config, resolved

FOLDER = "codec"  # subfolder of a run: the codec that decodes its samples
CONFIG, WEIGHTS, STATE = "config.yaml", "model.safetensors", "codec.json"
PUBLISHED = "config.json"  # configuration of a published autoencoder
LOADER, SAVER = "models.pretrained.load_autoencoder", "models.pretrained.save_autoencoder"
AUTOREGRESSIVE = "ddpm.training.tasks.autoregressive.Autoregressive"  # the task that is trained on codes
CACHE = "latents"  # subfolder of the folder of all runs


class Found(NamedTuple):
    """A codec, with its files and checksum."""

    codec: Any
    written: Callable[[Path], None]  # writes its configuration and its weights into a folder
    sha256: str  # of the weights


def recipe_of(config: DictConfig) -> tuple[list[str], DictConfig] | None:
    """Return overrides and configuration of the run that trains the codec, if `init_codec` holds overrides; else None.

    Data, seed and device are those of the run that needs it, unless overridden; its study is STUDY_codecs, so that many
    runs can share it.

    Raises: InvalidInput for overrides that do not compose.
    """
    if not _is_recipe(config.get("init_codec")):
        return None
    try:
        words = shlex.split(resolved(config)["init_codec"])
    except ValueError as error:  # a quotation mark that is not closed
        raise InvalidInput(f"init_codec={config.init_codec}: {error}") from error
    for word in words:
        if "=" not in word or word.startswith(("hydra", "trust", "init_codec", "runs=", "study=", "extend=")):
            raise InvalidInput(f"init_codec: {word} is not allowed here; allowed are KEY=VALUE of ddpm-train")
    made = compose("train", words)
    keys = {word.partition("=")[0].partition(".")[0] for word in words}
    for key in ("data", "seed"):
        if key not in keys:
            made[key] = config[key]
    for key in ("runs", "device", "trust", "retry"):
        made[key] = config[key]
    made.study = f"{config.study}_codecs"
    return words, made


def _is_recipe(named: Any) -> bool:
    """Whether `init_codec` holds overrides of ddpm-train in place of a run."""
    return isinstance(named, str) and named.startswith(("experiment=", "task="))


def with_codec(config: DictConfig, words: list[str], run: Path) -> DictConfig:
    """Return the configuration of a run whose codec was trained with these overrides."""
    config = config.copy()
    config.init_codec = str(run)
    config.codec.recipe = words
    return config


def codec_of(config: DictConfig, shape: Callable[[], Sequence[int]]) -> Found | None:
    """Return the codec that `init_codec` names, or None.

    It may name a run of an autoencoder, a run with a codec of its own, or a folder with a published autoencoder.

    Args:
        shape: returns the shape of the data's samples; called only for a published codec, which has no fixed size.
    Raises: InvalidInput for a run that has no codec.
    """
    named = config.get("init_codec")
    if named is None:
        return None
    if _is_recipe(named):
        raise InvalidInput(f"init_codec={named}: only ddpm-train trains a run from such words; here name a run")
    if (folder := Path(str(named)) / FOLDER).is_dir():
        named = folder
    if (Path(str(named)) / STATE).is_file():
        return stored_in(Path(str(named)), trusted(config))
    for place in (Path(str(named)), Path(str(named)) / "vae"):  # by itself, or in a pipeline
        if not (Path(str(named)) / CONFIG).is_file() and (place / PUBLISHED).is_file():
            config.init_codec = os.path.abspath(place)
            return _published(place, shape(), f"init_codec={named}")
    run, files = taken_from(config, "init_codec")
    return _built(run.path / CONFIG, files.get("model"), trusted(config), f"init_codec={named}")


def taken_from(config: DictConfig, key: str) -> tuple[Any, dict[str, Path]]:
    """Return the run that a key of the configuration names, and the files of its modules' averaged weights.

    The checkpoint is written into the configuration, as RUN@STEP.

    Raises: InvalidInput if there is no such run.
    """
    from ddpm.runs import checkpoint

    named = str(config[key])
    run, folder = open_run_at(named, key)
    if run.status().get("state") in UNFINISHED:
        say(f"warning: {key}={named} is not finished: once it is, the same command trains anew")
    config[key] = f"{os.path.abspath(run.path)}@{folder.name}"
    return run, checkpoint.weights_of(folder, averaged=True)


def stored_in(folder: Path, trust: list[str]) -> Found:
    """Load the codec in a run's folder, with the statistics of its latents."""
    try:
        known = json.loads((folder / STATE).read_text())
        if (folder / PUBLISHED).is_file():
            found = _published(folder, known["shape"], str(folder))
        else:
            found = _built(folder / CONFIG, folder / WEIGHTS, trust, str(folder))
        if known["sha256"] != found.sha256:
            raise ValueError("its weights have changed since training: their checksum differs")
        return found._replace(codec=found.codec.with_state(known["state"]))
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise InvalidInput(f"{folder} cannot be read: {error}") from error


def _published(folder: Path, shape: Sequence[int], word: str) -> Found:
    """Load the codec in a folder of published weights, for images of a shape (C, H, W)."""
    from ddpm.latent.codec import Continuous
    from ddpm.training.task import checksum

    model = build({"_target_": LOADER, "folder": str(folder)}, word, [LOADER])
    model.requires_grad_(False)
    codec = Continuous(model)
    if len(shape) == 3 and shape[0] == codec.of[0]:  # other shapes are refused later, see `must_suit`
        try:
            codec = codec.of_size(*shape[1:])
        except ValueError as error:
            raise InvalidInput(f"{word}: {error}") from error

    def written(to: Path) -> None:
        build({"_target_": SAVER, "folder": str(to)}, word, [SAVER], model=model)

    return Found(codec, written, checksum(model))


def _built(config: Path, weights: Path | None, trust: list[str], word: str) -> Found:
    from ddpm.runs import checkpoint

    trained = read_config(config)
    task = task_of(trained, trust)
    must_be_codec(task, word)
    assert weights is not None  # a task with a codec has a network
    load_into(task.model, weights)
    task.model.eval().requires_grad_(False)
    return Found(task.codec(), partial(_copied, {CONFIG: config, WEIGHTS: weights}), checkpoint.sha256(weights))


def must_be_codec(task: Any, word: str) -> None:
    """Raise InvalidInput if a task trains no codec."""
    if task.codec() is None or "model" not in task.modules:
        raise InvalidInput(
            f"{word}: {type(task).__name__} trained no codec; train one with experiment=vqvae or autoencoder_kl"
        )


def _copied(files: dict[str, Path], folder: Path) -> None:
    """Copy files into a folder under the given names."""
    from ddpm.runs.files import replacing

    for name, source in files.items():
        if source.resolve() != (folder / name).resolve():
            with replacing(folder / name) as temporary:
                shutil.copyfile(source, temporary)


def keep(found: Found, codec: Any, run: Path) -> None:
    """Write a codec into a run's folder, so that sampling needs no other run.

    Args:
        codec: the same codec, with the statistics of its latents.
    """
    from ddpm.runs.files import replacing

    folder = run / FOLDER
    folder.mkdir(exist_ok=True)
    found.written(folder)
    with replacing(folder / STATE) as temporary:
        known = {"sha256": found.sha256, "state": codec.state(), "shape": list(codec.of)}
        temporary.write_text(json.dumps(known, indent=1))


def fill(config: DictConfig, codec: Any) -> None:
    """Write the shape and kind of a codec's latents or codes into a configuration, whose network refers to them.

    Raises: InvalidInput for codes if the task trains on latents, or the reverse.
    """
    wanted = "codes" if config.task.get("_target_") == AUTOREGRESSIVE else "latents"
    if codec.kind != wanted:
        maker = "vqvae or task=vqgan" if wanted == "codes" else "autoencoder_kl"
        raise InvalidInput(
            f"init_codec={config.init_codec} makes {codec.kind}, and this run is trained on {wanted}; take a run of "
            f"experiment={maker}"
        )
    channels, size = (None, codec.shape) if codec.kind == "codes" else (codec.shape[0], codec.shape[1:])
    known = {"size": list(size), "channels": channels, "codes": getattr(codec, "codes", None)}
    config.codec = OmegaConf.create(known | {"recipe": plain(config.codec.get("recipe"))})


def encoded(
    data: Any, found: Found, device: Any, runs: Path, fit: bool = True, log: Callable[[str], None] = say
) -> Any:
    """Return the latents or codes of data, cached in a file below the folder of all runs.

    Args:
        fit: whether to measure the latents' scale; a run that is tuned keeps the scale that it has.
    Raises: InvalidInput for data that the codec does not take.
    """
    from ddpm.data.encoded import encoded as made

    found.codec.model.to(device)
    key = json.dumps([found.sha256, data.identity()], sort_keys=True, default=str)
    file = f"{data.name}-{hashlib.sha256(key.encode()).hexdigest()[:16]}.safetensors"
    try:
        return made(data, found.codec, device, runs / CACHE / file, log, fit)
    except ValueError as error:
        raise InvalidInput(f"init_codec: {error}") from error


def trained_on(config: DictConfig, run: Any, trained: DictConfig, device: Any) -> Any:
    """Return the data of a run as its network sees them: encoded, if it has a codec."""
    data = data_of(config, trained)
    if trained.get("init_codec") is None:
        return data
    fit = trained.get("subject") is None
    return encoded(data, stored_in(run.path / FOLDER, trusted(config)), device, run.path.parent.parent, fit)
