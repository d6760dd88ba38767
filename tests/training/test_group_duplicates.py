"""Copies of a photograph stay on one side of a drawn split, wherever the images are split."""

import io

import pytest
from PIL import Image
from sklearn.datasets import load_sample_image

from training import tiny
from training.test_resume import Killed, kill_at
from vitrail.data.catalog import open_dataset
from vitrail.training.engine.trainer import Trainer
from vitrail.training.run import train

COPIED = range(12)  # of 20 photographs of a class
SETTINGS = {**tiny.PLAIN, "img_size": 8, "in_chans": 1, "epochs": 2, "batch_size": 16}
SETTINGS |= {"test_fraction": 0.2, "val_fraction": 0.2}


def recompressed(image):
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=60)
    return Image.open(stream)


CHANGES = {
    "resized": lambda image: image.resize((80, 66), Image.Resampling.BICUBIC),
    "mirrored": lambda image: image.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
    "recompressed": recompressed,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Names are SOURCE.png, and SOURCE-CHANGE.png for a copy; two classes of 20 photographs and 12 copies."""
    root = tmp_path_factory.mktemp("photos")
    for c, name in enumerate(("china.jpg", "flower.jpg")):
        whole = load_sample_image(name)
        (root / f"class{c}").mkdir()
        for i in range(20):
            y, x = 106 * (i // 5), 128 * (i % 5)
            image = Image.fromarray(whole[y : y + 104, x : x + 124])
            image.save(root / f"class{c}/{i:02}.png")
            if i in COPIED:
                change = list(CHANGES)[i % len(CHANGES)]
                CHANGES[change](image).save(root / f"class{c}/{i:02}-{change}.png")
    return root


def torn(dataset):
    """Photographs of which copies are in more than one split."""
    sides = {}
    for name, split in dataset.splits.items():
        for i in range(len(split)):
            folder, _, file = split.name(i).rpartition("/")
            sides.setdefault((folder, file[:2]), set()).add(name)
    return [source for source, names in sides.items() if len(names) > 1]


def test_no_group_is_on_two_sides(folder):
    fractions = {"val_fraction": 0.2, "test_fraction": 0.2}
    for seed in range(3):
        apart = open_dataset(folder, **fractions, split_seed=seed)
        together = open_dataset(folder, **fractions, split_seed=seed, group_duplicates=True)
        assert torn(apart)
        assert torn(together) == []
        assert sum(together.counts().values()) == 64
        assert all(abs(together.counts()[name] - 13) <= 2 for name in ("val", "test"))
        assert "48 images in 24 groups" in together.how_split


@pytest.mark.filterwarnings("ignore:.*copies of images in two splits")
def test_splits_of_the_data_are_kept(folder, tmp_path):
    for name in ("train", "test", "val"):
        (tmp_path / name).symlink_to(folder, target_is_directory=True)
    dataset = open_dataset(tmp_path, group_duplicates=True)
    assert dataset.counts() == {"train": 64, "val": 64, "test": 64}
    assert "group_duplicates has no effect" in dataset.how_split


def test_evaluation_and_resume_split_alike(folder, tmp_path, monkeypatch):
    tiny.add_variant(monkeypatch)
    expected = open_dataset(folder, val_fraction=0.2, test_fraction=0.2, group_duplicates=True)
    clf = train(folder, out=tmp_path / "whole", progress=False, group_duplicates=True, **SETTINGS)
    assert clf.notes["counts"] == expected.counts()
    assert clf.notes["split"]["group_duplicates"] is True
    for split in expected.splits:
        assert clf.evaluate(folder, split).to_dict() == clf.evaluate(expected, split).to_dict()
    apart = open_dataset(folder, val_fraction=0.2, test_fraction=0.2)
    assert clf.evaluate(folder, "train").loss != clf.evaluate(apart, "train").loss

    with monkeypatch.context() as patch:
        kill_at(patch, Trainer, "step", 3)  # of two epochs of two steps
        with pytest.raises(Killed):
            train(folder, out=tmp_path / "run", progress=False, group_duplicates=True, **SETTINGS)
    report = train(resume=tmp_path / "run", progress=False).report
    assert report["top1"] == clf.report["top1"]
    assert report["how_split"] == expected.how_split
