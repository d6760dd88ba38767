"""What is measured of one trained model: accuracy by image, calibration, robustness, and inductive bias."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache, partial
from typing import Any

import numpy as np
import numpy.typing as npt

from vitrail.classifier import Classifier
from vitrail.comparison.arms import part_of
from vitrail.comparison.plan import Arm
from vitrail.data.dataset import Dataset
from vitrail.evaluation.corruptions import CORRUPTIONS, corrupt, shuffle_patches, translate
from vitrail.evaluation.evaluate import evaluate
from vitrail.evaluation.metrics import Evaluation
from vitrail.images.convert import Pixels
from vitrail.inference.engine import SplitReader
from vitrail.training.checkpoints.run_folder import RunFolder
from vitrail.utils.counter_rng import fold, permutation

PROBED = 500  # test images at most, of the corruptions and probes
SEVERITIES = (1, 3, 5)
GRIDS = (2, 4)  # patches a side that are shuffled
_SHIFT = 8  # the side divided by this, in pixels, is the translation

Change = Callable[[Pixels, int], Pixels]  # an image and its number to an image of the same size


def measure(
    arm: Arm, classifier: Classifier, summary: Mapping[str, Any], dataset: Dataset, folder: RunFolder
) -> dict[str, Any]:
    """Plain JSON. top1: percent. indices, correct: the test images that could be read, and "1" or "0" of each. seconds,
    images_per_second, epochs: of the training. Of an arm with all images also `probes`."""
    name = dataset.eval_split()
    found = evaluate(classifier.engine().runtime, dataset.split(name), classifier.class_names, name=name)
    return {
        "model": arm.contender.label,
        "share": arm.share,
        "seed": arm.seed,
        "train_images": len(part_of(dataset, arm.share, arm.seed).split("train")),
        "top1": found.top1,
        "loss": found.loss,
        "ece": found.ece,
        **{key: summary[key] for key in ("seconds", "images_per_second", "epochs", "params")},
        "bytes": (folder.model / "model.safetensors").stat().st_size,
        "indices": found.records.indices.tolist(),
        "correct": "".join("01"[int(hit)] for hit in found.records.correct),
        **({"probes": probe(classifier, dataset)} if arm.share == 100 else {}),
    }


def probe(classifier: Classifier, dataset: Dataset) -> dict[str, Any]:
    """Accuracy on changed test images, at most PROBED of them, the same for all models; all figures are percentages.

    corruptions: top-1 by corruption and severity. translation: top-1, and how many predictions change, when images
    move by an eighth of their side. shuffling: top-1 by patches a side. clean: top-1 of the same images unchanged.
    """
    name = dataset.eval_split()
    count = len(dataset.split(name))
    rows = np.sort(permutation(fold(0, "probed images"), 0, count)[:PROBED])
    top1 = partial(_evaluate, classifier, dataset, rows, _crops(classifier, dataset, rows))
    height, width = classifier.preprocess.size
    pixels = max(1, round(min(height, width) / _SHIFT))
    clean, moved = top1(lambda image, _: image), top1(lambda image, i: translate(image, pixels, index=i))
    return {
        "images": clean.images,
        "clean": clean.top1,
        "corruptions": {
            kind: {str(severity): top1(_corruption(kind, severity)).top1 for severity in SEVERITIES}
            for kind in CORRUPTIONS
        },
        "translation": {
            "pixels": pixels,
            "top1": moved.top1,
            "changed": 100 * float(np.mean(clean.records.predicted != moved.records.predicted)),
        },
        "shuffling": {str(grid): top1(_shuffling(grid)).top1 for grid in GRIDS if grid <= min(height, width)},
    }


def _corruption(kind: str, severity: int) -> Change:
    return lambda image, number: corrupt(image, kind, severity, index=number)


def _shuffling(grid: int) -> Change:
    return lambda image, number: shuffle_patches(image, grid, index=number)


def _crops(classifier: Classifier, dataset: Dataset, rows: npt.NDArray[np.int64]) -> Callable[[int], Pixels]:
    """Reads an image of the sample as the model takes it; each is decoded once."""
    return cache(SplitReader(dataset.split(dataset.eval_split()).take(rows), classifier.preprocess))


def _evaluate(
    classifier: Classifier,
    dataset: Dataset,
    rows: npt.NDArray[np.int64],
    crops: Callable[[int], Pixels],
    change: Change,
) -> Evaluation:
    """The metrics on the sample after `change`, which gets the number of the image in the whole split."""
    reader = SplitReader(
        dataset.split(dataset.eval_split()).take(rows),
        classifier.preprocess,
        lambda row: change(crops(row), int(rows[row])),
    )
    return evaluate(classifier.engine().runtime, reader, classifier.class_names)
