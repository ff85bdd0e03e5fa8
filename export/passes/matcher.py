"""Reading a graph node by node, backwards from its outputs, and holding each node against what it should be.

A lowering that replaces many nodes by few must not lose one on the way. So every node that a pattern explains is
claimed, with its operator, all its attributes, the number of its inputs and where they come from; what is left over in
the end is an error.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir
from numpy.typing import ArrayLike

from qwen_rt.errors import GraphError
from qwen_rt.export.passes.compute_dtype import FLOAT_TYPES
from qwen_rt.export.passes.graph_tools import known_constant

__all__ = ["GraphMatcher"]

_FIX = "export the graph with this version of qwen-rt"


class GraphMatcher:
    """Claims the nodes of one graph.

    Every method raises `GraphError`, which names the node and what was expected in its place, where the graph is
    another one.
    """

    def __init__(self, model: ir.Model) -> None:
        self._graph = model.graph
        self._claimed: set[ir.Node] = set()
        self.weights: dict[str, ir.Value] = {}

    def boundary(self, inputs: set[str], outputs: set[str]) -> None:
        """Demand exactly these graph inputs and outputs."""
        for what, values, wanted in (
            ("inputs", self._graph.inputs, inputs),
            ("outputs", self._graph.outputs, outputs),
        ):
            found = {str(value.name) for value in values}
            for problem, names in (("lacks", wanted - found), ("has the unknown", found - wanted)):
                if names:
                    raise GraphError(f"the graph {problem} {what[:-1]} {min(names)}", f"{len(wanted)} {what}", _FIX)

    def output(self, name: str) -> ir.Value:
        """The graph output of that name."""
        return next(value for value in self._graph.outputs if value.name == name)

    def node(
        self,
        value: ir.Value | None,
        op_type: str,
        num_inputs: int,
        attributes: Mapping[str, int | float | str | tuple[int, ...]] | None = None,
    ) -> ir.Node:
        """Claim the standard node that makes `value`.

        Args:
            value: Its only output.
            op_type: Its operator, of ONNX's own domain.
            num_inputs: How many inputs it has, absent ones in the middle counted.
            attributes: All its attributes with their values; floats are compared as float32, which ONNX stores.
        """
        found = self._made_by(value, op_type)
        if len(found.inputs) != num_inputs or len(found.outputs) != 1:
            raise GraphError(
                f"{found.name} has {len(found.inputs)} inputs and {len(found.outputs)} outputs",
                f"{num_inputs} and 1",
                _FIX,
            )
        wanted = {key: _plain(number) for key, number in (attributes or {}).items()}
        given = {key: _plain(attribute.value) for key, attribute in found.attributes.items()}
        for key in sorted(wanted.keys() | given.keys()):
            if key not in wanted:
                raise GraphError(f"{found.name}: {key}={given[key]}", f"no attribute {key}", _FIX)
            if wanted[key] != given.get(key):
                raise GraphError(f"{found.name}: {key}={given.get(key, 'unset')}", f"{wanted[key]}", _FIX)
        self._claimed.add(found)
        return found

    def operands(self, node: ir.Node, op_type: str) -> tuple[ir.Value, ir.Value]:
        """The two inputs of a commutative node: the one that operator `op_type` makes, then the other."""
        first, second = node.inputs
        for made, other in ((first, second), (second, first)):
            producer = made.producer() if made is not None else None
            if made is not None and other is not None and producer is not None and producer.op_type == op_type:
                return made, other
        raise GraphError(f"{node.name} has no input that {op_type} makes", f"{op_type} in front of it", _FIX)

    def same(self, found: ir.Value | None, wanted: ir.Value | None, what: str) -> None:
        """Demand that two edges come from one value."""
        if found is not wanted or found is None:
            raise GraphError(f"{what} is {_name(found)}", _name(wanted), _FIX)

    def absent(self, value: ir.Value | None, what: str) -> None:
        """Demand that an optional input is not given."""
        if value is not None:
            raise GraphError(f"{what} is {_name(value)}", "an absent input", _FIX)

    def given(self, node: ir.Node, index: int = 0) -> ir.Value:
        """An input of a node, which must not be absent."""
        value = node.inputs[index]
        if value is None:
            raise GraphError(f"input {index} of {node.name} is absent", "a value", _FIX)
        return value

    def graph_input(self, value: ir.Value | None, name: str) -> None:
        """Demand a graph input."""
        if value is None or not value.is_graph_input() or value.name != name:
            raise GraphError(f"{_name(value)} stands where graph input {name} belongs", name, _FIX)

    def constant(self, value: ir.Value | None, wanted: ArrayLike, what: str) -> None:
        """Demand a small constant with exactly these elements, in the constant's own dtype."""
        array = known_constant(value)
        if array is None:
            raise GraphError(f"{what} is {_name(value)}, which is no constant", "a constant", _FIX)
        expected = np.asarray(wanted).astype(array.dtype)
        if array.shape != expected.shape or not np.array_equal(array, expected):
            raise GraphError(f"{what} is {_short(array)}", _short(expected), _FIX)

    def weight(self, value: ir.Value | None, name: str, shape: tuple[int, ...]) -> None:
        """Demand the parameter of that name and shape, as stored or cast to the dtype that the graph computes in."""
        producer = value.producer() if value is not None else None
        if producer is not None and producer.op_type == "Cast":
            value = self.cast(value)
        if value is None or not value.is_initializer() or value.name != name:
            raise GraphError(f"{_name(value)} stands where weight {name} belongs", name, _FIX)
        if value.shape is None or tuple(value.shape) != shape:
            raise GraphError(f"weight {name} has shape {value.shape}", str(list(shape)), "check config.json")
        self.weights[name] = value

    def cast(self, value: ir.Value | None) -> ir.Value:
        """Claim a Cast to a floating-point dtype; returns what it casts."""
        node = self._made_by(value, "Cast")
        to = node.attributes["to"].value if "to" in node.attributes else None
        if to not in {int(dtype) for dtype in FLOAT_TYPES.values()}:
            raise GraphError(f"{node.name} casts to {to}", "a floating-point dtype", _FIX)
        return self.given(self.node(value, "Cast", 1, {"to": int(to)}))

    def skip_cast(self, value: ir.Value | None) -> ir.Value | None:
        """What stands before an optional Cast to a floating-point dtype."""
        producer = value.producer() if value is not None else None
        return self.cast(value) if producer is not None and producer.op_type == "Cast" else value

    def finish(self) -> None:
        """Demand that every node of the graph has been claimed."""
        for node in self._graph:
            if node not in self._claimed:
                domain = f"{node.domain}." if node.domain else ""
                raise GraphError(
                    f"node {node.name} ({domain}{node.op_type}) is no part of the model",
                    "none but its nodes",
                    _FIX,
                )

    def _made_by(self, value: ir.Value | None, op_type: str) -> ir.Node:
        found = value.producer() if value is not None else None
        if found is None or found.op_type != op_type or found.domain != "":
            maker = "no node" if found is None else f"{found.domain or 'ai.onnx'}.{found.op_type}"
            raise GraphError(f"{_name(value)} is made by {maker}", op_type, _FIX)
        return found


def _name(value: ir.Value | None) -> str:
    return "an absent input" if value is None else str(value.name)


def _plain(value: object) -> object:
    """An attribute's value as a number or a tuple; a float as the float32 that a file holds."""
    if isinstance(value, float):
        return float(np.float32(value))
    return tuple(value) if isinstance(value, (list, tuple)) else value


def _short(array: np.ndarray) -> str:
    return np.array2string(array, threshold=8, max_line_width=200)
