"""Zip archives of strangers: limits on their directory and on what their entries unpack to."""

import contextlib
import io
import os
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, cast

from vitrail.errors import WeightsError
from vitrail.utils.text import one_line

_MAX_DIRECTORY = 4 << 20  # bytes: tens of thousands of entries
_MAX_COMPRESSION = 20  # an archive with a higher ratio is rejected as a zip bomb


class _Bounded(io.FileIO):
    """A file that zipfile reads at most `_MAX_DIRECTORY` bytes of at a time: it reads the directory in one piece."""

    def read(self, size: int | None = -1, /) -> bytes:
        rest = os.fstat(self.fileno()).st_size - self.tell()
        if (rest if size is None or size < 0 else min(size, rest)) > _MAX_DIRECTORY:
            raise zipfile.BadZipFile(f"its directory is larger than {_MAX_DIRECTORY >> 20} MiB")
        return super().read(size)


@contextlib.contextmanager
def open_archive(path: Path) -> Iterator[tuple[zipfile.ZipFile, BinaryIO]]:
    """The archive, and its file.

    Raises:
        WeightsError: it is damaged, has too many entries, or unpacks to far more than its size.
    """
    try:
        with _Bounded(path) as file, zipfile.ZipFile(cast(BinaryIO, file)) as archive:
            size = os.fstat(file.fileno()).st_size
            if sum(entry.file_size for entry in archive.infolist()) > _MAX_COMPRESSION * size:
                raise WeightsError(
                    f"{path} would unpack to more than {_MAX_COMPRESSION} times its size: do not trust it"
                )
            yield archive, cast(BinaryIO, file)
    except (zipfile.BadZipFile, NotImplementedError) as error:
        raise WeightsError(f"{path} is damaged or truncated: {one_line(error)}") from None
