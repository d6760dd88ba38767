"""A disk cache of decoded images, shared by later epochs, later runs and concurrent runs.

A cache is a folder with two files. `pixels` has every image at an offset that follows from the sizes of all images;
`checksums` has the CRC-32 of each image, 0 for one that is not stored. An image is written before its checksum, which a
process verifies when it first reads the image: one partly written before a power cut is decoded again. Processes that
store the same image write the same bytes, so they need no lock. Pixels are written by `pwrite` and read through a
memory map: a full disk is an error of the write, not a signal that kills the process.

The folder is named by a hash of the images' paths, sizes and times, and of how they were processed.
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

RESERVE = 1 << 30  # bytes of the disk that are left free
_MAX_FRACTION = 0.5  # of the free disk space, for all caches together
_VERSION = "1"  # of the files' layout, and of how pixels are computed


class PixelCache:
    """uint8 H W C pixels by number. Made by `open_cache`; safe for several threads and processes.

    shapes: int64 (N, 2), the (height, width) of each image. limit: bytes; images beyond it are not stored.
    """

    def __init__(self, folder: Path, shapes: Shapes, channels: int, limit: int, log: Log) -> None:
        self.folder = folder
        self._shapes = shapes
        self._channels = channels
        self._ends = np.cumsum(shapes.prod(axis=1) * channels)
        self._limit = limit
        self._log = log
        self._lock = threading.Lock()
        self._verified = bytearray(len(shapes))  # 1: the checksum was verified, or written, by this process
        self._writable = True
        files = [_lock_shared(folder)]
        self.close = weakref.finalize(self, _close, files)  # arrays that `get` has returned stay valid
        maps = []
        for name, length in (("pixels", int(self._ends[-1])), ("checksums", 4 * len(shapes))):
            files.append(os.open(folder / name, os.O_RDWR | os.O_CREAT, 0o666))
            if os.fstat(files[-1]).st_size < length:
                os.ftruncate(files[-1], length)  # the new bytes are 0, and use no space until they are written
            maps.append(mmap.mmap(files[-1], length, access=mmap.ACCESS_READ))
        _, self._pixels, self._checksums = files
        self._pixel_map, self._checksum_map = maps
        os.utime(folder)  # the time of the last use

    def get(self, i: int) -> Pixels | None:
        """Image i, read-only; None if it is not stored."""
        shape, end = self._shape(i), int(self._ends[i])
        start = end - shape[0] * shape[1] * shape[2]
        if not self._verified[i]:
            if end > self._limit:
                return None
            checksum = int.from_bytes(self._checksum_map[4 * i : 4 * i + 4], "little")
            if checksum == 0 or checksum != _checksum(memoryview(self._pixel_map)[start:end]):
                return None
            self._verified[i] = 1
        return np.frombuffer(self._pixel_map, np.uint8, end - start, start).reshape(shape)

    def put(self, i: int, pixels: Pixels) -> None:
        """Store image i, unless it is beyond the limit or has another shape than expected."""
        end = int(self._ends[i])
        if not self._writable or end > self._limit or pixels.shape != self._shape(i):
            return
        content = memoryview(np.ascontiguousarray(pixels).reshape(-1).data)
        try:
            disk = os.fstatvfs(self._pixels)
            if disk.f_bavail * disk.f_frsize < RESERVE + len(content):
                raise OSError(errno.ENOSPC, f"less than {format_bytes(RESERVE)} of the disk is free")
            _write(self._pixels, content, end - len(content))
            _write(self._checksums, memoryview(_checksum(content).to_bytes(4, "little")), 4 * i)
        except OSError as error:
            self._stop_writing(error.strerror or str(error))
            return
        self._verified[i] = 1

    def _shape(self, i: int) -> tuple[int, int, int]:
        height, width = self._shapes[i].tolist()
        return height, width, self._channels

    def _stop_writing(self, reason: str) -> None:
        with self._lock:
            was_writable, self._writable = self._writable, False
        if was_writable:
            self._log(f"cache   no more images are stored ({reason}); training continues without caching them")


def open_cache(
    kind: str, fingerprints: Iterable[str], shapes: Shapes, channels: int, limit: int, log: Log
) -> PixelCache | None:
    """The cache of images processed in one way (`kind`). None if limit is 0 or the cache cannot be written (logged).

    fingerprints: a line per image that changes when its content does.
    """
    if not len(shapes) or limit <= 0:
        return None
    digest = hashlib.blake2b(f"{_VERSION}\n{kind}\n{channels}\n".encode(), digest_size=12)
    for fingerprint, (height, width) in zip(fingerprints, shapes.tolist(), strict=True):
        digest.update(f"{fingerprint}\t{height}\t{width}\n".encode("utf-8", "surrogateescape"))
    folder = _root() / digest.hexdigest()
    try:
        if not hasattr(os, "pwrite"):
            raise OSError("this operating system has no pwrite")
        size = min(limit, int((shapes.prod(axis=1) * channels).sum()))
        _evict(size, folder)
        folder.mkdir(parents=True, exist_ok=True)
        return PixelCache(folder, shapes, channels, size, log)
    except OSError as error:
        log(f"cache   off: could not write {folder}: {error.strerror or error}")
        return None


def max_total_size() -> int:
    """Bytes that all caches together may use on their disk."""
    root = _root()
    disk = next(path for path in (root, *root.parents) if path.exists())
    free = max(0, shutil.disk_usage(disk).free - RESERVE)
    return int(_MAX_FRACTION * (free + sum(size for _, size, _ in _caches())))


def _evict(size: int, keep: Path) -> None:
    """Remove the least recently used caches until `keep` may use `size` bytes. Caches that are open are not removed."""
    others = sorted(cache for cache in _caches() if cache[2] != keep)
    excess = sum(used for _, used, _ in others) + size - max_total_size()
    for _, used, folder in others:
        if excess <= 0:
            return
        if _remove(folder):
            excess -= used


def _root() -> Path:
    return cache_dir() / "decoded"


def _caches() -> list[tuple[float, int, Path]]:
    """Time of the last use, bytes on the disk (images that are not stored use none), and folder of each cache."""
    found = []
    for pixels in _root().glob("*/pixels"):
        with suppress(OSError):  # removed by another process
            found.append((pixels.parent.stat().st_mtime, pixels.stat().st_blocks * 512, pixels.parent))
    return found


def _close(files: list[int]) -> None:
    for file in files:
        os.close(file)


def _lock_shared(folder: Path) -> int:
    """Lock a folder against removal, until the returned file descriptor is closed or the process ends."""
    import fcntl

    while True:
        folder.mkdir(parents=True, exist_ok=True)
        file = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(file, fcntl.LOCK_SH)
            # Another process may have removed the folder since, and with it this lock file.
            if os.path.samestat(os.fstat(file), os.stat(folder / "lock")):
                return file
        except FileNotFoundError:
            pass
        except BaseException:
            os.close(file)
            raise
        os.close(file)


def _remove(folder: Path) -> bool:
    """Remove a cache, unless a process has it open."""
    import fcntl

    try:
        with (folder / "lock").open("ab") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder)
    except OSError:
        return False
    return True


def _write(file: int, content: memoryview, offset: int) -> None:
    """Write everything. On a disk that becomes full, the first call writes a part and the next one raises."""
    while content:
        count = os.pwrite(file, content, offset)
        content, offset = content[count:], offset + count


def _checksum(content: memoryview) -> int:
    """The CRC-32, but never 0, which means that nothing is stored."""
    return zlib.crc32(content) or 1
