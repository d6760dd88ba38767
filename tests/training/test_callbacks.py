"""Early stopping by patience and by callbacks: when, what is kept, and in runs that are killed or distributed."""

import json
from pathlib import Path
from typing import Any

import pytest

from training import tiny
from training.page import parse
from training.runs import assert_same, outcome, run, timeless
from training.test_distributed import SAME, trained
from vitrail.errors import ConfigError
from vitrail.training.callbacks import EpochState
from vitrail.training.checkpoints.best import BestWeights
from vitrail.training.engine.trainer import Trainer
from vitrail.training.run import train
from vitrail.training.session import Session

SCORES = (50.0, 60.0, 60.0, 55.0, 70.0, 61.0, 62.0, 63.0, 64.0, 65.0)


@pytest.fixture(autouse=True)
def _variant(monkeypatch: pytest.MonkeyPatch) -> None:
    tiny.add_variant(monkeypatch)


@pytest.fixture
def planted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every validation finds the score planted for its epoch, with a loss that gets worse."""
    validate = Session._validate

    def planted_validate(self: Session, *args: Any) -> dict[str, Any]:
        epoch, before = self.trainer.state.epoch, self.best
        record = validate(self, *args)
        self.best = before
        if before.is_beaten_by(SCORES[epoch], 1.0 + epoch):
            weights = {name: value.clone() for name, value in self.trainer.eval_model.state_dict().items()}
            self.best = BestWeights(epoch + 1, SCORES[epoch], 1.0 + epoch, SCORES[epoch], weights)
        return record | {"val_top1": SCORES[epoch], "val_loss": 1.0 + epoch}

    monkeypatch.setattr(Session, "_validate", planted_validate)


class Watch:
    """Notes what it sees, and stops after an epoch."""

    def __init__(self, stop: int = 0) -> None:
        self.stop, self.seen = stop, []  # type: ignore[var-annotated]

    def on_epoch_end(self, state: EpochState) -> str | None:
        self.seen.append(state)
        return "stop" if state.epoch == self.stop else None


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.usefixtures("planted")
@pytest.mark.parametrize(("keys", "epochs", "best"), [
    ({"patience": 1}, 3, 2),
    ({"patience": 2}, 4, 2),
    ({"patience": 3}, 8, 5),
    ({"patience": 4}, 9, 5),
    ({"patience": 2, "eval_every": 2}, 4, 2),  # validated after epochs 2 and 4: 60 and 55
    ({"patience": 3, "eval_every": 2}, 10, 10),  # and 61 after epoch 6, which is better, 63 and 65
    ({}, 10, 5),
])  # fmt: skip
def test_patience_counts_epochs_since_the_best_one(
    keys: dict[str, int], epochs: int, best: int, tmp_path: Path
) -> None:
    report = train(tiny.dataset(), out=tmp_path / "run", progress=False, **{**tiny.PLAIN, "epochs": 10, **keys}).report
    found = lines(tmp_path / "run")
    assert (len(found), report["epochs"], report["best_epoch"]) == (epochs, epochs, best)
    if epochs < 10:
        assert report["stopped"] == f"no better validation than that of epoch {best} in {keys['patience']} epochs"
        assert f"Stopped early: {report['stopped']}" in parse((tmp_path / "run" / "report.html").read_text()).text
    else:
        assert report["stopped"] is None


def test_a_callback_sees_every_epoch_and_ends_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    watch, other = Watch(stop=2), Watch()
    keys = {**tiny.PLAIN, "epochs": 5}
    clf = train(tiny.dataset(), out=tmp_path / "run", callbacks=[watch, other], progress=True, **keys)
    assert [state.epoch for state in watch.seen] == [state.epoch for state in other.seen] == [1, 2]
    for state, line in zip(watch.seen, lines(tmp_path / "run"), strict=True):
        assert state.metrics == line
        assert state.folder == tmp_path / "run"
    last = watch.seen[-1]
    assert (last.best_epoch, last.best_top1) == (clf.report["best_epoch"], clf.report["val_top1"])
    assert last.best_loss == lines(tmp_path / "run")[last.best_epoch - 1]["val_loss"]
    assert (clf.report["epochs"], clf.report["stopped"]) == (2, "asked to by Watch")
    assert "stopped after epoch 2: asked to by Watch" in capsys.readouterr().err


def test_a_run_that_stops_before_its_first_validation_is_validated(tmp_path: Path) -> None:
    keys = {**tiny.PLAIN, "epochs": 6, "eval_every": 4}
    report = train(tiny.dataset(), out=tmp_path / "run", callbacks=[Watch(stop=1)], progress=False, **keys).report
    assert (report["epochs"], report["best_epoch"]) == (1, 1)
    assert "val_top1" in lines(tmp_path / "run")[0]


def test_a_stopped_run_is_the_first_part_of_the_whole_one(tmp_path: Path) -> None:
    keys = {**tiny.PLAIN, "epochs": 4}
    train(tiny.dataset(), out=tmp_path / "whole", progress=False, **keys)
    train(tiny.dataset(), out=tmp_path / "part", progress=False, callbacks=[Watch(stop=3)], **keys)
    whole, part = ([timeless(line) for line in lines(tmp_path / name)] for name in ("whole", "part"))
    assert part == whole[:3]


@pytest.mark.parametrize("where", ["step", "evaluation"])
def test_a_killed_run_stops_where_it_would_have(where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed in the last epoch, and between the end of the training and the summary."""
    keys = {"epochs": 8, "patience": 2}
    monkeypatch.setattr(BestWeights, "is_beaten_by", lambda self, score, loss: self.epoch < 2)
    run(tmp_path / "whole", **keys)
    whole = outcome(tmp_path / "whole")
    assert (whole["summary"]["epochs"], whole["summary"]["best_epoch"]) == (4, 2)
    owner: Any = Trainer if where == "step" else Session
    name = "step" if where == "step" else "final_evaluation"
    original = getattr(owner, name)

    def killed(self: Any, *args: Any) -> Any:
        if where == "evaluation" or self.state.steps == 18:
            raise KeyboardInterrupt
        return original(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, killed)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "run", **keys)
    train(tiny.dataset(), resume=tmp_path / "run", progress=False)
    assert_same(outcome(tmp_path / "run"), whole)


