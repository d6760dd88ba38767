"""Attention inside windows, with relative position bias and shifted windows.

Liu et al., "Swin Transformer: Hierarchical Vision Transformer using Shifted Windows", 2021
(https://arxiv.org/abs/2103.14030), section 3.2.

Shapes: B batch, H W height and width of the feature map in tokens, C width, Wh Ww height and width of a window,
n = Wh Ww tokens of a window, M windows of an image, A heads, D = C / A width of one head.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vitrail.layers.attention import MultiHeadAttention, attend, attention_weights, merge_heads
from vitrail.layers.kernels import autocast_dtype, checked_kernel, on_cuda
from vitrail.utils.torch_compat import softmax_backward

Pair = tuple[int, int]
# From qkv B H W 3C, bias M A n n or 1 A n n, and `gather` and `inverse` of Windows to B H W C (window_kernel.py).
Kernel = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
_KERNEL_WINDOW = 64  # tokens at most, so that the scores of a window stay in registers
_KERNEL_BATCH = 65_535  # images at most, in CUDA's grid
_KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_KERNEL_WIDTHS = (16, 32, 64)  # of a head, that a matrix product of the kernel takes


def relative_position_index(window: Pair) -> Tensor:
    """n n: for each pair of tokens of a window, its row in the bias table of (2 Wh - 1)(2 Ww - 1) rows."""
    rows = torch.arange(window[0])[:, None] - torch.arange(window[0]) + window[0] - 1  # Wh Wh
    columns = torch.arange(window[1])[:, None] - torch.arange(window[1]) + window[1] - 1  # Ww Ww
    index = rows[:, None, :, None] * (2 * window[1] - 1) + columns[None, :, None, :]  # Wh Ww Wh Ww
    return index.flatten(2).flatten(0, 1)


@dataclass(frozen=True)
class Windows:
    """The partition of a feature map into windows: it is padded at the bottom and right to whole windows, then rolled
    by `shift` to the top and left, then partitioned."""

    size: Pair  # H, W before padding
    window: Pair
    shift: Pair
    gather: Tensor  # (M n): index of the token, in H W, at each position of each window; 0 at padding
    inverse: Tensor  # (H W): position of each token in (M n), the inverse of `gather`
    mask: Tensor | None  # M n n: -inf for pairs that may not attend to each other, else 0; None without such pairs

    @property
    def padded(self) -> bool:
        return len(self.gather) != len(self.inverse)

    def partition(self, x: Tensor) -> Tensor:
        """B H W C -> (B M) n C. Values at padding are arbitrary, since no token attends to them."""
        tokens = _reorder(x.flatten(1, 2), self.gather, None if self.padded else self.inverse)
        return tokens.reshape(-1, self.window[0] * self.window[1], x.shape[-1])

    def reverse(self, windows: Tensor, batch: int) -> Tensor:
        """(B M) n C -> B H W C, the inverse of `partition`, without the padding."""
        tokens = windows.reshape(batch, -1, windows.shape[-1])  # B (M n) C
        tokens = _reorder(tokens, self.inverse, None if self.padded else self.gather)
        return tokens.reshape(batch, *self.size, windows.shape[-1])


class _Permute(torch.autograd.Function):
    """`index_select` of tokens by a permutation. The gradient is the inverse permutation, which is much faster than
    autograd's `index_add` for arbitrary indices."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(index, inverse)
        return x.index_select(1, index)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        index, inverse = ctx.saved_tensors
        return _Permute.apply(grad, inverse, index), None, None  # type: ignore[no-untyped-call]


def _reorder(x: Tensor, index: Tensor, inverse: Tensor | None) -> Tensor:
    """Tokens B N C in the order `index`; inverse: the inverse permutation, or None if `index` is not a permutation."""
    if inverse is None or not x.requires_grad:
        return x.index_select(1, index)
    permuted: Tensor = _Permute.apply(x, index, inverse)  # type: ignore[no-untyped-call]
    return permuted


_plans: dict[tuple[Pair, Pair, bool, torch.device], Windows] = {}


def plan_windows(size: Pair, window: Pair, shifted: bool, device: torch.device) -> Windows:
    """The windows of a feature map of `size`, cached by size and device.

    Along a side not longer than the window, the window has that length and there is no shift. `shifted`: by half a
    window along the other sides.
    """
    key = (size, window, shifted, device)
    plan = _plans.get(key)
    if plan is None:
        with torch.inference_mode(False):  # a cached plan may be used in training later
            plan = _plan_windows(size, window, shifted, device)
        if type(plan.gather) is Tensor:  # not a tracer's fake tensor
            if len(_plans) >= 256:  # bounds the memory when image sizes vary
                _plans.clear()
            _plans[key] = plan
    return plan


