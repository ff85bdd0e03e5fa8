"""Writing a graph of standard operators node by node, each output with its dtype and shape."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qwen_rt.export.passes.graph_tools import inline_value

__all__ = ["Attributes", "GraphWriter", "Shape", "graph_input"]

Shape = Sequence[Any]
"""Numbers and names of dimensions: lists that mix them have no narrower type to mypy."""

Attributes = Mapping[str, int | float | str | Sequence[int]]
"""Of a node."""


def graph_input(name: str, dtype: ir.DataType, *shape: int | str) -> ir.Value:
    """An input of a graph."""
    return ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape))


class GraphWriter:
    """Nodes in the order in which they are asked for, and the initializers that they read.

    Attributes:
        nodes: What has been written.
        initializers: By name.
    """

    def __init__(self) -> None:
        self.nodes: list[ir.Node] = []
        self.initializers: dict[str, ir.Value] = {}

    def node(
        self,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        name: str,
        dtype: ir.DataType,
        shape: Shape,
        attributes: Attributes | None = None,
    ) -> ir.Value:
        """Write a node with one output, `{name}/output_0`, and return that."""
        attrs = [ir.convenience.convert_attribute(key, value) for key, value in (attributes or {}).items()]
        node = ir.Node("", op_type, inputs, attrs, num_outputs=1, name=name)
        output = node.outputs[0]
        output.name, output.type, output.shape = f"{name}/output_0", ir.TensorType(dtype), ir.Shape(shape)
        self.nodes.append(node)
        return output

    def constant(self, name: str, array: NDArray[Any]) -> ir.Value:
        """The initializer of that name, which lies in the graph itself; made on first use."""
        if name not in self.initializers:
            self.initializers[name] = inline_value(name, array)
        return self.initializers[name]

    def stored(self, tensor: ir.TensorProtocol) -> ir.Value:
        """The initializer with the tensor's name and data, whatever holds them; made on first use."""
        name = str(tensor.name)
        if name not in self.initializers:
            made = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(tensor.shape.numpy()))
            made.const_value = tensor
            self.initializers[name] = made
        return self.initializers[name]

    def integers(self, *values: int) -> ir.Value:
        """The initializer int64[n] of these values."""
        return self.constant(f"/constants/{'_'.join(map(str, values))}", np.array(values, np.int64))

    def integer(self, value: int) -> ir.Value:
        """The initializer int64[] of this value."""
        return self.constant(f"/constants/scalar_{value}", np.array(value, np.int64))

    def cast(self, value: ir.Value, dtype: ir.DataType, name: str) -> ir.Value:
        """The value in another dtype; itself if it has that one."""
        if value.dtype == dtype:
            return value
        assert value.shape is not None
        return self.node("Cast", [value], name, dtype, list(value.shape), {"to": int(dtype)})
