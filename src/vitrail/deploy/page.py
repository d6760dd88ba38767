"""What stands beside the model in an export: README.md and export.html. Importing this imports no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vitrail.inference.export_folder import ExportRecord
from vitrail.reports.page import render_page
from vitrail.utils.files import atomic_write_text
from vitrail.utils.text import format_bytes

COLUMNS = (
    ("export", "<"),
    ("size", ">"),
    ("1 image, ms", ">"),
    ("16, ms", ">"),
    ("speedup", ">"),
    ("at 16", ">"),
    ("top-1, %", ">"),
    ("change, points", ">"),
    ("agreement, %", ">"),
    ("logit error", ">"),
    ("verdict", "<"),
)
Row = Mapping[str, Any]

_CODE = {  # the lines that load the image entry and run it
    "onnx": (
        'session = onnxruntime.InferenceSession("{image}")',
        'probabilities = session.run(["probabilities"], {{"image": pixels}})[0][0]',
    ),
    "openvino": (
        'model = openvino.Core().compile_model("{image}", "CPU", {{"INFERENCE_PRECISION_HINT": "{hint}"}})',
        'probabilities = model(pixels)["probabilities"][0]',
    ),
}
_PACKAGES = {"onnx": "onnxruntime", "openvino": "openvino"}


def cells(row: Row, chosen: bool = False) -> list[str]:
    """The texts of a row of `export --json`, in the order of COLUMNS."""
    latency, speedup = row["latency_ms"] or {}, row["speedup"] or {}
    student = f"{row['model']}, " if row["student"] else ""
    name = f"{student}{row['target']} {row['precision']}"
    mixed = f", {len(row['float_layers'])} layers fp32" if row["float_layers"] else ""
    verdict = "kept" if chosen else row["reason"] or "passes"
    return [
        name + mixed,
        format_bytes(row["bytes"]) if row["bytes"] else "–",
        *(_number(latency.get(size), 2) for size in ("1", "16")),
        *(_number(speedup.get(size), 2, "x") for size in ("1", "16")),
        _number(row["top1"], 2),
        _change(row),
        _number(row["agreement"], 2),
        "–" if row["max_abs_logit_error"] is None else f"{row['max_abs_logit_error']:.2g}",
        verdict,
    ]


def reference_cells(reference: Mapping[str, Any]) -> list[str]:
    """The row of the model in torch."""
    latency = reference["latency_ms"] or {}
    times = [_number(latency.get(size), 2) for size in ("1", "16")]
    return [
        f"torch {reference['precision']}",
        "–",
        *times,
        "1.00x",
        "1.00x",
        _number(reference["top1"], 2),
        "–",
        "–",
        "–",
        "the model",
    ]


def write_readme(record: ExportRecord, path: Path, name: str) -> None:
    """README.md: what the export is, and how it predicts without vitrail."""
    height, width = record.preprocess.size
    entry = (
        f"`{record.model}` takes a batch that is {height}x{width} already: `images`, uint8 batch x height x width x"
        f" {record.preprocess.channels}, and gives `logits`, `probabilities` and `features`."
    )
    about = [
        f"# {name}",
        "",
        f"{record.architecture}, {len(record.class_names)} classes, {height}x{width} pixels: {record.target},"
        f" {record.precision}. Written by vitrail {record.vitrail}; export.html has the figures of the check.",
        "",
        f"`vitrail predict {name} photo.jpg` predicts an image.",
    ]
    atomic_write_text(path, "\n".join([*about, *(_code(record) if record.image else []), entry]) + "\n")


def _code(record: ExportRecord) -> list[str]:
    """Ten lines of Python that predict a file with the runtime alone."""
    package, (load, run) = _PACKAGES[record.target], _CODE[record.target]
    # Left to itself, OpenVINO computes the resizing too in bfloat16 on CPUs that have it.
    hint = "bf16" if record.precision == "bf16" else "f32"
    mode, pixels = ("RGB", "") if record.preprocess.channels == 3 else ("L", "[..., None]")
    return [
        f"Without vitrail, in this folder (`pip install {package} pillow`):",
        "",
        "```python",
        "import json",
        "from pathlib import Path",
        "import numpy as np",
        f"import {package}",
        "from PIL import Image, ImageOps",
        'names = json.loads(Path("export.json").read_text(encoding="utf-8"))["class_names"]',
        load.format(image=record.image, hint=hint),
        f'pixels = np.asarray(ImageOps.exif_transpose(Image.open("photo.jpg")).convert("{mode}")){pixels}',
        run.format(),
        "print(names[probabilities.argmax()], probabilities.max())",
        "```",
        "",
        f"`{record.image}` takes one image of any size, uint8 height x width x {record.preprocess.channels}, and"
        " resizes and normalises it.",
    ]


def write_page(record: ExportRecord, rows: Sequence[Row], facts: Mapping[str, str], notes: Sequence[str],
               reference: Mapping[str, Any], command: str, path: Path) -> None:  # fmt: skip
    """export.html: the check of the export. rows: of all candidates, the one that was kept first."""
    kept = rows[0]
    cards = [
        {"name": "one image", "value": _number(kept["latency_ms"]["1"], 2), "unit": "ms",
         "note": f"{kept['speedup']['1']:.2f}x as fast as torch"},
        {"name": "16 images", "value": _number(kept["latency_ms"]["16"], 2), "unit": "ms",
         "note": f"{kept['speedup']['16']:.2f}x as fast as torch"},
        {"name": "top-1", "value": _number(kept["top1"], 2), "unit": "%", "note": _top1_note(kept)},
        {"name": "agreement", "value": _number(kept["agreement"], 2), "unit": "%",
         "note": f"same class as the model, {kept['images']:,} images"},
        {"name": "size", "value": format_bytes(kept["bytes"]), "unit": "", "note": "all files"},
    ]  # fmt: skip
    values = {
        "heading": f"{record.architecture}: {kept['target']}, {kept['precision']}",
        "cards": cards,
        "notes": notes,
        "columns": [(name, "n" if align == ">" else "") for name, align in COLUMNS],
        "rows": [reference_cells(reference), *(cells(row, row is kept) for row in rows)],
        "float_layers": kept["float_layers"],
        "facts": facts,
        "calibration": record.calibration,
        "command": command,
    }
    atomic_write_text(path, render_page("vitrail.deploy", "export.html", values))


def _top1_note(row: Row) -> str:
    if row["difference"] is None:
        return "not checked: there were no labelled images"
    return f"model: {row['top1_reference']:.2f} %; change {_change(row)} points"


def _change(row: Row) -> str:
    if row["difference"] is None:
        return "–"
    low, high = row["ci95"]
    return f"{row['difference']:+.2f} [{low:+.2f}, {high:+.2f}]"


def _number(value: float | None, digits: int, unit: str = "") -> str:
    return "–" if value is None else f"{value:.{digits}f}{unit}"
