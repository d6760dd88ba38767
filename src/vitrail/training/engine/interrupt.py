"""Ctrl-C and SIGTERM wait until the step is done, so that what is then saved is whole."""

import signal
import threading
from types import FrameType, TracebackType
from typing import Any, Self


class Stopped(KeyboardInterrupt):
    """A run was stopped by a signal, saved, and can go on. Its text says how; `signal` is the signal's number."""

    def __init__(self, text: str, number: int) -> None:
        super().__init__(text)
        self.signal = number


class Interrupt:
    """While it is entered, the first Ctrl-C or SIGTERM only sets `number`; the second one acts as ever.

    Outside the main thread, where Python lets nobody handle signals, it does nothing. patient: further signals do
    nothing either, as under torchrun, which repeats them to processes that have them already, and kills after 30 s.
    """

    def __init__(self, patient: bool = False) -> None:
        self.number: int | None = None
        self.patient = patient
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._before = {s: signal.signal(s, self._note) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.number = number
        if not self.patient:
            self._restore()
