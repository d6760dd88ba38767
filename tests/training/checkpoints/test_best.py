"""By what the best epoch is selected."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from training import tiny
from training.runs import KEYS
from vitrail.training.checkpoints.best import BestWeights, validation_score
from vitrail.training.run import train


def result(top1: float, loss: float, images: int, balanced: float = 0.0) -> Any:
    return SimpleNamespace(top1=top1, loss=loss, images=images, balanced_top1=balanced)


def best_of(*results: Any, balance: str = "none") -> int:
    """The number of the best result."""
    best = BestWeights()
    for number, one in enumerate(results, 1):
        score = validation_score(one, balance)
        if best.is_beaten_by(score, one.loss):
            best = BestWeights(number, one.top1, one.loss, score)
    return best.epoch


def test_by_accuracy_where_there_are_enough_images_and_by_loss_where_there_are_few() -> None:
    for images, expected in ((100, 1), (99, 2)):
        assert best_of(result(90.0, 1.5, images), result(85.0, 1.2, images)) == expected
    assert best_of(result(90.0, 1.5, 100), result(90.0, 1.4, 100)) == 2, "of equal accuracies, the lower loss"


def test_balanced_accuracy_where_classes_are_balanced() -> None:
    few = [result(90.0, 1.5, 20, balanced=80.0), result(95.0, 1.2, 20, balanced=60.0)]
    assert best_of(*few, balance="sample") == 1


def test_the_plan_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    tiny.add_variant(monkeypatch)
    for name, balance in (("one", "none"), ("two", "sample")):
        train(tiny.dataset(), out=tmp_path / name, **{**KEYS, "epochs": 0.2, "balance": balance})
        said = "select  the epoch of the lowest validation loss: 12 images" in capsys.readouterr().err
        assert said == (balance == "none")
