"""What users of other tools type first is answered with what to type here."""

from __future__ import annotations

from pathlib import Path

import pytest

import vitrail
from data.make_folder import make_folder
from vitrail.classifier import Classifier
from vitrail.cli import main
from vitrail.cli.app import app
from vitrail.cli.common.hints import COMMANDS, OPTIONS
from vitrail.images.preprocess import Preprocess


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as left:
        main(list(arguments))
    assert left.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    return lines[0]


@pytest.mark.parametrize(
    ("line", "answer"),
    [
        ("val", "`vitrail evaluate`"),
        ("finetune photos", "`vitrail train`"),
        ("trian", "'train'"),
        ("predict --model runs/photos holiday", "`vitrail predict MODEL PATH...`"),
        ("predict --source holiday", "`vitrail predict MODEL PATH...`"),
        ("predict model=runs/photos source=holiday", "write it without model="),
        ("evaluate --data photos runs/photos", "`vitrail evaluate MODEL DATA`"),
        ("train --data photos", "`vitrail train DATA`"),
        ("train photos --lr 1e-3", "lr=VALUE"),
        ("train photos --imgsz 64", "--img-size"),
        ("train photos --lr-find --img-size 64", "--lr-find lacks its value"),
        ("train photos --lr-find", "'--lr-find' requires an argument"),
        ("export runs/photos --format onnx", "--format is --target"),
    ],
)
def test_answers(line: str, answer: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert answer in refusal(capsys, *line.split())


def test_answers_name_what_exists() -> None:
    commands = {command.callback.__name__ for command in app.registered_commands if command.callback}
    assert set(COMMANDS.values()) <= commands
    assert not COMMANDS.keys() & commands
    assert not OPTIONS.keys() & set(OPTIONS.values())


def test_model_name_cut_short(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_folder(tmp_path / "photos", classes=2, per_class=2, broken=False)
    answer = refusal(capsys, "train", str(tmp_path / "photos"), "--model", "vit_tiny")
    assert "did you mean 'vit_tiny_patch16_224' or 'vit_tiny_patch16_384'?" in answer


def test_data_as_a_setting(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    missing = str(tmp_path / "photos")
    for arguments in (["epochs=1", f"data={missing}"], [f"data={missing}", "epochs=1"], [f"dataset={missing}"]):
        assert f"error: {missing} is neither a folder" in refusal(capsys, "train", *arguments)


@pytest.mark.parametrize(
    ("name", "kind", "answer"),
    [
        ("predict", AttributeError, r"vitrail\.load\('runs/photos'\)\.predict"),
        ("val", AttributeError, r"\.evaluate\("),
        ("ViT", ImportError, r"create_model\('vit_tiny_patch16_224'"),
        ("nothing", AttributeError, "'nothing'$"),
    ],
)
def test_names_of_the_package(name: str, kind: type[Exception], answer: str) -> None:
    with pytest.raises(kind, match=answer):
        getattr(vitrail, name)


def test_import_of_a_class() -> None:
    with pytest.raises(ImportError, match="create_model"):
        from vitrail import ViT  # noqa: F401


def test_attributes_of_a_classifier() -> None:
    model = vitrail.create_model("vit_nano_patch2_8", num_classes=2)
    classifier = Classifier(model, Preprocess(size=(8, 8)), ["a", "b"], architecture="vit_nano_patch2_8")
    for name, answer in (("classes", r"\.class_names"), ("export", r"vitrail\.export\("), ("nothing", "'nothing'$")):
        with pytest.raises(AttributeError, match=answer):
            getattr(classifier, name)
    assert not hasattr(classifier, "explain")
