"""What copies of an image are recognised by: a hash of its content, and small grey and colour copies of it.

A large JPEG is decoded at a reduced size, with a shorter side of at least `WORK` pixels.
Shapes: N images.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from vitrail.data.dataset import EncodedSplit, Split
from vitrail.images.convert import BadImage, Pixels, quiet_pillow, to_channels
from vitrail.images.decode import decode, one_image

if TYPE_CHECKING:
    from PIL import Image

WORK = 128  # pixels: shorter side of the image that the copies are made from, at most
THUMB = 64  # pixels: side of the square grey copy, squashed
COLOUR = 8  # pixels: side of the square colour copy, squashed
_CHUNK = 32  # images per task

Item = tuple[str, int]  # split and row
T = TypeVar("T")


@dataclass(frozen=True)
class Decoded:
    """An RGB image with a shorter side of at least WORK pixels, if its full size (height, width) has, and its content:
    that of the file, None for an image in memory."""

    image: Image.Image
    size: tuple[int, int]
    content: bytes | None

    def digest(self) -> bytes:
        """A hash of the content of the file, else of the pixels."""
        if self.content is None:
            return pixel_digest(self.image)
        return hashlib.blake2b(self.content, digest_size=16).digest()


def pixel_digest(image: Image.Image) -> bytes:
    """A hash of pixels and size."""
    return hashlib.blake2b(image.tobytes() + repr(image.size).encode(), digest_size=16).digest()


def read_reduced(split: Split, row: int) -> Decoded:
    """Read image `row` of a split. Raises BadImage."""
    if not isinstance(split, EncodedSplit):
        image = to_channels(split.image(row), 3)
        return Decoded(image, (image.height, image.width), None)
    full: list[tuple[int, int]] = []

    def at_least(height: int, width: int) -> tuple[int, int]:
        full.append((height, width))
        scale = min(1.0, WORK / min(height, width))
        return max(1, round(height * scale)), max(1, round(width * scale))

    source = split.encoded(row)
    content = source if isinstance(source, bytes) else _content(source)
    image = decode(content, 3, at_least)
    return Decoded(image, full[0] if full else (image.height, image.width), content)


def _content(path: str) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError as error:
        raise BadImage(f"cannot be read: {(error.strerror or str(error)).lower()}") from None


def shrink(image: Image.Image) -> Image.Image:
    """The image with a shorter side of at most WORK pixels."""
    from PIL import Image

    scale = WORK / min(image.size)
    if scale >= 1:
        return image
    width, height = (max(1, round(side * scale)) for side in image.size)
    return image.resize((width, height), Image.Resampling.BILINEAR, reducing_gap=3.0)


def thumbnail(grey: Image.Image) -> Pixels:
    """THUMB THUMB, of the grey version of a shrunk image."""
    from PIL import Image

    return np.asarray(grey.resize((THUMB, THUMB), Image.Resampling.BILINEAR))


def colours(small: Image.Image) -> Pixels:
    """COLOUR COLOUR 3, of a shrunk image."""
    from PIL import Image

    return np.asarray(small.resize((COLOUR, COLOUR), Image.Resampling.BILINEAR))


@dataclass(frozen=True)
class View:
    """What an image is compared by: the digest, THUMB THUMB grey and COLOUR COLOUR 3."""

    digest: bytes
    thumb: Pixels
    colours: Pixels


def read_view(split: Split, row: int) -> View:
    """The view of image `row`. Raises BadImage."""
    decoded = read_reduced(split, row)
    small = shrink(decoded.image)
    return View(decoded.digest(), thumbnail(small.convert("L")), colours(small))


def read_each(
    splits: Mapping[str, Split],
    read: Callable[[Split, int], T],
    workers: int,
    on_images: Callable[[int], None] | None = None,
) -> Iterator[tuple[Item, T | str]]:
    """What `read` makes of each image, in order, or the reason why it cannot be read. Images are read on threads.

    on_images is called with the number of images just read.
    """
    every = [(name, row) for name, split in splits.items() for row in range(len(split))]

    def read_part(part: list[Item]) -> list[T | str]:
        found: list[T | str] = []
        with quiet_pillow():
            for name, row in part:
                try:
                    with one_image():
                        found.append(read(splits[name], row))
                except BadImage as bad:
                    found.append(bad.reason)
        return found

    parts = [every[start : start + _CHUNK] for start in range(0, len(every), _CHUNK)]
    pool = ThreadPoolExecutor(max(1, workers), thread_name_prefix="read")
    try:
        for part, done in zip(parts, pool.map(read_part, parts), strict=True):
            yield from zip(part, done, strict=True)
            if on_images:
                on_images(len(done))
    finally:
        pool.shutdown(cancel_futures=True)
