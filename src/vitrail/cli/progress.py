"""Progress on stderr: a bar, or a line every ten seconds without a terminal."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress

_LINE_SECONDS = 10.0  # between two lines without a terminal


@contextmanager
def progress(what: str, total: int | None = None) -> Iterator[Callable[[int], None]]:
    """Yields a function to call with the number of items just done. what: their plural, such as "images"."""
    if sys.stderr.isatty():
        with _bar(what) as bar:
            task = bar.add_task(what, total=total, rate="")
            start = time.perf_counter()

            def advance(count: int) -> None:
                done = bar.tasks[0].completed + count
                bar.update(task, completed=done, rate=_rate(done, start, what))

            yield advance
    else:
        yield _lines(what, total)


def _bar(what: str) -> "Progress":
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (BarColumn(), TextColumn("{task.fields[rate]}"), TimeRemainingColumn())
    return Progress(*columns, console=Console(file=sys.stderr), transient=True)


def _lines(what: str, total: int | None) -> Callable[[int], None]:
    start = last = time.perf_counter()
    done = 0

    def advance(count: int) -> None:
        nonlocal last, done
        done += count
        if time.perf_counter() - last >= _LINE_SECONDS:
            last = time.perf_counter()
            of = f" of {total:,}" if total else ""
            print(f"{_rate(done, start, what)}{of}", file=sys.stderr)

    return advance


def _rate(done: float, start: float, what: str) -> str:
    return f"{done:,.0f} {what}, {done / max(time.perf_counter() - start, 1e-9):,.0f} a second"
