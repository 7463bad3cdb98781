"""Atomic file writing (temporary file, flush, rename), size-bounded reading, and detection of changed files."""

import hashlib
import json
import os
import stat
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

LARGEST_JSON = 16 * 2**20  # bytes


@contextmanager
def replacing(path: str | Path, durable: bool = False) -> Iterator[Path]:
    """Yield a temporary path next to `path`, which replaces `path` once the block has ended without an error.

    Args:
        durable: flush to disk before and after replacing, so that a power cut leaves the old file or the new one.
    """
    path = Path(path)
    if not path.parent.is_dir():
        raise ValueError(f"cannot write {path}: the folder {path.parent} does not exist")
    temporary = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        yield temporary
        if durable:
            flush(temporary)
        os.replace(temporary, path)
        if durable:
            flush(path.parent)
    finally:
        with suppress(FileNotFoundError):
            temporary.unlink()


def flush(path: Path) -> None:
    """Wait until a file, or the entries of a folder, are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def regular_size(path: Path, largest: int) -> int:
    """Return the size of a regular file without opening it: a pipe waits for a writer, a device has no end.

    Args:
        largest: bytes that it may have; a sparse file, which takes no room on disk, can claim any number.
    Raises: FileNotFoundError; ValueError for anything else than a regular file, or a larger one.
    """
    try:
        found = path.stat()
    except FileNotFoundError:
        raise
    except OSError as error:  # a link to itself, say
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error
    if not stat.S_ISREG(found.st_mode):
        raise ValueError(f"{path} cannot be read: it is no file")
    if found.st_size > largest:
        raise ValueError(f"{path} cannot be read: it has more than {largest:,} bytes")
    return found.st_size


def shortened(text: str, longest: int = 200) -> str:
    """Return text of a file shortened and escaped for a terminal, which it must neither control nor flood."""
    text = text if len(text) <= longest else f"{text[:longest]}..."
    return text if text.isprintable() else repr(text)


def read_json(path: Path, largest: int = LARGEST_JSON) -> Any:
    """Return the content of a JSON file.

    Args:
        largest: bytes that it may have.
    Raises: FileNotFoundError; ValueError that names a file which is not JSON, or is too large or too deeply nested.
    """
    size = regular_size(path, largest)
    with open(path, "rb") as file:
        content = file.read(size)
    try:
        return json.loads(content.decode())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error


def is_number(value: Any) -> bool:
    """Whether a JSON value is a number: any float, nan and infinity included, or an integer of at most 64 bits."""
    return type(value) is float or (type(value) is int and abs(value) < 2**63)


class Origin:
    """A snapshot of the state of some files, which later tells whether any of them has changed.

    Args:
        files: returns their paths, existing or not; called anew each time, for a folder may have others then.
    Raises: what `files` raises.
    """

    def __init__(self, files: Callable[[], Iterable[Path]]):
        self.files, self.stamp = files, _stamp(files())

    def changed(self) -> bool:
        """Whether a file was added, removed or written since."""
        try:
            return _stamp(self.files()) != self.stamp
        except (OSError, ValueError):  # the folder is gone, say
            return True


def _stamp(paths: Iterable[Path]) -> str:
    """Return a checksum of the paths of files and their metadata: device, inode, size and times."""
    digest = hashlib.sha256()
    for path in paths:
        try:
            found = path.stat()
        except OSError:
            digest.update(f"{path}\0".encode(errors="surrogateescape"))
            continue
        stamp = (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)
        digest.update(f"{path}\0{stamp}".encode(errors="surrogateescape"))
    return digest.hexdigest()
