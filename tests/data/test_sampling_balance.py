"""Imbalanced classes: balanced sampling and class weights, against explicit counts and scikit-learn."""

import numpy as np
import pytest
import torch
from sklearn.utils.class_weight import compute_class_weight

from vitrail.data.dataset import ArraySplit
from vitrail.data.loader import TrainLoader
from vitrail.data.sampling import Imbalance, balanced_rows, class_weights, repetitions_of, rows_of
from vitrail.errors import ConfigError
from vitrail.images.preprocess import Preprocess

# Class 2 has no images; the labels are not sorted.
LABELS = np.random.default_rng(0).permutation(np.repeat([0, 1, 3], [70, 26, 4]))
SPLIT = ArraySplit(np.arange(100 * 64).reshape(100, 8, 8).astype(np.uint8), LABELS)
PREPROCESS = Preprocess(size=(8, 8), mean=(0.5,), std=(0.5,), channels=1)


def loader(**options: object) -> TrainLoader:
    return TrainLoader(SPLIT, PREPROCESS, **{"batch_size": 10, "balance": True, **options})


def test_classes_and_their_images_are_equally_frequent() -> None:
    extra = set()
    for epoch in range(6):
        rows = balanced_rows(LABELS, 3, epoch)
        assert len(rows) == 100
        kinds, counts = np.unique(LABELS[rows], return_counts=True)
        assert kinds.tolist() == [0, 1, 3]
        assert sorted(counts) == [33, 33, 34]
        extra.add(int(counts.argmax()))
        times = np.bincount(rows, minlength=100)
        assert set(times[LABELS == 0]) == {0, 1}
        assert set(times[LABELS == 1]) <= {1, 2}
        assert set(times[LABELS == 3]) <= {8, 9}
        assert times.max() <= Imbalance.of(LABELS).most_repeats == 9
    assert len(extra) > 1, "the odd place goes to one class now and to another then"


def test_the_order_is_reproducible_shuffled_and_different_in_every_epoch() -> None:
    one = balanced_rows(LABELS, 3, 1)
    assert (one == balanced_rows(LABELS, 3, 1)).all()
    assert (one != balanced_rows(LABELS, 3, 2)).any()
    assert (one != balanced_rows(LABELS, 4, 1)).any()
    assert len(np.unique(LABELS[one][:20])) == 3, "classes are spread over the epoch"
    seen = {row for epoch in range(20) for row in balanced_rows(LABELS, 3, epoch)}
    assert seen == set(range(100)), "of a large class another part comes in every epoch"


def test_one_image_per_class_and_one_class() -> None:
    assert sorted(balanced_rows(np.array([1, 0]), 0, 0)) == [0, 1]
    assert sorted(balanced_rows(np.array([5, 5, 5]), 0, 0)) == [0, 1, 2]


def test_epochs_resume_at_any_step_and_views_of_one_image_differ() -> None:
    whole = list(loader().epoch(2))
    assert [batch.keys.tolist() for batch in loader().epoch(2, 4)] == [batch.keys.tolist() for batch in whole[4:]]
    keys = torch.cat([batch.keys for batch in whole])
    assert len(set(keys.tolist())) == len(keys) == 100, "a view is determined by its key"
    assert int(repetitions_of(keys).max()) in (7, 8)
    assert (rows_of(keys).numpy() == balanced_rows(LABELS, 0, 2)).all()
    for batch in whole:
        assert (batch.labels.numpy() == LABELS[batch.indices.numpy()]).all()
        assert (batch.images[:, 0].numpy() == SPLIT.images[batch.indices.numpy()]).all()


def test_random_crops_of_a_repeated_image_differ() -> None:
    """A rare image comes eight times; its crops are drawn by key."""
    wide = np.arange(64 * 64).reshape(1, 64, 64).astype(np.uint8).repeat(4, 0)
    split = ArraySplit(wide, np.array([0, 0, 0, 1]))
    crops = TrainLoader(split, PREPROCESS, batch_size=4, balance=True, crop_scale=(0.2, 0.9))
    (batch,) = crops.epoch(0)
    rare = batch.images[batch.labels == 1]
    assert len(rare) == 2
    assert not torch.equal(rare[0], rare[1])


def test_two_processes_get_the_images_of_one() -> None:
    halves = [list(loader(rank=rank, world_size=2).epoch(0)) for rank in range(2)]
    for whole, *parts in zip(loader().epoch(0), *halves, strict=True):
        assert torch.equal(whole.keys, torch.cat([part.keys for part in parts]))


def test_repeated_augmentation_with_balancing_is_refused() -> None:
    with pytest.raises(ConfigError, match="balance=loss"):
        loader(repeats=3)


def test_class_weights_equal_scikit_learns_and_average_to_one_over_images() -> None:
    weights = class_weights(LABELS, 5)
    assert weights[[0, 1, 3]] == pytest.approx(compute_class_weight("balanced", classes=np.array([0, 1, 3]), y=LABELS))
    assert weights[[2, 4]].tolist() == [0, 0]
    assert weights[LABELS].mean() == pytest.approx(1)


def test_imbalance() -> None:
    found = Imbalance.of(LABELS)
    assert (found.largest, found.smallest, found.ratio) == ((0, 70), (3, 4), 17.5)
    even = Imbalance.of(np.array([0, 1, 0, 1]))
    assert (even.ratio, even.most_repeats) == (1.0, 1)
