"""`ddpm-train task=progressive` and `task=consistency`: from a trained run to its students, and what is refused."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from omegaconf import OmegaConf
from test_cli import Call, assert_refused, call, losses, same, status, typed, weights, without_pictures, words  # noqa: F401
from test_edit_cli import made

from ddpm import cli
from ddpm.commands.load import sampler_of
from ddpm.config import compose, resolved
from ddpm.runs import checkpoint
from ddpm.samplers import DDIM, Consistency, Student


def begun(run: Path, changes: list[str]) -> Path:
    run.mkdir(parents=True)
    return made(run, changes)


@pytest.fixture
def teacher(tmp_path) -> Path:
    return begun(tmp_path / "runs" / "taught" / "teacher", words(f"runs={tmp_path / 'runs'}", "study=taught"))


def students(teacher: Path) -> dict[int, Path]:
    """Steps -> the run of the student."""
    found = [path.parent for path in teacher.parents[1].glob("default/*/config.yaml")]
    return {OmegaConf.load(run / "config.yaml").task.get("steps"): run for run in found}


def taught_by(teacher: Path) -> list[str]:
    return [f"teacher={teacher}", f"runs={teacher.parents[1]}"]


STAGES = ["task=progressive", "task.steps=[4,2,1]", "trainer.steps=3", "device=cpu"]


@pytest.mark.slow
def test_a_run_is_halved_stage_by_stage_each_a_run(call, teacher, without_pictures):  # noqa: F811
    command = (*STAGES, *taught_by(teacher))
    result = call(cli.train, *command)
    assert result.code == 0 and "warning" not in result.out + result.err
    runs = students(teacher)
    assert runs.keys() == {4, 2, 1} and all(status(run)["state"] == "DONE" for run in runs.values())
    of = {N: OmegaConf.load(run / "config.yaml") for N, run in runs.items()}
    assert of[4].teacher == f"{teacher}@2" and of[2].teacher == f"{runs[4]}@3" and of[1].teacher == f"{runs[2]}@3"
    assert all((one.sampler.steps, one.diffusion.loss) == (N, "simple") for N, one in of.items())
    for N, before in ((4, teacher), (2, runs[4]), (1, runs[2])):
        manifest = json.loads((runs[N] / "checkpoints" / "3" / "manifest.json").read_text())
        assert manifest["modules"] == ["model"] and manifest["frozen"].keys() == {"teacher"}
        first = checkpoint.load_weights(
            before / "checkpoints" / ("2" if before == teacher else "3") / "ema.safetensors"
        )
        assert not same(first, weights(runs[N], 3))

    kept, lines = weights(runs[2], 3), losses(runs[2])  # killed in the second stage
    shutil.rmtree(runs[1])
    shutil.rmtree(runs[2] / "checkpoints" / "3")
    assert (runs[2] / "checkpoints" / "2").is_dir()
    (runs[2] / "status.json").write_text(json.dumps(status(runs[2]) | {"state": "INTERRUPTED"}))
    result = call(cli.train, *command)
    assert result.code == 0 and f"{runs[4]} is done already" in result.out
    assert f"going on from {runs[2] / 'checkpoints' / '2'}" in result.out
    assert same(weights(runs[2], 3), kept) and losses(runs[2]) == lines and students(teacher) == runs


def test_a_student_begins_as_its_teacher(call, teacher, without_pictures):  # noqa: F811
    one = ("task.steps=2", "trainer.steps=1", "optimizer.lr=1e-30", "optimizer.weight_decay=0")
    assert call(cli.train, "task=progressive", *taught_by(teacher), *one, "device=cpu").code == 0
    first = checkpoint.load_weights(teacher / "checkpoints" / "2" / "ema.safetensors")
    found = weights(students(teacher)[2], 1)
    assert max((first[k] - found[k]).abs().max() for k in first) < 1e-20


@pytest.mark.slow
def test_a_student_is_drawn_from_at_its_own_times(call, teacher, without_pictures, tmp_path):  # noqa: F811
    assert (
        call(cli.train, "task=progressive", *taught_by(teacher), "task.steps=2", "trainer.steps=1", "device=cpu").code
        == 0
    )
    run = students(teacher)[2]
    for name, more in (
        ("plain", []),
        ("named", ["sampler=student"]),
        ("typed", ["sampler=student", "sampler.steps=2"]),
    ):
        assert call(cli.sample, f"run={run}", "n=3", f"out={tmp_path / name}.npy", *more).code == 0
    one, two, three = (np.load(tmp_path / f"{name}.npy") for name in ("plain", "named", "typed"))
    assert np.array_equal(one, two) and np.array_equal(one, three)
    assert_refused(call(cli.sample, f"run={run}", "sampler=student", "sampler.steps=4", f"out={tmp_path / 'a.npy'}"),
                   "sampler.steps=4", "distilled to 2 steps")  # fmt: skip
    assert_refused(
        call(cli.sample, f"run={teacher}", "sampler=student", f"out={tmp_path / 'a.npy'}"), "task=progressive"
    )
    assert call(cli.evaluate, f"run={run}", "metric=kernel", "features=pixels", "n=8").code == 0
    (record,) = json.loads((run / "evaluation.json").read_text()).values()
    assert (record["sampler"], record["steps"], record["sampler_settings"]) == ("Student", 2, {"steps": 2})
    assert_refused(call(cli.sample, f"run={run}", "steps_strip=[1,2]", f"out={tmp_path / 'a.png'}"), "to 2 steps")
    assert_refused(
        call(cli.train, "task=consistency", *taught_by(run), "trainer.steps=1"), "run of Progressive was trained on few"
    )


@pytest.mark.parametrize(
    ("sampler", "task", "expected"),
    [
        ([], "progressive", Student),
        ([], "consistency", Consistency),
        ([], "diffusion", DDIM),
        (["sampler.steps=7"], "progressive", DDIM),
        (["sampler=consistency", "sampler.steps=3"], "consistency", Consistency),
    ],
)
def test_which_sampler_draws_from_a_run_that_none_was_asked_for(sampler, task, expected):
    trained = compose("train", [f"task={task}", *(["task.steps=4", "teacher=t"] if task == "progressive" else [])])
    found = sampler_of(compose("sample", ["run=r", *sampler]), OmegaConf.create(resolved(trained)), [])
    assert type(found) is expected
    assert found.steps == {DDIM: 50, Student: 4, Consistency: 2}[expected] or sampler


@pytest.mark.parametrize("of_teacher", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_consistency_goes_the_whole_way_of_a_diffusion(call, teacher, tmp_path, of_teacher):  # noqa: F811
    levels = ("task=consistency", "task.s_0=2", "task.s_1=8", "device=cpu")
    evaluation = 'evaluation=["metric=kernel features=pixels n=8"]'
    own = [word for word in words("trainer.steps=3", "trainer.previews=1") if not word.startswith("sampler")]
    command = (*levels, *([f"teacher={teacher}", "trainer.steps=3"] if of_teacher else own), evaluation,
               f"runs={tmp_path / 'runs'}", "study=c")  # fmt: skip
    result = call(cli.train, *command)
    assert result.code == 0 and "warning" not in result.out + result.err
    (run,) = (tmp_path / "runs" / "c").iterdir()
    (record,) = json.loads((run / "evaluation.json").read_text()).values()
    assert (record["sampler"], record["steps"]) == ("Consistency", 2)
    assert all((run / name).stat().st_size for name in ("samples.png", "denoising.gif"))
    manifest = json.loads((run / "checkpoints" / "3" / "manifest.json").read_text())
    assert (manifest["frozen"].keys() == {"teacher"}) == of_teacher
    lines = losses(run)
    shutil.rmtree(run / "checkpoints" / "3")
    (run / "status.json").write_text(json.dumps(status(run) | {"state": "INTERRUPTED"}))
    assert call(cli.train, *command).code == 0 and losses(run) == lines


@pytest.mark.slow
def test_students_of_a_network_with_classes_extend_check_and_sweep(call, tmp_path, without_pictures):  # noqa: F811
    runs = tmp_path / "runs"
    of_classes = words("model.num_classes=10", "task.drop=0.2", f"runs={runs}", "study=taught")
    teacher = begun(runs / "taught" / "teacher", of_classes)
    assert call(cli.train, *STAGES[:1], *taught_by(teacher), "task.steps=[2,1]", "trainer.steps=2", "--check").code == 0
    assert not students(teacher)
    assert call(cli.train, *STAGES[:1], *taught_by(teacher), "task.steps=[2,1]", "trainer.steps=2").code == 0
    run = students(teacher)[1]
    trained = OmegaConf.load(run / "config.yaml")
    assert trained.task.drop == 0.2 and trained.model.num_classes == 10
    words_of = ("guidance=classifier_free", "guidance.w=2", "class=[3,4]", "n=4", f"out={tmp_path / 'x.npy'}")
    assert call(cli.sample, f"run={run}", *words_of).code == 0 and np.load(tmp_path / "x.npy").shape == (4, 8, 8, 1)
    assert call(cli.train, f"extend={run}", "trainer.steps=3").code == 0
    (longer,) = (path.parent for path in runs.glob("default/*/checkpoints/3"))
    manifests = [json.loads((path / "manifest.json").read_text()) for path in (longer / "3", run / "checkpoints" / "2")]
    assert manifests[0]["frozen"] == manifests[1]["frozen"]
    shutil.rmtree(students(teacher)[2])
    assert_refused(call(cli.train, f"extend={run}", "trainer.steps=4"), "teacher=", "no run directory")
    assert_refused(call(cli.train, "task=progressive", *taught_by(run), "task.steps=2", "trainer.steps=1"),
                   "was distilled to 1 steps")  # fmt: skip


WRONG = {
    "no teacher": (["task=progressive", "trainer.steps=1"], ["teacher must be given"]),
    "no run": (["task=progressive", "teacher=nowhere", "trainer.steps=1"], ["teacher=nowhere", "no run directory"]),
    "no such step": (["task=progressive", "teacher={teacher}@7", "trainer.steps=1"], ["checkpoint 7", "there: 2"]),
    "no budget": (["task=progressive", "teacher={teacher}"], ["needs a budget"]),
    "no halves": (["task=progressive", "teacher={teacher}", "task.steps=[4,3]", "trainer.steps=1"], ["half the steps"]),
    "no steps": (["task=progressive", "teacher={teacher}", "task.steps=[]", "trainer.steps=1"], ["half the steps"]),
    "too many": (["task=progressive", "teacher={teacher}", "task.steps=6", "trainer.steps=1"], ["1..5"]),
    "another network": (
        ["task=progressive", "teacher={teacher}", "model.channels=16", "trainer.steps=1"],
        ["model.channels=16", "configuration of its teacher"],
    ),
    "another target": (
        ["task=progressive", "teacher={teacher}", "diffusion.target=eps", "trainer.steps=1"],
        ["diffusion.target=eps", "configuration of its teacher"],
    ),
    "another recipe": (
        ["task=progressive", "teacher={teacher}", "experiment=mnist", "trainer.steps=1"],
        ["experiment=mnist", "configuration of its teacher"],
    ),
    "other weights": (
        ["task=progressive", "teacher={teacher}", "init={teacher}", "trainer.steps=1"],
        ["leave init out"],
    ),
    "another sampler": (
        ["task=progressive", "teacher={teacher}", "task.steps=2", "sampler.steps=1", "trainer.steps=1"],
        ["a student of 2 steps"],
    ),
    "another drop": (
        ["task=consistency", "teacher={teacher}", "task.drop=0.5", "trainer.steps=1"],
        ["task.drop=0.5", "configuration of its teacher"],
    ),
    "no noise": (["task=consistency", "teacher={teacher}", "task.P_mean=60", "trainer.steps=1"], ["P_mean = 60"]),
    "a curriculum that falls": (
        ["task=consistency", "teacher={teacher}", "task.s_1=1", "trainer.steps=1"],
        ["s_0 = 10", "s_1 = 1"],
    ),
}


@pytest.mark.parametrize("given", WRONG)
def test_what_cannot_be_distilled_is_refused(call, teacher, given, monkeypatch, tmp_path):  # noqa: F811
    monkeypatch.chdir(tmp_path)
    typed_words, told = WRONG[given]
    result = call(cli.train, *(word.format(teacher=teacher) for word in typed_words))
    assert_refused(result, *told)
    assert {path.name for path in teacher.parents[1].iterdir()} == {"taught"}


def test_a_teacher_of_target_eps_is_refused(call, tmp_path):  # noqa: F811
    eps = begun(tmp_path / "runs" / "a" / "eps", words("diffusion.target=eps", f"runs={tmp_path / 'runs'}", "study=a"))
    for task in ("progressive", "consistency"):
        result = call(cli.train, f"task={task}", f"teacher={eps}", "trainer.steps=1", "device=cpu")
        assert_refused(result, "target = 'eps'", "diffusion.target=v")
