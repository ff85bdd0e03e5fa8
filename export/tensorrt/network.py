"""ONNX graph → network of TensorRT: the parser reads the graph, weights stay where they are mapped."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir

from qwen_rt.errors import GraphError, MissingDependencyError
from qwen_rt.export.tensorrt.flavour import Flavour
from qwen_rt.export.tensorrt.histogram import check_network, count_nodes, network_layers
from qwen_rt.export.tensorrt.messages import make_log, reason_of
from qwen_rt.export.tensorrt.weights import MappedWeights, feed

__all__ = ["Network", "parse"]


@dataclass(frozen=True)
class Network:
    """A parsed network and what has to live as long as it.

    Attributes:
        builder: The library's builder.
        network: The network.
        log: Its messages (`make_log`).
        parser: Holds what the network refers to.
        layers: Layer type → number.
        graph: The graph that was parsed, for the shapes of its inputs.
    """

    builder: Any
    network: Any
    log: Any
    parser: Any
    layers: dict[str, int]
    graph: ir.Graph

    def layer_names(self) -> list[str]:
        """Names of all layers, to find one in a message."""
        return [self.network.get_layer(index).name for index in range(self.network.num_layers)]


def parse(flavour: Flavour, model: ir.Model, weights: MappedWeights, num_heads: int) -> Network:
    """Parse a lowered graph.

    Args:
        flavour: The library.
        model: The graph; its weights are references that `weights` took over.
        weights: Has to stay open until the engine is built.
        num_heads: Attention heads of this rank.

    Raises:
        GraphError: The library does not take a node, with its name, or made something else of it than its layer.
        MissingDependencyError: Its builder does not start.
    """
    module, wanted = flavour.module, count_nodes(model)
    foreign = next((node for node in model.graph if node.domain not in ("", "ai.onnx")), None)
    if foreign is not None:  # some parsers end the process over one
        raise GraphError(f"{flavour.title} does not take {foreign.op_type} {foreign.name}", "operators of ONNX")
    log = make_log(module)
    builder = module.Builder(log)
    if not builder:
        raise MissingDependencyError(f"{flavour.title} does not start: {reason_of(log.errors)}", fix="qwen-rt doctor")
    typed = getattr(module.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)  # where networks can be others
    network = builder.create_network(0 if typed is None else 1 << int(typed))
    parser = module.OnnxParser(network, log)
    data = ir.serde.serialize_model(model).SerializeToString()
    refused = not parser.load_model_proto(data)
    if not refused and (missing := feed(parser, weights.addresses)):
        raise GraphError(f"{flavour.title} does not take the weight {missing[0]}: {_parser_reason(parser, log, ())}")
    if refused or not parser.parse_model_proto() or parser.num_errors:
        known = [str(node.name) for node in model.graph]
        raise GraphError(f"{flavour.title} does not take {_parser_reason(parser, log, known)}", fix=_FIX)
    if num_heads < _HEADS_OF_DECODE_KERNEL:
        _allow_decomposition(module, network)
    layers = network_layers(network)
    check_network(layers, wanted, flavour.title)
    return Network(builder, network, log, parser, layers, model.graph)


def _allow_decomposition(module: Any, network: Any) -> None:
    """Let attentions be compiled without their kernel for single tokens; that for many tokens is taken instead."""
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        if layer.type == module.LayerType.ATTENTION_INPUT:
            layer.__class__ = module.IAttentionInputLayer
            layer.attention.decomposable = True


_HEADS_OF_DECODE_KERNEL = 4
"""TensorRT-RTX 1.7 has a kernel for the attention of single tokens from this many heads on."""

_FIX = "choose another --precision, or another --compute-capability"


def _parser_reason(parser: Any, log: Any, known: Sequence[str]) -> str:
    """The node that the parser stopped at, and why."""
    for index in range(parser.num_errors):
        error = parser.get_error(index)
        if error.node_name():
            text = reason_of([line for line in error.desc().splitlines() if "Invalid Node" not in line], known)
            text = text.removeprefix(f"{error.node_name()}: ")
            return f"{error.node_operator()} {error.node_name()}: {text}"
    return reason_of([*(parser.get_error(index).desc() for index in range(parser.num_errors)), *log.errors], known)
