"""Decoded images for a loader, through the disk cache.

For random crops, the cache stores full images, large ones reduced to a maximum shorter side. A crop is taken from these
pixels whether they were cached or just decoded, so it does not depend on the content of the cache. For everything else,
the cache stores evaluation crops, exactly those of `Preprocess.crop`.
Shapes: N images, H height, W width, C channels.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from vitrail.data.cache.pixel_cache import Log, Shapes, open_cache
from vitrail.data.dataset import EncodedSplit, Split, decode_reduced
from vitrail.images.convert import Pixels
from vitrail.images.decode import bad_image_errors
from vitrail.images.preprocess import Preprocess

ReadImage = Callable[[int], Pixels]  # row -> uint8 H W C, or BadImage


def max_short_side(preprocess: Preprocess) -> int:
    """The largest shorter side of a stored image, in pixels.

    Twice the model's input: only a random crop of less than a quarter of the area is enlarged, as with images of about
    500 pixels, for which published recipes are made.
    """
    return 2 * max(preprocess.size)


def shrunk_size(height: int, width: int, side: int) -> tuple[int, int]:
    """(height, width) with a shorter side of at most `side` and the same aspect ratio."""
    short = min(height, width)
    if short <= side:
        return height, width
    return max(side, round(height * side / short)), max(side, round(width * side / short))


def cached_shapes(split: Split, preprocess: Preprocess, *, random_crop: bool) -> Shapes | None:
    """(N, 2): height and width of each stored image; None if the split is not of files, so that none are stored."""
    if not isinstance(split, EncodedSplit) or split.sizes is None:
        return None
    if not random_crop:
        return np.tile(np.array(preprocess.size, dtype=np.int64), (len(split.sizes), 1))
    side = max_short_side(preprocess)
    shapes = [shrunk_size(height, width, side) for height, width in split.sizes.tolist()]
    return np.array(shapes, dtype=np.int64).reshape(-1, 2)


def cache_size(split: Split, preprocess: Preprocess, *, random_crop: bool) -> int:
    """Bytes of a cache of all images; 0 if there is nothing to decode."""
    shapes = cached_shapes(split, preprocess, random_crop=random_crop)
    return 0 if shapes is None else int(shapes.prod(axis=1).sum()) * preprocess.channels


def cached_reader(split: Split, preprocess: Preprocess, limit: int, log: Log, *, random_crop: bool) -> ReadImage:
    """Reads images of a split: full ones for random crops, else evaluation crops. Up to `limit` bytes are stored."""
    shapes = cached_shapes(split, preprocess, random_crop=random_crop)
    assert isinstance(split, EncodedSplit)
    assert shapes is not None
    side = max_short_side(preprocess)
    kind = f"full {side}" if random_crop else f"crop {preprocess.to_dict()}"
    cache = open_cache(kind, split.fingerprints(), shapes, preprocess.channels, limit, log)

    def decode(row: int) -> Pixels:
        if random_crop:
            return decode_shrunk(split, row, preprocess.channels, side)
        return preprocess.crop(split.image(row))

    def read(row: int) -> Pixels:
        assert cache is not None
        pixels = cache.get(row)
        if pixels is None:
            pixels = decode(row)
            cache.put(row, pixels)
        return pixels

    return decode if cache is None else read


def decode_shrunk(split: Split, row: int, channels: int, side: int) -> Pixels:
    """Image `row` with a shorter side of at most `side` pixels: uint8 H W C."""
    from PIL import Image

    image, full = decode_reduced(split, row, channels, lambda height, width: shrunk_size(height, width, side))
    height, width = shrunk_size(*full, side)
    if image.size != (width, height):
        with bad_image_errors():
            image = image.resize((width, height), Image.Resampling.BICUBIC)
    return np.asarray(image).reshape(height, width, channels)
