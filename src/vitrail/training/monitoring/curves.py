"""Training curves of the report (loss, top-1, learning rate), and the table of metrics by epoch."""

from collections.abc import Mapping, Sequence
from typing import Any

from vitrail.reports.charts import STYLES, Series, line_chart, subsample
from vitrail.reports.run_summary import metric_series, train_and_val

_MAX_EPOCHS = 200  # rows of the table
_MAX_RATES = 6  # lines in the chart of learning rates
_LOSS_NOTE = "Training: mean of the training objective over the epoch, on augmented images. Validation: cross-entropy."


def charts(
    history: Sequence[Mapping[str, Any]], summary: Mapping[str, Any], groups: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """The charts, each with title, SVG, legend (name, line style) and note."""
    probe = "probe" in summary
    label = "fit, from strong to weak L2" if probe else "epoch"
    best = summary.get("best_epoch")
    if probe:
        best = next((i for i, row in enumerate(history, 1) if row["l2"] == summary["probe"]["l2"]), None)
    mark = (float(best), "best") if best else None
    rows = (
        ("Loss", "loss", train_and_val(history, "loss"), {"zero": True, "mark": mark}, "" if probe else _LOSS_NOTE),
        ("Top-1 accuracy", "top-1, %", train_and_val(history, "top1"), {"y_max": 100.0, "mark": mark}, ""),
        ("Learning rate", "learning rate", _rates(history, groups), {"zero": True}, ""),
    )
    found: list[dict[str, Any]] = []
    for title, y_label, series, options, note in rows:
        svg = line_chart(series, title=f"{title} by {label}", x_label=label, y_label=y_label, **options)
        legend = [(one.name, f"line s{one.style % STYLES}") for one in series if one.points]
        found += [{"title": title, "svg": svg, "legend": legend, "note": note}] if svg else []
    return found


def _rates(history: Sequence[Mapping[str, Any]], groups: Sequence[Mapping[str, Any]]) -> list[Series]:
    """One line for each distinct peak learning rate; at most _MAX_RATES, evenly spaced from largest to smallest."""
    peaks: dict[float, list[str]] = {}
    for group in groups:
        name = str(group["name"]).removesuffix(", no decay")
        names = peaks.setdefault(float(group["peak_lr"]), [])
        names.extend([] if name in names else [name])
    order = sorted(peaks, reverse=True)
    if not order:
        return [metric_series("largest", history, "lr", 0)]
    single = len(peaks) == 1
    return [
        Series(
            "all parameters" if single else ", ".join(peaks[peak]),
            [(float(row["epoch"]), row["lr"] * peak / max(peaks)) for row in history if "lr" in row],
            style,
        )
        for style, peak in enumerate(subsample(order, _MAX_RATES))
    ]


def history_table(history: Sequence[Mapping[str, Any]], *, top5: bool = True) -> dict[str, Any]:
    """Columns (name, CSS class) and rows of the metrics by epoch, or by fit of a linear probe."""
    formats = {
        "epoch": ("epoch", "d"),
        "l2": ("L2", "g"),
        "lr": ("learning rate", ".3g"),
        "train_loss": ("training loss", ".4f"),
        "train_top1": ("training top-1, %", ".2f"),
        "val_loss": ("validation loss", ".4f"),
        "val_top1": ("validation top-1, %", ".2f"),
        "val_top5": ("validation top-5, %", ".2f"),
        "val_ece": ("validation ECE", ".4f"),
        "images_per_second": ("images/s", ",.0f"),
    }
    keys = [key for key in formats if any(key in row for row in history) and (top5 or key != "val_top5")]
    rows = [
        ["–" if row.get(key) is None else format(row[key], formats[key][1]) for key in keys]
        for row in history[-_MAX_EPOCHS:]
    ]
    return {
        "unit": "epoch" if "epoch" in keys else "fit",
        "columns": [(formats[key][0], "n") for key in keys],
        "rows": rows,
        "left_out": max(0, len(history) - _MAX_EPOCHS),
    }
