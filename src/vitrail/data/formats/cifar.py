"""CIFAR-10 and CIFAR-100 in their binary version, read from the archive or from its extracted folder.

A record is the label bytes (one; for CIFAR-100 two, coarse then fine), then 1024 red, 1024 green and 1024 blue bytes,
row by row. Krizhevsky, "Learning multiple layers of features from tiny images", 2009.
https://www.cs.toronto.edu/~kriz/cifar.html
"""

from __future__ import annotations

import tarfile
import zlib
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

import numpy as np

from vitrail.data.dataset import ArraySplit, Labels
from vitrail.data.named import DatasetRow
from vitrail.errors import DataError
from vitrail.images.convert import Pixels
from vitrail.utils.download import Progress

_PIXELS = 3 * 32 * 32
_FILE_LIMIT = 1 << 30


def open_cifar(row: DatasetRow, data_dir: Path | None, progress: Progress | None) -> dict[str, ArraySplit]:
    """The splits of a row whose only file is an archive, or a folder with its content."""
    (file,) = row.files
    if data_dir is None:
        return read_cifar(row.download(file, progress), row)
    member = row.splits["test"][0]
    candidates = [data_dir / row.folder, data_dir / file.name, data_dir, data_dir / row.name / file.name]
    source = next((path for path in candidates if path.is_file() or (path / member).is_file()), None)
    if source is None:
        raise DataError(
            f"{data_dir} contains neither {file.name} nor {row.folder}; without --data-dir it is downloaded"
        )
    return read_cifar(source, row)


def read_cifar(source: Path, row: DatasetRow) -> dict[str, ArraySplit]:
    """Read the splits of a row from a .tar.gz, without extracting it to the disk, or from a folder.

    Raises DataError for a damaged archive, a missing file or a label out of range.
    """
    wanted = [name for names in row.splits.values() for name in names]
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
    for split, names in row.splits.items():
        parts = [_records(content[name], f"{name} in {source}", row) for name in names]
        images, labels = (np.concatenate(x) for x in zip(*parts, strict=True))
        # A view: memory stays N C H W, the layout of batches.
        splits[split] = ArraySplit(images.transpose(0, 2, 3, 1), labels, f"{row.name}/{split}")
    return splits


def _from_folder(folder: Path, wanted: Sequence[str]) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in wanted if (folder / name).is_file()}


def _from_archive(archive: Path, wanted: Sequence[str]) -> dict[str, bytes]:
    """Members are found by their file name alone and read into memory, so a path with ".." is harmless."""
    content: dict[str, bytes] = {}
    with tarfile.open(archive, "r:gz") as tar:
        for member in tar:
            name = PurePosixPath(member.name).name
            if name not in wanted or not member.isfile():
                continue
            file = tar.extractfile(member)
            if file is None or member.size > _FILE_LIMIT:
                raise DataError(f"{archive} is damaged: the size of {name} is given as {member.size:,} bytes")
            content[name] = file.read()
    return content


def _records(content: bytes, name: str, row: DatasetRow) -> tuple[Pixels, Labels]:
    """uint8 N C H W and labels."""
    if not content or len(content) % (row.label_bytes + _PIXELS):
        raise DataError(f"{name} is damaged: {len(content):,} bytes is not a multiple of the size of an image")
    records = np.frombuffer(content, dtype=np.uint8).reshape(-1, row.label_bytes + _PIXELS)
    labels = records[:, row.label_bytes - 1].astype(np.int64)
    if int(labels.max()) >= row.num_classes:
        raise DataError(f"{name} is damaged: label {labels.max()} is outside 0..{row.num_classes - 1}")
    return records[:, row.label_bytes :].reshape(-1, 3, 32, 32), labels
