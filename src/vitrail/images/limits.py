"""Bounds on the memory and time that one image takes, and on the memory of all images that threads decode at once.

What decoding takes is estimated from the header, before any pixel is allocated: Pillow's pixels, their conversion to
RGB, and what the format's decoder keeps beside them.
"""

from __future__ import annotations

import io
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import lru_cache
from typing import IO, TYPE_CHECKING, Any

from vitrail.images.convert import BadImage
from vitrail.utils.memory import free_host_memory
from vitrail.utils.text import format_bytes

if TYPE_CHECKING:
    from PIL import Image

PIXEL_LIMIT = 178_956_970  # Pillow's limit for decompression bombs
SIDE_LIMIT = 1 << 22  # pixels; resampling takes 48 bytes for each along a side
DECODING_BYTES = 512 << 20  # that decoding one image may take, and decoding all of them at once
SCARCE_BYTES = 4 * DECODING_BYTES  # of free memory: with less, models compute while no image is decoded
_LOOKS = 4  # at the free memory in a second, at most
SECONDS = 10.0  # of the processor, that reading one image may take
_SCAN_PIXELS = 1_500_000_000  # scans of a progressive JPEG times its pixels
_PYTHON_PIXELS = 2_000_000  # of a format whose decoder is written in Python, about a microsecond per pixel

# Bytes per pixel that a decoder keeps beside the image: its canvases and copies of the output. Others keep rows only.
_BESIDE = {"WEBP": 16, "AVIF": 16, "JPEG2000": 32, "ICNS": 32, "ICO": 12, "CUR": 12, "TIFF": 8, "GIF": 5, "PSD": 4}
_NARROW = {"1": 1, "L": 1, "P": 1, "I;16": 2, "I;16B": 2, "I;16L": 2, "I;16N": 2}  # bytes per pixel; other modes: 4


def check_size(width: int, height: int) -> None:
    """Raise BadImage if an image has no pixels or too many."""
    if width < 1 or height < 1:
        raise BadImage(f"has no pixels ({width} x {height})")
    if width * height > PIXEL_LIMIT:
        raise BadImage(f"has {width * height:,} pixels ({width} x {height}), more than the limit of {PIXEL_LIMIT:,}")
    if max(width, height) > SIDE_LIMIT:
        raise BadImage(f"has a side of {max(width, height):,} pixels, more than the limit of {SIDE_LIMIT:,}")


def decoding_bytes(image: Image.Image, full: tuple[int, int]) -> int:
    """Bytes that decoding an opened image and its conversion take at most.

    full: its size in the file, (width, height), which is larger than that of a JPEG that is decoded at a reduced size.

    Raises:
        BadImage: more than DECODING_BYTES, or decoding would take too long.
    """
    from PIL import Image

    kind, pixels = image.format or "", full[0] * full[1]
    if any(tile[0] in Image.DECODERS for tile in getattr(image, "tile", ())) and pixels > _PYTHON_PIXELS:
        raise BadImage(f"has {pixels:,} pixels, more than the limit of {_PYTHON_PIXELS:,} for {kind}: save it as PNG")
    own = _NARROW.get(image.mode, 4)
    needed = image.width * image.height * (own + (0 if image.mode == "RGB" else 5)) + pixels * _BESIDE.get(kind, 0)
    if image.info.get("progressive"):
        needed += pixels * _coefficient_bytes(getattr(image, "layer", []))
    if needed > DECODING_BYTES:
        size = f"{full[0]} x {full[1]}"
        raise BadImage(
            f"takes {format_bytes(needed)} of memory to decode ({size} pixels, {kind}), more than the limit of "
            f"{format_bytes(DECODING_BYTES)}: make it smaller"
        )
    return needed


