"""What the passes share: finding a pattern's nodes, and putting new ones in their place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from qwen_rt.errors import GraphError

__all__ = [
    "constant",
    "inline_value",
    "insert",
    "known_constant",
    "made_by",
    "nodes_of_type",
    "prune",
    "replace_value",
    "stored_elements",
]

CONTRIB_DOMAIN = "com.microsoft"


def nodes_of_type(model: ir.Model, op_type: str) -> list[ir.Node]:
    """All nodes of one operator, in graph order; a list, so that the caller may edit the graph."""
    return [node for node in model.graph if node.op_type == op_type]


def made_by(value: ir.Value | None, op_type: str) -> ir.Node:
    """The node of operator `op_type` that makes `value`.

    Raises:
        GraphError: Something else makes it: the graph is not the exporter's.
    """
    node = value.producer() if value is not None else None
    if node is None or node.op_type != op_type:
        found = node.op_type if node is not None else "no node"
        name = value.name if value is not None else "(absent input)"
        raise GraphError(f"{name} is made by {found}", op_type, "export the graph with this version of qwen-rt")
    return node


def insert(
    before: ir.Node,
    op_type: str,
    inputs: Sequence[ir.Value | None],
    name: str,
    attributes: Mapping[str, int | float | str | Sequence[int]] | None = None,
    domain: str = "",
    num_outputs: int = 1,
) -> ir.Node:
    """Make a node and put it before another; outputs are named `{name}/output_{i}`."""
    attrs = [ir.convenience.convert_attribute(key, value) for key, value in (attributes or {}).items()]
    node = ir.Node(domain, op_type, inputs, attrs, num_outputs=num_outputs, name=name)
    for index, output in enumerate(node.outputs):
        output.name = f"{name}/output_{index}"
    graph = before.graph
    assert graph is not None
    graph.insert_before(before, node)
    return node


def constant(graph: ir.Graph, name: str, array: np.ndarray) -> ir.Value:
    """The initializer `name`, made on first use."""
    if name not in graph.initializers:
        graph.initializers[name] = inline_value(name, array)
    return graph.initializers[name]


def inline_value(name: str, array: np.ndarray) -> ir.Value:
    """An initializer whose elements lie in the graph itself."""
    tensor = ir.tensor(array, name=name)
    return ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(array.shape), const_value=tensor)


def known_constant(value: ir.Value | None) -> np.ndarray | None:
    """The elements of a small initializer, or None if `value` is computed or a weight by reference."""
    if value is None or value.const_value is None or isinstance(value.const_value, ir.ExternalTensor):
        return None
    return value.const_value.numpy()


def stored_elements(tensor: ir.TensorProtocol) -> np.ndarray:
    """The elements of a weight, wherever its bytes lie; those of a reference are a map of the file.

    onnx_ir refuses references whose file is a link out of its folder, or has more than one hard link. Checkpoints are
    both: Hugging Face's cache links a snapshot to its blobs, and `qwen-rt export --layout` shares shards by hard links.
    The places come from headers of shards that the user named, not from a graph, so the refusal would guard nothing.
    """
    if not isinstance(tensor, ir.ExternalTensor):
        return tensor.numpy()
    return ir.ExternalTensor(
        str(tensor.path), tensor.offset, tensor.length, tensor.dtype, shape=tensor.shape, name=tensor.name or "",
        base_dir="",
    ).numpy()  # fmt: skip


def replace_value(model: ir.Model, old: ir.Value, new: ir.Value) -> None:
    """Let every reader of `old`, and the graph output of that name, take `new`; names of graph outputs stay."""
    if old.is_graph_output():
        name = old.name
        old.name = f"{name}/replaced"
        new.name = name
        new.type, new.shape = new.type or old.type, new.shape or old.shape
        model.graph.outputs[list(model.graph.outputs).index(old)] = new
    for use in list(old.uses()):
        use.node.replace_input_with(use.idx, new)


def prune(model: ir.Model) -> ir.Model:
    """Drop nodes and initializers that nothing reads any more."""
    RemoveUnusedNodesPass()(model)
    return model
