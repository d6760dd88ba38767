"""RandAugment on batches, with counter-based random numbers.

Cubuk et al., "RandAugment: Practical automated data augmentation with a reduced search space", 2019
(https://arxiv.org/abs/1909.13719), in the variant that DeiT and most recipes after it use, timm's
`rand-m9-mstd0.5-inc1`: fifteen operations that all grow with the magnitude. Each one that is drawn is applied with
probability 0.5, with a magnitude from a normal distribution.

The operations are Pillow's, bit for bit wherever an image is not interpolated (except automatic contrast, which Pillow
computes in floating point: within 1 of 255). Eight of the fifteen are tables of 256 values for each channel.
Interpolation is bilinear; pixels from outside the image have the colour `fill`.
Shapes: B images, G images that get one operation, C channels (1 or 3), H height, W width.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

Floats = npt.NDArray[np.float64]

OPS = (
    "auto_contrast", "equalize", "invert", "rotate", "posterize", "solarize", "solarize_add", "colour", "contrast",
    "brightness", "sharpness", "shear_x", "shear_y", "translate_x", "translate_y",
)  # fmt: skip
DRAWS = 4  # random numbers per operation
MAX_MAGNITUDE = 10.0
_APPLY = 0.5  # probability
_CHUNK = 1 << 18  # pixels that go through an operation at once on a CPU, to fit its cache


def rand_augment(
    images: torch.Tensor, u: Floats, *, magnitude: float, std: float, fill: tuple[int, ...]
) -> torch.Tensor:
    """Apply u.shape[1] / DRAWS operations, one after the other, to each image.

    images: uint8 B C H W. u: (B, DRAWS * operations) numbers in [0, 1). magnitude: 0..10. std: the standard deviation
    of the magnitude. fill: 0..255 for each channel. Returns uint8 B C H W, on the images' device.
    """
    from scipy.special import ndtri  # type: ignore[import-untyped,unused-ignore]

    x = images.clone()
    for which, applied, normal, side in np.moveaxis(u.reshape(len(u), -1, DRAWS), 0, -1):
        levels = np.clip(magnitude + std * ndtri(np.clip(normal, 1e-12, None)), 0.0, MAX_MAGNITUDE)
        signs = np.where(side < 0.5, -1.0, 1.0)
        ops = np.where(applied < _APPLY, np.floor(which * len(OPS)).astype(np.int64), -1)
        for op in np.unique(ops[ops >= 0]).tolist():
            rows = np.flatnonzero(ops == op)
            in_chunks = x.device.type == "cpu" and OPS[op] not in _TABLES
            step = max(1, _CHUNK // x[0].numel()) if in_chunks else len(rows)
            for chunk in (rows[i : i + step] for i in range(0, len(rows), step)):
                index = torch.from_numpy(chunk).to(x.device)
                # index_select is several times faster than x[index], which copies byte by byte.
                result = apply(OPS[op], x.index_select(0, index), levels[chunk], signs[chunk], fill)
                x.index_copy_(0, index, result)
    return x


def apply(name: str, x: torch.Tensor, levels: Floats, signs: Floats, fill: tuple[int, ...]) -> torch.Tensor:
    """One operation of OPS on uint8 G C H W. levels: (G,) in 0..10. signs: (G,) of -1 and 1, its direction."""
    strength = levels / MAX_MAGNITUDE
    if name in _TABLES:
        return _look_up(x, _TABLES[name](x, strength, signs).to(torch.uint8))
    if name in _MATRICES:
        return _transform(x, _MATRICES[name](strength * signs, *x.shape[2:]), fill)
    return (_colour if name == "colour" else _sharpness)(x, _factors(strength, signs))


# Tables. Each gives int G (1 or C) 256: what the values 0..255 of a channel become.


def _per_image(values: npt.NDArray[np.generic], x: torch.Tensor) -> torch.Tensor:
    """(G,) -> G 1 1 on the device of x; floats as float32, which Pillow's own blending uses."""
    dtype = np.float32 if values.dtype == np.float64 else np.int32
    return torch.from_numpy(values.astype(dtype)).to(x.device)[:, None, None]


def _ramp(x: torch.Tensor) -> torch.Tensor:
    return torch.arange(256, dtype=torch.int32, device=x.device).expand(len(x), 1, 256)


