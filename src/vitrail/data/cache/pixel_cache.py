"""Decoded images on disk, so that later epochs, later runs and other runs at the same time decode nothing.

A cache is a folder with one file of pixels, in which every image has a place that is known beforehand from the images'
sizes, and a small file of marks: 0 for a place that is empty, else the CRC-32 of what stands there. Pixels are written
first and the mark after; two runs that fill one place write the same bytes, so nobody waits for anybody. A mark is
checked against the pixels the first time that a process reads them, so what a power cut left half written is written
again. Pixels are written by `pwrite` and read through a memory map: a full disk is an error of the write, and never a
signal that kills the process.

The folder is named after the images (their paths, sizes and times) and what was made of them: other images, other
folder.
"""

from __future__ import annotations

import errno
import hashlib
import mmap
import os
import shutil
import threading
import weakref
import zlib
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

import numpy as np
import numpy.typing as npt

from vitrail.images.convert import Pixels
from vitrail.utils.download import cache_dir
from vitrail.utils.text import format_bytes

Shapes = npt.NDArray[np.int64]
Log = Callable[[str], None]

RESERVE = 1 << 30  # bytes of a disk that are left free, for checkpoints and for others
SHARE = 0.5  # of what a disk has free for caches, which all of them together may take
_VERSION = "1"  # of the files' layout, and of how pixels are made


class PixelCache:
    """uint8 H W C pixels by number. Made by `open_cache`; safe for threads and for processes at the same time.

    shapes: int64 (N, 2), the (height, width) of each. limit: bytes; images whose place lies beyond are never kept.
    """

    def __init__(self, folder: Path, shapes: Shapes, channels: int, limit: int, say: Log) -> None:
        self.folder = folder
        self._shapes = shapes
        self._channels = channels
        self._ends = np.cumsum(shapes.prod(axis=1) * channels)
        self._limit = limit
        self._say = say
        self._lock = threading.Lock()
        self._checked = bytearray(len(shapes))  # 1: the mark was found right, or set, by this process
        self._writes = True
        size = int(self._ends[-1])
        handles = [_hold(folder)]
        self.close = weakref.finalize(self, _close, handles)  # also on its own; pixels given out stay readable
        for name in ("pixels", "marks"):
            handles.append(os.open(folder / name, os.O_RDWR | os.O_CREAT, 0o666))
        _, self._pixels, self._marks = handles
        _at_least(self._pixels, size)
        _at_least(self._marks, 4 * len(shapes))
        self._map = mmap.mmap(self._pixels, size, access=mmap.ACCESS_READ)
        self._mark_map = mmap.mmap(self._marks, 4 * len(shapes), access=mmap.ACCESS_READ)
        os.utime(folder)  # when it was last of use

    def get(self, i: int) -> Pixels | None:
        """Image i, read-only, or None where it is not kept."""
        shape, end = self._shape(i), int(self._ends[i])
        begin = end - shape[0] * shape[1] * shape[2]
        if not self._checked[i]:
            if end > self._limit:
                return None
            mark = int.from_bytes(self._mark_map[4 * i : 4 * i + 4], "little")
            if mark == 0 or mark != _mark(memoryview(self._map)[begin:end]):
                return None
            self._checked[i] = 1
        return np.frombuffer(self._map, np.uint8, end - begin, begin).reshape(shape)

    def put(self, i: int, pixels: Pixels) -> None:
        """Keep image i, where there is room for it and it has the shape that was said."""
        end = int(self._ends[i])
        if not self._writes or end > self._limit or pixels.shape != self._shape(i):
            return
        content = memoryview(np.ascontiguousarray(pixels).reshape(-1).data)
        try:
            disk = os.fstatvfs(self._pixels)
            if disk.f_bavail * disk.f_frsize < RESERVE + len(content):
                raise OSError(errno.ENOSPC, f"less than {format_bytes(RESERVE)} of the disk is free")
            _write(self._pixels, content, end - len(content))
            _write(self._marks, memoryview(_mark(content).to_bytes(4, "little")), 4 * i)
        except OSError as error:
            self._stop(error.strerror or str(error))
            return
        self._checked[i] = 1

    def _shape(self, i: int) -> tuple[int, int, int]:
        height, width = self._shapes[i].tolist()
        return height, width, self._channels

    def _stop(self, reason: str) -> None:
        with self._lock:
            first, self._writes = self._writes, False
        if first:
            self._say(f"cache   no more images are kept ({reason}); the run goes on without")


