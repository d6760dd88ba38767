"""Crop and resize of an array into a slot of a batch.

torch's antialiased resize of uint8 is Pillow's algorithm (fixed-point weights, rounded to bytes between the two passes)
in vector instructions, several times faster. Bilinear differs from Pillow by at most 1 of 255; bicubic as well, except
for a few of 10,000 values.

Shapes: H W height and width, C channels.
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
    # Copied by numpy: torch would start its thread pool, and refuses read-only arrays. Into a buffer that is reused:
    # page faults of new memory take longer than the copy.
    part = _input_buffer(height * width * pixels.shape[2]).reshape(height, width, -1)
    np.copyto(part, pixels[top : top + height, left : left + width])
    if interpolation not in ("bilinear", "bicubic"):
        out.numpy()[:] = _pillow_resize(part, tuple(out.shape[1:]), interpolation).transpose(2, 0, 1)
        return
    # channels_last is the kernel's fast path; numpy then copies it to planes.
    resized = _output_buffer(out.shape)
    resize_into(torch.from_numpy(part).permute(2, 0, 1)[None], interpolation, resized)
    np.copyto(out.numpy(), resized[0].numpy())


_buffers = threading.local()


def _output_buffer(shape: torch.Size) -> torch.Tensor:
    """1 C H W in channels_last; reused by every call of a thread."""
    found: torch.Tensor | None = getattr(_buffers, "tensor", None)
    if found is None or found.shape[1:] != shape:
        found = torch.empty(1, *shape, dtype=torch.uint8).contiguous(memory_format=torch.channels_last)
        _buffers.tensor = found
    return found


def _input_buffer(size: int) -> npt.NDArray[np.uint8]:
    """`size` bytes of an array that grows as needed; reused by every call of a thread."""
    found: npt.NDArray[np.uint8] | None = getattr(_buffers, "bytes", None)
    if found is None or len(found) < size:
        _buffers.bytes = found = np.empty(size, dtype=np.uint8)
    return found[:size]


def _pillow_resize(part: Pixels, size: tuple[int, ...], interpolation: str) -> Pixels:
    from PIL import Image

    height, width = size
    image = Image.fromarray(part[..., 0] if part.shape[2] == 1 else part)
    image = image.resize((width, height), Image.Resampling[interpolation.upper()])
    return np.asarray(image).reshape(height, width, part.shape[2])
