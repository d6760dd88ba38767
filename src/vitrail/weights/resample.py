"""Tables made for one size, turned into tables for another. Each gives what timm 1.0.31 gives (a test compares).

Shapes: C width, I channels of the image, P Q sides of a patch, h w the grid, H heads, s t sides of a bias table
(twice the window's less one).
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from vitrail.layers.embed import resample_positions

Pair = tuple[int, int]


def resample_bias_table(table: Tensor, old: Pair, new: Pair) -> Tensor:
    """Swin's relative position biases s*t H for windows of the size `old`, read off for windows of the size `new`.

    Offsets near the centre change quickly and those far away slowly, so the old entries are thought to lie at distances
    that grow geometrically up to the new window's edge, and are interpolated linearly (BEiT's way,
    https://arxiv.org/abs/2106.08254, with timm's linear in place of SciPy's cubic interpolation).
    """
    if old == new:
        return table
    rows, columns = (_interpolation(2 * a - 1, 2 * b - 1) for a, b in zip(old, new, strict=True))
    grid = table.float().T.reshape(-1, 2 * old[0] - 1, 2 * old[1] - 1)  # H s t
    return (rows @ grid @ columns.T).flatten(1).T.to(table.dtype)


def _interpolation(old: int, new: int) -> Tensor:
    """The matrix new x old that interpolates linearly between geometrically spaced points."""
    half = _distances(old // 2, new // 2)
    points = torch.tensor([*(-d for d in reversed(half)), 0.0, *half])
    wanted = torch.arange(-(new // 2), new // 2 + 1.0)
    right = torch.bucketize(wanted, points).clamp(max=old - 1)
    left = (right - 1).clamp(min=0)
    # Beyond the outermost points both distances are not positive, and the nearer point is taken alone.
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
    """A patch projection C I P Q for patches of another size, by the pseudo-inverse of resizing images.

    An image resized like the patches then gives the same tokens, as far as resizing loses nothing (FlexiViT,
    https://arxiv.org/abs/2212.08013).
    """
    old = (kernel.shape[2], kernel.shape[3])
    if old == new:
        return kernel
    basis = torch.eye(old[0] * old[1]).view(-1, 1, *old)
    resized = F.interpolate(basis, size=new, mode="bicubic", antialias=True, align_corners=False)
    resize = resized.flatten(1).T  # new P Q x old P Q
    resampled = kernel.float().flatten(2) @ torch.linalg.pinv(resize)
    out: Tensor = resampled.view(*kernel.shape[:2], *new).to(kernel.dtype)
    return out


def adapt_channels(kernel: Tensor, channels: int) -> Tensor:
    """A first convolution C I P Q for images of another number of channels.

    For one channel the kernels are summed, so that a grey image gives what it gave as RGB; for more they are repeated
    in turn and scaled by I / channels, so that the sum keeps its size (timm's `adapt_input_conv`).
    """
    old = kernel.shape[1]
    if old == channels:
        return kernel
    weight = kernel.float()
    if channels == 1:
        return weight.sum(dim=1, keepdim=True).to(kernel.dtype)
    weight = weight.repeat(1, math.ceil(channels / old), 1, 1)[:, :channels] * (old / channels)
    return weight.to(kernel.dtype)


__all__ = ["adapt_channels", "resample_bias_table", "resample_patches", "resample_positions"]
