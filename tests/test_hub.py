"""Data of the Hugging Face hub, from local files: what the library reads of them, and what we make of that."""

import inspect
import io
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from ddpm import config
from ddpm.data import Folder, Hub, hub

REPOSITORY = Path(__file__).parents[1]


def encoded(colour: Any, mode: str = "RGB", size: tuple[int, int] = (8, 8), form: str = "PNG", **options: Any) -> bytes:
    """An image of one colour, or one that is given, as a file."""
    image = colour if isinstance(colour, Image.Image) else Image.new(mode, size, colour)
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def reds(count: int, start: int = 0) -> list[bytes]:
    return [encoded((n, 0, 0)) for n in range(start, start + count)]


# ---------------------------------------------------------------------------------------------- without the library


@pytest.fixture
def no_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)


def test_a_missing_library_is_named_with_the_extra_that_brings_it(no_library: None, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^a/b needs the library datasets: pip install 'ddpm-ablations\[hub\]'$"):
        Hub("a/b", root=tmp_path)
    with pytest.raises(config.InvalidInput, match=r"data: a/b needs the library datasets"):
        config.build_data({"_target_": "ddpm.data.Hub", "name": "a/b", "root": str(tmp_path)}, [])


@pytest.mark.parametrize(
    "name", ["", "/nowhere", "./a", "../a", "parquet", "a/b/c", "a b", "a.parquet", "a/b.arrow", "a\n", "é"]
)
def test_names_that_can_be_neither_on_the_hub_nor_here(no_library: None, name: str) -> None:
    with pytest.raises(FileNotFoundError, match=r"name='.*a name on the hub, such as \S+, a local folder, or .*parq"):
        Hub(name)


def test_files_that_are_no_data_sets(no_library: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("pictures").write_text("a file")
    with pytest.raises(FileNotFoundError, match="name='pictures'"):
        Hub("pictures")


@pytest.mark.parametrize("options", [{"channels": 2}, {"image_size": 0}, {"validation": 1.0}])
def test_options_are_looked_at_first(no_library: None, options: dict) -> None:
    with pytest.raises(ValueError, match=f"^{next(iter(options))}="):
        Hub("a/b", **options)


@pytest.mark.parametrize("root", [".", "deeper", "deeper/still"])
def test_the_cache_must_not_lie_among_the_data(no_library: None, tmp_path: Path, root: str) -> None:
    with pytest.raises(ValueError, match=r"root=.* would lie among the data, in .*; set another"):
        Hub(str(tmp_path), root=tmp_path / root)


def test_titles_are_the_last_part_of_names(tmp_path: Path) -> None:
    (tmp_path / "v1.0").mkdir()
    (tmp_path / "one.parquet").touch()
    names = ["huggan/butterflies", str(tmp_path / "v1.0"), str(tmp_path / "one.parquet")]
    assert [hub.title(name, hub.find_local(name)) for name in names] == ["butterflies", "v1.0", "one"]


def test_splits() -> None:
    assert hub.choose_split("a/b", "auto", ["test", "train"]) == "train"
    assert hub.choose_split("a/b", "auto", ["everything"]) == "everything"
    assert hub.choose_split("a/b", "test", ["test", "train"]) == "test"
    for split, there in (("auto", ["test", "valid"]), ("tst", ["test", "valid"]), ("train[:10]", ["test", "valid"])):
        with pytest.raises(ValueError, match=rf"^a/b: split='{re.escape(split)}': choose one of test, valid$"):
            hub.choose_split("a/b", split, there)


def test_config_keys_are_the_constructors_arguments() -> None:
    keys = yaml.safe_load((REPOSITORY / "conf" / "data" / "hub.yaml").read_text())
    assert keys.pop("_target_") == "ddpm.data.Hub"
    defaults = {key: argument.default for key, argument in inspect.signature(Hub).parameters.items()}
    assert list(keys.items()) == list((defaults | {"name": "???"}).items())


@pytest.mark.parametrize("experiment", ["butterflies", "cars"])
def test_experiments_of_folders_take_data_of_the_hub(experiment: str) -> None:
    plain = config.compose("train", [f"experiment={experiment}"])
    composed = config.compose("train", [f"experiment={experiment}", "data=hub", "data.name=a/b"])
    assert composed.data._target_ == "ddpm.data.Hub" and composed.data.name == "a/b" and composed.data.root == "data"
    assert {key: composed.data[key] for key in ("image_size", "channels", "flip")} == {
        key: plain.data[key] for key in ("image_size", "channels", "flip")
    }


# ---------------------------------------------------------------------------------------------- with it


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The library, which asks no network even where another test had imported it before."""
    datasets = pytest.importorskip("datasets")
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    datasets.disable_progress_bars()
    yield datasets
    datasets.enable_progress_bars()


def write(path: Path, library: Any, images: list[Any], features: dict[str, Any] | None = None, **columns: Any) -> Path:
    """A Parquet file with the column image, and others."""
    path.parent.mkdir(parents=True, exist_ok=True)
    cells = [{"bytes": one, "path": None} if isinstance(one, bytes) else one for one in images]
    features = library.Features({"image": library.Image(), **(features or {})})
    library.Dataset.from_dict({"image": cells, **columns}, features=features).to_parquet(str(path))
    return path


def of(path: Path, **options: Any) -> Hub:
    """The data in a file or folder, with the cache beside it."""
    return Hub(str(path), root=path.parent / "cache", **({"image_size": 8, "validation": 0} | options))


@pytest.mark.slow  # needs the extra hub
def test_a_parquet_file(library: Any, tmp_path: Path) -> None:
    classes = {"label": library.ClassLabel(names=["ant", "zebra"])}
    path = write(tmp_path / "shapes.parquet", library, reds(4), classes, label=[0, 1, 1, 0])
    d = of(path)
    assert d.name == "shapes" and d.split == "train" and d.shape == (3, 8, 8)
    assert d.images[:, 0, 0, 0].tolist() == [0, 1, 2, 3] and int(d.images[:, 1:].max()) == 0
    assert d.labels.tolist() == [0, 1, 1, 0] and d.classes == ("ant", "zebra")
    assert of(path, label=None).labels is None and of(path, channels=1, image_size=[4, 6]).shape == (1, 4, 6)
    moved = path.rename(tmp_path / "moved.parquet").rename(tmp_path / "elsewhere.parquet")
    assert of(moved).identity() == d.identity() | {"name": "elsewhere"}


@pytest.mark.slow  # needs the extra hub
def test_an_arrow_file(library: Any, tmp_path: Path) -> None:
    path = tmp_path / "shapes.arrow"
    parquet = write(tmp_path / "shapes.parquet", library, reds(3))
    with library.arrow_writer.ArrowWriter(path=str(path), features=library.Features(image=library.Image())) as writer:
        for content in reds(3):
            writer.write({"image": {"bytes": content, "path": None}})
        writer.finalize()
    assert of(path).identity() == of(parquet).identity()


@pytest.mark.slow  # needs the extra hub
def test_a_folder_of_images_is_what_folder_makes_of_it(library: Any, tmp_path: Path) -> None:
    for n, name in enumerate(("ant/a.png", "ant/b.png", "zebra/c.png")):
        (tmp_path / "shapes" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "shapes" / name).write_bytes(encoded((n, 0, 0), size=(9, 7)))
    d, folder = of(tmp_path / "shapes"), Folder(tmp_path / "shapes", image_size=8, validation=0)
    assert d.classes == folder.classes and d.identity() == folder.identity() | {"split": "train"}


@pytest.mark.slow  # needs the extra hub
def test_images_of_any_kind_are_treated_as_those_of_a_folder(library: Any, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    images = [
        encoded(7, "L"),
        encoded((9, 9, 9, 0), "RGBA"),
        encoded(Image.fromarray(np.full((8, 8), 0x8000, np.uint16))),
        encoded((50, 60, 70), size=(40, 20)),
        encoded((200, 200, 200), form="JPEG"),
        encoded(Image.fromarray(np.repeat([[0] * 8, [255] * 8], 4, 0).astype(np.uint8)), exif=exif),
    ]
    d = of(write(tmp_path / "one.parquet", library, images))
    gray, white, half = [7] * 3, [255] * 3, [128] * 3
    assert d.images[:, :, 0, 0].tolist() == [gray, white, half, [50, 60, 70], [200] * 3, white]
    assert d.images[5, :, 7, 0].tolist() == [0] * 3


def test_broken_images_are_named_counted_and_left_out_with_their_labels(
    library: Any, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 300)
    bomb, gif = encoded(0, size=(32, 32)), encoded(0, form="GIF")
    images = [*reds(2), b"no image", encoded(0)[:45], None, bomb, gif, *reds(1, 7)]
    d = of(write(tmp_path / "one.parquet", library, images, {"n": library.Value("int64")}, n=list(range(8))), label="n")
    assert d.images[:, 0, 0, 0].tolist() == [0, 1, 7] and d.labels.tolist() == [0, 1, 7] and d.num_classes == 8
    said = capsys.readouterr().out.strip()
    assert said.count("\n") == 0 and "one.parquet: skipped 5 of 8 images, which cannot be read: image 2 (not a" in said
    assert "image 3 (" in said and "image 4 (there is none)" in said and "image 5 (Image size (1024 pixels)" in said
    with pytest.raises(ValueError, match=r"none of its 1 images can be read: image 0 \(not a PNG, JPEG, WebP, BMP or"):
        of(write(tmp_path / "two.parquet", library, [b"no image"]))


@pytest.mark.slow  # needs the extra hub
def test_columns_of_images(library: Any, tmp_path: Path) -> None:
    features = {"other": library.Image(), "raw": library.Value("binary"), "text": library.Value("string")}
    others = [{"bytes": content, "path": None} for content in reds(2, 10)]
    columns = {"other": others, "raw": reds(2, 20), "text": ["a", "b"]}
    path = write(tmp_path / "one.parquet", library, reds(2), features, **columns)
    found = {name: of(path, column=name).images[:, 0, 0, 0].tolist() for name in ("image", "other", "raw")}
    assert found == {"image": [0, 1], "other": [10, 11], "raw": [20, 21]}
    listed = r"there are image \(Image\), other \(Image\), raw \(binary\), text \(string\)$"
    with pytest.raises(ValueError, match=rf"column='auto': 2 columns hold images, choose one; {listed}"):
        of(path)
    with pytest.raises(ValueError, match=rf"column='img': no such column; {listed}"):
        of(path, column="img")
    with pytest.raises(ValueError, match=r"none of its 2 images can be read: image 0 \(.*No such file"):
        of(path, column="text")


@pytest.mark.slow  # needs the extra hub
def test_columns_of_labels(library: Any, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    features = {
        "coarse": library.ClassLabel(names=["a", "b"]),
        "fine": library.ClassLabel(names=["a", "b", "c"]),
        "year": library.Value("int64"),
        "taxon": library.Value("string"),
        "wings": library.Value("float64"),
        "gaps": library.Value("int64"),
        "hidden": library.ClassLabel(names=["a"]),
    }
    columns = {
        "coarse": [0, 1, 0], "fine": [2, 1, 0], "year": [1999, -5, 1999], "taxon": ["b", "a", "c"],
        "wings": [0.5, 1.0, 2.0], "gaps": [1, None, None], "hidden": [0, -1, -1],
    }  # fmt: skip
    path = write(tmp_path / "one.parquet", library, reds(3), features, **columns)
    assert of(path).labels is None and "several columns have some: coarse, fine, hidden" in capsys.readouterr().out
    found = {name: of(path, label=name) for name in ("fine", "year", "taxon")}
    assert {name: (d.labels.tolist(), d.classes) for name, d in found.items()} == {
        "fine": ([2, 1, 0], ("a", "b", "c")),
        "year": ([1, 0, 1], ("-5", "1999")),
        "taxon": ([1, 0, 2], ("a", "b", "c")),
    }
    for name in ("wings", "image", "nowhere"):
        with pytest.raises(ValueError, match=rf"label='{name}' is no column of classes.*: image \(Image\), coarse \("):
            of(path, label=name)
    for name in ("gaps", "hidden"):
        with pytest.raises(ValueError, match=rf"2 of 3 images, .* image 1, have no label in column {name}; set label"):
            of(path, label=name)


@pytest.mark.slow  # needs the extra hub
def test_splits_of_files(library: Any, tmp_path: Path) -> None:
    for n, half in enumerate(("test", "train", "validation"), 2):
        write(tmp_path / "halves" / f"{half}-00000.parquet", library, reds(n))
    assert {s: len(of(tmp_path / "halves", split=s)) for s in ("auto", "train", "test")} == {
        "auto": 3, "train": 3, "test": 2,
    }  # fmt: skip
    assert of(tmp_path / "halves", split="test").split == "test"
    with pytest.raises(ValueError, match=r"halves: split='tst': choose one of (train|validation|test|, ){5}$"):
        of(tmp_path / "halves", split="tst")


@pytest.mark.slow  # needs the extra hub
def test_it_knows_when_its_files_changed(library: Any, tmp_path: Path) -> None:
    path = write(tmp_path / "shapes" / "train.parquet", library, reds(2))
    folder, file = of(tmp_path / "shapes"), Hub(str(path), root=tmp_path, image_size=8, validation=0)
    assert not folder.origin.changed() and not file.origin.changed()
    write(tmp_path / "shapes" / "more" / "train.parquet", library, reds(1))
    assert folder.origin.changed() and not file.origin.changed()
    write(path, library, reds(3))
    assert file.origin.changed() and len(Hub(str(path), root=tmp_path, image_size=8)) == 3, "of a stale cache"


@pytest.mark.slow  # needs the extra hub
def test_what_cannot_be_loaded_is_said_in_one_line(library: Any, tmp_path: Path) -> None:
    with pytest.raises(ConnectionError, match=r"^nobody/nothing: .*nobody/nothing.*; without a network, only what"):
        Hub("nobody/nothing", root=tmp_path / "cache")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"empty: .*any data files$"):
        of(tmp_path / "empty")
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 and nothing else")
    with pytest.raises(ValueError, match=r"broken\.parquet cannot be loaded: .*[Pp]arquet") as error:
        of(tmp_path / "broken.parquet")
    assert "\n" not in str(error.value)
    path = write(tmp_path / "one.parquet", library, reds(2))
    with pytest.raises(config.InvalidInput, match=r"^data: .*one\.parquet: column='x': no such column; there are"):
        config.build({"_target_": "ddpm.data.Hub", "name": str(path), "column": "x", "root": str(tmp_path)}, "data")
