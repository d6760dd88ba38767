"""Training that starts from weights: what they decide, what is said of them, and what the model inherits."""

import json
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import vitrail
from data.make_folder import make_folder
from vitrail.classifier import Classifier
from vitrail.data.dataset import Sizes
from vitrail.errors import ModelError
from vitrail.images.preprocess import Preprocess
from vitrail.pretrained.create import create_model
from vitrail.training.config.schema import make_config
from vitrail.training.setup import prepare

OPTIONS = {"embed_dim": 32, "depth": 2, "num_heads": 2, "img_size": 16, "patch_size": 4}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A model folder of a ViT on digits' classes, in another order, with a preprocessing of its own."""
    model = create_model("vit_tiny_patch16_224", num_classes=10, in_chans=1, **OPTIONS)
    names = [str(digit) for digit in reversed(range(10))]
    preprocess = Preprocess(size=(16, 16), mean=(0.1,), std=(0.7,), channels=1, crop_pct=0.9)
    notes = {"source": "hf:someone/something", "licence": "cc-by-nc-4.0"}
    return Classifier(model, preprocess, names, notes=notes).save(tmp_path / "source")


def test_weights_bring_architecture_preprocessing_and_head(source: Path) -> None:
    setup = prepare("digits", make_config({"weights": str(source)}))
    assert setup.model.config.embed_dim == 32
    assert setup.preprocess == Preprocess(size=(16, 16), mean=(0.1,), std=(0.7,), channels=1, crop_pct=0.9)
    old = vitrail.load(source).model.head.weight
    assert torch.equal(setup.model.head.weight, old.flip(0))  # the same classes in another order: permuted by name
    assert any(line.startswith("weights from") for line in setup.reasons)


def test_another_size_and_other_channels(source: Path) -> None:
    setup = prepare("digits", make_config({"weights": str(source), "img_size": (24, 32), "in_chans": 3}))
    assert setup.model.pos_embed.shape[1] == 1 + 6 * 8
    assert setup.preprocess.size == (24, 32)
    assert setup.preprocess.mean == (0.1,) * 3
    assert "resized" in str(setup.pretrained.report)
    assert "adapted" in str(setup.pretrained.report)


def test_other_classes_get_a_fresh_head(source: Path, tmp_path: Path) -> None:
    make_folder(tmp_path / "photos", classes=2, per_class=6)
    setup = prepare(tmp_path / "photos", make_config({"weights": str(source)}))
    assert setup.model.head.weight.shape == (2, 32)
    assert {entry.name for entry in setup.pretrained.report.of("new")} == {"head.weight", "head.bias"}


def test_the_run_tells_and_inherits(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trained = vitrail.train("digits", weights=source, out=tmp_path / "run", epochs=0.1, verbose=True)
    told = capsys.readouterr().err
    assert "weights from" in told
    assert "blocks.1.mlp.fc2.weight" in told  # every tensor, with verbose
    notes = json.loads((tmp_path / "run/model/config.json").read_text())["vitrail"]["notes"]
    assert notes["source"]
    assert trained.notes["figures"]["images"] == 360


def test_a_model_that_the_weights_are_not(source: Path) -> None:
    with pytest.raises(ModelError, match=r"vit_small_patch16_224.*depth"):
        prepare("digits", make_config({"weights": str(source), "model": "vit_small_patch16_224"}))
    with pytest.raises(ModelError, match="vit_small_patch16_224"):
        prepare("digits", make_config({"weights": str(source), "model": "vit_smal_patch16_224"}))


@pytest.mark.parametrize(("fit", "mode"), [("crop", "center"), ("pad", "border"), ("squash", "squash")])
def test_fit_is_a_choice(fit: str, mode: str) -> None:
    setup = prepare("digits", make_config({"fit": fit}))
    assert setup.preprocess.crop_mode == mode
    assert not any(line.startswith("advice") for line in setup.reasons)


@pytest.mark.filterwarnings("ignore:.*copies of images in two splits")  # the images are made by a few loops
@pytest.mark.parametrize(
    ("wide", "advice"), [(3, ""), (4, "the center crop cuts off 40% or more of 10% of the images")]
)
def test_fit_is_advised_where_many_images_lose_much(wide: int, advice: str, tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for number in range(20):  # of the 40, so many have a shape of which a square loses 80 %
            size = (300, 60) if name == "a" and number < wide else (100, 90)
            Image.new("RGB", size, (number * 10, 9, 9)).save(tmp_path / name / f"{number}.png")
    lines = [line for line in prepare(tmp_path, make_config({})).reasons if line.startswith("advice")]
    assert lines == ([f"advice: {advice}; --fit pad or --fit squash keeps all of them"] if advice else [])


def test_the_share_of_images_that_lose_much() -> None:
    sizes = Sizes.of(np.array([[100, 100], [100, 160], [100, 170], [200, 100]]))
    assert sizes.losing(1.0, 0.4) == 0.5
    assert sizes.losing(1.7, 0.4) == 0.5  # the square loses 41 %, the tall one 71 %
    assert sizes.losing(1.0, 0.0) == 1.0


@pytest.mark.filterwarnings("ignore:.*copies of images in two splits")  # the images are made by a few loops
def test_a_folder_that_grew_is_warned_of(tmp_path: Path) -> None:
    made = make_folder(tmp_path / "photos", classes=2, per_class=12, broken=False)
    small = {"model": "vit_nano_patch2_8", "img_size": 8, "epochs": 0.1, "batch_size": 4, "progress": False}
    trained = vitrail.train(made.root, out=tmp_path / "run", **small)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trained.evaluate(made.root)
    for number in range(6):
        Image.new("RGB", (9, 9)).save(made.root / "class0" / f"more{number}.png")
    with pytest.warns(UserWarning, match="may have been trained on"):
        vitrail.load(tmp_path / "run").evaluate(made.root)


@pytest.mark.parametrize(("size", "differs"), [((48, 32), True), ((28, 28), False)])
def test_the_plan_says_where_a_swin_is_not_timms(size: tuple[int, int], differs: bool) -> None:
    setup = prepare("digits", make_config({"model": "swin_tiny_patch4_window7_224", "img_size": size}))
    found = [line for line in setup.reasons if "timm" in line]
    assert len(found) == differs
    assert all("48x32" in line and "height 28 or 56" in line for line in found)
