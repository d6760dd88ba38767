"""What a classifier is worth on some images, from one small record an image.

Shapes: N images, K classes.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

UNEVEN = 1.5  # times the images of the smallest class, above which a split's classes count as uneven
_BINS = 15


@dataclass(frozen=True)
class Records:
    """What is kept of each image, N each: its place in the split, its class, the class that was predicted, the
    probability given to that, its cross-entropy, and whether its class was among the five likeliest."""

    indices: npt.NDArray[np.int64]
    labels: npt.NDArray[np.int64]
    predicted: npt.NDArray[np.int64]
    confidence: npt.NDArray[np.float64]
    loss: npt.NDArray[np.float64]
    in_top5: npt.NDArray[np.bool_]


class Recorder:
    """Collects records batch by batch, without waiting for the device."""

    def __init__(self) -> None:
        self._integers: list[Tensor] = []
        self._floats: list[Tensor] = []

    def add(self, logits: Tensor, labels: Tensor, indices: Tensor) -> None:
        """Logits B K, class numbers B and places in the split B."""
        logits = logits.float()
        top = logits.topk(min(5, logits.shape[1]), dim=1).indices
        predicted = logits.argmax(dim=1)
        in_top5 = (top == labels[:, None]).any(dim=1)
        confidence = logits.softmax(dim=1).gather(1, predicted[:, None])[:, 0]
        loss = F.cross_entropy(logits, labels, reduction="none")
        self._integers.append(torch.stack([indices.to(labels.device), labels, predicted, in_top5.long()]))
        self._floats.append(torch.stack([confidence, loss]))

    def records(self) -> Records:
        """Everything so far."""
        if not self._integers:
            nothing = np.zeros(0)
            empty = nothing.astype(np.int64)
            return Records(empty, empty, empty, nothing, nothing, nothing.astype(np.bool_))
        indices, labels, predicted, in_top5 = torch.cat(self._integers, dim=1).cpu().numpy()
        confidence, loss = torch.cat(self._floats, dim=1).double().cpu().numpy()
        return Records(indices, labels, predicted, confidence, loss, in_top5.astype(np.bool_))


@dataclass(frozen=True)
class Evaluation:
    """Figures over the images of a split. top1, balanced_top1 and top5 are in percent, ece (expected calibration
    error) is 0 to 1.
    """

    records: Records = field(repr=False)
    class_names: tuple[str, ...] = field(repr=False)
    split: str = ""
    skipped: list[dict[str, str]] = field(default_factory=list)

    @property
    def images(self) -> int:
        """Images that were counted."""
        return len(self.records.labels)

    @cached_property
    def top1(self) -> float:
        return _percent(self.records.predicted == self.records.labels)

    @cached_property
    def balanced_top1(self) -> float:
        """The mean of the classes' own top-1, in percent: each class counts the same, however many images it has."""
        shares = [row["top1"] for row in self.per_class if row["images"]]
        return sum(shares) / len(shares) if shares else float("nan")

    @cached_property
    def top5(self) -> float:
        return _percent(self.records.in_top5)

    @cached_property
    def loss(self) -> float:
        """Mean cross-entropy, nats."""
        return float(self.records.loss.mean()) if self.images else float("nan")

    @cached_property
    def ece(self) -> float:
        return calibration_error(self.records.confidence, self.records.predicted == self.records.labels)

    @cached_property
    def confusion(self) -> npt.NDArray[np.int64]:
        """Images of class (row) that were taken for class (column), K K."""
        kinds = len(self.class_names)
        pairs = self.records.labels * kinds + self.records.predicted
        return np.bincount(pairs, minlength=kinds**2).reshape(kinds, kinds)

    @cached_property
    def per_class(self) -> list[dict[str, Any]]:
        """For each class: label, images, correct, and top1 in percent (None without images)."""
        kinds = len(self.class_names)
        images = np.bincount(self.records.labels, minlength=kinds)
        hits = np.bincount(self.records.labels[self.records.predicted == self.records.labels], minlength=kinds)
        return [
            {"label": name, "images": int(n), "correct": int(hit), "top1": 100 * int(hit) / int(n) if n else None}
            for name, n, hit in zip(self.class_names, images, hits, strict=True)
        ]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        names = ("top1", "balanced_top1", "top5", "loss", "ece", "images", "split", "skipped", "per_class")
        return {name: getattr(self, name) for name in names}


def uneven(per_class: Iterable[Mapping[str, Any]]) -> bool:
    """Whether classes differ so much in images that top1 and balanced_top1 may tell two stories."""
    images = [row["images"] for row in per_class if row["images"]]
    return bool(images) and max(images) > UNEVEN * min(images)


def _percent(hits: npt.NDArray[np.bool_]) -> float:
    return 100 * int(hits.sum()) / len(hits) if len(hits) else float("nan")


def calibration_error(confidence: npt.NDArray[np.float64], correct: npt.NDArray[np.bool_], bins: int = _BINS) -> float:
    """Expected calibration error, 0 to 1: the mean distance of confidence from accuracy over `bins` equal widths of
    confidence, each weighted by its share of the images. Guo et al., 2017 (https://arxiv.org/abs/1706.04599)."""
    if not len(confidence):
        return float("nan")
    gap = np.bincount(bin_of(confidence, bins), weights=confidence - correct, minlength=bins)
    return float(np.abs(gap).sum() / len(confidence))


def bin_of(confidence: npt.NDArray[np.float64], bins: int) -> npt.NDArray[np.int64]:
    """Which of `bins` equal widths each confidence lies in, from 0; they are open below and closed above."""
    return np.clip(np.ceil(confidence * bins).astype(np.int64) - 1, 0, bins - 1)
