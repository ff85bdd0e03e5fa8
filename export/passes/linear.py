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
    """One product for q, k and v: weights and biases are concatenated by nodes that the runtime folds at load.

        x ─ Gemm(Concat(Wq, Wk, Wv), Concat(bq, bk, bv)) ─ Reshape ─ GroupQueryAttention(packed)

    MatMulNBits likewise, with its scales and zero points. Left as they are: projections without biases, and those that
    read different inputs (permuted ones).

    Args:
        model: A graph after `fuse_linear`; changed in place.
    """
    for attention in nodes_of_type(model, "GroupQueryAttention"):
        reshapes = [value.producer() for value in attention.inputs[:3] if value is not None]
        found = [r.inputs[0].producer() for r in reshapes if r is not None and r.inputs[0] is not None]
        products = [node for node in found if node is not None and node.op_type in ("Gemm", "MatMulNBits")]
        first, last = (products[0] if products else None), reshapes[0] if reshapes else None
        if first is None or last is None or len(products) != 3 or not _can_pack(products):
            continue
        scope = str(attention.name).rsplit("/", 1)[0]
        names = _PACKED_INPUTS[first.op_type]
        inputs = [first.inputs[0]]
        for index, value in enumerate(first.inputs[1:], 1):
            if value is None:
                inputs.append(None)
                continue
            joined = [node.inputs[index] for node in products]
            inputs.append(insert(last, "Concat", joined, f"{scope}/qkv_proj/{names[index]}", {"axis": 0}).outputs[0])
        attributes = {key: attribute.value for key, attribute in first.attributes.items()}
        if "N" in attributes:
            attributes["N"] = sum(node.attributes["N"].as_int() for node in products)
        name = f"{scope}/qkv_proj/{first.op_type}"
        packed = insert(last, first.op_type, inputs, name, attributes, domain=first.domain)
        split = insert(attention, "Reshape", [packed.outputs[0], last.inputs[1]], f"{scope}/qkv_batched")
        attention.replace_input_with(0, split.outputs[0])
        attention.replace_input_with(1, None)
        attention.replace_input_with(2, None)
    _sort(model)
    return prune(model)


_PACKED_INPUTS = {
    "Gemm": ("", "weight", "bias"),
    "MatMulNBits": ("", "weight", "scale", "zero_point", "", "bias"),
}


def _can_pack(products: list[ir.Node]) -> bool:
    """Whether three products read one input, are of one kind, and have biases."""
    first = products[0]
    with_bias = len(first.inputs) == len(_PACKED_INPUTS[first.op_type])
    alike = all(
        node.op_type == first.op_type
        and node.inputs[0] is first.inputs[0]
        and [value is None for value in node.inputs] == [value is None for value in first.inputs]
        and all(node.attributes[key].value == first.attributes[key].value for key in first.attributes if key != "N")
        for node in products
    )
    return with_bias and alike


def _sort(model: ir.Model) -> None:
    """Casts of k and v weights stand after the first projection: bring nodes back into topological order."""
    model.graph.sort()
