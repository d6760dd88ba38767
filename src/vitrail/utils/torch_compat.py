"""Every private PyTorch function that this package calls, each with a public fallback for releases that lack it.

Shapes: B batch, H heads, N tokens, D width of one head, C channels, Y X height and width of an image.
"""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def _private(owner: Any, name: str) -> Any:
    """The attribute, or None in a PyTorch that does not have it."""
    return getattr(owner, name, None)


_CPUINFO = Path("/proc/cpuinfo")
_HAS_FOREACH = all(hasattr(torch, f"_foreach_{name}") for name in ("lerp_", "sub", "mul_", "add_"))
_SOFTMAX_BACKWARD = _private(torch, "_softmax_backward_data")
_FLASH = _private(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu")
_FLASH_BACKWARD = _private(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu_backward")
_RESIZE = {mode: _private(torch.ops.aten, f"_upsample_{mode}2d_aa") for mode in ("bilinear", "bicubic")}


def lerp_(averages: list[Tensor], values: list[Tensor], weight: float | Tensor) -> None:
    """averages += weight * (values - averages), in place, for all tensors at once where PyTorch can.

    weight: a number, or a tensor of one value on the same device.
    """
    if not _HAS_FOREACH:
        for average, value in zip(averages, values, strict=True):
            average.lerp_(value, weight) if isinstance(weight, float) else average.add_((value - average).mul_(weight))
    elif isinstance(weight, float):
        torch._foreach_lerp_(averages, values, weight)
    else:
        change = torch._foreach_sub(values, averages)
        torch._foreach_mul_(change, weight)
        torch._foreach_add_(averages, change)


def softmax_backward(grad: Tensor, output: Tensor) -> Tensor:
    """The gradient of a softmax over the last dimension: `grad` with respect to its `output`, both ... N."""
    if _SOFTMAX_BACKWARD is not None:
        fused: Tensor = _SOFTMAX_BACKWARD(grad, output, -1, output.dtype)
        return fused
    weighted = grad * output
    return weighted - output * weighted.sum(-1, keepdim=True)


def cpu_bf16() -> str | None:
    """The CPU's instructions for matrix products in bfloat16: "AMX", else "AVX512_BF16", else None."""
    for name, query, flag in (
        ("AMX", "_is_amx_tile_supported", "amx_bf16"),
        ("AVX512_BF16", "_is_avx512_bf16_supported", "avx512_bf16"),
    ):
        asked = _private(torch.cpu, query)
        if asked() if asked is not None else flag in _cpu_flags():
            return name
    return None


def _cpu_flags() -> list[str]:
    """Linux's names of the CPU's instructions; none on other systems."""
    lines = _CPUINFO.read_text().splitlines() if _CPUINFO.exists() else []
    return next((line.split() for line in lines if line.startswith("flags")), [])


def has_flash_attention_cpu() -> bool:
    """Whether `flash_attention_cpu` can be called; if not, use `F.scaled_dot_product_attention`."""
    return _FLASH is not None and _FLASH_BACKWARD is not None


def flash_attention_cpu(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """softmax(q k^T / sqrt(D)) v of B H N D on the CPU, and the logsumexp of the scores, which the backward reads."""
    out, logsumexp = _FLASH(q, k, v)
    return out, logsumexp


def flash_attention_cpu_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, logsumexp: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of `flash_attention_cpu` with respect to q, k and v."""
    dq, dk, dv = _FLASH_BACKWARD(grad, q, k, v, out, logsumexp, 0.0, False)
    return dq, dk, dv


def resize_into(image: Tensor, mode: str, out: Tensor) -> None:
    """Antialiased resize of 1 C Y X to fill `out`, 1 C Y' X', without a new tensor. mode: bilinear or bicubic."""
    size = list(out.shape[2:])
    if _RESIZE[mode] is not None:
        _RESIZE[mode].out(image, size, False, None, None, out=out)
        return
    out.copy_(F.interpolate(image, size=size, mode=mode, align_corners=False, antialias=True))
