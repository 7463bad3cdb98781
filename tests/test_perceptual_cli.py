"""task.parts.perceptual through the commands: where the network comes from, what a run is called by it, refusals."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from test_cli import Call, assert_refused, call, run_of, same, save_pictures, status, typed, weights  # noqa: F401
from test_codes_cli import CODES, go_on, made
from test_latent_cli import CODEC, LATENT
from test_perceptual import published

from ddpm import cli
from ddpm.data import ImageData
from ddpm.latent.perceptual import Perceptual
from ddpm.metrics import quality
from ddpm.runs import checkpoint
from ddpm.runs.directory import read_metrics
from ddpm.training.task import checksum
from models.classifier import Classifier
from models.lpips import load_lpips

BY_JUDGE = ["perceptual=classifier", "perceptual.channels=4", "perceptual.features=8"]
ON = ["task.parts.perceptual=0.5", "task.start=0", *BY_JUDGE]


def frozen(run: Path, step: int = 8) -> dict[str, str]:
    return json.loads((run / "checkpoints" / str(step) / "manifest.json").read_text())["frozen"]


@pytest.fixture(scope="module")
def lpips(tmp_path_factory) -> Path:
    """Random weights as they are published, in two files of one folder."""
    folder, all_of_them = tmp_path_factory.mktemp("lpips"), published("alex")
    of_channels = {name: x for name, x in all_of_them.items() if name.startswith("lin")}
    torch.save({name: x for name, x in all_of_them.items() if name not in of_channels}, folder / "features.pth")
    save_file(of_channels, folder / "lin.safetensors")
    return folder


def by_lpips(folder: Path | str) -> list[str]:
    files = f"perceptual.files=[{folder}/features.pth,{folder}/lin.safetensors]"
    return ["task.parts.perceptual=0.5", "perceptual=lpips", "perceptual.kind=alex", files]


@pytest.mark.slow
def test_it_is_trained_by_goes_on_after_a_kill_and_nothing_else_needs_the_network(call, tmp_path):  # noqa: F811
    run = made(call, tmp_path / "a", CODEC, *ON)
    for split in ("train", "held_out"):
        line = [line for line in read_metrics(run) if line["split"] == split][-1]
        weighted = line["loss_absolute"] + 0.5 * line["loss_ssim"] + 0.5 * line["loss_perceptual"]
        weighted += 1e-6 * line["loss_kl"] + 0.5 * line.get("loss_adversarial", 0)
        assert line["loss_perceptual"] > 0 and line["loss"] == pytest.approx(weighted, rel=1e-4)
    (judge,) = (tmp_path / "a" / "judges").glob("*.safetensors")
    classifier = Classifier(8, 1, 10, channels=4, features=8)
    checkpoint.load_into(classifier, judge)
    assert frozen(run) == {"perceptual": checksum(Perceptual(classifier))}

    kept = [weights(run, 8, name) for name in ("model", "ema", "discriminator")]
    go_on(run)
    assert made(call, tmp_path / "a", CODEC, *ON) == run and status(run)["state"] == "DONE"
    assert all(same(weights(run, 8, n), k) for n, k in zip(("model", "ema", "discriminator"), kept, strict=True))
    shutil.rmtree(judge.parent)
    assert call(cli.sample, f"run={run}", "n=4", f"out={tmp_path / 'a.npy'}").code == 0
    assert call(cli.evaluate, f"run={run}", "metric=reconstruction", "n=20").code == 0
    assert call(cli.train, *LATENT, f"init_codec={run}", f"runs={tmp_path / 'b'}", "trainer.steps=1").code == 0
    assert not judge.parent.exists() and not (tmp_path / "b" / "judges").exists()


@pytest.mark.slow
@pytest.mark.parametrize("words", [CODES, ["experiment=vae", "model.channels=8", "data=digits", *CODES[-9:]]])
def test_other_autoencoders_have_it_too_and_one_judge_does_for_all(call, tmp_path, words):  # noqa: F811
    short = ["trainer.steps=2", "trainer.checkpoint_every=2"]
    one = call(cli.train, *words, f"runs={tmp_path}", *BY_JUDGE, *short, "task.parts.perceptual=1")
    two = call(cli.train, *words, f"runs={tmp_path}", *BY_JUDGE, *short, "task.parts.perceptual=2")
    assert one.code == two.code == 0 and "training the judge" in one.out and "training the judge" not in two.out
    runs = [path for path in (tmp_path / "default").iterdir() if path.is_dir()]
    assert len(runs) == 2 and len({str(frozen(run, 2)) for run in runs}) == 1
    assert all("loss_perceptual" in read_metrics(run)[-1] for run in runs)


@pytest.mark.slow
def test_published_weights_name_the_run_wherever_they_lie(call, tmp_path, lpips, monkeypatch):  # noqa: F811
    large = [*CODEC, "data.image_size=32", "trainer.steps=2", "trainer.checkpoint_every=1"]
    for folder in ("own", "moved"):
        shutil.copytree(lpips, tmp_path / folder)
    monkeypatch.chdir(tmp_path)
    run = made(call, tmp_path / "a", large, *by_lpips("own"))
    expected = checksum(Perceptual(*load_lpips("alex", [lpips / "features.pth", lpips / "lin.safetensors"])))
    assert frozen(run, 2) == {"perceptual": expected} and not (tmp_path / "a" / "judges").exists()
    assert "is done already" in call(cli.train, *large, f"runs={tmp_path / 'a'}", *by_lpips("moved")).out

    monkeypatch.chdir(run)
    longer = call(cli.train, f"extend={run}", "trainer.steps=3")  # which knows its files
    assert longer.code == 0, longer
    other = {name: torch.zeros_like(x) for name, x in published("alex").items() if name.startswith("lin")}
    save_file(other, tmp_path / "own" / "lin.safetensors")
    assert_refused(call(cli.train, f"extend={run}", "trainer.steps=4"), "trained with another perceptual")
    again = call(cli.train, *large, f"runs={tmp_path / 'a'}", *by_lpips(tmp_path / "own"))
    assert again.code == 0 and "is done already" not in again.out


@pytest.mark.slow
def test_looking_ahead_trains_no_judge_and_finds_what_is_done(call, typed, tmp_path):  # noqa: F811
    words = [*CODEC, f"runs={tmp_path}", "trainer.steps=2", *ON]
    checked = call(cli.train, "--check", *words)
    assert checked.code == 0 and "its name is known once the classifier" in checked.out, checked
    planned = typed(cli.study, "plan", *words, "model.latent_channels=1,2")
    assert planned.code == 0 and "2 runs of 2 arms" in planned.out and "latent_channels" in planned.out, planned
    assert not (tmp_path / "judges").exists() and not (tmp_path / "default").exists()
    run = made(call, tmp_path, CODEC, "trainer.steps=2", *ON)
    assert f"{run}: done (2 steps)" in call(cli.train, "--check", *words).out
    by_weight = [word for word in words if not word.startswith("task.parts.perceptual")]
    planned = typed(cli.study, "plan", *by_weight, "task.parts.perceptual=0,0.5,1")
    assert "3 runs of 3 arms" in planned.out and "done already: 1" in planned.out, planned
    rows = {row.split()[0]: row for row in planned.out.splitlines()[1:4]}
    assert set(rows) == {"perceptual=0", "perceptual=0.5", "perceptual=1"} and "DONE" in rows["perceptual=0.5"]


@pytest.mark.slow
def test_an_arm_of_a_sweep_that_is_refused_is_left_with_its_reason(typed, tmp_path):  # noqa: F811
    words = [*CODEC, "trainer.steps=1", "trainer.checkpoint_every=1", *ON]
    swept = typed(cli.train, "-m", *words, f"runs={tmp_path}", "model.groups=4,3")
    assert swept.code == 1, swept
    states = {status(path)["state"] for path in (tmp_path / "default").iterdir() if path.is_dir()}
    assert states == {"DONE", "FAILED"} and len(list((tmp_path / "judges").glob("*.safetensors"))) == 1


@pytest.mark.slow
def test_what_cannot_be_is_refused_before_anything_is_begun(call, tmp_path, lpips):  # noqa: F811
    save_pictures(tmp_path / "pictures", 6)
    unlabelled = ["data=folder", f"data.root={tmp_path / 'pictures'}", "data.image_size=8"]
    vae = ["experiment=vae", "task.parts.perceptual=1", "trainer.steps=1"]
    for words, told in [
        ([*CODEC, *unlabelled, "task.parts.perceptual=1"], "has no labels, by which the classifier is trained; give"),
        ([*CODEC, "task.parts.perceptual=-1"], "parts.perceptual = -1"),
        ([*CODEC, *ON, "task.parts.absolute=0", "task.parts.ssim=0"], "perceptual alone does not determine data"),
        ([*CODEC, *ON, "perceptual.channels=0"], "channels"),
        ([*CODEC, *ON, "trainer.batch_size=0"], "batch_size"),  # with nothing trained for it
        ([*CODEC, *ON, "perceptual._target_=models.unet.UNet"], "perceptual: _target_ 'models.unet.UNet'"),
        ([*CODEC, "perceptual=lpips"], "perceptual.files must be given"),
        ([*CODEC, "task.parts.perceptual=1", "perceptual=lpips", "perceptual.files=[nowhere.pth]"], "is no file"),
        ([*CODEC, *by_lpips(lpips)], "task.parts.perceptual: these features are of images"),
        ([*vae, "data=swiss_roll"], "data"),
        (["task.parts.perceptual=1"], "task.parts.perceptual"),
    ]:
        assert_refused(call(cli.train, *words, f"runs={tmp_path / 'runs'}"), told)
    assert not (tmp_path / "runs").exists()


def test_a_judge_needs_nothing_held_out(tmp_path, monkeypatch):
    """As it has to train an autoencoder of all the data."""
    monkeypatch.setattr(quality, "passes", lambda n: 1)
    images = torch.randint(256, (4, 1, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    data = ImageData("four", "all", images, torch.tensor([0, 1, 0, 1]), validation=0)
    torch.manual_seed(0)
    classifier = Classifier(8, 1, 2, channels=2, features=2)
    file = quality.trained_judge(data, classifier, tmp_path, "cpu", lambda words: None)
    other = Classifier(8, 1, 2, channels=2, features=2)
    checkpoint.load_into(other, file)
    assert same(classifier.state_dict(), other.state_dict()) and not classifier.training
