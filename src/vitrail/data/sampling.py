"""Which samples an epoch has, and in which order: shuffling, repeated augmentation, balanced sampling, class weights.

A sample has a key: the row of its image in the split, and above that the repetition, 0 for the first view of the image
in an epoch. Everything random about a sample is seeded by (seed, epoch, key), so two views of one image differ, and
without repetitions a key is a row.

Repeated augmentation: Hoffer et al., "Augment Your Batch: Improving Generalization Through Instance Repetition", CVPR
2020 (https://arxiv.org/abs/1901.09335); Berman et al., "MultiGrain", 2019 (https://arxiv.org/abs/1902.05509). As in
DeiT, an epoch keeps its length and sees fewer images.

Shapes: N images, K classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import torch

from vitrail.data.dataset import Labels
from vitrail.utils.counter_rng import permutation, uniform

Keys = npt.NDArray[np.int64]
_Numbers = TypeVar("_Numbers", Keys, torch.Tensor)

_ROW_BITS = 40


def rows_of(keys: _Numbers) -> _Numbers:
    """The rows of keys."""
    return keys & ((1 << _ROW_BITS) - 1)


def repetitions_of(keys: _Numbers) -> _Numbers:
    """The repetitions of keys, from 0."""
    return keys >> _ROW_BITS


def count_repetitions(rows: Keys) -> Keys:
    """Keys for rows with duplicates: the first occurrence of a row is repetition 0, the next one 1, and so on."""
    order = np.argsort(rows, kind="stable")
    new = np.diff(rows[order], prepend=-1) != 0
    positions = np.arange(len(rows))
    keys = np.empty(len(rows), dtype=np.int64)
    keys[order] = rows[order] + ((positions - np.maximum.accumulate(np.where(new, positions, 0))) << _ROW_BITS)
    return keys


def epoch_order(seed: int, epoch: int, count: int, repeats: int, batch_size: int) -> Keys:
    """The keys of an epoch of `count` views, in order.

    With repeats = 1 each of `count` images comes once. With more, ceil(count / repeats) images, drawn for each epoch,
    come `repeats` times each (the last one perhaps fewer), in the same batch if it is large enough. Within a batch the
    repetitions of an image are not adjacent, so that mixup and CutMix pair different images.
    """
    order = permutation(seed, epoch, count)
    if repeats == 1:
        return order
    keys = count_repetitions(np.repeat(order[: -(-count // repeats)], repeats)[:count])
    batch = np.arange(count) // batch_size
    return keys[np.lexsort((repetitions_of(keys), batch))]


def balanced_rows(labels: Labels, seed: int, epoch: int) -> Labels:
    """The N rows of an epoch in which all classes are equally frequent; depends on (seed, epoch) alone.

    Each class that has images gets N / K samples, rounded down or up. Its images are repeated equally often, up to a
    difference of one; a class with more images than samples gives another random subset in each epoch.
    """
    count = len(labels)
    images = np.bincount(labels)
    present = np.flatnonzero(images)
    classes = len(present)
    starts = np.cumsum(images) - images
    draw = uniform(seed, epoch, np.arange(count), "balance", 1)[:, 0]
    by_class = np.lexsort((draw, labels))  # rows, class after class, each class in random order
    rounded_up = present[permutation(seed, epoch, classes)][: count % classes]
    samples = np.zeros(len(images), dtype=np.int64)  # per class
    samples[present] = count // classes
    samples[rounded_up] += 1
    labels_drawn = np.repeat(np.arange(len(images)), samples)
    number = np.arange(count) - np.repeat(np.cumsum(samples) - samples, samples)  # of the sample within its class
    rows = by_class[starts[labels_drawn] + number % images[labels_drawn]]
    return rows[permutation(seed, epoch, count)]


def class_weights(labels: Labels, num_classes: int) -> npt.NDArray[np.float64]:
    """Class weights inversely proportional to class frequencies, as scikit-learn's "balanced". Shape (K,).

    N / (K' n_k), where K' classes have images; 0 for a class without images.
    """
    images = np.bincount(labels, minlength=num_classes)
    present = images > 0
    weights = np.zeros(num_classes)
    weights[present] = len(labels) / (present.sum() * images[present])
    return weights


@dataclass(frozen=True)
class Imbalance:
    """The largest and the smallest class that has images, as (class number, images)."""

    largest: tuple[int, int]
    smallest: tuple[int, int]
    images: int
    classes: int  # that have images

    @classmethod
    def of(cls, labels: Labels) -> Imbalance:
        """From the labels of at least one image."""
        images = np.bincount(labels)
        present = np.flatnonzero(images)
        smallest, largest = (int(present[pick(images[present])]) for pick in (np.argmin, np.argmax))
        return cls((largest, int(images[largest])), (smallest, int(images[smallest])), len(labels), len(present))

    @property
    def ratio(self) -> float:
        """Images of the largest class / images of the smallest class."""
        return self.largest[1] / self.smallest[1]

    @property
    def most_repeats(self) -> int:
        """The most repetitions of an image of the smallest class in an epoch of `balanced_rows`."""
        samples = -(-self.images // self.classes)
        return -(-samples // self.smallest[1])
