"""Explanation: a map with its target, score and pictures; it shows itself in a notebook and saves itself.

Shapes: h w height and width of a map, H W of the original image.
"""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from vitrail.explanation.colors import Values
from vitrail.explanation.rendering import Box, Size, encode_png, enlarged, grid, heat_picture, place, with_caption
from vitrail.utils.files import atomic_write_bytes, disk_errors

if TYPE_CHECKING:
    from vitrail.explanation.faithfulness import Faithfulness
    from vitrail.prediction import Score

_NAME_BYTES = 120  # of a file name, without its number and suffix
NOT_CLASS_SPECIFIC = "not class-specific: the map is the same for every class"


@dataclass(frozen=True)
class Unreadable:
    """An image that could not be read, and why. path: None for an image in memory."""

    path: str | None
    error: str

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        return {"path": self.path, "error": self.error}


@dataclass(frozen=True)
class Saved:
    """The files of an explanation: the heatmap as .npy, float32 H W, and the picture as .png."""

    heatmap: Path
    picture: Path


@dataclass(frozen=True)
class Explanation:
    """Which pixels of an image decided.

    path: None for an image in memory. method: its name in `METHODS`. target: a label, or "cat:dog" for a pair; None if
    the model has no classes. score: the probability of the target, 0 to 1, or for a pair the difference of the two
    logits. top: the most probable classes. values: the map on the model's input, float32 h w. box: what the input shows
    of the original. size: H W. picture: the upright original, reduced to at most 1,024 pixels. faithfulness: None
    unless it was measured. class_specific, reference: of the method, see `Method`. signed: whether values may be
    below 0, evidence against the target. parts: a map for each attention head, heads h w, if all were asked for.
    """

    path: str | None
    method: str
    target: str | None
    is_pair: bool
    score: float | None
    top: tuple[Score, ...]
    values: Values
    input_size: Size
    box: Box
    size: Size
    picture: Image.Image
    faithfulness: Faithfulness | None = None
    class_specific: bool = True
    signed: bool = False
    reference: str = ""
    parts: Values | None = None

    def __repr__(self) -> str:
        return f"Explanation({self.path or 'image in memory'}: {'; '.join(self.caption())})"

    @property
    def grid(self) -> tuple[int, int]:
        """Height and width of the map, in its own cells."""
        height, width = self.values.shape
        return height, width

    @property
    def heatmap(self) -> Values:
        """The map in the coordinates of the upright original image, float32 H W, on the method's own scale; 0 where the
        model did not see the image."""
        return place(self.values, self.input_size, self.box, self.size)

    def heat(self, size: Size, values: Values | None = None) -> Image.Image:
        """The map in colour, transparent where it is weak: RGBA of `size` to lay over the image. values: another map,
        h w."""
        across = size[0] / self.size[0], size[1] / self.size[1]
        top, left, bottom, right = self.box
        box = (top * across[0], left * across[1], bottom * across[0], right * across[1])
        return heat_picture(self.values if values is None else values, self.input_size, box, size, self.signed)

    def overlay(self, opacity: float = 0.7, values: Values | None = None) -> Image.Image:
        """The image with the map over it, RGB. opacity: 0 to 1, of the strongest values. values: another map, h w."""
        image = enlarged(self.picture)
        heat = self.heat((image.height, image.width), values)
        alpha = heat.getchannel("A").point(lambda value: round(value * opacity))
        return Image.composite(heat.convert("RGB"), image, alpha)

    def caption(self) -> list[str]:
        """Lines of text that belong to the picture: what it explains, and how faithful it is."""
        lines = [" · ".join([self.method, *([self.score_text()] if self.target is not None else [])])]
        if self.faithfulness is not None:
            lines.append(faithfulness_text(self.faithfulness))
        if not self.class_specific:
            lines.append(NOT_CLASS_SPECIFIC)
        if self.is_against:
            lines.append(f"what is marked speaks against {self.target}")
        return lines

    @property
    def is_against(self) -> bool:
        """Whether the map is of evidence against the target alone. A map of zeros is not, nor is that of a pair."""
        return self.target is not None and not self.is_pair and bool(self.values.min() < 0 >= self.values.max())

    def score_text(self) -> str:
        """Target and score: "cat, probability 97.3 %" or "cat:dog, logit difference +2.10"."""
        if self.is_pair:
            return f"{self.target}, logit difference {self.score:+.2f}"
        return f"{self.target}, probability {100 * (self.score or 0):.1f} %"

    def heads_picture(self) -> Image.Image:
        """The overlay of every head, in a grid. Only with `parts`."""
        assert self.parts is not None
        heads = range(len(self.parts))
        return grid([self.overlay(values=self.parts[head]) for head in heads], [f"head {head}" for head in heads])

    def annotated(self) -> Image.Image:
        """The overlay, or those of every head, with a caption below."""
        return with_caption(self.overlay() if self.parts is None else self.heads_picture(), self.caption())

    def _repr_png_(self) -> bytes:
        return encode_png(self.annotated())

    def save(self, folder: str | Path) -> Saved:
        """Write heatmap and picture into a folder, under the image's name, the method's and the target's. No file is
        overwritten: a name that is taken gets a number.

        Raises:
            RunError: the disk is full, read-only or forbidden.
        """
        stem = Path(self.path).stem if self.path is not None else "image"
        name = file_name(stem, self.method, *([self.target] if self.target and self.class_specific else []))
        array = io.BytesIO()
        np.save(array, self.heatmap)
        heatmap, picture = write_new(folder, name, {".npy": array.getvalue(), ".png": self._repr_png_()})
        return Saved(heatmap, picture)

    def to_dict(self, saved: Saved | None = None) -> dict[str, Any]:
        """Plain JSON. saved: the files of `save`; their paths are null without it."""
        return {
            "path": self.path,
            "method": self.method,
            "target": self.target,
            "score": self.score,
            "is_against": self.is_against,
            "grid": list(self.grid),
            "heatmap": saved and str(saved.heatmap),
            "picture": saved and str(saved.picture),
            "faithfulness": self.faithfulness and asdict(self.faithfulness),
        }


