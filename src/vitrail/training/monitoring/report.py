"""report.html: a finished run for people, in one file that needs nothing else.

It is made from the run folder's files alone, so that it can be made again; `vitrail report RUN` does that. What a file
lacks is left out of the report. Importing this imports no torch.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any
from unicodedata import category

from vitrail.errors import VitrailError
from vitrail.models.catalog import VARIANTS
from vitrail.reports.charts import Bin, reliability_chart
from vitrail.training.checkpoints.run_folder import RunFolder
from vitrail.training.config.schema import FIELDS, read_config
from vitrail.training.monitoring.curves import charts, history_table
from vitrail.utils.files import atomic_write_text
from vitrail.utils.text import format_duration

_MATRIX = 20  # classes up to which the whole confusion matrix is drawn
_PAIRS = 20  # of classes taken for each other that are listed
_WORST = 20  # classes that are listed at once; the others unfold
_CLASSES = 1000  # that are listed at all
_SKIPPED = 100  # unreadable files that are listed
_NAME = 28  # letters of a class's name where it is mentioned beside others
_TURNS = "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
_WORDS = {"vitrail": "vitrail", "torch": "PyTorch", "python": "Python", "gpu": "GPU"}


def write_report(folder: RunFolder) -> Path:
    """Make the report of a finished run, or make it anew.

    Raises:
        VitrailError: the folder holds no finished run, or cannot be written to.
    """
    atomic_write_text(folder.report, make_report(folder))
    return folder.report


def make_report(folder: RunFolder) -> str:
    """The HTML, all of whose strings from elsewhere are escaped."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    if not folder.summary.is_file():
        what = "the run is not finished" if folder.config.is_file() else "it holds no run"
        raise VitrailError(f"no report can be made of {folder.path}: {what}")
    page = Environment(
        loader=PackageLoader("vitrail.training", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page.filters["last"] = last_name
    return plain(page.get_template("report.html").render(**contents(folder)))


def contents(folder: RunFolder) -> dict[str, Any]:
    """Everything that the page says, by the names that the template uses."""
    summary = _read(folder.summary)
    details = _read(folder.details) if folder.details.is_file() else {}
    history = _lines(folder.metrics)
    config = {key: _shown(value) for key, value in read_config(folder.config).given.items()}
    classes = details.get("classes") or [row["label"] for row in summary["per_class"]]
    return {
        "summary": summary,
        "judged": judged(summary, config),
        "cards": cards(summary),
        "charts": charts(history, summary, details.get("groups", [])),
        "history": history_table(history),
        "groups": details.get("groups", []),
        "classes": per_class(summary, details.get("confused"), classes),
        "shown_classes": _WORST,
        "matrix": matrix(summary, details["confused"]) if details and len(classes) <= _MATRIX else None,
        "pairs": pairs(summary, details.get("confused", []), classes),
        "mistakes": mistakes(details, classes),
        "wrong": sum(row["images"] - row["correct"] for row in summary["per_class"]),
        "calibration": calibration(details, summary),
        "bins": details.get("calibration", []),
        "sessions": _lines(folder.sessions) if folder.sessions.is_file() else [],
        "facts": facts(summary, config),
        "config": config,
        "chosen": {key for key in config if config[key] != _shown(FIELDS[key].default)},
        "skipped": summary["skipped"][:_SKIPPED],
        "has_details": bool(details),
    }


# --- words and numbers


def plain(text: str) -> str:
    """Text that can be written and shown. Control characters, those that turn the direction of writing, and what is no
    text at all (a file's name need not be) become visible escapes."""
    return "".join(c if c == "\n" or not _hidden(c) else c.encode("unicode_escape").decode() for c in text)


def _hidden(character: str) -> bool:
    return category(character) in ("Cc", "Cs") or character in _TURNS


def last_name(path: str) -> str:
    """The last two parts of a path: folder and file."""
    return "/".join(PurePath(path).parts[-2:])


def _short(name: str) -> str:
    return name if len(name) <= _NAME else name[: _NAME - 1].rstrip() + "…"


def wilson(share: float, count: int) -> tuple[float, float]:
    """The 95 % interval of a share of `count` images, both in percent: 0 to 100 where there are none. Wilson, 1927."""
    if not count:
        return 0.0, 100.0
    z2 = 1.96**2
    middle = share + z2 / (2 * count)
    half = (z2 * (share * (1 - share) / count + z2 / (4 * count**2))) ** 0.5
    low, high = (100 * (middle + sign * half) / (1 + z2 / count) for sign in (-1, 1))
    return max(low, 0.0), min(high, 100.0)


def _shown(value: object) -> str:
    """A setting as it is written on the command line."""
    if isinstance(value, list | tuple):
        return ",".join(_shown(part) for part in value)
    if value is None:
        return "none"
    return f"{value:g}" if isinstance(value, float) else str(value).lower() if isinstance(value, bool) else str(value)


def judged(summary: Mapping[str, Any], config: Mapping[str, str]) -> str:
    """On which images the figures were measured, and which weights were kept, in a sentence or two."""
    split, best = summary["split"], summary.get("best_epoch")
    role = {
        "test": "which had no say in the training",
        "val": "which also chose what is kept: the figures flatter the model a little",
        "train": "which the model was trained on: the figures say nothing about other images",
    }.get(split, "")
    if split == "val" and summary.get("val_top1") is None:
        role = ""
    said = f"Measured on {summary['images']:,} {split} images" + (f", {role}." if role else ".")
    if "probe" in summary:
        val = summary["probe"]["val_top1"]
        chosen = "" if val is None else f", chosen on validation, {val:.2f} %"
        return (
            f"{said} A linear head on frozen features (l2 {summary['probe']['l2']:g}{chosen}); "
            f"{summary['probe']['knn_neighbours']} nearest neighbours give {summary['knn_top1']:.2f} %."
        )
    if best:
        val = summary["val_top1"]
        return f"{said} Weights of epoch {best} of {summary['epochs']}, the best on validation ({val:.2f} %)."
    if summary.get("epochs"):
        return f"{said} Weights of the last epoch, {summary['epochs']}: there was no validation."
    return f"{said} The model was not trained."


def cards(summary: Mapping[str, Any]) -> list[dict[str, str]]:
    """The figures at the top: name, value, unit, and a note."""
    images = summary["images"]
    interval = wilson(summary["top1"] / 100, images)
    spread = f"95 % interval {interval[0]:.1f} to {interval[1]:.1f}"
    rate, share = summary["images_per_second"], summary["waiting_for_data"]
    each = [
        ("Top-1", f"{summary['top1']:.2f}", "%", spread),
        ("Top-5", f"{summary['top5']:.2f}", "%", "right within five guesses"),
        ("Loss", f"{summary['loss']:.4f}", "nats", "cross-entropy"),
        ("Calibration error", f"{100 * summary['ece']:.2f}", "%", "0 is best"),
        ("Images", f"{images:,}", "", f"of the {summary['split']} split"),
        ("Time", format_duration(summary["seconds"]), "", "of the whole run"),
        ("Speed", f"{rate:,.0f}", "images/s", f"{share:.0%} of it waiting for data"),
    ]
    if "balanced_top1" in summary:
        each.insert(1, ("Balanced top-1", f"{summary['balanced_top1']:.2f}", "%", "each class counts the same"))
    return [dict(zip(("name", "value", "unit", "note"), card, strict=True)) for card in each]


def facts(summary: Mapping[str, Any], config: Mapping[str, str]) -> dict[str, str]:
    """What the model was made of and where, by name; what does not apply is left out."""
    teacher = "" if config.get("teacher", "none") == "none" else config["teacher"]
    found = {
        "weights": summary.get("weights") or _origin(config),
        "teacher": teacher and f"{teacher} ({config['distill']}, {config['distill_weight']} of the loss)",
        "splits": summary["how_split"],
        "parameters": f"{summary['params']:,}",
        "device": summary["device"],
        "processes": str(summary["processes"]) if summary.get("processes", 1) > 1 else "",
        **{_WORDS.get(key, key): str(value) for key, value in summary["environment"].items()},
        "steps without effect": _unsteady(summary),
    }
    return {name: value for name, value in found.items() if value}


def _unsteady(summary: Mapping[str, Any]) -> str:
    """Steps whose loss or gradient was not finite."""
    if not summary.get("skipped_steps"):
        return ""
    back = f"; went back {summary['rollbacks']} times" if summary.get("rollbacks") else ""
    return f"{summary['skipped_steps']:,}, as their loss or gradient was not finite{back}"


def _origin(config: Mapping[str, str]) -> str:
    """What the model started from, where no weights were loaded."""
    if config.get("model") in VARIANTS:
        return "random weights: trained from scratch" if config.get("probe") != "true" else "random weights"
    return "the weights of the model that was handed in"


# --- classes and mistakes


def per_class(
    summary: Mapping[str, Any], confused: Sequence[Sequence[int]] | None, classes: Sequence[str]
) -> dict[str, Any]:
    """The classes that have images, worst first, each with what it was most taken for; and those that have none."""
    taken: dict[int, list[str]] = {}
    for label, guess, count in confused or []:
        taken.setdefault(label, []).append(f"{_short(classes[guess])} ({count:,})")
    rows = [{**row, "taken": ", ".join(taken.get(k, [])[:3])} for k, row in enumerate(summary["per_class"])]
    with_images = sorted((row for row in rows if row["images"]), key=lambda row: (row["top1"], -row["images"]))
    return {
        "rows": with_images[:_CLASSES],
        "left_out": max(0, len(with_images) - _CLASSES),
        "empty": [row["label"] for row in rows if not row["images"]],
        "total": len(rows),
    }


def matrix(summary: Mapping[str, Any], confused: Sequence[Sequence[int]]) -> list[dict[str, Any]]:
    """Rows of the confusion matrix: label, images, and cells with count, share of the row, and a strength of colour."""
    per_class = summary["per_class"]
    counts = [[0] * len(per_class) for _ in per_class]
    for k, row in enumerate(per_class):
        counts[k][k] = row["correct"]
    for label, guess, count in confused:
        counts[label][guess] = count
    return [
        {
            "label": row["label"],
            "images": row["images"],
            "cells": [
                {"count": n, "share": n / max(row["images"], 1), "right": i == k, "guess": per_class[i]["label"]}
                | {"strength": _strength(n / max(row["images"], 1), i == k)}
                for i, n in enumerate(counts[k])
            ],
        }
        for k, row in enumerate(per_class)
    ]


def _strength(share: float, right: bool) -> float:
    """0 to 1. Mistakes are rare: a root makes them show."""
    return round(share if right else (0.12 + 0.88 * share**0.5 if share else 0.0), 3)


def pairs(
    summary: Mapping[str, Any], confused: Sequence[Sequence[int]], classes: Sequence[str]
) -> list[dict[str, Any]]:
    """The pairs of classes that are most often taken for each other, one way or the other."""
    images = [row["images"] for row in summary["per_class"]]
    return [
        {"label": classes[label], "guess": classes[guess], "count": count, "share": 100 * count / max(images[label], 1)}
        for label, guess, count in confused[:_PAIRS]
    ]


def mistakes(details: Mapping[str, Any], classes: Sequence[str]) -> list[dict[str, Any]]:
    """The kept mistakes with their classes' names."""
    return [
        {**row, "label": classes[row["label"]], "guess": classes[row["guess"]], "name": row["name"] or ""}
        for row in details.get("mistakes", [])
    ]


def calibration(details: Mapping[str, Any], summary: Mapping[str, Any]) -> str:
    """The reliability diagram, "" without details or images."""
    bins = [Bin(**row) for row in details.get("calibration", [])]
    if not bins:
        return ""
    title = f"Accuracy by confidence; expected calibration error {100 * summary['ece']:.2f} %"
    return reliability_chart(bins, title)


# --- files


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise VitrailError(f"cannot read {path}: {error}") from None
    if not isinstance(found, dict):
        raise VitrailError(f"cannot read {path}: it holds something else than a run's figures")
    return found


def _lines(path: Path) -> list[dict[str, Any]]:
    """Whole lines of JSON; a line that a killed process left half-written is none."""
    found = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found