def _auto_contrast(x: torch.Tensor, strength: Floats, signs: Floats) -> torch.Tensor:
    low, high = (value.to(torch.int32)[:, :, None] for value in (x.amin(dim=(2, 3)), x.amax(dim=(2, 3))))
    ramp = _ramp(x)
    return torch.where(high > low, (ramp - low) * 255 // (high - low).clamp(min=1), ramp).clamp(0, 255)


def _equalize(x: torch.Tensor, strength: Floats, signs: Floats) -> torch.Tensor:
    counts = _histograms(x)
    below = counts.cumsum(2) - counts
    # Pillow excludes the highest value that occurs from its step.
    step = below.masked_fill(counts == 0, 0).amax(2, keepdim=True) // 255
    return torch.where(step > 0, (step // 2 + below) // step.clamp(min=1), _ramp(x)).clamp(0, 255)


def _histograms(x: torch.Tensor) -> torch.Tensor:
    """uint8 G C H W -> int64 G C 256."""
    flat = x.flatten(2)
    if x.device.type == "cpu":
        return torch.stack([torch.stack([torch.bincount(c, minlength=256) for c in image]) for image in flat])
    counts = torch.zeros(*flat.shape[:2], 256, dtype=torch.int64, device=x.device)
    return counts.scatter_add_(2, flat.long(), torch.ones((), dtype=torch.int64, device=x.device).expand(flat.shape))


def _posterize(x: torch.Tensor, strength: Floats, signs: Floats) -> torch.Tensor:
    """Keep the 4 to 1 highest bits. (timm keeps 0 at the largest magnitude, an error in current Pillow.)"""
    dropped = 4 + (strength * 4).astype(np.int64).clip(max=3)
    return _ramp(x) & _per_image(256 - 2**dropped, x)


def _solarize(x: torch.Tensor, strength: Floats, signs: Floats) -> torch.Tensor:
    """Invert from a threshold on, which falls from 256 to 0."""
    ramp = _ramp(x)
    return torch.where(ramp < _per_image(256 - (strength * 256).astype(np.int64), x), ramp, 255 - ramp)


def _solarize_add(x: torch.Tensor, strength: Floats, signs: Floats) -> torch.Tensor:
    """Add up to 110 to the values below 128."""
    ramp = _ramp(x)
    return torch.where(ramp < 128, ramp + _per_image((strength * 110).astype(np.int64), x), ramp)


def _brightness(x: torch.Tensor, strength: Floats, signs: Floats) -> torch.Tensor:
    return _blend(torch.zeros_like(_ramp(x)), _ramp(x), _per_image(_factors(strength, signs), x))


def _contrast(x: torch.Tensor, strength: Floats, signs: Floats) -> torch.Tensor:
    total = _grey(x).flatten(1).sum(1)[:, None, None]
    pixels = x.shape[2] * x.shape[3]
    return _blend((2 * total + pixels) // (2 * pixels), _ramp(x), _per_image(_factors(strength, signs), x))


def _look_up(x: torch.Tensor, tables: torch.Tensor) -> torch.Tensor:
    """uint8 G C H W through uint8 G (1 or C) 256."""
    planes = x.flatten(2) if tables.shape[1] > 1 else x.flatten(1)[:, None]  # a table for each plane
    if x.device.type != "cpu":
        return tables.gather(2, planes.long()).view_as(x)
    # bytes.translate takes less than a nanosecond per byte; gather needs an index of eight bytes per value.
    result = np.empty(tuple(planes.shape), dtype=np.uint8)
    for image, image_tables, out in zip(planes.numpy(), tables.numpy(), result, strict=True):
        for channel, (plane, table) in enumerate(zip(image, image_tables, strict=True)):
            out[channel] = np.frombuffer(plane.tobytes().translate(table.tobytes()), dtype=np.uint8)
    return torch.from_numpy(result).view_as(x)


# Blends with another image.


def _factors(strength: Floats, signs: Floats) -> Floats:
    """The factor of a blend, 0.1 to 1.9; 1 leaves an image unchanged."""
    return np.maximum(0.1, 1.0 + 0.9 * strength * signs)


def _blend(other: torch.Tensor, x: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """other + factor (x - other), clamped to 0..255 and rounded down, as in Pillow. Returns uint8."""
    other = other.to(torch.float32)
    return _bytes((x.to(torch.float32).sub_(other).mul_(factor).add_(other)).clamp_(0, 255))


def _bytes(x: torch.Tensor) -> torch.Tensor:
    """0..255 rounded down to uint8; through int32, for which CPUs have an instruction."""
    return x.to(torch.int32).to(torch.uint8)


def _grey(x: torch.Tensor) -> torch.Tensor:
    """G C H W -> int32 G 1 H W: Pillow's conversion to "L", ITU-R 601 in 16 bits."""
    if x.shape[1] == 1:
        return x.to(torch.int32)
    red, green, blue = x.to(torch.int32).split(1, dim=1)
    total: torch.Tensor = red * 19595 + green * 38470 + blue * 7471 + 0x8000
    return total >> 16


def _colour(x: torch.Tensor, factors: Floats) -> torch.Tensor:
    return x if x.shape[1] == 1 else _blend(_grey(x), x, _per_image(factors, x)[..., None])


def _sharpness(x: torch.Tensor, factors: Floats) -> torch.Tensor:
    """Blend with Pillow's SMOOTH filter, (8 neighbours + 5 centre) / 13; the border is unchanged."""
    if min(x.shape[2:]) < 3:
        return x
    wide = x.to(torch.int16)
    inside = wide[:, :, 1:-1, 1:-1]
    columns = wide[:, :, :-2] + wide[:, :, 1:-1] + wide[:, :, 2:]
    total = columns[..., :-2] + columns[..., 1:-1] + columns[..., 2:] + 4 * inside
    smooth = total.to(torch.float32).div_(13).add_(0.5).floor_()
    out = x.clone()
    out[:, :, 1:-1, 1:-1] = _blend(smooth, inside, _per_image(factors, x)[..., None])
    return out


# Geometry. Each gives (G, 6): x_in = a x + b y + c and y_in = d x + e y + f, in pixels from the upper left corner.


def _matrix(amount: Floats, **entries: Floats) -> Floats:
    values: dict[str, Floats | float] = {"a": 1.0, "b": 0.0, "c": 0.0, "d": 0.0, "e": 1.0, "f": 0.0, **entries}
    return np.stack([np.broadcast_to(values[name], amount.shape) for name in "abcdef"], axis=1)


def _rotate(amount: Floats, height: int, width: int) -> Floats:
    """By up to 30 degrees about the centre."""
    angle = amount * math.radians(-30.0)
    cos, sin = np.cos(angle), np.sin(angle)
    x, y = width / 2, height / 2
    return _matrix(amount, a=cos, b=sin, c=x - cos * x - sin * y, d=-sin, e=cos, f=y + sin * x - cos * y)


def _transform(x: torch.Tensor, matrix: Floats, fill: tuple[int, ...]) -> torch.Tensor:
    """Bilinear, with the nearest pixels for the half pixel at the border, as Pillow."""
    height, width = x.shape[2:]
    across = torch.arange(width, dtype=torch.float32, device=x.device) + 0.5
    down = (torch.arange(height, dtype=torch.float32, device=x.device) + 0.5)[:, None]
    # grid_sample takes -1 to 1. Not affine_grid: the rounding of its product depends on the number of images.
    unit = matrix * np.repeat([2 / width, 2 / height], 3)
    a, b, c, d, e, f = (_per_image(column, x) for column in (unit - [0, 0, 1, 0, 0, 1]).T)
    x_in, y_in = a * across + (b * down + c), d * across + (e * down + f)  # G H W
    grid = torch.view_as_real(torch.complex(x_in, y_in))  # three times as fast as torch.stack
    moved = F.grid_sample(x.to(torch.float32), grid, mode="bilinear", padding_mode="border", align_corners=False)
    inside = (torch.maximum(x_in.abs_(), y_in.abs_()) <= 1)[:, None]
    colour = torch.tensor(fill, dtype=torch.uint8, device=x.device)[:, None, None]
    # Pillow rounds down; the small constant keeps integers to which float32 gives a slightly smaller value.
    return _bytes(moved.add_(2**-9)).mul_(inside).add_(colour * ~inside)


_TABLES: dict[str, Callable[[torch.Tensor, Floats, Floats], torch.Tensor]] = {
    "auto_contrast": _auto_contrast,
    "equalize": _equalize,
    "invert": lambda x, strength, signs: 255 - _ramp(x),
    "posterize": _posterize,
    "solarize": _solarize,
    "solarize_add": _solarize_add,
    "brightness": _brightness,
    "contrast": _contrast,
}
# Shear by up to 0.3, translation by up to 0.45 of the side.
_MATRICES: dict[str, Callable[[Floats, int, int], Floats]] = {
    "rotate": _rotate,
    "shear_x": lambda amount, height, width: _matrix(amount, b=0.3 * amount),
    "shear_y": lambda amount, height, width: _matrix(amount, d=0.3 * amount),
    "translate_x": lambda amount, height, width: _matrix(amount, c=0.45 * amount * width),
    "translate_y": lambda amount, height, width: _matrix(amount, f=0.45 * amount * height),
}
