"""Progress of commands without and in a terminal."""

import io
import sys

import pytest

from vitrail.cli.common import progress as module
from vitrail.cli.common.progress import progress


def test_lines_without_a_terminal(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    with progress("images", 4000) as advance:
        advance(10)  # too soon for a line
    monkeypatch.setattr(module, "_LINE_SECONDS", 0.0)
    with progress("images", 4000) as advance:
        advance(1000)
        advance(500)
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith("1,000 images, ")
    assert second.startswith("1,500 images, ")
    assert second.endswith("4,000")


def test_one_image_slowly(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_LINE_SECONDS", 0.0)
    clock = iter((0.0, 8.0))
    monkeypatch.setattr(module.time, "perf_counter", lambda: next(clock))
    with progress("images read", 2) as advance:
        advance(1)
    assert capsys.readouterr().err == "1 image read, 0.12 per second, of 2\n"


def test_a_bar_in_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = io.StringIO()
    terminal.isatty = lambda: True  # type: ignore[method-assign]
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    with progress("images", 20) as advance:
        advance(20)
    assert "20 images, " in terminal.getvalue()
