"""Residual add and RMS norm as ONNX Runtime's fused operators."""

from __future__ import annotations

import onnx_ir as ir

from qwen_rt.export.passes.graph_tools import CONTRIB_DOMAIN, insert, nodes_of_type, prune, replace_value

__all__ = ["fuse_norm"]


def fuse_norm(model: ir.Model) -> ir.Model:
    """`RMSNormalization(a + b)` → `SkipSimplifiedLayerNormalization(a, b)`, which also returns `a + b`.

    A norm whose input is no sum (the first of the stack), or whose sum has another shape than its own, becomes
    `SimplifiedLayerNormalization`, which ONNX Runtime registers in the default domain.

    Args:
        model: Any lowering of the portable graph; changed in place.
    """
    for norm in nodes_of_type(model, "RMSNormalization"):
        x, weight = norm.inputs
        assert x is not None
        epsilon = float(norm.attributes["epsilon"].as_float())
        add = x.producer()
        scope = str(norm.name).rsplit("/", 1)[0]
        if add is not None and add.op_type == "Add":
            fused = insert(
                norm,
                "SkipSimplifiedLayerNormalization",
                [add.inputs[0], add.inputs[1], weight],
                f"{scope}/SkipSimplifiedLayerNormalization",
                {"epsilon": epsilon},
                CONTRIB_DOMAIN,
                num_outputs=4,
            )
            fused.outputs[1].name = fused.outputs[2].name = ""  # mean and inverse deviation are not wanted
            replace_value(model, norm.outputs[0], fused.outputs[0])
            replace_value(model, x, fused.outputs[3])
        else:
            attrs: dict[str, int | float] = {"axis": -1, "epsilon": epsilon, "stash_type": 1}
            fused = insert(
                norm, "SimplifiedLayerNormalization", [x, weight], f"{scope}/SimplifiedLayerNormalization", attrs
            )
            replace_value(model, norm.outputs[0], fused.outputs[0])
    model.opset_imports.setdefault(CONTRIB_DOMAIN, 1)
    return prune(model)
