"""The pre-norm transformer block, and its layers that other architectures use too.

Shapes: B batch, N tokens, Q query tokens (Q <= N), C width, H heads.
"""

import torch
from torch import Tensor, nn

from vitrail.layers.attention import Attention


class Mlp(nn.Module):
    """Two linear layers with a GELU in between, applied to every token: ... C -> ... C."""

    def __init__(self, dim: int, hidden: int, drop: float = 0.0) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.act = nn.GELU()
        self.drop1 = nn.Dropout(drop)
        self.fc2 = nn.Linear(hidden, dim)
        self.drop2 = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.drop2(self.fc2(self.drop1(self.act(self.fc1(x)))))
        return out


class DropPath(nn.Module):
    """Stochastic depth (Huang et al., 2016, https://arxiv.org/abs/1603.09382): in training, the residual branch is set
    to zero for an image with probability `rate`, and else divided by 1 - rate."""

    def __init__(self, rate: float = 0.0) -> None:
        super().__init__()
        if not 0 <= rate < 1:
            raise ValueError(f"drop path rate must be in [0, 1), not {rate}")
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        if self.rate == 0 or not self.training:
            return x
        keep = torch.rand(x.shape[0], *(1 for _ in x.shape[1:]), device=x.device) >= self.rate
        return x * (keep.to(x.dtype) / (1 - self.rate))


class LayerScale(nn.Module):
    """A learnable factor per channel of a residual branch, initialised near zero (Touvron et al., "Going deeper with
    Image Transformers", 2021, https://arxiv.org/abs/2103.17239)."""

    def __init__(self, dim: int, init: float) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim,), init))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class Block(nn.Module):
    """x + attention(norm(x)), then x + MLP(norm(x)): equations 2 and 3 of ViT (https://arxiv.org/abs/2010.11929)."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        init_values: float | None = None,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        drop_path: float = 0.0,
        norm_eps: float = 1e-6,
    ) -> None:
        super().__init__()

        def scale() -> nn.Module:
            return nn.Identity() if init_values is None else LayerScale(dim, init_values)

        self.norm1 = nn.LayerNorm(dim, eps=norm_eps)
        self.attn = Attention(dim, num_heads, qkv_bias, attn_drop, proj_drop)
        self.ls1 = scale()
        self.drop_path1 = DropPath(drop_path)
        self.norm2 = nn.LayerNorm(dim, eps=norm_eps)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), proj_drop)
        self.ls2 = scale()
        self.drop_path2 = DropPath(drop_path)

    def forward(self, x: Tensor, queries: int | None = None) -> Tensor:
        """B N C -> B Q C. With `queries`, only the first `queries` tokens are computed; they attend to all N."""
        x = x[:, :queries] + self.drop_path1(self.ls1(self.attn(self.norm1(x), queries)))
        out: Tensor = x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))
        return out

    def forward_with_weights(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """`forward` without dropout or drop path: the output B N C and the attention weights B H N N."""
        attended, weights = self.attn.attend_with_weights(self.norm1(x))
        x = x + self.ls1(attended)
        return x + self.ls2(self.mlp(self.norm2(x))), weights


def drop_path_rates(rate: float, depth: int) -> list[float]:
    """Stochastic depth's rates, which increase linearly from 0 at the first block to `rate` at the last."""
    return [rate * index / max(depth - 1, 1) for index in range(depth)]


def init_linear(module: nn.Module, layer: type[nn.Linear | nn.Conv2d] = nn.Linear) -> None:
    """For `nn.Module.apply`: initialise modules of type `layer` as in DeiT (https://arxiv.org/abs/2012.12877) and Swin,
    weights from a normal distribution with std 0.02 truncated at 2 std, biases zero."""
    if isinstance(module, layer):
        nn.init.trunc_normal_(module.weight, std=0.02, a=-0.04, b=0.04)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
