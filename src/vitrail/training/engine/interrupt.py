"""Ctrl-C, SIGTERM and SIGHUP take effect after the current step, so that a checkpoint is saved first."""

import signal
import threading
from types import FrameType, TracebackType
from typing import Any, Self


class Stopped(KeyboardInterrupt):
    """A run was stopped by a signal, and saved. The text says how to resume it; `signal` is the signal's number."""

    def __init__(self, text: str, number: int) -> None:
        super().__init__(text)
        self.signal = number


class Interrupt:
    """While it is entered, the first Ctrl-C, SIGTERM or SIGHUP only sets `number`; a second one acts as usual.

    SIGHUP, which a closed terminal sends, often twice, never acts as usual; under nohup it stays ignored.
    Outside the main thread, where Python allows no signal handlers, it does nothing. ignore_repeats: further signals
    are ignored: torchrun repeats them to processes that have received them already, and kills after 30 s.
    """

    def __init__(self, ignore_repeats: bool = False) -> None:
        self.number: int | None = None
        self.ignore_repeats = ignore_repeats
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            numbers = [signal.SIGINT, signal.SIGTERM]
            if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
                numbers.append(signal.SIGHUP)
            self._previous = {s: signal.signal(s, self._handle) for s in numbers}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.number = number
        if not self.ignore_repeats and number != getattr(signal, "SIGHUP", None):
            self._restore()
