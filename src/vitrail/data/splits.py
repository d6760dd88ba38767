"""Seeded, stratified splits.

Which images are held out depends on a hash of each image's name or index, so that adding images to a folder moves
few other images from one split to another.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from vitrail.data.dataset import Dataset, Sizes, SkippedImage, Split
from vitrail.errors import ConfigError, DataError
from vitrail.utils.counter_rng import fold, hash_text, uniform

Rows = npt.NDArray[np.int64]
S = TypeVar("S", bound=Split)

# Names of folders, files and table splits, and the split each one means.
SPLIT_NAMES = {
    "train": "train", "training": "train",
    "val": "val", "valid": "val", "validation": "val",
    "test": "test", "testing": "test",
}  # fmt: skip
SPLITS = ("train", "val", "test")
MIN_FOR_TEST = 10  # images per class, on average, below which no test split is held out


@dataclass(frozen=True)
class SplitOptions:
    """How a dataset is split: fractions held out where a split is missing, their seed, and the fewest classes.

    group_duplicates: whether near duplicates are held out together, or not at all.
    """

    val_fraction: float = 0.1
    test_fraction: float = 0.1
    seed: int = 0
    min_classes: int = 2
    group_duplicates: bool = False

    def __post_init__(self) -> None:
        for name in ("val_fraction", "test_fraction"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 0 and below 1, not {getattr(self, name)}")
        if self.val_fraction + self.test_fraction >= 1:
            raise ConfigError(
                f"val_fraction {self.val_fraction} and test_fraction {self.test_fraction} leave no training images"
            )

    def check_classes(self, source: object, class_names: Sequence[str]) -> None:
        """Raise DataError if there are too few classes."""
        if len(class_names) < self.min_classes:
            raise DataError(
                f"{source} has only {len(class_names)} class ({', '.join(class_names)}); "
                f"a classifier needs at least {self.min_classes}"
            )


def split_of(name: str) -> str | None:
    """The split that a file or split name contains ("train-0001.tar", "imagenet_validation"); None if none."""
    parts = re.split(r"[^a-z]+", name.lower())
    return next((SPLIT_NAMES[part] for part in parts if part in SPLIT_NAMES), None)


def natural(name: str) -> tuple[list[int | str], str]:
    """Sort key that puts "class2" before "class10"."""
    parts = re.split(r"([0-9]+)", name.casefold())
    return [int(part) if i % 2 else part for i, part in enumerate(parts)], name


def stratified(
    labels: Rows,
    fraction: float,
    seed: int,
    stream: str,
    *,
    names: Sequence[str] | None = None,
    groups: Rows | None = None,
) -> tuple[Rows, Rows]:
    """Split rows into (kept, held out), both ascending, with the same proportion of every class.

    ceil(fraction * N) rows are held out if the classes allow it; every class keeps at least one row. stream: the name
    of the split ("val", "test"), so that two splits with the same seed are independent. names: one per row, whose hash
    decides which rows are held out; None to use the rows' indices. groups: a number per row; rows with the same number
    stay together, and fewer rows are held out where a group is larger than what is left to hold out of a class.
    """
    n = len(labels)
    keys = np.arange(n) if names is None else np.array([hash_text(x) >> 1 for x in names], dtype=np.int64)
    draw = uniform(fold(seed, "split"), 0, keys, stream, 1)[:, 0]
    classes, counts = np.unique(labels, return_counts=True)
    quotas = _quotas(counts, fraction)
    if groups is None:
        order = np.lexsort((draw, labels))  # by class, within it by draw, then by row
        place = np.arange(n) - np.repeat(np.cumsum(counts) - counts, counts)  # in its class
        out = np.sort(order[place < np.repeat(np.array(quotas, dtype=np.int64), counts)])
    else:
        held_out = _whole_groups(labels, groups, dict(zip(classes.tolist(), quotas, strict=True)), draw, keys)
        out = np.sort(np.concatenate(held_out)) if held_out else np.zeros(0, dtype=np.int64)
    return np.setdiff1d(np.arange(n, dtype=np.int64), out, assume_unique=True), out


def _whole_groups(
    labels: Rows, groups: Rows, quotas: dict[int, int], draw: npt.NDArray[np.float64], keys: Rows
) -> list[Rows]:
    """Groups, each the rows of one, in the order of their draws, as long as no class exceeds its quota.

    The draw of a group is that of its row with the smallest key, so that it does not depend on the order of the rows.
    """
    order = np.lexsort((keys, groups))
    members = np.split(order, np.flatnonzero(np.diff(groups[order])) + 1) if len(order) else []
    held_out = []
    for rows in sorted(members, key=lambda rows: float(draw[rows[0]])):
        counts = Counter(labels[rows].tolist())
        if all(count <= quotas[c] for c, count in counts.items()):
            for c, count in counts.items():
                quotas[c] -= count
            held_out.append(rows)
    return held_out


def _quotas(counts: npt.NDArray[np.int64], fraction: float) -> list[int]:
    """How many images of each class to hold out, by largest remainder: at least one of a class of three or more, and
    never all.
    """
    if not 0 <= fraction < 1:
        raise ValueError(f"the fraction held out must be in [0, 1), not {fraction}")
    if fraction == 0:
        return [0] * len(counts)
    exact = [float(c) * fraction for c in counts]
    quota = [min(max(math.floor(x), int(c >= 3)), int(c) - 1) for x, c in zip(exact, counts, strict=True)]
    # The tolerance keeps 0.1 * 30 = 3.0000000000000004 from being rounded up to 4.
    missing = math.ceil(math.fsum(exact) - 1e-9) - sum(quota)
    for c in sorted(range(len(counts)), key=lambda c: (quota[c] - exact[c], c)):
        if missing > 0 and quota[c] < counts[c] - 1 and quota[c] < math.ceil(exact[c]):
            quota[c] += 1
            missing -= 1
    return quota


def make_dataset(
    name: str,
    class_names: Sequence[str],
    splits: Mapping[str, S],
    options: SplitOptions,
    *,
    names_of: Callable[[S], list[str]] | None = None,
    skipped: list[SkippedImage] | None = None,
) -> Dataset:
    """A dataset from the given splits; val and test are held out of train if they are missing.

    names_of: a name for each image that decides whether it is held out, independent of where the data are stored;
    None to use the images' indices.
    """
    splits = {split: part for split, part in splits.items() if len(part)}
    given = len(splits)
    how_split = _hold_out_missing(splits, options, names_of)
    if options.group_duplicates and len(splits) == given:
        how_split += "; group_duplicates has no effect: no images were held out"
    found: dict[str, Split] = {split: splits[split] for split in SPLITS if split in splits}
    return Dataset(
        name,
        tuple(class_names),
        found,
        Sizes.of(np.concatenate([part.sizes for part in found.values() if part.sizes is not None])),
        how_split=how_split,
        held_out=len(splits) > given,
        skipped=skipped or [],
    )


def _hold_out_missing(splits: dict[str, S], options: SplitOptions, names_of: Callable[[S], list[str]] | None) -> str:
    """Hold out the missing splits of train, in place. Returns a description of where all splits come from."""
    given = [name for name in SPLITS if name in splits]
    notes = [f"{', '.join(given)}: the dataset's own"]
    if "train" not in splits or len(given) == len(SPLITS):
        return notes[0]
    if len(given) == 1:
        notes = []
    train = splits["train"]
    total, classes = len(train), len(np.unique(train.labels))
    too_few = total < MIN_FOR_TEST * classes
    groups: Rows | None = None
    copies = ""
    for split, fraction in (("test", options.test_fraction), ("val", options.val_fraction)):
        # With val/ given, the images are already split: no test images are taken out of train/.
        if split in given or fraction == 0 or (split == "test" and (too_few or "val" in given)):
            continue
        train = splits["train"]
        if options.group_duplicates and groups is None:
            groups, copies = _groups_of_copies(train)
        share = fraction * total / len(train)
        names = names_of(train) if names_of else None
        kept, held_out = stratified(train.labels, share, options.seed, split, names=names, groups=groups)
        groups = None if groups is None else groups[kept]
        if len(held_out):
            splits[split], splits["train"] = train.take(held_out), train.take(kept)
            notes.append(
                f"{split}: {len(held_out):,} of {total:,} images held out, stratified, split seed {options.seed}"
            )
    if copies:
        notes.append(copies)
    if too_few and len(given) == 1 and options.test_fraction:
        notes.append(f"no test split: fewer than {MIN_FOR_TEST} images per class")
    return "; ".join(notes) or "all images are in train"


def _groups_of_copies(train: Split) -> tuple[Rows, str]:
    """A number per image, the same for near duplicates, and how many there are."""
    from vitrail.data.duplicates.groups import group_copies  # imports torch

    groups = group_copies(train)
    _, sizes = np.unique(groups, return_counts=True)
    several = sizes[sizes > 1]
    return groups, f"near duplicates stay together: {several.sum()} images in {len(several)} groups"
