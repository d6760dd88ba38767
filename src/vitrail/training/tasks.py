"""What the loss is. The loop calls a task and knows none by name."""

from dataclasses import dataclass
from typing import Protocol

import torch.nn.functional as F
from torch import Tensor, nn

from vitrail.training.views import View


class Task(Protocol):
    """The mean loss of a view, a scalar that can be differentiated."""

    def __call__(self, model: nn.Module, view: View) -> Tensor: ...


@dataclass(frozen=True)
class Classify:
    """Cross-entropy with label smoothing, 0 <= smoothing < 1, on class numbers or on shares.

    Of a model that gives two outputs in training (DeiT's two heads) each learns the same target, and the loss is their
    mean.
    """

    smoothing: float = 0.0

    def __call__(self, model: nn.Module, view: View) -> Tensor:
        output = model(view.images)
        heads: tuple[Tensor, ...] = output if isinstance(output, tuple) else (output,)
        losses = [F.cross_entropy(logits, view.targets, label_smoothing=self.smoothing) for logits in heads]
        return losses[0] if len(losses) == 1 else sum(losses[1:], losses[0]) / len(losses)
