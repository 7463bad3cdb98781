"""ddpm/runs/checkpoint.py: whole or not at all, and never code."""

import errno
import json
import math
import os
import pickle
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn

from ddpm.runs import checkpoint


def network(value: float = 0.0) -> nn.Module:
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    for p in model.parameters():
        nn.init.constant_(p, value)
    return model


def save(folder: Path, step: int = 1, value: float = 1.0, held_out: float | None = 0.5) -> Path:
    state = {"step": step, "seconds": 2.5, "phases": {"all": {"exp_avg": torch.arange(3.0)}}, "precision": "fp32"}
    return checkpoint.save(folder, step, {"model": network(value)}, {"model": network(2 * value)}, state, held_out)


def names(folder: Path) -> list[str]:
    """All that is in a folder, hidden files too."""
    return sorted(os.listdir(folder))


def test_what_is_saved_is_loaded(tmp_path):
    path = save(tmp_path / "run" / "checkpoints", 30, value=3.0)
    assert path == tmp_path / "run" / "checkpoints" / "30" and names(path.parent) == ["30"]
    assert names(path) == ["ema.safetensors", "manifest.json", "model.safetensors", "state.pt"]
    state = checkpoint.load_state(path)
    assert (state["step"], state["seconds"], state["precision"]) == (30, 2.5, "fp32")
    assert torch.equal(state["phases"]["all"]["exp_avg"], torch.arange(3.0))
    model, ema = network(), network()
    checkpoint.load_into(model, path / "model.safetensors")
    checkpoint.load_into(ema, path / "ema.safetensors")
    for loaded, value in ((model, 3.0), (ema, 6.0)):
        assert all(torch.equal(v, network(value).state_dict()[k]) for k, v in loaded.state_dict().items())
    manifest = json.loads((path / "manifest.json").read_text())
    assert (manifest["format"], manifest["step"], manifest["held_out"]) == (checkpoint.FORMAT, 30, 0.5)
    assert manifest["sha256"].keys() == {"ema.safetensors", "model.safetensors", "state.pt"}
    assert checkpoint.verify(path) is None


def test_memory_layout_and_dtype_survive(tmp_path):
    model = nn.Conv2d(3, 4, 3).to(torch.bfloat16).to(memory_format=torch.channels_last)
    checkpoint.save_weights(model, tmp_path / "made" / "model.safetensors")
    loaded = checkpoint.load_weights(tmp_path / "made" / "model.safetensors")
    assert loaded["weight"].dtype == torch.bfloat16 and torch.equal(loaded["weight"], model.weight)


# ---------------------------------------------------------------------------------------------- whole or not at all


@pytest.mark.parametrize("failing", ["safetensors.torch.save", "torch.save", "verify", "flush", "os.rename"])
@pytest.mark.parametrize("error", [RuntimeError("broken"), KeyboardInterrupt()])
def test_what_goes_wrong_while_saving_leaves_the_old_one_and_nothing_else(failing, error, tmp_path, monkeypatch):
    save(tmp_path, 1)
    before = {path.name: path.read_bytes() for path in (tmp_path / "1").iterdir()}

    def fail(*arguments: object, **options: object) -> None:
        raise error

    module, _, name = failing.rpartition(".")
    places = {"torch": torch, "os": os, "safetensors.torch": safetensors.torch, "": checkpoint}
    monkeypatch.setattr(places[module], name, fail)
    for step in (1, 2):
        with pytest.raises(type(error)):
            save(tmp_path, step, value=9.0)
    monkeypatch.undo()
    assert names(tmp_path) == ["1"]
    assert {path.name: path.read_bytes() for path in (tmp_path / "1").iterdir()} == before


def test_the_old_one_of_the_same_step_comes_back_if_the_new_one_cannot_take_its_place(tmp_path, monkeypatch):
    save(tmp_path, 1)
    before, rename = {path.name: path.read_bytes() for path in (tmp_path / "1").iterdir()}, os.rename

    def only_aside(source: Path, target: Path) -> None:
        if source.name.startswith(f".1.{os.getpid()}"):
            raise OSError(errno.EIO, "broken")
        rename(source, target)

    monkeypatch.setattr(os, "rename", only_aside)
    with pytest.raises(OSError, match="broken"):
        save(tmp_path, 1, value=9.0)
    assert names(tmp_path) == ["1"]
    assert {path.name: path.read_bytes() for path in (tmp_path / "1").iterdir()} == before


