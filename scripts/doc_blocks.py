"""The code blocks of Markdown pages, for the tests of the documentation and for its pictures."""

import re
from dataclasses import dataclass
from pathlib import Path

_BLOCK = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```", re.DOTALL | re.MULTILINE)


@dataclass(frozen=True)
class Block:
    """A fenced block: its page, first line, language and text."""

    page: Path
    line: int
    language: str
    text: str

    def code(self) -> object:
        """A block of Python, compiled such that a traceback names the page and line."""
        return compile("\n" * self.line + self.text, str(self.page), "exec")


def read_blocks(page: Path) -> list[Block]:
    """The blocks of a page, in order."""
    text = page.read_text(encoding="utf-8")
    return [Block(page, text.count("\n", 0, m.start()) + 1, m[1], m[2]) for m in _BLOCK.finditer(text)]
