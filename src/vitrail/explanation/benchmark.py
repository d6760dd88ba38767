"""All methods of a model compared by faithfulness and time, on the same images.

Shapes: B batch, C channels, H W height and width of the model's input.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vitrail.classifier import Classifier
from vitrail.data.catalog import open_dataset
from vitrail.errors import DataError, ModelError
from vitrail.explanation.explain import ReadImage, compute_maps, compute_scores, normalized, read_image
from vitrail.explanation.faithfulness import Faithfulness
from vitrail.explanation.methods.method import Method
from vitrail.explanation.methods.table import METHODS, methods_of
from vitrail.explanation.targets import Target, parse_target
from vitrail.images.reader import Input, NoImages, expand
from vitrail.reports.charts import subsample

_BATCH = 8


@dataclass(frozen=True)
class Result:
    """A method on `images` images. score, percentile: means. sure: share, 0 to 1, of images whose score is at or above
    the 99th percentile of random rankings. seconds: for one image, without the score."""

    method: str
    class_specific: bool
    images: int
    score: float
    percentile: float
    sure: float
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        return asdict(self)


def benchmark(
    clf: Classifier,
    data: str | os.PathLike[str],
    limit: int = 32,
    target: str | int | None = None,
    baseline: str = "mean",
    batch_size: int | None = None,
    on_method: Callable[[str], None] = lambda name: None,
) -> list[Result]:
    """Every method that the model's family has, the most faithful first.

    data: a folder or a dataset's name. limit: images, evenly spaced over the data. on_method is called with the name
    of each method when it is done.

    Raises:
        DataError: no image could be read, or no such dataset.
        ModelError: the model has no classes.
    """
    if not clf.class_names:
        raise ModelError("this model has no classes: there is no score to compare methods by")
    parsed = parse_target(target, clf.class_names)
    pictures = list(islice(_readable(clf, _inputs(data, limit)), limit))
    if not pictures:
        raise DataError(f"{data}: none of the images could be read")
    size = batch_size or _BATCH
    batches = [normalized(clf, pictures[start : start + size]) for start in range(0, len(pictures), size)]
    results = []
    for name in methods_of(clf.model):
        results.append(_measure(clf, METHODS[name], batches, parsed, baseline))
        on_method(name)
    return sorted(results, key=lambda result: -result.score)


def _inputs(data: str | os.PathLike[str], limit: int) -> list[Input | NoImages]:
    """A folder's images, or the evaluation split of a dataset, evenly spaced."""
    if Path(data).exists():
        return subsample(list(expand(data)), limit)
    dataset = open_dataset(os.fspath(data))
    split = dataset.split(dataset.eval_split())
    return [split.image(row) for row in subsample(range(len(split)), limit)]


def _readable(clf: Classifier, inputs: Iterable[Input | NoImages]) -> Iterator[ReadImage]:
    for source in inputs:
        if isinstance(picture := read_image(source, clf), ReadImage):
            yield picture


def _measure(clf: Classifier, method: Method, batches: list[Tensor], target: Target, baseline: str) -> Result:
    scores: list[Faithfulness] = []
    seconds = 0.0
    compute_maps(clf.model, batches[0][:1], method, target)  # not timed: the first call allocates memory
    for images in batches:
        start = time.perf_counter()
        maps = compute_maps(clf.model, images, method, target)[0]
        if images.is_cuda:
            torch.cuda.synchronize(images.device)
        seconds += time.perf_counter() - start
        scores += compute_scores(clf.model, images, maps, target, baseline)
    count = len(scores)
    return Result(
        method=method.name,
        class_specific=method.class_specific,
        images=count,
        score=sum(score.score for score in scores) / count,
        percentile=sum(score.percentile for score in scores) / count,
        sure=sum(score.beats_random for score in scores) / count,
        seconds=seconds / count,
    )
