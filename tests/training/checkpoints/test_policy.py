"""When checkpoints are written, and that one is there at every moment."""

import os
import signal
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from training import tiny
from training.checkpoints.test_checkpoint import checkpoint
from training.runs import run
from vitrail.training import session
from vitrail.training.checkpoints.checkpoint import find_checkpoints, load_checkpoint, save_checkpoint
from vitrail.training.checkpoints.policy import CheckpointPolicy
from vitrail.training.config.schema import make_config
from vitrail.training.engine.interrupt import Stopped
from vitrail.training.engine.state import TrainState
from vitrail.training.engine.trainer import Trainer
from vitrail.training.run import train
from vitrail.training.session import Session


@pytest.fixture(autouse=True)
def _variant(monkeypatch: pytest.MonkeyPatch) -> None:
    tiny.add_variant(monkeypatch)


def saved_at(cost: float, seconds: float, steps: int, **keys: Any) -> list[int]:
    """After which of so many steps, each of so many seconds, a checkpoint is due that takes `cost`."""
    policy, state, found = CheckpointPolicy(make_config({"data": "-", "model": "-", **keys})), TrainState(), []
    for _ in range(steps):
        state.steps, state.seconds = state.steps + 1, state.seconds + seconds
        if policy.due(state):
            found.append(state.steps)
            state.seconds += cost
            policy.cost = cost
            policy.record(state)
    return found


def test_every_so_many_steps_where_that_is_said() -> None:
    assert saved_at(9.0, 0.001, 700, checkpoint_every=200) == [200, 400, 600]
    assert saved_at(0.0, 1.0, 20, checkpoint_every=0, checkpoint_minutes=0.1) == [6, 12, 18]
    assert saved_at(0.0, 1.0, 20, checkpoint_every=0, checkpoint_minutes=0) == []
    assert saved_at(0.0, 1.0, 20, checkpoint_every=4, checkpoint_minutes=0.1) == [4, 8, 12, 16, 20]


def test_by_itself_every_200_steps_for_2_percent_of_the_time_at_most() -> None:
    assert saved_at(0.02, 0.1, 700) == [200, 400, 600]
    quick = saved_at(0.02, 0.001, 5000)  # a checkpoint takes as long as 20 steps
    assert quick[0] == 200
    assert {after - before for before, after in pairwise(quick)} <= {1000, 1001}
    assert len(quick) * 20 <= 0.02 * 5000 + 20
    assert saved_at(0.02, 2.0, 400) == [150, 300]  # slow steps: every five minutes


def test_never_amid_steps_that_are_left_out() -> None:
    policy, state = (
        CheckpointPolicy(make_config({"data": "-", "model": "-", "checkpoint_every": 1})),
        TrainState(steps=3, consecutive_bad_steps=1),
    )
    assert not policy.due(state)
    state.consecutive_bad_steps = 0
    assert policy.due(state)


def test_two_of_the_same_step_stand_until_the_newer_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever call of the system a process dies in, one checkpoint can be read."""
    save_checkpoint(tmp_path, 3, checkpoint(1))
    for name in ("rename", "mkdir"):
        original = getattr(Path, name)

        def dies(self: Path, *args: Any, original: Any = original, **kwargs: Any) -> Any:
            found = load_checkpoint(tmp_path)
            assert found is not None
            return original(self, *args, **kwargs)

        monkeypatch.setattr(Path, name, dies)
    save_checkpoint(tmp_path, 3, checkpoint(2))
    assert [path.name for path in find_checkpoints(tmp_path)] == ["step-00000003.1", "step-00000003"]
    save_checkpoint(tmp_path, 3, checkpoint(3))
    found = load_checkpoint(tmp_path)
    assert found is not None
    assert found.tensors["model"]["a"][0, 0] == 3
    save_checkpoint(tmp_path, 12, checkpoint(4))
    assert [path.name for path in find_checkpoints(tmp_path)] == ["step-00000012", "step-00000003.2"]


def test_a_stop_right_after_a_checkpoint_writes_no_second_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written, original, step = [], Session._checkpoint, Trainer.step

    def count(self: Session) -> Any:
        written.append(self.trainer.state.steps)
        return original(self)

    def stopping(self: Trainer, batch: Any) -> None:
        if self.state.steps == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        step(self, batch)

    monkeypatch.setattr(Session, "_checkpoint", count)
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", stopping)
        with pytest.raises(Stopped):
            run(tmp_path / "run")
    assert written == [3, 6]


def test_a_signal_ends_a_validation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A long one would outlast the patience of whoever sent it; the resumed run does it anew, with the same result."""
    from training.runs import assert_same, outcome
    from vitrail.evaluation.metrics import Recorder

    run(tmp_path / "whole", eval_batch_size=2)
    original, seen = Recorder.add, []

    def add(self: Recorder, *args: Any) -> None:
        seen.append(1)
        if len(seen) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        original(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Recorder, "add", add)
        with pytest.raises(Stopped, match="epoch 1, step 5"):
            run(tmp_path / "run", eval_batch_size=2)
    assert len(seen) == 2
    train(tiny.dataset(), resume=tmp_path / "run", progress=False)
    assert_same(outcome(tmp_path / "run"), outcome(tmp_path / "whole"))


@pytest.mark.slow
def test_checkpoints_of_a_tiny_model_cost_little(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint takes as long as 20 steps: the second is due as long as 1000 steps after the first began."""
    clock, saved, step, save = SimpleNamespace(now=0.0), [], Trainer.step, session.save_checkpoint

    def train_step(self: Trainer, batch: Any) -> None:
        step(self, batch)
        clock.now += 2**-10  # exact in floating point

    def save_slowly(folder: Path, steps: int, *tensors: Any, **options: Any) -> Path:
        written = save(folder, steps, *tensors, **options)
        clock.now += 20 * 2**-10
        saved.append(steps)
        return written

    monkeypatch.setattr(session, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    monkeypatch.setattr(Trainer, "step", train_step)
    monkeypatch.setattr(session, "save_checkpoint", save_slowly)
    summary = run(tmp_path / "run", epochs=320, checkpoint_every=None).report
    assert summary["steps"] == 1600
    assert saved == [200, 1180, 1600], "the last one ends the run"
