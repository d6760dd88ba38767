"""torch tensors as images. Importing this imports no torch: whoever has a tensor has imported it.

Shapes: B batch, C channels, H W height and width.
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np

from vitrail.errors import DataTypeError
from vitrail.images.convert import Pixels

_ROUNDS_TO_A_BYTE = 0.5 / 255  # by how much a value may be outside 0..1


def is_tensor(value: object) -> bool:
    """Whether a value is a torch.Tensor."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Tensor)


def tensor_pixels(tensor: Any, channels: int | None = None) -> list[Pixels]:
    """The images of a tensor C H W or B C H W, uint8 or float 0..1, each uint8 H W C.

    Floats are rounded to 1/255, which leaves the result of torchvision's ToTensor as it was. channels: of a model;
    images then have as many, or 1, 3 or 4.

    Raises:
        DataTypeError: another shape, type or range of values.
    """
    shape, kind = tuple(tensor.shape), str(tensor.dtype).removeprefix("torch.")
    want = "give C H W or B C H W, uint8, or float with values from 0 to 1"
    if tensor.ndim not in (3, 4) or 0 in shape or not (kind == "uint8" or tensor.is_floating_point()):
        raise DataTypeError(f"a tensor of {kind} {shape} is not an image: {want}")
    if shape[-3] not in (1, 3, 4, channels):
        hint = ", as tensor.movedim(-1, -3) has" if shape[-1] in (1, 3, 4, channels) else ""
        raise DataTypeError(f"a tensor of {kind} {shape} has {shape[-3]} channels: {want}, channels first{hint}")
    tensor = tensor.detach().cpu()
    if tensor.is_floating_point():
        tensor = tensor.float()
        low, high = float(tensor.min()), float(tensor.max())
        if not (low >= -_ROUNDS_TO_A_BYTE and high <= 1 + _ROUNDS_TO_A_BYTE):
            raise DataTypeError(
                f"a tensor with values from {low:.3g} to {high:.3g} is not an image: {want}, not normalised "
                "(the classifier normalises)"
            )
        tensor = (tensor * 255).round().clamp(0, 255)
    images = tensor.reshape(-1, *shape[-3:]).movedim(1, 3).numpy().astype(np.uint8)
    return [np.ascontiguousarray(image) for image in images]
