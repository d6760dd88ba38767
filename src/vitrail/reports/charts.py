"""Charts as inline SVG, made of plain strings: lines over epochs, and the reliability diagram.

They are drawn for a width of about 360 CSS pixels, which is a phone's and a third of a desktop's, and scale with their
box. Colours are classes of the page's style sheet (`s0`, `s1`, ... for series), so that they follow its light and dark.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 360, 220
LEFT, RIGHT, TOP, BOTTOM = 46, 10, 24, 34  # margins, for the words of the axes
SERIES = 6  # series that the style sheet tells apart, by colour and by dashes
_FEW = 15  # points up to which each has a dot that is seen
_HOVERED = 120  # points of a series that tell their values under the mouse
_DRAWN = 1000  # points of a series that are drawn
_COUNTS = 46  # pixels under the reliability diagram, for how many images each bar stands for


@dataclass(frozen=True)
class Series:
    """One line: its name, its points (x, y), and which of the style sheet's series it looks like."""

    name: str
    points: Sequence[tuple[float, float]]
    style: int = 0


@dataclass(frozen=True)
class Bin:
    """Images whose confidence lies above `low` and up to `high`; mean confidence and accuracy, all 0 to 1."""

    low: float
    high: float
    images: int
    confidence: float
    accuracy: float


def ticks(low: float, high: float, most: int = 6, whole: bool = False) -> list[float]:
    """Round numbers, 1, 2 or 5 times a power of ten apart, `most` at most, from `low` or just below it to `high` or
    just above it. whole: integers only."""
    if not high > low:
        half = 0.5 if whole else abs(low) / 2 or 0.5
        low, high = low - half, high + half
    power = math.floor(math.log10((high - low) / most)) - 1
    while True:
        for digit in (1, 2, 5):
            step = digit * 10.0**power
            first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
            if last - first < most and (not whole or step >= 1):
                return [round(n * step, max(0, -power)) for n in range(first, last + 1)]
        power += 1


def number(value: float) -> str:
    """A short number: 0.25, 40, 2e-5, 12,000."""
    if value and abs(value) < 1e-3:
        mantissa, _, exponent = f"{value:.2e}".partition("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    return f"{value:.4g}" if abs(value) < 1e4 else f"{value:,.0f}"


def _alike(values: Sequence[float]) -> list[str]:
    """The numbers of an axis, all in one notation."""
    small = max(map(abs, values)) < 1e-3
    return [number(value) if small or abs(value) >= 1e4 else f"{value:.6g}" for value in values]


def thin(items: Sequence[tuple[float, float]], most: int) -> list[tuple[float, float]]:
    """At most so many of the items, evenly chosen, the first and the last among them."""
    if len(items) <= most:
        return list(items)
    return [items[round(i * (len(items) - 1) / (most - 1))] for i in range(most)]


@dataclass(frozen=True)
class _Axes:
    """Where values lie in the picture."""

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
    highest: float = math.inf,
    mark: tuple[float, str] | None = None,
) -> str:
    """Lines over x, which counts in whole numbers. "" where there is no finite point.

    title: what a screen reader says. zero: the y axis begins at 0. highest: where it ends at most. mark: a place on the
    x axis, and the word that stands there.
    """
    series = [Series(one.name, _finite(one.points), one.style) for one in series]
    series = [one for one in series if one.points]
    if not series:
        return ""
    xs = [x for one in series for x, _ in one.points]
    ys = [y for one in series for _, y in one.points]
    low, high = min([0.0, *ys] if zero else ys), max(ys)
    marks = [tick for tick in ticks(low, high) if tick <= highest]
    left, right = min(xs), max(xs)
    if left == right:
        left, right = left - 0.5, right + 0.5
    axes = _Axes((left, right), (min(*marks, low), max(*marks, high)))
    parts = [_grid_y(axes, marks, y_label), _grid_x(axes, ticks(left, right, 7, whole=True), x_label)]
    if mark is not None and left <= mark[0] <= right:
        parts.append(_mark(axes, *mark))
    return _svg(title, parts + [_line(axes, one, x_label) for one in series])


