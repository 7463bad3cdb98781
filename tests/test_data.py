"""Every source of images, what it refuses, and the order in which training sees them."""

import gzip
import hashlib
import inspect
import io
import os
import re
import struct
import tarfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from threading import Thread

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

import ddpm.data
from ddpm.data import CIFAR10, IDX, Digits, Folder, ImageData, cifar10, digits, idx
from ddpm.data.dataset import fit
from ddpm.data.download import download
from ddpm.randomness import generator

REPOSITORY = Path(__file__).parents[1]


def random_images(n: int, channels: int = 1, height: int = 4, width: int = 4, seed: int = 0) -> torch.Tensor:
    """Bytes (n, channels, height, width)."""
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (n, channels, height, width), dtype=torch.uint8, generator=draw)


def data(n: int = 50, **options: object) -> ImageData:
    """A small labelled data set."""
    return ImageData("toy", "all", random_images(n), torch.arange(n) % 3, **options)


# ---------------------------------------------------------------------------------------------- images in memory


def test_batch_has_the_scale_the_types_and_the_labels() -> None:
    images = torch.tensor([0, 51, 255], dtype=torch.uint8).reshape(3, 1, 1, 1)
    d = ImageData("toy", "all", images, torch.tensor([2, 0, 1]), ("a", "b", "c"), validation=0)
    batch = d.batch(torch.tensor([2, 0, 1]))
    x_0, y = batch.x, batch.y
    assert x_0.dtype == torch.float32 and y.dtype == torch.int64
    assert x_0.flatten().tolist() == pytest.approx([1, -1, -0.6]) and y.tolist() == [1, 2, 0]
    assert (d.num_classes, d.classes, d.shape, d.image_size, len(d)) == (3, ("a", "b", "c"), (1, 1, 1), (1, 1), 3)


def test_without_labels_there_is_no_y() -> None:
    d = ImageData("toy", "all", random_images(5))
    assert d.batch(torch.arange(2)).y is None and d.num_classes == 0 and d.labels is None


def test_labels_without_names_name_themselves() -> None:
    assert data().classes == ("0", "1", "2")


def test_to_moves_bytes_and_returns_itself() -> None:
    d = data()
    identity = d.identity()
    assert d.to("meta") is d and d.images.device.type == d.labels.device.type == "meta"
    assert d.images.dtype == torch.uint8 and d.identity() == identity


def test_held_out_part_is_fixed_disjoint_sorted_and_random() -> None:
    one, other = data(200, validation=0.2), ImageData("other", "all", random_images(200, seed=9), validation=0.2)
    assert torch.equal(one.held_out, other.held_out) and torch.equal(one.train, other.train)
    assert len(one.held_out) == 40 and sorted([*one.train.tolist(), *one.held_out.tolist()]) == list(range(200))
    assert one.train.dtype == torch.int64
    assert one.train.tolist() == sorted(one.train.tolist()) and one.held_out.tolist() == sorted(one.held_out.tolist())
    assert 60 < one.held_out.float().mean() < 140 and one.held_out.tolist() != list(range(160, 200))


@pytest.mark.parametrize(
    ("n", "validation", "held_out"), [(10, 0, 0), (10, 0.001, 1), (10, 0.14, 1), (10, 0.26, 3), (2, 0.99, 1), (1, 0, 0)]
)
def test_held_out_part_has_at_least_one_and_leaves_one(n: int, validation: float, held_out: int) -> None:
    d = data(n, validation=validation)
    assert (len(d.held_out), len(d.train)) == (held_out, n - held_out)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"validation": 1.0}, "0 <= validation < 1"),
        ({"validation": -0.1}, "0 <= validation < 1"),
        ({"validation": float("nan")}, "0 <= validation < 1"),
        ({"validation": "many"}, "0 <= validation < 1"),
        ({"channels": 2}, r"channels=2: choose 1 \(grayscale\) or 3 \(RGB\)"),
        ({"image_size": 0}, "image_size=0: .*>= 1"),
        ({"image_size": (8, -1)}, "image_size"),
        ({"image_size": (8, 8, 8)}, "image_size"),
        ({"image_size": 7.5}, "image_size=7.5"),
        ({"image_size": "28"}, "image_size='28'"),
    ],
)
def test_options_outside_their_range_name_the_range(options: dict, message: str) -> None:
    for source in (data, Digits, lambda **o: IDX("mnist", "nowhere", **o), lambda **o: Folder("nowhere", **o)):
        with pytest.raises(ValueError, match=message):
            source(**options)


def test_wrong_tensors_are_refused() -> None:
    with pytest.raises(ValueError, match=r"uint8 .* not torch.float32"):
        ImageData("toy", "all", torch.zeros(3, 1, 4, 4))
    with pytest.raises(ValueError, match=r"\(3, 2, 4, 4\)"):
        ImageData("toy", "all", random_images(3, 2))
    with pytest.raises(ValueError, match=r"uint8"):
        ImageData("toy", "all", random_images(0))
    with pytest.raises(ValueError, match=r"3 images but labels of shape \(2,\)"):
        ImageData("toy", "all", random_images(3), torch.arange(2))
    with pytest.raises(ValueError, match=r"label 2 of sample 2 is outside 0\.\.1"):
        ImageData("toy", "all", random_images(3), torch.arange(3), ("a", "b"))
    with pytest.raises(ValueError, match="validation=0"):
        data(1)


