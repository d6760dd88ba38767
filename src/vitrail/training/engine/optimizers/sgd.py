"""Stochastic gradient descent with Nesterov momentum: Sutskever et al., 2013 (https://proceedings.mlr.press/v28/sutskever13.html).

As torch.optim.SGD, whose fused kernel, the one that knows `found_inf`, does not take sharded parameters.
"""

from typing import Any

import torch
from torch import Tensor

from vitrail.training.engine.non_finite import copy_if_finite


class Sgd(torch.optim.Optimizer):
    """SGD with L2 regularisation. With `found_inf`, a tensor of one value, a step changes nothing if that is not 0."""

    def __init__(self, groups: list[dict[str, Any]], momentum: float) -> None:
        super().__init__(groups, {"momentum": momentum})
        self.found_inf: Tensor | None = None

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """v <- momentum v + g, then x <- x - lr (g + momentum v), where g has weight_decay x added."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                grad, state = parameter.grad.add(parameter, alpha=group["weight_decay"]), self.state[parameter]
                velocity = state.setdefault("momentum_buffer", torch.zeros_like(grad))
                copy_if_finite(velocity, (velocity * group["momentum"]).add_(grad), self.found_inf)
                update = grad.add_(velocity, alpha=group["momentum"])
                copy_if_finite(parameter, parameter.sub(update, alpha=group["lr"]), self.found_inf)
