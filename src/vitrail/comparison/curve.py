"""What twice the training images would give: a learning curve of a linear head on frozen features, continued."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vitrail.classifier import load
from vitrail.comparison.page import write_curve_page
from vitrail.comparison.run import open_data, write_json
from vitrail.comparison.verdict import spread
from vitrail.data.contents import names_digest
from vitrail.data.dataset import Data, Dataset, Split
from vitrail.errors import ConfigError, DataError
from vitrail.evaluation.learning_curve import forecast, measure_curve
from vitrail.images.preprocess import Preprocess
from vitrail.inference.engine import Engine, SplitReader, default_workers
from vitrail.prediction import BaseClassifier
from vitrail.training.config.schema import Use, keys_for
from vitrail.utils.files import user_path

FEATURES = "deit_small_patch16_224"  # whose published weights give the features by default
PIXELS = "pixels"
_SIDE = 16  # pixels of an image whose pixels are the features
_MIN_IMAGES = 80  # of a sixteenth, five images are left


def learning_curve(
    data: Data,
    features: str = FEATURES,
    *,
    out: str | Path | None = None,
    device: str = "auto",
    command: str = "",
    **settings: Any,
) -> dict[str, Any]:
    """Accuracy of a linear head at five numbers of training images, five draws each, and at twice the images.

    features: a model as `vitrail.load` takes it, that was not trained on these images; or "pixels", for the pixels of
    the image at 16x16. out: a folder, for learning_curve.json and learning_curve.html. settings: val_fraction and
    others that decide which images are held out, and data_dir.

    Returns plain JSON: `curve`, a list of {"images", "top1": {"mean", "std", "n"}}, and `forecast`, {"images", "top1",
    "low", "high"}, the bounds of the 80 % interval. All accuracies are percentages.

    Raises:
        ConfigError: the model was trained on these images.
        DataError: there are too few images.
        WeightsError: the model was not found.
    """
    dataset = _open(data, settings)
    name, train = dataset.eval_split(), dataset.split("train")
    classifier = None if features == PIXELS else load(features, device)
    if classifier is not None and _was_trained_on(classifier, dataset):
        raise ConfigError(
            f"{features} was trained on {dataset.name}: its features would give too high a forecast; name another"
        )
    (x, y), (test_x, test_y) = (_embed(classifier, dataset, split) for split in (train, dataset.split(name)))
    curve = measure_curve(x, y, test_x, test_y, dataset.num_classes)
    ahead = forecast(curve, 2 * len(y))
    result = {
        "data": dataset.name,
        "images": dataset.counts(),
        "split": name,
        "test_images": len(test_y),
        "features": features,
        "curve": [
            # Of all the images there is one part, and one fit.
            {"images": int(size), "top1": spread((100 * accuracy[: 1 if size == len(y) else None]).tolist())}
            for size, accuracy in zip(curve.sizes, curve.accuracy, strict=True)
        ],
        "forecast": {
            "images": ahead.size,
            "top1": 100 * ahead.accuracy,
            "low": 100 * ahead.low,
            "high": 100 * ahead.high,
        },
        "command": command,
    }
    if out is not None:
        folder = user_path(out)
        write_json(folder / "learning_curve.json", result)
        write_curve_page(result, folder / "learning_curve.html")
    return result


def _open(data: Data, settings: Mapping[str, Any]) -> Dataset:
    for key in settings.keys() - {*keys_for(Use.HELD_OUT), "data_dir"}:
        raise ConfigError(f"{key} is a setting of trainings, and a learning curve trains nothing: leave it out")
    dataset = open_data(data, settings)
    name, train = dataset.eval_split(), dataset.split("train")
    if name == "train" or len(train) < _MIN_IMAGES:
        raise DataError(
            f"{dataset.name} has {len(train)} training images and {len(dataset.split(name))} {name} images: "
            f"a learning curve needs at least {_MIN_IMAGES} training images, and others"
        )
    return dataset


def _was_trained_on(classifier: BaseClassifier, dataset: Dataset) -> bool:
    """Whether the model's training data had this name, or the same class and file names under another."""
    notes = classifier.notes
    images = notes.get("trained_on", {}).get("images")
    return notes.get("data") == dataset.name or images == names_digest(dataset.split("train"))


def _embed(classifier: BaseClassifier | None, dataset: Dataset, split: Split) -> tuple[torch.Tensor, torch.Tensor]:
    """Features N C and classes N of the images that can be read."""
    rows: list[int] = []
    found: list[np.ndarray[Any, Any]] = []
    for kept, values in _pixels(dataset, split) if classifier is None else _features(classifier, split):
        rows += kept
        found.append(values)
    return torch.from_numpy(np.concatenate(found)).float(), torch.from_numpy(split.labels[rows])


def _features(classifier: BaseClassifier, split: Split) -> Iterable[tuple[list[int], np.ndarray[Any, Any]]]:
    engine = classifier.engine(adapt_threads=True, frozen=True)
    reader = SplitReader(split, classifier.preprocess)
    for batch in engine.run(range(len(split)), reader, workers=default_workers(split), features=True):
        yield batch.readable, batch.outputs


class _Pixels:
    """A runtime whose features are the pixels."""

    num_classes, default_batch_size = 0, 256

    def __init__(self, preprocess: Preprocess) -> None:
        self.preprocess = preprocess
        self.num_features = preprocess.size[0] * preprocess.size[1] * preprocess.channels

    def features(self, images: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        return images.reshape(len(images), -1).astype(np.float32) / 255

    logits = features


def _pixels(dataset: Dataset, split: Split) -> Iterable[tuple[list[int], np.ndarray[Any, Any]]]:
    side = min(_SIDE, *dataset.sizes.median)
    runtime: Any = _Pixels(Preprocess(size=(side, side)).with_channels(dataset.channels))
    reader = SplitReader(split, runtime.preprocess)
    for batch in Engine(runtime).run(range(len(split)), reader, workers=default_workers(split), features=True):
        yield batch.readable, batch.outputs
