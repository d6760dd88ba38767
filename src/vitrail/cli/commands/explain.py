"""`vitrail explain`."""

from typing import TYPE_CHECKING, Annotated, Any

import typer

from vitrail.cli.common.options import (
    BatchSizeOption,
    DeviceOption,
    JsonOption,
    ModelArgument,
    SizeOption,
    WeightsOption,
    print_loaded,
    refuse_options,
)
from vitrail.errors import ConfigError, DataError

if TYPE_CHECKING:
    from rich.table import Table

    from vitrail.classifier import Classifier
    from vitrail.explanation.result import Explanation, Saved

_POSITIONS = "positions"  # of the model alone: needs no image
_OF_PICTURES = ("method", "score", "out", "block", "head")  # options without effect on --benchmark
_OF_IMAGES = ("target", "score", "baseline", "block", "head", "batch_size", "img_size")  # ... on --method positions
_IMAGE_WIDTH = 20  # columns for the paths of images, at least

PathsOrNone = Annotated[
    list[str] | None,
    typer.Argument(metavar="IMAGE...", help="Images, folders (searched recursively), or patterns.", show_default=False),
]
MethodOption = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="relevance (default for ViT and Swin), gradcam (default for others), legrad, rollout, attention, tokens, "
        "integrated_gradients, occlusion, or positions, which needs no image.",
        show_default=False,
    ),
]
TargetOption = Annotated[
    str | None,
    typer.Option(
        metavar="CLASS",
        help="A label, an index, or a pair such as cat:dog (why cat and not dog); by default the predicted class.",
        show_default=False,
    ),
]
BaselineOption = Annotated[
    str | None,
    typer.Option(
        metavar="mean|blur",
        help="What --score and --benchmark cover patches with: the mean colour (default), or a blurred copy.",
        show_default=False,
    ),
]


def explain(
    context: typer.Context,
    model: ModelArgument,
    images: PathsOrNone = None,
    method: MethodOption = None,
    target: TargetOption = None,
    score: Annotated[bool, typer.Option("--score", help="Measure how faithful each picture is (slower).")] = False,
    baseline: BaselineOption = None,
    out: Annotated[str, typer.Option(metavar="FOLDER", help="Where the pictures are written.")] = "explanations",
    block: Annotated[
        int | None, typer.Option(metavar="N", help="Block of attention and tokens; -1 is the last.")
    ] = None,
    head: Annotated[str | None, typer.Option(metavar="N|all", help="Head of attention, or all in a grid.")] = None,
    benchmark: Annotated[
        bool, typer.Option("--benchmark", help="Compare all methods on IMAGE, a folder or a dataset's name.")
    ] = False,
    limit: Annotated[int, typer.Option(min=1, help="Images of --benchmark, at most.")] = 32,
    json: JsonOption = False,
    weights: WeightsOption = None,
    batch_size: BatchSizeOption = None,
    img_size: SizeOption = None,
    device: DeviceOption = None,
) -> None:
    """Draw which pixels decided, as heatmaps (.npy), pictures (.png) and one page with the first 200 (gallery.html).

    No file is overwritten: a name that is taken gets a number. --json prints one object per line. Images that could not
    be read are reported as errors; the exit status is 2 if that is all of them, else 0.

    Example: `vitrail explain runs/photos holiday/ --target cat:dog --score`
    """
    if not images and method != _POSITIONS:
        raise ConfigError("give at least one image, or --method positions")
    if images and method == _POSITIONS:
        raise ConfigError("--method positions draws the model alone: leave out IMAGE")
    if benchmark and len(images or []) != 1:
        raise ConfigError("--benchmark compares all methods on one folder or dataset: give one IMAGE")
    if method == _POSITIONS:
        refuse_options(context, ("benchmark", "limit", *_OF_IMAGES), "--method positions draws the model alone")
    elif benchmark:
        refuse_options(context, _OF_PICTURES, "--benchmark compares all methods by their scores and draws nothing")
    else:
        refuse_options(context, ("limit",), "--limit belongs to --benchmark")
    if baseline is not None and not (score or benchmark):
        raise ConfigError("--baseline belongs to --score: add --score")
    baseline = baseline or "mean"
    classifier = _open(model, device, img_size, weights)
    if method == _POSITIONS:
        _positions(classifier, out, json)
    elif benchmark:
        _benchmark(
            classifier, (images or [])[0], json, limit=limit, target=target, baseline=baseline, batch_size=batch_size
        )
    else:
        options = {"score": score, "baseline": baseline, "block": block, "head": _head(head), "batch_size": batch_size}
        _explain(classifier, images or [], out, json, method=method, target=target, **options)


def _open(source: str, device: str | None, img_size: str | None, weights: str | None) -> "Classifier":
    from vitrail.classifier import load_torch
    from vitrail.explanation.explain import open_classifier
    from vitrail.utils.device import pick_device

    if weights is not None:
        return print_loaded(load_torch(weights, device or "auto", img_size, model=source))
    return print_loaded(open_classifier(source, pick_device(device or "auto"), img_size))


