"""Tiny WebDataset shards, written by hand."""

import io
import tarfile
from pathlib import Path

from data.make_folder import picture


def encoded(c: int, number: int, kind: str = "JPEG", size: tuple[int, int] = (20, 26)) -> bytes:
    """An image of class `c` as the content of a file."""
    content = io.BytesIO()
    picture(c, number, size).save(content, kind)
    return content.getvalue()


def write_tar(path: Path, files: list[tuple[str, bytes]]) -> Path:
    """An archive of these files, in this order."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, content in files:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def write_shard(path: Path, numbers: range, classes: int = 3, *, words: bool = False) -> Path:
    """Samples `numbers`, of the classes in turn; words: labels are names instead of numbers."""
    files: list[tuple[str, bytes]] = []
    for number in numbers:
        label = f"kind{number % classes}" if words else str(number % classes)
        files += [(f"{number:05}.cls", label.encode()), (f"{number:05}.jpg", encoded(number % classes, number))]
    return write_tar(path, files)
