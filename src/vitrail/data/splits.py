"""Seeded, stratified splits.

Which images are held out depends on a hash of each image's own name or number, so that adding images to a folder moves
hardly any of the others from one split to another.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from typing import Protocol, Self, TypeVar

import numpy as np
import numpy.typing as npt

from vitrail.utils.counter_rng import fold, uniform, word

Rows = npt.NDArray[np.int64]

# What people call a folder, a shard or a table of images, and which split it means.
SPLIT_NAMES = {
    "train": "train", "training": "train",
    "val": "val", "valid": "val", "validation": "val",
    "test": "test", "testing": "test",
}  # fmt: skip
LEAST_FOR_TEST = 10  # images a class on average, below which no test images are held out


def split_of(name: str) -> str | None:
    """The split that a file's or a split's name tells of ("train-0001.tar", "imagenet_validation"); None for none."""
    parts = re.split(r"[^a-z]+", name.lower())
    return next((SPLIT_NAMES[part] for part in parts if part in SPLIT_NAMES), None)


class Part(Protocol):
    """A split of which a part can be taken."""

    labels: Rows

    def __len__(self) -> int: ...

    def take(self, rows: Rows) -> Self: ...


P = TypeVar("P", bound=Part)


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


def hold_out(
    parts: dict[str, P],
    names_of: Callable[[P], list[str]],
    own_words: str,
    val_fraction: float,
    test_fraction: float,
    split_seed: int,
) -> str:
    """Add the splits that are lacking, in place, taken out of train. Returns in words where all of them come from.

    names_of: what the choice hangs on, a name for each image; names that last, wherever the images lie.
    """
    own = [name for name in ("train", "val", "test") if name in parts]
    if "train" not in parts or {"val", "test"} <= parts.keys():
        return f"{', '.join(own)}: {own_words}"
    words = [f"{', '.join(own)}: {own_words}"] if len(own) > 1 else []
    train = parts["train"]
    total, classes = len(train), len(np.unique(train.labels))
    few = total < LEAST_FOR_TEST * classes
    wanted = {"test": test_fraction, "val": val_fraction}
    for split, fraction in wanted.items():
        # A person who made val/ has split the images already: no test images are taken from that train/.
        if split in parts or fraction == 0 or (split == "test" and (few or "val" in parts)):
            continue
        train = parts["train"]
        kept, held = stratified(train.labels, fraction * total / len(train), split_seed, split, names=names_of(train))
        if not len(held):
            continue
        parts[split], parts["train"] = train.take(held), train.take(kept)
        words.append(f"{split}: {len(held)} of {total} images held out, stratified, split seed {split_seed}")
    if few and len(own) == 1 and test_fraction:
        words.append(f"no test split, with fewer than {LEAST_FOR_TEST} images a class")
    return "; ".join(words) or "all images are train"
