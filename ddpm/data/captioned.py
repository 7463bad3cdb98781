"""Folders of image files with captions: a text file per image, or one table for all."""

import csv
import io
import json
from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path, PurePosixPath

from ddpm.data.dataset import ImageData, check_choice, check_name, check_options
from ddpm.data.folder import choose_half, decode_all, files_in, first_of, looked_at, visible
from ddpm.runs.files import Origin, regular_size, shortened

TABLES = ("metadata.jsonl", "metadata.csv")
COLUMNS = ("file_name", "text")
LARGEST = 1 << 28  # bytes of a table
LONGEST = 1 << 16  # bytes of a text file


class Captioned(ImageData):
    """The images of a folder and of its subfolders, one level deep, in sorted order, each with a caption.

    The captions lie in one of two forms: a file .txt beside each image with the image's name; or, in the folder, a
    table metadata.jsonl (an object a line) or metadata.csv (with a head) whose `file_name` is an image's path in the
    folder, and whose `text` is its caption, the layout of Hugging Face's ImageFolder; other columns are not read. Of
    captions any white space is one blank. Images are read as those of `Folder`; broken ones are named, counted and left
    out, with their captions.

    Args:
        root: the folder.
        image_size, channels, validation, condition: as in `ImageData`.
        flip: as in `ImageData`; what captions say of left and right is not changed by it.
        split: as in `Folder`: "auto", or, of a folder with the subfolders train and test, one of them.
        name: the data set's name; None for the folder's own name.

    Attributes:
        captions: the caption of each image, by its number.

    Raises: FileNotFoundError, NotADirectoryError, PermissionError; ValueError if there are no captions, or of more than
        one form, for images without caption, captions without image, empty ones, and several of one image; and as
        `Folder`.
    """

    def __init__(
        self,
        root: str | Path,
        image_size: int | Sequence[int] = 32,
        channels: int = 3,
        split: str = "auto",
        validation: float = 0.1,
        flip: bool = False,
        name: str | None = None,
        condition: str | None = None,
    ):
        check_choice("split", split, ("auto", "train", "test"))
        check_options(image_size, channels, validation, condition)
        check_name(name or "")
        root = Path(root).expanduser()
        try:
            half, folder = choose_half(root, split)
            self.origin = Origin(partial(looked_at, root, split))
            images, captions = captions_in(folder)
        except PermissionError as error:
            raise PermissionError(f"cannot read {error.filename or root}: {error.strerror or error}") from error
        names = list(images)
        pictures, whole = decode_all(names, lambda n: images[names[n]], folder, image_size, channels)
        self.captions = tuple(captions[names[n]] for n in whole.tolist())
        super().__init__(
            name or root.resolve().name,
            half,
            pictures,
            validation=validation,
            flip=flip,
            condition=condition,
        )


def captions_in(folder: Path) -> tuple[dict[str, Path], dict[str, str]]:
    """Return the images of a folder by relative path, sorted, and their captions by the same paths.

    Raises: ValueError, see `Captioned`.
    """
    images: dict[str, Path] = {}
    texts: dict[str, Path] = {}
    for place in (folder, *(path for path in visible(folder) if path.is_dir())):
        pictures, others = files_in(place)
        images |= {path.relative_to(folder).as_posix(): path for path in pictures}
        texts |= {path.relative_to(folder).as_posix(): path for path in others if path.suffix.lower() == ".txt"}
    tables = [folder / name for name in TABLES if (folder / name).exists()]
    forms = [table.name for table in tables] + [f"{len(texts):,} files .txt"] * bool(texts)
    if len(forms) != 1:
        found = "has captions of several forms: " + " and ".join(forms) if forms else "has no captions"
        raise ValueError(f"{folder} {found}; give a file .txt next to each image, or one of {' and '.join(TABLES)}")
    if not images:
        raise ValueError(f"{folder} has captions ({forms[0]}), but no images, nor have its subfolders (one level deep)")
    captions = of_table(tables[0]) if tables else of_texts(folder, images, texts)
    lacking, without = (
        [name for name in images if name not in captions],
        [name for name in captions if name not in images],
    )
    _refuse(folder, "images have no caption", lacking)
    _refuse(folder, "captions have no image", without)
    _refuse(folder, "captions are empty", [name for name, text in captions.items() if not text])
    return dict(sorted(images.items())), captions


def _refuse(folder: Path, what: str, names: Sequence[str]) -> None:
    """Raise ValueError if `names` is not empty; the message counts them and names the first."""
    if names:
        raise ValueError(f"{folder}: {len(names):,} {what}: {first_of(names)}")


def of_texts(folder: Path, images: dict[str, Path], texts: dict[str, Path]) -> dict[str, str]:
    """Return the captions in text files, by the path of their image; those without image by their own file name."""
    named: dict[str, list[str]] = {}
    for name in images:
        named.setdefault(str(PurePosixPath(name).with_suffix("")), []).append(name)
    _refuse(
        folder,
        "text files each name several images",
        [" = ".join(names) for names in named.values() if len(names) > 1],
    )
    captions = {}
    for name, path in texts.items():
        (image,) = named.get(str(PurePosixPath(name).with_suffix("")), [name])
        captions[image] = " ".join(_read(path, LONGEST).split())
    return captions


def of_table(path: Path) -> dict[str, str]:
    """Return the captions in a table, by the path of the image relative to the table's folder.

    Raises: ValueError that names the line if it is no table, or has two captions of one image.
    """
    rows = _lines(path) if path.suffix == ".jsonl" else _csv(path)
    found: list[tuple[str, str]] = []
    for line, row in rows:
        name, text = (row.get(column) for column in COLUMNS)
        if not isinstance(name, str) or not isinstance(text, str | None):
            raise ValueError(f"{path}, line {line}: {' and '.join(COLUMNS)} must be texts")
        if "text" not in row:
            raise ValueError(f"{path}, line {line}: there is no text; a line has {' and '.join(COLUMNS)}")
        found.append((PurePosixPath(name).as_posix(), " ".join((text or "").split())))
    twice = [name for name, times in Counter(name for name, _ in found).items() if times > 1]
    _refuse(path, "images have several captions", twice)
    return dict(found)


def _lines(path: Path) -> list[tuple[int, dict[str, object]]]:
    """Return the objects of a JSON Lines file, each with its line number."""
    rows = []
    for number, line in enumerate(_read(path, LARGEST).split("\n"), 1):
        if line.strip():
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{path}, line {number}: {error}") from error
            if not isinstance(row, dict):
                raise ValueError(
                    f"{path}, line {number}: {shortened(line, 40)} is no object with {' and '.join(COLUMNS)}"
                )
            rows.append((number, row))
    return rows


def _csv(path: Path) -> list[tuple[int, dict[str, object]]]:
    """Return the rows of a CSV file with a header, each with the number of its last line."""
    table = csv.DictReader(io.StringIO(_read(path, LARGEST), newline=""), strict=True)
    try:
        if not set(COLUMNS) <= set(table.fieldnames or ()):
            raise ValueError(f"{path}, line 1: the head must have {' and '.join(COLUMNS)}")
        return [(table.line_num, dict(row)) for row in table]
    except csv.Error as error:
        raise ValueError(f"{path}, line {table.line_num + 1}: {error}") from error


def _read(path: Path, largest: int) -> str:
    """Return the content of a text file; ValueError if it is larger than `largest` bytes, or not UTF-8."""
    size = regular_size(path, largest)
    with path.open("rb") as file:
        content = file.read(size)
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} cannot be read: it is no UTF-8 text") from error
