"""TrainState: how far a run has come. A checkpoint stores all of it."""

from dataclasses import dataclass


@dataclass
class TrainState:
    """How far a run has come. A checkpoint keeps all of it."""

    epoch: int = 0  # the one that is being done, from 0
    step: int = 0  # steps done in it
    steps: int = 0  # steps done in all
    images: int = 0  # images learnt from in all
    epoch_images: int = 0  # and in this epoch
    seconds: float = 0.0  # of the clock, in all sessions of the run
    step_seconds: float = 0.0  # of these in steps, and not in validation or in writing checkpoints
    wait_seconds: float = 0.0  # of these waiting for images
    validation_seconds: float = 0.0  # kept of a budget for the last validation, by the longest or an estimate
    factor: float = 0.0  # what the peak learning rates were multiplied by in the last step
    skipped: int = 0  # steps in all whose loss or gradient was not finite: they changed nothing
    in_a_row: int = 0  # of these, the last ones without a good one since
    rollbacks: int = 0  # returns to an earlier place for it
    rate: float = 1.0  # what the learning rates are multiplied by since then

    @property
    def spent(self) -> float:
        """Seconds of a budget that are no longer there for steps, as the last validation wants its share."""
        return self.seconds + self.validation_seconds
