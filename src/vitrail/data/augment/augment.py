"""Augmentation of batches on the device, with counter-based random numbers.

An augmented image depends on (seed, epoch, key) alone, where the key is the image's row and repetition (see
sampling.py): not on the workers, the batch's other images or the number of processes. Mixup and CutMix pair images 0
and 1, 2 and 3, ... of the (shuffled) batch, so a process with an even slice of it has both images of each pair.

Order: geometry, RandAugment, colour, normalization, erasing, mixup and CutMix; as in timm's training pipeline.
Shapes: B images, C channels, H height, W width, K classes.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from vitrail.data.augment.randaugment import DRAWS, rand_augment
from vitrail.data.augment.settings import Augment
from vitrail.images.preprocess import Preprocess
from vitrail.utils.counter_rng import fold, uniform

Floats = npt.NDArray[np.float64]


def augment(
    images: torch.Tensor,
    labels: torch.Tensor,
    num_classes: int,
    keys: torch.Tensor,
    *,
    config: Augment,
    preprocess: Preprocess,
    seed: int,
    epoch: int,
    sample_weights: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Augment and normalise a batch, on the images' device.

    images: uint8 B C H W. labels: int64 B. keys: int64 B, on the CPU. sample_weights: float B, of each image.
    Returns float32 B C H W, normalised, and the targets: `labels` unchanged, or float32 B K if the config mixes images.
    These sum to 1; with sample_weights each label counts as much as its image, and they sum to the mixture's weight.
    Label smoothing is applied by the loss: cross_entropy(..., label_smoothing=) takes soft targets too.
    """

    def draw(stream: str, n: int) -> Floats:
        return uniform(seed, epoch, keys.numpy(), stream, n)

    x: torch.Tensor = images
    if config.affine:
        x = _affine(x.to(torch.float32), config, draw("affine", 10))
    elif config.flip or config.vflip or config.pad_shift:
        x = _move(x, config, draw("move", 4))
    if config.rand_augment:
        x = rand_augment(
            x.round().clamp(0, 255).to(torch.uint8) if x.is_floating_point() else x,
            draw("rand_augment", DRAWS * config.rand_augment_ops),
            magnitude=config.rand_augment,
            std=config.rand_augment_std,
            fill=tuple(round(255 * value) for value in preprocess.mean),
        )
    if config.brightness or config.contrast or config.saturation:
        x = _colour(x.to(torch.float32), config, draw("colour", 3))
    x = preprocess.normalize(x)
    if config.erase:
        x = _erase(x, config, draw("erase", 7), fold(seed, epoch, "noise"))
    if not config.mixes:
        return x, labels
    return _mix(x, labels, num_classes, config, draw("mix", 5), sample_weights)


def _tensor(values: npt.NDArray[np.generic], like: torch.Tensor) -> torch.Tensor:
    """A float array as float32, other arrays as they are, on the device of `like`."""
    if values.dtype == np.float64:
        values = values.astype(np.float32)
    return torch.from_numpy(values).to(like.device, non_blocking=True)


def _signed(u: Floats) -> Floats:
    return 2.0 * u - 1.0


def _move(images: torch.Tensor, config: Augment, u: Floats) -> torch.Tensor:
    """Flip, and shift by whole pixels, without interpolation. u: (B, 4)."""
    pad = config.pad_shift
    steps = np.floor(u[:, :2] * (2 * pad + 1)).astype(np.int64)
    flips = np.stack([u[:, 2] < config.vflip, u[:, 3] < config.flip], axis=1)
    if images.device.type == "cpu":
        return _move_each(images, steps, flips, pad, config.edge)
    return _move_windows(images, steps, flips, pad, config.edge)


def _move_each(
    images: torch.Tensor, steps: npt.NDArray[np.int64], flips: npt.NDArray[np.bool_], pad: int, edge: str
) -> torch.Tensor:
    """`_move` on the CPU: slices of the padded images, several times faster than one large gather."""
    height, width = images.shape[2:]
    mode: Any = "constant" if edge == "black" else edge
    source = images.numpy()
    if pad:
        source = np.pad(source, ((0, 0), (0, 0), (pad, pad), (pad, pad)), mode)
    moved = np.empty(images.shape, dtype=np.uint8)
    for b, ((y, x), (flip_y, flip_x)) in enumerate(zip(steps.tolist(), flips.tolist(), strict=True)):
        part = source[b, :, y : y + height, x : x + width]
        if flip_x or flip_y:  # by torch, whose flip of bytes is vectorised
            part = torch.from_numpy(part).flip([axis for axis, flip in ((1, flip_y), (2, flip_x)) if flip]).numpy()
        moved[b] = part
    return torch.from_numpy(moved)


