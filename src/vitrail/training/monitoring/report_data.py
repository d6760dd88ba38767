"""details.json: per-image results that the report needs; its size does not grow with the number of images.

Shapes: K classes.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

from vitrail.classifier import Classifier
from vitrail.data.dataset import Split
from vitrail.errors import ModelError
from vitrail.evaluation.calibration import calibration_bins
from vitrail.evaluation.metrics import Evaluation
from vitrail.explanation.explain import explain
from vitrail.explanation.methods.table import choose_method
from vitrail.reports.thumbnails import SIDE, thumbnail

_MAX_ERRORS = 24
_MAX_PAIRS = 10_000


def report_details(
    result: Evaluation,
    split: Split | None,
    groups: Sequence[Mapping[str, Any]] = (),
    classifier: Classifier | None = None,
) -> dict[str, Any]:
    """The content of details.json.

    classes: the K names. confused: [true label, predicted label, images], most images first. calibration: the bins of
    the reliability diagram that have images. mistakes: the most confident errors, each with name in `split`, true and
    predicted label, score, loss, and two thumbnails (data URIs, or None): the image, and with a `classifier` the
    explanation of the predicted label. method: of these explanations, or None. groups: the optimizer's parameter
    groups.
    """
    method = None if split is None or classifier is None else _method(classifier)
    return {
        "split": result.split,
        "classes": list(result.class_names),
        "confused": confused_pairs(result),
        "calibration": calibration_bins(result.records.confidence, result.records.correct),
        "mistakes": confident_errors(result, split, classifier if method else None),
        "method": method,
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


def confident_errors(
    result: Evaluation, split: Split | None, classifier: Classifier | None = None
) -> list[dict[str, Any]]:
    """The wrong predictions with the highest scores, explained if there is a classifier."""
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
            **_pictures(split, int(records.indices[i]), classifier),
        }
        for i in order
    ]


def _pictures(split: Split | None, row: int, classifier: Classifier | None) -> dict[str, str | None]:
    """Thumbnails of an image and of its explanation. The image is read whole only if it is explained."""
    try:
        image = None if split is None else split.image(row, None if classifier else (SIDE, SIDE))
    except Exception:  # the file may have been removed since
        image = None
    evidence = None if image is None or classifier is None else _evidence(image, classifier)
    return {"image": None if image is None else thumbnail(image), "evidence": evidence}


def _evidence(image: Image.Image, classifier: Classifier) -> str | None:
    """None if memory is too short for a backward pass: the other parts of the report remain."""
    try:
        return thumbnail(explain(classifier, image).overlay())
    except torch.OutOfMemoryError:
        return None


def _method(classifier: Classifier) -> str | None:
    """The name of the model's default method of explanation; None if it has none."""
    try:
        return choose_method(None, classifier.model).name
    except ModelError:
        return None
