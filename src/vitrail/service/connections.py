"""Limits of connections: a deadline for each request's header, for a client that does not read, and their number."""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

from vitrail.service.settings import ServeSettings


def limited_protocol(settings: ServeSettings) -> type[H11Protocol]:
    """uvicorn's HTTP/1.1 with limits; the body's are in `bodies.py`, those of a whole request in `guard.py`."""

    class LimitedProtocol(H11Protocol):
        _header_timer: asyncio.TimerHandle | None = None
        _write_timer: asyncio.TimerHandle | None = None

        @property
        def _between_requests(self) -> bool:
            return self.cycle is None or self.cycle.response_complete

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            if len(self.connections) > settings.max_connections:
                transport.abort()
            else:
                self._header_timer = self.loop.call_later(settings.header_timeout, transport.abort)

        def data_received(self, data: bytes) -> None:
            if self._header_timer is None and self._between_requests:
                self._header_timer = self.loop.call_later(settings.header_timeout, self.transport.abort)
            super().data_received(data)
            if not self._between_requests:  # the header is complete
                self._stop_header_timer()

        def pause_writing(self) -> None:
            super().pause_writing()
            self._write_timer = self.loop.call_later(settings.request_timeout, self.transport.abort)

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

    return LimitedProtocol
