"""The pass that gives a graph the inputs, outputs and padding rules of other people's runtimes."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from qwen_rt import tensors
from qwen_rt.errors import GraphError
from qwen_rt.export.passes.activation import fuse_silu
from qwen_rt.export.passes.attention import fuse_group_query_attention
from qwen_rt.export.passes.compute_dtype import set_compute_dtype
from qwen_rt.export.passes.decoder import match_decoder
from qwen_rt.export.passes.flatten import flatten_tokens
from qwen_rt.export.passes.graph_tools import constant, insert, nodes_of_type, prune, replace_value
from qwen_rt.export.passes.linear import fuse_linear, pack_qkv
from qwen_rt.export.passes.norm import fuse_norm
from qwen_rt.spec import ModelSpec

__all__ = ["ATTENTION_MASK", "POSITION_IDS", "follow_attention_mask", "lower_layout"]

ATTENTION_MASK = "attention_mask"
POSITION_IDS = "position_ids"

_PATH = "/model/layout"
_BATCH, _TOKENS, _PAST, _TOTAL = "batch_size", "sequence_length", "past_sequence_length", "total_sequence_length"


def lower_layout(model: ir.Model, spec: ModelSpec, max_length: int) -> ir.Model:
    """Lower a portable graph as for target `cpu`, then let it take what optimum and ONNX Runtime GenAI pass.

    Args:
        model: A portable graph of any dtype; changed in place.
        spec: The model's hyperparameters.
        max_length: Positions that the graph can reach.

    Returns:
        The same object, with the inputs and outputs of `follow_attention_mask`, in float32.

    Raises:
        GraphError: The graph is not the portable graph of this model.
    """
    match_decoder(model, spec)
    set_compute_dtype(model, "float32")
    fuse_group_query_attention(model, spec, max_length)
    follow_attention_mask(model)
    flatten_tokens(model)
    _shape_logits(model)
    fuse_linear(model)
    pack_qkv(model)
    _turn_by_position_ids(model, spec)
    fuse_norm(model)
    return fuse_silu(model)


def follow_attention_mask(model: ir.Model) -> ir.Model:
    """Replace the inputs of `qwen_rt.tensors` that say where tokens stand by a mask and positions.

        write_indices, kv_lengths, logits_indices
                              becomes
        attention_mask: int64[B, T]   1 for a token, 0 for padding, on either side; T = past + S
        position_ids: int64[B, S]     below `max_length`; of padding, whatever
        past_key_values.{i}.key, .value: KV dtype[B, Hkv, T - S, D]
        logits: float32[B, S, V]      of every token
        present.{i}.key, .value: KV dtype[B, Hkv, T, D]

    Rows of a batch share the length T of their cache, padding included. A bias of the lowest float32 hides padding: a
    row of padding sees only padding, evenly, so that nothing becomes NaN. Past and present may be one buffer with more
    than T rows. ONNX Runtime's CPU kernel takes S > 1 after a past for one row alone.

    Args:
        model: A float32 graph after `fuse_group_query_attention`; changed in place.

    Returns:
        The same object.

    Raises:
        GraphError: The graph has no GroupQueryAttention.
    """
    attentions = nodes_of_type(model, "GroupQueryAttention")
    if not attentions:
        raise GraphError("a graph without GroupQueryAttention", "one after fuse_group_query_attention")
    inputs = {str(value.name): value for value in model.graph.inputs}
    mask = _int64(ATTENTION_MASK, (_BATCH, _TOTAL))
    positions = _int64(POSITION_IDS, (_BATCH, _TOKENS))
    first = next(iter(model.graph))
    seqlens, total, bias = _mask_values(model.graph, first, inputs[tensors.INPUT_IDS], mask)
    for attention in attentions:
        attention.replace_input_with(5, seqlens)
        attention.replace_input_with(6, total)
        attention.resize_inputs(11)
        attention.replace_input_with(10, bias)
    for gather in nodes_of_type(model, "GatherND"):  # of the rows whose logits are wanted: all are
        hidden = gather.inputs[0]
        assert hidden is not None
        replace_value(model, gather.outputs[0], hidden)
    prune(model)
    caches = [value for value in model.graph.inputs if str(value.name).startswith("past_key_values.")]
    ids = inputs[tensors.INPUT_IDS]
    model.graph.inputs[:] = [ids, mask, positions, *caches]
    ids.shape = ir.Shape((_BATCH, _TOKENS))
    for value in caches:
        value.shape = _cache_shape(value, _PAST)
    for value in model.graph.outputs:
        if str(value.name).startswith("present."):
            value.shape = _cache_shape(value, _TOTAL)
    return model


def _turn_by_position_ids(model: ir.Model, spec: ModelSpec) -> None:
    """Turn queries and keys before GroupQueryAttention, which takes positions from the length of the cache instead.

        qkv ─ Split ─ q ─ RotaryEmbedding(position_ids) ─┐
                    ├ k ─ RotaryEmbedding(position_ids) ─┼─ GroupQueryAttention(do_rotary=0)
                    └ v ─────────────────────────────────┘

    Its own input of that name will not do: ONNX Runtime 1.31's CPU kernel reads it for prompts and not for decode.
    """
    positions = next(value for value in model.graph.inputs if value.name == POSITION_IDS)
    width = spec.num_kv_heads * spec.head_dim
    widths = np.array([spec.num_heads * spec.head_dim, width, width], np.int64)
    for attention in nodes_of_type(model, "GroupQueryAttention"):
        path = str(attention.name).rsplit("/", 1)[0]
        parts = list(attention.inputs[:3])
        if parts[1] is None:
            sizes = constant(model.graph, f"{_PATH}/qkv_widths", widths)
            split = insert(attention, "Split", [parts[0], sizes], f"{path}/qkv", {"axis": -1}, num_outputs=3)
            parts = list(split.outputs)
        tables = list(attention.inputs[7:9])
        for index, num_heads in enumerate((spec.num_heads, spec.num_kv_heads)):
            inputs = [parts[index], *tables, positions]
            name = f"{path}/{'qk'[index]}_rotary"
            parts[index] = insert(attention, "RotaryEmbedding", inputs, name, {"num_heads": num_heads}).outputs[0]
        for index, value in enumerate(parts):
            attention.replace_input_with(index, value)
        for index in (7, 8):
            attention.replace_input_with(index, None)
        attention.attributes["do_rotary"] = ir.AttrInt64("do_rotary", 0)


def _int64(name: str, dims: tuple[str, str]) -> ir.Value:
    return ir.Value(name=name, type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape(dims))


def _cache_shape(value: ir.Value, length: str) -> ir.Shape:
    assert value.shape is not None
    return ir.Shape((_BATCH, value.shape[1], length, value.shape[3]))


def _mask_values(
    graph: ir.Graph, before: ir.Node, ids: ir.Value, mask: ir.Value
) -> tuple[ir.Value, ir.Value, ir.Value]:
    """`seqlens_k: int32[B]` = T - 1, `total_sequence_length: int32[]` = T, `attention_bias: float32[B, 1, S, T]`."""

    def add(op_type: str, inputs: list[ir.Value], name: str, **attributes: int) -> ir.Value:
        return insert(before, op_type, list(inputs), f"{_PATH}/{name}", attributes).outputs[0]

    def ints(name: str, *numbers: int) -> ir.Value:
        return constant(graph, f"{_PATH}/{name}", np.array(numbers, np.int64))

    length = add("Cast", [add("Shape", [mask], "total/Shape", start=1, end=2)], "total/Cast", to=int(ir.DataType.INT32))
    total = add("Squeeze", [length], "total/Squeeze")
    last = add("Sub", [length, constant(graph, f"{_PATH}/one", np.array([1], np.int32))], "seqlens/Sub")
    seqlens = add("Expand", [last, add("Shape", [mask], "batch/Shape", start=0, end=1)], "seqlens/Expand")

    # (mask - 1) · highest: 0 for a token, the lowest number for padding
    numbers = add("Cast", [mask], "bias/Cast", to=int(ir.DataType.FLOAT))
    hidden = add("Sub", [numbers, constant(graph, f"{_PATH}/shown", np.array(1, np.float32))], "bias/Sub")
    highest = constant(graph, f"{_PATH}/highest", np.array(np.finfo(np.float32).max, np.float32))
    row = add("Unsqueeze", [add("Mul", [hidden, highest], "bias/Mul"), ints("axes", 1, 2)], "bias/Unsqueeze")
    tokens = add("Shape", [ids], "tokens/Shape", start=1, end=2)
    square = add("Concat", [ints("ones", 1, 1), tokens, ints("unit", 1)], "bias/Concat", axis=0)
    return seqlens, total, add("Expand", [row, square], "bias/Expand")  # [B, 1, S, T]


def _shape_logits(model: ir.Model) -> None:
    """Give the logits, [B·S, V] after `flatten_tokens`, their batch axis back."""
    logits = next(value for value in model.graph.outputs if value.name == tensors.LOGITS)
    node = logits.producer()
    assert node is not None
    assert logits.shape is not None
    vocab_size = logits.shape[-1]
    flat = f"{_PATH}/logits/flat"
    shape = next(n for n in model.graph if n.name == "/model/flatten/Concat").outputs[0]  # [B, S, -1]
    logits.name = flat
    logits.shape = None
    reshape = ir.Node("", "Reshape", [logits, shape], name=f"{_PATH}/logits/Reshape")
    out = reshape.outputs[0]
    out.name, out.type = tensors.LOGITS, ir.TensorType(ir.DataType.FLOAT)
    out.shape = ir.Shape((_BATCH, _TOKENS, vocab_size))
    model.graph.insert_after(node, reshape)
    model.graph.outputs[list(model.graph.outputs).index(logits)] = out
