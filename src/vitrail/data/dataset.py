"""Datasets: named splits of (image, label) with class names.

Shapes: N images, H height, W width, C channels.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, Self

import numpy as np
import numpy.typing as npt

from vitrail.errors import DataError, did_you_mean
from vitrail.images.convert import Pixels, to_channels
from vitrail.images.decode import AtLeast, decode

if TYPE_CHECKING:
    from PIL import Image

Labels = npt.NDArray[np.int64]
Weights = npt.NDArray[np.float64]
Resize = Callable[[int, int], tuple[int, int]]  # (height, width) before and after
SkippedImage = dict[str, str]  # {"path", "reason"}
Data = Any  # what `open_dataset` takes: a path or name, a frame, a torch dataset, ..., or a Dataset


class Split(Protocol):
    """Images and labels. Each implementation is a dataclass.

    labels: int64 (N,). weights: float64 (N,), of each image in the loss, or None for 1. sizes: int64 (N, 2), heights
    and widths, or None if unknown.
    """

    labels: Labels
    weights: Weights | None

    def __len__(self) -> int: ...

    @property
    def sizes(self) -> npt.NDArray[np.int64] | None: ...

    def image(self, i: int, at_least: AtLeast | None = None) -> Image.Image:
        """Image i, "RGB" or "L". at_least: see `decode`. Raises BadImage."""
        ...

    def name(self, i: int) -> str:
        """A path, or a name such as "digits/test/17"."""
        ...

    def take(self, rows: npt.NDArray[np.int64]) -> Self:
        """A subset, in the order of `rows`."""
        ...


def decode_reduced(split: Split, row: int, channels: int, at_least: Resize) -> tuple[Image.Image, tuple[int, int]]:
    """Image `row`, at a reduced size if it is a JPEG and `at_least` allows it, and its full (height, width)."""
    full: list[tuple[int, int]] = []

    def needed(height: int, width: int) -> tuple[int, int]:
        full.append((height, width))
        return at_least(height, width)

    image = to_channels(split.image(row, needed), channels)
    return image, full[0] if full else (image.height, image.width)


@dataclass
class ArraySplit:
    """Images of one size in memory: uint8 N H W (grey) or N H W C."""

    images: Pixels
    labels: Labels
    prefix: str = "image"
    indices: npt.NDArray[np.int64] | None = None  # of a subset in the full split, used in names; None: all images
    weights: Weights | None = None

    def __post_init__(self) -> None:
        if self.images.dtype != np.uint8 or self.images.ndim not in (3, 4):
            raise ValueError(f"images must be uint8 N H W or N H W C, not {self.images.dtype} {self.images.shape}")
        if len(self.images) != len(self.labels):
            raise ValueError(f"{len(self.images)} images with {len(self.labels)} labels")
        self.labels = np.asarray(self.labels, dtype=np.int64)

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def channels(self) -> int:
        return 1 if self.images.ndim == 3 else int(self.images.shape[3])

    @property
    def sizes(self) -> npt.NDArray[np.int64]:
        return np.tile(np.array(self.images.shape[1:3], dtype=np.int64), (len(self), 1))

    def image(self, i: int, at_least: AtLeast | None = None) -> Image.Image:
        from PIL import Image

        images = self.images[..., 0] if self.images.ndim == 4 and self.channels == 1 else self.images
        return Image.fromarray(images[i])

    def name(self, i: int) -> str:
        return f"{self.prefix}/{i if self.indices is None else self.indices[i]}"

    def take(self, rows: npt.NDArray[np.int64]) -> ArraySplit:
        indices = rows if self.indices is None else self.indices[rows]
        images = self.images
        if images.ndim == 4:  # keep C first in memory, the layout of batches and of CIFAR's files
            images = np.ascontiguousarray(images.transpose(0, 3, 1, 2)[rows]).transpose(0, 2, 3, 1)
        else:
            images = images[rows]
        return ArraySplit(images, self.labels[rows], self.prefix, indices, _of_rows(self.weights, rows))


def _of_rows(values: npt.NDArray[Any] | None, rows: npt.NDArray[np.int64]) -> Any:
    return None if values is None else values[rows]


class EncodedSplit:
    """A split of encoded images, decoded to RGB on access."""

    labels: Labels
    weights: Weights | None = None
    sizes: npt.NDArray[np.int64] | None

    def __len__(self) -> int:
        return len(self.labels)

    def image(self, i: int, at_least: AtLeast | None = None) -> Image.Image:
        return decode(self.encoded(i), at_least=at_least)

    def encoded(self, i: int) -> str | bytes:
        """The path or content of image i. Raises BadImage."""
        raise NotImplementedError

    def fingerprints(self) -> Iterator[str]:
        """A line per image that changes when its content does."""
        raise NotImplementedError

    def stats(self) -> npt.NDArray[np.int64]:
        """(N, 2): the length of each image's content in bytes, and the time in ns at which its file was changed; -1 if
        unknown.
        """
        raise NotImplementedError


@dataclass
class FileSplit(EncodedSplit):
    """Image files."""

    paths: list[str]
    labels: Labels
    sizes: npt.NDArray[np.int64] | None = None
    weights: Weights | None = None

    def __post_init__(self) -> None:
        if len(self.paths) != len(self.labels):
            raise ValueError(f"{len(self.paths)} paths with {len(self.labels)} labels")
        self.labels = np.asarray(self.labels, dtype=np.int64)

    def encoded(self, i: int) -> str:
        return self.paths[i]

    def name(self, i: int) -> str:
        return self.paths[i]

    def fingerprints(self) -> Iterator[str]:
        for path in self.paths:
            yield f"{os.path.abspath(path)}\t{file_fingerprint(path)}"

    def stats(self) -> npt.NDArray[np.int64]:
        return np.array([_stat(path) for path in self.paths], dtype=np.int64).reshape(-1, 2)

    def take(self, rows: npt.NDArray[np.int64]) -> FileSplit:
        paths = [self.paths[i] for i in rows]
        return FileSplit(paths, self.labels[rows], _of_rows(self.sizes, rows), _of_rows(self.weights, rows))


def _stat(path: str) -> tuple[int, int]:
    try:
        status = os.stat(path)
    except OSError:
        return -1, -1
    return status.st_size, status.st_mtime_ns


def file_fingerprint(path: str) -> str:
    """A file's size and modification time; "" if it cannot be read."""
    try:
        status = os.stat(path)
    except OSError:
        return ""
    return f"{status.st_size}\t{status.st_mtime_ns}"


