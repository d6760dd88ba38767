"""Colour maps, and the scale on which a heatmap is drawn.

Shapes: H W height and width.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

Values = npt.NDArray[np.float32]

# matplotlib's "inferno" (CC0) at nine points: its lightness rises evenly, so that equal steps of the value look equal,
# also in grey and to the colour-blind.
SEQUENTIAL = (
    (0, 0, 4),
    (33, 12, 74),
    (87, 16, 110),
    (138, 34, 106),
    (188, 55, 84),
    (228, 90, 49),
    (249, 142, 9),
    (249, 203, 53),
    (252, 255, 164),
)
# Blue is evidence against the target, orange for it.
DIVERGING = (
    (5, 72, 138),
    (78, 150, 205),
    (170, 203, 226),
    (242, 242, 240),
    (246, 190, 133),
    (221, 117, 32),
    (140, 55, 0),
)
_PERCENTILE = 99.5


def strength(values: Values, signed: bool) -> Values:
    """A map on the scale of its colours, H W. signed: -1..1, with 0 for 0; else 0..1, with 0 for the smallest value.

    1 is the 99.5th percentile of the size of the values, and what is above is clipped: a single extreme pixel would
    leave the rest dark. It is the largest one where that percentile is 0. A constant map without a sign is 0.
    """
    values = values if signed else values - values.min()
    size = np.abs(values)
    scale = float(np.percentile(size, _PERCENTILE)) or float(size.max())
    return np.zeros_like(values) if scale == 0 else np.clip(values / np.float32(scale), -1, 1)


def colorize(shares: Values, signed: bool) -> npt.NDArray[np.uint8]:
    """Values of `strength` to RGB, H W 3. signed: a diverging colour map of -1..1, else a sequential one of 0..1."""
    table: npt.NDArray[Any] = np.array(DIVERGING if signed else SEQUENTIAL, np.float32)
    position = ((shares + 1) / 2 if signed else np.clip(shares, 0, 1)) * (len(table) - 1)
    low = np.minimum(position.astype(np.intp), len(table) - 2)
    part = (position - low)[..., None]
    colors: npt.NDArray[np.uint8] = np.rint(table[low] * (1 - part) + table[low + 1] * part).astype(np.uint8)
    return colors
