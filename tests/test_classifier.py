"""Classifier: predict, embed, evaluate, save and load. Oracles: the model called by hand, scikit-learn's metrics."""

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sklearn.metrics
import torch
from PIL import Image
from sklearn.datasets import load_sample_image

import vitrail
from vitrail.classifier import Classifier, load
from vitrail.data.catalog import open_dataset
from vitrail.errors import ConfigError, DataError, ModelError, WeightsError
from vitrail.images.preprocess import Preprocess
from vitrail.models.build import build_model
from vitrail.models.configs import ConvNeXtConfig, ModelConfig, ResNetConfig, SwinConfig, ViTConfig
from vitrail.prediction import Prediction, Score
from vitrail.pretrained.create import create_model

DIGITS = tuple("0123456789")
VIT = ViTConfig(img_size=(8, 8), patch_size=2, embed_dim=16, depth=2, num_heads=2, num_classes=10, in_chans=1)
PHOTO = ViTConfig(img_size=(32, 32), patch_size=8, embed_dim=24, depth=2, num_heads=3, num_classes=4)


def classifier(config: ModelConfig = VIT, names: tuple[str, ...] | None = None, **options: Any) -> Classifier:
    torch.manual_seed(1)
    model = build_model(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    channels = config.in_chans
    preprocess = Preprocess(size=config.img_size, mean=(0.5,) * channels, std=(0.3,) * channels, channels=channels)
    return Classifier(model, preprocess, names or tuple("0123456789"[: config.num_classes]), **options)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    (tmp_path / "photos").mkdir()
    for name in ("china.jpg", "flower.jpg"):
        image = Image.fromarray(load_sample_image(name))
        image.save(tmp_path / "photos" / name)
        image.resize((40, 60)).save(tmp_path / "photos" / f"small {name}.png")
    return tmp_path / "photos"


@torch.inference_mode()
def by_hand(clf: Classifier, image: Image.Image) -> torch.Tensor:
    return clf.model.eval()(clf.preprocess(image)[None])[0].softmax(0)  # type: ignore[no-any-return]


# --- predict


def test_predictions_are_the_models_in_the_order_of_the_inputs(photos: Path) -> None:
    clf = classifier(PHOTO, ("cat", "dog", "bird", "fish"))
    paths = [photos / "flower.jpg", photos / "china.jpg", photos / "small flower.jpg.png"]
    found = clf.predict([*paths, Image.open(paths[0]), np.asarray(Image.open(paths[1]))], top=3, batch_size=2)
    assert [p.path for p in found] == [*map(str, paths), None, None]
    for prediction, path in zip(found, [*paths, *paths], strict=False):
        expected = by_hand(clf, Image.open(path))
        order = expected.argsort(descending=True)[:3].tolist()
        assert [score.label for score in prediction.top] == [clf.class_names[k] for k in order]
        assert [score.score for score in prediction.top] == pytest.approx(expected[order].tolist(), rel=1e-5)
        assert (prediction.label, prediction.score) == (prediction.top[0].label, prediction.top[0].score)
    assert len({p.score for p in found[:3]}) == 3


def test_inputs_may_be_one_path_or_a_folder(photos: Path) -> None:
    clf = classifier(PHOTO)
    one = clf.predict(photos / "china.jpg")
    assert len(one) == 1
    assert one[0].error is None
    assert [Path(p.path or "").name for p in clf.predict(str(photos))] == [
        "china.jpg",
        "flower.jpg",
        "small china.jpg.png",
        "small flower.jpg.png",
    ]


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_unreadable_images_give_errors_in_their_place(photos: Path, batch_size: int) -> None:
    (photos / "broken.jpg").write_bytes((photos / "china.jpg").read_bytes()[:5000])
    (photos / "empty.png").write_bytes(b"")
    (photos / "text.jpg").write_text("hello")
    names = ["broken.jpg", "china.jpg", "empty.png", "text.jpg", "gone.jpg", "flower.jpg"]
    found = classifier(PHOTO).predict([photos / name for name in names], batch_size=batch_size)
    assert [Path(p.path or "").name for p in found] == names
    assert [p.error is None for p in found] == [False, True, False, False, False, True]
    for prediction in found:
        if prediction.error:
            assert prediction.to_dict() == {"path": prediction.path, "error": prediction.error}
            assert "\n" not in prediction.error
            assert (prediction.label, prediction.score, prediction.top) == (None, None, ())


def test_only_unreadable_images(tmp_path: Path) -> None:
    found = classifier(PHOTO).predict([tmp_path / "a.jpg", tmp_path / "b.jpg"])
    assert [p.error for p in found] == ["does not exist"] * 2
    assert classifier(PHOTO).predict([]) == []


def test_top_is_at_most_the_number_of_classes(photos: Path) -> None:
    clf = classifier(PHOTO)
    prediction = clf.predict(photos / "china.jpg", top=50)[0]
    assert len(prediction.top) == 4
    assert sum(score.score for score in prediction.top) == pytest.approx(1, abs=1e-6)
    with pytest.raises(ConfigError, match=r"top .*0"):
        clf.predict(photos, top=0)
    with pytest.raises(ConfigError, match=r"batch_size .*0"):
        clf.predict(photos, batch_size=0)


def test_a_prediction_as_json() -> None:
    scores = (Score("cat", 0.75), Score("dog", 0.25))
    assert Prediction("a.jpg", "cat", 0.75, scores).to_dict() == {
        "path": "a.jpg",
        "label": "cat",
        "score": 0.75,
        "top": [{"label": "cat", "score": 0.75}, {"label": "dog", "score": 0.25}],
    }


def test_predicting_leaves_mode_gradients_and_threads_as_they_were(photos: Path) -> None:
    clf = classifier(PHOTO)
    clf.model.train()
    threads = torch.get_num_threads()
    stream = clf.stream([photos] * 3, batch_size=1)
    next(stream)
    assert clf.model.training
    assert not torch.is_inference_mode_enabled()
    assert torch.is_grad_enabled()
    stream.close()  # type: ignore[attr-defined]
    clf.model.eval()
    clf.predict(photos)
    assert not clf.model.training
    assert torch.get_num_threads() == threads
    assert not [t.name for t in threading.enumerate() if t.name.startswith("decode")]


def test_images_are_read_while_the_model_runs(photos: Path) -> None:
    """While the model computes a batch, the images of the next ones are decoded."""
    clf = classifier(PHOTO)
    seen: list[int] = []
    crop = Preprocess.crop

    def counted(self: Preprocess, image: Image.Image) -> Any:
        seen.append(1)
        return crop(self, image)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Preprocess, "crop", counted)
        stream = clf.stream([photos / "small china.jpg.png"] * 9, batch_size=2)
        next(stream)
        for _ in range(100):
            if len(seen) >= 4:
                break
            threading.Event().wait(0.05)
        assert len(seen) >= 4
        assert len(list(stream)) == 8


