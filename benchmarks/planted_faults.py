"""Photographs with faults of single images, planted in known ways, and what cleanvision finds in the same files."""

import contextlib
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageEnhance, ImageFilter

# Kinds of cleanvision, and the checks of `doctor` that are meant to find the same.
CHECKS = {
    "dark": "dark",
    "light": "bright",
    "odd_aspect_ratio": "odd_size",
    "odd_size": "odd_size",
    "low_information": "low_information",
    "blurry": "blurry",
    "grayscale": "low_information",
    "exact_duplicates": "exact_duplicate",
    "near_duplicates": "near_duplicate",
}


def _enlarged(image: Image.Image, factor: float) -> Image.Image:
    return image.resize((round(image.width * factor), round(image.height * factor)), Image.Resampling.BICUBIC)


def _recompressed(image: Image.Image) -> Image.Image:
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=70)
    return Image.open(stream).convert("RGB")


# One change for each kind; the last two keep the image that they copy.
FAULTS: dict[str, Callable[[Image.Image], Image.Image]] = {
    "dark": lambda image: image.point([round(0.08 * level) for level in range(256)] * 3),
    "light": lambda image: image.point([255 - round(0.06 * (255 - level)) for level in range(256)] * 3),
    "odd_aspect_ratio": lambda image: image.resize((6 * image.height, image.height // 2)),
    "odd_size": lambda image: _enlarged(image, 12),
    "low_information": lambda image: Image.new("RGB", image.size, image.getpixel((0, 0))),
    "blurry": lambda image: image.filter(ImageFilter.GaussianBlur(max(image.size) / 25)),
    "grayscale": lambda image: ImageEnhance.Color(image).enhance(0).convert("L"),
    "exact_duplicates": lambda image: image,
    "near_duplicates": _recompressed,
}


def plant(images: list[Image.Image], folder: Path, each: int) -> dict[str, set[str]]:
    """Write the images, in two classes, with `each` faults of each kind; their names by kind."""
    planted: dict[str, set[str]] = {kind: set() for kind in FAULTS}
    for c in range(2):
        (folder / f"class{c}").mkdir(parents=True)
    for i, image in enumerate(images):
        kind = list(FAULTS)[i // each] if i < each * len(FAULTS) else None
        copies = kind in ("exact_duplicates", "near_duplicates")
        if kind is None or copies:
            image.save(folder / f"class{i % 2}" / f"{i:04}.png")
        if kind is not None:
            path = folder / f"class{i % 2}" / f"{i:04}-{kind}.png"
            FAULTS[kind](image).save(path)
            planted[kind].add(path.name)
    return planted


def by_cleanvision(folder: Path) -> dict[str, set[str]]:
    """The names of the images that cleanvision finds, by kind."""
    from cleanvision import Imagelab

    with contextlib.redirect_stdout(io.StringIO()):
        lab = Imagelab(data_path=str(folder))
        lab.find_issues(n_jobs=1, verbose=False)
    issues = lab.issues
    return {kind: {Path(path).name for path in issues.index[issues[f"is_{kind}_issue"]]} for kind in CHECKS}


def by_doctor(folder: Path) -> dict[str, set[str]]:
    """The names of the images that `doctor` finds, by the kind of cleanvision."""
    from vitrail.diagnosis.doctor import doctor

    found: dict[str, set[str]] = {}
    for finding in doctor(folder, forecast_model="none").findings:
        names = {Path(path).name for group in finding.groups for path in group}
        found.setdefault(finding.check, set()).update(names)
    return {kind: found.get(check, set()) for kind, check in CHECKS.items()}


def agreement(images: list[Image.Image], folder: Path, each: int) -> dict[str, dict[str, Any]]:
    """By kind: how many of the planted images each finds, of all images that cleanvision finds how many `doctor` finds,
    and how many it finds besides. A check of `doctor` may stand for two kinds."""
    planted, theirs, ours = plant(images, folder, each), by_cleanvision(folder), by_doctor(folder)
    return {
        kind: {
            "planted": len(planted[kind]),
            "planted_found_by_cleanvision": len(planted[kind] & theirs[kind]),
            "planted_found": len(planted[kind] & ours[kind]),
            "cleanvision": len(theirs[kind]),
            "both": len(theirs[kind] & ours[kind]),
            "missed": sorted(theirs[kind] - ours[kind])[:10],
        }
        for kind in CHECKS
    }


def photographs(side: tuple[int, int] = (104, 124)) -> list[Image.Image]:
    """20 parts of each of scikit-learn's two photographs; the sky, of which parts are alike, is left out."""
    from sklearn.datasets import load_sample_image

    parts = []
    for name in ("china.jpg", "flower.jpg"):
        whole = np.asarray(load_sample_image(name))
        parts += [whole[y : y + side[0], x : x + side[1]] for y in range(108, 320, 105) for x in range(0, 500, 125)]
    return [Image.fromarray(part) for part in parts]
