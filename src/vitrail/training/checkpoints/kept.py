"""What a run that is stopped by Ctrl-C leaves behind, in one line."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from vitrail.training.checkpoints.checkpoint import find_checkpoints
from vitrail.training.checkpoints.run_folder import RunFolder
from vitrail.training.engine.interrupt import Stopped


def what_is_kept(folder: RunFolder | None) -> str:
    """What is on the disk of a run that was stopped, and how to go on; None: it had not written anything."""
    if folder is None or not folder.config.is_file():
        return "stopped before the run began: nothing was written"
    if folder.summary.exists():
        report = "" if folder.report.exists() else f"; `vitrail report {folder.path}` writes its report"
        return f"stopped after the run: its model is saved in {folder.model}{report}"
    again = f"`vitrail train --resume {folder.path}`"
    if find_checkpoints(folder.checkpoint):
        return f"stopped: the last checkpoint is kept; continue with {again}"
    return f"stopped before the first checkpoint: the settings are kept; {again} starts again"


@contextmanager
def stop_says_what_is_kept(log: Callable[[str], None], folder: RunFolder | None = None) -> Iterator[None]:
    """Turn a KeyboardInterrupt into a Stopped that says what is kept.

    folder: None: no folder is known yet. This outermost use logs the text, of a Stopped from inside too.
    """
    try:
        yield
    except KeyboardInterrupt as error:
        stopped = error if isinstance(error, Stopped) else Stopped(what_is_kept(folder), signal.SIGINT)
        if folder is None:
            log(str(stopped))
        raise stopped from None
