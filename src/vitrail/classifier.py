"""Classifier: a model with its preprocessing and class names; predict, embed, evaluate, save and load.

Shapes: N inputs, K classes, C features.
"""

from __future__ import annotations

import json
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from vitrail.errors import ConfigError, DataError, ModelError
from vitrail.images.preprocess import Preprocess
from vitrail.images.reader import Inputs, path_of
from vitrail.inference.engine import Engine
from vitrail.inference.torch_runtime import TorchRuntime
from vitrail.models.base import ImageModel
from vitrail.models.catalog import VARIANTS
from vitrail.models.timm_compat import window_mismatch
from vitrail.pretrained.model_folder import Contents, find_model_folder, name_of, read_model_folder, write_model_folder

if TYPE_CHECKING:
    from vitrail.data.dataset import Dataset
    from vitrail.evaluation.metrics import Evaluation
    from vitrail.pretrained.load import Pretrained

PRECISIONS = ("auto", "bf16", "off")  # see inference/torch_runtime.py
_SPLIT_OPTIONS = ("val_fraction", "test_fraction", "split_seed", "group_duplicates")  # of open_dataset


@dataclass(frozen=True)
class Score:
    """One class and its probability, 0 to 1."""

    label: str
    score: float


@dataclass(frozen=True)
class Prediction:
    """The most probable class of one input, its score and the `top` classes; or the `error` why it could not be read.

    `path` is None for an image in memory.
    """

    path: str | None
    label: str | None = None
    score: float | None = None
    top: tuple[Score, ...] = ()
    error: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON: `path` and `error`, or `path`, `label`, `score` and `top`."""
        if self.error is not None:
            return {"path": self.path, "error": self.error}
        top = [asdict(score) for score in self.top]
        return {"path": self.path, "label": self.label, "score": self.score, "top": top}


class Classifier:
    """`model` is an nn.Module in timm's interface, `preprocess` a Preprocess, `class_names` the K names by index.

    `architecture` is the variant's name. `report` is the summary of the run that trained the model, or a report of how
    its weights were loaded. `notes` is JSON that is saved with the model, such as how the training images were split.
    `precision` is "bf16" (autocast), "off" (float32) or "auto": the faster one on this hardware.
    """

    def __init__(
        self,
        model: ImageModel,
        preprocess: Preprocess,
        class_names: Sequence[str],
        report: Any = None,
        *,
        architecture: str | None = None,
        notes: dict[str, Any] | None = None,
        precision: str = "auto",
    ) -> None:
        if precision not in PRECISIONS:
            raise ConfigError(f"precision must be one of {', '.join(PRECISIONS)}, not {precision!r}")
        if len(class_names) != model.num_classes:
            raise ModelError(f"{len(class_names)} class names for a model of {model.num_classes} classes")
        if repeated := [name for name, count in Counter(class_names).items() if count > 1]:
            raise ModelError(f"two classes have the same name: {', '.join(repeated[:3])}")
        self.model = model
        self.preprocess = preprocess
        self.class_names = tuple(class_names)
        self.report = report
        self.architecture = architecture or name_of(model.config)
        self.notes = notes or {}
        self.precision = precision

    def __repr__(self) -> str:
        height, width = self.preprocess.size
        return f"Classifier({self.architecture}, {len(self.class_names)} classes, {height}x{width} pixels)"

    @property
    def device(self) -> torch.device:
        """The device of the model."""
        return next(self.model.parameters()).device

    def to(self, device: str | torch.device) -> Classifier:
        """Move the model; returns the classifier itself."""
        self.model.to(device)
        return self

    def resize(self, img_size: int | tuple[int, int] | str) -> Classifier:
        """Change the input size, in pixels: 384, (320, 192) or "320x192" (height, width). Returns the classifier.

        Raises:
            ConfigError: not a size.
            ModelError: the model cannot take images of this size.
        """
        from pydantic import TypeAdapter, ValidationError

        from vitrail.utils.settings import Size

        try:
            size = TypeAdapter(Size).validate_python(img_size)
        except ValidationError:
            raise ConfigError(f"{img_size!r} is not an image size: use 384, or 320x192 for height and width") from None
        preprocess = self.preprocess.replace(size=size or self.preprocess.size)
        try:
            TorchRuntime(self.model, preprocess).logits(np.zeros((1, *preprocess.size, preprocess.channels), np.uint8))
        except (RuntimeError, ValueError) as error:
            raise ModelError(
                f"{self.architecture} cannot take images of {preprocess.size[0]}x{preprocess.size[1]}: {error}"
            ) from None
        self.preprocess = preprocess
        return self

    def engine(self) -> Engine:
        """An inference engine with the current model, preprocessing and precision."""
        return Engine(TorchRuntime(self.model, self.preprocess, self.precision, self.architecture))

    def predict(self, inputs: Inputs, top: int = 5, batch_size: int | None = None) -> list[Prediction]:
        """The `top` most probable classes of each image, in the order of `inputs`. Safe to call from several threads.

        inputs: one or several paths, folders (searched recursively), glob patterns, Pillow images, or uint8 arrays
        H W or H W C. An image that could not be read gives a Prediction with `error`. batch_size: None for the default,
        with which the probabilities are bit-identical to those of `evaluate`.
        """
        return list(self.stream(inputs, top, batch_size))

    def stream(self, inputs: Inputs, top: int = 5, batch_size: int | None = None) -> Iterator[Prediction]:
        """`predict` as an iterator. Images are decoded while the model runs, a few batches at a time."""
        if not self.class_names:
            raise ModelError("this model has no classes to predict; use embed() for its features")
        if top < 1:
            raise ConfigError(f"top must be at least 1, not {top}")
        for batch in self.engine().stream(inputs, batch_size):
            logits = torch.from_numpy(batch.outputs)
            # Stable: bfloat16 gives equal logits; the first of these classes comes first, as in evaluate's argmax.
            indices = logits.argsort(dim=1, descending=True, stable=True)[:, :top]
            scores = logits.softmax(dim=1).gather(1, indices)
            rows = zip(scores.tolist(), indices.tolist(), strict=True)
            for item, error in zip(batch.items, batch.errors, strict=True):
                path = path_of(item)
                if error is not None:
                    yield Prediction(path, error=error)
                    continue
                best = tuple(Score(self.class_names[k], score) for score, k in zip(*next(rows), strict=True))
                yield Prediction(path, best[0].label, best[0].score, best)

    def embed(self, inputs: Inputs, batch_size: int | None = None) -> npt.NDArray[np.float32]:
        """The input of the classification head, float32 N F, in the order of `inputs`.

        Raises:
            DataError: an image could not be read.
        """
        rows = [np.empty((0, self.model.num_features), np.float32)]
        for batch in self.engine().stream(inputs, batch_size, features=True):
            for item, error in zip(batch.items, batch.errors, strict=True):
                if error is not None:
                    raise DataError(f"{path_of(item) or 'an image'} {error}")
            rows.append(batch.outputs)
        return np.concatenate(rows)

    def evaluate(
        self,
        data: str | Path | Dataset,
        split: str | None = None,
        *,
        data_dir: str | Path | None = None,
        batch_size: int | None = None,
        on_batch: Callable[[int], None] | None = None,
    ) -> Evaluation:
        """Metrics on a dataset: a folder, a name or a Dataset.

        split: "test", "val" or "train"; by default test if there is one, else val. The images are split as in training
        (`notes["split"]`). Classes are matched by name. on_batch is called with the number of images of each batch.

        Raises:
            DataError: the data has a class that the model lacks, or no such split.
        """
        from vitrail.data.catalog import open_dataset  # not needed by predict
        from vitrail.data.dataset import Dataset
        from vitrail.evaluation.evaluate import evaluate

        if isinstance(data, Dataset):
            dataset = data.relabel(self.class_names)
        else:
            options = {key: value for key, value in self.notes.get("split", {}).items() if key in _SPLIT_OPTIONS}
            dataset = open_dataset(data, data_dir=data_dir, class_names=self.class_names, **options)
        name = split or dataset.eval_split()
        self._warn_if_changed(dataset, name)
        result = evaluate(
            self.engine().runtime,
            dataset.split(name),
            self.class_names,
            name=name,
            batch_size=batch_size,
            on_batch=on_batch,
        )
        result.skipped[:0] = dataset.skipped  # found when the folder was opened
        return result

    def _warn_if_changed(self, dataset: Dataset, name: str) -> None:
        """Images that are split by fractions are split differently if there are more or fewer than in training."""
        before = self.notes.get("counts")
        if before and dataset.held_out and name != "train" and dataset.name == self.notes.get("data"):
            now = dataset.counts()
            if now != before:
                counts = (", ".join(f"{count} {split}" for split, count in each.items()) for each in (before, now))
                warnings.warn(
                    f"the images are not the same as in training ({' then, now '.join(counts)}): "
                    f"some of these {name} images may have been trained on",
                    stacklevel=3,
                )

    def save(self, folder: str | Path) -> Path:
        """Write a model folder, atomically; see `vitrail.pretrained.model_folder`."""
        folder = Path(folder)
        mismatch = window_mismatch(self.model.config, self.preprocess.size)
        if mismatch:
            warnings.warn(mismatch, stacklevel=2)
        write_model_folder(
            folder,
            Contents(
                model=self.model,
                preprocess=self.preprocess,
                class_names=self.class_names,
                architecture=self.architecture,
                notes=self.notes,
            ),
        )
        return folder


def load(
    source: str | Path,
    device: str | torch.device = "cpu",
    img_size: int | tuple[int, int] | str | None = None,
    precision: str = "auto",
) -> Classifier:
    """Load a classifier.

    source: a model folder or run folder; a catalog name, for its default published weights; hf:org/repo, timm:name,
    torchvision:name, a URL; or a checkpoint file or folder of another library. img_size: an input size other than that
    of training, see `Classifier.resize`. precision: see `Classifier`.

    Raises:
        WeightsError: the source does not exist, is damaged, or its weights do not match the model.
        ModelError: the model cannot be built, or cannot take images of this size.
        ConfigError: not a size, or not a precision.
    """
    path = Path(source).expanduser()
    if folder := find_model_folder(path):
        found = read_model_folder(folder)
        classifier = Classifier(
            found.model,
            found.preprocess,
            found.class_names,
            None if folder == path else _summary(path / "summary.json"),
            architecture=found.architecture,
            notes=found.notes,
            precision=precision,
        )
    else:
        from vitrail.pretrained.load import load_pretrained  # not needed for a model folder

        name = str(source) if str(source) in VARIANTS else None
        classifier = _from_weights(load_pretrained("default" if name else source, name), precision)
    classifier.to(device)
    return classifier if img_size is None else classifier.resize(img_size)


def _from_weights(found: Pretrained, precision: str) -> Classifier:
    """Classes without known names are named by their indices."""
    config = found.model.config
    names = found.class_names
    if names is None or len(names) != config.num_classes:
        names = tuple(str(number) for number in range(config.num_classes))
    preprocess = found.preprocess
    if preprocess is None:
        if config.in_chans != 3:
            raise ModelError(
                f"{found.loaded.source} has no preprocessing for images of {config.in_chans} channels: "
                "load it with vitrail.create_model, and make a Classifier with a Preprocess"
            )
        assumed = f"{found.loaded.source} has no preprocessing: ImageNet's mean and std are assumed"
        warnings.warn(assumed, stacklevel=3)
        preprocess = Preprocess(size=config.img_size)
    return Classifier(
        found.model.eval(),
        preprocess,
        names,
        found.report,
        architecture=found.name,
        notes={"source": found.loaded.source, "licence": found.loaded.licence},
        precision=precision,
    )


def _summary(path: Path) -> Any:
    """A run's summary; None if the run is not finished."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
