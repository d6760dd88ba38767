"""`wds:` WebDataset shards: tar files in which the files of a sample lie side by side and share a name.

"0001.jpg" and "0001.cls" are one sample: what stands before the first dot is its key, what comes after says what it is.
A shard is read through once and its images are found by their places from then on, in any order: the order, the views
and resuming are those of a folder. Shards that are not on this machine are fetched whole, into the cache, and stay
there.
(https://github.com/webdataset/webdataset)
"""

from __future__ import annotations

import glob
import hashlib
import itertools
import json
import os
import re
import tarfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any
from urllib.parse import urlsplit

from vitrail.data.dataset import Dataset, Skipped, file_stamp
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
from vitrail.errors import VitrailError
from vitrail.utils.download import Progress, cache_dir, fetch

SCHEME = "wds:"
_IMAGES = ("jpg", "jpeg", "png", "webp")
_CLASSES = ("classes.txt", "classes.json")
_BLOCK = 512  # bytes; a whole archive ends in two of zeros


def open_wds(spec: str, wanted: Wanted, progress: Progress | None = None) -> Dataset:
    """Open shards: `wds:` and a path, a folder, a pattern ("train-*.tar", "train-{000..009}.tar") or a URL.

    Which split a shard belongs to is told by "train", "val" or "test" in its name, or by its folder's; what is lacking
    is held out as of a folder. Class names come from classes.txt or classes.json beside the first shard, or else are
    the labels themselves. Raises VitrailError.
    """
    pattern = spec.removeprefix(SCHEME)
    addresses = expand(pattern)
    paths = {address: _local(address, progress) for address in addresses}
    names = _class_names(addresses[0])
    scans = _scans(list(paths.values()), progress)
    skipped: list[Skipped] = [item for scan in scans.values() for item in scan.skipped]
    parts: dict[str, tuple[ShardSplit, list[Label]]] = {}
    for split, members in by_split(addresses).items():
        found = [scans[paths[address]].split(paths[address]) for address in members]
        parts[split] = (
            joined([part for part, _ in found]),
            [label for _, labels in found for label in labels],
        )
    return make_dataset(spec, parts, names, skipped, _lasting_names, wanted)


def expand(pattern: str) -> list[str]:
    """The shards that a pattern stands for: braces first, then, for paths, stars; a folder stands for its tar files.

    Raises VitrailError where there is none, or where one that is named is not there.
    """
    found: list[str] = []
    for word in braces(pattern):
        if is_url(word):
            found.append(word)
            continue
        path = os.path.expanduser(word)
        if os.path.isdir(path):
            matches = sorted(glob.glob(os.path.join(glob.escape(path), "*.tar")))
        elif not os.path.exists(path) and glob.has_magic(path):
            matches = sorted(glob.glob(path, recursive=True))
        else:
            matches = [path] if os.path.isfile(path) else []
        if not matches:
            raise VitrailError(f"there is no shard {word}" if not os.path.isdir(path) else f"{word} holds no .tar file")
        found += matches
    if not found:
        raise VitrailError(f"{SCHEME} needs shards: a path, a pattern such as data/train-{{000..009}}.tar, or a URL")
    return list(dict.fromkeys(found))


def braces(pattern: str) -> list[str]:
    """ "a-{00..02}.tar" to three words, "{a,b}" to two; several braces to all combinations."""
    if not pattern:
        return []
    parts = [_alternatives(part) for part in re.split(r"(\{[^{}]*\})", pattern)]
    return ["".join(words) for words in itertools.product(*parts)]


def _alternatives(part: str) -> list[str]:
    if not (part.startswith("{") and part.endswith("}")):
        return [part]
    span = re.fullmatch(r"\{(\d+)\.\.(\d+)\}", part)
    if span is None:
        return part[1:-1].split(",")
    first, last = int(span[1]), int(span[2])
    step = 1 if first <= last else -1
    return [str(number).zfill(len(span[1])) for number in range(first, last + step, step)]


def is_url(word: str) -> bool:
    """Whether this is to be fetched from somewhere."""
    return "://" in word


def _local(address: str, progress: Progress | None) -> str:
    """Where a shard lies on this machine; it is fetched if it does not yet."""
    if not is_url(address):
        return address
    folder, name = address.rsplit("/", 1)
    digest = hashlib.blake2b(folder.encode(), digest_size=6).hexdigest()
    place = cache_dir() / "shards" / digest / (Path(urlsplit(name).path).name or "shard")
    return str(fetch(address, place, unchecked=True, progress=progress))


def _class_names(address: str) -> list[str] | None:
    """Names of the classes 0, 1, ... from classes.txt (one a line) or classes.json beside a shard; None without."""
    for name in _CLASSES:
        if is_url(address):
            path = _fetched_if_there(f"{address.rsplit('/', 1)[0]}/{name}")
        else:
            path = str(Path(address).with_name(name))
        if path is not None and os.path.isfile(path):
            return read_class_names(Path(path))
    return None


def _fetched_if_there(address: str) -> str | None:
    try:
        return _local(address, None)
    except VitrailError as error:
        if "the server says 40" in str(error):  # 404; some hosts say 403 of what they do not have
            return None
        raise


def read_class_names(path: Path) -> list[str]:
    """A line each, or JSON: a list, {"cat": 0} or {"0": "cat"}. Raises VitrailError."""
    try:
        text = path.read_text(encoding="utf-8")
        names = _from_json(json.loads(text)) if path.suffix == ".json" else text.splitlines()
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise VitrailError(f"{path} is no list of class names") from None
    names = [name.strip() for name in names]
    while names and not names[-1]:
        names.pop()
    if not names or len(set(names)) < len(names) or not all(names):
        raise VitrailError(f"{path} must name each class once, in the order of their numbers")
    return names


