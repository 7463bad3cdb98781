"""Published pipelines as sources of samples, in place of a run: `pipeline=FOLDER [prompt=TEXT]`."""

import json
import math
import re
import warnings
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from ddpm.commands.console import say
from ddpm.commands.launch import overrides
from ddpm.commands.load import guidance_of
from ddpm.commands.validate import must_be_drawable, trusted
from ddpm.config import InvalidInput, build, plain, resolve_device, resolved

LOADER, ADDER = "models.pretrained.load_pipeline", "models.pretrained.with_lora"
OF_SOUNDS = ("AudioDiffusionPipeline", "LatentAudioDiffusionPipeline")  # unconditional pipelines of sounds
DEFAULTS = {"run": "null", "guidance": "classifier_free", "guidance.w": "7.5", "n": "1", "batch": "4"}
INDEX = "model_index.json"
ONLY = ("size", "depth", "lora")  # keys of pipelines alone
OF_RUNS = {
    "class": None,
    "style": None,
    "weights": "ema",
    "checkpoint": "last",
    "temperature": 1.0,
}  # keys of runs alone, with their defaults


@dataclass(frozen=True)
class Drawn:
    """The stand-in for a run when samples come from a pipeline; `path` is the default folder of files.

    mel is the transform that turns its samples into sounds; None if they are pictures.
    """

    folder: Path
    path: Path = Path()
    mel: Any = None

    def status(self) -> dict[str, Any]:
        """Return {}: a pipeline has no status."""
        return {}


def with_defaults(words: list[str]) -> list[str]:
    """Return the overrides of a command; with `pipeline=`, after the defaults of pipelines that were not typed."""
    typed = [word.partition("=")[0].lstrip("+") for word in words]
    if "pipeline" not in typed or "pipeline=null" in words:
        return words
    guided = "guidance" not in typed or "guidance=classifier_free" in words
    missing = {key: value for key, value in DEFAULTS.items() if key not in typed}
    folder = words[typed.index("pipeline")].partition("=")[2]
    if draws_sounds(Path(re.sub(r"\\(.)", r"\1", folder[1:-1]) if folder[:1] == "'" else folder).expanduser()):
        return [*(f"{key}={value}" for key, value in missing.items() if not key.startswith("guidance")), *words]
    if not guided:
        missing.pop("guidance.w", None)
    return [*(f"{key}={value}" for key, value in missing.items()), *words]


def is_requested(config: DictConfig) -> bool:
    """Whether the configuration names a pipeline, and no run.

    Raises: InvalidInput for both, or neither, and for keys of the other.
    """
    run, pipeline = None if OmegaConf.is_missing(config, "run") else config.run, config.get("pipeline")
    if pipeline is not None and run is not None:
        raise InvalidInput(f"run={run} and pipeline={pipeline} exclude each other: samples are drawn from one of them")
    if pipeline is None:
        for key in ONLY:
            if config.get(key) not in (None, ""):
                raise InvalidInput(f"{key}={plain(config[key])} is for a published pipeline: give pipeline=FOLDER too")
        return False
    if not isinstance(pipeline, str) or not pipeline:
        raise InvalidInput(f"pipeline={plain(pipeline)} must be a folder with model_index.json")
    for key, nothing in OF_RUNS.items():
        if config.get(key, nothing) != nothing:
            raise InvalidInput(
                f"{key}={plain(config[key])} is for runs only, not for pipeline={pipeline}; leave it out"
            )
    return True


def draws_sounds(folder: Path) -> bool:
    """Whether a folder's model_index.json names a model of sounds."""
    from ddpm.runs.files import read_json

    try:
        index = read_json(folder / INDEX)
    except (OSError, ValueError):  # reported when it is loaded
        return False
    return isinstance(index, dict) and index.get("_class_name") in OF_SOUNDS


def source_of(config: DictConfig) -> tuple[Any, Drawn]:
    """Open the source of samples that `pipeline=` and `prompt=` name, and the stand-in for its run.

    Raises: InvalidInput.
    """
    return open_pipeline(config)[1:]


