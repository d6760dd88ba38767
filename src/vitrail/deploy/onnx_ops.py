"""Arithmetic on values of an ONNX graph that is being built: `a + b` adds a node.

Shapes: any.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import helper, numpy_helper

Operand = "Value | int | float | npt.NDArray[Any]"


class GraphBuilder:
    """Collects nodes and constants in the order in which they are made. `prefix` starts all names."""

    def __init__(self, prefix: str) -> None:
        self.prefix = prefix
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []

    def value(self, operand: Any) -> Value:
        """A Value as it is; an int as int64, a float as float32, an array with its own type, as a constant."""
        if isinstance(operand, Value):
            return operand
        dtype = {int: np.int64, float: np.float32}.get(type(operand))
        name = f"{self.prefix}constant_{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.asarray(operand, dtype), name))
        return Value(self, name)

    def op(self, kind: str, *operands: Any, output: str | None = None, **attributes: Any) -> Value:
        """A node of type `kind` with one output; operands and attributes as in ONNX's operator schemas."""
        name = output or f"{self.prefix}{kind}_{len(self.nodes)}"
        inputs = [self.value(operand).name for operand in operands]
        self.nodes.append(helper.make_node(kind, inputs, [name], name=f"{name}_node", **attributes))
        return Value(self, name)


class Value:
    """The output of a node. The other operand of an operator must have the same type (a constant: see `value`)."""

    def __init__(self, graph: GraphBuilder, name: str) -> None:
        self.graph, self.name = graph, name

    def __add__(self, other: Any) -> Value:
        return self.graph.op("Add", self, other)

    def __sub__(self, other: Any) -> Value:
        return self.graph.op("Sub", self, other)

    def __mul__(self, other: Any) -> Value:
        return self.graph.op("Mul", self, other)

    def __truediv__(self, other: Any) -> Value:
        """Division; of integers, rounded towards zero."""
        return self.graph.op("Div", self, other)

    def __neg__(self) -> Value:
        return self.graph.op("Neg", self)

    def __lt__(self, other: Any) -> Value:
        return self.graph.op("Less", self, other)

    def __le__(self, other: Any) -> Value:
        return self.graph.op("LessOrEqual", self, other)

    def __and__(self, other: Any) -> Value:
        return self.graph.op("And", self, other)

    def max(self, other: Any) -> Value:
        return self.graph.op("Max", self, other)

    def min(self, other: Any) -> Value:
        return self.graph.op("Min", self, other)

    def where(self, yes: Any, no: Any) -> Value:
        """`yes` where this is true, else `no`."""
        return self.graph.op("Where", self, yes, no)

    def cast(self, dtype: npt.DTypeLike) -> Value:
        return self.graph.op("Cast", self, to=helper.np_dtype_to_tensor_dtype(np.dtype(dtype)))
