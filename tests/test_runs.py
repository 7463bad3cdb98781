"""ddpm/runs/directory.py: a name for what a result depends on, one process a run, and metrics that survive a stop."""

import copy
import json
import math
import os
import platform
import re
import subprocess
import sys
import threading
from pathlib import Path

import filelock
import pytest
import torch
from torch import nn

import ddpm
from ddpm import config
from ddpm.data import ImageData
from ddpm.runs import checkpoint, directory
from ddpm.runs.directory import (
    DONE,
    FAILED,
    INTERRUPTED,
    RUNNING,
    Metrics,
    Run,
    RunIsHeld,
    open_run,
    read_metrics,
    science_hash,
)

CONFIG = {
    "model": {"_target_": "models.unet.UNet", "channels": 8, "channel_mults": [1, 2]},
    "schedule": {"_target_": "ddpm.schedules.cosine", "T": 20},
    "diffusion": {"_target_": "ddpm.diffusion.GaussianDiffusion", "target": "eps"},
    "optimizer": {"_target_": "torch.optim.Adam", "lr": 1e-3},
    "trainer": {"_target_": "ddpm.training.trainer.Trainer", "steps": 5, "log_every": 1, "keep": 2},
    "data": {"_target_": "ddpm.data.Folder", "root": "/here", "validation": 0.1, "flip": False},
    "seed": 0,
    "device": "cpu",
    "study": "default",
    "runs": "runs",
    "sampler": {"steps": 50},
    "recognition": False,
    "trust": [],
}


def images(n: int = 10, seed: int = 0, labels: bool = True, **options: object) -> ImageData:
    draw = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (n, 1, 4, 4), dtype=torch.uint8, generator=draw)
    return ImageData("toy", "all", pixels, torch.arange(n) % 2 if labels else None, **options)


def hashed(
    changes: dict | None = None, data: ImageData | None = None, parents: dict | None = None, numerics: int = 1
) -> str:
    settings = copy.deepcopy(CONFIG)
    for key, value in (changes or {}).items():
        *groups, name = key.split(".")
        node = settings
        for group in groups:
            node = node[group]
        node[name] = value
    identity = (data or images()).identity()
    return science_hash(config.science(settings, identity, parents or {}, numerics))


# ---------------------------------------------------------------------------------------------- the name of a run


def test_a_hash_is_twelve_hexadecimal_digits_that_never_change():
    assert re.fullmatch("[0-9a-f]{12}", hashed())
    assert (
        science_hash({"a": 1, "b": [1.5, None, "x"]}) == "51824779aebd" == science_hash({"b": [1.5, None, "x"], "a": 1})
    )


def test_the_order_of_keys_does_not_matter():
    turned = {k: dict(reversed(v.items())) if isinstance(v, dict) else v for k, v in reversed(CONFIG.items())}
    assert science_hash(config.science(turned, images().identity(), {}, 1)) == hashed()


@pytest.mark.slow
def test_the_same_numbers_in_another_process_have_the_same_hash():
    code = "import json, sys; from ddpm.runs.directory import science_hash; print(science_hash(json.load(sys.stdin)))"
    facts = config.science(CONFIG, images().identity(), {}, 1)
    environment = os.environ | {"PYTHONHASHSEED": "7", "PYTHONPATH": str(Path(ddpm.__file__).parents[1])}
    out = subprocess.run(
        [sys.executable, "-c", code], input=json.dumps(facts), capture_output=True, text=True, env=environment
    )
    assert out.stdout.strip() == science_hash(facts), out.stderr


@pytest.mark.parametrize(
    "changes",
    [
        {"model.channels": 16},
        {"model.channel_mults": [2, 1]},
        {"model._target_": "models.mlp.MLP"},
        {"schedule.T": 21},
        {"diffusion.target": "v"},
        {"optimizer.lr": 1.0001e-3},
        {"trainer.steps": 6},
        {"trainer.batch_size": 7},
        {"data.validation": 0.2},
        {"data.flip": True},
        {"seed": 1},
    ],
)
def test_science_changes_the_hash(changes):
    assert hashed(changes) != hashed()


