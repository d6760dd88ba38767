"""Images of objects in memory: the items (image, label) of a sequence or of a torch dataset.

Shapes: N images, H W height and width, C channels.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from vitrail.data.dataset import Labels, Weights
from vitrail.errors import DataTypeError
from vitrail.images.convert import BadImage, Pixels
from vitrail.images.decode import decode
from vitrail.images.tensors import is_tensor, tensor_pixels
from vitrail.utils.text import one_line


@dataclass
class ItemSplit:
    """Items (image, label) of a sequence or a torch dataset, read when needed, one at a time.

    rows: of the items. digests: of each image's pixels, as of when the data were opened. channels: 1 if all are grey.
    """

    items: Any
    rows: npt.NDArray[np.int64]
    labels: Labels
    sizes: npt.NDArray[np.int64]
    digests: list[str]
    prefix: str
    channels: int = 3
    weights: Weights | None = None
    lock: Any = field(default_factory=threading.Lock, repr=False, compare=False)  # a dataset may have one open file

    def __len__(self) -> int:
        return len(self.rows)

    def image(self, i: int, at_least: object = None) -> Image.Image:
        with self.lock:
            try:
                value = self.items[int(self.rows[i])][0]
            except Exception as error:  # of the user's code
                raise BadImage(f"could not be read: {one_line(error)}") from None
        return to_image(value)

    def name(self, i: int) -> str:
        return f"{self.prefix}/{self.rows[i]}"

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state | {"lock": threading.Lock()}

    def fingerprints(self) -> Iterator[str]:
        """A line per image that changes when its content does."""
        yield from self.digests

    def take(self, rows: npt.NDArray[np.int64]) -> ItemSplit:
        digests, weights = [self.digests[i] for i in rows], None if self.weights is None else self.weights[rows]
        return replace(
            self,
            rows=self.rows[rows],
            labels=self.labels[rows],
            sizes=self.sizes[rows],
            digests=digests,
            weights=weights,
        )


def to_image(value: Any) -> Image.Image:
    """The image of an item, "RGB" or "L". Raises BadImage, or DataTypeError for another type."""
    if is_tensor(value):
        (value,) = tensor_pixels(value[None] if value.ndim == 2 else value)
    if isinstance(value, np.ndarray):
        pixels: Pixels = value
        if (
            pixels.dtype != np.uint8
            or pixels.ndim not in (2, 3)
            or (pixels.ndim == 3 and pixels.shape[2] not in (1, 3, 4))
        ):
            raise DataTypeError(
                f"an item's image is an array of {pixels.dtype} {pixels.shape}: give uint8 H W or H W C"
            )
        value = Image.fromarray(pixels[..., 0] if pixels.ndim == 3 and pixels.shape[2] == 1 else pixels)
    if not isinstance(value, Image.Image):
        raise DataTypeError(
            f"an item's image is a {type(value).__name__}: give a Pillow image, a tensor C H W or an array H W C"
        )
    return decode(value, 1 if value.mode == "L" else 3)
