"""Corruptions of images, to measure how robust a classifier is, and two probes of its inductive bias.

Hendrycks and Dietterich, "Benchmarking Neural Network Robustness to Common Corruptions and Perturbations", 2019
(https://arxiv.org/abs/1903.12261). Noise, blur, brightness, contrast and JPEG have the severities of CIFAR-10-C for
images of 32 pixels and those of ImageNet-C for 224. Between the two sizes they are interpolated in the logarithm of
the size, and beyond them lengths grow with it. Occlusion and rotation are not in that benchmark.

Images are uint8 arrays H W C. A random draw depends on (seed, index, name) alone and not on the severity: one square
grows, one pattern of noise becomes stronger.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from vitrail.errors import ConfigError, did_you_mean
from vitrail.images.convert import Pixels
from vitrail.utils.counter_rng import fold, permutation, uniform

SEVERITIES = (1, 2, 3, 4, 5)

Draw = Callable[[int], npt.NDArray[np.float64]]  # that many uniform numbers in [0, 1), the same at every call
Levels = tuple[float, float, float, float, float]


def _noise(image: Pixels, std: float, draw: Draw) -> Pixels:
    """Gaussian noise of this standard deviation, in units of the range of values."""
    from scipy.special import ndtri  # type: ignore[import-untyped,unused-ignore]

    normal = ndtri(draw(image.size) + 2.0**-54).reshape(image.shape)  # of 0, it would be infinite
    return _to_bytes(image + 255 * std * normal)


def _blur(image: Pixels, sigma: float, draw: Draw) -> Pixels:
    """A Gaussian filter; sigma in pixels."""
    from scipy.ndimage import gaussian_filter  # type: ignore[import-untyped,unused-ignore]

    return _to_bytes(gaussian_filter(image.astype(np.float64), (sigma, sigma, 0), mode="nearest"))


def _brightness(image: Pixels, shift: float, draw: Draw) -> Pixels:
    """Raises the value of HSV, which is the largest channel, and keeps hue and saturation."""
    pixels = image.astype(np.float64)
    value = pixels.max(axis=2, keepdims=True)
    raised = np.minimum(value + 255 * shift, 255)
    return _to_bytes(np.where(value > 0, pixels * (raised / np.maximum(value, 1)), raised))  # black becomes grey


def _contrast(image: Pixels, factor: float, draw: Draw) -> Pixels:
    """Moves every value towards the mean of its channel."""
    mean = image.mean(axis=(0, 1))
    return _to_bytes((image - mean) * factor + mean)


def _jpeg(image: Pixels, quality: float, draw: Draw) -> Pixels:
    """Encodes and decodes; unless there are three channels, each by itself as grey."""
    from PIL import Image

    parts = [image] if image.shape[2] == 3 else np.split(image, image.shape[2], axis=2)
    decoded = []
    for part in parts:
        file = io.BytesIO()
        Image.fromarray(part if part.shape[2] == 3 else part[..., 0]).save(file, "JPEG", quality=round(quality))
        decoded.append(np.asarray(Image.open(file)).reshape(part.shape))
    return np.concatenate(decoded, axis=2)


def _occlusion(image: Pixels, share: float, draw: Draw) -> Pixels:
    """Covers a rectangle with this share of the area, anywhere, with the mean of each channel."""
    height, width = image.shape[:2]
    h, w = (max(1, round(side * math.sqrt(share))) for side in (height, width))
    y, x = draw(2)
    top, left = int(y * (height - h + 1)), int(x * (width - w + 1))
    covered: Pixels = image.copy()
    covered[top : top + h, left : left + w] = np.rint(image.mean(axis=(0, 1)))
    return covered


def _rotation(image: Pixels, degrees: float, draw: Draw) -> Pixels:
    """Rotates about the centre, to either side, bilinear; what comes from outside is the mirrored image."""
    from scipy.ndimage import rotate  # type: ignore[import-untyped,unused-ignore]

    angle = degrees if draw(1)[0] < 0.5 else -degrees
    turned = rotate(image.astype(np.float64), angle, axes=(0, 1), reshape=False, order=1, mode="reflect")
    return _to_bytes(turned)


def _to_bytes(values: npt.NDArray[np.float64]) -> Pixels:
    rounded: Pixels = np.rint(values.clip(0, 255)).astype(np.uint8)
    return rounded


@dataclass(frozen=True)
class Corruption:
    """A corruption, and its amounts at severities 1 to 5 for images with a side of 32 and of 224 pixels. `length`: the
    amount is in pixels, and beyond these sizes it grows with the side."""

    apply: Callable[[Pixels, float, Draw], Pixels]
    small: Levels
    large: Levels
    length: bool = False

    def amount(self, severity: int, side: float) -> float:
        """The amount for images whose side, the square root of their area, has this many pixels."""
        small, large = self.small[severity - 1], self.large[severity - 1]
        amount = float(np.interp(math.log(side), (math.log(32), math.log(224)), (small, large)))
        return amount * side / min(max(side, 32), 224) if self.length else amount


_SHARES, _DEGREES = (0.04, 0.08, 0.15, 0.25, 0.4), (6.0, 12.0, 18.0, 24.0, 30.0)

CORRUPTIONS = {
    "noise": Corruption(_noise, (0.04, 0.06, 0.08, 0.09, 0.10), (0.08, 0.12, 0.18, 0.26, 0.38)),
    "blur": Corruption(_blur, (0.4, 0.6, 0.7, 0.8, 1.0), (1.0, 2.0, 3.0, 4.0, 6.0), length=True),
    "brightness": Corruption(_brightness, (0.05, 0.1, 0.15, 0.2, 0.3), (0.1, 0.2, 0.3, 0.4, 0.5)),
    "contrast": Corruption(_contrast, (0.75, 0.5, 0.4, 0.3, 0.15), (0.4, 0.3, 0.2, 0.1, 0.05)),
    "jpeg": Corruption(_jpeg, (80, 65, 58, 50, 40), (25, 18, 15, 10, 7)),
    "occlusion": Corruption(_occlusion, _SHARES, _SHARES),
    "rotation": Corruption(_rotation, _DEGREES, _DEGREES),
}


def corrupt(image: Pixels, name: str, severity: int, *, seed: int = 0, index: int = 0) -> Pixels:
    """`image`, uint8 H W C, with a corruption of CORRUPTIONS at a severity from 1 to 5; `index` numbers the image.

    The image should have the size that the model takes, for which the severity is meant. Raises ConfigError for an
    unknown name or severity.
    """
    if name not in CORRUPTIONS:
        raise ConfigError(f"no corruption named {name!r}{did_you_mean(name, CORRUPTIONS)}: {', '.join(CORRUPTIONS)}")
    if severity not in SEVERITIES:
        raise ConfigError(f"severity {severity} of {name}: severities are 1 to 5")
    corruption = CORRUPTIONS[name]
    amount = corruption.amount(severity, math.sqrt(image.shape[0] * image.shape[1]))
    return corruption.apply(image, amount, lambda count: uniform(seed, 0, [index], f"corrupt {name}", count)[0])


def translate(image: Pixels, pixels: int, *, seed: int = 0, index: int = 0) -> Pixels:
    """`image` H W C, shifted by `pixels` up, down, left or right; the gap is filled with the mirrored image.

    Measures how much a classifier depends on where an object lies, which a convolution does least.
    """
    direction = int(4 * uniform(seed, 0, [index], "translate", 1)[0, 0])
    down, right = ((pixels, 0), (-pixels, 0), (0, pixels), (0, -pixels))[direction]
    height, width = image.shape[:2]
    margin = abs(pixels)
    padded = np.pad(image, ((margin, margin), (margin, margin), (0, 0)), mode="symmetric")
    top, left = margin - down, margin - right
    return padded[top : top + height, left : left + width].copy()


def shuffle_patches(image: Pixels, grid: int, *, seed: int = 0, index: int = 0) -> Pixels:
    """`image` H W C, cut into `grid` x `grid` patches of equal size in a random order; what is left over at the right
    and the bottom stays.

    Measures how much a classifier depends on the arrangement of parts and not on the parts alone: Naseer et al.,
    "Intriguing Properties of Vision Transformers", 2021 (https://arxiv.org/abs/2105.10497). Raises ConfigError if a
    patch would have no pixels.
    """
    height, width, channels = image.shape
    h, w = (height // grid, width // grid) if grid > 0 else (0, 0)
    if not h or not w:
        raise ConfigError(f"an image of {height} x {width} pixels has no {grid} x {grid} patches")
    used = image[: h * grid, : w * grid]
    patches = used.reshape(grid, h, grid, w, channels).swapaxes(1, 2).reshape(grid**2, h, w, channels)
    patches = patches[permutation(fold(seed, "shuffle patches", index), 0, grid**2)]
    shuffled = image.copy()
    shuffled[: h * grid, : w * grid] = (
        patches.reshape(grid, grid, h, w, channels).swapaxes(1, 2).reshape(h * grid, w * grid, channels)
    )
    return shuffled
