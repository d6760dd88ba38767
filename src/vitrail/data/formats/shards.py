"""Tar shards: how they are scanned, and how images are read from them by offset."""

from __future__ import annotations

import json
import os
import re
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import IO

import numpy as np
import numpy.typing as npt

from vitrail.data.dataset import EncodedSplit, FileSplit, Labels, file_fingerprint
from vitrail.data.formats.scan import Label, Scan
from vitrail.errors import DataError
from vitrail.images.decode import BadImage

_IMAGES = ("jpg", "jpeg", "png", "webp")  # in order of preference
_BLOCK = 512  # bytes; a complete archive ends with two blocks of zeros


@dataclass
class ShardSplit(EncodedSplit):
    """Images in shards. locations: int64 (N, 3): the shard's index, the image's offset in it, and its length."""

    shards: list[str]
    names: list[str]
    locations: npt.NDArray[np.int64]
    labels: Labels
    sizes: npt.NDArray[np.int64]

    @classmethod
    def from_scans(cls, scans: Sequence[tuple[str, Scan]]) -> ShardSplit:
        """The samples of several shards, each (path, scan), in order. Labels are all 0."""
        samples = [(i, sample) for i, (_, scan) in enumerate(scans) for sample in scan.samples]
        locations = np.array([(i, sample.offset, sample.length) for i, sample in samples], dtype=np.int64)
        names = [sample.name for _, sample in samples]
        labels = np.zeros(len(samples), dtype=np.int64)
        sizes = np.concatenate([scan.sizes for _, scan in scans])
        return cls([path for path, _ in scans], names, locations.reshape(-1, 3), labels, sizes)

    def encoded(self, i: int) -> bytes:
        shard, offset, length = self.locations[i].tolist()
        try:
            # Opened for each read, which takes microseconds: a process cannot keep thousands of files open.
            with open(self.shards[shard], "rb", buffering=0) as file:
                file.seek(offset)
                content = file.read(length)
        except OSError as error:
            raise BadImage(f"could not be read: {error.strerror or error}") from None
        if len(content) < length:
            raise BadImage("is in a shard that is truncated")
        return content

    def name(self, i: int) -> str:
        return f"{self.shards[self.locations[i, 0]]}/{self.names[i]}"

    def fingerprints(self) -> Iterator[str]:
        shards = [f"{os.path.abspath(path)}\t{file_fingerprint(path)}" for path in self.shards]
        for shard, offset, length in self.locations.tolist():
            yield f"{shards[shard]}\t{offset}\t{length}"

    def stats(self) -> npt.NDArray[np.int64]:
        shards = FileSplit(self.shards, np.zeros(len(self.shards), dtype=np.int64)).stats()
        return np.stack([self.locations[:, 2], shards[self.locations[:, 0], 1]], axis=1)

    def take(self, rows: npt.NDArray[np.int64]) -> ShardSplit:
        names, locations = [self.names[i] for i in rows], self.locations[rows]
        return replace(self, names=names, locations=locations, labels=self.labels[rows], sizes=self.sizes[rows])


def scan_shard(path: str) -> Scan:
    """Scan a shard: the image of every sample, its offset and size, and its label."""
    scan = Scan()
    sample = _Sample("", path)
    try:
        with open(path, "rb") as file:
            for name, offset, length in _members(file, path, scan):
                key, extension = _split_name(name)
                if key != sample.key:
                    sample.finish(scan)
                    sample = _Sample(key, path)
                sample.add(file, extension, offset, length)
    except OSError as error:
        scan.skip(path, f"could not be read: {error.strerror or error}")
    sample.finish(scan)
    return scan


def _members(file: IO[bytes], path: str, scan: Scan) -> Iterator[tuple[str, int, int]]:
    """Name, offset and length of every complete file in an archive. Errors in the archive go to `scan.skipped`."""
    size = os.fstat(file.fileno()).st_size
    try:
        with tarfile.open(fileobj=file, mode="r:") as archive:
            for member in archive:
                archive.members = []  # type: ignore[attr-defined]  # do not keep all of them in memory
                if not member.isfile():
                    continue
                if member.offset_data + member.size > size:
                    raise tarfile.ReadError
                yield member.name, member.offset_data, member.size
    except tarfile.TarError:
        file.seek(0)
        head = file.read(8)
        compression = next((kind for kind, magic in _COMPRESSED.items() if head.startswith(magic)), None)
        if compression:
            raise DataError(
                f"{path} is compressed ({compression}), which does not allow random access: decompress it first"
            ) from None
        truncated = "is truncated: samples after the last complete one are left out"
        scan.skip(path, truncated if head and size >= _BLOCK else "is not a tar archive")
        return
    file.seek(max(0, size - _BLOCK))
    if file.read(_BLOCK).strip(b"\0"):
        scan.skip(path, "has no end-of-archive marker: it may be truncated")


_COMPRESSED = {"gzip": b"\x1f\x8b", "bzip2": b"BZh", "xz": b"\xfd7zXZ\0", "zstd": b"\x28\xb5\x2f\xfd"}


def _split_name(name: str) -> tuple[str, str]:
    """ "a/0001.seg.png" to "a/0001" and "seg.png"."""
    folder, _, base = name.rpartition("/")
    key, _, extension = base.partition(".")
    return (f"{folder}/{key}" if folder else key), extension.lower()


@dataclass
class _Sample:
    """The files of one sample, added one by one."""

    key: str
    path: str
    image: tuple[str, bytes, int] | None = None  # extension, content, offset
    label: Label | None = None
    label_error: str = ""

    def add(self, file: IO[bytes], extension: str, offset: int, length: int) -> None:
        """Use a file of the sample if it is an image or a label; others are ignored."""
        if extension in _IMAGES and (self.image is None or _IMAGES.index(extension) < _IMAGES.index(self.image[0])):
            self.image = extension, _read(file, offset, length), offset
        elif extension == "cls" or (extension == "json" and self.label is None):
            try:
                label = _parse_label(_read(file, offset, length), extension)
            except ValueError as error:
                self.label_error = f"has a .{extension} that could not be parsed ({error})"
                return
            self.label = self.label if label is None else label

    def finish(self, scan: Scan) -> None:
        """Add the sample to the scan, or skip it with the reason."""
        name = os.path.basename(self.key)
        if not self.key or name.startswith((".", "__")):  # files of macOS, metadata of the shard
            return
        extension = self.image[0] if self.image else ""
        where = f"{self.path}/{self.key}" + (f".{extension}" if extension else "")
        if self.image is None:
            scan.skip(where, f"has no image ({', '.join(_IMAGES)})")
        elif self.label is None:
            scan.skip(where, self.label_error or 'has no label (.cls, or .json with "label")')
        else:
            scan.add(f"{self.key}.{extension}", where, self.image[1], self.label, self.image[2])


def _read(file: IO[bytes], offset: int, length: int) -> bytes:
    file.seek(offset)
    return file.read(length)


def _parse_label(content: bytes, extension: str) -> Label | None:
    """A class index or name; None if a .json has none. Raises ValueError."""
    text = content.decode("utf-8").strip()
    if extension == "json":
        record = json.loads(text)
        value = record.get("label") if isinstance(record, dict) else None
        if value is None:
            return None
        if isinstance(value, int | str) and not isinstance(value, bool):
            return value
        raise ValueError(f"label is {value!r}")
    if not text:
        raise ValueError("it is empty")
    return int(text) if re.fullmatch(r"-?\d+", text) else text
