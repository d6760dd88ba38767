"""The summary of a run, as it is shown in Python and in notebooks, with its curves.

Importing this imports no torch, numpy, Pillow or matplotlib: `vitrail report` needs none of them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vitrail.reports import plots
from vitrail.reports.charts import Series
from vitrail.utils.text import format_duration

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from matplotlib.axes import Axes

PLOTS = "plots"  # the folder of PNG files in a run folder


class RunSummary(dict[str, Any]):
    """The content of a run's summary.json, a dict, with the run's `folder`."""

    def __init__(self, values: Mapping[str, Any], folder: str | Path) -> None:
        super().__init__(values)
        self.folder = Path(folder)

    def __repr__(self) -> str:
        return f"RunSummary({self.folder}: {', '.join(f'{name} {value}' for name, value in self._figures())})"

    def _figures(self) -> list[tuple[str, str]]:
        of = f" of {self['epochs']}" if self.get("epochs") else ""
        best = [("best epoch", f"{self['best_epoch']}{of}")] if self.get("best_epoch") else []
        return [
            ("model", str(self["model"])),
            (f"{self['split']} top-1", f"{self['top1']:.2f} % of {self['images']:,} images"),
            ("loss", f"{self['loss']:.4f}"),
            *best,
            ("time", format_duration(self["seconds"])),
        ]

    def _repr_html_(self) -> str:
        from vitrail.reports import notebook

        rows = [*self._figures(), ("data", str(self["data"])), ("folder", str(self.folder))]
        drawn = [plots.image_tag(plot) for name, plot in self._plots().items() if name in ("loss", "top1")]
        return notebook.box("Run", notebook.figures(rows), *drawn)

    @property
    def history(self) -> list[dict[str, Any]]:
        """The metrics of each epoch."""
        return [json.loads(line) for line in _read(self.folder / "metrics.jsonl").splitlines() if line.strip()]

    def plot(self, kind: str = "loss", ax: Axes | None = None) -> Axes:
        """Draw a plot with matplotlib; returns its axes.

        kind: "loss", "top1" or "lr" by epoch, "confusion" or "calibration". ax: of matplotlib; None: a new figure.

        Raises:
            ConfigError: another kind, or one whose data this run does not have.
            DeviceError: matplotlib is not installed.
        """
        return plots.draw(plots.choose(kind, self._plots()), ax)

    def _plots(self) -> dict[str, plots.Draw]:
        """The plots whose data are there."""
        history, details = self.history, _read(self.folder / "details.json")
        best = self.get("best_epoch")
        mark = (float(best), "best epoch") if best else None
        found: dict[str, plots.Draw] = {}
        if any("epoch" in row for row in history):  # a probe has none
            found["loss"] = plots.lines(train_and_val(history, "loss"), "Loss", "loss", mark)
            found["top1"] = plots.lines(train_and_val(history, "top1"), "Top-1 accuracy", "top-1, %", mark)
            found["lr"] = plots.lines([metric_series("largest", history, "lr", 0)], "Learning rate", "learning rate")
        if details:
            content = json.loads(details)
            found["confusion"] = plots.confusion(_matrix(self, content), content["classes"])
            found["calibration"] = plots.calibration(content["calibration"])
        return found

    def write_plots(self) -> list[Path]:
        """Write all plots as PNG files to the folder `plots` in the run folder; none without matplotlib."""
        if not plots.available():
            return []
        folder = self.folder / PLOTS
        folder.mkdir(exist_ok=True)
        written = []
        for name, plot in self._plots().items():
            plots.write_png(folder / f"{name}.png", plot)
            written.append(folder / f"{name}.png")
        return written


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.is_file() else ""


def _matrix(summary: Mapping[str, Any], details: Mapping[str, Any]) -> npt.NDArray[np.int64]:
    """The confusion matrix from the images of each class that are right, and the pairs that are confused."""
    import numpy as np

    matrix = np.diag([int(row["correct"]) for row in summary["per_class"]]).astype(np.int64)
    for label, predicted, images in details["confused"]:
        matrix[label, predicted] = images
    return matrix


def train_and_val(history: Sequence[Mapping[str, Any]], metric: str) -> list[Series]:
    """The training and validation curves of a metric."""
    return [
        metric_series("training", history, f"train_{metric}", 0),
        metric_series("validation", history, f"val_{metric}", 1),
    ]


def metric_series(name: str, history: Sequence[Mapping[str, Any]], key: str, style: int) -> Series:
    """One value of each epoch, where it is known."""
    known = ((i, row) for i, row in enumerate(history, 1) if row.get(key) is not None)
    return Series(name, [(float(row.get("epoch", i)), float(row[key])) for i, row in known], style)
