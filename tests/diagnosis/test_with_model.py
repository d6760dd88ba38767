"""`doctor` with the features of a model, on images whose class only the model can see."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

import vitrail
from vitrail.classifier import Classifier
from vitrail.cli import main
from vitrail.data.catalog import open_dataset
from vitrail.diagnosis.doctor import model_features
from vitrail.diagnosis.scan import scan_images
from vitrail.images.preprocess import Preprocess
from vitrail.models.build import build_model
from vitrail.models.configs import ViTConfig

CLASSES, IMAGES, SIDE = 3, 30, 128
WRONG = [("class0", 3, 1), ("class1", 5, 2), ("class2", 7, 0)]  # folder, number, and the class that the image has


def stripes(c, number):
    """Lines of one pixel across, along, or a chessboard: no trace of them is left at half the size."""
    draw = np.random.default_rng([c, number])
    y, x = np.mgrid[:SIDE, :SIDE]
    fine = (-1.0) ** (y, x, x + y)[c]
    coarse = np.asarray(
        Image.fromarray(draw.integers(90, 166, (6, 6)).astype(np.uint8)).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    )
    return Image.fromarray((coarse + 40 * fine).clip(0, 255).astype(np.uint8))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("stripes")
    wrong = {(name, number): c for name, number, c in WRONG}
    for c in range(CLASSES):
        (root / f"class{c}").mkdir()
        for number in range(IMAGES):
            seen = wrong.get((f"class{c}", number), c)
            stripes(seen, 100 * c + number).save(root / f"class{c}/{number:02}.png")
    return root


@pytest.fixture(scope="module")
def classifier():
    torch.manual_seed(0)
    config = ViTConfig(img_size=(SIDE, SIDE), in_chans=1, num_classes=CLASSES, patch_size=16, embed_dim=48, depth=1,
                       num_heads=3)  # fmt: skip
    preprocess = Preprocess(size=(SIDE, SIDE), crop_pct=1.0, mean=(0.5,), std=(0.2,), channels=1)
    return Classifier(build_model(config), preprocess, [f"class{c}" for c in range(CLASSES)])


def suspects(diagnosis):
    (finding,) = [each for each in diagnosis["findings"] if each["check"] == "suspect_label"]
    return finding


def test_features_are_those_of_embed(folder, classifier):
    scan = scan_images(open_dataset(folder))
    paths = [scan.path(i) for i in range(len(scan))]
    features = model_features(scan, classifier.engine(), lambda count: None)
    torch.testing.assert_close(features, torch.as_tensor(classifier.embed(paths)), atol=1e-5, rtol=0)


def test_wrong_labels_that_only_the_model_sees(folder, classifier, tmp_path, capsys):
    alone = suspects(vitrail.doctor(folder, forecast_model="none").to_dict())
    assert (alone["severity"], alone["count"]) == ("note", 0), "simple features tell nothing about these classes"
    classifier.save(tmp_path / "model")
    with pytest.raises(SystemExit) as status:
        main(["doctor", str(folder), "--model", str(tmp_path / "model"), "--forecast-model", "none", "--json"])
    assert status.value.code == 0
    found = suspects(json.loads(capsys.readouterr().out))
    planted = {str(folder / name / f"{number:02}.png"): f"{name}, perhaps class{c}" for name, number, c in WRONG}
    assert found["severity"] == "warning"
    assert found["notes"] == planted