def open_pipeline(config: DictConfig) -> tuple[Any, Any, Drawn]:
    """Return (pipeline, source, stand-in for its run); the source does not need the pipeline's text encoder any more.

    Raises: InvalidInput.
    """
    must_be_drawable(config)
    folder, device = Path(str(config.pipeline)).expanduser(), resolve_device(config.device)
    if draws_sounds(folder):
        return _of_sounds(config, folder, device)
    if not folder.is_dir():  # checked first, before the keys that it would need
        raise InvalidInput(f"{folder} is no pipeline: there is no such folder")
    text = {key: plain(config[key]) for key in ("prompt", "negative")}
    if text["prompt"] is None:
        raise InvalidInput("prompt=TEXT is needed; prompt='' draws without one")
    for key, value in text.items():
        if not isinstance(value, str):
            raise InvalidInput(f"{key}={value} must be a text, in quotes where it is a number or a list")
    size, own = _size(config.size), _own_steps(config)
    sampler = own if own is not None else build(config.sampler, "sampler", trusted(config))
    guidance = guidance_of(config, trusted(config), device)
    if type(guidance).__name__ not in ("ClassifierFree", "Guidance"):
        raise InvalidInput("guidance of a pipeline: allowed: classifier_free, none")
    pipeline = pipeline_of(config, folder, device)
    settings = {"sampler": sampler, "size": size, "seed": config.seed, "guidance": guidance}
    try:
        with warnings.catch_warnings(record=True) as cut:
            warnings.simplefilter("always")
            source = pipeline.of(text["prompt"], text["negative"], **settings)
    except ValueError as error:
        raise InvalidInput(str(error)) from error
    for warning in cut:
        say(f"warning: {warning.message}")
    source.own = None if own is None else pipeline.scheduler.sampler
    return pipeline, source, Drawn(folder)


def _of_sounds(config: DictConfig, folder: Path, device: Any) -> tuple[Any, Any, Drawn]:
    """Return what `open_pipeline` does, for an unconditional model of sounds."""
    for key, nothing in {"prompt": (None, ""), "negative": (None, ""), "size": (None,), "lora": (None,)}.items():
        if (value := plain(config.get(key))) not in nothing:
            raise InvalidInput(f"{key}={value}: {folder} draws sounds from noise alone; leave {key}= out")
    if type(guidance_of(config, trusted(config), device)).__name__ != "Guidance":
        raise InvalidInput(
            f"guidance: {folder} draws sounds from noise alone, without a condition to guide by; leave guidance= out"
        )
    own = _own_steps(config)
    sampler = None if own is not None else build(config.sampler, "sampler", trusted(config))
    pipeline = pipeline_of(config, folder, device)
    if own is not None and not any(word.lstrip("+").startswith("sampler.steps=") for word in overrides()):
        own = config.sampler.steps = pipeline.scheduler.usual  # recorded with the samples
    try:
        source: Any = pipeline.of(own if sampler is None else sampler, config.seed)
    except ValueError as error:
        raise InvalidInput(str(error)) from error
    source.own = None if own is None else pipeline.scheduler.sampler
    return pipeline, source, Drawn(folder, mel=pipeline.mel)


def pipeline_of(config: DictConfig, folder: Path, device: Any) -> Any:
    """Load the pipeline in a folder with its adapters, and print its description."""
    from ddpm.runs.precision import as_trained

    precision = as_trained("fp32", device) if config.precision == "auto" else str(config.precision)
    settings = {"_target_": LOADER, "folder": str(folder), "device": str(device), "precision": precision}
    try:
        pipeline = build(settings, "pipeline", [LOADER])
    except OSError as error:
        raise InvalidInput(f"pipeline={folder}: {error}") from error
    say("\n".join((f"{folder}: {pipeline.kind}", *(f"  {line}" for line in pipeline.about))))
    for file, scale in _adapters(config):
        adding = {"_target_": ADDER, "path": file, "scale": scale}
        try:
            build(adding, "lora", [ADDER], model=pipeline.model, encoder=pipeline.encoder)
        except OSError as error:
            raise InvalidInput(f"lora={file}: {error}") from error
        say(f"  adapted by {file}, times {scale:g}")
    return pipeline


