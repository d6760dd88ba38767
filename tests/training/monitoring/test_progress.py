"""What a run tells while it goes on."""

import io
import time

import pytest
from rich.console import Console

from training import tiny
from vitrail.training.engine.state import TrainState
from vitrail.training.monitoring import progress
from vitrail.training.monitoring.progress import Reporter, describe


@pytest.fixture(autouse=True)
def _variant(monkeypatch: pytest.MonkeyPatch) -> None:
    tiny.add_variant(monkeypatch)


def test_one_line_says_it_all() -> None:
    state = TrainState(images=50, seconds=10.0, step_seconds=5.0, wait_seconds=1.0)
    assert describe(0.5, state, "  loss 0.1") == " 50%  loss 0.1  10 images/s  10 s left  data wait 20%"


def test_less_than_an_image_a_second() -> None:
    assert "  0.25 images/s  16 s left" in describe(0.2, TrainState(images=1, seconds=4, step_seconds=4))


def test_nothing_done_yet() -> None:
    assert "left" not in describe(0.0, TrainState())
    assert "left" not in describe(0.05, TrainState())  # a step is done, but its time is not known yet


def test_lines_without_a_terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(progress, "_LINE_SECONDS", 0.0)
    with Reporter() as reporter:
        reporter.step(tiny.session().trainer)
        reporter.epoch("an epoch [1/2]", last=False)
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == [f"epoch 1/1  {describe(0.0, TrainState(), '  loss nan')}", "an epoch [1/2]"]


def test_of_many_short_epochs_some_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    with Reporter() as reporter:
        for number in range(5):
            reporter.epoch(f"epoch {number}", last=number == 4)
    assert capsys.readouterr().err.splitlines() == ["epoch 0", "epoch 4"]


def test_silence(capsys: pytest.CaptureFixture[str]) -> None:
    with Reporter(enabled=False) as reporter:
        reporter.log("something")
        reporter.epoch("more", last=True)
    assert capsys.readouterr() == ("", "")


def test_a_bar_in_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "_BAR_SECONDS", 0.0)
    screen = io.StringIO()
    reporter = Reporter()
    reporter.console = Console(file=screen, force_terminal=True, width=150)
    reporter._every = 0.0
    with reporter:
        reporter.step(tiny.session().trainer)
        reporter.epoch("an epoch", last=True)
    assert "data wait" in screen.getvalue()
    assert "an epoch" in screen.getvalue()


def test_something_moves_while_nothing_is_counted() -> None:
    screen = io.StringIO()
    reporter = Reporter()
    reporter.console = Console(file=screen, force_terminal=True, width=80)
    with reporter.busy("trial steps"):
        shown = screen.tell()
        time.sleep(1.2)
        assert screen.tell() > shown  # drawn again, without a call
    assert "trial steps" in screen.getvalue()


def test_the_bar_moves_within_a_step() -> None:
    screen = io.StringIO()
    reporter = Reporter()
    reporter.console = Console(file=screen, force_terminal=True, width=80)
    with reporter:
        time.sleep(0.5)
        shown = screen.tell()
        time.sleep(1.0)
        assert screen.tell() > shown


def test_nothing_moves_without_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with Reporter().busy("trial steps"):
        pass
    assert capsys.readouterr() == ("", "")
