"""Steps that are not finite: skipped and counted, then a return to the last checkpoint, then the end, explained."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from training import tiny
from training.guests_for_verify import Steady
from training.runs import KEYS, assert_same, outcome, run
from vitrail.errors import RunError
from vitrail.training.checkpoints.checkpoint import load_checkpoint
from vitrail.training.engine.interrupt import Stopped
from vitrail.training.engine.trainer import Trainer
from vitrail.training.objectives.classification import Classify
from vitrail.training.run import train
from vitrail.training.session import Session


@pytest.fixture(autouse=True)
def _variant(monkeypatch: pytest.MonkeyPatch) -> None:
    tiny.add_variant(monkeypatch)


def spoil(
    monkeypatch: pytest.MonkeyPatch, bad: Callable[[int, float], bool], value: float = float("nan")
) -> list[tuple[int, float]]:
    """Make the loss of some steps not finite, by their number from 1 and their rate's factor. Gives the steps met."""
    original, met = Trainer._accumulate_gradients, []

    def learn(self: Trainer, view: Any) -> Tensor:
        step = self.state.steps + 1
        met.append((step, self.state.lr_scale))
        task = self.task

        def spoilt(model: nn.Module, part: Any) -> Tensor:
            loss: Tensor = task(model, part)
            return loss * value if bad(step, self.state.lr_scale) else loss

        self.task = spoilt
        try:
            return original(self, view)
        finally:
            self.task = task

    monkeypatch.setattr(Trainer, "_accumulate_gradients", learn)
    return met


def everything(one: Session) -> dict[str, Tensor]:
    parts = one.trainer.state_dict()
    return {f"{part} {name}": value.clone() for part in parts for name, value in parts[part].items()}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("at_once", [True, False])
