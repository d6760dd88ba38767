"""Downloads: resumed by HTTP Range, verified by checksum, moved into place when complete.

The file is written as `NAME.part` next to its target, under a lock that other processes sharing the cache wait for, and
renamed after its checksum was verified: a file that exists under its own name is complete. Size and time of a download
are bounded before its checksum is known, and a redirect may not lead to another scheme, except from http to https.
"""

from __future__ import annotations

import errno
import hashlib
import http.client
import os
import re
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from email.message import Message
from functools import partial
from http.client import HTTPMessage
from pathlib import Path
from typing import IO
from urllib.parse import urljoin, urlsplit

from vitrail.errors import DownloadError
from vitrail.utils.files import user_path, wait_for_lock
from vitrail.utils.text import one_line, printable

Progress = Callable[[int, int | None], None]  # bytes so far, total bytes (None: unknown)

_CHUNK = 1 << 18
_ATTEMPTS = 4  # requests in one call, if connections break
_TIMEOUT = 30.0  # seconds without a byte from the server
_CONNECT_SECONDS = 2.0  # for a first connection
_PAUSE = 0.2  # seconds before the second attempt, doubled each time
_MAX_BYTES = 16 << 30
_MAX_SECONDS = 6 * 3600.0  # of one download, with all attempts
_MIN_RATE = 16 << 10  # bytes per second: a small file has less time
_MIN_DIGITS = 16  # of a checksum: 64 bits
_SHORT_DIGITS, _SHORT_FROM = 8, "https://download.pytorch.org/"  # torch.hub's file names: see `fetch`


def cache_dir() -> Path:
    """$VITRAIL_CACHE, or vitrail's folder in $XDG_CACHE_HOME or ~/.cache."""
    if own := os.environ.get("VITRAIL_CACHE"):
        return user_path(own)
    return user_path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "vitrail"


def unreachable(url: str, seconds: float = _CONNECT_SECONDS) -> str | None:
    """Why no connection to the server of this URL, or to the proxy for it, can be made within `seconds`; else None."""
    parts = urlsplit(url)
    proxy = None if urllib.request.proxy_bypass(parts.hostname or "") else urllib.request.getproxies().get(parts.scheme)
    target = urlsplit(proxy if proxy and "//" in proxy else f"//{proxy}") if proxy else parts
    address = (target.hostname or "", target.port or {"https": 443}.get(target.scheme, 80))
    found: list[str | None] = []

    def connect() -> None:
        try:
            socket.create_connection(address, timeout=seconds).close()
            found.append(None)
        except (OSError, ValueError) as error:
            found.append(one_line(getattr(error, "strerror", None) or error, 80))

    # On a thread, because the look-up of a name has no time limit of its own.
    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    thread.join(seconds)
    return found[0] if found else f"no answer in {seconds:g} s"


def fetch(
    urls: str | Sequence[str],
    path: Path,
    *,
    sha256: str | None = None,
    md5: str | None = None,
    unchecked: bool = False,
    max_bytes: int = _MAX_BYTES,
    progress: Progress | None = None,
) -> Path:
    """Download to `path` unless it exists; `urls` are mirrors, tried in order. Returns `path`.

    At least one checksum must be given, in full or its first 16 digits or more. From download.pytorch.org over https, 8
    digits are enough: it publishes no more, in the file names, and the connection is what protects against another
    file. unchecked: for files without a published checksum; only their length is checked, and a partial file is resumed
    only if the server confirms with its ETag or Last-Modified header that the content is unchanged. max_bytes: a larger
    file is refused. A download may take 6 hours at most, and less if it is small.

    Raises:
        DownloadError: no connection, an HTTP error, a checksum that does not match, or a full disk.
    """
    checksums = {name: value.lower() for name, value in (("sha256", sha256), ("md5", md5)) if value}
    if not (checksums or unchecked):
        raise ValueError("a download needs a checksum")
    urls = [urls] if isinstance(urls, str) else urls
    for url in urls:
        _check_url(url, checksums)
    if path.exists():
        return path
    download = _Download(path, checksums, max_bytes, progress)
    errors: list[DownloadError] = []
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with wait_for_lock(path.with_name(path.name + ".lock")):
            for url in urls:
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


def _check_url(url: str, checksums: Mapping[str, str]) -> None:
    """Raise DownloadError for what is not a URL of http or https, or for a checksum with too few digits."""
    try:
        parts = urlsplit(url)
        valid = bool(parts.hostname) and parts.port != 0 and url.isascii() and url.isprintable() and " " not in url
    except ValueError:
        valid = False
    if not valid:
        raise DownloadError(f"{printable(url)} is not a valid URL of http or https: check it")
    if parts.scheme not in ("http", "https"):
        raise DownloadError(f"cannot download {printable(url)}: only http and https URLs are supported")
    digits = _SHORT_DIGITS if url.startswith(_SHORT_FROM) else _MIN_DIGITS
    if short := [name for name, digest in checksums.items() if len(digest) < digits]:
        raise DownloadError(f"{short[0]} of {printable(url)} has too few digits: give at least {digits}, or all")


