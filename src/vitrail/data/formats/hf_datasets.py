"""`hf-dataset:` a dataset of the Hugging Face hub, a folder that `save_to_disk` made, or parquet files.

Datasets by name and saved ones are read by the library `datasets`, from the Arrow files that it maps into memory.
Parquet files need pyarrow alone. They are compressed in groups of rows, of which no single one can be read, so their
images are copied once, side by side, into a file in the cache, and read from there by their places.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from vitrail.data.dataset import Dataset, Labels, Skipped, file_stamp
from vitrail.data.formats.shards import (
    Label,
    Scan,
    ShardSplit,
    Wanted,
    by_split,
    joined,
    kept_scan,
    make_dataset,
)
from vitrail.data.splits import split_of
from vitrail.errors import VitrailError
from vitrail.images.decode import AtLeast, BadImage, decode
from vitrail.utils.download import Progress, cache_dir
from vitrail.utils.files import atomic_folder, wait_for_lock
from vitrail.utils.text import one_line

if TYPE_CHECKING:
    from PIL import Image

SCHEME = "hf-dataset:"
_IMAGE_NAMES = ("image", "img", "images", "picture", "photo", "pixels", "jpg", "png")
_LABEL_NAMES = ("label", "labels", "fine_label", "class", "target", "category", "cls")
_SAVED = ("dataset_info.json", "dataset_dict.json")  # what `save_to_disk` leaves
_ROWS = 64  # of a table in memory at once


@dataclass
class HubSplit:
    """Rows of a `datasets.Dataset` whose column `image` is not decoded by it. sizes: int64 (N, 2)."""

    table: Any
    image_column: str
    rows: npt.NDArray[np.int64]
    labels: Labels
    sizes: npt.NDArray[np.int64]
    prefix: str
    stamp: str
    channels: int = 3

    def __len__(self) -> int:
        return len(self.labels)

    def image(self, i: int, at_least: AtLeast | None = None) -> Image.Image:
        value = self.table[int(self.rows[i])][self.image_column]
        return decode(_source(value), self.channels, at_least)

    def name(self, i: int) -> str:
        return f"{self.prefix}/{self.rows[i]}"

    def stamps(self) -> Iterator[str]:
        """A line for each image that changes when the dataset does."""
        for row in self.rows.tolist():
            yield f"{self.stamp}\t{row}"

    def take(self, rows: npt.NDArray[np.int64]) -> HubSplit:
        """Some of the images, in the order given."""
        return HubSplit(
            self.table,
            self.image_column,
            self.rows[rows],
            self.labels[rows],
            self.sizes[rows],
            self.prefix,
            self.stamp,
            self.channels,
        )


def open_hf(spec: str, wanted: Wanted, progress: Progress | None = None) -> Dataset:
    """Open `hf-dataset:` and parquet files (a path, a pattern or a folder), a saved folder, or a name on the hub.

    A name may go on with a configuration and a revision: org/name/config@revision. The columns are found by what the
    dataset says of them, else by their names. Raises VitrailError.
    """
    word = spec.removeprefix(SCHEME)
    path = os.path.expanduser(word)
    if os.path.isdir(path) and any(os.path.exists(os.path.join(path, name)) for name in _SAVED):
        return _open_tables(spec, _load_saved(path), wanted, progress)
    files = _parquet_files(path)
    if files:
        return _open_parquet(spec, files, wanted, progress)
    if word and os.path.isdir(path):
        raise VitrailError(f"{word} holds no parquet file, and is no folder that save_to_disk made")
    if not word or word.startswith((".", "/", "~")) or word.endswith(".parquet") or glob.has_magic(word):
        raise VitrailError(f"there is no {word or 'name'}: {SCHEME} needs parquet files, a saved dataset, or a name")
    return _open_tables(spec, _load_named(word), wanted, progress)


# --- parquet files, by pyarrow alone


def _parquet_files(path: str) -> list[str]:
    if os.path.isdir(path):
        return sorted(glob.glob(os.path.join(glob.escape(path), "**", "*.parquet"), recursive=True))
    if os.path.isfile(path):
        return [path]
    return [found for found in sorted(glob.glob(path, recursive=True)) if found.endswith(".parquet")]


def _open_parquet(spec: str, files: list[str], wanted: Wanted, progress: Progress | None) -> Dataset:
    scans: dict[str, tuple[str, Scan]] = {}
    for number, file in enumerate(files):
        scans[file] = _unpacked(file)
        if progress:
            progress(number + 1, len(files))
    every = [scan for _, scan in scans.values()]
    names = every[0].class_names
    for file, (_, scan) in scans.items():
        if scan.class_names != names:
            raise VitrailError(f"{file} has other classes than {files[0]}: open them one by one")
    skipped: list[Skipped] = [item for scan in every for item in scan.skipped]
    parts: dict[str, tuple[ShardSplit, list[Label]]] = {}
    for split, members in by_split(files).items():
        found = [(file, *scans[file][1].split(scans[file][0])) for file in members]
        part = joined([images for _, images, _ in found])
        parts[split] = part, [label for _, _, labels in found for label in labels]
    return make_dataset(spec, parts, names, skipped, lambda part: list(part.names), wanted)


def _unpacked(file: str) -> tuple[str, Scan]:
    """Where the images of a parquet file lie side by side, and what they are; unpacked now if they were not yet."""
    stamp = file_stamp(file)
    key = f"{os.path.abspath(file)}\t{stamp}".encode("utf-8", "surrogateescape")
    folder = cache_dir() / "unpacked" / hashlib.blake2b(key, digest_size=12).hexdigest()
    images = folder / "images"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with wait_for_lock(folder.with_name(folder.name + ".lock")):
        if not images.exists():
            with atomic_folder(folder) as temporary:
                scan = _unpack(file, temporary / "images")
                kept_scan(str(images), stamp, lambda: scan)
    return str(images), kept_scan(str(images), stamp, lambda: _unpack(file, Path(os.devnull)))


def _unpack(file: str, out: Path) -> Scan:
    """Copy the images of a parquet file to `out`, one after the other, a few rows in memory at a time."""
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise VitrailError(f"parquet files need pyarrow: pip install 'vitrail[parquet]' to read {file}") from None
    try:
        table = ParquetFile(file)
        image, label, names = _parquet_columns(file, table.schema_arrow)
        scan, place, row = Scan(class_names=names), 0, 0
        base = os.path.basename(file)
        with out.open("wb") as content:
            for batch in table.iter_batches(_ROWS, columns=[image, label]):
                for value, known in zip(batch[image].to_pylist(), batch[label].to_pylist(), strict=True):
                    length = _add(scan, f"{base}/{row}", f"{file}/{row}", value, known, place)
                    if length:
                        content.write(_bytes(value))
                    place, row = place + length, row + 1
    except (OSError, ArrowException) as error:
        raise VitrailError(f"cannot read {file}: {one_line(error)}") from None
    return scan


def _parquet_columns(file: str, schema: Any) -> tuple[str, str, list[str] | None]:
    """The columns of images and labels, and the classes' names, where the file tells them."""
    try:
        features = json.loads(schema.metadata[b"huggingface"])["info"]["features"]
    except (TypeError, KeyError, ValueError):
        features = {}
    columns = list(schema.names)
    held = [name for name in columns if str(schema.field(name).type).startswith(("struct", "binary", "large_binary"))]
    return _columns(file, {name: features.get(name, {}) for name in columns}, held)


