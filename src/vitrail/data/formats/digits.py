"""scikit-learn's digits: 1,797 scanned digits, 8 x 8, grey. Part of scikit-learn, so there is nothing to download."""

from __future__ import annotations

import numpy as np

from vitrail.data.dataset import ArraySplit, take
from vitrail.data.splits import stratified

TEST_SEED = 0  # the test split is part of the dataset: the same for everyone


def load_digits() -> dict[str, ArraySplit]:
    """{"train", "test"}: test is a fixed stratified fifth, 360 images. The sixteen grey levels are spread over
    0..255.
    """
    from sklearn.datasets import load_digits as read  # heavy, and only this dataset needs it

    bunch = read()
    images = np.rint(bunch.images * (255 / 16)).astype(np.uint8)
    everything = ArraySplit(images, bunch.target.astype(np.int64))
    train, test = stratified(everything.labels, 0.2, TEST_SEED, "test")
    parts = {"train": take(everything, train), "test": take(everything, test)}
    for name, part in parts.items():
        part.prefix = f"digits/{name}"
    return parts