# --- embed


@pytest.mark.parametrize(
    "config",
    [
        PHOTO,
        ViTConfig(img_size=(32, 32), patch_size=8, embed_dim=24, depth=2, num_heads=3, num_classes=4, dist_token=True),
        SwinConfig(img_size=(32, 32), embed_dim=12, depths=(1, 2), num_heads=(1, 2), window_size=4, num_classes=4),
        ResNetConfig(img_size=(32, 32), block="basic", layers=(1, 1, 1, 1), num_classes=4),
        ConvNeXtConfig(img_size=(32, 32), depths=(1, 1, 1, 1), dims=(8, 16, 24, 32), num_classes=4),
    ],
    ids=["vit", "distilled", "swin", "resnet", "convnext"],
)
def test_embeddings_are_what_the_head_reads(config: ModelConfig, photos: Path) -> None:
    clf = classifier(config)
    paths = sorted(photos.iterdir())
    features = clf.embed(paths, batch_size=3)
    assert features.dtype == np.float32
    assert features.shape == (4, clf.model.num_features)
    with torch.inference_mode():
        x = torch.stack([clf.preprocess(Image.open(path)) for path in paths])
        clf.model.eval()
        expected = clf.model.forward_head(clf.model.forward_features(x), pre_logits=True).numpy()
    assert np.abs(features - expected).max() <= 1e-5 * np.abs(expected).max()


