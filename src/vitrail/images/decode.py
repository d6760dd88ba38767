"""Decoding of files, bytes and Pillow images to upright RGB or grey; BadImage with a one-line reason otherwise."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import IO, TYPE_CHECKING

from vitrail.errors import VitrailError
from vitrail.images.convert import BadImage, orientation, quiet_pillow, to_channels
from vitrail.images.limits import (
    DECODING_BYTES,
    PIXEL_LIMIT,
    TimedBytes,
    TimedFile,
    check_scans,
    check_size,
    decoding_bytes,
    holding,
    reserved,
)
from vitrail.utils.memory import is_out_of_memory
from vitrail.utils.text import one_line

if TYPE_CHECKING:
    from collections.abc import Iterator

    from PIL import Image

__all__ = [
    "AtLeast",
    "BadImage",
    "Header",
    "bad_image_errors",
    "decode",
    "image_extensions",
    "one_image",
    "read_header",
]

AtLeast = tuple[int, int] | Callable[[int, int], tuple[int, int]]

_HEIC_BRANDS = frozenset({b"heic", b"heix", b"heim", b"heis", b"hevc", b"mif1", b"msf1"})  # at byte 8, after "ftyp"
# Readers that start another program (EPS runs Ghostscript), that never decode, or that work on one system only.
_EXCLUDED_FORMATS = frozenset({"EPS", "WMF", "MPEG", "HDF5", "BUFR", "GRIB", "PDF"})


@dataclass(frozen=True)
class Header:
    """What is known without decoding: size after orientation, and whether decoding may fail."""

    height: int
    width: int
    may_fail: bool


@lru_cache(maxsize=1)
def _formats() -> tuple[str, ...]:
    from PIL import Image

    Image.init()
    return tuple(name for name in Image.OPEN if name not in _EXCLUDED_FORMATS)


@lru_cache(maxsize=1)
def image_extensions() -> frozenset[str]:
    """The file name extensions of images, in lower case, with the dot: also those of HEIC, which is reported as
    unreadable instead of being left out without a word."""
    from PIL import Image

    formats = set(_formats())
    known = {suffix.lower() for suffix, name in Image.registered_extensions().items() if name in formats}
    return frozenset(known | {".heic", ".heif"})


@contextmanager
def bad_image_errors() -> Iterator[None]:
    """Turn any exception of Pillow into BadImage, except those of this package; on damaged files it is nearly any."""
    try:
        yield
    except (BadImage, VitrailError):
        raise
    except FileNotFoundError:
        raise BadImage("does not exist") from None
    except PermissionError:
        raise BadImage("cannot be read: permission denied") from None
    except MemoryError:
        raise BadImage("does not fit in memory") from None
    except Exception as error:
        raise BadImage(_reason(error)) from None


@contextmanager
def one_image() -> Iterator[None]:
    """A block that reads one image of many and crops it: memory that does not suffice is a BadImage too."""
    try:
        with holding():
            yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise BadImage("does not fit in memory") from None


def _reason(error: Exception) -> str:
    text = one_line(error.strerror if isinstance(error, OSError) and error.strerror else error, 160)
    if type(error).__name__ == "DecompressionBombError":
        return f"has more pixels than the limit of {PIXEL_LIMIT:,}"
    if type(error).__name__ == "UnidentifiedImageError":
        return "is not an image that Pillow can read"
    if "truncated" in text.lower() or isinstance(error, EOFError):
        # Pillow's own sentence says so again: "image file is truncated (36 bytes not processed)".
        details = text.lower().removeprefix("image file is truncated")
        details = f" ({details.strip(' ()')})" if details.strip(" ()") else ""
        return f"is truncated{details}"
    return f"cannot be decoded ({text})"


@contextmanager
def _opened(source: str | os.PathLike[str] | bytes) -> Iterator[tuple[IO[bytes], int]]:
    """A regular file or its content, opened, and its size in bytes. Opening a pipe would block."""
    if isinstance(source, bytes):
        yield TimedBytes(source), len(source)
        return
    status = os.stat(source)
    if not stat.S_ISREG(status.st_mode):
        raise BadImage("is a folder" if stat.S_ISDIR(status.st_mode) else "is not a regular file")
    with TimedFile(open(source, "rb", buffering=0)) as file:
        yield file, status.st_size


def _open(file: IO[bytes], size: int) -> Image.Image:
    from PIL import Image, UnidentifiedImageError

    if size == 0:
        raise BadImage("is empty (0 bytes)")
    try:
        image = Image.open(file, formats=_formats())
    except UnidentifiedImageError:
        file.seek(0)
        start = file.read(12)
        if start[4:8] == b"ftyp" and start[8:] in _HEIC_BRANDS:
            raise BadImage("is HEIC (convert it to JPEG)") from None
        raise
    check_size(*image.size)
    return image


def decode(
    source: str | os.PathLike[str] | bytes | Image.Image, channels: int = 3, at_least: AtLeast | None = None
) -> Image.Image:
    """Decode to "RGB" (channels=3) or "L" (channels=1), upright, alpha on white, the first frame of an animation.

    at_least: minimum (height, width) of the result, or a function from the image's (height, width) to it. A JPEG may
    then be decoded at 1/2, 1/4 or 1/8 of its size, several times faster; omit it if pixels must be exact.

    Raises:
        BadImage: the image cannot be read, or takes more memory or time than `limits` allows.
    """
    with quiet_pillow(), bad_image_errors():
        if isinstance(source, bytes | str | os.PathLike):
            try:
                return _decode_file(source, channels, at_least)
            except MemoryError:  # again without other threads' images
                return _decode_file(source, channels, at_least, alone=True)
        check_size(*source.size)
        return to_channels(source, channels)


def _decode_file(
    source: str | os.PathLike[str] | bytes, channels: int, at_least: AtLeast | None, alone: bool = False
) -> Image.Image:
    with _opened(source) as (file, size), _open(file, size) as image:
        full = image.size
        if at_least is not None and image.format in ("JPEG", "MPO"):
            sideways = orientation(image) >= 5
            height, width = image.size if sideways else image.size[::-1]
            need_h, need_w = at_least(height, width) if callable(at_least) else at_least
            # draft keeps both sides at least this long.
            image.draft(None, (need_h, need_w) if sideways else (need_w, need_h))
        needed = decoding_bytes(image, full)
        check_scans(file, image)
        with reserved(DECODING_BYTES if alone else needed):
            return to_channels(image, channels)


def read_header(source: str | os.PathLike[str] | bytes) -> Header:
    """The header, from the first and last bytes of a file or of its content. Raises BadImage."""
    with quiet_pillow(), bad_image_errors(), _opened(source) as (file, size), _open(file, size) as image:
        width, height = image.size
        # For TIFF, Pillow applies the orientation itself and reports the size after it.
        if image.format in ("JPEG", "MPO", "PNG", "WEBP", "AVIF") and orientation(image) >= 5:
            width, height = height, width
        # Wide integers and floats may have values that `to_channels` rejects.
        may_fail = image.mode in ("I", "F") or _lacks_end_marker(file, size, image.format or "")
        return Header(height, width, may_fail)


def _lacks_end_marker(file: IO[bytes], size: int, kind: str) -> bool:
    """Whether the end-of-file marker is missing, as in a truncated file. Some files lack it and decode well."""
    tail = min(size, 64)
    if kind == "WEBP":
        file.seek(4)
        return int.from_bytes(file.read(4), "little") + 8 > size
    file.seek(size - tail)
    last = file.read(tail)
    if kind in ("JPEG", "MPO"):
        return b"\xff\xd9" not in last
    return kind == "PNG" and b"IEND" not in last
