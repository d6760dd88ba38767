"""Figures sent elsewhere while a run goes on: TensorBoard, Weights & Biases, Trackio.

A tracker only listens. One that fails is told of once, and the run goes on without it. Every figure is sent once, at
its number of steps, also of a run that is stopped and taken up again: trackers.json keeps how far each was told.
"""

import json
import os
import secrets
from collections.abc import Callable, Mapping
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from types import TracebackType
from typing import Any, Protocol, Self

from vitrail.errors import VitrailError
from vitrail.training.checkpoints.run_folder import RunFolder
from vitrail.utils.files import atomic_write_text
from vitrail.utils.text import one_line

_FINAL = ("top1", "top5", "loss", "ece", "best_epoch", "epochs", "seconds", "images_per_second", "params")
_PROJECT = "vitrail"  # where Weights & Biases and Trackio file a run, unless the environment says otherwise


class Tracker(Protocol):
    """What can be told of a run. Names are such as train/loss and lr/head."""

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Figures after `step` optimiser steps. On return they are on the disk, or with a process of their own."""
        ...

    def finish(self, values: Mapping[str, float], step: int) -> None:
        """The figures of the finished run."""
        ...

    def close(self) -> None:
        """No more will come in this session."""
        ...


class TensorBoard:
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

    def finish(self, values: Mapping[str, float], step: int) -> None:
        self.log({f"final/{name}": value for name, value in values.items()}, step)

    def close(self) -> None:
        self._writer.close()


class WandB:
    """A run of Weights & Biases, whose own environment variables count (WANDB_PROJECT, WANDB_MODE=offline, ...)."""

    def __init__(self, folder: RunFolder, config: Mapping[str, Any], state: dict[str, Any]) -> None:
        wandb = import_module("wandb")
        state.setdefault("id", secrets.token_hex(4))
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", _PROJECT),
            name=folder.path.name,
            id=state["id"],
            resume="allow",
            dir=str(folder.path),
            config=dict(config),
        )

    def log(self, values: Mapping[str, float], step: int) -> None:
        self._run.log(dict(values), step=step)

    def finish(self, values: Mapping[str, float], step: int) -> None:
        self._run.summary.update({f"final/{name}": value for name, value in values.items()})

    def close(self) -> None:
        self._run.finish()


class Trackio:
    """A run of Trackio, on this machine or in the Space that TRACKIO_SPACE_ID names."""

    def __init__(self, folder: RunFolder, config: Mapping[str, Any], state: dict[str, Any]) -> None:
        trackio = import_module("trackio")
        state.setdefault("name", f"{folder.path.name}-{secrets.token_hex(4)}")
        self._run = trackio.init(
            project=os.environ.get("TRACKIO_PROJECT", _PROJECT),
            name=state["name"],
            resume="allow",
            config=dict(config),
        )

    def log(self, values: Mapping[str, float], step: int) -> None:
        self._run.log(dict(values), step=step)

    def finish(self, values: Mapping[str, float], step: int) -> None:
        self.log({f"final/{name}": value for name, value in values.items()}, step)

    def close(self) -> None:
        self._run.finish()


_KINDS: dict[str, Callable[[RunFolder, Mapping[str, Any], dict[str, Any]], Tracker]] = {
    "tensorboard": TensorBoard,
    "wandb": WandB,
    "trackio": Trackio,
}


def tracker_names(track: str) -> list[str]:
    """The names in the config's `track`, which may be "none"."""
    return [] if track == "none" else track.split(",")


def check_trackers(track: str) -> None:
    """Raise VitrailError for a tracker that is not installed."""
    for name in tracker_names(track):
        if find_spec(name) is None:
            raise VitrailError(f"track={name} needs a package that is not here: pip install 'vitrail[{name}]'")


class Trackers:
    """All trackers of a run, from when it is entered. `say` is told once of each that fails."""

    def __init__(self, track: str, folder: RunFolder, config: Mapping[str, Any], say: Callable[[str], None]) -> None:
        self._names = tracker_names(track)
        self._folder = folder
        self._config = config
        self._say = say
        self._open: dict[str, Tracker] = {}
        self._state: dict[str, dict[str, Any]] = {}

    def __enter__(self) -> Self:
        if self._names and self._folder.trackers.exists():
            self._state = json.loads(self._folder.trackers.read_text(encoding="utf-8"))
        for name in self._names:
            self._guarded(name, partial(self._start, name))
        self._keep()
        return self

    def _start(self, name: str) -> None:
        self._open[name] = _KINDS[name](self._folder, self._config, self._state.setdefault(name, {}))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for name, tracker in list(self._open.items()):
            self._guarded(name, tracker.close)
        self._open = {}

    def epoch(self, record: Mapping[str, Any], rates: Mapping[str, float]) -> None:
        """A line of metrics.jsonl, and the learning rates by group as of its last step."""
        self._tell(figures(record, rates), record["steps"], lambda tracker: tracker.log)

    def finish(self, summary: Mapping[str, Any]) -> None:
        """The run's summary."""
        values = {name: summary[name] for name in _FINAL if isinstance(summary.get(name), int | float)}
        self._tell(values, summary["steps"], lambda tracker: tracker.finish, key="finished")

    def _tell(
        self,
        values: Mapping[str, float],
        step: int,
        how: Callable[[Tracker], Callable[[Mapping[str, float], int], None]],
        key: str = "steps",
    ) -> None:
        for name, tracker in list(self._open.items()):
            state = self._state[name]
            if step > state.get(key, -1) and self._guarded(name, partial(how(tracker), values, step)):
                state[key] = step
        self._keep()

    def _guarded(self, name: str, call: Callable[[], None]) -> bool:
        """Whether the call went well."""
        try:
            call()
        except Exception as error:  # whatever it is, the run is worth more
            self._open.pop(name, None)
            words = one_line(error)
            self._say(f"warning: {name} failed, and the run goes on without it: {words}")
            return False
        return True

    def _keep(self) -> None:
        if self._names:
            atomic_write_text(self._folder.trackers, json.dumps(self._state) + "\n")


def figures(record: Mapping[str, Any], rates: Mapping[str, float]) -> dict[str, float]:
    """An epoch's figures by the names that trackers group: train/..., val/..., lr/<group>, epoch."""
    found: dict[str, float] = {"epoch": record["epoch"], "train/images_per_second": record["images_per_second"]}
    for key, value in record.items():
        part, _, name = key.partition("_")
        if part in ("train", "val") and isinstance(value, int | float):
            found[f"{part}/{name}"] = value
    return found | {f"lr/{name}": rate for name, rate in rates.items()}
