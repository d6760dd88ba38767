"""MODEL on the command line: a classifier, and on stderr what became of weights that are not a folder of ours."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vitrail.classifier import Classifier


def open_model(source: str, device: str, img_size: str | None) -> "Classifier":
    """Load MODEL; a line tells what was loaded, resized, adapted, new or unused where that is in question."""
    from vitrail.classifier import load
    from vitrail.utils.device import pick_device

    classifier = load(source, pick_device(device), img_size)
    if classifier.report is not None and not isinstance(classifier.report, dict):  # else a run's summary
        from vitrail.cli.tables import stderr

        stderr().print(str(classifier.report))
    return classifier
