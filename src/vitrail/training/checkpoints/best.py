"""The weights with the best validation so far."""

import math
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from vitrail.evaluation.metrics import Evaluation

_FEW = 100  # images, of which an accuracy tells too little: one of 90 % has a standard error of 3 points or more


def selects_by_loss(images: int, balance: str) -> bool:
    """Whether the best epoch is the one of the lowest loss, on so many validation images."""
    return balance == "none" and images < _FEW


def validation_score(result: Evaluation, balance: str) -> float:
    """The higher, the better: the top-1 accuracy, or the balanced one if the run balances classes; of few images, the
    negative loss."""
    if balance != "none":
        return result.balanced_top1
    return -result.loss if selects_by_loss(result.images, balance) else result.top1


@dataclass
class BestWeights:
    """The weights with the highest validation score; of equal scores, the lowest loss.

    score: see `validation_score`. weights: on rank 0 only.
    """

    epoch: int = 0  # from 1; 0: none yet
    top1: float = -1.0
    loss: float = float("inf")
    score: float = float("-inf")
    weights: dict[str, Tensor] = field(default_factory=dict)

    def is_beaten_by(self, score: float, loss: float) -> bool:
        """Whether these are better; a loss that is not finite never is."""
        return math.isfinite(loss) and (score, -loss) > (self.score, -self.loss)

    def record(self) -> dict[str, Any]:
        """All but the weights, for a checkpoint's JSON."""
        return {name: value for name, value in vars(self).items() if name != "weights"}
