"""scikit-learn's digits: 1,797 scanned digits, 8 x 8, grey. Part of scikit-learn: nothing is downloaded."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from vitrail.data.dataset import ArraySplit
from vitrail.data.named import DatasetRow
from vitrail.data.splits import stratified
from vitrail.utils.download import Progress

TEST_SEED = 0  # fixed: the test split is part of the dataset


def open_digits(row: DatasetRow, data_dir: Path | None, progress: Progress | None) -> dict[str, ArraySplit]:
    """{"train", "test"}: test is a fixed, stratified fifth, 360 images. The 16 grey levels are scaled to 0..255."""
    from sklearn.datasets import load_digits  # slow to import

    bunch = load_digits()
    images = np.rint(bunch.images * (255 / 16)).astype(np.uint8)
    labels = bunch.target.astype(np.int64)
    rows = dict(zip(("train", "test"), stratified(labels, 0.2, TEST_SEED, "test"), strict=True))
    return {split: ArraySplit(images, labels, f"digits/{split}").take(rows[split]) for split in rows}
