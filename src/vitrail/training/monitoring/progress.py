"""Training progress on stderr: a progress bar in a terminal, plain lines elsewhere.

In a notebook, lines on stdout, one per epoch: stderr is red there, and rich would make a display of each line.

Reading the loss synchronises with the device, so it happens at most a few times per second.
"""

import math
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Self

from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from vitrail.training.engine.state import TrainState
from vitrail.training.engine.trainer import Trainer
from vitrail.utils.console import PlainConsole, in_notebook
from vitrail.utils.streams import lossy
from vitrail.utils.text import format_duration, format_speed, plain

_BAR_SECONDS = 0.25  # between two updates of the bar
_LINE_SECONDS = 10.0  # between two lines without a terminal
_MOVES = 4  # times per second that the bar is drawn in a terminal
_INDENT = 8  # columns of the first word of a plan's line
_EPOCH_SECONDS = 2.0  # between two epoch lines without a terminal


class Reporter:
    """Prints steps, epochs and messages of a run; nothing if `enabled` is False. verbose: in full."""

    def __init__(self, enabled: bool = True, verbose: bool = False) -> None:
        self.verbose = verbose
        self._notebook = in_notebook()
        stream = sys.stdout if self._notebook else sys.stderr
        # The streams of a notebook say that they are terminals, but cannot move the cursor.
        terminal = False if self._notebook else None
        self.console = PlainConsole(file=lossy(stream), quiet=not enabled, force_jupyter=False, force_terminal=terminal)
        self._bar: Progress | None = None
        self._every = _BAR_SECONDS if self.console.is_terminal else _LINE_SECONDS
        self._last = 0.0
        self._last_epoch = float("-inf")

    def log(self, text: str) -> None:
        """Print a line above the bar."""
        self.console.print(text, highlight=False, markup=False, soft_wrap=not self.console.is_terminal)

    def plan(self, lines: list[str]) -> None:
        """Print the lines of a plan; in a terminal, what does not fit continues below the text, not the first word."""
        for line in lines:
            if not self.console.is_terminal:
                self.log(line)
                continue
            indent, width = " " * _INDENT, max(self.console.width, 2 * _INDENT)
            self.log(textwrap.fill(plain(line), width, subsequent_indent=indent, break_on_hyphens=False))

    @contextmanager
    def busy(self, what: str) -> Iterator[None]:
        """While something goes on that has no steps to count: in a terminal, what it is and the time so far."""
        if self.console.quiet or not self.console.is_terminal:
            yield
            return
        columns = (SpinnerColumn("line"), TextColumn("{task.description}"), TimeElapsedColumn())
        with Progress(*columns, console=self.console, refresh_per_second=_MOVES, transient=True) as moving:
            moving.add_task(what, total=None)
            yield

    def __enter__(self) -> Self:
        self._last = time.perf_counter()
        if not self.console.quiet and self.console.is_terminal:
            self._bar = Progress(
                SpinnerColumn("line"),
                TextColumn("{task.description}"),
                BarColumn(bar_width=6),
                TextColumn("{task.fields[status]}", markup=False),
                console=self.console,
                refresh_per_second=_MOVES,
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
        done = trainer.schedule.progress(state.steps, state.spent)  # of the whole run
        title = epoch_title(state.epoch + 1, trainer.config.schedule.epochs)
        self.update(title, done, state, lambda: f"  loss {trainer.mean_loss():.4f}")

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
        """Print the line of a finished epoch; without a terminal or notebook, one every two seconds, and the last."""
        now = time.perf_counter()
        if self._bar or self._notebook or last or now - self._last_epoch >= _EPOCH_SECONDS:
            self._last = self._last_epoch = now
            self.log(line)


def epoch_title(number: int, epochs: float | None) -> str:
    """Such as "epoch 1/10". epochs: of the run; None where a time budget ends it."""
    return f"epoch {number}" if epochs is None else f"epoch {number}/{math.ceil(epochs)}"


def describe(done: float, state: TrainState, extra: str = "") -> str:
    """Progress, throughput, remaining time and share of the time spent waiting for data, in one line."""
    left = f"  {format_duration(state.seconds * (1 - done) / done)} left" if done and state.seconds else ""
    rate = f"{format_speed(state.images_per_second)} images/s"
    return f"{done:4.0%}{extra}  {rate}{left}  data wait {state.waiting_for_data:.0%}"
