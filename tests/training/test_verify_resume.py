"""--verify-resume: says that the promise holds where it does, and which tensors break it where it does not."""

from pathlib import Path

import pytest
import torch

from training import tiny
from training.guests_for_verify import Drifting, Steady
from vitrail.errors import ConfigError, RunError
from vitrail.training.checkpoints.checkpoint import Checkpoint
from vitrail.training.resume_harness import differences
from vitrail.training.verify_resume import kill_plan, verify_resume

KEYS = {key: value for key, value in tiny.PLAIN.items() if key not in ("model", "drop_path")}
GUEST = {**KEYS, "epochs": 3, "ema": 0.9, "img_size": 8, "in_chans": 1, "progress": False, "seconds": 1.0}


def test_the_kill_comes_after_a_checkpoint_within_an_epoch_and_before_the_end() -> None:
    for steps in range(3, 60):
        for per_epoch in range(1, 30):
            saved, killed = kill_plan(steps, per_epoch)
            assert 1 <= saved < killed < steps
            assert killed <= 2 * saved, "else there would be a later checkpoint"
            assert saved % per_epoch or per_epoch == 1
    with pytest.raises(RunError, match="2 steps"):
        kill_plan(2, 5)


def test_differences_are_named() -> None:
    one = {"model": {"a": torch.tensor([0.0, 1.0]), "b": torch.tensor(2)}, "ema": {"a": torch.tensor([float("nan")])}}
    record = {"state": {"steps": 3, "seconds": 1.5, "wait_seconds": 1.0}, "history": [{"loss": 1, "seconds": 2}]}
    same = {"state": {"steps": 3, "seconds": 9.0, "wait_seconds": 2.0}, "history": [{"loss": 1, "seconds": 3}]}
    assert differences(Checkpoint(one, record), Checkpoint(one, same)) == ([], 0.0)
    two = {"model": {"a": torch.tensor([-0.0, 1.25])}, "ema": {"a": torch.tensor([float("nan")])}}
    names, largest = differences(Checkpoint(one, record), Checkpoint(two, {**same, "history": [{"loss": 2}]}))
    assert names == ["model: a", "model: b", "figures: history"]
    assert largest == 0.25
    minus = {"model": {"a": torch.tensor([-0.0, 1.0]), "b": torch.tensor(2)}, "ema": one["ema"]}
    assert differences(Checkpoint(one, record), Checkpoint(minus, record))[0] == ["model: a"]


@pytest.mark.parametrize(
    ("keys", "words"),
    [({"resume": "x"}, "a new run"), ({"probe": True}, "a new run"), ({"show_batch": "a.png"}, "a new run")],
)
def test_what_cannot_be_verified_is_refused(keys: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        verify_resume("digits", progress=False, **keys)


@pytest.mark.slow
def test_a_setup_that_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    verdict = verify_resume(tiny.dataset(), model=Steady(), out=tmp_path / "mine", **GUEST)
    assert verdict.same, verdict
    assert verdict.saved < verdict.killed < verdict.steps <= 15
    assert str(verdict).startswith(f"verified: all {verdict.tensors:,} tensors")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_setup_that_draws_anew_each_time_is_found_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    verdict = verify_resume(tiny.dataset(), model=Drifting(), **GUEST)
    assert not verdict.same
    assert "model: head.weight" in verdict.differing
    assert verdict.largest > 0
    assert str(verdict).startswith("not verified: ")
    assert "head.weight" in str(verdict)


@pytest.mark.slow
def test_a_budget_and_a_mistake_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="budget"):
        verify_resume("digits", budget="10s", progress=False)
    with pytest.raises(RunError, match="'vit_nonsense'"):
        verify_resume("digits", model="vit_nonsense", progress=False)


def test_a_model_that_cannot_be_passed_on_is_refused() -> None:
    guest = Steady()
    guest.hook = lambda x: x
    with pytest.raises(RunError, match="another process"):
        verify_resume(tiny.dataset(), model=guest, **GUEST)