@dataclass(frozen=True)
class Sizes:
    """Statistics of image sizes. Sizes are (height, width); aspect is width / height at the 5th, 50th and 95th
    percentile.
    """

    count: int
    median: tuple[int, int]
    smallest: tuple[int, int]
    largest: tuple[int, int]
    aspect: tuple[float, float, float]
    aspects: tuple[tuple[float, int], ...] = ()  # (width / height to three digits, images), ascending

    def losing(self, aspect: float, share: float) -> float:
        """The share of the images, 0 to 1, of which a center crop of this aspect cuts off at least `share`."""
        lost = [count for own, count in self.aspects if 1 - min(own / aspect, aspect / own) >= share]
        return sum(lost) / self.count

    @classmethod
    def of(cls, sizes: npt.NDArray[np.int64]) -> Sizes:
        """From an (N, 2) array of (height, width), N > 0. Smallest and largest are by area."""
        area = sizes.prod(axis=1)
        smallest, largest = sizes[area.argmin()], sizes[area.argmax()]
        median = np.median(sizes, axis=0)
        ratios = sizes[:, 1] / sizes[:, 0]
        aspect = np.percentile(ratios, [5, 50, 95])
        values, counts = np.unique([float(f"{ratio:.3g}") for ratio in ratios], return_counts=True)
        return cls(
            count=len(sizes),
            median=(round(float(median[0])), round(float(median[1]))),
            smallest=(int(smallest[0]), int(smallest[1])),
            largest=(int(largest[0]), int(largest[1])),
            aspect=(float(aspect[0]), float(aspect[1]), float(aspect[2])),
            aspects=tuple(zip(values.tolist(), counts.tolist(), strict=True)),
        )

    @property
    def uniform(self) -> bool:
        """Whether all images have the same size."""
        return self.smallest == self.largest


@dataclass
class Dataset:
    """What a model is trained and evaluated on.

    mean, std: one per channel, for pixels scaled to 0..1; None means ImageNet's. skipped: files that were left out,
    each {"path", "reason"}. how_split: a description of where the splits come from. held_out: whether val or test were
    held out of train, so that they change when images are added.
    """

    name: str
    class_names: tuple[str, ...]
    splits: dict[str, Split]
    sizes: Sizes
    channels: int = 3
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    how_split: str = ""
    held_out: bool = False
    skipped: list[SkippedImage] = field(default_factory=list)

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    def eval_split(self) -> str:
        """The split whose results are reported: "test" if there is one, else "val", else the first."""
        return next((name for name in ("test", "val") if name in self.splits), next(iter(self.splits)))

    def split(self, name: str) -> Split:
        """A split by name. Raises DataError if the dataset has none of that name."""
        if name not in self.splits:
            raise DataError(f"{self.name} has no {name!r} split; it has {', '.join(self.splits)}")
        return self.splits[name]

    def counts(self) -> dict[str, int]:
        """Number of images in each split."""
        return {name: len(split) for name, split in self.splits.items()}

    def relabel(self, class_names: Sequence[str]) -> Dataset:
        """The same images with labels that index `class_names`, a model's classes; classes are matched by name.

        Raises DataError if the dataset has a class that is not in `class_names`.
        """
        if tuple(class_names) == self.class_names:
            return self
        position = {name: i for i, name in enumerate(class_names)}
        for name in self.class_names:
            if name not in position:
                raise DataError(
                    f"{self.name} has the class {name!r}, which the model does not have{did_you_mean(name, position)}"
                )
        new_label = np.array([position[name] for name in self.class_names], dtype=np.int64)
        splits: dict[str, Split] = {}
        for name, split in self.splits.items():
            any_dataclass: Any = split
            splits[name] = dataclasses.replace(any_dataclass, labels=new_label[split.labels])
        return dataclasses.replace(self, class_names=tuple(class_names), splits=splits)
