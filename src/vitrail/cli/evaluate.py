"""`vitrail evaluate`."""

from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.table import Table

    from vitrail.evaluation.metrics import Evaluation

_WORST = 10  # classes that are shown
_LABEL = 28  # columns of a class's name


def evaluate(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL", help="A run, a model folder, a name, hf:org/repo, a checkpoint.", show_default=False
        ),
    ],
    data: Annotated[
        str, typer.Argument(metavar="DATA", help="A folder, a dataset's name, wds: or hf-dataset:.", show_default=False)
    ],
    split: Annotated[
        str | None, typer.Option(help="test, val or train; by default test where there is one, else val.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    data_dir: Annotated[str | None, typer.Option(help="Where a named dataset's files are.")] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Images at once; by default by their size.")] = None,
    img_size: Annotated[
        str | None, typer.Option(metavar="SIZE", help="See images at another size than in training: 384, or 320x192.")
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, mps; auto: the best that is there.")] = "auto",
) -> None:
    """Judge a model on images: top-1, top-5, loss, calibration, and each class.

    The images are split as they were in training, and classes are matched by name. An image that cannot be read is left
    out of the figures and named.

    Example: `vitrail evaluate runs/photos photos/ --split test`
    """
    from vitrail.cli.progress import progress
    from vitrail.cli.source import open_model

    classifier = open_model(model, device, img_size)
    with progress("images") as advance:
        result = classifier.evaluate(data, split, data_dir=data_dir, batch_size=batch_size, on_batch=advance)
    if json:
        from json import dumps

        print(dumps(result.to_dict(), indent=2, ensure_ascii=False))
    else:
        _print(result, data)


def _print(result: "Evaluation", data: str) -> None:
    from vitrail.cli.tables import percent, stderr, stdout
    from vitrail.evaluation.metrics import uneven

    console = stdout()
    console.print(f"{result.images:,} {result.split} images of {data}\n")
    console.print(f"  top-1  {percent(result.top1, 2):>9}    top-5              {percent(result.top5, 2):>9}")
    console.print(f"  loss   {result.loss:>9.4f}    calibration error  {percent(100 * result.ece, 2):>9}")
    if uneven(result.per_class):
        console.print(f"  mean of the classes' own top-1, which all count the same: {percent(result.balanced_top1, 2)}")
    console.print()
    worst = _worst(result, console.width)
    console.print(worst if worst is not None else "  every image is right")
    for skipped in result.skipped:
        stderr().print(f"skipped: {skipped['path']} {skipped['reason']}", style="yellow")


def _worst(result: "Evaluation", width: int) -> "Table | None":
    """The classes with the most of their images wrong, and what those were taken for; None without any mistake."""
    from vitrail.cli.tables import cut, percent, table

    wrong = [(row["top1"], k) for k, row in enumerate(result.per_class) if row["images"] and row["top1"] < 100]
    rows = []
    for top1, k in sorted(wrong)[:_WORST]:
        row, taken = result.per_class[k], result.confusion[k].copy()
        taken[k] = 0
        others = [f"{result.class_names[j]} ({taken[j]})" for j in (-taken).argsort(kind="stable")[:3] if taken[j]]
        rows.append([f"  {cut(row['label'], _LABEL)}", f"{row['images']:,}", percent(top1), ", ".join(others)])
    headers = [("  worst classes", "<"), ("images", ">"), ("right", ">"), ("taken for", "<")]
    return table(headers, rows, width) if rows else None
