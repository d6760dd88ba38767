"""Data that are objects in memory: torch datasets, lists of (image, label), arrays, and a mapping of splits of these.

Shapes: N images, H W height and width, C channels.
"""

from __future__ import annotations

import hashlib
import os
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from vitrail.data.dataset import ArraySplit, Dataset, SkippedImage, Split
from vitrail.data.formats.scan import Label, make_labelled_dataset
from vitrail.data.formats.table import Row, frame_rows, is_frame, is_table, read_table, split_named, take_files
from vitrail.data.items import ItemSplit, to_image
from vitrail.data.splits import SplitOptions
from vitrail.errors import DataError, DataTypeError
from vitrail.images.convert import BadImage
from vitrail.images.tensors import is_tensor
from vitrail.utils.download import Progress
from vitrail.utils.files import user_path
from vitrail.utils.text import one_line

MEMORY = "memory:"  # the name of a dataset that was an object; it cannot be opened by it
TAKEN = (
    "a folder, a CSV or parquet table, a dataset's name, wds: shards, hf-dataset:, a pandas or polars frame "
    "(path, label), a list of (path, label) or (image, label), a torch.utils.data.Dataset of (image, label), arrays "
    "(images uint8 N H W or N H W C, labels), or a dict of train, val and test with one of these each"
)


@dataclass
class Part:
    """A split as it was found. labels: of each image; those of `split` are not set. class_names: None if unknown."""

    split: Split
    labels: list[Label]
    class_names: Sequence[str] | None = None
    skipped: list[SkippedImage] = field(default_factory=list)


def open_object(data: Any, options: SplitOptions, progress: Progress | None = None) -> Dataset:
    """Open data of any type in TAKEN that is not a string or a path.

    The images of a torch dataset, or of a list of (image, label), are read once to learn labels and sizes, and again,
    from one thread at a time, when they are needed. The transform of torchvision's ImageFolder is not applied.

    Raises:
        DataTypeError: another type. DataError: no image with a label.
    """
    name = MEMORY + _kind(data)
    if isinstance(data, Mapping) and not is_frame(data):
        parts = _mapping_parts(data, progress)
    else:
        parts = read_parts(data, "data", progress)
    names = next((part.class_names for part in parts.values()), None)
    skipped = [each for part in parts.values() for each in part.skipped]
    splits = {name: (part.split, part.labels) for name, part in parts.items()}
    dataset = make_labelled_dataset(name, splits, names, skipped, options, _names_of)
    if all(getattr(part.split, "channels", 3) == 1 for part in parts.values()):
        dataset.channels = 1
    return dataset


def refuse_memory(name: str, options: SplitOptions, progress: Progress | None = None) -> Dataset:
    """The opener of `memory:`, which stands for an object of another Python session."""
    raise DataError(f"the data were an object in memory ({name}): pass it again, as in vitrail.train(data, resume=RUN)")


def read_parts(data: Any, name: str, progress: Progress | None) -> dict[str, Part]:
    """The splits of one object; {"train": ...} if it has no column of splits. Raises DataTypeError."""
    if is_frame(data):
        return _file_parts(frame_rows(data), progress)
    if is_array(data):
        return {"train": _array_part(data, name)}
    if is_torch_dataset(data):
        files = _image_folder(data)
        return {"train": _item_part(data, name, progress)} if files is None else _file_parts(files, progress, data)
    if isinstance(data, Sequence) and len(data) and all(isinstance(x, list | tuple) and len(x) == 2 for x in data):
        if all(isinstance(path, str | os.PathLike) for path, _ in data):
            rows = [Row(os.path.expanduser(os.fspath(path)), _label(label)) for path, label in data]
            return _file_parts(rows, progress)
        return {"train": _item_part(data, name, progress)}
    raise DataTypeError(f"{_kind(data)} is not data to take images from{_hint(data)}: give {TAKEN}")


def image_inputs(inputs: Any) -> Any:
    """Inputs of `predict`, where a table, a frame or a torch dataset is replaced by its images; labels are not read."""
    if is_frame(inputs):
        return [row.path for row in frame_rows(inputs, labels=False)]
    if is_torch_dataset(inputs):
        return (inputs[row][0] for row in range(len(inputs)))
    if isinstance(inputs, str | os.PathLike):
        inputs = [inputs]
    return _with_tables(inputs) if isinstance(inputs, list | tuple) else inputs


def _with_tables(inputs: Sequence[Any]) -> Iterator[Any]:
    for each in inputs:
        if isinstance(each, str | os.PathLike) and is_table(os.fspath(each)):
            yield from (row.path for row in read_table(user_path(os.fspath(each)), labels=False))
        else:
            yield each


def is_torch_dataset(data: object) -> bool:
    """Whether it is a torch.utils.data.Dataset with a length and items by number."""
    torch = sys.modules.get("torch")
    known = torch is not None and isinstance(data, torch.utils.data.Dataset)
    return known and hasattr(data, "__len__") and not isinstance(data, torch.utils.data.IterableDataset)  # type: ignore[union-attr]


def is_array(data: object) -> bool:
    """Whether it is (images, labels) with an array of images."""
    return isinstance(data, tuple) and len(data) == 2 and isinstance(data[0], np.ndarray)


def _hint(data: object) -> str:
    if hasattr(data, "dataset") and hasattr(data, "batch_size"):  # a DataLoader
        return " (pass its .dataset)"
    if hasattr(data, "__iter__") and not hasattr(data, "__len__"):
        return " (it has no length)"
    return ""


