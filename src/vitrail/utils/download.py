"""Downloads: resumed by HTTP Range, verified by checksum, moved into place when complete.

The file is written as `NAME.part` next to its target, under a lock that other processes sharing the cache wait for, and
renamed after its checksum was verified: a file that exists under its own name is complete.
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
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from email.message import Message
from functools import partial
from pathlib import Path
from typing import IO
from urllib.parse import urlsplit

from vitrail.errors import DownloadError
from vitrail.utils.files import user_path, wait_for_lock

Progress = Callable[[int, int | None], None]  # bytes so far, total bytes (None: unknown)

_CHUNK = 1 << 18
_ATTEMPTS = 4  # requests in one call, if connections break
_TIMEOUT = 30.0  # seconds without a byte from the server
_PAUSE = 0.2  # seconds before the second attempt, doubled each time


def cache_dir() -> Path:
    """$VITRAIL_CACHE, or vitrail's folder in $XDG_CACHE_HOME or ~/.cache."""
    if own := os.environ.get("VITRAIL_CACHE"):
        return user_path(own)
    return user_path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "vitrail"


def fetch(
    urls: str | Sequence[str],
    path: Path,
    *,
    sha256: str | None = None,
    md5: str | None = None,
    unchecked: bool = False,
    progress: Progress | None = None,
) -> Path:
    """Download to `path` unless it exists; `urls` are mirrors, tried in order. Returns `path`.

    At least one checksum must be given, in full or its first digits. unchecked: for files without a published checksum;
    only their length is checked, and a partial file is resumed only if the server confirms with its ETag or
    Last-Modified header that the content is unchanged.

    Raises:
        DownloadError: no connection, an HTTP error, a checksum that does not match, or a full disk.
    """
    checksums = {name: value.lower() for name, value in (("sha256", sha256), ("md5", md5)) if value}
    if not (checksums or unchecked):
        raise ValueError("a download needs a checksum")
    if path.exists():
        return path
    download = _Download(path, checksums, progress)
    errors: list[DownloadError] = []
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with wait_for_lock(path.with_name(path.name + ".lock")):
            for url in [urls] if isinstance(urls, str) else urls:
                if path.exists():  # another process fetched it while this one waited
                    return path
                try:
                    download.fetch(url)
                    return path
                except DownloadError as error:
                    errors.append(error)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            with suppress(OSError):  # a partial file must not keep the disk full
                download.part.unlink()
        raise DownloadError(
            f"cannot write {path}: {error.strerror or error}; set VITRAIL_CACHE to another folder"
        ) from None
    raise errors[0]


@dataclass(frozen=True)
class _Download:
    """One file to download. checksums: algorithm -> hex digest, or its first digits."""

    path: Path
    checksums: Mapping[str, str]
    progress: Progress | None

    @property
    def part(self) -> Path:
        """The partial file."""
        return self.path.with_name(self.path.name + ".part")

    @property
    def validator(self) -> Path:
        """For a file without a checksum: the ETag or Last-Modified header of the partial file's content."""
        return self.path.with_name(self.path.name + ".tag")

    def fetch(self, url: str) -> None:
        """Download from one URL."""
        if urlsplit(url).scheme not in ("http", "https"):
            raise DownloadError(f"cannot download {url}: only http and https URLs are supported")
        resumed = self.part.exists() and self.part.stat().st_size > 0
        self._complete(url)
        mismatch = self._mismatch()
        if mismatch and resumed:  # the partial file may be of another version of the file: download all of it
            self.part.unlink()
            self._complete(url)
            mismatch = self._mismatch()
        if mismatch:
            self.part.unlink()
            raise DownloadError(f"{url} has another checksum ({mismatch}): try again, or put the file at {self.path}")
        with self.part.open("rb+") as file:
            os.fsync(file.fileno())
        self.part.replace(self.path)
        self.validator.unlink(missing_ok=True)

    def _complete(self, url: str) -> None:
        """Fill `part` to its full length; a broken connection is retried from where it stopped."""
        for attempt in range(_ATTEMPTS):
            if attempt:
                time.sleep(_PAUSE * 2**attempt)
            try:
                if self._append(url):
                    return
                reason = "the connection was closed early"
            except urllib.error.HTTPError as error:
                with error:
                    # Range not satisfiable: the part has the full length already, or is too long (bad checksum).
                    if error.code == 416 and self.part.exists():
                        return
                raise DownloadError(f"cannot download {url}: HTTP {error.code} {error.reason}", error.code) from None
            except urllib.error.URLError as error:
                reason = str(getattr(error.reason, "strerror", None) or error.reason)
                if _is_offline(error.reason):
                    break
            except (http.client.HTTPException, ConnectionError, TimeoutError) as error:
                reason = str(error) or type(error).__name__
        kept = f"; {self.part.stat().st_size:,} bytes are kept and resumed from" if self.part.exists() else ""
        raise DownloadError(
            f"cannot download {url} ({reason}): check the connection, or put the file at {self.path}{kept}"
        )

    def _append(self, url: str) -> bool:
        """One request for the missing bytes. Returns whether all announced bytes arrived."""
        start = self.part.stat().st_size if self.part.exists() else 0
        headers = {"User-Agent": "vitrail", "Accept-Encoding": "identity"}
        unchanged = self.validator.read_text(encoding="latin-1") if self.validator.exists() else ""
        if start and (unchanged or self.checksums):
            headers["Range"] = f"bytes={start}-"
            if not self.checksums:
                headers["If-Range"] = unchanged
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=_TIMEOUT) as response:
            is_rest = response.status == 206 and response.headers.get("Content-Range", "").startswith(f"bytes {start}-")
            if not is_rest:  # the server sends the full file
                start = 0
                if not self.checksums:
                    self._save_validator(response.headers)
            length = response.headers.get("Content-Length")
            total = start + int(length) if length else None
            with self.part.open("ab" if is_rest else "wb") as file:
                return _copy(response, file, start, total, self.progress)

    def _save_validator(self, headers: Message) -> None:
        """Keep the header that identifies this content: a strong ETag, else the time of the last change."""
        value = headers.get("ETag", "")
        if not value or value.startswith("W/"):  # a weak ETag does not guarantee equal bytes
            value = headers.get("Last-Modified", "")
        self.validator.unlink(missing_ok=True)
        if value:
            self.validator.write_text(value, encoding="latin-1")

    def _mismatch(self) -> str:
        """Which checksum differs, or ""."""
        for name, expected in self.checksums.items():
            with self.part.open("rb") as file:
                found = hashlib.file_digest(file, partial(hashlib.new, name, usedforsecurity=False)).hexdigest()
            if not found.startswith(expected):
                return f"{name} {found[:12]}..., not {expected[:12]}..."
        return ""


def _copy(response: IO[bytes], file: IO[bytes], done: int, total: int | None, progress: Progress | None) -> bool:
    while True:
        if progress:
            progress(done, total)
        chunk = response.read(_CHUNK)
        if not chunk:
            return total is None or done >= total
        file.write(chunk)
        done += len(chunk)


def _is_offline(reason: object) -> bool:
    """Errors that do not pass within seconds, so that a retry is useless."""
    return isinstance(reason, socket.gaierror | ConnectionRefusedError) or (
        isinstance(reason, OSError) and reason.errno in (errno.ENETUNREACH, errno.EHOSTUNREACH)
    )
