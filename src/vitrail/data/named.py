"""The rows of the catalog of datasets."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from vitrail.data.dataset import ArraySplit
from vitrail.utils.download import Progress, cache_dir, fetch


@dataclass(frozen=True, kw_only=True)
class DatasetFile:
    """A file to download from the first of `urls` that has it, and its checksums."""

    name: str
    urls: tuple[str, ...]
    md5: str
    sha256: str | None = None


@dataclass(frozen=True, kw_only=True)
class DatasetRow:
    """One dataset. size: (height, width). mean, std: of all images but the test images, for pixels scaled to 0..1.

    opener: given the row, the folder with the files (None: download them) and a progress callback, the official splits.
    """

    name: str
    opener: Callable[[DatasetRow, Path | None, Progress | None], dict[str, ArraySplit]]
    class_names: tuple[str, ...]
    size: tuple[int, int]
    channels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    files: tuple[DatasetFile, ...] = ()
    splits: dict[str, tuple[str, ...]] = field(default_factory=dict)  # split -> files, or members of the archive
    folder: str = ""  # top folder of the archive
    label_bytes: int = 1

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    def download(self, file: DatasetFile, progress: Progress | None) -> Path:
        """Download a file to the cache unless it exists. Returns its path."""
        path = self.cache_dir / file.name
        return fetch(file.urls, path, md5=file.md5, sha256=file.sha256, progress=progress)

    @property
    def cache_dir(self) -> Path:
        return cache_dir() / self.name
