"""compare.html: the result of a comparison as one page without external resources. Importing this imports no torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from vitrail.comparison.verdict import format_spread
from vitrail.reports.charts import STYLES, Series, line_chart
from vitrail.reports.page import render_page
from vitrail.utils.files import atomic_write_text
from vitrail.utils.text import format_bytes, format_duration

Model = Mapping[str, Any]


def write_page(result: Mapping[str, Any], path: Path) -> None:
    """Write the page; `result` is the content of compare.json."""
    atomic_write_text(path, render_page("vitrail.comparison", "compare.html", page_values(result)))


def write_curve_page(result: Mapping[str, Any], path: Path) -> None:
    """Write the page of a learning curve; `result` is what `learning_curve` returns."""
    ahead, points = result["forecast"], [(row["images"], row["top1"]["mean"]) for row in result["curve"]]
    series = [
        Series("measured", points, 0),
        Series("expected", [points[-1], (ahead["images"], ahead["top1"])], 1),
        *(Series("80 % interval", [points[-1], (ahead["images"], ahead[bound])], 5) for bound in ("low", "high")),
    ]
    title = "Accuracy by training images"
    svg = line_chart(series, title=title, x_label="training images", y_label="top-1, %", y_max=100.0)
    legend = [(one.name, f"line s{one.style}") for one in series[:3]]
    values = {
        "result": result,
        "chart": {"title": title, "svg": svg, "legend": legend, "note": "Mean of five random parts of the images."},
        "rows": [[f"{row['images']:,}", format_spread(row["top1"])] for row in result["curve"]],
    }
    atomic_write_text(path, render_page("vitrail.comparison", "learning_curve.html", values))


def page_values(result: Mapping[str, Any]) -> dict[str, Any]:
    """The values of the template."""
    return {
        "result": result,
        "heading": f"{' or '.join(model['name'] for model in result['models'])}?",
        "answer": answer(result),
        "charts": _charts(result),
        "columns": [("", ""), *((model["name"], "n") for model in result["models"])],
        "rows": _table(result["models"], _ROWS),
        "corruptions": _table(result["models"], _corruption_rows(result["models"][0])),
        "pairs": [_pair_row(pair) for pair in result["pairs"]],
        "curve_pairs": [
            [f"{each['share']} %", _points(each["difference"]), _interval(each)] for each in result["curve_pairs"]
        ],
        "curve": [
            [each["model"], f"{each['share']} %", f"{each['images']:,}", format_spread(each["top1"]), each["top1"]["n"]]
            for each in result["curve"]
        ],
        "facts": _facts(result),
    }


def answer(result: Mapping[str, Any]) -> str:
    """The verdict in a few words."""
    if result["verdict"] == "cannot tell":
        needed = result["images_needed"]
        return "Cannot tell" + (f": about {needed:,} more test images are needed" if needed else "")
    winner = result[result["verdict"]]
    return f"{winner} is more accurate" if result["best"] or len(result["models"]) == 2 else f"{winner} leads"


def _charts(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    names = [model["name"] for model in result["models"]]

    def curve(name: str) -> list[tuple[float, float]]:
        return [(point["images"], point["top1"]["mean"]) for point in result["curve"] if point["model"] == name]

    def times(name: str) -> list[tuple[float, float]]:
        (model,) = (model for model in result["models"] if model["name"] == name)
        return [(max(row["size"]), row["ms"]) for row in model["resolution"]]

    crossings = result["crossings"]
    mark = (float(crossings[0]), f"equal: about {crossings[0]:,}") if crossings else None
    seeds = result["plan"]["seeds"]
    found = []
    for title, x_label, y_label, points, options, note in (
        ("Accuracy by training images", "training images", "top-1, %", curve, {"y_max": 100.0, "mark": mark},
         f"Mean of {seeds} seed{'s' if seeds > 1 else ''}, each on another part of the images."),
        ("Time by resolution", "input side, px", "ms per image", times, {"zero": True}, "In batches of 8."),
    ):  # fmt: skip
        svg = _chart(names, points, title=title, x_label=x_label, y_label=y_label, **options)
        legend = [(name, f"line s{style % STYLES}") for style, name in enumerate(names)]
        found += [{"title": title, "svg": svg, "legend": legend, "note": note}] if svg else []
    return found


def _chart(names: Sequence[str], points: Callable[[str], list[tuple[float, float]]], **options: Any) -> str:
    return line_chart([Series(name, points(name), style) for style, name in enumerate(names)], **options)


_ROWS: tuple[tuple[str, Callable[[Model], str]], ...] = (
    ("top-1 accuracy, %", lambda m: format_spread(m["top1"])),
    ("parameters", lambda m: f"{m['params']:,}"),
    ("size on disk", lambda m: format_bytes(m["bytes"])),
    ("time to train", lambda m: format_duration(m["seconds"])),
    ("epochs in that time", lambda m: f"{m['epochs']:.1f}"),
    ("latency of one image, ms", lambda m: f"{m['latency_ms']:.2f}"),
    ("time at 1.5 times the side", lambda m: _times(m, 1)),
    ("time at 2 times the side", lambda m: _times(m, 2)),
    ("calibration error (ECE), %", lambda m: format_spread({**m["ece"], **_percent(m["ece"])})),
    ("top-1 under corruptions, %", lambda m: format_spread(m["corrupted"])),
    ("predictions changed by a translation, %", lambda m: format_spread(m["translation"]["changed"])),
    ("top-1 with shuffled patches, %", lambda m: _shuffled(m)),
    ("points of top-1 per doubling of the images", lambda m: _points(m["points_per_doubling"])),
)


def _percent(value: Mapping[str, Any]) -> dict[str, Any]:
    return {key: None if value[key] is None else 100 * value[key] for key in ("mean", "std")}


def _times(model: Model, index: int) -> str:
    first, other = model["resolution"][0], model["resolution"][index]
    return f"{other['ms'] / first['ms']:.1f}x"


def _shuffled(model: Model) -> str:
    return ", ".join(f"{value['mean']:.1f} ({grid}x{grid})" for grid, value in model["shuffling"].items())


def _corruption_rows(model: Model) -> list[tuple[str, Callable[[Model], str]]]:
    def row(kind: str) -> Callable[[Model], str]:
        return lambda m: format_spread(m["corruptions"][kind], 1)

    return [("none", lambda m: format_spread(m["clean"], 1)), *((kind, row(kind)) for kind in model["corruptions"])]


def _table(models: Sequence[Model], rows: Sequence[tuple[str, Callable[[Model], str]]]) -> list[list[str]]:
    return [[name, *(text(model) for model in models)] for name, text in rows]


def _pair_row(pair: Mapping[str, Any]) -> list[str]:
    needed = "" if pair["images_needed"] is None else f"{pair['images_needed']:,}"
    verdict = "cannot tell" if pair["verdict"] == "cannot tell" else f"{pair[pair['verdict']]} is more accurate"
    names = f"{pair['a']} minus {pair['b']}"
    return [names, _points(pair["difference"]), _interval(pair), f"{pair['p_value']:.4f}", verdict, needed]


def _points(value: float | None) -> str:
    return "–" if value is None else f"{value:+.2f}"


def _interval(pair: Mapping[str, Any]) -> str:
    low, high = pair["ci95"]
    return f"{low:+.2f} to {high:+.2f}"


def _setting(value: Any) -> str:
    """As on the command line."""
    return "x".join(map(str, value)) if isinstance(value, list) else str(value)


def _facts(result: Mapping[str, Any]) -> dict[str, str]:
    plan, environment = result["plan"], result["environment"]
    return {
        "images": ", ".join(f"{count:,} {name}" for name, count in result["images"].items()),
        "splits": result["how_split"],
        "each training": result["length"],
        "seeds": str(plan["seeds"]),
        "settings of all": ", ".join(f"{key}={_setting(value)}" for key, value in plan["settings"].items()),
        "device": result["device"],
        **{name: str(value) for name, value in environment.items()},
    }
