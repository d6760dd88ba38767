"""`vitrail recommend`."""

from typing import TYPE_CHECKING, Annotated

import typer

from vitrail.cli.common.options import DataArgument, DataDirOption, DeviceOption, JsonOption

if TYPE_CHECKING:
    from rich.table import Table

    from vitrail.recommendation.recommend import Recommendation, Row

_NO_CHOICE = 3  # exit status if nothing is within the limits


def recommend(
    data: DataArgument,
    max_latency_ms: Annotated[
        float | None, typer.Option(metavar="MS", help="Longest time for one image on this machine, milliseconds.")
    ] = None,
    max_memory_mb: Annotated[
        float | None, typer.Option(metavar="MB", help="Most memory while predicting, 10^6 bytes.")
    ] = None,
    hours: Annotated[
        float | None, typer.Option(metavar="HOURS", help="Longest training on this machine, estimated.")
    ] = None,
    pretrained: Annotated[
        bool, typer.Option("--pretrained", help="Published weights may be downloaded, as with train --pretrained.")
    ] = False,
    device: DeviceOption = None,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads of the measurement.")] = None,
    data_dir: DataDirOption = None,
    json: JsonOption = False,
) -> int:
    """Recommend a model for these images, this machine and these limits, with reasons.

    Without limits it is the model of `vitrail train` without --model. Latency and memory are measured once on a machine
    and stored. The exit status is 3 if no candidate is within the limits.

    Example: `vitrail recommend photos/ --max-latency-ms 50`
    """
    from vitrail.cli.common.tables import print_json, stderr, stdout
    from vitrail.recommendation.recommend import recommend as run

    result = run(
        data,
        max_latency_ms=max_latency_ms,
        max_memory_mb=max_memory_mb,
        hours=hours,
        pretrained=pretrained or None,
        device=device or "auto",
        threads=threads,
        data_dir=data_dir,
        log=lambda line: stderr().print(line, style="dim"),
    )
    if json:
        print_json(result.to_dict())
    else:
        console = stdout()
        console.print(_table(result.candidates, console.width))
        console.print(f"\n{_text(result)}")
    if result.choice is None:
        stderr().print(f"error: {result.reasons[-1]}", style="red")
        return _NO_CHOICE
    return 0


def _text(result: "Recommendation") -> str:
    """The choice, its reasons, the runner-up, and the command."""
    lines = [f"- {reason}" for reason in result.reasons]
    if choice := result.choice:
        height, width = choice.img_size
        weights = f"weights {choice.weights}" if choice.weights else "from scratch"
        head = f"{choice.model} at {height}x{width}, {weights}, recipe {choice.recipe}"
        lines = [head, *lines]
        if result.runner_up:
            lines.append(f"runner-up: {result.runner_up}")
        lines.append(f"\n{result.command}")
    return "\n".join(lines)


def _table(rows: "list[Row]", width: int) -> "Table":
    """A row for each candidate; the licence, and why something was not measured, if there is room."""
    from vitrail.cli.common.tables import table

    headers = [("model", "<"), ("size", ">"), ("params", ">"), ("ms", ">"), ("MB", ">"), ("top-1", ">"), ("probe", ">")]
    headers += [("fits", "<"), ("licence", "<"), ("note", "<")]
    cells = [
        [
            row.candidate.model,
            "x".join(map(str, dict.fromkeys(row.candidate.size))),
            f"{row.params / 1e6:.1f} M",
            _number(row.latency_ms, 1 if (row.latency_ms or 0) >= 10 else 2),
            _number(row.peak_mb, 0),
            _number(row.candidate.top1, 1),
            _number(row.probe_top1, 1),
            "yes" if row.fits else "no",
            (row.licence or "not stated") if row.candidate.pretrained else "",
            row.note,
        ]
        for row in rows
    ]
    if width < 120:
        headers, cells = headers[:-2], [line[:-2] for line in cells]
    return table(headers, cells)


def _number(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:,.{digits}f}"
