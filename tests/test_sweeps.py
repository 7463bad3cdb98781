"""Multiruns: what they start, what becomes of every arm, and that nothing is lost or done twice."""

import contextlib
import itertools
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import OFFLINE
from test_cli import TINY, assert_refused, run_of, status, typed, without_pictures, words  # noqa: F401

from ddpm import cli, config
from ddpm.commands.evaluate import evaluating
from ddpm.commands.train import training
from ddpm.config import InvalidInput, resolved
from ddpm.runs import checkpoint, device_slots
from ddpm.runs.directory import Run, read_metrics
from ddpm.study.formatting import amount
from ddpm.training.trainer import Trainer

REPOSITORY = Path(__file__).parents[1]
SCIENCE_FREE = [  # keys and words that name no other run
    "device=auto", "slots=3", "retry=true", "recognition=true", "question=why", "baseline=a",
    "evaluation=['metric=cost cost.steps=[2]']", "trainer.log_every=7", "trainer.checkpoint_every=3", "trainer.keep=9",
    "trainer.previews=1", "trainer.max_skipped=3", "model.checkpointing=true", "stack=seed",
]  # fmt: skip


def states(folder: Path) -> dict[str, str]:
    """Name of each run directory -> its state."""
    return {path.parent.name: Run(path.parent).status()["state"] for path in sorted(folder.glob("*/status.json"))}


@pytest.fixture(autouse=True)
def own_slots(tmp_path, monkeypatch):
    monkeypatch.setattr(device_slots.tempfile, "gettempdir", lambda: str(tmp_path))


# ------------------------------------------------------------------------------------------------------------ the jobs


def test_jobs_of_what_is_typed_and_of_what_a_configuration_sweeps():
    assert config.jobs("train", ["seed=1"], multirun=False) is None
    assert config.jobs("train", ["seed=1"], multirun=True) == [["seed=1"]]
    assert config.jobs("train", ["schedule=linear,cosine", "seed=0,1"], multirun=True) == [
        [f"schedule={name}", f"seed={seed}"] for name in ("linear", "cosine") for seed in (0, 1)
    ]
    found = config.jobs("train", ["experiment=study/targets", "hydra/launcher=basic"], multirun=False)
    assert found is not None and len(found) == 25
    assert found[0] == ["+ablation/target=eps", "seed=0", "experiment=study/targets"]
    assert {job[0] for job in found} == {f"+ablation/target={name}" for name in ablations("target")}


def test_what_is_interpolated_is_each_jobs_own():
    words_typed = ["data.image_size=8,16", "model.image_size=${data.image_size}"]
    found = config.jobs("train", words_typed, multirun=True)
    assert found is not None
    assert [resolved(config.compose("train", job))["model"]["image_size"] for job in found] == [8, 16]


def ablations(group: str) -> list[str]:
    return sorted(path.stem for path in (REPOSITORY / "conf" / "ablation" / group).glob("*.yaml"))


def test_what_is_typed_goes_before_what_a_study_sweeps():
    found = config.jobs("train", ["experiment=study/targets", "seed=7", "+ablation/target=v,x_0"], multirun=False)
    assert found is not None and [job[:2] for job in found] == [
        ["+ablation/target=v", "seed=7"],
        ["+ablation/target=x_0", "seed=7"],
    ]


def test_lists_and_globs_are_swept_over():
    found = config.jobs("train", ["model.attention_resolutions=[],[4],[8,4]"], multirun=True)
    assert found == [[f"model.attention_resolutions={value}"] for value in ("[]", "[4]", "[8,4]")]
    found = config.jobs("train", ["schedule=glob(*)"], multirun=True)
    assert found is not None and ["schedule=cosine"] in found and len(found) == 9


@pytest.mark.parametrize("words", [["seed=range("], ["nope=1,2"], ["schedule=linear,nope"]])
def test_a_sweep_that_does_not_compose_stops_before_its_first_job(words, typed, tmp_path):  # noqa: F811
    result = typed(cli.train, "-m", *TINY, f"runs={tmp_path / 'runs'}", *words)
    assert result.code == 2 and len(result.err.strip().splitlines()) == 1 and not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_no_word_that_changes_no_result_names_another_run(typed, tmp_path, without_pictures, monkeypatch):  # noqa: F811
    monkeypatch.setattr(training, "measure", lambda plan: None)
    assert typed(cli.train, *TINY, f"runs={tmp_path}").code == 0
    for word in SCIENCE_FREE:
        changed = [other for other in TINY if other.partition("=")[0] != word.partition("=")[0]]
        assert "is done already" in typed(cli.train, *changed, word, f"runs={tmp_path}").out, word
    assert typed(cli.train, *words("model.dropout=0.5"), f"runs={tmp_path}").code == 0
    assert len(states(tmp_path / "default")) == 2


