"""Which views an epoch has, and in which order; repeated augmentation.

A view has a key: the row of its image in the split, and above that the repetition, 0 for the first view of the image
in an epoch. All that is random about a view is counted by (seed, epoch, key), so two views of one image differ, and
without repetitions a key is a row.

Hoffer et al., "Augment Your Batch: Improving Generalization Through Instance Repetition", CVPR 2020
(https://arxiv.org/abs/1901.09335); Berman et al., "MultiGrain", 2019 (https://arxiv.org/abs/1902.05509), as DeiT does
it: an epoch keeps its length, and sees fewer images.
"""

from __future__ import annotations

from typing import TypeVar

import numpy as np
import numpy.typing as npt
import torch

from vitrail.randomness import permutation

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
