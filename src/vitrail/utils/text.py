"""Text for messages and logs: printable names, short lists, one-line errors, shapes, durations and sizes."""

from collections.abc import Iterable


def printable(name: str, limit: int = 120) -> str:
    """`name` with control characters replaced by "?", cut to `limit` characters."""
    plain = "".join(c if c.isprintable() else "?" for c in name)
    return plain if len(plain) <= limit else plain[: limit - 3] + "..."


def one_line(value: object, limit: int = 200) -> str:
    """An error or another value as one line of at most `limit` characters; the type's name if its text is empty."""
    return printable(" ".join(str(value).split()), limit) or type(value).__name__


def join_names(names: Iterable[str], limit: int = 8) -> str:
    """The first `limit` names separated by commas, and the number of the remaining ones."""
    names = [printable(name) for name in names]
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def format_shape(shape: Iterable[int]) -> str:
    """ "3x4x5"; "scalar" for a tensor without dimensions."""
    return "x".join(str(size) for size in shape) or "scalar"


def format_duration(seconds: float) -> str:
    """ "12 s", "3 m 05 s" or "2 h 07 m"."""
    total = round(seconds)
    if total < 60:
        return f"{total} s"
    return f"{total // 60} m {total % 60:02d} s" if total < 3600 else f"{total // 3600} h {total % 3600 // 60:02d} m"


def format_bytes(count: float) -> str:
    """ "14.4 kB", "2.5 MB", "3.2 GB" or "1.5 TB": decimal units, three digits."""
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if count >= size:
            return f"{count / size:.3g} {unit}" if count < 999.5 * size else f"{count / size:.0f} {unit}"
    return f"{count / 1e3:.3g} kB"