@pytest.mark.parametrize(
    "changes",
    [
        {"device": "cuda"},
        {"study": "other"},
        {"runs": "/elsewhere"},
        {"sampler.steps": 10},
        {"recognition": True},
        {"trust": ["my.Net"]},
        {"data.root": "/there"},
        {"model.checkpointing": True},
        {"model.checkpointing": False},  # which older configurations do not have
        *({f"trainer.{key}": 77} for key in ("log_every", "checkpoint_every", "keep", "previews", "ema_snapshots")),
    ],
)
def test_what_changes_no_result_is_not_in_the_hash(changes):
    assert hashed(changes) == hashed()


def test_the_data_are_known_by_what_they_are():
    reference = hashed()
    one_label, one_pixel = images(), images()
    one_label.labels[3] = 1 - one_label.labels[3]
    one_pixel.images[9, 0, 3, 3] ^= 1
    others = [
        images(seed=1),
        images(9),
        images(labels=False),
        one_label,
        one_pixel,
        images(channels=3),
        images(image_size=8),
    ]
    assert len({reference, *(hashed(data=data) for data in others)}) == 1 + len(others)
    assert hashed(data=images()) == reference


def test_parents_and_numerics_are_in_the_hash():
    names = {hashed(), hashed(parents={"init": "a" * 64}), hashed(parents={"extend": "a" * 64}), hashed(numerics=2)}
    assert len(names) == 4


def test_numbers_that_are_not_finite_have_no_hash():
    with pytest.raises(ValueError):
        science_hash({"lr": math.nan})


# ---------------------------------------------------------------------------------------------- state and lock


def test_a_run_that_never_began_has_no_status(tmp_path):
    assert Run(tmp_path / "abc").status() == {} and not (tmp_path / "abc").exists()


def test_status_says_who_where_and_since_when(tmp_path):
    run = Run(tmp_path / "0123456789ab")
    with run.locked():
        run.begin()
        status = json.loads((run.path / "status.json").read_text())
    keys = {
        "state",
        "reason",
        "traceback",
        "step",
        "seconds",
        "started",
        "ended",
        "host",
        "pid",
        "commit",
        "hash",
        "format",
    }
    assert keys <= status.keys()
    assert (status["state"], status["hash"], status["format"]) == (RUNNING, "0123456789ab", directory.FORMAT)
    assert (status["host"], status["pid"]) == (platform.node(), os.getpid())
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", status["started"]) and status["ended"] is None


def test_writing_status_keeps_what_it_does_not_name(tmp_path):
    run = Run(tmp_path)
    run.write_status(RUNNING, step=5, precision="bf16")
    run.write_status(DONE, reason="budget of steps used")
    status = run.status()
    assert (status["step"], status["precision"], status["state"]) == (5, "bf16", DONE)
    run.write_status(FAILED, reason="out of memory", traceback="Traceback ...")
    run.begin()
    again = json.loads((tmp_path / "status.json").read_text())
    assert (again["reason"], again["traceback"], again["step"]) == (None, None, 5)
    assert os.listdir(tmp_path) == ["status.json"]


@pytest.mark.parametrize("content", ["", '{"state": "DO', "[]", "null", '{"state": 3}', "[" * 10**6])
def test_a_status_that_cannot_be_read_is_told_and_written_anew(content, tmp_path, capsys):
    run = Run(tmp_path)
    (tmp_path / "status.json").write_text(content)
    assert run.status() == {}
    assert "status.json" in (said := capsys.readouterr().out) and "the checkpoints show how far" in said
    run.write_status(DONE, step=3)
    assert run.status()["step"] == 3


def test_a_status_of_a_newer_format_is_an_error_and_stays(tmp_path):
    run = Run(tmp_path)
    run.write_status(DONE, step=3)
    newer = (tmp_path / "status.json").read_text().replace('"format": 1', '"format": 2')
    (tmp_path / "status.json").write_text(newer)
    for refused in (run.status, lambda: run.write_status(RUNNING)):
        with pytest.raises(ValueError, match="written by a newer version: its format 2 is newer than 1"):
            refused()
    assert (tmp_path / "status.json").read_text() == newer


def test_running_with_a_free_lock_is_interrupted_and_with_a_held_one_running(tmp_path):
    run = Run(tmp_path / "run")
    with run.locked():
        run.begin()
        assert run.status()["state"] == Run(run.path).status()["state"] == RUNNING
    assert run.status()["state"] == INTERRUPTED and "without recording a reason" in run.status()["reason"]
    assert json.loads((run.path / "status.json").read_text())["state"] == RUNNING  # reading writes nothing
    for state in (DONE, FAILED, INTERRUPTED):
        run.write_status(state, reason="so it is")
        assert (run.status()["state"], run.status()["reason"]) == (state, "so it is")


