"""Thumbnails of images as data URIs, for pages that need no other file."""

import base64
import io

from PIL import Image

SIDE = 96  # pixels: longer side at most


def thumbnail(image: Image.Image) -> str:
    """A data URI: PNG at full size for a small image, a reduced JPEG for a large one."""
    stream = io.BytesIO()
    if max(image.size) <= SIDE:
        image.save(stream, "PNG", optimize=True)
        kind = "png"
    else:
        small = image.copy()
        small.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
        small.save(stream, "JPEG", quality=80)
        kind = "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(stream.getvalue()).decode()}"
