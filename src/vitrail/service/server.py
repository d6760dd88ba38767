"""Running a service: the listening socket, worker processes, and the orderly stop."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import socket
import sys
import tempfile
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import uvicorn

from vitrail.classifier import load
from vitrail.errors import ConfigError, DeviceError
from vitrail.inference.engine import default_workers
from vitrail.service.app import create_app
from vitrail.service.connections import limited_protocol
from vitrail.service.guard import Guard
from vitrail.service.settings import ServeSettings
from vitrail.service.workers import run_workers
from vitrail.utils.memory import share_malloc_arena
from vitrail.utils.text import counted

_SETTLE = 0.2  # seconds in which connections that were made before a stop are accepted and send their request


class Server(uvicorn.Server):
    """Stops in order: no more connections, then every request that was accepted is answered."""

    def __init__(self, config: uvicorn.Config, guard: Guard) -> None:
        super().__init__(config)
        self._guard = guard

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._guard.draining = True
        await asyncio.sleep(_SETTLE)
        for server in self.servers:
            server.close()
        await asyncio.sleep(_SETTLE)
        await super().shutdown(sockets)


def serve(
    model: Any,
    settings: ServeSettings | None = None,
    *,
    device: str = "auto",
    precision: str = "auto",
    name: str | None = None,
    **options: Any,
) -> None:
    """Answer HTTP requests until Ctrl-C or SIGTERM; see docs/serve.md.

    Args:
        model: a classifier, or what `vitrail.load` takes.
        settings: or its fields as keywords: `vitrail.serve("runs/photos", port=8080, token="...")`.
        device, precision: as in `vitrail.load`; for a model that is loaded here.
        name: of the model, in responses; by default that of its folder.

    Raises:
        ConfigError: a setting out of range, or several workers for a classifier that is in memory.
        DeviceError: the address cannot be listened on.
    """
    settings = settings or ServeSettings(**options)
    source = os.fspath(model) if isinstance(model, str | os.PathLike) else None
    if settings.workers > 1 and source is None:
        raise ConfigError("several workers load the model themselves: give its folder instead of a classifier")
    name = name or model_name(source)
    start = partial(run_worker, source if source is not None else model, settings, device, precision, name)
    with bind(settings) as listening:
        if settings.workers == 1:
            start(sockets=[listening], announce=True)
            return
        with tempfile.TemporaryDirectory(prefix="vitrail-metrics-") as folder:
            os.environ["PROMETHEUS_MULTIPROC_DIR"] = folder
            os.environ.setdefault("OMP_NUM_THREADS", str(max(1, default_workers() // settings.workers)))
            print(
                f"{counted(settings.workers, 'worker')} on {_url(listening)}; Ctrl-C stops them",
                file=sys.stderr,
                flush=True,
            )
            run_workers(start, listening, settings.workers, settings.drain_timeout)


def run_worker(
    model: Any,
    settings: ServeSettings,
    device: str,
    precision: str,
    name: str,
    sockets: list[socket.socket],
    announce: bool = False,
) -> None:
    """Load the model and answer requests; the target of each process."""
    share_malloc_arena()  # or memory that requests took would stay with their threads
    classifier = load(model, device, precision=precision) if isinstance(model, str) else model
    server = make_server(create_app(classifier, settings, name), settings)
    # What exists now stays: a full garbage collection would walk through it, and hold up all requests for 40 ms.
    gc.collect()
    gc.freeze()
    if announce:
        print(f"{classifier!r}\nserved on {_url(sockets[0])}; Ctrl-C stops it", file=sys.stderr, flush=True)
    server.run(sockets=sockets)


def make_server(guard: Guard, settings: ServeSettings) -> Server:
    """A server of this application, which is not running yet."""
    for name in ("uvicorn.error", "python_multipart"):  # else a line for each damaged request
        logging.getLogger(name).setLevel(logging.ERROR)
    config = uvicorn.Config(
        guard,
        http=limited_protocol(settings),
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_keep_alive=int(settings.keep_alive),
        timeout_graceful_shutdown=int(settings.drain_timeout),
        backlog=512,
    )
    return Server(config, guard)


def bind(settings: ServeSettings) -> socket.socket:
    """The listening socket.

    Raises:
        DeviceError: the address is in use, forbidden, or none of this machine.
    """
    with ExitStack() as stack:
        try:
            family, kind, _, _, address = socket.getaddrinfo(settings.host, settings.port, type=socket.SOCK_STREAM)[0]
            listening = stack.enter_context(socket.socket(family, kind))
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listening.bind(address)
        except OSError as error:
            reason = (error.strerror or str(error)).lower()
            where = f"{settings.host}:{settings.port}"
            raise DeviceError(f"cannot listen on {where}: {reason}; choose another with --host and --port") from None
        stack.pop_all()
        return listening


def model_name(source: str | None) -> str:
    """A name for URLs: the last part of a path or of hf:org/name."""
    name = Path(source).resolve().name if source and Path(source).exists() else (source or "model").rpartition("/")[2]
    return "".join(c if c.isalnum() or c in "._-" else "-" for c in name) or "model"


def _url(listening: socket.socket) -> str:
    host, port = listening.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"
