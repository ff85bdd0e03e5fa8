"""A lowered graph of target cuda made ready for TensorRT's ONNX parser, which takes its nodes for plugins.

The parser finds a plugin by the node's op type, `plugin_version` and `plugin_namespace`. It knows no absent tensors, so
a node also says which of its op's tensors it has. The workspace is TensorRT's to give: the input that ONNX Runtime's
binding takes for it goes.
"""

from __future__ import annotations

import onnx
from onnx import helper

from qwen_rt import tensors
from qwen_rt.errors import GraphError
from qwen_rt.ops import DOMAIN, find_op
from qwen_rt.plugins.tensorrt.plugin import INPUT_NAMES, OUTPUT_NAMES

__all__ = ["mark_plugins"]


def mark_plugins(model: onnx.ModelProto) -> None:
    """Change a graph of target `cuda` in place.

    Its outputs `present.*` share the memory of inputs: build with PreviewFeature.ALIASED_PLUGIN_IO_10_03.

    Raises:
        GraphError: A node has more tensors than its op.
    """
    for node in model.graph.node:
        if node.domain == DOMAIN:
            _mark(node)
    kept = [value for value in model.graph.input if value.name != tensors.WORKSPACE]
    del model.graph.input[:]
    model.graph.input.extend(kept)


def _mark(node: onnx.NodeProto) -> None:
    op = find_op(node.op_type)
    inputs = list(node.input)
    if op.has_workspace and len(inputs) == len(op.inputs) + 1:
        inputs.pop()
    if len(inputs) > len(op.inputs) or len(node.output) > len(op.outputs):
        raise GraphError(f"node {node.name} has {len(inputs)} inputs", f"at most {len(op.inputs)}")
    there = [(tensor.name, name) for tensor, name in zip(op.inputs, inputs, strict=False) if name]
    made = [(tensor.name, name) for tensor, name in zip(op.outputs, node.output, strict=False) if name]
    del node.input[:], node.output[:]
    node.input.extend(name for _, name in there)
    node.output.extend(name for _, name in made)
    texts = {
        INPUT_NAMES: ",".join(name for name, _ in there),
        OUTPUT_NAMES: ",".join(name for name, _ in made),
        "plugin_version": str(op.version),
        "plugin_namespace": DOMAIN,
    }
    node.attribute.extend(helper.make_attribute(name, text) for name, text in texts.items())
