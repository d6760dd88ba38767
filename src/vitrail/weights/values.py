"""Which values of a file may become a model's: dense, of the same kind, and finite. The same for every source."""

from collections import Counter
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor


def is_finite(tensor: Tensor) -> bool:
    """Whether no value is NaN or infinite."""
    if not (tensor.is_floating_point() or tensor.is_complex()) or not tensor.numel():
        return True
    if tensor.element_size() < 2:  # float8, which has few operations
        tensor = tensor.float()
    # A sum, which is one pass without a copy, is finite only if all values are. It may overflow.
    return bool(torch.isfinite(tensor.sum())) or bool(torch.isfinite(tensor).all())


def non_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    """Names of the tensors with a value that is NaN or infinite."""
    return [name for name, tensor in tensors.items() if not is_finite(tensor)]


def is_castable(value: Tensor, expected: Tensor) -> bool:
    """Whether `value` is dense, and both are floats, or both integers, or both booleans."""
    if value.layout != torch.strided or value.is_quantized or value.is_meta:
        return False
    return _kind(value) == _kind(expected)


def _kind(tensor: Tensor) -> str:
    if tensor.is_complex() or tensor.dtype == torch.bool:
        return dtype_name(tensor)
    return "float" if tensor.is_floating_point() else "integer"


def dtype_name(tensor: Tensor) -> str:
    """Such as "float16"; with the layout if it is not dense."""
    name = str(tensor.dtype).removeprefix("torch.")
    if tensor.is_meta:
        return f"{name} without values (meta)"
    return name if tensor.layout == torch.strided else f"{name}, {str(tensor.layout).removeprefix('torch.')}"


def describe_casts(casts: Iterable[str]) -> str:
    """Such as "150 cast from float16 to float32"; "" if there are none. casts: one per tensor, "float16 to float32"."""
    return ", ".join(f"{count} cast from {cast}" for cast, count in Counter(casts).items())