def _head(text: str | None) -> int | str | None:
    if text is None or text == "all":
        return text
    try:
        return int(text)
    except ValueError:
        raise ConfigError(f"--head {text!r}: give a number, or all") from None


def _explain(classifier: "Classifier", images: list[str], out: str, json: bool, **options: Any) -> None:
    from json import dumps

    from vitrail.cli.common.progress import progress
    from vitrail.cli.common.tables import stderr, stdout
    from vitrail.explanation.explain import explain_stream
    from vitrail.explanation.gallery import MAX_IMAGES, write_gallery
    from vitrail.explanation.result import Unreadable
    from vitrail.utils.text import plain_json

    shown: list[Explanation | Unreadable] = []
    failed: list[Unreadable] = []
    rows: list[list[str]] = []
    count, is_pair = 0, False
    with progress("images") as advance:
        for found in explain_stream(classifier, images, **options):
            advance(1)
            if isinstance(found, Unreadable):
                failed.append(found)
                record = found.to_dict()
            else:
                count, is_pair = count + 1, found.is_pair
                saved = found.save(out)
                record = found.to_dict(saved)
                rows.append(_row(found, saved))
                if count <= MAX_IMAGES:
                    shown.append(found)
            if json:
                print(plain_json(dumps(record, ensure_ascii=False)), flush=True)
    if count:
        gallery = write_gallery(out, [*shown, *failed], classifier.architecture, count - len(shown))
        if not json:
            stdout().print(_table(rows, is_pair, stdout().width))
        (stderr() if json else stdout()).print(f"gallery  {gallery}")
    for each in failed if not json else ():
        stderr().print(f"error: {each.path} {each.error}", style="red")
    if not count:
        raise DataError(f"0 of {len(failed)} images could be read")


def _row(found: "Explanation", saved: "Saved") -> list[str]:
    from vitrail.cli.common.tables import percent

    measured = found.faithfulness
    score = f"{found.score:+.2f}" if found.is_pair else percent(None if found.score is None else 100 * found.score)
    return [
        found.path or "",
        found.target or "–",
        score,
        f"{measured.score:.3g}" if measured else "",
        f"{measured.percentile:.0f}" if measured else "",
        str(saved.picture),
    ]


def _table(rows: list[list[str]], is_pair: bool, width: int) -> "Table":
    """Image, target, score, faithfulness and percentile if measured, and the picture if it fits, in `width` columns."""
    from rich.cells import cell_len

    from vitrail.cli.common.tables import cut, end_of, table

    headers = [("image", "<"), ("target", "<"), ("logit difference" if is_pair else "probability", ">")]
    headers += [("faithfulness", ">"), ("percentile", ">"), ("picture", "<")]
    widths = [
        max(map(cell_len, (title, *column)))
        for (title, _), column in zip(headers, zip(*rows, strict=True), strict=True)
    ]
    widths[1] = min(widths[1], max(width // 5, len("target")))
    columns = [0, 1, 2] + ([3, 4] if any(row[3] for row in rows) else [])
    left = width - sum(widths[column] + 2 for column in columns[1:])
    if left > widths[5] + _IMAGE_WIDTH:
        columns, left = [*columns, 5], left - widths[5] - 2
    rows = [[end_of(row[0], max(left, _IMAGE_WIDTH)), cut(row[1], widths[1]), *row[2:]] for row in rows]
    return table([headers[column] for column in columns], [[row[column] for column in columns] for row in rows])


def _benchmark(classifier: "Classifier", data: str, json: bool, **options: Any) -> None:
    from vitrail.cli.common.progress import progress
    from vitrail.cli.common.tables import percent, print_json, stdout, table
    from vitrail.explanation.benchmark import benchmark

    with progress("methods") as advance:
        results = benchmark(classifier, data, on_method=lambda name: advance(1), **options)
    if json:
        print_json([result.to_dict() for result in results])
        return
    headers = [("method", "<"), ("class-specific", "<"), ("faithfulness", ">"), ("percentile", ">")]
    headers += [("above 99th", ">"), ("s per image", ">")]
    rows = [
        [
            result.method,
            "yes" if result.class_specific else "no",
            f"{result.score:.3f}",
            f"{result.percentile:.1f}",
            percent(100 * result.sure),
            f"{result.seconds:.3f}",
        ]
        for result in results
    ]
    stdout().print(f"{results[0].images:,} images of {data}, {classifier.architecture}\n")
    stdout().print(table(headers, rows))
    stdout().print("\npercentile: mean, among random rankings of the same patches; above 99th: share of the images")


def _positions(classifier: "Classifier", out: str, json: bool) -> None:
    from vitrail.cli.common.tables import print_json, stdout
    from vitrail.explanation.positions import position_pictures
    from vitrail.explanation.rendering import encode_png
    from vitrail.explanation.result import write_new

    pictures = position_pictures(classifier.model)
    saved = {
        name: str(write_new(out, f"positions-{name}", {".png": encode_png(picture)})[0])
        for name, picture in pictures.items()
    }
    if json:
        print_json({"method": _POSITIONS, "pictures": saved})
        return
    for name, path in saved.items():
        stdout().print(f"{name}  {path}")
