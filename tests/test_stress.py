"""What a run survives, and what a comparison of two finds; experiments/stress.py does the same at length."""

import json
import math
import re
import runpy
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import safetensors.torch
import torch
from forked import Forked

from ddpm.runs import checkpoint
from ddpm.runs.directory import Run

SCRIPT = Path(__file__).parents[1] / "experiments" / "stress.py"
FULL = ["trainer.steps=9", "trainer.keep=5", "trainer.previews=0"]  # three checkpoints, all of which are kept


@pytest.fixture(scope="module")
def stress() -> dict:
    return runpy.run_path(str(SCRIPT))


def short(stress: dict, *words: str) -> list[str]:
    """The words of a short run, and others in their place."""
    return stress["last_of_each"]([*stress["SHORT"], *words])


@pytest.mark.slow
def test_a_kill_at_each_moment_changes_nothing(stress, tmp_path, monkeypatch):
    fewer = short(stress, "trainer.steps=60", "trainer.batch_size=8", "trainer.previews=1")
    monkeypatch.setitem(stress["kills"].__globals__, "SHORT", fewer)
    monkeypatch.setattr(stress["Victim"], "start", lambda self: Forked(self.command[1:], stress["ENVIRONMENT"]))
    told = stress["kills"](tmp_path, 3, 1, 2)  # a seed by which each moment is drawn
    assert told["kills"] == sum(told["moments"].values()) == 3
    assert {moment.partition(",")[0] for moment in told["moments"]} == set(stress["MOMENTS"])
    assert told["differences"] == [] and told["unreadable"] == []
    assert len(list(tmp_path.glob("killed_*/default/*/status.json"))) == told["runs"]


@pytest.fixture(scope="module")
def undisturbed(stress, tmp_path_factory) -> Path:
    """A folder with a run that nothing disturbs."""
    victim = stress["Victim"](tmp_path_factory.mktemp("undisturbed"), short(stress, *FULL), 0, None)
    victim.finish()
    return victim.folder


@pytest.mark.slow
def test_two_runs_of_the_same_words_are_the_same(stress, undisturbed, tmp_path):
    """In processes that have nothing in common, not even the order of their sets of words."""
    other = stress["Victim"](tmp_path, short(stress, *FULL), 0, None)
    other.finish()
    one = stress["Victim"](undisturbed, [], 0, None).run
    assert one.status()["state"] == "DONE" and stress["differences"](one, other.run) == []
    shutil.rmtree(other.run.checkpoints / "3")
    (other.run.path / "samples.png").unlink()
    assert stress["differences"](one, other.run) == ["names of checkpoints", "samples.png (in one only)"]


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="looks into /proc")
@pytest.mark.slow
def test_a_long_run_is_watched(stress, tmp_path, monkeypatch):
    """With a checkpoint, and so a held-out loss, after each step."""
    monkeypatch.setitem(stress["long"].__globals__, "LONG", [*stress["SHORT"], "trainer.previews=4"])
    told = stress["long"](tmp_path, 80, 0.05)
    assert told["looks"] > 5 and told["checkpoints"] <= 4
    assert told["bytes"]["metrics.jsonl"] < 2 * 80 * 187 and told["open files, least and most"][1] < 50


# ---------------------------------------------------------------------------------------------- comparison


STORED = max(Path(__file__).parent.glob("format_*"))  # a run of six steps


@pytest.fixture
def pair(tmp_path) -> tuple[Run, Run]:
    """Two copies of a run, with results and a picture."""
    runs = [Run(shutil.copytree(STORED, tmp_path / name / "0123456789ab")) for name in ("one", "other")]
    for run in runs:
        (run.path / "evaluation.json").write_text('{"bits": {"value": 1.5, "commit": "a"}}')
        (run.path / "samples.png").write_bytes(b"picture")
    return runs[0], runs[1]


def seal(step: Path, name: str) -> None:
    """Let the manifest of a checkpoint name the checksum that a file has now."""
    manifest = json.loads((step / "manifest.json").read_text())
    manifest["sha256"][name] = checkpoint.sha256(step / name)
    (step / "manifest.json").write_text(json.dumps(manifest))


def change_weights(path: Path, metadata: dict[str, str] | None = None, by: float = 0.0) -> str:
    """Write a checkpoint's file of weights anew, with another first number of one tensor; the tensor's name."""
    weights = checkpoint.load_weights(path)
    name = min(weights)
    weights[name].view(-1)[0] += by
    safetensors.torch.save_file(weights, path, metadata)
    seal(path.parent, path.name)
    return name


