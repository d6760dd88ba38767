import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_image
from torchvision.transforms import RandomResizedCrop

from vitrail.data.augment.crop import CROP_DRAWS, crop_box, random_crop
from vitrail.data.catalog import open_dataset
from vitrail.data.dataset import ArraySplit, FileSplit
from vitrail.data.loader import TrainLoader
from vitrail.errors import DataError, DistributedError
from vitrail.images.decode import BadImage
from vitrail.images.preprocess import Preprocess
from vitrail.utils.counter_rng import uniform

GREY8 = Preprocess(size=(8, 8), mean=(0.3,), std=(0.4,), channels=1)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    paths = []
    for number in range(20):
        pixels = load_sample_image(("china.jpg", "flower.jpg")[number % 2])
        top, left = 8 * number, 12 * number
        path = folder / f"{number}.jpg"
        Image.fromarray(np.ascontiguousarray(pixels[top : top + 250, left : left + 330])).save(path)
        paths.append(str(path))
    return FileSplit(paths, np.arange(20) % 2)


def same(a, b):
    a, b = list(a), list(b)
    assert len(a) == len(b) > 0
    for x, y in zip(a, b, strict=True):
        assert torch.equal(x.indices, y.indices)
        assert torch.equal(x.images, y.images)
        assert torch.equal(x.labels, y.labels)


def test_arrays_are_copied_without_cropping(monkeypatch):
    split = open_dataset("digits").splits["train"]
    monkeypatch.setattr(Preprocess, "crop", lambda *args: pytest.fail("no image may be cropped one by one"))
    loader = TrainLoader(split, GREY8, batch_size=64, seed=3)
    assert loader.steps_per_epoch == len(split) // 64
    batches = list(loader.epoch(2))
    rows = torch.cat([b.indices for b in batches]).numpy()
    assert len(set(rows.tolist())) == len(rows) == 64 * loader.steps_per_epoch
    assert batches[0].images.shape == (64, 1, 8, 8)
    assert batches[0].images.dtype == torch.uint8
    np.testing.assert_array_equal(torch.cat([b.images for b in batches])[:, 0].numpy(), split.images[rows])
    np.testing.assert_array_equal(torch.cat([b.labels for b in batches]).numpy(), split.labels[rows])
    same(loader.epoch(2, start_step=5), batches[5:])
    assert not torch.equal(next(iter(loader.epoch(3))).indices, batches[0].indices)
    assert 0 < loader.wait_seconds < 5


@pytest.mark.parametrize("crop_scale", [None, (0.08, 1.0)])
def test_workers_and_resuming_change_nothing(photos, crop_scale):
    p = Preprocess(size=(48, 48), crop_pct=0.9)
    one = TrainLoader(photos, p, batch_size=6, seed=1, crop_scale=crop_scale)
    four = TrainLoader(photos, p, batch_size=6, seed=1, crop_scale=crop_scale, workers=4)
    expected = list(one.epoch(0))
    assert one.steps_per_epoch == 3
    same(four.epoch(0), expected)
    same(four.epoch(0, start_step=2), expected[2:])
    list(four.epoch(1))
    iterator = four.epoch(0)  # closed before its end
    next(iterator)
    iterator.close()
    same(four.epoch(0), expected)
    four.close()
    same(four.epoch(0), expected)
    four.close()


@pytest.mark.parametrize("world_size", [2, 3])
def test_processes_share_each_batch(photos, world_size):
    p = Preprocess(size=(24, 24))
    whole = TrainLoader(photos, p, batch_size=6, crop_scale=(0.3, 1))
    ranks = [
        TrainLoader(photos, p, batch_size=6, crop_scale=(0.3, 1), rank=r, world_size=world_size)
        for r in range(world_size)
    ]
    for batch, *parts in zip(whole.epoch(1), *(rank.epoch(1) for rank in ranks), strict=True):
        assert torch.equal(batch.images, torch.cat([part.images for part in parts]))
        assert torch.equal(batch.indices, torch.cat([part.indices for part in parts]))
    with pytest.raises(DistributedError, match="batch_size=5"):
        TrainLoader(photos, p, batch_size=5, world_size=2)
    with pytest.raises(DistributedError, match="20 training images"):
        TrainLoader(photos, p, batch_size=21, world_size=21)


def test_last_batch(photos):
    p = Preprocess(size=(16, 16))
    assert [len(b) for b in TrainLoader(photos, p, batch_size=8).epoch(0)] == [8, 8]
    assert [len(b) for b in TrainLoader(photos, p, batch_size=64).epoch(0)] == [20]
    for rank in range(3):
        assert [len(b) for b in TrainLoader(photos, p, batch_size=63, rank=rank, world_size=3).epoch(0)] == [6]


class Broken(FileSplit):
    """Photos of which some cannot be read."""

    def image(self, i, at_least=None):
        if i in self.broken:
            raise BadImage(f"broken {i}")
        return super().image(i, at_least)


def broken(photos, *rows):
    split = Broken(photos.paths, photos.labels)
    split.broken = rows
    return split


