"""Copies of images in two splits, found by their bytes when data are opened; and what a resumed run knows images by."""

from __future__ import annotations

import io
import os
import shutil
import tarfile
import warnings
from pathlib import Path

import numpy as np

from data.make_folder import picture
from data.make_shards import encoded
from vitrail.data.catalog import open_dataset
from vitrail.data.contents import _copies, fingerprint
from vitrail.data.dataset import Dataset


def write(root: Path, count: int = 6, kind: str = "png", *, start: int = 0) -> Path:
    for c, name in enumerate(("ant", "bee")):
        (root / name).mkdir(parents=True, exist_ok=True)
        for number in range(start, start + count):
            picture(c, number).save(root / name / f"{number}.{kind}")
    return root


def warned(data: str | Path) -> tuple[Dataset, str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        dataset = open_dataset(data)
    return dataset, " ".join(str(each.message) for each in caught)


def test_the_same_images_in_every_split(tmp_path: Path) -> None:
    write(tmp_path / "d/train")
    for split in ("val", "test"):
        shutil.copytree(tmp_path / "d/train", tmp_path / "d" / split)
    _, text = warned(tmp_path / "d")
    for fact in ("12 of 12 val images are also in train", "12 of 12 test images are also in train", "also in val"):
        assert fact in text
    assert f"{tmp_path}/d/val/ant/0.png = {tmp_path}/d/train/ant/0.png" in text
    assert "vitrail doctor" in text


def test_planted_copies_are_counted_and_nothing_else(tmp_path: Path) -> None:
    """Copies under other names and in another class, and images of equal length that differ in one byte."""
    write(tmp_path / "d/train", 20, "bmp")
    write(tmp_path / "d/val", 9, "bmp", start=100)
    shutil.copy(tmp_path / "d/train/ant/3.bmp", tmp_path / "d/val/bee/other.bmp")
    shutil.copy(tmp_path / "d/train/bee/4.bmp", tmp_path / "d/val/bee/another.bmp")
    changed = bytearray((tmp_path / "d/train/ant/5.bmp").read_bytes())
    changed[60] ^= 1
    (tmp_path / "d/val/ant/changed.bmp").write_bytes(changed)
    assert len({path.stat().st_size for path in (tmp_path / "d").rglob("*.bmp")}) == 1
    dataset, text = warned(tmp_path / "d")
    assert "2 of 21 val images are also in train" in text
    pairs = {
        tuple(sorted(os.path.basename(dataset.splits[name].name(row)) for name, rows in group.items() for row in rows))
        for group in _copies(dataset)
    }
    assert pairs == {("3.bmp", "other.bmp"), ("4.bmp", "another.bmp")}


def test_without_copies_there_is_no_word(tmp_path: Path) -> None:
    write(tmp_path / "d", 30)
    assert warned(tmp_path / "d")[1] == ""


def test_a_copy_within_train_is_one_between_splits_if_they_are_held_out(tmp_path: Path) -> None:
    write(tmp_path / "d", 40)
    for number in range(40):
        shutil.copy(tmp_path / f"d/ant/{number}.png", tmp_path / f"d/ant/copy{number}.png")
    dataset, text = warned(tmp_path / "d")
    rows = [row for group in _copies(dataset) if "train" in group for row in group.get("val", ())]
    assert rows
    assert f"{len(rows)} of {len(dataset.splits['val'])} val images are also in train" in text


def test_shards(tmp_path: Path) -> None:
    for split, numbers in (("train", range(20)), ("val", (*range(30, 36), 7))):
        with tarfile.open(tmp_path / f"{split}-0.tar", "w") as archive:
            for number in numbers:
                for suffix, content in (("jpg", encoded(number % 2, number)), ("cls", str(number % 2).encode())):
                    info = tarfile.TarInfo(f"{split}{number:04}.{suffix}")
                    info.size = len(content)
                    archive.addfile(info, io.BytesIO(content))
    assert "1 of 7 val images are also in train" in warned(f"wds:{tmp_path}")[1]


def test_what_a_fingerprint_notices(tmp_path: Path) -> None:
    root = write(tmp_path / "d", 8, "bmp")
    before = fingerprint(open_dataset(root)).to_dict()
    assert fingerprint(open_dataset(root)).to_dict() == before

    moved = tmp_path / "moved" / "d"
    shutil.copytree(root, moved, copy_function=shutil.copyfile)  # with other times
    now = fingerprint(open_dataset(moved))
    assert now.difference(before) == ""
    assert "16" in now.checked(before)
    assert "newer or older" in now.checked(before)

    (root / "ant").rename(root / "x")
    (root / "bee").rename(root / "ant")
    (root / "x").rename(root / "bee")
    assert fingerprint(open_dataset(root)).difference(before) == "contents"

    write(moved, 8, "bmp", start=0)
    path = moved / "ant/0.bmp"
    path.write_bytes(path.read_bytes() + b"\0")
    assert fingerprint(open_dataset(moved)).difference(before) == "sizes of files"
    path.rename(moved / "ant/00.bmp")
    assert "names" in fingerprint(open_dataset(moved)).difference(before)


def test_images_in_memory_are_known_by_their_pixels() -> None:
    digits = open_dataset("digits")
    before = fingerprint(digits).to_dict()
    split = digits.split("train")
    split.images = np.roll(split.images, 1, axis=0)  # type: ignore[attr-defined]
    assert fingerprint(digits).difference(before) == "contents"