def open_cache(
    what: str, stamps: Iterable[str], shapes: Shapes, channels: int, limit: int, say: Log
) -> PixelCache | None:
    """The cache of what was made (`what`, in a few words) of images that `stamps` tell apart, a line each.

    None where there is no disk to write to; `say` is told so.
    """
    if not len(shapes) or limit <= 0:
        return None
    digest = hashlib.blake2b(f"{_VERSION}\n{what}\n{channels}\n".encode(), digest_size=12)
    for stamp, (height, width) in zip(stamps, shapes.tolist(), strict=True):
        digest.update(f"{stamp}\t{height}\t{width}\n".encode("utf-8", "surrogateescape"))
    folder = _root() / digest.hexdigest()
    try:
        if not hasattr(os, "pwrite"):
            raise OSError("this system cannot write at a place in a file")
        size = min(limit, int((shapes.prod(axis=1) * channels).sum()))
        make_room(size, folder)
        folder.mkdir(parents=True, exist_ok=True)
        return PixelCache(folder, shapes, channels, size, say)
    except OSError as error:
        say(f"cache   off: cannot write {folder} ({error.strerror or error})")
        return None


def room() -> int:
    """Bytes that all caches together may take, of the disk that they are or would be on."""
    root = _root()
    disk = next(path for path in (root, *root.parents) if path.exists())
    return int(SHARE * (max(0, shutil.disk_usage(disk).free - RESERVE) + sum(map(_taken, _folders()))))


def make_room(size: int, keep: Path) -> None:
    """Remove the caches that nobody has used for longest, as far as `size` bytes more for `keep` ask for it.

    A cache that a process has open is never removed.
    """
    others = sorted((folder for folder in _folders() if folder != keep), key=_last_use)
    over = sum(map(_taken, others)) + size - room()
    for folder in others:
        if over <= 0:
            return
        taken = _taken(folder)
        if _remove(folder):
            over -= taken


def _root() -> Path:
    return cache_dir() / "decoded"


def _folders() -> list[Path]:
    with suppress(OSError):
        return [path for path in _root().iterdir() if path.is_dir()]
    return []


def _taken(folder: Path) -> int:
    """Bytes on the disk: the file of pixels is sparse, and places that are empty take nothing."""
    with suppress(OSError):
        return (folder / "pixels").stat().st_blocks * 512
    return 0


def _last_use(folder: Path) -> float:
    with suppress(OSError):
        return folder.stat().st_mtime
    return 0.0


def _close(handles: list[int]) -> None:
    for handle in handles:
        os.close(handle)


def _hold(folder: Path) -> int:
    """Hold the folder, with others who use it; the system lets go of it when the process ends, however it ends.

    A handle of its lock file, whose closing lets go of it.
    """
    import fcntl

    while True:
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(handle, fcntl.LOCK_SH)
            # Whoever removes a cache holds its lock meanwhile: then this is the lock of a folder that is gone.
            if os.path.samestat(os.fstat(handle), os.stat(folder / "lock")):
                return handle
        except FileNotFoundError:
            pass
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)


def _remove(folder: Path) -> bool:
    """Remove a cache, unless a process uses it."""
    import fcntl

    try:
        with (folder / "lock").open("ab") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder)
    except OSError:
        return False
    return True


def _at_least(handle: int, size: int) -> None:
    """Make a file so long. What is added reads as zeros and takes no room until it is written."""
    if os.fstat(handle).st_size < size:
        os.ftruncate(handle, size)


def _write(handle: int, content: memoryview, place: int) -> None:
    """All of it; a disk that fills up on the way takes a part at first, and says so at the next call."""
    while content:
        count = os.pwrite(handle, content, place)
        content, place = content[count:], place + count


def _mark(content: memoryview) -> int:
    """Never 0, which means empty."""
    return zlib.crc32(content) or 1