# ---------------------------------------------------------------------------------------------- flips


def test_flips_are_seeded_half_of_the_rows_and_only_in_training() -> None:
    d, i = data(400, flip=True), torch.arange(400)
    plain = d.batch(i).x
    assert torch.equal(plain, data(400).batch(i).x)
    x_0 = d.batch(i, generator=generator(1, "flip", 1)).x
    assert torch.equal(x_0, d.batch(i, generator=generator(1, "flip", 1)).x)
    assert not torch.equal(x_0, d.batch(i, generator=generator(1, "flip", 2)).x)
    same, mirrored = (x_0 == plain).flatten(1).all(1), (x_0 == plain.flip(-1)).flatten(1).all(1)
    assert (same | mirrored).all() and 150 < int(mirrored.sum()) < 250
    assert torch.equal(data(400).batch(i, generator=generator(1, "flip", 1)).x, plain)


# ---------------------------------------------------------------------------------------------- order


def stream(d: ImageData, seed: int, batch_size: int, length: int) -> list[int]:
    """The first `length` image numbers that training sees."""
    steps = range(1, -(-length // batch_size) + 1)
    return torch.cat([d.order(seed, step, batch_size) for step in steps]).tolist()[:length]


@pytest.mark.parametrize("batch_size", [1, 7, 45, 90, 100, 300])
def test_every_epoch_is_a_permutation_of_the_training_part(batch_size: int) -> None:
    d = data(50)  # 45 to train on
    seen = stream(d, 3, batch_size, 45 * 7)
    epochs = [seen[start : start + 45] for start in range(0, len(seen), 45)]
    assert all(sorted(epoch) == d.train.tolist() for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 7
    assert seen == stream(data(50), 3, 11, 45 * 7), "batches cut the same stream wherever their boundaries lie"


def test_order_is_a_pure_function_of_seed_step_and_batch_size() -> None:
    d = data(50)
    expected = {step: d.order(5, step, 16).tolist() for step in range(1, 20)}
    for step in (19, 1, 7, 18, 2, 7):
        d.order(6, step, 16)
        assert d.order(5, step, 16).tolist() == data(50).order(5, step, 16).tolist() == expected[step]
        assert len(expected[step]) == 16 and d.order(5, step, 16).dtype == torch.int64
    assert d.order(6, 1, 16).tolist() != expected[1]
    assert len(d._epochs) <= 3


@pytest.mark.parametrize(("step", "batch_size"), [(0, 4), (1, 0)])
def test_order_refuses_what_does_not_exist(step: int, batch_size: int) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        data().order(0, step, batch_size)


# ---------------------------------------------------------------------------------------------- size, colour, identity


def test_fit_leaves_what_fits() -> None:
    images = random_images(2, 3, 6, 5)
    assert fit(images, (6, 5), 3) is images


def test_fit_scales_the_shorter_side_and_crops_the_centre() -> None:
    stripes = torch.zeros(1, 1, 4, 12, dtype=torch.uint8)
    stripes[..., 4:8] = 200
    assert torch.equal(fit(stripes, 4, 1), torch.full((1, 1, 4, 4), 200, dtype=torch.uint8))
    wide = fit(stripes, (8, 24), 1)
    assert wide.shape == (1, 1, 8, 24) and int(wide[0, 0, 4, 12]) == 200 and int(wide[0, 0, 4, 2]) == 0
    assert fit(stripes.mT.contiguous(), 4, 1).float().mean() == 200


def test_fit_is_antialiased() -> None:
    board = (torch.arange(64)[:, None] + torch.arange(64)) % 2 * 255
    small = fit(board.to(torch.uint8).reshape(1, 1, 64, 64), 8, 1).int()
    assert (small - 128).abs().max() <= 3


def test_fit_converts_colour() -> None:
    red = torch.tensor([200, 0, 0], dtype=torch.uint8).reshape(1, 3, 1, 1)
    assert fit(red, 1, 1).item() == round(0.299 * 200)
    gray = random_images(2)
    assert torch.equal(fit(gray, 4, 3), gray.expand(2, 3, 4, 4)) and torch.equal(fit(fit(gray, 4, 3), 4, 1), gray)


def test_data_are_resized() -> None:
    d = data(image_size=(6, 8), channels=3)
    assert d.shape == (3, 6, 8) and d.image_size == (6, 8) and d.images.shape == (50, 3, 6, 8)
    assert data(image_size=[6, 8], channels=3).identity() == d.identity()


def test_identity_is_what_the_data_are() -> None:
    images, labels = random_images(9), torch.arange(9) % 2
    expected = ImageData("toy", "train", images, labels).identity()
    assert expected == ImageData("toy", "train", images.clone(), labels.clone(), validation=0.5, flip=True).identity()
    assert {**expected, "sha256": ""} == {
        "name": "toy", "split": "train", "count": 9, "image_size": [4, 4], "channels": 1, "sha256": "",
    }  # fmt: skip
    changed, relabelled = images.clone(), labels.clone()
    changed[3, 0, 1, 2] ^= 1
    relabelled[3] ^= 1
    others = [
        ImageData("toy", "train", changed, labels),
        ImageData("toy", "train", images, relabelled),
        ImageData("toy", "train", images),
        ImageData("toy", "train", images.reshape(9, 1, 2, 8), labels),
        ImageData("toy", "train", images, labels, image_size=5),
    ]
    assert len({expected["sha256"], *(other.identity()["sha256"] for other in others)}) == 6
    assert ImageData("toy", "test", images, labels).identity() != expected


# ---------------------------------------------------------------------------------------------- digits


def test_digits() -> None:
    d = Digits()
    assert len(d) == 1797 and d.shape == (1, 8, 8) and d.split == "all" and d.classes == tuple("0123456789")
    assert len(d.held_out) == 359 and d.images.min() == 0 and d.images.max() == 255
    assert set(d.images.unique().tolist()) == {round(level * 255 / 16) for level in range(17)}
    assert d.labels.bincount().min() >= 174
    assert Digits(image_size=16, channels=3).shape == (3, 16, 16)
    for split in ("train", "test"):
        with pytest.raises(ValueError, match="digits has no published split"):
            Digits(split=split)


def test_digits_without_the_file_of_scikit_learn_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    read = Digits()

    def moved(name: str) -> None:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(digits, "distribution", moved)
    assert Digits().identity() == read.identity() and Digits().classes == read.classes


# ---------------------------------------------------------------------------------------------- IDX files


def idx_bytes(array: np.ndarray) -> bytes:
    """An IDX file of unsigned bytes."""
    header = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
    return header + array.astype(np.uint8).tobytes()


def write_half(folder: Path, prefix: str, n: int = 6, zipped: bool = True, seed: int = 0) -> torch.Tensor:
    """Write images 28x28 and labels 0..9 of a half; returns the images (n, 1, 28, 28)."""
    folder.mkdir(parents=True, exist_ok=True)
    images = random_images(n, 1, 28, 28, seed)
    for stem, array in (("images-idx3", images[:, 0].numpy()), ("labels-idx1", np.arange(n) % 10)):
        content = idx_bytes(array)
        path = folder / f"{prefix}-{stem}-ubyte{'.gz' * zipped}"
        path.write_bytes(gzip.compress(content) if zipped else content)
    return images


@pytest.mark.parametrize("zipped", [True, False])
def test_idx_reads_gzipped_and_raw(tmp_path: Path, zipped: bool) -> None:
    images = write_half(tmp_path / "mnist", "train", zipped=zipped)
    d = IDX("mnist", tmp_path)
    assert torch.equal(d.images, images) and d.labels.tolist() == list(range(6)) and d.split == "train"
    assert d.name == "mnist" and d.num_classes == 10


def test_idx_looks_in_the_named_folder_first_then_in_root(tmp_path: Path) -> None:
    outside = write_half(tmp_path, "train", seed=1)
    assert torch.equal(IDX("kmnist", tmp_path).images, outside)
    inside = write_half(tmp_path / "kmnist", "train", seed=2)
    assert torch.equal(IDX("kmnist", tmp_path).images, inside)
    assert torch.equal(IDX("fashion_mnist", tmp_path).images, outside)


def test_idx_auto_prefers_train_and_says_when_it_falls_back(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    test = write_half(tmp_path / "mnist", "t10k", n=7, seed=3)
    d = IDX("mnist", tmp_path)
    assert d.split == "test" and torch.equal(d.images, test)
    said = capsys.readouterr().out.strip()
    assert said.count("\n") == 0 and "no train half" in said and "test half, 7 images" in said
    assert IDX("mnist", tmp_path, split="test").identity() == d.identity() and not capsys.readouterr().out
    train = write_half(tmp_path, "train", seed=4)
    assert torch.equal(IDX("mnist", tmp_path).images, train) and not capsys.readouterr().out
    assert IDX("mnist", tmp_path).identity() != d.identity()


def test_idx_knows_when_its_files_changed(tmp_path: Path) -> None:
    write_half(tmp_path / "mnist", "t10k")
    auto, test = IDX("mnist", tmp_path), IDX("mnist", tmp_path, split="test")
    write_half(tmp_path / "kmnist", "train")
    assert not auto.origin.changed() and not test.origin.changed()
    write_half(tmp_path, "train")  # which auto would choose now
    assert auto.origin.changed() and not test.origin.changed()
    write_half(tmp_path / "mnist", "t10k", seed=1)
    assert test.origin.changed()


def test_idx_identity_does_not_know_the_path(tmp_path: Path) -> None:
    write_half(tmp_path / "here" / "mnist", "train")
    write_half(tmp_path / "there", "train", zipped=False)
    assert IDX("mnist", tmp_path / "here").identity() == IDX("mnist", tmp_path / "there").identity()


def test_idx_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"train-images-idx3-ubyte\[.gz\] and train-labels.* in .*download"):
        IDX("mnist", tmp_path, download=False)
    write_half(tmp_path / "mnist", "train")
    with pytest.raises(FileNotFoundError, match="t10k-images"):
        IDX("mnist", tmp_path, split="test", download=False)
    (tmp_path / "mnist" / "train-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(FileNotFoundError, match="train-labels"):
        IDX("mnist", tmp_path, download=False)


def test_idx_unknown_names_list_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="name='emnist': choose one of mnist, fashion_mnist, kmnist"):
        IDX("emnist", tmp_path)
    with pytest.raises(ValueError, match="split='valid': choose one of auto, train, test"):
        IDX("mnist", tmp_path, split="valid")


IMAGES = idx_bytes(np.zeros((6, 28, 28)))


@pytest.mark.parametrize(
    ("stem", "content", "message"),
    [
        ("images-idx3", IMAGES[:-1], r"announces the shape \(6, 28, 28\), 4,704 bytes, and holds only 4,703"),
        ("images-idx3", IMAGES + b"\0", "holds more"),
        ("images-idx3", IMAGES[:9], "is cut off: 9 bytes"),
        ("images-idx3", b"", "00 00 08 03"),
        ("images-idx3", b"\0\0\x0d\x03" + IMAGES[4:], "starts with 00 00 0d 03; IDX of unsigned bytes in 3 dimensions"),
        ("images-idx3", idx_bytes(np.zeros((6, 28))), "starts with 00 00 08 02"),
        ("images-idx3", b"<html>", "starts with 3c 68 74 6d"),
        ("images-idx3", b"\0\0\x08\x03" + b"\xff" * 12, "announces the shape"),
        ("images-idx3", idx_bytes(np.zeros((0, 28, 28))), "empty"),
        ("images-idx3", idx_bytes(np.zeros((5, 28, 28))), "holds 5 images, but .*labels-idx1-ubyte.* 6 labels"),
        ("labels-idx1", idx_bytes(np.array([0, 1, 10, 3, 4, 5])), r"labels.*: label 10 of sample 2 is outside 0\.\.9"),
    ],
)
@pytest.mark.parametrize("zipped", [True, False])
def test_idx_refuses_damaged_files(tmp_path: Path, stem: str, content: bytes, message: str, zipped: bool) -> None:
    write_half(tmp_path, "train", zipped=zipped)
    path = tmp_path / f"train-{stem}-ubyte{'.gz' * zipped}"
    path.write_bytes(gzip.compress(content) if zipped else content)
    with pytest.raises(ValueError, match=message) as error:
        IDX("mnist", tmp_path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("damage", ["cut", "no gzip", "crc"])
def test_idx_refuses_damaged_gzip(tmp_path: Path, damage: str) -> None:
    write_half(tmp_path, "train")
    path = tmp_path / "train-images-idx3-ubyte.gz"
    content = path.read_bytes()
    wrong_crc = content[:-6] + bytes([content[-6] ^ 1]) + content[-5:]
    path.write_bytes({"cut": content[:-100], "no gzip": b"no" + content, "crc": wrong_crc}[damage])
    with pytest.raises(ValueError, match=re.escape(str(path)) + " is a damaged gzip file"):
        IDX("mnist", tmp_path)


@pytest.mark.skipif("DDPM_MNIST" not in os.environ, reason="DDPM_MNIST names no folder with MNIST's files")
def test_real_mnist_digits() -> None:
    d = IDX("mnist", os.environ["DDPM_MNIST"], split="test", download=False)
    assert d.split == "test" and d.shape == (1, 28, 28) and len(d.held_out) == 1000
    assert d.labels.bincount().tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
    assert d.labels[:5].tolist() == [7, 2, 1, 0, 4]


# ---------------------------------------------------------------------------------------------- download


class Server(ThreadingHTTPServer):
    """Serves `files`; `ranges` says whether it knows Range, `cut` after how many bytes it breaks off, once."""

    files: dict[str, bytes]
    ranges: bool = True
    cut: int | None = None
    requests: list[tuple[str, str | None]]

    def handle_error(self, *_: object) -> None:
        """Say nothing of connections that the client closes."""

    def url(self, name: str) -> str:
        return f"http://127.0.0.1:{self.server_port}/{name}"


class Handler(BaseHTTPRequestHandler):
    """GET with or without Range."""

    server: Server

    def do_GET(self) -> None:
        asked, content = self.headers.get("Range"), self.server.files.get(self.path[1:])
        self.server.requests.append((self.path[1:], asked))
        if content is None:
            return self.send_error(404)
        first = int(re.fullmatch(r"bytes=(\d+)-", asked)[1]) if asked and self.server.ranges else 0
        if first and first >= len(content):
            return self.send_error(416)
        self.send_response(206 if first else 200)
        if first:
            self.send_header("Content-Range", f"bytes {first}-{len(content) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(content) - first))
        self.end_headers()
        cut, self.server.cut = self.server.cut, None
        self.wfile.write(content[first:][:cut])

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture
def server() -> Iterator[Server]:
    with Server(("127.0.0.1", 0), Handler) as it:
        it.files, it.requests = {}, []
        thread = Thread(target=it.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        yield it
        it.shutdown()
        thread.join()


CONTENT = bytes(range(256)) * 2000
MD5, SHA256 = hashlib.md5(CONTENT).hexdigest(), hashlib.sha256(CONTENT).hexdigest()


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("checksum", [{"md5": MD5}, {"sha256": SHA256}, {"md5": MD5.upper()}])
def test_download(tmp_path: Path, server: Server, checksum: dict) -> None:
    server.files["f.gz"] = CONTENT
    path = download(server.url("f.gz"), tmp_path / "new" / "f.gz", **checksum)
    assert path.read_bytes() == CONTENT and names(path.parent) == ["f.gz"]
    download(server.url("f.gz"), path, **checksum)
    assert server.requests == [("f.gz", None)], "what is there is kept"


@pytest.mark.parametrize("ranges", [True, False])
def test_download_goes_on_where_it_broke_off(tmp_path: Path, server: Server, ranges: bool) -> None:
    server.files["f"], server.ranges, server.cut = CONTENT, ranges, 100_000
    with pytest.raises(ConnectionError, match=r"127.0.0.1.*ended after 100,000 of 512,000 bytes.*by hand"):
        download(server.url("f"), tmp_path / "f", md5=MD5)
    assert names(tmp_path) == ["f.part"], "nothing stands under the final name before it is whole"
    assert (tmp_path / "f.part").read_bytes() == CONTENT[:100_000]
    download(server.url("f"), tmp_path / "f", md5=MD5)
    assert (tmp_path / "f").read_bytes() == CONTENT and names(tmp_path) == ["f"]
    assert server.requests[-1] == ("f", "bytes=100000-")


def test_download_takes_a_whole_part(tmp_path: Path, server: Server) -> None:
    server.files["f"] = CONTENT
    (tmp_path / "f.part").write_bytes(CONTENT)
    assert download(server.url("f"), tmp_path / "f", md5=MD5).read_bytes() == CONTENT


@pytest.mark.parametrize("part", [None, b"x" * 1000])
def test_download_refuses_a_wrong_file(tmp_path: Path, server: Server, part: bytes | None) -> None:
    server.files["f"] = CONTENT if part else CONTENT + b"!"
    if part:
        (tmp_path / "f.part").write_bytes(part)
    with pytest.raises(ValueError, match=rf"/f: wrong checksum, md5 [0-9a-f]{{32}} instead of {MD5}"):
        download(server.url("f"), tmp_path / "f", md5=MD5)
    assert names(tmp_path) == []


def test_download_tries_the_mirrors_in_turn(tmp_path: Path, server: Server) -> None:
    server.files |= {"wrong": b"<html>", "right": CONTENT}
    download([server.url(name) for name in ("missing", "wrong", "right")], tmp_path / "f", md5=MD5)
    assert (tmp_path / "f").read_bytes() == CONTENT
    assert [name for name, _ in server.requests] == ["missing", "wrong", "right"]


def test_those_who_want_the_same_file_at_once_fetch_it_once(tmp_path: Path, server: Server) -> None:
    server.files["f"] = CONTENT
    with ThreadPoolExecutor(4) as pool:
        paths = list(pool.map(lambda _: download(server.url("f"), tmp_path / "f", md5=MD5), range(4)))
    assert {path.read_bytes() for path in paths} == {CONTENT} and len(server.requests) == 1
    assert names(tmp_path) == ["f"]


def test_download_has_a_limit(tmp_path: Path, server: Server) -> None:
    server.files["f"] = CONTENT
    with pytest.raises(ValueError, match="larger than the 1,000 bytes"):
        download(server.url("f"), tmp_path / "f", md5=MD5, limit=1000)
    assert names(tmp_path) == []


def test_download_without_a_network_says_what_to_do(tmp_path: Path, server: Server) -> None:
    with pytest.raises(ConnectionError, match=r"http://127.0.0.1:1/f: .*refused.*404.*put the file at .*/f by hand"):
        download(["http://127.0.0.1:1/f", server.url("f")], tmp_path / "f", md5=MD5)
    with pytest.raises(ValueError, match="md5 or sha256"):
        download("http://127.0.0.1:1/f", tmp_path / "f")


def serve_half(folder: Path, server: Server, monkeypatch: pytest.MonkeyPatch, prefix: str) -> None:
    """Move a written half to the server and publish it as MNIST."""
    server.files |= {path.name: path.read_bytes() for path in folder.glob(f"{prefix}-*")}
    md5 = {name: hashlib.md5(content).hexdigest() for name, content in server.files.items()}
    monkeypatch.setitem(idx.SOURCES, "mnist", idx.Published((server.url(""),), md5, tuple("0123456789")))


def test_idx_downloads_only_what_is_asked_and_missing(
    tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    train, test = write_half(tmp_path / "web", "train", seed=1), write_half(tmp_path / "web", "t10k", seed=2)
    for prefix in ("train", "t10k"):
        serve_half(tmp_path / "web", server, monkeypatch, prefix)
    root = tmp_path / "data"
    assert torch.equal(IDX("mnist", root).images, train)
    assert names(root / "mnist") == ["train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz"]
    assert torch.equal(IDX("mnist", root, split="test").images, test) and len(server.requests) == 4
    (root / "mnist" / "t10k-labels-idx1-ubyte.gz").unlink()
    assert torch.equal(IDX("mnist", root, split="test").images, test)
    assert [name for name, _ in server.requests[4:]] == ["t10k-labels-idx1-ubyte.gz"]
    IDX("mnist", root), IDX("mnist", root, split="test")
    assert len(server.requests) == 5


def test_idx_auto_does_not_download_train_beside_a_test_half(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(idx, "fetch", lambda *_, **__: pytest.fail("downloads"))
    write_half(tmp_path, "t10k")
    assert IDX("mnist", tmp_path).split == "test"


def test_every_published_file_has_an_address_and_a_checksum() -> None:
    for source in idx.SOURCES.values():
        assert sorted(source.md5) == sorted(f"{stem}.gz" for half in idx.PREFIX for stem in idx.file_stems(half))
        assert all(re.fullmatch("[0-9a-f]{32}", md5) for md5 in source.md5.values()) and len(source.classes) == 10
        assert source.urls and all(re.fullmatch("https?://.*/", url) for url in source.urls)
    assert len({md5 for source in idx.SOURCES.values() for md5 in source.md5.values()}) == 12


# ---------------------------------------------------------------------------------------------- CIFAR-10


def cifar_files(n: int = 4) -> dict[str, bytes]:
    """The six files of the binary version with n records each."""
    labels = torch.arange(n, dtype=torch.uint8)[:, None] % 10
    wanted = [*cifar10.FILES["train"], *cifar10.FILES["test"]]
    pixels = [random_images(n, 3, 32, 32, seed).flatten(1) for seed in range(6)]
    return {name: torch.cat([labels, x], 1).numpy().tobytes() for name, x in zip(wanted, pixels, strict=True)}


def tar_bytes(files: dict[str, bytes], kind: bytes = tarfile.REGTYPE) -> bytes:
    """A .tar.gz of the published layout; `kind` is the type of its last member."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as archive:
        for n, (name, content) in enumerate(files.items()):
            member = tarfile.TarInfo(f"{cifar10.FOLDER}/{name}")
            if n == len(files) - 1 and kind != tarfile.REGTYPE:
                member.type, member.linkname = kind, "/etc/passwd"
                archive.addfile(member)
            else:
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    return out.getvalue()


def test_cifar10_downloads_and_reads_the_archive(
    tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    archive = tar_bytes({"readme.html": b"x", **cifar_files()})
    server.files[cifar10.ARCHIVE] = archive
    monkeypatch.setattr(cifar10, "URLS", (server.url(cifar10.ARCHIVE),))
    monkeypatch.setattr(cifar10, "MD5", hashlib.md5(archive).hexdigest())
    d = CIFAR10(tmp_path)
    assert d.split == "train" and d.name == "cifar10" and d.images.shape == (20, 3, 32, 32)
    assert torch.equal(d.images[4:8], random_images(4, 3, 32, 32, seed=1)) and d.labels[4:8].tolist() == [0, 1, 2, 3]
    assert d.classes[8] == "ship" and d.num_classes == 10
    test = CIFAR10(tmp_path, split="test")
    assert torch.equal(test.images, random_images(4, 3, 32, 32, seed=5)) and test.split == "test"
    assert len(server.requests) == 1 and names(tmp_path / "cifar10") == [cifar10.ARCHIVE], "nothing is extracted"
    monkeypatch.setattr(cifar10, "MD5", "0" * 32)
    with pytest.raises(ValueError, match="wrong checksum"):
        CIFAR10(tmp_path / "other")


def test_cifar10_reads_the_extracted_folder_first(tmp_path: Path) -> None:
    (tmp_path / cifar10.ARCHIVE).write_bytes(tar_bytes(cifar_files(3)))
    assert len(CIFAR10(tmp_path, download=False)) == 15
    folder = tmp_path / cifar10.FOLDER
    folder.mkdir()
    for name, content in cifar_files(2).items():
        (folder / name).write_bytes(content)
    assert len(CIFAR10(tmp_path, download=False)) == 10
    (tmp_path / "cifar10").mkdir()
    (tmp_path / "cifar10" / cifar10.ARCHIVE).write_bytes(tar_bytes(cifar_files(4)))
    assert len(CIFAR10(tmp_path, download=False)) == 20
    folder.rename(tmp_path / "cifar10" / cifar10.FOLDER)
    assert CIFAR10(tmp_path, image_size=16, channels=1).images.shape == (10, 1, 16, 16)
    (tmp_path / "cifar10" / cifar10.FOLDER / "data_batch_3.bin").unlink()
    with pytest.raises(FileNotFoundError, match=r"lacks data_batch_3\.bin"):
        CIFAR10(tmp_path)


def test_cifar10_knows_when_its_files_changed(tmp_path: Path) -> None:
    (tmp_path / cifar10.ARCHIVE).write_bytes(tar_bytes(cifar_files(3)))
    archive = CIFAR10(tmp_path)
    assert not archive.origin.changed()
    folder = tmp_path / cifar10.FOLDER
    folder.mkdir()
    assert archive.origin.changed()
    for name, content in cifar_files(2).items():
        (folder / name).write_bytes(content)
    train, test = CIFAR10(tmp_path), CIFAR10(tmp_path, split="test")
    assert not train.origin.changed() and not test.origin.changed()
    (folder / "data_batch_3.bin").touch()
    assert train.origin.changed() and not test.origin.changed()


def test_cifar10_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"cifar-10-batches-bin/ or cifar-10-binary.tar.gz in .*download"):
        CIFAR10(tmp_path, download=False)
    with pytest.raises(ValueError, match="split='all': choose one of auto, train, test"):
        CIFAR10(tmp_path, split="all")


@pytest.mark.parametrize(
    ("archive", "message"),
    [
        (tar_bytes({**cifar_files(), "data_batch_2.bin": b"\0" * 3072}), "data_batch_2.bin: 3,072 bytes are not 1 to"),
        (tar_bytes({**cifar_files(), "data_batch_2.bin": b""}), "data_batch_2.bin: 0 bytes"),
        (tar_bytes({**cifar_files(), "data_batch_2.bin": b"\x0a" * 3073}), r"data_batch_2.bin: label 10 .* 0\.\.9"),
        (tar_bytes({"data_batch_1.bin": cifar_files()["data_batch_1.bin"]}), "lacks cifar-10-batches-bin/data_batch_2"),
        (tar_bytes({k: v for k, v in cifar_files().items() if "data" in k}, tarfile.SYMTYPE), "lacks .*data_batch_5"),
        (tar_bytes({f"../{name}": content for name, content in cifar_files().items()}), "lacks"),
        (tar_bytes(cifar_files())[:-5000], "is a damaged archive"),
        (b"<html>no archive</html>", "is a damaged archive"),
    ],
    ids=["size", "empty", "label", "one", "links", "outside", "cut", "html"],  # gzip writes the time into what it makes
)
def test_cifar10_refuses_damaged_archives(tmp_path: Path, archive: bytes, message: str) -> None:
    (tmp_path / cifar10.ARCHIVE).write_bytes(archive)
    with pytest.raises(ValueError, match=message) as error:
        CIFAR10(tmp_path)
    assert str(tmp_path / cifar10.ARCHIVE) in str(error.value)


# ---------------------------------------------------------------------------------------------- folders


def save(path: Path, colour: int | tuple[int, ...] = 100, size: tuple[int, int] = (8, 8), mode: str = "RGB") -> Path:
    """Write an image of one colour."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, colour).save(path)
    return path


def test_folder_with_class_subfolders(tmp_path: Path) -> None:
    root = tmp_path / "shapes"
    for name, colour in (("zebra/a.png", (0, 0, 9)), ("ant/b.PNG", (0, 0, 2)), ("ant/a.png", (0, 0, 1))):
        save(root / name, colour)
    save(root / "ant" / "deeper" / "c.png")
    save(root / "ant" / "._a.png")
    (root / "ant" / "notes.txt").write_text("none")
    (root / "empty").mkdir()
    d = Folder(root, image_size=8, validation=0)
    assert d.classes == ("ant", "zebra") and d.labels.tolist() == [0, 0, 1] and d.split == "all" and d.name == "shapes"
    assert d.images[:, 2, 0, 0].tolist() == [1, 2, 9]
    root.rename(tmp_path / "moved")
    assert Folder(tmp_path / "moved", image_size=8, name="shapes").identity() == d.identity()


def test_folder_without_subfolders_has_no_labels(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    save(tmp_path / "b.jpg", (200, 200, 200)), save(tmp_path / "a.JPEG", 0), save(tmp_path / "c.png", (1, 2, 3))
    d = Folder(tmp_path, image_size=8)
    assert d.labels is None and d.num_classes == 0 and len(d) == 3 and not capsys.readouterr().out
    assert d.images[:, :, 0, 0].tolist() == [[0, 0, 0], [200, 200, 200], [1, 2, 3]]
    save(tmp_path / "sub" / "d.png")
    assert len(Folder(tmp_path, image_size=8)) == 3 and "not those of 1 subfolders" in capsys.readouterr().out


def test_folder_resizes_crops_and_converts(tmp_path: Path) -> None:
    save(tmp_path / "wide.png", 100, (40, 20)), save(tmp_path / "tall.png", (200, 0, 0), (10, 50))
    d = Folder(tmp_path, image_size=(6, 12), channels=3)
    assert d.shape == (3, 6, 12) and d.images[0, :, 3, 6].tolist() == [200, 0, 0]
    gray = Folder(tmp_path, image_size=5, channels=1)
    assert gray.shape == (1, 5, 5) and gray.images[0].unique().tolist() == [60]


def test_folder_understands_gray_palette_depth_transparency_and_orientation(tmp_path: Path) -> None:
    save(tmp_path / "a.png", 7, mode="L")
    save(tmp_path / "b.png", (9, 9, 9, 0), mode="RGBA")
    Image.fromarray(np.full((8, 8), 0x8000, np.uint16)).save(tmp_path / "c.png")
    Image.new("RGB", (8, 8), (50, 60, 70)).convert("P", palette=Image.Palette.ADAPTIVE).save(tmp_path / "d.png")
    turned = Image.fromarray(np.repeat([[0] * 8, [255] * 8], 4, 0).astype(np.uint8))  # black above white
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    turned.save(tmp_path / "e.png", exif=exif)
    d = Folder(tmp_path, image_size=8)
    assert d.images[:4, :, 0, 0].tolist() == [[7, 7, 7], [255, 255, 255], [128, 128, 128], [50, 60, 70]]
    assert d.images[4, 0, 0, 0] == 255 and d.images[4, 0, 7, 0] == 0


def test_broken_images_are_named_counted_and_skipped(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for n in range(4):
        save(tmp_path / "cat" / f"{n}.png", n)
        save(tmp_path / "dog" / f"{n}.jpg", n)
    (tmp_path / "cat" / "1.png").write_bytes(b"no image")
    (tmp_path / "cat" / "3.png").write_bytes((tmp_path / "cat" / "3.png").read_bytes()[:50])
    (tmp_path / "dog" / "0.jpg").write_bytes(b"")
    d = Folder(tmp_path, image_size=8, validation=0)
    assert d.labels.tolist() == [0, 0, 1, 1, 1] and d.images[:2, 0, 0, 0].tolist() == [0, 2]
    said = capsys.readouterr().out.strip()
    assert said.count("\n") == 0 and "skipped 3 of 8 images" in said and "cat/1.png (not a PNG, JPEG, WebP" in said
    assert "cat/3.png" in said and "dog/0.jpg" in said and "cat/0.png" not in said


def test_only_the_first_broken_images_are_named(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    save(tmp_path / "whole.png")
    for n in range(9):
        (tmp_path / f"{n}.png").write_bytes(b"no image")
    assert len(Folder(tmp_path, validation=0)) == 1
    said = capsys.readouterr().out
    assert "skipped 9 of 10" in said and "4.png" in said and "5.png" not in said and "..." in said
    (tmp_path / "whole.png").unlink()
    with pytest.raises(ValueError, match=r"none of its 9 images can be read: 0\.png"):
        Folder(tmp_path)


@pytest.mark.parametrize("limit", [300, 900])  # 1,024 pixels: PIL warns above its limit, and refuses above twice that
def test_decompression_bombs_are_broken(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch, limit: int
) -> None:
    save(tmp_path / "bomb.png", size=(32, 32)), save(tmp_path / "small.png", size=(8, 8))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    assert len(Folder(tmp_path, validation=0)) == 1
    assert "bomb.png (Image size (1024 pixels) exceeds limit" in capsys.readouterr().out


def test_folder_splits(tmp_path: Path) -> None:
    for half, n in (("Train", 3), ("TEST", 2)):
        for i in range(n):
            save(tmp_path / half / "a" / f"{i}.png", i)
    assert [Folder(tmp_path, split=s).split for s in ("auto", "train", "test")] == ["train", "train", "test"]
    assert [len(Folder(tmp_path, split=s)) for s in ("auto", "train", "test")] == [3, 3, 2]
    assert Folder(tmp_path).classes == ("a",) and Folder(tmp_path).name == tmp_path.name
    with pytest.raises(ValueError, match=r"split='test': .*Train has no subfolders train and test, so only auto"):
        Folder(tmp_path / "Train", split="test")
    with pytest.raises(ValueError, match="split='half': choose one of auto, train, test"):
        Folder(tmp_path, split="half")


def test_folder_knows_when_its_files_changed(tmp_path: Path) -> None:
    root = tmp_path / "link"
    for half in ("train", "test"):
        save(tmp_path / "there" / half / "a" / "0.png")
    (tmp_path / "there" / "test" / "empty").mkdir()
    root.symlink_to("there")
    train, test = Folder(root, validation=0), Folder(root, split="test", validation=0)
    save(root / "train" / "a" / "1.png")
    assert train.origin.changed() and not test.origin.changed()
    changes: list[Callable[[], object]] = [
        lambda: save(root / "test" / "empty" / "0.png"),
        lambda: save(root / "test" / "a" / "0.png", 99),
        lambda: (root / "test" / "a" / "0.png").rename(root / "test" / "a" / "1.png"),
        lambda: save(root / "test" / "0.png"),
        lambda: (root / "test" / "a" / "1.png").unlink(),
        lambda: ((tmp_path / "there").rename(tmp_path / "moved"), root.unlink(), root.symlink_to("moved")),
        lambda: (root / "train").rename(root / "trained"),  # so that it has no halves any more
    ]
    for change in changes:
        now = Folder(root, split="test", validation=0)
        assert not now.origin.changed()
        change()
        assert now.origin.changed()


def test_folder_that_is_missing_empty_or_unreadable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FileNotFoundError, match=r"no folder .*nowhere.*point root at"):
        Folder(tmp_path / "nowhere")
    with pytest.raises(NotADirectoryError, match="is a file; point root"):
        Folder(save(tmp_path / "one.png"))
    (tmp_path / "empty" / "class").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"no PNG, JPEG, WebP, BMP or TIFF file in .*empty or in its subfolders"):
        Folder(tmp_path / "empty")

    def refuse(path: Path) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "iterdir", refuse)
    with pytest.raises(PermissionError, match=r"cannot read .*empty: Permission denied"):
        Folder(tmp_path / "empty")


# ---------------------------------------------------------------------------------------------- configs


@pytest.mark.parametrize("name", ["digits", "mnist", "fashion_mnist", "kmnist", "cifar10", "dhcd", "folder"])
def test_config_keys_are_the_constructors_arguments(name: str) -> None:
    config = yaml.safe_load((REPOSITORY / "conf" / "data" / f"{name}.yaml").read_text())
    package, _, target = config.pop("_target_").rpartition(".")
    arguments = inspect.signature(getattr(ddpm.data, target)).parameters
    assert package == "ddpm.data" and list(config) == list(arguments)
    required = {"name": name} if target == "IDX" else {"root": "???"} if target == "Folder" else {}
    defaults = {key: argument.default for key, argument in arguments.items()}
    assert config == defaults | required
