"""Progress on stderr: a bar, or a line every ten seconds without a terminal."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_LINE_SECONDS = 10.0  # between two lines without a terminal


@contextmanager
def starting(what: str) -> Iterator[None]:
    """While something is imported or loaded: in a terminal, what it is and the time so far."""
    if not sys.stderr.isatty():
        yield
        return
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (SpinnerColumn("line"), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=Console(file=sys.stderr), refresh_per_second=4, transient=True) as moving:
        moving.add_task(what, total=None)
        yield


@contextmanager
def progress(what: str, total: int | None = None) -> Iterator[Callable[[int], None]]:
    """Yields a function to call with the number of items just done. what: their plural, such as "images"."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn

    from vitrail.utils.streams import lossy
    from vitrail.utils.text import counted, format_speed

    terminal = sys.stderr.isatty()
    columns = (SpinnerColumn("line"), BarColumn(), TextColumn("{task.fields[rate]}"), TimeRemainingColumn())
    start = last = time.perf_counter()
    done = 0
    with Progress(*columns, console=Console(file=lossy(sys.stderr)), transient=True, disable=not terminal) as bar:
        task = bar.add_task(what, total=total, rate="")

        def advance(count: int) -> None:
            nonlocal done, last
            done += count
            now = time.perf_counter()
            speed = done / max(now - start, 1e-9)
            noun, space, rest = what.partition(" ")
            rate = f"{counted(done, noun.removesuffix('s'), noun)}{space}{rest}, {format_speed(speed)} per second"
            bar.update(task, completed=done, rate=rate)
            if not terminal and now - last >= _LINE_SECONDS:
                last = now
                print(f"{rate}, of {total:,}" if total else rate, file=lossy(sys.stderr))

        yield advance
