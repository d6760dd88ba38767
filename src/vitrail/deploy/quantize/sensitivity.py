"""Which layers lose the most by 8 bits: each is quantised alone, and the logits are compared with those in float32.

Shapes: N images, K classes, L layers.
"""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import helper, numpy_helper

from vitrail.deploy.quantize.layers import layers, matrix_products
from vitrail.images.convert import Pixels
from vitrail.inference.threads import default_threads

_SWITCHES = "quantised"  # an input: bool L, which layers are quantised


def rank_layers(model: Path, images: Sequence[Pixels], *, products_only: bool) -> list[onnx.NodeProto]:
    """The layers of an ONNX file, the most sensitive first, by the mean square error of the logits that 8-bit weights
    and activations of this layer alone cause.

    images: uint8 H W C of the model's size. products_only: only products with a constant matrix.
    """
    import onnxruntime

    proto = onnx.load(model)
    chosen = matrix_products(proto.graph) if products_only else list(layers(proto.graph))
    names = [node.name for node in chosen]
    _add_switches(proto, names)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = default_threads()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "model.onnx")
        onnx.save_model(proto, path, save_as_external_data=True, location="weights.bin")
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    batch = np.stack(images)

    def logits(switches: npt.NDArray[np.bool_]) -> Any:
        return session.run(["logits"], {proto.graph.input[0].name: batch, _SWITCHES: switches})[0]

    exact = logits(np.zeros(len(names), bool))
    errors = [float(np.square(logits(row) - exact).mean()) for row in np.eye(len(names), dtype=bool)]
    return [chosen[index] for index in np.argsort(errors)[::-1]]


def _add_switches(proto: onnx.ModelProto, names: Sequence[str]) -> None:
    """Give every layer quantised inputs beside its own, and the input `_SWITCHES` that selects."""
    graph = proto.graph
    weights = {tensor.name: tensor for tensor in graph.initializer}
    graph.input.append(helper.make_tensor_value_info(_SWITCHES, onnx.TensorProto.BOOL, [len(names)]))
    nodes: list[onnx.NodeProto] = []
    index = {name: number for number, name in enumerate(names)}
    for node in graph.node:
        if node.name in index:
            number, prefix = index[node.name], f"{_SWITCHES}/{index[node.name]}"
            graph.initializer.append(numpy_helper.from_array(np.array(number), f"{prefix}/index"))
            nodes.append(helper.make_node("Gather", [_SWITCHES, f"{prefix}/index"], [f"{prefix}/on"]))
            for position, name in enumerate(node.input[:2]):
                rounded = f"{prefix}/{position}"
                if name in weights:
                    axis = _output_axis(node, position, len(weights[name].dims))
                    graph.initializer.append(_round_weights(weights[name], axis, rounded))
                else:
                    parts = [f"{rounded}/{part}" for part in ("integers", "scale", "zero")]
                    nodes.append(helper.make_node("DynamicQuantizeLinear", [name], parts))
                    nodes.append(helper.make_node("DequantizeLinear", parts, [rounded]))
                nodes.append(helper.make_node("Where", [f"{prefix}/on", rounded, name], [f"{rounded}/used"]))
                node.input[position] = f"{rounded}/used"
        nodes.append(node)
    del graph.node[:]
    graph.node.extend(nodes)


def _output_axis(node: onnx.NodeProto, position: int, dimensions: int) -> int:
    """The axis of the output channels of a layer's weights."""
    transposed = any(attribute.name == "transB" and attribute.i for attribute in node.attribute)
    if node.op_type == "Conv" or transposed:
        return 0
    return dimensions - 1 if position == 1 else dimensions - 2


def _round_weights(tensor: onnx.TensorProto, axis: int, name: str) -> onnx.TensorProto:
    """The weights as symmetric 8-bit integers, with a scale for each output channel, would have them."""
    values = numpy_helper.to_array(tensor)
    others = tuple(each for each in range(values.ndim) if each != axis)
    scale = np.maximum(np.abs(values).max(axis=others, keepdims=True), 1e-12) / 127
    return numpy_helper.from_array((np.round(values / scale) * scale).astype(values.dtype), name)
