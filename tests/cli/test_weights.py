"""--weights FILE with a catalog name as MODEL: a checkpoint that does not tell its architecture."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import vitrail
from vitrail.cli.app import main
from vitrail.errors import ModelError, WeightsError

NAME = "vit_tiny_patch16_224"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """w.pth, the bare state dict of a ViT-Ti of three classes, and photos/0, 1 and 2."""
    root = tmp_path_factory.mktemp("weights")
    torch.manual_seed(1)
    torch.save(vitrail.create_model(NAME, num_classes=3).state_dict(), root / "w.pth")
    draw = np.random.default_rng(0)
    for number in range(6):
        place = root / "photos" / str(number % 3) / f"{number}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(draw.integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(place)
    return root


def run(capsys: pytest.CaptureFixture[str], *arguments: object, status: int = 0) -> str:
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    out = capsys.readouterr()
    assert ended.value.code == status, out.err
    return out.out if status == 0 else out.err


def test_every_command_takes_the_file(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights, photos = ("--weights", folder / "w.pth"), folder / "photos"
    classifier = vitrail.load(folder / "w.pth", model=NAME)
    own = create_own(folder)
    assert all(torch.equal(a, b) for a, b in zip(classifier.model.state_dict().values(), own.values(), strict=True))

    lines = run(capsys, "predict", NAME, photos, *weights, "--json").splitlines()
    expected = classifier.predict(photos)
    assert [json.loads(line)["label"] for line in lines] == [prediction.label for prediction in expected]
    result = json.loads(run(capsys, "evaluate", NAME, photos, *weights, "--split", "train", "--json"))
    assert result["loss"] == pytest.approx(classifier.evaluate(photos, "train").loss)
    run(capsys, "embed", NAME, photos, *weights, "--out", tmp_path / "f.npy")
    assert np.load(tmp_path / "f.npy") == pytest.approx(classifier.embed(photos), abs=1e-5)
    one = next(photos.rglob("*.png"))
    found = run(capsys, "explain", NAME, one, *weights, "--method", "attention", "--json", "--out", tmp_path / "e")
    assert json.loads(found)["target"] in ("0", "1", "2", None)


def create_own(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = torch.load(folder / "w.pth", weights_only=True)
    return found


def test_wrong_names_and_files(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ModelError, match="model=NAME"):
        vitrail.load(folder / "w.pth")
    with pytest.raises(WeightsError, match="192 in the file and 384 in the model"):
        vitrail.load(folder / "w.pth", model="vit_small_patch16_224")
    with pytest.raises(ModelError, match="vit_tiny_patch16_224"):
        vitrail.load(folder / "w.pth", model="vit_tiny_patch16_225")
    vitrail.load(folder / "w.pth", model=NAME).save(tmp_path / "model")
    assert vitrail.load(tmp_path / "model", model=NAME).architecture == NAME
    with pytest.raises(ModelError, match="is a model of vit_tiny_patch16_224, not vit_small_patch16_224"):
        vitrail.load(tmp_path / "model", model="vit_small_patch16_224")
    line = run(capsys, "predict", "no/such/folder", folder / "photos", "--weights", folder / "w.pth", status=2)
    assert len(line.splitlines()) == 1
