"""Muon: momentum whose matrices are orthogonalised, for the hidden matrices of a network trained from scratch.

Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024 (https://kellerjordan.github.io/posts/muon/).
The update is scaled as in Liu et al., "Muon is Scalable for LLM Training", 2025 (https://arxiv.org/abs/2502.16982), so
that its root mean square is that of AdamW: learning rate and weight decay carry over. All other parameters are updated
by AdamW.

torch.optim.Muon takes one matrix at a time, always computes in bfloat16, and knows no `found_inf` and no sharded
parameters; here matrices of one shape are orthogonalised together.

Shapes: L matrices of one shape, M N its rows and columns.
"""

from typing import Any

import torch
from torch import Tensor

from vitrail.training.engine.non_finite import copy_if_finite
from vitrail.training.engine.parallel import full_tensor, like_sharded

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the quintic iteration, from Jordan et al.
_ITERATIONS = 5
_EPS = 1e-7


class Muon(torch.optim.AdamW):
    """AdamW, and Muon with Nesterov momentum for the groups with orthogonalize=True.

    Such a group has matrices only, and `momentum`. With `found_inf`, a tensor of one value, a step changes nothing if
    that is not 0, as in torch's fused optimizers.
    """

    def __init__(self, groups: list[dict[str, Any]], betas: tuple[float, float], fused: bool) -> None:
        super().__init__(groups, betas=betas, fused=fused)
        self.found_inf: Tensor | None = None

    def __setstate__(self, state: dict[str, Any]) -> None:
        torch.optim.Optimizer.__setstate__(self, state)  # AdamW's own wants a step count of every parameter

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update all parameters that have a gradient."""
        groups = self.param_groups
        try:
            self.param_groups = [group for group in groups if not group["orthogonalize"]]
            super().step()
        finally:
            self.param_groups = groups
        for group in groups:
            if group["orthogonalize"]:
                self._step_matrices(group)

    def _step_matrices(self, group: dict[str, Any]) -> None:
        """x <- (1 - lr * weight_decay) x - 0.2 sqrt(max(M, N)) lr orthogonalize(Nesterov momentum)."""
        by_shape: dict[torch.Size, list[Tensor]] = {}
        for parameter in group["params"]:
            if parameter.grad is not None:
                by_shape.setdefault(parameter.shape, []).append(parameter)
        for (rows, columns), parameters in by_shape.items():
            directions = [self._momentum(parameter, group["momentum"]) for parameter in parameters]
            updates = orthogonalize(torch.stack([full_tensor(direction) for direction in directions]))
            rate = 0.2 * max(rows, columns) ** 0.5 * group["lr"]
            for parameter, update in zip(parameters, updates, strict=True):
                changed = parameter * (1 - group["lr"] * group["weight_decay"])
                changed.sub_(like_sharded(update, parameter), alpha=rate)
                copy_if_finite(parameter, changed, self.found_inf)

    def _momentum(self, parameter: Tensor, momentum: float) -> Tensor:
        """The Nesterov momentum of one matrix, after updating its running mean of gradients."""
        grad, state = parameter.grad, self.state[parameter]
        assert grad is not None
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(grad)
        buffer = state["momentum_buffer"]
        copy_if_finite(buffer, buffer.lerp(grad, 1 - momentum), self.found_inf)
        return grad.lerp(buffer, momentum)


def orthogonalize(matrices: Tensor) -> Tensor:
    """L M N to about the nearest matrices whose rows or columns, the fewer, are orthonormal: singular values become
    0.7 to 1.2 (Newton-Schulz iteration). bfloat16 on CUDA, else float32.
    """
    a, b, c = _COEFFICIENTS
    x = matrices.bfloat16() if matrices.device.type == "cuda" else matrices.float()
    wide = x.shape[1] <= x.shape[2]
    x = x if wide else x.mT
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=_EPS)  # singular values at most 1
    for _ in range(_ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x if wide else x.mT).to(matrices.dtype)
