"""Tables of images: CSV and parquet files and frames with the columns path, label and perhaps split and weight.

A path is relative to the folder of the table's file, or to the working directory for a frame.
"""

from __future__ import annotations

import csv
import io
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from vitrail.data.dataset import Dataset, FileSplit, SkippedImage
from vitrail.data.formats.scan import Label, make_labelled_dataset, scan_files
from vitrail.data.splits import SPLIT_NAMES, SPLITS, SplitOptions
from vitrail.errors import DataError, DeviceError, how_to_install
from vitrail.images.decode import image_extensions
from vitrail.utils.download import Progress
from vitrail.utils.files import user_path
from vitrail.utils.text import one_line

SUFFIXES = (".csv", ".tsv", ".parquet")
# Names of the columns, without regard to case; the first that a table has is used.
_COLUMNS = {
    "path": (
        "path",
        "image",
        "image_path",
        "img_path",
        "filepath",
        "file_path",
        "file",
        "filename",
        "file_name",
        "img",
    ),
    "label": ("label", "labels", "class", "target", "category", "class_name"),
    "split": ("split",),
    "weight": ("weight", "sample_weight"),
}
_NEED = "a table needs the columns path and label, and may have split and weight"


class Row(NamedTuple):
    """One image. label, split, weight: None if it has none."""

    path: str
    label: Label | None
    split: str | None = None
    weight: float | None = None


class Table(NamedTuple):
    """Columns by name, and where each row is, such as "line 7"."""

    columns: Mapping[str, Sequence[Any]]
    places: Sequence[str]


def is_table(path: str) -> bool:
    """Whether a path names a table, and not a folder."""
    return path.lower().endswith(SUFFIXES) and not user_path(path).is_dir()


def is_frame(data: object) -> bool:
    """Whether it is a pandas or polars frame, neither of which is imported for it."""
    return type(data).__module__.partition(".")[0] in ("pandas", "polars") and hasattr(data, "columns")


def open_table(path: str, options: SplitOptions, progress: Progress | None = None) -> Dataset:
    """Open a CSV or parquet file. Raises DataError, or DeviceError without pyarrow for parquet."""
    file = user_path(path)
    rows = read_table(file)
    parts, skipped = take_files(rows, progress)
    if not parts:
        missing = f"{skipped[0]['path']} {skipped[0]['reason']}" if skipped else "it has no rows"
        raise DataError(f"{path} names no image that can be read ({missing}); paths are relative to the table's folder")

    def names_of(split: FileSplit) -> list[str]:
        return [Path(os.path.relpath(image, file.parent)).as_posix() for image in split.paths]

    return make_labelled_dataset(str(file), parts, None, skipped, options, names_of)


def read_table(file: Path, *, labels: bool = True) -> list[Row]:
    """The rows of a CSV or parquet file, with paths relative to its folder resolved. labels: whether they are needed.

    Raises DataError.
    """
    if not file.is_file():
        raise DataError(f"{file} does not exist")
    table = _read_parquet(file) if file.suffix.lower() == ".parquet" else _read_csv(file)
    return list(_rows(table, str(file), file.parent, labels))


def frame_rows(frame: Any, *, labels: bool = True) -> list[Row]:
    """The rows of a frame. Raises DataError."""
    names = [str(name) for name in frame.columns]
    columns = {name: frame[key].to_numpy().tolist() for name, key in zip(names, frame.columns, strict=True)}
    return list(_rows(_numbered(columns, len(frame)), f"the {type(frame).__name__}", Path(), labels))


def take_files(
    rows: Sequence[Row], progress: Progress | None = None
) -> tuple[dict[str, tuple[FileSplit, list[Label]]], list[SkippedImage]]:
    """The files of rows by split with their labels, and what was left out. Every header is read."""
    skipped: list[SkippedImage] = []
    parts: dict[str, tuple[FileSplit, list[Label]]] = {}
    for split in SPLITS:
        of_split = [row for row in rows if (row.split or "train") == split]
        skipped += [{"path": row.path, "reason": "has no label"} for row in of_split if row.label is None]
        files = [(row, row.label) for row in of_split if row.label is not None]
        scan = scan_files([(row.path, label) for row, label in files], progress)
        skipped += scan.skipped
        kept = [files[sample.offset][0] for sample in scan.samples]
        weights = [1.0 if row.weight is None else row.weight for row in kept]
        weighted = any(row.weight is not None for row in kept)
        if kept:
            files_of = FileSplit(
                [row.path for row in kept],
                np.zeros(len(kept), np.int64),
                scan.sizes,
                np.array(weights, np.float64) if weighted else None,
            )
            parts[split] = files_of, scan.labels
    train = parts.get("train")
    if train is not None and train[0].weights is not None and not train[0].weights.any():
        raise DataError("the weights of all training images are 0: at least one must be above 0")
    return parts, skipped


def split_named(value: object) -> str | None:
    """train, val or test, by any name that SPLIT_NAMES has for it; None for another."""
    return SPLIT_NAMES.get(str(value).strip().lower())


def _numbered(columns: Mapping[str, Sequence[Any]], count: int) -> Table:
    return Table(columns, [f"row {number}" for number in range(1, count + 1)])


