"""Proposals of what to move, relabel or remove, as CSV: path, action, to, reason. Nothing is done to any file."""

from __future__ import annotations

import csv
import io
import os
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from PIL import Image

from vitrail.utils.files import atomic_write_text

if TYPE_CHECKING:
    from vitrail.diagnosis.doctor import Diagnosis
    from vitrail.diagnosis.findings import Evidence

_KEEP = {"test": 0, "val": 1, "train": 2}  # of copies in several splits, the first is kept: a test stays as it is
_EXTENSIONS = {"JPEG": ".jpg", "TIFF": ".tif"}


class Fix(NamedTuple):
    """action: "remove", "relabel" (to a class) or "move" (to a split, or to another file name)."""

    path: str
    action: str
    to: str
    reason: str


def propose(evidence: Evidence) -> list[Fix]:
    """At most one proposal for a path: the first of unreadable, duplicate, leak, conflict, suspect label, name."""
    scan, copies = evidence.scan, evidence.duplicates
    guesses = dict(zip(evidence.label_errors.rows.tolist(), evidence.label_errors.guesses.tolist(), strict=True))
    fixes: dict[str, Fix] = {}

    def add(path: str, action: str, to: str, reason: str) -> None:
        fixes.setdefault(path, Fix(path, action, to, reason))

    for each in scan.unreadable:
        add(each["path"], "remove", "", each["reason"])
    for group in copies.exact:
        labels = {int(scan.labels[i]) for i in group}
        trusted = [i for i in group if i not in guesses]
        if len(labels) > 1 and (len(trusted) == len(group) or len({int(scan.labels[i]) for i in trusted}) != 1):
            trusted = []  # nothing says which label is right
        elif not trusted:
            trusted = group
        kept = min(trusted, key=lambda i: (_KEEP.get(scan.home(i), 3), i), default=None)
        for i in group:
            if kept is None:
                others = ", ".join(sorted(scan.dataset.class_names[k] for k in labels - {int(scan.labels[i])}))
                add(scan.path(i), "remove", "", f"the same image is also labelled {others}")
            elif i != kept:
                add(scan.path(i), "remove", "", f"copy of {scan.path(kept)}")
    for group in copies.every:
        splits = {scan.home(i) for i in group if scan.path(i) not in fixes}
        if len(splits) > 1:
            target = min(splits, key=lambda name: _KEEP.get(name, 3))
            for i in group:
                if scan.home(i) != target:
                    add(scan.path(i), "move", target, f"a near copy is in {target}")
    for i, guess in guesses.items():
        quality = evidence.label_errors.quality[i]
        name = scan.dataset.class_names[guess]
        add(scan.path(i), "relabel", name, f"labelled {scan.label(i)}; label quality {quality:.3f} of 1")
    for i, reason in scan.odd.items():
        if reason.startswith("contains a "):
            kind = reason.split()[2]
            suffix = _EXTENSIONS.get(kind) or next(s for s, k in Image.registered_extensions().items() if k == kind)
            add(scan.path(i), "move", os.path.splitext(scan.path(i))[0] + suffix, reason)
    return list(fixes.values())


def write_fixes(diagnosis: Diagnosis, path: Path) -> int:
    """Write the proposals; returns their number. Raises RunError."""
    fixes = propose(diagnosis.evidence)
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(Fix._fields)
    writer.writerows(fixes)
    atomic_write_text(path, stream.getvalue())
    return len(fixes)