def change_state(step: Path, change: Callable[[dict], None]) -> None:
    state = torch.load(step / "state.pt", weights_only=True)
    change(state)
    torch.save(state, step / "state.pt")
    seal(step, "state.pt")


def change_line(run: Run, number: int, **values: float) -> None:
    lines = (run.path / "metrics.jsonl").read_text().splitlines()
    lines[number - 1] = json.dumps(json.loads(lines[number - 1]) | values)
    (run.path / "metrics.jsonl").write_text("\n".join([*lines, ""]))


def test_copies_are_the_same_and_neither_time_nor_commit_counts(stress, pair):
    one, other = pair
    assert stress["differences"](one, other) == []
    change_line(other, 1, seconds=1e6)
    change_state(other.checkpoints / "6", lambda state: state.update(seconds=1e6))
    (other.path / "evaluation.json").write_text('{"bits": {"value": 1.5, "commit": "b"}}')
    assert stress["differences"](one, other) == []


@pytest.mark.parametrize("file", ["model.safetensors", "ema.safetensors"])
def test_a_difference_in_a_tensor_is_found(stress, pair, file):
    name = change_weights(pair[1].checkpoints / "6" / file, by=1e-6)
    assert stress["differences"](*pair) == [f"checkpoint 6, {file}: {name}"]


def test_a_difference_in_the_bytes_of_weights_alone_is_found(stress, pair):
    change_weights(pair[1].checkpoints / "6" / "model.safetensors", metadata={"a": "b"})
    assert stress["differences"](*pair) == ["checkpoint 6, model.safetensors: not in its tensors"]


def test_weights_that_one_run_lacks_or_that_are_damaged_are_found(stress, pair):
    step = pair[1].checkpoints / "6"
    (step / "more.safetensors").write_bytes((step / "model.safetensors").read_bytes())
    assert stress["differences"](*pair) == ["checkpoint 6, more.safetensors: in one only"]
    (step / "model.safetensors").write_bytes(b"")
    (found,) = stress["differences"](*pair)
    assert found.startswith(f"checkpoint 6, {step} is damaged: model.safetensors")


def test_a_difference_in_an_optimizer_or_a_counter_is_found(stress, pair):
    def moment(node: dict) -> None:
        """Change a number in the first of the moments, wherever this format keeps them."""
        for value in node.values():
            if isinstance(value, dict):
                if "exp_avg" in value:
                    value["exp_avg"].view(-1)[0] += 1e-7
                    return
                moment(value)

    change_state(pair[1].checkpoints / "6", moment)
    (found,) = stress["differences"](*pair)
    assert found.startswith("checkpoint 6, state: ") and found.endswith("exp_avg") and "optimizer, 0" in found
    change_state(pair[1].checkpoints / "6", lambda state: state.update(step=7, another=1))
    (found,) = stress["differences"](*pair)
    assert found.startswith("checkpoint 6, state: another (in one only); ") and found.endswith("; step")


def test_a_difference_in_the_held_out_loss_is_found(stress, pair):
    path = pair[1].checkpoints / "6" / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"held_out": None, "another": 1}))
    assert stress["differences"](*pair) == ["checkpoint 6, manifest: held_out"]


def test_a_difference_in_a_line_of_metrics_is_found(stress, pair):
    change_line(pair[1], 2, loss=5.0)
    assert stress["differences"](*pair) == ["metrics.jsonl: line 2, loss"]
    lines = (pair[0].path / "metrics.jsonl").read_text().splitlines(keepends=True)
    (pair[1].path / "metrics.jsonl").write_text("".join(lines[:-1]))
    assert stress["differences"](*pair) == [f"metrics.jsonl: line {len(lines)} (in one only)"]


def test_a_difference_in_results_is_found(stress, pair):
    (pair[1].path / "evaluation.json").write_text('{"bits": {"value": 1.25}, "more": {}}')
    assert stress["differences"](*pair) == ["evaluation.json: bits, value; more (in one only)"]
    (pair[1].path / "evaluation.json").unlink()
    assert stress["differences"](*pair) == ["evaluation.json: bits (in one only)"]


def test_a_picture_that_differs_or_is_missing_is_found(stress, pair):
    (pair[1].path / "samples.png").write_bytes(b"another")
    assert stress["differences"](*pair) == ["samples.png"]
    (pair[1].path / "samples.png").rename(pair[1].path / "samples.gif")
    assert stress["differences"](*pair) == ["samples.gif (in one only)", "samples.png (in one only)"]


