"""Experiment trackers: TensorBoard, Weights & Biases, Trackio.

A tracker that fails is reported once and then left out; training continues. Each value is logged once, at its step:
trackers.json stores the last step logged by each tracker, for resumed runs.
"""

import json
import os
import secrets
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from types import TracebackType
from typing import Any, Self

from vitrail.errors import DeviceError, how_to_install
from vitrail.training.checkpoints.run_folder import RunFolder
from vitrail.utils.files import atomic_write_text
from vitrail.utils.text import one_line

_FINAL = ("top1", "top5", "loss", "ece", "best_epoch", "epochs", "seconds", "images_per_second", "params")
_PROJECT = "vitrail"  # default project of Weights & Biases and Trackio


class Tracker(ABC):
    """Logs scalars by name, such as train/loss and lr/head."""

    @abstractmethod
    def log(self, values: Mapping[str, float], step: int) -> None:
        """Log the values after `step` optimizer steps; on return they are written or handed to another process."""

    def finish(self, values: Mapping[str, float], step: int) -> None:
        """Log the final metrics."""
        self.log({f"final/{name}": value for name, value in values.items()}, step)

    @abstractmethod
    def close(self) -> None:
        """Close the tracker at the end of a session."""


class TensorBoard(Tracker):
    """Event files in RUN/tensorboard; `tensorboard --logdir runs` shows all runs."""

    def __init__(self, folder: RunFolder, config: Mapping[str, Any], state: dict[str, Any]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(str(folder.path / "tensorboard"))
        if not state.get("begun"):
            rows = "\n".join(f"| {key} | {value} |" for key, value in config.items())
            self._writer.add_text("config", f"| key | value |\n|---|---|\n{rows}", 0)
        state["begun"] = True

    def log(self, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name.replace(" ", "_"), value, step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class Trackio(Tracker):
    """A Trackio run, local or in the Space TRACKIO_SPACE_ID."""

    def __init__(self, folder: RunFolder, config: Mapping[str, Any], state: dict[str, Any]) -> None:
        name = state.setdefault("name", f"{folder.path.name}-{secrets.token_hex(4)}")
        self._init("trackio", config, name=name)

    def _init(self, package: str, config: Mapping[str, Any], **options: Any) -> None:
        project = os.environ.get(f"{package.upper()}_PROJECT", _PROJECT)
        self._run = import_module(package).init(project=project, resume="allow", config=dict(config), **options)

    def log(self, values: Mapping[str, float], step: int) -> None:
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        self._run.finish()


class WandB(Trackio):
    """A Weights & Biases run; reads its environment variables (WANDB_PROJECT, WANDB_MODE=offline, ...)."""

    def __init__(self, folder: RunFolder, config: Mapping[str, Any], state: dict[str, Any]) -> None:
        run_id = state.setdefault("id", secrets.token_hex(4))
        self._init("wandb", config, name=folder.path.name, id=run_id, dir=str(folder.path))

    def finish(self, values: Mapping[str, float], step: int) -> None:
        self._run.summary.update({f"final/{name}": value for name, value in values.items()})


_KINDS: dict[str, Callable[[RunFolder, Mapping[str, Any], dict[str, Any]], Tracker]] = {
    "tensorboard": TensorBoard,
    "wandb": WandB,
    "trackio": Trackio,
}


def tracker_names(track: str) -> list[str]:
    """The tracker names in the config key `track`, a comma-separated list or "none"."""
    return [] if track == "none" else track.split(",")


def check_trackers(track: str) -> None:
    """Raise DeviceError for a tracker that is not installed."""
    for name in tracker_names(track):
        if find_spec(name) is None:
            raise DeviceError(f"track={name} needs a package that is not installed: {how_to_install(name)}")


class Trackers:
    """The trackers of a run, as a context manager. `log` prints a warning for each that fails."""

    def __init__(self, track: str, folder: RunFolder, config: Mapping[str, Any], log: Callable[[str], None]) -> None:
        self._names = tracker_names(track)
        self._folder = folder
        self._config = config
        self._print = log
        self._open: dict[str, Tracker] = {}
        self._state: dict[str, dict[str, Any]] = {}

    def __enter__(self) -> Self:
        if self._names and self._folder.trackers.exists():
            self._state = json.loads(self._folder.trackers.read_text(encoding="utf-8"))
        for name in self._names:
            self._try(name, partial(self._start, name))
        self._save_state()
        return self

    def _start(self, name: str) -> None:
        self._open[name] = _KINDS[name](self._folder, self._config, self._state.setdefault(name, {}))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for name, tracker in list(self._open.items()):
            self._try(name, tracker.close)
        self._open = {}

    def epoch(self, record: Mapping[str, Any], rates: Mapping[str, float]) -> None:
        """Log a line of metrics.jsonl, and the learning rates by group at its last step."""
        self._call("log", scalars(record, rates), record["steps"], "steps")

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Log the final metrics of the summary."""
        values = {name: summary[name] for name in _FINAL if isinstance(summary.get(name), int | float)}
        self._call("finish", values, summary["steps"], "finished")

    def _call(self, method: str, values: Mapping[str, float], step: int, key: str) -> None:
        """Call a method of each tracker, unless it was called at this step; `key` stores its last step."""
        for name, tracker in list(self._open.items()):
            state = self._state[name]
            if step > state.get(key, -1) and self._try(name, partial(getattr(tracker, method), values, step)):
                state[key] = step
        self._save_state()

    def _try(self, name: str, call: Callable[[], None]) -> bool:
        """Call, and return whether it succeeded; a tracker that fails is closed."""
        try:
            call()
        except Exception as error:  # no failure of a tracker may end the run
            self._open.pop(name, None)
            self._print(f"warning: {name} failed, training continues without it: {one_line(error)}")
            return False
        return True

    def _save_state(self) -> None:
        if self._names:
            atomic_write_text(self._folder.trackers, json.dumps(self._state) + "\n")


def scalars(record: Mapping[str, Any], rates: Mapping[str, float]) -> dict[str, float]:
    """The values of an epoch by tracker name: train/..., val/..., lr/<group>, epoch."""
    found: dict[str, float] = {"epoch": record["epoch"], "train/images_per_second": record["images_per_second"]}
    for key, value in record.items():
        part, _, name = key.partition("_")
        if part in ("train", "val") and isinstance(value, int | float):
            found[f"{part}/{name}"] = value
    return found | {f"lr/{name}": rate for name, rate in rates.items()}
