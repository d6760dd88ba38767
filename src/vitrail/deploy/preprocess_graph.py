"""Preprocessing as nodes of an ONNX graph: an image of any size to the model's input, with Pillow's arithmetic.

Pillow resizes along one axis after the other, and each is a product with a matrix of weights: for the output position i
and the input position j, filter(x) with x = ((j + 1/2) - (i + 1/2) in / out) / max(in / out, 1), divided by the sum of
its row (src/libImaging/Resample.c). The matrix is computed in the graph from the size of the image, for the part of the
image that the crop shows. So every filter works, in every runtime, and a long thin image needs no more memory.

Shapes: H W height and width of the image, C channels, h w height and width of the model's input, n the part of an axis
of the image that the crop shows.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import PIL

from vitrail.deploy.onnx_ops import GraphBuilder, Value
from vitrail.images.preprocess import Preprocess

PIXELS = "preprocess/pixels"  # the name of what `add_preprocess` returns

Filter = Callable[[GraphBuilder, Value], Value]


def _bilinear(graph: GraphBuilder, x: Value) -> Value:
    return (graph.value(1.0) - graph.op("Abs", x)).max(0.0)


def _hamming(graph: GraphBuilder, x: Value) -> Value:
    window = graph.op("Cos", x * math.pi) * 0.46 + 0.54
    return (graph.op("Abs", x) < 1.0).where(_sinc(graph, x) * window, 0.0)


def _bicubic(graph: GraphBuilder, x: Value) -> Value:
    """Keys' cubic convolution with a = -0.5."""
    x = graph.op("Abs", x)
    near = (x * 1.5 - 2.5) * x * x + 1.0
    far = (((x - 5.0) * x + 8.0) * x - 4.0) * -0.5
    return (x < 1.0).where(near, (x < 2.0).where(far, 0.0))


def _lanczos(graph: GraphBuilder, x: Value) -> Value:
    return (graph.op("Abs", x) < 3.0).where(_sinc(graph, x) * _sinc(graph, x * (1 / 3)), 0.0)


def _sinc(graph: GraphBuilder, x: Value) -> Value:
    x = x * math.pi
    zero = graph.op("Equal", x, 0.0)
    return zero.where(1.0, graph.op("Sin", x) / zero.where(1.0, x))


# The filter, and the largest |x| at which it is not 0, rounded up.
_FILTERS: dict[str, tuple[Filter, int]] = {
    "bilinear": (_bilinear, 1),
    "hamming": (_hamming, 1),
    "bicubic": (_bicubic, 2),
    "lanczos": (_lanczos, 3),
}


_PILLOW = int(PIL.__version__.partition(".")[0])
_HALF = 2.0**11  # half of the 22 bits behind the point of Pillow's weights


class _Axis(NamedTuple):
    """One axis of the image; each value is an int64 of shape (1,), and rows is h or w long."""

    length: Value  # of the image
    resized: Value
    rows: Value  # the position in the resized image of each row of the input, clipped to 0 .. resized - 1
    inside: Value  # whether it was inside; elsewhere the input is padded


def add_preprocess(graph: GraphBuilder, image: Value, preprocess: Preprocess) -> Value:
    """uint8 H W C -> uint8 1 h w C, as `Preprocess.crop`: the same to 1 of 255, see the tests.

    Needs opset 18.
    """
    sides = [graph.op("Shape", image, start=axis, end=axis + 1) for axis in (0, 1)]
    axes = [
        _axis(graph, length, resized, crop)
        for length, resized, crop in zip(sides, _resized(graph, sides, preprocess), preprocess.size, strict=True)
    ]
    if preprocess.interpolation == "nearest":
        pixels = _nearest(graph, image, axes)
    else:
        pixels = _filtered(graph, image, axes, preprocess.interpolation)
    inside = graph.op("Reshape", axes[0].inside, np.array([-1, 1, 1])) & graph.op(
        "Reshape", axes[1].inside, np.array([1, -1, 1])
    )
    border = preprocess.crop_mode == "border"
    color = [round(255 * mean) if border else 0 for mean in preprocess.mean]
    pixels = inside.where(pixels, np.array(color, np.uint8))
    return graph.op("Unsqueeze", pixels, np.array([0]), output=PIXELS)


