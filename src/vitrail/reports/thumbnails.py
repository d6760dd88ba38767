"""Thumbnails of images as data URIs, for pages that need no other file."""

import base64
import io

from PIL import Image

SIDE = 96  # pixels: longer side at most


def thumbnail(image: Image.Image) -> str:
    """A data URI: PNG at full size for a small image, a reduced JPEG for a large one."""
    if max(image.size) <= SIDE:
        return data_uri(image)
    small = image.copy()
    small.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    return data_uri(small, quality=80)


def data_uri(image: Image.Image, quality: int | None = None) -> str:
    """The image as a JPEG of this quality, 1 to 95, or as a PNG without one."""
    stream = io.BytesIO()
    if quality is None:
        image.save(stream, "PNG", optimize=True)
    else:
        image.save(stream, "JPEG", quality=quality)
    return f"data:image/{'png' if quality is None else 'jpeg'};base64,{base64.b64encode(stream.getvalue()).decode()}"
