"""The modules that have pages, in reading order."""

from collections.abc import Mapping
from typing import NamedTuple

from ddpm.reading.mistakes import Mistake
from ddpm.reading.source import Module


class Room(NamedTuple):
    """A titled group of modules."""

    title: str
    modules: tuple[str, ...]


def _room(title: str, folder: str, names: str) -> Room:
    return Room(title, tuple(f"{folder}.{name}" for name in names.split()))


ROOMS = (
    _room(
        "The process, its losses and its likelihood",
        "ddpm",
        "schedules forward targets preconditioning reverse losses times likelihood diffusion oracle randomness",
    ),
    _room(
        "Samplers",
        "ddpm.samplers",
        "base ancestral ddim dpm_solver edm lms plms unipc langevin student consistency accuracy",
    ),
    _room("Guidance", "ddpm.guidance", "classifier_free classifier"),
    _room("Editing", "ddpm.editing", "img2img inpaint inverse invert"),
    _room("Scores", "ddpm.score", "objectives langevin ladder"),
    _room("Latent variables", "ddpm.latent", "elbo codec reconstruction perceptual adversarial"),
    _room("Distillation", "ddpm.distillation", "progressive consistency"),
    _room("Training", "ddpm.training", "ema post_hoc muon"),
    _room(
        "Networks",
        "models",
        "embeddings layers unet magnitude transformer dit noisy_classifier vae autoencoder_kl vqvae pixelcnn gan "
        "discriminator mlp lpips text tokenizer",
    ),
)
OTHERS = "Equations elsewhere"


def rooms_of(modules: Mapping[str, Module], rooms: tuple[Room, ...] = ROOMS) -> tuple[Room, ...]:
    """Return the rooms, and in a last one all other modules that quote an equation.

    Raises: Mistake for a listed module that does not exist.
    """
    listed = [name for room in rooms for name in room.modules]
    for name in listed:
        if name not in modules:
            raise Mistake("ddpm/reading/contents.py", f"{name} is listed, but there is no such module")
    others = [name for name, m in modules.items() if name not in listed and any(d.tags for d in m.definitions)]
    return (*rooms, Room(OTHERS, tuple(others))) if others else rooms