def test_embed_raises_for_an_unreadable_image(photos: Path) -> None:
    clf = classifier(PHOTO)
    with pytest.raises(DataError, match=r"gone\.jpg"):
        clf.embed([photos / "china.jpg", photos / "gone.jpg"])
    assert clf.embed([]).shape == (0, 24)
    (batch,) = clf.engine().stream([photos / "gone.jpg", photos / "china.jpg"], features=True)
    assert (batch.errors, batch.outputs.shape) == (["does not exist", None], (1, 24))


def test_a_model_without_a_head_embeds_and_does_not_predict(photos: Path) -> None:
    clf = classifier(ViTConfig(img_size=(32, 32), patch_size=8, embed_dim=24, depth=1, num_heads=3, num_classes=0))
    assert clf.embed(photos / "china.jpg").shape == (1, 24)
    with pytest.raises(ModelError, match="no classes"):
        clf.predict(photos / "china.jpg")


# --- evaluate


def test_an_evaluation_is_that_of_the_model_on_the_test_images() -> None:
    clf = classifier()
    result = clf.evaluate("digits")
    test = open_dataset("digits").split("test")
    assert (result.split, result.images) == ("test", len(test))
    with torch.inference_mode():
        x = torch.stack([clf.preprocess(test.image(i)) for i in range(len(test))])
        scores = clf.model.eval()(x).softmax(1).numpy()
    top5 = 100 * sklearn.metrics.top_k_accuracy_score(test.labels, scores, k=5, labels=range(10))
    assert result.top1 == pytest.approx(100 * sklearn.metrics.accuracy_score(test.labels, scores.argmax(1)))
    assert result.top5 == pytest.approx(top5)
    assert result.loss == pytest.approx(sklearn.metrics.log_loss(test.labels, scores, labels=range(10)), rel=1e-4)
    assert np.array_equal(result.confusion, sklearn.metrics.confusion_matrix(test.labels, scores.argmax(1)))


def test_a_split_can_be_named() -> None:
    clf = classifier()
    assert clf.evaluate("digits", "val").images == len(open_dataset("digits").split("val"))
    with pytest.raises(DataError, match="'tset'"):
        clf.evaluate("digits", "tset")


def test_classes_are_matched_by_name() -> None:
    clf = classifier()
    shuffled = [3, 1, 4, 0, 5, 9, 2, 6, 8, 7]
    other = classifier(names=tuple(DIGITS[k] for k in shuffled))
    with torch.no_grad():
        for name in ("weight", "bias"):
            getattr(other.model.head, name).copy_(getattr(clf.model.head, name)[shuffled])
    one, two = clf.evaluate("digits"), other.evaluate("digits")
    assert one.top1 == two.top1
    assert two.loss == pytest.approx(one.loss, rel=1e-5)
    by_label = {row["label"]: row for row in two.per_class}
    assert [by_label[row["label"]] for row in one.per_class] == one.per_class


def test_a_class_that_the_model_does_not_know_is_an_error() -> None:
    clf = classifier(names=(*DIGITS[:9], "nine"))
    with pytest.raises(DataError, match=r"digits .*'9'"):
        clf.evaluate("digits")


def make_folder(root: Path, classes: int = 3, images: int = 20) -> Path:
    rng = np.random.default_rng(0)
    for k in range(classes):
        (root / str(k)).mkdir(parents=True)
        for i in range(images):
            Image.fromarray(rng.integers(0, 256, (8, 8), dtype=np.uint8)).save(root / str(k) / f"{i:02}.png")
    return root


