"""Whole published pipelines of random weights, below a megabyte, that load_pipeline reads: of each version's form."""

import json
from pathlib import Path

import torch

from models.autoencoder_kl import AutoencoderKL
from models.pretrained import save_autoencoder, save_text_encoder, save_tokenizer, save_unet
from models.text import TextEncoder
from models.tokenizer import BytePairs
from models.unet import UNet

LENGTH, WIDTH, SIDE = 16, 16, 8  # tokens of a text, of which width, and latents of a side
PROCESS = {"num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
PNDM = {"_class_name": "PNDMScheduler", "skip_prk_steps": True, "set_alpha_to_one": False, "steps_offset": 1}
DDIM = {"_class_name": "DDIMScheduler", "clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1}
VERSIONS = {  # class of the pipeline, arguments of the U-Net, activation of the text encoder, scheduler
    "1": ("StableDiffusionPipeline", {"heads": 2}, "quick_gelu", PNDM),
    "2": (
        "StableDiffusionPipeline",
        {"heads": [1, 2], "linear_projection": True},
        "gelu",
        DDIM | {"prediction_type": "v_prediction"},
    ),
    "inpainting": ("StableDiffusionInpaintPipeline", {"heads": 2, "condition_channels": 5}, "quick_gelu", DDIM),
    "depth": (
        "StableDiffusionDepth2ImgPipeline",
        {"heads": [1, 2], "linear_projection": True, "condition_channels": 1},
        "gelu",
        PNDM,
    ),
}
PARTS = {
    "scheduler": ["diffusers", "PNDMScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
    "safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"],
    "feature_extractor": ["transformers", "CLIPImageProcessor"],
}
CARD = "---\nlicense: creativeml-openrail-m\nbase_model: somebody/something\ntags:\n- text-to-image\n---\n# A model\n"


def networks(version: str) -> dict[str, torch.nn.Module]:
    """The networks of a version, with random weights of a seed by order, and outputs that are far from 0."""
    _, unet, activation, _ = VERSIONS[version]
    vocabulary = BytePairs([]).vocabulary
    made = {
        "unet": UNet(
            SIDE,
            4,
            channels=16,
            channel_mults=(1, 2),
            blocks=1,
            attention_resolutions=(SIDE,),
            dropout=0.0,
            groups=4,
            norm_eps=1e-5,
            flip_sin_to_cos=True,
            freq_shift=0,
            time_offset=-1,
            token_channels=WIDTH,
            any_size=True,
            **unet,
        ),
        "vae": AutoencoderKL(8 * SIDE, channels=8, channel_mults=(1, 1, 1, 1), blocks=1, groups=4),
        "text_encoder": TextEncoder(vocabulary, LENGTH, WIDTH, 2, 2, activation),
    }
    generator = torch.Generator().manual_seed(0)
    for network in made.values():
        for _, p in sorted(network.named_parameters()):
            with torch.no_grad():
                size = 0.1 if p.ndim == 1 else p[0].numel() ** -0.5
                p.copy_(size * torch.randn(p.shape, generator=generator) + (p.ndim == 1) * p.round())
        network.eval()
    return made


def write(folder: Path, version: str = "1", scheduler: dict | None = None) -> Path:
    """A whole pipeline below `folder`; scheduler: settings in place of the version's."""
    folder.mkdir(parents=True, exist_ok=True)
    made = networks(version)
    save_unet(made["unet"], folder / "unet")
    save_autoencoder(made["vae"], folder / "vae")
    save_text_encoder(made["text_encoder"], folder / "text_encoder")
    save_tokenizer(BytePairs([], length=LENGTH), folder / "tokenizer")
    name, _, _, settings = VERSIONS[version]
    (folder / "scheduler").mkdir(exist_ok=True)
    settings = {**PROCESS, **(settings if scheduler is None else scheduler)}
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(settings))
    (folder / "model_index.json").write_text(json.dumps({"_class_name": name, **PARTS}))
    (folder / "README.md").write_text(CARD)
    return folder
