"""Pages of a mapped file leave the memory of the process, and are there when they are read."""

import mmap
import os
import sys
from pathlib import Path

import pytest

from vitrail.utils.memory import release_pages, resident_memory


@pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux's")
def test_pages_are_released_and_read_again(tmp_path: Path) -> None:
    path = tmp_path / "weights of a model.bin"
    content = os.urandom(1 << 16) * 512  # 32 MiB
    path.write_bytes(content)
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        assert mapped[:] == content
        before = resident_memory()
        release_pages(path)
        assert before - resident_memory() > 30 << 20
        assert mapped[:] == content


def test_changes_that_only_the_process_has_stay(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(bytes(1 << 16))
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) as mapped:
        mapped[:4] = b"mine"
        release_pages(path)
        assert mapped[:4] == b"mine"


def test_a_file_that_is_not_mapped(tmp_path: Path) -> None:
    release_pages(tmp_path / "none")
