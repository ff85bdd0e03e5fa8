"""What a network and its engine consist of, and whether the graph fell apart on the way there.

A node that the parser has no layer for becomes dozens of small ones, and a pattern that the builder does not know is
compiled piece by piece: both give an engine that works and is slow. So both are counted.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import onnx_ir as ir

from qwen_rt.errors import GraphError

__all__ = ["LAYER_OF", "check_engine", "check_network", "count_nodes", "engine_layers", "network_layers"]

LAYER_OF = {
    "Attention": "ATTENTION",
    "TensorScatter": "KV_CACHE_UPDATE",
    "RotaryEmbedding": "ROTARY_EMBEDDING",
    "Gemm": "MATRIX_MULTIPLY",
    "MatMul": "MATRIX_MULTIPLY",
    "DistCollective": "DIST_COLLECTIVE",
    "QuantizeLinear": "QUANTIZE",
    "DequantizeLinear": "DEQUANTIZE",
}
"""ONNX operator → layer type that it has to become, one for one."""

MAX_ENGINE_LAYERS = 24
"""Compiled layers for each decoder layer, beyond which the engine has fallen apart; a whole one has 11 to 20."""

_COMPILED = re.compile(r"^Name: .*?_myl(\d+)_\d+, LayerType: (\w+)", re.MULTILINE)
_SYNCHRONISATION = ("signal", "wait")  # between streams; no work
_ATTENTION_PAIR = ("ATTENTION_INPUT", "ATTENTION_OUTPUT")


def count_nodes(model: ir.Model) -> Counter[str]:
    """How often each of the operators in `LAYER_OF` is in a graph, by layer type."""
    return Counter(LAYER_OF[node.op_type] for node in model.graph if node.op_type in LAYER_OF)


def network_layers(network: Any) -> dict[str, int]:
    """Layer type → number; the two ends of an attention count as one `ATTENTION`."""
    names = Counter(network.get_layer(index).type.name for index in range(network.num_layers))
    first, last = (names.pop(name, 0) for name in _ATTENTION_PAIR)
    if first or last:
        names["ATTENTION"] += max(first, last)
    return dict(sorted(names.items()))


def check_network(found: Mapping[str, int], wanted: Mapping[str, int], title: str) -> None:
    """Refuse a network in which a node was not parsed into the layer that it stands for.

    Raises:
        GraphError: With the layer type and both numbers.
    """
    for layer in sorted(set(LAYER_OF.values())):
        if found.get(layer, 0) != wanted.get(layer, 0):
            raise GraphError(
                f"{title} made {found.get(layer, 0)} {layer} layers of the graph, which fell apart",
                f"{wanted.get(layer, 0)}, one for each node",
                "build with the version that qwen-rt was tested with (docs/tensorrt.md)",
            )


def engine_layers(messages: Iterable[str], profiles: Iterable[str]) -> dict[str, dict[str, int]]:
    """Count the compiled layers of each profile from what the builder logs of them.

    Args:
        messages: The builder's messages, in order; those that list an engine begin with `Layers:`.
        profiles: Names of the profiles, in order.

    Returns:
        Profile → kind of layer (`gemm`, `kgen`, …) → number; empty if the builder listed none.
    """
    parts: dict[tuple[int, str], Counter[str]] = {}  # the compiler makes one program for each profile, and numbers them
    for index, message in enumerate(message for message in messages if message.startswith("Layers:")):
        for program, kind in _COMPILED.findall(message):
            found = parts.setdefault((index, program), Counter())
            if kind not in _SYNCHRONISATION:
                found[kind] += 1
    names = list(profiles)
    if len(parts) != len(names):
        names = [f"program {number}" for number in range(len(parts))]
    return {name: dict(sorted(found.items())) for name, found in zip(names, parts.values(), strict=True)}


def check_engine(layers: Mapping[str, Mapping[str, int]], num_layers: int, title: str) -> None:
    """Refuse an engine that consists of too many pieces.

    Args:
        layers: Of `engine_layers`.
        num_layers: Decoder layers.
        title: The library, for the message.

    Raises:
        GraphError: More than `MAX_ENGINE_LAYERS` for each decoder layer, and as many outside of them.
    """
    for profile, kinds in layers.items():
        total, limit = sum(kinds.values()), MAX_ENGINE_LAYERS * (num_layers + 1)
        if total > limit:
            listed = ", ".join(f"{kind} {count}" for kind, count in kinds.items())
            raise GraphError(
                f"{title} compiled {num_layers} decoder layers into {total} for {profile} ({listed})",
                f"at most {limit}",
                "build with the version that qwen-rt was tested with (docs/tensorrt.md)",
            )