@pytest.mark.parametrize("name", ["model.safetensors", "ema.safetensors", "state.pt"])
@pytest.mark.parametrize("harm", [lambda content: content[:-1], lambda content: bytes(content[:-1]) + b"!"])
def test_a_disk_that_writes_something_else_is_noticed_before_the_old_one_goes(name, harm, tmp_path, monkeypatch):
    save(tmp_path, 1)
    write = Path.write_bytes

    def wrong(path: Path, content: bytes) -> int:
        return write(path, harm(content) if path.name == name else content)

    monkeypatch.setattr(Path, "write_bytes", wrong)
    with pytest.raises(OSError, match=f"does not read back as it was written: {name} does not match its checksum"):
        save(tmp_path, 2)
    assert names(tmp_path) == ["1"] and checkpoint.verify(tmp_path / "1") is None


def test_killed_while_an_old_one_is_deleted_no_damaged_one_is_left(tmp_path, monkeypatch):
    """The names that count disappear at once, whatever is left of the files."""
    for step in (1, 2, 3):
        save(tmp_path, step)
    monkeypatch.setattr(checkpoint.shutil, "rmtree", lambda path, **options: None)
    checkpoint.rotate(tmp_path, keep=1)
    assert [name for name in names(tmp_path) if not name.startswith(".")] == ["1", "3"]  # the best is the first
    monkeypatch.undo()
    checkpoint.rotate(tmp_path, keep=1)
    assert names(tmp_path) == ["1", "3"]


def test_what_is_on_disk_was_flushed_before_it_got_its_name(tmp_path, monkeypatch):
    """The files, then the names in their folder, then the rename, then the name of the folder."""
    done: list[str] = []
    flush, rename = checkpoint.flush, os.rename
    monkeypatch.setattr(checkpoint, "flush", lambda path: (done.append(path.name), flush(path)))
    monkeypatch.setattr(os, "rename", lambda a, b: (done.append("rename"), rename(a, b)))
    save(tmp_path / "checkpoints", 7)
    temporary = f".7.{os.getpid()}"
    assert sorted(done[:4]) == ["ema.safetensors", "manifest.json", "model.safetensors", "state.pt"]
    assert done[4:] == [temporary, "rename", "checkpoints"]


@pytest.mark.parametrize("name", ["model.safetensors", "ema.safetensors", "state.pt", "manifest.json"])
def test_a_full_disk_is_told_as_such(name, tmp_path, monkeypatch):
    """Each file in turn is written to a device that is always full."""
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    save(tmp_path, 1)
    mkdir = Path.mkdir

    def with_a_full_file(path: Path, **options: object) -> None:
        mkdir(path, **options)
        (path / name).symlink_to("/dev/full")

    monkeypatch.setattr(Path, "mkdir", with_a_full_file)
    with pytest.raises(OSError) as raised:
        save(tmp_path, 2)
    assert raised.value.errno == errno.ENOSPC and names(tmp_path) == ["1"]


def test_saving_again_replaces(tmp_path):
    save(tmp_path, 1, value=1.0)
    save(tmp_path, 1, value=5.0)
    assert names(tmp_path) == ["1"] and checkpoint.verify(tmp_path / "1") is None
    assert checkpoint.load_weights(tmp_path / "1" / "model.safetensors")["0.weight"].eq(5).all()


def test_temporary_folders_of_a_process_that_was_killed_are_no_checkpoints_and_go_away(tmp_path):
    save(tmp_path, 1)
    left = tmp_path / ".7.12345"
    left.mkdir()
    (left / "model.safetensors").write_bytes(b"half")
    assert checkpoint.last_whole(tmp_path).name == "1" and checkpoint.best(tmp_path) == 1
    save(tmp_path, 2)
    checkpoint.rotate(tmp_path, keep=2)
    assert names(tmp_path) == ["1", "2"]


# ---------------------------------------------------------------------------------------------- damage


def truncate(path: Path) -> None:
    (path / "model.safetensors").write_bytes((path / "model.safetensors").read_bytes()[:-7])


def flip_a_bit(path: Path) -> None:
    content = bytearray((path / "ema.safetensors").read_bytes())
    content[-3] ^= 4
    (path / "ema.safetensors").write_bytes(content)


def manifest(text: str | bytes):
    def write(path: Path) -> None:
        (path / "manifest.json").write_bytes(text if isinstance(text, bytes) else text.encode())

    return write


