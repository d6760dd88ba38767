"""Pieces of HTML for notebooks: self-contained, with inline styles, all text escaped. Importing this imports no torch.

The colours suit light and dark themes: text has the notebook's own colour, and fills are half transparent.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from vitrail.images.convert import BadImage
from vitrail.images.decode import decode
from vitrail.reports.page import escape_unprintable
from vitrail.reports.thumbnails import SIDE, thumbnail

MAX_PICTURES = 24
_MAX_MATRIX = 12  # classes of a confusion matrix
_NAME = 24  # characters of a name
_FONT = "font-family:sans-serif;font-size:13px"
_BLUE = "rgba(45, 125, 210, {:.2f})"
_CELL = "padding:2px 8px;text-align:{};border:0"


def text(value: object, limit: int | None = None) -> str:
    """Escaped text, shortened to `limit` characters."""
    plain = escape_unprintable(str(value))
    return escape(plain if limit is None or len(plain) <= limit else plain[: limit - 1] + "…")


def box(title: str, *parts: str) -> str:
    """A block with a title, which is escaped, and parts, which are HTML."""
    return f'<div style="{_FONT}"><b>{text(title)}</b>{"".join(parts)}</div>'


def figures(rows: Iterable[tuple[str, object]]) -> str:
    """A table of names and values."""
    cells = (
        f'<tr><td style="{_CELL.format("left")};opacity:.7">{text(name)}</td>'
        f'<td style="{_CELL.format("left")}">{text(value)}</td></tr>'
        for name, value in rows
    )
    return f'<table style="border-collapse:collapse;margin:4px 0">{"".join(cells)}</table>'


def picture(source: Any) -> str:
    """A thumbnail of a path, Pillow image or uint8 array H W or H W C, or an empty frame if it cannot be read."""
    frame = f"width:{SIDE}px;height:{SIDE}px;object-fit:contain;background:rgba(128,128,128,.15)"
    try:
        if isinstance(source, np.ndarray):
            grey = source.ndim == 3 and source.shape[2] == 1
            source = Image.fromarray(np.ascontiguousarray(source[..., 0] if grey else source))
        uri = thumbnail(decode(source, 3, (SIDE, SIDE)))
    except (BadImage, TypeError, ValueError, AttributeError):  # None, or more than four channels
        return f'<div style="{frame}"></div>'
    return f'<img src="{uri}" style="{frame}" alt="">'


def card(source: Any, name: str, lines: Sequence[str], color: str = "inherit") -> str:
    """A picture with a name below it in bold, and lines of text."""
    below = "".join(f'<div style="opacity:.7">{text(line, _NAME)}</div>' for line in lines)
    title = f'<div style="font-weight:bold;color:{color}">{text(name, _NAME)}</div>'
    return f'<div style="width:150px;font-size:12px">{picture(source)}{title}{below}</div>'


def gallery(cards: Sequence[str], count: int) -> str:
    """Cards side by side; count: how many there would be."""
    more = f"<div>and {count - len(cards):,} more</div>" if count > len(cards) else ""
    return f'<div style="{_FONT};display:flex;flex-wrap:wrap;gap:10px;margin:6px 0">{"".join(cards)}</div>{more}'


def confusion_table(matrix: npt.NDArray[np.int64], names: Sequence[str]) -> str:
    """A confusion matrix, rows are true classes; "" for more than a dozen classes."""
    if len(names) > _MAX_MATRIX:
        return ""
    shares = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    head = "".join(f'<th style="{_CELL.format("right")};font-weight:normal">{text(name, 10)}</th>' for name in names)
    rows = []
    style = f"{_CELL.format('right')};min-width:24px"
    for name, counts, share in zip(names, matrix.tolist(), shares.tolist(), strict=True):
        cells = "".join(
            f'<td style="{style};background:{_BLUE.format(0.75 * part)}">{count or ""}</td>'
            for count, part in zip(counts, share, strict=True)
        )
        rows.append(f'<tr><td style="{_CELL.format("left")}">{text(name, _NAME)}</td>{cells}</tr>')
    caption = "true class (rows) and predicted class (columns)"
    return (
        f'<table style="border-collapse:collapse;margin:6px 0"><caption style="text-align:left;opacity:.7">{caption}'
        f"</caption><tr><td></td>{head}</tr>{''.join(rows)}</table>"
    )
