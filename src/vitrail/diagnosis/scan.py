"""One pass over all images: each is read and decoded once, on threads, and only small arrays of it are kept.

Statistics are those of the image at about the size at which a model sees it, see `shrink`.
Shapes: N readable images, H W height and width.
"""

from __future__ import annotations

import io
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageChops
from scipy import ndimage

from vitrail.data.dataset import Dataset, Split
from vitrail.data.duplicates.views import colours, read_each, read_reduced, shrink, thumbnail
from vitrail.errors import DataError
from vitrail.images.convert import Pixels, to_channels
from vitrail.images.decode import read_header
from vitrail.inference.engine import default_workers

BLUR_SIDE = 48  # pixels: shorter side below which sharpness is not measured
_ANIMATED = ("GIF", "PNG", "WEBP", "AVIF")
_MARKED = ("JPEG", "PNG", "WEBP")  # formats whose files end with a marker

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Facts:
    """What is kept of an image.

    digest: of the content of the file, else of the pixels. dark, bright: the 99th and the 5th percentile of grey, 0 to
    1. entropy: of the grey histogram, bits. blur: 0 to 1, see `blur_effect`; NaN for a small image. chroma: the largest
    difference of two channels, in levels. odd: what is suspicious about the file, or "".
    """

    digest: bytes
    size: tuple[int, int]
    thumb: Pixels
    colour: Pixels
    dark: float
    bright: float
    entropy: float
    blur: float
    chroma: float
    odd: str


@dataclass
class Scan:
    """The readable images of all splits; N rows, in the order of the splits.

    splits: index into `split_names`. rows: index in the split. labels: index into the dataset's class names. sizes:
    N 2, height and width. thumbs: uint8 N 64 64, grey. colours: uint8 N 8 8 3. dark, bright, entropy, blur, chroma: see
    `Facts`. odd: {row: reason}. unreadable: {"path", "reason"} of every other file.
    """

    dataset: Dataset
    split_names: tuple[str, ...]
    splits: npt.NDArray[np.int64]
    rows: npt.NDArray[np.int64]
    labels: npt.NDArray[np.int64]
    digests: list[bytes]
    sizes: npt.NDArray[np.int64]
    thumbs: Pixels
    colours: Pixels
    dark: Floats
    bright: Floats
    entropy: Floats
    blur: Floats
    chroma: Floats
    odd: dict[int, str] = field(default_factory=dict)
    unreadable: list[dict[str, str]] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.labels)

    def home(self, i: int) -> str:
        """The split that image i has in the data: "train" if its split was held out of the training images."""
        name = self.split_names[self.splits[i]]
        return "train" if re.search(rf"\b{name}: \d+ of \d+ images held out", self.dataset.how_split) else name

    def path(self, i: int) -> str:
        """The path or name of image i."""
        return self.split(i).name(int(self.rows[i]))

    def split(self, i: int) -> Split:
        """The split of image i."""
        return self.dataset.splits[self.split_names[self.splits[i]]]

    def image(self, i: int, at_least: tuple[int, int] | None = None) -> Image.Image:
        """Image i, RGB. Raises BadImage."""
        return to_channels(self.split(i).image(int(self.rows[i]), at_least), 3)

    def label(self, i: int) -> str:
        """The class name of image i."""
        return self.dataset.class_names[int(self.labels[i])]


def scan_images(dataset: Dataset, on_images: Callable[[int], None] | None = None) -> Scan:
    """Read every image. on_images is called with the number of images just read.

    Raises:
        DataError: no image can be read.
    """
    names = tuple(dataset.splits)
    unreadable = [dict(each) for each in dataset.skipped]
    kept: list[tuple[int, int]] = []
    facts: list[Facts] = []
    for (name, row), found in read_each(dataset.splits, read_facts, default_workers(), on_images):
        if isinstance(found, str):
            unreadable.append({"path": dataset.splits[name].name(row), "reason": found})
        else:
            kept.append((names.index(name), row))
            facts.append(found)
    if not facts:
        why = f": {unreadable[0]['path']} {unreadable[0]['reason']}" if unreadable else ""
        raise DataError(f"none of the images of {dataset.name} could be read{why}")
    where = np.array(kept, dtype=np.int64)
    labels = [int(dataset.splits[names[s]].labels[row]) for s, row in kept]

    def column(name: str) -> Floats:
        return np.array([getattr(each, name) for each in facts], dtype=np.float32)

    return Scan(
        dataset=dataset,
        split_names=names,
        splits=where[:, 0],
        rows=where[:, 1],
        labels=np.array(labels, dtype=np.int64),
        digests=[each.digest for each in facts],
        sizes=np.array([each.size for each in facts], dtype=np.int64),
        thumbs=np.stack([each.thumb for each in facts]),
        colours=np.stack([each.colour for each in facts]),
        dark=column("dark"),
        bright=column("bright"),
        entropy=column("entropy"),
        blur=column("blur"),
        chroma=column("chroma"),
        odd={i: each.odd for i, each in enumerate(facts) if each.odd},
        unreadable=unreadable,
    )


