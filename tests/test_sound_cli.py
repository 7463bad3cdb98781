"""experiment=spoken_digits and sound_folder through the commands: trained, drawn from to be heard, edited, measured."""

import json
import re
import wave

import numpy as np
import pytest
import torch
from PIL import Image
from test_cli import assert_refused, call, run_of, typed  # noqa: F401
from test_codes_cli import OF_BOTH

from ddpm import cli
from ddpm.config import build, compose
from ddpm.data.sound import wav_of
from ddpm.data.spectrogram import Mel, load_mel, save_mel
from ddpm.samplers import DDIM
from ddpm.schedules import linear
from models.pretrained import load_unet, save_unet

for library in ("soundfile", "soxr"):
    pytest.importorskip(library, reason="the extra [audio] is not installed")

TINY = [
    *OF_BOTH[1:], "experiment=sound_folder", "data.sample_rate=8000", "data.n_fft=128", "data.hop=64",
    "data.image_size=16", "data.n_iter=4", "model.channels=8", "model.groups=4", "model.patch=1",
    "model.head_channels=4", "model.channel_mults=[1]", "model.attention_resolutions=[]", "model.num_classes=2",
    "schedule.T=10", "sampler.steps=3",
]  # fmt: skip
SIZE = 16 * 64 - 1  # samples of a clip


def sounds(folder):
    """Eight of each of two classes, low and high."""
    t = torch.arange(SIZE) / 8000
    for name, pitch in (("high", 2500), ("low", 400)):
        (folder / name).mkdir(parents=True)
        for k in range(8):
            (folder / name / f"{k}.wav").write_bytes(wav_of(torch.sin(2 * np.pi * (pitch + 20 * k) * t) / 2, 8000))
    return folder


def frames_of(path) -> tuple[int, int]:
    with wave.open(str(path)) as file:
        return file.getframerate(), file.getnframes()


@pytest.mark.slow
def test_the_experiments_compose_and_build():
    for name, words in (("spoken_digits", []), ("sound_folder", ["data.root=x"])):
        config = compose("train", [f"experiment={name}", *words])
        with torch.device("meta"):
            model = build(config.model, "model")
        side = config.data.image_size
        x, t = torch.zeros(1, 1, side, side, device="meta"), torch.ones(1, device="meta")
        y = torch.zeros(1, dtype=torch.long, device="meta") if name == "spoken_digits" else None
        assert model(x, t, y).shape == x.shape


