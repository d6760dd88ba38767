"""report.html: the report of a finished run, in one file without external resources.

It is made from the files of the run folder alone, so that `vitrail report RUN` can make it again. Parts whose data are
missing are left out. Importing this imports no torch.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vitrail.errors import RunError
from vitrail.evaluation.statistics import has_top5, wilson
from vitrail.models.catalog import VARIANTS
from vitrail.reports.charts import Bin, reliability_chart
from vitrail.reports.page import render_page
from vitrail.training.checkpoints.run_folder import RunFolder
from vitrail.training.config.schema import FIELDS, read_config
from vitrail.training.monitoring.curves import charts, history_table
from vitrail.utils.files import atomic_write_text
from vitrail.utils.settings import format_value
from vitrail.utils.text import counted, format_duration, format_speed, printable

_MATRIX_CLASSES = 20  # up to so many classes, the confusion matrix is shown; above, the most confused pairs
_MAX_PAIRS = 20
_OPEN_CLASSES = 20  # rows of the table of classes that are shown without a click
_MAX_CLASSES = 1000
_MAX_SKIPPED = 100
_NAME_LENGTH = 28  # characters of a class name inside a list
_ENVIRONMENT = {"torch": "PyTorch", "python": "Python", "gpu": "GPU"}


def write_report(folder: RunFolder) -> Path:
    """Write the report of a finished run.

    Raises:
        RunError: the folder contains no finished run, or its files were changed.
    """
    atomic_write_text(folder.report, make_report(folder))
    return folder.report


def make_report(folder: RunFolder) -> str:
    """The report as HTML."""
    if not folder.summary.is_file():
        reason = "the run is not finished" if folder.config.is_file() else "not a run folder"
        raise RunError(f"could not make a report of {folder.path}: {reason}")
    folder.check()
    return render_page("vitrail.training.monitoring", "report.html", report_values(folder))


def report_values(folder: RunFolder) -> dict[str, Any]:
    """The values of the template."""
    summary = _read_json(folder.summary)
    details = _read_json(folder.details) if folder.details.is_file() else {}
    history = _read_json_lines(folder.metrics)
    config = {key: format_value(value) for key, value in read_config(folder.config).given.items()}
    classes = details.get("classes") or [row["label"] for row in summary["per_class"]]
    groups = details.get("groups", [])
    return {
        "summary": summary,
        "lead": describe_evaluation(summary),
        "cards": metric_cards(summary),
        "charts": charts(history, summary, groups),
        "history": history_table(history, top5=has_top5(len(summary["per_class"]))),
        "groups": [
            (row["name"], f"{row['parameters']:,}", f"{row['peak_lr']:.3g}", f"{row['weight_decay']:.3g}")
            for row in groups
        ],
        "classes": class_table(summary, details.get("confused"), classes),
        "shown_classes": _OPEN_CLASSES,
        "matrix": confusion_matrix(summary, details["confused"])
        if details and len(classes) <= _MATRIX_CLASSES
        else None,
        "pairs": pair_rows(summary, details.get("confused", []), classes),
        "errors": [
            {**row, "label": classes[row["label"]], "predicted": classes[row["guess"]], "name": row["name"] or ""}
            | {"evidence": row.get("evidence")}  # not stored by earlier versions
            for row in details.get("mistakes", [])
        ],
        "explained_by": details.get("method"),
        "wrong": sum(row["images"] - row["correct"] for row in summary["per_class"]),
        "calibration": reliability_diagram(details, summary),
        "bins": [_bin_row(row) for row in details.get("calibration", [])],
        "sessions": _read_json_lines(folder.sessions) if folder.sessions.is_file() else [],
        "facts": run_facts(summary, config),
        "config": config,
        "changed": {key for key in config if config[key] != format_value(FIELDS[key].default)},
        "skipped": [(row["path"], row["reason"]) for row in summary["skipped"][:_MAX_SKIPPED]],
        "has_details": bool(details),
    }


# --- text and numbers


def describe_evaluation(summary: Mapping[str, Any]) -> str:
    """The images that the metrics were measured on and the weights that were evaluated."""
    split, best = summary["split"], summary.get("best_epoch")
    selected = split == "val" and summary.get("val_top1") is not None
    role = {
        "test": ", used neither for training nor for model selection",
        "val": ", also used for model selection, so the figures are slightly optimistic" if selected else "",
        "train": ", the training images: the figures do not apply to other images",
    }.get(split, "")
    measured = f"Measured on {counted(summary['images'], f'{split} image')}{role}."
    if "probe" in summary:
        val = summary["probe"]["val_top1"]
        chosen = "" if val is None else f", selected on validation, top-1 {val:.2f} %"
        return (
            f"{measured} Linear probe on frozen features (L2 {summary['probe']['l2']:g}{chosen}); "
            f"k-NN with k = {summary['probe']['knn_neighbours']}: top-1 {summary['knn_top1']:.2f} %."
        )
    if best:
        val = summary["val_top1"]
        early = f" Stopped early: {summary['stopped']}." if summary.get("stopped") else ""
        return f"{measured} Best epoch: {best} of {summary['epochs']} (validation top-1 {val:.2f} %).{early}"
    if summary.get("epochs"):
        return f"{measured} Weights of the last epoch, {summary['epochs']}; there were no validation images."
    return f"{measured} The model was not trained."


def metric_cards(summary: Mapping[str, Any]) -> list[dict[str, str]]:
    """The metrics at the top of the page: name, value, unit, note."""
    low, high = wilson(summary["top1"] / 100, summary["images"])
    top5 = has_top5(len(summary["per_class"]))
    waiting = f"{100 * summary['waiting_for_data']:.0f} % of the time waiting for data"
    cards = [
        ("Top-1 accuracy", f"{summary['top1']:.2f}", "%", f"95 % CI {low:.1f} to {high:.1f} %"),
        *([("Top-5 accuracy", f"{summary['top5']:.2f}", "%", "true label among the top 5")] if top5 else []),
        ("Loss", f"{summary['loss']:.4f}", "", "cross-entropy"),
        ("Calibration error", f"{100 * summary['ece']:.2f}", "%", "ECE; lower is better"),
        ("Images", f"{summary['images']:,}", "", f"{summary['split']} split"),
        ("Training time", format_duration(summary["seconds"]), "", "validation included"),
        ("Throughput", format_speed(summary["images_per_second"]), "images/s", waiting),
    ]
    if "balanced_top1" in summary:
        cards.insert(1, ("Balanced top-1", f"{summary['balanced_top1']:.2f}", "%", "mean over classes"))
    return [dict(zip(("name", "value", "unit", "note"), card, strict=True)) for card in cards]


def run_facts(summary: Mapping[str, Any], config: Mapping[str, str]) -> dict[str, str]:
    """Weights, teacher, splits and environment by name, without empty entries."""
    teacher = "" if config.get("teacher", "none") == "none" else config["teacher"]
    facts = {
        "initial weights": summary.get("weights") or _initial_weights(config),
        "teacher": teacher and f"{teacher} ({config['distill']}, {config['distill_weight']} of the loss)",
        "splits": summary["how_split"],
        "parameters": f"{summary['params']:,}",
        "device": summary["device"],
        "processes": str(summary["processes"]) if summary.get("processes", 1) > 1 else "",
        **{_ENVIRONMENT.get(key, key): str(value) for key, value in summary["environment"].items()},
        "skipped steps": _skipped_steps(summary),
    }
    return {name: value for name, value in facts.items() if value}


def _skipped_steps(summary: Mapping[str, Any]) -> str:
    if not summary.get("skipped_steps"):
        return ""
    rollbacks = f", {counted(summary['rollbacks'], 'rollback')}" if summary.get("rollbacks") else ""
    return f"{summary['skipped_steps']:,} with a loss or gradient that was not finite{rollbacks}"


def _initial_weights(config: Mapping[str, str]) -> str:
    """The initial weights of a run that loaded none."""
    if config.get("model") in VARIANTS:
        return "random" if config.get("probe") == "true" else "random (trained from scratch)"
    return "those of the model passed to train()"


# --- classes and errors


def class_table(
    summary: Mapping[str, Any], confused: Sequence[Sequence[int]] | None, classes: Sequence[str]
) -> dict[str, Any]:
    """The classes with images, lowest accuracy first, each with its most frequent confusions; and those without."""
    confusions: dict[int, list[str]] = {}
    for label, predicted, count in confused or []:
        confusions.setdefault(label, []).append(f"{printable(classes[predicted], _NAME_LENGTH)} ({count:,})")
    rows = [{**row, "confused": ", ".join(confusions.get(k, [])[:3])} for k, row in enumerate(summary["per_class"])]
    with_images = sorted((row for row in rows if row["images"]), key=lambda row: (row["top1"], -row["images"]))
    return {
        "rows": with_images[:_MAX_CLASSES],
        "left_out": max(0, len(with_images) - _MAX_CLASSES),
        "empty": [row["label"] for row in rows if not row["images"]],
        "total": len(rows),
    }


def confusion_matrix(summary: Mapping[str, Any], confused: Sequence[Sequence[int]]) -> list[dict[str, Any]]:
    """Rows of the matrix: label, images, and cells with count, share of the row and strength of the colour."""
    per_class = summary["per_class"]
    counts = [[0] * len(per_class) for _ in per_class]
    for k, row in enumerate(per_class):
        counts[k][k] = row["correct"]
    for label, predicted, count in confused:
        counts[label][predicted] = count
    return [
        {
            "label": row["label"],
            "images": row["images"],
            "cells": [
                {"count": n, "share": n / max(row["images"], 1), "correct": i == k, "predicted": per_class[i]["label"]}
                | {"strength": _strength(n / max(row["images"], 1), i == k)}
                for i, n in enumerate(counts[k])
            ],
        }
        for k, row in enumerate(per_class)
    ]


def _strength(share: float, correct: bool) -> float:
    """0 to 1. The square root makes rare errors visible."""
    return round(share if correct else (0.12 + 0.88 * share**0.5 if share else 0.0), 3)


def pair_rows(
    summary: Mapping[str, Any], confused: Sequence[Sequence[int]], classes: Sequence[str]
) -> list[tuple[str, str, str, str]]:
    """True label, predicted label, images and share of the true label's images, most images first."""
    images = [row["images"] for row in summary["per_class"]]
    return [
        (classes[label], classes[predicted], f"{count:,}", f"{100 * count / max(images[label], 1):.1f} %")
        for label, predicted, count in confused[:_MAX_PAIRS]
    ]


def reliability_diagram(details: Mapping[str, Any], summary: Mapping[str, Any]) -> dict[str, Any] | None:
    """The chart; None without details or images."""
    bins = [Bin(**row) for row in details.get("calibration", [])]
    if not bins:
        return None
    title = f"Accuracy by confidence; expected calibration error {100 * summary['ece']:.2f} %"
    return {
        "title": "Reliability diagram",
        "svg": reliability_chart(bins, title),
        "legend": [("perfect calibration", "diagonal"), ("gap: confidence minus accuracy", "gap")],
        "note": "",
    }


def _bin_row(row: Mapping[str, float]) -> list[str]:
    interval = f"{row['low']:.2f} to {row['high']:.2f}"
    return [interval, f"{row['images']:,}", f"{row['confidence']:.3f}", f"{100 * row['accuracy']:.1f} %"]


# --- files


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RunError(f"could not read {path}: {error}") from None
    if not isinstance(found, dict):
        raise RunError(f"could not read {path}: not a JSON object")
    return found


def _read_json_lines(path: Path) -> list[dict[str, Any]]:
    """All complete lines; a line cut off by a killed process is skipped."""
    found = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found
