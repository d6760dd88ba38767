"""`vitrail export`."""

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vitrail.cli.common.options import DataDirOption, JsonOption, ModelArgument, SizeOption, WeightsOption
from vitrail.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vitrail.deploy.export import Result

_REFUSED = 3  # exit status if the gate refuses the export
_TERMINATED = 128 + signal.SIGTERM

_Target = Annotated[
    str,
    typer.Option(
        metavar="NAME",
        help="onnx, openvino, auto: the fastest on this machine; pt2 (torch.export), or web: for browsers.",
    ),
]
_Precision = Annotated[str, typer.Option(metavar="NAME", help="fp32, bf16, int8, or auto: the fastest that passes.")]
_Check = Annotated[
    str | None, typer.Option(metavar="DATA", help="Labelled images, on which the export has to be as accurate.")
]
_Data = Annotated[
    str | None,
    typer.Option(metavar="DATA", help="Images to calibrate int8 with (training split).  [default: those of --check]"),
]
_Out = Annotated[str | None, typer.Option(help="The folder; by default exports/ and the name of MODEL.")]
_MaxLoss = Annotated[float, typer.Option(metavar="POINTS", help="Points of top-1 that may be lost.")]
_MinSpeedup = Annotated[
    float | None,
    typer.Option(
        metavar="X", min=0, help="Refuse what is not so many times as fast as torch.  [default: 1.15; pt2, web: 0]"
    ),
]
_Merge = Annotated[
    float | None,
    typer.Option(metavar="POINTS", help="Merge similar tokens of a ViT or DeiT, so many that this much is lost."),
]
_Distill = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="If nothing passes, train this smaller model (auto: chosen) on the model's logits, and export it.",
    ),
]
_Settings = Annotated[
    list[str] | None, typer.Argument(metavar="key=value...", help="Of --distill: settings as of `vitrail train`.")
]


def export(
    context: typer.Context,
    model: ModelArgument,
    settings: _Settings = None,
    target: _Target = "auto",
    precision: _Precision = "auto",
    check: _Check = None,
    data: _Data = None,
    max_loss: _MaxLoss = 0.3,
    min_speedup: _MinSpeedup = None,
    merge: _Merge = None,
    distill: _Distill = None,
    weights: WeightsOption = None,
    img_size: SizeOption = None,
    out: _Out = None,
    data_dir: DataDirOption = None,
    json: JsonOption = False,
) -> int:
    """Export a model for another runtime: predicts without torch, checked against the model it came from.

    Exit status 3: every candidate lost accuracy or gained no speed; nothing is written.

    Example: `vitrail export runs/photos --check photos/ --out exports/photos`
    """
    from pathlib import Path

    from vitrail.classifier import load_torch
    from vitrail.cli.common.options import print_loaded
    from vitrail.cli.common.tables import print_json, stderr
    from vitrail.deploy.export import export as run
    from vitrail.deploy.trials import ExportRefused
    from vitrail.training.config.schema import parse_overrides

    if settings and distill is None:
        raise ConfigError(f"{settings[0]} belongs to --distill: add it, or leave out {settings[0]}")
    try:
        with _cleaned_up_when_terminated():
            result = run(
                print_loaded(load_torch(weights or model, "cpu", img_size, model=model if weights else None)),
                out or Path("exports", Path(model).name),
                target=target,
                precision=precision,
                data=data,
                check=check,
                data_dir=data_dir,
                max_loss=max_loss,
                min_speedup=min_speedup,
                merge=merge,
                distill=distill,
                settings=parse_overrides(settings or []),
                name=model,
                log=lambda line: stderr().print(line, style="dim"),
                command=context.obj,
            )
    except ExportRefused as refused:
        print_json(refused.rows) if json else _print_table(refused.rows)
        stderr().print(str(refused))
        return _REFUSED
    print_json(result.rows) if json else _print(result)
    return 0


@contextmanager
def _cleaned_up_when_terminated() -> Iterator[None]:
    """SIGTERM ends the block by an exception, so that temporary folders are removed."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(_TERMINATED))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _print(result: "Result") -> None:
    from vitrail.cli.common.tables import stderr, stdout

    _print_table(result.rows, result.reference)
    for name, reason in result.left_out.items():
        stderr().print(f"not built: {name}: {reason}")
    for note in result.notes:
        stderr().print(f"note: {note}", style="yellow")
    page = "index.html" if result.rows[0]["target"] == "web" else "export.html"
    stdout().print(f"\nexport  {result.folder}\npage    {result.folder}/{page}")


def _print_table(rows: "Sequence[dict[str, Any]]", reference: "dict[str, Any] | None" = None) -> None:
    from vitrail.cli.common.tables import stdout, table
    from vitrail.deploy.page import COLUMNS, cells, reference_cells

    first = [reference_cells(reference)] if reference else []
    console = stdout()
    console.print(table(COLUMNS, [*first, *(cells(row, row["path"] is not None) for row in rows)], console.width))
