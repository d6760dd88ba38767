"""Training progress on stderr: a progress bar in a terminal, plain lines elsewhere.

Reading the loss synchronises with the device, so it happens at most a few times per second.
"""

import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import Self

from rich.progress import BarColumn, Progress, TextColumn

from vitrail.training.engine.state import TrainState
from vitrail.training.engine.trainer import Trainer
from vitrail.utils.console import PlainConsole
from vitrail.utils.streams import lossy
from vitrail.utils.text import format_duration

_BAR_SECONDS = 0.25  # between two updates of the bar
_LINE_SECONDS = 10.0  # between two lines without a terminal
_EPOCH_SECONDS = 2.0  # between two epoch lines without a terminal


class Reporter:
    """Prints steps, epochs and messages of a run; nothing if `enabled` is False."""

    def __init__(self, enabled: bool = True) -> None:
        self.console = PlainConsole(file=lossy(sys.stderr), quiet=not enabled)
        self._bar: Progress | None = None
        self._every = _BAR_SECONDS if self.console.is_terminal else _LINE_SECONDS
        self._last = 0.0
        self._last_epoch = float("-inf")

    def log(self, text: str) -> None:
        """Print a line above the bar."""
        self.console.print(text, highlight=False, markup=False, soft_wrap=not self.console.is_terminal)

    def __enter__(self) -> Self:
        self._last = time.perf_counter()
        if not self.console.quiet and self.console.is_terminal:
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=6),
                TextColumn("{task.fields[status]}", markup=False),
                console=self.console,
                auto_refresh=False,
                transient=True,
            )
            self._bar.add_task("training", total=1.0, status="")
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar:
            self._bar.stop()
            self._bar = None

    def step(self, trainer: Trainer) -> None:
        """Call after every training step."""
        state = trainer.state
        done = trainer.schedule.progress(state.steps, state.spent)
        self.update(f"epoch {state.epoch + 1}", done, state, lambda: f"  loss {trainer.mean_loss():.4f}")

    def update(self, title: str, done: float, state: TrainState, extra: Callable[[], str] = lambda: "") -> None:
        """Show the progress `done`, 0 to 1; at most every `_BAR_SECONDS`, or every `_LINE_SECONDS` without a terminal.

        extra: further text, which is computed only when it is shown.
        """
        now = time.perf_counter()
        if self.console.quiet or now - self._last < self._every:
            return
        self._last = now
        status = describe(done, state, extra())
        if self._bar:
            self._bar.update(self._bar.task_ids[0], description=title, completed=done, status=status, refresh=True)
        else:
            self.log(f"{title}  {status}")

    def epoch(self, line: str, last: bool) -> None:
        """Print the line of a finished epoch; without a terminal, at most one every two seconds, and the last one."""
        now = time.perf_counter()
        if self._bar or last or now - self._last_epoch >= _EPOCH_SECONDS:
            self._last = self._last_epoch = now
            self.log(line)


def describe(done: float, state: TrainState, extra: str = "") -> str:
    """Progress, throughput, remaining time and share of the time spent waiting for data, in one line."""
    left = format_duration(state.seconds * (1 - done) / done if done else 0.0)
    rate = f"{state.images_per_second:,.0f} images/s"
    return f"{done:4.0%}{extra}  {rate}  {left} left  data wait {state.waiting_for_data:.0%}"