@pytest.mark.slow
def test_a_run_keeps_the_words_that_were_typed_for_it(typed, tmp_path, without_pictures):  # noqa: F811
    sweep = [*words("trainer.log_every=${trainer.checkpoint_every}"), "seed=0,1", f"runs={tmp_path}"]
    assert typed(cli.train, "-m", *sweep).code == 0
    for path in (tmp_path / "default").glob("*/"):
        said = status(path)
        assert "seed=" + str(config.read_config(path / "config.yaml").seed) in said["overrides"]
        assert any("${" in word.replace("\\", "") for word in said["overrides"]) and said["job"] in (0, 1)


# ------------------------------------------------------------------------------------------------- what becomes of arms


@pytest.mark.slow
def test_wrong_arms_fail_with_their_reasons_the_others_run_and_the_report_says_so(
    typed,  # noqa: F811
    tmp_path,
    without_pictures,  # noqa: F811
    monkeypatch,
):
    """An attention placement that is not there, a loss that explodes, a step beyond the memory."""
    fit = training._fit

    def short_of_memory(plan: object, *arguments: object) -> object:
        if plan.config.model.channels == 16:
            raise torch.OutOfMemoryError("out of memory: tried to allocate 80 GB")
        return fit(plan, *arguments)

    monkeypatch.setattr(training, "_fit", short_of_memory)
    sweep = [
        "-m", *words("model.channels=8,16", "model.attention_resolutions=[],[3]"), "optimizer.lr=1e-3,1e30",
        "trainer.max_skipped=0", f"runs={tmp_path}", "study=wrong",
    ]  # fmt: skip
    result = typed(cli.train, *sweep)
    assert result.code == 1 and "7 runs are not done" in result.out
    found = [status(path) for path in sorted((tmp_path / "wrong").glob("*/"))]
    reasons = sorted(str(said["reason"]) for said in found if said["state"] == "FAILED")
    assert len(found) == 8 and len(reasons) == 7 and [said["state"] for said in found].count("DONE") == 1
    assert sum("attention_resolutions has 3" in reason for reason in reasons) == 4
    assert sum("OutOfMemoryError: out of memory" in reason for reason in reasons) == 2
    assert sum("not finite" in reason for reason in reasons) == 1
    last = result.out[result.out.index("7 runs are not done") :]
    assert "failed: model.channels=8 model.attention_resolutions=[3] optimizer.lr=0.001: model: attention" in last
    assert "data.validation" not in last  # all jobs say so

    assert typed(cli.study, "report", tmp_path / "wrong").code == 0
    for text in ((tmp_path / "wrong" / name).read_text() for name in ("report.md", "report.html")):
        for reason in ("has 3, which never occurs", "tried to allocate 80 GB", "not finite"):
            assert reason in text.replace("\\_", "_")
    result = typed(cli.study, "status", tmp_path / "wrong")
    assert result.code == 0 and "8 runs: 1 DONE, 7 FAILED" in result.out


@pytest.mark.slow
def test_what_failed_is_tried_again_only_when_asked(typed, tmp_path, without_pictures, monkeypatch):  # noqa: F811
    fit, broken = training._fit, [True]

    def breaks(plan: object, *arguments: object) -> object:
        if broken[0] and plan.config.seed == 1:
            raise OSError("the disk is not there")
        return fit(plan, *arguments)

    monkeypatch.setattr(training, "_fit", breaks)
    sweep = ["-m", *TINY, "seed=0,1", f"runs={tmp_path}"]
    assert typed(cli.train, *sweep).code == 1
    broken[0] = False
    result = typed(cli.train, *sweep)
    assert (
        result.code == 1 and "failed before (OSError: the disk is not there); retry=true tries it again" in result.out
    )
    assert sorted(states(tmp_path / "default").values()) == ["DONE", "FAILED"]
    result = typed(cli.train, *sweep, "retry=true")
    assert result.code == 0 and set(states(tmp_path / "default").values()) == {"DONE"}


