"""Output of the commands: JSON, tables and text; nothing is truncated if stdout is not a terminal."""

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.cells import cell_len, set_cell_size
from rich.table import Table
from rich.text import Text

from vitrail.utils.console import PlainConsole, plain_text
from vitrail.utils.streams import lossy
from vitrail.utils.text import plain_json

_PIPE_WIDTH = 10_000  # columns if stdout is not a terminal


def stdout() -> PlainConsole:
    """The console for results."""
    terminal = sys.stdout.isatty()
    return PlainConsole(file=sys.stdout, width=None if terminal else _PIPE_WIDTH, highlight=False, markup=False)


def stderr() -> PlainConsole:
    """The console for messages; long lines are not wrapped."""
    return PlainConsole(file=lossy(sys.stderr), highlight=False, markup=False, soft_wrap=True)


def print_json(value: Any) -> None:
    """Print indented JSON to stdout."""
    print(plain_json(json.dumps(value, indent=2, ensure_ascii=False)))


def print_skipped(skipped: Iterable[Mapping[str, str]]) -> None:
    """List the images that could not be read, {"path", "reason"} each, on stderr."""
    for each in skipped:
        stderr().print(f"skipped: {each['path']} {each['reason']}", style="yellow")


def table(headers: Sequence[tuple[str, str]], rows: Iterable[Sequence[str | Text]], width: int | None = None) -> Table:
    """A table without borders. headers: title and alignment ("<" or ">") of each column.

    width: truncate the last column so that the table fits.
    """
    cells = [[plain_text(cell) for cell in row] for row in rows]
    result = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    used = 0
    for column, (title, align) in enumerate(headers):
        last = column == len(headers) - 1
        for row in cells if last and width is not None else ():
            row[column].truncate(max((width or 0) - used, 1), overflow="ellipsis")
        used += max(cell_len(text) for text in (title, *(row[column].plain for row in cells))) + 2
        result.add_column(title, justify="left" if align == "<" else "right", no_wrap=True)
    for row in cells:
        result.add_row(*row)
    return result


def end_of(path: str, width: int) -> str:
    """The path, with its beginning truncated to `width` columns."""
    if cell_len(path) <= width:
        return path
    while cell_len(path) > width - 1:
        path = path[1:]
    return "…" + path


def cut(text: str, width: int) -> str:
    """The text truncated to `width` columns."""
    return text if cell_len(text) <= width else set_cell_size(text, width - 1).rstrip() + "…"


def percent(share: float | None, digits: int = 1) -> str:
    """A percentage (0 to 100) with a fixed number of digits; a dash for None."""
    return "–" if share is None else f"{share:.{digits}f} %"
