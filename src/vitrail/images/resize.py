"""Resizing a part of an array straight into a place of a batch.

torch's antialiased resize of uint8 is Pillow's algorithm (a filter as wide as the reduction asks for, weights in fixed
point, rounded to bytes between the two passes) in vector instructions, several times faster. Bilinear differs from
Pillow by at most 1 of 255, bicubic too in all but some ten-thousandths of the values.
"""

from __future__ import annotations

import threading

import numpy as np
import numpy.typing as npt
import torch

from vitrail.images.convert import Pixels
from vitrail.utils.torch_compat import resize_into


def resize_part(pixels: Pixels, box: tuple[int, int, int, int], interpolation: str, out: torch.Tensor) -> None:
    """Resize the part `box` (top, left, height, width) of uint8 H W C `pixels` to fill `out`, uint8 C H W."""
    top, left, height, width = box
    # A copy by numpy: torch's own wakes its thread pool, and takes no read-only array. Into memory that is there
    # already: fresh pages would take longer than the copy.
    part = _room(height * width * pixels.shape[2]).reshape(height, width, -1)
    np.copyto(part, pixels[top : top + height, left : left + width])
    if interpolation not in ("bilinear", "bicubic"):
        out.numpy()[:] = _by_pillow(part, tuple(out.shape[1:]), interpolation).transpose(2, 0, 1)
        return
    # Pixel by pixel is what the kernel reads and writes fastest; numpy then sorts the colours into planes.
    resized = _scratch(out.shape)
    resize_into(torch.from_numpy(part).permute(2, 0, 1)[None], interpolation, resized)
    np.copyto(out.numpy(), resized[0].numpy())


_own = threading.local()


def _scratch(shape: torch.Size) -> torch.Tensor:
    """1 C H W, the colours of a pixel side by side; the same tensor for every call of a thread."""
    found: torch.Tensor | None = getattr(_own, "tensor", None)
    if found is None or found.shape[1:] != shape:
        found = torch.empty(1, *shape, dtype=torch.uint8).contiguous(memory_format=torch.channels_last)
        _own.tensor = found
    return found


def _room(size: int) -> npt.NDArray[np.uint8]:
    """So many bytes, of an array that grows and serves every call of a thread."""
    found: npt.NDArray[np.uint8] | None = getattr(_own, "bytes", None)
    if found is None or len(found) < size:
        _own.bytes = found = np.empty(size, dtype=np.uint8)
    return found[:size]


def _by_pillow(part: Pixels, size: tuple[int, ...], interpolation: str) -> Pixels:
    from PIL import Image

    height, width = size
    image = Image.fromarray(part[..., 0] if part.shape[2] == 1 else part)
    image = image.resize((width, height), Image.Resampling[interpolation.upper()])
    return np.asarray(image).reshape(height, width, part.shape[2])
