"""The learning rate as a pure function of the progress of a run: linear warm-up, then half a cosine.

Loshchilov and Hutter, "SGDR", 2016 (https://arxiv.org/abs/1608.03983), without restarts.
"""

import math
from dataclasses import dataclass

_MAX_WARMUP = 0.1  # of a budget
_MAX_RESERVE = 0.3  # of a budget


def cosine(progress: float, floor: float = 0.0) -> float:
    """From 1 at progress 0 to `floor` at progress 1, along half a cosine."""
    return floor + (1 - floor) * (1 + math.cos(math.pi * min(max(progress, 0.0), 1.0))) / 2


@dataclass(frozen=True)
class Schedule:
    """The length of a run, and the factor of the peak learning rates at each step.

    steps: optimizer steps in all; None: as many as fit into the budget. warmup: steps of linear warm-up. floor: the
    last factor, 0 to 1. budget: seconds; the run ends when its steps or its seconds are used up, whichever comes first.
    """

    steps: int | None
    warmup: float = 0.0
    floor: float = 0.0
    budget: float | None = None

    def __post_init__(self) -> None:
        if self.steps is None and self.budget is None:
            raise ValueError("a schedule without steps needs a budget")

    def progress(self, step: int, seconds: float) -> float:
        """The fraction of the run, 0 to 1, that is done after `step` steps and `seconds`."""
        by_steps = 0.0 if self.steps is None else step / max(self.steps, 1)
        by_time = 0.0 if self.budget is None else seconds / self.budget
        return min(max(by_steps, by_time), 1.0)

    def finished(self, step: int, seconds: float) -> bool:
        """Whether no steps or no time is left."""
        no_steps = self.steps is not None and step >= self.steps
        return no_steps or (self.budget is not None and seconds >= self.budget)

    def reserve(self, seconds: float) -> float:
        """Seconds of the budget to reserve for a last validation that takes `seconds`: at most a part of the budget."""
        return seconds if self.budget is None else min(seconds, _MAX_RESERVE * self.budget)

    def factor(self, step: int, seconds: float = 0.0) -> float:
        """The factor of the step that comes after `step` steps and `seconds`.

        By steps, it rises over the warm-up and falls from its end on. With a budget the number of steps is unknown: the
        cosine follows the progress from the start, and the warm-up takes a tenth of the budget at most.
        """
        rise = (step + 1) / (self.warmup + 1)
        if self.budget is None:
            assert self.steps is not None
            return (
                rise
                if step < self.warmup
                else cosine((step - self.warmup) / max(self.steps - self.warmup, 1), self.floor)
            )
        progress = self.progress(step, seconds)
        return min(1.0, max(rise, progress / _MAX_WARMUP)) * cosine(progress, self.floor)
