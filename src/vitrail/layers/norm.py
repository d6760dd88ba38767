"""Layer normalisation before linear layers (Ba et al., "Layer Normalization", 2016, https://arxiv.org/abs/1607.06450).

Shapes: C width.
"""

from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitrail.layers.kernels import autocast_dtype, checked_kernel, on_cuda

# From x ... C, weight and bias C, epsilon and the type of the output to ... C (norm_kernel.py).
Kernel = Callable[[Tensor, Tensor, Tensor, float, torch.dtype], Tensor]
_KERNEL_ELEMENTS = 1 << 24  # at least: of fewer, PyTorch's own two kernels start sooner
_KERNEL_WIDTH = 8192  # at most, so that rows stay in registers


class LayerNorm(nn.LayerNorm):
    """Layer normalisation whose output only linear layers read: ... C -> ... C.

    On CUDA, in inference in mixed precision, a Triton kernel computes it and rounds at once to the type in which the
    linear layers compute. PyTorch writes float32 and rounds with a second kernel, and is slow for narrow rows.
    """

    def forward(self, x: Tensor) -> Tensor:
        kernel = self._kernel(x)
        return super().forward(x) if kernel is None else kernel(x, self.weight, self.bias, self.eps, autocast_dtype(x))

    def _kernel(self, x: Tensor) -> Kernel | None:
        if torch.is_grad_enabled() or not on_cuda(x) or x.numel() < _KERNEL_ELEMENTS:
            return None
        if not self.elementwise_affine or self.bias is None or x.shape[-1] > _KERNEL_WIDTH:
            return None
        dtype = autocast_dtype(x)
        return norm_kernel(x.device, x.dtype, dtype) if dtype is not x.dtype else None


@cache
def norm_kernel(device: torch.device, dtype: torch.dtype, out: torch.dtype) -> Kernel | None:
    """The Triton kernel if it works on this device, from values of `dtype` to `out`."""

    def error(kernel: Kernel) -> float:
        x = torch.arange(96 * 37, device=device).sin().view(37, 96)  # no random state is changed
        weight, bias = x[0] + 1, x[1]
        with torch.autocast(device.type, enabled=False):
            expected = F.layer_norm(x, (96,), weight, bias)
        return float((kernel(x.to(dtype), weight, bias, 1e-5, out) - expected).abs().max())

    kernel: Kernel | None = checked_kernel(
        f"layer normalisation on {device} in {out}", "norm_kernel", "normalise", torch.no_grad()(error)
    )
    return kernel
