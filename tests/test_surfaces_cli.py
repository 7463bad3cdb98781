"""task=regression, and metric=depth and masks, through the commands: trained, drawn from, measured, refused."""

import json
from pathlib import Path

import numpy as np
import pytest
from test_cli import assert_refused, call, same, status, typed, weights  # noqa: F401
from test_codes_cli import OF_BOTH, go_on, made

from ddpm import cli
from ddpm.config import compose
from ddpm.runs.directory import read_metrics

NET = [
    "model.channels=4", "model.groups=2", "model.channel_mults=[1]", "model.attention_resolutions=[]", "model.blocks=1",
    "model.middle_attention=false",
]  # fmt: skip
SMALL = [*OF_BOTH, "data=scenes", "data.count=40", "data.image_size=8", *NET, "model.patch=1"]
DRAWN = ["schedule.T=10", "sampler.steps=3"]


@pytest.mark.parametrize("kind", ["depth", "masks"])
def test_the_recipes_have_the_channels_of_what_is_told(kind):
    of = {"depth": 1, "masks": 4}[kind]
    drawn = compose("train", [f"experiment=scenes_from_{kind}"])
    assert (drawn.data.condition, drawn.model.condition_channels) == (kind, of)
    read = compose("train", ["experiment=depth_of_scenes", f"data.condition={kind}"])
    assert (read.model.out_channels, read.model.condition_channels, read.model.in_channels) == (of, 0, 3)
    assert read.get("sampler") is None and read.get("diffusion") is None


def scored(run: Path) -> dict[str, dict]:
    return json.loads((run / "evaluation.json").read_text())


@pytest.mark.slow
def test_what_is_drawn_of_depths_is_read_by_a_run_of_regression(call, tmp_path):  # noqa: F811
    root = f"data.root={tmp_path / 'data'}"
    learn = ["experiment=depth_of_scenes", *SMALL, root]
    judge = made(call, tmp_path / "judge", learn)
    assert {p.name for p in judge.glob("*.png")} == {
        "samples.png", "samples_conditions.png", "preview.png", "loss.png", "predictions.png",
    }  # fmt: skip
    line = [line for line in read_metrics(judge) if line["split"] == "held_out"][-1]
    assert line["loss_error"] == pytest.approx(5.5 * line["loss_absolute"], rel=1e-4)
    kept = weights(judge, 8)
    go_on(judge)
    assert made(call, tmp_path / "judge", learn) == judge and same(weights(judge, 8), kept)
    out = tmp_path / "depths.npy"
    assert call(cli.sample, f"run={judge}", "n=5", f"out={out}").code == 0
    depths = np.load(out)
    assert depths.shape == (5, 8, 8, 3) and (depths == depths[..., :1]).all()
    assert_refused(call(cli.sample, f"run={judge}", "process=4"), "this run has none")
    assert_refused(
        call(cli.evaluate, f"run={judge}", "metric=frechet"), "metric=frechet does not apply to this run; allowed"
    )
    assert call(cli.evaluate, f"run={judge}", "metric=cost", "device=cpu").code == 0

    told = [*SMALL, root, *DRAWN]
    of_depth = made(call, tmp_path / "depth", ["experiment=scenes_from_depth", *told])
    asked = ["metric=depth", "n=4", "sampler.steps=2"]
    result = call(cli.evaluate, f"run={of_depth}", f"judge_run={judge}", *asked)
    assert result.code == 0 and "the floor" in result.out, result
    found = scored(of_depth)
    assert [name.partition("_judge-")[0] for name in found] == ["depth_error", "depth_correlation"]
    record = found[next(iter(found))]
    assert record["n"] == 4 and record["real_n"] == 4 and record["floor"] > 0 and record["value"] != record["floor"]
    assert (of_depth / "depth.png").stat().st_size > 0
    words = ["+tokenizer=byte_pairs", "+text=transformer", "text.channels=8", "text.heads=2", "text.layers=1"]
    with_words = ["model.attention_resolutions=[8]", "model.middle_attention=true", "model.heads=2", *words]
    both = made(call, tmp_path / "both", ["experiment=scenes_from_depth", *told, *with_words])
    assert {"conv_in.weight", "text.token_embedding.weight"} < weights(both, 8).keys()
    assert call(cli.evaluate, f"run={both}", f"judge_run={judge}@last", *asked).code == 0
    assert len(scored(both)) == 2

    for run, changes, said in (
        (of_depth, asked, "reads samples by a regression run: give judge_run=RUN"),
        (of_depth, [f"judge_run={of_depth}", *asked], "it does not predict the depth of pictures"),
        (of_depth, [f"judge_run={judge}", "metric=masks", "n=4"], "trained with data.condition=depth"),
        (
            of_depth,
            [f"judge_run={judge}", "metric=depth", "n=1", "sampler.steps=2"],
            "n = 1: metric=depth compares scenes",
        ),
        (judge, [f"judge_run={judge}", "metric=depth", "n=4"], "metric=depth does not apply to this run"),
    ):
        assert_refused(call(cli.evaluate, f"run={run}", *changes), said)


@pytest.mark.slow
def test_what_is_drawn_of_masks_is_read_too_and_no_network_is_given_what_it_cannot_learn(call, tmp_path):  # noqa: F811
    root = f"data.root={tmp_path / 'data'}"
    learn = ["experiment=depth_of_scenes", *SMALL, root, "data.condition=masks", "task.parts.squared=1"]
    judge = made(call, tmp_path / "judge", learn)
    run = made(call, tmp_path / "masks", ["experiment=scenes_from_masks", *SMALL, root, *DRAWN])
    words = ["metric=masks", "n=4", "sampler.steps=2", "seeds=2"]
    assert call(cli.evaluate, f"run={run}", f"judge_run={judge}", *words).code == 0
    (name, record), *others = scored(run).items()
    assert name.startswith("masks_overlap_judge-") and 0 <= record["value"] <= 1 and not others
    assert len(record["values"]) == 2 and (run / "masks.png").exists()
    for changes, said in (
        (["data.condition=null"], "data.condition=null needs the image that data.condition names"),
        (["data.condition=mask"], "holes are drawn by chance"),
        (["model.num_classes=3"], "takes nothing but the picture, not classes"),
        (["model.out_channels=1"], "set model.out_channels=4"),
        (["+task.parts.ssim=1"], "parts: 'ssim' is not known; allowed: squared, absolute, huber"),
    ):
        assert_refused(call(cli.train, *learn, f"runs={tmp_path / 'refused'}", *changes), said)
    assert not list((tmp_path / "refused").glob("*/*/checkpoints"))
