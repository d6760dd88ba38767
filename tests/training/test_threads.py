"""The number of torch's threads in a run: chosen by trial, changed in mid-run, written to the config, and resumed."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from training import tiny
from training.runs import KEYS, assert_same, outcome, run
from training.test_resume import Killed, kill_at
from vitrail.errors import ConfigError
from vitrail.training.config.schema import make_config, read_config
from vitrail.training.config.threads import ThreadPlan
from vitrail.training.engine.trainer import Trainer
from vitrail.training.resources import threads
from vitrail.training.resources.threads import ThreadControl
from vitrail.training.run import train


@pytest.fixture(autouse=True)
def _variant(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tiny model; and torch says that it has two threads, while it computes on one, which does not wait."""
    tiny.add_variant(monkeypatch)
    number = [2]
    monkeypatch.setattr(torch, "get_num_threads", lambda: number[0])
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: number.__setitem__(0, threads))


def plant(monkeypatch: pytest.MonkeyPatch, times: dict[int, float]) -> None:
    """Trial work is done, and is said to have taken this long."""

    def timed(work: Callable[[], object]) -> Callable[[int], float]:
        def seconds(number: int) -> float:
            torch.set_num_threads(number)
            work()
            return times[number]

        return seconds

    monkeypatch.setattr(threads, "timed", timed)


def record_steps(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of threads of each training step."""
    seen: list[int] = []
    step = Trainer.step

    def recorded(self: Trainer, *args: Any) -> None:
        seen.append(torch.get_num_threads())
        step(self, *args)

    monkeypatch.setattr(Trainer, "step", recorded)
    return seen


def used(folder: Path) -> str:
    return read_config(folder / "config.toml").machine.threads


LONG = {"epochs": 4, "checkpoint_every": 3}  # 20 steps: the shortest run with a trial


def test_the_faster_number_is_taken_said_and_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plant(monkeypatch, {2: 0.4, 1: 0.1})
    seen = record_steps(monkeypatch)
    train(tiny.dataset(), out=tmp_path / "run", **{**KEYS, **LONG})
    assert used(tmp_path / "run") == "auto,1"
    assert set(seen) == {1}
    (line,) = re.findall("^threads .*", capsys.readouterr().err, re.MULTILINE)
    assert line == "threads 1 of 2: 80 images/s with 1, 20 images/s with 2; threads=2 uses them all"
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["environment"]["threads"] == 1
    assert torch.get_num_threads() == 2, "as the caller had it"


@pytest.mark.parametrize(
    ("keys", "times", "expected"),
    [
        (LONG, {2: 0.1, 1: 0.2}, "auto,2"),
        ({"epochs": 2}, {}, "auto,2"),  # too short for a trial
        ({**LONG, "threads": 2}, {}, "2"),
        ({**LONG, "threads": "none"}, {}, "none"),
        ({"epochs": None, "budget": 5}, {}, "auto,2"),
    ],
)
def test_the_number_is_in_the_config(
    keys: dict[str, Any], times: dict[int, float], expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(monkeypatch, times)
    if keys.get("budget"):
        monkeypatch.setattr("vitrail.training.session.Session.run", lambda self: self.trainer.eval_model)
    seen = record_steps(monkeypatch)
    run(tmp_path / "run", **keys)
    assert used(tmp_path / "run") == expected
    assert set(seen) <= {2}


def look_at(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """The rate halves after this many steps."""
    count = iter(range(1, 1000))
    monkeypatch.setattr(ThreadControl, "due", lambda self, seconds: next(count) == step)


def test_a_change_in_mid_run_is_resumed_bit_for_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plant(monkeypatch, {2: 0.4, 1: 0.1})
    seen = record_steps(monkeypatch)
    with monkeypatch.context() as patch:
        look_at(patch, 4)
        train(tiny.dataset(), out=tmp_path / "whole", **KEYS)
    assert seen == [2] * 4 + [1] * 8
    assert used(tmp_path / "whole") == "auto,2,1@4"
    assert "threads 1 of 2 from step 5 on: 100 images/s with 1, 25 images/s with 2" in capsys.readouterr().err

    seen.clear()
    with monkeypatch.context() as patch:
        look_at(patch, 4)
        kill_at(patch, Trainer, "step", 6)  # the last checkpoint is of step 3, before the change
        with pytest.raises(Killed):
            run(tmp_path / "killed")
    torch.set_num_threads(2)
    seen.clear()
    train(tiny.dataset(), resume=tmp_path / "killed", progress=False)
    assert seen == [2] + [1] * 8
    assert used(tmp_path / "killed") == "auto,2,1@4"
    assert_same(outcome(tmp_path / "killed"), outcome(tmp_path / "whole"))

    seen.clear()
    run(tmp_path / "again", threads="2,1@4")
    assert seen == [2] * 4 + [1] * 8
    assert_same(outcome(tmp_path / "again"), outcome(tmp_path / "whole"))


def test_looking_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(tmp_path / "plain", threads=2)
    plant(monkeypatch, {2: 0.1, 1: 0.2})
    monkeypatch.setattr(ThreadControl, "due", lambda self, seconds: True)  # after every step
    run(tmp_path / "looked", threads="auto")
    assert used(tmp_path / "looked") == "auto,2"
    assert_same(outcome(tmp_path / "looked"), outcome(tmp_path / "plain"))


def test_batch_norm_is_as_it_was_after_a_rehearsal() -> None:
    from vitrail.data.loader import Batch

    session = tiny.session(model="resnet20_32", drop_path=None)
    trainer = session.trainer
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    images = torch.randint(0, 256, (10, session.setup.preprocess.channels, *session.setup.preprocess.size))
    trainer.rehearse(Batch(images.to(torch.uint8), torch.arange(10) % 3, torch.arange(10)))
    assert any("running_mean" in name for name in before)
    assert tiny.same(before, dict(trainer.model.state_dict()))
    assert all(parameter.grad is None for parameter in trainer.model.parameters())


def test_a_probe_has_its_number_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch, {2: 0.4, 1: 0.1})
    keys = {"model": tiny.VARIANT.name, "probe": True, "device": "cpu", "progress": False}
    train(tiny.dataset(), out=tmp_path / "run", **keys)
    assert used(tmp_path / "run") == "auto,1"


@pytest.mark.parametrize("text", ["auto", "none", "3", "auto,2", "2,1@450", "auto,4,2@10,3@11"])
def test_settings_are_read_as_written(text: str) -> None:
    assert make_config({"threads": text}).machine.threads == text
    assert str(ThreadPlan.parse(text)) == text


@pytest.mark.parametrize("text", ["0", "-1", "2.5", "1025", "two", "auto,", "1@450", "2,1@9,2@9", "2,1@9,2@8", True])
def test_wrong_settings(text: object) -> None:
    with pytest.raises(ConfigError, match="threads"):
        make_config({"threads": text})


def test_the_number_of_each_step() -> None:
    plan = ThreadPlan.parse("auto,4,2@10")
    assert [plan.at(step) for step in (0, 9, 10, 11)] == [4, 4, 2, 2]
    assert ThreadPlan.parse("auto").at(0) is None
    assert str(plan.changed(20, 2)) == str(plan)
    assert str(plan.changed(20, 3)) == "auto,4,2@10,3@20"
    assert str(plan.changed(10, 3)) == "auto,4,3@10"
    assert str(plan.fixed) == "4,2@10"