def _move_windows(
    images: torch.Tensor, steps: npt.NDArray[np.int64], flips: npt.NDArray[np.bool_], pad: int, edge: str
) -> torch.Tensor:
    """`_move` in a fixed number of kernels, for accelerators."""
    height, width = images.shape[2:]
    x = images.to(torch.float32)
    if pad:
        x = F.pad(x, (pad, pad, pad, pad), {"black": "constant", "edge": "replicate", "reflect": "reflect"}[edge])
        y_, x_ = _tensor(steps[:, 0], x), _tensor(steps[:, 1], x)
        windows = x.unfold(2, height, 1).unfold(3, width, 1)  # B C 2pad+1 2pad+1 H W, a view
        x = windows[torch.arange(len(x), device=x.device), :, y_, x_]
    for axis in (0, 1):
        if flips[:, axis].any():
            x = torch.where(_tensor(flips[:, axis], x)[:, None, None, None], x.flip(2 + axis), x)
    return x


def _affine(x: torch.Tensor, config: Augment, u: Floats) -> torch.Tensor:
    """Rotate, zoom, shear, shift and flip in one interpolation. u: (B, 10)."""
    height, width = x.shape[2:]
    angle = np.radians(_signed(u[:, 0]) * config.rotate)
    low, high = np.log(config.zoom[0]), np.log(config.zoom[1])
    size = np.exp(low + u[:, 1] * (high - low))
    shear_x, shear_y = (np.tan(np.radians(_signed(u[:, i]) * config.shear)) for i in (2, 3))
    sign_x = np.where(u[:, 4] < config.flip, -1.0, 1.0)
    sign_y = np.where(u[:, 5] < config.vflip, -1.0, 1.0)
    cos, sin = np.cos(angle) / size, np.sin(angle) / size
    # Output to input, in pixels from the centre: flip, then shear, then rotate and zoom.
    a = np.stack([cos - sin * shear_y, cos * shear_x - sin, sin + cos * shear_y, sin * shear_x + cos], axis=1)
    a[:, [0, 2]] *= sign_x[:, None]
    a[:, [1, 3]] *= sign_y[:, None]
    steps = _signed(u[:, 6:8]) * config.shift
    if config.pad_shift:
        pixels = np.floor(u[:, 8:10] * (2 * config.pad_shift + 1)) - config.pad_shift
        steps = steps + pixels / np.array([width, height])
    theta = np.zeros((len(u), 2, 3))
    # For grid_sample each side has length 2, so the rotation of a non-square image needs the ratio of the sides.
    theta[:, 0, 0], theta[:, 0, 1] = a[:, 0], a[:, 1] * height / width
    theta[:, 1, 0], theta[:, 1, 1] = a[:, 2] * width / height, a[:, 3]
    theta[:, :, 2] = 2.0 * steps
    grid = F.affine_grid(_tensor(theta, x), list(x.shape), align_corners=False)
    padding = {"black": "zeros", "edge": "border", "reflect": "reflection"}[config.edge]
    return F.grid_sample(x, grid, mode="bilinear", padding_mode=padding, align_corners=False)


def _colour(x: torch.Tensor, config: Augment, u: Floats) -> torch.Tensor:
    """Brightness, contrast, saturation, in this order, each clipped to 0..255 as in torchvision's ColorJitter."""
    strengths = (config.brightness, config.contrast, config.saturation)
    for k, strength in enumerate(strengths):
        if not strength or (k == 2 and x.shape[1] != 3):
            continue
        low = max(0.0, 1.0 - strength)
        factor = _tensor(low + u[:, k] * (1.0 + strength - low), x)[:, None, None, None]
        if k == 0:
            x = x * factor
        else:
            # B 1 H W, ITU-R 601
            grey = x if x.shape[1] == 1 else 0.299 * x[:, :1] + 0.587 * x[:, 1:2] + 0.114 * x[:, 2:3]
            x = torch.lerp(grey.mean(dim=(2, 3), keepdim=True) if k == 1 else grey, x, factor)
        x = x.clamp_(0, 255)
    return x


def _inside(boxes: Floats, height: int, width: int, like: torch.Tensor) -> torch.Tensor:
    """Whole-pixel boxes (B, 4: top, left, bottom, right) -> bool B 1 H W."""
    box = _tensor(boxes, like)[:, :, None]
    y, x = torch.arange(height, device=like.device)[None], torch.arange(width, device=like.device)[None]
    in_y, in_x = (y >= box[:, 0]) & (y < box[:, 2]), (x >= box[:, 1]) & (x < box[:, 3])
    return (in_y[:, :, None] & in_x[:, None, :])[:, None]


