"""ddpm/data/folder.py: what images of each format come out as, which are refused, what is said of other files."""

import hashlib
import io
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, features

from ddpm.data import Folder
from ddpm.data.folder import FORMATS, SUFFIXES, decode

RANDOM = np.random.default_rng(0).integers(0, 256, (6, 4, 3), dtype=np.uint8)
ALLOWED = "read are .png, .jpg, .jpeg, .webp, .bmp, .tif, .tiff"


def encoded(pixels: np.ndarray | Image.Image, form: str, **options: Any) -> bytes:
    """An image as a file."""
    image, file = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels), io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def of(content: bytes, height: int, width: int, channels: int = 3) -> list[list[int]]:
    """The first row of an image: channels x width."""
    return decode(content, (height, width), channels)[0][0, :, 0].tolist()


# ---------------------------------------------------------------------------------------------- formats


def test_png_webp_bmp_and_tiff_keep_every_pixel(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    files = {
        "a.png": ("PNG", {}),
        "b.webp": ("WEBP", {"lossless": True}),
        "c.bmp": ("BMP", {}),
        "d.tif": ("TIFF", {}),
        "e.TIFF": ("TIFF", {"compression": "tiff_lzw"}),
        "f.tiff": ("TIFF", {"compression": "tiff_adobe_deflate", "big_tiff": True}),
        "g.WebP": ("WEBP", {"lossless": True}),
        "h.jpg": ("TIFF", {"compression": "packbits"}),  # what a file holds counts, not what it is called
    }
    for name, (form, options) in files.items():
        (tmp_path / name).write_bytes(encoded(RANDOM, form, **options))
    found = Folder(tmp_path, image_size=(6, 4), validation=0).images
    assert len(found) == len(files) and not capsys.readouterr().out
    assert all(torch.equal(image, torch.from_numpy(RANDOM).permute(2, 0, 1)) for image in found)


def test_jpeg_and_lossy_webp_keep_them_roughly() -> None:
    smooth = np.full((16, 16, 3), (40, 120, 200), dtype=np.uint8)
    for content in (encoded(smooth, "JPEG"), encoded(smooth, "WEBP"), encoded(smooth, "TIFF", compression="jpeg")):
        found, _ = decode(content, 16, 3)
        assert (found.int() - torch.tensor([40, 120, 200]).reshape(1, 3, 1, 1)).abs().max() <= 4


def test_pillow_reads_all_that_is_named_here() -> None:
    assert features.check("webp") and features.check("libtiff")
    known = {suffix for suffix, form in Image.registered_extensions().items() if form in FORMATS}
    assert set(SUFFIXES) <= known


def test_the_identity_of_png_and_jpeg_is_what_it_was(tmp_path: Path) -> None:
    """That of their pixels, whatever else can be read now."""
    for n, (name, pixels) in enumerate({"a.png": RANDOM, "b.png": RANDOM[..., 0], "c.png": RANDOM[::-1]}.items()):
        (tmp_path / name).write_bytes(encoded(np.ascontiguousarray(pixels), "PNG", compress_level=n))
    digest = hashlib.sha256(repr(((3, 3, 6, 4), False)).encode())
    for pixels in (RANDOM, np.repeat(RANDOM[..., :1], 3, 2), RANDOM[::-1]):
        digest.update(np.ascontiguousarray(pixels.transpose(2, 0, 1)).tobytes())
    before = Folder(tmp_path, image_size=(6, 4)).identity()
    assert before["sha256"] == digest.hexdigest()
    (tmp_path / "d.gif").write_bytes(encoded(RANDOM, "GIF"))
    assert Folder(tmp_path, image_size=(6, 4)).identity() == before


@pytest.mark.parametrize("form", ["WEBP", "TIFF", "TIFF packed"])
@pytest.mark.parametrize(("orientation", "corner"), [(1, (0, 0)), (3, (-1, -1)), (6, (-1, 0)), (8, (0, -1))])
def test_images_are_turned_as_they_say(form: str, orientation: int, corner: tuple[int, int]) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    more = {"lossless": True} if form == "WEBP" else {"compression": "tiff_lzw"} if "packed" in form else {}
    content = encoded(RANDOM, form.split()[0], exif=exif, **more)
    found, _ = decode(content, (4, 6) if orientation in (6, 8) else (6, 4), 3)
    assert found[0, :, 0, 0].tolist() == RANDOM[corner].tolist()


def test_transparent_images_are_laid_on_white() -> None:
    half = np.array([[[100, 150, 200, 0], [100, 150, 200, 255], [0, 0, 0, 51]]], dtype=np.uint8)
    for content in (encoded(half, "WEBP", lossless=True, exact=True), encoded(half, "TIFF"), encoded(half, "PNG")):
        assert of(content, 1, 3) == [[255, 100, 204], [255, 150, 204], [255, 200, 204]]


# ---------------------------------------------------------------------------------------------- TIFF


def tiff(
    data: bytes, bits: tuple[int, ...], photometric: int, width: int, order: str = "<", **tags: list[int]
) -> bytes:
    """One row of uncompressed pixels; more tags are named t258 and the like, of 16 bits."""
    values = {256: [width], 257: [1], 258: [*bits], 259: [1], 262: [photometric], 273: [8], 277: [len(bits)]}
    values |= {278: [1], 279: [len(data)]} | {int(name[1:]): value for name, value in tags.items()}
    at = 8 + len(data)
    entries, later, start = b"", b"", at + 6 + 12 * len(values)
    for tag, numbers in sorted(values.items()):
        raw = struct.pack(f"{order}{len(numbers)}H", *numbers)
        place = raw.ljust(4, b"\0") if len(raw) <= 4 else struct.pack(order + "I", start + len(later))
        later += raw if len(raw) > 4 else b""
        entries += struct.pack(order + "HHI", tag, 3, len(numbers)) + place
    count = struct.pack(order + "H", len(values))
    return (
        (b"II*\0" if order == "<" else b"MM\0*")
        + struct.pack(order + "I", at)
        + data
        + count
        + entries
        + bytes(4)
        + later
    )


def words(*values: float, of: str = "<u2") -> bytes:
    return np.array(values, of).tobytes()


DEEP = (0, 0x80FF, 0xFFFF, 0x1234)
GRAY, INVERTED, RGB, PALETTE, CMYK = 1, 0, 2, 3, 5
PACKED = [zlib.compress(words(n, n + 256)) for n in (0, 512, 1024)]
TIFFS: dict[str, tuple[bytes, list[list[int]]]] = {
    "gray": (tiff(bytes([0, 7, 255]), (8,), GRAY, 3), [[0, 7, 255]] * 3),
    "gray, white is 0": (tiff(bytes([0, 7, 255]), (8,), INVERTED, 3), [[255, 248, 0]] * 3),
    "1 bit": (tiff(b"\xa0", (1,), GRAY, 4), [[255, 0, 255, 0]] * 3),
    "1 bit, white is 0": (tiff(b"\xa0", (1,), INVERTED, 4), [[0, 255, 0, 255]] * 3),
    "4 bits": (tiff(b"\x0f\x80", (4,), GRAY, 4), [[0, 255, 0x88, 0]] * 3),
    "12 bits": (tiff(b"\x00\x08\x00\xff\xf1\x23", (12,), GRAY, 4), [[0, 0x80, 255, 0x12]] * 3),
    "16 bits": (tiff(words(*DEEP), (16,), GRAY, 4), [[0, 0x80, 255, 0x12]] * 3),
    "16 bits, most significant first": (tiff(words(*DEEP, of=">u2"), (16,), GRAY, 4, ">"), [[0, 0x80, 255, 0x12]] * 3),
    "16 bits, white is 0": (tiff(words(*DEEP), (16,), INVERTED, 4), [[255, 0x7F, 0, 0xED]] * 3),
    "16 bits, upside down": (tiff(words(*DEEP), (16,), GRAY, 4, t274=[3]), [[0x12, 255, 0x80, 0]] * 3),
    "RGB of 16 bits": (tiff(words(*DEEP, 0x0A00, 0x0B00), (16,) * 3, RGB, 2), [[0, 0x12], [0x80, 0x0A], [255, 0x0B]]),
    "planes": (tiff(bytes(range(6)), (8,) * 3, RGB, 2, t284=[2], t273=[8, 10, 12], t279=[2] * 3),
               [[0, 1], [2, 3], [4, 5]]),
    "deep planes, compressed": (
        tiff(b"".join(PACKED), (16,) * 3, RGB, 2, t259=[8], t284=[2], t279=[len(plane) for plane in PACKED],
             t273=[8, 8 + len(PACKED[0]), 8 + len(PACKED[0] + PACKED[1])]),
        [[0, 1], [2, 3], [4, 5]]),
    "alpha": (tiff(bytes([10, 20, 30, 0, 10, 20, 30, 255]), (8,) * 4, RGB, 2, t338=[2]),
              [[255, 10], [255, 20], [255, 30]]),
    "alpha, multiplied": (tiff(bytes([64, 0, 0, 128]), (8,) * 4, RGB, 1, t338=[1]), [[191], [127], [127]]),
    "no alpha": (tiff(bytes([10, 20, 30, 0]), (8,) * 4, RGB, 1, t338=[0]), [[10], [20], [30]]),
    "gray, alpha": (tiff(bytes([10, 0, 10, 255]), (8,) * 2, GRAY, 2, t338=[2]), [[255, 10]] * 3),
    "palette": (tiff(b"\0\1", (8,), PALETTE, 2, t320=[0, 0x0A0A] * 128 + [257] * 256 + [0xFFFF] * 256),
                [[0, 10], [1, 1], [255, 255]]),
    "CMYK": (tiff(bytes([0, 0, 0, 0, 255, 0, 0, 0, 0, 0, 0, 255]), (8,) * 4, CMYK, 3),
             [[255, 0, 0], [255, 255, 0], [255, 255, 0]]),
}  # fmt: skip


@pytest.mark.parametrize("kind", TIFFS)
def test_kinds_of_tiff(kind: str) -> None:
    content, expected = TIFFS[kind]
    assert of(content, 1, len(expected[0])) == expected
    if expected[0] == expected[1]:
        assert of(content, 1, len(expected[0]), channels=1) == expected[:1]


UNKNOWN = "b.tif (not a PNG, JPEG, WebP, BMP or TIFF file)"
SIGNED, REAL = {"t339": [2]}, {"t339": [3]}
REFUSED: dict[str, tuple[bytes, str]] = {
    "8 bits with a sign": (tiff(bytes(4), (8,), GRAY, 4, **SIGNED), "its pixels have a sign, 32 bits or floating"),
    "16 bits with a sign": (tiff(bytes(8), (16,), GRAY, 4, **SIGNED), "its pixels have a sign, 32 bits or floating"),
    "32 bits": (tiff(bytes(16), (32,), GRAY, 4), "its pixels have a sign, 32 bits or floating point; allowed: 1 to 16"),
    "floating point": (tiff(words(0, 0.5, 1, 2, of="<f4"), (32,), GRAY, 4, **REAL), "or floating point; allowed: 1 to"),
    "half precision": (tiff(bytes(8), (16,), GRAY, 4, **REAL), UNKNOWN),
    "RGB of floating point": (tiff(bytes(12), (32,) * 3, RGB, 1, **REAL), UNKNOWN),
    "deep planes": (tiff(bytes(12), (16,) * 3, RGB, 2, t284=[2], t273=[8, 12, 16], t279=[4] * 3), "colours of more"),
    "huge tiles": (tiff(zlib.compress(bytes(99)), (8,), GRAY, 8, t259=[8], t322=[60000], t323=[60000]), "its tiles of"),
    "cut": (encoded(RANDOM, "TIFF")[:30], ""),
    "cut pixels": (tiff(bytes(4), (8,), GRAY, 400), ""),
    "a WebP that is cut": (encoded(RANDOM, "WEBP")[:-40], ""),
    "a BMP that is cut": (encoded(RANDOM, "BMP")[:-40], "truncated"),
    "GIF": (encoded(RANDOM, "GIF"), UNKNOWN),
    "JPEG 2000": (encoded(RANDOM, "JPEG2000"), UNKNOWN),
    "TGA": (encoded(RANDOM, "TGA"), UNKNOWN),
}  # fmt: skip


@pytest.mark.parametrize("kind", REFUSED)
def test_what_no_picture_can_be_made_of_is_named_and_left_out(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture, recwarn: pytest.WarningsRecorder
) -> None:
    content, reason = REFUSED[kind]
    (tmp_path / "a.png").write_bytes(encoded(RANDOM, "PNG"))
    (tmp_path / "b.tif").write_bytes(content)
    assert len(Folder(tmp_path, validation=0)) == 1
    said = capsys.readouterr().out
    assert said.startswith(f"{tmp_path}: skipped 1 of 2 images, which cannot be read: b.tif (")
    assert reason in said and said.count("\n") == 1 and not recwarn.list


# ---------------------------------------------------------------------------------------------- animations and pages


def frames(form: str, **options: Any) -> bytes:
    first, second = Image.new("RGB", (4, 4), (10, 20, 30)), Image.new("RGB", (4, 4), (200, 0, 0))
    return encoded(first, form, save_all=True, append_images=[second], **options)


def test_of_several_frames_or_pages_the_first_is_read(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for name, content in {
        "a.png": frames("PNG"),
        "b.webp": frames("WEBP", lossless=True),
        "c.tif": frames("TIFF"),
        "d.tif": frames("TIFF", compression="tiff_lzw"),
        "e.jpg": frames("MPO"),  # such as a phone's, with a preview of the same picture
        "f.webp": encoded(Image.new("RGB", (4, 4), (10, 20, 30)), "WEBP", lossless=True),
    }.items():
        (tmp_path / name).write_bytes(content)
    found = Folder(tmp_path, image_size=4, validation=0).images
    assert (found.int() - torch.tensor([10, 20, 30]).reshape(1, 3, 1, 1)).abs().amax((1, 2, 3)).tolist()[:4] == [0] * 4
    assert len(found) == 6 and (found[:, 0].int() - 10).abs().max() <= 4
    said = f"{tmp_path}: of 4 images with several frames or pages the first is read: a.png, b.webp, c.tif, d.tif\n"
    assert capsys.readouterr().out == said


def test_pages_that_lead_in_a_circle() -> None:
    content = tiff(bytes([5]), (8,), GRAY, 1)
    at = struct.unpack("<I", content[4:8])[0]
    end = at + 2 + 12 * struct.unpack("<H", content[at : at + 2])[0]
    circle = content[:end] + struct.pack("<I", at) + content[end + 4 :]
    assert decode(circle, 1, 1)[0].item() == 5


# ---------------------------------------------------------------------------------------------- other files


def write(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(encoded(RANDOM, "PNG") if name.endswith(".png") else b"other")
    return root


def test_files_that_are_no_images_are_counted_by_their_suffix(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    write(tmp_path, "cat/a.png", "dog/b.png", "cat/c.gif", "dog/d.GIF", "dog/e.svg", "README", "labels.csv")
    write(tmp_path, "cat/deeper/f.gif", "cat/.hidden.gif", "sounds/g.wav", ".DS_Store")
    (tmp_path / "cat" / "folder.gif").mkdir()
    assert len(Folder(tmp_path)) == 2
    counts = "2 .gif, 1 without a suffix, 1 .csv, 1 .svg, 1 .wav"
    assert capsys.readouterr().out == f"{tmp_path}: 6 other files are not read: {counts}; {ALLOWED}\n"


def test_beside_images_only_their_own_folder_is_looked_at(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    write(tmp_path, "a.png", "b.heic", "sub/c.gif")
    assert len(Folder(tmp_path, validation=0)) == 1
    assert capsys.readouterr().out == f"{tmp_path}: 1 other files are not read: 1 .heic; {ALLOWED}\n"


def test_rare_suffixes_are_counted_together(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    write(tmp_path, "a.png", *(f"{n}.gif" for n in range(1200)), *(f"b.{letter}" for letter in "cdefghijk"))
    assert len(Folder(tmp_path, validation=0)) == 1
    assert "1,209 other files are not read: 1,200 .gif, 1 .c, 1 .d, 1 .e, 1 .f, 5 others; " in capsys.readouterr().out


@pytest.mark.parametrize("suffix", ["\x1b]0;evil\x07", "a\nb", "\u202egnp", "\udcff", "x" * 200], ids=ascii)
def test_a_suffix_neither_steers_nor_floods_the_terminal(
    suffix: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    write(tmp_path, "a.png", f"b.{suffix}")
    assert len(Folder(tmp_path, validation=0)) == 1
    said = capsys.readouterr().out.removesuffix("\n")
    assert "1 other files are not read: 1 " in said and said.isprintable() and len(said) < len(str(tmp_path)) + 150


@pytest.mark.parametrize("names", [("a.gif", "b.gif", "c.txt"), ("x/a.gif", "y/b.gif", "c.txt")])
def test_a_folder_of_other_files_alone_is_refused_with_their_kinds(names: tuple[str, ...], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no PNG, JPEG, WebP, BMP or TIFF file in .*; there are 2 \.gif, 1 \.txt$"):
        Folder(write(tmp_path, *names))


@pytest.mark.parametrize(
    "make",
    [
        lambda: encoded(Image.new("RGB", (40, 40)), "WEBP", lossless=True),
        lambda: encoded(Image.new("RGB", (40, 40)), "BMP"),
        lambda: encoded(Image.new("RGB", (40, 40)), "TIFF", compression="tiff_adobe_deflate"),
    ],
    ids=["webp", "bmp", "tiff"],
)
@pytest.mark.parametrize("limit", [500, 1000])  # PIL warns above its limit, and refuses above twice that
def test_decompression_bombs_of_every_format(
    make: Callable[[], bytes], limit: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "bomb.png").write_bytes(make())
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    with pytest.raises(ValueError, match=r"bomb\.png \(Image size \(1600 pixels\) exceeds limit"):
        Folder(tmp_path)
