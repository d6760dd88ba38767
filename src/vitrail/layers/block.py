"""Layers of a residual block, and their initialisation.

Shapes: C width.
"""

import torch
from torch import Tensor, nn


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
