"""Tables of images: every column, header or none, against pandas, polars and pyarrow writing the same rows."""

import os
import re
from pathlib import Path

import numpy as np
import pandas
import pytest

from data.make_folder import picture
from vitrail.data.catalog import absolute_data, open_dataset
from vitrail.data.dataset import FileSplit
from vitrail.data.formats.folder import open_folder
from vitrail.data.splits import SplitOptions
from vitrail.errors import DataError

ROWS = [(f"images/{number}.png", ("cat", "dog")[number % 2]) for number in range(40)]
SPLITS = ["train"] * 28 + ["validation"] * 6 + ["Test"] * 6
WEIGHTS = [0.5, 1, 2, 4] * 10


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("table")
    (root / "images").mkdir()
    for number, (path, _) in enumerate(ROWS):
        picture(number % 2, number, (20, 24)).save(root / path)
    return root


@pytest.fixture(scope="module")
def frame() -> pandas.DataFrame:
    frame = pandas.DataFrame(ROWS, columns=["path", "label"])
    return frame.assign(split=SPLITS, weight=WEIGHTS)


def check(dataset, root: Path) -> None:
    """All 40 images are where the table says, with their labels and weights."""
    assert dataset.class_names == ("cat", "dog")
    assert dataset.counts() == {"train": 28, "val": 6, "test": 6}
    for (name, split), rows in zip(dataset.splits.items(), (range(28), range(28, 34), range(34, 40)), strict=True):
        assert isinstance(split, FileSplit), name
        assert [os.path.realpath(path) for path in split.paths] == [os.path.realpath(root / ROWS[i][0]) for i in rows]
        assert split.labels.tolist() == [i % 2 for i in rows]
        assert split.weights.tolist() == [WEIGHTS[i] for i in rows]
    np.testing.assert_array_equal(np.asarray(dataset.splits["test"].image(5)), np.asarray(picture(1, 39, (20, 24))))


