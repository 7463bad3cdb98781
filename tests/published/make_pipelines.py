"""What the library that publishes pipelines draws of tiny ones, and where its schedulers walk: writes pipelines.json.

    pip install -c constraints.txt -e '.[peers]'
    python tests/published/make_pipelines.py

The library is found by name, for no installation requires it.
"""

import importlib
import json
import sys
import tempfile
from pathlib import Path

import torch

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

import tiny_pipeline  # noqa: E402

from ddpm.randomness import SampleNoise  # noqa: E402

STEPS, PROMPT, NEGATIVE, W, SEED = 10, "A red cat, 2 dogs", "blurry", 7.5, 3
DRAWN = {"1": ("1", None), "2": ("2", None), "1 by DDIM": ("1", tiny_pipeline.DDIM)}  # version, scheduler
WALKS = {
    f"{name} {spacing}": {
        "_class_name": f"{name}Scheduler",
        "timestep_spacing": spacing,
        "steps_offset": int(spacing == "leading"),
        **more,
    }
    for name, more, spacings in (
        ("DDIM", {"clip_sample": False, "set_alpha_to_one": False}, ("leading", "trailing")),
        ("PNDM", {"skip_prk_steps": True}, ("leading", "trailing")),
        ("EulerDiscrete", {}, ("leading",)),
        ("HeunDiscrete", {}, ("leading",)),
        ("LMSDiscrete", {}, ("leading",)),
        ("DPMSolverMultistep", {}, ("leading", "trailing", "linspace")),
        ("UniPCMultistep", {}, ("leading", "trailing", "linspace")),
    )
    for spacing in spacings
}


def net(x, t):
    """An answer to x (B, 4) at their t, in closed form."""
    return 0.7 * torch.sin(1.3 * x + torch.linspace(-1, 1, 4, dtype=x.dtype) + t / 500) + 0.3 * x


def start():
    """Where walks start, (4, 4), float64."""
    return torch.linspace(-2, 2, 16, dtype=torch.float64).reshape(4, 4)


def walked(settings):
    """Where a scheduler of the library ends."""
    diffusers = importlib.import_module("diffusers")
    scheduler = getattr(diffusers, settings["_class_name"]).from_config({**tiny_pipeline.PROCESS, **settings})
    scheduler.set_timesteps(STEPS)
    x = start() * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        x = scheduler.step(net(scheduler.scale_model_input(x, t), t.item()), t, x).prev_sample
    return x


def drawn(version, scheduler):
    """The image that the library draws of a tiny pipeline, every fourth pixel, and its latents."""
    diffusers = importlib.import_module("diffusers")
    with tempfile.TemporaryDirectory() as folder:
        path = tiny_pipeline.write(Path(folder), version, scheduler)
        index = json.loads((path / "model_index.json").read_text())
        said = json.loads((path / "scheduler" / "scheduler_config.json").read_text())
        index["scheduler"] = ["diffusers", said["_class_name"]]
        index |= {"safety_checker": [None, None], "feature_extractor": [None, None], "requires_safety_checker": False}
        (path / "model_index.json").write_text(json.dumps(index))
        pipe = diffusers.StableDiffusionPipeline.from_pretrained(path, safety_checker=None, feature_extractor=None)
    x_T = SampleNoise(SEED, [0]).x_T((4, tiny_pipeline.SIDE, tiny_pipeline.SIDE), torch.device("cpu"))
    settings = {"negative_prompt": NEGATIVE, "guidance_scale": W, "num_inference_steps": STEPS, "latents": x_T}
    size = 8 * tiny_pipeline.SIDE
    latents = pipe(PROMPT, height=size, width=size, output_type="latent", **settings).images
    with torch.no_grad():
        image = pipe.vae.decode(latents / pipe.vae.config.scaling_factor).sample
    return {"latents": latents[0].flatten().tolist(), "image": image[0, :, ::4, ::4].flatten().tolist()}


def main():
    found = {
        "walks": {name: walked(settings).flatten().tolist() for name, settings in WALKS.items()},
        "drawn": {name: drawn(*of) for name, of in DRAWN.items()},
    }
    text = json.dumps(found, default=float)
    rounded = json.loads(text, parse_float=lambda number: float(f"{float(number):.7g}"))
    (HERE / "pipelines.json").write_text(json.dumps(rounded) + "\n")


if __name__ == "__main__":
    main()
