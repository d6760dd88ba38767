"""`vitrail doctor`."""

from typing import TYPE_CHECKING, Annotated

import typer

from vitrail.cli.common.options import DataArgument, DataDirOption, DeviceOption, JsonOption

if TYPE_CHECKING:
    from vitrail.diagnosis.doctor import Diagnosis
    from vitrail.diagnosis.findings import Finding

_SHOWN = 3  # groups of a finding that are printed
_STYLES = {"error": "red", "warning": "yellow", "note": "dim"}
FAILED = 3  # exit status


def doctor(
    data: DataArgument,
    model: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="Use this model's features, which find more duplicates and wrong labels."),
    ] = None,
    json: JsonOption = False,
    out: Annotated[str | None, typer.Option(metavar="FILE", help="Write a page with the images to this file.")] = None,
    fix: Annotated[
        str | None, typer.Option(metavar="FILE", help="Write what to move, relabel or remove to this CSV file.")
    ] = None,
    forecast_model: Annotated[
        str | None, typer.Option(metavar="NAME", help="Forecast the cost of this model too; none: no forecast.")
    ] = None,
    data_dir: DataDirOption = None,
    device: DeviceOption = None,
) -> None:
    """Find what is wrong with images and labels, and forecast what training would cost. No image is changed.

    The exit status is 3 if accuracies on these data would be wrong: copies of an image in two splits, or under two
    labels.

    Example: `vitrail doctor photos/ --out doctor.html --fix fixes.csv`
    """
    from vitrail.cli.common.progress import progress
    from vitrail.cli.common.tables import print_json, stderr
    from vitrail.diagnosis.doctor import doctor as diagnose

    diagnosis = diagnose(
        data, model, forecast_model=forecast_model, data_dir=data_dir, device=device, progress=progress
    )
    if json:
        print_json(diagnosis.to_dict())
    else:
        _print(diagnosis, data)
    if out is not None:
        stderr().print(f"report  {diagnosis.write_report(out)}")
    if fix is not None:
        stderr().print(f"fixes   {diagnosis.write_fixes(fix):,} proposals in {fix}; no file was changed")
    if diagnosis.has_errors:
        raise typer.Exit(FAILED)


def _print(diagnosis: "Diagnosis", data: str) -> None:
    from vitrail.cli.common.tables import stdout
    from vitrail.diagnosis.report import cost_facts
    from vitrail.utils.text import counted

    console = stdout()
    console.print(f"{counted(diagnosis.images, 'image')} of {counted(diagnosis.classes, 'class', 'classes')} in {data}")
    console.print(f"{diagnosis.test_interval}\n")
    for finding in diagnosis.findings:
        _print_finding(finding)
    if not diagnosis.findings:
        console.print("no check found anything\n")
    for cost in diagnosis.cost.values():
        for name, text in cost_facts(cost).items() if cost else ():
            console.print(f"{name:<14} {text}")


def _print_finding(finding: "Finding") -> None:
    from vitrail.cli.common.tables import stdout

    console = stdout()
    console.print(f"{finding.severity:<8} {finding.check}: {finding.count:,}", style=_STYLES[finding.severity])
    console.print(f"  {finding.advice}")
    for group in finding.groups[:_SHOWN]:
        notes = [f"{path} ({finding.notes[path]})" if path in finding.notes else path for path in group[:4]]
        console.print(f"  - {', '.join(notes)}{f' and {len(group) - 4} more' if len(group) > 4 else ''}", style="dim")
    if len(finding.groups) > _SHOWN:
        console.print(f"  - and {len(finding.groups) - _SHOWN:,} more", style="dim")
    console.print()
