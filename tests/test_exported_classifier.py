"""An export as a classifier. Oracles: the matrix that its file contains, scikit-learn's metrics."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import sklearn.metrics
import torch
from PIL import Image

import vitrail
from inference.export_files import GREY, WEIGHT, expected_features, make_export
from vitrail.classifier import ExportedClassifier, load, load_torch
from vitrail.data.catalog import open_dataset
from vitrail.data.dataset import ArraySplit
from vitrail.errors import ConfigError, DeviceError, ExportError, ModelError
from vitrail.explanation.explain import explain
from vitrail.images.preprocess import Preprocess
from vitrail.training.engine.batch_augmenter import View
from vitrail.training.objectives.teacher import TeacherLogits, config_name, open_teacher

TARGETS = ("onnx", "openvino")


@pytest.fixture(scope="module", params=TARGETS)
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ExportedClassifier:
    folder = tmp_path_factory.mktemp("exports") / request.param
    found = vitrail.load(make_export(folder, request.param, check={"top1": 9.0}, notes={"split": {"split_seed": 3}}))
    assert isinstance(found, vitrail.ExportedClassifier)
    return found


def test_it_has_what_a_classifier_has(exported: ExportedClassifier) -> None:
    assert repr(exported) == "ExportedClassifier(linear, 10 classes, 8x8 pixels)"
    assert (exported.preprocess, exported.class_names, exported.precision) == (GREY, tuple("0123456789"), "fp32")
    assert (exported.notes, exported.report) == ({"split": {"split_seed": 3}}, {"top1": 9.0})
    assert not hasattr(exported, "model")


def test_it_predicts_and_embeds(exported: ExportedClassifier, tmp_path: Path) -> None:
    split = open_dataset("digits").split("test")
    assert isinstance(split, ArraySplit)
    images = split.images[:30].reshape(-1, 8, 8)
    Image.fromarray(images[0]).save(tmp_path / "a.png")
    features = expected_features(images)
    scores = torch.from_numpy(features @ WEIGHT).softmax(1)
    found = exported.predict([tmp_path / "a.png", tmp_path / "gone.png", *images[1:]], top=3)
    assert (found[0].path, found[1].error, len(found)) == (str(tmp_path / "a.png"), "does not exist", 31)
    for prediction, expected in zip([found[0], *found[2:]], scores, strict=True):
        order = expected.argsort(descending=True)[:3]
        assert [score.label for score in prediction.top] == [str(int(k)) for k in order]
        assert [score.score for score in prediction.top] == pytest.approx(expected[order].tolist(), abs=1e-5)
    assert np.abs(exported.embed(list(images)) - features).max() <= 1e-5 * np.abs(features).max()


def test_it_evaluates(exported: ExportedClassifier) -> None:
    test = open_dataset("digits", split_seed=3).split("test")
    assert isinstance(test, ArraySplit)
    scores = torch.from_numpy(expected_features(test.images.reshape(-1, 8, 8)) @ WEIGHT).double().softmax(1).numpy()
    result = exported.evaluate("digits")
    assert (result.images, result.split) == (len(test), "test")
    assert result.top1 == pytest.approx(100 * sklearn.metrics.accuracy_score(test.labels, scores.argmax(1)))
    assert result.loss == pytest.approx(sklearn.metrics.log_loss(test.labels, scores, labels=range(10)), rel=1e-4)


def test_what_an_export_cannot_do_is_refused(tmp_path: Path) -> None:
    folder = make_export(tmp_path / "e")
    for options, kind, facts in (
        ({"device": "cuda"}, DeviceError, "'cuda'"),
        ({"precision": "bf16"}, ConfigError, "fp32.*'bf16'"),
        ({"img_size": 16}, ConfigError, "8x8"),
    ):
        with pytest.raises(kind, match=facts):
            load(folder, **options)  # type: ignore[arg-type]
    assert load(folder, device="auto").precision == load(folder, device=torch.device("cpu")).precision == "fp32"
    for needs_torch in (load_torch, lambda path: explain(path, np.zeros((8, 8), np.uint8))):
        with pytest.raises(ModelError, match=r"e is an export.*runs/digits"):
            needs_torch(folder)
    with pytest.raises(ModelError, match="same name: 1"):
        load(make_export(tmp_path / "twice", class_names=tuple("0112345678")))
    (folder / "weights.bin").unlink()
    with pytest.raises(ExportError, match=r"weights\.bin"):
        load(folder)


def test_a_model_without_classes_embeds_and_does_not_predict(tmp_path: Path) -> None:
    clf = load(make_export(tmp_path / "e", class_names=()))
    assert clf.embed(np.zeros((8, 8), np.uint8)).shape == (1, 64)
    with pytest.raises(ModelError, match="no classes"):
        clf.predict(np.zeros((8, 8), np.uint8))


def test_an_export_teaches(exported: ExportedClassifier) -> None:
    """A student that reads colour images of other statistics: the oracle turns them to grey and normalises them."""
    assert config_name(exported) == str(exported.folder.resolve())
    teacher = open_teacher(config_name(exported))
    student = Preprocess(size=(8, 8), mean=(0.5,) * 3, std=(0.25,) * 3)
    answers = TeacherLogits(teacher, student, ("3", "1"), torch.device("cpu"))
    answers.check()
    grey = torch.randint(0, 256, (5, 1, 8, 8), dtype=torch.uint8)
    images = (grey.float().repeat(1, 3, 1, 1) / 255 - 0.5) / 0.25
    expected = (expected_features(grey[:, 0].numpy()) @ WEIGHT)[:, [3, 1]]
    found = answers(View(images, torch.zeros(5, dtype=torch.long), torch.arange(5), 0)).numpy()
    assert np.abs(found - expected).max() <= 1e-4 * np.abs(expected).max()


@pytest.mark.parametrize("target", TARGETS)
def test_the_commands_import_no_torch(target: str, tmp_path: Path) -> None:
    folder = make_export(tmp_path / "e", target)
    for name in ("1", "2"):
        (tmp_path / "data" / name).mkdir(parents=True)
        for k in range(3):
            Image.fromarray(np.full((9, 9), 20 * k, np.uint8)).save(tmp_path / "data" / name / f"{k}.png")
    code = (
        "import sys\nfrom vitrail.cli import main\n"
        "def run(*arguments):\n"
        "    try:\n        main(arguments)\n"
        "    except SystemExit as end:\n        assert end.code == 0, arguments\n"
        f"export, data, out = {str(folder)!r}, {str(tmp_path / 'data')!r}, {str(tmp_path / 'f.npy')!r}\n"
        "run('predict', export, data, '--json')\n"
        "early = {'scipy', 'sklearn', 'huggingface_hub', 'vitrail.data.catalog', 'asyncio', 'rich.progress'}\n"
        "print(sorted(early & set(sys.modules)))\n"
        "run('predict', export, data)\n"
        "run('embed', export, data, '--out', out)\n"
        "run('evaluate', export, data, '--split', 'train', '--json')\n"
        "print(sorted({'torch', 'sklearn', 'scipy'} & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert sum('"label"' in line and '"path"' in line for line in lines) == 6
    assert (lines[6], lines[-1]) == ("[]", "[]")
    assert "6 images, 64 features each" in done.stdout
    assert np.load(tmp_path / "f.npy").shape == (6, 64)
    assert '"top1": 50.0' in done.stdout or '"top1": 0.0' in done.stdout


def test_importing_the_package_for_an_export_imports_no_torch() -> None:
    modules = "vitrail.classifier, vitrail.evaluation.evaluate, vitrail.data.catalog, vitrail.feature_file"
    done = subprocess.run([sys.executable, "-c", f"import sys, {modules}; print('torch' in sys.modules)"],
                          capture_output=True, text=True, check=True)  # fmt: skip
    assert done.stdout == "False\n"
