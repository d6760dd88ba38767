"""State that all processes share between steps: rank 0's clock, and whether any process received a signal."""

from vitrail.training.engine.state import TrainState
from vitrail.utils.distributed import DistributedContext

# Processes exchange these every few steps. So a signal takes effect, and a budget ends, at most so many steps or about
# this many seconds late, whichever is less, but one step at least. (torchrun kills 30 s after it has sent SIGTERM.)
_MAX_STEPS = 8
_MAX_SECONDS = 1.0


class ProcessSync:
    """signal: the number of a signal that any process has received, as of the last exchange; else None."""

    def __init__(self, distributed: DistributedContext) -> None:
        self.signal: int | None = None
        self._distributed = distributed
        self._next_step = 0
        self._last = (0, 0.0)  # steps and seconds at the last exchange

    def update(self, state: TrainState, seconds: float, signal: int | None, force: bool = False) -> None:
        """Set `state.seconds` and `signal` to the same in all processes, if an exchange is due or forced.

        seconds, signal: those of this process.
        """
        if self._distributed.world_size == 1:
            state.seconds, self.signal = seconds, signal
            return
        if state.steps < self._next_step and not force:
            return
        rows = self._distributed.all_gather_numbers(signal or 0, seconds)
        self.signal = round(max(row[0] for row in rows)) or None
        state.seconds = rows[0][1]
        steps, elapsed = state.steps - self._last[0], state.seconds - self._last[1]
        interval = steps * _MAX_SECONDS / elapsed if steps > 0 and elapsed > 0 else 1
        self._next_step = state.steps + max(1, min(_MAX_STEPS, int(interval)))
        self._last = (state.steps, state.seconds)
