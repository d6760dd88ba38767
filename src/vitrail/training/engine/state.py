"""TrainState: the progress of a run."""

from dataclasses import dataclass


@dataclass
class TrainState:
    """The progress of a run. A checkpoint stores all of it."""

    epoch: int = 0  # the current one, from 0
    step: int = 0  # steps done in it
    steps: int = 0  # steps done in all
    images: int = 0  # training images in all, without skipped steps
    epoch_images: int = 0  # of these in this epoch
    seconds: float = 0.0  # wall clock, in all sessions of the run
    step_seconds: float = 0.0  # of these in training steps
    wait_seconds: float = 0.0  # of these waiting for images
    validation_seconds: float = 0.0  # reserved of a budget for the last validation: the longest so far, or an estimate
    factor: float = 0.0  # of the peak learning rates, in the last step
    skipped: int = 0  # steps whose loss or gradient was not finite: they changed nothing
    consecutive_bad_steps: int = 0  # of these, since the last finite step
    rollbacks: int = 0  # to an earlier checkpoint, because of them
    lr_scale: float = 1.0  # of all learning rates, since the last rollback
    stopped: str = ""  # why the run ended before the end of its schedule
    stopped_of: int | None = None  # the steps of that schedule

    @property
    def images_per_second(self) -> float:
        """Training images a second, without validation and checkpoints."""
        return self.images / self.step_seconds if self.step_seconds else 0.0

    @property
    def waiting_for_data(self) -> float:
        """The share of the time of training steps that was spent waiting for images, 0 to 1."""
        return self.wait_seconds / self.step_seconds if self.step_seconds else 0.0

    @property
    def spent(self) -> float:
        """Seconds of a budget that are used up or reserved for the last validation."""
        return self.seconds + self.validation_seconds