def _from_json(record: Any) -> list[str]:
    if isinstance(record, dict):
        if all(isinstance(value, int) for value in record.values()):
            record = {str(number): name for name, number in record.items()}
        record = [record[str(number)] for number in range(len(record))]
    return [name + "" for name in record]  # a TypeError for what is no text


def _lasting_names(part: ShardSplit) -> list[str]:
    """A shard's own name and the sample's: they do not change when the shards move."""
    shards = [os.path.basename(path) for path in part.shards]
    return [f"{shards[place]}/{name}" for place, name in zip(part.places[:, 0], part.names, strict=True)]


def _scans(paths: list[str], progress: Callable[[int, int | None], None] | None) -> dict[str, Scan]:
    """What is in each shard; those that were read before are not read again."""
    found: dict[str, Scan] = {}
    with ThreadPoolExecutor(min(8, 2 * (os.cpu_count() or 1))) as pool:
        for path, scan in zip(paths, pool.map(_scan, paths), strict=True):
            found[path] = scan
            if progress:
                progress(len(found), len(paths))
    return found


def _scan(path: str) -> Scan:
    return kept_scan(os.path.abspath(path), file_stamp(path), lambda: scan_shard(path))


def scan_shard(path: str) -> Scan:
    """Read a shard through: every sample's image, its place and size, and its label."""
    scan = Scan()
    sample = _Sample("", path)
    try:
        with open(path, "rb") as file:
            for name, begin, length in _members(file, path, scan):
                key, end = _split_name(name)
                if key != sample.key:
                    sample.finish(scan)
                    sample = _Sample(key, path)
                sample.take(file, end, begin, length)
    except OSError as error:
        scan.skip(path, f"cannot be read: {error.strerror or error}")
    sample.finish(scan)
    return scan


def _members(file: IO[bytes], path: str, scan: Scan) -> Iterator[tuple[str, int, int]]:
    """Name, place and length of every whole file in an archive. What is wrong with the archive goes to `scan`."""
    size = os.fstat(file.fileno()).st_size
    try:
        with tarfile.open(fileobj=file, mode="r:") as archive:
            for member in archive:
                archive.members = []  # type: ignore[attr-defined]  # else it keeps all of them
                if not member.isfile():
                    continue
                if member.offset_data + member.size > size:
                    raise tarfile.ReadError
                yield member.name, member.offset_data, member.size
    except tarfile.TarError:
        file.seek(0)
        head = file.read(8)
        packed = next((kind for kind, magic in _PACKED.items() if head.startswith(magic)), None)
        if packed:
            raise VitrailError(
                f"{path} is compressed ({packed}), so its samples cannot be read in any order: unpack it; "
                "images gain nothing from it"
            ) from None
        whole = "is cut short: what lies behind its last whole sample is left out"
        scan.skip(path, whole if head and size >= _BLOCK else "is not a tar archive")
        return
    file.seek(max(0, size - _BLOCK))
    if file.read(_BLOCK).strip(b"\0"):
        scan.skip(path, "has no end mark: it may have been cut short")


_PACKED = {"gzip": b"\x1f\x8b", "bzip2": b"BZh", "xz": b"\xfd7zXZ\0", "zstd": b"\x28\xb5\x2f\xfd"}


def _split_name(name: str) -> tuple[str, str]:
    """ "a/0001.seg.png" to "a/0001" and "seg.png"."""
    folder, _, base = name.rpartition("/")
    key, _, end = base.partition(".")
    return (f"{folder}/{key}" if folder else key), end.lower()


class _Sample:
    """The files of one sample, as they come."""

    def __init__(self, key: str, path: str) -> None:
        self.key = key
        self.path = path
        self.image: tuple[str, bytes, int] | None = None  # kind, content, place
        self.label: Label | None = None
        self.wrong = ""

    def take(self, file: IO[bytes], end: str, begin: int, length: int) -> None:
        """Note what this file tells; a sample may hold any others."""
        if end in _IMAGES and (self.image is None or _IMAGES.index(end) < _IMAGES.index(self.image[0])):
            self.image = end, _read(file, begin, length), begin
        elif end == "cls" or (end == "json" and self.label is None):
            try:
                label = _label(_read(file, begin, length), end)
            except ValueError as error:
                self.wrong = f"has a .{end} that cannot be understood ({error})"
                return
            self.label = self.label if label is None else label

    def finish(self, scan: Scan) -> None:
        """Add the sample, or say what it lacks."""
        name = os.path.basename(self.key)
        if not self.key or name.startswith((".", "__")):  # leavings of systems; notes on the shard
            return
        kind = self.image[0] if self.image else ""
        where = f"{self.path}/{self.key}" + (f".{kind}" if kind else "")
        if self.image is None:
            scan.skip(where, f"has no image ({', '.join(_IMAGES)})")
        elif self.label is None:
            scan.skip(where, self.wrong or 'has no label (.cls, or .json with "label")')
        else:
            scan.add(f"{self.key}.{kind}", where, self.image[1], self.image[2], self.label)


def _read(file: IO[bytes], begin: int, length: int) -> bytes:
    file.seek(begin)
    return file.read(length)


def _label(content: bytes, end: str) -> Label | None:
    """A class's number or name. Raises ValueError."""
    text = content.decode("utf-8").strip()
    if end == "json":
        record = json.loads(text)
        value = record.get("label") if isinstance(record, dict) else None
        if value is None:
            return None
        if isinstance(value, int | str) and not isinstance(value, bool):
            return value
        raise ValueError(f"its label is {value!r}")
    if not text:
        raise ValueError("it is empty")
    return int(text) if re.fullmatch(r"-?\d+", text) else text
