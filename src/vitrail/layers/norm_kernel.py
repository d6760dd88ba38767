"""Layer normalisation as one CUDA kernel in Triton, with an output of another type than the input.

Importing this file needs triton, which PyTorch's builds for CUDA bring.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

_ELEMENTS = 4096  # of a program: 32 for each of its 128 threads


@triton.jit  # type: ignore[untyped-decorator]
def _normalise(x, weight, bias, out, rows, width, eps, ROWS: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """ROWS rows of x, in float32. x, out: `rows` `width`."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    inside = (row < rows)[:, None] & (column < width)[None, :]
    place = row[:, None] * width + column[None, :]
    values = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
    centred = tl.where(inside, values - (tl.sum(values, axis=1) / width)[:, None], 0.0)
    deviation = tl.sqrt(tl.sum(centred * centred, axis=1) / width + eps)
    scale = tl.load(weight + column, mask=column < width, other=0.0).to(tl.float32)
    shift = tl.load(bias + column, mask=column < width, other=0.0).to(tl.float32)
    result = centred / deviation[:, None] * scale[None, :] + shift[None, :]
    tl.store(out + place, result.to(out.dtype.element_ty), mask=inside)


def normalise(x: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """(x - mean) / sqrt(variance + eps) * weight + bias over the last dimension, without a gradient.

    Args:
        x: ... C, of a floating-point type; computed in float32.
        weight, bias: C.
        dtype: of the result.
    """
    x, width = x.contiguous(), x.shape[-1]
    out = torch.empty_like(x, dtype=dtype)
    block = triton.next_power_of_2(width)
    rows, together = x.numel() // width, max(1, _ELEMENTS // block)
    with torch.cuda.device_of(x):
        _normalise[(triton.cdiv(rows, together),)](
            x, weight.contiguous(), bias.contiguous(), out, rows, width, eps, ROWS=together, BLOCK=block
        )
    return out
