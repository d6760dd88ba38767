"""Attention as plain matrix products, which every runtime recognises and fuses.

Shapes: B batch, N tokens, Q query tokens (Q <= N), C width, A heads, D = C / A width of one head, M windows, n tokens
of a window.
"""

from __future__ import annotations

from torch import Tensor, nn

from vitrail.layers.attention import MultiHeadAttention
from vitrail.layers.window import WindowAttention, Windows


class FoldedAttention(nn.Module):
    """The layers of attention, apart: `q`, `k`, `v` and `proj`, and a factor of the queries.

    Three products instead of one save splitting its result, which runtimes do in one thread.
    """

    def __init__(self, attn: MultiHeadAttention) -> None:
        super().__init__()
        self.heads = attn.num_heads
        self.q, self.k, self.v = (_part(attn.qkv, index) for index in range(3))
        self.proj = attn.proj
        self.scale = (attn.qkv.in_features // attn.num_heads) ** -0.5

    def project(self, x: Tensor, queries: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """... N C to queries ... A Q D of the first `queries` tokens (None for all), keys and values ... A N D."""
        parts = (self.q(x if queries is None else x[:, :queries]), self.k(x), self.v(x))
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(-2, -3) for part in parts)
        return (q if self.scale == 1 else q * self.scale), k, v

    def attend(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
        """softmax(q k^T + bias) v and the projection: ... Q C."""
        scores = q @ k.transpose(-2, -1)
        weights = (scores if bias is None else scores + bias).softmax(dim=-1)
        projected: Tensor = self.proj((weights @ v).transpose(-2, -3).flatten(-2))
        return projected


class TokenAttention(FoldedAttention):
    """Attention over tokens B N C, with the methods of `vitrail.layers.attention.Attention`."""

    def forward(self, x: Tensor, queries: int | None = None) -> Tensor:
        """B N C -> B Q C: attention of the first `queries` tokens (None for all) to all N."""
        return self.forward_with_keys(x, queries)[0]

    def forward_with_keys(
        self, x: Tensor, queries: int | None = None, bias: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """`forward` with a `bias` that is added to the scores: the output B Q C, and the keys B A N D."""
        q, k, v = self.project(x, queries)
        return self.attend(q, k, v, bias), k


class ReadingAttention(nn.Module):
    """Attention of the few tokens that are read to all others, without computing keys and values.

    For keys W x, the scores q^T (W x) are (W^T q)^T x; for values W x, their sum with weights a is W (sum of a x). That
    is two products with C x D weights for each query and head instead of two for each of N tokens.
    """

    keys: Tensor  # A D C
    values: Tensor  # A C D
    value_bias: Tensor | None  # A 1 D

    def __init__(self, attn: FoldedAttention) -> None:
        super().__init__()
        self.heads, self.scale, self.q, self.proj = attn.heads, attn.scale, attn.q, attn.proj
        shape = (attn.heads, -1)
        self.register_buffer("keys", attn.k.weight.detach().unflatten(0, shape))
        self.register_buffer("values", attn.v.weight.detach().unflatten(0, shape).transpose(1, 2))
        bias: Tensor | None = attn.v.bias
        self.register_buffer("value_bias", None if bias is None else bias.detach().unflatten(0, shape)[:, None])

    def forward(self, x: Tensor, queries: int) -> Tensor:
        """B N C -> B Q C. A bias of the keys changes no weight, and is left out."""
        return self.forward_with_keys(x, queries)[0]

    def forward_with_keys(self, x: Tensor, queries: int, bias: Tensor | None = None) -> tuple[Tensor, None]:
        """`forward` with a `bias` B 1 1 N that is added to the scores. There are no keys to return."""
        q = self.q(x[:, :queries]) * self.scale if self.scale != 1 else self.q(x[:, :queries])
        q = q.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # B A Q D
        scores = (q @ self.keys).flatten(1, 2) @ x.transpose(1, 2)  # B (A Q) N
        scores = scores if bias is None else scores + bias[:, 0]
        mean = (scores.softmax(dim=-1) @ x).unflatten(1, (self.heads, -1))  # B A Q C
        out = mean @ self.values
        out = out if self.value_bias is None else out + self.value_bias
        return self.proj(out.transpose(1, 2).flatten(2)), None


class WindowedAttention(FoldedAttention):
    """Attention in the windows of a feature map of one size, whose tokens B (M n) C are sorted by window.

    The bias, 1 A n n or M A n n with a mask, is gathered from the table in every call, or once: `bias`.
    """

    bias: Tensor | None

    def __init__(self, attn: WindowAttention, windows: Windows) -> None:
        super().__init__(attn)
        self.windows = windows
        self.table: WindowAttention | None = attn
        self.register_buffer("bias", None)

    def gather_bias(self) -> Tensor:
        assert self.table is not None
        return self.table.bias(self.windows)

    def forward(self, x: Tensor) -> Tensor:
        tokens, length = self.windows.window[0] * self.windows.window[1], x.shape[1]
        bias = self.gather_bias() if self.bias is None else self.bias
        # Without a mask all windows are alike, and go into the batch.
        x = x.reshape(-1, tokens, x.shape[2]) if len(bias) == 1 else x.reshape(-1, length // tokens, tokens, x.shape[2])
        out = self.attend(*self.project(x), bias)
        return out.reshape(-1, length, out.shape[-1])


def _part(qkv: nn.Linear, index: int) -> nn.Linear:
    """The third `index` of the outputs of `qkv`."""
    weight, bias = qkv.weight.detach().chunk(3)[index], qkv.bias
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(weight)
    layer.bias = None if bias is None else nn.Parameter(bias.detach().chunk(3)[index])
    return layer
