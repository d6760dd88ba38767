"""Which run is resumed or extended, and its config."""

from collections.abc import Mapping
from pathlib import Path

from vitrail._version import __version__
from vitrail.errors import ConfigError, RunError
from vitrail.training.checkpoints.run_folder import RunFolder, check_empty, run_to_resume
from vitrail.training.config.schema import TrainConfig, make_config
from vitrail.training.config.stamp import read_run_toml
from vitrail.training.lr_find import check_plot
from vitrail.utils.files import user_path


def check_folders(
    out: str | Path | None,
    resume: str | Path | None,
    recipe: str | Path | None,
    only: Mapping[str, str | Path | None],
    epochs: float | None,
) -> TrainConfig | None:
    """The config of the run to resume, or None for a new one, after checking that its folder can be used.

    only: the files that `show_batch` and `lr_find` write instead of a run. epochs: with more than a finished run has,
    it can be resumed too, and its config has them.

    Raises:
        VitrailError: the folder is of another kind, or settings contradict each other.
    """
    if only["lr_find"] is not None:
        check_plot(only["lr_find"])
        if resume is not None or only["show_batch"] is not None:
            raise ConfigError("--lr-find tests a new run and nothing else: leave out --resume and --show-batch")
    if resume is not None:
        if recipe is not None or (out is not None and Path(out) != Path(resume)):
            raise ConfigError("--resume continues a run in its folder with its settings: leave out --out and --recipe")
        folder = run_to_resume(resume, extend=epochs is not None)
        before = _read_run_config(folder)
        return _extended(before, epochs, folder) if epochs is not None and folder.summary.exists() else before
    if out is not None and not any(only.values()):
        check_empty(RunFolder(user_path(out)))  # before a download, not after
    return None


def _extended(before: TrainConfig, epochs: float, folder: RunFolder) -> TrainConfig:
    """The config of a finished run with more epochs."""
    number, usual = make_config({"epochs": epochs}).schedule.epochs, before.schedule.epochs
    if before.model.probe or usual is None or before.schedule.budget is not None or number is None:
        raise RunError(f"the run in {folder.path} is finished, and is not one of a number of epochs: start a new run")
    if number <= usual:
        raise RunError(f"the run in {folder.path} has finished {usual:g} epochs: extend it with more, not {number:g}")
    return before.updated({"epochs": number})


def _read_run_config(folder: RunFolder) -> TrainConfig:
    """The config of a run that was written by this version or an earlier one."""
    try:
        given = read_run_toml(folder.config).given
    except ConfigError as error:
        version = folder.started_with()
        if version is None or version == __version__:
            raise RunError(str(error)) from None
        raise RunError(f"{error}; resume this run with vitrail {version}, which started it") from None
    return TrainConfig().updated(given)