def cached_plans() -> list[Windows]:
    """Those that `plan_windows` keeps now: to keep their tensors in memory where a CUDA graph reads them."""
    return list(_plans.values())


def _plan_windows(size: Pair, window: Pair, shifted: bool, device: torch.device) -> Windows:
    """Computed in NumPy, so that the values are real under a tracer or on the meta device too."""
    shift = tuple(w // 2 if shifted and s > w else 0 for s, w in zip(size, window, strict=True))
    window = (min(size[0], window[0]), min(size[1], window[1]))
    rows, row_regions = _roll_axis(size[0], window[0], shift[0])
    columns, column_regions = _roll_axis(size[1], window[1], shift[1])
    is_token = (rows < size[0])[:, None] & (columns < size[1])
    tokens = np.where(is_token, rows[:, None] * size[1] + columns, -1)
    regions = np.where(is_token, row_regions[:, None] * 2 + column_regions, -1)

    def partition(grid: np.ndarray) -> np.ndarray:
        grid = grid.reshape(len(rows) // window[0], window[0], len(columns) // window[1], window[1])
        return grid.swapaxes(1, 2).reshape(-1, window[0] * window[1])  # M n

    gather, regions = partition(tokens).ravel(), partition(regions)
    inverse = np.empty(size[0] * size[1], dtype=np.int64)
    inverse[gather[gather >= 0]] = np.flatnonzero(gather >= 0)
    masked = regions[:, :, None] != regions[:, None, :]
    mask = np.where(masked, np.float32("-inf"), np.float32(0)) if masked.any() else None
    return Windows(
        size=size,
        window=window,
        shift=(shift[0], shift[1]),
        gather=torch.as_tensor(gather.clip(min=0), device=device),
        inverse=torch.as_tensor(inverse, device=device),
        mask=None if mask is None else torch.as_tensor(mask, device=device),
    )


def _roll_axis(size: int, window: int, shift: int) -> tuple[np.ndarray, np.ndarray]:
    """Pad and roll one axis: the original position of each entry, and 1 where it was rolled over the edge."""
    length = -(-size // window) * window
    positions = np.arange(length, dtype=np.int64) + shift
    return positions % length, (positions >= length).astype(np.int64)


class _AttendWithBias(torch.autograd.Function):
    """softmax(q k^T / sqrt(D) + bias) v with a gradient for the bias, on the CPU.

    `scaled_dot_product_attention` has no fused CPU kernel for a bias that needs a gradient, and allocates the scores
    again for every operation. Here operations are in place.
    """

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, bias: Tensor) -> Tensor:
        """qkv (B M) n 3C and bias 1 A n n or M A n n -> (B M) n C."""
        _, heads, n, _ = bias.shape
        q, k, v = qkv.view(len(qkv), n, 3, heads, -1).permute(2, 0, 3, 1, 4).flatten(1, 2).unbind(0)  # (B M A) n D
        scores = torch.bmm(q, k.transpose(1, 2)).mul_(q.shape[-1] ** -0.5)
        scores.view(-1, *bias.shape).add_(bias)
        weights = torch.softmax(scores, dim=-1, out=scores)
        ctx.save_for_backward(q, k, v, weights)
        ctx.bias_shape = bias.shape
        return merge_heads(torch.bmm(weights, v).view(len(qkv), heads, n, -1))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        q, k, v, weights = ctx.saved_tensors
        _, heads, n, _ = ctx.bias_shape
        windows = len(grad)
        grad = grad.reshape(windows, n, heads, -1).transpose(1, 2).flatten(0, 1)  # (B M A) n D
        dscores = torch.bmm(grad, v.transpose(1, 2))
        dscores = softmax_backward(dscores, weights)
        dbias = dscores.view(-1, *ctx.bias_shape).sum(0)
        scale = q.shape[-1] ** -0.5
        dq = torch.bmm(dscores, k).mul_(scale)
        dk = torch.bmm(dscores.transpose(1, 2), q).mul_(scale)
        dv = torch.bmm(weights.transpose(1, 2), grad)
        dqkv = torch.stack([d.view(windows, heads, n, -1).transpose(1, 2) for d in (dq, dk, dv)], dim=2)
        return dqkv.flatten(2), dbias


class WindowAttention(MultiHeadAttention):
    """Multi-head self-attention in windows (B M) n C, with a learnable bias per head and relative position added to the
    scores."""

    relative_position_index: Tensor

    def __init__(
        self,
        dim: int,
        num_heads: int,
        window: Pair,
        qkv_bias: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
    ) -> None:
        super().__init__(dim, num_heads, qkv_bias, attn_drop, proj_drop)
        self.window = window
        self.relative_position_bias_table = nn.Parameter(
            torch.zeros((2 * window[0] - 1) * (2 * window[1] - 1), num_heads)
        )
        self.register_buffer("relative_position_index", relative_position_index(window), persistent=False)
        nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02, a=-0.04, b=0.04)

    def bias(self, windows: Windows) -> Tensor:
        """Relative position bias and mask: M A n n, or 1 A n n without mask."""
        height, width = windows.window
        index = self.relative_position_index
        if windows.window != self.window:  # use the corner of the index of a full window
            index = index.view(*self.window, *self.window)[:height, :width, :height, :width]
        bias = self.relative_position_bias_table[index.flatten()]  # (n n) A
        bias = bias.t().reshape(1, self.num_heads, height * width, height * width)
        return bias if windows.mask is None else bias + windows.mask.to(bias.dtype)[:, None]

    def forward(self, x: Tensor, windows: Windows) -> Tensor:
        """B H W C -> B H W C; windows: the partition of such a feature map."""
        kernel = self._kernel(x, windows)
        if kernel is not None:
            return self.proj(kernel(self.qkv(x), self.bias(windows), windows.gather, windows.inverse))  # type: ignore[no-any-return]
        qkv, bias = self.qkv(windows.partition(x)), self.bias(windows)
        dropout = self.attn_drop if self.training else 0.0
        if bias.requires_grad and not dropout and x.is_cpu:
            out: Tensor = _AttendWithBias.apply(qkv, bias.to(qkv.dtype))  # type: ignore[no-untyped-call]
        else:
            q, k, v = self.split_heads(qkv)
            bias = bias.to(q.dtype)
            if len(bias) > 1:
                bias = bias.repeat(len(q) // len(bias), 1, 1, 1)  # (B M) A n n
            out = merge_heads(attend(q, k, v, bias, dropout))
        return windows.reverse(self.proj_drop(self.proj(out)), len(x))

    def _kernel(self, x: Tensor, windows: Windows) -> Kernel | None:
        """The Triton kernel where it can compute this: on CUDA, in evaluation mode, without gradients."""
        width = x.shape[-1] // self.num_heads
        if self.training or torch.is_grad_enabled() or not on_cuda(x) or len(x) > _KERNEL_BATCH:
            return None
        if windows.window[0] * windows.window[1] > _KERNEL_WINDOW or width not in _KERNEL_WIDTHS:
            return None
        dtype = autocast_dtype(x)
        return window_kernel(x.device, dtype, width) if dtype in _KERNEL_DTYPES else None

    def forward_with_weights(self, x: Tensor, windows: Windows) -> tuple[Tensor, Tensor]:
        """`forward` without dropout: the output (B M) n C and the attention weights (B M) A n n."""
        bias = self.bias(windows)
        return self.attend_with_weights(x, bias.repeat(len(x) // len(bias), 1, 1, 1))


@cache
def window_kernel(device: torch.device, dtype: torch.dtype, width: int) -> Kernel | None:
    """The Triton kernel if it works on this device, for heads of this width; else attention is computed by PyTorch."""
    what = f"window attention on {device} in {dtype}"
    kernel: Kernel | None = checked_kernel(
        what, "window_kernel", "attend_in_windows", lambda kernel: kernel_error(kernel, device, dtype, width)
    )
    return kernel


@torch.no_grad()
def kernel_error(kernel: Kernel, device: torch.device, dtype: torch.dtype, width: int) -> float:
    """The largest difference to the explicit path in float32, in windows of 7x7 with padding and a shift. Values are
    between -1 and 1. width: of each of two heads."""
    windows, heads = plan_windows((9, 16), (7, 7), True, device), 2
    values = torch.arange(9 * 16 * 3 * heads * width, device=device).sin()  # no random state is changed
    qkv = values.view(1, 9, 16, -1)
    mask = windows.mask if windows.mask is not None else torch.zeros(1, 49, 49, device=device)
    bias = mask[:, None] + values[: heads * 49 * 49].view(1, heads, 49, 49)  # M A n n
    with torch.autocast(device.type, enabled=False):
        q, k, v = windows.partition(qkv).unflatten(-1, (3, heads, width)).permute(2, 0, 3, 1, 4)
        expected = windows.reverse(merge_heads(attention_weights(q, k, bias) @ v), 1)
        found = kernel(qkv.to(dtype), bias, windows.gather, windows.inverse)
    return float((found - expected).abs().max())
