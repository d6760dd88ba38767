"""Classes with few images beside classes with many: how uneven they are, and two ways to give the rare ones their due.

By sampling: an epoch keeps its length, and every class has an equal share of it. By weight: every image comes once, and
the loss of a rare class counts more.
Letters: N images, K classes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from vitrail.randomness import permutation, uniform

Labels = npt.NDArray[np.int64]


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
