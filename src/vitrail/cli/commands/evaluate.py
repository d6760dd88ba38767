"""`vitrail evaluate`."""

from typing import TYPE_CHECKING

from vitrail.cli.common.options import (
    BatchSizeOption,
    DataArgument,
    DataDirOption,
    DeviceOption,
    JsonOption,
    ModelArgument,
    PrecisionOption,
    SizeOption,
    SplitOption,
    TtaOption,
    WeightsOption,
    open_model,
    print_tta,
)

if TYPE_CHECKING:
    from rich.table import Table

    from vitrail.evaluation.metrics import Evaluation

_WORST = 10  # classes in the table
_LABEL_WIDTH = 28


def evaluate(
    model: ModelArgument,
    data: DataArgument,
    split: SplitOption = None,
    json: JsonOption = False,
    data_dir: DataDirOption = None,
    weights: WeightsOption = None,
    batch_size: BatchSizeOption = None,
    img_size: SizeOption = None,
    device: DeviceOption = None,
    precision: PrecisionOption = "auto",
    tta: TtaOption = None,
) -> None:
    """Evaluate a model on a dataset: top-1, top-5, loss, calibration error, and accuracy per class.

    The data is split as in training, and classes are matched by name. Images that could not be read are listed and not
    counted.

    Example: `vitrail evaluate runs/photos photos/ --split test`
    """
    from vitrail.cli.common.progress import progress
    from vitrail.cli.common.tables import print_json

    print_tta(tta)
    classifier = open_model(model, device, img_size, precision, weights)
    with progress("images") as advance:
        result = classifier.evaluate(data, split, data_dir=data_dir, batch_size=batch_size, on_batch=advance, tta=tta)
    if json:
        print_json(result.to_dict() | ({"tta": tta} if tta else {}))
    else:
        _print(result, f"{data}, tta={tta}" if tta else data)


def _print(result: "Evaluation", data: str) -> None:
    from vitrail.cli.common.tables import percent, print_skipped, stdout
    from vitrail.evaluation.metrics import is_imbalanced
    from vitrail.evaluation.statistics import has_top5
    from vitrail.utils.text import counted

    console = stdout()
    console.print(f"{counted(result.images, f'{result.split} image')} of {data}\n")
    top5 = f"    top-5              {percent(result.top5, 2):>9}" if has_top5(len(result.class_names)) else ""
    console.print(f"  top-1  {percent(result.top1, 2):>9}{top5}")
    console.print(f"  loss   {result.loss:>9.4f}    calibration error  {percent(100 * result.ece, 2):>9}")
    if is_imbalanced(result.per_class):
        console.print(f"  balanced top-1 (mean over classes): {percent(result.balanced_top1, 2)}")
    console.print()
    worst = _worst(result, console.width)
    console.print(worst if worst is not None else "  all predictions are correct")
    print_skipped(result.skipped)


def _worst(result: "Evaluation", width: int) -> "Table | None":
    """The classes with the lowest top-1 and what they were predicted as; None if all predictions are correct."""
    from vitrail.cli.common.tables import cut, percent, table

    imperfect = [(row["top1"], k) for k, row in enumerate(result.per_class) if row["images"] and row["top1"] < 100]
    rows = []
    for top1, k in sorted(imperfect)[:_WORST]:
        row, wrong = result.per_class[k], result.predicted_as(k)
        wrong[k] = 0
        others = [f"{result.class_names[j]} ({wrong[j]})" for j in (-wrong).argsort(kind="stable")[:3] if wrong[j]]
        rows.append([f"  {cut(row['label'], _LABEL_WIDTH)}", f"{row['images']:,}", percent(top1), ", ".join(others)])
    headers = [("  worst classes", "<"), ("images", ">"), ("top-1", ">"), ("predicted as", "<")]
    return table(headers, rows, width) if rows else None
