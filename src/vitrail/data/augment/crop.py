"""The random resized crop of Inception (Szegedy et al., "Going deeper with convolutions", CVPR 2015), at decode.

The rectangle has the distribution of torchvision's RandomResizedCrop, from counter-based random numbers. It is known
before decoding, so that a JPEG is decoded at a reduced size if the crop allows it.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from vitrail.data.dataset import Split, decode_reduced
from vitrail.images.convert import Pixels
from vitrail.images.decode import bad_image_errors
from vitrail.images.preprocess import Preprocess

_TRIES = 10
CROP_DRAWS = 2 * _TRIES + 2  # random numbers per crop


def crop_box(
    height: int, width: int, scale: tuple[float, float], ratio: tuple[float, float], draw: npt.NDArray[np.float64]
) -> tuple[int, int, int, int]:
    """(top, left, height, width) of a random rectangle. draw: CROP_DRAWS numbers in [0, 1).

    scale: range of the share of the area. ratio: range of width / height, drawn log-uniformly.
    """
    low, high = math.log(ratio[0]), math.log(ratio[1])
    for k in range(_TRIES):
        area = height * width * (scale[0] + float(draw[2 * k]) * (scale[1] - scale[0]))
        aspect = math.exp(low + float(draw[2 * k + 1]) * (high - low))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return int(draw[-2] * (height - h + 1)), int(draw[-1] * (width - w + 1)), h, w
    # No rectangle fits in the image: the largest centred one with an allowed ratio.
    w, h = width, height
    if width / height < ratio[0]:
        h = max(1, round(width / ratio[0]))
    elif width / height > ratio[1]:
        w = max(1, round(height * ratio[1]))
    return (height - h) // 2, (width - w) // 2, h, w


def random_crop(
    split: Split,
    row: int,
    preprocess: Preprocess,
    scale: tuple[float, float],
    ratio: tuple[float, float],
    draw: npt.NDArray[np.float64],
) -> Pixels:
    """Image `row` of a split, cropped at random and resized: uint8 H W C of preprocess.size."""
    from PIL import Image

    target_h, target_w = preprocess.size

    def at_least(height: int, width: int) -> tuple[int, int]:
        _, _, h, w = crop_box(height, width, scale, ratio, draw)
        return math.ceil(height * min(1.0, target_h / h)), math.ceil(width * min(1.0, target_w / w))

    image, (height, width) = decode_reduced(split, row, preprocess.channels, at_least)
    top, left, h, w = crop_box(height, width, scale, ratio, draw)
    x, y = image.width / width, image.height / height  # below 1 if a JPEG was decoded at a reduced size
    box = (left * x, top * y, min((left + w) * x, image.width), min((top + h) * y, image.height))
    with bad_image_errors():
        image = image.resize((target_w, target_h), Image.Resampling[preprocess.interpolation.upper()], box=box)
    return np.asarray(image).reshape(target_h, target_w, preprocess.channels)
