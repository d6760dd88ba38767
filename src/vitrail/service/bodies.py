"""Reading of request bodies, as a stream, with limits of size and time; multipart forms.

What is wrong with a request is a `Refused`, with the HTTP status.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from starlette.requests import Request

from vitrail.service.settings import ServeSettings
from vitrail.utils.text import format_bytes, printable

H = TypeVar("H", str, bytes)
FORM = "multipart/form-data"
_LONGEST = 1024  # bytes of a header with options
_LARGE = 64 << 10  # bytes of a form that is parsed in a thread, which takes longer than parsing a small one


class Refused(Exception):
    """A request that is answered with an error: HTTP status, one line, and more headers."""

    def __init__(self, status: int, reason: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(reason)
        self.status = status
        self.reason = reason
        self.headers = dict(headers or {})


@dataclass(frozen=True)
class Upload:
    """One file of a request. name: None if the request does not name it."""

    name: str | None
    data: bytes


class Bodies:
    """Reads bodies. The bytes of all requests that are being answered are bounded together."""

    def __init__(self, settings: ServeSettings) -> None:
        self._settings = settings
        self._in_memory = 0

    @asynccontextmanager
    async def read(self, request: Request) -> AsyncIterator[bytes]:
        """The body of a request. Its memory counts as used within the context.

        Raises:
            Refused: it is too large (413), compressed (415), not sent in time (408), or there are too many (429).
            ClientDisconnect: the client went away.
        """
        settings, stream = self._settings, request.stream()
        size, parts = 0, []
        if request.headers.get("content-encoding", "identity").lower() != "identity":
            raise Refused(415, "compressed requests are not accepted: send the image as it is")
        length = request.headers.get("content-length", "")
        too_large = length.isdigit() and int(length) > settings.max_body
        try:
            async with asyncio.timeout(settings.body_timeout):
                while not too_large and (part := await anext(stream, None)) is not None:
                    if self._in_memory + len(part) > settings.max_body_memory:
                        raise Refused(429, "too many large requests at the same time", {"Retry-After": "1"})
                    self._in_memory += len(part)
                    size += len(part)
                    parts.append(part)
                    too_large = size > settings.max_body
            if too_large:
                raise Refused(413, f"the request is larger than {format_bytes(settings.max_body)}")
            yield b"".join(parts)
        except TimeoutError:
            reason = f"the request was not sent within {settings.body_timeout:g} s"
            raise Refused(408, reason) from None
        finally:
            self._in_memory -= size

    @asynccontextmanager
    async def uploads(self, request: Request, field: str, most: int) -> AsyncIterator[list[Upload]]:
        """The files of a request: its body, or those in the fields named `field` of a multipart form.

        Raises:
            Refused: as `read`; or of another type (415), empty or damaged (400), or more than `most` files (413).
        """
        kind, boundary = parse_content_type(request.headers.get("content-type", ""))
        if kind != FORM and not kind.startswith("image/") and kind not in ("", "application/octet-stream"):
            allowed = f"image/*, application/octet-stream or {FORM}"
            raise Refused(415, f"content type {printable(kind)!r} is not an image: use {allowed}")
        async with self.read(request) as body:
            if kind != FORM:
                if not body:
                    raise Refused(400, "the request has no content: send the bytes of an image")
                yield [Upload(None, body)]
                return
            # The parser is pure Python: other requests must not wait for a large form.
            if len(body) > _LARGE:
                yield await asyncio.to_thread(parse_form, body, boundary, field, most)
            else:
                yield parse_form(body, boundary, field, most)


def _short(header: H) -> H:
    """The same: python-multipart takes the square of its length to parse it. Raises Refused (400) if it is long."""
    if len(header) > _LONGEST:
        raise Refused(400, f"a Content-Type or Content-Disposition is longer than {_LONGEST} bytes")
    return header


def parse_content_type(text: str) -> tuple[str, bytes | None]:
    """The media type in lower case, and the boundary of a multipart form."""
    from python_multipart.multipart import parse_options_header

    kind, options = parse_options_header(_short(text))
    return kind.decode("latin-1").strip().lower(), options.get(b"boundary")


def parse_form(body: bytes, boundary: bytes | None, field: str, most: int) -> list[Upload]:
    """The files of a multipart form (RFC 7578), each in a field of this name.

    Raises:
        Refused: the form is damaged, or has no such field or others (400); or it has more than `most` files (413).
    """
    from python_multipart.exceptions import FormParserError
    from python_multipart.multipart import MultipartParser

    if not boundary:
        raise Refused(400, "the content type of a multipart form needs a boundary")
    collector = _Collector(field, most)
    try:
        parser = MultipartParser(boundary, collector.callbacks())
        parser.write(body)
        parser.finalize()
    except FormParserError:
        raise Refused(400, "the multipart form is damaged") from None
    if not collector.complete:
        raise Refused(400, "the multipart form is truncated")
    if not collector.files:
        raise Refused(400, f"the form has no file: add a field {field}=@photo.jpg")
    return collector.files


class _Collector:
    """Callbacks of the parser."""

    def __init__(self, field: str, most: int) -> None:
        self._name = field
        self._most = most
        self.files: list[Upload] = []
        self.complete = False
        self._field = self._value = self._disposition = b""
        self._data: list[bytes] = []

    def callbacks(self) -> Any:
        names = ("part_begin", "header_field", "header_value", "header_end", "part_data", "part_end", "end")
        return {f"on_{name}": getattr(self, f"_{name}") for name in names}

    def _part_begin(self) -> None:
        self._disposition, self._data = b"", []

    def _header_field(self, data: bytes, start: int, end: int) -> None:
        self._field += data[start:end]

    def _header_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def _header_end(self) -> None:
        if self._field.lower() == b"content-disposition":
            self._disposition = self._value
        self._field = self._value = b""

    def _part_data(self, data: bytes, start: int, end: int) -> None:
        self._data.append(data[start:end])

    def _part_end(self) -> None:
        from python_multipart.multipart import parse_options_header

        _, options = parse_options_header(_short(self._disposition))
        if (found := options.get(b"name", b"").decode("utf-8", "replace")) != self._name:
            raise Refused(400, f"the form has a field {printable(found, 40)!r}: name it {self._name}")
        if len(self.files) == self._most:
            raise Refused(413, f"the form has more than {self._most} files: send them in several requests")
        name = options.get(b"filename")
        text = None if name is None else printable(name.decode("utf-8", "replace"), 255)
        self.files.append(Upload(text, b"".join(self._data)))

    def _end(self) -> None:
        self.complete = True