def read_facts(split: Split, row: int) -> Facts:
    """Read image `row` of a split. Raises BadImage."""
    decoded = read_reduced(split, row)
    odd = "" if decoded.content is None else suspicion(split.name(row), decoded.content)
    return measure(decoded.image, decoded.digest(), decoded.size, odd)


def suspicion(name: str, content: bytes) -> str:
    """What is suspicious about a file that can be decoded: another format than its name says, an animation of which
    only the first frame is used, or a missing end; "" if nothing is."""
    with Image.open(io.BytesIO(content)) as image:
        kind = "JPEG" if image.format == "MPO" else image.format or ""
        animated = kind in _ANIMATED and bool(getattr(image, "is_animated", False))
        integers = image.mode.startswith("I") or image.mode == "F"
    suffix = os.path.splitext(name)[1].lower()
    expected = Image.registered_extensions().get(suffix, kind)
    if expected not in (kind, "MPO"):
        return f"contains a {kind} image, although its name ends in {suffix}"
    if animated:
        return "is an animation, of which only the first frame is used"
    if kind in _MARKED and not integers and read_header(content).may_fail:
        return "has no end-of-file marker: it may be truncated"
    return ""


def measure(image: Image.Image, digest: bytes, size: tuple[int, int], odd: str = "") -> Facts:
    """The facts of a decoded RGB image. size: height and width of the full image."""
    small = shrink(image)
    grey = small.convert("L")
    histogram = np.array(grey.histogram(), dtype=np.float64)
    share = np.cumsum(histogram) / histogram.sum()
    used = histogram[histogram > 0] / histogram.sum()
    red, green, blue = small.split()
    lightest, darkest = (choose(choose(red, green), blue) for choose in (ImageChops.lighter, ImageChops.darker))
    spread = ImageChops.subtract(lightest, darkest)  # 0 in a grey image
    return Facts(
        digest=digest,
        size=size,
        thumb=thumbnail(grey),
        colour=colours(small),
        dark=float(np.searchsorted(share, 0.99)) / 255,
        bright=float(np.searchsorted(share, 0.05)) / 255,
        entropy=float(-(used * np.log2(used)).sum()),
        blur=blur_effect(np.asarray(grey)) if min(grey.size) >= BLUR_SIDE else float("nan"),
        chroma=float(np.asarray(spread).max()),
        odd=odd,
    )


def blur_effect(grey: npt.NDArray[np.uint8], length: int = 11) -> float:
    """How little an image H W changes if it is blurred once more: 0 (sharp) to 1 (blurred).

    Crete et al., "The blur effect: perception and estimation with a new no-reference perceptual blur metric", 2007.
    An image of one colour counts as 0: it has no edges that could be blurred.
    """
    values = grey.astype(np.float32) / 255
    worst = 0.0
    for axis in (0, 1):
        sharp = np.abs(ndimage.sobel(values, axis=axis)) / 4
        smooth = np.abs(ndimage.sobel(ndimage.uniform_filter1d(values, length, axis=axis), axis=axis)) / 4
        inner = (slice(2, -1), slice(2, -1))
        total = float(sharp[inner].sum(dtype=np.float64))
        lost = float(np.maximum(0, sharp - smooth)[inner].sum(dtype=np.float64))
        worst = max(worst, 1 - lost / total) if total > 1e-6 else worst
    return worst
