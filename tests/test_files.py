"""ddpm/runs/files.py: the old file or the new one, regular ones only, and JSON within bounds."""

import os
from pathlib import Path

import pytest

from ddpm.runs import files


def names(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "a.png"
    path.write_text("old")
    with pytest.raises(RuntimeError), files.replacing(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert names(tmp_path) == ["a.png"] and path.read_text() == "old"


@pytest.mark.parametrize("durable", [False, True])
def test_the_new_file_takes_the_place_of_the_old_one_at_once(durable, tmp_path):
    path = tmp_path / "a.png"
    path.write_text("old")
    with files.replacing(path, durable) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old"
        written = temporary.stat().st_ino
    assert path.stat().st_ino == written  # renamed, not copied
    assert names(tmp_path) == ["a.png"] and path.read_text() == "new"


def test_what_is_durable_is_flushed_before_and_after_it_gets_its_name(tmp_path, monkeypatch):
    done: list[str] = []
    replace = os.replace
    monkeypatch.setattr(files, "flush", lambda path: done.append(path.name))
    monkeypatch.setattr(os, "replace", lambda a, b: (done.append("replace"), replace(a, b)))
    for durable in (False, True):
        with files.replacing(tmp_path / "a.txt", durable) as temporary:
            temporary.write_text("x")
    assert done == ["replace", f".a.{os.getpid()}.txt", "replace", tmp_path.name]


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with (
        pytest.raises(ValueError, match=r"the folder .*nowhere does not exist"),
        files.replacing(tmp_path / "nowhere/a"),
    ):
        pass


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "Expecting value"),
        (b'{"a": ', "Expecting value"),
        (b"\xff\xfe{}", "codec can't decode"),
        (b"[" * 100_000, "recursion"),
        (b" " * 100 + b"{}", None),
        (b" " * 200_001, "more than 200,000 bytes"),
    ],
)
def test_json_is_read_within_bounds(content, words, tmp_path):
    path = tmp_path / "status.json"
    path.write_bytes(content)
    if words is None:
        assert files.read_json(path, 200_000) == {}
        return
    with pytest.raises(ValueError, match=rf"status\.json cannot be read: .*{words}"):
        files.read_json(path, 200_000)


def test_the_size_of_a_regular_file_or_of_what_a_link_leads_to(tmp_path):
    (tmp_path / "a").write_bytes(bytes(7))
    (tmp_path / "link").symlink_to("a")
    assert files.regular_size(tmp_path / "a", 7) == files.regular_size(tmp_path / "link", 7) == 7
    with pytest.raises(ValueError, match="a cannot be read: it has more than 6 bytes"):
        files.regular_size(tmp_path / "a", 6)
    with pytest.raises(FileNotFoundError):
        files.regular_size(tmp_path / "b", 7)


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: os.symlink("/dev/null", path)])
def test_what_is_no_regular_file_is_not_opened(make, tmp_path):
    make(tmp_path / "a")
    with pytest.raises(ValueError, match="a cannot be read: it is no file"):
        files.regular_size(tmp_path / "a", 7)


@pytest.mark.parametrize(
    ("text", "shown"),
    [("two words, é", "two words, é"), ("a\x1b[2J", r"'a\x1b[2J'"), ("x" * 201, "x" * 200 + "..."), ("", "")],
)
def test_text_for_a_terminal(text, shown):
    assert files.shortened(text) == shown


def test_an_origin_knows_when_a_file_changed(tmp_path):
    path, missing = tmp_path / "a", tmp_path / "b"
    path.write_text("one")
    origin = files.Origin(lambda: [path, missing])
    assert not origin.changed() and not origin.changed()
    missing.touch()
    assert origin.changed()
    missing.unlink()
    assert not origin.changed()
    before = path.stat()
    path.write_text("two")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))  # of the same size, as if it were as old
    assert origin.changed()
    path.unlink()
    assert origin.changed()


def test_an_origin_whose_files_cannot_be_listed_any_more_has_changed(tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    origin = files.Origin(lambda: sorted(folder.iterdir()))
    (folder / "new").touch()
    assert origin.changed()
    (folder / "new").unlink()
    assert not origin.changed()
    folder.rmdir()
    assert origin.changed()
