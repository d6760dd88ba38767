"""The layers of an ONNX graph that a quantisation computes in 8 bits."""

import math
from collections.abc import Iterator

import onnx

_LAYERS = ("MatMul", "Gemm", "Conv")


def layers(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    """Matrix products and convolutions, in the order of the graph."""
    return (node for node in graph.node if node.op_type in _LAYERS)


def weight_count(graph: onnx.GraphProto, nodes: Iterator[onnx.NodeProto]) -> int:
    """How many weights these layers have."""
    sizes = {tensor.name: math.prod(tensor.dims) for tensor in graph.initializer}
    return sum(sizes.get(name, 0) for node in nodes for name in node.input[:2])


def matrix_products(graph: onnx.GraphProto) -> list[onnx.NodeProto]:
    """Products with a constant matrix, which ONNX Runtime can quantise with a scale for each output channel; not the
    head, which is a Gemm."""
    matrices = {tensor.name for tensor in graph.initializer if len(tensor.dims) == 2}
    return [node for node in layers(graph) if node.op_type == "MatMul" and node.input[1] in matrices]
