"""Whether a file's classification head can be kept for a model's classes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from vitrail.errors import WeightsError

HeadPolicy = Literal["auto", "keep", "new"]
HEADS = ("head", "head_dist", "head.fc", "fc")


def head_names(tensors: Mapping[str, Tensor]) -> list[str]:
    """The names of tensors of classification heads."""
    return [name for head in HEADS for name in (f"{head}.weight", f"{head}.bias") if name in tensors]


def num_classes_of(tensors: Mapping[str, Tensor]) -> int:
    """Number of classes of the head; 0 without a head."""
    for name in head_names(tensors):
        if tensors[name].ndim:
            return tensors[name].shape[0]
    return 0


@dataclass(frozen=True)
class HeadDecision:
    """keep: use the file's head, with its rows in the order `rows` if given. Otherwise the model keeps its new head.
    problem: loading fails.
    """

    keep: bool
    reason: str = ""
    rows: tuple[int, ...] | None = None
    warning: str = ""
    problem: bool = False


def decide_head(
    old: int,
    new: int,
    *,
    requested: int | None,
    old_names: Sequence[str] | None,
    new_names: Sequence[str] | None,
    policy: HeadPolicy,
) -> HeadDecision:
    """Decide on the head of a model with `new` classes, given a file's head with `old` classes.

    requested: the number of classes that the caller asked for, or None. policy: "keep" requires the file's head, "new"
    a new one, "auto" keeps it if the classes match.

    Raises:
        WeightsError: "keep" is impossible.
    """
    if not new:
        return HeadDecision(keep=False, reason="the model has no head")
    if policy == "new":
        return HeadDecision(keep=False, reason="a new head was requested")
    if old != new:
        reason = f"{new} classes in place of {old}" if old else "the file has no head"
        if policy == "keep":
            raise WeightsError(f"cannot keep the head: {reason}")
        return HeadDecision(keep=False, reason=reason, problem=requested is None)
    return _by_names(old_names, new_names, policy)


def _by_names(old: Sequence[str] | None, new: Sequence[str] | None, policy: HeadPolicy) -> HeadDecision:
    """For equal numbers of classes: compare the names, if known."""
    if new is None or (old is not None and list(old) == list(new)):
        return HeadDecision(keep=True)
    if old is not None and len(set(new)) == len(new) and sorted(old) == sorted(new):
        row_of = {name: row for row, name in enumerate(old)}
        rows = tuple(row_of[name] for name in new)
        return HeadDecision(keep=True, rows=rows, reason="rows reordered to match the class names")
    if old is None:
        reason = f"the file does not name its {len(new)} classes"
    else:
        first = next(index for index, pair in enumerate(zip(old, new, strict=False)) if pair[0] != pair[1])
        reason = f"class {first} is {old[first]!r} in the file and {new[first]!r} here"
    if policy == "keep":
        raise WeightsError(f"cannot keep the head: {reason}")
    return HeadDecision(keep=False, reason="other classes", warning=f"same number of classes, but a new head: {reason}")
