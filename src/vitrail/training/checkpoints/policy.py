"""When a checkpoint is due."""

from vitrail.training.config.schema import TrainConfig
from vitrail.training.engine.state import TrainState

_DEFAULT_STEPS = 200  # between two checkpoints, without checkpoint_every
_MIN_COST_RATIO = 50  # then also this many times the duration of the last one: saving takes 2 % of the time at most


class CheckpointPolicy:
    """Decides from the TrainState alone, so that all processes decide the same.

    cost: seconds that the last checkpoint took, on rank 0's clock.
    """

    def __init__(self, config: TrainConfig) -> None:
        self.every = config.io.checkpoint_every
        self.minutes = config.io.checkpoint_minutes
        self.cost = 0.0
        self._last = TrainState()

    @property
    def steps(self) -> int:
        """Steps at the last checkpoint, or at the start of the run."""
        return self._last.steps

    def due(self, state: TrainState) -> bool:
        """Whether a checkpoint is due. Never after a bad step: a rollback must go back to before it."""
        steps, seconds = state.steps - self._last.steps, state.seconds - self._last.seconds
        cheap = steps >= _DEFAULT_STEPS and seconds >= _MIN_COST_RATIO * self.cost
        by_steps = cheap if self.every is None else 0 < self.every <= steps
        by_time = self.minutes and steps and seconds >= 60 * self.minutes
        return bool(by_steps or by_time) and not state.consecutive_bad_steps

    def is_saved(self, state: TrainState) -> bool:
        """Whether the last checkpoint is of this state."""
        return _position(state) == _position(self._last)

    def record(self, state: TrainState) -> None:
        """Note that there is a checkpoint of this state."""
        self._last = TrainState(**vars(state))


def _position(state: TrainState) -> tuple[int, ...]:
    return state.epoch, state.step, state.steps, state.rollbacks
