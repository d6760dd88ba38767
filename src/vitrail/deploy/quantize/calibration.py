"""Images that a quantisation is calibrated with: of the training split, so that no check sees them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vitrail.data.dataset import Dataset
from vitrail.errors import DataError
from vitrail.images.convert import Pixels
from vitrail.images.decode import BadImage
from vitrail.images.preprocess import Preprocess
from vitrail.inference.engine import SplitReader

IMAGES = 300  # NNCF's own default
_SPLIT = "train"


@dataclass(frozen=True)
class Calibration:
    """`images` are uint8 H W C, cropped for the model; `paths` are their names, in the same order."""

    data: str
    split: str
    paths: tuple[str, ...]
    images: Sequence[Pixels]

    def to_dict(self) -> dict[str, Any]:
        """For export.json."""
        return {"data": self.data, "split": self.split, "images": len(self.paths), "paths": list(self.paths)}


def choose_calibration(dataset: Dataset, preprocess: Preprocess, count: int = IMAGES, seed: int = 0) -> Calibration:
    """`count` random images of the training split, or all if there are fewer. Unreadable ones are left out.

    Raises:
        DataError: the dataset has no training split, or none of the images could be read.
    """
    if _SPLIT not in dataset.splits:
        raise DataError(f"{dataset.name} has no training split, from which int8 is calibrated: name another --data")
    split = dataset.split(_SPLIT)
    read = SplitReader(split, preprocess)
    paths, images = [], []
    for row in np.random.default_rng(seed).permutation(len(split))[:count].tolist():
        try:
            images.append(read(row))
        except BadImage:
            continue
        paths.append(split.name(row))
    if not images:
        raise DataError(f"none of {min(count, len(split))} training images of {dataset.name} could be read")
    return Calibration(dataset.name, _SPLIT, tuple(paths), images)
