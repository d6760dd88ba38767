"""SHA256SUMS: the checksums of a folder's files, in the format of `sha256sum -c`, so that damage is noticed."""

import hashlib
from collections.abc import Iterable
from pathlib import Path

from vitrail.utils.files import atomic_write_text

SUMS = "SHA256SUMS"


def write_checksums(folder: Path, names: Iterable[str]) -> None:
    """List these files of a folder. Raises RunError if the disk is full, read-only or forbidden."""
    atomic_write_text(folder / SUMS, "".join(f"{_digest(folder / name)}  {name}\n" for name in sorted(names)))


def mismatches(folder: Path, names: Iterable[str]) -> list[str]:
    """Those of these files that are missing or not as listed; all of them if there is no list.

    Raises:
        OSError: a file cannot be read.
    """
    try:
        lines = (folder / SUMS).read_text(encoding="utf-8", errors="replace").splitlines()
    except FileNotFoundError:
        return list(names)
    listed = {name: digest for digest, _, name in (line.partition("  ") for line in lines)}
    return [name for name in names if not (folder / name).is_file() or listed.get(name) != _digest(folder / name)]


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
