"""Whether a kernel in Triton may be used: on CUDA, and after it was compared with PyTorch's own path on the device."""

import importlib
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vitrail.utils.text import one_line

TOLERANCE = 0.05  # in any precision, TF32 and bfloat16 too, for values near 1; an error of the order is near 1


def on_cuda(x: Tensor) -> bool:
    """Whether a kernel can read x: not while it is traced or compiled."""
    traced = torch.compiler.is_compiling() or torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
    return x.is_cuda and type(x) is Tensor and not traced


def autocast_dtype(x: Tensor) -> torch.dtype:
    """The type in which linear layers compute with x: autocast's where it is on, else that of x."""
    autocast = x.dtype is not torch.float64 and torch.is_autocast_enabled(x.device.type)
    return torch.get_autocast_dtype(x.device.type) if autocast else x.dtype


def checked_kernel(what: str, module: str, name: str, error: Callable[[Any], float]) -> Any:
    """The function `name` of vitrail.layers.`module`, or None if it cannot be used.

    error: the largest difference to PyTorch's path, of values near 1; the kernel is compiled there. If that fails, for
    want of a C compiler for example, a warning says so. what: for that warning.
    """
    try:
        kernel = getattr(importlib.import_module(f"vitrail.layers.{module}"), name)
    except ImportError:  # no triton: PyTorch's builds for CUDA bring it
        return None
    try:
        found = error(kernel)
        reason = None if found < TOLERANCE else f"it is wrong by {found:.2g}"
    except Exception as failure:  # of a compiler or a driver: no common class
        reason = one_line(failure)
    if reason is None:
        return kernel
    warnings.warn(f"the Triton kernel for {what} is not used: {reason}", stacklevel=3)
    return None