@pytest.mark.slow
def test_a_study_tries_again_what_failed_and_goes_on_with_what_was_interrupted(
    typed,  # noqa: F811
    tmp_path,
    without_pictures,  # noqa: F811
    monkeypatch,
):
    fit, broken = training._fit, [True]

    def breaks(plan: object, *arguments: object) -> object:
        if broken[0] and plan.config.seed > 0:
            raise OSError("the disk is not there")
        return fit(plan, *arguments)

    monkeypatch.setattr(training, "_fit", breaks)
    assert typed(cli.train, "-m", *TINY, "seed=0,1,2", f"runs={tmp_path}").code == 1
    folder = tmp_path / "default"
    names = states(folder)
    assert_refused(
        typed(cli.study, "retry", folder, "model.channels=16"), "model.channels=16: a run is retried unchanged"
    )
    assert_refused(typed(cli.study, "retry", folder, "data.root"), "data.root: a run is retried unchanged")
    result = typed(cli.study, "retry", folder)
    assert result.code == 1 and "2 of 2 runs are not done" in result.out
    broken[0] = False
    run = next(Run(folder / name) for name, state in names.items() if state == "FAILED")
    run.write_status("RUNNING")  # and nobody holds it
    moved = tmp_path / "elsewhere"
    folder.rename(moved)
    result = typed(cli.study, "retry", moved, "device=cpu")
    assert result.code == 0 and states(moved) == dict.fromkeys(names, "DONE") and not folder.exists()
    typed_words = [word for name in names for word in status(moved / name)["overrides"]]
    assert sorted(word for word in typed_words if word.startswith("seed=")) == ["seed=0", "seed=1", "seed=2"]
    assert "nothing in" in typed(cli.study, "retry", moved).out


@pytest.mark.slow
def test_a_run_that_is_held_is_looked_at_again_in_the_end(typed, tmp_path, without_pictures):  # noqa: F811
    assert typed(cli.train, *words("seed=0"), f"runs={tmp_path}").code == 0
    held = Run(run_of(tmp_path))
    held.write_status("RUNNING", host="elsewhere", pid=4711)
    with held.locked():
        result = typed(cli.train, "-m", *TINY, "seed=0,1", f"runs={tmp_path}")
    assert result.code == 1 and "by process 4711 on elsewhere" in result.out
    assert "1 runs were locked by other processes: trying each once more" in result.out
    assert result.out.count("HELD") == 2
    assert sorted(states(tmp_path / "default").values()) == ["DONE", "INTERRUPTED"]


@pytest.mark.slow
def test_a_run_that_was_held_and_is_free_in_the_end_is_gone_on_with(
    typed,  # noqa: F811
    tmp_path,
    without_pictures,  # noqa: F811
    monkeypatch,
):
    assert typed(cli.train, *words("seed=0"), f"runs={tmp_path}").code == 0
    held = Run(run_of(tmp_path))
    held.write_status("RUNNING", host="elsewhere", pid=4711)
    with contextlib.ExitStack() as holding:
        holding.enter_context(held.locked())
        fit = training._fit

        def frees(plan: object, *arguments: object) -> object:
            holding.close()
            return fit(plan, *arguments)

        monkeypatch.setattr(training, "_fit", frees)
        result = typed(cli.train, "-m", *TINY, "seed=0,1", f"runs={tmp_path}")
    assert result.code == 0 and "once more" in result.out, result
    assert set(states(tmp_path / "default").values()) == {"DONE"}


@pytest.mark.slow
def test_the_next_arm_is_not_begun_after_a_signal(typed, tmp_path, without_pictures, monkeypatch):  # noqa: F811
    fit = training._fit

    def interrupted(plan: object, *arguments: object) -> object:
        os.kill(os.getpid(), signal.SIGTERM)
        return fit(plan, *arguments)

    monkeypatch.setattr(training, "_fit", interrupted)
    handler = signal.getsignal(signal.SIGTERM)
    result = typed(cli.train, "-m", *TINY, "seed=0,1", f"runs={tmp_path}")
    assert result.code == 143 and signal.getsignal(signal.SIGTERM) == handler
    assert list(states(tmp_path / "default")) == [] or list(states(tmp_path / "default").values()) != ["DONE", "DONE"]


