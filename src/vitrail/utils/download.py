"""Downloads that survive: resumed by HTTP Range, checked, and moved into place only when whole.

The file grows as `NAME.part` beside its place, under a lock that other processes sharing the cache wait for. It is
renamed after its checksum is right, so a file that exists under its own name is whole.
"""

from __future__ import annotations

import errno
import hashlib
import http.client
import os
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from contextlib import suppress
from email.message import Message
from pathlib import Path
from typing import IO
from urllib.parse import urlsplit

from vitrail.errors import VitrailError
from vitrail.utils.files import wait_for_lock

Progress = Callable[[int, int | None], None]  # bytes so far, bytes in all (None: unknown)

_CHUNK = 1 << 18
_ATTEMPTS = 4  # in one call, for connections that are cut; each goes on from where the last one stopped
_PAUSE = 0.2  # seconds before the second attempt, doubled each time


def cache_dir() -> Path:
    """$VITRAIL_CACHE, or vitrail's folder in $XDG_CACHE_HOME or ~/.cache."""
    if own := os.environ.get("VITRAIL_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "vitrail"


def fetch(
    urls: str | Sequence[str],
    path: Path,
    *,
    sha256: str | None = None,
    md5: str | None = None,
    unchecked: bool = False,
    progress: Progress | None = None,
    timeout: float = 30.0,
) -> Path:
    """Download to `path` unless it is there; `urls` are mirrors, tried in order. Returns `path`.

    At least one checksum must be given. unchecked: for files of which nobody knows one, it is enough that as much came
    as the server promised, and what an earlier run left is gone on with only where the server says that its file is
    still the same. Raises VitrailError, in one line, for no connection, an HTTP error, content that does not match, or
    a full disk.
    """
    if not (sha256 or md5 or unchecked):
        raise ValueError("a download needs a checksum")
    if path.exists():
        return path
    mirrors = [urls] if isinstance(urls, str) else list(urls)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with wait_for_lock(path.with_name(path.name + ".lock")):
            if not path.exists():  # else another process fetched it while this one waited
                _from_mirrors(mirrors, path, sha256, md5, progress, timeout)
    except OSError as error:
        raise VitrailError(_disk_words(error, path)) from None
    return path


def _from_mirrors(
    mirrors: Sequence[str], path: Path, sha256: str | None, md5: str | None, progress: Progress | None, timeout: float
) -> None:
    problem: VitrailError | None = None
    for url in mirrors:
        try:
            return _from_url(url, path, sha256, md5, progress, timeout)
        except VitrailError as error:
            problem = problem or error
    assert problem is not None
    raise problem


def _from_url(
    url: str, path: Path, sha256: str | None, md5: str | None, progress: Progress | None, timeout: float
) -> None:
    if urlsplit(url).scheme not in ("http", "https"):
        raise VitrailError(f"cannot download {url}: only http and https are")
    part = path.with_name(path.name + ".part")
    if not (sha256 or md5):
        _download(url, part, path, progress, timeout, tag=path.with_name(path.name + ".tag"))
        _put_in_place(part, path)
        return
    resumed = part.exists() and part.stat().st_size > 0
    _download(url, part, path, progress, timeout)
    wrong = _mismatch(part, sha256, md5)
    if wrong and resumed:
        # What an earlier run left may be of another version of the file: once more from the start.
        part.unlink()
        _download(url, part, path, progress, timeout)
        wrong = _mismatch(part, sha256, md5)
    if wrong:
        part.unlink()
        raise VitrailError(
            f"{url} is not the file expected ({wrong}): it was thrown away; try again, or put a good copy at {path}"
        )
    _put_in_place(part, path)


def _put_in_place(part: Path, path: Path) -> None:
    with part.open("rb+") as file:
        os.fsync(file.fileno())
    os.replace(part, path)
    path.with_name(path.name + ".tag").unlink(missing_ok=True)


def _download(
    url: str, part: Path, path: Path, progress: Progress | None, timeout: float, tag: Path | None = None
) -> None:
    """Fill `part` to its full length. A cut connection is taken up again where it broke. tag: as _append's."""
    for attempt in range(_ATTEMPTS):
        if attempt:
            time.sleep(_PAUSE * 2**attempt)
        try:
            if _append(url, part, progress, timeout, tag):
                return
            reason = "the connection was cut"
        except urllib.error.HTTPError as error:
            with error:
                # Nothing left to send, or the part is too long: the checksum tells, and so does the same file's length.
                if error.code == 416 and part.exists():
                    return
            raise VitrailError(f"cannot download {url}: the server says {error.code} {error.reason}") from None
        except urllib.error.URLError as error:
            if _is_offline(error.reason):
                reason = str(getattr(error.reason, "strerror", None) or error.reason)
                break
            reason = str(error.reason)
        except (http.client.HTTPException, ConnectionError, TimeoutError) as error:
            reason = str(error) or type(error).__name__
    kept = f"; {part.stat().st_size:,} bytes are kept and the next try goes on from there" if part.exists() else ""
    raise VitrailError(f"cannot download {url} ({reason}): check the connection, or put the file at {path}{kept}")


def _is_offline(reason: object) -> bool:
    """Errors that another attempt a second later will not mend."""
    return isinstance(reason, socket.gaierror | ConnectionRefusedError) or (
        isinstance(reason, OSError) and reason.errno in (errno.ENETUNREACH, errno.EHOSTUNREACH)
    )


def _append(url: str, part: Path, progress: Progress | None, timeout: float, tag: Path | None = None) -> bool:
    """One request for what is missing. Returns whether everything that was promised came.

    tag: a file for the server's word for this very content, without which the whole is asked for anew.
    """
    have = part.stat().st_size if part.exists() else 0
    headers = {"User-Agent": "vitrail", "Accept-Encoding": "identity"}
    same = tag.read_text(encoding="latin-1") if tag and tag.exists() else ""
    if have and (same or not tag):
        headers["Range"] = f"bytes={have}-"
        if same:
            headers["If-Range"] = same
    with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=timeout) as response:
        goes_on = response.status == 206 and response.headers.get("Content-Range", "").startswith(f"bytes {have}-")
        if not goes_on:
            have = 0  # the server sends the whole file
            if tag:
                _note_tag(tag, response.headers)
        length = response.headers.get("Content-Length")
        total = have + int(length) if length else None
        with part.open("ab" if goes_on else "wb") as file:
            return _copy(response, file, have, total, progress)


