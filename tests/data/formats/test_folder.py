import os
import sys

import numpy as np
import pytest
from PIL import Image

from data.crops import read_crops
from data.make_folder import BROKEN, GOOD, make_folder, picture
from vitrail.data.catalog import open_dataset
from vitrail.data.dataset import FileSplit
from vitrail.data.loader import TrainLoader
from vitrail.data.splits import natural
from vitrail.errors import DataError
from vitrail.images.preprocess import Preprocess
from vitrail.images.reader import expand

SMALL = Preprocess(size=(32, 32))


def paths(dataset, name):
    split = dataset.splits[name]
    assert isinstance(split, FileSplit)
    return split.paths


def test_readable_and_unreadable_kinds_of_files(tmp_path):
    made = make_folder(tmp_path / "photos", classes=2, per_class=24)
    assert len(GOOD) == 12
    assert len(made.broken) == len(BROKEN) == 8
    dataset = open_dataset(tmp_path / "photos")
    assert dataset.class_names == made.class_names
    reasons = {s["path"]: s["reason"] for s in dataset.skipped}
    assert reasons.keys() == made.broken.keys()
    for path, kind in made.broken.items():
        assert BROKEN[kind][0] in reasons[path]
    every = [path for name in dataset.splits for path in paths(dataset, name)]
    assert sorted(every) == sorted(made.good)
    assert dataset.counts() == {"train": 38, "val": 5, "test": 5}
    for name, split in dataset.splits.items():
        assert [f"class{label}" for label in split.labels] == [
            os.path.basename(os.path.dirname(p)) for p in paths(dataset, name)
        ]
        crops, skipped = read_crops(split, SMALL)
        assert (len(crops), skipped) == (len(split), {})
    assert dataset.sizes.count == 48
    assert dataset.sizes.median == (48, 64)
    assert dataset.sizes.uniform
    assert dataset.sizes.aspect == pytest.approx((4 / 3,) * 3)
    assert dataset.eval_split() == "test"
    assert "split seed 0" in dataset.how_split


def test_an_image_deleted_later_is_replaced_and_listed(tmp_path):
    made = make_folder(tmp_path / "photos", per_class=12, broken=False)
    dataset = open_dataset(tmp_path / "photos", val_fraction=0, test_fraction=0)
    gone = sorted(made.good)[5]
    os.unlink(gone)
    for workers in (0, 2):
        loader = TrainLoader(dataset.splits["train"], SMALL, batch_size=6, workers=workers)
        for _ in range(2):
            batches = list(loader.epoch(0))
            assert all(len(b.images) == len(b.labels) == len(b.indices) == 6 for b in batches)
        assert loader.skipped == [{"path": gone, "reason": "does not exist"}]
        loader.close()


def test_batches_without_any_readable_image_are_replaced(tmp_path):
    make_folder(tmp_path / "photos", per_class=4, broken=False)
    dataset = open_dataset(tmp_path / "photos", val_fraction=0, test_fraction=0)
    for path in paths(dataset, "train")[:6]:
        os.unlink(path)
    loader = TrainLoader(dataset.splits["train"], SMALL, batch_size=1)
    first = [int(b.indices[0]) for b in loader.epoch(0)]
    assert len(first) == 8
    assert set(first) == {6, 7}
    assert first[5:] == [int(b.indices[0]) for b in loader.epoch(0, start_step=5)]
    for path in paths(dataset, "train")[6:]:
        os.unlink(path)
    with pytest.raises(DataError, match="does not exist"):
        next(iter(loader.epoch(1)))


