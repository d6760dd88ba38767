"""CIFAR-10 and CIFAR-100 in their binary version, read from the archive or from its extracted folder.

A record is the label bytes (one; for CIFAR-100 two, coarse then fine), then 1024 red, 1024 green and 1024 blue bytes,
row by row. Krizhevsky, "Learning multiple layers of features from tiny images", 2009.
https://www.cs.toronto.edu/~kriz/cifar.html
"""

from __future__ import annotations

import tarfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath

import numpy as np

from vitrail.data.dataset import ArraySplit
from vitrail.data.named import DatasetRow
from vitrail.errors import DataError
from vitrail.utils.download import Progress

_PIXELS = 3 * 32 * 32
_FILE_LIMIT = 1 << 30


def open_cifar(row: DatasetRow, data_dir: Path | None, progress: Progress | None) -> dict[str, ArraySplit]:
    """The splits of a row whose one file is an archive, which may also be extracted."""
    (file,) = row.files
    if data_dir is None:
        source = row.download(file, progress)
    else:
        member = next(iter(row.splits["test"]))
        candidates = [data_dir / row.folder, data_dir / file.name, data_dir, data_dir / row.name / file.name]
        found = next((path for path in candidates if path.is_file() or (path / member).is_file()), None)
        if found is None:
            raise DataError(
                f"{data_dir} contains neither {file.name} nor {row.folder}; without --data-dir it is downloaded"
            )
        source = found
    return read_cifar(source, row.splits, row.label_bytes, row.num_classes, row.name)


def read_cifar(
    source: Path, files: Mapping[str, Sequence[str]], label_bytes: int, num_classes: int, prefix: str
) -> dict[str, ArraySplit]:
    """Read splits from a .tar.gz or a folder. `files`: split -> its files, in order.

    Nothing is extracted to the disk. Raises DataError for a damaged archive, a missing file or a label out of range.
    """
    wanted = [name for names in files.values() for name in names]
    try:
        content = _from_folder(source, wanted) if source.is_dir() else _from_archive(source, wanted)
    except (tarfile.TarError, EOFError, zlib.error) as error:
        raise DataError(f"{source} is damaged ({error}): delete it and download it again") from None
    except OSError as error:
        raise DataError(f"could not read {source}: {error.strerror or error}") from None
    for name in wanted:
        if name not in content:
            raise DataError(f"{source} does not contain {name}: it must be the binary version of the dataset")
    splits = {}
    for split, names in files.items():
        parts = [_records(content[name], source, name, label_bytes, num_classes) for name in names]
        images, labels = (np.concatenate(x) for x in zip(*parts, strict=True))
        # A view: memory stays N C H W, the layout of batches.
        splits[split] = ArraySplit(images.transpose(0, 2, 3, 1), labels, f"{prefix}/{split}")
    return splits


def _from_folder(folder: Path, wanted: Sequence[str]) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in wanted if (folder / name).is_file()}


def _from_archive(archive: Path, wanted: Sequence[str]) -> dict[str, bytes]:
    """Members are found by their last name alone and read into memory, so a path with ".." is harmless."""
    content: dict[str, bytes] = {}
    with tarfile.open(archive, "r:gz") as tar:
        for member in tar:
            name = PurePosixPath(member.name).name
            if name not in wanted or not member.isfile():
                continue
            file = tar.extractfile(member)
            if file is None or member.size > _FILE_LIMIT:
                raise DataError(f"{archive} is damaged: {name} claims {member.size:,} bytes")
            content[name] = file.read()
    return content


def _records(
    content: bytes, source: Path, name: str, label_bytes: int, num_classes: int
) -> tuple[np.ndarray[tuple[int, ...], np.dtype[np.uint8]], np.ndarray[tuple[int, ...], np.dtype[np.int64]]]:
    if not content or len(content) % (label_bytes + _PIXELS):
        raise DataError(f"{name} in {source} is damaged: {len(content):,} bytes is not a whole number of images")
    records = np.frombuffer(content, dtype=np.uint8).reshape(-1, label_bytes + _PIXELS)
    labels = records[:, label_bytes - 1].astype(np.int64)
    if int(labels.max()) >= num_classes:
        raise DataError(f"{name} in {source} is damaged: label {labels.max()} is outside 0..{num_classes - 1}")
    return records[:, label_bytes:].reshape(-1, 3, 32, 32), labels