@pytest.mark.slow
def test_a_signal_while_pictures_are_drawn_or_numbers_measured_is_told(typed, tmp_path, monkeypatch):  # noqa: F811
    def stop(*arguments: object) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    command = [*TINY, f"runs={tmp_path}", "evaluation=['metric=cost cost.steps=[2]']"]
    handler = signal.getsignal(signal.SIGTERM)
    draw = training._draw_results
    monkeypatch.setattr(training, "_draw_results", stop)
    result = typed(cli.train, *command)
    assert result.code == 143 and "interrupted by SIGTERM; the same command resumes from " in result.out
    said = status(run_of(tmp_path))
    assert said["state"] == "INTERRUPTED" and said["reason"] == "interrupted by SIGTERM"
    monkeypatch.setattr(training, "_draw_results", draw)
    monkeypatch.setattr(evaluating, "evaluate", stop)
    result = typed(cli.train, *command)
    assert result.code == 143 and "is trained, but measuring it was interrupted; the same command resumes" in result.out
    said = status(run_of(tmp_path))
    assert said["state"] == "DONE" and not said.get("evaluated") and signal.getsignal(signal.SIGTERM) == handler
    monkeypatch.setattr(evaluating, "evaluate", lambda config: None)
    assert typed(cli.study, "retry", tmp_path / "default").code == 0
    assert len(status(run_of(tmp_path))["evaluated"]) == 1


@pytest.mark.parametrize("word", ["+ablation/attntion=glob(*)", "seed=range(0)"])
def test_a_sweep_without_jobs_is_refused(word, typed, tmp_path):  # noqa: F811
    for command, first in ((cli.train, "-m"), (cli.study, "plan")):
        result = typed(command, first, *TINY, f"runs={tmp_path}", word)
        assert_refused(result, f"the sweep has no jobs: {word} expand to no value")


@pytest.mark.slow
def test_an_arm_that_lacks_a_value_is_listed_and_stops_no_other(typed, tmp_path, without_pictures):  # noqa: F811
    sweep = [*(word for word in TINY if not word.startswith("schedule.T")), "sampler.steps=2", "schedule=betas,cosine"]
    result = typed(cli.train, "-m", *sweep, f"runs={tmp_path}")
    assert result.code == 1 and result.out.rstrip().splitlines()[-2] == "1 run is not done:"
    assert "failed: schedule=betas: schedule.beta must be given" in result.out.splitlines()[-1]
    assert list(states(tmp_path / "default").values()) == ["DONE"]
    result = typed(cli.study, "plan", *sweep, f"runs={tmp_path}")
    assert result.code == 0 and "refused: schedule=betas: schedule.beta must be given" in result.out
    assert "1 run of 1 arm in" in result.out and "done already: 1" in result.out


@pytest.mark.slow
def test_a_run_that_became_done_while_its_arm_waited_is_left_alone(typed, tmp_path, without_pictures, monkeypatch):  # noqa: F811
    assert typed(cli.train, *TINY, f"runs={tmp_path}").code == 0
    said, seen = status(run_of(tmp_path)), []

    def at_first_new(run: Run) -> dict:
        seen.append(run.status() if seen else {})
        return seen[-1]

    monkeypatch.setattr(training, "status_of", at_first_new)
    result = typed(cli.train, *TINY, f"runs={tmp_path}")
    assert result.code == 0 and "is done already" in result.out and status(run_of(tmp_path)) == said


@pytest.mark.slow
def test_what_strangers_wrote_neither_steers_the_terminal_nor_takes_memory(typed, tmp_path, without_pictures):  # noqa: F811
    assert typed(cli.train, "-m", *TINY, "seed=0,1", f"runs={tmp_path}").code == 0
    folder = tmp_path / "default"
    for number, path in enumerate(sorted(folder.glob("*/"))):
        said = status(path) | {"state": "FAILED", "reason": f"\x1b]0;steered\x07 {number}"}
        said["overrides"] = [f"optimizer.lr=\x1b[2J{number}"]
        (path / "status.json").write_text(json.dumps(said))
    named = [f"{b}: &{b} [{','.join([f'*{a}'] * 9)}]" for a, b in itertools.pairwise("abcdefghi")]
    bomb = ["a: &a [x,x,x,x,x,x,x,x,x]", *named]
    (folder / "multirun.yaml").write_text("\n".join([*bomb, "hydra: {overrides: {task: [*i]}}"]))
    for verb in ("status", "report"):
        result = typed(cli.study, verb, folder)
        assert result.code == 0 and "\x1b" not in result.out + result.err, verb
    assert "\x1b" not in (folder / "report.md").read_text()
    path = next(folder.glob("*/"))
    (path / "status.json").write_text(json.dumps(status(path) | {"state": "\x1b[2J"}))
    assert "cannot be read" in typed(cli.study, "status", folder).out


# --------------------------------------------------------------------------------------------------------- measured


