"""Conversion of any Pillow image to RGB or grey, with its EXIF orientation applied.

Pillow's `convert("RGB")` drops alpha (transparent pixels take a hidden colour), clips 16-bit grey to white and ignores
orientation. Decoding and preprocessing both use this module instead.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from PIL import Image

Pixels = npt.NDArray[np.uint8]

_ORIENTATION = 0x0112  # the EXIF tag
_STRIP = 1 << 20  # pixels that are converted at a time where a conversion takes much memory
_lock = threading.Lock()
_users = 0


class BadImage(Exception):
    """An image that cannot be used. `reason` is one line."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


@contextmanager
def quiet_pillow() -> Iterator[None]:
    """Silence the warnings of Pillow's modules while any thread is inside.

    `warnings.catch_warnings` is not thread-safe: it restores the filters that it saw on entry. Here the first thread to
    enter adds one filter and the last one to leave removes it.
    """
    global _users
    with _lock:
        _users += 1
        if _users == 1:
            warnings.filterwarnings("ignore", module=r"PIL\.")
    try:
        yield
    finally:
        with _lock:
            _users -= 1
            if _users == 0:
                _remove_filter()


def _remove_filter() -> None:
    for number, entry in enumerate(warnings.filters):
        if entry[0] == "ignore" and getattr(entry[3], "pattern", entry[3]) == r"PIL\.":
            # warnings has no function that removes a filter; typeshed calls the list a Sequence.
            del warnings.filters[number]  # type: ignore[attr-defined]
            return


def orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 to 8; 1 if there is none or it is damaged."""
    try:
        value = image.getexif().get(_ORIENTATION, 1)
    except Exception:  # damaged EXIF raises nearly any exception
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def _upright(image: Image.Image) -> Image.Image:
    """Apply the EXIF orientation."""
    from PIL import Image

    method = Image.Transpose
    transpose = {
        2: method.FLIP_LEFT_RIGHT,
        3: method.ROTATE_180,
        4: method.FLIP_TOP_BOTTOM,
        5: method.TRANSPOSE,
        6: method.ROTATE_270,
        7: method.TRANSVERSE,
        8: method.ROTATE_90,
    }.get(orientation(image))
    if transpose is None:
        return image
    image = image.transpose(transpose)
    image.info.clear()  # else its EXIF would be applied again
    return image


def to_channels(image: Image.Image, channels: int = 3) -> Image.Image:
    """Convert an image of any mode to upright "RGB" (channels=3) or "L" (channels=1).

    Alpha is composited on white. 16-bit grey and floats in 0..1 are scaled to 0..255; floats in 0..255 are kept.

    Raises:
        BadImage: integers beyond 16 bits or floats in another range, whose scale is unknown.
    """
    if channels not in (1, 3):
        raise ValueError(f"an image has 1 or 3 channels, not {channels}")
    with quiet_pillow():
        image.load()
        image = _upright(image)
        if image.mode.startswith("I") or image.mode == "F":
            image = _to_8_bits(image)
        elif image.has_transparency_data:
            image = _on_white(image)
        mode = "RGB" if channels == 3 else "L"
        if image.mode == mode:
            return image
        if image.mode not in ("RGB", "L") and channels == 1:
            image = image.convert("RGB")  # LAB, HSV and CMYK do not convert to grey directly
        image = image.convert(mode)
    image.info.clear()
    return image


def _on_white(image: Image.Image) -> Image.Image:
    """Composited on white, in strips: converting all of a large image at once would take five times its memory."""
    from PIL import Image

    result = Image.new("RGB", image.size, "white")
    for top, strip in _strips(image):
        try:
            rgba = strip.convert("RGBA")
        except (ValueError, TypeError, OverflowError):
            # The transparent colour is out of range for the mode (16 bits in an 8-bit image), so no pixel has it.
            image.info.pop("transparency", None)
            return image.convert("RGB")
        white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        result.paste(Image.alpha_composite(white, rgba).convert("RGB"), (0, top))
    return result


def _strips(image: Image.Image) -> Iterator[tuple[int, Image.Image]]:
    """Horizontal strips of an image, each with the row where it begins."""
    rows = max(1, _STRIP // image.width)
    for top in range(0, image.height, rows):
        yield top, image.crop((0, top, image.width, min(image.height, top + rows)))


def _to_8_bits(image: Image.Image) -> Image.Image:
    from PIL import Image

    ranges = [(float(v.min()), float(v.max())) for v in (np.asarray(strip) for _, strip in _strips(image))]
    low, high = min(low for low, _ in ranges), max(high for _, high in ranges)
    if not all(np.isfinite(ends).all() for ends in ranges):
        raise BadImage("contains NaN or infinite values")
    if image.mode == "F":
        if low < 0 or high > 255:
            raise BadImage(f"contains floats from {low:g} to {high:g}; save it with 8 or 16 bits, or scaled to 0..1")
        scale: np.floating[Any] = np.float32(255.0 if high <= 1 else 1.0)
    elif low < 0 or high > 65535:
        raise BadImage(f"contains integers from {low:g} to {high:g}; save it with 8 or 16 bits")
    else:
        scale = np.float64(1 / 257)  # 65535 / 255
    result = Image.new("L", image.size)
    for top, strip in _strips(image):
        result.paste(Image.fromarray(np.rint(np.asarray(strip) * scale).astype(np.uint8)), (0, top))
    return result
