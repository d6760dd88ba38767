"""Private PyTorch functions, each with a public fallback for releases that lack it; and queries that changed names.

Shapes: B batch, H heads, N tokens, D width of one head, C channels, Y X height and width of an image.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_CPUINFO = Path("/proc/cpuinfo")
_HAS_FOREACH = all(hasattr(torch, f"_foreach_{name}") for name in ("lerp_", "sub", "mul_", "add_"))
_SOFTMAX_BACKWARD = getattr(torch, "_softmax_backward_data", None)
_RESIZE: dict[str, Any] = {
    mode: getattr(torch.ops.aten, f"_upsample_{mode}2d_aa", None) for mode in ("bilinear", "bicubic")
}

# (q, k, v) B H N D on the CPU -> (softmax(q k^T / sqrt(D)) v, logsumexp of the scores), and the gradients of q, k, v
# from (grad, q, k, v, out, logsumexp, dropout, is_causal). None where missing: use F.scaled_dot_product_attention.
flash_attention_cpu: Any = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None)
flash_attention_cpu_backward: Any = getattr(
    torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu_backward", None
)


def lerp_(averages: list[Tensor], values: list[Tensor], weight: float | Tensor) -> None:
    """averages += weight * (values - averages), in place, with few kernel launches for all tensors together.

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
    """The gradient of a softmax over the last dimension, from `grad` with respect to its `output`, both ... N."""
    if _SOFTMAX_BACKWARD is not None:
        fused: Tensor = _SOFTMAX_BACKWARD(grad, output, -1, output.dtype)
        return fused
    weighted = grad * output
    return weighted - output * weighted.sum(-1, keepdim=True)


def cpu_bf16() -> str | None:
    """The CPU's instruction set for bfloat16 matrix products: "AMX", else "AVX512_BF16", else None."""
    names = {"amx_bf16": "AMX", "avx512_bf16": "AVX512_BF16"}
    return next((name for flag, name in names.items() if _cpu_flags().get(flag)), None)


def cpu_vnni() -> bool:
    """Whether the CPU sums products of 8-bit integers in 32 bits."""
    return any(_cpu_flags().get(flag) for flag in ("avx512_vnni", "avx_vnni", "amx_int8", "dot"))


def _cpu_flags() -> Mapping[str, Any]:
    return torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else _linux_cpu_flags()


def _linux_cpu_flags() -> dict[str, bool]:
    """The CPU features that Linux lists; empty on other systems."""
    lines = _CPUINFO.read_text().splitlines() if _CPUINFO.exists() else []
    return next((dict.fromkeys(line.split(), True) for line in lines if line.startswith("flags")), {})


def resize_into(image: Tensor, mode: str, out: Tensor) -> None:
    """Antialiased resize of 1 C Y X to fill `out`, 1 C Y' X', without a new tensor. mode: bilinear or bicubic."""
    size = list(out.shape[2:])
    if _RESIZE[mode] is not None:
        _RESIZE[mode].out(image, size, False, None, None, out=out)
        return
    out.copy_(F.interpolate(image, size=size, mode=mode, align_corners=False, antialias=True))
