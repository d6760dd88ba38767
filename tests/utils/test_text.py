"""Text helpers: whatever the input, one short printable line."""

import pytest

from vitrail.utils.text import (
    counted,
    format_bytes,
    format_duration,
    format_rate,
    format_shape,
    join_names,
    one_line,
    printable,
)


def test_printable() -> None:
    assert printable("a\nb\x1b") == "a\\nb\\x1b"
    assert printable("x" * 10, 5) == "xx..."


def test_one_line() -> None:
    assert one_line(ValueError("two\n  lines")) == "two lines"
    assert one_line(KeyError()) == "KeyError"
    assert len(one_line("x" * 500)) == 200


def test_join_names() -> None:
    assert join_names(["a", "b"]) == "a, b"
    assert join_names("abcd", 2) == "a, b and 2 more"


def test_format_shape() -> None:
    assert format_shape((3, 4)) == "3x4"
    assert format_shape(()) == "scalar"


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0 s"), (125, "2 m 05 s"), (7629, "2 h 07 m"), (3600, "1 h 00 m")])
def test_format_duration(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


def test_format_bytes() -> None:
    assert [format_bytes(n) for n in (5, 14_400, 2_500_000, 999_999_999, 3.2e9, 7.25e11, 1.5e12)] == [
        "0.005 kB", "14.4 kB", "2.5 MB", "1000 MB", "3.2 GB", "725 GB", "1.5 TB",
    ]  # fmt: skip


def test_counted() -> None:
    assert [counted(n, "image") for n in (0, 1, 1234)] == ["0 images", "1 image", "1,234 images"]
    assert [counted(n, "epoch") for n in (0.5, 1.0, 3.0)] == ["0.5 epochs", "1 epoch", "3 epochs"]
    assert counted(2, "class", "classes") == "2 classes"


def test_format_rate() -> None:
    rates = (5e-3, 2.121e-4, 1e-4, 5e-6, 0.0)
    assert [format_rate(rate) for rate in rates] == ["0.005", "2.12e-4", "1e-4", "5e-6", "0"]
