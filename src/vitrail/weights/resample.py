"""Resampling of weights for another window, patch size or number of channels; equal to timm 1.0.31 (tested).

Shapes: C width, I input channels, P Q patch height and width, H heads, s t bias table height and width
(2 * window size - 1).
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

Pair = tuple[int, int]


def resample_bias_table(table: Tensor, old: Pair, new: Pair) -> Tensor:
    """Resample Swin's relative position biases s*t H from windows of size `old` to size `new`.

    The old entries are placed at geometrically growing distances up to the new window's edge and interpolated linearly
    (BEiT, https://arxiv.org/abs/2106.08254; linear as in timm instead of cubic).
    """
    if old == new:
        return table
    rows, columns = (_interpolation(2 * a - 1, 2 * b - 1) for a, b in zip(old, new, strict=True))
    grid = table.float().T.reshape(-1, 2 * old[0] - 1, 2 * old[1] - 1)  # H s t
    return (rows @ grid @ columns.T).flatten(1).T.to(table.dtype)


def _interpolation(old: int, new: int) -> Tensor:
    """The new x old matrix of linear interpolation between geometrically spaced points."""
    half = _distances(old // 2, new // 2)
    points = torch.tensor([*(-d for d in reversed(half)), 0.0, *half])
    wanted = torch.arange(-(new // 2), new // 2 + 1.0)
    right = torch.bucketize(wanted, points).clamp(max=old - 1)
    left = (right - 1).clamp(min=0)
    # Beyond the outermost points both distances are 0: use the nearest point.
    to_left, to_right = (wanted - points[left]).clamp(min=0), (points[right] - wanted).clamp(min=0)
    exact = (to_left == 0) & (to_right == 0)
    to_left[exact] = to_right[exact] = 1.0
    matrix = torch.zeros(new, old)
    index = torch.arange(new)
    matrix[index, left] += to_right / (to_left + to_right)
    matrix[index, right] += to_left / (to_left + to_right)
    return matrix


def _distances(count: int, edge: int) -> list[float]:
    """`count` distances 1, 1 + q, 1 + q + q^2, ...; q in (1.01, 1.5) such that the last reaches `edge`."""
    low, high = 1.01, 1.5
    ratio = high
    while high - low > 1e-6:
        ratio = (low + high) / 2
        if (1 - ratio**count) / (1 - ratio) > edge:
            high = ratio
        else:
            low = ratio
    return [sum(ratio**power for power in range(steps + 1)) for steps in range(count)]


def resample_patches(kernel: Tensor, new: Pair) -> Tensor:
    """Resample a patch projection C I P Q by the pseudo-inverse of image resizing.

    An image resized like the patches then gives nearly the same tokens (FlexiViT, https://arxiv.org/abs/2212.08013).
    """
    old = (kernel.shape[2], kernel.shape[3])
    basis = torch.eye(old[0] * old[1]).view(-1, 1, *old)
    resized = F.interpolate(basis, size=new, mode="bicubic", antialias=True, align_corners=False)
    resize = resized.flatten(1).T  # new P Q x old P Q
    resampled = kernel.float().flatten(2) @ torch.linalg.pinv(resize)
    out: Tensor = resampled.view(*kernel.shape[:2], *new).to(kernel.dtype)
    return out


def adapt_channels(kernel: Tensor, channels: int) -> Tensor:
    """Adapt a first convolution C I P Q to another number of input channels.

    For one channel the kernels are summed, so that a grey image gives the same output as its RGB version; for more they
    are repeated and scaled by I / channels (timm's `adapt_input_conv`).
    """
    old, weight = kernel.shape[1], kernel.float()
    if channels == 1:
        return weight.sum(dim=1, keepdim=True).to(kernel.dtype)
    weight = weight.repeat(1, math.ceil(channels / old), 1, 1)[:, :channels] * (old / channels)
    return weight.to(kernel.dtype)
