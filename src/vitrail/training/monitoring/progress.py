"""How far a run is, for people: a bar in a terminal, now and then a line elsewhere. Always on stderr.

Drawing costs time and reading the loss waits for the device, so both happen a few times a second at most.
"""

import sys
import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn
from rich.text import Text

from vitrail.training.engine.trainer import Trainer
from vitrail.utils.text import format_duration

_BAR_SECONDS = 0.25  # between two drawings of the bar
_LINE_SECONDS = 10.0  # between two lines where there is no terminal
_EPOCH_SECONDS = 2.0  # there, between two lines on finished epochs


class Reporter:
    """Tells of a run's steps and epochs. `enabled=False` tells nothing."""

    def __init__(self, enabled: bool = True) -> None:
        self.console = Console(file=sys.stderr, quiet=not enabled)
        self._bar: Progress | None = None
        self._every = _BAR_SECONDS if self.console.is_terminal else _LINE_SECONDS
        self._last = 0.0
        self._last_epoch = float("-inf")
        self._enabled = enabled

    def say(self, text: str) -> None:
        """Print a line above the bar."""
        self.console.print(text, highlight=False, markup=False, soft_wrap=not self.console.is_terminal)

    def __enter__(self) -> Self:
        self._last = time.perf_counter()
        if self._enabled and self.console.is_terminal:
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=10),
                _Share(),
                console=self.console,
                auto_refresh=False,
                transient=True,
            )
            self._bar.add_task("training", total=1.0, share="")
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar:
            self._bar.stop()
            self._bar = None

    def step(self, trainer: Trainer) -> None:
        """To be called after every step; mostly it only looks at the clock."""
        now = time.perf_counter()
        if not self._enabled or now - self._last < self._every:
            return
        self._last = now
        words = describe(trainer)
        if self._bar:
            state = trainer.state
            done = trainer.schedule.progress(state.steps, state.spent)
            task = self._bar.task_ids[0]
            self._bar.update(task, description=f"epoch {state.epoch + 1}", completed=done, share=words, refresh=True)
        else:
            self.say(f"epoch {trainer.state.epoch + 1}  {words}")

    def epoch(self, line: str, last: bool) -> None:
        """A line for a finished epoch; without a terminal, not for every one of many short ones."""
        now = time.perf_counter()
        if self._bar or last or now - self._last_epoch >= _EPOCH_SECONDS:
            self._last = self._last_epoch = now
            self.say(line)


def describe(trainer: Trainer) -> str:
    """Share done, loss, rate, time left and share of time spent waiting for data, in one line."""
    state = trainer.state
    done = trainer.schedule.progress(state.steps, state.spent)
    left = state.seconds * (1 - done) / done if done else 0.0
    rate = state.images / state.step_seconds if state.step_seconds else 0.0
    waited = state.wait_seconds / state.step_seconds if state.step_seconds else 0.0
    return (
        f"{done:4.0%}  loss {trainer.mean_loss():.4f}  {rate:,.0f} images/s  {format_duration(left)} left"
        f"  {waited:.0%} waiting for data"
    )


class _Share(ProgressColumn):
    """The words that `describe` gives."""

    def render(self, task: Task) -> Text:
        return Text(task.fields["share"])
