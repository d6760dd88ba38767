"""A smaller model that is trained on the logits of the one to export, where quantising alone is not fast enough."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vitrail.classifier import Classifier
from vitrail.data.dataset import Dataset
from vitrail.errors import ConfigError
from vitrail.models.catalog import VARIANTS, variant
from vitrail.training.run import train

AUTO = "auto"


def choose_student(classifier: Classifier, factor: float) -> str:
    """The largest model of the catalog for this image size with at most 1 / `factor` of the multiply-accumulate
    operations: of the same family if it has one.

    Raises:
        ConfigError: there is none, or the classifier's own cost is unknown.
    """
    teacher, size = VARIANTS.get(classifier.architecture), classifier.preprocess.size
    if teacher is None or teacher.config.img_size != size:
        raise ConfigError(f"the cost of {classifier.architecture} at {size[0]}x{size[1]} is unknown: name a student")
    limit = teacher.gmacs / max(factor, 1.0)
    rows = [row for row in VARIANTS.values() if row.config.img_size == size and row.gmacs <= limit and row != teacher]
    rows = [row for row in rows if row.gmacs < teacher.gmacs]
    if not rows:
        raise ConfigError(f"the catalog has no model of {size[0]}x{size[1]} with 1/{factor:.2g} of the cost")
    return max(rows, key=lambda row: (row.family == teacher.family, row.gmacs)).name


def train_student(classifier: Classifier, name: str, data: Dataset, settings: Mapping[str, Any]) -> Classifier:
    """Train the model `name` with `classifier` as its teacher, in a run folder below runs/.

    settings: of the training, as of `vitrail.train`.
    """
    variant(name)
    given: dict[str, Any] = {
        "img_size": classifier.preprocess.size,
        "in_chans": classifier.preprocess.channels,
        **settings,
    }
    return train(data.relabel(classifier.class_names), model=name, teacher=classifier, **given)