def _note_tag(tag: Path, headers: Message) -> None:
    """Keep the word by which a server knows this content again: a strong ETag, or the time of its last change."""
    word = headers.get("ETag", "")
    if not word or word.startswith("W/"):  # a weak one is no promise of equal bytes
        word = headers.get("Last-Modified", "")
    if word:
        tag.write_text(word, encoding="latin-1")
    else:
        tag.unlink(missing_ok=True)


def _copy(response: IO[bytes], file: IO[bytes], have: int, total: int | None, progress: Progress | None) -> bool:
    while True:
        if progress:
            progress(have, total)
        chunk = response.read(_CHUNK)
        if not chunk:
            return total is None or have >= total
        file.write(chunk)
        have += len(chunk)


def _mismatch(part: Path, sha256: str | None, md5: str | None) -> str:
    """What is wrong with the checksums, or nothing."""
    for name, expected in (("sha256", sha256), ("md5", md5)):
        if expected:
            digest = hashlib.new(name, usedforsecurity=False)
            with part.open("rb") as file:
                while chunk := file.read(1 << 20):
                    digest.update(chunk)
            if not digest.hexdigest().startswith(expected.lower()):  # some publish only the first digits
                return f"{name} {digest.hexdigest()[:12]}..., not {expected[:12]}..."
    return ""


def _disk_words(error: OSError, path: Path) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        with suppress(OSError):  # half a file must not keep the disk full
            path.with_name(path.name + ".part").unlink()
        return f"no space left in {path.parent}: free some, or set VITRAIL_CACHE to another folder"
    return f"cannot write {path}: {error.strerror or error}; set VITRAIL_CACHE to a folder that can be written"