def test_a_step_that_is_not_finite_changes_nothing(
    at_once: bool, value: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither weights nor statistics of batch norms, average or optimiser; also where the device is not waited for."""
    spoil(monkeypatch, lambda step, rate: step == 3, value)
    one = tiny.session(ema=0.9, clip_grad=1.0, weight_decay=0.1)
    one.trainer.guard.synchronous = at_once
    batches = one.loader.epoch(0)
    for _ in range(2):
        one.trainer.step(next(batches))
    before, loss, state = everything(one), one.trainer.mean_loss(), one.trainer.state
    assert state.skipped == 0
    one.trainer.step(next(batches))
    assert tiny.same(everything(one), before)
    assert one.trainer.mean_loss() == loss
    assert (state.steps, state.images, state.epoch_images) == (3, 20, 20)
    assert (state.skipped, state.consecutive_bad_steps) == (1, 1)
    one.trainer.step(next(batches))
    assert one.trainer.mean_loss() != loss
    assert (state.skipped, state.consecutive_bad_steps, state.images) == (1, 0, 30)
    assert not any(tiny.same({name: value}, {name: before[name]}) for name, value in everything(one).items())


def test_a_gradient_that_is_not_finite_is_found_without_clipping() -> None:
    one = tiny.session(clip_grad=None)
    one.trainer.model.head.weight.register_hook(lambda gradient: gradient * float("inf"))
    before = {name: value.clone() for name, value in one.trainer.state_dict()["model"].items()}
    one.trainer.step(next(one.loader.epoch(0)))
    assert tiny.same(one.trainer.state_dict()["model"], before)
    one.trainer.guard.flush()
    assert one.trainer.state.skipped == 1


def test_not_waiting_for_the_device_gives_the_same_numbers() -> None:
    """But for the average, whose sum is formed otherwise, to the last bits."""
    states = []
    for at_once in (True, False):
        one = tiny.session(ema=0.9, clip_grad=1.0)
        one.trainer.guard.synchronous = at_once
        for batch in one.loader.epoch(0):
            one.trainer.step(batch)
        states.append((one.trainer.state_dict(), one.trainer.mean_loss()))
    (first, loss), (second, other) = states
    assert loss == other
    assert tiny.same(first["model"], second["model"])
    assert tiny.same(first["optimizer"], second["optimizer"])
    for name, value in first["ema"].items():
        torch.testing.assert_close(second["ema"][name], value, rtol=1e-5, atol=1e-7, msg=name)


def test_single_steps_are_skipped_and_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil(monkeypatch, lambda step, rate: step in (3, 4, 8))
    summary = train(tiny.dataset(), out=tmp_path / "run", **KEYS).report
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["skipped_steps"] for line in lines] == [2, 3, 3]
    assert [line["train_images"] for line in lines] == [30, 40, 20]
    assert (summary["skipped_steps"], summary["rollbacks"], summary["train_images"]) == (3, 0, 90)
    assert "3 steps skipped" in capsys.readouterr().err


def test_a_few_consecutive_bad_steps_lead_back_at_half_the_rate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """To the checkpoint of step 6, whose rate a resumed run keeps; and the same run is resumed bit for bit."""
    met = spoil(monkeypatch, lambda step, rate: step in (8, 9, 10) and rate == 1)
    summary = train(tiny.dataset(), out=tmp_path / "whole", **KEYS).report
    assert met == [(step, 1.0) for step in range(1, 11)] + [(step, 0.5) for step in range(7, 13)]
    assert (summary["skipped_steps"], summary["rollbacks"], summary["steps"]) == (3, 1, 12)
    found = load_checkpoint(tmp_path / "whole" / "checkpoint")
    assert found is not None
    assert found.record["state"]["lr_scale"] == 0.5
    said = " ".join(capsys.readouterr().err.split())
    assert "steps 8 to 10 were not finite and changed nothing; back at step 6, with 0.5 of the learning rate" in said
    # Killed right after the return, and after a step more.
    for steps in (0, 1):
        folder, left = tmp_path / f"killed-{steps}", [steps]
        with monkeypatch.context() as patch:
            original = Trainer.step

            def step(
                self: Trainer, batch: Any, left: list[int] = left, original: Callable[..., None] = original
            ) -> None:
                if self.state.rollbacks and left[0] == 0:
                    raise KeyboardInterrupt
                left[0] -= self.state.rollbacks
                original(self, batch)

            patch.setattr(Trainer, "step", step)
            with pytest.raises(KeyboardInterrupt):
                run(folder)
        train(tiny.dataset(), resume=folder, progress=False)
        assert_same(outcome(folder), outcome(tmp_path / "whole"))


def test_before_the_first_checkpoint_the_way_back_is_to_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same as a run that begins at half the rate."""
    keys = {"epochs": 2, "checkpoint_every": 0}
    with monkeypatch.context() as patch:
        met = spoil(patch, lambda step, rate: step in (3, 4, 5) and rate == 1)
        run(tmp_path / "one", **keys)
    assert [step for step, rate in met if rate == 0.5] == list(range(1, 11))
    run(tmp_path / "two", **keys, lr=KEYS["lr"] / 2)
    one, two = outcome(tmp_path / "one"), outcome(tmp_path / "two")
    assert one["model"] == two["model"]
    for part, tensors in two["tensors"].items():
        assert tiny.same(tensors, one["tensors"][part]), part


def test_after_a_few_rollbacks_the_run_ends_with_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    met = spoil(monkeypatch, lambda step, rate: step in (5, 6, 7))
    with pytest.raises(RunError) as error:
        run(tmp_path / "run")
    message = str(error.value)
    assert "\n" not in message
    for fact in (
        "steps 5 to 7",
        "loss nan",
        "3 rollbacks",
        "step 3",
        "lower lr",
        "warmup_epochs",
        "clip_grad=1",
        "images",
    ):
        assert fact in message
    assert [step for step, _ in met] == [1, 2, 3, 4, 5, 6, 7] + 3 * [4, 5, 6, 7]
    assert [rate for step, rate in met if step == 7] == [1.0, 0.5, 0.25, 0.125]
    found = load_checkpoint(tmp_path / "run" / "checkpoint")
    assert found is not None
    assert found.record["state"]["steps"] == 3
    assert not (tmp_path / "run" / "summary.json").exists()


def test_a_stop_amid_bad_steps_goes_on_counting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import os
    import signal

    spoil(monkeypatch, lambda step, rate: step in (5, 6, 7) and rate == 1)
    original = Trainer.step

    def step(self: Trainer, batch: Any) -> None:
        if self.state.steps == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        original(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", step)
        with pytest.raises(Stopped):
            run(tmp_path / "run")
    found = load_checkpoint(tmp_path / "run" / "checkpoint")
    assert found is not None
    assert (found.record["state"]["steps"], found.record["state"]["consecutive_bad_steps"]) == (6, 2)
    summary = train(tiny.dataset(), resume=tmp_path / "run", progress=False).report
    assert (summary["skipped_steps"], summary["rollbacks"]) == (3, 1)


class Poisoned(Steady):
    """A guest that gives no number for one bright image."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) / (1 - (x.amax(dim=(1, 2, 3), keepdim=False) > 1e3).float())[:, None]


def test_a_guest_that_fails_on_one_image_loses_the_steps_with_it(tmp_path: Path) -> None:
    data = tiny.dataset()
    data.std = (1e-4,)  # so that every image is bright enough
    keys = {key: value for key, value in tiny.PLAIN.items() if key not in ("model", "drop_path")}
    with pytest.raises(RunError, match="check the images and the model"):
        train(data, model=Poisoned(), img_size=8, in_chans=1, out=tmp_path / "run", progress=False, **keys)


def test_the_task_itself_is_not_touched() -> None:
    """The loss that is counted is the task's mean over the images."""
    one = tiny.session()
    batch = next(one.loader.epoch(0))
    expected = Classify()(one.trainer.model, one.trainer.view(batch, 0))
    one = tiny.session()
    one.trainer.step(batch)
    assert one.trainer.mean_loss() == pytest.approx(float(expected.detach()), rel=1e-6)


def test_an_epoch_without_a_good_step_has_no_loss(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil(monkeypatch, lambda step, rate: step < 3)
    train(tiny.dataset(), out=tmp_path / "run", **{**KEYS, "batch_size": 25, "epochs": 2})
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["train_loss"] is None for line in lines] == [True, False]
    assert "could not be written" not in capsys.readouterr().err
