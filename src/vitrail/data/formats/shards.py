"""Images that lie in large files, many to a file, each read by its place: tar shards, and what tables were unpacked to.

What a scan of such a file found is kept as JSON in the cache, and holds as long as the file's length and time of change
do.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from vitrail.data.dataset import Dataset, Labels, Sizes, Skipped, Split, file_stamp
from vitrail.data.splits import SPLIT_NAMES, Part, hold_out, split_of
from vitrail.errors import VitrailError
from vitrail.images.decode import AtLeast, BadImage, decode, read_header
from vitrail.utils.download import cache_dir
from vitrail.utils.files import atomic_write_text

if TYPE_CHECKING:
    from PIL import Image

Label = int | str
_VERSION = 1  # of what is kept of a scan


@dataclass
class ShardSplit:
    """Images in shards. places: int64 (N, 3), the number of the shard, where in it the image begins, and its length.

    sizes: int64 (N, 2), heights and widths.
    """

    shards: list[str]
    names: list[str]
    places: npt.NDArray[np.int64]
    labels: Labels
    sizes: npt.NDArray[np.int64]
    channels: int = 3

    def __len__(self) -> int:
        return len(self.labels)

    def image(self, i: int, at_least: AtLeast | None = None) -> Image.Image:
        return decode(self._read(i), self.channels, at_least)

    def _read(self, i: int) -> bytes:
        number, begin, length = self.places[i].tolist()
        try:
            # Opened each time, which costs some microseconds: a process may not hold thousands of shards open.
            with open(self.shards[number], "rb", buffering=0) as file:
                file.seek(begin)
                content = file.read(length)
        except OSError as error:
            raise BadImage(f"cannot be read: {error.strerror or error}") from None
        if len(content) < length:
            raise BadImage("lies in a shard that has been cut short")
        return content

    def name(self, i: int) -> str:
        return f"{self.shards[self.places[i, 0]]}/{self.names[i]}"

    def stamps(self) -> Iterator[str]:
        """A line for each image that changes when its shard does."""
        shards = [f"{os.path.abspath(path)}\t{file_stamp(path)}" for path in self.shards]
        for number, begin, length in self.places.tolist():
            yield f"{shards[number]}\t{begin}\t{length}"

    def take(self, rows: npt.NDArray[np.int64]) -> ShardSplit:
        """Some of the images, in the order given."""
        names = [self.names[i] for i in rows]
        return ShardSplit(self.shards, names, self.places[rows], self.labels[rows], self.sizes[rows], self.channels)


@dataclass
class Scan:
    """What is in a shard or a table: samples that can be used, and what cannot be, with the reason.

    samples: (name, begin, length, label, height, width) each.
    """

    samples: list[tuple[str, int, int, Label, int, int]] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)
    class_names: list[str] | None = None

    def add(self, name: str, path: str, content: bytes, begin: int, label: Label) -> None:
        """A sample whose image is `content`, or the reason why it is none."""
        try:
            header = read_header(content)
            if header.doubtful:
                decode(content)
        except BadImage as bad:
            self.skip(path, bad.reason)
            return
        self.samples.append((name, begin, len(content), label, header.height, header.width))

    def skip(self, path: str, reason: str) -> None:
        """Leave something out, by its name."""
        self.skipped.append({"path": path, "reason": reason})

    def split(self, shard: str) -> tuple[ShardSplit, list[Label]]:
        """The samples as images of one shard, and their labels, which are no numbers of classes yet."""
        places = np.array([(0, row[1], row[2]) for row in self.samples], dtype=np.int64).reshape(-1, 3)
        sizes = np.array([row[4:6] for row in self.samples], dtype=np.int64).reshape(-1, 2)
        blank = np.zeros(len(self.samples), dtype=np.int64)
        return ShardSplit([shard], [row[0] for row in self.samples], places, blank, sizes), [r[3] for r in self.samples]


def kept_scan(key: str, stamp: str, scan: Callable[[], Scan]) -> Scan:
    """What a scan of `key` gave before, where its stamp is the same; else what it gives now, which is kept."""
    digest = hashlib.blake2b(key.encode("utf-8", "surrogateescape"), digest_size=12).hexdigest()
    place = cache_dir() / "indexes" / f"{digest}.json"
    try:
        record = json.loads(place.read_bytes())
        if record["version"] == _VERSION and record["stamp"] == stamp:
            return _from_record(record)
    except (OSError, ValueError, KeyError, TypeError):
        pass
    found = scan()
    with suppress(OSError, VitrailError):  # else it is scanned again the next time
        atomic_write_text(place, json.dumps(to_record(found) | {"version": _VERSION, "stamp": stamp}))
    return found


def to_record(scan: Scan) -> dict[str, Any]:
    """A scan as plain JSON."""
    return {"samples": scan.samples, "skipped": scan.skipped, "class_names": scan.class_names}


def _from_record(record: dict[str, Any]) -> Scan:
    return Scan([tuple(row) for row in record["samples"]], record["skipped"], record["class_names"])


def joined(parts: Sequence[ShardSplit]) -> ShardSplit:
    """The images of several shards, one after the other."""
    places = []
    for number, part in enumerate(parts):
        places.append(part.places + np.array([number, 0, 0]))
        assert len(part.shards) == 1
    return ShardSplit(
        [part.shards[0] for part in parts],
        [name for part in parts for name in part.names],
        np.concatenate(places),
        np.concatenate([part.labels for part in parts]),
        np.concatenate([part.sizes for part in parts]),
    )


# --- from samples to a dataset


@dataclass(frozen=True)
class Wanted:
    """How a dataset is to be opened: what is held out, and how many classes it needs at least."""

    val_fraction: float
    test_fraction: float
    split_seed: int
    least_classes: int = 2


def make_dataset(
    name: str,
    parts: dict[str, tuple[Any, list[Label]]],
    class_names: Sequence[str] | None,
    skipped: list[Skipped],
    names_of: Callable[[Any], list[str]],
    wanted: Wanted,
) -> Dataset:
    """A dataset from splits and their labels, which are numbers or names of classes.

    class_names: of the numbers 0, 1, ...; None: the labels themselves, in order. Raises VitrailError where there is
    nothing to learn from.
    """
    parts = {split: part for split, part in parts.items() if part[1]}
    if not parts:
        why = f": {skipped[0]['path']} {skipped[0]['reason']}" if skipped else ""
        raise VitrailError(f"{name} holds no image with a label{why}")
    classes = list(class_names) if class_names is not None else _classes(name, parts)
    if len(classes) < wanted.least_classes:
        raise VitrailError(f"{name} has one class only, {classes[0]!r}: a classifier needs at least two")
    number: dict[Label, int] = {word: i for i, word in enumerate(classes)}
    if class_names is not None:
        number |= {i: i for i in range(len(classes))} | {str(i): i for i in range(len(classes)) if str(i) not in number}
    splits: dict[str, Part] = {}
    for split, (images, labels) in parts.items():
        numbers = [number.get(label if label in number else str(label), -1) for label in labels]
        rows = np.array([row for row, known in enumerate(numbers) if known >= 0], dtype=np.int64)
        for row, known in enumerate(numbers):
            if known < 0:
                reason = f"has the label {labels[row]!r}, which is none of the {len(classes)} classes"
                skipped.append({"path": images.name(row), "reason": reason})
        part = images.take(rows)
        part.labels = np.array([numbers[row] for row in rows], dtype=np.int64)
        if len(part):
            splits[split] = part
    if not splits:
        raise VitrailError(f"{name} holds no image whose label is one of its {len(classes)} classes")
    fractions = wanted.val_fraction, wanted.test_fraction, wanted.split_seed
    how = hold_out(splits, names_of, "the dataset's own", *fractions)
    ordered: dict[str, Split] = {split: splits[split] for split in ("train", "val", "test") if split in splits}  # type: ignore[misc]
    sizes = np.concatenate([part.sizes for part in ordered.values()])  # type: ignore[attr-defined]
    return Dataset(name, tuple(classes), ordered, Sizes.of(sizes), how_split=how, skipped=skipped)


def _classes(name: str, parts: dict[str, tuple[Any, list[Label]]]) -> list[str]:
    """The labels of the first split, numbers by size and words in natural order. Other splits may have no others."""
    from vitrail.data.formats.folder import natural

    first = next(split for split in ("train", "val", "test") if split in parts)
    found = set(parts[first][1])
    if all(isinstance(label, int) for label in found):
        classes = [str(label) for label in sorted(found)]
    else:
        classes = sorted({str(label) for label in found}, key=natural)
    known = set(classes)
    for split, (_, labels) in parts.items():
        strange = next((str(label) for label in labels if str(label) not in known), None)
        if strange is not None:
            raise VitrailError(f"{name}: the class {strange!r} is in {split} and not in {first}")
    return classes


def by_split(paths: Iterable[str]) -> dict[str, list[str]]:
    """Files by the split that their names, or their folders' names, tell of; "train" where they tell of none."""
    found: dict[str, list[str]] = {}
    for path in paths:
        place = Path(path)
        split = split_of(place.name) or SPLIT_NAMES.get(place.parent.name.lower(), "train")
        found.setdefault(split, []).append(path)
    return {split: found[split] for split in ("train", "val", "test") if split in found}
