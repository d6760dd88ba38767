"""Small export folders for tests, of a linear model."""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import torch
from onnx import TensorProto, helper

from vitrail.images.preprocess import Preprocess
from vitrail.inference.export_folder import ExportRecord

GREY = Preprocess(size=(8, 8), mean=(0.4,), std=(0.3,), channels=1)
DIGITS = tuple("0123456789")
WEIGHT = np.random.default_rng(1).normal(scale=0.1, size=(64, len(DIGITS))).astype(np.float32)


def make_export(folder: Path, target: str = "onnx", **changes: Any) -> Path:
    """An export of logits = normalised pixels @ WEIGHT, whose features are the normalised pixels. changes: of its
    record."""
    folder.mkdir(parents=True)
    onnx.save_model(
        _model(), folder / "model.onnx", save_as_external_data=True, location="weights.bin", size_threshold=0
    )
    (folder / "image.onnx").write_bytes((folder / "model.onnx").read_bytes())  # not read by vitrail
    suffix = "onnx"
    if target == "openvino":
        _to_openvino(folder)
        suffix = "xml"
    known: dict[str, Any] = {
        "architecture": "linear",
        "target": target,
        "precision": "fp32",
        "model": f"model.{suffix}",
        "image": f"image.{suffix}",
        "class_names": DIGITS,
        "preprocess": GREY,
        "num_features": 64,
        "source": {"name": "runs/digits", "fingerprint": "0123"},
    }
    ExportRecord(**(known | changes)).write(folder)
    return folder


def expected_features(images: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    """N 64, of images N 8 8."""
    return GREY.normalize(torch.from_numpy(images)[:, None]).flatten(1).numpy()


def _model() -> onnx.ModelProto:
    def constant(name: str, value: Any) -> onnx.TensorProto:
        array = np.asarray(value, np.float32)
        return helper.make_tensor(name, TensorProto.FLOAT, array.shape, array.tobytes(), raw=True)

    (mean,), (std,) = GREY.mean, GREY.std
    nodes = [
        helper.make_node("Cast", ["images"], ["float"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["float", "scale"], ["scaled"]),
        helper.make_node("Add", ["scaled", "shift"], ["normal"]),
        helper.make_node("Flatten", ["normal"], ["features"]),
        helper.make_node("MatMul", ["features", "weight"], ["logits"]),
        helper.make_node("Softmax", ["logits"], ["probabilities"], axis=1),
    ]
    widths = {"logits": len(DIGITS), "probabilities": len(DIGITS), "features": 64}
    graph = helper.make_graph(
        nodes,
        "linear",
        [helper.make_tensor_value_info("images", TensorProto.UINT8, ["batch", 8, 8, 1])],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", width]) for name, width in widths.items()],
        [constant("scale", 1 / (255 * std)), constant("shift", -mean / std), constant("weight", WEIGHT)],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)


def _to_openvino(folder: Path) -> None:
    import openvino

    model = openvino.convert_model(folder / "model.onnx")
    for name in ("model.xml", "image.xml"):
        openvino.save_model(model, folder / name, compress_to_fp16=False)
    for name in ("model.onnx", "image.onnx", "weights.bin"):
        (folder / name).unlink()
