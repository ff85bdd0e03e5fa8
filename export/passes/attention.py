"""RoPE, cache write and attention become one GroupQueryAttention that writes its cache in place."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from qwen_rt import tensors
from qwen_rt.export.passes.graph_tools import (
    CONTRIB_DOMAIN,
    constant,
    insert,
    made_by,
    nodes_of_type,
    prune,
    replace_value,
)
from qwen_rt.spec import ModelSpec

__all__ = ["fuse_group_query_attention"]


def fuse_group_query_attention(model: ir.Model, spec: ModelSpec, max_length: int) -> ir.Model:
    """Replace each layer's attention by `com.microsoft.GroupQueryAttention`.

        q ─ Reshape ─ Transpose ─ RotaryEmbedding ───────────────┐
        k ─ Reshape ─ Transpose ─ RotaryEmbedding ─ TensorScatter ┼─ Attention ─ Transpose ─ Reshape ─ out
        v ─ Reshape ─ Transpose ─────────────────── TensorScatter ┘
                              becomes
        q, k, v, past, kv_lengths - 1, max(kv_lengths), cos, sin ── GroupQueryAttention ── out, present

    ONNX Runtime's CPU TensorScatter copies the whole cache in every step; GroupQueryAttention writes the new rows into
    the past buffer when past and present are bound to the same memory.

    Args:
        model: A portable graph; changed in place.
        spec: The model's hyperparameters.
        max_length: Rows of the cos and sin tables: no position may reach it.

    Returns:
        The same object. The tables are computed from `inv_freq` by nodes on constants, which the runtime folds at load.
    """
    attentions = nodes_of_type(model, "Attention")
    seqlens, total = _lengths(model, attentions[0])
    cos, sin = _rope_tables(model, spec, max_length, attentions[0])
    for layer, attention in enumerate(attentions):
        query, keys, values = attention.inputs[:3]
        rotated_query = made_by(query, "RotaryEmbedding")
        key_scatter, value_scatter = made_by(keys, "TensorScatter"), made_by(values, "TensorScatter")
        rotated_key = made_by(key_scatter.inputs[1], "RotaryEmbedding")
        q, k, v = (_flat(x) for x in (rotated_query.inputs[0], rotated_key.inputs[0], value_scatter.inputs[1]))
        merged = _merged(attention)
        gqa = insert(
            attention,
            "GroupQueryAttention",
            [q, k, v, key_scatter.inputs[0], value_scatter.inputs[0], seqlens, total, cos, sin],
            f"/model/layers.{layer}/self_attn/GroupQueryAttention",
            {
                "num_heads": spec.num_heads,
                "kv_num_heads": spec.num_kv_heads,
                "scale": float(attention.attributes["scale"].as_float()),
                "do_rotary": 1,
                "rotary_interleaved": 0,
            },
            CONTRIB_DOMAIN,
            num_outputs=3,
        )
        replace_value(model, merged, gqa.outputs[0])
        replace_value(model, key_scatter.outputs[0], gqa.outputs[1])
        replace_value(model, value_scatter.outputs[0], gqa.outputs[2])
    model.opset_imports.setdefault(CONTRIB_DOMAIN, 1)
    return prune(model)


def _flat(value: ir.Value | None) -> ir.Value:
    """The [B, S, heads·D] tensor that was split into heads."""
    reshape = made_by(made_by(value, "Transpose").inputs[0], "Reshape")
    flat = reshape.inputs[0]
    assert flat is not None
    return flat


def _merged(attention: ir.Node) -> ir.Value:
    """The [B, S, H·D] tensor into which the attention's heads are merged."""
    transpose = next(use.node for use in attention.outputs[0].uses())
    return next(use.node for use in transpose.outputs[0].uses()).outputs[0]


def _lengths(model: ir.Model, before: ir.Node) -> tuple[ir.Value, ir.Value]:
    """`seqlens_k: int32[B]` = kv_lengths - 1, and `total_sequence_length: int32[]` = max(kv_lengths)."""
    kv_lengths = next(value for value in model.graph.inputs if value.name == tensors.KV_LENGTHS)
    path = "/model/attention_lengths"
    lengths = insert(before, "Cast", [kv_lengths], f"{path}/Cast", {"to": int(ir.DataType.INT32)})
    one = constant(model.graph, f"{path}/one", np.array(1, np.int32))
    seqlens = insert(before, "Sub", [lengths.outputs[0], one], f"{path}/Sub")
    total = insert(before, "ReduceMax", [lengths.outputs[0]], f"{path}/ReduceMax", {"keepdims": 0})
    return seqlens.outputs[0], total.outputs[0]


def _rope_tables(model: ir.Model, spec: ModelSpec, max_length: int, before: ir.Node) -> tuple[ir.Value, ir.Value]:
    """`cos_cache` and `sin_cache`, float32 [max_length, D/2], as nodes on constants."""
    graph, path = model.graph, "/model/rotary_emb/table"
    zero, limit, one = (
        constant(graph, f"{path}/{name}", np.array(value, np.float32))
        for name, value in (("zero", 0), ("max_length", max_length), ("one", 1))
    )
    positions = insert(before, "Range", [zero, limit, one], f"{path}/Range")
    axis = constant(graph, f"{path}/last_axis", np.array([-1], np.int64))
    column = insert(before, "Unsqueeze", [positions.outputs[0], axis], f"{path}/Unsqueeze")
    inv_freq = constant(graph, f"{path}/inv_freq", spec.rope.inv_freq(spec.head_dim).astype(np.float32))
    angles = insert(before, "Mul", [column.outputs[0], inv_freq], f"{path}/Mul")
    scaling = constant(graph, f"{path}/attention_scaling", np.array(spec.rope.attention_scaling, np.float32))

    def table(op_type: str) -> ir.Value:
        raw = insert(before, op_type, [angles.outputs[0]], f"{path}/{op_type}")
        return insert(before, "Mul", [raw.outputs[0], scaling], f"{path}/{op_type}_scaled").outputs[0]

    return table("Cos"), table("Sin")
