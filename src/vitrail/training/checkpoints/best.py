"""The weights with the best validation so far."""

import math
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor


@dataclass
class BestWeights:
    """The weights with the highest validation score; of equal scores, the lowest loss.

    score: the top-1 accuracy, or the balanced one if the run balances classes. weights: on rank 0 only.
    """

    epoch: int = 0  # from 1; 0: none yet
    top1: float = -1.0
    loss: float = float("inf")
    score: float = -1.0
    weights: dict[str, Tensor] = field(default_factory=dict)

    def is_beaten_by(self, score: float, loss: float) -> bool:
        """Whether these are better; a loss that is not finite never is."""
        return math.isfinite(loss) and (score, -loss) > (self.score, -self.loss)

    def record(self) -> dict[str, Any]:
        """All but the weights, for a checkpoint's JSON."""
        return {name: value for name, value in vars(self).items() if name != "weights"}
