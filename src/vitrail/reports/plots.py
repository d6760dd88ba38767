"""Plots with matplotlib, which is the extra `plot`: confusion matrix, calibration, curves.

Importing this imports none of matplotlib, numpy and torch.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vitrail.errors import DeviceError, how_to_install
from vitrail.reports.charts import Series
from vitrail.reports.page import escape_unprintable
from vitrail.utils.files import atomic_write_bytes

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from matplotlib.axes import Axes

_NUMBERS = 20  # classes up to which the cells of a confusion matrix have their number, and its axes their names
_COLORS = ("#2d7dd2", "#e4572e", "#3a9d5d", "#8a5cc2", "#c29a2d", "#666666")
Draw = Callable[["Axes"], None]


def available() -> bool:
    """Whether matplotlib is installed."""
    return find_spec("matplotlib") is not None


def draw(plot: Draw, ax: Axes | None) -> Axes:
    """Draw on `ax`, or on a new figure of pyplot, which a notebook shows. Raises DeviceError without matplotlib."""
    if ax is None:
        if not available():
            raise DeviceError(f"plots need matplotlib: {how_to_install('plot')}")
        from matplotlib import pyplot

        _, ax = pyplot.subplots(layout="constrained")
    plot(ax)
    return ax


def png(plot: Draw, size: tuple[float, float] = (6.4, 4.8), dpi: int = 120) -> bytes:
    """The plot as a PNG of `size` inches, without pyplot, which has a state that threads share."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    plot(figure.subplots())
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=dpi)
    return stream.getvalue()


def image_tag(plot: Draw) -> str:
    """The plot as an HTML image, or "" without matplotlib."""
    if not available():
        return ""
    content = base64.b64encode(png(plot, (4.4, 3.0), 100)).decode()
    return f'<img style="max-width:100%" src="data:image/png;base64,{content}" alt="">'


def write_png(path: Path, plot: Draw) -> None:
    """Write the plot to a file, atomically."""
    atomic_write_bytes(path, png(plot))


def _name(text: str) -> str:
    """A class name for matplotlib, to which `$` starts a formula."""
    return escape_unprintable(text if len(text) <= 24 else text[:23] + "…").replace("$", r"\$")


def confusion(matrix: npt.NDArray[np.int64], names: Sequence[str]) -> Draw:
    """The confusion matrix K K, rows are true classes; the colour is the share of the row."""

    def plot(ax: Axes) -> None:
        import numpy as np

        shares = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
        ax.imshow(shares, cmap="Blues", vmin=0, vmax=1)
        ax.set(xlabel="predicted class", ylabel="true class", title="Confusion matrix")
        if len(names) > _NUMBERS:
            return
        places = range(len(names))
        turned: dict[str, Any] = (
            {"rotation": 45, "ha": "right", "rotation_mode": "anchor"} if max(map(len, names)) > 3 else {}
        )
        ax.set_xticks(places, [_name(name) for name in names], **turned)
        ax.set_yticks(places, [_name(name) for name in names])
        for row, column in zip(*np.nonzero(matrix), strict=True):
            color = "white" if shares[row, column] > 0.5 else "black"
            ax.text(column, row, f"{matrix[row, column]:,}", ha="center", va="center", color=color, fontsize=8)

    return plot


def calibration(bins: Sequence[Mapping[str, float]]) -> Draw:
    """The reliability diagram of `calibration_bins`: accuracy by confidence, and the diagonal."""

    def plot(ax: Axes) -> None:
        middles = [(each["low"] + each["high"]) / 2 for each in bins]
        widths = [0.9 * (each["high"] - each["low"]) for each in bins]
        accuracies = [each["accuracy"] for each in bins]
        ax.bar(middles, accuracies, widths, color=_COLORS[0], alpha=0.8, label="accuracy")
        ax.plot([each["confidence"] for each in bins], accuracies, "o", color=_COLORS[1], label="mean confidence")
        ax.plot([0, 1], [0, 1], "--", color="grey", label="perfect calibration")
        ax.set(xlabel="confidence", ylabel="accuracy", title="Calibration", xlim=(0, 1), ylim=(0, 1))
        ax.legend(loc="upper left")

    return plot


def lines(series: Sequence[Series], title: str, y_label: str, mark: tuple[float, str] | None = None) -> Draw:
    """Lines by epoch. mark: x and label of a vertical line."""

    def plot(ax: Axes) -> None:
        from matplotlib.ticker import MaxNLocator

        for one, color in zip(series, _COLORS, strict=False):
            if one.points:
                x, y = zip(*one.points, strict=True)
                ax.plot(x, y, "o-" if len(x) <= 15 else "-", color=color, label=one.name)
        if mark is not None:
            ax.axvline(mark[0], color="grey", linestyle=":", label=mark[1])
        ax.set(xlabel="epoch", ylabel=y_label, title=title)
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        ax.grid(alpha=0.3)
        if ax.get_legend_handles_labels()[0]:
            ax.legend()

    return plot


def choose(kind: str, plots: Mapping[str, Any]) -> Any:
    """The plot of this name. Raises ConfigError."""
    from vitrail.errors import ConfigError

    if kind not in plots:
        raise ConfigError(f"there is no plot {kind!r}: give {', '.join(plots)}")
    return plots[kind]
