"""Trackers: what they are told, once each, and that no fault of theirs costs a run."""

import importlib
import json
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from training import tiny
from training.runs import KEYS, assert_same, outcome, run
from vitrail.errors import ConfigError, DeviceError
from vitrail.training.config.schema import make_config, read_config
from vitrail.training.engine.interrupt import Stopped
from vitrail.training.engine.trainer import Trainer
from vitrail.training.monitoring import trackers
from vitrail.training.monitoring.trackers import check_trackers, scalars
from vitrail.training.run import train


@pytest.fixture(autouse=True)
def _variant(monkeypatch: pytest.MonkeyPatch) -> None:
    tiny.add_variant(monkeypatch)


def stop_at(monkeypatch: pytest.MonkeyPatch, steps: int, original: Any = Trainer.step) -> None:
    def step(self: Trainer, batch: Any, *rest: Any) -> None:
        if self.state.steps == steps:
            raise Stopped("stopped", 2)
        original(self, batch, *rest)

    monkeypatch.setattr(Trainer, "step", step)


def history(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


# --- TensorBoard itself


def events(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """(step, value) by name, from the event files as TensorBoard reads them."""
    found = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0})
    found.Reload()
    return {name: [(one.step, one.value) for one in found.Scalars(name)] for name in found.Tags()["scalars"]}


