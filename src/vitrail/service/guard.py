"""What stands before every route: who may call, how long a request may take, security headers, access log, metrics."""

from __future__ import annotations

import asyncio
import json
import secrets
import sys
from collections.abc import Iterator
from contextlib import suppress
from datetime import UTC, datetime
from time import perf_counter
from typing import Any
from urllib.parse import urlsplit

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from vitrail.service.metrics import Metrics
from vitrail.service.settings import ServeSettings
from vitrail.utils.text import printable

# Everybody may load the page, which then asks for the token, and a load balancer may ask how the service is.
PUBLIC = frozenset(
    (
        "/",
        "/page.css",
        "/page.js",
        "/images.js",
        "/icon.svg",
        "/healthz",
        "/readyz",
        "/v2/health/live",
        "/v2/health/ready",
    )
)
_SECURITY = (
    (b"content-security-policy", b"default-src 'self'; frame-ancestors 'none'; base-uri 'none'; form-action 'self'"),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"cache-control", b"no-store"),
)
_DISCARD = 1.0  # seconds
_LOCAL = ("localhost", "127.0.0.1", "::1")


class Guard:
    """ASGI middleware. `draining` is set when the service stops."""

    def __init__(self, app: ASGIApp, settings: ServeSettings, metrics: Metrics) -> None:
        self._app = app
        self._settings = settings
        self._metrics = metrics
        self.draining = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        start, status = perf_counter(), 0
        headers = dict(scope["headers"])
        unread = b"transfer-encoding" in headers or headers.get(b"content-length", b"0") != b"0"
        added = [*_SECURITY, *self._cors(headers)]

        async def send_with_headers(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                if b"expect" not in headers:  # whose client may be waiting to be told whether to send the body
                    await discard()
                status = message["status"]
                own = {name for name, _ in message["headers"]}
                message["headers"] = [*message["headers"], *(pair for pair in added if pair[0] not in own)]
                # What follows a body that was not read would be taken for its rest.
                if (self.draining or unread) and b"connection" not in own:
                    message["headers"].append((b"connection", b"close"))
            await send(message)

        async def receive_all() -> Message:
            nonlocal unread
            message = await receive()
            unread = unread and message.get("more_body", False)
            return message

        async def discard() -> None:
            """Read what the client goes on sending, for a moment: it would not see an answer while it sends."""
            with suppress(TimeoutError):
                async with asyncio.timeout(_DISCARD):
                    while unread:
                        await receive_all()

        try:
            if refusal := self._refusal(scope, headers):
                await _answer(send_with_headers, *refusal)
                return
            async with asyncio.timeout(self._settings.request_timeout):
                await self._app(scope, receive_all, send_with_headers)
        except TimeoutError:
            if not status:
                reason = f"not answered within {self._settings.request_timeout:g} s"
                await _answer(send_with_headers, 503, reason, [(b"retry-after", b"5")])
        finally:
            self._finish(scope, status, perf_counter() - start)

    def _refusal(self, scope: Scope, headers: dict[bytes, bytes]) -> tuple[int, str, list[tuple[bytes, bytes]]] | None:
        """Status, reason and headers for a caller who may not use the service."""
        settings = self._settings
        host = _hostname(headers.get(b"host", b""))
        if settings.host in _LOCAL and host not in _LOCAL:
            # Another site whose name is made to point to this machine (DNS rebinding).
            return 403, f"this service answers to localhost only, not to {printable(host)!r}", []
        origin = headers.get(b"origin", b"").decode("latin-1")
        if (
            origin
            and origin not in settings.origins
            and urlsplit(origin).netloc != headers.get(b"host", b"").decode("latin-1")
        ):
            return 403, f"the page {printable(origin)!r} may not call this service: allow it with --origin", []
        if scope["method"] == "OPTIONS" and origin:
            return 204, "", []
        if settings.token is None or scope["path"] in PUBLIC:
            return None
        kind, _, given = headers.get(b"authorization", b"").partition(b" ")
        if kind.lower() == b"bearer" and secrets.compare_digest(given.strip(), settings.token.encode()):
            return None
        return (
            401,
            "this service needs a token: send the header Authorization: Bearer TOKEN",
            [(b"www-authenticate", b"Bearer")],
        )

    def _cors(self, headers: dict[bytes, bytes]) -> Iterator[tuple[bytes, bytes]]:
        origin = headers.get(b"origin", b"")
        if origin.decode("latin-1") in self._settings.origins:
            yield b"access-control-allow-origin", origin
            yield b"access-control-allow-methods", b"GET, POST"
            yield b"access-control-allow-headers", b"authorization, content-type"
            yield b"vary", b"origin"

    def _finish(self, scope: Scope, status: int, seconds: float) -> None:
        route = getattr(scope.get("route"), "path", "other")  # not the path: a metric for each would have no bound
        self._metrics.requests.labels(route, str(status)).inc()
        self._metrics.seconds.labels(route).observe(seconds)
        if status >= 400:
            self._metrics.errors.labels(str(status)).inc()
        if self._settings.access_log:
            client = scope.get("client")
            record: dict[str, Any] = {
                "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
                "client": client[0] if client else None,
                "method": scope["method"],
                "path": printable(scope["path"], 200),
                "status": status or None,  # None: the client went away
                "ms": round(1000 * seconds, 1),
            }
            print(json.dumps(record), file=sys.stderr, flush=True)


async def _answer(send: Send, status: int, reason: str, headers: list[tuple[bytes, bytes]]) -> None:
    body = json.dumps({"error": reason}).encode() if reason else b""
    own = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode()), *headers]
    await send({"type": "http.response.start", "status": status, "headers": own})
    await send({"type": "http.response.body", "body": body})


def _hostname(host: bytes) -> str:
    """The host without its port; "" if it is none."""
    try:
        return urlsplit("//" + host.decode("latin-1")).hostname or ""
    except ValueError:
        return ""