@pytest.mark.slow
def test_a_run_is_measured_at_its_end_by_each_line_once(typed, tmp_path, without_pictures, monkeypatch):  # noqa: F811
    measured = []
    monkeypatch.setattr(
        evaluating, "evaluate", lambda config: measured.append((config.run, list(config.metric), config.n))
    )
    line = "metric=[kernel,memorisation] n=9 sampler.steps=2"
    other = f"evaluation=['{line}','metric=[cost] cost.steps=[2]']"
    line = f"evaluation=['{line}']"
    sweep = ["-m", *TINY, "seed=0,1", f"runs={tmp_path}"]
    assert typed(cli.train, *sweep, line).code == 0
    runs = {str(path) for path in (tmp_path / "default").glob("*/")}
    assert {run for run, *_ in measured} == runs
    assert [rest for _, *rest in measured] == [[["kernel", "memorisation"], 9]] * 2
    assert typed(cli.train, *sweep, line).code == 0 and len(measured) == 2
    assert typed(cli.train, *sweep, other).code == 0 and [rest for _, *rest in measured[2:]] == [[["cost"], None]] * 2


def test_a_run_that_cannot_be_measured_is_done_all_the_same(typed, tmp_path, without_pictures):  # noqa: F811
    line = "metric=bits_per_dim n=2 checkpoint=3"  # which is not kept, but where time may end training, who knows
    result = typed(cli.train, *TINY, "trainer.seconds=600", f"runs={tmp_path}", f"evaluation=['{line}']")
    assert result.code == 1 and f"is trained, but not measured by {line}: " in result.out
    assert "checkpoint 3 cannot be read (there is none of that name); there: 2, 4" in result.out
    assert status(run_of(tmp_path))["state"] == "DONE"


@pytest.mark.parametrize(("every", "keep"), [(1, 2), (1, 9), (2, 1), (3, 2), (4, 1), (5, 3)])
def test_which_checkpoints_will_be_there_is_known_before(every, keep, typed, tmp_path, without_pictures):  # noqa: F811
    cadence = {"steps": 4, "checkpoint_every": every, "keep": keep}
    told = [f"trainer.{key}={value}" for key, value in cadence.items()]
    assert typed(cli.train, *TINY, *told, f"runs={tmp_path}").code == 0
    checkpoints, trainer = run_of(tmp_path) / "checkpoints", Trainer(**cadence, seconds=None)
    kept = {step for step in range(9) if trainer.keeps(step, 1000)}
    assert set(checkpoint.steps(checkpoints)) == kept | {checkpoint.best(checkpoints)}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("metric=frechet n=2 sampler.steps=2", "n = 2 samples are too few for the covariance of 64 features"),
        ("metric=kernel", "steps = 50 is more than the schedule's T = 10"),
        ("metric=cost cost.samplers=[nope]", "nope"),
        ("metric=bits_per_dim n=1000", "n = 1000"),
        ("metric=steps", "steps, ddim: steps = 20 is more than the schedule's T = 10"),
        ("metric=recognition recogniser=nope", "recogniser=nope is not known; allowed: auto, classifier, logistic"),
        ("metric=kernel sampler.steps=2 features=pca pca=65", "pca = 65: components of"),
        ("metric=kernel sampler.steps=2 features=inception inception.weights=nowhere.pth", "features=inception: "),
        ("metric=kernel sampler.steps=2 data.root=nowhere", "data.root"),
        ("metric=loss_by_snr checkpoint=3", "checkpoint=3 will not exist when training ends"),
        ("metric=loss_by_snr checkpoint=first", "checkpoint=first must be an integer >= 1"),
        ("metric=loss_by_snr weights=none", "weights=none is not known; allowed: ema, raw"),
        ("metric=loss_by_snr device=tpu", "tpu"),
    ],
)
def test_what_could_not_be_measured_is_refused_before_anything_is_trained(line, told, typed, tmp_path):  # noqa: F811
    result = typed(cli.train, *TINY, f"runs={tmp_path / 'runs'}", f"evaluation=['metric=loss_by_snr','{line}']")
    assert_refused(result, f"evaluation, {line}: ")
    assert told in result.err and not (tmp_path / "runs").exists()
    result = typed(cli.study, "plan", *TINY, f"runs={tmp_path / 'runs'}", f"evaluation=['{line}']")
    assert "refused (1)" in result.out and told in result.out


@pytest.mark.slow
def test_that_it_is_going_to_be_measured_changes_no_run(typed, tmp_path, without_pictures, monkeypatch):  # noqa: F811
    monkeypatch.setattr(evaluating, "evaluate", lambda config: None)
    lines = "['metric=[kernel,recognition] recogniser=classifier sampler.steps=2','metric=cost cost.steps=[2]']"
    for folder, added in (("plain", []), ("measured", [f"evaluation={lines}"])):
        typed_words = [*words("model.dropout=0.5"), *added, f"runs={tmp_path / folder}"]
        assert typed(cli.train, *typed_words).code == 0
    first, second = (run_of(tmp_path / folder) / "checkpoints" / "4" for folder in ("plain", "measured"))
    for name in ("model.safetensors", "ema.safetensors"):
        assert (first / name).read_bytes() == (second / name).read_bytes()


