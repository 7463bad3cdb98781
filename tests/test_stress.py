"""What a run survives: kills, a full disk. experiments/stress.py does the same at length."""

import json
import runpy
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from ddpm import checkpoint
from ddpm.runs import Run

SCRIPT = Path(__file__).parents[1] / "experiments" / "stress.py"


@pytest.fixture(scope="module")
def stress() -> dict:
    return runpy.run_path(str(SCRIPT))


@pytest.mark.slow
def test_five_kills_change_nothing(stress, tmp_path):
    told = stress["kills"](tmp_path, 5, 1, 0)
    assert told["kills"] == sum(told["moments"].values()) == 5
    assert told["differences"] == [] and told["unreadable"] == []
    assert len(list(tmp_path.glob("killed_*/default/*/status.json"))) == told["runs"]


@pytest.mark.slow
def test_what_differs_between_two_runs_is_found(stress, tmp_path):
    """Else no difference would mean nothing."""
    whole = stress["Victim"](
        tmp_path / "a", [w for w in stress["SHORT"] if "steps=180" not in w] + ["trainer.steps=6"], 0, None
    )
    whole.finish()
    assert whole.run.status()["state"] == "DONE" and stress["differences"](whole.run, whole.run) == []
    other = Run(Path(shutil.copytree(whole.run.path, tmp_path / "b" / whole.run.hash)))
    assert stress["differences"](whole.run, other) == []
    lines = (other.path / "metrics.jsonl").read_text().splitlines(keepends=True)
    (other.path / "metrics.jsonl").write_text("".join(lines[:-1]))
    (other.path / "samples.png").write_bytes(b"")
    weights = checkpoint.load_weights(other.checkpoints / "6" / "ema.safetensors")
    state = checkpoint.load_state(other.checkpoints / "6")
    state["optimizer"][0]["exp_avg"][(0,) * state["optimizer"][0]["exp_avg"].ndim] += 1e-7
    network = stress["torch"].nn.ParameterDict({k.replace(".", "_"): v for k, v in weights.items()})
    checkpoint.save(other.checkpoints, 6, network, network, state, None)
    shutil.rmtree(other.checkpoints / "3")
    assert set(stress["differences"](whole.run, other)) == {
        "model.safetensors", "ema.safetensors", "state, optimizer", "metrics.jsonl", "names of checkpoints",
        "samples.png",
    }  # fmt: skip


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="looks into /proc")
@pytest.mark.slow
def test_a_long_run_is_watched(stress, tmp_path, monkeypatch):
    monkeypatch.setitem(stress["long"].__globals__, "LONG", [*stress["SHORT"], "trainer.previews=4"])
    told = stress["long"](tmp_path, 600, 0.2)
    assert told["looks"] > 5 and told["checkpoints"] <= 4
    assert told["bytes"]["metrics.jsonl"] < 600 * 250 and told["open files, least and most"][1] < 50


# ---------------------------------------------------------------------------------------------- a full disk


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    """A file system of 1 MB: room for one checkpoint of the network below, and no second one beside it."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1000k", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no file system can be mounted here")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.mark.slow
def test_a_full_disk_stops_training_and_costs_nothing_that_was_saved(stress, small_disk, tmp_path):
    words = [word for word in stress["SHORT"] if "steps=180" not in word]
    words += ["trainer.steps=30", "trainer.keep=5", "trainer.previews=0"]

    def train(runs: Path) -> subprocess.CompletedProcess:
        command = [sys.executable, str(stress["TRAIN"]), *words, f"runs={runs}"]
        return subprocess.run(command, env=stress["ENVIRONMENT"], capture_output=True, text=True)

    first = train(small_disk)
    assert (
        first.returncode == 1 and "the disk is full" in first.stdout and "Traceback" not in first.stdout + first.stderr
    )
    (path,) = (path for path in (small_disk / "default").iterdir() if path.is_dir())
    run = Run(path)
    last = checkpoint.last_whole(run.checkpoints)
    assert last is not None and f"the last whole checkpoint is {last}" in first.stdout
    there = list(run.checkpoints.iterdir())
    assert there and all(checkpoint.verify(folder) is None for folder in there), "nothing half-written is left"
    assert json.loads((path / "status.json").read_text())["state"] == "FAILED"

    subprocess.run(["mount", "-o", "remount,size=50m", str(small_disk)], check=True)
    assert train(small_disk).returncode == 0 and run.status()["state"] == "DONE"
    assert train(tmp_path / "undisturbed").returncode == 0
    (whole,) = (path for path in (tmp_path / "undisturbed" / "default").iterdir() if path.is_dir())
    assert stress["differences"](run, Run(whole)) == []
