"""Seeded, stratified splits.

Which images are held out depends on a hash of each image's own name or number, so that adding images to a folder moves
hardly any of the others from one split to another.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from vitrail.randomness import fold, uniform, word

Rows = npt.NDArray[np.int64]


def stratified(
    labels: npt.NDArray[np.int64], fraction: float, seed: int, stream: str, *, names: Sequence[str] | None = None
) -> tuple[Rows, Rows]:
    """Split rows into (kept, held out), both ascending, each class in proportion.

    ceil(fraction * N) rows are held out as far as the classes allow; every class keeps at least one row. `stream`
    names the split ("val", "test"), so that two splits with one seed are independent. names: one a row, what the
    choice hangs on; without it, the row's number.
    """
    n = len(labels)
    keys = np.arange(n, dtype=np.int64) if names is None else np.array([word(x) >> 1 for x in names], dtype=np.int64)
    draw = uniform(fold(seed, "split"), 0, keys, stream, 1)[:, 0]
    classes, counts = np.unique(labels, return_counts=True)
    quota = _quotas(counts, fraction)
    held = [np.flatnonzero(labels == c) for c in classes]
    held = [rows[np.argsort(draw[rows], kind="stable")[:k]] for rows, k in zip(held, quota, strict=True)]
    out = np.sort(np.concatenate(held)) if held else np.zeros(0, dtype=np.int64)
    return np.setdiff1d(np.arange(n, dtype=np.int64), out, assume_unique=True), out


def _quotas(counts: npt.NDArray[np.int64], fraction: float) -> list[int]:
    """How many of each class to hold out: largest remainders, at least one left, and one held out of classes of three
    or more.
    """
    if not 0 <= fraction < 1:
        raise ValueError(f"a fraction held out lies in 0..1, not {fraction}")
    if fraction == 0:
        return [0] * len(counts)
    exact = [float(c) * fraction for c in counts]
    quota = [min(max(math.floor(x), int(c >= 3)), int(c) - 1) for x, c in zip(exact, counts, strict=True)]
    # A hair less than the sum, so that 0.1 * 30 = 3.0000000000000004 is not rounded up to 4.
    missing = math.ceil(math.fsum(exact) - 1e-9) - sum(quota)
    for c in sorted(range(len(counts)), key=lambda c: (quota[c] - exact[c], c)):
        if missing > 0 and quota[c] < counts[c] - 1 and quota[c] < math.ceil(exact[c]):
            quota[c] += 1
            missing -= 1
    return quota