DAMAGES = {
    "cut off": (truncate, "model.safetensors does not match its checksum"),
    "one bit": (flip_a_bit, "ema.safetensors does not match its checksum"),
    "a file is missing": (lambda path: (path / "state.pt").unlink(), "FileNotFoundError"),
    "no manifest": (lambda path: (path / "manifest.json").unlink(), "FileNotFoundError"),
    "empty manifest": (manifest(""), "manifest.json cannot be read"),
    "binary manifest": (manifest(b"\xff\x00\xfe"), "manifest.json cannot be read"),
    "a manifest of something else": (manifest("{}"), "KeyError"),
    "a manifest that is a list": (manifest("[1]"), "TypeError"),
    "a manifest that is null": (manifest("null"), "TypeError"),
    "checksums that are a list": (manifest('{"format": 1, "sha256": ["state.pt"]}'), "Error"),
    "a format in words": (manifest('{"format": "new", "sha256": {}}'), "TypeError"),
    "a manifest that names no file": (manifest('{"format": 1, "step": 2, "sha256": {}}'), "safetensors"),
    "a name that leads elsewhere": (
        manifest(
            '{"format": 1, "sha256": {"../../secret": 0, "model.safetensors": 0, "ema.safetensors": 0, "state.pt": 0}}'
        ),
        "its manifest names '../../secret', which is no file of a checkpoint",
    ),
    "an endless manifest": (manifest("[" * 100_000), "it has more than 65,536 bytes"),
    "a deep manifest": (manifest("[" * 60_000), "maximum recursion depth"),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damaged_checkpoint_is_recognised_named_and_passed_over(kind, tmp_path, capsys):
    damage, words = DAMAGES[kind]
    save(tmp_path, 1, held_out=0.5)
    save(tmp_path, 2, held_out=0.1)
    assert checkpoint.last_whole(tmp_path).name == "2" and capsys.readouterr().out == ""
    damage(tmp_path / "2")
    assert words in checkpoint.verify(tmp_path / "2")
    assert checkpoint.last_whole(tmp_path) == tmp_path / "1"
    said = capsys.readouterr().out
    assert str(tmp_path / "2") in said and words in said and "going back to the one before" in said


def test_the_best_is_one_of_those_that_were_measured_by_the_samples_of_the_last(tmp_path):
    """An earlier version measured others: its losses, of which no number is noted, are no comparison."""
    save(tmp_path, 1, held_out=0.1)
    for step, held_out in ((2, 0.3), (3, 0.4)):
        path = save(tmp_path, step, held_out=held_out)
        manifest = json.loads((path / "manifest.json").read_text())
        (path / "manifest.json").write_text(json.dumps(manifest | {"n": 512}))
    assert checkpoint.best(tmp_path) == 2
    save(tmp_path, 4, held_out=0.2)
    assert checkpoint.best(tmp_path) == 1


@pytest.mark.parametrize("kind", [k for k in DAMAGES if "manifest" in k])
def test_a_manifest_that_cannot_be_read_stops_neither_rotation_nor_the_search_for_the_best(kind, tmp_path):
    for step, held_out in ((1, 0.1), (2, 0.5), (3, 0.4), (4, 0.3)):
        save(tmp_path, step, held_out=held_out)
    DAMAGES[kind][0](tmp_path / "3")
    assert checkpoint.best(tmp_path) == 1
    checkpoint.rotate(tmp_path, keep=1)
    assert checkpoint.last_whole(tmp_path).name == "4" and (tmp_path / "1").is_dir() and not (tmp_path / "2").exists()


def test_a_newer_format_is_an_error_and_nothing_is_passed_over_or_deleted(tmp_path):
    save(tmp_path, 1)
    save(tmp_path, 2)
    manifest('{"format": 99, "sha256": {}}')(tmp_path / "2")
    assert "its format 99 is newer than 2" in checkpoint.verify(tmp_path / "2")
    for refused in (lambda: checkpoint.last_whole(tmp_path), lambda: checkpoint.drop_after(tmp_path, 1)):
        with pytest.raises(ValueError, match=r"2 was written by a newer version .*format 99 is newer than 2"):
            refused()
    assert names(tmp_path) == ["1", "2"]


def test_without_a_whole_checkpoint_there_is_none(tmp_path):
    assert checkpoint.last_whole(tmp_path / "nowhere") is None and checkpoint.best(tmp_path / "nowhere") is None
    save(tmp_path, 1)
    truncate(tmp_path / "1")
    assert checkpoint.last_whole(tmp_path) is None


# ---------------------------------------------------------------------------------------------- which are kept


@pytest.mark.parametrize(
    ("keep", "losses", "kept"),
    [
        (2, [3.0, 1.0, 2.0, 4.0, 5.0], [2, 4, 5]),
        (2, [3.0, 2.0, 2.5, 4.0, 1.0], [4, 5]),
        (1, [None] * 5, [5]),
        (9, [1.0] * 5, [1, 2, 3, 4, 5]),
        (1, [2.0, math.nan, 1.0, math.inf, math.nan], [3, 5]),
        (1, [math.nan, 2.0, 1.0, 3.0, 4.0], [3, 5]),
    ],
)
def test_rotation_keeps_the_last_and_the_best(keep, losses, kept, tmp_path):
    for step, loss in enumerate(losses, 1):
        save(tmp_path, step, held_out=loss)
    checkpoint.rotate(tmp_path, keep)
    assert names(tmp_path) == [str(n) for n in kept]
    assert not any("NaN" in path.read_text() or "Inf" in path.read_text() for path in tmp_path.glob("*/manifest.json"))


@pytest.mark.parametrize(
    ("every", "kept"), [(None, [3, 7]), (1, [1, 2, 3, 4, 5, 6, 7]), (2, [2, 3, 4, 6, 7]), (9, [3, 7])]
)
def test_rotation_leaves_the_stages(every, kept, tmp_path):
    for step in range(1, 8):
        save(tmp_path, step, held_out=abs(step - 3))
        checkpoint.rotate(tmp_path, 1, every)
    assert names(tmp_path) == [str(n) for n in kept]


@pytest.mark.parametrize("links", [True, False])
def test_one_that_is_kept_outlives_rotation(links, tmp_path, monkeypatch):
    if not links:
        monkeypatch.setattr(os, "link", lambda a, b: (_ for _ in ()).throw(OSError(errno.EPERM, "no links here")))
    for step in (1, 2):
        save(tmp_path / "checkpoints", step, held_out=None)
    kept = checkpoint.keep(tmp_path / "checkpoints" / "1", tmp_path / "aside")
    assert kept == checkpoint.keep(tmp_path / "checkpoints" / "1", tmp_path / "aside") == tmp_path / "aside" / "1"
    checkpoint.rotate(tmp_path / "checkpoints", keep=1)
    assert names(tmp_path / "checkpoints") == ["2"] and checkpoint.verify(kept) is None


def test_hidden_files_that_others_leave_stop_no_rotation(tmp_path):
    """As macOS's .DS_Store."""
    save(tmp_path, 1)
    (tmp_path / ".DS_Store").write_bytes(b"")
    (tmp_path / ".notes").mkdir()
    checkpoint.rotate(tmp_path, keep=1)
    assert names(tmp_path) == [".DS_Store", ".notes", "1"]


def test_steps_are_numbers_and_not_words(tmp_path):
    for step in (9, 10, 100):
        save(tmp_path, step, held_out=None)
    (tmp_path / "notes").mkdir()
    assert checkpoint.last_whole(tmp_path).name == "100" and checkpoint.best(tmp_path) == 100
    checkpoint.rotate(tmp_path, keep=2)
    assert names(tmp_path) == ["10", "100", "notes"]


# ---------------------------------------------------------------------------------------------- what may be loaded


class Malicious:
    def __init__(self, path: str):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("write", [torch.save, lambda o, path: path.write_bytes(pickle.dumps(o))])
def test_code_in_state_is_refused_and_not_run(write, tmp_path):
    path, trap = save(tmp_path), tmp_path / "trap"
    write({"step": 1, "optimizer": Malicious(str(trap))}, path / "state.pt")
    with pytest.raises(ValueError, match=r"state\.pt (holds more than plain data|is no whole file of torch\.save)"):
        checkpoint.load_state(path)
    assert not trap.exists()


@pytest.mark.parametrize("content", [None, [1], {"step": 1}, {"step": "1", "seconds": 0.0}])
def test_plain_data_that_are_no_state_are_refused(content, tmp_path):
    path = save(tmp_path)
    torch.save(content, path / "state.pt")
    with pytest.raises(ValueError, match="is not the state of a run"):
        checkpoint.load_state(path)


@pytest.mark.parametrize("part", [0.0, 0.3, 0.9])
def test_a_state_that_is_cut_off_is_refused(part, tmp_path):
    path = save(tmp_path) / "state.pt"
    path.write_bytes(path.read_bytes()[: int(part * path.stat().st_size)])
    with pytest.raises(ValueError, match=r"state\.pt is no whole file"):
        checkpoint.load_state(path.parent)


def test_weights_that_do_not_fit_are_listed(tmp_path):
    path = save(tmp_path) / "model.safetensors"
    other = nn.Sequential(nn.Linear(3, 4), nn.Identity(), nn.Linear(4, 1))
    with pytest.raises(ValueError) as raised:
        checkpoint.load_into(other, path)
    message = str(raised.value)
    assert str(path) in message and "does not fit the network" in message
    assert (
        "2 missing: 2.bias, 2.weight" in message
        and "5 unknown: 1.bias, 1.num_batches_tracked, 1.running_mean, ..." in message
    )
    assert "2 of another shape: 0.bias (2,), the network's is (4,), 0.weight (2, 3), the network's is (4, 3)" in message


@pytest.mark.parametrize("content", [b"", b"garbage", b"\x08" + bytes(7) + b"{}"])
def test_a_file_that_holds_no_weights_is_told_in_one_kind_of_error(content, tmp_path):
    file = tmp_path / "ema.safetensors"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"ema\.safetensors"):
        checkpoint.load_into(network(), file)
