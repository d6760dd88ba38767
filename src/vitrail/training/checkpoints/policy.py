"""When a checkpoint is due, what it is of, and how its tensors come to all processes."""

import hashlib
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from vitrail.data.dataset import Dataset
from vitrail.training.checkpoints.checkpoint import Checkpoint
from vitrail.training.config.schema import TrainConfig
from vitrail.training.engine.state import TrainState
from vitrail.utils.distributed import DistributedContext

_EVERY = 200  # steps, where nobody says
_WORTH = 50  # then also this many times as long as the last one took: saving costs 2 % of the time at most


@dataclass
class Best:
    """The weights with the best validation so far: the highest score, of equal ones the lowest loss.

    The score is the top-1, or the mean of the classes' own where the run balances them.
    """

    epoch: int = 0  # from 1; 0: none yet
    top1: float = -1.0
    loss: float = float("inf")
    weights: dict[str, Tensor] = field(default_factory=dict)
    score: float | None = None  # None: the top-1

    def beaten_by(self, score: float, loss: float) -> bool:
        """Whether these figures are better."""
        mine = self.top1 if self.score is None else self.score
        return (score, -loss) > (mine, -self.loss)


class CheckpointPolicy:
    """Decides from a place alone, so that all processes decide alike.

    cost: seconds that the last checkpoint took, by the first process's clock.
    """

    def __init__(self, config: TrainConfig) -> None:
        self.every = config.io.checkpoint_every
        self.minutes = config.io.checkpoint_minutes
        self.cost = 0.0
        self._last = TrainState()

    @property
    def steps(self) -> int:
        """Steps at the last checkpoint, or at the run's beginning."""
        return self._last.steps

    def now(self, state: TrainState) -> bool:
        """Whether it is time. Never amid steps that were left out: the last good checkpoint must be from before."""
        steps, seconds = state.steps - self._last.steps, state.seconds - self._last.seconds
        worth = steps >= _EVERY and seconds >= _WORTH * self.cost
        by_steps = worth if self.every is None else 0 < self.every <= steps
        by_time = self.minutes and steps and seconds >= 60 * self.minutes
        return bool(by_steps or by_time) and not state.in_a_row

    def saved(self, state: TrainState) -> bool:
        """Whether the last checkpoint is of this very place."""
        return _where(state) == _where(self._last)

    def start(self, state: TrainState) -> None:
        """A checkpoint of this place stands, or the run begins here."""
        self._last = TrainState(**vars(state))

    @contextmanager
    def saving(self, state: TrainState) -> Iterator[None]:
        """Around the writing of a checkpoint."""
        begin = time.perf_counter()
        yield
        self.cost = time.perf_counter() - begin
        self.start(state)


def _where(state: TrainState) -> tuple[int, ...]:
    return state.epoch, state.step, state.steps, state.rollbacks


def copied(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copies on the CPU."""
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}


def everywhere(
    tensors: dict[str, dict[str, Tensor]], distributed: DistributedContext
) -> Iterator[tuple[str, str, Tensor]]:
    """Part, name and tensor of what the first process has, in each, one at a time. What the others pass is ignored."""
    items = [(part, name, value) for part, values in tensors.items() for name, value in values.items()]
    if distributed.world_size == 1:
        yield from items
        return
    kinds = distributed.broadcast_object([(part, name, tuple(value.shape), value.dtype) for part, name, value in items])
    for number, (part, name, shape, dtype) in enumerate(kinds):
        mine = items[number][2].cpu().contiguous() if distributed.is_main else torch.empty(shape, dtype=dtype)
        yield part, name, distributed.broadcast(mine)


def without_best(checkpoint: Checkpoint) -> dict[str, dict[str, Tensor]]:
    """What a trainer takes up."""
    return {part: tensors for part, tensors in checkpoint.tensors.items() if part != "best"}


def fingerprint(dataset: Dataset) -> str:
    """A word that changes when the training or validation images, their order or their labels do.

    Images go by the last two parts of their names, so that a folder may move.
    """
    digest = hashlib.blake2b(digest_size=8)
    for name in ("train", "val"):
        split = dataset.splits.get(name)
        if split is not None:
            digest.update(np.ascontiguousarray(split.labels).tobytes())
            names = ("/".join(split.name(i).split(os.sep)[-2:]) for i in range(len(split)))
            digest.update("\n".join(names).encode("utf-8", "surrogateescape"))
    return digest.hexdigest()
