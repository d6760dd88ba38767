"""The curves of a run: loss, top-1 and learning rates, as pictures and in numbers."""

from collections.abc import Mapping, Sequence
from typing import Any

from vitrail.reports.charts import SERIES, Series, line_chart

_EPOCHS = 200  # epochs that are listed
_RATES = 6  # different learning rates that get a line each


def charts(
    history: Sequence[Mapping[str, Any]], summary: Mapping[str, Any], groups: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """The curves, each with title, SVG, legend (name, style) and a note."""
    probe = "probe" in summary
    label = "fit, from strong to weak l2" if probe else "epoch"
    best = summary.get("best_epoch")
    if probe:
        best = next((i for i, row in enumerate(history, 1) if row["l2"] == summary["probe"]["l2"]), None)
    mark = (float(best), "kept") if best else None
    loss = [_series("training", history, "train_loss", 0), _series("validation", history, "val_loss", 1)]
    top1 = [_series("training", history, "train_top1", 0), _series("validation", history, "val_top1", 1)]
    rates = _rates(history, groups)
    loss_chart = line_chart(loss, title=f"Loss by {label}", x_label=label, y_label="loss, nats", zero=True, mark=mark)
    top1_chart = line_chart(top1, title=f"Top-1 by {label}", x_label=label, y_label="right, %", highest=100, mark=mark)
    rate_chart = line_chart(rates, title="Learning rate by epoch", x_label=label, y_label="rate", zero=True)
    loss_note = (
        "Training loss is what the run minimises, in the mean of an epoch, on images as they were augmented; "
        "validation loss is plain cross-entropy."
    )
    found = [
        ("Loss", loss, loss_chart, "" if probe else loss_note),
        ("Top-1", top1, top1_chart, ""),
        ("Learning rate", rates, rate_chart, ""),
    ]
    return [
        {
            "title": title,
            "svg": svg,
            "legend": [(one.name, one.style % SERIES) for one in series if one.points],
            "note": note,
        }
        for title, series, svg, note in found
        if svg
    ]


def _series(name: str, history: Sequence[Mapping[str, Any]], key: str, style: int) -> Series:
    known = ((i, row) for i, row in enumerate(history, 1) if row.get(key) is not None)
    return Series(name, [(float(row.get("epoch", i)), float(row[key])) for i, row in known], style)


def _rates(history: Sequence[Mapping[str, Any]], groups: Sequence[Mapping[str, Any]]) -> list[Series]:
    """A line for each different peak rate; of many, the largest, the smallest and some between."""
    peaks: dict[float, list[str]] = {}
    for group in groups:
        name = str(group["name"]).removesuffix(", no decay")
        names = peaks.setdefault(float(group["peak_lr"]), [])
        names.extend([] if name in names else [name])
    order = sorted(peaks, reverse=True)
    if not order:
        return [_series("largest", history, "lr", 0)]
    if len(order) > _RATES:
        order = [order[round(i * (len(order) - 1) / (_RATES - 1))] for i in range(_RATES)]
    whole = len(peaks) == 1
    return [
        Series(
            "all parameters" if whole else ", ".join(peaks[peak]),
            [(float(row["epoch"]), row["lr"] * peak / max(peaks)) for row in history if "lr" in row],
            style,
        )
        for style, peak in enumerate(order)
    ]


def history_table(history: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Heads and rows of the epochs' figures, as the file has them."""
    known = {
        "epoch": ("epoch", "d"),
        "l2": ("l2", "g"),
        "lr": ("rate", ".3g"),
        "train_loss": ("training loss", ".4f"),
        "train_top1": ("training top-1, %", ".2f"),
        "val_loss": ("validation loss", ".4f"),
        "val_top1": ("top-1, %", ".2f"),
        "val_top5": ("top-5, %", ".2f"),
        "val_ece": ("calibration error", ".4f"),
        "images_per_second": ("images/s", ",.0f"),
    }
    columns = [key for key in known if any(key in row for row in history)]
    rows = [
        ["–" if row.get(key) is None else format(row[key], known[key][1]) for key in columns]
        for row in history[-_EPOCHS:]
    ]
    return {"heads": [known[key][0] for key in columns], "rows": rows, "left_out": max(0, len(history) - _EPOCHS)}
