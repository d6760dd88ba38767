"""What every classifier does, on whatever runtime: predict, embed and evaluate. Importing this imports no torch.

Shapes: N inputs, K classes, F features.
"""

from __future__ import annotations

import os
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from vitrail.errors import ConfigError, DataError, ModelError
from vitrail.images.preprocess import Preprocess
from vitrail.images.reader import Inputs, path_of
from vitrail.images.tensors import is_tensor
from vitrail.inference.engine import Engine
from vitrail.inference.probabilities import ranking, softmax
from vitrail.inference.tta import TtaRuntime
from vitrail.reports import notebook
from vitrail.utils.text import printable

if TYPE_CHECKING:
    from vitrail.data.dataset import Data, Dataset
    from vitrail.evaluation.metrics import Evaluation

SPLIT_OPTIONS = ("val_fraction", "test_fraction", "split_seed", "group_duplicates")  # of open_dataset


@dataclass(frozen=True)
class Score:
    """One class, its probability, 0 to 1, and its number in `class_names`."""

    label: str
    score: float
    index: int | None = None


@dataclass(frozen=True, repr=False)
class Prediction:
    """The most probable class of one input, its score and the `top` classes; or the `error` why it could not be read.

    `path` is None for an image in memory. `index` is the number of the class in `class_names`. `probabilities` are
    those of all K classes, in the order of `class_names`, if they were asked for. `image` is the input of `predict` if
    it was in memory.
    """

    path: str | None
    label: str | None = None
    score: float | None = None
    top: tuple[Score, ...] = ()
    error: str | None = None
    index: int | None = None
    probabilities: npt.NDArray[np.float32] | None = field(default=None, compare=False)
    image: Any = field(default=None, compare=False)

    def __repr__(self) -> str:
        if self.error is not None:
            return f"Prediction(path={self.path!r}, error={self.error!r})"
        return f"Prediction(path={self.path!r}, label={self.label!r}, score={self.score or 0:.3f})"

    def _repr_html_(self) -> str:
        return notebook.gallery([self._card(5)], 1)

    def _card(self, most: int) -> str:
        """The image and its classes, at most so many, as HTML."""
        source = self.image if self.path is None else self.path
        name = [] if self.path is None else [os.path.basename(self.path)]
        if self.error is not None:
            return notebook.card(None, "error", [self.error, *name], "#e4572e")
        others = [f"{each.label} {100 * each.score:.1f} %" for each in self.top[1:most]]
        return notebook.card(source, f"{self.label} {100 * (self.score or 0):.1f} %", [*others, *name])

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON: `path` and `error`, or `path`, `label`, `score` and `top`, and `probabilities` if it has them."""
        if self.error is not None:
            return {"path": self.path, "error": self.error}
        top = [{"label": each.label, "score": each.score} for each in self.top]
        found = {"path": self.path, "label": self.label, "score": self.score, "top": top}
        return found if self.probabilities is None else {**found, "probabilities": self.probabilities.tolist()}


class Predictions(list[Prediction]):
    """The predictions of several images: a list, which a notebook shows with pictures."""

    def _repr_html_(self) -> str:
        return notebook.gallery([each._card(2) for each in self[: notebook.MAX_PICTURES]], len(self))


# What users of other libraries look for in a classifier, and what it is here.
_ELSEWHERE = {
    **dict.fromkeys(
        ("classes", "names", "labels", "vocab", "classes_", "id2label"), "its class names are .class_names"
    ),
    **dict.fromkeys(("fit", "train", "fine_tune", "learn"), "use vitrail.train(DATA)"),
    **dict.fromkeys(
        ("val", "validate", "test", "accuracy", "score"), "use .evaluate(DATA), and .top1 of what it returns"
    ),
    **dict.fromkeys(("predict_proba", "get_preds"), "use .predict(..., probabilities=True)"),
    **dict.fromkeys(("forward", "eval", "state_dict", "parameters"), "the torch module is .model"),
    **dict.fromkeys(("transform", "transforms", "preprocessor"), "use .preprocess"),
    "explain": "use vitrail.explain(classifier, IMAGE)",
    "export": "use vitrail.export(classifier, FOLDER)",
    "serve": "use vitrail.serve(classifier)",
}


class BaseClassifier:
    """`preprocess` is a Preprocess, `class_names` the K names by index, `architecture` the variant's name.

    `notes` is JSON that is stored with the model, such as how the training images were split. `report` says how the
    weights were loaded, or is the summary of a run. `precision` is that of the computation.
    """

    preprocess: Preprocess
    report: Any = None

    def __init__(self, class_names: Sequence[str], architecture: str, notes: dict[str, Any], precision: str) -> None:
        if repeated := [name for name, count in Counter(class_names).items() if count > 1]:
            raise ModelError(f"two classes have the same name: {', '.join(repeated[:3])}")
        self.class_names = tuple(class_names)
        self.architecture = architecture
        self.notes = notes
        self.precision = precision

    if not TYPE_CHECKING:  # a checker of types would take it for any attribute

        def __getattr__(self, name: str) -> Any:
            hint = f": {_ELSEWHERE[name]}" if name in _ELSEWHERE else ""
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}{hint}", name=name, obj=self)

    def __repr__(self) -> str:
        height, width = self.preprocess.size
        about = f"{self.architecture}, {len(self.class_names)} classes, {height}x{width} pixels"
        return f"{type(self).__name__}({', '.join([about, *self._accuracy()])})"

    def _accuracy(self) -> list[str]:
        """What it reached at the end of its training, if that is known."""
        found = self.notes.get("figures")
        return [f"{found['split']} top-1 {found['top1']:.2f} %"] if found and found.get("top1") is not None else []

    def _repr_html_(self) -> str:
        (height, width), channels = self.preprocess.size, self.preprocess.channels
        rows = [
            ("architecture", self.architecture),
            ("input", f"{height}x{width} pixels, {channels} channel{'s' * (channels > 1)}"),
            (f"{len(self.class_names)} classes", printable(", ".join(self.class_names), 100)),
            ("precision", self.precision),
            *(("accuracy", each) for each in self._accuracy()),
        ]
        return notebook.box(type(self).__name__, notebook.figures(rows))

    def engine(self, *, adapt_threads: bool = False, cuda_graphs: bool = False, frozen: bool = False) -> Engine:
        """An inference engine with the current model, preprocessing and precision.

        adapt_threads: for one long job: torch on the CPU computes with as many threads as are the fastest while other
        programs use the cores, and a warning says so. An export has the threads that it was opened with.
        cuda_graphs: on CUDA, passes are recorded and replayed: see `CudaGraphs`. DeviceError elsewhere.
        frozen: the model's parameters will not change, so that they are rounded once where it computes in bfloat16.
        """
        raise NotImplementedError

    def _tta_engine(self, tta: str | None) -> Engine:
        """An engine for one long job, with test-time augmentation if asked for."""
        engine = self.engine(adapt_threads=True, frozen=True)
        return engine if tta is None else Engine(TtaRuntime(engine.runtime, tta))

    def predict(
        self,
        inputs: Inputs,
        top: int = 5,
        batch_size: int | None = None,
        *,
        probabilities: bool = False,
        tta: str | None = None,
    ) -> Predictions:
        """The `top` most probable classes of each image, in the order of `inputs`. Safe to call from several threads.

        inputs: one or several paths, folders (searched recursively), glob patterns, tables or frames of paths, Pillow
        images, uint8 arrays H W or H W C, or tensors C H W or B C H W (uint8, or float from 0 to 1, not normalised). An
        image that could not be read gives a Prediction with `error`. batch_size: None for the default, with which the
        probabilities are bit-identical to those of `evaluate`. probabilities: of all classes too. tta: average the
        probabilities of the image and its mirror image ("flip", 2 forward passes), or of the center and the corners
        ("crops", 5 forward passes).

        Raises:
            DataTypeError: an input of another type, which is a TypeError.
        """
        # Images of a generator or a dataset would stay in memory, where there may not be room for all.
        keep = isinstance(inputs, list | tuple | np.ndarray | Image.Image | bytes) or is_tensor(inputs)
        return Predictions(self._stream(inputs, top, batch_size, probabilities, tta, keep))

    def stream(
        self,
        inputs: Inputs,
        top: int = 5,
        batch_size: int | None = None,
        *,
        probabilities: bool = False,
        tta: str | None = None,
    ) -> Iterator[Prediction]:
        """`predict` as an iterator. Images are decoded while the model runs, a few batches at a time."""
        return self._stream(inputs, top, batch_size, probabilities, tta, False)

    def _stream(
        self, inputs: Inputs, top: int, batch_size: int | None, probabilities: bool, tta: str | None, keep: bool
    ) -> Iterator[Prediction]:
        """keep: whether predictions refer to images in memory."""
        if not self.class_names:
            raise ModelError("this model has no classes to predict; use embed() for its features")
        if top < 1:
            raise ConfigError(f"top must be at least 1, not {top}")
        from vitrail.data.formats.objects import image_inputs  # later: it takes a while

        for batch in self._tta_engine(tta).stream(image_inputs(inputs), batch_size):
            indices = ranking(batch.outputs, top)
            values = softmax(batch.outputs)
            scores = np.take_along_axis(values, indices, axis=1)
            rows = zip(scores.tolist(), indices.tolist(), values, strict=True)
            for item, error in zip(batch.items, batch.errors, strict=True):
                path = path_of(item)
                image = item if keep and isinstance(item, np.ndarray | Image.Image | bytes) else None
                if error is not None:
                    yield Prediction(path, error=error, image=image)
                    continue
                top_scores, numbers, row = next(rows)
                pairs = zip(top_scores, numbers, strict=True)
                best = tuple(Score(self.class_names[k], score, k) for score, k in pairs)
                first = best[0]
                yield Prediction(
                    path,
                    first.label,
                    first.score,
                    best,
                    index=first.index,
                    probabilities=row.copy() if probabilities else None,
                    image=image,
                )

    def embed(self, inputs: Inputs, batch_size: int | None = None) -> npt.NDArray[np.float32]:
        """The input of the classification head, float32 N F, in the order of `inputs`.

        Raises:
            DataError: an image could not be read.
        """
        from vitrail.data.formats.objects import image_inputs

        engine = self.engine(adapt_threads=True, frozen=True)
        rows = [np.empty((0, engine.runtime.num_features), np.float32)]
        for batch in engine.stream(image_inputs(inputs), batch_size, features=True):
            for item, error in zip(batch.items, batch.errors, strict=True):
                if error is not None:
                    raise DataError(f"{path_of(item) or 'an image'} {error}")
            rows.append(batch.outputs)
        return np.concatenate(rows)

    def evaluate(
        self,
        data: Data,
        split: str | None = None,
        *,
        data_dir: str | Path | None = None,
        batch_size: int | None = None,
        on_batch: Callable[[int], None] | None = None,
        tta: str | None = None,
    ) -> Evaluation:
        """Metrics on a dataset: a folder, a table, a name, or any other data that `train` takes.

        split: "test", "val" or "train"; by default test if there is one, else val. The images are split as in training
        (`notes["split"]`). Classes are matched by name. on_batch is called with the number of images of each batch.
        tta: see `predict`.

        Raises:
            DataError: the data has a class that the model lacks, or no such split.
        """
        from vitrail.data.catalog import open_dataset  # not needed by predict
        from vitrail.evaluation.evaluate import evaluate

        options = {key: value for key, value in self.notes.get("split", {}).items() if key in SPLIT_OPTIONS}
        dataset = open_dataset(data, data_dir=data_dir, class_names=self.class_names, **options)
        name = split or dataset.eval_split()
        self._warn_if_changed(dataset, data, name)
        result = evaluate(
            self._tta_engine(tta).runtime,
            dataset.split(name),
            self.class_names,
            name=name,
            batch_size=batch_size,
            on_batch=on_batch,
        )
        result.skipped[:0] = dataset.skipped  # found when the folder was opened
        return result

    def _warn_if_changed(self, dataset: Dataset, data: Data, name: str) -> None:
        """Images of the data that were trained on, split by fractions, are split differently if some were added,
        removed or renamed since.
        """
        from vitrail.data.catalog import absolute_data
        from vitrail.data.contents import digest, names_digest

        before = self.notes.get("trained_on")
        if not before or not dataset.held_out or name == "train":
            return
        where = absolute_data(data) if isinstance(data, str | Path) else dataset.name
        if before["data"] != digest(where) or before["images"] == names_digest(dataset.split("train")):
            return
        then, now = self.notes.get("counts", {}), dataset.counts()
        counts = (", ".join(f"{count} {split}" for split, count in each.items()) for each in (then, now))
        how = f"then {' and now '.join(counts)}" if then != now else "some have other names"
        warnings.warn(
            f"the images are not the same as in training ({how}): some of these {name} images may have been trained on",
            stacklevel=3,
        )
