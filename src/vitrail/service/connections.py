"""Limits of connections: the size of a request's header and a deadline for it, a deadline for a client that does not
read, requests that are sent ahead, and the number of connections.

httptools takes a twentieth of the service's Python time, where h11 took a third; but it has no limit of its own, and
parses all requests that were sent ahead.
"""

from __future__ import annotations

import asyncio
from typing import Any

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from vitrail.service.settings import ServeSettings

_HEADER_BYTES = 32 << 10  # of a header, and of what surrounds a body: lengths of chunks, trailers
_LINE_BYTES = 32  # that a line of a header counts besides, for what it takes in memory
_CHUNK_BYTES = 64  # that may surround a chunk of a body
_SENT_AHEAD = 8  # requests of one connection that may wait for their turn


class _TooMuch(Exception):
    """Ends the parsing, whereupon uvicorn answers 400 and closes the connection."""


class LimitedProtocol(HttpToolsProtocol):
    """uvicorn's HTTP/1.1 with limits; the body's are in `bodies.py`, those of a whole request in `guard.py`."""

    settings: ServeSettings
    _header_bytes = 0  # of this request
    _method = b""  # of a request that asks for another protocol
    _surplus = 0  # bytes received that were no part of a body
    _header_timer: asyncio.TimerHandle | None = None
    _write_timer: asyncio.TimerHandle | None = None

    @property
    def _between_requests(self) -> bool:
        return self.cycle is None or self.cycle.response_complete

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        transport.set_write_buffer_limits(high=0)  # the write timer runs as long as anything is unsent
        if len(self.connections) > self.settings.max_connections:
            transport.abort()
        else:
            self._header_timer = self.loop.call_later(self.settings.header_timeout, transport.abort)

    def data_received(self, data: bytes) -> None:
        if self._header_timer is None and self._between_requests:
            self._header_timer = self.loop.call_later(self.settings.header_timeout, self.transport.abort)
        self._surplus += len(data)
        self._unset_keepalive_if_required()
        self._parse(data)
        if self._surplus > _HEADER_BYTES and not self.transport.is_closing():
            self.send_400_response("Invalid HTTP request received.")
        if not self._between_requests:  # the header is complete
            self._stop_header_timer()

    def _parse(self, data: bytes) -> None:
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            self._ignore_upgrade(data[upgrade.args[0] :])
        except httptools.HttpParserError:
            self.send_400_response("Invalid HTTP request received.")

    def _ignore_upgrade(self, rest: bytes) -> None:
        """Parse a request that asks for another protocol, as Java's client asks for HTTP/2, as if it did not (RFC 9110,
        section 7.8): the parser has stopped after its header, and would drop its body. rest: what follows."""
        version = self.parser.get_http_version().encode()
        self.parser = httptools.HttpRequestParser(self)
        self.parser.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn's
        kept = [(name, value) for name, value in self.headers if name != b"upgrade"]
        lines = [b"%s %s HTTP/%s" % (self._method, self.url, version), *(b"%s: %s" % pair for pair in kept)]
        self._parse(b"\r\n".join(lines) + b"\r\n\r\n" + rest)

    def on_message_begin(self) -> None:
        if len(self.pipeline) >= _SENT_AHEAD:
            raise _TooMuch
        self._header_bytes = self._surplus = 0
        self._method = b""
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        if self.parser.should_upgrade() and self.parser.get_method() != b"CONNECT":
            self._method = self.parser.get_method()  # `_ignore_upgrade` follows
            return
        if b"://" in self.url and (parts := httptools.parse_url(self.url)).path is None:
            self.url = b"/" + (b"?" + parts.query if parts.query else b"")  # RFC 9110, section 4.2.3
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        if not self._method:
            super().on_message_complete()

    def on_url(self, url: bytes) -> None:
        self._count_header(url)
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        self._count_header(name + value)
        super().on_header(name, value)

    def on_body(self, body: bytes) -> None:
        self._surplus = max(0, self._surplus - len(body) - _CHUNK_BYTES)
        super().on_body(body)

    def _count_header(self, data: bytes) -> None:
        self._header_bytes += len(data) + _LINE_BYTES
        if self._header_bytes > _HEADER_BYTES:
            raise _TooMuch

    def pause_writing(self) -> None:
        super().pause_writing()
        self._write_timer = self.loop.call_later(self.settings.request_timeout, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._stop_write_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_header_timer()
        self._stop_write_timer()
        super().connection_lost(exc)

    def _stop_header_timer(self) -> None:
        if self._header_timer is not None:
            self._header_timer.cancel()
            self._header_timer = None

    def _stop_write_timer(self) -> None:
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None


def limited_protocol(settings: ServeSettings) -> type[LimitedProtocol]:
    """The protocol with these limits: uvicorn makes an object of it for each connection."""
    return type("LimitedProtocol", (LimitedProtocol,), {"settings": settings})
