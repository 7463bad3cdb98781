"""Downloads of single files: resumed, checked, and put in place atomically."""

import hashlib
import re
import ssl
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import date
from functools import partial
from http.client import HTTPException, HTTPResponse
from pathlib import Path
from typing import BinaryIO
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

from filelock import FileLock

from ddpm.runs.files import regular_size, replacing

CHUNK = 1 << 20
LARGEST_RECORD = 1 << 16  # bytes: a line of sha256sum, with a name as long as it may be
NETWORK_ERRORS = (URLError, HTTPException, ConnectionError, TimeoutError, ssl.SSLError)


def download(
    urls: str | Sequence[str],
    path: Path,
    *,
    md5: str | None = None,
    sha256: str | None = None,
    record: Path | None = None,
    inspect: Callable[[Path], object] | None = None,
    limit: int = 1 << 30,
    timeout: float = 30.0,
) -> Path:
    """Fetch a file from the first mirror that serves the right one.

    Bytes go to `path` + ".part", which the next call continues (HTTP Range), and which is renamed when its checksum is
    right. A file with a wrong checksum is removed and the next mirror tried. Of processes that want the same file at
    once, one fetches it and the others wait. A file that exists already is left as it is, unchecked.

    Args:
        urls: one address or several of the same file.
        path: where the file goes; its folder is made.
        md5, sha256: exactly one of them, in hexadecimal.
        record: in their place, for a file without a published checksum: where its sha256 is written down, as sha256sum
            does, when it comes for the first time. Later ones must match it. The addresses may give different files, so
            only the first one goes on where it broke off.
        inspect: raises ValueError for what cannot be the file, before it is recorded; goes with `record`.
        limit: the most bytes to accept.
        timeout: seconds without an answer before a mirror is given up.

    Returns: path.

    Raises: ConnectionError if no mirror can be reached; ValueError if the last one that can gives another file.
    """
    path = Path(path)
    checks: list[Callable[[Path, str], None]] = [
        partial(_check, algorithm=algorithm, expected=checksum)
        for algorithm, checksum in (("md5", md5), ("sha256", sha256))
        if checksum is not None
    ]
    if record is not None:
        checks.append(partial(_check_recorded, name=path.name, record=record, inspect=inspect))
    if len(checks) != 1:
        raise ValueError("give md5 or sha256 or record, and only one of them")
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    lock = path.with_name(path.name + ".lock")
    try:
        with FileLock(lock):
            if not path.exists():
                mirrors = [urls] if isinstance(urls, str) else urls
                _from_mirrors(mirrors, part, checks[0], limit, timeout, same=record is None)
                part.replace(path)
    finally:
        with suppress(OSError):
            lock.unlink()
    return path


def _from_mirrors(
    urls: Sequence[str], part: Path, check: Callable[[Path, str], None], limit: int, timeout: float, same: bool
) -> None:
    """Fill `part` with the right file, or raise; unless mirrors serve the `same` file, none resumes another."""
    failures, wrong_file = [], None
    for url in urls:
        try:
            _fetch(url, part, limit, timeout, resume=same or url == urls[0])
            check(part, url)
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


def _fetch(url: str, part: Path, limit: int, timeout: float, resume: bool) -> None:
    """Write the rest of `url` to `part`; all of it without `resume`, or if the server does not support Range."""
    have = part.stat().st_size if resume and part.exists() else 0
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


def _checksum(path: Path, algorithm: str) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, algorithm).hexdigest()


def _check(part: Path, url: str, algorithm: str, expected: str) -> None:
    """Raise ValueError unless `part` has the expected checksum."""
    found = _checksum(part, algorithm)
    if found != expected.lower():
        raise ValueError(f"{url}: wrong checksum, {algorithm} {found} instead of {expected}; the file was not kept")


def _check_recorded(part: Path, url: str, name: str, record: Path, inspect: Callable[[Path], object] | None) -> None:
    """Raise ValueError unless `part` has the recorded checksum and passes `inspect`; the first one is recorded."""
    found = _checksum(part, "sha256")
    try:
        known = matches_record(found, record, url)
        if inspect is not None:
            inspect(part)
    except ValueError as error:
        raise ValueError(f"{error}; the file that {url} gave was not kept") from error
    if not known:
        with replacing(record) as temporary:
            temporary.write_text(f"{found}  {name}\n")
        print(f"{url}: its checksum is recorded now, since there is no published one: {found} in {record}", flush=True)


def matches_record(sha256: str, record: Path, what: object) -> bool:
    """Return whether a checksum is the recorded one, and print so; False if none is recorded.

    Args:
        sha256: of a file, in hexadecimal.
        record: as `download` writes it.
        what: names the file.

    Raises: ValueError if another is recorded, or `record` holds none.
    """
    try:
        size = regular_size(record, LARGEST_RECORD)
    except FileNotFoundError:
        return False
    with record.open("rb") as file:
        known = re.match(rb"([0-9a-f]{64})\s", file.read(size))
    if known is None:
        raise ValueError(f"{record} does not start with a sha256 of 64 digits; remove it to have one recorded anew")
    day = date.fromtimestamp(record.stat().st_mtime)
    if (expected := known[1].decode()) != sha256:
        raise ValueError(
            f"{what}: wrong checksum, sha256 {sha256} instead of {expected}, which {record} has since {day}; "
            "remove that record to accept the file, or the file to download it again"
        )
    print(f"{what} matches the checksum recorded on {day}", flush=True)
    return True