@pytest.mark.slow
def test_sounds_are_trained_drawn_heard_edited_and_measured(call, tmp_path):  # noqa: F811
    folder = sounds(tmp_path / "sounds")
    said = call(cli.train, *TINY, f"data.root={folder}", f"runs={tmp_path / 'a'}")
    assert said.code == 0, said
    run = run_of(tmp_path / "a")
    page = (run / "listen.html").read_text(encoding="utf-8")
    assert page.count("<audio") == 64 + 1 + 1 and "high, sample 0" in page and "media-src data:" in page
    few = [f"run={run}", "sampler.steps=2"]

    one = tmp_path / "one.wav"
    assert call(cli.sample, *few, "class=low", f"out={one}").code == 0
    assert frames_of(one) == (8000, SIZE)
    drawn = call(cli.sample, *few, "n=4", f"out={tmp_path / 'many'}/")
    assert drawn.code == 0, drawn
    assert sorted(p.name for p in (tmp_path / "many").glob("*.wav")) == [f"{k:06}.wav" for k in range(4)]
    assert (tmp_path / "many" / "listen.html").read_text().count("<audio") == 4
    array = tmp_path / "x.npy"
    assert call(cli.sample, *few, "n=4", f"out={array}").code == 0
    shown = np.asarray(Image.open(tmp_path / "many" / "000000.png"))
    assert np.array_equal(shown, np.load(array)[0, ::-1, :, 0])  # low sounds are shown below
    way = call(cli.sample, *few, "between=[0,1]", f"out={tmp_path / 'between.png'}")
    assert way.code == 0 and (tmp_path / "between.html").read_text().count("<audio") == 10

    gap = tmp_path / "gap.npy"
    edit = call(cli.edit, *few, "image=held_out:0", "mask=0.032:0.064s", "n=1", "resamples=1", f"out={gap}")
    assert edit.code == 0, edit
    kept = tmp_path / "kept.npy"
    assert call(cli.edit, *few, "image=held_out:0", "strength=0", "n=1", f"out={kept}").code == 0
    same = (np.load(gap) == np.load(kept))[0, :, :, 0].all(axis=0)
    assert same.tolist() == [True] * 4 + [False] * 4 + [True] * 8  # a frame is 8 ms
    clip = folder / "low" / "0.wav"
    strip = call(cli.edit, *few, f"image={clip}", "class=low", "strength=0.5", "n=2", f"out={tmp_path / 'strip.png'}")
    assert strip.code == 0 and (tmp_path / "strip.html").read_text().count("<audio") == 3
    assert call(cli.edit, *few, f"image={clip}", "class=high", "strength=1", f"out={tmp_path / 'e.wav'}").code == 0
    assert frames_of(tmp_path / "e.wav") == (8000, SIZE)
    for words, reason in (
        (["mask=0.3:0.2s"], "a gap begins before it ends, within 0:0.13s"),
        (["strength=0.5", "n=2", f"out={tmp_path / 'two.wav'}"], "a .wav file holds one result"),
        (["image=nowhere.wav", "class=low", "strength=0.5"], "no such file"),
    ):
        given = [] if any(word.startswith("image=") for word in words) else ["image=held_out:0"]
        assert_refused(call(cli.edit, *few, *given, *words), reason)

    measured = call(cli.evaluate, *few, "metric=[sound,frechet]", "features=classifier", "n=70")
    assert measured.code == 2 or "sound_classifier" in (run / "evaluation.json").read_text()
    measured = call(cli.evaluate, *few, "metric=sound", "n=8")
    assert measured.code == 0, measured
    assert "no Frechet distance: 8 samples, and 64 features need 65 or more" in measured.out
    found = json.loads((run / "evaluation.json").read_text())
    record = next(v for k, v in found.items() if k.startswith("sound_classifier"))
    assert {"value", "ceiling", "seen", "relative", "convergence", "real_vs_real", "judge_accuracy"} <= record.keys()
    copied = next(v for k, v in found.items() if k.startswith("sound_memorisation_classifier"))
    assert copied["n"] == 8 and copied["value"] > 0 and not any(k.startswith("sound_frechet") for k in found)
    said = measured.out
    measured = call(cli.evaluate, *few, "metric=sound", "n=8", "judge.features=4")
    assert measured.code == 0 and "held-out sounds through their spectrograms" in measured.out, measured
    found = json.loads((run / "evaluation.json").read_text())
    name = next(k for k in found if k.startswith("sound_frechet_classifier"))
    assert name.endswith("_8_train") and {"value", "low", "high", "floor", "real_vs_real"} <= found[name].keys()
    assert record["ceiling"] == 1 and re.search("the ceiling, .* 100.0%", said)


def test_what_is_no_sound_is_not_heard(tmp_path):
    from ddpm.commands.evaluate.sounds import mel_of

    assert mel_of(compose("train", [])) is None
    mel = mel_of(compose("train", ["experiment=sound_folder", "data.root=x"]))
    assert mel == Mel(11025, 1024, 256, 64, 64)


def test_a_published_folder_is_loaded_drawn_from_and_heard(tmp_path):
    """A U-Net and mel_config.json, with their published names."""
    small = ["experiment=spoken_digits", "model.patch=1", "model.num_classes=null", "model.channels=8"]
    small += ["model.groups=4", "data.image_size=16", "model.attention_resolutions=[8]", "task.drop=0"]
    (tmp_path / "unet").mkdir()
    save_unet(build(compose("train", small).model, "model"), tmp_path / "unet")
    (tmp_path / "mel").mkdir()
    save_mel(Mel(8000, 256, 64, 16, 16), tmp_path / "mel")
    model, mel = load_unet(tmp_path / "unet").eval(), load_mel(tmp_path)
    from ddpm.diffusion import GaussianDiffusion
    from ddpm.figures.images import to_uint8

    diffusion = GaussianDiffusion(linear(1000))
    with torch.no_grad():
        x = DDIM(2)(diffusion.schedule, diffusion.denoiser(model), torch.randn(1, 1, mel.n_mels, mel.frames))
    y = mel.decode(to_uint8(x))
    assert y.shape == (1, mel.slice_size) and y.isfinite().all() and y.abs().max().item() == pytest.approx(0.9)
