"""`vitrail report`."""

from typing import Annotated

import typer


def report(
    run: Annotated[str, typer.Argument(metavar="RUN", help="Folder of a finished run.", show_default=False)],
) -> None:
    """Write the report.html of a finished run again, from the files in its folder.

    Example: `vitrail report runs/photos`
    """
    from vitrail.training.checkpoints.run_folder import RunFolder
    from vitrail.training.monitoring.report import write_report
    from vitrail.utils.files import user_path

    print(write_report(RunFolder(user_path(run))))
