"""explain: maps in the coordinates of the original image, inputs and errors as in predict, and what is saved.

Oracles: images that are really cropped by Pillow, a method whose map is the image itself, and predict.
"""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import Tensor, nn

import vitrail
from vitrail.classifier import Classifier
from vitrail.errors import ConfigError, DataError, ModelError, RunError
from vitrail.explanation.explain import explain, explain_stream, open_classifier
from vitrail.explanation.methods.method import Method, Request
from vitrail.explanation.methods.table import METHODS
from vitrail.explanation.result import Explanation, Unreadable, file_name
from vitrail.images import limits
from vitrail.images.preprocess import Preprocess
from vitrail.models.build import build_model
from vitrail.models.configs import ViTConfig
from vitrail.pretrained.external import ExternalModel

SIZE = (32, 48)
NAMES = ("cat", "dog", "a:b", "fish")
CONFIG = ViTConfig(img_size=SIZE, patch_size=8, embed_dim=24, depth=2, num_heads=3, num_classes=4)


def brightness(request: Request) -> Tensor:
    """A map that is the image."""
    return request.images.mean(1).float()


BRIGHTNESS = Method("brightness", brightness, ("vit",), class_specific=False, signed=False, reference="")


@pytest.fixture
def bright(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vitrail.explanation.explain.choose_method", lambda name, model: BRIGHTNESS)


def make(config: ViTConfig = CONFIG, names: tuple[str, ...] = NAMES, **preprocess: Any) -> Classifier:
    torch.manual_seed(1)
    model = build_model(config)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return Classifier(model, Preprocess(size=config.img_size, **preprocess), names)


@pytest.fixture(scope="module")
def clf() -> Classifier:
    return make()


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    random = np.random.default_rng(0)
    for number in range(5):
        size = (int(random.integers(20, 90)), int(random.integers(20, 90)), 3)
        Image.fromarray(random.integers(0, 256, size, np.uint8)).save(folder / f"{number}.png")
    (folder / "2 broken.png").write_bytes(b"not an image")
    return folder


# --- where the map lies in the original

CROPS = [
    {"crop_mode": "center"},
    {"crop_mode": "center", "crop_pct": 0.8},
    {"crop_mode": "border"},
    {"crop_mode": "border", "crop_pct": 0.9},
    {"crop_mode": "squash"},
    {"crop_mode": "squash", "crop_pct": 0.875},
]


@pytest.mark.parametrize("crop", CROPS, ids=lambda crop: "-".join(map(str, crop.values())))
@pytest.mark.parametrize("size", [(250, 100), (100, 250), (123, 201), (20, 17)])
@pytest.mark.parametrize("target", [(32, 48), (64, 64)])
def test_crop_box_is_what_a_crop_shows(crop: dict[str, Any], size: tuple[int, int], target: tuple[int, int]) -> None:
    """In an image whose red is the row and whose green is the column."""
    rows, columns = np.mgrid[: size[0], : size[1]]
    image = np.stack([rows, columns, np.full(size, 255)], axis=2).astype(np.uint8)
    preprocess = Preprocess(size=target, interpolation="bilinear", mean=(0.0,) * 3, **crop)
    shown = preprocess.crop(Image.fromarray(image)).astype(float)
    top, left, bottom, right = preprocess.crop_box(*size)
    expected_row = top + (np.arange(target[0]) + 0.5) / target[0] * (bottom - top) - 0.5
    expected_column = left + (np.arange(target[1]) + 0.5) / target[1] * (right - left) - 0.5
    # The colour of padding has no blue; at the edge of the image, resizing repeats the last pixels.
    border = max(1.0, (bottom - top) / target[0], (right - left) / target[1])
    inner_row = (expected_row >= border) & (expected_row <= size[0] - 1 - border)
    inner_column = (expected_column >= border) & (expected_column <= size[1] - 1 - border)
    inside = np.ix_(inner_row, inner_column)
    assert inner_row.sum() > 5
    assert inner_column.sum() > 5
    assert np.all(shown[..., 2][inside] == 255)
    assert np.abs(shown[..., 0][inside] - expected_row[inner_row][:, None]).max() <= 1
    assert np.abs(shown[..., 1][inside] - expected_column[inner_column]).max() <= 1
    is_padding = (expected_row[:, None] < -border) | (expected_column < -border)
    assert np.all(shown[..., 2][is_padding] == 0)


@pytest.mark.usefixtures("bright")
@pytest.mark.parametrize("crop", CROPS, ids=lambda crop: "-".join(map(str, crop.values())))
@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_the_peak_lies_on_the_object(crop: dict[str, Any], orientation: int, tmp_path: Path) -> None:
    upright = np.zeros((200, 320, 3), np.uint8)
    upright[60:100, 180:220] = 255
    turns = {1: 0, 3: 2, 6: 1, 8: 3}[orientation]  # counter-clockwise quarter turns that undo the orientation
    image = Image.fromarray(np.ascontiguousarray(np.rot90(upright, turns)))
    exif = Image.Exif()
    exif[0x0112] = orientation
    image.save(tmp_path / "a.png", exif=exif)
    found = explain(make(mean=(0.0,) * 3, **crop), tmp_path / "a.png")
    assert found.size == found.heatmap.shape == (200, 320)
    assert found.heatmap.dtype == np.float32
    assert found.picture.size == (320, 200)
    row, column = np.unravel_index(found.heatmap.argmax(), found.heatmap.shape)
    assert 58 <= row < 102
    assert 178 <= column < 222
    centre = (found.heatmap.sum(1) @ np.arange(200.0), found.heatmap.sum(0) @ np.arange(320.0))
    assert np.allclose(np.array(centre) / found.heatmap.sum(), (79.5, 199.5), atol=1)


@pytest.mark.usefixtures("bright")
def test_what_the_model_did_not_see_is_zero_and_grey() -> None:
    found = explain(make(mean=(0.0,) * 3), np.full((32, 480, 3), 255, np.uint8))
    seen = np.zeros((32, 480), bool)
    seen[:, 216:264] = True
    assert np.array_equal(found.heatmap > 0, seen)
    overlay = np.asarray(found.overlay(1.0))
    assert np.all(overlay[:, :216] == overlay[0, 0])
    assert not np.array_equal(overlay[0, 0], overlay[16, 240])


@pytest.mark.usefixtures("bright")
def test_a_map_that_reaches_over_the_edge_is_cropped(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a model that pads: 5 cells of 7 pixels on 32, the last one of which is mostly outside."""
    ramp = Method("ramp", lambda request: torch.arange(5.0).expand(1, 5, 5), ("vit",), False, False, "")
    monkeypatch.setattr("vitrail.explanation.explain.choose_method", lambda name, model: ramp)
    clf = make(ViTConfig(img_size=(32, 32), patch_size=8, embed_dim=24, depth=1, num_heads=3, num_classes=4))
    heatmap = explain(clf, np.zeros((32, 32, 3), np.uint8)).heatmap
    oracle = nn.functional.interpolate(torch.arange(5.0).expand(1, 1, 5, 5), (35, 35), mode="bilinear")[0, 0, :32, :32]
    assert np.abs(heatmap - oracle.numpy()).max() < 1e-5


# --- inputs


def test_one_image_gives_one_explanation_as_predict_sees_it(clf: Classifier, photos: Path) -> None:
    found = explain(clf, photos / "1.png")
    predicted = clf.predict(photos / "1.png")[0]
    assert isinstance(found, Explanation)
    assert (found.path, found.target) == (str(photos / "1.png"), predicted.label)
    assert found.score == pytest.approx(predicted.score, abs=1e-5)
    assert [each.label for each in found.top] == [each.label for each in predicted.top]
    assert found.method == "relevance"
    assert found.grid == (4, 6)


def test_no_image_is_decoded_while_it_computes_where_memory_is_scarce(
    clf: Classifier, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reserved: list[int] = []

    @contextmanager
    def reserve(size: int) -> Iterator[None]:
        reserved.append(size)
        yield

    monkeypatch.setattr(limits, "reserved", reserve)
    monkeypatch.setattr(limits, "_memory_is_scarce", lambda _look: True)
    explain(clf, photos / "1.png", score=True)
    assert reserved.count(limits.DECODING_BYTES) == 2  # the map, and its score


def test_several_images_keep_their_order_and_name_the_unreadable(clf: Classifier, photos: Path) -> None:
    found = explain(clf, photos, batch_size=2)
    assert [Path(each.path).name for each in found] == ["0.png", "1.png", "2 broken.png", "2.png", "3.png", "4.png"]
    assert [type(each) for each in found] == [Explanation, Explanation, Unreadable, *[Explanation] * 3]
    assert found[2].to_dict() == {"path": str(photos / "2 broken.png"), "error": found[2].error}
    assert explain(clf, [photos / "2 broken.png"])[0].error == found[2].error
    assert explain(clf, photos / "no*.png")[0].error


def test_a_single_unreadable_image_raises(clf: Classifier, photos: Path) -> None:
    with pytest.raises(DataError, match=r"2 broken\.png"):
        explain(clf, photos / "2 broken.png")
    with pytest.raises(DataError, match=r"missing\.png"):
        explain(clf, "missing.png")


def test_images_in_memory(clf: Classifier, photos: Path) -> None:
    image = Image.open(photos / "1.png")
    oracle = explain(clf, photos / "1.png").heatmap
    for each in (image, np.asarray(image), (photos / "1.png").read_bytes()):
        found = explain(clf, each)
        assert found.path is None
        assert repr(found) == f"Explanation(image in memory: relevance · {found.score_text()})"
        assert np.array_equal(found.heatmap, oracle)
    several = explain(clf, np.asarray(image)[None])
    assert isinstance(several, list)
    assert np.array_equal(several[0].heatmap, oracle)
    bands = make(
        ViTConfig(img_size=SIZE, patch_size=8, embed_dim=24, depth=1, num_heads=3, num_classes=4, in_chans=5),
        mean=(0.5,) * 5,
        std=(0.5,) * 5,
        channels=5,
    )
    assert explain(bands, np.zeros((40, 50, 5), np.uint8)).picture.mode == "RGB"


@pytest.mark.parametrize("method", ["relevance", "gradcam", "occlusion"])
def test_a_batch_is_the_same_as_one_by_one(clf: Classifier, photos: Path, method: str) -> None:
    paths = [photos / f"{number}.png" for number in (0, 1, 2, 3, 4, 0, 1, 2)]
    together = explain(clf, paths, method, batch_size=8)
    for path, each in zip(paths, together, strict=True):
        alone = explain(clf, path, method)
        assert np.abs(each.values - alone.values).max() <= 1e-5 * max(1, np.abs(alone.values).max())
        assert (each.target, each.path) == (alone.target, alone.path)


def test_targets(clf: Classifier, photos: Path) -> None:
    with torch.inference_mode():
        logits = clf.model.eval()(clf.preprocess(Image.open(photos / "1.png"))[None])[0]
    for target, name in (("dog", "dog"), (1, "dog"), ("a:b", "a:b"), ("2", "a:b")):
        found = explain(clf, photos / "1.png", target=target)
        assert (found.target, found.is_pair) == (name, False)
        assert found.score == pytest.approx(float(logits.softmax(0)[NAMES.index(name)]), abs=1e-5)
    pair = explain(clf, photos / "1.png", target="cat:fish")
    assert (pair.target, pair.is_pair) == ("cat:fish", True)
    assert pair.score == pytest.approx(float(logits[0] - logits[3]), abs=1e-4)
    with pytest.raises(ConfigError, match="bird"):
        explain(clf, photos / "1.png", target="bird")


def test_relevance_is_negative_for_a_class_that_is_ruled_out(clf: Classifier, photos: Path) -> None:
    predicted = explain(clf, photos / "1.png", "relevance")
    assert not predicted.signed
    assert predicted.values.min() >= 0
    worst = min(predicted.top, key=lambda each: each.score).label
    least = explain(clf, photos / "1.png", "relevance", target=worst)
    assert least.signed
    assert least.is_against
    assert least.values.max() <= 0
    pair = explain(clf, photos / "1.png", "relevance", target=f"{worst}:{predicted.target}")
    assert pair.score is not None
    assert pair.score < 0
    assert not pair.signed
    assert pair.values.min() >= 0  # what favours the first all the same


def test_a_method_with_signs_keeps_its_colours_without_negative_values(
    clf: Classifier, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    positive = replace(METHODS["occlusion"], compute=lambda request: METHODS["occlusion"].compute(request).abs())
    monkeypatch.setattr("vitrail.explanation.explain.choose_method", lambda name, model: positive)
    found = explain(clf, photos / "1.png")
    assert found.signed
    assert not found.is_against


def test_options_are_checked_before_an_image_is_read(clf: Classifier) -> None:
    with pytest.raises(ModelError, match="relevence"):
        explain_stream(clf, "missing.png", "relevence")
    with pytest.raises(ConfigError, match=r"relevance .* block"):
        explain_stream(clf, "missing.png", block=1)
    with pytest.raises(ConfigError, match="batch_size"):
        explain_stream(clf, "missing.png", batch_size=0)
    with pytest.raises(ConfigError, match="middle"):
        explain_stream(clf, "missing.png", "attention", head="middle")
    with pytest.raises(ConfigError, match="blurr"):
        explain_stream(clf, "missing.png", baseline="blurr")


def test_a_model_without_classes_has_maps_of_its_attention_only(photos: Path) -> None:
    clf = make(ViTConfig(img_size=SIZE, patch_size=8, embed_dim=24, depth=2, num_heads=3, num_classes=0), ())
    with pytest.raises(ModelError, match="rollout"):
        explain(clf, photos / "1.png")
    found = explain(clf, photos / "1.png", "rollout")
    assert (found.target, found.score, found.top) == (None, None, ())
    assert found._repr_png_().startswith(b"\x89PNG")


def test_external_models(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = timm.create_model("test_resnet", num_classes=4).eval()
    preprocess = Preprocess(size=(64, 64))
    direct = explain(Classifier(model, preprocess, NAMES, architecture="timm:test_resnet"), photos / "1.png")
    assert (direct.method, direct.target in NAMES) == ("gradcam", True)
    del model.num_classes  # as torchvision's
    monkeypatch.setattr(
        "vitrail.explanation.explain.open_external_model", lambda source: ExternalModel(model, preprocess, NAMES)
    )
    by_name = open_classifier("timm:test_resnet")
    assert np.array_equal(explain(by_name, photos / "1.png").values, direct.values)
    assert explain("timm:test_resnet", photos / "1.png", "occlusion").method == "occlusion"
    with pytest.raises(ModelError, match="relevance"):
        explain(by_name, photos / "1.png", "relevance")


# --- nothing is disturbed


@pytest.mark.parametrize(
    "context", [torch.no_grad, torch.inference_mode, lambda: torch.autocast("cpu", torch.bfloat16)]
)
def test_any_context_gives_the_same_map_and_keeps_the_model(photos: Path, context: Any) -> None:
    clf = make()
    oracle = explain(clf, photos / "1.png").values
    clf.model.train().requires_grad_(False)
    before, random = {name: value.clone() for name, value in clf.model.state_dict().items()}, torch.get_rng_state()
    with context():
        found = explain(clf, photos / "1.png")
        assert torch.is_inference_mode_enabled() == (context is torch.inference_mode)
    assert np.array_equal(found.values, oracle)
    assert clf.model.training
    assert all(torch.equal(before[name], value) for name, value in clf.model.state_dict().items())
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in clf.model.parameters())
    assert torch.equal(torch.get_rng_state(), random)
    assert not any(module._forward_hooks or module._backward_hooks for module in clf.model.modules())


def test_two_threads_at_once(clf: Classifier, photos: Path) -> None:
    paths = [photos / f"{number}.png" for number in (0, 1, 3, 4)]
    oracle = [each.values for each in explain(clf, paths)]
    found: list[list[Explanation]] = []
    threads = [threading.Thread(target=lambda: found.append(explain(clf, paths))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 2
    assert all(np.array_equal(each.values, one) for run in found for each, one in zip(run, oracle, strict=True))


def test_a_bfloat16_model(photos: Path) -> None:
    clf = make()
    clf.model.to(torch.bfloat16)
    found = explain(clf, photos / "1.png")
    assert found.values.dtype == np.float32
    assert np.isfinite(found.values).all()


# --- what is saved


def test_json_and_files(clf: Classifier, photos: Path, tmp_path: Path) -> None:
    found = explain(clf, photos / "1.png", score=True)
    saved = found.save(tmp_path / "new" / "folder")
    record = json.loads(json.dumps(found.to_dict(saved)))
    assert list(record) == [
        *("path", "method", "target", "score", "is_against", "grid", "heatmap", "picture", "faithfulness")
    ]
    assert {"score", "deletion", "insertion", "random_mean", "random_std", "percentile"} <= set(record["faithfulness"])
    assert 0 <= record["faithfulness"]["percentile"] <= 100
    assert np.array_equal(np.load(record["heatmap"]), found.heatmap)
    with Image.open(record["picture"]) as picture:
        assert picture.height > found.overlay().height  # the caption
        assert picture.format == "PNG"
    assert explain(clf, photos / "1.png").to_dict()["faithfulness"] is None


@pytest.mark.parametrize(
    "name", ["../../escape", "a/b", "", ".hidden", "new\nline", "\x00", "x" * 5000, "ü" * 300, "CON:", "\udcff"]
)
def test_file_names_stay_in_the_folder(name: str, tmp_path: Path) -> None:
    found = file_name(name, "relevance")
    assert Path(found).name == found
    (tmp_path / f"{found}-12.png").touch()
    assert [path.parent for path in tmp_path.rglob("*")] == [tmp_path]
    assert not found.startswith(".")


def test_no_file_is_overwritten(clf: Classifier, photos: Path, tmp_path: Path) -> None:
    found = explain(clf, photos / "1.png")
    saved = [found.save(tmp_path) for _ in range(3)]
    assert (
        len({each.heatmap for each in saved} | {each.picture for each in saved}) == len(list(tmp_path.iterdir())) == 6
    )
    assert {each.heatmap.stem for each in saved} == {each.picture.stem for each in saved}
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match="file"):
        found.save(tmp_path / "file")


def test_the_public_names() -> None:
    assert vitrail.explain is explain
    assert vitrail.Explanation is Explanation
