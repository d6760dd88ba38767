"""Metrics of a classifier on the images of a split, computed from a record of each image.

Shapes: N images, K classes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from vitrail.evaluation.calibration import expected_calibration_error
from vitrail.inference.probabilities import Logits, log_softmax, ranking

IMBALANCE_RATIO = 1.5  # images of the largest class to those of the smallest, above which a split is imbalanced


@dataclass(frozen=True)
class Records:
    """One entry per image, N each: index in the split, true class, predicted class, probability of the predicted class,
    cross-entropy, and whether the true class is among the five most probable."""

    indices: npt.NDArray[np.int64]
    labels: npt.NDArray[np.int64]
    predicted: npt.NDArray[np.int64]
    confidence: npt.NDArray[np.float64]
    loss: npt.NDArray[np.float64]
    in_top5: npt.NDArray[np.bool_]

    @property
    def correct(self) -> npt.NDArray[np.bool_]:
        """Whether the predicted class is the true one, N."""
        return np.equal(self.predicted, self.labels)

    @classmethod
    def concatenate(cls, parts: Sequence[Records]) -> Records:
        """The records of all parts, ordered by index."""
        values = {each.name: np.concatenate([getattr(part, each.name) for part in parts]) for each in fields(cls)}
        order = np.argsort(values["indices"], kind="stable")
        return cls(**{name: value[order] for name, value in values.items()})


_INTEGERS, _FLOATS = np.empty(0, np.int64), np.empty(0, np.float64)
_NO_RECORDS = Records(_INTEGERS, _INTEGERS, _INTEGERS, _FLOATS, _FLOATS, np.empty(0, np.bool_))


class Recorder:
    """Collects records batch by batch."""

    def __init__(self) -> None:
        self._parts = [_NO_RECORDS]

    def add(self, logits: Logits, labels: npt.NDArray[np.int64], indices: npt.NDArray[np.int64]) -> None:
        """Logits B K, class numbers B and indices in the split B."""
        log_probabilities, order = log_softmax(logits), ranking(logits, 5)
        predicted = order[:, 0]
        rows = np.arange(len(labels))
        self._parts.append(
            Records(
                indices=indices,
                labels=labels,
                predicted=predicted,
                confidence=np.exp(log_probabilities[rows, predicted]).astype(np.float32).astype(np.float64),
                loss=-log_probabilities[rows, labels],
                in_top5=(order == labels[:, None]).any(axis=1),
            )
        )

    def records(self) -> Records:
        """Everything so far, ordered by index."""
        return Records.concatenate(self._parts)


@dataclass(frozen=True)
class Evaluation:
    """Metrics on a split. top1, balanced_top1 and top5 are percentages; ece, the expected calibration error, is 0 to 1;
    loss is the mean cross-entropy in nats. NaN without images.
    """

    records: Records = field(repr=False)
    class_names: tuple[str, ...] = field(repr=False)
    split: str = ""
    skipped: list[dict[str, str]] = field(default_factory=list)

    @property
    def images(self) -> int:
        """Number of images, without the skipped ones."""
        return len(self.records.labels)

    @cached_property
    def top1(self) -> float:
        return _percent(self.records.correct)

    @cached_property
    def balanced_top1(self) -> float:
        """The mean of top-1 over the classes that have images (balanced accuracy)."""
        values = [row["top1"] for row in self.per_class if row["images"]]
        return sum(values) / len(values) if values else float("nan")

    @cached_property
    def top5(self) -> float:
        return _percent(self.records.in_top5)

    @cached_property
    def loss(self) -> float:
        return float(self.records.loss.mean()) if self.images else float("nan")

    @cached_property
    def ece(self) -> float:
        return expected_calibration_error(self.records.confidence, self.records.correct)

    @cached_property
    def confusion(self) -> npt.NDArray[np.int64]:
        """The confusion matrix K K: images of true class (row) and predicted class (column)."""
        num_classes = len(self.class_names)
        pairs = self.records.labels * num_classes + self.records.predicted
        return np.bincount(pairs, minlength=num_classes**2).reshape(num_classes, num_classes)

    @cached_property
    def per_class(self) -> list[dict[str, Any]]:
        """A dict for each class: "label", "images", "correct" and "top1" (None without images)."""
        num_classes = len(self.class_names)
        images = np.bincount(self.records.labels, minlength=num_classes)
        hits = np.bincount(self.records.labels[self.records.correct], minlength=num_classes)
        return [
            {"label": name, "images": int(n), "correct": int(hit), "top1": 100 * int(hit) / int(n) if n else None}
            for name, n, hit in zip(self.class_names, images, hits, strict=True)
        ]

    def predicted_as(self, label: int) -> npt.NDArray[np.int64]:
        """How many images of this class were predicted as each class, K: a row of the confusion matrix."""
        return np.bincount(self.records.predicted[self.records.labels == label], minlength=len(self.class_names))

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON, in which NaN is null."""
        names = ("top1", "balanced_top1", "top5", "loss", "ece", "images", "split", "skipped", "per_class")
        values = {name: getattr(self, name) for name in names}
        return {key: None if isinstance(value, float) and math.isnan(value) else value for key, value in values.items()}


def is_imbalanced(per_class: Iterable[Mapping[str, Any]]) -> bool:
    """Whether the numbers of images per class differ so much that balanced_top1 is printed next to top1."""
    images = [row["images"] for row in per_class if row["images"]]
    return bool(images) and max(images) > IMBALANCE_RATIO * min(images)


def _percent(hits: npt.NDArray[np.bool_]) -> float:
    return 100 * int(hits.sum()) / len(hits) if len(hits) else float("nan")
