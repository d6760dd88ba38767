"""The IDX format of MNIST and Fashion-MNIST (http://yann.lecun.com/exdb/mnist), plain or gzipped."""

from __future__ import annotations

import gzip
import math
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import IO

import numpy as np
import numpy.typing as npt

from vitrail.data.dataset import ArraySplit
from vitrail.data.named import DatasetRow
from vitrail.errors import DataError
from vitrail.utils.download import Progress

_BYTES_LIMIT = 4 << 30
_DEBIAN = Path("/usr/share/datasets")  # of packages such as dataset-fashion-mnist


def open_idx(row: DatasetRow, data_dir: Path | None, progress: Progress | None) -> dict[str, ArraySplit]:
    """The splits of a row in which each split has an image file and a label file."""
    folders = [data_dir, data_dir / row.name] if data_dir else [_DEBIAN / row.name, row.cache_dir]
    names = [file.name for file in row.files]
    paths = _find(names, folders)
    if paths is None:
        if data_dir:
            raise DataError(f"{data_dir} lacks some of {', '.join(names)}; without --data-dir they are downloaded")
        paths = {file.name: row.download(file, progress) for file in row.files}
    return {
        split: _read_split(paths[images], paths[labels], row.num_classes, f"{row.name}/{split}")
        for split, (images, labels) in row.splits.items()
    }


def _find(names: Sequence[str], folders: Sequence[Path]) -> dict[str, Path] | None:
    """The files in the first folder that contains all of them, gzipped or not."""
    for folder in folders:
        candidates = {name: (folder / name, folder / name.removesuffix(".gz")) for name in names}
        found = {name: path for name, paths in candidates.items() for path in reversed(paths) if path.is_file()}
        if len(found) == len(names):
            return found
    return None


def _read_split(images: Path, labels: Path, num_classes: int, prefix: str) -> ArraySplit:
    x, y = read_idx(images), read_idx(labels)  # N H W, N
    if x.ndim != 3 or y.ndim != 1 or len(x) != len(y):
        raise DataError(f"{images} and {labels} do not match: shapes {x.shape} and {y.shape}")
    if len(y) == 0 or int(y.max()) >= num_classes:
        raise DataError(f"{labels} has no labels, or labels outside 0..{num_classes - 1}")
    return ArraySplit(x, y.astype(np.int64), prefix)


def read_idx(path: Path) -> npt.NDArray[np.uint8]:
    """Read an array of unsigned bytes. Raises DataError if the header does not match the content."""
    try:
        with path.open("rb") as file:
            gzipped = file.peek(2).startswith(b"\x1f\x8b")
            return _read(gzip.GzipFile(fileobj=file) if gzipped else file, path)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{path} is damaged ({error}): download it again") from None
    except OSError as error:
        raise DataError(f"could not read {path}: {error.strerror or error}") from None


def _read(file: IO[bytes] | gzip.GzipFile, path: Path) -> npt.NDArray[np.uint8]:
    magic = file.read(4)
    if len(magic) < 4 or magic[:2] != b"\0\0" or magic[2] != 0x08 or not 1 <= magic[3] <= 4:
        raise DataError(f"{path} is not an IDX file of unsigned bytes (it starts with {magic.hex() or 'nothing'})")
    header = file.read(4 * magic[3])
    if len(header) < 4 * magic[3]:
        raise DataError(f"{path} is damaged: its header is truncated")
    shape = tuple(int(x) for x in np.frombuffer(header, dtype=">u4"))
    count = math.prod(shape)
    if count > _BYTES_LIMIT:
        raise DataError(f"{path} is damaged: its header gives a size of {count:,} bytes")
    content = file.read(count)
    if len(content) != count or file.read(1):
        raise DataError(f"{path} is damaged: its length does not match its header, {shape}")
    return np.frombuffer(content, dtype=np.uint8).reshape(shape)
