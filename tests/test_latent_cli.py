"""experiment=gan, autoencoder_kl and latent_diffusion through the commands: trained, resumed, drawn from, refused."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from omegaconf import OmegaConf
from PIL import Image
from test_cli import Call, assert_refused, call, same, status, typed, weights  # noqa: F401
from test_codes_cli import OF_BOTH, go_on, made

from ddpm import cli
from ddpm.commands.study.plan import science_of
from ddpm.config import build, compose, read_config, resolved
from ddpm.data import Digits
from ddpm.figures import images
from ddpm.runs.directory import read_metrics
from ddpm.study.formatting import amount
from models.autoencoder_kl import AutoencoderKL
from models.pretrained import save_autoencoder

GAN = ["experiment=gan", "model.channels=8", "discriminator.channels=8", *OF_BOTH]
CODEC = [
    "experiment=autoencoder_kl", "model.channels=8", "model.groups=4", "model.patch=1", "discriminator.channels=8",
    *OF_BOTH, "data.channels=1",
]  # fmt: skip
LATENT = [
    "experiment=latent_diffusion", "model.channels=8", "model.groups=4", "model.attention_resolutions=[]",
    "schedule.T=10", "sampler.steps=3", *OF_BOTH,
]  # fmt: skip


@pytest.fixture
def codec(tmp_path, call) -> Path:  # noqa: F811
    return made(call, tmp_path / "codec", CODEC, "trainer.previews=0")


@pytest.mark.slow
def test_a_gan_is_trained_resumed_drawn_from_and_measured(call, tmp_path):  # noqa: F811
    lines = 'evaluation=["metric=[kernel,recognition] n=40 features=pixels"]'
    told = ["model.num_classes=10", lines]
    run = made(call, tmp_path / "a", GAN, *told)
    assert {p.name for p in run.glob("*.png")} == {"samples.png", "preview.png", "loss.png"}
    line = [line for line in read_metrics(run) if line["split"] == "train"][-1]
    assert {"loss_discriminator", "loss_r1", "loss_generator"} < line.keys()
    files = ("model", "ema", "discriminator")
    kept = [weights(run, 8, name) for name in files]
    go_on(run)
    assert made(call, tmp_path / "a", GAN, *told) == run and status(run)["state"] == "DONE"
    assert all(same(weights(run, 8, name), before) for name, before in zip(files, kept, strict=True))
    for name, asked in (("all", []), ("threes", ["class=3"])):
        result = call(cli.sample, f"run={run}", "n=12", f"out={tmp_path / name}.npy", *asked)
        assert result.code == 0 and "generated at once" in result.out
    every, threes = (np.load(tmp_path / f"{name}.npy") for name in ("all", "threes"))
    assert np.array_equal(every[3], threes[3]) and not np.array_equal(every[4], threes[4])
    for words, said in [
        (["between=[0,1]"], "between interpolates codings"),
        (["temperature=0.5"], "temperature=0.5 is for runs that draw code by code"),
        (["sampler.steps=5"], "draws no samples by a sampler"),
    ]:
        assert_refused(call(cli.sample, f"run={run}", *words), said)
    assert_refused(call(cli.evaluate, f"run={run}", "metric=elbo"), "metric=elbo does not apply to this run")


@pytest.mark.slow
def test_an_autoencoder_with_a_discriminator_goes_on_after_a_kill(call, tmp_path):  # noqa: F811
    lines = 'evaluation=["metric=[reconstruction,kernel] n=40 features=pixels"]'
    run = made(call, tmp_path / "a", CODEC, lines)
    names = {"samples.png", "samples_conditions.png", "preview.png", "loss.png", "reconstructions.png"}
    assert {p.name for p in run.glob("*.png")} == names
    assert "psnr_40_held_out" in json.loads((run / "evaluation.json").read_text())
    steps = [line for line in read_metrics(run) if line["split"] == "train"]
    assert "loss_adversarial" in steps[-1] and {"loss_absolute", "loss_ssim", "loss_kl"} < steps[-1].keys()
    kept = [weights(run, 8, name) for name in ("model", "ema", "discriminator")]
    go_on(run)
    assert made(call, tmp_path / "a", CODEC, lines) == run
    assert all(same(weights(run, 8, n), k) for n, k in zip(("model", "ema", "discriminator"), kept, strict=True))


@pytest.mark.slow
def test_latents_are_diffused_and_drawn_without_the_run_that_made_them(call, codec, tmp_path):  # noqa: F811
    words = [*LATENT, f"init_codec={codec}"]
    run = made(
        call, tmp_path / "a", words, 'evaluation=["metric=[kernel,loss_by_snr] n=30 features=pixels sampler.steps=3"]'
    )
    assert {p.name for p in run.glob("*.png")} >= {"samples.png", "preview.png", "forward.png", "schedule.png"}
    state = json.loads((run / "codec" / "codec.json").read_text())["state"]
    assert state["scale"] > 0 and state.keys() == {"scale", "shift"}
    kept = weights(run, 8)
    go_on(run)
    assert (
        made(
            call,
            tmp_path / "a",
            words,
            'evaluation=["metric=[kernel,loss_by_snr] n=30 features=pixels sampler.steps=3"]',
        )
        == run
    )
    assert same(weights(run, 8), kept)
    shutil.rmtree(codec)
    for name, asked in (("a", ["batch=4"]), ("b", ["batch=12"]), ("c", ["seed=1"])):
        result = call(cli.sample, f"run={run}", "n=12", "sampler.steps=3", f"out={tmp_path / name}.npy", *asked)
        assert result.code == 0, result
    one, other, third = (np.load(tmp_path / f"{name}.npy").astype(int) for name in "abc")
    assert one.shape == (12, 8, 8, 1) and abs(one - other).max() <= 1 and not np.array_equal(one, third)
    assert call(cli.sample, f"run={run}", "process=3", "sampler.steps=3", f"out={tmp_path / 'way.png'}").code == 0
    assert call(cli.sample, f"run={run}", "between=[0,1]", "sampler.steps=3", f"out={tmp_path / 'b.png'}").code == 0
    cost = call(cli.evaluate, f"run={run}", "metric=cost", "cost.steps=[2]", "batch=8")
    assert cost.code == 0 and "images/s" in cost.out
    assert_refused(call(cli.evaluate, f"run={run}", "metric=bits_per_dim", "n=4"), "is measured on pixels")


@pytest.mark.slow
def test_a_plan_counts_a_codec_that_is_trained_first_and_what_is_trained_on_its_latents(call, tmp_path):  # noqa: F811
    recipe = " ".join(CODEC)
    sweep = [*LATENT, "data.channels=1", f"init_codec='{recipe}'", "seed=0,1", f"runs={tmp_path / 'runs'}"]
    result = call(cli.study, "plan", *sweep)
    assert result.code == 0 and not (tmp_path / "runs").exists(), result
    before, after = result.out.split("and then:")
    assert before.startswith("trained first, each once") and "default_codecs" in before
    assert "2 runs of 1 arm in " in before
    assert "2 runs of 1 arm in " in after and re.search(r"about .* for both", after)
    first, then = (
        compose("train", words)
        for words in (CODEC, [*LATENT, "data.channels=1", "init_codec=x", "codec.size=[4,4]", "codec.channels=4"])
    )
    networks = ((first, "model"), (first, "discriminator"), (then, "model"))
    own, judge, latent = (sum(p.numel() for p in build(of[group], group).parameters()) for of, group in networks)
    for text, count in ((before, own + judge), (after, latent)):
        assert amount(count) in text and "2 new" in text
    for word in (f"init_codec='{recipe} model.channels=7'", "init_codec='experiment=vqvae'"):
        told = call(cli.study, "plan", *LATENT, "data.channels=1", word, f"runs={tmp_path / 'runs'}")
        assert told.code == 0 and "refused (1): " in told.out, told
    codec = made(call, tmp_path / "codec", CODEC, "trainer.previews=0")
    words = [*LATENT, "data.channels=1", f"init_codec={codec}", f"runs={tmp_path / 'a'}"]
    assert amount(latent) in call(cli.study, "plan", *words).out
    made(call, tmp_path / "a", words[:-1])
    assert "1 DONE" in call(cli.study, "plan", *words).out


@pytest.mark.slow
def test_latents_of_a_published_autoencoder_are_diffused(call, tmp_path):  # noqa: F811
    model = AutoencoderKL(64, in_channels=1, channels=8, channel_mults=(1, 2), blocks=1, groups=4)
    save_autoencoder(model, tmp_path / "published" / "vae")
    words = [*LATENT, "data.channels=1"]
    run = made(call, tmp_path / "a", [*words, f"init_codec={tmp_path / 'published'}"])
    assert made(call, tmp_path / "a", [*words, f"init_codec={tmp_path / 'published' / 'vae'}"]) == run
    config = read_config(run / "config.yaml")
    assert list(config.codec.size) == [4, 4] and config.codec.channels == 4
    shutil.rmtree(tmp_path / "published")
    result = call(cli.sample, f"run={run}", "n=3", "sampler.steps=3", f"out={tmp_path / 'x.npy'}")
    assert result.code == 0 and np.load(tmp_path / "x.npy").shape == (3, 8, 8, 1)
    again = call(cli.train, *words, f"init_codec={run}", f"runs={tmp_path / 'b'}", "trainer.steps=1")
    assert again.code == 0, again
    odd = AutoencoderKL(64, in_channels=1, channels=8, channel_mults=(1, 1, 1, 1, 1), blocks=1, groups=4)
    save_autoencoder(odd, tmp_path / "odd")
    refused = call(cli.train, *words, f"init_codec={tmp_path / 'odd'}", f"runs={tmp_path / 'c'}")
    assert_refused(refused, "it encodes squares of 16x16 pixels, and 8 of 8x8 is not divisible by 16; nearest")
    colour = AutoencoderKL(64, channels=8, channel_mults=(1, 2), blocks=1, groups=4)
    save_autoencoder(colour, tmp_path / "colour")
    refused = call(cli.train, *words, f"init_codec={tmp_path / 'colour'}", f"runs={tmp_path / 'c'}")
    assert_refused(refused, "the codec was trained on images (C, H, W) = (3, 64, 64)")


@pytest.mark.slow
def test_pictures_are_edited_in_latents(call, codec, tmp_path):  # noqa: F811
    run = made(call, tmp_path / "a", [*LATENT, f"init_codec={codec}", "model.num_classes=10"])
    words = [f"run={run}", "image=held_out:0", "sampler.steps=3", "n=3"]
    results = {}
    half = np.zeros((8, 8), np.uint8)
    half[:, 5:] = 255
    Image.fromarray(half).save(tmp_path / "half.png")
    mask = f"mask={tmp_path / 'half.png'}"
    edits = {"kept": "strength=0", "some": "strength=0.7", "all": "strength=1", "hole": mask, "redrawn": "redraw=true"}
    for name, asked in edits.items():
        result = call(cli.edit, *words, asked, f"out={tmp_path / name}.npy")
        assert result.code == 0, result
        results[name] = np.load(tmp_path / f"{name}.npy")
        assert results[name].shape == (3, 8, 8, 1)
    assert (results["kept"] == results["kept"][0]).all()  # what the autoencoder makes of the image
    same = [np.array_equal(results["kept"], results[name]) for name in ("some", "all", "redrawn")]
    assert not any(same) and not np.array_equal(results["some"], results["all"])
    image = images.to_uint8(Digits().batch(Digits().held_out[:1]).x).movedim(1, -1).numpy()
    assert (results["hole"][:, :, :5] == image[:, :, :5]).all()
    assert not (results["hole"][:, :, 5:] == results["hole"][:1, :, 5:]).all()
    refused = call(cli.edit, *words, "operator=blur")
    assert_refused(refused, "draws latents, to which operator=blur does not apply; allowed: strength=, mask=, redraw")


@pytest.mark.slow
def test_what_cannot_be_is_refused_before_anything_is_begun(call, codec, tmp_path):  # noqa: F811
    of_gan = [
        (["task.game=chess"], "choose one of hinge, non_saturating"),
        (["task.r1=-1"], "r1 = -1"),
        (["discriminator.num_classes=10"], "set both alike"),
        (["discriminator.channels=0"], "channels = 0"),
        (["model.groups=5"], "groups"),
        (["data=swiss_roll"], "data"),
    ]
    of_codec = [
        (["model.channel_mults=[1,1,1,1,1]"], "nearest legal sizes: 16"),
        (["task.start=1"], "start = 1"),
        (["task.parts.adversarial=-1"], "parts.adversarial = -1"),
        (["discriminator.layers=3"], "layers = 3 leaves nothing"),
        (["task.parts.absolute=0", "task.parts.ssim=0"], "none compares with data"),
        (["model.latent_channels=0"], "latent_channels = 0"),
    ]
    of_latents = [
        ([], "init_codec must be given"),
        ([f"init_codec={codec}", "model.image_size=8"], "the model takes images"),
        ([f"init_codec={codec}", "data.image_size=16"], "the codec was trained on images (C, H, W) = (1, 8, 8)"),
        ([f"init_codec={codec}", "diffusion.clip_x_0=true"], "set diffusion.clip_x_0=false"),
        ([f"init_codec={codec}", "data.condition=mask"], "set data.condition=null"),
        ([f"init_codec={codec}", 'evaluation=["metric=bits_per_dim"]'], "is measured on pixels"),
    ]
    for words, several in ((GAN, of_gan), (CODEC, of_codec), (LATENT, of_latents)):
        for changes, told in several:
            assert_refused(call(cli.train, *words, f"runs={tmp_path / 'runs'}", *changes), told)
    of_codes = ["experiment=pixelcnn", *OF_BOTH, "data.channels=1", f"init_codec={codec}", f"runs={tmp_path / 'runs'}"]
    assert_refused(call(cli.train, *of_codes), "makes latents, and this run is trained on codes", "experiment=vqvae")
    assert not (tmp_path / "runs" / "default").exists()


@pytest.mark.slow
def test_words_train_the_codec_first_and_once_and_seeds_of_one_recipe_are_one_arm(call, tmp_path):  # noqa: F811
    runs = tmp_path / "runs"
    small = ["trainer.seconds=null", "trainer.steps=2", "trainer.batch_size=4", "trainer.previews=0"]
    recipe = ["experiment=vqvae", "model.channels=8", "model.codes=6", *small]
    words = ["experiment=pixelcnn", "data=digits", "model.channels=8", "model.layers=1", *small, f"runs={runs}"]
    words += [f"init_codec='{' '.join(recipe)}'", "device=cpu", "recognition=false"]
    for seed in (3, 4):
        result = call(cli.train, *words, f"seed={seed}")
        assert result.code == 0, result
    codecs = [OmegaConf.load(path) for path in sorted((runs / "default_codecs").glob("*/config.yaml"))]
    assert {config.seed for config in codecs} == {3, 4} and {config.data._target_ for config in codecs} == {
        "ddpm.data.Digits"
    }
    typed_of = [json.loads(path.read_text())["overrides"] for path in (runs / "default_codecs").glob("*/status.json")]
    assert typed_of == [recipe, recipe]
    priors = [read_config(path) for path in (runs / "default").glob("*/config.yaml")]
    assert len({config.init_codec for config in priors}) == 2
    sciences = [science_of(resolved(config) | {"seed": None}) for config in priors]
    assert sciences[0] == sciences[1]
    assert "is done already" in call(cli.train, *words, "seed=3").out
    for changes, told in [
        (["init_codec='experiment=vqvae hydra.mode=RUN'"], "hydra.mode=RUN is not allowed here"),
        (["init_codec='experiment=vqvae study=x'"], "study=x is not allowed here"),
        (["init_codec='experiment=nope'"], "nope"),
    ]:
        assert_refused(call(cli.train, *words, *changes), told)