def test_another_hash_and_missing_checkpoints_are_found(stress, pair, tmp_path):
    one, other = pair
    other = Run(other.path.rename(tmp_path / "ba9876543210"))
    assert stress["differences"](one, other) == ["hash: 0123456789ab, ba9876543210"]
    shutil.rmtree(other.checkpoints / "6")
    assert "names of checkpoints" in stress["differences"](one, other)
    shutil.rmtree(one.checkpoints / "6")
    assert "no checkpoints" in stress["differences"](one, other), "or nothing would have been compared"


def test_equal_is_to_the_bit(stress):
    equal, x = stress["equal"], torch.tensor([[1.0, math.nan], [0.0, 2.0]])
    assert equal({"a": [x, (math.nan, "b", None)]}, {"a": [x.clone(), (math.nan, "b", None)]})
    assert equal(x.t(), x.t().contiguous()) and equal(torch.tensor(3), torch.tensor(3))
    assert not equal(x, x.double()) and not equal(x, x[None]) and not equal(x, -x) and not equal(x, x.tolist())
    assert not equal(torch.zeros(2), -torch.zeros(2)) and not equal(0.0, -0.0)
    assert not equal(1, 1.0) and not equal(1, True) and not equal([1], [1, 1])


def test_the_list_of_names_is_short(stress):
    assert stress["_listed"]("state", list("abcde")) == ["state: a; b; c and 2 more"]
    assert stress["_listed"]("b", []) == []


def test_two_files_are_compared_by_their_bytes(stress, tmp_path):
    one, other = tmp_path / "one.npy", tmp_path / "other.npy"
    one.write_bytes(b"1")
    other.write_bytes(b"1")
    assert stress["between"](one, other) == []
    other.write_bytes(b"2")
    assert stress["between"](one, other) == ["other.npy: its bytes"]


def test_a_revision_is_unpacked(stress, tmp_path):
    commit = stress["commit_of"]("HEAD")
    if commit is None:
        pytest.skip("no repository")
    stress["unpack"](commit, tmp_path)
    assert (tmp_path / "ddpm" / "__init__.py").is_file() and not (tmp_path / ".git").exists()
    assert stress["commit_of"]("no-such-revision") is None


def test_the_last_word_of_a_key_counts(stress):
    assert stress["last_of_each"](["a=1", "b=2", "a=3=4", "~c"]) == ["a=3=4", "b=2", "~c"]


@pytest.mark.slow
def test_code_of_another_folder_is_refused(stress, tmp_path, monkeypatch):
    """As PYTHONPATH or an editable install would smuggle in, where a folder lacks its own."""
    root = SCRIPT.parents[1]
    for name in ("ddpm", "conf"):
        shutil.copytree(root / name, tmp_path / "code" / name)
    monkeypatch.setenv("PYTHONPATH", str(root))
    with pytest.raises(RuntimeError, match=f"would run the code of {re.escape(str(root / 'models' / '__init__.py'))}$"):
        stress["Code"](tmp_path / "code", tmp_path / "out")


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
def test_a_full_disk_stops_training_and_costs_nothing_that_was_saved(stress, small_disk, undisturbed):
    def train(runs: Path) -> tuple[int, str, str]:
        process = Forked([str(stress["TRAIN"]), *short(stress, *FULL), f"runs={runs}"], stress["ENVIRONMENT"])
        return process.wait(), *process.communicate()

    code, out, err = train(small_disk)
    assert code == 1 and "the disk is full" in out and "Traceback" not in out + err
    (path,) = (path for path in (small_disk / "default").iterdir() if path.is_dir())
    run = Run(path)
    last = checkpoint.last_whole(run.checkpoints)
    assert last is not None and f"the last whole checkpoint is {last}" in out
    there = list(run.checkpoints.iterdir())
    assert there and all(checkpoint.verify(folder) is None for folder in there), "nothing half-written is left"
    assert json.loads((path / "status.json").read_text())["state"] == "FAILED"

    subprocess.run(["mount", "-o", "remount,size=50m", str(small_disk)], check=True)
    assert train(small_disk)[0] == 0 and run.status()["state"] == "DONE"
    (whole,) = (path for path in (undisturbed / "default").iterdir() if path.is_dir())
    assert stress["differences"](run, Run(whole)) == []