def test_patience_can_be_changed_on_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = Trainer.step

    def step(self: Trainer, batch: Any) -> None:
        if self.state.steps == 2:
            raise KeyboardInterrupt
        original(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", step)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "run", epochs=6, patience=1)
    monkeypatch.setattr(BestWeights, "is_beaten_by", lambda self, score, loss: self.epoch < 1)
    watch = Watch()
    report = train(tiny.dataset(), resume=tmp_path / "run", patience=3, callbacks=[watch], progress=False).report
    assert (report["epochs"], len(watch.seen)) == (4, 4)


def test_a_run_that_stopped_early_can_be_extended(tmp_path: Path) -> None:
    keys = {**tiny.PLAIN, "epochs": 4}
    train(tiny.dataset(), out=tmp_path / "run", progress=False, callbacks=[Watch(stop=2)], **keys)
    report = train(tiny.dataset(), resume=tmp_path / "run", epochs=5, progress=False).report
    assert (report["epochs"], report["stopped"]) == (5, None)
    assert [line["epoch"] for line in lines(tmp_path / "run")] == [1, 2, 3, 4, 5]


@pytest.mark.slow
def test_two_processes_stop_at_the_same_epoch(tmp_path: Path) -> None:
    keys = {**SAME, "patience": 2, "lr": 1e-30, "ema": 0.0, "epochs": 6}  # weights that do not change
    two = trained(2, tmp_path / "two", out=tmp_path / "two", **keys)
    assert two["summary"]["stopped"]
    assert len(two["metrics"]) == 3


def test_what_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="on_epoch_end"):
        train(tiny.dataset(), out=tmp_path / "a", callbacks=[len], progress=False, **tiny.PLAIN)  # type: ignore[list-item]

    class Wrong:
        def on_epoch_end(self, state: EpochState) -> Any:
            return True

    with pytest.raises(ConfigError, match='returned True: return "stop" or None'):
        train(tiny.dataset(), out=tmp_path / "b", callbacks=[Wrong()], progress=False, **tiny.PLAIN)
    with pytest.raises(ConfigError, match="callbacks"):
        train("digits", probe=True, model="resnet20_32", callbacks=[Watch()], out=tmp_path / "c", progress=False)
    data = tiny.dataset()
    del data.splits["val"]
    with pytest.raises(ConfigError, match="patience needs validation images"):
        train(data, out=tmp_path / "d", patience=2, progress=False, **tiny.PLAIN)