def _resized(graph: GraphBuilder, sides: list[Value], preprocess: Preprocess) -> list[Value]:
    """`Preprocess._resized`: the height and width after resizing and before cropping."""
    targets = [math.floor(side / preprocess.crop_pct) for side in preprocess.size]
    height, width = sides
    if preprocess.crop_mode == "squash":
        return [graph.value(np.array([target])) for target in targets]
    if preprocess.crop_mode == "center" and targets[0] == targets[1]:
        # The shorter side becomes the target, and the quotient of the other one is truncated.
        return [(height * targets[0] / width).max(targets[0]), (width * targets[0] / height).max(targets[0])]
    # In float64, so that halves are rounded as there.
    lengths = [side.cast(np.float64) for side in sides]
    ratios = [length / np.array(target, np.float64) for length, target in zip(lengths, targets, strict=True)]
    ratio = ratios[0].max(ratios[1]) if preprocess.crop_mode == "border" else ratios[0].min(ratios[1])
    return [graph.op("Round", length / ratio).cast(np.int64).max(1) for length in lengths]


def _axis(graph: GraphBuilder, length: Value, resized: Value, crop: int) -> _Axis:
    """Center crop, rounded as in `images.preprocess._crop_start`."""
    padding = -((-resized + crop) / 2)
    cropped = graph.op("Round", (resized - crop).cast(np.float32) * 0.5).cast(np.int64)
    rows = (resized < crop).where(padding, cropped) + np.arange(crop)
    inside = (graph.value(-1) < rows) & (rows < resized)
    return _Axis(length, resized, rows.max(0).min(resized - 1), inside)


def _filtered(graph: GraphBuilder, image: Value, axes: list[_Axis], interpolation: str) -> Value:
    """Resample along one axis, round to bytes, resample along the other, round: h w C.

    The order decides what is rounded and clipped in between. Pillow 13 takes the width first, unless the height shrinks
    by more than twice as many pixels; older versions always take the width first. The graph does as the Pillow that is
    installed.
    """
    weights = []
    for number, axis in enumerate(axes):
        matrix, start, stop = _weights(graph, axis, interpolation)
        image = graph.op("Slice", image, start, stop, np.array([number]))
        weights.append(matrix)
    if _PILLOW < 13:
        resized = _resample_both(graph, image, weights, (1, 0))
    else:
        shrinks = [axis.length - axis.resized for axis in axes]
        resized = _in_either_order(graph, image, weights, (graph.value(0) < shrinks[0]) & (shrinks[1] * 2 < shrinks[0]))
    return graph.op("Transpose", resized, perm=[1, 2, 0]).cast(np.uint8)


def _in_either_order(graph: GraphBuilder, image: Value, weights: list[Value], height_first: Value) -> Value:
    """The image h w C resampled, planes C h w. Both orders are in the graph, without control flow; the one that is not
    taken gets one pixel."""
    results = []
    for order in ((1, 0), (0, 1)):
        taken = height_first if order == (0, 1) else graph.op("Not", height_first)
        size = taken.where(np.array([2**31 - 1]), np.array([1]))  # (1,)
        part = graph.op("Slice", image, np.array([0, 0]), graph.op("Concat", size, size, axis=0), np.array([0, 1]))
        parts = [graph.op("Slice", matrix, np.array([0]), size, np.array([1])) for matrix in weights]
        results.append(_resample_both(graph, part, parts, order))
    return height_first.where(results[1], results[0])


def _resample_both(graph: GraphBuilder, image: Value, weights: list[Value], order: tuple[int, int]) -> Value:
    """The image h w C resampled along both axes in this order, planes C h w."""
    planes = graph.op("Transpose", image.cast(np.float32), perm=[2, 0, 1])
    for number in order:
        planes = _resample(graph, planes, weights[number], number)
    return planes