def _erase(x: torch.Tensor, config: Augment, u: Floats, noise_seed: int) -> torch.Tensor:
    height, width = x.shape[2:]
    area = (config.erase_area[0] + u[:, 1] * (config.erase_area[1] - config.erase_area[0])) * height * width
    low, high = np.log(config.erase_ratio[0]), np.log(config.erase_ratio[1])
    ratio = np.exp(low + u[:, 2] * (high - low))
    h = np.rint(np.sqrt(area * ratio)).clip(1, height)
    w = np.rint(np.sqrt(area / ratio)).clip(1, width)
    top, left = np.floor(u[:, 3] * (height - h + 1)), np.floor(u[:, 4] * (width - w + 1))
    boxes = np.stack([top, top + h, left, left + w, u[:, 5] * height, u[:, 6] * width], axis=1).astype(np.int64)
    # Slicing in numpy takes a tenth of the time of torch's; on the CPU both are the same memory.
    target = x.numpy() if x.device.type == "cpu" else x
    noise = _noise(noise_seed, x.shape[1], height, width, x.device) if config.erase_fill == "noise" else None
    for b in np.flatnonzero(u[:, 0] < config.erase).tolist():
        y0, y1, x0, x1, down, right = boxes[b].tolist()
        # One noise tensor per epoch; each image uses its own window of it.
        fill = 0.0 if noise is None else noise[:, down + y0 : down + y1, right + x0 : right + x1]
        target[b, :, y0:y1, x0:x1] = fill
    return x


@lru_cache(maxsize=2)
def _noise(seed: int, channels: int, height: int, width: int, device: torch.device) -> torch.Tensor:
    """C 2H 2W of standard normal noise, drawn on the CPU so that it is the same on every device."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(channels, 2 * height, 2 * width, generator=generator).to(device)


def _beta(alpha: float, u: Floats) -> Floats:
    """Beta(alpha, alpha) from uniform numbers, by the inverse of its distribution function."""
    if alpha == 1.0:
        return u
    from scipy.special import betaincinv  # type: ignore[import-untyped,unused-ignore]

    return np.asarray(betaincinv(alpha, alpha, u), dtype=np.float64)


def _mix(
    x: torch.Tensor,
    labels: torch.Tensor,
    num_classes: int,
    config: Augment,
    u: Floats,
    sample_weights: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mixup or CutMix of each image with its neighbour. u: (B, 5).

    Image b becomes w x_b + (1 - w) x_partner, with w one number (Mixup) or 0 inside a box and 1 outside (CutMix); its
    target is the same mixture of the labels, with the mean of w, and of their weights.
    """
    height, width = x.shape[2:]
    cut = u[:, 1] < (config.switch if config.mixup and config.cutmix else float(config.cutmix > 0))
    mixed = u[:, 0] < config.mix_prob
    mixed[len(x) & ~1 :] = False  # the last image of an odd batch has no partner
    keep = np.where(cut, _beta(config.cutmix or 1.0, u[:, 2]), _beta(config.mixup or 1.0, u[:, 2]))
    keep = np.where(mixed, keep, 1.0)
    weight = _tensor(np.where(cut, 1.0, keep), x)[:, None, None, None]
    if cut.any():
        boxes = _cut_boxes(keep, u[:, 3:5], height, width) * cut[:, None]
        weight = torch.where(_inside(boxes, height, width, x), 0.0, weight)
        area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
        keep = np.where(cut, 1.0 - area / (height * width), keep)
    one_hot = (labels[:, None] == torch.arange(num_classes, device=labels.device)).to(torch.float32)
    if sample_weights is not None:
        one_hot *= sample_weights[:, None]
    return _with_partner(x, weight), _with_partner(one_hot, _tensor(keep, x)[:, None])


def _with_partner(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """weight x + (1 - weight) partner, where images 0 and 1, 2 and 3, ... are partners."""
    mixed = x.clone()
    even, odd = x[: len(x) & ~1 : 2], x[1::2]
    weight = weight.expand(-1, *x.shape[1:])
    torch.lerp(odd, even, weight[: len(x) & ~1 : 2], out=mixed[: len(x) & ~1 : 2])
    torch.lerp(even, odd, weight[1::2], out=mixed[1::2])
    return mixed


def _cut_boxes(keep: Floats, u: Floats, height: int, width: int) -> Floats:
    """CutMix's boxes: a share 1 - keep of the area, centred anywhere, clipped at the border. Returns (B, 4)."""
    ratio = np.sqrt(1.0 - keep)
    h, w = np.floor(height * ratio), np.floor(width * ratio)
    y, x = np.floor(u[:, 0] * height), np.floor(u[:, 1] * width)
    top, left = (y - h // 2).clip(0, height), (x - w // 2).clip(0, width)
    return np.stack([top, left, (y + h // 2).clip(0, height), (x + w // 2).clip(0, width)], axis=1)
