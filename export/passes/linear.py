"""Linear layers as Gemm on the weight as it is stored, and the projections of attention packed into one."""

from __future__ import annotations

import onnx_ir as ir

from qwen_rt.export.passes.graph_tools import insert, nodes_of_type, prune, replace_value

__all__ = ["fuse_linear", "pack_qkv"]


def fuse_linear(model: ir.Model) -> ir.Model:
    """`MatMul(x, Transpose(W)) [+ b]` → `Gemm(x, W, b, transB=1)`.

    The weight stays [out, in], as the checkpoint stores it: a folded Transpose would hold every weight twice while the
    session is made.

    Args:
        model: A graph whose linear inputs are 2-D (after `flatten_tokens`); changed in place.
    """
    for matmul in nodes_of_type(model, "MatMul"):
        x, transposed = matmul.inputs
        transpose = transposed.producer() if transposed is not None else None
        if transpose is None or transpose.op_type != "Transpose":
            continue
        weight, out, bias = transpose.inputs[0], matmul.outputs[0], None
        uses = list(out.uses())
        if len(uses) == 1 and uses[0].node.op_type == "Add":
            other = uses[0].node.inputs[1 - uses[0].idx]
            if other is not None and _is_bias(other):
                bias, out = other, uses[0].node.outputs[0]
        anchor = out.producer()
        assert anchor is not None
        name = str(matmul.name).rsplit("/", 1)[0] + "/Gemm"
        inputs = [x, weight] if bias is None else [x, weight, bias]
        gemm = insert(anchor, "Gemm", inputs, name, {"transB": 1})
        replace_value(model, out, gemm.outputs[0])
    return prune(model)


def _is_bias(value: ir.Value) -> bool:
    """Whether `value` is a parameter vector, possibly cast from its stored dtype."""
    producer = value.producer()
    if producer is not None:
        return producer.op_type == "Cast" and producer.inputs[0] is not None and _is_bias(producer.inputs[0])
    return value.is_initializer() and value.shape is not None and len(value.shape) == 1


def pack_qkv(model: ir.Model) -> ir.Model:
    """One Gemm for q, k and v: weights and biases are concatenated by nodes that the runtime folds at load.

        x ─ Gemm(Concat(Wq, Wk, Wv), Concat(bq, bk, bv)) ─ Reshape ─ GroupQueryAttention(packed)

    Args:
        model: A graph after `fuse_linear`; changed in place.
    """
    for attention in nodes_of_type(model, "GroupQueryAttention"):
        reshapes = [value.producer() for value in attention.inputs[:3] if value is not None]
        gemms = [r.inputs[0].producer() for r in reshapes if r is not None and r.inputs[0] is not None]
        if len(gemms) != 3 or any(g is None or g.op_type != "Gemm" or len(g.inputs) != 3 for g in gemms):
            continue
        first = gemms[0]
        assert first is not None
        scope = str(attention.name).rsplit("/", 1)[0]
        last = reshapes[0]
        assert last is not None
        weights, biases = ([g.inputs[i] for g in gemms if g is not None] for i in (1, 2))
        weight = insert(last, "Concat", weights, f"{scope}/qkv_proj/weight", {"axis": 0}).outputs[0]
        bias = insert(last, "Concat", biases, f"{scope}/qkv_proj/bias", {"axis": 0}).outputs[0]
        packed = insert(last, "Gemm", [first.inputs[0], weight, bias], f"{scope}/qkv_proj/Gemm", {"transB": 1})
        split = insert(attention, "Reshape", [packed.outputs[0], last.inputs[1]], f"{scope}/qkv_batched")
        attention.replace_input_with(0, split.outputs[0])
        attention.replace_input_with(1, None)
        attention.replace_input_with(2, None)
    _sort(model)
    return prune(model)


def _sort(model: ir.Model) -> None:
    """Casts of k and v weights stand after the first projection: bring nodes back into topological order."""
    model.graph.sort()