def _adapters(config: DictConfig) -> list[tuple[str, float]]:
    """Return the files that `lora=` names, each with its strength; a single strength applies to all.

    Raises: InvalidInput.
    """
    names, scales = plain(config.get("lora")), plain(config.get("lora_scale", 1.0))
    files = [] if names is None else names if isinstance(names, list) else [names]
    scales = scales if isinstance(scales, list) else [scales] * len(files)
    if not all(isinstance(file, str) and file for file in files):
        raise InvalidInput(f"lora={names} must be a file of safetensors, or a list of them")
    if len(scales) != len(files) or not all(type(s) in (int, float) and math.isfinite(s) for s in scales):
        raise InvalidInput(f"lora_scale={scales} must be a number, or one for each of {len(files)} files of lora=")
    return list(zip(files, map(float, scales), strict=True))


def how_prompted(source: Any, run: Drawn, config: DictConfig, evaluations: int | None) -> str:
    """Return the terminal line that names the pipeline, the sampler, the size and the guidance."""
    _, height, width = source.decoded_shape
    cost = type(source.sampler).__name__ + ("" if evaluations is None else f", {evaluations} evaluations")
    own = " of its own" if source.own is not None else ""
    guidance = f", {source.guidance}" if str(source.guidance) else ""
    return f"{run.folder}, {cost}{own}, {height} high and {width} wide, seed {config.seed}{guidance}"


def label(config: DictConfig) -> str:
    """Return the part of a file name: the prompt or the folder, and a checksum of all settings but the seed."""
    keys: tuple[str, ...] = ("pipeline", "prompt", "negative", "guidance", "sampler", "size", "steps_strip", "process")
    keys = (*keys, *(key for key in ("lora", "lora_scale") if config.get("lora") is not None))
    drawn = json.dumps([plain(config.get(key)) for key in keys], default=str)
    named = Path(str(config.get("pipeline"))).name if config.prompt is None else str(config.prompt)
    words = re.sub(r"[^0-9A-Za-z]+", "-", named).strip("-")[:32]
    return f"{words or 'no-prompt'}-{sha256(drawn.encode()).hexdigest()[:6]}"


def settings(config: DictConfig, run: Drawn) -> dict[str, Any]:
    """Return the settings that a pipeline's numbered samples depend on."""
    keys = ("prompt", "negative", "size", *(("lora", "lora_scale") if config.get("lora") is not None else ()))
    own = _own_steps(config) is not None
    return {"pipeline": str(run.folder.resolve()), "own_sampler": own} | {key: plain(config[key]) for key in keys}


def _own_steps(config: DictConfig) -> int | None:
    """Return the requested steps of the pipeline's own sampler; None if another sampler was typed."""
    typed = [word.lstrip("+") for word in overrides() if word.lstrip("+").startswith("sampler")]
    chosen = any(word.startswith("sampler=") for word in typed)
    others = [word for word in typed if not word.startswith(("sampler=", "sampler.steps="))]
    if chosen:
        return None
    if others:
        raise InvalidInput(f"{others[0]} is no setting of the pipeline's own sampler; give sampler=NAME too")
    steps = resolved(config.sampler).get("steps")
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise InvalidInput(f"sampler.steps={steps} must be an integer >= 1")
    return steps


def _size(typed: Any) -> tuple[int, int] | None:
    """Return (H, W) of size=480x640, size=[480,640] or size=512; None for none."""
    size = plain(typed)
    if size is None:
        return None
    if isinstance(size, str) and (found := re.fullmatch(r"(\d{1,6})x(\d{1,6})", size)):
        size = [int(side) for side in found.groups()]
    size = [size, size] if isinstance(size, int) else size
    whole = isinstance(size, list) and len(size) == 2 and all(type(side) is int and side > 0 for side in size)
    if not whole:
        raise InvalidInput(f"size={plain(typed)} must be HEIGHTxWIDTH in pixels, such as 480x640")
    return size[0], size[1]
