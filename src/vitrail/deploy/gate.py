"""The gate: whether an export predicts what its model predicts, and is faster; measured, on images.

Shapes: N images, H W height and width, C channels, K classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from vitrail.data.dataset import Dataset, SkippedImage, Split
from vitrail.evaluation.significance import bootstrap_difference
from vitrail.inference.engine import Engine, SplitReader, default_workers
from vitrail.inference.runtime import Outputs, Runtime

MAX_LOSS = 0.3  # points of top-1
MIN_SPEEDUP = 1.15
MIN_AGREEMENT = 98.0  # percent, where there are no labels
MAX_ERROR = 1e-3  # of the largest logit, in float32


@dataclass(frozen=True)
class Limits:
    """max_loss: points of top-1 that may be lost. min_speedup: for one image."""

    max_loss: float = MAX_LOSS
    min_speedup: float = MIN_SPEEDUP


@dataclass(frozen=True)
class CheckImages:
    """Images on which exports are compared with the model, and the model's logits N K in float32.

    labels: int64 N; None: accuracy is not checked. data: the name of the dataset, and its split. skipped: those that
    could not be read, which are left out.
    """

    reader: SplitReader
    rows: list[int]
    logits: Outputs
    labels: npt.NDArray[np.int64] | None
    data: str
    split: str
    skipped: list[SkippedImage]

    @classmethod
    def open(
        cls, reference: Runtime, dataset: Dataset, split: str, *, labelled: bool, limit: int | None = None
    ) -> CheckImages:
        """The first `limit` images of a split, or all; `reference` computes the logits."""
        images: Split = dataset.split(split)
        reader = SplitReader(images, reference.preprocess)
        rows: list[int] = []
        skipped: list[SkippedImage] = []
        logits = [np.empty((0, reference.num_classes), np.float32)]
        wanted = range(min(limit or len(images), len(images)))
        for batch in Engine(reference).run(wanted, reader, workers=default_workers(images)):
            rows += batch.readable
            skipped += reader.skipped(batch)
            logits.append(batch.outputs)
        labels = images.labels[rows] if labelled else None
        return cls(reader, rows, np.concatenate(logits), labels, dataset.name, split, skipped)

    def run(self, runtime: Runtime) -> Outputs:
        """The logits of another runtime, N K."""
        split, reader = self.reader.split, self.reader
        if runtime.preprocess != reader.preprocess:  # a student's
            reader = SplitReader(split, runtime.preprocess)
        batches = Engine(runtime).run(self.rows, reader, workers=default_workers(split))
        return np.concatenate([batch.outputs for batch in batches])


@dataclass(frozen=True)
class Agreement:
    """How an export's predictions differ from the model's.

    top1, top1_reference: percent; None without labels. difference: of top-1, export minus reference, in points, with
    its paired 95 % interval. agreement: percent of images with the same class. error: the largest absolute difference
    of a logit, and `largest` the largest absolute logit of the reference.
    """

    images: int
    agreement: float
    error: float
    largest: float
    top1: float | None = None
    top1_reference: float | None = None
    difference: float | None = None
    ci95: tuple[float, float] | None = None

    @classmethod
    def of(cls, check: CheckImages, logits: Outputs) -> Agreement:
        """Compare the logits of an export, N K, with those of the reference."""
        ours, theirs = logits.argmax(axis=1), check.logits.argmax(axis=1)
        error = float(np.abs(logits - check.logits).max()) if np.isfinite(logits).all() else float("inf")
        shared = {
            "images": len(logits),
            "agreement": 100 * float((ours == theirs).mean()),
            "error": error,
            "largest": float(np.abs(check.logits).max()),
        }
        if check.labels is None:
            return cls(**shared)  # type: ignore[arg-type]
        correct, reference = ours == check.labels, theirs == check.labels
        difference, (low, high), _ = bootstrap_difference(correct, reference)
        accuracies: dict[str, Any] = {
            "top1": 100 * float(correct.mean()),
            "top1_reference": 100 * float(reference.mean()),
            "difference": 100 * difference,
            "ci95": (100 * low, 100 * high),
        }
        return cls(**shared, **accuracies)  # type: ignore[arg-type]

    def reject(self, limits: Limits, *, exact: bool) -> str | None:
        """Why the gate refuses these predictions; None if it does not. exact: the logits have to be the model's."""
        if not np.isfinite(self.error):
            return "it computes values that are not finite"
        if exact and self.error > MAX_ERROR * self.largest:
            return (
                f"its logits differ from the model's by up to {self.error:.3g} (the largest is {self.largest:.3g}): "
                "float32 allows for a thousandth"
            )
        if self.difference is not None and -self.difference > limits.max_loss + 1e-9:
            return f"it loses {-self.difference:.2f} points of top-1 (at most {limits.max_loss:g} are allowed)"
        if self.difference is None and self.agreement < MIN_AGREEMENT:
            return (
                f"it predicts the model's class of only {self.agreement:.1f} % of the images "
                f"(at least {MIN_AGREEMENT:g} % are needed where there are no labels)"
            )
        return None


def reject_speed(speedup: float, limits: Limits) -> str | None:
    """Why the gate refuses this speed; None if it does not."""
    if speedup >= limits.min_speedup:
        return None
    return f"it is {speedup:.2f}x as fast as the model for one image (at least {limits.min_speedup:g}x is asked for)"
