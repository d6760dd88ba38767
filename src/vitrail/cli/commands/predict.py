"""`vitrail predict`."""

import sys
from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vitrail.cli.common.options import (
    BatchSizeOption,
    DeviceOption,
    JsonOption,
    ModelArgument,
    PathsArgument,
    PrecisionOption,
    SizeOption,
    TtaOption,
    WeightsOption,
    open_model,
    print_tta,
)
from vitrail.errors import ConfigError, DataError

if TYPE_CHECKING:
    from rich.table import Table

    from vitrail.prediction import Prediction

_TOP = {"text": 3, "json": 5, "csv": 1}  # default of --top


def predict(
    model: ModelArgument,
    paths: PathsArgument,
    top: Annotated[int | None, typer.Option(min=1, help="Number of classes per image.")] = None,
    json: JsonOption = False,
    csv: Annotated[bool, typer.Option("--csv", help="Print CSV with a header.")] = False,
    weights: WeightsOption = None,
    batch_size: BatchSizeOption = None,
    img_size: SizeOption = None,
    device: DeviceOption = None,
    precision: PrecisionOption = "auto",
    tta: TtaOption = None,
) -> None:
    """Predict labels and scores of images.

    --json prints one object per line. Images that could not be read or predicted are reported as errors; the
    exit status is 2 if that is all of them, else 0.

    Example: `vitrail predict runs/photos holiday/ --top 3`
    """
    if json and csv:
        raise ConfigError("--json and --csv exclude each other")
    form = "json" if json else "csv" if csv else "text"
    print_tta(tta)
    classifier = open_model(model, device, img_size, precision, weights)
    top = top or _TOP[form]
    counts = Counter[bool]()  # of readable and other images

    def predictions() -> "Iterator[Prediction]":
        for prediction in classifier.stream(paths, top, batch_size, tta=tta):
            counts[prediction.error is None] += 1
            yield prediction

    _FORMS[form](predictions(), min(top, len(classifier.class_names)))
    if not counts[True]:
        raise DataError(f"0 of {counts[False]} images could be read and predicted")


def _print_json(predictions: "Iterator[Prediction]", top: int) -> None:
    from json import dumps

    from vitrail.utils.text import plain_json

    for prediction in predictions:
        print(plain_json(dumps(prediction.to_dict(), ensure_ascii=False)), flush=True)


def _print_csv(predictions: "Iterator[Prediction]", top: int) -> None:
    from csv import writer

    from vitrail.utils.text import plain

    terminal = sys.stdout.isatty()  # elsewhere, paths stay as they are
    out = writer(sys.stdout, lineterminator="\n")
    more = [f"{column}_{rank}" for rank in range(2, top + 1) for column in ("label", "score")]
    out.writerow(["path", "label", "score", "error", *more])
    for prediction in predictions:
        others: list[Any] = [value for score in prediction.top[1:] for value in (score.label, score.score)]
        row = [prediction.path, prediction.label, prediction.score, prediction.error, *others]
        out.writerow([plain(value) if terminal and isinstance(value, str) else value for value in row])
        sys.stdout.flush()


def _print_text(predictions: "Iterator[Prediction]", top: int) -> None:
    from vitrail.cli.common.progress import progress
    from vitrail.cli.common.tables import stderr, stdout

    good: list[Prediction] = []
    failed: list[Prediction] = []
    with progress("images read") as advance:
        for prediction in predictions:
            advance(1)
            (good if prediction.error is None else failed).append(prediction)
    if good:
        console = stdout()
        console.print(_table(good, top, console.width))
    for prediction in failed:
        stderr().print(f"error: {prediction.path} {prediction.error}", style="red")


def _table(predictions: "list[Prediction]", top: int, width: int) -> "Table":
    """Image, best class and score, and the other classes, in `width` columns."""
    from rich.cells import cell_len
    from rich.text import Text

    from vitrail.cli.common.tables import cut, end_of, percent, table

    cells = [
        (
            prediction.path or "",
            prediction.label or "",
            percent(100 * (prediction.score or 0)),
            ", ".join(f"{score.label} {percent(100 * score.score)}" for score in prediction.top[1:]),
        )
        for prediction in predictions
    ]
    longest = [max(map(cell_len, column)) for column in zip(*cells, strict=True)]
    label = min(longest[1], max(width // 4, 10))
    left = width - label - 2 - len("100.0 %") - 2
    path = max(min(longest[0], left if top == 1 else left * 3 // 5), len("image"))
    rows: list[list[str | Text]] = [
        [end_of(image, path), Text(cut(best, label), style="bold"), score, Text(others, style="dim")]
        for image, best, score, others in cells
    ]
    headers = [("image", "<"), ("label", "<"), ("score", ">"), ("or", "<")]
    return table(headers, rows, width) if top > 1 else table(headers[:3], [row[:3] for row in rows])


_FORMS = {"text": _print_text, "json": _print_json, "csv": _print_csv}
