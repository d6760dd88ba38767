"""What a run is told to cost, against what it costs."""

import math
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from training import tiny
from training.runs import KEYS
from vitrail.cli import main
from vitrail.training import session as session_module
from vitrail.training.engine.trainer import Trainer
from vitrail.training.resources import forecast as cost
from vitrail.training.resources import trial
from vitrail.training.resources.forecast import Cost, estimate_cost
from vitrail.training.run import train
from vitrail.training.session import Session


@pytest.fixture(autouse=True)
def _variant(monkeypatch: pytest.MonkeyPatch) -> None:
    tiny.add_variant(monkeypatch)


class Clock:
    """Time that goes on by the work that is done: half a second a batch that is read, two a step."""

    now = 0.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    from vitrail.data.loader import TrainLoader

    clock = Clock()
    for module in (cost, trial):
        monkeypatch.setattr(module, "time", clock)
    epoch = TrainLoader.epoch

    def read(self: Any, *place: int) -> Any:
        for batch in epoch(self, *place):
            clock.now += 0.5
            yield batch

    def step(self: Trainer, batch: Any) -> None:
        clock.now += 2.0 if self.state.steps else 9.0  # the first is slower
        self.state.steps += 1

    monkeypatch.setattr(TrainLoader, "epoch", read)
    monkeypatch.setattr(Trainer, "step", step)
    return clock


def estimate(session: Session, least_steps: int = 0) -> tuple[Cost | None, list[str]]:
    dataset = session.setup.dataset
    return estimate_cost(session.trainer, session.loader, dataset.counts(), dataset.eval_split(), least_steps)


def measured(**keys: Any) -> Cost:
    found, lines = estimate(tiny.session(**keys))
    assert found is not None
    assert lines == [found.line()]
    return found


def test_the_estimate_by_hand(clock: Clock) -> None:
    """Five steps an epoch of 2.5 s; 12 images to validate, 15 to test, each a tenth of (0.5 + 2 / 3) s."""
    told = measured(epochs=40, eval_every=2)
    an_image = (0.5 + 2 / 3) / 10
    assert told.seconds == pytest.approx(40 * 5 * 2.5 + 20 * 12 * an_image + 15 * an_image)
    assert (told.epochs, told.epoch_seconds, told.images_per_second) == (40, 12.5, 4.0)