def _resample(graph: GraphBuilder, planes: Value, weights: Value, axis: int) -> Value:
    """C H W times `weights` along the height (axis 0) or the width, rounded, halves up, and clipped to 0..255.

    Pillow adds integers of 30 bits. In float32 that is exact for the upper and the lower bits of the weights apart.
    """
    high = graph.op("Floor", weights * (1 / _HALF))
    sums = []
    for part in (high, weights - high * _HALF):
        across = (planes, graph.op("Transpose", part, perm=[1, 0]))
        sums.append(graph.op("MatMul", *((part, planes) if axis == 0 else across)))
    upper = sums[0] * (1 / _HALF) + 0.5
    whole = graph.op("Floor", upper)
    rounded = whole + graph.op("Floor", upper - whole + sums[1] * (1 / _HALF**2))
    return graph.op("Clip", rounded, 0.0, 255.0)


def _weights(graph: GraphBuilder, axis: _Axis, interpolation: str) -> tuple[Value, Value, Value]:
    """The matrix h n (or w n) of one axis, as Pillow's integers: 2**22 is 1; and the start and stop of its n positions
    in the image."""
    kernel, support = _FILTERS.get(interpolation, (_bilinear, 1))
    length, resized = axis.length, axis.resized
    longer = length.max(resized)
    centers = (axis.rows * 2 + 1) * length  # of the rows, in units of 1 / (2 resized) of the image's pixels
    reach = longer * (2 * support)
    first, last = (graph.op("Gather", centers, np.array([index])) for index in (0, -1))
    start = ((first - reach) / (resized * 2)).max(0)
    stop = ((last + reach) / (resized * 2) + 1).min(length)
    positions = graph.op("Range", *(graph.op("Squeeze", x) for x in (start, stop)), 1)
    if interpolation == "box":
        weights = _box_weights(graph, axis, positions)
    else:
        # Integers up to the division: x is exact but for one rounding, in every runtime.
        offsets = (positions * 2 + 1) * resized - graph.op("Unsqueeze", centers, np.array([1]))
        weights = kernel(graph, offsets.cast(np.float32) / (longer * 2).cast(np.float32))
    weights = weights / graph.op("ReduceSum", weights, np.array([1]), keepdims=1)
    return graph.op("Floor", weights * _HALF**2 + 0.5), start, stop


def _box_weights(graph: GraphBuilder, axis: _Axis, positions: Value) -> Value:
    """Where the edge of a box falls on the center of a pixel, Pillow's rounding in float64 decides: step by step as
    there."""
    length, resized = axis.length.cast(np.float64), axis.resized.cast(np.float64)
    half, one = (np.array(number, np.float64) for number in (0.5, 1))
    step = length / resized
    scale = step.max(one)
    center = graph.op("Unsqueeze", (axis.rows.cast(np.float64) + half) * step, np.array([1]))
    support = scale * half
    first, end = ((edge + half).cast(np.int64) for edge in (center - support, center + support))
    x = (positions.cast(np.float64) - center + half) * (graph.value(one) / scale)
    inside = (graph.value(-half) < x) & (x <= half) & (first <= positions) & (positions < end)
    return inside.cast(np.float32)


def _nearest(graph: GraphBuilder, image: Value, axes: list[_Axis]) -> Value:
    """h w C. Pillow adds the step up in float64 from one pixel to the next, and so must we: where a center falls on
    the edge between two pixels, the rounding of the sum decides."""
    for number, axis in enumerate(axes):
        step = axis.length.cast(np.float64) / axis.resized.cast(np.float64)
        steps = graph.op("Concat", step * np.array(0.5), graph.op("Expand", step, axis.resized - 1), axis=0)
        positions = graph.op("CumSum", steps, 0).cast(np.int64)
        image = graph.op("Gather", image, graph.op("Gather", positions, axis.rows), axis=number)
    return image