@pytest.mark.parametrize(
    ("layout", "own"),
    [
        (("train", "val", "test"), 3),
        (("train", "validation"), 2),
        (("training", "testing"), 2),
        (("Train",), 1),
        (("test",), 1),
    ],
)
def test_split_folders(layout, own, tmp_path):
    make_folder(tmp_path / "d", per_class=12, broken=False, layout=layout)
    dataset = open_dataset(tmp_path / "d")
    expected = {
        ("train", "val", "test"): {"train": 24, "val": 24, "test": 24},
        ("train", "validation"): {"train": 24, "val": 24},
        ("training", "testing"): {"train": 21, "val": 3, "test": 24},
        ("Train",): {"train": 18, "val": 3, "test": 3},
        ("test",): {"test": 24},
    }[layout]
    assert dataset.counts() == expected
    assert list(dataset.splits) == list(expected)
    everything = [p for name in dataset.splits for p in paths(dataset, name)]
    assert len(set(everything)) == len(everything) == 24 * own
    assert dataset.how_split


def test_few_images_give_no_test_split(tmp_path):
    make_folder(tmp_path / "d", per_class=6, broken=False)
    dataset = open_dataset(tmp_path / "d")
    assert dataset.counts() == {"train": 10, "val": 2}
    assert "no test split" in dataset.how_split
    assert dataset.eval_split() == "val"
    with pytest.raises(DataError, match="no 'test' split"):
        dataset.split("test")


def test_one_image_per_class_stays_in_train(tmp_path):
    make_folder(tmp_path / "d", per_class=1, broken=False)
    assert open_dataset(tmp_path / "d").counts() == {"train": 2}


def test_subfolders_links_and_ignored_files(tmp_path):
    made = make_folder(tmp_path / "d", per_class=2, broken=False)
    inner = tmp_path / "d" / "class0" / "2024" / "may"
    inner.mkdir(parents=True)
    picture(0, 7).save(inner / "deep.jpg")
    (inner / "up").symlink_to(tmp_path / "d" / "class0", target_is_directory=True)  # a loop
    (inner / "self").symlink_to(inner / "self")
    for name in ("notes.txt", "Thumbs.db", ".DS_Store", "._photo.jpg", "data.json"):
        (tmp_path / "d" / "class1" / name).write_bytes(b"nothing")
    (tmp_path / "d" / ".git").mkdir()
    (tmp_path / "d" / "README.md").write_text("about")
    dataset = open_dataset(tmp_path / "d", val_fraction=0)
    assert sorted(paths(dataset, "train")) == sorted([*made.good, str(inner / "deep.jpg")])
    assert dataset.skipped == []
    assert dataset.class_names == ("class0", "class1")
    picture(0, 8).save(tmp_path / "d" / "stray.jpg")
    (stray,) = open_dataset(tmp_path / "d").skipped
    assert stray["path"].endswith("stray.jpg")
    assert "class folder" in stray["reason"]


def test_natural_order_of_class_names(tmp_path):
    names = ["class10", "class2", "Zebra", "apple", "ärger", "日本", "with space", "2", "10"]
    for c, name in enumerate(names):
        (tmp_path / "d" / name).mkdir(parents=True)
        picture(c, 0).save(tmp_path / "d" / name / "a.png")
    found = open_dataset(tmp_path / "d").class_names
    assert found == tuple(sorted(names, key=natural))
    assert found.index("2") < found.index("10") < found.index("class2") < found.index("class10")


def test_a_class_named_like_a_split(tmp_path):
    for c, name in enumerate(("train", "bus", "test")):
        (tmp_path / "d" / name).mkdir(parents=True)
        for i in range(3):
            picture(c, i).save(tmp_path / "d" / name / f"{i}.png")
    assert open_dataset(tmp_path / "d").class_names == ("bus", "test", "train")


def write(root, *names):
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".png":
            Image.new("RGB", (8, 8)).save(path)
        elif path.suffix:
            path.write_bytes(b"")
        else:
            path.mkdir()


