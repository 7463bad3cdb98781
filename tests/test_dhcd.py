"""The Devanagari characters of UCI: what is read of an archive, what is refused, what is recorded and kept."""

import hashlib
import io
import os
import struct
import tracemalloc
import unicodedata
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import test_data
import torch
from PIL import Image
from test_data import Server, names

from ddpm.data import DHCD, dhcd
from ddpm.data.devanagari import CHARACTERS, CLASSES
from ddpm.data.download import download
from ddpm.runs.tensor_cache import save_tensor

server = test_data.server  # the fixture
ARCHIVE, FOLDER = dhcd.ARCHIVES[0], dhcd.FOLDER

# what the folders' names say, in Unicode's words; the last three are conjuncts
LETTERS = (
    "ka KA, kha KHA, ga GA, gha GHA, kna NGA, cha CA, chha CHA, ja JA, jha JHA, yna NYA, taamatar TTA, thaa TTHA, "
    "daa DDA, dhaa DDHA, adna NNA, tabala TA, tha THA, da DA, dha DHA, na NA, pa PA, pha PHA, ba BA, bha BHA, ma MA, "
    "yaw YA, ra RA, la LA, waw VA, motosaw SHA, petchiryakha SSA, patalosaw SA, ha HA, chhya KA+SSA, tra TA+RA, "
    "gya JA+NYA"
)
DIGITS = "ZERO ONE TWO THREE FOUR FIVE SIX SEVEN EIGHT NINE"


def unicode_names(glyph: str) -> str:
    """KA for क, KA+SSA for क्ष, ONE for १."""
    parts = [unicodedata.name(character).removeprefix("DEVANAGARI ").split(" ", 1) for character in glyph]
    return "+".join(name for kind, name in parts if kind != "SIGN")


def test_the_table() -> None:
    letters = [f"character_{n}_{letter}" for n, letter in enumerate(LETTERS.split(", "), start=1)]
    expected = [*letters, *(f"digit_{digit} {name}" for digit, name in enumerate(DIGITS.split()))]
    assert [f"{folder} {unicode_names(glyph)}" for _, folder, glyph in CHARACTERS] == expected
    assert [character.label for character in CHARACTERS] == list(range(46))
    assert list(CLASSES) == [name.split()[0] for name in expected]
    assert all((len(glyph) == 3) == (20 < label < 36 and "+" in expected[label]) for label, _, glyph in CHARACTERS)


# ---------------------------------------------------------------------------------------------- archives


def png(label: int = 0, number: int = 0, size: tuple[int, int] = (32, 32), dtype: type = np.uint8) -> bytes:
    """A picture whose first pixels are its label and number."""
    pixels = np.zeros(size, dtype)
    pixels[0, :3] = label, number, 255
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


def files(train: int = 2, test: int = 1, top: str = f"{FOLDER}/") -> dict[str, bytes]:
    """All classes, from the last; the train half's images are 9, 10, ..., from the last, too."""
    return {
        f"{top}{half}/{folder}/{number}.png": png(label, number)
        for half, numbers in (("Train", range(9, 9 + train)), ("Test", range(test)))
        for label, folder, _ in reversed(CHARACTERS)
        for number in reversed(numbers)
    }


def zip_bytes(content: dict[str, bytes], compression: int = zipfile.ZIP_DEFLATED) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", compression) as archive:
        for name, member in content.items():
            archive.writestr(zipfile.ZipInfo(name), member, compression)
    return out.getvalue()


WHOLE = zip_bytes(files())
FIRST = f"{FOLDER}/Train/{CLASSES[0]}/9.png"


def changed(at: int, layout: str, value: int, content: bytes = WHOLE, name: str = FIRST) -> bytes:
    """An archive with another value at `at` of the entry of a member in the list of members."""
    changed = bytearray(content)
    struct.pack_into(layout, changed, content.rindex(name.encode()) - 46 + at, value)
    return bytes(changed)