@pytest.mark.slow
def test_an_arm_that_was_refused_begins_as_soon_as_it_can(typed, tmp_path, without_pictures, monkeypatch):  # noqa: F811
    monkeypatch.setattr(evaluating, "evaluate", lambda config: None)
    sweep = ["-m", *words("schedule.T=2,10"), f"runs={tmp_path}"]
    result = typed(cli.train, *sweep, "evaluation=['metric=cost cost.steps=[5]']")
    assert result.code == 1 and "is more than the schedule's T = 2" in result.out
    assert sorted(states(tmp_path / "default").values()) == ["DONE", "FAILED"]
    assert typed(cli.train, *sweep, "evaluation=['metric=cost cost.steps=[2]']").code == 0
    assert set(states(tmp_path / "default").values()) == {"DONE"}


@pytest.mark.parametrize(
    ("word", "told"),
    [
        ("evaluation=metric", "evaluation=metric must be a list of lines"),
        ("evaluation=[3]", "evaluation=[3] must be a list of lines"),
        ("evaluation=['metrc=frechet']", "evaluation: "),
        ('evaluation=["metric=\'"]', "evaluation: No closing quotation"),
        (
            "evaluation=[\"n=$''{oc.env:HOME}\"]",
            "n=${oc.env:HOME} is not allowed here; allowed are KEY=VALUE",
        ),
        ("evaluation=['hydra.searchpath=[x]']", "evaluation: hydra.searchpath=[x] is not allowed here"),
        ("evaluation=['run=x']", "evaluation: run=x is not allowed here"),
        ("evaluation=['trust=[os.system]']", "evaluation: trust=[os.system] is not allowed here"),
        ("question=3", "question=3 must be text"),
        ("baseline=[a]", "baseline=['a'] must be text"),
        ("retry=1", "retry=1 must be true or false"),
    ],
)
def test_what_a_study_says_is_checked_before_anything_is_trained(word, told, typed, tmp_path):  # noqa: F811
    result = typed(cli.train, *TINY, f"runs={tmp_path / 'runs'}", word)
    assert_refused(result, told)
    assert not (tmp_path / "runs").exists()


# ---------------------------------------------------------------------------------------------------------- slots


def test_each_job_of_the_joblib_launcher_takes_a_slot_before_it_touches_the_device(monkeypatch):
    threads = torch.get_num_threads()
    settings = config.compose("train", ["slots=1"])
    with training._slot(settings) as device:  # another launcher: nothing is shared
        assert device == "auto"
    monkeypatch.setattr(training, "jobs_at_once", lambda: 2)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    try:
        with training._slot(settings) as first, training._slot(settings) as second:
            assert [first, second] == ["cuda:0", "cuda:1"]
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
        with training._slot(settings) as first, training._slot(settings) as second:
            assert [first, second] == ["cpu", "cpu"]
        with (
            pytest.raises(InvalidInput, match="slots=0 must be an integer >= 1"),
            training._slot(config.compose("train", ["slots=0"])),
        ):
            pass
    finally:
        torch.set_num_threads(threads)


# ------------------------------------------------------------------------------------------------ plan, by its command


@pytest.mark.slow
def test_a_plan_counts_what_each_arm_takes_and_begins_nothing(typed, tmp_path):  # noqa: F811
    sweep = [
        *words("model.attention_resolutions=[],[8]", "model.channels=8,16"),
        "seed=0,1",
        f"runs={tmp_path / 'runs'}",
    ]
    result = typed(cli.study, "plan", *sweep)
    assert result.code == 0 and not (tmp_path / "runs").exists()
    rows = {line.split("  ")[0]: line for line in result.out.splitlines() if line.startswith("attention_resolutions")}
    assert len(rows) == 4
    for name, row in rows.items():
        typed_words = name.replace("attention_resolutions", "model.attention_resolutions").replace(
            "channels", "model.channels"
        )
        arm = config.compose("train", [*words(*typed_words.split(", "))])
        parameters = sum(p.numel() for p in config.build(arm.model, "model").parameters())
        assert amount(parameters) in row and " 2 new" in row
    assert "8 runs of 4 arms" in result.out