def test_a_run_is_held_by_one_process_at_a_time(tmp_path):
    run = Run(tmp_path / "run")
    with run.locked():
        run.begin()
        run.write_status(RUNNING, host="elsewhere", pid=4242)
        with (
            pytest.raises(RunIsHeld, match=r"run is being trained by process 4242 on elsewhere"),
            Run(run.path).locked(),
        ):
            pytest.fail("two at once")
    with Run(run.path).locked():
        pass


def test_who_looks_at_a_run_does_not_keep_it_from_starting(tmp_path):
    """To see whether somebody holds the lock is to hold it for a moment."""
    run = Run(tmp_path)
    with run.locked():
        run.write_status("RUNNING")
    ended, failed = threading.Event(), []

    def look() -> None:
        try:
            while not ended.is_set():
                assert Run(tmp_path).status()["state"] in directory.STATES
        except BaseException as error:  # which would end this thread alone
            failed.append(error)

    watchers = [threading.Thread(target=look) for _ in range(3)]
    for watcher in watchers:
        watcher.start()
    try:
        for _ in range(50):
            with Run(tmp_path).locked():
                pass
    finally:
        ended.set()
        for watcher in watchers:
            watcher.join()
    assert failed == []


def test_the_lock_is_freed_by_an_error_and_by_the_death_of_its_process(tmp_path):
    run = Run(tmp_path / "run")
    with pytest.raises(RuntimeError), run.locked():
        raise RuntimeError
    code = f"""
import filelock, os, signal
filelock.FileLock({str(run.path / "run.lock")!r}).acquire()
os.kill(os.getpid(), signal.SIGKILL)
"""
    assert subprocess.run([sys.executable, "-c", code]).returncode == -9
    with run.locked():
        lock = filelock.FileLock(run.path / "run.lock")
        with pytest.raises(filelock.Timeout):
            lock.acquire(timeout=0)


# ---------------------------------------------------------------------------------------------- metrics


def written(folder: Path, step: int = 0, last: int = 4) -> None:
    metrics = Metrics(folder, step)
    for n in range(step + 1, last + 1):
        metrics.write(n, "train", loss=1 / n, lr=0.1)
    metrics.close()


def test_one_object_a_line(tmp_path):
    metrics = Metrics(tmp_path, 0)
    metrics.write(3, "train", loss=0.5, lr=1e-3)
    assert read_metrics(tmp_path) == [{"step": 3, "split": "train", "loss": 0.5, "lr": 1e-3}]  # before it is closed
    metrics.write(4, "held_out", loss=None)
    metrics.close()
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["loss"] for line in lines] == [0.5, None]
    assert list((tmp_path / "tensorboard").glob("events*"))


def test_numbers_that_are_not_finite_are_null(tmp_path):
    metrics = Metrics(tmp_path, 0)
    metrics.write(1, "train", loss=math.nan, grad_norm=math.inf, lr=-math.inf, other=0.0)
    metrics.close()
    assert read_metrics(tmp_path) == [
        {"step": 1, "split": "train", "loss": None, "grad_norm": None, "lr": None, "other": 0.0}
    ]


def test_lines_after_the_step_that_a_run_goes_on_from_are_dropped(tmp_path):
    written(tmp_path, 0, 5)
    written(tmp_path, 3, 6)
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2, 3, 4, 5, 6]
    written(tmp_path, 0, 2)
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2]


def test_a_last_line_that_was_cut_off_is_left_out_and_replaced(tmp_path):
    written(tmp_path)
    whole = (tmp_path / "metrics.jsonl").read_text()
    (tmp_path / "metrics.jsonl").write_text(whole[:-9])
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2, 3]
    written(tmp_path, 3, 5)
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2, 3, 4, 5]
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 5


