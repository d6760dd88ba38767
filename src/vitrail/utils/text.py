"""Text for messages and logs: text without control characters, short lists, one-line errors, durations and sizes."""

import re
from collections.abc import Iterable

# Control characters but line feed and tab, marks that reverse the writing direction, other line separators; and
# surrogates, as which Python reads the bytes of file names that are not UTF-8.
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def plain(text: str) -> str:
    """Text from outside, such as file and class names, for a terminal: control characters as escapes (\\x1b)."""
    return _CONTROL.sub(lambda found: _escape(found[0]), text)


def _escape(character: str) -> str:
    number = ord(character)
    if 0xDC80 <= number <= 0xDCFF:  # a byte of a file name
        number -= 0xDC00
    return f"\\x{number:02x}" if number < 256 else f"\\u{number:04x}"


def readable(name: str) -> str:
    """A file name as text: bytes that are not UTF-8 are read as Latin-1, and control characters escaped."""
    return _in_line("".join(chr(ord(c) - 0xDC00) if "\udca0" <= c <= "\udcff" else c for c in name))


def plain_json(text: str) -> str:
    """JSON that was written without ASCII escapes, with the characters that `plain` replaces as JSON's escapes."""
    return _CONTROL.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def _in_line(text: str) -> str:
    return plain(text).replace("\n", "\\n").replace("\t", "\\t")


def printable(name: str, limit: int = 120) -> str:
    """`name` in one line: control characters and line breaks as escapes, cut to `limit` characters."""
    text = _in_line(name)
    return text if len(text) <= limit else text[: limit - 3] + "..."


def one_line(value: object, limit: int = 200) -> str:
    """An error or another value as one line of at most `limit` characters; the type's name if its text is empty."""
    return printable(" ".join(str(value).split()), limit) or type(value).__name__


def join_names(names: Iterable[str], limit: int = 8) -> str:
    """The first `limit` names separated by commas, and the number of the remaining ones."""
    names = [printable(name) for name in names]
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def counted(count: float, one: str, many: str = "") -> str:
    """ "1 image", "1,234 images", "0.5 epochs"; many: the plural where it is not `one` with an s."""
    return f"{f'{count:,}' if isinstance(count, int) else f'{count:g}'} {one if count == 1 else many or one + 's'}"


def format_rate(value: float) -> str:
    """A learning rate in three digits: "0.005", "2.12e-4", "5e-6"."""
    if value >= 1e-3 or not value:
        return f"{value:.3g}"
    digits, _, exponent = f"{value:.2e}".partition("e")
    return f"{digits.rstrip('0').rstrip('.')}e{int(exponent)}"


def format_speed(value: float) -> str:
    """Something per second: "1,234", "12"; below 10 in two digits: "3.4", "0.071"."""
    return f"{value:,.0f}" if value >= 9.95 else f"{value:.2g}"


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
