"""Multi-head self-attention: the fused path, and an explicit one that returns the weights.

Vaswani et al., "Attention Is All You Need", 2017 (https://arxiv.org/abs/1706.03762); for images,
Dosovitskiy et al., "An Image is Worth 16x16 Words", 2020 (https://arxiv.org/abs/2010.11929), equations 5 to 8.

Shapes: B batch, N tokens, Q query tokens (Q <= N), C width, H heads, D = C / H width of one head.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitrail.utils.torch_compat import flash_attention_cpu, flash_attention_cpu_backward


class _AttendInBf16(torch.autograd.Function):
    """`attend` on the CPU, with forward in bfloat16 and backward in float32.

    PyTorch's backward in bfloat16 takes 1.7 (N=197, D=64) to 20 times (N=17, D=32) as long as in float32.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out: Tensor
        out, logsumexp = flash_attention_cpu(q, k, v)
        ctx.save_for_backward(q, k, v, out, logsumexp)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        *saved, logsumexp = ctx.saved_tensors
        grad, q, k, v, out = (x.float() for x in (grad, *saved))
        gradients = flash_attention_cpu_backward(grad, q, k, v, out, logsumexp, 0.0, False)
        return tuple(gradient.to(torch.bfloat16) for gradient in gradients)


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None, dropout: float = 0.0) -> Tensor:
    """softmax(q k^T / sqrt(D) + bias) v in one fused kernel.

    Args:
        q: B H Q D.
        k, v: B H N D.
        bias: added to the scores, broadcast to B H Q N; -inf masks a pair.
        dropout: probability of setting a weight to zero.

    Returns:
        B H Q D.
    """
    needs_grad = torch.is_grad_enabled() and q.requires_grad and not torch.compiler.is_compiling()
    has_kernel = q.is_cpu and q.dtype is torch.bfloat16 and bias is None and not dropout
    if needs_grad and has_kernel and flash_attention_cpu is not None:
        fast: Tensor = _AttendInBf16.apply(q, k, v)  # type: ignore[no-untyped-call]
        return fast
    out: Tensor = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=dropout)
    return out


def attention_weights(q: Tensor, k: Tensor, bias: Tensor | None = None) -> Tensor:
    """The weights of `attend`, which the fused kernel does not return: softmax(q k^T / sqrt(D) + bias), B H Q N."""
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
    weights: Tensor = (scores if bias is None else scores + bias).softmax(dim=-1)
    return weights


def merge_heads(x: Tensor) -> Tensor:
    """B H N D -> B N C."""
    return x.transpose(1, 2).flatten(2)


class MultiHeadAttention(nn.Module):
    """The layers of multi-head self-attention; queries, keys and values come from one linear layer, `qkv`."""

    def __init__(
        self, dim: int, num_heads: int, qkv_bias: bool = True, attn_drop: float = 0.0, proj_drop: float = 0.0
    ) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"the width {dim} is not a multiple of num_heads={num_heads}")
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.attn_drop = attn_drop
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def split_heads(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """B N 3C -> queries, keys and values, B H N D each."""
        q, k, v = qkv.unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        return q, k, v

    def attend_with_weights(self, x: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Attention of all tokens without dropout: the output B N C and the attention weights B H N N."""
        q, k, v = self.split_heads(self.qkv(x))
        weights = attention_weights(q, k, bias)
        return self.proj(merge_heads(weights @ v)), weights


class Attention(MultiHeadAttention):
    """Multi-head self-attention over tokens B N C."""

    def project(self, x: Tensor, queries: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Queries B H Q D of the first `queries` tokens (None for all), and keys and values B H N D of all tokens."""
        if queries is None or queries == x.shape[1]:
            return self.split_heads(self.qkv(x))
        dim = x.shape[-1]
        weight, bias = self.qkv.weight, self.qkv.bias
        q = F.linear(x[:, :queries], weight[:dim], None if bias is None else bias[:dim])
        kv = F.linear(x, weight[dim:], None if bias is None else bias[dim:])
        k, v = kv.unflatten(-1, (2, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        return q.unflatten(-1, (self.num_heads, -1)).transpose(1, 2), k, v

    def forward(self, x: Tensor, queries: int | None = None) -> Tensor:
        """B N C -> B Q C: attention of the first `queries` tokens (None for all) to all N."""
        return self.forward_with_keys(x, queries)[0]

    def forward_with_keys(
        self, x: Tensor, queries: int | None = None, bias: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """`forward` with a `bias` as in `attend`: the output B Q C, and the keys B H N D."""
        q, k, v = self.project(x, queries)
        out = attend(q, k, v, bias, self.attn_drop if self.training else 0.0)
        return self.proj_drop(self.proj(merge_heads(out))), k
