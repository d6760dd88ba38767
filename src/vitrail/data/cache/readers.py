"""Images as arrays for a loader, through a cache of what was decoded.

For random crops, whole images: shrunk, where they are large, so that the shorter side has a certain length. Views are
cut out of these very pixels whether they come from the cache or were decoded a moment ago, so no view depends on what
the cache holds. For everything else, the evaluation's crop as `Preprocess.crop` makes it, exactly.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from vitrail.data.cache.pixel_cache import Log, PixelCache, Shapes, open_cache
from vitrail.data.dataset import Split
from vitrail.images.convert import Pixels
from vitrail.images.preprocess import Preprocess

ReadImage = Callable[[int], Pixels]  # row -> uint8 H W C, or BadImage

_LARGER = 2  # times the model's longer side: what the shorter side of a stored image is shrunk to


@runtime_checkable
class Encoded(Protocol):
    """What a split of files has, beside the images, for them to be worth a cache."""

    sizes: npt.NDArray[np.int64] | None  # (N, 2): height and width, upright

    def fingerprints(self) -> Iterable[str]:
        """A line for each image that changes when its content does."""
        ...


def image_sizes(split: Split) -> Shapes | None:
    """(N, 2): height and width of each image of a split of files; None where there is nothing to decode."""
    return split.sizes if isinstance(split, Encoded) else None


def max_short_side(preprocess: Preprocess) -> int:
    """Pixels that the shorter side of a stored image has at most.

    Twice what the model sees: a random crop is enlarged where it takes less than a quarter of the area, as it is with
    images of some 500 pixels, which published recipes are made for.
    """
    return _LARGER * max(preprocess.size)


def shrunk_size(height: int, width: int, side: int) -> tuple[int, int]:
    """(height, width) with a shorter side of at most `side`, in the same ratio."""
    short = min(height, width)
    if short <= side:
        return height, width
    return max(side, round(height * side / short)), max(side, round(width * side / short))


def cached_shapes(split: Split, preprocess: Preprocess, *, whole: bool) -> Shapes | None:
    """(N, 2): height and width of what is stored of each image."""
    sizes = image_sizes(split)
    if sizes is None:
        return None
    if not whole:
        return np.tile(np.array(preprocess.size, dtype=np.int64), (len(sizes), 1))
    side = max_short_side(preprocess)
    return np.array([shrunk_size(height, width, side) for height, width in sizes.tolist()], dtype=np.int64).reshape(
        -1, 2
    )


def cache_size(split: Split, preprocess: Preprocess, *, whole: bool) -> int:
    """What a cache of all images takes on the disk; 0 where there is nothing to decode."""
    shapes = cached_shapes(split, preprocess, whole=whole)
    return 0 if shapes is None else int(shapes.prod(axis=1).sum()) * preprocess.channels


def reader(split: Split, preprocess: Preprocess, limit: int, say: Log, *, whole: bool) -> ReadImage:
    """How a loader reads this split: `whole` images, or the evaluation's crops; up to `limit` bytes are kept."""
    shapes = cached_shapes(split, preprocess, whole=whole)
    assert isinstance(split, Encoded)
    assert shapes is not None
    if whole:
        side = max_short_side(preprocess)
        what = f"whole {side}"

        def make(row: int) -> Pixels:
            return decode_shrunk(split, row, preprocess.channels, side)
    else:
        # All of it: how much is cut away, and what fills the borders, changes the pixels.
        what = f"crop {preprocess.to_dict()}"

        def make(row: int) -> Pixels:
            return preprocess.crop(split.image(row))

    cache = open_cache(what, split.fingerprints(), shapes, preprocess.channels, limit, say)
    return make if cache is None else _through(cache, make)


def _through(cache: PixelCache, make: ReadImage) -> ReadImage:
    def read(row: int) -> Pixels:
        pixels = cache.get(row)
        if pixels is None:
            pixels = make(row)
            cache.put(row, pixels)
        return pixels

    return read


def decode_shrunk(split: Split, row: int, channels: int, side: int) -> Pixels:
    """Image `row`, its shorter side of at most `side` pixels: uint8 H W C, the same whenever it is asked for."""
    from PIL import Image

    from vitrail.images.convert import to_channels

    full: list[tuple[int, int]] = []

    def needed(height: int, width: int) -> tuple[int, int]:
        full.append((height, width))
        return shrunk_size(height, width, side)

    image = to_channels(split.image(row, needed), channels)
    height, width = shrunk_size(*(full[0] if full else (image.height, image.width)), side)
    if image.size != (width, height):
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    return np.asarray(image).reshape(height, width, channels)