def test_a_plan_merges_what_says_the_same_and_names_what_is_refused(typed, tmp_path):  # noqa: F811
    sweep = [*words("model.attention_resolutions=[],[5]"), "optimizer.lr=1e-3,0.001", f"runs={tmp_path / 'runs'}"]
    result = typed(cli.study, "plan", *sweep)
    assert result.code == 0
    assert "refused (1): model: attention_resolutions has 5, which never occurs" in result.out
    assert "2 more jobs have the same settings as others" in result.out and "1 are refused" in result.out


@pytest.mark.slow
def test_a_plan_knows_what_is_done(typed, tmp_path, without_pictures):  # noqa: F811
    assert typed(cli.train, *words("seed=0"), f"runs={tmp_path}").code == 0
    result = typed(cli.study, "plan", *TINY, "seed=0,1", f"runs={tmp_path}")
    assert "1 DONE, 1 new" in result.out and "done already: 1" in result.out


@pytest.mark.slow
def test_a_plan_of_data_that_are_not_at_hand(typed, tmp_path):  # noqa: F811
    result = typed(
        cli.study, "plan", "experiment=mnist", f"data.root={tmp_path}", "model.channels=32,64", "trainer.steps=10"
    )
    assert result.code == 0 and "the data are not available" in result.out and "703 k" in result.out


@pytest.mark.slow
def test_the_memory_of_a_plan_is_that_of_a_check(typed, tmp_path, monkeypatch):  # noqa: F811
    """Counted on the meta device, where nothing is computed, as on the CPU."""
    monkeypatch.setattr("models.kernels.available", lambda: False)  # which keep less
    sweep = [*words("model.channels=16", "trainer.batch_size=32"), f"runs={tmp_path / 'runs'}"]
    planned = typed(cli.study, "plan", *sweep).out.splitlines()[1]
    checked = typed(cli.train, "--check", *sweep).out
    (of_plan,) = re.findall(r"([\d.]+) MB", planned)
    (of_check,) = re.findall(r"memory\s+([\d.]+) MB", checked)
    assert float(of_plan) == pytest.approx(float(of_check), rel=0.02)


@pytest.mark.parametrize(
    ("typed_words", "told"),
    [
        (["nope"], "nope is not known; allowed: plan, status, retry, report, lr-range, optimise"),
        (["plan", "--x"], "--x: there are no options"),
        (["plan", "model.chanels=3"], "model.chanels is no key"),
        (["plan", "seed=range("], "range("),
        (["status"], "the folder of a study is missing"),
        (["status", "nowhere"], "nowhere holds no runs"),
        (["retry", "nowhere"], "nowhere holds no runs"),
        (["report", "nowhere"], "nowhere holds no runs"),
    ],
)
def test_wrong_words_to_a_study(typed_words, told, typed, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.chdir(tmp_path)
    assert_refused(typed(cli.study, *typed_words), told)
    assert list(tmp_path.iterdir()) == []


def test_help(typed):  # noqa: F811
    for word in ([], ["--help"], ["-h"]):
        result = typed(cli.study, *word)
        assert result.code == 0 and all(verb in result.out for verb in cli.VERBS)


# ------------------------------------------------------------------------------------------ launchers, kills: processes


ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([OFFLINE, str(REPOSITORY)])}
SWEEP = [*words("trainer.steps=30", "trainer.checkpoint_every=5", "model.channels=8,16"), "seed=0,1"]


def command(*typed_words: str) -> list[str]:
    return [sys.executable, str(REPOSITORY / "experiments" / "train.py"), "-m", *typed_words]


def run(tmp_path: Path, *typed_words: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        command(*typed_words), cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, timeout=300
    )


