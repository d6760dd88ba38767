"""`doctor`: what is wrong with the images of a dataset, and what training on them would cost."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from vitrail.data.catalog import open_dataset
from vitrail.data.dataset import Data
from vitrail.diagnosis.checks.labels import test_interval
from vitrail.diagnosis.checks.table import CHECKS
from vitrail.diagnosis.cost import forecasts, plan
from vitrail.diagnosis.duplicates import find_duplicates
from vitrail.diagnosis.findings import Evidence, Finding
from vitrail.diagnosis.label_errors import find_label_errors, simple_features
from vitrail.diagnosis.scan import Scan, scan_images
from vitrail.errors import VitrailError
from vitrail.inference.engine import Engine, SplitReader, default_workers

if TYPE_CHECKING:
    from vitrail.prediction import BaseClassifier

Progress = Callable[[str, int], AbstractContextManager[Callable[[int], None]]]
_DEFAULT_INPUT = (224, 224)


@dataclass(frozen=True)
class Diagnosis:
    """The findings of all checks, in the order of their table, and the cost of training.

    images: readable images. cost: {"automatic", "named"}, see `cost.forecast`; {} if none was asked for.
    """

    images: int
    classes: int
    findings: list[Finding]
    cost: dict[str, Any]
    evidence: Evidence = field(repr=False)

    @property
    def has_errors(self) -> bool:
        """Whether a finding makes accuracies on these data wrong."""
        return any(finding.severity == "error" for finding in self.findings)

    @property
    def test_interval(self) -> str:
        """A sentence: how precisely the test images measure an accuracy."""
        return test_interval(self.evidence)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        findings = [finding.to_dict() for finding in self.findings]
        return {"images": self.images, "classes": self.classes, "findings": findings, "cost": self.cost}

    def write_report(self, path: str | Path) -> Path:
        """Write a page with the images. Raises RunError."""
        from vitrail.diagnosis.report import write_report

        return write_report(self, Path(path))

    def write_fixes(self, path: str | Path) -> int:
        """Write a CSV of proposals, see `fixes.py`; returns their number. No image is touched. Raises RunError."""
        from vitrail.diagnosis.fixes import write_fixes

        return write_fixes(self, Path(path))


def doctor(
    data: Data,
    model: str | Path | BaseClassifier | None = None,
    *,
    forecast_model: str | None = None,
    data_dir: str | Path | None = None,
    device: str | None = None,
    progress: Progress | None = None,
    **split: Any,
) -> Diagnosis:
    """Check the images and labels of a dataset, and forecast what a training would cost. No file is changed.

    Args:
        data: a folder of images, a CSV or parquet table, a dataset's name, wds: shards or an hf-dataset:; or a frame, a
            list of (path, label), a torch dataset, arrays, or a Dataset (see docs/data.md).
        model: a classifier, or what `load` takes. Its features find more duplicates and more wrong labels.
        forecast_model: a catalog name whose cost is forecast besides that of the automatic choice; "none": no forecast.
        data_dir: folder of a named dataset's files.
        device: of `model`; by default the best available.
        progress: a context that yields a function to call with counts, from a name and a total.
        split: val_fraction, test_fraction and split_seed of `open_dataset`.

    Raises:
        DataError: the data cannot be opened, or no image can be read.
        VitrailError: the model cannot be loaded or, if named, trained.
    """
    dataset = open_dataset(data, data_dir=data_dir, find_copies=False, **split)
    show = progress or (lambda name, total: nullcontext(lambda count: None))
    setup = None
    if forecast_model != "none" and "train" in dataset.splits:
        try:
            setup = plan(dataset, {})
        except VitrailError:
            if forecast_model is not None:
                raise
    # Before the images are read, so that the peak is that of a training.
    cost = forecasts(dataset, setup, forecast_model)
    total = sum(dataset.counts().values())
    with show("images", total) as advance:
        scan = scan_images(dataset, advance)
    features = None
    if model is not None:
        classifier = _classifier(model, device)
        with show("features", total) as advance:
            features = model_features(scan, classifier.engine(adapt_threads=True, frozen=True), advance)
        input_size = classifier.preprocess.size
    else:
        input_size = setup.preprocess.size if setup is not None else _DEFAULT_INPUT
    evidence = Evidence(
        scan,
        find_duplicates(scan, features),
        find_label_errors(simple_features(scan) if features is None else features, scan.labels),
        input_size,
        features is not None,
    )
    findings = [finding for _, check in CHECKS for finding in check(evidence)]
    return Diagnosis(len(scan), dataset.num_classes, findings, cost, evidence)


def _classifier(model: str | Path | BaseClassifier, device: str | None) -> BaseClassifier:
    from vitrail.classifier import load

    return load(model, device or "auto") if isinstance(model, str | Path) else model


def model_features(scan: Scan, engine: Engine, advance: Callable[[int], None]) -> torch.Tensor:
    """The model's features of every image of the scan, float32 N F."""
    preprocess = engine.runtime.preprocess
    readers = [SplitReader(split, preprocess) for split in scan.dataset.splits.values()]
    items = list(zip(scan.splits.tolist(), scan.rows.tolist(), strict=True))

    def read(item: tuple[int, int]) -> Any:
        return readers[item[0]](item[1])

    parts, rows = [np.empty((0, engine.runtime.num_features), np.float32)], list[tuple[int, int]]()
    for batch in engine.run(items, read, workers=default_workers(), features=True):
        parts.append(batch.outputs)
        rows += batch.readable
        advance(len(batch.items))
    found = np.zeros((len(scan), engine.runtime.num_features), np.float32)  # zeros: removed since the scan
    position = {item: i for i, item in enumerate(items)}
    found[[position[row] for row in rows]] = np.concatenate(parts)
    return torch.from_numpy(found)