def _columns(
    what: str, features: Mapping[str, Mapping[str, Any]], may_hold_images: list[str]
) -> tuple[str, str, list[str] | None]:
    """(image column, label column, class names) by the features' types, else by the columns' names."""
    columns = list(features)
    images = [name for name in columns if features[name].get("_type") == "Image"]
    image = _first(_IMAGE_NAMES, images) or _first(_IMAGE_NAMES, may_hold_images, named=True)
    labels = [name for name in columns if features[name].get("_type") == "ClassLabel"]
    label = _first(_LABEL_NAMES, labels) or _first(_LABEL_NAMES, columns, named=True)
    for found, wanted in ((image, "images"), (label, "labels")):
        if found is None:
            raise VitrailError(f"{what} has no column of {wanted}; its columns are {', '.join(columns)}")
    assert image is not None
    assert label is not None
    names = features[label].get("names")
    return image, label, None if names is None else [str(name) for name in names]


def _first(names: tuple[str, ...], among: list[str], *, named: bool = False) -> str | None:
    """The first of the usual names that is there; else the first column, unless it must be `named` so."""
    known = next((name for name in names if name in among), None)
    return known if known or named or not among else among[0]


# --- tables of the library `datasets`


def _datasets() -> Any:
    try:
        import datasets
    except ImportError:
        raise VitrailError("this needs the library datasets: pip install 'vitrail[hf]'") from None
    return datasets


def _load_saved(path: str) -> Any:
    try:
        return _datasets().load_from_disk(path)
    except (OSError, ValueError) as error:
        raise VitrailError(f"cannot open {path}: {one_line(error)}") from None


