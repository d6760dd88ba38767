"""Output of rich whose text from outside, such as file and class names, has no control characters."""

from __future__ import annotations

import sys
from typing import Any

from rich.console import Console
from rich.text import Text

from vitrail.utils.text import plain


def in_notebook() -> bool:
    """Whether this is a kernel of Jupyter."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return type(shell).__name__ == "ZMQInteractiveShell"


class PlainConsole(Console):
    """A console that prints control characters in strings as escapes. Texts with a style are passed through
    `plain_text` first."""

    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(plain(text), **options)


def plain_text(value: str | Text) -> Text:
    """A string or a text with a style, without control characters."""
    if isinstance(value, str):
        return Text(plain(value))
    if plain(value.plain) != value.plain:
        value.plain = plain(value.plain)
    return value
