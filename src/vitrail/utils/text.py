"""Text for messages and logs: names from elsewhere made printable, lists cut short, durations and sizes."""

from collections.abc import Iterable


def shape_words(shape: Iterable[int]) -> str:
    """3x4x5; "a number" for a tensor of no dimensions."""
    return "x".join(str(size) for size in shape) or "a number"


def show(name: str, limit: int = 120) -> str:
    """A stranger's name made fit for one line of text: no control characters, and not without end."""
    plain = "".join(c if c.isprintable() else "?" for c in name)
    return plain if len(plain) <= limit else plain[: limit - 3] + "..."


def listing(names: Iterable[str], limit: int = 8) -> str:
    """The first names, and how many more there are."""
    names = [show(name) for name in names]
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
