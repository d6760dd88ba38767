"""`vitrail compare`."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from comparison import comparing
from training.page import assert_self_contained
from vitrail.classifier import Classifier
from vitrail.cli import main
from vitrail.comparison.curve import learning_curve
from vitrail.data.catalog import open_dataset
from vitrail.errors import ConfigError, DataError
from vitrail.images.preprocess import Preprocess
from vitrail.models.build import build_model
from vitrail.models.catalog import variant
from vitrail.training.run import train


@pytest.fixture(autouse=True)
def _variants(monkeypatch: pytest.MonkeyPatch) -> None:
    comparing.add_variants(monkeypatch)
    comparing.quick(monkeypatch)


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as caught:
        main(["compare", *map(str, arguments)])
    out, err = capsys.readouterr()
    assert isinstance(caught.value.code, int)
    return caught.value.code, out, err


def test_a_comparison_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ("digits", "--models", ",".join(comparing.MODELS), "--epochs", 0.5, "--seeds", 1, "--shares", "100",
             "--out", tmp_path / "out", "--device", "cpu", "batch_size=64")  # fmt: skip
    status, out, err = run(capsys, *given, "--json")
    assert status == 0
    result = json.loads(out)
    assert result["plan"]["settings"] | {"batch_size": 64, "epochs": 0.5} == result["plan"]["settings"]
    assert "2/2" in err
    assert result["command"].startswith("vitrail compare digits --models")
    status, out, _ = run(capsys, *given)
    assert status == 0
    assert result["paragraph"] in out
    assert "compare.html" in out
    status, _, err = run(capsys, *given[:-1], "batch_size=32")
    assert (status, "batch_size" in err) == (2, True)


def test_a_learning_curve_from_pixels(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capsys, "digits", "--curve", "--features", "pixels", "--out", tmp_path, "--json")
    assert status == 0
    result = json.loads(out)
    assert [point["images"] for point in result["curve"]] == [81, 162, 323, 646, 1293]
    assert [point["top1"]["n"] for point in result["curve"]] == [5, 5, 5, 5, 1]
    ahead, now = result["forecast"], result["curve"][-1]["top1"]["mean"]
    assert ahead["images"] == 2586
    assert ahead["low"] <= ahead["top1"] <= ahead["high"]
    assert 90 < now < ahead["top1"] + 1
    assert json.loads((tmp_path / "learning_curve.json").read_text()) == result
    assert_self_contained((tmp_path / "learning_curve.html").read_text())


def test_features_of_a_model_are_those_of_embed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build_model(variant("vit_nano_patch2_8").config)
    classifier = Classifier(model, Preprocess(size=(8, 8)), [str(k) for k in range(10)])
    classifier.save(tmp_path / "model")
    seen: list[Any] = []

    def stop(features: Any, *_: Any) -> None:
        seen.append(features)
        raise KeyboardInterrupt

    monkeypatch.setattr("vitrail.comparison.curve.measure_curve", stop)
    with pytest.raises(KeyboardInterrupt):
        learning_curve("digits", str(tmp_path / "model"))
    train = open_dataset("digits").split("train")
    expected = classifier.embed([np.asarray(train.image(i)) for i in range(3)])
    np.testing.assert_allclose(seen[0][:3], expected, atol=1e-4 * np.abs(expected).max())


def test_features_that_were_trained_on_the_images_are_refused(tmp_path: Path) -> None:
    model = build_model(variant("vit_nano_patch2_8").config)
    names = [str(k) for k in range(10)]
    Classifier(model, Preprocess(size=(8, 8)), names, notes={"data": "digits"}).save(tmp_path / "model")
    with pytest.raises(ConfigError, match="trained on digits"):
        learning_curve("digits", str(tmp_path / "model"))


def test_the_same_images_under_another_name_are_recognised(tmp_path: Path) -> None:
    renamed = dataclasses.replace(open_dataset("digits"), name="others")
    train(renamed, model="vit_nano_patch2_8", epochs=0.01, out=tmp_path / "run", progress=False)
    with pytest.raises(ConfigError, match="trained on digits"):
        learning_curve("digits", str(tmp_path / "run"))


def test_too_few_images_for_a_curve() -> None:
    from training import tiny

    with pytest.raises(DataError, match="50 training images"):
        learning_curve(tiny.dataset(), "pixels")


@pytest.mark.parametrize(
    ("arguments", "fact"),
    [
        (("digits", "--shares", "half"), "--shares"),
        (("digits", "--features", "pixels"), "--curve"),
        (("digits", "--curve", "--features", "pixels", "--epochs", "2"), "epochs"),
        (("digits", "--curve", "--models", "resnet18"), "--models"),
        (("digits", "--models", "resnet18"), "at least two"),
        (("no such data",), "no such data"),
    ],
)
def test_mistakes_are_one_line(arguments: tuple[str, ...], fact: str, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = run(capsys, *arguments)
    assert (status, out) == (2, "")
    assert fact in err
    assert err.count("\n") == 1
