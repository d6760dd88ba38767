"""Whether the classification head of a file can be kept for a model's classes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from vitrail.errors import WeightsError

HeadPolicy = Literal["auto", "keep", "new"]
HEADS = ("head", "head_dist", "head.fc", "fc")


def head_names(tensors: Mapping[str, Tensor]) -> list[str]:
    """Those names that belong to a classifier."""
    return [name for head in HEADS for name in (f"{head}.weight", f"{head}.bias") if name in tensors]


def num_classes_of(tensors: Mapping[str, Tensor]) -> int:
    """How many classes the head knows; 0 without a head."""
    for name in head_names(tensors):
        if tensors[name].ndim:
            return tensors[name].shape[0]
    return 0


@dataclass(frozen=True)
class HeadDecision:
    """keep: the file's head is taken, its rows in the order `rows` where that is not None. Else a fresh head stays, or,
    with `problem`, nothing can be done."""

    keep: bool
    why: str = ""
    rows: tuple[int, ...] | None = None
    warning: str = ""
    problem: bool = False


def decide_head(
    old: int,
    new: int,
    *,
    asked: int | None,
    old_names: Sequence[str] | None,
    new_names: Sequence[str] | None,
    policy: HeadPolicy,
) -> HeadDecision:
    """Decide on a head for `new` classes, with one for `old` classes in the file.

    asked: the requested number of classes, or None. "keep" requires the file's head, "new"
    a new one, "auto" keeps it if classes match.

    Raises:
        WeightsError: "keep" cannot be had.
    """
    if not new:
        return HeadDecision(keep=False, why="the model has no head")
    if policy == "new":
        return HeadDecision(keep=False, why="a new head was requested")
    if not old:
        if policy == "keep":
            raise WeightsError("cannot keep the head: the file has none")
        return HeadDecision(keep=asked is None, why="the file has no head", problem=asked is None)
    if old != new:
        if policy == "keep":
            raise WeightsError(f"cannot keep the head: it has {old} classes and the model {new}")
        why = f"{new} classes in place of {old}"
        return HeadDecision(keep=asked is None, why=why, problem=asked is None)
    return _by_names(old_names, new_names, policy)


def _by_names(old: Sequence[str] | None, new: Sequence[str] | None, policy: HeadPolicy) -> HeadDecision:
    """The numbers are equal; the names have the last word, where they are known."""
    if new is None or (old is not None and list(old) == list(new)):
        return HeadDecision(keep=True)
    if old is not None and len(set(new)) == len(new) and sorted(old) == sorted(new):
        place = {name: row for row, name in enumerate(old)}
        return HeadDecision(
            keep=True, rows=tuple(place[name] for name in new), why="rows reordered to match the class names"
        )
    if old is None:
        why = f"the file does not name its {len(new)} classes"
    else:
        first = next(index for index, pair in enumerate(zip(old, new, strict=False)) if pair[0] != pair[1])
        why = f"class {first} is {old[first]!r} in the file and {new[first]!r} here"
    if policy == "keep":
        raise WeightsError(f"cannot keep the head: {why}")
    return HeadDecision(keep=False, why="other classes", warning=f"same number of classes, but a new head: {why}")