@pytest.mark.parametrize(
    ("names", "facts"),
    [
        ([], "class folder"),
        (["a.png", "b.png"], "class folder"),
        (["cat/a.png"], "cat"),
        (["cat/a.png", "dog/a.jpg"], "'dog'.*is empty"),
        (["cat/a.png", "dog/notes.txt"], "'dog'.*0 files"),
        (["cat/a.png", "dog"], "'dog'.*0 files"),
        (["train/a.png", "val/a.png"], "train .*class folder"),
        (["train/cat/a.png", "train/dog/a.png", "val/cat/a.png", "val/dgo/a.png"], "'dgo'.*'dog'"),
        (["train/cat/a.png", "train/dog/a.png", "val/cat/a.png"], "val .*'dog'"),
        (["train/cat/a.png", "train/dog/a.png", "val/cat/a.png", "valid/cat/a.png"], "val/.*valid/"),
    ],
)
def test_unusable_folders(names, facts, tmp_path):
    (tmp_path / "d").mkdir()
    write(tmp_path / "d", *names)
    with pytest.raises(DataError, match=facts) as error:
        open_dataset(tmp_path / "d")
    assert "\n" not in str(error.value)


def test_a_file_or_a_missing_path_is_refused(tmp_path):
    (tmp_path / "photo.jpg").write_bytes(b"")
    with pytest.raises(DataError, match=r"photo\.jpg"):
        open_dataset(tmp_path / "photo.jpg")
    with pytest.raises(DataError, match="'fashion-mnist'"):
        open_dataset("fashion-minst")
    with pytest.raises(DataError, match="nowhere"):
        open_dataset(tmp_path / "nowhere")


def test_held_out_splits_are_stratified_seeded_and_stable(tmp_path):
    make_folder(tmp_path / "d", classes=3, per_class=20, broken=False)
    one = open_dataset(tmp_path / "d", val_fraction=0.2, test_fraction=0.1)
    assert [np.bincount(one.splits[s].labels).tolist() for s in ("train", "val", "test")] == [
        [14] * 3,
        [4] * 3,
        [2] * 3,
    ]
    again = open_dataset(tmp_path / "d", val_fraction=0.2, test_fraction=0.1)
    assert all(paths(one, s) == paths(again, s) for s in one.splits)
    other = open_dataset(tmp_path / "d", val_fraction=0.2, test_fraction=0.1, split_seed=1)
    assert paths(one, "val") != paths(other, "val")
    # Held-out images depend on names: moving the folder changes nothing, and adding an image moves few.
    os.rename(tmp_path / "d", tmp_path / "e")
    moved = open_dataset(tmp_path / "e", val_fraction=0.2, test_fraction=0.1)
    assert [p.replace("/e/", "/d/") for p in paths(moved, "test")] == paths(one, "test")
    picture(0, 99).save(tmp_path / "e" / "class0" / "000_a.png")
    more = open_dataset(tmp_path / "e", val_fraction=0.2, test_fraction=0.1)
    assert len(set(paths(moved, "val")) - set(paths(more, "val"))) <= 2


def test_labels_are_matched_to_the_classes_of_a_model(tmp_path):
    make_folder(tmp_path / "d", classes=2, per_class=3, broken=False)
    dataset = open_dataset(tmp_path / "d", val_fraction=0, class_names=("class1", "other", "class0"))
    assert dataset.class_names == ("class1", "other", "class0")
    folders = [os.path.basename(os.path.dirname(path)) for path in paths(dataset, "train")]
    labels = dataset.splits["train"].labels.tolist()
    assert set(zip(folders, labels, strict=True)) == {("class0", 2), ("class1", 0)}
    with pytest.raises(DataError, match="'class0'"):
        open_dataset(tmp_path / "d", class_names=("class1", "class2"))


def test_progress(tmp_path):
    make_folder(tmp_path / "d", per_class=40, broken=False)
    seen = []
    open_dataset(tmp_path / "d", progress=lambda done, total: seen.append((done, total)))
    assert seen == [(64, 80), (80, 80)]


