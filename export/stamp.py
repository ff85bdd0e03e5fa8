"""Repeat the traced layer: `layers.0` becomes `layers.0 … layers.{L-1}`, each with its own weights and cache."""

from __future__ import annotations

import re

import onnx_ir as ir

from qwen_rt import tensors
from qwen_rt.errors import GraphError

__all__ = ["stamp_layers"]

_LAYER_NODE = "/model/layers.0/"
_LAYER_WEIGHT = "model.layers.0."
_LAYER_CACHE = re.compile(r"^(past_key_values|present)\.0\.")


def stamp_layers(model: ir.Model, num_layers: int) -> ir.Model:
    """Repeat the one layer of a traced model, in place.

    Args:
        model: A model of one layer, as `trace.trace_single_layer` returns it.
        num_layers: How many layers the result has, at least 1.

    Returns:
        The same object, with `num_layers` layers. Node, tensor and cache names of layer `i` are those of layer 0
        with `layers.0` (`past_key_values.0`, `present.0`) replaced; constants and rotary angles are shared.

    Raises:
        GraphError: The model does not hold exactly one traced layer.
    """
    graph = model.graph
    layer = [node for node in graph if str(node.name).startswith(_LAYER_NODE)]
    if not layer:
        raise GraphError("the traced graph has no node below /model/layers.0", fix="trace it again")
    entry = _layer_input(layer)
    inside = {output for node in layer for output in node.outputs}
    hidden = next(
        (out for node in layer for out in node.outputs if any(use.node not in layer for use in out.uses())), None
    )
    if hidden is None:
        raise GraphError("the traced layer has no output that the rest of the graph reads", fix="trace it again")
    outside_uses = [use for use in hidden.uses() if use.node not in layer]

    last_node, last_hidden = layer[-1], hidden
    for index in range(1, num_layers):
        mapping: dict[ir.Value, ir.Value] = {entry: last_hidden}
        copies: list[ir.Node] = []
        for node in layer:
            inputs = [_mapped(value, mapping, inside, graph, index) for value in node.inputs]
            copy = ir.Node(
                node.domain,
                node.op_type,
                inputs,
                [ir.Attr(a.name, a.type, a.value) for a in node.attributes.values()],
                num_outputs=len(node.outputs),
                name=_renamed(node.name, index),
            )
            for old, new in zip(node.outputs, copy.outputs, strict=True):
                new.name, new.type, new.shape = _renamed(old.name, index), old.type, old.shape
                mapping[old] = new
                if old.is_graph_output():
                    graph.outputs.append(new)
            copies.append(copy)
        graph.insert_after(last_node, copies)
        last_node, last_hidden = copies[-1], mapping[hidden]
    for use in outside_uses:
        use.node.replace_input_with(use.idx, last_hidden)
    _order_inputs(graph, num_layers)
    return model


def _order_inputs(graph: ir.Graph, num_layers: int) -> None:
    """Bring the graph inputs into the order of the table in `qwen_rt.tensors`."""
    by_name = {str(value.name): value for value in graph.inputs}
    caches = [name(i) for i in range(num_layers) for name in (tensors.past_key, tensors.past_value)]
    order = [tensors.INPUT_IDS, *caches, tensors.WRITE_INDICES, tensors.KV_LENGTHS, tensors.LOGITS_INDICES]
    missing = [name for name in order if name not in by_name]
    if missing:
        raise GraphError(f"the graph has no input {missing[0]}", fix="trace it again")
    graph.inputs.clear()
    graph.inputs.extend(by_name[name] for name in order)


def _layer_input(layer: list[ir.Node]) -> ir.Value:
    """The hidden state that enters the layer: what its first norm reads."""
    norm = next(node for node in layer if node.op_type == "RMSNormalization")
    entry = norm.inputs[0]
    assert entry is not None
    return entry


def _renamed(name: str | None, index: int) -> str:
    renamed = str(name).replace(_LAYER_NODE, f"/model/layers.{index}/").replace(_LAYER_WEIGHT, f"model.layers.{index}.")
    return _LAYER_CACHE.sub(rf"\g<1>.{index}.", renamed)


def _mapped(
    value: ir.Value | None, mapping: dict[ir.Value, ir.Value], inside: set[ir.Value], graph: ir.Graph, index: int
) -> ir.Value | None:
    """The counterpart of `value` in layer `index`: made on first sight for weights and caches, shared for the rest."""
    if value is None:
        return None
    if value in mapping:
        return mapping[value]
    name = str(value.name)
    is_weight = name.startswith(_LAYER_WEIGHT)
    if not is_weight and not (value.is_graph_input() and name in (tensors.past_key(0), tensors.past_value(0))):
        if value in inside:
            raise GraphError(f"value {name} is read before it is written", fix="trace it again")
        return value
    twin = ir.Value(name=_renamed(name, index), type=value.type, shape=value.shape)
    if is_weight:
        graph.initializers[str(twin.name)] = twin
    else:
        graph.inputs.append(twin)
    mapping[value] = twin
    return twin
