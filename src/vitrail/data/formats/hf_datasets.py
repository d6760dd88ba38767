"""`hf-dataset:` a dataset on the Hugging Face hub, a folder written by `save_to_disk`, or parquet files.

All are read by the library `datasets` from memory-mapped Arrow files. Parquet files, which do not allow random access,
are converted to Arrow once, in the cache.
"""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from vitrail.data.dataset import Dataset, EncodedSplit, Labels, SkippedImage
from vitrail.data.formats.scan import Label, Scan, cached_scan, group_by_split, make_labelled_dataset
from vitrail.data.splits import SplitOptions, split_of
from vitrail.errors import DataError, DeviceError, how_to_install
from vitrail.images.decode import BadImage
from vitrail.utils.download import Progress, cache_dir, unreachable
from vitrail.utils.text import one_line

_IMAGE_COLUMNS = ("image", "img", "images", "picture", "photo", "pixels", "jpg", "png")
_LABEL_COLUMNS = ("label", "labels", "fine_label", "class", "target", "category", "cls")
_SAVED = ("dataset_info.json", "dataset_dict.json")  # written by `save_to_disk`
_ROWS = 64  # of a table in memory at once


@dataclass
class TableSplit(EncodedSplit):
    """Rows of a `datasets.Dataset` whose image column is not decoded by it."""

    table: Any
    image_column: str
    rows: npt.NDArray[np.int64]
    labels: Labels
    sizes: npt.NDArray[np.int64]
    lengths: npt.NDArray[np.int64]  # of the images' contents, bytes
    prefix: str
    fingerprint: str

    def encoded(self, i: int) -> bytes | str:
        return _source(self.table[int(self.rows[i])][self.image_column])

    def name(self, i: int) -> str:
        return f"{self.prefix}/{self.rows[i]}"

    def fingerprints(self) -> Iterator[str]:
        for row in self.rows.tolist():
            yield f"{self.fingerprint}\t{row}"

    def stats(self) -> npt.NDArray[np.int64]:
        return np.stack([self.lengths, np.full(len(self.rows), -1)], axis=1)

    def take(self, rows: npt.NDArray[np.int64]) -> TableSplit:
        lengths = self.lengths[rows]
        return replace(self, rows=self.rows[rows], labels=self.labels[rows], sizes=self.sizes[rows], lengths=lengths)


def open_hf_dataset(name: str, options: SplitOptions, progress: Progress | None = None) -> Dataset:
    """Open parquet files (a path, a pattern or a folder), a saved folder, or a name on the hub.

    A hub name can include a configuration and a revision: org/name/config@revision. The image and label columns are
    found by their feature types, else by their names. Raises DataError.
    """
    tables = _load_tables(name)
    known = {key: split_of(key) or ("train" if len(tables) == 1 else None) for key in tables}
    used = {split: key for key, split in known.items() if split is not None}
    if not used:
        raise DataError(f"{name} has the splits {', '.join(tables)}; none is named train, val or test")
    class_names: list[str] | None = None
    skipped: list[SkippedImage] = []
    splits: dict[str, tuple[TableSplit, list[Label]]] = {}
    for split, key in used.items():
        image, label, class_names = _columns(name, tables[key])
        part, scan = _scan_table(tables[key], image, label, f"hf-dataset:{name}/{key}", progress)
        splits[split] = part, scan.labels
        skipped += scan.skipped
    dataset = make_labelled_dataset(f"hf-dataset:{name}", splits, class_names, skipped, options, _names_of)
    left_out = [key for key, split in known.items() if split is None]
    if left_out:
        dataset.how_split += f"; left out: {', '.join(left_out)}"
    return dataset


def _names_of(split: TableSplit) -> list[str]:
    return [str(row) for row in split.rows]


# --- from a name to tables


def _load_tables(name: str) -> dict[str, Any]:
    """The tables by split name."""
    path = os.path.expanduser(name)
    files = _parquet_files(path)
    if os.path.isdir(path) and any(os.path.exists(os.path.join(path, file)) for file in _SAVED):
        with _errors_of(name):
            loaded = _library().load_from_disk(path)
    elif files:
        loaded = _load_parquet(name, files)
    elif name and os.path.isdir(path):
        raise DataError(f"{name} contains no parquet file and was not written by save_to_disk")
    elif not name or is_path(name) or glob.has_magic(name):
        raise DataError(f"could not find {name!r}: hf-dataset: needs parquet files, a saved dataset, or a hub name")
    else:
        loaded = _load_from_hub(name)
    return dict(loaded) if isinstance(loaded, dict) else {str(loaded.split or "train"): loaded}


def is_path(name: str) -> bool:
    """Whether a name means local files, not a dataset on the hub."""
    return name.startswith((".", "/", "~")) or name.endswith(".parquet") or os.path.isdir(name)


def _parquet_files(path: str) -> list[str]:
    if os.path.isdir(path):
        found = sorted(glob.glob(os.path.join(glob.escape(path), "**", "*.parquet"), recursive=True))
        return [file for file in found if os.path.isfile(file)]
    if os.path.isfile(path):
        return [path]
    matching = sorted(glob.glob(path, recursive=True))
    return [file for file in matching if file.endswith(".parquet") and os.path.isfile(file)]


