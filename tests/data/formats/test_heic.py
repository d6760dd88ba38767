"""HEIC photographs, which Pillow does not read, are named and not left out without a word."""

from __future__ import annotations

from pathlib import Path

import pytest

from data.make_folder import make_folder
from vitrail.data.catalog import open_dataset
from vitrail.errors import DataError
from vitrail.images.reader import expand
from vitrail.training.monitoring.plan import data_lines

HEIC = b"\0\0\0\x18ftypheic" + bytes(100)


def test_among_other_images(tmp_path: Path) -> None:
    make_folder(tmp_path, classes=2, per_class=12, broken=False)
    path = next(tmp_path.iterdir()) / "IMG_1.HEIC"
    path.write_bytes(HEIC)
    dataset = open_dataset(str(tmp_path))
    assert [(each["path"], each["reason"]) for each in dataset.skipped] == [(str(path), "is HEIC (convert it to JPEG)")]
    assert [line for line in data_lines(dataset) if "skipped 1 file: " in line and "IMG_1.HEIC is HEIC" in line]
    assert str(path) in [str(each) for each in expand([str(tmp_path)])]  # so that predict reports it


def test_a_class_of_nothing_else(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / "1.heic").write_bytes(HEIC)
    with pytest.raises(DataError, match=r"no readable image \(1 file: 1\.heic is HEIC"):
        open_dataset(str(tmp_path))
