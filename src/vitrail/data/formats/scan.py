"""The scan of a shard or table, cached as JSON, and the dataset that is made from scans."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from vitrail.data.dataset import Dataset, SkippedImage, Split
from vitrail.data.splits import SPLIT_NAMES, SPLITS, SplitOptions, make_dataset, natural, split_of
from vitrail.errors import DataError, VitrailError
from vitrail.images.decode import BadImage, decode, read_header
from vitrail.utils.download import Progress, cache_dir
from vitrail.utils.files import atomic_write_text

Label = int | str  # a class index or a class name
S = TypeVar("S", bound=Split)
_VERSION = 2  # of the cached JSON
_CHUNK = 64  # files per task of the scan


class Sample(NamedTuple):
    """A readable image. offset, length: of its content in a shard; in a table or list of files, offset is its row."""

    name: str
    offset: int
    length: int
    label: Label
    height: int
    width: int


@dataclass
class Scan:
    """Usable samples, and images that were left out."""

    samples: list[Sample] = field(default_factory=list)
    skipped: list[SkippedImage] = field(default_factory=list)

    @property
    def labels(self) -> list[Label]:
        return [sample.label for sample in self.samples]

    @property
    def sizes(self) -> npt.NDArray[np.int64]:
        """(N, 2): heights and widths."""
        return np.array([(sample.height, sample.width) for sample in self.samples], dtype=np.int64).reshape(-1, 2)

    def add(self, name: str, path: str, source: str | bytes, label: Label, offset: int = 0) -> None:
        """Add a sample if `source` is a readable image, else skip it."""
        try:
            header = read_header(source)
            if header.may_fail:
                decode(source)
        except BadImage as bad:
            self.skip(path, bad.reason)
        else:
            length = len(source) if isinstance(source, bytes) else 0
            self.samples.append(Sample(name, offset, length, label, header.height, header.width))

    def skip(self, path: str, reason: str) -> None:
        self.skipped.append({"path": path, "reason": reason})


def scan_files(files: Sequence[tuple[str, Label]], progress: Progress | None) -> Scan:
    """Read the headers of all files, each (path, label). A sample's offset is the file's place in `files`."""

    def scan_chunk(start: int) -> Scan:
        scan = Scan()
        for number, (path, label) in enumerate(files[start : start + _CHUNK], start):
            scan.add(path, path, path, label, number)
        return scan

    found = Scan()
    with ThreadPoolExecutor(min(16, 4 * (os.cpu_count() or 1))) as pool:
        for part in pool.map(scan_chunk, range(0, len(files), _CHUNK)):
            found.samples += part.samples
            found.skipped += part.skipped
            if progress:
                progress(len(found.samples) + len(found.skipped), len(files))
    return found


def cached_scan(key: str, fingerprint: str, scan: Callable[[], Scan]) -> Scan:
    """The cached scan of `key` if its fingerprint is unchanged, else a new one, which is cached."""
    digest = hashlib.blake2b(key.encode("utf-8", "surrogateescape"), digest_size=12).hexdigest()
    path = cache_dir() / "indexes" / f"{digest}.json"
    try:
        record = json.loads(path.read_bytes())
        if record["version"] == _VERSION and record["fingerprint"] == fingerprint:
            return Scan([Sample(*sample) for sample in record["samples"]], record["skipped"])
    except (OSError, ValueError, KeyError, TypeError):
        pass  # missing or damaged
    found = scan()
    with suppress(OSError, VitrailError):  # if it cannot be written, the next run scans again
        atomic_write_text(path, json.dumps(asdict(found) | {"version": _VERSION, "fingerprint": fingerprint}))
    return found


def group_by_split(paths: Iterable[str]) -> dict[str, list[str]]:
    """Files by the split that their name or their folder's name contains; "train" if neither does."""
    groups: dict[str, list[str]] = {}
    for path in paths:
        split = split_of(Path(path).name) or SPLIT_NAMES.get(Path(path).parent.name.lower(), "train")
        groups.setdefault(split, []).append(path)
    return {split: groups[split] for split in SPLITS if split in groups}


def make_labelled_dataset(
    name: str,
    splits: Mapping[str, tuple[S, list[Label]]],
    class_names: Sequence[str] | None,
    skipped: list[SkippedImage],
    options: SplitOptions,
    names_of: Callable[[S], list[str]],
) -> Dataset:
    """A dataset from splits and their labels, which are class indices or class names.

    class_names: of the indices 0, 1, ...; None to use the sorted labels themselves. Raises DataError if no image has a
    usable label.
    """
    splits = {split: splits[split] for split in SPLITS if split in splits and splits[split][1]}
    if not splits:
        why = f": {skipped[0]['path']} {skipped[0]['reason']}" if skipped else ""
        raise DataError(f"{name} contains no image with a label{why}")
    classes = list(class_names) if class_names is not None else _classes(name, splits)
    options.check_classes(name, classes)
    index: dict[Label, int] = {name: i for i, name in enumerate(classes)}
    if class_names is not None:
        index |= {i: i for i in range(len(classes))} | {str(i): i for i in range(len(classes)) if str(i) not in index}
    labelled: dict[str, S] = {}
    for split, (images, labels) in splits.items():
        indices = np.array([index.get(label if label in index else str(label), -1) for label in labels])
        for row in np.flatnonzero(indices < 0).tolist():
            reason = f"has the label {labels[row]!r}, which is not one of the {len(classes)} classes"
            skipped.append({"path": images.name(row), "reason": reason})
        rows = np.flatnonzero(indices >= 0)
        labelled[split] = images.take(rows)
        labelled[split].labels = indices[rows]
    if not any(map(len, labelled.values())):
        raise DataError(f"{name} contains no image whose label is one of its {len(classes)} classes")
    return make_dataset(name, classes, labelled, options, names_of=names_of, skipped=skipped)


def _classes(name: str, splits: Mapping[str, tuple[S, list[Label]]]) -> list[str]:
    """The labels of the first split, sorted. Raises DataError if another split has more."""
    first = next(iter(splits))
    found = set(splits[first][1])
    if all(isinstance(label, int) for label in found):
        classes = [str(label) for label in sorted(found)]
    else:
        classes = sorted({str(label) for label in found}, key=natural)
    for split, (_, labels) in splits.items():
        unknown = {str(label) for label in labels} - set(classes)
        if unknown:
            raise DataError(f"{name}: the class {min(unknown)!r} is in {split} but not in {first}")
    return classes
