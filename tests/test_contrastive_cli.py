"""experiment=contrastive_* through the commands: trained, resumed, shared, refused, and what reads by its words."""

import json
import re
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
    lines = [root, "data.without=[red cube]", 'evaluation=["metric=retrieval"]']
    run = made(call, tmp_path / "a", PAIRS, *lines)
    measured = json.loads((run / "evaluation.json").read_text())
    names = {name.rpartition("_")[0] for name in measured}
    parts, counted = ("trained", "held_out", "composed"), ("first", "top5", "top10", "rank")
    assert names == {f"retrieval_{p}-{way}-{what}" for p in parts for way in ("name", "picture") for what in counted}
    assert all(record["sampler"] is None and record["chance"] > 0 for record in measured.values())
    kept = [weights(run, 8, name) for name in ("model", "ema")]
    assert {"text.token_embedding.weight", "project.weight", "log_scale"} <= kept[0].keys()
    go_on(run)
    assert made(call, tmp_path / "a", PAIRS, *lines) == run and status(run)["state"] == "DONE"
    assert all(same(weights(run, 8, name), before) for name, before in zip(("model", "ema"), kept, strict=True))
    assert_refused(call(cli.sample, f"run={run}"), "Contrastive draws no samples; metric=retrieval of ddpm-evaluate")
    assert_refused(
        call(cli.evaluate, f"run={run}", "metric=kernel"), "metric=kernel does not apply to this run; allowed: ret"
    )

    reading = [*TOLD, root, f"init_text={run}", "data.without=[red cube]"]
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
    raw = call(cli.train, "--check", *reading[:-2], f"init_text={run}@4", reading[-1], f"runs={tmp_path / 'b2'}")
    (name,) = re.findall(r"^run .*/(\w{12}): new", raw.out, re.M)
    assert told.name != name, "whose words they are is part of the name"

    asked = ["metric=retrieval", "n=3", "sampler.steps=2"]
    assert_refused(call(cli.evaluate, f"run={told}", *asked), "compares samples by another run: give judge_run=RUN")
    assert_refused(
        call(cli.evaluate, f"run={told}", *asked, f"judge_run={told}"), "Diffusion does not compare pictures"
    )
    result = call(cli.evaluate, f"run={told}", *asked, f"judge_run={run}")
    assert result.code == 0 and "the ceiling" in result.out and "by chance" in result.out, result
    drawn = [name for name in json.loads((told / "evaluation.json").read_text()) if name.startswith("retrieval")]
    assert len(drawn) == 8 and all(re.fullmatch(r"retrieval_\w+-drawn-\w+_contrastive-\w{6}_\d", n) for n in drawn)

    shutil.rmtree(run)
    out = tmp_path / "x.npy"
    result = call(cli.sample, f"run={told}", "n=2", "sampler.steps=3", "prompt=a red cube", f"out={out}")
    assert result.code == 0 and np.load(out).shape == (2, 8, 8, 3)
    again = made(call, tmp_path / "c", [*reading[:-2], f"init_text={told}", reading[-1]])
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
        (PAIRS, ["trainer.batch_size=1"], "trainer.batch_size = 1: in a batch a pair is compared with others"),
        (PAIRS, ["model.features=1"], "features = 1: in a space of one dimension"),
        (TOLD, [f"init_text={run}", "text.layers=3"], "text.layers=3: encoder and tokenizer come from init_text="),
        (TOLD, [f"init_text={run}", "task.only=['model.text.*']"], "task.only names parameters of the text encoder"),
        (TOLD, [f"init_text={tmp_path}"], "this is no run directory"),
        (digits, [f"init_text={run}"], "this run is not conditioned on words; take experiment=text_emoji"),
    ):
        of_data = [] if words is digits else [root]
        assert_refused(call(cli.train, *words, *of_data, f"runs={tmp_path / 'runs'}", *changes), said)
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_scenes_are_drawn_by_words_through_latents(call, tmp_path):  # noqa: F811
    root = [f"data.root={tmp_path / 'data'}", "data=scenes", "data.count=40", "data.image_size=16"]
    steps = [word for word in OF_BOTH if word != "data=digits"]
    small = ["model.channels=8", "model.groups=4", "model.patch=1"]
    codec = made(call, tmp_path / "a", ["experiment=autoencoder_kl", *steps, *small, "discriminator.channels=8", *root])
    words = ["experiment=text_scenes_latent", *steps, "model.channels=8", "model.groups=4", "model.heads=2", *root]
    words += ["model.attention_resolutions=[8]", "text.channels=8", "text.heads=2", "text.layers=1", "schedule.T=10"]
    words += [
        "sampler.steps=3",
        f"init_codec={codec}",
        'evaluation=["metric=kernel n=4 features=pixels sampler.steps=3"]',
    ]
    run = made(call, tmp_path / "b", words)
    assert {p.name for p in run.glob("*.png")} >= {"samples.png", "preview.png"} and (run / "codec").is_dir()
    kept = weights(run, 8)
    assert {"text.token_embedding.weight", "null_tokens"} < kept.keys() and kept["conv_in.weight"].shape[1] == 4
    go_on(run)
    assert made(call, tmp_path / "b", words) == run and same(weights(run, 8), kept)
    shutil.rmtree(codec)
    asked = ["metric=scenes", "n=2", "sampler.steps=2", "scenes.count=40", "scenes.epochs=1", "reader.channels=4"]
    result = call(cli.evaluate, f"run={run}", *asked)
    assert result.code == 0 and "of held-out pictures, the ceiling" in result.out, result
    assert any(name.startswith("scenes_composed") for name in json.loads((run / "evaluation.json").read_text()))
    drawn = []
    for number, prompt in enumerate(("a small red cube", "a large white cone")):
        out = tmp_path / f"{number}.npy"
        result = call(cli.sample, f"run={run}", "n=2", "sampler.steps=3", f"prompt={prompt}", f"out={out}")
        assert result.code == 0, result
        drawn.append(np.load(out))
    assert drawn[0].shape == (2, 16, 16, 3) and not np.array_equal(*drawn)


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
