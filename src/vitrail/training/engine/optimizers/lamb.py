"""LAMB: Adam whose update is scaled by each parameter's own norm, for large batches.

You et al., "Large Batch Optimization for Deep Learning: Training BERT in 76 minutes", 2019
(https://arxiv.org/abs/1904.00962), algorithm 2. As in the authors' code, the updates of parameters without weight decay
(biases, norms) are not scaled.
"""

from typing import Any

import torch
from torch import Tensor

from vitrail.training.engine.non_finite import copy_if_finite
from vitrail.training.engine.parallel import full_tensor

_EPS = 1e-6


class Lamb(torch.optim.Optimizer):
    """LAMB with bias correction. With `found_inf`, a tensor of one value, a step changes nothing if that is not 0."""

    def __init__(self, groups: list[dict[str, Any]], betas: tuple[float, float]) -> None:
        super().__init__(groups, {"betas": betas})
        self.found_inf: Tensor | None = None

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update all parameters that have a gradient."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad, group)

    def _update(self, parameter: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        """x <- x - lr phi(|x|) / |u| u with u = m / (sqrt(v) + eps) + weight_decay x, and phi the identity."""
        (beta1, beta2), decay, state = group["betas"], group["weight_decay"], self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=grad.device)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(grad), torch.zeros_like(grad)
        step = state["step"] + 1
        mean = state["exp_avg"].lerp(grad, 1 - beta1)
        square = (state["exp_avg_sq"] * beta2).addcmul_(grad, grad, value=1 - beta2)
        update = mean / (1 - beta1**step) / ((square / (1 - beta2**step)).sqrt_() + _EPS)
        if decay:
            update.add_(parameter, alpha=decay)
            size, length = full_tensor(parameter.norm()), full_tensor(update.norm())
            update *= torch.where((size > 0) & (length > 0), size / length, 1.0)
        after = {"step": step, "exp_avg": mean, "exp_avg_sq": square}
        for name, value in after.items():
            copy_if_finite(state[name], value, self.found_inf)
        copy_if_finite(parameter, parameter.sub(update, alpha=group["lr"]), self.found_inf)