def _load_parquet(name: str, files: list[str]) -> Any:
    library = _library()
    from pyarrow.parquet import read_schema  # which `datasets` depends on

    first: Any = None
    for file in files:
        with _errors_of(file):
            features = library.Features.from_arrow_schema(read_schema(file))
        first = first or features
        # `datasets` applies the features of the first file to all: other class names would give wrong labels.
        if _class_names(features) != _class_names(first):
            raise DataError(f"{file} has other class names than {files[0]}: open them separately")
    with _errors_of(name):
        return library.load_dataset("parquet", data_files=group_by_split(files), cache_dir=str(cache_dir() / "parquet"))


def _class_names(features: Mapping[str, Any]) -> dict[str, list[str]]:
    return {column: feature.names for column, feature in features.items() if type(feature).__name__ == "ClassLabel"}


def _load_from_hub(name: str) -> Any:
    """Load "org/name/config@revision", of which only the name is required."""
    path, _, revision = name.partition("@")
    parts = path.split("/")
    if len(parts) > 3 or not all(parts):
        raise DataError(f"{name!r} is not a dataset name: use org/name[/config][@revision]")
    config = parts[2] if len(parts) == 3 else None
    library = _library()
    with _errors_of(name), _offline_if_unreachable(library):
        return library.load_dataset("/".join(parts[:2]), config, revision=revision or None)


@contextmanager
def _offline_if_unreachable(library: Any) -> Iterator[None]:
    """Without a connection to the hub the library is told so: it then looks into its cache, without trying for long."""
    from huggingface_hub import constants

    reason = None if constants.HF_HUB_OFFLINE else unreachable(constants.ENDPOINT)
    if reason is None:
        yield
        return
    flags = [(constants, "HF_HUB_OFFLINE"), (library.config, "HF_HUB_OFFLINE"), (library.config, "HF_DATASETS_OFFLINE")]
    before = [(owner, flag, getattr(owner, flag)) for owner, flag in flags if hasattr(owner, flag)]
    try:
        for owner, flag, _ in before:
            setattr(owner, flag, True)
        yield
    except Exception:
        raise ConnectionError(
            f"cannot reach the hub ({reason}), and it is not in the cache; check the connection, or use local files"
        ) from None
    finally:
        for owner, flag, value in before:
            setattr(owner, flag, value)


def _library() -> Any:
    try:
        import datasets
    except ImportError:
        raise DeviceError(f"hf-dataset: needs the library datasets: {how_to_install('hf')}") from None
    return datasets


@contextmanager
def _errors_of(name: str) -> Iterator[None]:
    """Any error of the hub, the network or the library as a DataError of one line."""
    try:
        yield
    except Exception as error:
        raise DataError(f"could not read {name}: {one_line(error.__cause__ or error)}") from None


# --- from tables to splits


def _columns(name: str, table: Any) -> tuple[str, str, list[str] | None]:
    """(image column, label column, class names): found by feature type, else by column name."""
    kinds: dict[str, str] = {column: type(feature).__name__ for column, feature in table.features.items()}

    def find(content: str, kind: str, usual_names: tuple[str, ...]) -> str:
        typed = [column for column, found in kinds.items() if found == kind]
        for column in (*usual_names, *typed):
            if column in (typed or kinds):
                return column
        raise DataError(f"{name} has no column of {content}; its columns are {', '.join(kinds)}")

    image, label = find("images", "Image", _IMAGE_COLUMNS), find("labels", "ClassLabel", _LABEL_COLUMNS)
    return image, label, getattr(table.features[label], "names", None)


def _scan_table(table: Any, image: str, label: str, prefix: str, progress: Progress | None) -> tuple[TableSplit, Scan]:
    table = table.select_columns([image, label]).cast_column(image, _library().Image(decode=False))
    fingerprint = str(getattr(table, "_fingerprint", "")) or prefix

    def scan_rows() -> Scan:
        scan = Scan()
        for start in range(0, len(table), _ROWS):
            batch = table[start : start + _ROWS]
            for row, (value, known) in enumerate(zip(batch[image], batch[label], strict=True), start):
                _add(scan, row, f"{prefix}/{row}", value, known)
            if progress:
                progress(min(start + _ROWS, len(table)), len(table))
        return scan

    scan = cached_scan(f"{prefix}\t{image}\t{label}", f"{fingerprint}\t{len(table)}", scan_rows)
    rows = np.array([sample.offset for sample in scan.samples], dtype=np.int64)
    lengths = np.array([sample.length or -1 for sample in scan.samples], dtype=np.int64)
    labels = np.zeros(len(rows), dtype=np.int64)
    return TableSplit(table, image, rows, labels, scan.sizes, lengths, prefix, fingerprint), scan


def _add(scan: Scan, row: int, path: str, value: Any, label: Any) -> None:
    """Add a row to the scan, or skip it with the reason."""
    if label is None or (isinstance(label, int) and label < 0):  # -1: how the hub hides the labels of test images
        scan.skip(path, "has no label")
    elif not isinstance(label, int | str) or isinstance(label, bool):
        scan.skip(path, f"has the label {label!r}, which is neither an integer nor a string")
    else:
        try:
            source = _source(value)
        except BadImage as bad:
            scan.skip(path, bad.reason)
        else:
            scan.add(str(row), path, source, label, row)


def _source(value: Any) -> bytes | str:
    """The bytes or path of an image column's value. Raises BadImage if it has neither."""
    if isinstance(value, Mapping):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, bytes | str) and value:
        return value
    raise BadImage("has no image")
