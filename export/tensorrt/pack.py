"""Matrices that read the same rows become one, whose rows lie behind each other.

    x ─┬─ Gemm(W₁, b₁) ─ y₁            x ─ Gemm([W₁; W₂]) ─ Reshape ─ Split ─┬─ Reshape ─ Add(b₁) ─ y₁
       └─ Gemm(W₂, b₂) ─ y₂     →                                            └─ Reshape ─ Add(b₂) ─ y₂

TensorRT merges q, k and v, and gate and up, itself, but by copying them, and keeps the copies until the engine is
written: two thirds of the model once more. Merged beforehand, the same engine needs no copy in memory. Without the
Reshape around it the builder would move the Split before the product, cut the matrix, and merge it again.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

__all__ = ["join_weights", "pack_linears"]

Parts = dict[str, tuple[ir.ExternalTensor, ...]]


def pack_linears(model: ir.Model) -> Parts:
    """Pack the products of a lowered graph, in place.

    Args:
        model: A graph of `lower_tensorrt`.

    Returns:
        Name of each packed matrix → its parts, which are to lie behind each other. The graph has an initializer of that
        name, whose data says shape and dtype only.
    """
    groups: dict[ir.Value, list[ir.Node]] = defaultdict(list)
    for node in model.graph:
        if _is_linear(node):
            source = node.inputs[0]
            assert source is not None
            groups[source].append(node)
    parts: Parts = {}
    for source, nodes in groups.items():
        weights = [_weight(node) for node in nodes]
        same = {(weight.dtype, weight.shape[1]) for weight in weights}
        if len(nodes) > 1 and len(same) == 1 and len({weight.name for weight in weights}) == len(weights):
            ordered = sorted(nodes, key=lambda node: _place(_weight(node)))  # as they lie: neighbours need no copy
            name = _joined_name([str(_weight(node).name) for node in nodes])
            parts[name] = _pack(model.graph, source, ordered, name)
    return parts


def _is_linear(node: ir.Node) -> bool:
    if node.op_type != "Gemm" or node.domain or node.attributes.get_int("transB", 0) != 1:
        return False
    matrix = node.inputs[1]
    return matrix is not None and isinstance(matrix.const_value, ir.ExternalTensor) and len(matrix.uses()) == 1


def _weight(node: ir.Node) -> ir.ExternalTensor:
    matrix = node.inputs[1]
    assert matrix is not None
    assert isinstance(matrix.const_value, ir.ExternalTensor)
    return matrix.const_value


def _dims(weight: ir.ExternalTensor) -> tuple[int, ...]:
    return weight.shape.numpy()


def _place(weight: ir.ExternalTensor) -> tuple[str, int]:
    return str(weight.path), weight.offset or 0


def _joined_name(names: Sequence[str]) -> str:
    """`….q_proj.weight`, `….k_proj.weight`, `….v_proj.weight` → `….q_k_v_proj.weight`."""
    head, _, _ = names[0].rpartition("_proj.weight")
    if not head:
        return "+".join(names)
    stem = head.rpartition(".")[0]
    letters = [name.removesuffix("_proj.weight").rpartition(".")[2] for name in names]
    return f"{stem}.{'_'.join(letters)}_proj.weight"


def _pack(graph: ir.Graph, source: ir.Value, nodes: Sequence[ir.Node], name: str) -> tuple[ir.ExternalTensor, ...]:
    weights = tuple(_weight(node) for node in nodes)
    rows = [_dims(weight)[0] for weight in weights]
    width = math.gcd(*rows)
    path = "/" + name.removesuffix(".weight").replace(".layers.", "/layers*").replace(".", "/")
    path = path.replace("/layers*", "/layers.")
    whole = join_weights(name, weights)
    matrix = ir.Value(name=name, type=ir.TensorType(whole.dtype), shape=ir.Shape(whole.shape), const_value=whole)
    graph.register_initializer(matrix)
    writer = _Writer(graph, nodes[0].outputs[0].type)
    leading = nodes[0].outputs[0].shape
    lead = leading[0] if leading is not None else None
    product = writer.node("Gemm", [source, matrix], f"{path}/Gemm", [lead, sum(rows)], transB=1)
    num_blocks = sum(rows) // width
    blocks = writer.integers(-1, num_blocks, width)
    product = writer.node("Reshape", [product, blocks], f"{path}/blocks", [lead, num_blocks, width])
    sizes = writer.integers(*(count // width for count in rows))
    split = writer.split(product, sizes, f"{path}/Split", [[lead, count // width, width] for count in rows])
    outputs = []
    for node, part, count in zip(nodes, split, rows, strict=True):
        flat = writer.node("Reshape", [part, writer.integers(-1, count)], f"{node.name}/rows", [lead, count])
        bias = node.inputs[2] if len(node.inputs) > 2 else None
        outputs.append(flat if bias is None else writer.node("Add", [flat, bias], f"{node.name}/bias", [lead, count]))
    order = {node: index for index, node in enumerate(graph)}
    graph.insert_before(min(nodes, key=lambda node: order[node]), writer.nodes)
    for node, output in zip(nodes, outputs, strict=True):
        ir.convenience.replace_all_uses_with(node.outputs[0], output)
    for node in nodes:
        stored = node.inputs[1]
        assert stored is not None
        graph.remove([node], safe=True)
        graph.initializers.pop(str(stored.name))
    return weights


class _Writer:
    """Nodes that all give the same dtype."""

    def __init__(self, graph: ir.Graph, type_: ir.TypeProtocol | None) -> None:
        self.nodes: list[ir.Node] = []
        self._graph, self._type = graph, type_

    def node(
        self, op_type: str, inputs: Sequence[ir.Value], name: str, shape: Sequence[Any], **attributes: int
    ) -> ir.Value:
        """A node with one output."""
        attrs = [ir.AttrInt64(key, value) for key, value in attributes.items()]
        node = ir.Node("", op_type, inputs, attrs, num_outputs=1, name=name)
        self._finish(node, [shape])
        return node.outputs[0]

    def split(self, value: ir.Value, sizes: ir.Value, name: str, shapes: Sequence[Sequence[Any]]) -> Sequence[ir.Value]:
        """A Split of axis 1."""
        node = ir.Node("", "Split", [value, sizes], [ir.AttrInt64("axis", 1)], num_outputs=len(shapes), name=name)
        self._finish(node, shapes)
        return node.outputs

    def _finish(self, node: ir.Node, shapes: Sequence[Sequence[Any]]) -> None:
        for index, (output, shape) in enumerate(zip(node.outputs, shapes, strict=True)):
            output.name, output.type, output.shape = f"{node.name}/output_{index}", self._type, ir.Shape(shape)
        self.nodes.append(node)

    def integers(self, *values: int) -> ir.Value:
        """The initializer int64[n] of these values."""
        name = f"/constants/{'_'.join(map(str, values))}"
        if name not in self._graph.initializers:
            tensor = ir.tensor(np.array(values, np.int64), name=name)
            made = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape([len(values)]))
            made.const_value = tensor
            self._graph.register_initializer(made)
        return self._graph.initializers[name]


def join_weights(name: str, weights: Sequence[ir.ExternalTensor]) -> ir.ExternalTensor:
    """A reference with the dtype and shape of all rows; it points at the first part, and is not to be read."""
    first = weights[0]
    shape = ir.Shape([sum(_dims(weight)[0] for weight in weights), _dims(first)[1]])
    nbytes = sum(weight.nbytes for weight in weights)
    return ir.ExternalTensor(
        first.location, first.offset, nbytes, first.dtype, shape=shape, name=name, base_dir=first.base_dir
    )
