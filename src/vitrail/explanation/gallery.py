"""The gallery: explanations in one HTML file that needs nothing else, for a person to look at."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vitrail.explanation.colors import DIVERGING, SEQUENTIAL
from vitrail.explanation.rendering import reduced
from vitrail.explanation.result import Explanation, Unreadable, write_new
from vitrail.reports.page import render_page
from vitrail.reports.thumbnails import data_uri

MAX_IMAGES = 200
_SIDES = ((24, 640, 256), (MAX_IMAGES, 320, 160))  # up to so many images, pixels of the picture's and the heat's side
_QUALITY = 82  # of JPEGs
_SMALL = 128  # pixels: pictures up to this side are shown as squares, without loss


def write_gallery(folder: str | Path, found: Sequence[Explanation | Unreadable], model: str, left_out: int = 0) -> Path:
    """Write the gallery into a folder, under a name that is free. Returns its path.

    Raises:
        RunError: the disk is full, read-only or forbidden.
    """
    return write_new(folder, "gallery", {".html": make_gallery(found, model, left_out).encode()})[0]


def make_gallery(found: Sequence[Explanation | Unreadable], model: str, left_out: int = 0) -> str:
    """The gallery as HTML. model: its name. left_out: explanations that are not among `found`. The pictures of many
    images are smaller, and only the first MAX_IMAGES are shown."""
    explanations = [each for each in found if isinstance(each, Explanation)]
    shown = explanations[:MAX_IMAGES]
    side, heat_side = next(sides[1:] for sides in _SIDES if len(shown) <= sides[0])
    methods = {each.method: each for each in shown}
    scores = [each.faithfulness for each in shown if each.faithfulness is not None]
    values = {
        "model": model,
        "methods": [
            _method(each, {other.signed for other in shown if other.method == name}) for name, each in methods.items()
        ],
        "images": len(explanations) + left_out,
        "left_out": len(explanations) - len(shown) + left_out,
        "scored": bool(scores),
        "unsure": sum(not score.beats_random for score in scores),
        "cards": [_card(each, side, heat_side) for each in shown],
        "unreadable": [each for each in found if isinstance(each, Unreadable)],
        "several_methods": len(methods) > 1,
    }
    return render_page("vitrail.explanation", "gallery.html", values)


def _method(explanation: Explanation, signed: set[bool]) -> dict[str, Any]:
    """signed: of the maps of this method."""
    return {
        "name": explanation.method,
        "reference": explanation.reference,
        "class_specific": explanation.class_specific,
        "scales": [_scale(each) for each in sorted(signed)],
    }


def _scale(signed: bool) -> dict[str, Any]:
    return {
        "gradient": ", ".join("#{:02x}{:02x}{:02x}".format(*color) for color in (DIVERGING if signed else SEQUENTIAL)),
        "ends": ("against the target", "for the target") if signed else ("weak", "strong"),
    }


def _card(explanation: Explanation, side: int, heat_side: int) -> dict[str, Any]:
    picture = explanation.picture
    small = max(picture.size) <= _SMALL
    ratio = min(1.0, heat_side / max(picture.size)) if not small else heat_side / max(picture.size)
    heat = explanation.heat((max(1, round(picture.height * ratio)), max(1, round(picture.width * ratio))))
    measured = explanation.faithfulness
    heads = None if explanation.parts is None else reduced(explanation.heads_picture())
    return {
        "path": explanation.path or "image in memory",
        "image": data_uri(picture) if small else data_uri(reduced(picture, side), quality=_QUALITY),
        "small": small,
        "heat": data_uri(heat),
        "height": picture.height,
        "width": picture.width,
        "heads": None if heads is None else data_uri(heads, quality=_QUALITY),
        "method": explanation.method,
        "class_specific": explanation.class_specific,
        "target": explanation.target,
        "is_pair": explanation.is_pair,
        "is_against": explanation.is_against,
        "score": explanation.score,
        "top": [
            {
                "label": each.label,
                "percent": 100 * each.score,
                "is_target": each.label == explanation.target and not explanation.is_pair,
            }
            for each in explanation.top
        ],
        "measured": measured,
        "sure": measured is not None and measured.beats_random,
        "z": measured.z if measured is not None and math.isfinite(measured.z) else None,
    }
