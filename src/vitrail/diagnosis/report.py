"""The page of `doctor`: findings with their images, classes, and the cost of training."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vitrail.diagnosis.findings import SEVERITIES, Finding
from vitrail.diagnosis.scan import Scan
from vitrail.images.convert import BadImage
from vitrail.reports.page import render_page
from vitrail.reports.thumbnails import SIDE, thumbnail
from vitrail.utils.files import atomic_write_text
from vitrail.utils.text import counted, format_bytes, format_duration

if TYPE_CHECKING:
    from vitrail.diagnosis.doctor import Diagnosis

_GROUPS, _IN_GROUP = 24, 6  # shown with images
_FILES = 100  # of a finding without images
_CLASSES = 50
TITLES = {
    "unreadable": "Files",
    "exact_duplicate": "Exact duplicates",
    "near_duplicate": "Near duplicates",
    "leak": "Leaks between splits",
    "conflicting_label": "One image, two labels",
    "suspect_label": "Suspect labels",
    "odd_size": "Odd sizes",
    "dark": "Dark images",
    "bright": "Bright images",
    "blurry": "Blurry images",
    "low_information": "Little information",
    "imbalance": "Class imbalance",
    "tiny_class": "Tiny classes",
}


def write_report(diagnosis: Diagnosis, path: Path) -> Path:
    """Write the page. Raises RunError."""
    atomic_write_text(path, render_page("vitrail.diagnosis", "doctor.html", report_values(diagnosis)))
    return path


def report_values(diagnosis: Diagnosis) -> dict[str, Any]:
    """The values of the template."""
    scan = diagnosis.evidence.scan
    order = sorted(diagnosis.findings, key=lambda finding: SEVERITIES.index(finding.severity))
    counts = {severity: sum(f.severity == severity for f in order) for severity in SEVERITIES}
    classes = counted(diagnosis.classes, "class", "classes")
    return {
        "data": scan.dataset.name,
        "lead": f"{counted(diagnosis.images, 'readable image')} of {classes}. {diagnosis.test_interval}",
        "cards": [
            {"name": "Errors", "value": counts["error"], "unit": "", "note": "accuracies would be wrong"},
            {"name": "Warnings", "value": counts["warning"], "unit": "", "note": "training would suffer"},
            {"name": "Images", "value": f"{diagnosis.images:,}", "unit": "", "note": _split_counts(scan)},
            {"name": "Unreadable", "value": f"{len(scan.unreadable):,}", "unit": "", "note": "left out"},
        ],
        "findings": [_section(scan, finding) for finding in order],
        "classes": _class_rows(scan),
        "splits": scan.split_names,
        "left_out": max(0, scan.dataset.num_classes - _CLASSES),
        "costs": [facts for each in diagnosis.cost.values() if each for facts in [cost_facts(each)]],
    }


def _split_counts(scan: Scan) -> str:
    counts = np.bincount(scan.splits, minlength=len(scan.split_names))
    return ", ".join(f"{count:,} {name}" for name, count in zip(scan.split_names, counts, strict=True))


def _section(scan: Scan, finding: Finding) -> dict[str, Any]:
    groups = []
    for rows in (finding.images or [])[:_GROUPS]:
        shown = [
            {
                "image": _thumbnail(scan, i),
                "label": scan.label(i),
                "split": scan.split_names[scan.splits[i]],
                "name": scan.path(i),
                "note": finding.notes.get(scan.path(i), ""),
            }
            for i in rows[:_IN_GROUP]
        ]
        groups.append({"images": shown, "more": len(rows) - len(shown)})
    files = [(path, finding.notes.get(path, "")) for group in finding.groups for path in group][:_FILES]
    return {
        "title": TITLES[finding.check],
        "severity": finding.severity,
        "what": f"{finding.count:,} {'classes' if not finding.groups else 'images' if finding.images else 'files'}",
        "advice": finding.advice,
        "groups": groups,
        "single": all(len(group) == 1 for group in finding.groups),
        "more": max(0, len(finding.images or []) - _GROUPS),
        "files": [] if finding.images else files,
    }


def _thumbnail(scan: Scan, i: int) -> str | None:
    try:
        return thumbnail(scan.image(i, (SIDE, SIDE)))
    except BadImage:  # removed since
        return None


def _class_rows(scan: Scan) -> list[tuple[str, ...]]:
    """Images of each class by split, fewest first."""
    size = scan.dataset.num_classes
    counts = np.stack(
        [np.bincount(scan.labels[scan.splits == s], minlength=size) for s in range(len(scan.split_names))]
    )
    order = np.argsort(counts.sum(axis=0), kind="stable")[:_CLASSES]
    return [(scan.dataset.class_names[k], *(f"{count:,}" for count in counts[:, k])) for k in order]


def cost_facts(cost: dict[str, Any]) -> dict[str, str]:
    """A forecast as text, by name."""
    if "error" in cost:
        return {"cost": cost["error"]}
    height, width = cost["img_size"]
    facts = {
        "model": f"{cost['model']}, input {width} x {height}, {cost['batch_size']} images a batch, {cost['device']}"
    }
    if cost["epoch_seconds"] is not None:
        facts["an epoch"] = f"about {duration(cost['epoch_seconds'])}, validation included"
    if cost["total_seconds"] is not None:
        facts["training"] = f"about {duration(cost['total_seconds'])} for {cost['epochs']:g} epochs"
    if cost["peak_bytes"] is not None:
        of = f" of {format_bytes(cost['available_bytes'])}" if cost["available_bytes"] else ""
        facts["memory"] = f"about {format_bytes(cost['peak_bytes'])}{of}"
    facts["cache on disk"] = format_bytes(cost["cache_bytes"]) if cost["cache_bytes"] else "none"
    if cost["note"]:
        facts["warning"] = cost["note"]
    return facts


def duration(seconds: float) -> str:
    """As `format_duration`, with tenths below ten seconds."""
    return f"{seconds:.1f} s" if seconds < 10 else format_duration(seconds)
