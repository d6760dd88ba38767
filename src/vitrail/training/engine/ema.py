"""An exponential moving average of a model's weights (Polyak and Juditsky, 1992), as in DeiT's recipe."""

import copy

import torch
from torch import Tensor, nn

from vitrail.training.engine.parallel import to_local
from vitrail.utils.torch_compat import lerp_


class Ema:
    """A second model with the average of the first one's weights: average = decay * average + (1 - decay) * weights.

    Floating-point buffers (batch norm statistics) are averaged too; counters are copied. With `warmup`, the decay of
    step s, counted from 0, is at most (1 + s) / (10 + s), so that the first weights soon have little influence.
    """

    def __init__(self, model: nn.Module, decay: float, warmup: bool = True, average: nn.Module | None = None) -> None:
        """average: the model for the averages, if `copy_of` has made it already."""
        self.model = self.copy_of(model) if average is None else average
        self.decay = decay
        self.warmup = warmup
        states = (self.model.state_dict().values(), model.state_dict().values())
        pairs = [(to_local(average), to_local(weight)) for average, weight in zip(*states, strict=True)]
        # state_dict's tensors share memory with the modules', so these lists stay valid until the end of the run.
        self._averages = [average for average, _ in pairs if average.is_floating_point()]
        self._weights = [weight for average, weight in pairs if average.is_floating_point()]
        self._counters: list[tuple[Tensor, Tensor]] = [pair for pair in pairs if not pair[0].is_floating_point()]

    @staticmethod
    def copy_of(model: nn.Module) -> nn.Module:
        """A copy without gradients."""
        return copy.deepcopy(model).eval().requires_grad_(False)

    def decay_at(self, step: int) -> float:
        """The decay that the update after this step uses."""
        return min(self.decay, (1 + step) / (10 + step)) if self.warmup else self.decay

    @torch.no_grad()
    def update(self, step: int, finite: Tensor | None = None) -> None:
        """Add the model's weights as they are after `step` to the average.

        finite: a boolean on the device; if it is false the average stays as it is, without waiting for the device.
        """
        share = 1 - self.decay_at(step)
        lerp_(self._averages, self._weights, share if finite is None else share * finite)
        for average, counter in self._counters:
            average.copy_(counter)
