"""Small ONNX files for tests."""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper


def onnx_file(
    path: Path, shape: list[Any], metadata: dict[str, str] | None = None, *, kind: int = 1, features: bool = False
) -> npt.NDArray[np.float32]:
    """A linear model of 1x8x8 pixels and three classes; returns its weight, 64 x 3.

    features: the flattened image is an output of that name.
    """
    weight = np.random.default_rng(1).normal(size=(64, 3)).astype(np.float32)
    outputs = ["y", "features"] if features else ["y"]
    graph = helper.make_graph(
        [helper.make_node("Flatten", ["x"], ["features"]), helper.make_node("MatMul", ["features", "w"], ["y"])],
        "linear",
        [helper.make_tensor_value_info("x", kind, shape)],
        [helper.make_tensor_value_info(name, kind, None) for name in outputs],
        [helper.make_tensor("w", TensorProto.FLOAT, weight.shape, weight.tobytes(), raw=True)],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    for key, value in (metadata or {}).items():
        model.metadata_props.add(key=key, value=value)
    onnx.save(model, path)
    return weight
