"""Groups of images that are the same: in content, in pixels, or nearly so."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import Tensor

from vitrail.data.duplicates.groups import Groups, UnionFind, join_equal, near_pairs
from vitrail.data.duplicates.views import pixel_digest
from vitrail.diagnosis.scan import Scan
from vitrail.images.convert import BadImage


@dataclass(frozen=True)
class Duplicates:
    """Groups of at least two images each, ascending. exact: equal content or pixels. near: also resized, recompressed,
    mirrored, turned or cropped; only groups that are not wholly exact. every: all groups of either kind."""

    exact: Groups
    near: Groups
    every: Groups


def find_duplicates(scan: Scan, features: Tensor | None = None) -> Duplicates:
    """All groups. features: of a model, N F, which name further pairs whose pixels are compared."""
    exact, rows = join_equal(scan.digests)  # rows: one of each content
    near = UnionFind(len(scan))
    pairs = near_pairs(scan.thumbs[rows], scan.colours[rows], None if features is None else features[rows])
    for i, j in _same_pixels(scan, [(int(rows[c.first]), int(rows[c.second])) for c, close in pairs if close]):
        exact.join(i, j)
    for candidate, _ in pairs:
        near.join(int(rows[candidate.first]), int(rows[candidate.second]))
    for group in exact.groups():
        for i in group[1:]:
            near.join(group[0], i)
    every = near.groups()
    return Duplicates(exact.groups(), [g for g in every if len({exact.find(i) for i in g}) > 1], every)


def _same_pixels(scan: Scan, pairs: Sequence[tuple[int, int]]) -> Iterable[tuple[int, int]]:
    """The pairs whose decoded images are equal."""
    digests: dict[int, bytes | None] = {}

    def digest(i: int) -> bytes | None:
        if i not in digests:
            try:
                digests[i] = pixel_digest(scan.image(i))
            except BadImage:  # removed since
                digests[i] = None
        return digests[i]

    for i, j in pairs:
        if (scan.sizes[i] == scan.sizes[j]).all() and digest(i) is not None and digest(i) == digest(j):
            yield i, j
