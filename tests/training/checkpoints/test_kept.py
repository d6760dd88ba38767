"""Ctrl-C at any moment of `train`: the message says what is kept, and it is so."""

from pathlib import Path
from typing import Any

import pytest

import vitrail
from training import tiny
from vitrail.training import run, session
from vitrail.training.checkpoints.checkpoint import find_checkpoints
from vitrail.training.engine.interrupt import Stopped

KEYS: dict[str, Any] = {**tiny.PLAIN, "epochs": 2, "device": "cpu"}


@pytest.fixture(autouse=True)
def _variant(monkeypatch: pytest.MonkeyPatch) -> None:
    tiny.add_variant(monkeypatch)


def interrupt(*_: Any, **__: Any) -> Any:
    raise KeyboardInterrupt


def stopped(out: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """Train, be interrupted, and return the message, which is printed too."""
    with pytest.raises(Stopped) as error:
        run.train(tiny.dataset(), out=out, **KEYS)
    text = str(error.value)
    assert capsys.readouterr().err.count(text) == 1
    return text


def test_before_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(run, "prepare", interrupt)
    assert "nothing was written" in stopped(tmp_path / "run", capsys)
    assert not (tmp_path / "run").exists()


def test_in_the_trial_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(run, "estimate_cost", interrupt)
        text = stopped(tmp_path / "run", capsys)
    assert "settings are kept" in text
    assert f"--resume {tmp_path / 'run'}" in text
    assert not find_checkpoints(tmp_path / "run" / "checkpoint")
    run.train(tiny.dataset(), resume=tmp_path / "run", progress=False)
    assert (tmp_path / "run" / "summary.json").exists()


def test_in_the_final_evaluation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(session.Session, "final_evaluation", interrupt)
        text = stopped(tmp_path / "run", capsys)
    assert "last checkpoint is kept" in text
    assert find_checkpoints(tmp_path / "run" / "checkpoint")
    run.train(tiny.dataset(), resume=tmp_path / "run", progress=False)
    assert (tmp_path / "run" / "summary.json").exists()


def test_in_the_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(run, "write_report", interrupt)
        text = stopped(tmp_path / "run", capsys)
    assert f"model is saved in {tmp_path / 'run' / 'model'}" in text
    assert f"vitrail report {tmp_path / 'run'}" in text
    assert vitrail.load(tmp_path / "run").class_names == ("one", "two", "three")