def _load_named(word: str) -> Any:
    """ "org/name/config@revision", of which the last two may be left out; a name may stand alone."""
    name, _, revision = word.partition("@")
    parts = name.split("/")
    if len(parts) > 3 or not all(parts):
        raise VitrailError(f"{word!r} is no dataset's name: org/name, org/name/config, or either with @revision")
    config = parts[2] if len(parts) == 3 else None
    library = _datasets()
    try:
        return library.load_dataset("/".join(parts[:2]), config, revision=revision or None)
    except Exception as error:  # of the hub's, the network's and the library's own kinds
        raise VitrailError(f"cannot open the dataset {word}: {one_line(error, 300)}") from None


def _open_tables(spec: str, loaded: Any, wanted: Wanted, progress: Progress | None) -> Dataset:
    tables = dict(loaded) if isinstance(loaded, dict) else {str(loaded.split or "train"): loaded}
    known = {name: split_of(name) for name in tables}
    if len(tables) == 1:
        known = {name: split or "train" for name, split in known.items()}
    left_out = [name for name, split in known.items() if split is None]
    used = {split: name for name, split in known.items() if split is not None}
    if not used:
        raise VitrailError(f"{spec} has the splits {', '.join(tables)}, of which none is called train, val or test")
    names: list[str] | None = None
    skipped: list[Skipped] = []
    parts: dict[str, tuple[HubSplit, list[Label]]] = {}
    for split, name in used.items():
        table = tables[name]
        image, label, names = _columns(spec, _features(table), list(table.column_names))
        part, labels, bad = _table_split(table, image, label, f"{spec}/{name}", progress)
        parts[split] = part, labels
        skipped += bad
    dataset = make_dataset(spec, parts, names, skipped, lambda part: [str(row) for row in part.rows], wanted)
    if left_out:
        dataset.how_split += f"; left out: {', '.join(left_out)}"
    return dataset


def _features(table: Any) -> dict[str, dict[str, Any]]:
    """What a table says of its columns, as the hub's own JSON has it."""
    found: dict[str, dict[str, Any]] = {}
    for name, feature in table.features.items():
        found[name] = {"_type": type(feature).__name__, "names": getattr(feature, "names", None)}
    return found


def _table_split(
    table: Any, image: str, label: str, prefix: str, progress: Progress | None
) -> tuple[HubSplit, list[Label], list[Skipped]]:
    plain = table.select_columns([image, label]).cast_column(image, _datasets().Image(decode=False))
    stamp = str(getattr(table, "_fingerprint", "")) or prefix

    def look() -> Scan:
        scan = Scan()
        for row in range(0, len(plain), _ROWS):
            batch = plain[row : row + _ROWS]
            for number, (value, known) in enumerate(zip(batch[image], batch[label], strict=True), row):
                _add(scan, str(number), f"{prefix}/{number}", value, known, number)
            if progress:
                progress(min(row + _ROWS, len(plain)), len(plain))
        return scan

    scan = kept_scan(f"{prefix}\t{image}\t{label}", f"{stamp}\t{len(plain)}", look)
    rows = np.array([sample[1] for sample in scan.samples], dtype=np.int64)
    sizes = np.array([sample[4:6] for sample in scan.samples], dtype=np.int64).reshape(-1, 2)
    part = HubSplit(plain, image, rows, np.zeros(len(rows), dtype=np.int64), sizes, prefix, stamp)
    return part, [sample[3] for sample in scan.samples], scan.skipped


# --- one row of either


def _source(value: Any) -> bytes | str:
    """What stands in a column of images: bytes, or a struct of bytes and a path. Raises BadImage."""
    if isinstance(value, Mapping):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, bytes | str) and value:
        return value
    raise BadImage("has no image")


def _bytes(value: Any) -> bytes:
    source = _source(value)
    if isinstance(source, bytes):
        return source
    try:
        return Path(source).read_bytes()
    except OSError as error:
        raise BadImage(f"cannot be read: {error.strerror or error}") from None


def _add(scan: Scan, name: str, path: str, value: Any, label: Any, place: int) -> int:
    """Add a row to what was found, or say why not; the length of its image, where it was added."""
    if label is None or (isinstance(label, int) and label < 0):  # the hub's way to hide the labels of test images
        scan.skip(path, "has no label")
        return 0
    if not isinstance(label, int | str) or isinstance(label, bool):
        scan.skip(path, f"has the label {label!r}, which is neither a number nor a word")
        return 0
    try:
        content = _bytes(value)
    except BadImage as bad:
        scan.skip(path, bad.reason)
        return 0
    before = len(scan.samples)
    scan.add(name, path, content, place, label)
    return len(content) if len(scan.samples) > before else 0
