"""experiment=vqvae and pixelcnn through the commands: trained, resumed, drawn from, measured, refused in one line."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from test_cli import Call, assert_refused, call, run_of, same, status, typed, weights  # noqa: F401

from ddpm import cli
from ddpm.runs.directory import read_metrics

OF_BOTH = [
    "data=digits", "trainer.seconds=null", "trainer.steps=8", "trainer.batch_size=16", "trainer.previews=1",
    "trainer.checkpoint_every=4", "trainer.warmup=0", "trainer.keep=9", "device=cpu",
]  # fmt: skip
CODES = ["experiment=vqvae", "model.channels=8", "model.codes=12", "model.code_channels=4", *OF_BOTH]
PRIOR = ["experiment=pixelcnn", "model.channels=8", "model.layers=2", *OF_BOTH]


def made(call: Call, runs: Path, words: list[str], *changes: str) -> Path:  # noqa: F811
    result = call(cli.train, *words, f"runs={runs}", *changes)
    assert result.code == 0, result
    return run_of(runs)


@pytest.fixture
def codec(tmp_path, call) -> Path:  # noqa: F811
    return made(call, tmp_path / "codec", CODES, "trainer.previews=0")


def go_on(run: Path) -> None:
    """Leave a run as if it had been killed after step 4."""
    for name in ("5", "6", "7", "8"):
        shutil.rmtree(run / "checkpoints" / name, ignore_errors=True)
    known = json.loads((run / "status.json").read_text())
    (run / "status.json").write_text(json.dumps(known | {"state": "RUNNING", "evaluated": []}))


@pytest.mark.slow
def test_a_vqvae_leaves_reconstructions_and_measures_and_goes_on_after_a_kill(call, tmp_path):  # noqa: F811
    lines = 'evaluation=["metric=[reconstruction,kernel,recognition] n=40 features=pixels"]'
    run = made(call, tmp_path / "a", CODES, lines, "task.revive=3")
    assert {p.name for p in run.glob("*.png")} == {
        "samples.png", "samples_conditions.png", "preview.png", "loss.png", "reconstructions.png",
    }  # fmt: skip
    found = json.loads((run / "evaluation.json").read_text())
    assert {"psnr_40_held_out", "kernel_pixels_40_train"} < found.keys() and len(found) == 3
    assert found["psnr_40_held_out"]["used"] <= 12 and found["psnr_40_held_out"]["sampler"] is None
    line = [line for line in read_metrics(run) if line["split"] == "held_out"][-1]
    assert {"loss_squared", "loss_commitment", "loss_perplexity"} < line.keys()

    kept, averages = weights(run, 8), weights(run, 8, "ema")
    assert "codebook.m" in kept
    go_on(run)
    assert made(call, tmp_path / "a", CODES, lines, "task.revive=3") == run
    assert same(weights(run, 8), kept) and same(weights(run, 8, "ema"), averages) and status(run)["state"] == "DONE"


@pytest.mark.slow
def test_a_prior_is_trained_on_codes_and_drawn_from_without_the_run_that_made_them(call, codec, tmp_path):  # noqa: F811
    lines = 'evaluation=["metric=[codes,kernel,recognition] n=40 features=pixels"]'
    run = made(call, tmp_path / "a", PRIOR, f"init_codec={codec}", lines)
    assert {p.name for p in run.glob("*.png")} == {"samples.png", "preview.png", "loss.png", "codes.png"}
    found = json.loads((run / "evaluation.json").read_text())
    assert found["bits_per_code_40_held_out"]["share"] > 0 and len(found) == 3
    kept = weights(run, 8)
    go_on(run)
    assert made(call, tmp_path / "a", PRIOR, f"init_codec={codec}", lines) == run and same(weights(run, 8), kept)
    assert "is done already" in call(cli.train, *PRIOR, f"runs={tmp_path / 'a'}", f"init_codec={codec}", lines).out
    longer = call(cli.train, f"extend={run}", "trainer.steps=10", f"runs={tmp_path / 'longer'}")
    assert longer.code == 0, longer

    shutil.rmtree(codec)  # what decodes lies in the run
    for name, asked in (("all", []), ("threes", ["class=3"]), ("cold", ["temperature=0"])):
        result = call(cli.sample, f"run={run}", "n=12", f"out={tmp_path / name}.npy", *asked)
        assert result.code == 0 and "codes drawn one by one" in result.out, result
    every, threes, cold = (np.load(tmp_path / f"{name}.npy") for name in ("all", "threes", "cold"))
    assert every.shape == (12, 8, 8, 1) and np.array_equal(every[3], threes[3])
    assert not np.array_equal(every, cold) and np.array_equal(cold[0], cold[10])
    assert call(cli.sample, f"run={run}", "n=4", "temperature=0.5").code == 0
    assert (run / "samples_step8_ema_temperature0.5_seed0.png").exists()
    assert call(cli.evaluate, f"run={run}", "metric=kernel", "n=40", "features=pixels", "temperature=0.5").code == 0
    assert "kernel_pixels_40_train_temperature0.5" in json.loads((run / "evaluation.json").read_text())
    for words, told in [
        (["temperature=-1"], "temperature=-1 must be a number >= 0"),
        (["class=none"], "never trained without its classes"),
        (["between=[0,1]"], "between interpolates codings"),
        (["process=5"], "need a sampler that walks"),
    ]:
        assert_refused(call(cli.sample, f"run={run}", *words), told)
    state = json.loads((run / "codec" / "codec.json").read_text())
    (run / "codec" / "codec.json").write_text(json.dumps(state | {"sha256": "0" * 64}))
    assert_refused(call(cli.sample, f"run={run}", "n=1"), "its weights have changed since training")


@pytest.mark.slow
def test_what_cannot_be_is_refused_before_anything_is_begun(call, codec, tmp_path):  # noqa: F811
    of_codec = [
        (["model.image_size=7"], "7 is not divisible by 4; nearest legal sizes: 4, 8"),
        (["model.codes=0"], "codes = 0"),
        (["task.parts.commitment=-1"], "parts.commitment = -1"),
        (["task.revive=-2"], "revive = -2"),
        (["model.update=gradient", "task.parts.codebook=0"], "trains no codebook"),
        (["model.update=magic"], "allowed: gradient, average"),
        (["data=swiss_roll"], "data"),
        (["+sampler=ddim"], "draws no samples by a sampler"),
        (['evaluation=["metric=elbo"]'], "metric=elbo does not apply to this run"),
    ]
    of_prior = [
        ([], "init_codec must be given: init_codec=..."),
        ([f"init_codec={tmp_path / 'nowhere'}"], "nowhere"),
        ([f"init_codec={codec}", "data.image_size=16"], "the codec was trained on images (C, H, W) = (1, 8, 8)"),
        ([f"init_codec={codec}", "data.flip=true"], "set data.flip=false"),
        ([f"init_codec={codec}", "model.codes=7"], "model.codes = 7, but the codec has 12"),
        ([f"init_codec={codec}", "model.num_classes=3"], "but the data have 10 classes"),
        ([f"init_codec={codec}", "augment=script"], "augment changes pictures"),
        ([f"init_codec={codec}", 'evaluation=["metric=bits_per_dim"]'], "does not apply to this run"),
    ]
    for words, several in ((CODES, of_codec), (PRIOR, of_prior)):
        for changes, told in several:
            assert_refused(call(cli.train, *words, f"runs={tmp_path / 'runs'}", *changes), told)
    of_latents = ["experiment=latent_diffusion", *OF_BOTH, f"init_codec={codec}", f"runs={tmp_path / 'runs'}"]
    told = "makes codes, and this run is trained on latents; take a run of experiment=autoencoder_kl"
    assert_refused(call(cli.train, *of_latents), told)
    assert not (tmp_path / "runs" / "default").exists()


@pytest.mark.slow
def test_a_run_that_is_no_codec_is_refused(call, tmp_path):  # noqa: F811
    words = ["experiment=vae", "data=digits", "model.channels=8", "model.groups=4", "trainer.seconds=null"]
    other = [*words, "trainer.steps=1", "trainer.batch_size=4", "trainer.previews=0", "device=cpu"]
    run = made(call, tmp_path / "vae", other)
    result = call(cli.train, *PRIOR, f"init_codec={run}", f"runs={tmp_path / 'runs'}")
    assert_refused(result, "VAE trained no codec; train one with experiment=vqvae")
    assert torch.is_tensor(next(iter(weights(run, 1).values())))
