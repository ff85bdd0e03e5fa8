"""SiLU as one operator."""

from __future__ import annotations

import onnx_ir as ir

from qwen_rt.export.passes.graph_tools import CONTRIB_DOMAIN, insert, nodes_of_type, prune, replace_value

__all__ = ["fuse_silu"]


def fuse_silu(model: ir.Model) -> ir.Model:
    """`x · Sigmoid(x)` → `com.microsoft.QuickGelu(x, alpha=1)`: one pass over the tensor instead of two.

    Args:
        model: Any lowering of the portable graph; changed in place.
    """
    for sigmoid in nodes_of_type(model, "Sigmoid"):
        x = sigmoid.inputs[0]
        uses = list(sigmoid.outputs[0].uses())
        if len(uses) != 1 or uses[0].node.op_type != "Mul" or uses[0].node.inputs[1 - uses[0].idx] is not x:
            continue
        mul = uses[0].node
        name = str(sigmoid.name).rsplit("/", 1)[0] + "/QuickGelu"
        fused = insert(mul, "QuickGelu", [x], name, {"alpha": 1.0}, CONTRIB_DOMAIN)
        replace_value(model, mul.outputs[0], fused.outputs[0])
    model.opset_imports.setdefault(CONTRIB_DOMAIN, 1)
    return prune(model)
