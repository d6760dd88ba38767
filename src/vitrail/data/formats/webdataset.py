"""`wds:` WebDataset shards: tar files in which the files of one sample are adjacent and share a name.

"0001.jpg" and "0001.cls" are one sample: the part before the first dot is its key, the rest its type. A shard is
scanned once and its images are then read by offset, in any order, so epochs are shuffled and resumed as with a folder.
Remote shards are downloaded to the cache. (https://github.com/webdataset/webdataset)
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from braceexpand import braceexpand

from vitrail.data.dataset import Dataset, SkippedImage, file_fingerprint
from vitrail.data.formats.scan import Scan, cached_scan, group_by_split, make_labelled_dataset
from vitrail.data.formats.shards import ShardSplit, scan_shard
from vitrail.data.splits import SplitOptions
from vitrail.errors import DataError, DownloadError
from vitrail.utils.download import Progress, cache_dir, fetch

_CLASS_FILES = ("classes.txt", "classes.json")


def open_webdataset(pattern: str, options: SplitOptions, progress: Progress | None = None) -> Dataset:
    """Open shards: a path, a folder, a pattern ("train-*.tar", "train-{000..009}.tar") or a URL.

    A shard's split is taken from "train", "val" or "test" in its name or its folder's name; missing splits are held
    out. Class names come from classes.txt or classes.json next to the first shard, else they are the labels. Raises
    DataError.
    """
    addresses = expand(pattern)
    paths = {address: _local(address, progress) for address in addresses}
    class_names = _class_names(addresses[0])
    scans = _scan_all(list(paths.values()), progress)
    skipped: list[SkippedImage] = [item for scan in scans.values() for item in scan.skipped]
    splits = {}
    for split, members in group_by_split(addresses).items():
        found = [(paths[address], scans[paths[address]]) for address in members]
        splits[split] = ShardSplit.from_scans(found), [label for _, scan in found for label in scan.labels]
    return make_labelled_dataset(f"wds:{pattern}", splits, class_names, skipped, options, _names_of)


def expand(pattern: str) -> list[str]:
    """The shards of a pattern: braces are expanded first, then, in paths, wildcards; a folder means its tar files.

    Raises DataError if there is none, or if a named one does not exist.
    """
    if not pattern:
        raise DataError("wds: needs shards: a path, a pattern such as data/train-{000..009}.tar, or a URL")
    try:
        addresses = list(braceexpand(pattern, escape=False))
    except ValueError as error:
        raise DataError(f"wds:{pattern} has unbalanced braces") from error
    found: list[str] = []
    for address in addresses:
        if is_url(address):
            found.append(address)
            continue
        path = os.path.expanduser(address)
        if os.path.isdir(path):
            matches = sorted(glob.glob(os.path.join(glob.escape(path), "*.tar")))
        elif not os.path.exists(path) and glob.has_magic(path):
            matches = sorted(glob.glob(path, recursive=True))
        else:
            matches = [path] if os.path.isfile(path) else []
        for match in matches:
            if os.path.exists(match) and not os.path.isfile(match):
                raise DataError(f"the shard {match} is not a regular file")
        if not matches:
            raise DataError(
                f"{path} contains no .tar file" if os.path.isdir(path) else f"could not find the shard {path}"
            )
        found += matches
    return list(dict.fromkeys(found))


def is_url(address: str) -> bool:
    return "://" in address


def _local(address: str, progress: Progress | None) -> str:
    """The local path of a shard, which is downloaded first if it is remote."""
    if not is_url(address):
        return address
    folder, name = address.rsplit("/", 1)
    digest = hashlib.blake2b(folder.encode(), digest_size=6).hexdigest()
    path = cache_dir() / "shards" / digest / (Path(urlsplit(name).path).name or "shard")
    return str(fetch(address, path, unchecked=True, progress=progress))


def _class_names(address: str) -> list[str] | None:
    """Names of the classes 0, 1, ... from classes.txt or classes.json next to a shard; None if there is neither."""
    for name in _CLASS_FILES:
        if is_url(address):
            path = _fetch_if_exists(f"{address.rsplit('/', 1)[0]}/{name}")
        else:
            path = str(Path(address).with_name(name))
        if path is not None and os.path.isfile(path):
            return read_class_names(Path(path))
    return None


def _fetch_if_exists(address: str) -> str | None:
    try:
        return _local(address, None)
    except DownloadError as error:
        if error.status in (403, 404, 410):  # some hosts answer 403 if it does not exist
            return None
        raise


def read_class_names(path: Path) -> list[str]:
    """One per line, or JSON: a list, {"cat": 0} or {"0": "cat"}. Raises DataError."""
    try:
        text = path.read_text(encoding="utf-8")
        names = _from_json(json.loads(text)) if path.suffix == ".json" else text.splitlines()
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise DataError(f"{path} is not a list of class names") from None
    names = [name.strip() for name in names]
    while names and not names[-1]:
        names.pop()
    if not names or len(set(names)) < len(names) or not all(names):
        raise DataError(f"{path} must name each class once, in the order of the class indices")
    return names


def _from_json(record: Any) -> list[str]:
    if isinstance(record, dict):
        if all(isinstance(value, int) for value in record.values()):
            record = {str(number): name for name, number in record.items()}
        record = [record[str(number)] for number in range(len(record))]
    return [name + "" for name in record]  # raises TypeError if it is not text


def _names_of(split: ShardSplit) -> list[str]:
    """The names of the shard and the sample, which do not change when the shards are moved."""
    shards = [os.path.basename(path) for path in split.shards]
    return [f"{shards[shard]}/{name}" for shard, name in zip(split.locations[:, 0], split.names, strict=True)]


def _scan_all(paths: list[str], progress: Progress | None) -> dict[str, Scan]:
    """The scan of each shard, from the cache if its file is unchanged."""
    found: dict[str, Scan] = {}
    with ThreadPoolExecutor(min(8, 2 * (os.cpu_count() or 1))) as pool:
        for path, scan in zip(paths, pool.map(_scan, paths), strict=True):
            found[path] = scan
            if progress:
                progress(len(found), len(paths))
    return found


def _scan(path: str) -> Scan:
    return cached_scan(os.path.abspath(path), file_fingerprint(path), lambda: scan_shard(path))
