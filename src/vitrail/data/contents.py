"""The contents of images, without decoding: copies in two splits, and fingerprints by which a resumed run knows them.

Shapes: N images.
"""

from __future__ import annotations

import hashlib
import io
import os
import warnings
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from itertools import combinations
from typing import Any

import numpy as np

from vitrail.data.dataset import ArraySplit, Dataset, EncodedSplit, Split
from vitrail.data.items import ItemSplit
from vitrail.images.decode import BadImage

SAMPLE = 256  # images of a split whose contents a fingerprint covers
_PROBE = 4096  # bytes in the middle that are compared before all of two files of one size
_THREADS = 8
_CHUNK = 64  # images per task

Place = tuple[str, int]  # split and row


def warn_about_leaks(dataset: Dataset) -> None:
    """Warn if images of two splits are equal byte for byte, with their numbers and an example.

    Only images of equal length are read, and of most of these only a part.
    """
    lines = []
    copies = _copies(dataset)
    for first, second in combinations(dataset.splits, 2):
        # Counted in the second split: how many of its images are in the first too.
        found = [(group[first][0], row) for group in copies if first in group for row in group.get(second, ())]
        if found:
            a, b = found[0]
            names = f"{dataset.splits[second].name(b)} = {dataset.splits[first].name(a)}"
            lines.append(
                f"{len(found):,} of {len(dataset.splits[second]):,} {second} images are also in {first} ({names})"
            )
    if lines:
        warnings.warn(
            f"{dataset.name}: copies of images in two splits make the accuracy too high: {'; '.join(lines)}; "
            "`vitrail doctor` lists them",
            stacklevel=3,
        )


def _copies(dataset: Dataset) -> list[dict[str, list[int]]]:
    """Groups of equal images that are in more than one split: rows by split."""
    if len(dataset.splits) < 2:
        return []
    splits = {name: split for name, split in dataset.splits.items() if isinstance(split, EncodedSplit)}
    lengths = {name: split.stats()[:, 0] for name, split in splits.items()}
    places = [(name, row) for name, each in lengths.items() for row in np.flatnonzero(each > 0).tolist()]
    groups = _apart([places], [int(lengths[name][row]) for name, row in places])
    for part in (_PROBE, None):

        def digests(some: list[Place], part: int | None = part) -> list[bytes | None]:
            return [_digest(splits[name], row, part) for name, row in some]

        places = [place for group in groups for place in group]
        chunks = [places[i : i + _CHUNK] for i in range(0, len(places), _CHUNK)]
        with ThreadPoolExecutor(_THREADS, thread_name_prefix="copies") as pool:
            groups = _apart(groups, [value for values in pool.map(digests, chunks) for value in values])
    return [
        {name: [row for split, row in group if split == name] for name in dict.fromkeys(name for name, _ in group)}
        for group in groups
    ]


def _apart(groups: list[list[Place]], values: Sequence[object]) -> list[list[Place]]:
    """Groups divided by the value of each place, in order; of these, groups that are in more than one split."""
    found: dict[tuple[int, object], list[Place]] = {}
    numbered = ((number, place) for number, group in enumerate(groups) for place in group)
    for (number, place), value in zip(numbered, values, strict=True):
        if value is not None:
            found.setdefault((number, value), []).append(place)
    return [group for group in found.values() if len({name for name, _ in group}) > 1]


def _digest(split: EncodedSplit, row: int, part: int | None = None) -> bytes | None:
    """Of the content of an image, or of `part` bytes in its middle; None if it cannot be read."""
    with suppress(BadImage, OSError):
        source = split.encoded(row)
        with io.BytesIO(source) if isinstance(source, bytes) else open(source, "rb") as file:
            if part is None:
                return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).digest()
            file.seek(max(0, (file.seek(0, os.SEEK_END) - part) // 2))
            return hashlib.blake2b(file.read(part), digest_size=16).digest()
    return None


def names_digest(split: Split) -> str:
    """Of the names of a split's images: the last two parts of their paths, so that a folder may move."""
    names = "\n".join("/".join(split.name(i).split(os.sep)[-2:]) for i in range(len(split)))
    return digest(names)


def digest(text: str) -> str:
    """16 hex digits."""
    return hashlib.blake2b(text.encode("utf-8", "surrogateescape"), digest_size=8).hexdigest()


@dataclass(frozen=True)
class Fingerprint:
    """What identifies the training and validation images of a run.

    names: of labels, weights, order and names. sizes: of all files' lengths, or shapes of arrays. contents: of a sample
    of `sampled` images. times: of all files' modification times, which also change when a folder is copied.
    """

    names: str
    sizes: str
    contents: str
    times: str
    images: int
    sampled: int

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        return asdict(self)

    @property
    def text(self) -> str:
        """All but the times."""
        return f"{self.names} {self.sizes} {self.contents}"

    def difference(self, before: Mapping[str, object]) -> str:
        """What differs from a stored fingerprint, or "". Times alone do not count."""
        kinds = {"names": "names, order, labels or weights", "sizes": "sizes of files", "contents": "contents"}
        return next((text for name, text in kinds.items() if before.get(name) != getattr(self, name)), "")

    def checked(self, before: Mapping[str, object]) -> str:
        """A line: what was compared with a stored fingerprint from which this one does not differ."""
        moved = "" if before.get("times") == self.times else "; the files are newer or older"
        return (
            f"images as before: names, labels and sizes of {self.images:,}, contents of {self.sampled:,} of them{moved}"
        )


def fingerprint(dataset: Dataset) -> Fingerprint:
    """The fingerprint of the training and validation images."""
    parts = {name: hashlib.blake2b(digest_size=8) for name in ("names", "sizes", "contents", "times")}
    images = sampled = 0
    for split in (dataset.splits[name] for name in ("train", "val") if name in dataset.splits):
        parts["names"].update(np.ascontiguousarray(split.labels).tobytes())
        parts["names"].update(names_digest(split).encode())
        if split.weights is not None:
            parts["names"].update(split.weights.tobytes())
        rows = np.unique(np.linspace(0, len(split) - 1, min(SAMPLE, len(split))).astype(np.int64)).tolist()
        for row in rows:
            if isinstance(split, ArraySplit):
                parts["contents"].update(split.images[row].tobytes())
            elif isinstance(split, EncodedSplit):
                parts["contents"].update(_digest(split, row) or b"")
            elif isinstance(split, ItemSplit):
                parts["contents"].update(split.digests[row].encode())
        if isinstance(split, ItemSplit):
            parts["sizes"].update(split.sizes.tobytes())
        if isinstance(split, EncodedSplit):
            lengths, times = split.stats().T
            parts["sizes"].update(lengths.tobytes())
            parts["times"].update(times.tobytes())
        images, sampled = images + len(split), sampled + len(rows)
    return Fingerprint(**{name: part.hexdigest() for name, part in parts.items()}, images=images, sampled=sampled)
