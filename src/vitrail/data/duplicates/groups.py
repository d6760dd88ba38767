"""Groups of images that are the same, or copies that were resized, recompressed, mirrored, turned or cropped.

Shapes: N images, F features.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from vitrail.data.dataset import Split
from vitrail.data.duplicates.alignment import Likeness, compare
from vitrail.data.duplicates.hashes import Candidate, Hashes, find_candidates
from vitrail.data.duplicates.views import read_each, read_view
from vitrail.images.convert import Pixels

MAX_FOR_CROPS = 50_000  # images above which crops are not searched for: the search is quadratic
_HASH, _CROP_HASH = 0.95, 0.56  # cosines of hashes from which pixels are compared
_FEATURES, _NEIGHBOURS = 0.85, 3  # cosine of a model's features, and pairs per image, from which pixels are compared
_SAME_PIXELS = 1.5  # levels: largest difference of two blocks of images whose full pixels are compared

Groups = list[list[int]]


@dataclass(frozen=True)
class Limits:
    """What two images must reach to be the same; see `Likeness`. Of smooth images the fine part is noise: `residual`
    may be small instead. colour: the largest mean difference of a colour, in levels."""

    coarse: float
    fine: float
    block: float
    residual: float
    colour: float


# Copies that were resized, recompressed, mirrored or turned; and crops, whose pixels were interpolated anew
# and whose mean colour is that of a part.
WHOLE = Limits(coarse=0.97, fine=0.85, block=6.0, residual=4.0, colour=8.0)
CROP = Limits(coarse=0.9, fine=0.75, block=6.0, residual=4.0, colour=64.0)


class UnionFind:
    """Disjoint sets of the numbers below `count`."""

    def __init__(self, count: int) -> None:
        self._parent = list(range(count))

    def find(self, i: int) -> int:
        while self._parent[i] != i:
            self._parent[i] = self._parent[self._parent[i]]
            i = self._parent[i]
        return i

    def join(self, i: int, j: int) -> None:
        first, second = sorted((self.find(i), self.find(j)))
        self._parent[second] = first

    def groups(self) -> Groups:
        """The sets of more than one, ascending."""
        members = defaultdict[int, list[int]](list)
        for i in range(len(self._parent)):
            members[self.find(i)].append(i)
        return [group for group in members.values() if len(group) > 1]


def join_equal(digests: Sequence[bytes]) -> tuple[UnionFind, npt.NDArray[np.int64]]:
    """The sets of images with equal digests, and the first image of each, ascending."""
    sets = UnionFind(len(digests))
    first_of: dict[bytes, int] = {}
    for i, digest in enumerate(digests):
        sets.join(first_of.setdefault(digest, i), i)
    return sets, np.array(sorted(first_of.values()), dtype=np.int64)


def group_copies(split: Split) -> npt.NDArray[np.int64]:
    """The first row, N, of the group of copies that each image of a split belongs to. Reads every image; one that
    cannot be read is a group of its own."""
    found = {
        row: view
        for (_, row), view in read_each({"": split}, read_view, os.cpu_count() or 1)
        if not isinstance(view, str)
    }
    readable, views = np.array(list(found), dtype=np.int64), list(found.values())
    groups = np.arange(len(split), dtype=np.int64)
    if not views:
        return groups
    sets, rows = join_equal([view.digest for view in views])
    thumbs, colours = (np.stack([getattr(views[i], name) for i in rows]) for name in ("thumb", "colours"))
    for candidate, _ in near_pairs(thumbs, colours):
        sets.join(int(rows[candidate.first]), int(rows[candidate.second]))
    groups[readable] = readable[[sets.find(i) for i in range(len(views))]]
    return groups


def near_pairs(thumbs: Pixels, colours: Pixels, features: Tensor | None = None) -> list[tuple[Candidate, bool]]:
    """Pairs that are the same, and whether the two may have equal pixels."""
    if len(thumbs) < 2:
        return []
    hashes = Hashes(thumbs)
    candidates = find_candidates(hashes, _HASH, _CROP_HASH, crops=len(thumbs) <= MAX_FOR_CROPS)
    if features is not None:
        candidates += _by_features(features, hashes)
    plain = compare(thumbs, candidates, align=False)
    flat = colours.reshape(len(colours), -1, 3).astype(np.float32).mean(axis=1)
    shift = np.abs(flat[[c.first for c in candidates]] - flat[[c.second for c in candidates]]).reshape(-1, 3)
    colour = torch.from_numpy(shift.max(axis=1, initial=0.0))
    same = _within(plain, colour, WHOLE) & torch.tensor([c.window[0] == 1.0 for c in candidates], dtype=torch.bool)
    found = [
        (c, c.symmetry == 0 and float(block) <= _SAME_PIXELS)
        for c, yes, block in zip(candidates, same.tolist(), plain.block.tolist(), strict=True)
        if yes
    ]
    known = {frozenset((c.first, c.second)) for c, _ in found}
    rest = [k for k, c in enumerate(candidates) if c.window[0] < 1.0 and frozenset((c.first, c.second)) not in known]
    left = [candidates[k] for k in rest]
    aligned = _within(compare(thumbs, left, align=True), colour[rest], CROP)
    return found + [(c, False) for c, yes in zip(left, aligned.tolist(), strict=True) if yes]


def _within(likeness: Likeness, colour: Tensor, limits: Limits) -> Tensor:
    fine = (likeness.fine >= limits.fine) | (likeness.residual <= limits.residual)
    return (likeness.coarse >= limits.coarse) & fine & (likeness.block <= limits.block) & (colour <= limits.colour)


def _by_features(features: Tensor, hashes: Hashes) -> list[Candidate]:
    """Nearest neighbours by a model's features, each with the symmetry in which their hashes are most alike."""
    unit = torch.nn.functional.normalize(features.float(), dim=1)
    versions = [hashes.symmetric(s) for s in range(8)]
    found = []
    for start in range(0, len(unit), 1024):
        cosine = unit[start : start + 1024] @ unit.T
        rows = torch.arange(len(cosine))
        cosine[rows, rows + start] = -1
        values, nearest = cosine.topk(min(_NEIGHBOURS, len(unit) - 1), dim=1)
        for row, k in torch.nonzero(values >= _FEATURES).tolist():
            i, j = start + row, int(nearest[row, k])
            if hashes.usable[i] and hashes.usable[j]:
                symmetry = int(torch.stack([versions[0][i] @ version[j] for version in versions]).argmax())
                found.append(Candidate(i, j, symmetry))
                found.append(Candidate(i, j, symmetry, (0.85, 0.075, 0.075)))
    return found