def test_a_class_folder_whose_name_is_not_utf8(tmp_path):
    root = tmp_path / "d"
    for c, name in enumerate((b"caf\xe9", "thé".encode(), b"\x1b[31mred")):
        folder = os.path.join(os.fsencode(root), name)
        os.makedirs(folder)
        for i in range(4):
            picture(c, i).save(os.path.join(os.fsdecode(folder), f"{i}.png"))
    with pytest.warns(UserWarning, match=r"caf\\xe9 as café"):
        dataset = open_dataset(root)
    assert sorted(dataset.class_names) == ["\\x1b[31mred", "café", "thé"]
    assert "\x1b" not in "".join(dataset.class_names)
    "".join(dataset.class_names).encode()
    assert sum(dataset.counts().values()) == 12
    assert all(dataset.splits[name].image(0).size == (64, 48) for name in dataset.splits)
    # Two names that read alike stay two classes.
    os.makedirs(os.path.join(os.fsencode(root), "café".encode()))
    picture(3, 0).save(root / "café" / "0.png")
    with pytest.warns(UserWarning, match="by another name"):
        assert sorted(open_dataset(root, val_fraction=0).class_names) == ["\\x1b[31mred", "caf\\xe9", "café", "thé"]


def test_links_that_would_relabel_the_images_of_other_classes(tmp_path):
    made = make_folder(tmp_path / "up/d", classes=3, per_class=5, broken=False)
    (made.root / "class0/root").symlink_to(made.root)
    (made.root / "class0/up").symlink_to(tmp_path / "up")
    (made.root / "class1/other").symlink_to(made.root / "class2")
    (made.root / "class1/self").symlink_to(made.root / "class1")
    (tmp_path / "elsewhere").mkdir()
    picture(2, 77).save(tmp_path / "elsewhere/77.png")
    (made.root / "class2/more").symlink_to(tmp_path / "elsewhere")
    dataset = open_dataset(made.root, val_fraction=0)
    label = {
        os.path.realpath(p): dataset.class_names[k]
        for p, k in zip(paths(dataset, "train"), dataset.splits["train"].labels, strict=True)
    }
    assert len(paths(dataset, "train")) == len(label) == 16
    assert all(os.path.basename(os.path.dirname(p)) in (name, "elsewhere") for p, name in label.items())
    assert {os.path.relpath(s["path"], made.root) for s in dataset.skipped} == {
        "class0/root",
        "class0/up",
        "class1/other",
    }


def test_folders_beside_the_splits_are_named(tmp_path):
    made = make_folder(tmp_path / "d", classes=2, per_class=5, broken=False, layout=("train",))
    (made.root / "dogs").mkdir()
    picture(0, 9).save(made.root / "dogs/9.png")
    dataset = open_dataset(made.root)
    assert [(s["path"], "train/" in s["reason"]) for s in dataset.skipped] == [(str(made.root / "dogs"), True)]


@pytest.fixture
def deep(tmp_path):
    """A folder of images with 1,500 folders in each other, which are removed one by one: rmtree is recursive."""
    made = make_folder(tmp_path / "d", classes=2, per_class=3, broken=False)
    inner, other = made.root / "class0/s", made.root / "class0/t"
    inner.mkdir()
    for _ in range(1500):
        inner.rename(other)
        inner.mkdir()
        other.rename(inner / "s")
    yield made.root
    while inner.exists():
        if (inner / "s").exists():
            (inner / "s").rename(other)
        inner.rmdir()
        if other.exists():
            other.rename(inner)


@pytest.mark.slow
def test_a_folder_1500_deep(deep):
    assert sum(open_dataset(deep).counts().values()) == 6
    assert len(list(expand(str(deep)))) == 6
    limit = sys.getrecursionlimit()
    try:
        sys.setrecursionlimit(1000)  # Python's default: imported packages may have raised it
        with pytest.raises(DataError, match="deep"):
            list(expand(f"{deep}/**/*.png"))
    finally:
        sys.setrecursionlimit(limit)
