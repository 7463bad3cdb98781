"""experiment=contrastive_* through the commands: trained, resumed, shared, refused, and what reads by its words."""

import json
import shutil

import numpy as np
import pytest
import torch
from test_cli import Call, assert_refused, call, same, status, typed, weights  # noqa: F401
from test_codes_cli import OF_BOTH, go_on, made
from test_ranks import ended, run_in, train
from test_words_cli import SCENES

from ddpm import cli
from ddpm.runs import checkpoint
from ddpm.runs.directory import read_metrics

OF_SCENES = ["data=scenes", "data.count=40", "data.image_size=8"]
PAIRS = [
    "experiment=contrastive_scenes", *OF_BOTH, *OF_SCENES, "model.channels=8", "model.groups=4", "model.patch=1",
    "model.channel_mults=[1]", "model.features=8", "text.channels=8", "text.heads=2", "text.layers=1",
]  # fmt: skip
TOLD = [word for word in SCENES if not word.startswith("text.")]


@pytest.mark.slow
def test_encoders_are_trained_resumed_and_read_the_prompts_of_another_run(call, tmp_path):  # noqa: F811
    root = f"data.root={tmp_path / 'data'}"
    run = made(call, tmp_path / "a", PAIRS, root)
    kept = [weights(run, 8, name) for name in ("model", "ema")]
    assert {"text.token_embedding.weight", "project.weight", "log_scale"} <= kept[0].keys()
    go_on(run)
    assert made(call, tmp_path / "a", PAIRS, root) == run and status(run)["state"] == "DONE"
    assert all(same(weights(run, 8, name), before) for name, before in zip(("model", "ema"), kept, strict=True))
    assert_refused(call(cli.sample, f"run={run}"), "Contrastive draws no samples; metric=retrieval of ddpm-evaluate")
    assert_refused(call(cli.evaluate, f"run={run}", "metric=kernel"), "metric=kernel is not of such a run; allowed: ret")

    reading = [*TOLD, root, f"init_text={run}"]
    told = made(call, tmp_path / "b", reading)
    ours = {name.removeprefix("text."): x for name, x in kept[1].items() if name.startswith("text.")}
    for file in ("model", "ema"):
        theirs = {k.removeprefix("text."): x for k, x in weights(told, 8, file).items() if k.startswith("text.")}
        assert same(theirs, ours), "taken along as it was averaged, and frozen"
    assert same(checkpoint.load_weights(told / "text" / "model.safetensors"), ours)
    assert (told / "tokenizer.json").read_bytes() == (run / "tokenizer.json").read_bytes()
    manifest = json.loads((told / "checkpoints" / "8" / "manifest.json").read_text())
    assert manifest["frozen"]["text"] == json.loads((told / "text" / "text.json").read_text())["sha256"]
    before = weights(told, 8)
    go_on(told)
    assert made(call, tmp_path / "b", reading) == told and same(weights(told, 8), before)
    alone = made(call, tmp_path / "b2", [*SCENES, root])
    raw = made(call, tmp_path / "b3", [*TOLD, root, f"init_text={run}@4"])
    assert len({told.name, alone.name, raw.name}) == 3, "whose words they are is part of the name"

    shutil.rmtree(run)
    out = tmp_path / "x.npy"
    result = call(cli.sample, f"run={told}", "n=2", "sampler.steps=3", "prompt=a red cube", f"out={out}")
    assert result.code == 0 and np.load(out).shape == (2, 8, 8, 3)
    again = made(call, tmp_path / "c", [*TOLD, root, f"init_text={told}"])
    assert again.name == told.name, "what a run keeps is as good as the run that made it"
    longer = call(cli.train, f"extend={told}", "trainer.steps=10", "device=cpu")
    assert longer.code == 0, longer
    (told / "text" / "text.json").write_text(json.dumps({"sha256": "0"}))
    refused = call(cli.train, *TOLD, root, f"init_text={told}", f"runs={tmp_path / 'd'}")
    assert_refused(refused, "text cannot be read")


@pytest.mark.slow
def test_what_cannot_be_is_refused_before_anything_is_begun(call, tmp_path):  # noqa: F811
    root = f"data.root={tmp_path / 'data'}"
    run = made(call, tmp_path / "a", PAIRS, root)
    digits = ["experiment=digits", *OF_BOTH]
    for words, changes, said in (
        (PAIRS, ["trainer.accumulate=2"], "the loss of Contrastive needs the whole batch at once"),
        (PAIRS, ["data=digits", "~data.count"], "digits has no captions"),
        (PAIRS, ["model.features=1"], "features = 1: in a space of one dimension"),
        (PAIRS, ["tokenizer=null"], "task=contrastive reads captions"),
        (TOLD, [f"init_text={run}", "text.layers=3"], "text.layers=3: encoder and tokenizer are those of init_text="),
        (TOLD, [f"init_text={run}", "task.only=['model.text.*']"], "task.only names parameters of the text encoder"),
        (TOLD, [f"init_text={tmp_path}"], "this is no run directory"),
        (digits, [f"init_text={run}"], "this run is told of no words; take experiment=text_emoji"),
    ):
        kept = [word for word in words if not (word.startswith("data") and "data=digits" in changes)]
        changes = [word for word in changes if word != "~data.count"]
        result = call(cli.train, *kept, root, f"runs={tmp_path / 'runs'}", *changes)
        assert_refused(result, said)
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_two_processes_compare_the_whole_batch_as_one_does(tmp_path):
    changed = ["experiment=contrastive_scenes", *OF_SCENES, f"data.root={tmp_path / 'data'}", "data.flip=false"]
    changed += ["model.patch=1", "model.channel_mults=[1]", "text.channels=8", "text.heads=2", "text.layers=1"]
    changed += ["trainer.accumulate=1", "trainer.batch_size=16", "trainer.previews=0"]
    for size in (1, 2):
        results = ended(train(size, *changed, f"runs={tmp_path / str(size)}", without=("sampler.", "schedule.")))
        assert [code for code, _, _ in results] == [0] * size, results
    one, two = (run_in(tmp_path / name) for name in "12")
    assert one.hash == two.hash
    a, b = (checkpoint.load_weights(run.checkpoints / "12" / "model.safetensors") for run in (one, two))
    for key in a:
        torch.testing.assert_close(a[key], b[key], rtol=0, atol=1e-4 * a[key].abs().max().item() + 1e-7)
    losses = [[line["loss"] for line in read_metrics(run.path)] for run in (one, two)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4) and losses[0][0] > 1, "of 16, and not of 8"