@pytest.mark.parametrize("bad", ['{"step": 2, "spl', "\0\0\0", "[1, 2]", "{}", '{"step": "x", "split": "train"}'])
def test_a_damaged_line_is_told_and_left_out(bad, tmp_path, capsys):
    lines = [json.dumps({"step": n, "split": "train", "loss": 0.5}) for n in (1, 2, 3)]
    (tmp_path / "metrics.jsonl").write_text("\n".join([lines[0], bad, lines[2]]) + "\n")
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 3]
    assert "metrics.jsonl, line 2 cannot be read" in capsys.readouterr().out


def test_without_a_file_there_are_no_metrics(tmp_path):
    assert read_metrics(tmp_path) == []


def test_tensorboard_has_the_same_numbers_once(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    written(tmp_path, 0, 5)
    written(tmp_path, 3, 6)
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    assert {e.step: e.value for e in board.Scalars("train/loss")} == pytest.approx({n: 1 / n for n in range(1, 7)})
    assert len(board.Scalars("train/loss")) == 6


# ---------------------------------------------------------------------------------------------- opening a run


@pytest.fixture
def trained(tmp_path) -> Path:
    (tmp_path / "config.yaml").write_text("seed: 0\n")
    for step, loss in ((5, 0.2), (10, 0.1), (15, 0.3)):
        model = nn.Linear(1, 1)
        checkpoint.save(tmp_path / "checkpoints", step, {"model": model}, {"model": model}, {"step": step}, loss)
    return tmp_path


@pytest.mark.parametrize(("which", "step"), [("last", "15"), ("best", "10"), (5, "5"), ("5", "5")])
def test_which_checkpoint_is_opened(which, step, trained):
    run, folder = open_run(str(trained), which)
    assert run.path == trained and folder == trained / "checkpoints" / step


@pytest.mark.parametrize("which", [7, "newest", "../.."])
def test_a_checkpoint_that_is_not_there_is_told_with_those_that_are(which, trained):
    with pytest.raises(FileNotFoundError, match=r"checkpoint .* cannot be read .* there: 5, 10, 15"):
        open_run(trained, which)


def test_a_damaged_checkpoint_is_not_opened(trained, capsys):
    (trained / "checkpoints" / "15" / "ema.safetensors").write_bytes(b"")
    assert open_run(trained)[1].name == "10" and "15 is damaged" in capsys.readouterr().out
    with pytest.raises(FileNotFoundError, match="checkpoint 15 cannot be read"):
        open_run(trained, 15)


def test_a_folder_without_a_run_or_without_a_checkpoint(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no config\.yaml there, so this is no run directory"):
        open_run(tmp_path)
    (tmp_path / "config.yaml").write_text("seed: 0\n")
    for which in ("last", "best"):
        with pytest.raises(FileNotFoundError, match="no whole checkpoint"):
            open_run(tmp_path, which)


# ---------------------------------------------------------------------------------------------- the commit


def git(folder: Path, *words: str) -> str:
    command = [
        "git",
        "-C",
        str(folder),
        "-c",
        "user.name=n",
        "-c",
        "user.email=e@x",
        "-c",
        "commit.gpgsign=false",
        *words,
    ]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def test_the_commit_and_whether_the_code_was_changed_since(tmp_path, monkeypatch):
    package = tmp_path / "ddpm"
    package.mkdir()
    monkeypatch.setattr(directory, "__file__", str(package / "directory.py"))
    (package / "directory.py").write_text("1\n")
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert directory.git_commit() is None
    git(tmp_path, "init", "-q")
    assert directory.git_commit() is None  # no commit yet
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-q", "-m", "one")
    head = git(tmp_path, "rev-parse", "HEAD")
    assert directory.git_commit() == head
    (tmp_path / "notes").write_text("untracked files are no change of the code")
    assert directory.git_commit() == head
    (package / "directory.py").write_text("2\n")
    assert directory.git_commit() == head + "+"


def test_an_installed_package_does_not_take_the_commit_of_a_repository_around_it(tmp_path, monkeypatch):
    """As in a virtual environment inside somebody's own project."""
    git(tmp_path, "init", "-q")
    git(tmp_path, "commit", "-q", "--allow-empty", "-m", "theirs")
    package = tmp_path / ".venv" / "ddpm"
    package.mkdir(parents=True)
    (package / "directory.py").write_text("")
    monkeypatch.setattr(directory, "__file__", str(package / "directory.py"))
    assert directory.git_commit() is None


def test_without_git_there_is_no_commit(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert directory.git_commit() is None