def test_tensorboard_has_the_figures(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    summary = run(folder, track="tensorboard", head_lr=1e-3).report
    told, lines = events(folder), history(folder)
    steps = [line["steps"] for line in lines]
    assert steps == [5, 10, 12]
    for name, key in (("train/loss", "train_loss"), ("val/top1", "val_top1"), ("val/ece", "val_ece")):
        assert told[name] == [(line["steps"], pytest.approx(line[key])) for line in lines]
    # The groups' rates keep the ratio of their peaks; "lr" is the largest.
    assert told["lr/backbone"] == [(line["steps"], pytest.approx(line["lr"])) for line in lines]
    assert told["lr/head"] == [(line["steps"], pytest.approx(line["lr"] / 10)) for line in lines]
    assert told["final/top1"] == [(12, pytest.approx(summary["top1"]))]
    assert read_config(folder / "config.toml").io.track == "tensorboard"


def test_tracking_changes_nothing_and_a_resumed_run_tells_nothing_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(tmp_path / "alone")
    run(tmp_path / "whole", track="tensorboard")
    folder = tmp_path / "stopped"
    with monkeypatch.context() as patch:
        stop_at(patch, 11)  # the last checkpoint is of step 9: the epoch that ended at 10 is done twice
        with pytest.raises(Stopped):
            run(folder, track="tensorboard")
    assert [step for step, _ in events(folder)["train/loss"]] == [5, 10]
    train(tiny.dataset(), resume=folder, progress=False)
    whole, resumed = events(tmp_path / "whole"), events(folder)
    assert whole.keys() == resumed.keys()
    for name, values in whole.items():
        if "seconds" not in name and "images_per_second" not in name:
            assert values == resumed[name], name
        assert [step for step, _ in values] == [step for step, _ in resumed[name]]
    assert_same(outcome(tmp_path / "alone"), outcome(folder))


# --- stand-ins for the others, which are written here, and record what they are told

STAND_IN = """
import json, os, pathlib

def note(*what):
    with open(os.environ["CALLS"], "a") as file:
        file.write(json.dumps(what) + "\\n")

class Summary(dict):
    def update(self, values):
        note("summary", values)

class Run:
    summary = Summary()
    def log(self, values, step=None):
        if step >= int(os.environ.get("FAILS_AT", 99)):
            raise ConnectionError("the network\\nis gone")
        note("log", values, step)
    def finish(self):
        note("finish")

def init(**options):
    note("init", {key: str(value) for key, value in options.items()})
    return Run()
"""


@pytest.fixture
def calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Gives what the stand-ins were told so far, by the kind of call."""
    packages = tmp_path / "packages"
    packages.mkdir()
    for name in ("wandb", "trackio"):
        (packages / f"{name}.py").write_text(STAND_IN)
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.syspath_prepend(packages)
    monkeypatch.setenv("CALLS", str(tmp_path / "calls"))
    for name in ("WANDB_PROJECT", "TRACKIO_PROJECT"):
        monkeypatch.delenv(name, raising=False)
    importlib.invalidate_caches()

    def found() -> dict[str, list[Any]]:
        by_kind: dict[str, list[Any]] = defaultdict(list)
        for line in (tmp_path / "calls").read_text().splitlines():
            kind, *rest = json.loads(line)
            by_kind[kind].append(rest)
        return by_kind

    yield found
    for name in ("wandb", "trackio"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_run_is_one_run_there_too(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, calls: Any) -> None:
    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        stop_at(patch, 11)
        with pytest.raises(Stopped):
            run(folder, track=name)
    train(tiny.dataset(), resume=folder, progress=False)
    told, summary = calls(), json.loads((folder / "summary.json").read_text())
    (first,), (second,) = told["init"]
    assert first == second  # the same id or name, and config
    assert first["project"] == "vitrail"
    assert first["resume"] == "allow"
    assert "'label_smoothing': 0.1" in first["config"]
    epochs = [(values, step) for values, step in told["log"] if "epoch" in values]
    assert [step for _, step in epochs] == [5, 10, 12]
    assert [values["train/loss"] for values, _ in epochs] == [line["train_loss"] for line in history(folder)]
    final = told["summary"][0][0] if name == "wandb" else told["log"][-1][0]
    assert final["final/top1"] == summary["top1"]
    assert len(told["finish"]) == 2


def test_a_tracker_that_fails_is_told_of_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, calls: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FAILS_AT", "10")
    run(tmp_path / "alone")
    train(tiny.dataset(), out=tmp_path / "run", **{**KEYS, "track": "wandb,tensorboard"})
    err = " ".join(capsys.readouterr().err.split())
    assert err.count("warning") == 1
    assert "warning: wandb failed, training continues without it: the network is gone" in err
    assert [step for _, step in calls()["log"]] == [5]
    assert [step for step, _ in events(tmp_path / "run")["train/loss"]] == [5, 10, 12]  # the other one goes on
    assert_same(outcome(tmp_path / "alone"), outcome(tmp_path / "run"))


def test_a_tracker_that_cannot_begin_costs_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: Any) -> Any:
        raise RuntimeError("no key")

    monkeypatch.setitem(trackers._KINDS, "tensorboard", refuse)
    train(tiny.dataset(), out=tmp_path / "run", **{**KEYS, "track": "tensorboard"})
    assert "tensorboard failed, training continues without it: no key" in " ".join(capsys.readouterr().err.split())
    assert (tmp_path / "run" / "summary.json").exists()


def test_one_that_is_not_installed_is_refused_before_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    with pytest.raises(DeviceError, match=r"track=trackio .*pip install .*'\.\[trackio\]'"):
        run(tmp_path / "run", track="trackio")
    assert not (tmp_path / "run").exists()
    check_trackers("none")


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ("none", "none"),
        ("", "none"),
        ("TensorBoard", "tensorboard"),
        ("wandb, trackio,wandb", "wandb,trackio"),
        (["tensorboard", "wandb"], "tensorboard,wandb"),
    ],
)
def test_the_config_takes_several_names(given: Any, kept: str) -> None:
    assert make_config({"data": "-", "model": "-", "track": given}).io.track == kept


def test_a_misspelt_name_is_an_error() -> None:
    with pytest.raises(ConfigError, match=r"'tensorbord' \(did you mean 'tensorboard'\?\)"):
        make_config({"data": "-", "model": "-", "track": "tensorbord"})


def test_figures_have_names_that_group() -> None:
    record = {"epoch": 2, "steps": 10, "lr": 0.1, "train_loss": 1.5, "train_images": 50, "val_top1": 90.0}
    found = scalars({**record, "seconds": 3.0, "images_per_second": 70.0}, {"head": 0.1, "backbone layer 0": 0.01})
    assert found == {
        "epoch": 2,
        "train/loss": 1.5,
        "train/images": 50,
        "train/images_per_second": 70.0,
        "val/top1": 90.0,
        "lr/head": 0.1,
        "lr/backbone layer 0": 0.01,
    }
