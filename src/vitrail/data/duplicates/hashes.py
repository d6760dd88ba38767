"""Perceptual hashes: the low DCT coefficients of a grey thumbnail, and pairs of images whose hashes are alike.

As in pHash (Zauner, "Implementation and benchmarking of perceptual image hash functions", 2010), but the coefficients
are compared by their cosine and not by their signs: on images that all look alike, such as scans of clothes, signs are
the same by the thousand. The eight symmetries of the square are exact on coefficients: a mirror changes signs, a
quarter turn also swaps the axes. The hash of a window of the image comes from the same product with another matrix.
Shapes: N images, S side of a thumbnail, K coefficients per axis, D = K * K - 1 values of a hash.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from vitrail.images.convert import Pixels
from vitrail.utils.device import cpu_threads

K = 7
_ROWS = 256  # rows of a block of similarities
_NEIGHBOURS = 4  # pairs per image and symmetry, at most
_MIN_CROPS = 2000  # pairs of an image and a window that are kept, or a quarter of the images
_FLAT = 1.5  # standard deviation, in levels, below which an image has no structure to compare

Window = tuple[float, float, float]  # scale, y and x of the upper left corner, as shares of the side
Pair = tuple[int, int, float]  # two images and the cosine of their hashes
S = TypeVar("S")
R = TypeVar("R")

# Crops that are searched for: one of 95 %, five of 88 % and nine of 80 % of the sides.
WINDOWS: tuple[Window, ...] = (
    (0.95, 0.025, 0.025),
    *((0.88, y, x) for y, x in ((0.06, 0.06), (0.0, 0.0), (0.0, 0.12), (0.12, 0.0), (0.12, 0.12))),
    *((0.8, y / 10, x / 10) for y in range(3) for x in range(3)),
)
SYMMETRIES = tuple((turn, y, x) for turn in (False, True) for y in (1, -1) for x in (1, -1))


@dataclass(frozen=True)
class Candidate:
    """Two images that look alike: `second`, changed by SYMMETRIES[symmetry], is like `window` of `first`."""

    first: int
    second: int
    symmetry: int = 0
    window: Window = (1.0, 0.0, 0.0)


def apply_symmetry(images: Tensor, symmetry: int) -> Tensor:
    """SYMMETRIES[symmetry] of images ... S S: transposed if it is a turn, then mirrored along each axis that is -1."""
    turn, y, x = SYMMETRIES[symmetry]
    if turn:
        images = images.transpose(-1, -2)
    axes = [axis for axis, sign in ((-2, y), (-1, x)) if sign < 0]
    return images.flip(axes) if axes else images


def _dct(side: int, scale: float = 1.0, start: float = 0.0) -> Tensor:
    """The first K vectors, K S, of the cosine transform of a part of a line: from `start`, `scale` of its length."""
    at = (torch.arange(side, dtype=torch.float64) + 0.5) / side
    inside = (at - start) / scale
    weight = ((inside > 0) & (inside < 1)).double()
    vectors = torch.cos(torch.pi * torch.arange(K, dtype=torch.float64)[:, None] * inside) * weight
    return (vectors / weight.sum()).float()


class Hashes:
    """Hashes of thumbnails N S S, scaled so that each coefficient varies equally among these images."""

    def __init__(self, thumbs: Pixels) -> None:
        self._thumbs = thumbs
        flat = thumbs.reshape(len(thumbs), -1)
        self.usable = torch.from_numpy(np.array([part.std() > _FLAT for part in flat], dtype=bool))
        full = self._coefficients((1.0, 0.0, 0.0))
        versions = torch.stack([self._symmetric(full[self.usable], s) for s in range(8)])
        if versions.shape[1] == 0:
            versions = torch.ones(8, 1, K, K)
        # Over all symmetries: so the scaling commutes with each of them.
        self._mean = versions.mean(dim=(0, 1))
        self._scale = (versions - self._mean).square().mean(dim=(0, 1)).sqrt().clamp_min(1e-6)
        self._full = full

    def _coefficients(self, window: Window) -> Tensor:
        """N K K."""
        scale, y, x = window
        side = self._thumbs.shape[1]
        rows, columns = _dct(side, scale, y), _dct(side, scale, x)
        parts = torch.from_numpy(self._thumbs).split(_ROWS)
        return torch.cat([rows @ part.float() @ columns.T for part in parts])

    @staticmethod
    def _symmetric(coefficients: Tensor, symmetry: int) -> Tensor:
        turn, y, x = SYMMETRIES[symmetry]
        if turn:
            coefficients = coefficients.transpose(1, 2)
        order = torch.arange(K)
        return coefficients * (float(y) ** order)[:, None] * (float(x) ** order)

    def _normalised(self, coefficients: Tensor) -> Tensor:
        """N D of length 1."""
        values = ((coefficients - self._mean) / self._scale).flatten(1)[:, 1:]  # brightness is not part of it
        return torch.nn.functional.normalize(values, dim=1)

    def symmetric(self, symmetry: int) -> Tensor:
        """Hashes N D of the images changed by a symmetry."""
        return self._normalised(self._symmetric(self._full, symmetry))

    def window(self, window: Window) -> Tensor:
        """Hashes N D of a window of each image."""
        return self._normalised(self._coefficients(window))


def find_candidates(hashes: Hashes, threshold: float, crop_threshold: float, crops: bool = True) -> list[Candidate]:
    """Pairs whose hashes have at least a cosine of `threshold`, or `crop_threshold` for a window of one of them.

    crops: whether windows are searched. Of each image and symmetry, or image and window, the best few are kept;
    and of all windows the best, one for every four images.
    """
    base = hashes.symmetric(0)

    def symmetric(symmetry: int) -> list[Pair]:
        return _pairs(base, hashes.symmetric(symmetry), hashes.usable, threshold, _NEIGHBOURS)

    def cropped(window: Window) -> list[Pair]:
        return _pairs(hashes.window(window), base, hashes.usable, crop_threshold, 1)

    found: dict[tuple[int, int], Candidate] = {}
    for symmetry, pairs in enumerate(map_on_threads(symmetric, range(len(SYMMETRIES)))):
        for i, j, _ in pairs:
            found.setdefault((min(i, j), max(i, j)), Candidate(i, j, symmetry))
    if not crops:
        return list(found.values())
    best: dict[tuple[int, int], tuple[float, Candidate]] = {}
    for window, pairs in zip(WINDOWS, map_on_threads(cropped, WINDOWS), strict=True):
        for i, j, cosine in pairs:
            if cosine > best.get((i, j), (0.0, None))[0]:
                best[i, j] = cosine, Candidate(i, j, 0, window)
    crop_pairs = sorted(best.values(), key=lambda each: -each[0])[: max(_MIN_CROPS, len(base) // 4)]
    return [*found.values(), *(candidate for _, candidate in crop_pairs)]


def _pairs(queries: Tensor, base: Tensor, usable: Tensor, threshold: float, most: int) -> list[Pair]:
    """(i, j, cosine), i != j: of query i at most `most` rows j of `base`, with the largest cosines from `threshold`."""
    found: list[Pair] = []
    for start in range(0, len(queries), _ROWS):
        cosine = queries[start : start + _ROWS] @ base.T
        rows = torch.arange(len(cosine))
        cosine[rows, rows + start] = -1
        hits = torch.nonzero((cosine.amax(dim=1) >= threshold) & usable[start : start + _ROWS])[:, 0]
        values, nearest = cosine[hits].topk(min(most, cosine.shape[1]), dim=1)
        keep = (values >= threshold) & usable[nearest]
        i = (hits + start)[:, None].expand_as(nearest)[keep]
        found += zip(i.tolist(), nearest[keep].tolist(), values[keep].tolist(), strict=True)
    return found


def map_on_threads(work: Callable[[S], R], parts: Iterable[S]) -> list[R]:
    """`work` on each part, in order, on a thread a core. Threads of torch's own, which wait for each other in every
    operation, are many times slower when another program uses a core."""
    with cpu_threads(1), ThreadPoolExecutor(os.cpu_count() or 1, thread_name_prefix="search") as pool:
        return list(pool.map(work, parts))
