"""Images of which it is known which pixels decide: an object of 32 px in clutter, whose pattern alone tells the class.

An image is a crop of a photograph with rectangles, ellipses and lines on it, two tiles of the object's size that belong
to no class (plain, shaded or noise), and the object: a tile with one of eight patterns in two random colours. Place,
colours, period and phase say nothing about the class. A ninth class of training images has no object; without it, a
model may tell one pattern by the absence of the other seven, and then no pixel is evidence of it. Training and test
images have different photographs. An image depends on (seed, index) alone. With decoys, the two other tiles have
patterns too, which belong to no class and are in no training image.

Shapes: N images, S side of an image (the model sees its central INPUT pixels).
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import skimage.data
from PIL import Image, ImageDraw
from sklearn.datasets import load_sample_image

from vitrail.data.dataset import ArraySplit, Dataset, Sizes, Split

INPUT = 96  # side of the model's input
SIDE = int(INPUT / 0.95)  # of which 95 %, the central 96 pixels, are evaluated
OBJECT = 32
_LEFT = round((SIDE - INPUT) / 2)  # and top, of these pixels
CENTRE = slice(_LEFT, _LEFT + INPUT)

Pixels = npt.NDArray[np.uint8]
Grid = npt.NDArray[np.float64]
Pattern = Callable[[Grid, Grid, float], npt.NDArray[np.bool_]]
PATTERNS: dict[str, Pattern] = {  # of x, y from the centre, and the period
    "horizontal": lambda x, y, p: y % p < p / 2,
    "vertical": lambda x, y, p: x % p < p / 2,
    "rising": lambda x, y, p: (x + y) / 2**0.5 % p < p / 2,
    "falling": lambda x, y, p: (x - y) / 2**0.5 % p < p / 2,
    "checks": lambda x, y, p: (x % p < p / 2) ^ (y % p < p / 2),
    "dots": lambda x, y, p: (x % p - p / 2) ** 2 + (y % p - p / 2) ** 2 < p**2 / 7,
    "rings": lambda x, y, p: np.hypot(x, y) % p < p / 2,
    "chevrons": lambda x, y, p: (y + np.abs(x)) / 2**0.5 % p < p / 2,
}
DECOYS: dict[str, Pattern] = {
    "squares": lambda x, y, p: np.maximum(np.abs(x), np.abs(y)) % p < p / 2,
    "grid": lambda x, y, p: (np.abs(x % p - p / 2) < p / 8) | (np.abs(y % p - p / 2) < p / 8),
    "diamonds": lambda x, y, p: np.abs(x % p - p / 2) + np.abs(y % p - p / 2) < p / 2.6,
    "waves": lambda x, y, p: (y + 1.5 * np.sin(2 * np.pi * x / p)) % p < p / 2,
    "bricks": lambda x, y, p: (y % p >= 1.5) & ((x + y // p % 2 * p / 2) % p >= 1.5),
    "rays": lambda x, y, p: np.arctan2(y, x) % (np.pi / 4) < np.pi / 8,
}
NOTHING = len(PATTERNS)  # the class of images without an object
CLASSES = (*PATTERNS, "nothing")
PHOTOGRAPHS = {
    "train": ("china.jpg", "astronaut", "coffee", "brick", "grass", "coins"),
    "test": ("flower.jpg", "chelsea", "rocket", "camera", "gravel", "hubble_deep_field"),
}


@dataclass
class Planted:
    """images: uint8 N S S 3. labels: int64 N objects, the class of each. boxes: int64 N objects 4: left, top, right and
    bottom, the last two exclusive; zeros where there is no object."""

    images: Pixels
    labels: npt.NDArray[np.int64]
    boxes: npt.NDArray[np.int64]

    def take(self, rows: npt.NDArray[Any]) -> "Planted":
        """Some of the images, by their numbers or by a mask."""
        return Planted(self.images[rows], self.labels[rows], self.boxes[rows])

    def inside(self) -> npt.NDArray[np.bool_]:
        """bool N objects S S: whether a pixel is in the object."""
        at = np.arange(self.images.shape[1])
        left, top, right, bottom = np.moveaxis(self.boxes[..., None], 2, 0)
        return ((at >= top) & (at < bottom))[..., :, None] & ((at >= left) & (at < right))[..., None, :]


def planted_images(
    count: int, *, seed: int, photographs: str = "test", objects: int = 1, empty: float = 0.0, decoys: bool = False
) -> Planted:
    """`count` images with `objects` objects of different classes, which do not touch; a share `empty` has none."""
    images = np.empty((count, SIDE, SIDE, 3), np.uint8)
    labels, boxes = np.empty((count, objects), np.int64), np.empty((count, objects, 4), np.int64)
    for index in range(count):
        rng = np.random.default_rng((seed, index))
        image = _clutter(rng, _photographs(photographs))
        places = _places(rng, objects + 2)
        for place in places[objects:]:
            image.paste(Image.fromarray(_decoy(rng) if decoys else _other_tile(rng)), tuple(place))
        labels[index], boxes[index] = NOTHING, 0
        if rng.random() >= empty:
            labels[index] = rng.permutation(len(PATTERNS))[:objects]
            boxes[index] = np.hstack([places[:objects], places[:objects] + OBJECT])
            for label, place in zip(labels[index], places, strict=False):
                image.paste(Image.fromarray(_object(rng, PATTERNS[CLASSES[label]])), tuple(place))
        noisy = np.asarray(image) + rng.normal(0, 6, (SIDE, SIDE, 3))
        images[index] = noisy.clip(0, 255).astype(np.uint8)
    return Planted(images, labels, boxes)


def planted_dataset(train: int, *, seed: int, val: int = 500, test: int = 1000) -> Dataset:
    """A dataset of images with one object, or in a ninth of them none."""
    empty = 1 / len(CLASSES)
    parts = {
        "train": planted_images(train, seed=seed, photographs="train", empty=empty),
        "val": planted_images(val, seed=seed + 1, photographs="train", empty=empty),
        "test": planted_images(test, seed=seed + 2, photographs="test", empty=empty),
    }
    splits: dict[str, Split] = {
        name: ArraySplit(part.images, part.labels[:, 0], f"planted/{name}") for name, part in parts.items()
    }
    return Dataset("planted", CLASSES, splits, Sizes.of(np.array([[SIDE, SIDE]])))


@cache
def _photographs(part: str) -> list[Image.Image]:
    pictures = (
        load_sample_image(name) if name.endswith(".jpg") else getattr(skimage.data, name)()
        for name in PHOTOGRAPHS[part]
    )
    return [Image.fromarray(np.ascontiguousarray(picture)).convert("RGB") for picture in pictures]


def _clutter(rng: np.random.Generator, photographs: list[Image.Image]) -> Image.Image:
    """A crop of a photograph, scaled and perhaps mirrored, with shapes in random colours."""
    photograph = photographs[rng.integers(len(photographs))]
    side = int(rng.integers(SIDE, min(photograph.size) + 1))
    left, top = (int(rng.integers(0, length - side + 1)) for length in photograph.size)
    image = photograph.resize((SIDE, SIDE), Image.Resampling.BILINEAR, (left, top, left + side, top + side))
    if rng.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    draw = ImageDraw.Draw(image)
    for _ in range(8):
        x, y = (sorted(int(value) for value in rng.integers(0, SIDE, 2)) for _ in range(2))
        color = tuple(int(value) for value in rng.integers(0, 256, 3))
        box = (x[0], y[0], min(x[1], x[0] + 36), min(y[1], y[0] + 36))
        match rng.integers(4):
            case 0:
                draw.rectangle(box, fill=color)
            case 1:
                draw.ellipse(box, fill=color)
            case 2:
                draw.rectangle(box, outline=color, width=3)
            case _:
                draw.line((x[0], *y, x[1])[:: 1 if rng.random() < 0.5 else -1], fill=color, width=3)
    return image


def _places(rng: np.random.Generator, count: int) -> npt.NDArray[np.int64]:
    """Left and top of tiles that do not touch, in what the model sees; int64 count 2."""
    while True:
        places = rng.integers(_LEFT, _LEFT + INPUT - OBJECT + 1, (count, 2))
        apart = np.abs(places[:, None] - places[None]).max(axis=2) >= OBJECT + 2
        if (apart | np.eye(count, dtype=bool)).all():
            return places


def _colors(rng: np.random.Generator) -> npt.NDArray[np.float64]:
    """Two colours whose brightness differs by at least 80 of 255; 2 3."""
    while True:
        colors = rng.uniform(0, 255, (2, 3))
        if abs(np.subtract(*(colors @ (0.299, 0.587, 0.114)))) >= 80:
            return colors


def _object(rng: np.random.Generator, pattern: Pattern) -> Pixels:
    """A tile with a pattern; 32 32 3."""
    centre = OBJECT / 2 + rng.uniform(-4, 4, 2)
    y, x = np.mgrid[:OBJECT, :OBJECT] - centre[:, None, None]
    mask = pattern(x, y, rng.uniform(7, 11))
    return _colors(rng)[mask.astype(int)].astype(np.uint8)


def _decoy(rng: np.random.Generator) -> Pixels:
    return _object(rng, list(DECOYS.values())[rng.integers(len(DECOYS))])


def _other_tile(rng: np.random.Generator) -> Pixels:
    """A tile of no class: one colour, a gradient, or noise in squares of 4 px; 32 32 3."""
    one, other = _colors(rng)
    match rng.integers(3):
        case 0:
            share = np.zeros((OBJECT, OBJECT))
        case 1:
            share = np.tile(np.linspace(0, 1, OBJECT), (OBJECT, 1))
            share = share.T if rng.random() < 0.5 else share
        case _:
            share = np.kron(rng.random((OBJECT // 4, OBJECT // 4)), np.ones((4, 4)))
    tile: Pixels = (one + share[..., None] * (other - one)).astype(np.uint8)
    return tile


def main() -> None:
    parser = argparse.ArgumentParser(description="Write images with planted evidence as PNG files, to look at.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--count", type=int, default=8)
    parser.add_argument("--objects", type=int, default=1, help="objects of different classes in an image")
    parser.add_argument("--seed", type=int, default=1_000)
    parser.add_argument("--decoys", action="store_true", help="the other tiles have patterns of no class")
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    found = planted_images(arguments.count, seed=arguments.seed, objects=arguments.objects, decoys=arguments.decoys)
    for number, (image, labels) in enumerate(zip(found.images, found.labels, strict=True)):
        names = "-".join(CLASSES[label] for label in labels)
        Image.fromarray(image).save(arguments.folder / f"{number:03d}-{names}.png")


if __name__ == "__main__":
    main()