@pytest.mark.parametrize("header", [True, False])
@pytest.mark.parametrize("separator", [",", ";", "\t"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_csv(root: Path, frame: pandas.DataFrame, header: bool, separator: str, encoding: str) -> None:
    file = root / "a table.csv"
    frame.to_csv(file, index=False, header=header, sep=separator, encoding=encoding)
    check(open_dataset(file), root)
    check(open_dataset(str(file)), root)


@pytest.mark.parametrize("columns", [["path", "label", "weight", "split"], ["weight", "label", "split", "path"]])
def test_columns_may_have_any_order_and_others_are_ignored(root, frame, columns) -> None:
    file = root / "order.csv"
    frame[columns].assign(note="x, y").to_csv(file, index=False)
    check(open_dataset(file), root)


def test_names_of_other_libraries(root, frame) -> None:
    file = root / "names.csv"
    frame.rename(columns={"path": "Image", "label": "class", "weight": "sample_weight"}).to_csv(file, index=False)
    check(open_dataset(file), root)


def test_parquet(root, frame) -> None:
    frame.to_parquet(root / "table.parquet")
    check(open_dataset(root / "table.parquet"), root)
    frame.astype({"label": "category"}).to_parquet(root / "table.parquet")
    check(open_dataset(root / "table.parquet"), root)


def test_frames_are_relative_to_the_working_directory(root, frame, monkeypatch) -> None:
    polars = pytest.importorskip("polars")
    monkeypatch.chdir(root)
    check(open_dataset(frame), root)
    check(open_dataset(frame.set_index(np.arange(100, 140))), root)
    check(open_dataset(polars.DataFrame({name: frame[name].tolist() for name in frame})), root)


def test_held_out_images_are_those_of_a_moved_table(root, tmp_path) -> None:
    """The split depends on the paths in the table alone, not on where it is."""
    names = []
    for folder in (root, tmp_path / "moved"):
        if folder != root:
            folder.mkdir()
            (folder / "images").symlink_to(root / "images")
        pandas.DataFrame(ROWS, columns=["path", "label"]).to_csv(folder / "plain.csv", index=False)
        dataset = open_dataset(folder / "plain.csv")
        assert dataset.counts() == {"train": 32, "val": 4, "test": 4}
        names.append({name: [Path(path).name for path in split.paths] for name, split in dataset.splits.items()})
    assert names[0] == names[1]


def test_numbers_as_labels_are_classes_in_their_order(root) -> None:
    labels = [10, 9, None, 100] * 10  # pandas makes floats of them
    pandas.DataFrame({"path": [path for path, _ in ROWS], "label": labels}).to_csv(root / "numbers.csv", index=False)
    dataset = open_dataset(root / "numbers.csv", val_fraction=0, test_fraction=0)
    assert dataset.class_names == ("9", "10", "100")
    assert dataset.splits["train"].labels.tolist() == [1, 0, 2] * 10
    assert {each["reason"] for each in dataset.skipped} == {"has no label"}
    assert len(dataset.skipped) == 10


def test_unreadable_images_are_skipped_by_name(root) -> None:
    (root / "bad.csv").write_text("path,label\n" + "".join(f"{p},{c}\n" for p, c in [*ROWS, ("gone.png", "cat")]))
    dataset = open_dataset(root / "bad.csv")
    assert [(Path(each["path"]).name, each["reason"]) for each in dataset.skipped] == [("gone.png", "does not exist")]


def test_the_same_images_as_of_a_folder(tmp_path) -> None:
    for number in range(20):
        file = tmp_path / f"class{number % 2}" / f"{number}.png"
        file.parent.mkdir(exist_ok=True)
        picture(number % 2, number).save(file)
    folder = open_folder(str(tmp_path), SplitOptions())
    rows = "".join(f"class{number % 2}/{number}.png,class{number % 2}\n" for number in range(20))
    (tmp_path / "t.csv").write_text(rows)
    table = open_dataset(tmp_path / "t.csv")
    for name, split in folder.splits.items():
        assert sorted(split.paths) == sorted(table.splits[name].paths)


@pytest.mark.parametrize(
    ("text", "facts"),
    [
        ("", "is empty"),
        ("path,kind\na.png,1\n", "no column label.*path, kind"),
        ("name,species\na,b\n", "name, species.*neither a header nor an image"),
        ("path,label\nimages/0.png,cat\nimages/1.png\n", "1 columns in line 3"),
        ("path,label\n,cat\n", "no path in line 2"),
        ("path,label,split\nimages/0.png,cat,holdout\n", "'holdout' in line 2.*train, val or test"),
        ("path,label,split\nimages/0.png,cat,\n", "no split in line 2"),
        ("path,label,weight\n\nimages/0.png,cat,-1\n", "'-1' in line 3"),
        ("path,label,weight\nimages/0.png,cat,nan\n", "'nan' in line 2"),
        ("path,label,weight\nimages/0.png,cat,0\nimages/1.png,dog,0\n", "weights of all training images are 0"),
        ("images/0.png,cat,x\n", "column 3 of .*neither splits nor weights"),
        ("path,label\nnone.png,cat\n", r"none.png does not exist.*relative to the table's folder"),
        ("path,label\nimages/0.png,cat\n", "only 1 class"),
    ],
)
def test_errors_name_the_line(root: Path, text: str, facts: str) -> None:
    (root / "wrong.csv").write_text(text)
    with pytest.raises(DataError) as caught:
        open_dataset(root / "wrong.csv")
    message = str(caught.value)
    assert re.search(facts, message), message
    assert "\n" not in message


def test_files_that_are_no_tables(root, tmp_path) -> None:
    with pytest.raises(DataError, match=r"nowhere.csv does not exist"):
        open_dataset("nowhere.csv")
    (tmp_path / "latin.csv").write_bytes("path,label\na.png,Bär\n".encode("latin-1"))
    with pytest.raises(DataError, match="UTF-8"):
        open_dataset(tmp_path / "latin.csv")
    (tmp_path / "x.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError, match="could not read"):
        open_dataset(tmp_path / "x.parquet")
    pandas.DataFrame({"image": [{"bytes": b"x", "path": None}], "label": [0]}).to_parquet(tmp_path / "y.parquet")
    with pytest.raises(DataError, match="write hf-dataset:"):
        open_dataset(tmp_path / "y.parquet")


def test_a_table_has_an_absolute_path(root, monkeypatch) -> None:
    monkeypatch.chdir(root)
    assert absolute_data("t.csv") == str(root / "t.csv")
