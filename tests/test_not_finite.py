"""Weights and outputs that are NaN or infinite: refused where they are read, and told where they are computed."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from training import tiny
from training.runs import KEYS
from vitrail.classifier import Classifier
from vitrail.cli.app import main
from vitrail.errors import DataError, DivergedError, ModelError, RunError
from vitrail.images.preprocess import Preprocess
from vitrail.models.build import build_model
from vitrail.training.checkpoints.best import BestWeights
from vitrail.training.engine.trainer import Trainer
from vitrail.training.run import train


@pytest.fixture
def poisoned() -> Iterator[Classifier]:
    """A classifier whose logits are NaN for bright images."""
    classifier = Classifier(
        build_model(tiny.CONFIG), Preprocess(size=(8, 8), channels=1, mean=(0.5,), std=(0.5,)), ["one", "two", "three"]
    )

    def hook(module: Any, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        bright = inputs[0].flatten(1).mean(dim=1) > 0.9
        return torch.where(bright[:, None], torch.full_like(output, float("nan")), output)

    handle = classifier.model.register_forward_hook(hook)
    yield classifier
    handle.remove()


DARK, BRIGHT = np.zeros((8, 8), np.uint8), np.full((8, 8), 255, np.uint8)


def test_predict_names_the_image(poisoned: Classifier) -> None:
    found = poisoned.predict([DARK, BRIGHT, DARK])
    assert [each.error is None for each in found] == [True, False, True]
    assert "not finite" in str(found[1].error)
    assert found[1].label is None
    assert json.loads(json.dumps(found[1].to_dict(), allow_nan=False)) == {"path": None, "error": found[1].error}
    assert found[0] == found[2] == poisoned.predict(DARK)[0]


def test_embed_and_evaluate_refuse(poisoned: Classifier, monkeypatch: pytest.MonkeyPatch) -> None:
    data = tiny.dataset()
    poisoned.evaluate(data, "test")
    data.splits["test"].images[3] = 255  # type: ignore[attr-defined]
    with pytest.raises(ModelError, match=r"1 of 15 images are not finite, such as of tiny/2/3"):
        poisoned.evaluate(data, "test")
    with torch.no_grad():
        poisoned.model.norm.weight.fill_(float("inf"))  # type: ignore[union-attr, operator]
    with pytest.raises(DataError, match="not finite"):
        poisoned.embed(DARK)


def test_a_loss_that_is_not_finite_is_never_the_best() -> None:
    best = BestWeights()
    for loss in (float("nan"), float("inf"), float("-inf")):
        assert not best.is_beaten_by(100.0, loss)
    assert best.is_beaten_by(0.0, 1e30)


def spoil(monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    """The weights are NaN from this step on; the steps themselves look finite."""
    original = Trainer._optimizer_step

    def step(self: Trainer, finite: Any, before: Any) -> None:
        original(self, finite, before)
        if self.state.steps + 1 >= after:
            for parameter in self.model.parameters():
                parameter.data.fill_(float("nan"))

    monkeypatch.setattr(Trainer, "_optimizer_step", step)
    monkeypatch.setattr("vitrail.training.session.MAX_CONSECUTIVE_BAD_STEPS", 10**9)


def test_a_run_without_a_finite_validation_has_its_own_status(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny.add_variant(monkeypatch)
    keys = {**KEYS, "ema": 0.0, "epochs": 2}
    with monkeypatch.context() as patch:
        spoil(patch, 1)
        with pytest.raises(DivergedError, match="no validation of the run"):
            train(tiny.dataset(), out=tmp_path / "run", **keys)
    assert "is not kept" in capsys.readouterr().err
    assert not (tmp_path / "run" / "model").exists()
    assert not (tmp_path / "run" / "summary.json").exists()
    with pytest.raises(RunError):
        train(tiny.dataset(), resume=tmp_path / "run", progress=False)

    def diverged(*_: Any, **__: Any) -> None:
        raise DivergedError("it has diverged")

    monkeypatch.setattr("vitrail.training.run.train", diverged)
    with pytest.raises(SystemExit) as status:
        main(["train", "digits"])
    assert status.value.code == 4
    assert capsys.readouterr().err == "error: it has diverged\n"


def test_the_last_finite_epoch_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny.add_variant(monkeypatch)
    spoil(monkeypatch, 6)
    classifier = train(tiny.dataset(), out=tmp_path / "run", progress=False, **{**KEYS, "ema": 0.0, "epochs": 2})
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert ["val_loss" in line for line in lines] == [True, False]
    assert all(bool(torch.isfinite(x).all()) for x in classifier.model.state_dict().values())


def test_the_command_says_so_for_each_image(
    poisoned: Classifier, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.fromarray(BRIGHT).save(tmp_path / "bright.png")
    monkeypatch.setattr("vitrail.classifier.load", lambda *_, **__: poisoned)
    with pytest.raises(SystemExit) as status:
        main(["predict", "model", str(tmp_path), "--json"])
    out, err = capsys.readouterr()
    assert status.value.code == 2
    assert "not finite" in json.loads(out, parse_constant=lambda name: pytest.fail(name))["error"]
    assert err == "error: 0 of 1 images could be read and predicted\n"
