"""Published pipelines: a text encoder, tokenizer, U-Net, autoencoder and scheduler in one folder; or audio pipelines.

The form is that of StableDiffusionPipeline and its siblings of the diffusers library: model_index.json names the class
of each part, and each part has a folder. Left out, and reported: safety_checker and feature_extractor, which process
finished images, and depth_estimator, as a depth is given.

AudioDiffusionPipeline has settings of mel bands (mel/mel_config.json), a U-Net, a scheduler, and an autoencoder of
pictures (vqvae) if it draws latents.
"""

import contextlib
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from models.pretrained.autoencoder import load_autoencoder
from models.pretrained.folder import listed, short
from models.pretrained.text import load_text_encoder
from models.pretrained.tokenizer import load_tokenizer
from models.pretrained.unet import load_unet
from models.pretrained.weights import read_object

if TYPE_CHECKING:
    from ddpm.sources.prompted import Pipeline
    from ddpm.sources.sounds import SoundPipeline

INDEX, CARD, CARD_BYTES = "model_index.json", "README.md", 2**20
CLASSES = {  # -> the conditions of the U-Net besides a text, see `ddpm.sources.prompted.KINDS`
    "StableDiffusionPipeline": ("text",),
    "StableDiffusionImg2ImgPipeline": ("text",),
    "StableDiffusionInpaintPipeline": ("inpainting", "text"),
    "StableDiffusionInpaintPipelineLegacy": ("text",),
    "StableDiffusionDepth2ImgPipeline": ("depth",),
}
PARTS = {  # -> classes that are read
    "text_encoder": ("CLIPTextModel",),
    "tokenizer": ("CLIPTokenizer", "CLIPTokenizerFast"),
    "unet": ("UNet2DConditionModel",),
    "vae": ("AutoencoderKL",),
    "scheduler": (),  # which states its class itself, see `ddpm.sources.published`
}
OF_SOUNDS = ("AudioDiffusionPipeline", "LatentAudioDiffusionPipeline")
SOUND_PARTS = {"mel": ("Mel",), "unet": ("UNet2DModel",), "scheduler": ()}
SOUND_LATENTS = {"vqvae": ("AutoencoderKL",)}  # which is there if latents are drawn
LEFT_OUT = ("safety_checker", "feature_extractor", "depth_estimator")
SAYS_NOTHING = ("requires_safety_checker",)
STATED = ("license", "license_name", "license_link", "base_model", "datasets")  # of a model card


def load_pipeline(
    folder: str | Path, device: str | torch.device = "cpu", precision: str = "fp32", variant: str | None = None
) -> "Pipeline | SoundPipeline":
    """Load the text-to-image model in a folder: `load_pipeline(folder).draw("a lighthouse, oil on canvas")`.

    Or the audio model: `pipeline = load_pipeline(folder)`, `pipeline.sound(pipeline.draw(n=1))`.

    Args:
        folder: with model_index.json and the folders that it names.
        device: the networks' device.
        precision: "fp32", "bf16" or "fp16": of the U-Net and the text encoder.
        variant: of the U-Net's weights, as in `load_unet`.
    Returns: see `ddpm.sources.prompted.Pipeline`, or `ddpm.sources.sounds.SoundPipeline`; `about` has what the
        folder states of its licence and source.
    Raises:
        ValueError: a folder of another kind, with its kind; a part that is missing, or of a class that is not read;
            parts that do not fit each other; what the parts raise.
    Source: High-Resolution Image Synthesis with Latent Diffusion Models (arXiv 2112.10752).
    """
    # The one place where networks import the mathematics: a pipeline is both, and is loaded by one call.
    from ddpm.latent.codec import Continuous
    from ddpm.sources.prompted import Pipeline
    from ddpm.sources.published import read_scheduler

    folder = Path(folder)
    name, present = index_of(folder)
    if name in OF_SOUNDS:
        return _of_sounds(folder, torch.device(device), precision, variant, latent="vqvae" in present)
    left_out = [part for part in LEFT_OUT if part in present]
    scheduler = read_scheduler(folder / "scheduler")
    tokenizer = load_tokenizer(folder / "tokenizer")
    vae = load_autoencoder(folder / "vae")
    unet, encoder = load_unet(folder / "unet", variant), load_text_encoder(folder / "text_encoder")
    codec = Continuous(vae, scale=vae.scaling_factor, shift=vae.shift_factor)
    codec = codec.of_size(*(side * vae.factor for side in unet.image_size))
    about = (*stated(folder), *([f"left out: {', '.join(left_out)}"] if left_out else []))
    pipeline = Pipeline(unet, codec, encoder, tokenizer, scheduler, torch.device(device), precision, about)
    if pipeline.kind not in CLASSES[name]:
        raise ValueError(
            f"{folder}: the U-Net of a {name} is conditioned on {' or '.join(CLASSES[name])}, and this one on "
            f"{pipeline.kind}"
        )
    return pipeline


