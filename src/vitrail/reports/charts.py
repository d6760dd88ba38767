"""Charts as inline SVG: line charts and the reliability diagram.

The view box is 360 units wide (a phone, or a third of a desktop window) and scales with the page. Colours are classes
of style.css (`s0`, `s1`, ... for series), so that charts follow the light or dark theme.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from importlib.resources import files
from typing import TypeVar

T = TypeVar("T")

WIDTH, HEIGHT = 360, 220
LEFT, RIGHT, TOP, BOTTOM = 46, 10, 24, 34  # margins for tick labels and axis titles
STYLES = 6  # line styles in style.css
_VISIBLE_DOTS = 15  # up to so many points, each has a visible dot
_MAX_TOOLTIPS = 120  # points per series with a tooltip
_MAX_POINTS = 1000  # points per series that are drawn
_HISTOGRAM = 46  # height of the histogram of images below the reliability diagram


@dataclass(frozen=True)
class Series:
    """One line of a chart: name, points (x, y), and index of the line style."""

    name: str
    points: Sequence[tuple[float, float]]
    style: int = 0


@dataclass(frozen=True)
class Bin:
    """A bin of the reliability diagram: images with low < confidence <= high. All values but `images` are 0 to 1."""

    low: float
    high: float
    images: int
    confidence: float
    accuracy: float


def ticks(low: float, high: float, limit: int = 6, integer: bool = False) -> list[float]:
    """At most `limit` axis ticks that cover low..high, with a step of 1, 2 or 5 times a power of ten."""
    if not high > low:
        half = 0.5 if integer else abs(low) / 2 or 0.5
        low, high = low - half, high + half
    power = math.floor(math.log10((high - low) / limit)) - 1
    while True:
        for digit in (1, 2, 5):
            step = digit * 10.0**power
            first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
            if last - first < limit and (not integer or step >= 1):
                return [round(n * step, max(0, -power)) for n in range(first, last + 1)]
        power += 1


def format_number(value: float) -> str:
    """Four significant digits: 0.25, 40, 2e-5, 12,000."""
    if value and abs(value) < 1e-3:
        mantissa, _, exponent = f"{value:.2e}".partition("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    return f"{value:.4g}" if abs(value) < 1e4 else f"{value:,.0f}"


def _tick_labels(values: Sequence[float]) -> list[str]:
    """Labels of an axis, all in one notation."""
    small = max(map(abs, values)) < 1e-3
    return [format_number(value) if small or abs(value) >= 1e4 else f"{value:.6g}" for value in values]


def subsample(items: Sequence[T], limit: int) -> list[T]:
    """At most `limit` evenly spaced items, including the first and the last."""
    if len(items) <= limit:
        return list(items)
    return [items[round(i * (len(items) - 1) / (limit - 1))] for i in range(limit)]


@dataclass(frozen=True)
class _Axes:
    """Ranges of x and y, and the mapping to SVG coordinates."""

    x: tuple[float, float]
    y: tuple[float, float]
    top: float = TOP
    bottom: float = HEIGHT - BOTTOM

    def at_x(self, value: float) -> float:
        low, high = self.x
        return LEFT + (value - low) / (high - low) * (WIDTH - LEFT - RIGHT)

    def at_y(self, value: float) -> float:
        low, high = self.y
        return self.bottom - (value - low) / (high - low) * (self.bottom - self.top)


def line_chart(
    series: Sequence[Series],
    *,
    title: str,
    x_label: str,
    y_label: str,
    zero: bool = False,
    y_max: float = math.inf,
    mark: tuple[float, str] | None = None,
) -> str:
    """Lines over an integer x; "" without finite points.

    title: for screen readers. zero: start the y axis at 0. y_max: largest tick of the y axis. mark: x and label of a
    vertical line.
    """
    series = [Series(one.name, _finite(one.points), one.style) for one in series]
    series = [one for one in series if one.points]
    if not series:
        return ""
    xs = [x for one in series for x, _ in one.points]
    ys = [y for one in series for _, y in one.points]
    low, high = min([0.0, *ys] if zero else ys), max(ys)
    marks = [tick for tick in ticks(low, high) if tick <= y_max]
    left, right = min(xs), max(xs)
    if left == right:
        left, right = left - 0.5, right + 0.5
    axes = _Axes((left, right), (min(*marks, low), max(*marks, high)))
    parts = [_grid_y(axes, marks, y_label), _grid_x(axes, ticks(left, right, 7, integer=True), x_label)]
    if mark is not None and left <= mark[0] <= right:
        parts.append(_mark(axes, *mark))
    return _svg(title, parts + [_line(axes, one, x_label) for one in series])


def reliability_chart(bins: Sequence[Bin], title: str) -> str:
    """Reliability diagram (Guo et al., 2017, https://arxiv.org/abs/1706.04599): accuracy by confidence, the diagonal of
    perfect calibration, and below a histogram of the images."""
    upper = _Axes((0, 1), (0, 1))
    largest = max([b.images for b in bins], default=0)
    lower = _Axes((0, 1), (0, largest or 1), HEIGHT - BOTTOM + 8, HEIGHT + _HISTOGRAM - BOTTOM)
    shares = [0, 0.2, 0.4, 0.6, 0.8, 1]
    corners = f'x1="{upper.at_x(0)}" y1="{upper.at_y(0)}" x2="{upper.at_x(1)}" y2="{upper.at_y(1)}"'
    side = f'x="{LEFT - 6}" text-anchor="end"'
    parts = [
        _grid_y(upper, shares, "accuracy"),
        *(_bar(b, upper, lower) for b in bins if b.images),
        f'<line class="diagonal" {corners}/>',
        _grid_x(lower, shares, "confidence"),
        f'<text {side} y="{(lower.top + lower.bottom) / 2 + 4:.1f}">images</text>',
    ]
    return _svg(title, parts, HEIGHT + _HISTOGRAM)


def standalone(chart: str) -> str:
    """A chart as the text of an SVG file, with its own styles."""
    style = (files("vitrail.reports") / "templates" / "style.css").read_text(encoding="utf-8")
    size = (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{2 * WIDTH}" height="{2 * HEIGHT}" font-family="sans-serif" '
    )
    head, _, rest = chart.replace("<svg ", size, 1).partition(">")
    paper = '<rect width="100%" height="100%" style="fill: var(--paper)"/>'
    return f"{head}><style>{style}</style>{paper}{rest}\n"


def _bar(b: Bin, upper: _Axes, lower: _Axes) -> str:
    left, width = upper.at_x(b.low) + 1, upper.at_x(b.high) - upper.at_x(b.low) - 2
    middle, top, count = left + width / 2, upper.at_y(b.accuracy), lower.at_y(b.images)
    across = f'x="{left:.1f}" width="{width:.1f}"'
    tooltip = (
        f"confidence {b.low:.2f} to {b.high:.2f}: {b.images:,} images, {100 * b.accuracy:.1f} % correct, "
        f"mean confidence {b.confidence:.3f}"
    )
    return (
        f"<g><title>{tooltip}</title>"
        f'<rect class="hover" {across} y="{TOP}" height="{lower.bottom - TOP}"/>'
        f'<rect class="bar" {across} y="{top:.1f}" height="{upper.bottom - top:.1f}"/>'
        f'<line class="gap" x1="{middle:.1f}" x2="{middle:.1f}" y1="{top:.1f}" y2="{upper.at_y(b.confidence):.1f}"/>'
        f'<rect class="count" {across} y="{count:.1f}" height="{lower.bottom - count:.1f}"/></g>'
    )


def _finite(points: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    return [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y)]


def _line(axes: _Axes, one: Series, x_label: str) -> str:
    points = [f"{axes.at_x(x):.1f},{axes.at_y(y):.1f}" for x, y in subsample(one.points, _MAX_POINTS)]
    style = f"s{one.style % STYLES}"
    kind = "dot" if len(one.points) <= _VISIBLE_DOTS else "dot hidden"
    dots = [
        f'<circle class="{kind} {style}" cx="{axes.at_x(x):.1f}" cy="{axes.at_y(y):.1f}" r="3">'
        f"<title>{escape(one.name)}, {escape(x_label)} {x:g}: {format_number(y)}</title></circle>"
        for x, y in subsample(one.points, _MAX_TOOLTIPS)
    ]
    return f'<polyline class="line {style}" points="{" ".join(points)}"/>' + "".join(dots)


def _grid_y(axes: _Axes, values: Sequence[float], label: str) -> str:
    lines = [
        f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{axes.at_y(v):.1f}" y2="{axes.at_y(v):.1f}"/>'
        f'<text x="{LEFT - 6}" y="{axes.at_y(v) + 4:.1f}" text-anchor="end">{text}</text>'
        for v, text in zip(values, _tick_labels(values), strict=True)
    ]
    return "".join(lines) + f'<text class="axis" x="2" y="11">{escape(label)}</text>'


def _grid_x(axes: _Axes, values: Sequence[float], label: str) -> str:
    low, high = axes.x
    labels = [
        f'<text x="{axes.at_x(v):.1f}" y="{axes.bottom + 15:.1f}" text-anchor="middle">{format_number(v)}</text>'
        for v in values
        if low <= v <= high
    ]
    base = f'<line class="base" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{axes.bottom:.1f}" y2="{axes.bottom:.1f}"/>'
    middle = (LEFT + WIDTH - RIGHT) / 2
    title = f'<text class="axis" x="{middle}" y="{axes.bottom + 30:.1f}" text-anchor="middle">{escape(label)}</text>'
    return base + "".join(labels) + title


def _mark(axes: _Axes, value: float, text: str) -> str:
    x = axes.at_x(value)
    anchor, gap = ("end", 4) if x > WIDTH / 2 else ("start", -4)
    return (
        f'<line class="mark" x1="{x:.1f}" x2="{x:.1f}" y1="{axes.top - 4:.1f}" y2="{axes.bottom:.1f}"/>'
        f'<text class="mark" x="{x + gap:.1f}" y="{axes.top - 8:.1f}" text-anchor="{anchor}">{escape(text)}</text>'
    )


def _svg(title: str, parts: Sequence[str], height: float = HEIGHT) -> str:
    return (
        f'<svg viewBox="0 0 {WIDTH} {height:g}" role="img" aria-label="{escape(title)}">'
        f"<title>{escape(title)}</title>{''.join(parts)}</svg>"
    )
