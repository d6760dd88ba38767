"""Steps whose loss or gradient is not finite: they are left out, counted, and after a few in a row not put up with.

A single one is harmless: it changes nothing, and the next batch is learnt from as if it had not been. `TOLERATED` in a
row mean that the weights themselves have gone astray: the run returns to its last checkpoint and goes on from there at
`LOWER` times the rate. Its randomness is counted, so it meets the same batches and the same views again; the rate is
what differs. After `RETURNS` of these it ends, and says what happened.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

TOLERATED = 3  # bad steps in a row
RETURNS = 3
LOWER = 0.5
_READ_EVERY = 16  # steps; reading waits for the device


class Counts(Protocol):
    """What the guard counts in: a run's place."""

    steps: int
    images: int
    epoch_images: int
    skipped: int
    in_a_row: int


@dataclass(frozen=True)
class Bad:
    """A step that was left out. step: from 1. lr: the largest of its learning rates."""

    step: int
    lr: float
    loss: float


@dataclass(frozen=True)
class _Note:
    state: Counts
    step: int
    lr: float
    images: int
    finite: Tensor
    loss: Tensor


class NonFiniteGuard:
    """Notes of each step whether it was finite, and reads the notes now and then, or at once where that costs nothing.

    row: the bad steps in a row that were met last. rows: those that led to a return, in this session.
    """

    def __init__(self, reads_at_once: bool) -> None:
        self.reads_at_once = reads_at_once
        self.row: list[Bad] = []
        self.rows: list[list[Bad]] = []
        self._notes: list[_Note] = []

    def note(self, state: Counts, lr: float, finite: Tensor, loss: Tensor, images: int) -> None:
        """Of the step that is being done: whether it is finite, its mean loss, and its images, which count as learnt
        from until it is read that they are not."""
        self._notes.append(_Note(state, state.steps + 1, lr, images, finite, loss))

    def read_if_due(self) -> None:
        """Read where it costs nothing, or is time."""
        if self.reads_at_once or len(self._notes) >= _READ_EVERY:
            self.read()

    def read(self) -> None:
        """Count what has been noted. Waits for the device."""
        notes, self._notes = self._notes, []
        if not notes:
            return
        finite = [bool(notes[0].finite)] if len(notes) == 1 else torch.stack([note.finite for note in notes]).tolist()
        for note, good in zip(notes, finite, strict=True):
            state = note.state
            if good:
                state.in_a_row = 0
                self.row = []
                continue
            state.skipped += 1
            state.in_a_row += 1
            state.images -= note.images
            state.epoch_images -= note.images
            self.row.append(Bad(note.step, note.lr, float(note.loss)))

    def returned(self) -> tuple[int, int]:
        """The run has gone back for the last row, of which this is the first and the last step."""
        row, self.row = self.row, []
        self.rows.append(row)
        return row[0].step, row[-1].step

    def account(self, back_to: int, returns: int, bf16: bool) -> str:
        """Why a run ends, in one line: which steps, losses and rates, and what to try."""
        first, last = self.row[0], self.row[-1]
        losses = sorted({f"{bad.loss:.4g}" for bad in self.row})
        kind = "loss" if any(loss in ("nan", "inf", "-inf") for loss in losses) else "gradient"
        rates = [f"{row[-1].lr:.3g}" for row in [*self.rows, self.row] if row]
        same = len(self.rows) > 1 and all(row and row[0].step == first.step for row in self.rows)
        advice = f"begin anew, and use a lower lr, more warmup_epochs or clip_grad=1{', or amp=off' if bf16 else ''}"
        if same:
            advice += "; as it is the same step each time, look at the images and the model too"
        return (
            f"the {kind} is not finite in steps {first.step} to {last.step} (loss {', '.join(losses)}), also after "
            f"{returns} returns to step {back_to} at half the rate (lr {', '.join(rates)}): {advice}"
        )