def _kind(data: object) -> str:
    """The type's name; of a subset, that of the dataset."""
    while hasattr(data, "dataset") and hasattr(data, "indices"):
        data = data.dataset
    return "arrays" if is_array(data) else type(data).__name__


def _mapping_parts(data: Mapping[Any, Any], progress: Progress | None) -> dict[str, Part]:
    parts: dict[str, Part] = {}
    for key, value in data.items():
        split = split_named(key)
        if split is None or split in parts:
            raise DataTypeError(f"a dict with the keys {', '.join(map(str, data))} is not data: give {TAKEN}")
        found = read_parts(value, split, progress)
        if list(found) != ["train"]:
            raise DataError(f"{key!r} of the data has a column of splits: give the table by itself, or leave it out")
        parts[split] = found["train"]
    return parts


def _file_parts(rows: Sequence[Row], progress: Progress | None, data: Any = None) -> dict[str, Part]:
    """Of files. data: the ImageFolder that lists them."""
    names = getattr(_root(data), "classes", None)
    parts, skipped = take_files(rows, progress)
    found = {name: Part(split, labels, names) for name, (split, labels) in parts.items()}
    for part in list(found.values())[:1]:
        part.skipped = skipped
    if not found:
        raise DataError(f"no image of the data can be read: {skipped[0]['path']} {skipped[0]['reason']}")
    return found


def _array_part(data: tuple[npt.NDArray[Any], Any], name: str) -> Part:
    images, given = data
    labels = np.asarray(given)
    if images.dtype != np.uint8 or images.ndim not in (3, 4) or (images.ndim == 4 and images.shape[3] not in (1, 3)):
        raise DataTypeError(
            f"an array of {images.dtype} {images.shape} is not images: give uint8 N H W or N H W C with 1 or 3 channels"
        )
    if labels.shape != (len(images),):
        raise DataError(f"{len(images)} images need as many labels, not an array of shape {labels.shape}")
    split = ArraySplit(images, np.zeros(len(images), np.int64), name)
    return Part(split, [_label(label) for label in labels.tolist()])


def _label(value: object) -> Label:
    """A label of a list, a dataset or an array: an integer or a string. Raises DataTypeError."""
    if is_tensor(value) or isinstance(value, np.generic):
        value = value.item()  # type: ignore[attr-defined]
    if isinstance(value, int | str):
        return str(value) if isinstance(value, bool) else value
    raise DataTypeError(f"a label is {value!r}: give an integer or a string")


# --- torch datasets and lists of (image, label)


def _item_part(data: Any, name: str, progress: Progress | None) -> Part:
    """Reads every item once, for its label, size and digest."""
    labels: list[Label] = []
    kept: list[tuple[int, int, int]] = []  # row, height, width
    digests: list[str] = []
    skipped: list[SkippedImage] = []
    channels = 1
    for row in range(len(data)):
        try:
            item = data[row]
        except Exception as error:  # of the user's code
            skipped.append({"path": f"{name}/{row}", "reason": f"could not be read: {one_line(error)}"})
            continue
        if not isinstance(item, list | tuple) or len(item) != 2:
            raise DataTypeError(f"item {row} of {_kind(data)} is a {type(item).__name__}, not (image, label)")
        try:
            image = to_image(item[0])
        except BadImage as bad:
            skipped.append({"path": f"{name}/{row}", "reason": bad.reason})
            continue
        channels = max(channels, len(image.getbands()))
        labels.append(_label(item[1]))
        kept.append((row, image.height, image.width))
        digests.append(hashlib.blake2b(image.tobytes(), digest_size=12).hexdigest())
        if progress:
            progress(row + 1, len(data))
    if not kept:
        why = f": {skipped[0]['path']} {skipped[0]['reason']}" if skipped else ""
        raise DataError(f"no item of {_kind(data)} can be read{why}")
    table = np.array(kept, dtype=np.int64)
    split = ItemSplit(data, table[:, 0], np.zeros(len(table), np.int64), table[:, 1:], digests, name, channels)
    names = getattr(_root(data), "classes", None)
    named = isinstance(names, Sequence) and all(isinstance(label, int) and 0 <= label < len(names) for label in labels)
    return Part(split, labels, [str(name) for name in names] if named else None, skipped)  # type: ignore[union-attr]


def _root(data: Any) -> Any:
    """The dataset of which this is a subset."""
    while hasattr(data, "dataset") and hasattr(data, "indices"):
        data = data.dataset
    return data


def _image_folder(data: Any) -> list[Row] | None:
    """The files of torchvision's ImageFolder or DatasetFolder, or of a subset of it; None for another dataset."""
    root = _root(data)
    kinds = {each.__name__ for each in type(root).__mro__ if each.__module__ == "torchvision.datasets.folder"}
    if not kinds or type(root).__getitem__.__module__ != "torchvision.datasets.folder" or root.target_transform:
        return None
    if root.transform is not None:
        warnings.warn(
            f"the transform of {type(root).__name__} is not applied: vitrail crops, augments and normalises itself",
            stacklevel=2,
        )
    rows = np.arange(len(data))
    while data is not root:
        rows, data = np.asarray(data.indices)[rows], data.dataset
    return [Row(path, int(label)) for path, label in (root.samples[row] for row in rows.tolist())]


def _names_of(split: Split) -> list[str]:
    """What decides whether an image is held out."""
    return [split.name(i) for i in range(len(split))]
