"""What a run keeps of its single images for the report: details.json, small whatever the number of images.

Shapes: K classes.
"""

import base64
import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from vitrail.data.dataset import Split
from vitrail.evaluation.metrics import Evaluation, bin_of

THUMBNAIL = 96  # pixels a side at most
_MISTAKES = 24  # that are kept with a thumbnail
_PAIRS = 10_000  # of classes taken for each other that are kept
_BINS = 15


def details(result: Evaluation, split: Split | None, groups: Sequence[Mapping[str, Any]] = ()) -> dict[str, Any]:
    """Plain JSON.

    classes: the K names. confused: [class, taken for, images], the largest first, without what is right.
    calibration: the bins of confidence that have images. mistakes: the most confident ones, each with its image's
    name in `split`, its class, the guess and its score, its loss, and a thumbnail as a data URI (None where there is
    none).
    groups: what is learnt at which rate, as `describe_groups` has it.
    """
    return {
        "split": result.split,
        "classes": list(result.class_names),
        "confused": confused(result),
        "calibration": calibration(result),
        "mistakes": mistakes(result, split),
        "groups": [
            {
                "name": group["name"],
                "parameters": sum(p.numel() for p in group["params"]),
                "peak_lr": group["peak_lr"],
                "weight_decay": group["weight_decay"],
            }
            for group in groups
        ],
    }


def confused(result: Evaluation) -> list[list[int]]:
    """[class, taken for, images] of every pair that occurs, the largest first; of equal ones the first classes."""
    records, kinds = result.records, len(result.class_names)
    wrong = records.labels != records.predicted
    pairs, counts = np.unique(records.labels[wrong] * kinds + records.predicted[wrong], return_counts=True)
    order = np.argsort(-counts, kind="stable")[:_PAIRS]
    return [[int(pairs[i] // kinds), int(pairs[i] % kinds), int(counts[i])] for i in order]


def calibration(result: Evaluation, bins: int = _BINS) -> list[dict[str, float]]:
    """For each of equal widths of confidence that has images: low, high, images, mean confidence and accuracy."""
    records = result.records
    place = bin_of(records.confidence, bins)
    images = np.bincount(place, minlength=bins)
    sums = np.bincount(place, weights=records.confidence, minlength=bins)
    hits = np.bincount(place, weights=records.predicted == records.labels, minlength=bins)
    return [
        {
            "low": i / bins,
            "high": (i + 1) / bins,
            "images": int(images[i]),
            "confidence": float(sums[i] / images[i]),
            "accuracy": float(hits[i] / images[i]),
        }
        for i in range(bins)
        if images[i]
    ]


def mistakes(result: Evaluation, split: Split | None) -> list[dict[str, Any]]:
    """The wrong guesses that the model was surest of."""
    records = result.records
    wrong = np.flatnonzero(records.labels != records.predicted)
    order = wrong[np.argsort(-records.confidence[wrong], kind="stable")][:_MISTAKES]
    return [
        {
            "name": None if split is None else split.name(int(records.indices[i])),
            "label": int(records.labels[i]),
            "guess": int(records.predicted[i]),
            "score": float(records.confidence[i]),
            "loss": float(records.loss[i]),
            "image": None if split is None else _thumbnail_of(split, int(records.indices[i])),
        }
        for i in order
    ]


def _thumbnail_of(split: Split, row: int) -> str | None:
    try:
        return thumbnail(split.image(row, (THUMBNAIL, THUMBNAIL)))
    except Exception:  # gone from the disk, or from a stream: the mistake is still worth telling
        return None


def thumbnail(image: Image.Image) -> str:
    """A data URI: a small image as it is, a large one reduced."""
    stream = io.BytesIO()
    if max(image.size) <= THUMBNAIL:
        image.save(stream, "PNG", optimize=True)
        kind = "png"
    else:
        small = image.copy()
        small.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS)
        small.save(stream, "JPEG", quality=80)
        kind = "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(stream.getvalue()).decode()}"
