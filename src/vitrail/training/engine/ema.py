"""An exponential moving average of a model's weights (Polyak and Juditsky, 1992), as in DeiT's recipe."""

import copy

import torch
from torch import Tensor, nn

from vitrail.training.engine.parallel import local
from vitrail.utils.torch_compat import lerp_


class Ema:
    """A second model with the average of the first one's weights: average = decay * average + (1 - decay) * weights.

    Floating-point buffers (the statistics of batch norms) are averaged too; counters are copied. With `warmup`, the
    decay of step s, counted from 0, is at most (1 + s) / (10 + s), so that the first weights are soon forgotten.
    """

    def __init__(self, model: nn.Module, decay: float, warmup: bool = True, average: nn.Module | None = None) -> None:
        """average: what holds the averages, where that was made before, by `copy_of`."""
        self.model = self.copy_of(model) if average is None else average
        self.decay = decay
        self.warmup = warmup
        states = (self.model.state_dict().values(), model.state_dict().values())
        pairs = [(local(mine), local(theirs)) for mine, theirs in zip(*states, strict=True)]
        # state_dict's tensors share memory with the modules', so these lists hold for the whole run.
        self._averages = [mine for mine, _ in pairs if mine.is_floating_point()]
        self._weights = [theirs for mine, theirs in pairs if mine.is_floating_point()]
        self._counters: list[tuple[Tensor, Tensor]] = [pair for pair in pairs if not pair[0].is_floating_point()]

    @staticmethod
    def copy_of(model: nn.Module) -> nn.Module:
        """A copy that does not learn."""
        return copy.deepcopy(model).eval().requires_grad_(False)

    def decay_at(self, step: int) -> float:
        """The decay that the update after this step uses."""
        return min(self.decay, (1 + step) / (10 + step)) if self.warmup else self.decay

    @torch.no_grad()
    def update(self, step: int, wanted: Tensor | None = None) -> None:
        """Take in the model's weights as they are after `step`.

        wanted: a boolean on the device; where it is false the average stays as it is, and nobody has waited for it.
        """
        share = 1 - self.decay_at(step)
        lerp_(self._averages, self._weights, share if wanted is None else share * wanted)
        for mine, theirs in self._counters:
            mine.copy_(theirs)
