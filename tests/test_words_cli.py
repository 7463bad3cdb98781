"""experiment=text_scenes through the commands: trained, resumed, drawn from by prompts, measured, refused."""

import json
import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
from test_cli import assert_refused, call, run_of, same, status, typed, weights  # noqa: F401
from test_codes_cli import OF_BOTH, go_on, made

from ddpm import cli

SCENES = [
    *OF_BOTH, "experiment=text_scenes", "data=scenes", "data.count=40", "data.image_size=8", "model.channels=8",
    "model.groups=4", "model.patch=1", "model.channel_mults=[1]", "model.attention_resolutions=[8]", "model.heads=2",
    "text.channels=8", "text.heads=2", "text.layers=1", "schedule.T=10", "sampler.steps=3",
]  # fmt: skip


@pytest.mark.slow
def test_a_network_is_told_in_words_and_draws_what_is_asked_for(call, tmp_path):  # noqa: F811
    words = [
        *SCENES,
        f"data.root={tmp_path / 'data'}",
        'evaluation=["metric=[kernel,loss_by_snr] n=4 features=pixels sampler.steps=3"]',
    ]
    said = call(cli.train, *words, f"runs={tmp_path / 'a'}").out
    run = run_of(tmp_path / "a")
    assert {p.name for p in run.glob("*.png")} >= {"samples.png", "preview.png", "loss.png"}
    proposed = next(line for line in said.splitlines() if line.startswith("  a prompt"))
    assert re.search(r"'prompt=a \w+ \w+ \w+ \w+ .* out=prompt.png sampler.steps=10", proposed)
    assert call(cli.sample, *shlex.split(proposed)[4:], f"out={tmp_path / 'prompt.png'}").code == 0
    kept, tokenizer = weights(run, 8), (run / "tokenizer.json").read_bytes()
    assert "text.token_embedding.weight" in kept and "null_tokens" in kept
    go_on(run)
    assert made(call, tmp_path / "a", words) == run and status(run)["state"] == "DONE"
    assert same(weights(run, 8), kept) and (run / "tokenizer.json").read_bytes() == tokenizer

    def drawn(name: str, *asked: str) -> np.ndarray:
        out: Path = tmp_path / f"{name}.npy"
        result = call(cli.sample, f"run={run}", "n=3", "sampler.steps=3", f"out={out}", *asked)
        assert result.code == 0, result
        return np.load(out).astype(int)

    of_captions = drawn("captions")
    shutil.rmtree(tmp_path / "data")
    free = ["guidance=classifier_free", "guidance.w=4"]
    one = drawn("one", "prompt=a large shiny red cube left of a small matt blue sphere", *free)
    both = drawn("both", "prompt=[a large shiny red cube,a small matt white cone]", *free)
    without = drawn("without", "prompt=a large shiny red cube, (not) blue: it's", "negative=blue", *free)
    assert one.shape == both.shape == (3, 8, 8, 3)
    arrays = [of_captions, one, both, without]
    assert all(not np.array_equal(a, b) for i, a in enumerate(arrays) for b in arrays[:i])
    cut = call(
        cli.sample, f"run={run}", "n=1", "sampler.steps=1", f"out={tmp_path / 'cut.npy'}", f"prompt={'red ' * 40}"
    )
    assert cut.code == 0 and "fit between start and end; cut: 'red" in cut.out + cut.err
    for asked, said in (
        (["negative=[a,b]", "guidance=classifier_free"], "negative=['a', 'b'] must be one text"),
        (["prompt=x", "between=[0,1]"], "prompt= has no effect on between"),
        (["negative=blue"], "negative= is what guidance=classifier_free leads away from"),
        (["prompt=[]"], "prompt=[] must be a text, or a list of texts"),
        (["class=3"], "the network was trained without classes"),
    ):
        assert_refused(call(cli.sample, f"run={run}", "sampler.steps=3", *asked), said)
    (run / "tokenizer.json").write_text(json.dumps({"merges": [["a"]]}))
    assert_refused(call(cli.sample, f"run={run}", "sampler.steps=3", "prompt=x"), "merge 0 is ['a'], not two tokens")


@pytest.mark.slow
def test_words_are_refused_where_there_are_none(call, tmp_path):  # noqa: F811
    scenes = ("experiment=text_scenes", "data=scenes", "data.count=40", "data.image_size=8")
    digits = ["experiment=text_emoji", "data=digits", *(word for word in SCENES if word not in scenes)]
    assert_refused(call(cli.train, *digits, f"runs={tmp_path / 'runs'}"), "tokenizer: digits has no captions")
    unread = [word for word in SCENES if not word.startswith("text.")]
    result = call(cli.train, *unread, f"data.root={tmp_path}", f"runs={tmp_path / 'runs'}", "~text")
    assert_refused(result, "tokenizer: the network reads no words; add +text=transformer")
    for changes, said in (
        (["tokenizer.vocabulary=100"], "vocabulary = 100 has no room for all bytes; allowed: 514"),
        (["text.heads=3"], "heads = 3 does not divide the 8 channels"),
        (["text.vocabulary=530"], "text.vocabulary = 530, text.length = 32: the captions have"),
    ):
        result = call(cli.train, *SCENES, f"data.root={tmp_path}", f"runs={tmp_path / 'runs'}", *changes)
        assert_refused(result, said)
    assert not list((tmp_path / "runs").glob("*/*/checkpoints"))
