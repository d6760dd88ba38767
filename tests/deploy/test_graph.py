"""The ONNX files against the classifier that they were made from."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from PIL import Image

from deploy.models import CONFIGS, preprocess_of, random_model
from vitrail.classifier import Classifier
from vitrail.deploy.graph import IMAGE, MODEL, WEIGHTS, write_onnx
from vitrail.images.decode import decode
from vitrail.inference.torch_runtime import TorchRuntime

NAMES = ("red", "grün", "blue", "cyan", "black")


def make_classifier(name: str) -> Classifier:
    config = CONFIGS[name]
    model = random_model(config)
    with torch.no_grad():
        for parameter in model.parameters():  # probabilities that are not all 0 or 1
            parameter *= 0.7 if parameter.dim() > 1 else 1
    return Classifier(model, preprocess_of(config), NAMES[: config.num_classes], precision="off")


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Classifier, Path]:
    folder = tmp_path_factory.mktemp("export")
    classifier = make_classifier("dinov2 with registers")
    write_onnx(classifier, folder)
    return classifier, folder


def run(path: Path, inputs: Any) -> dict[str, Any]:
    session = onnxruntime.InferenceSession(path)
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(None, {session.get_inputs()[0].name: inputs}), strict=True))


def check_model(classifier: Classifier, folder: Path) -> None:
    rng = np.random.default_rng(0)
    runtime = TorchRuntime(classifier.model, classifier.preprocess, "off")
    for batch in (1, 3):
        shape = (batch, *classifier.preprocess.size, classifier.preprocess.channels)
        images = rng.integers(0, 256, shape, dtype=np.uint8)
        outputs = run(folder / MODEL, images)
        expected = {"features": runtime.features(images)}
        if classifier.class_names:
            logits = runtime.logits(images)
            expected |= {"logits": logits, "probabilities": torch.from_numpy(logits).softmax(1).numpy()}
        assert outputs.keys() == expected.keys()
        for name, right in expected.items():
            assert np.abs(outputs[name] - right).max() <= 1e-4 * np.abs(right).max(), name


def test_model_file(exported: tuple[Classifier, Path]) -> None:
    check_model(*exported)


def test_image_file(exported: tuple[Classifier, Path], tmp_path: Path) -> None:
    """Files of many sizes, modes and orientations, against `predict`."""
    classifier, folder = exported
    rng = np.random.default_rng(0)
    session = onnxruntime.InferenceSession(folder / IMAGE)
    images = [
        Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)).resize(size).convert(mode)
        for size in ((30, 40), (200, 90), (1, 50), (24, 16), (333, 411))
        for mode in ("RGB", "L", "RGBA", "P", "CMYK")
    ]
    spread = []
    for number, image in enumerate(images):
        exif = Image.Exif()
        exif[0x0112] = number % 8 + 1
        path = tmp_path / f"{number}.tif"
        image.save(path, exif=exif)
        (prediction,) = classifier.predict([path], top=len(NAMES))
        _, probabilities, _ = session.run(None, {"image": np.asarray(decode(path, 3))})
        found = dict(zip(NAMES, probabilities[0], strict=True))
        assert all(abs(found[each.label] - each.score) <= 0.01 for each in prediction.top)
        spread.append(probabilities[0])
    assert np.ptp(spread, axis=0).max() > 0.05  # the images are not all alike to the model


def test_metadata_and_weights(exported: tuple[Classifier, Path]) -> None:
    classifier, folder = exported
    for name in (MODEL, IMAGE):
        onnx.checker.check_model(folder / name, full_check=True)
        session = onnxruntime.InferenceSession(folder / name)
        metadata = session.get_modelmeta().custom_metadata_map
        assert tuple(json.loads(metadata["class_names"])) == NAMES
        assert json.loads(metadata["preprocess"]) == classifier.preprocess.to_dict()
        assert metadata["architecture"] == classifier.architecture
        assert metadata["vitrail"]
    weights = sum(4 * parameter.numel() for parameter in classifier.model.parameters())
    assert (folder / WEIGHTS).stat().st_size > 0.9 * weights
    assert (folder / IMAGE).stat().st_size < 300_000
    assert session.get_inputs()[0].shape == ["height", "width", 3]


def test_no_control_flow_and_no_other_operators(exported: tuple[Classifier, Path]) -> None:
    for name in (MODEL, IMAGE):
        model = onnx.load(exported[1] / name, load_external_data=False)
        assert {node.domain for node in model.graph.node} == {""}
        assert not {"If", "Loop", "Scan"} & {node.op_type for node in model.graph.node}


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in CONFIGS if name != "dinov2 with registers"])
def test_every_architecture(name: str, tmp_path: Path) -> None:
    classifier = make_classifier(name)
    write_onnx(classifier, tmp_path)
    check_model(classifier, tmp_path)
    image = np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8)
    pixels = classifier.preprocess.crop(Image.fromarray(image))[None]
    assert np.abs(run(tmp_path / IMAGE, image)["features"] - run(tmp_path / MODEL, pixels)["features"]).max() < 0.1