def _rows(table: Table, name: str, base: Path, need_labels: bool) -> Iterator[Row]:
    found = _find_columns(table.columns, name, need_labels)
    empty: list[Any] = [None] * len(table.places)
    values = [found.get(column, empty) for column in _COLUMNS]
    for where, path, label, split, weight in zip(table.places, *values, strict=True):
        if _missing(path):
            raise DataError(f"{name} has no path in {where}")
        yield Row(
            str(base / os.path.expanduser(str(path).strip())),
            _label(label),
            _split(split, name, where) if "split" in found else None,
            _weight(weight, name, where) if "weight" in found else None,
        )


def _find_columns(columns: Mapping[str, Sequence[Any]], name: str, need_labels: bool) -> dict[str, Sequence[Any]]:
    """The columns by what they mean. Raises DataError if path or label is missing."""
    by_name = {column.strip().lower(): values for column, values in columns.items()}
    found = {
        meaning: by_name[chosen]
        for meaning, names in _COLUMNS.items()
        if (chosen := next((each for each in names if each in by_name), None)) is not None
    }
    for needed in ("path", "label") if need_labels else ("path",):
        if needed not in found:
            raise DataError(f"{name} has no column {needed}, but {', '.join(columns) or 'nothing'}: {_NEED}")
    return found


def _missing(value: object) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value)) or str(value).strip() in ("", "<NA>")


def _label(value: object) -> Label | None:
    """An integer or a text; 3.0, which pandas makes of 3 beside a missing label, is 3."""
    if _missing(value):
        return None
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    text = str(value).strip()
    return text.removesuffix(".0") if re.fullmatch(r"\d+\.0", text) else text


def _split(value: object, name: str, where: str) -> str:
    split = split_named(value)
    if split is None:
        what = "no split" if _missing(value) else f"the split {str(value)!r}"
        raise DataError(f"{name} has {what} in {where}: write train, val or test in every row")
    return split


def _weight(value: object, name: str, where: str) -> float:
    try:
        weight = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        weight = math.nan
    if not 0 <= weight < math.inf:
        raise DataError(f"{name} has the weight {value!r} in {where}: weights are numbers from 0 on")
    return weight


# --- files


def _read_parquet(file: Path) -> Table:
    try:
        from pyarrow.parquet import read_table as read
    except ImportError:
        raise DeviceError(f"{file} needs pyarrow: {how_to_install('parquet')}") from None
    try:
        table = read(file)
    except Exception as error:
        raise DataError(f"could not read {file}: {one_line(error)}") from None
    columns = {name: table.column(name).to_pylist() for name in table.column_names}
    paths = _find_columns(columns, str(file), need_labels=False)["path"]
    if any(not isinstance(path, str) for path in paths if path is not None):
        raise DataError(f"{file} has the images themselves, not their paths: write hf-dataset:{file}")
    return _numbered(columns, len(table))


def _read_csv(file: Path) -> Table:
    """A CSV file; without a header, its columns are path, label, and split or weight by their content."""
    try:
        text = file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"could not read {file}: {one_line(error)}; it must be UTF-8") from None
    delimiter = max(",;\t|", key=text.partition("\n")[0].count)
    reader = csv.reader(io.StringIO(text), delimiter=delimiter, strict=True)
    try:
        lines = [(f"line {reader.line_num}", line) for line in reader if any(line)]
    except csv.Error as error:
        raise DataError(f"could not read {file}: {error} in line {reader.line_num}") from None
    if not lines:
        raise DataError(f"{file} is empty")
    width = len(lines[0][1])
    if wrong := next(((place, line) for place, line in lines if len(line) != width), None):
        raise DataError(f"{file} has {len(wrong[1])} columns in {wrong[0]}, but {width} in {lines[0][0]}")
    names = [cell.strip() for cell in lines[0][1]]
    if _is_header(names):
        lines = lines[1:]
    else:
        names = _without_header(file, [line for _, line in lines])
    columns = {name: [line[i] for _, line in lines] for i, name in enumerate(names)}
    return Table(columns, [place for place, _ in lines])


def _is_header(cells: Sequence[str]) -> bool:
    """Whether a first line names columns: one of them is a name of paths, and none is an image file."""
    names = {cell.lower() for cell in cells}
    return any(name in names for name in _COLUMNS["path"]) and not any(map(_is_image, cells))


def _is_image(cell: str) -> bool:
    return os.path.splitext(cell)[1].lower() in image_extensions()


def _without_header(file: Path, lines: Sequence[Sequence[str]]) -> list[str]:
    """Names for the columns of a table without a header. Raises DataError if these are not clear."""
    width = len(lines[0])
    if not (_is_image(lines[0][0].strip()) or os.path.isfile(file.parent / lines[0][0].strip())) or width > 4:
        raise DataError(f"{file} begins with {', '.join(lines[0])[:100]}, neither a header nor an image: {_NEED}")
    more: list[str] = []
    for column in range(2, width):
        cells = [line[column] for line in lines]
        tests: dict[str, Callable[[str], object]] = {"split": split_named, "weight": _is_number}
        name = next((name for name, test in tests.items() if all(map(test, cells))), None)
        if name is None or name in more:
            raise DataError(f"column {column + 1} of {file} is neither splits nor weights: give the table a header")
        more.append(name)
    return ["path", "label", *more][:width]


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True
