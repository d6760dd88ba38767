"""Streams for messages."""

from __future__ import annotations

import io
from contextlib import suppress
from typing import IO, cast


class LossyStream(io.TextIOBase):
    """A text stream whose errors are ignored, for messages beside the work: behind it may be a terminal that was
    closed, a program that has exited (`| head`) or a full disk."""

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream

    def write(self, text: str, /) -> int:
        try:
            return self._stream.write(text)
        except (OSError, ValueError):  # ValueError: it is closed
            return len(text)

    def flush(self) -> None:
        with suppress(OSError, ValueError):
            self._stream.flush()

    def isatty(self) -> bool:
        try:
            return self._stream.isatty()
        except ValueError:
            return False

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._stream.fileno()

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return str(getattr(self._stream, "encoding", None) or "utf-8")


def lossy(stream: IO[str]) -> IO[str]:
    """The stream, its errors ignored."""
    return cast(IO[str], LossyStream(stream))
