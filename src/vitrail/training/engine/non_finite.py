"""Steps whose loss or gradient is not finite: they are skipped and counted, and several in succession cause a rollback.

A single bad step changes nothing, and training continues with the next batch. `MAX_CONSECUTIVE_BAD_STEPS` in succession
mean that the weights themselves have diverged: the run goes back to its last checkpoint and continues at
`ROLLBACK_LR_SCALE` times the learning rate. Batches and augmentation are the same again; only the rate differs. After
`MAX_ROLLBACKS` of these the run ends with an error.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from vitrail.training.engine.parallel import to_local
from vitrail.training.engine.state import TrainState

MAX_CONSECUTIVE_BAD_STEPS = 3
MAX_ROLLBACKS = 3
ROLLBACK_LR_SCALE = 0.5
_FLUSH_EVERY = 16  # steps; reading waits for the device


@dataclass(frozen=True)
class BadStep:
    """A skipped step. step: from 1. lr: the largest of its learning rates."""

    step: int
    lr: float
    loss: float


@dataclass(frozen=True)
class _PendingStep:
    state: TrainState
    step: int
    lr: float
    images: int
    finite: Tensor
    loss: Tensor


def copy_if_finite(target: Tensor, value: Tensor, found_inf: Tensor | None) -> None:
    """Copy `value` into `target`, both possibly sharded, unless `found_inf` (one value) is given and not 0."""
    target, value = to_local(target), to_local(value)
    target.copy_(value if found_inf is None else torch.where(found_inf == 0, value, target))


class NonFiniteGuard:
    """Records for each step whether it was finite; reads the records every few steps, or at once if `synchronous`.

    bad_steps: the latest consecutive ones. rolled_back: those that caused each rollback, in this session.
    """

    def __init__(self, synchronous: bool) -> None:
        self.synchronous = synchronous
        self.bad_steps: list[BadStep] = []
        self.rolled_back: list[list[BadStep]] = []
        self._pending: list[_PendingStep] = []

    def record(self, state: TrainState, lr: float, finite: Tensor, loss: Tensor, images: int) -> None:
        """Record a step: whether it is finite, its mean loss, and its images, which are subtracted again if it turns
        out not to be."""
        self._pending.append(_PendingStep(state, state.steps + 1, lr, images, finite, loss))

    def flush_if_due(self) -> None:
        """Read the records if that costs nothing, or there are many."""
        if self.synchronous or len(self._pending) >= _FLUSH_EVERY:
            self.flush()

    def flush(self) -> None:
        """Read the records and update the counters. Waits for the device."""
        pending, self._pending = self._pending, []
        if not pending:
            return
        finite = torch.stack([step.finite for step in pending]).tolist()
        for step, good in zip(pending, finite, strict=True):
            state = step.state
            if good:
                state.consecutive_bad_steps = 0
                self.bad_steps = []
                continue
            state.skipped += 1
            state.consecutive_bad_steps += 1
            state.images -= step.images
            state.epoch_images -= step.images
            self.bad_steps.append(BadStep(step.step, step.lr, float(step.loss)))

    def record_rollback(self) -> tuple[int, int]:
        """Note that the run was rolled back. Returns the first and the last of the bad steps that caused it."""
        steps, self.bad_steps = self.bad_steps, []
        self.rolled_back.append(steps)
        return steps[0].step, steps[-1].step

    def failure_message(self, checkpoint_step: int, rollbacks: int, bf16: bool) -> str:
        """Why a run ends, in one line: steps, losses and learning rates, and what to try."""
        first, last = self.bad_steps[0], self.bad_steps[-1]
        losses = sorted({f"{step.loss:.4g}" for step in self.bad_steps})
        kind = "loss" if any(loss in ("nan", "inf", "-inf") for loss in losses) else "gradient"
        rates = [f"{steps[-1].lr:.3g}" for steps in [*self.rolled_back, self.bad_steps] if steps]
        same = len(self.rolled_back) > 1 and all(steps and steps[0].step == first.step for steps in self.rolled_back)
        advice = f"start a new run with a lower lr, more warmup_epochs or clip_grad=1{', or amp=off' if bf16 else ''}"
        if same:
            advice += "; as the same steps fail each time, check the images and the model too"
        return (
            f"the {kind} is not finite in steps {first.step} to {last.step} (loss {', '.join(losses)}), also after "
            f"{rollbacks} rollbacks to step {checkpoint_step} at half the learning rate (lr {', '.join(rates)}): "
            f"{advice}"
        )
