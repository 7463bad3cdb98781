"""experiment=subject through the commands: a subject is taught in three ways, resumed, drawn from and refused."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from test_cli import assert_refused, call, run_of, same, status, typed, weights  # noqa: F401
from test_codes_cli import OF_BOTH, go_on, made
from test_words_cli import SCENES

from ddpm import cli
from ddpm.commands.load import split_step
from ddpm.study.formatting import amount

SUBJECT = [
    "experiment=subject", "data.count=3", "data.views=3", "subject.beside=4", "subject.steps=2", "trainer.steps=8",
    "trainer.batch_size=4", "trainer.checkpoint_every=4", "trainer.previews=0", "sampler.steps=3", "device=cpu",
]  # fmt: skip
PUT_IN = (".lora_A", ".lora_B", ".added")


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    words = [*SCENES, f"data.root={folder / 'data'}", f"runs={folder}"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["ddpm-train", *words])
        cli.train()
    return run_of(folder)


def test_a_checkpoint_is_named_behind_its_run(tmp_path):
    names: dict[str, tuple[str, str | int]] = {"a": ("a", "last"), "a@5": ("a", 5), "a@best": ("a", "best")}
    names |= {"b@c@last": ("b@c", "last"), "a@b": ("a@b", "last")}
    assert {named: split_step(named) for named in names} == names
    (tmp_path / "a@5").mkdir()
    assert split_step(f"{tmp_path}/a@5") == (f"{tmp_path}/a@5", "last")  # a folder of that name


@pytest.mark.slow
@pytest.mark.parametrize("tuning", ["full", "lora", "token"])
def test_a_subject_is_taught_resumed_and_drawn_from_the_run_alone(call, base, tmp_path, tuning):  # noqa: F811
    init, step = tmp_path / "init", 4 if tuning == "lora" else 8
    shutil.copytree(base, init)
    at = "@4" if tuning == "lora" else ""
    words = [*SUBJECT, f"tuning={tuning}", f"init={init}{at}", *(["adapter.rank=2"] if tuning == "lora" else [])]
    result = call(cli.train, *words, f"runs={tmp_path / 'a'}")
    assert result.code == 0, result
    run, before = run_of(tmp_path / "a"), load_file(init / "checkpoints" / str(step) / "ema.safetensors")
    kept = weights(run, 8)
    changed = {name for name, x in kept.items() if name not in before or not torch.equal(x, before[name])}
    if tuning == "full":
        assert len(changed) > 20 and kept.keys() == before.keys()
    else:  # what the run knew is there to the bit
        assert changed == {name for name in kept if name.endswith(PUT_IN)} and before.keys() < kept.keys()
    assert len(list((tmp_path / "a" / "beside").glob("*"))) == 1  # what was drawn of the class
    go_on(run)
    assert made(call, tmp_path / "a", words) == run and status(run)["state"] == "DONE"
    assert same(weights(run, 8), kept)
    shutil.rmtree(init)

    def drawn(prompt: str) -> np.ndarray:
        out = tmp_path / "drawn.npy"
        asked = ["n=2", "sampler.steps=3", f"out={out}", f"prompt={prompt}"]
        found = call(cli.sample, f"run={run}", *asked)
        assert found.code == 0, found
        return np.load(out).astype(int)

    assert not np.array_equal(drawn("a small sks sphere"), drawn("a small red sphere"))
    measured = call(cli.evaluate, f"run={run}", "metric=kernel", "features=pixels", "n=3", "sampler.steps=2")
    assert measured.code == 0 and "is not what was trained on" not in measured.out + measured.err
    reading = ["metric=subject", "scenes.count=40", "scenes.epochs=1", "n=3", "sampler.steps=2"]
    compared = call(cli.evaluate, f"run={run}", *reading)
    assert compared.code == 0, compared
    noted = [name for name in json.loads((run / "evaluation.json").read_text()) if name.startswith("subject_reader-")]
    assert len(noted) == 1 and "subject.png: the subject's pictures; then for each held-out caption" in compared.out
    with Image.open(run / "subject.png") as picture:  # a row of three pictures and two left white, three rows of views
        assert picture.width > picture.height > 0.6 * picture.width


@pytest.fixture(scope="module")
def base_of_others(tmp_path_factory) -> Path:
    """A run whose latents and whose encoder of texts are those of two others."""
    folder, steps = tmp_path_factory.mktemp("others"), [word for word in OF_BOTH if word != "data=digits"]
    data = [f"data.root={folder / 'data'}", "data=scenes", "data.count=40", "data.image_size=16"]
    small = ["model.channels=8", "model.groups=4", "trainer.previews=0"]
    reading = ["text.channels=8", "text.heads=2", "text.layers=1", "model.channel_mults=[1]", "model.features=8"]
    codec = ["experiment=autoencoder_kl", "discriminator.channels=8", "model.patch=1"]
    words = ["experiment=text_scenes_latent", "model.attention_resolutions=[8]", "model.heads=2", "schedule.T=10"]
    froms = ["init_text={text}", "init_codec={codec}", "sampler.steps=3"]
    found: dict[str, Path] = {}
    with pytest.MonkeyPatch.context() as patch:
        for name, own in (
            ("codec", codec),
            ("text", ["experiment=contrastive_scenes", "model.patch=1", *reading]),
            ("base", [*words, *froms]),
        ):
            given = [word.format(**found) for word in own]
            patch.setattr("sys.argv", ["ddpm-train", *given, *steps, *small, *data, f"runs={folder / name}"])
            cli.train()
            found[name] = run_of(folder / name)
    for name in ("codec", "text"):  # of which the run has its own
        shutil.rmtree(found[name])
    return found["base"]


@pytest.mark.slow
@pytest.mark.parametrize("tuning", ["full", "lora", "token"])
def test_what_a_run_has_of_others_stays_as_it_is_when_it_is_tuned(call, base_of_others, tmp_path, tuning):  # noqa: F811
    init = base_of_others
    words = [*SUBJECT, f"tuning={tuning}", f"init={init}", *(["adapter.rank=2"] if tuning == "lora" else [])]
    result = call(cli.train, *words, "subject.like=sphere", f"runs={tmp_path / 'a'}")
    assert result.code == 0, result
    run, before = run_of(tmp_path / "a"), load_file(init / "checkpoints" / "8" / "ema.safetensors")
    kept = weights(run, 8)
    changed = {name for name, x in kept.items() if name not in before or not torch.equal(x, before[name])}
    of_text = {name for name in changed if name.startswith("text.")}
    if tuning == "full":
        assert len(changed) > 20 and not of_text
    else:
        assert changed == {name for name in kept if name.endswith(PUT_IN)} and before.keys() < kept.keys()
        assert of_text == ({"text.token_embedding.added"} if tuning == "token" else set())
    assert (run / "text").is_dir() == (tuning == "full")
    ours, theirs = (json.loads((of / "codec" / "codec.json").read_text()) for of in (run, init))
    assert ours == theirs  # the scale of latents, too
    go_on(run)
    assert made(call, tmp_path / "a", [*words, "subject.like=sphere"]) == run and same(weights(run, 8), kept)
    out = tmp_path / "drawn.npy"
    asked = ["n=2", "sampler.steps=3", f"out={out}", "prompt=a small sks sphere"]
    found = call(cli.sample, f"run={run}", *asked)
    assert found.code == 0 and np.load(out).shape == (2, 16, 16, 3), found
    measured = call(
        cli.evaluate, f"run={run}", "metric=[kernel,loss_by_snr]", "features=pixels", "n=3", "sampler.steps=2"
    )
    assert measured.code == 0 and "is not what was trained on" not in measured.out + measured.err, measured
    if tuning == "full":
        longer = call(cli.train, f"extend={run}", "trainer.steps=10", "device=cpu")
        assert longer.code == 0, longer


@pytest.mark.slow
def test_a_check_draws_no_pictures_of_the_class(call, base, tmp_path):  # noqa: F811
    runs = f"runs={tmp_path / 'runs'}"
    told = call(cli.train, "--check", *SUBJECT, f"init={base}", runs)
    assert told.code == 0 and not (tmp_path / "runs").exists()
    assert "new; its name is known once" in told.out and "drawn the pictures of the class" in told.out


@pytest.mark.slow
def test_a_plan_draws_no_pictures_of_the_class_and_counts_the_network_of_the_run(call, base, tmp_path):  # noqa: F811
    sweep = [*SUBJECT, f"init={base}", "tuning=full,lora,token", f"runs={tmp_path / 'runs'}"]
    told = call(cli.study, "plan", *sweep)
    assert told.code == 0 and not (tmp_path / "runs").exists(), told
    own = sum(x.numel() for x in weights(base, 8).values())
    row = next(line for line in told.out.splitlines() if line.startswith("tuning=full") or line.startswith("full"))
    assert amount(own) in row and told.out.count("1 new") == 3
    done = call(cli.train, *SUBJECT, f"init={base}", "tuning=full", f"runs={tmp_path / 'runs'}")
    assert done.code == 0
    assert "1 DONE" in call(cli.study, "plan", *SUBJECT, f"init={base}", "tuning=full", f"runs={tmp_path / 'runs'}").out
    wrong = call(cli.study, "plan", *SUBJECT, f"init={base}", "tuning=full,token", "subject.word=red", "data.word=red")
    assert wrong.code == 0 and "refused (1): subject.word: 'red' is one token already" in wrong.out


@pytest.mark.slow
def test_what_cannot_be_taught_is_refused(call, base, tmp_path):  # noqa: F811
    for changes, said in (
        ([f"init_text={base}"], "init_text: a run that is tuned keeps its network"),
        ([f"+init_codec={base}"], "init_codec: a run that is tuned keeps its network"),
        ([f"init={base}@99"], "checkpoint 99 cannot be read"),
        (["subject.like=shpere", "tuning=token"], "subject.like=shpere is no word of the run, but "),
        (["subject.like=shpere", "tuning=token"], "such as sphere"),
        (["tuning=[full,lora]"], "sweep: -m tuning=full,lora"),
        (["init=nowhere"], "init=nowhere: a subject is taught to an existing run"),
        (["init=null"], "a subject is taught to an existing run; name one conditioned on words with init=RUN"),
        (["subject.word=red", "data.word=red", "tuning=token"], "subject.word: 'red' is one token already"),
        (["subject.word=zzz", "data.word=sks"], "subject.word=zzz: no caption of subject contains it; one caption is"),
        (["subject.of=dog"], "training captions of scenes name a dog; allowed: 0 to 0"),
        (["subject.of=cylindre"], "or another subject.of, perhaps cylinder"),
        (["+subject.foo=1"], "subject.foo is not known; allowed: word, like, of"),
        (["subject.beside=-1"], "subject.beside=-1 must be an integer >= 0"),
        (["subject.pictures=x"], "subject.pictures=x is not known; allowed: data, drawn"),
        (["subject.beside=0", "task.prior=2"], "task.prior = 2 weighs class pictures against those of a subject"),
        (["model.channels=16"], "model.channels: a run that is tuned keeps its network"),
        (["adapter.rank=99"], "adapter: rank = 99 is more than"),
        (["adapter.targets=[nope]"], "adapter: targets: no layer matches 'nope'"),
        (["subject=null"], "subject=None must hold settings"),
        (["subject.steps=99"], "subject.steps: steps = 99 is more than the schedule's T = 10"),
        (
            ["trainer.batch_size=1"],
            "trainer.batch_size = 1: in a batch each picture of the subject is paired with one of its class",
        ),
        (["tuning=token", "adapter.words=3"], "adapter.words=3: captions have one new word"),
        (["data.count=2"], "count=2 must be an integer in 3..10"),
    ):
        words = [word for word in SUBJECT if word.split("=")[0] not in {c.split("=")[0] for c in changes}]
        init = [] if any(c.startswith("init=") for c in changes) else [f"init={base}"]
        assert_refused(call(cli.train, *words, *init, f"runs={tmp_path / 'runs'}", *changes), said)
    assert not list((tmp_path / "runs").glob("*/*/checkpoints"))
