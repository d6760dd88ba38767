"""A finished run that goes on for more epochs."""

import json
from pathlib import Path

import pytest

from training import tiny
from training.runs import KEYS, assert_same, outcome, run
from training.test_resume import Killed, kill_at
from vitrail import load
from vitrail.errors import ConfigError, RunError
from vitrail.training.checkpoints.run_folder import RunFolder
from vitrail.training.config.schema import read_config
from vitrail.training.engine.schedule import cosine
from vitrail.training.engine.trainer import Trainer
from vitrail.training.run import train


@pytest.fixture(autouse=True)
def _variant(monkeypatch: pytest.MonkeyPatch) -> None:
    tiny.add_variant(monkeypatch)


def extended(folder: Path, epochs: float = 4, progress: bool = False) -> None:
    train(tiny.dataset(), resume=folder, epochs=epochs, progress=progress)


def test_more_epochs_on_the_schedule_of_all_of_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "run"
    run(folder, epochs=2)
    before = (folder / "metrics.jsonl").read_text().splitlines()
    extended(folder, progress=True)
    said = capsys.readouterr().err
    assert "extended: the learning rate follows the schedule of 4 epochs, and goes on at 0.005" in said
    assert "train   4 epochs of 5 steps" in said
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    assert lines[:2] == before
    rates = [json.loads(line)["lr"] for line in lines]
    assert rates[2:] == [pytest.approx(1e-2 * cosine(step / 20)) for step in (14, 19)]
    summary = json.loads((folder / "summary.json").read_text())
    assert (summary["epochs"], summary["steps"]) == (4, 20)
    assert read_config(folder / "config.toml").schedule.epochs == 4
    RunFolder(folder).check()
    assert load(folder).report["epochs"] == 4
    assert (folder / "report.html").is_file()


def test_the_best_of_before_is_kept(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    run(folder, epochs=2, lr=1e-2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("vitrail.training.session.validation_score", lambda result, balance: -1e9)
        extended(folder)
    assert json.loads((folder / "summary.json").read_text())["best_epoch"] <= 2


def test_an_extension_that_is_killed_is_resumed_bit_for_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("whole", "killed"):
        run(tmp_path / name, epochs=2)
    extended(tmp_path / "whole")
    with monkeypatch.context() as patch:
        kill_at(patch, Trainer, "step", 7)
        with pytest.raises(Killed):
            extended(tmp_path / "killed")
    assert not (tmp_path / "killed" / "summary.json").exists()
    train(tiny.dataset(), resume=tmp_path / "killed", progress=False)
    assert_same(outcome(tmp_path / "killed"), outcome(tmp_path / "whole"))


def test_what_cannot_be_extended(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    run(folder, epochs=2)
    with pytest.raises(RunError, match="finished 2 epochs: extend it with more, not 2"):
        extended(folder, 2)
    with pytest.raises(RunError, match="--epochs"):
        train(tiny.dataset(), resume=folder, progress=False)
    with pytest.raises(ConfigError, match="lr"):
        train(tiny.dataset(), resume=folder, epochs=4, lr=0.5, progress=False)
    assert (folder / "summary.json").exists(), "a refused extension leaves the run as it was"
    train(tiny.dataset(), out=tmp_path / "probe", model=tiny.VARIANT.name, probe=True, progress=False)
    with pytest.raises(RunError, match="a number of epochs"):
        extended(tmp_path / "probe")
    run(tmp_path / "budget", **{**KEYS, "epochs": None, "budget": 0.5})
    with pytest.raises(RunError, match="a number of epochs"):
        extended(tmp_path / "budget")
