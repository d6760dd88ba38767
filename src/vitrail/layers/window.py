"""Attention inside windows, with relative position bias and shifted windows.

Liu et al., "Swin Transformer: Hierarchical Vision Transformer using Shifted Windows", 2021
(https://arxiv.org/abs/2103.14030), section 3.2.

Shapes: B batch, H W height and width of the feature map in tokens, C width, Wh Ww height and width of a window,
n = Wh Ww tokens of a window, M windows of an image, A heads, D = C / A width of one head.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vitrail.layers.attention import attend, attention_weights, merge_heads
from vitrail.utils.torch_compat import softmax_backward

Pair = tuple[int, int]


def relative_position_index(window: Pair) -> Tensor:
    """n n: for each pair of a window's tokens, the row of the bias table, which has (2 Wh - 1)(2 Ww - 1) rows."""
    rows = torch.arange(window[0])[:, None] - torch.arange(window[0]) + window[0] - 1  # Wh Wh
    columns = torch.arange(window[1])[:, None] - torch.arange(window[1]) + window[1] - 1  # Ww Ww
    index = rows[:, None, :, None] * (2 * window[1] - 1) + columns[None, :, None, :]  # Wh Ww Wh Ww
    return index.flatten(2).flatten(0, 1)


@dataclass(frozen=True)
class Windows:
    """How a feature map of one size is cut into windows: the map is padded at the bottom and the right to whole
    windows, then rolled by `shift` rows and columns to the top and the left, then partitioned."""

    size: Pair  # H, W before padding
    window: Pair
    shift: Pair
    slots: Tensor  # (M n): which token (row by row) stands at each place of each window; at padding, token 0
    places: Tensor  # (H W): where each token stands, the inverse of `slots`
    mask: Tensor | None  # M n n: 0 or -inf where a pair is forbidden; None where every pair is allowed

    @property
    def padded(self) -> bool:
        return len(self.slots) != len(self.places)

    def cut(self, x: Tensor) -> Tensor:
        """B H W C -> (B M) n C. What stands at padding is arbitrary: no token attends to it."""
        tokens = _take(x.flatten(1, 2), self.slots, None if self.padded else self.places)
        return tokens.reshape(-1, self.window[0] * self.window[1], x.shape[-1])

    def join(self, windows: Tensor, batch: int) -> Tensor:
        """(B M) n C -> B H W C, the inverse of `cut`; padding is left out."""
        tokens = windows.reshape(batch, -1, windows.shape[-1])
        tokens = _take(tokens, self.places, None if self.padded else self.slots)
        return tokens.reshape(batch, *self.size, windows.shape[-1])


class _Permute(torch.autograd.Function):
    """`index_select` of tokens by a permutation. Its gradient is the inverse permutation, which is far cheaper than
    the sum over equal indices that autograd would do without that knowledge."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(index, inverse)
        return x.index_select(1, index)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        index, inverse = ctx.saved_tensors
        return _Permute.apply(grad, inverse, index), None, None  # type: ignore[no-untyped-call]


def _take(x: Tensor, index: Tensor, inverse: Tensor | None) -> Tensor:
    """Tokens B N C in the order `index`; `inverse` is the inverse permutation, None where there is none."""
    if inverse is None or not x.requires_grad:
        return x.index_select(1, index)
    permuted: Tensor = _Permute.apply(x, index, inverse)  # type: ignore[no-untyped-call]
    return permuted


_plans: dict[tuple[Pair, Pair, bool, torch.device], Windows] = {}


def plan_windows(size: Pair, window: Pair, shifted: bool, device: torch.device) -> Windows:
    """The windows of a feature map of `size`, computed once for each size and device.

    A side that is not longer than the window gets one window of its own length and no shift; else the shift is half a
    window.
    """
    key = (size, window, shifted, device)
    plan = _plans.get(key)
    if plan is None:
        with torch.inference_mode(False):  # the plan outlives this call and may serve a training step
            plan = _plan_windows(size, window, shifted, device)
        if type(plan.slots) is Tensor:  # a tracer's stand-in must not be kept
            if len(_plans) >= 256:  # images of ever new sizes
                _plans.clear()
            _plans[key] = plan
    return plan


def _plan_windows(size: Pair, window: Pair, shifted: bool, device: torch.device) -> Windows:
    """In NumPy, so that it runs for real under a tracer or on the meta device too."""
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

    slots, regions = partition(tokens).ravel(), partition(regions)
    places = np.empty(size[0] * size[1], dtype=np.int64)
    places[slots[slots >= 0]] = np.flatnonzero(slots >= 0)
    forbidden = regions[:, :, None] != regions[:, None, :]
    mask = np.where(forbidden, np.float32("-inf"), np.float32(0)) if forbidden.any() else None
    return Windows(
        size=size,
        window=window,
        shift=(shift[0], shift[1]),
        slots=torch.as_tensor(slots.clip(min=0), device=device),
        places=torch.as_tensor(places, device=device),
        mask=None if mask is None else torch.as_tensor(mask, device=device),
    )


def _roll_axis(size: int, window: int, shift: int) -> tuple[np.ndarray, np.ndarray]:
    """One axis, padded and rolled: the position that stands at each place, and 1 where it came over the edge."""
    length = -(-size // window) * window
    places = np.arange(length, dtype=np.int64) + shift
    return places % length, (places >= length).astype(np.int64)


class _AttendWithBias(torch.autograd.Function):
    """softmax(q k^T / sqrt(D) + bias) v with a gradient for the bias, on the CPU.

    There `scaled_dot_product_attention` has no fused kernel once the bias needs a gradient, and autograd over single
    operations makes a new array of all scores at every one of them. Here they are reused in place.
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


