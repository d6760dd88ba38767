"""Hugging Face datasets: parquet files, saved datasets and datasets by name."""

import builtins
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from data.crops import read_crops
from data.make_shards import encoded
from vitrail.data.catalog import open_dataset
from vitrail.data.formats import hf_datasets as module
from vitrail.data.formats.hf_datasets import TableSplit, open_hf_dataset
from vitrail.data.loader import TrainLoader
from vitrail.data.splits import SplitOptions
from vitrail.errors import DataError, DeviceError
from vitrail.images.preprocess import Preprocess

pa = pytest.importorskip("pyarrow")
pytest.importorskip("datasets")
import pyarrow.parquet as pq  # noqa: E402

P = Preprocess(size=(16, 16))
NAMES = ["ape", "bee", "cat"]
FEATURES = {"image": {"_type": "Image"}, "label": {"names": NAMES, "_type": "ClassLabel"}}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("VITRAIL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    return tmp_path / "cache"


def write_parquet(
    path: Path, numbers: range, *, columns: tuple[str, str] = ("image", "label"), features: Any = FEATURES, **more: Any
) -> Path:
    """As on the hub: images are a struct of bytes and path, and class names are in the metadata of the file."""
    image, label = columns
    rows = [{"bytes": encoded(number % 3, number), "path": f"{number}.jpg"} for number in numbers]
    table = pa.table({"id": list(numbers), image: rows, label: [number % 3 for number in numbers]})
    for name, values in more.items():
        table = table.set_column(table.column_names.index(name), name, pa.array(values))
    if features:
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, row_group_size=7)
    return path


def pictures(split: Any) -> list[np.ndarray]:
    return [np.asarray(split.image(i)) for i in range(len(split))]


def expected(number: int) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(encoded(number % 3, number))))