class _TooLong(Exception):
    """The download takes too long."""


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Redirects within http or https, or from http to https."""

    def http_error_302(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: HTTPMessage
    ) -> IO[bytes] | None:
        target = headers.get("Location", "")
        try:
            schemes = urlsplit(req.full_url).scheme, urlsplit(urljoin(req.full_url, target)).scheme
        except ValueError:
            schemes = "", ""
        if schemes not in (("http", "http"), ("http", "https"), ("https", "https")):
            fp.close()
            raise DownloadError(f"cannot download {printable(req.full_url)}: it redirects to {printable(target)}")
        return super().http_error_302(req, fp, code, msg, headers)

    http_error_301 = http_error_303 = http_error_307 = http_error_308 = http_error_302


_OPENER = urllib.request.build_opener(_Redirects)


@dataclass(frozen=True)
class _Download:
    """One file to download. checksums: algorithm -> hex digest, or its first digits."""

    path: Path
    checksums: Mapping[str, str]
    max_bytes: int
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
        resumed = self.part.exists() and self.part.stat().st_size > 0
        self._complete(url)
        mismatch = self._mismatch()
        if mismatch and resumed:  # the partial file may be of another version of the file: download all of it
            self.part.unlink()
            self._complete(url)
            mismatch = self._mismatch()
        if mismatch:
            self.part.unlink()
            raise DownloadError(
                f"{printable(url)} has another checksum ({mismatch}): try again, or put the file at {self.path}"
            )
        with self.part.open("rb+") as file:
            os.fsync(file.fileno())
        self.part.replace(self.path)
        self.validator.unlink(missing_ok=True)

    def _complete(self, url: str) -> None:
        """Fill `part` to its full length; a broken connection is retried from where it stopped."""
        started = time.monotonic()
        reason = unreachable(url) or ""
        for attempt in range(0 if reason else _ATTEMPTS):
            if attempt:
                time.sleep(_PAUSE * 2**attempt)
            try:
                if self._append(url, started):
                    return
                reason = "the connection was closed early"
            except urllib.error.HTTPError as error:
                with error:
                    # Range not satisfiable: the part has the full length already, or is too long (bad checksum).
                    if error.code == 416 and self.part.exists():
                        return
                reason = printable(str(error.reason), 80)
                message = f"cannot download {printable(url)}: HTTP {error.code} {reason}"
                raise DownloadError(message, error.code) from None
            except urllib.error.URLError as error:
                reason = one_line(getattr(error.reason, "strerror", None) or error.reason)
                if _is_offline(error.reason):
                    break
            except (http.client.HTTPException, ConnectionError, TimeoutError) as error:
                reason = one_line(error)
            except (_TooLong, ValueError) as error:  # of a host name that cannot be one
                reason = one_line(error)
                break
        kept = f"; {self.part.stat().st_size:,} bytes are kept and resumed from" if self.part.exists() else ""
        raise DownloadError(
            f"cannot download {printable(url)} ({reason}): check the connection, or put the file at {self.path}{kept}"
        )

    def _append(self, url: str, started: float) -> bool:
        """One request for the missing bytes. Returns whether all announced bytes arrived."""
        start = self.part.stat().st_size if self.part.exists() else 0
        headers = {"User-Agent": "vitrail", "Accept-Encoding": "identity"}
        unchanged = self.validator.read_text(encoding="latin-1") if self.validator.exists() else ""
        if start and (unchanged or self.checksums):
            headers["Range"] = f"bytes={start}-"
            if not self.checksums:
                headers["If-Range"] = unchanged
        with _OPENER.open(urllib.request.Request(url, headers=headers), timeout=_TIMEOUT) as response:
            is_rest = response.status == 206 and response.headers.get("Content-Range", "").startswith(f"bytes {start}-")
            if not is_rest:  # the server sends the full file
                start = 0
                if not self.checksums:
                    self._save_validator(response.headers)
            length = response.headers.get("Content-Length", "")
            total = start + int(length) if re.fullmatch(r"[0-9]{1,18}", length) else None
            deadline = started + min(_MAX_SECONDS, 60 + (self.max_bytes if total is None else total) / _MIN_RATE)
            with self.part.open("ab" if is_rest else "wb") as file:
                return self._copy(response, file, start, total, deadline)

    def _copy(
        self, response: http.client.HTTPResponse, file: IO[bytes], done: int, total: int | None, deadline: float
    ) -> bool:
        """The rest of a response. Returns whether it is all that was announced."""
        while True:
            if max(done, total or 0) > self.max_bytes:
                file.truncate(0)
                raise DownloadError(f"refused to download {self.path.name}: it has more than {self.max_bytes:,} bytes")
            if self.progress:
                self.progress(done, total)
            chunk = response.read1(_CHUNK)  # not read(): it waits for all of the chunk, byte by byte
            if not chunk:
                return total is None or done >= total
            if time.monotonic() > deadline:
                raise _TooLong("the server is too slow")
            file.write(chunk)
            done += len(chunk)

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


def _is_offline(reason: object) -> bool:
    """Errors that do not pass within seconds, so that a retry is useless."""
    return isinstance(reason, socket.gaierror | ConnectionRefusedError) or (
        isinstance(reason, OSError) and reason.errno in (errno.ENETUNREACH, errno.EHOSTUNREACH)
    )
