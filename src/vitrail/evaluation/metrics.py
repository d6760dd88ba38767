"""Metrics of a classifier on the images of a split, computed from a record of each image.

Shapes: N images, K classes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from vitrail.evaluation.calibration import calibration_bins, expected_calibration_error
from vitrail.images.convert import BadImage
from vitrail.inference.probabilities import Logits, log_softmax, ranking
from vitrail.reports import notebook, plots

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_MAX_CARDS = 12  # pictures of errors in a notebook
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


@dataclass(frozen=True, repr=False)
class Evaluation:
    """Metrics on a split. top1, balanced_top1 and top5 are percentages; ece, the expected calibration error, is 0 to 1;
    loss is the mean cross-entropy in nats. NaN without images.

    picture: gives an image of the split by its index, for notebooks.
    """

    records: Records = field(repr=False)
    class_names: tuple[str, ...] = field(repr=False)
    split: str = ""
    skipped: list[dict[str, str]] = field(default_factory=list)
    picture: Callable[[int], Any] | None = field(default=None, compare=False)

    def __repr__(self) -> str:
        return f"Evaluation({', '.join(f'{name} {value}' for name, value in self._figures())})"

    def _figures(self) -> list[tuple[str, str]]:
        """What is printed: names and values. top-5 says nothing of five classes or fewer."""
        top5 = [("top-5", f"{self.top5:.2f} %")] if len(self.class_names) > 5 else []
        balanced = [("balanced top-1", f"{self.balanced_top1:.2f} %")] if is_imbalanced(self.per_class) else []
        skipped = [("skipped", f"{len(self.skipped):,}")] if self.skipped else []
        return [
            (f"{self.split} top-1".strip(), f"{self.top1:.2f} %"),
            *balanced,
            *top5,
            ("loss", f"{self.loss:.4f}"),
            ("calibration error", f"{100 * self.ece:.2f} %"),
            ("images", f"{self.images:,}"),
            *skipped,
        ]

    def _repr_html_(self) -> str:
        records = self.records
        wrong = np.flatnonzero(~records.correct)
        order = wrong[np.argsort(-records.confidence[wrong], kind="stable")]
        cards = [self._card(int(row)) for row in order[: _MAX_CARDS if self.picture else 0]]
        errors = [f"<div>Most confident errors</div>{notebook.gallery(cards, len(wrong))}"] if cards else []
        matrix = notebook.confusion_table(self.confusion, self.class_names)
        return notebook.box("Evaluation", notebook.figures(self._figures()), matrix, *errors)

    def _card(self, row: int) -> str:
        records = self.records
        lines = [f"{100 * records.confidence[row]:.1f} %", f"is {self.class_names[records.labels[row]]}"]
        return notebook.card(self._image(row), self.class_names[records.predicted[row]], lines, "#e4572e")

    def _image(self, row: int) -> Any:
        """An image of the records; None if it cannot be read."""
        try:
            return None if self.picture is None else self.picture(int(self.records.indices[row]))
        except (BadImage, OSError):
            return None

    def plot(self, kind: str = "confusion", ax: Axes | None = None) -> Axes:
        """Draw a plot with matplotlib; returns its axes.

        kind: "confusion" (the confusion matrix) or "calibration" (the reliability diagram). ax: of matplotlib; None: a
        new figure.

        Raises:
            ConfigError: another kind.
            DeviceError: matplotlib is not installed.
        """
        known = {
            "confusion": plots.confusion(self.confusion, self.class_names),
            "calibration": plots.calibration(calibration_bins(self.records.confidence, self.records.correct)),
        }
        return plots.draw(plots.choose(kind, known), ax)

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
