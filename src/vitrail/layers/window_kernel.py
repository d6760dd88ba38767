"""Attention in windows as one CUDA kernel in Triton: shift, partition, attention and their reverse, without a copy of
the tokens in the order of the windows and without the scores in memory.

The kernel computes what `WindowAttention` computes between its linear layers, for inference. Importing this file needs
triton, which PyTorch's builds for CUDA bring.

Shapes: B batch, H W height and width of the feature map in tokens, C width, A heads, D = C / A width of one head, M
windows of an image, n tokens of a window.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit  # type: ignore[untyped-decorator]
def _attend(  # type: ignore[no-untyped-def]
    qkv, bias, gather, inverse, out, scale, tokens, heads, n, bias_windows,
    BLOCK: tl.constexpr, D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One head of one window. qkv: B (H W) 3 A D; bias: `bias_windows` A n n; out: B (H W) A D."""
    window, head, image = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    at, d = tl.arange(0, BLOCK), tl.arange(0, D)
    inside = at < n
    place = window * n + at
    token = tl.load(gather + place, mask=inside, other=0)
    real = inside & (tl.load(inverse + token, mask=inside, other=-1) == place)  # no padding
    row = image.to(tl.int64) * tokens + token
    width = heads * D
    source = qkv + row[:, None] * (3 * width) + head * D + d[None, :]
    q = tl.load(source, mask=real[:, None], other=0.0)
    k = tl.load(source + width, mask=real[:, None], other=0.0)
    v = tl.load(source + 2 * width, mask=real[:, None], other=0.0)
    added = bias + ((window % bias_windows) * heads + head) * n * n + at[:, None] * n + at[None, :]
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
    scores += tl.load(added, mask=inside[:, None] & inside[None, :], other=0.0)
    scores = tl.where(inside[None, :], scores, float("-inf"))
    weights = tl.exp(scores - tl.max(scores, axis=1)[:, None])
    weights /= tl.sum(weights, axis=1)[:, None]
    read = tl.dot(weights.to(v.dtype), v, input_precision=PRECISION)
    target = out + row[:, None] * width + head * D + d[None, :]
    tl.store(target, read.to(out.dtype.element_ty), mask=real[:, None])


def attend_in_windows(qkv: Tensor, bias: Tensor, gather: Tensor, inverse: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(D) + bias) v within the windows of a feature map, without a gradient.

    Args:
        qkv: B H W 3C, of all tokens in the order of the feature map; float32, float16 or bfloat16. D is a power of 2,
            at least 16.
        bias: relative position bias and mask, M A n n, or 1 A n n without mask.
        gather, inverse: those of `Windows`, on the device of qkv.

    Returns:
        B H W C. Products of float32 are exact unless `torch.backends.cuda.matmul` allows TF32; those of
        narrower types are summed in float32.
    """
    batch, heads, n = len(qkv), bias.shape[1], bias.shape[-1]
    qkv, bias = qkv.contiguous(), bias.float().contiguous()
    out = qkv.new_empty(*qkv.shape[:-1], qkv.shape[-1] // 3)
    width = out.shape[-1] // heads
    tf32 = qkv.dtype is torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    with torch.cuda.device_of(qkv):
        _attend[(len(gather) // n, heads, batch)](
            qkv, bias, gather, inverse, out, 1 / math.sqrt(width), len(inverse), heads, n, len(bias),
            BLOCK=max(16, triton.next_power_of_2(n)), D=width, PRECISION="tf32" if tf32 else "ieee",
        )  # fmt: skip
    return out
