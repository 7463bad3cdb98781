"""One file from the network: resumed where it broke off, checked, and put in place at once or not at all."""

import hashlib
import ssl
from collections.abc import Sequence
from contextlib import suppress
from http.client import HTTPException, HTTPResponse
from pathlib import Path
from typing import BinaryIO
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

from filelock import FileLock

CHUNK = 1 << 20
NETWORK_ERRORS = (URLError, HTTPException, ConnectionError, TimeoutError, ssl.SSLError)


def download(
    urls: str | Sequence[str],
    path: Path,
    *,
    md5: str | None = None,
    sha256: str | None = None,
    limit: int = 1 << 30,
    timeout: float = 30.0,
) -> Path:
    """Fetch a file from the first mirror that gives the right one.

    Bytes go to `path` + ".part", which the next call continues (HTTP Range), and which is renamed when its checksum is
    right. A file with a wrong checksum is removed and the next mirror tried. Of processes that want the same file at
    once, one fetches it and the others wait. A file that is there already is kept, unchecked.

    Args:
        urls: one address or several of the same file.
        path: where the file goes; its folder is made.
        md5, sha256: exactly one of them, in hexadecimal.
        limit: the most bytes to accept.
        timeout: seconds without an answer before a mirror is given up.

    Returns: path.

    Raises: ConnectionError if no mirror can be reached; ValueError if the last one that can gives another file.
    """
    given = [(name, checksum) for name, checksum in (("md5", md5), ("sha256", sha256)) if checksum is not None]
    if len(given) != 1:
        raise ValueError("give md5 or sha256, and not both")
    algorithm, expected = given[0]
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    lock = path.with_name(path.name + ".lock")
    try:
        with FileLock(lock):
            if not path.exists():
                _from_mirrors([urls] if isinstance(urls, str) else urls, part, algorithm, expected, limit, timeout)
                part.replace(path)
    finally:
        with suppress(OSError):
            lock.unlink()
    return path


def _from_mirrors(urls: Sequence[str], part: Path, algorithm: str, expected: str, limit: int, timeout: float) -> None:
    """Fill `part` with the right file; raise if no mirror gives it."""
    failures, wrong_file = [], None
    for url in urls:
        try:
            _fetch(url, part, limit, timeout)
            _check(part, url, algorithm, expected)
            return
        except NETWORK_ERRORS as error:
            failures.append(f"{url}: {error}")
        except ValueError as error:
            part.unlink(missing_ok=True)
            wrong_file = error
    if wrong_file is not None:
        raise wrong_file
    path = part.with_suffix("")
    reasons = "; ".join(failures)
    raise ConnectionError(f"cannot download {path.name} ({reasons}); try again, or put the file at {path} by hand")


def _fetch(url: str, part: Path, limit: int, timeout: float) -> None:
    """Write the rest of `url` to `part`, or all of it where the server knows no Range."""
    have = part.stat().st_size if part.exists() else 0
    print(f"downloading {url}" + (f", from byte {have:,} on" if have else ""), flush=True)
    headers = {"User-Agent": "ddpm"} | ({"Range": f"bytes={have}-"} if have else {})
    try:
        response = urlopen(Request(url, headers=headers), timeout=timeout)
    except HTTPError as error:
        if error.code == 416:  # nothing after what we have: it is whole, or it is another file; the checksum tells
            return
        raise
    with response:
        resumed = have and response.headers.get("Content-Range", "").startswith(f"bytes {have}-")
        with part.open("ab" if resumed else "wb") as file:
            _copy(response, file, limit - file.tell())


def _copy(response: HTTPResponse, file: BinaryIO, limit: int) -> None:
    """Copy a response to an open file; ValueError above `limit` bytes, ConnectionError if it ends early."""
    announced = response.headers.get("Content-Length")
    received = 0
    while chunk := response.read(CHUNK):
        received += len(chunk)
        if received > limit:
            raise ValueError(f"{response.url}: larger than the {limit:,} bytes that are accepted")
        file.write(chunk)
    if announced is not None and received < int(announced):
        raise ConnectionError(f"the connection ended after {received:,} of {int(announced):,} bytes")


def _check(part: Path, url: str, algorithm: str, expected: str) -> None:
    """Raise ValueError unless `part` has the expected checksum."""
    with part.open("rb") as file:
        found = hashlib.file_digest(file, algorithm).hexdigest()
    if found != expected.lower():
        raise ValueError(f"{url}: wrong checksum, {algorithm} {found} instead of {expected}; the file was not kept")
