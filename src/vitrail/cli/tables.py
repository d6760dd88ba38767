"""Tables and lines for people, on stdout; whole where stdout is no terminal, so that nothing is lost to a pipe."""

import sys
from collections.abc import Iterable, Sequence

from rich.cells import cell_len, set_cell_size
from rich.console import Console
from rich.table import Table
from rich.text import Text

_WIDE = 10_000  # columns of a pipe or a file


def stdout() -> Console:
    """Where results are printed."""
    terminal = sys.stdout.isatty()
    return Console(file=sys.stdout, width=None if terminal else _WIDE, highlight=False, markup=False)


def stderr() -> Console:
    """Where everything else is printed; without line breaks of our own making."""
    return Console(file=sys.stderr, highlight=False, markup=False, soft_wrap=True)


def table(headers: Sequence[tuple[str, str]], rows: Iterable[Sequence[str | Text]], width: int | None = None) -> Table:
    """A table without rules: a header and its alignment ("<" or ">") for each column, then the rows.

    With a `width`, the last column is cut to what the others leave of it.
    """
    cells = [[cell if isinstance(cell, Text) else Text(cell) for cell in row] for row in rows]
    made = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    used = 0
    for place, (title, side) in enumerate(headers):
        last = place == len(headers) - 1
        for row in cells if last and width is not None else ():
            row[place].truncate(max((width or 0) - used, 1), overflow="ellipsis")
        used += max(cell_len(text) for text in (title, *(row[place].plain for row in cells))) + 2
        made.add_column(title, justify="left" if side == "<" else "right", no_wrap=True)
    for row in cells:
        made.add_row(*row)
    return made


def end_of(path: str, width: int) -> str:
    """The path, or as much of its end as fits into `width` columns: the end tells one image from another."""
    if cell_len(path) <= width:
        return path
    while cell_len(path) > width - 1:
        path = path[1:]
    return "…" + path


def cut(text: str, width: int) -> str:
    """The text, or as much of its beginning as fits into `width` columns."""
    return text if cell_len(text) <= width else set_cell_size(text, width - 1).rstrip() + "…"


def percent(share: float | None, digits: int = 1) -> str:
    """A percentage, 0 to 100, in a fixed number of digits; a dash for none."""
    return "–" if share is None else f"{share:.{digits}f} %"
