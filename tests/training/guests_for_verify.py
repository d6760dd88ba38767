"""Models that other processes can import: one that always does the same, and one that does not."""

import time

import torch
from torch import Tensor, nn


class Steady(nn.Module):
    num_classes = 3

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(64, 3)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(x.flatten(1))
        return logits


class Drifting(Steady):
    """Draws from the clock, and not from the step's own random numbers."""

    def forward(self, x: Tensor) -> Tensor:
        noise = torch.rand((), generator=torch.Generator().manual_seed(time.perf_counter_ns()))
        return super().forward(x) * (1 + noise if self.training else 1)