def test_parquet_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The layout of the hub: data/<split>-00000-of-00002.parquet."""
    write_parquet(tmp_path / "data" / "train-00000-of-00002.parquet", range(25))
    write_parquet(tmp_path / "data" / "train-00001-of-00002.parquet", range(25, 40))
    write_parquet(tmp_path / "data" / "test-00000-of-00001.parquet", range(40, 49))
    dataset = open_dataset(f"hf-dataset:{tmp_path}/data", val_fraction=0.1)
    assert dataset.class_names == tuple(NAMES)
    assert dataset.counts() == {"train": 36, "val": 4, "test": 9}
    assert dataset.skipped == []
    for split in dataset.splits.values():
        assert isinstance(split, TableSplit)
        for row in range(len(split)):
            number = int(split.rows[row]) + 40 * split.prefix.endswith("/test")
            assert split.labels[row] == number % 3
            np.testing.assert_array_equal(np.asarray(split.image(row)), expected(number))
    # Converted and scanned once.
    with monkeypatch.context() as patch:
        patch.setattr(module, "_add", lambda *_: pytest.fail("scanned again"))
        again = open_dataset(f"hf-dataset:{tmp_path}/data", val_fraction=0.1)
    for name, split in dataset.splits.items():
        assert [split.name(i) for i in range(len(split))] == [again.split(name).name(i) for i in range(len(split))]
    assert open_dataset(f"hf-dataset:{tmp_path}/data/*.parquet").class_names == tuple(NAMES)
    write_parquet(tmp_path / "data" / "train-00001-of-00002.parquet", range(25, 50))
    with pytest.warns(UserWarning, match="9 of 9 test images are also in train"):
        assert sum(open_dataset(f"hf-dataset:{tmp_path}/data").counts().values()) == 59


def test_a_deleted_index_is_computed_again(tmp_path: Path, cache: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", range(12))
    before = open_dataset(f"hf-dataset:{path}", val_fraction=0, test_fraction=0).split("train")
    for notes in (cache / "indexes").iterdir():
        notes.unlink()
    after = open_dataset(f"hf-dataset:{path}", val_fraction=0, test_fraction=0).split("train")
    assert all(np.array_equal(a, b) for a, b in zip(pictures(before), pictures(after), strict=True))


def test_columns_are_found_by_name(tmp_path: Path) -> None:
    """Files without the metadata of the library `datasets`."""
    plain = write_parquet(tmp_path / "plain.parquet", range(12), columns=("img", "fine_label"), features=None)
    dataset = open_dataset(f"hf-dataset:{plain}", val_fraction=0, test_fraction=0)
    assert dataset.class_names == ("0", "1", "2")
    assert len(dataset.split("train")) == 12
    table = pa.table({"jpg": [encoded(0, n) for n in range(8)], "class": [("owl", "bat")[n % 2] for n in range(8)]})
    pq.write_table(table, tmp_path / "bytes.parquet")
    dataset = open_dataset(f"hf-dataset:{tmp_path}/bytes.parquet", val_fraction=0, test_fraction=0)
    assert dataset.class_names == ("bat", "owl")
    assert dataset.split("train").labels.tolist() == [1, 0] * 4


def test_unusable_rows_are_listed(tmp_path: Path) -> None:
    images = [{"bytes": encoded(0, n), "path": None} for n in range(8)]
    images[1] = {"bytes": b"no image", "path": None}
    images[3] = None
    images[4] = {"bytes": None, "path": str(tmp_path / "gone.jpg")}
    path = write_parquet(tmp_path / "a.parquet", range(8), image=images, label=[0, 1, 2, 1, 2, -1, None, 7])
    dataset = open_dataset(f"hf-dataset:{path}", val_fraction=0, test_fraction=0)
    assert dataset.split("train").labels.tolist() == [0, 2]
    reasons = {item["path"].rsplit("/", 1)[1]: item["reason"] for item in dataset.skipped}
    assert reasons == {
        "1": "is not an image that Pillow can read",
        "3": "has no image",
        "4": "does not exist",
        "5": "has no label",
        "6": "has no label",
        "7": "has the label 7, which is not one of the 3 classes",
    }


def test_unusable_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_parquet(tmp_path / "columns.parquet", range(4), columns=("pixels2", "truth"), features=None)
    (tmp_path / "text.parquet").write_text("no parquet")
    cut = write_parquet(tmp_path / "cut.parquet", range(30))
    cut.write_bytes(cut.read_bytes()[:-400])
    other = {**FEATURES, "label": {"names": ["x", "y", "z"], "_type": "ClassLabel"}}
    write_parquet(tmp_path / "both" / "train-0.parquet", range(6))
    write_parquet(tmp_path / "both" / "test-0.parquet", range(6), features=other)
    (tmp_path / "empty").mkdir()
    for spec, fact in (
        ("columns.parquet", "columns.parquet .*id, pixels2, truth"),
        ("text.parquet", "text.parquet"),
        ("cut.parquet", "cut.parquet"),
        ("both", "train-0.parquet"),
        ("gone.parquet", "gone.parquet"),
        ("none-*.parquet", "none-"),
        ("empty", "empty"),
    ):
        with pytest.raises(DataError, match=fact) as error:
            open_dataset(f"hf-dataset:{tmp_path}/{spec}")
        assert "\n" not in str(error.value)


def without(monkeypatch: pytest.MonkeyPatch, library: str) -> None:
    """As if a library were not installed."""
    real = builtins.__import__

    def missing(name: str, *rest: Any) -> Any:
        if name.partition(".")[0] == library:
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", missing)


# --- the library


def table(numbers: range) -> Any:
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=NAMES), "note": datasets.Value("string")}
    )
    rows = {
        "image": [{"bytes": encoded(number % 3, number), "path": None} for number in numbers],
        "label": [number % 3 for number in numbers],
        "note": ["..."] * len(numbers),
    }
    return datasets.Dataset.from_dict(rows, features=features)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    datasets = pytest.importorskip("datasets")
    tables = {"train": table(range(40)), "validation": table(range(40, 49)), "unsupervised": table(range(3))}
    datasets.DatasetDict(tables).save_to_disk(str(tmp_path / "saved"))
    return tmp_path / "saved"


def test_a_saved_dataset(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = open_dataset(f"hf-dataset:{saved}")
    assert dataset.class_names == tuple(NAMES)
    assert dataset.counts() == {"train": 40, "val": 9}
    assert dataset.how_split == "train, val: the dataset's own; left out: unsupervised"
    split = dataset.split("val")
    assert isinstance(split, TableSplit)
    assert split.name(3).endswith("saved/validation/3")
    for row in range(9):
        np.testing.assert_array_equal(np.asarray(split.image(row)), expected(40 + row))
        assert split.labels[row] == (40 + row) % 3
    # Headers are looked at once.
    monkeypatch.setattr(module, "_add", lambda *_: pytest.fail("looked at again"))
    again = open_dataset(f"hf-dataset:{saved}", class_names=["cat", "bee", "ape"]).split("val")
    assert again.labels.tolist() == [(2, 1, 0)[label] for label in split.labels]


def test_one_saved_table_is_split(tmp_path: Path) -> None:
    table(range(40)).save_to_disk(str(tmp_path / "one"))
    dataset = open_dataset(f"hf-dataset:{tmp_path}/one")
    assert dataset.counts() == {"train": 32, "val": 4, "test": 4}
    rows = [row for split in dataset.splits.values() for row in split.rows.tolist()]
    assert sorted(rows) == list(range(40))


def test_threads_and_resumed_epochs(saved: Path) -> None:
    split = open_dataset(f"hf-dataset:{saved}").split("train")
    plain = [batch.images for batch in TrainLoader(split, P, batch_size=8, crop_scale=(0.3, 1)).epoch(1)]
    threads = TrainLoader(split, P, batch_size=8, crop_scale=(0.3, 1), workers=3)
    assert all(torch.equal(a, b.images) for a, b in zip(plain, threads.epoch(1), strict=True))
    assert torch.equal(next(threads.epoch(1, 3)).images, plain[3])
    threads.close()
    assert len(read_crops(split, P)[0]) == 40


def test_a_dataset_by_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The calls of the library and the use of its results; no test connects to the hub."""
    datasets = pytest.importorskip("datasets")
    asked = []

    def load_dataset(*args: Any, **kwargs: Any) -> Any:
        asked.append((args, kwargs))
        return datasets.DatasetDict(train=table(range(30)), test=table(range(30, 36)))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.chdir(tmp_path)
    assert open_dataset("hf-dataset:org/pets/small@v2").counts() == {"train": 27, "val": 3, "test": 6}
    open_hf_dataset("beans", SplitOptions())
    assert asked == [(("org/pets", "small"), {"revision": "v2"}), (("beans", None), {"revision": None})]
    for word in ("a/b/c/d", "a//b"):
        with pytest.raises(DataError, match=word):
            open_dataset(f"hf-dataset:{word}")
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: 1 / 0)
    with pytest.raises(DataError, match="org/pets: division by zero"):
        open_dataset("hf-dataset:org/pets")


def test_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    without(monkeypatch, "datasets")
    with pytest.raises(DeviceError, match=r"datasets: pip install .*'\.\[hf\]'"):
        open_dataset("hf-dataset:org/pets")