def test_beside_an_accelerator_reading_and_learning_overlap(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    session = tiny.session(epochs=40)
    session.trainer.device = torch.device("meta")
    monkeypatch.setattr(torch.accelerator, "synchronize", lambda device: None)
    monkeypatch.setattr(cost, "preserve_state", lambda trainer: __import__("contextlib").nullcontext())
    monkeypatch.setattr(cost, "available_memory", lambda device: None)
    _, (line,) = estimate(session)
    assert "(5 images/s)" in line


def test_a_budget_is_told_in_epochs(clock: Clock) -> None:
    told = measured(epochs=None, budget=1000)
    an_image = (0.5 + 2 / 3) / 10
    assert told.epochs == pytest.approx(1000 / (5 * 2.5 + 12 * an_image))
    assert told.seconds == pytest.approx(1000, rel=0.02)


def test_an_estimate_that_is_asked_for_takes_its_steps_in_a_short_training_too(clock: Clock) -> None:
    session, an_image = tiny.session(epochs=2), (0.5 + 2 / 3) / 10
    assert estimate(session) == (None, [])
    found, _ = estimate(session, least_steps=3)
    assert found is not None
    assert found.seconds == pytest.approx(2 * 5 * 2.5 + 2 * 12 * an_image + 15 * an_image)


def test_trials_take_a_fiftieth_of_the_run_at_most(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[int] = []
    original = Trainer.step

    def step(self: Trainer, batch: Any) -> None:
        steps.append(1)
        original(self, batch)

    monkeypatch.setattr(Trainer, "step", step)
    for epochs, expected in ((19, 0), (20, 2), (30, 3), (400, 4)):
        steps.clear()
        assert len(estimate(tiny.session(epochs=epochs))[1]) == (expected > 0)
        assert len(steps) == expected
    steps.clear()
    estimate(tiny.session(epochs=None, budget=100))
    assert len(steps) == 1, "after nine seconds of a hundred"


def test_too_little_memory_is_told_before_it_is_taken(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    session = tiny.session(epochs=40)
    monkeypatch.setattr(cost, "available_memory", lambda device: 2**30)
    monkeypatch.setattr(cost, "estimate_peak_memory", lambda *_: 2 * 2**30)
    _, (line,) = estimate(session)
    assert line.startswith("warning: ")
    assert all(fact in line for fact in ("2.15 GB", "1.07 GB", "accumulate=2"))
    assert session.trainer.state.steps == 0
    assert clock.now == 0, "and no step is tried"


def test_the_line() -> None:
    told = Cost(754.0, 55.4, 20.0, 10.0, 1349.8, 2**30 // 2, 8 * 2**30)
    assert told.line() == "cost    about 12 m 34 s for 10 epochs (1,350 images/s), 537 MB of 8.59 GB memory"
    assert replace(told, peak_memory=None).line().endswith("(1,350 images/s)")


def test_a_run_says_what_it_will_cost_and_keeps_to_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The clock advances by the images: 10 ms each that is trained on, and a third of it that is evaluated."""
    ticks, step, evaluate = Clock(), Trainer.step, session_module.evaluate

    def train_step(self: Trainer, batch: Any) -> None:
        step(self, batch)
        ticks.now += 0.01 * len(batch)

    def evaluation(runtime: Any, images: Any, *names: Any, **keys: Any) -> Any:
        ticks.now += 0.01 / 3 * {"val": 12, "test": 15}[keys["name"]]
        return evaluate(runtime, images, *names, **keys)

    monkeypatch.setattr(Trainer, "step", train_step)
    monkeypatch.setattr(session_module, "evaluate", evaluation)
    for module in (cost, trial, session_module):
        monkeypatch.setattr(module, "time", ticks)
    summary = train(tiny.dataset(), out=tmp_path / "run", **{**KEYS, "epochs": 25, "checkpoint_every": 0}).report
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("cost ")]
    assert len(lines) == 1
    told = re.fullmatch(r"cost +about (\d+) s for 25 epochs \(([\d,]+) images/s\), .* [MG]B memory", lines[0])
    assert told, lines
    assert float(told[2].replace(",", "")) == pytest.approx(100)
    assert summary["images_per_second"] == pytest.approx(100)
    assert summary["seconds"] == pytest.approx(25 * (50 + 12 / 3) * 0.01)
    assert int(told[1]) == math.ceil(summary["seconds"])


def test_a_command_without_memory_ends_with_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("vitrail.training.run.train", lambda *_, **__: torch.empty(2**60))
    with pytest.raises(SystemExit) as stop:
        main(["train", "digits"])
    assert stop.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert "memory" in lines[0]
    assert "smaller" in lines[0]


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak can be started anew on Linux")
def test_a_part_of_the_batch_tells_the_memory_of_a_whole_one() -> None:
    """Each in a process of its own, as a peak that was reached before leaves memory that is not returned."""
    code = """
import sys, torch
from vitrail.data.catalog import open_dataset
from vitrail.diagnosis.cost import forecast, plan
from vitrail.training.resources import forecast as cost
cost.trial_images = lambda *_: int(sys.argv[1])
settings = {"model": "vit_tiny_patch16_224", "img_size": 96, "batch_size": 64, "epochs": 1, "pretrained": False,
            "cache": "off", "device": "cpu", "threads": 1}
print(forecast(plan(open_dataset("digits"), settings))["peak_bytes"])
"""
    whole, part = (
        int(subprocess.run([sys.executable, "-c", code, images], capture_output=True, text=True, check=True).stdout)
        for images in ("64", "32")
    )
    assert whole > 500 << 20, "most of it is of the step"
    assert part == pytest.approx(whole, rel=0.1)


def test_memory_is_unknown_where_the_peak_cannot_be_started_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """A part of the batch then tells nothing of a whole one."""
    monkeypatch.setattr(cost, "peak_memory", lambda device: 2**30)
    session = tiny.session(epochs=40)
    batches = list(session.loader.epoch(0))
    assert cost._steps(session.trainer, batches, len(batches[0]))[1] == 2**30
    assert cost._steps(session.trainer, batches, len(batches[0]) // 2)[1] is None


@pytest.mark.parametrize(("device", "expected"), [("cpu", 3.0), ("cuda", 0.01)])
def test_a_first_step_that_exceeds_the_share_of_a_budget(
    device: str, expected: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU it loads the kernels and says nothing of the others."""
    took = iter([3.0, 0.01, 0.01])
    monkeypatch.setattr(cost, "timed_step", lambda *_: next(took))
    trainer: Any = SimpleNamespace(schedule=SimpleNamespace(budget=75.0), device=torch.device(device))
    batches: list[Any] = [None] * 3
    assert cost._step_seconds(trainer, batches) == expected
