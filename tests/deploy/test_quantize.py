"""Dynamic int8 and the ranking of layers, on small graphs with a known answer."""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from vitrail.deploy.quantize.dynamic import quantize_dynamic
from vitrail.deploy.quantize.sensitivity import rank_layers
from vitrail.errors import ExportError

LAYERS, WIDTH = 5, 16
IMAGES = np.random.default_rng(0).integers(0, 256, (8, 4, 4, 1), np.uint8)


def weights() -> list[npt.NDArray[np.float32]]:
    rng = np.random.default_rng(1)
    matrices = [np.linalg.qr(rng.normal(size=(WIDTH, WIDTH)))[0].astype(np.float32) for _ in range(LAYERS)]
    matrices[0] /= 500  # so that tanh is nowhere flat
    return matrices


def write(path: Path, matrices: list[npt.NDArray[np.float32]]) -> Path:
    """A chain of matrix products named layer0, layer1, ..., with tanh between them."""
    nodes = [
        helper.make_node("Cast", ["images"], ["float"], to=TensorProto.FLOAT),
        helper.make_node("Flatten", ["float"], ["x0"]),
    ]
    initializers = []
    for number, matrix in enumerate(matrices):
        name = f"w{number}"
        initializers.append(numpy_helper.from_array(matrix, name))
        last = number == len(matrices) - 1
        value = "logits" if last else f"y{number}"
        nodes.append(helper.make_node("MatMul", [f"x{number}", name], [value], name=f"layer{number}"))
        if not last:
            nodes.append(helper.make_node("Tanh", [value], [f"x{number + 1}"]))
    graph = helper.make_graph(
        nodes,
        "chain",
        [helper.make_tensor_value_info("images", TensorProto.UINT8, ["batch", 4, 4, 1])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", WIDTH])],
        initializers,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    helper.set_model_props(model, {"class_names": "[]"})
    onnx.save_model(model, path)
    return path


def run(model: onnx.ModelProto) -> Any:
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {"images": IMAGES})[0]


def test_the_layer_with_an_outlier_is_the_most_sensitive(tmp_path: Path) -> None:
    matrices = weights()
    matrices[2][:, 1] *= 1e-3
    matrices[3][1] *= 1e3  # nearly the same function, but in each output channel one large weight: the others become 0
    ranked = rank_layers(write(tmp_path / "model.onnx", matrices), list(IMAGES), products_only=True)
    assert next(node.name for node in ranked) == "layer3"
    assert {node.name for node in ranked} == {f"layer{number}" for number in range(LAYERS)}


def test_dynamic_int8(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write(tmp_path / "model.onnx", weights())
    exact = run(onnx.load(path))
    found = quantize_dynamic(path)
    assert [node.op_type for node in found.graph.node].count("MatMulInteger") == LAYERS
    assert not caplog.records
    assert {prop.key for prop in found.metadata_props} == {"class_names"}
    error = np.abs(run(found) - exact).max()
    assert 0 < error < 0.05 * np.abs(exact).max()
    assert list(tmp_path.iterdir()) == [path]


def test_layers_that_are_kept_in_float32(tmp_path: Path) -> None:
    path = write(tmp_path / "model.onnx", weights())
    found = quantize_dynamic(path, keep=["layer1", "layer4"])
    assert {node.name for node in found.graph.node if node.op_type == "MatMul"} == {"layer1", "layer4"}


def test_convolutions_are_not_for_dynamic_int8(tmp_path: Path) -> None:
    weight = numpy_helper.from_array(np.ones((8, 1, 3, 3), np.float32), "w")
    graph = helper.make_graph(
        [helper.make_node("Conv", ["images", "w"], ["logits"], name="conv")],
        "conv",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, ["batch", 1, 4, 4])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 8, 2, 2])],
        [weight],
    )
    path = tmp_path / "model.onnx"
    onnx.save_model(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), path)
    with pytest.raises(ExportError, match="--target openvino"):
        quantize_dynamic(path)