def reliability_chart(bins: Sequence[Bin], title: str) -> str:
    """Accuracy over confidence, with the diagonal on which they are equal; below, how many images each bar stands for.

    Guo et al., 2017 (https://arxiv.org/abs/1706.04599).
    """
    upper = _Axes((0, 1), (0, 1))
    most = max([b.images for b in bins], default=0)
    lower = _Axes((0, 1), (0, most or 1), HEIGHT - BOTTOM + 8, HEIGHT + _COUNTS - BOTTOM)
    shares = [0, 0.2, 0.4, 0.6, 0.8, 1]
    corners = f'x1="{upper.at_x(0)}" y1="{upper.at_y(0)}" x2="{upper.at_x(1)}" y2="{upper.at_y(1)}"'
    side = f'x="{LEFT - 6}" text-anchor="end"'
    parts = [
        _grid_y(upper, shares, "share that is right"),
        *(_bar(b, upper, lower) for b in bins if b.images),
        f'<line class="diagonal" {corners}/>',
        _grid_x(lower, shares, "confidence of the guess"),
        f'<text {side} y="{(lower.top + lower.bottom) / 2 + 4:.1f}">images</text>',
    ]
    return _svg(title, parts, HEIGHT + _COUNTS)


def _bar(b: Bin, upper: _Axes, lower: _Axes) -> str:
    left, width = upper.at_x(b.low) + 1, upper.at_x(b.high) - upper.at_x(b.low) - 2
    middle, top, count = left + width / 2, upper.at_y(b.accuracy), lower.at_y(b.images)
    across = f'x="{left:.1f}" width="{width:.1f}"'
    words = (
        f"confidence {b.low:.2f} to {b.high:.2f}: {b.images:,} images, {100 * b.accuracy:.1f} % right, "
        f"mean confidence {b.confidence:.3f}"
    )
    return (
        f"<g><title>{words}</title>"
        f'<rect class="hover" {across} y="{TOP}" height="{lower.bottom - TOP}"/>'
        f'<rect class="bar" {across} y="{top:.1f}" height="{upper.bottom - top:.1f}"/>'
        f'<line class="gap" x1="{middle:.1f}" x2="{middle:.1f}" y1="{top:.1f}" y2="{upper.at_y(b.confidence):.1f}"/>'
        f'<rect class="count" {across} y="{count:.1f}" height="{lower.bottom - count:.1f}"/></g>'
    )


def _finite(points: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    return [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y)]


def _line(axes: _Axes, one: Series, x_label: str) -> str:
    places = [f"{axes.at_x(x):.1f},{axes.at_y(y):.1f}" for x, y in thin(one.points, _DRAWN)]
    style = f"s{one.style % SERIES}"
    kind = "dot" if len(one.points) <= _FEW else "dot hidden"
    dots = [
        f'<circle class="{kind} {style}" cx="{axes.at_x(x):.1f}" cy="{axes.at_y(y):.1f}" r="3">'
        f"<title>{escape(one.name)}, {escape(x_label)} {x:g}: {number(y)}</title></circle>"
        for x, y in thin(one.points, _HOVERED)
    ]
    return f'<polyline class="line {style}" points="{" ".join(places)}"/>' + "".join(dots)


def _grid_y(axes: _Axes, values: Sequence[float], label: str) -> str:
    lines = [
        f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{axes.at_y(v):.1f}" y2="{axes.at_y(v):.1f}"/>'
        f'<text x="{LEFT - 6}" y="{axes.at_y(v) + 4:.1f}" text-anchor="end">{word}</text>'
        for v, word in zip(values, _alike(values), strict=True)
    ]
    return "".join(lines) + f'<text class="axis" x="2" y="11">{escape(label)}</text>'


def _grid_x(axes: _Axes, values: Sequence[float], label: str) -> str:
    low, high = axes.x
    under = [
        f'<text x="{axes.at_x(v):.1f}" y="{axes.bottom + 15:.1f}" text-anchor="middle">{number(v)}</text>'
        for v in values
        if low <= v <= high
    ]
    base = f'<line class="base" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{axes.bottom:.1f}" y2="{axes.bottom:.1f}"/>'
    middle = (LEFT + WIDTH - RIGHT) / 2
    words = f'<text class="axis" x="{middle}" y="{axes.bottom + 30:.1f}" text-anchor="middle">{escape(label)}</text>'
    return base + "".join(under) + words


def _mark(axes: _Axes, place: float, word: str) -> str:
    x = axes.at_x(place)
    anchor, gap = ("end", 4) if x > WIDTH / 2 else ("start", -4)
    return (
        f'<line class="mark" x1="{x:.1f}" x2="{x:.1f}" y1="{axes.top - 4:.1f}" y2="{axes.bottom:.1f}"/>'
        f'<text class="mark" x="{x + gap:.1f}" y="{axes.top - 8:.1f}" text-anchor="{anchor}">{escape(word)}</text>'
    )


def _svg(title: str, parts: Sequence[str], height: float = HEIGHT) -> str:
    return (
        f'<svg viewBox="0 0 {WIDTH} {height:g}" role="img" aria-label="{escape(title)}">'
        f"<title>{escape(title)}</title>{''.join(parts)}</svg>"
    )
