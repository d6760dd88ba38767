"""Early stopping: by `patience`, and by callbacks, which see every epoch."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from vitrail.errors import ConfigError
from vitrail.training.checkpoints.best import BestWeights


@dataclass(frozen=True)
class EpochState:
    """What a callback sees at the end of an epoch.

    epoch: from 1. metrics: the epoch's record in metrics.jsonl: train_loss, lr, seconds, and where the epoch was
    validated val_top1, val_loss and others. best_epoch: with the best validation so far, 0 for none; best_top1
    (percent) and best_loss: of it, or None. folder: the run folder.
    """

    epoch: int
    metrics: Mapping[str, Any]
    best_epoch: int
    best_top1: float | None
    best_loss: float | None
    folder: Path


class Callback(Protocol):
    """An object with `on_epoch_end`."""

    def on_epoch_end(self, state: EpochState) -> str | None:
        """Called after every epoch. Return "stop" to end the training after it, None to go on."""


def check_callbacks(callbacks: Any) -> tuple[Callback, ...]:
    """The callbacks as a tuple. Raises ConfigError for an object without `on_epoch_end`."""
    found = tuple(callbacks or ())
    for callback in found:
        if not callable(getattr(callback, "on_epoch_end", None)):
            raise ConfigError(f"callbacks: {type(callback).__name__} has no method on_epoch_end(state)")
    return found


def early_stop(
    callbacks: tuple[Callback, ...], patience: int | None, record: Mapping[str, Any], best: BestWeights, folder: Path
) -> str:
    """Why the run ends after the epoch of this record, by a callback or by `patience`; "" if it does not.

    Raises:
        ConfigError: a callback returned neither None nor "stop".
    """
    top1, loss = (best.top1, best.loss) if best.epoch else (None, None)
    state = EpochState(record["epoch"], dict(record), best.epoch, top1, loss, folder)
    reason = ""
    for callback in callbacks:
        answer = callback.on_epoch_end(state)
        if answer not in (None, "stop"):
            name = f"{type(callback).__name__}.on_epoch_end"
            raise ConfigError(f'{name} returned {answer!r}: return "stop" or None')
        if answer == "stop" and not reason:
            reason = f"asked to by {type(callback).__name__}"
    if not reason and patience is not None and "val_loss" in record and state.epoch - best.epoch >= patience:
        reason = f"no better validation than that of epoch {best.epoch} in {patience} epochs"
    return reason
