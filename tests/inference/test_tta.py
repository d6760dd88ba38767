"""Test-time augmentation. Oracles: averages by hand of the model called by hand, torchvision's five crops."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_image
from torchvision.transforms import functional as transforms

import vitrail
from inference.export_files import WEIGHT, expected_features, make_export
from vitrail.classifier import Classifier
from vitrail.cli import main
from vitrail.data.catalog import open_dataset
from vitrail.data.dataset import ArraySplit
from vitrail.errors import ConfigError
from vitrail.images.preprocess import Preprocess
from vitrail.inference.tta import TtaRuntime, enlarged, forward_passes
from vitrail.models.build import build_model
from vitrail.models.configs import ViTConfig

CONFIG = ViTConfig(img_size=(32, 32), patch_size=8, embed_dim=24, depth=2, num_heads=3, num_classes=4)


@pytest.fixture(scope="module")
def photo() -> Image.Image:
    return Image.fromarray(load_sample_image("china.jpg")).resize((90, 60))


def classifier(**options: object) -> Classifier:
    torch.manual_seed(1)
    model = build_model(CONFIG)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return Classifier(model, Preprocess(size=(32, 32)).replace(**options), ("cat", "dog", "bird", "fish"))


@torch.inference_mode()
def by_hand(clf: Classifier, images: list[Image.Image]) -> np.ndarray:
    """The mean of the probabilities of 32x32 images."""
    pixels = np.stack([np.asarray(image) for image in images])
    batch = (torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255 - torch.tensor(clf.preprocess.mean)[:, None, None]) / (
        torch.tensor(clf.preprocess.std)[:, None, None]
    )
    probabilities: np.ndarray = clf.model.eval()(batch.contiguous()).softmax(1).mean(0).numpy()
    return probabilities


def predicted(clf: Classifier, image: Image.Image, tta: str | None) -> np.ndarray:
    (found,) = clf.predict(image, tta=tta, probabilities=True)
    assert found.probabilities is not None
    return found.probabilities


def test_flip_averages_an_image_and_its_mirror_image(photo: Image.Image) -> None:
    clf = classifier()
    seen = Image.fromarray(clf.preprocess.crop(photo))
    expected = by_hand(clf, [seen, seen.transpose(Image.Transpose.FLIP_LEFT_RIGHT)])
    assert np.abs(predicted(clf, photo, "flip") - expected).max() < 1e-5
    assert np.abs(predicted(clf, photo, None) - expected).max() > 1e-3
    mirrored = photo.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    assert np.abs(predicted(clf, mirrored, "flip") - expected).max() < 1e-5


def test_crops_are_torchvisions(photo: Image.Image) -> None:
    """Of the image resized to 32 / 0.875 = 36 pixels, or to 32 / crop_pct if that is larger."""
    for crop_pct, side in ((1.0, 36), (0.95, 36), (0.8, 40)):
        clf = classifier(crop_pct=crop_pct)
        resized = transforms.resize(photo, side, transforms.InterpolationMode.BICUBIC)
        views = list(transforms.five_crop(transforms.center_crop(resized, [side, side]), [32, 32]))
        assert np.abs(predicted(clf, photo, "crops") - by_hand(clf, views)).max() < 1e-5, crop_pct
    assert not np.array_equal(np.asarray(views[0]), np.asarray(views[4]))
    assert np.array_equal(clf.preprocess.crop(photo), np.asarray(views[4])), "the center is what predict sees"


def test_wide_inputs_and_the_other_crop_modes() -> None:
    for mode in ("squash", "border", "center"):
        preprocess = Preprocess(size=(32, 64), crop_pct=0.8, crop_mode=mode)
        larger = enlarged(preprocess)
        assert larger.size == (40, 80)
        image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (70, 90, 3), np.uint8))
        whole, usual = larger.crop(image), preprocess.crop(image)
        assert np.array_equal(whole[4:36, 8:72], usual), mode


@pytest.mark.parametrize("target", ["onnx", "openvino"])
def test_exports_average_too(target: str, tmp_path: Path) -> None:
    clf = vitrail.load(make_export(tmp_path / target, target))
    split = open_dataset("digits").split("test")
    assert isinstance(split, ArraySplit)
    images = split.images.reshape(-1, 8, 8)
    views = [
        torch.from_numpy(expected_features(view) @ WEIGHT).softmax(1) for view in (images, images[:, :, ::-1].copy())
    ]
    expected = torch.stack(views).mean(0).numpy()
    found = np.stack([each.probabilities for each in clf.predict(list(images), tta="flip", probabilities=True)])
    assert np.abs(found - expected).max() < 1e-5
    result = clf.evaluate("digits", tta="flip")
    assert result.top1 == pytest.approx(100 * (expected.argmax(1) == split.labels).mean())
    picked = expected[np.arange(len(expected)), split.labels].astype(np.float64)
    assert result.loss == pytest.approx(-np.log(picked).mean(), abs=1e-5)
    assert clf.evaluate("digits").loss != pytest.approx(result.loss, abs=1e-3)
    crops = clf.predict(list(images[:3]), tta="crops", probabilities=True)  # of 9x9 pixels
    assert all(each.probabilities is not None and abs(each.probabilities.sum() - 1) < 1e-5 for each in crops)


def test_probabilities_that_underflow_and_logits_that_are_not_finite() -> None:
    class Fixed:
        name, num_classes, num_features, default_batch_size = "fixed", 2, 3, 8
        preprocess = Preprocess(size=(4, 4))

        def logits(self, images: np.ndarray) -> np.ndarray:
            rows = np.array([[0.0, -2000.0], [0.0, np.nan], [0.0, np.inf]], np.float32)
            return rows if images[0, 0, 0, 0] else rows[:, ::-1]

        def features(self, images: np.ndarray) -> np.ndarray:
            return images[:, 0, :3, 0].astype(np.float32)

        def fingerprint(self) -> str:
            return "f"

    images = np.zeros((3, 4, 4, 3), np.uint8)
    images[:, :, 0] = 4
    runtime = TtaRuntime(Fixed(), "flip")
    found = runtime.logits(images)
    assert found[0] == pytest.approx([np.log(0.5)] * 2)
    assert not np.isfinite(found[1:]).any()
    assert runtime.features(images).tolist() == [[2.0, 0.0, 0.0]] * 3
    assert runtime.fingerprint() != TtaRuntime(Fixed(), "crops").fingerprint()


def test_what_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"flip, crops, not 'flips'.*did you mean 'flip'"):
        classifier().predict(Image.new("RGB", (9, 9)), tta="flips")
    assert (forward_passes("flip"), forward_passes("crops")) == (2, 5)


def run(*arguments: object) -> int:
    """The exit status."""
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    return int(ended.value.code or 0)


def test_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], photo: Image.Image) -> None:
    export = str(make_export(tmp_path / "export"))
    assert run("evaluate", export, "digits", "--tta", "flip", "--json") == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["tta"] == "flip"
    assert "2 forward passes per image" in err
    assert run("evaluate", export, "digits", "--tta", "crops") == 0
    assert "digits, tta=crops" in capsys.readouterr().out
    photo.convert("L").save(tmp_path / "a.png")
    assert run("predict", export, tmp_path / "a.png", "--tta", "crops", "--json") == 0
    out, err = capsys.readouterr()
    expected = vitrail.load(export).predict(tmp_path / "a.png", tta="crops")[0]
    assert json.loads(out)["score"] == pytest.approx(expected.score)
    assert "5 forward passes per image" in err
    assert run("predict", export, tmp_path / "a.png", "--tta", "five") == 2
