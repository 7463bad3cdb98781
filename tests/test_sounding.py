"""Published models of sounds: folders of random weights in their form, drawn from and heard, by call and by command."""

import json
import sys
import wave
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from ddpm import cli
from ddpm.data.spectrogram import Mel, save_mel
from ddpm.figures.images import to_float
from ddpm.samplers import DDIM, Ancestral
from ddpm.sources.published import of_config
from ddpm.sources.sounds import SoundPipeline, gray
from models.autoencoder_kl import AutoencoderKL
from models.pretrained import load_pipeline, save_autoencoder, save_unet
from models.unet import UNet

MEL = Mel(8000, 256, 64, 16, 24, n_iter=2)  # 16 bands, 24 frames: clips of 1,535 samples
PARTS = {
    "mel": ["audio_diffusion", "Mel"],
    "scheduler": ["diffusers", "DDIMScheduler"],
    "unet": ["diffusers", "UNet2DModel"],
    "vqvae": [None, None],
}
CPU = torch.device("cpu")


def seeded(model: torch.nn.Module) -> torch.nn.Module:
    """The same with random weights whose outputs are far from 0."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            size = 0.1 if p.ndim == 1 else p[0].numel() ** -0.5
            p.copy_(size * torch.randn(p.shape, generator=generator) + (p.ndim == 1) * p.round())
    return model.eval()


def unet(size=(16, 24), channels: int = 1) -> UNet:
    small = {"channels": 8, "channel_mults": (1, 2), "blocks": 1, "groups": 4, "dropout": 0.0}
    return seeded(UNet(size, channels, attention_resolutions=(), time_offset=-1, **small))


def write(folder, scheduler: str = "DDIMScheduler", latent: bool = False, **index: object):
    """A whole published folder; of latents, with an autoencoder of pictures in colour."""
    (folder / "mel").mkdir(parents=True)
    save_mel(MEL, folder / "mel")
    save_unet(unet((8, 12), 4) if latent else unet(), folder / "unet")
    parts = {"_class_name": "AudioDiffusionPipeline", **PARTS, "scheduler": ["diffusers", scheduler]}
    if latent:
        vae = seeded(AutoencoderKL(16, channels=4, channel_mults=(1, 1), blocks=1, groups=4))
        save_autoencoder(vae, folder / "vqvae")
        parts |= {"vqvae": ["diffusers", "AutoencoderKL"]}
    (folder / "scheduler").mkdir()
    settings = {"_class_name": scheduler, "num_train_timesteps": 20, "beta_end": 0.2}
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(settings))
    (folder / "model_index.json").write_text(json.dumps(parts | index))
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write(tmp_path_factory.mktemp("published") / "plain's (1)")


@pytest.fixture(scope="module")
def pipeline(folder):
    return load_pipeline(folder)


def test_pictures_are_drawn_by_the_scheduler_and_heard(pipeline):
    """What the network, the schedule and the sampler give when they are put together by hand."""
    x = pipeline.draw(2, sampler=4, seed=3)
    assert pipeline.kind == "sound" and pipeline.mel == MEL and x.shape == (2, 1, 16, 24)
    source, diffusion = pipeline.of(4, 3), pipeline.scheduler.diffusion
    sampler = DDIM(times=[16, 11, 6, 1])  # theirs 15, 10, 5 and 0
    assert pipeline.scheduler.times(4) == [16, 11, 6, 1] and diffusion.clip_x_0
    noise = source.noise([0, 1])
    with torch.no_grad():
        by_hand = sampler(diffusion.schedule, diffusion.denoiser(unet()), noise.x_T((1, 16, 24)), generator=noise)
    assert torch.allclose(x, by_hand, atol=1e-5) and x.std() > 0.1
    assert torch.allclose(pipeline.draw(1, 4, 3), x[:1], atol=1e-5) and not torch.allclose(x, pipeline.draw(2, 4, 4))
    y = pipeline.sound(x)
    assert y.shape == (2, MEL.slice_size) and y.abs().amax(1).tolist() == pytest.approx([0.9] * 2)
    with pytest.raises(ValueError, match="n = 0 must be an integer >= 1"):
        pipeline.draw(0)
    with pytest.raises(ValueError, match=r"steps = 21: .* in 1\.\.20"):
        pipeline.of(21)


def test_latents_are_decoded_and_colours_made_gray(tmp_path):
    assert gray(torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1]])[:, :, None, None]).flatten().tolist() == (
        pytest.approx([0.299, 0.587, 0.114])
    )
    pixels = torch.randint(0, 256, (1, 3, 5, 7), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    of_pil = np.asarray(Image.fromarray(pixels[0].movedim(0, -1).numpy()).convert("L"))
    assert np.abs((gray(to_float(pixels))[0, 0].numpy() + 1) * 127.5 - of_pil).max() <= 0.51
    latent = load_pipeline(write(tmp_path / "latent", latent=True))
    source = latent.of(2)
    x = source.draw([0])
    assert source.shape == (4, 8, 12) and source.decoded_shape == x.shape[1:] == (1, 16, 24)
    noise = source.noise([0])
    denoise = latent.scheduler.diffusion.denoiser(unet((8, 12), 4))
    with torch.no_grad():
        z = DDIM(times=[11, 1])(latent.scheduler.diffusion.schedule, denoise, noise.x_T((4, 8, 12)), generator=noise)
    decoded = latent.codec.model.decode(z / latent.codec.model.scaling_factor)
    assert torch.allclose(x, gray(decoded).clamp(-1, 1), atol=1e-4) and x.std() > 0.01


def test_the_scheduler_of_ddpm_takes_all_steps_with_its_variance():
    said = {"_class_name": "DDPMScheduler", "num_train_timesteps": 40}
    scheduler = of_config(said)
    sampler = scheduler.sampler(4)
    assert isinstance(sampler, Ancestral) and sampler.times(scheduler.diffusion.schedule) == [31, 21, 11, 1, 0]
    assert (scheduler.diffusion.variance, scheduler.diffusion.clip_x_0, scheduler.usual) == ("beta_tilde", True, 40)
    assert of_config(said | {"variance_type": "fixed_large"}).diffusion.variance == "beta"
    assert of_config({"_class_name": "DDIMScheduler"}).usual == 50
    assert of_config({"_class_name": "DDIMScheduler", "num_train_timesteps": 40}).usual == 40
    with pytest.raises(ValueError, match=r"variance_type = 'learned' \(allowed: fixed_small or fixed_large\)"):
        of_config(said | {"variance_type": "learned"})


def test_folders_and_parts_that_are_refused(pipeline, tmp_path):
    for name, index, message in (
        ("a", {"unet": ["diffusers", "UNet2DConditionModel"]}, r"UNet2DConditionModel.* \(allowed: UNet2DModel\)"),
        ("b", {"vqvae": ["diffusers", "VQModel"]}, r"VQModel.* \(allowed: AutoencoderKL\)|folder vqvae is missing"),
        ("c", {"text_encoder": ["transformers", "CLIPTextModel"]}, "text_encoder = .*, which is not a known key"),
        ("d", {"mel": None}, "mel is missing"),
        ("e", {"_class_name": "MusicLDMPipeline"}, "is a .*MusicLDMPipeline.*; .*AudioDiffusionPipeline"),
    ):
        with pytest.raises(ValueError, match=message):
            load_pipeline(write(tmp_path / name, **index))
    lacking = write(tmp_path / "f")
    (lacking / "mel" / "mel_config.json").unlink()
    with pytest.raises(ValueError, match=r"does not describe its mel bands: no mel_config\.json in "):
        load_pipeline(lacking)
    with pytest.raises(ValueError, match="precision = 'int8' is not known"):
        replace(pipeline, precision="int8")
    with pytest.raises(ValueError, match="U-Net draws 1x16x24, and pictures of 16 bands and 16 frames are 1x16x16"):
        replace(pipeline, mel=Mel(8000, 256, 64, 16, 16))
    told = UNet(
        (16, 24), 1, channels=8, channel_mults=(1,), blocks=1, attention_resolutions=(), groups=4, num_classes=3
    )
    with pytest.raises(ValueError, match="conditioned on classes, but sounds are drawn from noise alone"):
        SoundPipeline(told, MEL, pipeline.scheduler, None, CPU)


# ------------------------------------------------------------------------------------------------- the command


def command(*words):
    """The exit code of ddpm-sample, or of another command that comes first."""
    verb, words = (words[0], words[1:]) if words[0] == "edit" else ("sample", words)
    before, sys.argv = sys.argv, [f"ddpm-{verb}", *map(str, words), "device=cpu"]
    try:
        getattr(cli, verb)()
    except SystemExit as end:
        return end.code or 0
    finally:
        sys.argv = before
    return 0


@pytest.mark.slow
def test_sounds_are_drawn_on_the_command_line(pipeline, folder, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    of = f"pipeline={folder}"
    array, one, many = tmp_path / "x.npy", tmp_path / "one.wav", tmp_path / "many"
    assert command(of, "sampler.steps=4", "seed=3", "n=2", f"out={array}") == 0
    assert "DDIM, 4 evaluations of its own, 16 high and 24 wide, seed 3" in capsys.readouterr().out
    drawn = np.load(array)
    ours = ((pipeline.draw(2, 4, 3) + 1) * 127.5).round().clamp(0, 255)[:, 0].numpy()
    assert np.abs(drawn[..., 0] - ours).max() <= 1
    assert command(of, "sampler.steps=4", "seed=3", f"out={one}") == 0
    with wave.open(str(one)) as file:
        assert (file.getframerate(), file.getnframes()) == (8000, MEL.slice_size)
    assert command(of, "sampler.steps=4", "seed=3", "n=2", f"out={many}/") == 0
    assert sorted(p.name for p in many.iterdir()) == sorted(
        [*(f"{k:06}.{suffix}" for k in range(2) for suffix in ("png", "wav")), "listen.html", "samples.json"]
    )
    assert np.array_equal(np.asarray(Image.open(many / "000000.png")), drawn[0, ::-1, :, 0])  # low sounds below
    assert (many / "listen.html").read_text().count("<audio") == 2
    assert command(of, "sampler=dpmpp_2m", "sampler.steps=2") == 0
    assert len(list(tmp_path.glob("samples_plain-s-1-*_seed0.png"))) == 1
    assert command(of, "steps_strip=[1,2]", f"out={tmp_path}/s.png") == 0
    capsys.readouterr()
    assert command(of, "--check", "n=3") == 0
    said = capsys.readouterr().out
    assert "DDIM, 20 evaluations of its own" in said and "GFLOP for 3" in said and "text encoder" not in said
    ddpm = write(tmp_path / "ddpm", "DDPMScheduler")
    assert command(f"pipeline={ddpm}", f"out={one}") == 0
    assert "Ancestral, 20 evaluations of its own" in capsys.readouterr().out
    few = (f"pipeline={ddpm}", f"out={tmp_path}/few/")
    assert command(*few) == 0 and command(*few) == 0  # again: they are there already
    assert "1 of 1 samples exist already" in capsys.readouterr().out
    assert command(*few, "sampler.steps=5") == 2
    assert "holds samples of other settings" in capsys.readouterr().err


@pytest.mark.slow
def test_what_sounds_are_not_told_is_refused_in_one_line(folder, tmp_path, capsys):
    of = f"pipeline={folder}"
    lacking = write(tmp_path / "lacking")
    (lacking / "mel" / "mel_config.json").unlink()
    for words, message in (
        ((of, "prompt=a dog"), "prompt=a dog: "),
        ((of, "negative=a dog"), "leave negative= out"),
        ((of, "size=32x32"), "leave size= out"),
        ((of, "lora=x.safetensors"), "leave lora= out"),
        ((of, "guidance=classifier_free", "guidance.w=3"), "leave guidance= out"),
        ((of, "class=3"), "class=3 is for runs"),
        ((of, "sampler.steps=21"), "steps = 21"),
        ((of, "between=[0,1]"), "needs held-out images"),
        ((f"pipeline={lacking}",), "no mel_config.json"),
    ):
        assert command(*words, f"out={tmp_path}/x.wav") == 2, words
        told = capsys.readouterr().err
        assert message in told and told.count("\n") == 1, (words, told)
        assert not (tmp_path / "x.wav").exists()
    assert command("edit", of, "image=x.wav", "strength=0.5") == 2
    assert "draws sounds, and edits none" in capsys.readouterr().err