@pytest.mark.parametrize("repeats", [1, 2])
def test_an_unreadable_image_is_replaced_by_the_next_readable_one(photos, repeats):
    """By the next of the epoch's order, with its label and its crop: for any number of workers and processes, and for
    an epoch that is resumed in the middle."""
    p, size = Preprocess(size=(24, 24)), 6
    keys = {"batch_size": size, "seed": 4, "crop_scale": (0.3, 1), "repeats": repeats}
    order = TrainLoader(photos, p, **keys)._order(1)
    rows = (order & 0xFFFF).tolist()
    bad = (rows[3], rows[4], rows[17], 0)  # two in succession, and the last one of the last batch
    expected = [next(key for key in [*order[i:], *order[:i]] if key & 0xFFFF not in bad) for i in range(18)]
    views = {}  # by key
    for epoch_keys in (keys, {**keys, "batch_size": 20}):
        for batch in TrainLoader(photos, p, **epoch_keys).epoch(1):
            views |= dict(zip(batch.keys.tolist(), batch.images, strict=True))
    split = broken(photos, *bad)
    for workers in (0, 3):
        for start in (0, 2):
            for world in (1, 2, 3):
                loaders = [
                    TrainLoader(split, p, workers=workers, rank=r, world_size=world, **keys) for r in range(world)
                ]
                for step, parts in enumerate(zip(*(loader.epoch(1, start) for loader in loaders), strict=True), start):
                    assert [len(part) for part in parts] == [size // world] * world
                    found = torch.cat([part.keys for part in parts]).tolist()
                    assert found == expected[step * size : (step + 1) * size]
                    for part in parts:
                        assert part.labels.tolist() == photos.labels[part.indices].tolist()
                        for key, image in zip(part.keys.tolist(), part.images, strict=True):
                            assert key not in views or torch.equal(image, views[key])
                for loader in loaders:
                    loader.close()
                if start == 0:
                    named = {item["path"] for loader in loaders for item in loader.skipped}
                    met = [row for row in bad if row in rows[:18]]
                    assert named >= {photos.paths[row] for row in met}


@pytest.mark.parametrize("workers", [0, 3])
def test_no_readable_image_is_an_error(photos, workers):
    loader = TrainLoader(broken(photos, *range(20)), Preprocess(size=(24, 24)), batch_size=6, workers=workers)
    with pytest.raises(DataError, match=r"20 training images.*broken"):
        next(loader.epoch(0))
    assert len(loader.skipped) == 20
    loader.close()


def test_arrays_that_need_cropping():
    rng = np.random.default_rng(0)
    split = ArraySplit(rng.integers(0, 256, (30, 9, 7, 3), dtype=np.uint8), np.zeros(30, dtype=np.int64))
    p = Preprocess(size=(12, 12))
    expected = np.stack([p.crop(Image.fromarray(pixels)) for pixels in split.images]).transpose(0, 3, 1, 2)
    train = TrainLoader(split, p, batch_size=10)
    for _ in range(2):
        for batch in train.epoch(0):
            np.testing.assert_array_equal(batch.images.numpy(), expected[batch.indices.numpy()])


def test_crop_boxes_are_torchvisions():
    """The same distribution of positions and sizes, compared by percentiles over many draws."""
    height, width, scale, ratio = 300, 400, (0.08, 1.0), (3 / 4, 4 / 3)
    draws = uniform(0, 0, np.arange(20_000), "crop", CROP_DRAWS)
    ours = np.array([crop_box(height, width, scale, ratio, draw) for draw in draws])
    torch.manual_seed(0)
    blank = torch.empty(3, height, width)
    theirs = np.array([RandomResizedCrop.get_params(blank, scale, ratio) for _ in range(20_000)])
    for column in range(4):
        for q in (5, 25, 50, 75, 95):
            a, b = np.percentile(ours[:, column], q), np.percentile(theirs[:, column], q)
            assert abs(a - b) < 6, (column, q)
    assert (ours[:, 0] + ours[:, 2]).max() <= height
    assert (ours[:, 1] + ours[:, 3]).max() <= width
    assert crop_box(10, 1000, (0.9, 1.0), ratio, draws[0]) == (0, 493, 10, 13)
    assert crop_box(1000, 10, (0.9, 1.0), ratio, draws[0]) == (493, 0, 13, 10)


def test_random_crop_equals_that_part_of_the_image(photos):
    p = Preprocess(size=(32, 40), interpolation="bilinear")
    for row in range(20):
        draw = uniform(0, 0, [row], "crop", CROP_DRAWS)[0]
        top, left, h, w = crop_box(250, 330, (0.08, 1.0), (3 / 4, 4 / 3), draw)
        got = random_crop(photos, row, p, (0.08, 1.0), (3 / 4, 4 / 3), draw)
        image = photos.image(row).crop((left, top, left + w, top + h)).resize((40, 32), Image.Resampling.BILINEAR)
        # Not equal: a large crop is decoded at half the size.
        assert np.abs(got.astype(int) - np.asarray(image)).mean() < 8


def test_bad_arguments(photos):
    with pytest.raises(ValueError, match="batch_size"):
        TrainLoader(photos, GREY8, batch_size=0)
    with pytest.raises(DataError, match="no images"):
        TrainLoader(FileSplit([], np.zeros(0, dtype=np.int64)), GREY8, batch_size=1)


def test_other_exceptions_are_raised(photos, monkeypatch):
    monkeypatch.setattr(Preprocess, "crop", lambda *args: 1 / 0)
    for workers in (0, 2):
        loader = TrainLoader(photos, GREY8, batch_size=4, workers=workers)
        with pytest.raises(ZeroDivisionError):
            list(loader.epoch(0))
        loader.close()