LAUNCHERS = {
    "joblib": ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2"],
    "submitit": ["hydra/launcher=submitit_local", "hydra.launcher.timeout_min=5"],
}


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_under_another_launcher_a_failed_arm_stops_no_other_and_the_list_is_complete(
    launcher,
    typed,  # noqa: F811
    tmp_path,
    monkeypatch,
):
    pytest.importorskip(f"hydra_plugins.hydra_{launcher}_launcher")
    arms = words("model.groups=3,4", "trainer.steps=3", "schedule.T=4")
    result = run(tmp_path, *arms, "seed=0,1", *LAUNCHERS[launcher])
    assert result.returncode == 1, result.stderr
    assert sorted(states(tmp_path / "runs" / "default").values()) == ["DONE", "DONE", "FAILED", "FAILED"]
    last = result.stdout[result.stdout.index("2 runs are not done") :]
    assert all(f"failed: model.groups=3 seed={seed}: model: groups = 3 does not divide" in last for seed in (0, 1))
    monkeypatch.chdir(tmp_path)
    basic = typed(cli.train, "-m", *words("trainer.steps=3", "schedule.T=4"), "seed=0,1")  # the same runs
    assert basic.code == 0 and basic.out.count("is done already") == 2


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_under_joblib_a_signal_leaves_checkpoints_and_nothing_that_runs(number, tmp_path):
    """SIGINT comes to all processes of a terminal, SIGTERM to the one that was started."""
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    process = endless(tmp_path, "seed=0,1,2")
    folder = tmp_path / "runs" / "default"
    try:
        wait_for(lambda: sum(len(read_metrics(path.parent)) > 2 for path in folder.glob("*/metrics.jsonl")) == 2)
        (os.killpg if number == signal.SIGINT else os.kill)(process.pid, number)
        assert process.wait(60) == 128 + number, (tmp_path / "log").read_text()
        found = {path.parent: status(path.parent) for path in folder.glob("*/status.json")}
        assert len(found) == 2 and all(said["state"] == "INTERRUPTED" for said in found.values())
        assert all(checkpoint.last_whole(path / "checkpoints") is not None for path in found)
        assert "the same command resumes" in (tmp_path / "log").read_text()
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def wait_for(come: Callable[[], bool], seconds: float = 120) -> None:
    """Look now and then whether something has come; fails if it has not in that time."""
    end = time.monotonic() + seconds
    while not come():
        assert time.monotonic() < end
        time.sleep(0.1)


@pytest.mark.slow
def test_a_launcher_that_loses_a_process_says_so(tmp_path):
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    process = endless(tmp_path, "seed=0,1")
    folder = tmp_path / "runs" / "default"
    try:
        wait_for(lambda: any(len(read_metrics(path.parent)) > 2 for path in folder.glob("*/metrics.jsonl")))
        trained = [status(path.parent) for path in folder.glob("*/status.json")]
        os.kill(trained[0]["pid"], signal.SIGKILL)
        assert process.wait(60) == 1 and "the launcher lost a process" in (tmp_path / "log").read_text()
        assert set(states(folder).values()) == {"INTERRUPTED"}
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def endless(tmp_path: Path, seeds: str) -> subprocess.Popen:
    """A sweep of two runs at a time that do not end by themselves; what it says goes to a file."""
    arms = [*words("trainer.steps=100000", "trainer.checkpoint_every=1000000"), seeds, *LAUNCHERS["joblib"]]
    with open(tmp_path / "log", "w") as log:
        return subprocess.Popen(
            command(*arms), cwd=tmp_path, env=ENVIRONMENT, stdout=log, stderr=log, start_new_session=True
        )


def contents(folder: Path) -> dict[str, tuple]:
    """Run -> weights, averages and metrics, without the time they took."""
    found = {}
    for path in sorted(folder.glob("*/status.json")):
        newest = checkpoint.last_whole(path.parent / "checkpoints")
        assert newest is not None
        weights = tuple((newest / name).read_bytes() for name in ("model.safetensors", "ema.safetensors"))
        lines = [{k: v for k, v in line.items() if k != "seconds"} for line in read_metrics(path.parent)]
        found[path.parent.name] = (*weights, json.dumps(lines))
    return found


@pytest.mark.slow
def test_a_sweep_of_four_that_is_killed_three_times_is_the_one_that_is_not(tmp_path):
    started = time.monotonic()
    undisturbed = run(tmp_path, *SWEEP, "runs=undisturbed")
    took = time.monotonic() - started
    assert undisturbed.returncode == 0 and len(states(tmp_path / "undisturbed" / "default")) == 4, undisturbed.stderr
    chance, told = random.Random(0), []
    for kill in range(4):
        with open(tmp_path / f"{kill}.txt", "w") as log:
            process = subprocess.Popen(
                command(*SWEEP, "runs=killed"), cwd=tmp_path, env=ENVIRONMENT, stdout=log, stderr=subprocess.DEVNULL
            )
            if kill < 3:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(chance.uniform(0.1, 0.6) * took)
                process.kill()
            code = process.wait(300)
        told.append((tmp_path / f"{kill}.txt").read_text())
    assert code == 0
    found = states(tmp_path / "killed" / "default")
    assert len(found) == 4 and set(found.values()) == {"DONE"}
    ended = re.findall(r"done: killed/default/(\w+),", "".join(told))
    assert sorted(ended) == sorted(found), "each is trained to the end once"
    assert contents(tmp_path / "killed" / "default") == contents(tmp_path / "undisturbed" / "default")
