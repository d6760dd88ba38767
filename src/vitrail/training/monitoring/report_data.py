"""details.json: per-image results that the report needs; its size does not grow with the number of images.

Shapes: K classes.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from vitrail.data.dataset import Split
from vitrail.evaluation.calibration import calibration_bins
from vitrail.evaluation.metrics import Evaluation
from vitrail.reports.thumbnails import SIDE, thumbnail

_MAX_ERRORS = 24
_MAX_PAIRS = 10_000


def report_details(result: Evaluation, split: Split | None, groups: Sequence[Mapping[str, Any]] = ()) -> dict[str, Any]:
    """The content of details.json.

    classes: the K names. confused: [true label, predicted label, images], most images first. calibration: the bins of
    the reliability diagram that have images. mistakes: the most confident errors, each with name in `split`, true and
    predicted label, score, loss, and thumbnail (a data URI, or None). groups: the optimizer's parameter groups.
    """
    return {
        "split": result.split,
        "classes": list(result.class_names),
        "confused": confused_pairs(result),
        "calibration": calibration_bins(result.records.confidence, result.records.correct),
        "mistakes": confident_errors(result, split),
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


def confused_pairs(result: Evaluation) -> list[list[int]]:
    """[true label, predicted label, images] of the errors, most images first, ties by label."""
    records, classes = result.records, len(result.class_names)
    wrong = ~records.correct
    pairs, counts = np.unique(records.labels[wrong] * classes + records.predicted[wrong], return_counts=True)
    order = np.argsort(-counts, kind="stable")[:_MAX_PAIRS]
    return [[int(pairs[i] // classes), int(pairs[i] % classes), int(counts[i])] for i in order]


def confident_errors(result: Evaluation, split: Split | None) -> list[dict[str, Any]]:
    """The wrong predictions with the highest scores."""
    records = result.records
    wrong = np.flatnonzero(~records.correct)
    order = wrong[np.argsort(-records.confidence[wrong], kind="stable")][:_MAX_ERRORS]
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
        return thumbnail(split.image(row, (SIDE, SIDE)))
    except Exception:  # the file may have been removed since
        return None