def _of_sounds(
    folder: Path, device: torch.device, precision: str, variant: str | None, *, latent: bool
) -> "SoundPipeline":
    """Load the audio model in a folder, whose index is valid; with `latent` it has an autoencoder."""
    from ddpm.data.spectrogram import load_mel
    from ddpm.latent.codec import Continuous
    from ddpm.sources.published import read_scheduler
    from ddpm.sources.sounds import SoundPipeline

    try:
        mel = load_mel(folder)
    except FileNotFoundError as error:
        raise ValueError(f"{folder} does not describe its mel bands: {error}") from error
    scheduler = read_scheduler(folder / "scheduler")
    codec = None
    if latent:
        vae = load_autoencoder(folder / "vqvae")
        codec = Continuous(vae, scale=vae.scaling_factor, shift=vae.shift_factor)
    model = load_unet(folder / "unet", variant)
    return SoundPipeline(model, mel, scheduler, codec, device, precision, tuple(stated(folder)))


def index_of(folder: Path) -> tuple[str, dict[str, Any]]:
    """Return the class of a pipeline, and its present parts; ValueError unless all are read here, or left out."""
    if not (folder / INDEX).is_file():
        raise ValueError(f"{folder} is no pipeline: {_what_it_is(folder)}")
    index = read_object(folder / INDEX, "the parts of a pipeline")
    name = index.get("_class_name")
    if name not in (*CLASSES, *OF_SOUNDS):
        raise ValueError(f"{folder} is a {short(name)}; pipelines that are read: {', '.join((*CLASSES, *OF_SOUNDS))}")
    needed, optional = (SOUND_PARTS, SOUND_LATENTS) if name in OF_SOUNDS else (PARTS, {})
    known, aside = needed | optional, () if name in OF_SOUNDS else LEFT_OUT
    parts = {key: value for key, value in index.items() if not key.startswith("_") and key not in SAYS_NOTHING}
    present = {key: value for key, value in parts.items() if value not in (None, [None, None])}
    unknown = [key for key in present if key not in (*known, *aside)]
    wrong = [f"{key} = {short(present[key])}, which is not a known key" for key in unknown]
    for part in (part for part in known if part in needed or part in present):
        value, classes = present.get(part), known[part]
        if value is None or not (folder / part).is_dir():
            wrong.append(f"{part} is missing" if value is None else f"the folder {part} is missing")
        elif classes and (not isinstance(value, list) or value[-1] not in classes):
            wrong.append(f"{part} = {short(value)} (allowed: {' or '.join(classes)})")
    if wrong:
        raise ValueError(f"{folder / INDEX} names a pipeline that cannot be sampled: {listed(wrong)}")
    return name, present


def _what_it_is(folder: Path) -> str:
    """Return a message about a folder without an index."""
    if not folder.is_dir():
        return "there is no such folder"
    if (folder / "config.json").is_file():
        config: dict[str, Any] = {}
        with contextlib.suppress(ValueError):
            config = read_object(folder / "config.json", "a configuration")
        kind = config.get("_class_name") or next(iter(config.get("architectures") or []), "network")
        return f"it has no {INDEX}, but the config.json of a {short(kind)}, one part of one"
    if (folder / "status.json").is_file() and (folder / "config.yaml").is_file():
        return f"it has no {INDEX}; it is a run directory, which run= names"
    return f"it has no {INDEX}"


def stated(folder: Path) -> list[str]:
    """Return the licence and source of a model card's front matter, a line each; without any, a line that says so."""
    lines = []
    if (folder / CARD).is_file():
        with open(folder / CARD, encoding="utf-8", errors="replace") as file:
            text = file.read(CARD_BYTES)
        front = re.match(r"---\s*\n(.*?)\n---\s*(\n|$)", text, re.DOTALL)
        entries = dict(re.findall(r"^([a-z_]+):[ \t]*(\S.*)$", front[1], re.MULTILINE)) if front else {}
        lines = [f"{key}: {entries[key].strip()[:200]}" for key in STATED if key in entries]
    return lines or [f"{CARD} states no licence and no source"]