def test_a_folder_is_split_as_it_was_in_training(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "photos")
    how = {"val_fraction": 0.2, "test_fraction": 0.3, "split_seed": 7}
    clf = classifier(notes={"split": how})
    expected = clf.evaluate(open_dataset(folder, **how))  # type: ignore[arg-type]
    assert clf.evaluate(folder).to_dict() == expected.to_dict()
    assert clf.evaluate(folder).loss != classifier().evaluate(folder).loss
    clf.save(tmp_path / "model")
    assert load(tmp_path / "model").evaluate(folder).to_dict() == expected.to_dict()


def test_broken_images_of_a_folder_are_named(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "photos")
    (folder / "1" / "99.png").write_bytes(b"")
    result = classifier().evaluate(folder)
    assert [Path(item["path"]).name for item in result.skipped] == ["99.png"]


# --- save and load


def test_a_saved_classifier_predicts_the_same(photos: Path, tmp_path: Path) -> None:
    clf = classifier(PHOTO, ("cat", "dog", "bird", "fish"), notes={"data": "photos"})
    clf.save(tmp_path / "model")
    back = vitrail.load(tmp_path / "model")
    assert back.predict(photos) == clf.predict(photos)
    assert (back.class_names, back.preprocess, back.notes) == (clf.class_names, clf.preprocess, clf.notes)
    assert repr(back) == "Classifier(vit, 4 classes, 32x32 pixels)"
    assert back.to("cpu") is back
    assert back.device == torch.device("cpu")


def test_a_run_folder_is_loaded_with_its_summary(tmp_path: Path) -> None:
    classifier(PHOTO).save(tmp_path / "run" / "model")
    assert load(tmp_path / "run").report is None
    (tmp_path / "run" / "summary.json").write_text('{"top1": 99.2}')
    assert load(str(tmp_path / "run")).report == {"top1": 99.2}


@pytest.mark.parametrize(
    ("name", "facts"),
    [("gone", r"gone "), ("empty", r"empty .*model\.safetensors"), ("file", r"file .*empty")],
)
def test_a_source_that_is_not_a_model_is_an_error(name: str, facts: str, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    with pytest.raises(WeightsError, match=facts):
        load(tmp_path / name)


def test_precision_is_that_of_load(photos: Path, tmp_path: Path) -> None:
    clf = classifier(PHOTO)
    clf.save(tmp_path / "model")
    assert load(tmp_path / "model").precision == "auto"
    for precision in ("off", "bf16"):
        assert load(tmp_path / "model", precision=precision).predict(photos) == classifier(
            PHOTO, precision=precision
        ).predict(photos)
    assert not np.array_equal(load(tmp_path / "model", precision="bf16").embed(photos), clf.embed(photos))
    with pytest.raises(ConfigError, match="'fp8'"):
        load(tmp_path / "model", precision="fp8")


def test_names_and_classes_must_agree() -> None:
    with pytest.raises(ModelError, match=r"2 .*10 "):
        classifier(names=("a", "b"))
    with pytest.raises(ModelError, match="name: a"):
        classifier(names=("a",) * 10)


def test_another_size_than_in_training(tmp_path: Path) -> None:
    model = create_model("vit_tiny_patch16_224", depth=1, img_size=32, num_classes=3)
    Classifier(model, Preprocess(size=(32, 32)), ["a", "b", "c"]).save(tmp_path / "m")
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (70, 90, 3), dtype=np.uint8))
    resized = load(tmp_path / "m", img_size="64x48")
    assert resized.preprocess.size == (64, 48)
    with torch.inference_mode():
        logits = model.eval()(Preprocess(size=(64, 48))(picture)[None])
    assert resized.predict(picture)[0].score == pytest.approx(float(logits.softmax(1).max()), rel=1e-5)
    for size, kind in (("50", ModelError), ("big", ConfigError), ("1x2x3", ConfigError)):
        with pytest.raises(kind, match=size):
            resized.resize(size)
    assert resized.preprocess.size == (64, 48)
