"""Put the tokens of all rows on one axis: hidden states [B, S, C] become [B·S, C]."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from qwen_rt import tensors
from qwen_rt.export.passes.graph_tools import constant, insert, nodes_of_type

__all__ = ["flatten_tokens"]


def flatten_tokens(model: ir.Model) -> ir.Model:
    """Let everything between the embedding and the last gather work on [B·S, C].

        Gather(input_ids) ─ Reshape[-1, C] ─ … ─ Reshape[B, S, ·] ─ GroupQueryAttention ─ Reshape[-1, H·D] ─ … ─
        Reshape[B, S, C] ─ GatherND(logits_indices)

    Norms, residuals and products do not mix tokens, so they need no batch axis; only attention and the choice of the
    logits row do. Reshapes move no data.

    Args:
        model: A graph whose attention is GroupQueryAttention; changed in place.
    """
    graph = model.graph
    input_ids = next(value for value in graph.inputs if value.name == tensors.INPUT_IDS)
    embedding = next(use.node for use in input_ids.uses() if use.node.op_type == "Gather")
    path = "/model/flatten"
    flat = constant(graph, f"{path}/flat", np.array([-1], np.int64))
    flat_ids = insert(embedding, "Reshape", [input_ids, flat], f"{path}/input_ids")
    rest = constant(graph, f"{path}/rest", np.array([-1], np.int64))
    shape = insert(embedding, "Shape", [input_ids], f"{path}/Shape")
    batched = insert(embedding, "Concat", [shape.outputs[0], rest], f"{path}/Concat", {"axis": 0}).outputs[0]
    embedding.replace_input_with(1, flat_ids.outputs[0])

    for attention in nodes_of_type(model, "GroupQueryAttention"):
        scope = str(attention.name).rsplit("/", 1)[0]
        for index, value in enumerate(attention.inputs[:3]):
            if value is not None:
                split = insert(attention, "Reshape", [value, batched], f"{scope}/{'qkv'[index]}_batched")
                attention.replace_input_with(index, split.outputs[0])
        users = list(attention.outputs[0].uses())
        width = constant(graph, f"{path}/width", np.array([-1, _width(attention)], np.int64))
        merge = insert(users[0].node, "Reshape", [attention.outputs[0], width], f"{scope}/flat")
        for use in users:
            use.node.replace_input_with(use.idx, merge.outputs[0])

    for gather in nodes_of_type(model, "GatherND"):
        hidden = gather.inputs[0]
        gather.replace_input_with(0, insert(gather, "Reshape", [hidden, batched], f"{path}/batched").outputs[0])
    for node in graph:
        for output in node.outputs:  # ranks have changed: let the runtime infer them
            if not output.is_graph_output():
                output.shape = None
    return model


def _width(attention: ir.Node) -> int:
    """H·D: the width of the attention's output."""
    cache = attention.inputs[3]
    assert cache is not None
    assert cache.shape is not None
    head_dim = cache.shape[3]
    assert isinstance(head_dim, int)
    return int(attention.attributes["num_heads"].as_int()) * head_dim