def faithfulness_text(found: Faithfulness) -> str:
    """ "faithfulness 0.31, above 100 % of random rankings"."""
    return f"faithfulness {found.score:.3g}, above {found.percentile:.0f} % of random rankings"


def file_name(*parts: str) -> str:
    """One file name of several texts: without folders, control characters, leading dots, or what Windows refuses."""
    name = "-".join("".join(c if c.isprintable() and c not in '/\\:*?"<>|' else "_" for c in part) for part in parts)
    name = os.fsencode(name)[:_NAME_BYTES].decode(errors="ignore").strip(". ")
    return name or "image"


def write_new(folder: str | Path, name: str, contents: dict[str, bytes]) -> list[Path]:
    """Write `name` with each suffix, atomically, where none of them exists; else name-2, name-3, ..."""
    with disk_errors(folder):
        Path(folder).mkdir(parents=True, exist_ok=True)
        paths = _reserve(Path(folder), name, list(contents))
    try:
        for path, data in zip(paths, contents.values(), strict=True):
            atomic_write_bytes(path, data)
    except BaseException:
        for path in paths:
            path.unlink(missing_ok=True)
        raise
    return paths


def _reserve(folder: Path, name: str, suffixes: Sequence[str]) -> list[Path]:
    """Empty files under a name that no other thread or process has."""
    number = 1
    while True:
        paths = [folder / f"{name}{'' if number == 1 else f'-{number}'}{suffix}" for suffix in suffixes]
        made = []
        for path in paths:
            with contextlib.suppress(FileExistsError):
                path.touch(exist_ok=False)
                made.append(path)
        if len(made) == len(paths):
            return paths
        for path in made:
            path.unlink()
        number += 1
