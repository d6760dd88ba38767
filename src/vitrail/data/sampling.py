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

from vitrail.utils.counter_rng import permutation, uniform

Labels = npt.NDArray[np.int64]
Keys = npt.NDArray[np.int64]
_Numbers = TypeVar("_Numbers", Keys, torch.Tensor)

_ROW_BITS = 40


def rows_of(keys: _Numbers) -> _Numbers:
    """The rows that keys stand for."""
    return keys & ((1 << _ROW_BITS) - 1)


def repetitions_of(keys: _Numbers) -> _Numbers:
    """The repetitions that keys stand for, from 0."""
    return keys >> _ROW_BITS


def count_repetitions(rows: Keys) -> Keys:
    """Keys for rows that may come more than once: the first time a row is repetition 0, then 1, and so on."""
    order = np.argsort(rows, kind="stable")
    new = np.diff(rows[order], prepend=-1) != 0
    places = np.arange(len(rows))
    keys = np.empty(len(rows), dtype=np.int64)
    keys[order] = rows[order] + ((places - np.maximum.accumulate(np.where(new, places, 0))) << _ROW_BITS)
    return keys


def epoch_order(seed: int, epoch: int, count: int, repeats: int, batch_size: int) -> Keys:
    """The keys of an epoch of `count` views, in order.

    With repeats = 1 each of `count` images comes once. With more, ceil(count / repeats) images, drawn anew every epoch,
    come `repeats` times each (the last may come less often), all of them in one batch if it has room. Within a batch
    the repetitions of an image stand far apart: neighbours, which mixing pairs, are different images.
    """
    order = permutation(seed, epoch, count)
    if repeats == 1:
        return order
    keys = count_repetitions(np.repeat(order[: -(-count // repeats)], repeats)[:count])
    batch = np.arange(count) // batch_size
    return keys[np.lexsort((repetitions_of(keys), batch))]


def balanced_rows(labels: Labels, seed: int, epoch: int) -> Labels:
    """The rows of an epoch in which every class is equally likely: N of them, by (seed, epoch) alone.

    Each class that has images gets N / K places (some get one more, where that is no whole number). All its images come
    equally often, but for the last round, which a counted draw fills; of a class with more images than places, a part
    comes, another one in every epoch.
    """
    count = len(labels)
    images = np.bincount(labels)
    present = np.flatnonzero(images)
    kinds = len(present)
    starts = np.cumsum(images) - images
    draw = uniform(seed, epoch, np.arange(count), "balance", 1)[:, 0]
    by_class = np.lexsort((draw, labels))  # rows, class after class, each class in random order
    more = present[permutation(seed, epoch, kinds)][: count % kinds]
    places = np.zeros(len(images), dtype=np.int64)
    places[present] = count // kinds
    places[more] += 1
    kind = np.repeat(np.arange(len(images)), places)  # the class of each place
    number = np.arange(count) - np.repeat(np.cumsum(places) - places, places)  # of the place within its class
    rows = by_class[starts[kind] + number % images[kind]]
    return rows[permutation(seed, epoch, count)]


def class_weights(labels: Labels, num_classes: int) -> npt.NDArray[np.float64]:
    """A weight for each class, inverse to its share of the images; their mean over all images is 1. Shape (K,).

    N / (K' n_k), where K' classes have images; a class without any has the weight 0.
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
    kinds: int  # classes that have images

    @classmethod
    def of(cls, labels: Labels) -> Imbalance:
        """Of some images, at least one."""
        images = np.bincount(labels)
        present = np.flatnonzero(images)
        low, high = (int(present[pick(images[present])]) for pick in (np.argmin, np.argmax))
        return cls((high, int(images[high])), (low, int(images[low])), len(labels), len(present))

    @property
    def ratio(self) -> float:
        """How many times the images of the smallest class the largest has."""
        return self.largest[1] / self.smallest[1]

    @property
    def most_repeats(self) -> int:
        """How often an image of the smallest class may come in one epoch of `balanced_rows`."""
        places = -(-self.images // self.kinds)
        return -(-places // self.smallest[1])