class WindowAttention(nn.Module):
    """Multi-head self-attention in windows (B M) n C; a learnt bias for each head and relative position is added to
    the scores."""

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
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"a width of {dim} does not divide into {num_heads} heads")
        self.num_heads = num_heads
        self.window = window
        self.relative_position_bias_table = nn.Parameter(
            torch.zeros((2 * window[0] - 1) * (2 * window[1] - 1), num_heads)
        )
        self.register_buffer("relative_position_index", relative_position_index(window), persistent=False)
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.attn_drop = attn_drop
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)
        nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02, a=-0.04, b=0.04)

    def bias(self, windows: Windows) -> Tensor:
        """1 A n n, or M A n n where some pairs are forbidden: relative position bias and mask."""
        height, width = windows.window
        index = self.relative_position_index
        if windows.window != self.window:  # a smaller window is the corner of a full one
            index = index.view(*self.window, *self.window)[:height, :width, :height, :width]
        bias = self.relative_position_bias_table[index.flatten()]  # (n n) A
        bias = bias.t().reshape(1, self.num_heads, height * width, height * width)
        return bias if windows.mask is None else bias + windows.mask.to(bias.dtype)[:, None]

    def forward(self, x: Tensor, windows: Windows) -> Tensor:
        """(B M) n C -> (B M) n C, where `windows` tells how x was cut."""
        qkv, bias = self.qkv(x), self.bias(windows)
        dropout = self.attn_drop if self.training else 0.0
        if bias.requires_grad and not dropout and x.is_cpu:
            out: Tensor = _AttendWithBias.apply(qkv, bias.to(qkv.dtype))  # type: ignore[no-untyped-call]
        else:
            q, k, v = self._split(qkv)
            bias = bias.to(q.dtype)
            if len(bias) > 1:
                bias = bias.repeat(len(q) // len(bias), 1, 1, 1)
            out = merge_heads(attend(q, k, v, bias, dropout))
        projected: Tensor = self.proj_drop(self.proj(out))
        return projected

    def explain(self, x: Tensor, windows: Windows) -> tuple[Tensor, Tensor]:
        """The explicit twin of `forward`, without dropout: its output (B M) n C and its weights (B M) A n n."""
        q, k, v = self._split(self.qkv(x))
        bias = self.bias(windows)
        weights = attention_weights(q, k, bias.repeat(len(q) // len(bias), 1, 1, 1))
        return self.proj(merge_heads(weights @ v)), weights

    def _split(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B M) n 3C to queries, keys and values, (B M) A n D each."""
        q, k, v = qkv.reshape(*qkv.shape[:2], 3, self.num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        return q, k, v
