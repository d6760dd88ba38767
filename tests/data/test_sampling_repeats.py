"""Repeated augmentation: how many views of how many images, and which."""

import numpy as np
import pytest
import torch
from timm.data.distributed_sampler import RepeatAugSampler

from vitrail.data.dataset import ArraySplit
from vitrail.data.loader import TrainLoader
from vitrail.data.sampling import count_repetitions, epoch_order, repetitions_of, rows_of
from vitrail.images.preprocess import Preprocess
from vitrail.utils.counter_rng import permutation

SMALL = Preprocess(size=(8, 8), channels=1, mean=(0.5,), std=(0.5,))


def split(count: int, size: int = 12) -> ArraySplit:
    pixels = np.random.default_rng(0).integers(0, 256, (count, size, size)).astype(np.uint8)
    return ArraySplit(pixels, np.arange(count) % 10)


def test_without_repetitions_a_key_is_a_row() -> None:
    for epoch in (0, 7):
        assert np.array_equal(epoch_order(3, epoch, 100, 1, 8), permutation(3, epoch, 100))
    keys = np.array([5, 0, 99])
    assert np.array_equal(rows_of(keys), keys)
    assert not repetitions_of(keys).any()


def test_repetitions_are_counted() -> None:
    keys = count_repetitions(np.array([4, 2, 4, 4, 0, 2]))
    assert rows_of(keys).tolist() == [4, 2, 4, 4, 0, 2]
    assert repetitions_of(keys).tolist() == [0, 0, 1, 2, 0, 1]
    assert len(set(keys.tolist())) == 6
    assert len(count_repetitions(np.array([], dtype=np.int64))) == 0


@pytest.mark.parametrize(("count", "repeats"), [(768, 3), (512, 2), (1000, 3), (7, 3)])
def test_counts_equal_timms(count: int, repeats: int) -> None:
    """As many views of as many images as timm's (and DeiT's) sampler gives one process, but that it drops what does
    not fill 256.
    """
    timms = np.array(list(RepeatAugSampler(range(count), num_replicas=1, rank=0, num_repeats=repeats)))
    order = epoch_order(0, 0, count, repeats, 64)
    assert len(order) == count
    kept = len(timms)
    assert kept == (count // 256 * 256 if count >= 256 else count)
    theirs = np.bincount(timms, minlength=count)
    ours = np.bincount(rows_of(order), minlength=count)
    if kept == count:
        assert sorted(ours) == sorted(theirs)
    assert (ours > 0).sum() == -(-count // repeats)
    assert sorted(np.unique(ours[ours > 0]))[-1] == repeats
    assert (np.bincount(repetitions_of(order)) == [-(-(count - r) // repeats) for r in range(repeats)]).all()


def test_images_are_drawn_again_in_each_epoch() -> None:
    """In `repeats` epochs, (2/3)^3 of the images do not occur, as with timm's sampler."""
    seen = [set(rows_of(epoch_order(1, epoch, 3000, 3, 100)).tolist()) for epoch in range(3)]
    assert seen[0] != seen[1]
    share = len(set.union(*seen)) / 3000
    timm = set()
    for epoch in range(3):
        sampler = RepeatAugSampler(range(3000), num_replicas=1, rank=0, selected_round=0)
        sampler.set_epoch(epoch)
        timm |= set(sampler)
    assert share == pytest.approx(1 - (2 / 3) ** 3, abs=0.02)
    assert share == pytest.approx(len(timm) / 3000, abs=0.02)


@pytest.mark.parametrize("size", [12, 16, 50])
def test_a_batch_has_all_views_of_its_images_and_neighbours_differ(size: int) -> None:
    order = epoch_order(0, 2, 300, 3, size)
    batches = [order[i : i + size] for i in range(0, 300, size)]
    parted = 0  # images whose views fall into two batches, at its edge
    for keys in batches:
        rows = rows_of(keys)
        pairs = rows[: len(rows) & ~1].reshape(-1, 2)
        assert (pairs[:, 0] != pairs[:, 1]).all()
        assert len(set(keys.tolist())) == len(keys)
        parted += (np.unique(rows, return_counts=True)[1] < 3).sum()
    assert parted <= (0 if size % 3 == 0 else 2 * len(batches))


def test_views_of_an_image_are_cropped_differently() -> None:
    loader = TrainLoader(split(24), SMALL, batch_size=12, crop_scale=(0.2, 0.6), repeats=3)
    once = TrainLoader(split(24), SMALL, batch_size=24, crop_scale=(0.2, 0.6))
    assert loader.steps_per_epoch == 2
    (plain,) = once.epoch(0)
    usual = {int(i): x for i, x in zip(plain.indices, plain.images, strict=True)}
    for batch in loader.epoch(0):
        assert torch.equal(batch.labels, batch.indices % 10)
        for row in set(batch.indices.tolist()):
            mine = batch.indices == row
            views = batch.images[mine]
            assert len(views) == 3
            assert len({view.numpy().tobytes() for view in views}) == 3
            first = views[repetitions_of(batch.keys[mine]) == 0]
            assert torch.equal(first[0], usual[row])


@pytest.mark.parametrize("crop_scale", [None, (0.2, 0.6)])
def test_batches_do_not_depend_on_workers_processes_or_resuming(crop_scale: tuple[float, float] | None) -> None:
    options = {"batch_size": 12, "crop_scale": crop_scale, "repeats": 3, "seed": 5}
    expected = list(TrainLoader(split(50), SMALL, **options).epoch(1))
    assert len(expected) == 4
    threads = TrainLoader(split(50), SMALL, workers=3, **options)
    ranks = [TrainLoader(split(50), SMALL, rank=r, world_size=2, **options) for r in range(2)]
    parts = zip(*(rank.epoch(1) for rank in ranks), strict=True)
    for one, two, halves in zip(expected, threads.epoch(1), parts, strict=True):
        assert torch.equal(one.keys, two.keys)
        assert torch.equal(one.images, two.images)
        assert torch.equal(one.keys, torch.cat([half.keys for half in halves]))
        assert torch.equal(one.images, torch.cat([half.images for half in halves]))
    (last,) = threads.epoch(1, start_step=3)
    assert torch.equal(last.keys, expected[3].keys)
    threads.close()
