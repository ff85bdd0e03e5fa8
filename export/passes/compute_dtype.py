"""Set the dtype in which a graph computes, whatever dtype its weights are stored in."""

from __future__ import annotations

import onnx_ir as ir

from qwen_rt import tensors
from qwen_rt.errors import GraphError
from qwen_rt.export.passes.graph_tools import insert, prune, replace_value

__all__ = ["FLOAT_TYPES", "activation_types", "set_compute_dtype"]

FLOAT_TYPES = {
    "float32": ir.DataType.FLOAT,
    "bfloat16": ir.DataType.BFLOAT16,
    "float16": ir.DataType.FLOAT16,
}


def activation_types(model: ir.Model) -> set[ir.DataType]:
    """The floating-point dtypes of a graph's inputs, which are its KV cache's: one in every portable graph."""
    present = {value.dtype for value in model.graph.inputs}
    return {dtype for dtype in FLOAT_TYPES.values() if dtype in present}


def set_compute_dtype(model: ir.Model, dtype: str) -> ir.Model:
    """Make activations and KV cache `dtype`; weights stay as stored and are cast where they are read.

        stored ── Cast(dtype) ── Gemm, Add, RMSNormalization, …
        stored embedding ── Gather(input_ids) ── Cast(dtype)        (rows are cast, not the table)

    Args:
        model: A graph whose floating-point activations all have one dtype; changed in place.
        dtype: `float32`, `bfloat16` or `float16`.

    Returns:
        The same object. A runtime that folds constants turns each Cast into a weight of the new dtype at load.

    Raises:
        GraphError: The graph is float32 and `dtype` is narrower: what has to stay float32 (angles, logits) does not
            stand out.
    """
    target = FLOAT_TYPES[dtype]
    floats = set(FLOAT_TYPES.values())
    graph = model.graph
    present = activation_types(model)
    if ir.DataType.FLOAT in present and target != ir.DataType.FLOAT:
        raise GraphError(
            f"a float32 graph cannot become {dtype}", "a graph traced in a narrower dtype", "trace it again"
        )
    for node in list(graph):
        if node.op_type == "Cast" and node.attributes["to"].as_int() in {int(t) for t in present}:
            node.attributes["to"] = ir.AttrInt64("to", int(target))
        for output in node.outputs:
            if output.dtype in present and not output.is_graph_output():
                output.dtype = target
    for value in (*graph.inputs, *graph.outputs):
        if value.dtype in present and value.name != tensors.LOGITS:
            value.dtype = target
    for gather in graph:
        table = gather.inputs[0] if gather.op_type == "Gather" else None
        if table is not None and table.is_initializer():
            gather.outputs[0].type = table.type
    for weight in list(graph.initializers.values()):
        if weight.dtype in floats and weight.dtype != target and not str(weight.name).startswith("/"):
            _cast_weight(model, weight, target)
    for node in list(graph):
        source = node.inputs[0] if node.inputs else None
        if node.op_type == "Cast" and source is not None and source.dtype == target == node.attributes["to"].as_int():
            replace_value(model, node.outputs[0], source)
    return prune(model)


def _cast_weight(model: ir.Model, weight: ir.Value, target: ir.DataType) -> None:
    """Cast a weight once for all its readers, or after the lookup where it is an embedding table."""
    readers = list(weight.uses())
    gathers = [use.node for use in readers if use.node.op_type == "Gather" and use.idx == 0]
    others = [use for use in readers if use.node not in gathers]
    for gather in gathers:
        rows = gather.outputs[0]
        users = list(rows.uses())
        rows.type = weight.type
        cast = ir.Node("", "Cast", [rows], [ir.AttrInt64("to", int(target))], name=f"{gather.name}/Cast")
        cast.outputs[0].name, cast.outputs[0].type = f"{gather.name}/Cast/output_0", ir.TensorType(target)
        model.graph.insert_after(gather, cast)
        for use in users:
            use.node.replace_input_with(use.idx, cast.outputs[0])
    if others:
        first = min((use.node for use in others), key=list(model.graph).index)
        cast = insert(first, "Cast", [weight], f"/{weight.name}/Cast", {"to": int(target)})
        cast.outputs[0].type, cast.outputs[0].shape = ir.TensorType(target), weight.shape
        for use in others:
            use.node.replace_input_with(use.idx, cast.outputs[0])
