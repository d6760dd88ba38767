"""A budget ends when its time does, by a clock that steps and validations move on: the last validation is within it,
and so are all sessions together.
"""

import json
from pathlib import Path
from typing import Any

import pytest

from training import tiny
from training.runs import KEYS
from training.test_resume import Killed, kill_at
from vitrail.training import run as run_module
from vitrail.training import session as session_module
from vitrail.training.checkpoints.checkpoint import load_checkpoint
from vitrail.training.engine.state import TrainState
from vitrail.training.engine.trainer import Trainer
from vitrail.training.run import train
from vitrail.training.session import Session

BUDGET, STEP, VALIDATION = 60.0, 1.0, 8.0
TIMED = {key: value for key, value in KEYS.items() if key != "epochs"} | {"budget": BUDGET, "ema": 0.0}


@pytest.fixture(autouse=True)
def _clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step takes a second and a validation eight. An epoch has five steps."""
    tiny.add_variant(monkeypatch)
    step, validate = Trainer.step, Session._validate

    class Clock:
        now = 0.0

        def perf_counter(self) -> float:
            return self.now

    clock = Clock()

    def timed_step(self: Trainer, *arguments: Any) -> None:
        step(self, *arguments)
        clock.now += STEP

    def timed_validation(self: Session, *arguments: Any) -> Any:
        clock.now += VALIDATION
        return validate(self, *arguments)

    monkeypatch.setattr(session_module, "time", clock)
    monkeypatch.setattr(run_module, "_log_cost", lambda session, reporter: None)
    monkeypatch.setattr(Trainer, "step", timed_step)
    monkeypatch.setattr(Session, "_validate", timed_validation)


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_the_last_validation_is_within_the_budget(tmp_path: Path) -> None:
    """After four epochs of five steps and a validation, 52 seconds are over: for a step and a validation more it is too
    late."""
    report = train(tiny.dataset(), out=tmp_path / "run", progress=False, **TIMED).report
    assert (report["seconds"], report["epochs"]) == (52.0, 4)
    assert all("val_top1" in line for line in lines(tmp_path / "run"))


def test_an_epoch_is_cut_where_its_validation_must_begin(tmp_path: Path) -> None:
    """With a validation every third epoch: 15 steps and 8 s, 15 steps and 8 s, 6 steps and 8 s."""
    report = train(tiny.dataset(), out=tmp_path / "run", progress=False, eval_every=3, **TIMED).report
    assert (report["seconds"], report["steps"]) == (BUDGET, 36)
    found = lines(tmp_path / "run")
    assert [line["epoch"] for line in found if "val_top1" in line] == [3, 6, 8]
    assert found[-1]["lr"] < 0.01 * KEYS["lr"], "and the schedule has come to its end"


def test_without_the_share_that_is_kept_for_it_it_would_be_late(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TrainState, "spent", property(lambda self: self.seconds))
    report = train(tiny.dataset(), out=tmp_path / "run", progress=False, eval_every=3, **TIMED).report
    assert report["seconds"] == BUDGET + VALIDATION


def test_all_sessions_together_keep_to_the_budget(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed in the second of its validations, and gone on with from the checkpoint before it."""
    keys = {**TIMED, "eval_every": 3, "checkpoint_every": 5}
    with monkeypatch.context() as patch:
        kill_at(patch, Session, "_validate", 2)
        with pytest.raises(Killed):
            train(tiny.dataset(), out=tmp_path / "run", progress=False, **keys)
    found = load_checkpoint(tmp_path / "run" / "checkpoint")
    assert found is not None
    place = found.record["state"]
    assert (place["validation_seconds"], place["seconds"], place["steps"]) == (VALIDATION, 38.0, 30)
    report = train(tiny.dataset(), resume=tmp_path / "run", progress=False).report
    assert (report["seconds"], report["steps"]) == (BUDGET, 36)


def test_a_validation_longer_than_the_budget_leaves_time_to_learn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is expected to take 100 seconds of 60, of which 18 are kept for it: 42 steps. It takes 8, and so there is time
    for two more, and for their validation."""

    def expect(session: Session, reporter: Any) -> None:
        session.trainer.state.validation_seconds = session.trainer.schedule.reserve(100.0)

    monkeypatch.setattr(run_module, "_log_cost", expect)
    report = train(tiny.dataset(), out=tmp_path / "run", progress=False, eval_every=50, **TIMED).report
    assert (report["steps"], report["seconds"]) == (44, BUDGET)
    assert [line["steps"] for line in lines(tmp_path / "run") if "val_top1" in line] == [42, 44]
