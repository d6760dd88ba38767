"""Several processes that accept connections from one listening socket."""

from __future__ import annotations

import multiprocessing
import signal
import socket
import time
from collections.abc import Callable
from multiprocessing.connection import wait
from multiprocessing.context import SpawnProcess
from types import FrameType
from typing import Any

from vitrail.errors import RunError

_STARTING = 30.0  # seconds: a worker that ends earlier would end again, if it was started again
_EXTRA = 5.0  # seconds beyond a worker's own time to stop, after which it is killed


def run_workers(target: Callable[..., None], listening: socket.socket, count: int, drain_timeout: float) -> None:
    """Run `target(sockets=[listening])` in `count` processes until SIGTERM or Ctrl-C; one that is lost is replaced.

    Raises:
        RunError: a worker ended while it was starting.
    """
    context = multiprocessing.get_context("spawn")
    stopping = False

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal stopping
        stopping = True

    def start() -> tuple[SpawnProcess, float]:
        process = context.Process(target=target, kwargs={"sockets": [listening]})
        process.start()
        return process, time.monotonic()

    before: dict[int, Any] = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    workers: list[tuple[SpawnProcess, float]] = []
    try:
        workers = [start() for _ in range(count)]
        while not stopping:
            wait([process.sentinel for process, _ in workers], timeout=0.5)
            for index, (process, since) in enumerate(workers):
                if stopping or process.is_alive():
                    continue
                if time.monotonic() - since < _STARTING:
                    raise RunError(f"a worker ended with status {process.exitcode} while it was starting; see above")
                workers[index] = start()
    finally:
        for process, _ in workers:
            process.terminate()
        deadline = time.monotonic() + drain_timeout + _EXTRA
        for process, _ in workers:
            process.join(max(0.0, deadline - time.monotonic()))
            process.kill()
        for number, handler in before.items():
            signal.signal(number, handler)
