"""`vitrail.export`: what is written, what the gate refuses, and that nothing is left behind.

The files of ONNX are written once; each test alters a copy.
"""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper
from PIL import Image

import vitrail
from deploy.digit_models import digits_vit, outlier_vit
from vitrail.classifier import Classifier
from vitrail.data.catalog import open_dataset
from vitrail.deploy import candidates, trials
from vitrail.deploy.graph import write_onnx
from vitrail.deploy.quantize.calibration import Calibration, choose_calibration
from vitrail.deploy.quantize.layers import layers
from vitrail.deploy.quantize.static import operation_of
from vitrail.deploy.targets.openvino import read_openvino
from vitrail.deploy.trials import ExportRefused
from vitrail.errors import ConfigError, DeviceError, RunError
from vitrail.inference.openvino_runtime import OpenVINOSession

ANY_SPEED = {"min_speedup": 0}
ROW_KEYS = {
    "target", "precision", "path", "bytes", "latency_ms", "speedup", "top1", "top1_reference", "agreement",
    "max_abs_logit_error", "accepted", "reason",
}  # fmt: skip


@pytest.fixture(scope="module")
def exact(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The ONNX files of the two classifiers."""
    folders = {}
    for name, classifier in (("digits", digits_vit()), ("outlier", outlier_vit())):
        folders[name] = tmp_path_factory.mktemp(name)
        write_onnx(classifier, folders[name])
    return folders


@pytest.fixture
def use(exact: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Copy the files of a classifier instead of writing them, altered by a function of the model."""

    def choose(name: str = "digits", alter: Callable[[onnx.ModelProto], None] | None = None) -> None:
        def copy(classifier: Classifier, folder: Path) -> None:
            shutil.copytree(exact[name], folder, dirs_exist_ok=True)
            for file in ("model.onnx", "image.onnx") if alter else ():
                model = onnx.load(folder / file, load_external_data=False)
                alter(model)
                onnx.save_model(model, folder / file)

        monkeypatch.setattr(candidates, "write_onnx", copy)

    choose()
    return choose


def test_the_folder_predicts_as_the_model_without_vitrail(use: Any, tmp_path: Path, capsys: Any) -> None:
    classifier, out = digits_vit(), tmp_path / "digits"
    result = vitrail.export(classifier, out, target="onnx", precision="fp32", check="digits", **ANY_SPEED)
    assert sorted(path.name for path in out.iterdir()) == [
        "README.md", "export.html", "export.json", "image.onnx", "model.onnx", "weights.bin",
    ]  # fmt: skip
    assert [path.name for path in tmp_path.iterdir()] == ["digits"]
    (row,) = result.rows
    assert row.keys() >= ROW_KEYS
    assert row["accepted"]
    assert row["path"] == str(out)
    assert row["agreement"] == 100
    assert row["difference"] == 0
    evaluation = classifier.evaluate("digits")
    assert row["top1"] == pytest.approx(evaluation.top1)
    assert row["top1"] > 85  # else the gate has nothing to lose
    loaded = vitrail.load(out)
    images = open_dataset("digits").split("test")
    sample = [np.asarray(images.image(index)) for index in range(20)]
    assert [each.label for each in loaded.predict(sample)] == [each.label for each in classifier.predict(sample)]
    # The lines of the README, run in the folder, predict a photograph.
    photo = Image.fromarray(np.kron(sample[3], np.ones((5, 5), np.uint8)))
    photo.save(out / "photo.jpg", quality=95)
    (code,) = (out / "README.md").read_text().split("```python\n")[1:]
    code = code.split("```")[0]
    assert len(code.splitlines()) <= 10
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(out)
        exec(compile(code, "README.md", "exec"), {})
    label, score = capsys.readouterr().out.split()
    expected = classifier.predict(out / "photo.jpg")[0]
    assert label == expected.label
    assert float(score) == pytest.approx(expected.score, abs=0.01)


def refused(out: Path, classifier: Classifier, **options: Any) -> str:
    """The reason, with the promise that nothing is left behind."""
    with pytest.raises(ExportRefused) as error:
        vitrail.export(classifier, out, **options)
    assert list(out.parent.iterdir()) == []
    assert error.value.rows
    assert not any(row["accepted"] and row["path"] for row in error.value.rows)
    return str(error.value)


def only_these(monkeypatch: pytest.MonkeyPatch) -> None:
    """No search for alternatives."""
    monkeypatch.setattr(trials, "CANDIDATES", ())


ONNX: dict[str, Any] = {"target": "onnx", "precision": "fp32", "check": "digits"}


def test_too_slow(use: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    only_these(monkeypatch)
    message = refused(tmp_path / "out", digits_vit(), **ONNX, min_speedup=1000)
    assert "at least 1000x" in message
    assert "--min-speedup" in message


def scale_pixels(model: onnx.ModelProto) -> None:
    """Wrong normalisation: twice the contrast."""
    cast = next(node for node in model.graph.node if node.op_type == "Cast" and not node.name.startswith("preproc"))
    value = cast.output[0]
    cast.output[0] = "float/raw"
    model.graph.initializer.append(helper.make_tensor("float/two", onnx.TensorProto.FLOAT, [], [2.0]))
    position = list(model.graph.node).index(cast)
    model.graph.node.insert(position + 1, helper.make_node("Mul", ["float/raw", "float/two"], [value], name="float/x2"))


def missing_operator(model: onnx.ModelProto) -> None:
    next(node for node in model.graph.node if node.op_type == "Softmax").op_type = "SoftmaxOfTomorrow"


@pytest.mark.parametrize("check", ["digits", None])
def test_wrong_normalisation(use: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, check: str | None) -> None:
    only_these(monkeypatch)
    use(alter=scale_pixels)
    options = {**ONNX, "check": check, **ANY_SPEED}
    assert "logits differ" in refused(tmp_path / "out", digits_vit(), **options)
    # int8 has no bound on its logits: the labels, or the model's classes, show it.
    options |= {"precision": "int8", "data": "digits"}
    monkeypatch.setattr(trials, "_SHARES", ())
    message = refused(tmp_path / "out", digits_vit(), **options)
    assert "points of top-1" in message if check else "predicts the model's class of only" in message


def test_an_operator_that_the_runtime_lacks(use: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    only_these(monkeypatch)
    use(alter=missing_operator)
    assert "SoftmaxOfTomorrow" in refused(tmp_path / "out", digits_vit(), **ONNX, **ANY_SPEED)


def test_saturating_weights(use: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Refused in int8; and accepted with exactly the layers in float32 that saturate."""
    use("outlier")
    options = {**ONNX, "precision": "int8", **ANY_SPEED}
    with pytest.MonkeyPatch.context() as patch:
        only_these(patch)
        patch.setattr(trials, "_SHARES", ())
        assert "points of top-1" in refused(tmp_path / "out", outlier_vit(), **options)
    result = vitrail.export(outlier_vit(), tmp_path / "out", **options)
    kept, plain, *_ = result.rows
    assert kept["accepted"]
    assert -kept["difference"] <= 0.3
    assert len(kept["float_layers"]) == 2
    assert not plain["accepted"]
    assert "points of top-1" in plain["reason"]
    assert not plain["float_layers"]
    record = json.loads((tmp_path / "out" / "export.json").read_text())
    assert record["check"]["float_layers"] == kept["float_layers"]


def test_an_export_is_replaced_and_nothing_else(use: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("mine")
    with pytest.raises(RunError, match="not an export"):
        vitrail.export(digits_vit(), out, **ONNX, **ANY_SPEED)
    assert [path.name for path in out.iterdir()] == ["thesis.txt"]
    shutil.rmtree(out)
    vitrail.export(digits_vit(), out, **ONNX, **ANY_SPEED)
    before = (out / "export.json").read_text()
    only_these(monkeypatch)
    with pytest.raises(ExportRefused):
        vitrail.export(digits_vit(), out, **ONNX, min_speedup=1000)
    assert (out / "export.json").read_text() == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_full_disk_leaves_nothing(use: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("vitrail.deploy.export.write_page", full)
    with pytest.raises(RunError, match="disk is full"):
        vitrail.export(digits_vit(), tmp_path / "out", **ONNX, **ANY_SPEED)
    assert list(tmp_path.iterdir()) == []


def test_arguments(tmp_path: Path) -> None:
    classifier = digits_vit()
    with pytest.raises(ConfigError, match="--data"):
        vitrail.export(classifier, tmp_path / "out", precision="int8")
    with pytest.raises(ConfigError, match="openvino"):
        vitrail.export(classifier, tmp_path / "out", target="onnx", precision="bf16")
    with pytest.raises(ConfigError, match="tflite"):
        vitrail.export(classifier, tmp_path / "out", target="tflite")
    with pytest.raises(ConfigError, match="student"):
        vitrail.export(classifier, tmp_path / "out", precision="fp32", distill="auto")
    monkey = pytest.MonkeyPatch()
    with monkey.context() as patch:
        patch.setattr(candidates, "find_spec", lambda name: None)
        with pytest.raises(DeviceError, match="pip install"):
            vitrail.export(classifier, tmp_path / "out", target="openvino", precision="fp32")
    assert list(tmp_path.iterdir()) == []


def test_calibration_images_are_of_the_training_split() -> None:
    dataset = open_dataset("digits")
    found = choose_calibration(dataset, digits_vit().preprocess, count=50)
    train = dataset.split("train")
    names = {train.name(index): index for index in range(len(train))}
    assert len(found.paths) == len(set(found.paths)) == 50
    for path, image in zip(found.paths, found.images, strict=True):
        np.testing.assert_array_equal(image[..., 0], np.asarray(train.image(names[path])))
    assert found.to_dict() == {"data": "digits", "split": "train", "images": 50, "paths": list(found.paths)}


def test_layers_are_found_in_openvino(exact: dict[str, Path]) -> None:
    """The head, too, which is an output; each by a name of its own."""
    model = read_openvino(exact["digits"] / "model.onnx")
    nodes = list(layers(onnx.load(exact["digits"] / "model.onnx").graph))
    names = [operation_of(model, node.output[0]) for node in nodes]
    kinds = {each.friendly_name: each.get_type_name() for each in model.get_ops()}
    assert {kinds[name] for name in names} == {"MatMul", "Convolution"}
    assert len(set(names)) == len(nodes)


def test_gelu_is_found_in_openvino(exact: dict[str, Path]) -> None:
    """So that a ViT is compiled for single images, with GELU apart."""
    assert OpenVINOSession(exact["digits"] / "model.onnx", 1, "fp32")._splits


@pytest.mark.slow
def test_openvino_int8_and_wrong_calibration(use: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options: dict[str, Any] = {"target": "openvino", "precision": "int8", "check": "digits", **ANY_SPEED}
    result = vitrail.export(digits_vit(), tmp_path / "good", **options)
    assert -result.rows[0]["difference"] <= 0.3
    record = json.loads((tmp_path / "good" / "export.json").read_text())
    assert record["calibration"]["split"] == "train"
    assert len(record["calibration"]["paths"]) == 300
    shutil.rmtree(tmp_path / "good")
    only_these(monkeypatch)
    monkeypatch.setattr(trials, "_SHARES", ())

    def wrong_scale(*arguments: Any) -> Calibration:
        found = choose_calibration(*arguments)
        return Calibration(found.data, found.split, found.paths, [image // 255 for image in found.images])

    monkeypatch.setattr("vitrail.deploy.export.choose_calibration", wrong_scale)
    assert "points of top-1" in refused(tmp_path / "out", digits_vit(), **options)


@pytest.mark.slow
def test_pt2(tmp_path: Path) -> None:
    """torch.export's format: for other tools, so that it is asked for no speed."""
    out, classifier = tmp_path / "out", digits_vit()
    result = vitrail.export(classifier, out, target="pt2", check="digits")
    assert [(row["target"], row["precision"], row["agreement"]) for row in result.rows] == [("pt2", "fp32", 100.0)]
    assert sorted(path.name for path in out.iterdir()) == ["README.md", "export.html", "export.json", "model.pt2"]
    assert vitrail.load(out).evaluate("digits").top1 == classifier.evaluate("digits").top1


@pytest.mark.slow
def test_a_student_is_trained_and_passes_the_same_gate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The teacher is slowed down, so that only the student is fast enough."""
    monkeypatch.chdir(tmp_path)
    only_these(monkeypatch)
    monkeypatch.setattr(trials.Trials, "_rejects", reject_the_teacher(trials.Trials._rejects))
    result = vitrail.export(
        digits_vit(), tmp_path / "out", target="onnx", precision="fp32", check="digits", max_loss=60, min_speedup=0,
        distill="resnet20_32", settings={"epochs": 8, "batch_size": 64},
    )  # fmt: skip
    student, teacher = result.rows
    assert (student["model"], teacher["model"]) == ("resnet20_32", "vit_nano_patch2_8")
    assert (student["accepted"], teacher["accepted"]) == (True, False)
    assert student["top1_reference"] == pytest.approx(digits_vit().evaluate("digits").top1)
    assert vitrail.load(tmp_path / "out").evaluate("digits").top1 == pytest.approx(student["top1"])
    record = json.loads((tmp_path / "out" / "export.json").read_text())
    assert record["source"]["student"] == record["architecture"] == "resnet20_32"


def reject_the_teacher(judge: Any) -> Any:
    def rejects(self: Any, row: Any) -> str | None:
        if row.model.startswith("vit"):
            return "planted"
        return judge(self, row)

    return rejects


@pytest.mark.slow
def test_auto_keeps_the_fastest_that_passes(use: Any, tmp_path: Path) -> None:
    result = vitrail.export(digits_vit(), tmp_path / "out", check="digits", **ANY_SPEED)
    passed = [row for row in result.rows if row["accepted"]]
    assert {(row["target"], row["precision"]) for row in result.rows} >= {
        ("onnx", "fp32"), ("onnx", "int8"), ("openvino", "fp32"), ("openvino", "int8"),
    }  # fmt: skip
    assert result.rows[0]["latency_ms"]["1"] == min(row["latency_ms"]["1"] for row in passed)
    assert [row["path"] for row in result.rows] == [str(tmp_path / "out")] + [None] * (len(result.rows) - 1)


@pytest.mark.slow
def test_an_alternative_is_named(use: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use("outlier")
    monkeypatch.setattr(trials, "_SHARES", ())
    message = refused(
        tmp_path / "out", outlier_vit(), target="onnx", precision="int8", check="digits", min_speedup=0.001
    )
    assert "The best alternative is --target" in message


@pytest.mark.slow
def test_merged_tokens(tmp_path: Path) -> None:
    """The numbers that were chosen are in export.json, and the loss that was allowed is the gate's."""
    result = vitrail.export(
        digits_vit(), tmp_path / "out", target="onnx", precision="fp32", check="digits", merge=10.0, **ANY_SPEED
    )
    merging = json.loads((result.folder / "export.json").read_text())["merging"]
    assert any(merging["schedule"])
    assert 0 <= merging["loss"] <= 10
    assert result.rows[0]["top1"] >= result.rows[0]["top1_reference"] - 10
    with pytest.raises(ConfigError, match="--data or --check"):
        vitrail.export(digits_vit(), tmp_path / "other", target="onnx", precision="fp32", merge=1.0)


def test_openvino_is_refused_with_an_interpolation_that_needs_float64(tmp_path: Path) -> None:
    found = digits_vit()
    preprocess = replace(found.preprocess, interpolation="nearest")
    other = Classifier(found.model, preprocess, found.class_names, architecture=found.architecture)
    with pytest.raises(DeviceError, match="ties of 'nearest' resizing: use target onnx"):
        vitrail.export(other, tmp_path / "e", target="openvino", check="digits", **ANY_SPEED)
    assert not (tmp_path / "e").exists()