def _coefficient_bytes(components: list[tuple[int, int, int, int]]) -> int:
    """Bytes per pixel, rounded up, of the coefficients of a progressive JPEG, which are kept until its last scan."""
    areas = [vertical * horizontal for _, vertical, horizontal, _ in components] or [1, 1, 1]
    return -(-2 * sum(areas) // max(1, max(areas)))


def check_scans(file: IO[bytes], image: Image.Image) -> None:
    """Raise BadImage for a progressive JPEG with so many scans that it would take long to decode."""
    if not image.info.get("progressive"):
        return
    position = file.tell()
    file.seek(0)
    scans, tail = 0, b""
    while chunk := file.read(1 << 20):
        scans += (tail + chunk).count(b"\xff\xda")  # within pixel data, FF is followed by 00
        tail = chunk[-1:]
    file.seek(position)
    if scans * image.width * image.height > _SCAN_PIXELS:
        raise BadImage(f"is a progressive JPEG of {scans:,} scans, too many for {image.width} x {image.height} pixels")


class _Clock:
    """Raises BadImage from `check` when the thread has used SECONDS of the processor since the clock was made."""

    def __init__(self) -> None:
        self._end = time.thread_time() + SECONDS

    def check(self) -> None:
        if time.thread_time() > self._end:
            raise BadImage(f"takes more than {SECONDS:.0f} s to decode")


class TimedFile(io.BufferedReader):
    """A file whose reads fail when the thread has used too much time: decoders read it part by part."""

    def __init__(self, raw: Any) -> None:
        super().__init__(raw)
        self._clock = _Clock()

    def read(self, size: int | None = -1, /) -> bytes:
        self._clock.check()
        return super().read(size)


class TimedBytes(io.BytesIO):
    """As `TimedFile`, for a file's content."""

    def __init__(self, content: bytes) -> None:
        super().__init__(content)
        self._clock = _Clock()

    def read(self, size: int | None = -1, /) -> bytes:
        self._clock.check()
        return super().read(size)


class _Memory:
    """Bytes that threads share; a thread waits until enough are free."""

    def __init__(self, size: int) -> None:
        self._free = size
        self._changed = threading.Condition()
        self._waiting: deque[object] = deque()

    def take(self, size: int) -> None:
        """In the order of the calls, so that one that needs much gets it."""
        turn = object()
        with self._changed:
            self._waiting.append(turn)
            try:
                self._changed.wait_for(lambda: self._waiting[0] is turn and size <= self._free)
                self._free -= size
            finally:  # also on Ctrl-C, or nobody would have a turn after this one
                self._waiting.remove(turn)
                self._changed.notify_all()

    def give(self, size: int) -> None:
        with self._changed:
            self._free += size
            self._changed.notify_all()


class _Local(threading.local):
    """depth: of `holding` blocks in this thread. held: bytes taken for the image that was decoded last in them."""

    depth = 0
    held = 0


_memory = _Memory(DECODING_BYTES)
_local = _Local()


@contextmanager
def reserved(size: int) -> Iterator[None]:
    """Count `size` bytes as in use during the block; inside `holding`, until its end or the next reservation there."""
    _release()
    _memory.take(size)
    _local.held = size
    try:
        yield
    finally:
        if not _local.depth:
            _release()


@contextmanager
def holding() -> Iterator[None]:
    """A block that decodes an image and uses it, such as to crop it: its memory counts as in use until the end."""
    _local.depth += 1
    try:
        yield
    finally:
        _local.depth -= 1
        if not _local.depth:
            _release()


@contextmanager
def computing() -> Iterator[None]:
    """A block in which a model computes. If little memory is free, no image is decoded during it.

    To try again with less when memory did not suffice is no way: after a failure, oneDNN does not create some of its
    primitives any more, and a parallel region of PyTorch may never end (seen with PyTorch 2.13 on CPUs).
    """
    with reserved(DECODING_BYTES) if _memory_is_scarce(int(_LOOKS * time.monotonic())) else nullcontext():
        yield


@lru_cache(maxsize=1)
def _memory_is_scarce(look: int) -> bool:
    """look: another number for another look, which takes 0.1 ms."""
    free = free_host_memory()
    return free is not None and free < SCARCE_BYTES


def _release() -> None:
    if _local.held:
        _memory.give(_local.held)
        _local.held = 0
