"""The evaluation crops of a split, in order, and the images that could not be read."""

from typing import Any

import numpy as np
import numpy.typing as npt

from vitrail.data.dataset import Split
from vitrail.images.decode import BadImage
from vitrail.images.preprocess import Preprocess
from vitrail.inference.engine import SplitReader


def read_crops(split: Split, preprocess: Preprocess, read: Any = None) -> tuple[npt.NDArray[np.uint8], dict[str, str]]:
    """uint8 N H W C of the readable images, and the reasons of the others by path."""
    reader, found, skipped = SplitReader(split, preprocess, read), [], {}
    for row in range(len(split)):
        try:
            found.append(reader(row))
        except BadImage as bad:
            skipped[split.name(row)] = bad.reason
    return np.stack(found), skipped
