"""experiment=vae and cvae through the commands: trained, resumed, drawn from, measured, and refused in one line."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from test_cli import Call, assert_refused, call, run_of, same, status, typed, weights  # noqa: F401

from ddpm import cli

SMALL = [
    "data=digits", "model.codings=2", "model.channels=8", "model.groups=4", "trainer.seconds=null", "trainer.steps=8",
    "trainer.batch_size=16", "trainer.previews=1", "trainer.checkpoint_every=4", "trainer.warmup=0", "trainer.keep=9",
    "device=cpu",
]  # fmt: skip


def made(call: Call, runs: Path, *changes: str) -> Path:  # noqa: F811
    result = call(cli.train, *SMALL, f"runs={runs}", *changes)
    assert result.code == 0, result
    return run_of(runs)


def test_a_run_leaves_pictures_and_measures_and_goes_on_after_a_kill(call, tmp_path):  # noqa: F811
    words = "metric=[elbo,log_likelihood,kernel,recognition] n=40 log_likelihood.draws=60 features=pixels"
    lines = f'evaluation=["{words}"]'
    run = made(call, tmp_path / "a", "experiment=vae", lines)
    assert {p.name for p in run.glob("*.png")} == {
        "samples.png", "preview.png", "loss.png", "latent_map.png", "reconstructions.png", "traversals.png",
        "interpolations.png",
    }  # fmt: skip
    found = json.loads((run / "evaluation.json").read_text())
    assert {"elbo_40_held_out", "nats_iwae_60_40_held_out"} < found.keys() and len(found) == 4
    bound, tighter = found["elbo_40_held_out"], found["nats_iwae_60_40_held_out"]
    assert bound["sampler"] is None and bound["value"] > tighter["value"] > 0 and bound["codings"] == 2

    kept = weights(run, 8)
    for name in ("5", "6", "7", "8"):
        shutil.rmtree(run / "checkpoints" / name, ignore_errors=True)
    known = json.loads((run / "status.json").read_text())
    (run / "status.json").write_text(json.dumps(known | {"state": "RUNNING", "evaluated": []}))
    assert made(call, tmp_path / "a", "experiment=vae", lines) == run
    assert same(weights(run, 8), kept) and status(run)["state"] == "DONE"


@pytest.mark.slow
def test_classes_are_told_and_asked_for(call, tmp_path):  # noqa: F811
    run = made(call, tmp_path / "runs", "experiment=cvae", "optimizer.lr=0.05")
    for name, asked in (("all", []), ("threes", ["class=3"])):
        result = call(cli.sample, f"run={run}", "n=12", f"out={tmp_path / name}.npy", *asked)
        assert result.code == 0 and "codings of the prior, decoded" in result.out
    every, threes = (np.load(tmp_path / f"{name}.npy") for name in ("all", "threes"))
    assert every.shape == (12, 8, 8, 1) and every.dtype == np.uint8
    assert np.array_equal(every[3], threes[3]) and not np.array_equal(every[4], threes[4])
    assert call(cli.sample, f"run={run}", "n=4").code == 0 and (run / "samples_step8_ema_seed0.png").exists()
    assert call(cli.sample, f"run={run}", "between=[0,5]", f"out={tmp_path / 'between.png'}").code == 0
    assert call(cli.sample, f"run={run}", "n=4", f"out={tmp_path / 'many'}/").code == 0
    assert len(list((tmp_path / "many").glob("*.png"))) == 4
    for words, told in [
        (["class=none"], "never trained without its classes"),
        (["class=11"], "class = 11: the network has the classes 0..9"),
        (["sampler.steps=10"], "draws no samples by a sampler; leave sampler out"),
        (["process=5"], "need a sampler that walks"),
        (["steps_strip=[1,2]"], "need a sampler that walks"),
        (["style=1"], "not conditioned on styles"),
        (["guidance=classifier_free", "guidance.w=2"], "leave guidance out"),
        (["out=a.gif"], "no path from noise to data"),
        (["weights=ema:0.05"], "only diffusion runs have such averages"),
    ]:
        assert_refused(call(cli.sample, f"run={run}", *words), told)
    few = ["augmentation.real=2", "augmentation.times=2", "augmentation.steps=2", "judge.channels=2", "n=20"]
    measured = call(cli.evaluate, f"run={run}", "metric=[latent_structure,augmentation]", *few)
    assert measured.code == 0 and {"latent_pca.png", "latent_tsne.png"} < {p.name for p in run.glob("*.png")}, measured
    found = json.loads((run / "evaluation.json").read_text())
    assert found["augmentation_2x2_20_held_out"]["labelled_by"] == "asked" and len(found) == 3
    pure, apart = (found[f"latent_{name}_20_held_out"] for name in ("purity-k10", "silhouette"))
    assert 0 < pure["chance"] < 1 and pure["codings"] == 2 and -1 < apart["value"] < 1 and pure["sampler"] is None
    edited = call(cli.edit, f"run={run}", "image=held_out:0", "strength=0.5")
    assert_refused(edited, "editing needs a sampler that walks from noise to images, and this has none")
    for words, told in [
        (["metric=steps"], "metric=steps does not apply to this run; allowed: recognition"),
        (["metric=loss_by_snr"], "metric=loss_by_snr does not apply to this run"),
        (["metric=log_likelihood", "log_likelihood.draws=0"], "draws=0 must be an integer >= 1"),
        (["metric=elbo", "n=5000"], "holds out"),
        (["metric=latent_structure", "n=10"], "n is at least 11"),
        (["metric=latent_structure", "class=3", "n=20"], "20 held-out images of 1 classes"),
        (["metric=augmentation", "augmentation.real=[1000]"], "are trained on; allowed: at most"),
    ]:
        assert_refused(call(cli.evaluate, f"run={run}", *words), told)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["task.parts.kl=-1"], "parts.kl = -1"),
        (["task.parts.gaussian=1"], "set one to 0"),
        (["task.parts.bernoulli=0"], "none compares with data"),
        (["+task.parts.nope=1"], "'nope' is not known; allowed: bernoulli"),
        (["model.patch=3"], "patch = 3 does not divide the image size 8x8"),
        (["model.channel_mults=[1,1,1,1]"], "allowed: at most 3 channel_mults"),
        (["model.num_classes=3"], "but the data have 10 classes"),
        (["data=swiss_roll"], "data"),
        (["+sampler=ddim"], "draws no samples by a sampler"),
        (['evaluation=["metric=bits_per_dim"]'], "metric=bits_per_dim does not apply to this run"),
        (["task.parts.ssim=1", 'evaluation=["metric=elbo"]'], "has no likelihood"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_begun(words, told, call, tmp_path):  # noqa: F811
    result = call(cli.train, "experiment=vae", *SMALL, f"runs={tmp_path / 'runs'}", *words)
    assert_refused(result, told)
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_points_have_the_linear_one(call, tmp_path):  # noqa: F811
    words = ["experiment=vae", "data=mixture", "model=linear_vae", "task.parts={bernoulli:0,gaussian:1,kl:1}"]
    words += ["trainer.seconds=null", "trainer.steps=4", "trainer.batch_size=16", "trainer.previews=0", "device=cpu"]
    result = call(cli.train, *words, f"runs={tmp_path}")
    assert result.code == 0, result
    run = run_of(tmp_path)
    assert (run / "samples.png").exists() and np.load(run / "samples.npy").shape[1:] == (2,)
    assert call(cli.evaluate, f"run={run}", "metric=[elbo,energy_distance]", "n=20").code == 0
