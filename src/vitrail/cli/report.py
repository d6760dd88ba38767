"""`vitrail report`."""

from typing import Annotated

import typer


def report(
    run: Annotated[str, typer.Argument(metavar="RUN", help="The folder of a finished run.", show_default=False)],
) -> None:
    """Make a run's report.html anew, from the files in its folder.

    Every finished run has one; this is for runs of an earlier vitrail, or where it could not be written.

    Example: `vitrail report runs/photos`
    """
    from pathlib import Path

    from vitrail.training.checkpoints.run_folder import RunFolder
    from vitrail.training.monitoring.report import write_report

    print(write_report(RunFolder(Path(run).expanduser())))
