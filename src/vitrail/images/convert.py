"""Any Pillow image, made upright and turned into plain RGB or grey.

Pillow's own `convert("RGB")` drops alpha (what was transparent takes a hidden colour), clips 16-bit greys to white
and knows nothing of orientation. This is the one place where that is put right; decoding and preprocessing both go
through it.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from PIL import Image

Pixels = npt.NDArray[np.uint8]

_ORIENTATION = 0x0112  # the EXIF tag
_lock = threading.Lock()
_users = 0


class BadImage(Exception):
    """An image that cannot be used. `reason` says why, in one line."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


@contextmanager
def quiet_pillow() -> Iterator[None]:
    """Silence the warnings of Pillow's modules while any thread is inside.

    `warnings.catch_warnings` swaps the filters of the whole process, so threads that leave it in another order than
    they entered restore the wrong ones. Here the first to enter adds one filter and the last to leave takes it away.
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
                _drop_filter()


def _drop_filter() -> None:
    for number, entry in enumerate(warnings.filters):
        if entry[0] == "ignore" and getattr(entry[3], "pattern", entry[3]) == r"PIL\.":
            # The list is documented only as mutable through functions that cannot remove; deleting is what
            # catch_warnings amounts to. (typeshed calls it a Sequence.)
            del warnings.filters[number]  # type: ignore[attr-defined]
            return


def orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 to 8; 1 where there is none or it is damaged."""
    try:
        value = image.getexif().get(_ORIENTATION, 1)
    except Exception:  # damaged EXIF raises nearly anything, and an image without orientation is still an image
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def upright(image: Image.Image) -> Image.Image:
    """Turn the image as its EXIF orientation says."""
    from PIL import Image

    turn = Image.Transpose
    how = {
        2: turn.FLIP_LEFT_RIGHT,
        3: turn.ROTATE_180,
        4: turn.FLIP_TOP_BOTTOM,
        5: turn.TRANSPOSE,
        6: turn.ROTATE_270,
        7: turn.TRANSVERSE,
        8: turn.ROTATE_90,
    }.get(orientation(image))
    if how is None:
        return image
    turned = image.transpose(how)
    turned.info.clear()  # else the EXIF that came along would turn it a second time
    return turned


def to_channels(image: Image.Image, channels: int = 3) -> Image.Image:
    """Upright "RGB" (channels=3) or "L" (channels=1), whatever the mode was.

    Alpha lies on white. 16-bit greys are scaled, not clipped; so are floats in 0..1 (floats in 0..255 are kept). Raises
    BadImage for integers beyond 16 bits and for floats in any other range, because their scale is unknown.
    """
    if channels not in (1, 3):
        raise ValueError(f"an image has 1 or 3 channels, not {channels}")
    with quiet_pillow():
        image.load()
        image = upright(image)
        if image.mode.startswith("I") or image.mode == "F":
            image = _to_8_bits(image)
        elif image.has_transparency_data:
            image = _on_white(image)
        mode = "RGB" if channels == 3 else "L"
        if image.mode == mode:
            return image
        if image.mode not in ("RGB", "L") and channels == 1:
            image = image.convert("RGB")  # LAB, HSV and CMYK have no direct way to grey
        image = image.convert(mode)
    image.info.clear()
    return image


def _on_white(image: Image.Image) -> Image.Image:
    from PIL import Image

    try:
        rgba = image.convert("RGBA")
    except (ValueError, TypeError, OverflowError):
        # A transparent colour that is no colour of this mode (a 16-bit value on an 8-bit image) marks no pixel.
        image.info.pop("transparency", None)
        return image.convert("RGB")
    white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
    return Image.alpha_composite(white, rgba).convert("RGB")


def _to_8_bits(image: Image.Image) -> Image.Image:
    from PIL import Image

    values = np.asarray(image)
    low, high = float(values.min()), float(values.max())
    if not (np.isfinite(low) and np.isfinite(high)):
        raise BadImage("holds values that are not numbers")
    if image.mode == "F":
        if low < 0 or high > 255:
            raise BadImage(f"holds floats from {low:g} to {high:g}; save it with 8 or 16 bits, or scaled to 0..1")
        scaled = values * 255.0 if high <= 1 else values
    else:
        if low < 0 or high > 65535:
            raise BadImage(f"holds integers from {low:g} to {high:g}; save it with 8 or 16 bits")
        scaled = values.astype(np.float64) / 257.0  # 65535 / 255
    return Image.fromarray(np.rint(scaled).astype(np.uint8))
