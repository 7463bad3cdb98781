"""ddpm/data/captioned.py: which captions belong to which pictures, and what is refused."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from ddpm.data import Captioned, Folder

COLOURS = {"a.png": (255, 0, 0), "b.png": (0, 255, 0), "sub/c.png": (0, 0, 255)}
SAID = {"a.png": "a red square", "b.png": "a green square", "sub/c.png": "a blue square"}


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    for name, colour in COLOURS.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (9, 8), colour).save(tmp_path / name)
    return tmp_path


def write(folder: Path, form: str, said: dict[str, str | None] = SAID) -> None:
    """Captions in one of the forms; of a table in another order than that of the names."""
    rows = list(reversed(said.items()))
    if form == "txt":
        for name, text in rows:
            (folder / name).with_suffix(".txt").write_text(text or "")
    elif form == "jsonl":
        lines = [json.dumps({"other": 1, "file_name": name, "text": text}) for name, text in rows]
        (folder / "metadata.jsonl").write_text("\n\n".join(lines) + "\n")
    else:
        lines = [f'{name},"{text or ""}",x' for name, text in rows]
        (folder / "metadata.csv").write_text("\ufefffile_name,text,other\n" + "\n".join(lines))


def data(folder: Path, **options) -> Captioned:
    return Captioned(folder, **{"image_size": 8, "validation": 0} | options)


@pytest.mark.parametrize("form", ["txt", "jsonl", "csv"])
def test_every_picture_has_its_caption(pictures, form):
    write(pictures, form)
    read = data(pictures)
    assert read.captions == tuple(SAID.values()) and read.shape == (3, 8, 8) and read.labels is None
    assert read.images[:, :, 4, 4].tolist() == [list(colour) for colour in COLOURS.values()]
    assert read.name == pictures.name and read.split == "all" and data(pictures, name="mine").name == "mine"
    assert read.origin is not None and not read.origin.changed()
    write(pictures, form, SAID | {"b.png": "another"})
    assert read.origin.changed()
    other = data(pictures)
    assert other.identity()["sha256"] == read.identity()["sha256"]
    assert other.identity()["captions"] != read.identity()["captions"] and other.captions[1] == "another"


def test_pictures_are_those_of_a_folder_and_white_space_is_a_blank(pictures):
    write(pictures, "txt", SAID | {"a.png": " a  red\n\tsquare \n"})
    (pictures / "sub" / "c.png").unlink()
    (pictures / "sub" / "c.txt").unlink()
    read = data(pictures, channels=1)
    assert torch.equal(read.images, Folder(pictures, 8, 1, validation=0).images)
    assert read.captions == ("a red square", "a green square") and data(pictures, flip=True).flip


def test_broken_pictures_are_left_out_with_their_captions(pictures, capsys):
    write(pictures, "csv")
    (pictures / "a.png").write_bytes(b"no picture")
    read = data(pictures)
    assert read.captions == ("a green square", "a blue square") and len(read) == 2
    assert "skipped 1 of 3 images" in capsys.readouterr().out


def test_halves_have_captions_of_their_own(pictures):
    for half, colour in (("train", "red"), ("test", "blue")):
        (pictures / "both" / half).mkdir(parents=True)
        Image.new("RGB", (8, 8), colour).save(pictures / "both" / half / "1.png")
        write(pictures / "both" / half, "jsonl", {"1.png": colour})
    assert data(pictures / "both").captions == ("red",) and data(pictures / "both", split="test").captions == ("blue",)


def test_what_lies_outside_is_not_read(pictures):
    Image.new("RGB", (8, 8)).save(pictures / "out.png")
    write(pictures / "sub", "jsonl", {"c.png": "blue", "../out.png": "black"})
    with pytest.raises(ValueError, match=r"1 captions have no image: \.\./out\.png"):
        data(pictures / "sub")


def lines(*rows: object) -> dict[str, str]:
    return {"metadata.jsonl": "\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows)}


def row(name: str, text: object = "x") -> dict[str, object]:
    return {"file_name": name, "text": text}


ALL = [row(name) for name in SAID]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "has no captions; give a file .txt next to each image, or one of metadata.jsonl and metadata.csv"),
        ({"a.txt": "x", "b.txt": "x"}, "1 images have no caption: sub/c.png"),
        ({"a.txt": "x", "b.txt": "x", "sub/c.txt": "x", "d.txt": "x", "e.txt": "x"}, "2 captions have no image: d.txt"),
        ({"a.txt": "x", "b.txt": " \n", "sub/c.txt": "x"}, "1 captions are empty: b.png"),
        ({"a.txt": "x"} | lines(*ALL), "has captions of several forms: metadata.jsonl and 1 files .txt"),
        (lines(*ALL) | {"metadata.csv": ""}, "several forms: metadata.jsonl and metadata.csv"),
        (lines(*ALL, row("d.png")), "1 captions have no image: d.png"),
        (lines(*ALL[1:]), "1 images have no caption: a.png"),
        (lines(*ALL, row("./a.png")), "1 images have several captions: a.png"),
        (lines(*ALL[1:], row("a.png", None)), "1 captions are empty: a.png"),
        (lines(row("a.png", 3)), "line 1: file_name and text must be texts"),
        (lines(*ALL, {"file_name": "a.png"}), "line 4: there is no text"),
        (lines(*ALL, {"text": "x"}), "line 4: file_name and text must be texts"),
        (lines(*ALL, "[1]"), r"line 4: \[1\] is no object with file_name and text"),
        (lines("{"), "metadata.jsonl, line 1"),
        ({"metadata.csv": "name,text\na.png,x"}, "metadata.csv, line 1: the head must have file_name and text"),
        ({"metadata.csv": 'file_name,text\na.png,"x" y\n'}, "metadata.csv, line 2"),
        ({"metadata.csv": "file_name,text\na.png,x\na.png,x\n"}, "1 images have several captions: a.png"),
        (
            {"a.txt": "x", "b.txt": "x", "sub/c.txt": "x", "a.jpg": "y"},
            r"text files each name several images: a\.jpg = a",
        ),
        ({"a.txt": b"\xff\xfe"}, "a.txt cannot be read: it is no UTF-8 text"),
        ({"a.txt": b"x" * 100_000}, "a.txt cannot be read: it has more than 65,536 bytes"),
    ],
    ids=str,
)
def test_what_is_refused(pictures, files, message):
    for name, content in files.items():
        (pictures / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=message):
        data(pictures)


def test_folders_and_options_that_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="no folder"):
        data(tmp_path / "nowhere")
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(ValueError, match=r"has captions \(1 files .txt\), but no images"):
        data(tmp_path)
    for options in ({"split": "all"}, {"channels": 2}, {"validation": 1}, {"name": "a/b"}, {"condition": "depth"}):
        with pytest.raises(ValueError, match=next(iter(options))):
            data(tmp_path, **options)
