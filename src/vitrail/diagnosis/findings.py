"""What a check finds, and all that checks look at."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from vitrail.diagnosis.duplicates import Duplicates
from vitrail.diagnosis.label_errors import LabelErrors
from vitrail.diagnosis.scan import Scan

SEVERITIES = ("error", "warning", "note")
_COMMON = 0.2  # share of the images from which on a property is one of the data set, and no fault of an image


@dataclass(frozen=True)
class Finding:
    """One result of one check.

    check: its name. severity: "error" if accuracies measured on these data would be wrong, "warning" if training would
    suffer, else "note". count: of images; of classes for imbalance and tiny_class. groups: paths of images that belong
    together, or of one image each. images: the same as rows of the scan, None where it has none. advice: what was found
    and what to do. notes: a line on an image, by path.
    """

    check: str
    severity: str
    count: int
    groups: list[list[str]]
    advice: str
    images: list[list[int]] | None = None
    notes: dict[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        return {name: getattr(self, name) for name in ("check", "severity", "count", "groups", "advice", "notes")}


@dataclass(frozen=True)
class Evidence:
    """What the checks look at. input_size: of the model that would be trained, height and width. model: whether a
    model's features were used."""

    scan: Scan
    duplicates: Duplicates
    label_errors: LabelErrors
    input_size: tuple[int, int]
    model: bool = False


def of_groups(
    scan: Scan, check: str, severity: str, groups: Sequence[Sequence[int]], advice: str, **more: Any
) -> list[Finding]:
    """A finding about these groups of rows; none without groups. count: the images in them."""
    if not groups:
        return []
    paths = [[scan.path(i) for i in group] for group in groups]
    count = sum(map(len, groups))
    return [Finding(check, severity, count, paths, advice, [list(group) for group in groups], **more)]


def of_images(
    scan: Scan, check: str, rows: Iterable[int], advice: str, notes: dict[int, str] | None = None
) -> list[Finding]:
    """A finding about single images, worst first: a warning, or a note if that is how many of the images are."""
    groups = [[int(i)] for i in rows]
    common = len(groups) > _COMMON * len(scan)
    if common:
        advice = f"{len(groups) / len(scan):.0%} of the images: a property of these data. {advice}"
    by_path = {scan.path(i): text for i, text in (notes or {}).items()}
    return of_groups(scan, check, "note" if common else "warning", groups, advice, notes=by_path)


def tally(reasons: Iterable[str], limit: int = 4) -> str:
    """Reasons with how often each occurs, most frequent first."""
    counts = Counter(reasons).most_common()
    more = f", and {len(counts) - limit} other reasons" if len(counts) > limit else ""
    return ", ".join(f"{reason}: {count}" for reason, count in counts[:limit]) + more
