"""The IDX format of MNIST and its relatives (http://yann.lecun.com/exdb/mnist), plain or gzipped."""

from __future__ import annotations

import gzip
import math
import zlib
from pathlib import Path
from typing import IO

import numpy as np
import numpy.typing as npt

from vitrail.data.dataset import ArraySplit
from vitrail.errors import VitrailError

_BYTES_LIMIT = 4 << 30


def read_idx(path: Path) -> npt.NDArray[np.uint8]:
    """Read an array of unsigned bytes. Raises VitrailError where the header and the content do not agree."""
    try:
        with path.open("rb") as raw:
            zipped = raw.read(2) == b"\x1f\x8b"
            raw.seek(0)
            if not zipped:
                return _read(raw, path)
            with gzip.GzipFile(fileobj=raw) as file:
                return _read(file, path)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise VitrailError(f"{path} is damaged ({error}): get it again") from None
    except OSError as error:
        raise VitrailError(f"cannot read {path}: {error.strerror or error}") from None


def _read(file: IO[bytes] | gzip.GzipFile, path: Path) -> npt.NDArray[np.uint8]:
    magic = file.read(4)
    if len(magic) < 4 or magic[:2] != b"\0\0" or magic[2] != 0x08 or not 1 <= magic[3] <= 4:
        raise VitrailError(f"{path} is no IDX file of unsigned bytes (it starts with {magic.hex() or 'nothing'})")
    header = file.read(4 * magic[3])
    if len(header) < 4 * magic[3]:
        raise VitrailError(f"{path} is damaged: its header is cut short")
    shape = tuple(int(x) for x in np.frombuffer(header, dtype=">u4"))
    count = math.prod(shape)
    if count > _BYTES_LIMIT:
        raise VitrailError(f"{path} is damaged: its header claims {count:,} bytes")
    content = file.read(count)
    if len(content) != count or file.read(1):
        raise VitrailError(f"{path} is damaged: its header says {shape}, its content has another length")
    return np.frombuffer(content, dtype=np.uint8).reshape(shape)


def read_pair(images: Path, labels: Path, num_classes: int, prefix: str) -> ArraySplit:
    """An image file N H W and its label file N as a split."""
    x, y = read_idx(images), read_idx(labels)
    if x.ndim != 3 or y.ndim != 1 or len(x) != len(y):
        raise VitrailError(f"{images} and {labels} do not belong together: shapes {x.shape} and {y.shape}")
    if len(y) == 0 or int(y.max()) >= num_classes:
        raise VitrailError(f"{labels} holds no labels in 0..{num_classes - 1}")
    return ArraySplit(x, y.astype(np.int64), prefix)