def put(path: Path, content: bytes = WHOLE) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def extract(root: Path, content: dict[str, bytes]) -> Path:
    for name, member in content.items():
        put(root / name, member)
    return root


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@pytest.fixture
def published(server: Server, monkeypatch: pytest.MonkeyPatch) -> Server:
    """Serves the archive as both addresses; of the images, as many as there are."""
    server.files |= {"new.zip": WHOLE, "old.zip": WHOLE}
    monkeypatch.setattr(dhcd, "URLS", (server.url("new.zip"), server.url("old.zip")))
    monkeypatch.setattr(dhcd, "PUBLISHED", {"train": 2, "test": 1})
    return server


# ---------------------------------------------------------------------------------------------- what is read


def test_downloads_and_reads_the_archive(
    tmp_path: Path, published: Server, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    d = DHCD(tmp_path)
    assert (d.name, d.split, d.shape, d.num_classes, d.classes) == ("dhcd", "train", (1, 32, 32), 46, CLASSES)
    assert d.labels.tolist() == [label for label in range(46) for _ in range(2)]
    assert d.images[:, 0, 0, 0].tolist() == d.labels.tolist(), "the label of a picture's own folder"
    assert d.images[:, 0, 0, 1].tolist() == [9, 10] * 46, "10 comes after 9"
    assert set(d.images[:, 0, 0, 2].tolist()) == {255} and not d.images[:, 0, 1:].any()
    kept = [f"{half}-{sha256(WHOLE)[:12]}.safetensors" for half in ("test", "train")]
    assert names(tmp_path / "dhcd") == [ARCHIVE, f"{ARCHIVE}.sha256", *kept], "nothing is extracted"
    assert "its checksum is recorded now, since there is no published one" in capsys.readouterr().out
    assert not d.origin.changed()

    monkeypatch.setattr(dhcd, "decode_archive", lambda *_: pytest.fail("decoded twice"))
    test = DHCD(tmp_path, split="test", image_size=16, channels=3)
    assert test.images.shape == (46, 3, 16, 16) and test.split == "test" and test.labels.tolist() == list(range(46))
    assert len(published.requests) == 1 and len(list(tmp_path.rglob("*"))) == 5
    assert capsys.readouterr().out.count("matches the checksum recorded on") == 1


def test_images_are_in_the_order_of_their_numbers() -> None:
    numbers = ["007", "10", "8", "1", "a2", "a10", "a1b3", "9" * 5000]
    found = dhcd.arrange([f"Test/{folder}/{n}.png" for n in numbers for folder in CLASSES], "test", Path("x"))
    order = ["1", "007", "8", "10", "9" * 5000, "a1b3", "a2", "a10"]
    assert found == [f"Test/{folder}/{n}.png" for folder in CLASSES for n in order]


def test_folders_are_known_by_their_numbers(tmp_path: Path) -> None:
    spelled = {name.replace("kna", "nga").replace("character_2_", "character_02_"): f for name, f in files().items()}
    put(tmp_path / ARCHIVE, zip_bytes(spelled))
    assert {f"{FOLDER}/Train/character_5_nga/9.png", f"{FOLDER}/Test/character_02_kha/0.png"} <= spelled.keys()
    assert DHCD(tmp_path).images[:, 0, 0, 0].tolist() == [label for label in range(46) for _ in range(2)]


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_an_archive_in_an_archive(tmp_path: Path, compression: int) -> None:
    put(tmp_path / "plain" / ARCHIVE)
    nested = zip_bytes({ARCHIVE: WHOLE, "readme.txt": b"!", f"__MACOSX/._{ARCHIVE}": b"!"}, compression)
    put(tmp_path / "nested" / dhcd.ARCHIVES[1], nested)
    put(tmp_path / "deeper" / ARCHIVE, zip_bytes({ARCHIVE: nested}))
    assert DHCD(tmp_path / "nested").identity() == DHCD(tmp_path / "plain").identity()
    with pytest.raises(ValueError, match=r"Train lacks 46 of the 46 classes: character_1_ka, .*, \.\.\."):
        DHCD(tmp_path / "deeper")


def test_only_images_in_the_known_folders_are_read(tmp_path: Path) -> None:
    inside = f"{FOLDER}/Train/{CLASSES[3]}"
    others = [
        "../../evil.png", "../Train/digit_1/1.png", "/Train/digit_1/1.png", f"{tmp_path}/evil.png",
        "x/Train/digit_1/1.png", f"{inside}/../1.png", f"{inside}/deeper/1.png", f"{inside}/._9.png",
        f"{inside}/Thumbs.db", f"{inside}/1.jpg", f"__MACOSX/{inside}/9.png", f"{FOLDER}/.DS_Store",
        f"{FOLDER}/Train/1.png", f"{FOLDER}/train/digit_1/1.png", "C:\\evil.png", f"{FOLDER}/Train/digit_१/1.png",
        "other.zip",
    ]  # fmt: skip
    put(tmp_path / "plain" / ARCHIVE)
    put(tmp_path / "more" / ARCHIVE, zip_bytes(files() | dict.fromkeys(others, b"!")))
    before = set(tmp_path.parent.rglob("*"))
    assert DHCD(tmp_path / "more").identity() == DHCD(tmp_path / "plain").identity()
    new = {path.relative_to(tmp_path).parts[1:] for path in set(tmp_path.parent.rglob("*")) - before}
    assert {parts[0] for parts in new} == {"dhcd"} and len(new) == 3  # that folder, and a file for each archive


def test_a_folder_is_read_as_its_archive_is(tmp_path: Path) -> None:
    put(tmp_path / "archive" / ARCHIVE)
    expected = [DHCD(tmp_path / "archive", split=half).identity() for half in ("train", "test")]
    for at, top in (("here", ""), ("here/dhcd", ""), ("there", f"{FOLDER}/"), ("there/dhcd", f"{FOLDER}/")):
        root = extract(tmp_path / at, files(top=top) | {f"{top}Train/digit_1/Thumbs.db": b"!"})
        found = [DHCD(tmp_path / at.split("/")[0], split=half).identity() for half in ("train", "test")]
        assert found == expected and not list(root.rglob("*.safetensors"))


def test_where_it_looks_first(tmp_path: Path) -> None:
    put(tmp_path / ARCHIVE, zip_bytes(files(test=1)))
    assert len(DHCD(tmp_path, "test", download=False)) == 46
    extract(tmp_path, files(test=2))
    assert len(DHCD(tmp_path, "test", download=False)) == 92
    put(tmp_path / "dhcd" / ARCHIVE, zip_bytes(files(test=3)))
    assert len(DHCD(tmp_path, "test", download=False)) == 138
    (tmp_path / "dhcd" / "Train").mkdir()  # without Test it is not the folder
    assert len(DHCD(tmp_path, "test", download=False)) == 138


def test_knows_when_its_files_changed(tmp_path: Path) -> None:
    put(tmp_path / ARCHIVE)
    archive = DHCD(tmp_path)
    assert not archive.origin.changed()
    put(tmp_path / f"{ARCHIVE}.sha256", f"{sha256(WHOLE)}  {ARCHIVE}\n".encode())
    assert archive.origin.changed()
    archive = DHCD(tmp_path)
    assert not archive.origin.changed()
    extract(tmp_path, files())
    assert archive.origin.changed()
    train, test = DHCD(tmp_path), DHCD(tmp_path, split="test")
    assert not train.origin.changed() and not test.origin.changed()
    put(tmp_path / FIRST, png(1))
    assert train.origin.changed() and not test.origin.changed()
    (tmp_path / FOLDER / "Test").rename(tmp_path / FOLDER / "Tested")
    assert test.origin.changed()


def test_other_counts_than_the_published_are_said(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = put(tmp_path / ARCHIVE)
    for half, number, usual in (("train", 2, "1,700"), ("test", 1, "300")):
        DHCD(tmp_path, split=half)
        expected = f"dhcd: {path} has {number} images of each class in its {half} half, not {usual}"
        assert expected in capsys.readouterr().out.splitlines()


def test_the_published_counts_need_no_words(tmp_path: Path, published: Server, capsys: pytest.CaptureFixture) -> None:
    extract(tmp_path, files())
    DHCD(tmp_path)
    assert not capsys.readouterr().out and not published.requests


def test_missing_is_named(tmp_path: Path) -> None:
    message = f"no {FOLDER}/ with Train and Test in it and no {ARCHIVE} in .*dhcd or .*set download=true"
    with pytest.raises(FileNotFoundError, match=message):
        DHCD(tmp_path, download=False)
    with pytest.raises(ValueError, match="split='all': choose one of auto, train, test"):
        DHCD(tmp_path, split="all")
    with pytest.raises(ValueError, match="channels=2"):
        DHCD(tmp_path, channels=2)
    assert not names(tmp_path)


# ---------------------------------------------------------------------------------------------- what is refused


def without(name: str) -> dict[str, bytes]:
    return {path: content for path, content in files().items() if f"/Train/{name}/" not in path}


def with_first(content: bytes) -> bytes:
    return zip_bytes({**files(), FIRST: content})


def same_name_twice() -> bytes:
    """One file gets the name of another, which has the same length."""
    eights = {f"{FOLDER}/Train/{folder}/8.png": png() for folder in CLASSES}
    return zip_bytes(files(train=1) | eights).replace(b"digit_0/8", b"digit_0/9")


REFUSED: dict[str, tuple[bytes, str]] = {
    "a class is missing": (zip_bytes(without("digit_7")), "Train lacks 1 of the 46 classes: digit_7$"),
    "a half is missing": (zip_bytes(files(train=0)), "Train lacks 46 of the 46 classes"),
    "all lie outside": (zip_bytes(files(top="../")), "Train lacks 46"),
    "nothing": (zip_bytes({}), "Train lacks 46"),
    "a class has fewer": (
        zip_bytes({name: content for name, content in files().items() if name != FIRST}),
        "Train must hold the same number of images of each class, but has 1 in .*character_1_ka and 2 in",
    ),
    "an unknown character": (zip_bytes({**files(), "Train/character_37_x/1.png": png()}), "character_37_x is no class"),
    "character 0": (zip_bytes({**files(), "Train/character_0_x/1.png": png()}), "character_0_x is no class"),
    "an unknown digit": (zip_bytes({**files(), "Train/digit_10/1.png": png()}), "digit_10 is no class; .*_1_ka to dig"),
    "a number with two folders": (
        zip_bytes({**files(), "Train/digit_1/9.png": png(), "Train/digit_1/10.png": png()}),
        f"Train has more than one folder of a class: {FOLDER}/Train/digit_1 and Train/digit_1",
    ),
    "two spellings": (
        zip_bytes({**files(), f"{FOLDER}/Train/character_1_kaa/9.png": png()}),
        "more than one folder of a class: .*character_1_ka and .*character_1_kaa",
    ),
    "a name twice": (same_name_twice(), "holds .*Train/digit_0/9.png more than once"),
    "another size": (with_first(png(size=(100, 100))), "_ka/9.png cannot be read: it is 100x100 of mode L, not 32x32"),
    "16 bits": (with_first(png(dtype=np.uint16)), "_ka/9.png cannot be read: it is 32x32 of mode I;16, not 32x32 of 8"),
    "a broken image": (with_first(png()[:50]), "_ka/9.png cannot be read"),
    "no image": (with_first(b"no image"), "_ka/9.png cannot be read: not a PNG"),
    "an empty image": (with_first(b""), "_ka/9.png cannot be read"),
    "too large": (with_first(png() + bytes(1 << 16)), "_ka/9.png has 65,6.. bytes, more than the 65,536 that are acc"),
    "encrypted": (changed(8, "<H", 1), "_ka/9.png is encrypted"),
    "not deflated": (zip_bytes(files(), zipfile.ZIP_BZIP2), "is neither stored nor deflated"),
    "an unknown method": (changed(10, "<H", 99), "is neither stored nor deflated"),
    "a wrong checksum": (changed(16, "<L", 1), "Bad CRC-32"),
    "a member elsewhere": (changed(42, "<L", 1), "Bad magic number"),
    "cut off": (WHOLE[:-1000], "File is not a zip file"),
    "its first half is lost": (WHOLE[len(WHOLE) // 2 :], "cannot be read"),
    "html": (b"<html>Not found</html>", "File is not a zip file"),
    "empty": (b"", "File is not a zip file"),
    "broken, in another": (zip_bytes({ARCHIVE: WHOLE[:-1000]}), "File is not a zip file"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(tmp_path: Path, case: str) -> None:
    content, message = REFUSED[case]
    path = put(tmp_path / ARCHIVE, content)
    with pytest.raises(ValueError, match=message) as error:
        DHCD(tmp_path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)
    assert names(tmp_path) == [ARCHIVE], "nothing is kept"


def test_a_member_that_is_larger_than_it_says(tmp_path: Path) -> None:
    """64 MiB in a member that announces 100 bytes."""
    bomb = with_first(bytes(1 << 26))
    put(tmp_path / ARCHIVE, changed(24, "<L", 100, bomb))
    tracemalloc.start()
    with pytest.raises(ValueError, match="Bad CRC-32"):
        DHCD(tmp_path)
    assert tracemalloc.get_traced_memory()[1] < 1 << 22
    tracemalloc.stop()


@pytest.mark.parametrize(
    ("limit", "value", "content", "message"),
    [
        ("MOST_MEMBERS", 100, WHOLE, "it has more than 100 members"),
        ("LARGEST", 1000, WHOLE, "it has more than 1,000 bytes"),
        ("LARGEST", 40_000, zip_bytes({ARCHIVE: WHOLE + bytes(40_000)}), r"has 7\d,\d{3} bytes, more than the 40,000"),
        ("LARGEST", 40_000, zip_bytes({n: c + bytes(1000) for n, c in files().items()}), "its images have more than"),
    ],
    ids=["members", "bytes", "bytes of the inner one", "bytes of all images"],
)
def test_bounds(
    tmp_path: Path, limit: str, value: int, content: bytes, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(tmp_path / ARCHIVE, content)
    DHCD(tmp_path, split="test")
    monkeypatch.setattr(dhcd, limit, value)
    with pytest.raises(ValueError, match=message) as error:
        DHCD(tmp_path)
    assert str(tmp_path / ARCHIVE) in str(error.value)


def test_the_published_archive_is_within_the_bounds() -> None:
    members = 46 * (1700 + 300)
    assert 2.5 * members < dhcd.MOST_MEMBERS and members * 1024 * 2 < dhcd.LARGEST


@pytest.mark.parametrize(
    "spoil",
    [
        lambda path: os.truncate(path, 1 << 42),  # sparse: it takes no room
        lambda path: (path.unlink(), path.mkdir()),
        lambda path: (path.unlink(), os.mkfifo(path)),
        lambda path: path.write_bytes(png(size=(31, 32))),
        lambda path: path.write_bytes(b""),
    ],
    ids=["no end", "a folder", "a pipe", "another size", "empty"],
)
def test_files_of_a_folder_that_are_refused(tmp_path: Path, spoil: Callable[[Path], object]) -> None:
    extract(tmp_path, files())
    spoil(tmp_path / FIRST)
    with pytest.raises(ValueError, match=r"_ka/9.png cannot be read"):
        DHCD(tmp_path)
    assert len(DHCD(tmp_path, split="test")) == 46


# ---------------------------------------------------------------------------------------------- what is recorded


def test_the_record_is_what_sha256sum_writes(tmp_path: Path, published: Server) -> None:
    DHCD(tmp_path)
    assert (tmp_path / "dhcd" / f"{ARCHIVE}.sha256").read_text() == f"{sha256(WHOLE)}  {ARCHIVE}\n"


def test_the_record_stays_when_the_archive_comes_again(
    tmp_path: Path, published: Server, capsys: pytest.CaptureFixture
) -> None:
    DHCD(tmp_path)
    path, record = tmp_path / "dhcd" / ARCHIVE, tmp_path / "dhcd" / f"{ARCHIVE}.sha256"
    os.utime(record, (1e9, 1e9))
    path.unlink()
    capsys.readouterr()
    DHCD(tmp_path)
    said = capsys.readouterr().out
    assert f"{published.url('new.zip')} matches the checksum recorded on 2001-09-" in said
    assert f"{path} matches the checksum recorded on 2001-09-" in said and "recorded now" not in said


def test_a_changed_archive_is_refused(tmp_path: Path, published: Server) -> None:
    DHCD(tmp_path)
    path, record = tmp_path / "dhcd" / ARCHIVE, tmp_path / "dhcd" / f"{ARCHIVE}.sha256"
    other = zip_bytes(files(test=3))
    path.write_bytes(other)
    message = rf"{path}: wrong checksum, sha256 {sha256(other)} instead of {sha256(WHOLE)}, which {record} has since .*"
    with pytest.raises(ValueError, match=message + "remove that record to accept the file, or the file to download it"):
        DHCD(tmp_path)
    path.unlink()
    assert len(DHCD(tmp_path, split="test")) == 46, "downloaded again"
    path.write_bytes(other)
    record.unlink()
    assert len(DHCD(tmp_path, split="test")) == 138 and not record.exists(), "only what is downloaded is recorded"


def test_a_download_that_is_not_the_recorded_file(tmp_path: Path, published: Server) -> None:
    DHCD(tmp_path)
    folder, other = tmp_path / "dhcd", zip_bytes(files(test=3))
    (folder / ARCHIVE).unlink()
    before = names(folder)
    published.files |= {"new.zip": other, "old.zip": other}
    message = f"old.zip: wrong checksum, sha256 {sha256(other)} instead of {sha256(WHOLE)}, .*old.zip gave was not kept"
    with pytest.raises(ValueError, match=message):
        DHCD(tmp_path)
    assert names(folder) == before
    published.files["old.zip"] = WHOLE
    assert len(DHCD(tmp_path, split="test")) == 46 and [name for name, _ in published.requests[-2:]] == [
        "new.zip",
        "old.zip",
    ]


@pytest.mark.parametrize("content", ["html", "cut off", "a class is missing", "another size"])
def test_what_is_no_such_archive_is_not_recorded(tmp_path: Path, published: Server, content: str) -> None:
    wrong, message = REFUSED[content]
    published.files |= {"new.zip": wrong, "old.zip": wrong}
    message = f"{message.removesuffix('$')}.*; the file that http.*/old.zip gave was not kept"
    with pytest.raises(ValueError, match=message):
        DHCD(tmp_path)
    assert names(tmp_path / "dhcd") == []
    published.files["old.zip"] = WHOLE
    assert len(DHCD(tmp_path)) == 92


def test_only_its_own_address_goes_on_with_what_broke_off(tmp_path: Path, published: Server) -> None:
    published.files["new.zip"], published.cut = zip_bytes({ARCHIVE: WHOLE}), 5000
    assert len(DHCD(tmp_path / "two")) == 92
    assert published.requests == [("new.zip", None), ("old.zip", None)], "of another file, no rest is asked for"
    del published.files["old.zip"]
    published.cut = 5000
    with pytest.raises(ConnectionError, match=r"ended after 5,000 of"):
        DHCD(tmp_path / "one")
    assert names(tmp_path / "one" / "dhcd") == [f"{ARCHIVE}.part"]
    assert len(DHCD(tmp_path / "one")) == 92 and published.requests[-1] == ("new.zip", "bytes=5000-")


def test_without_a_network_it_says_what_to_do(tmp_path: Path, published: Server) -> None:
    published.files.clear()
    with pytest.raises(ConnectionError, match=rf"new.zip: .*404.*old.zip: .*404.*put the file at .*{ARCHIVE} by hand"):
        DHCD(tmp_path)


def test_record_is_a_choice_of_its_own(tmp_path: Path, server: Server) -> None:
    server.files["f"], record = b"content", tmp_path / "record"
    with pytest.raises(ValueError, match="md5 or sha256 or record"):
        download(server.url("f"), tmp_path / "f", sha256="0" * 64, record=record)
    for text in ("", "0" * 63, f"{'0' * 64}"):
        record.write_text(text)
        with pytest.raises(ValueError, match=rf"{record} does not start with a sha256 of 64 digits"):
            download(server.url("f"), tmp_path / "f", record=record)
    record.write_text(f"{sha256(b'content')} *{'f'}\n")  # as sha256sum -b writes it
    assert download(server.url("f"), tmp_path / "f", record=record).read_bytes() == b"content"
    assert names(tmp_path) == ["f", "record"]


# ---------------------------------------------------------------------------------------------- what is kept


@pytest.fixture
def kept(tmp_path: Path) -> Path:
    """The decoded train half of an archive."""
    put(tmp_path / ARCHIVE)
    DHCD(tmp_path)
    return tmp_path / "dhcd" / f"train-{sha256(WHOLE)[:12]}.safetensors"


def test_what_is_kept_is_used(kept: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    capsys.readouterr()
    monkeypatch.setattr(dhcd, "decode", lambda *_: pytest.fail("decodes again"))
    d = DHCD(kept.parents[1])
    assert torch.equal(d.images[:, 0, 0, 0].long(), d.labels) and capsys.readouterr().out.count("\n") == 1


def test_of_another_archive_nothing_kept_is_used(kept: Path) -> None:
    put(kept.parents[1] / ARCHIVE, zip_bytes(files(train=3)))
    assert len(DHCD(kept.parents[1])) == 138 and len(names(kept.parent)) == 2


def flip_last_pixel(path: Path) -> None:
    content = path.read_bytes()
    at = content.rindex(bytes([45, 10, 255])) + 40
    path.write_bytes(content[:at] + b"\x01" + content[at + 1 :])


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: os.truncate(path, 1000),
        lambda path: os.truncate(path, 1 << 42),
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(b"\xff" * 1000),
        flip_last_pixel,
        lambda path: save_tensor(torch.zeros(46, 2, 8, 8, dtype=torch.uint8), path),
        lambda path: save_tensor(torch.zeros(45, 1, 32, 32, dtype=torch.uint8), path),
        lambda path: save_tensor(torch.zeros(46, 0, 32, 32, dtype=torch.uint8), path),
    ],
    ids=["cut", "no end", "empty", "no tensors", "a pixel", "another size", "another count", "no images"],
)
def test_what_is_kept_and_damaged_is_made_again(
    kept: Path, damage: Callable[[Path], object], capsys: pytest.CaptureFixture
) -> None:
    before = kept.read_bytes()
    damage(kept)
    assert kept.stat().st_size != len(before) or kept.read_bytes() != before
    capsys.readouterr()
    d = DHCD(kept.parents[1])
    assert torch.equal(d.images[:, 0, 0, 0].long(), d.labels) and not d.images[:, 0, 1:].any()
    assert capsys.readouterr().out.count(f"{kept} is damaged and will be made again: ") == 1
    assert kept.read_bytes() == before


def test_where_nothing_can_be_kept_it_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    put(tmp_path / ARCHIVE), put(tmp_path / "dhcd", b"a file")
    assert len(DHCD(tmp_path)) == 92
    assert "cannot be saved: " in capsys.readouterr().out
