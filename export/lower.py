"""The graph of a target: a portable graph lowered, as an object or as bytes. Reads no weight."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import onnx_ir as ir

from qwen_rt.checkpoint import Checkpoint
from qwen_rt.engine_card import ENGINE_TARGETS
from qwen_rt.errors import GraphError
from qwen_rt.export.passes.lower_cpu import lower_cpu
from qwen_rt.export.passes.lower_cuda import check_cuda_shapes, lower_cuda
from qwen_rt.export.passes.lower_tensorrt import lower_tensorrt
from qwen_rt.export.passes.shard import Shard
from qwen_rt.export.portable import (
    QuantizedLocation,
    WeightLocation,
    checkpoint_locations,
    external_value,
    portable_graph,
)
from qwen_rt.quantization import key_offset_name
from qwen_rt.safetensors_header import BYTES_OF_DTYPE
from qwen_rt.spec import ModelSpec

if TYPE_CHECKING:
    from qwen_rt.export.quantize.kv import KvPlan

__all__ = ["COMPUTE_DTYPES", "cuda_graph_bytes", "graph_bytes", "lowered_graph"]

COMPUTE_DTYPES = {"cpu": "float32", "cuda": "bfloat16"}
"""Target → dtype of its activations and its KV cache; the other targets let one choose."""

_WHOLE = Shard()


def lowered_graph(
    checkpoint: Checkpoint,
    target: str,
    max_length: int,
    locations: Mapping[str, WeightLocation],
    exported: ir.Model | None = None,
    quantized: Mapping[str, QuantizedLocation] | None = None,
    activations: str = "float32",
    kv: KvPlan | None = None,
    dtype: str = "bfloat16",
    shard: Shard = _WHOLE,
) -> ir.Model:
    """Make the graph of a target.

    Args:
        checkpoint: The model.
        target: A key of `COMPUTE_DTYPES`, or one of `engine_card.ENGINE_TARGETS`, which share a graph.
        max_length: Positions that the graph can reach.
        locations: Where each parameter's bytes lie, in the dtype in which the target wants them stored.
        exported: A portable graph of this model, to be taken instead of tracing one; changed in place.
        quantized: Where the parts of each quantized matrix lie; `lm_head.weight` of a tied model may be among them.
        activations: Target cpu: `float32`, or `int8` to round what int8 and int4 matrices are multiplied by.
        kv: How the KV cache is quantized; None for one of the activations' dtype. Where `locations` has the offsets,
            the graph refers to them and to the biases there; else it holds those of the plan itself.
        dtype: Targets of TensorRT: dtype of activations and cache, `bfloat16`, `float16` or `float32`.
        shard: Targets of TensorRT: which rank of a tensor-parallel model the graph is for.

    Returns:
        A graph with the inputs and outputs of that target in `qwen_rt.tensors`. It is lowered from a float32 graph,
        into which a graph of any dtype can be turned: equal models give equal graphs whatever they began as.

    Raises:
        GraphError: `exported` is not the portable graph of this model.
        UsageError: Target of TensorRT: something in `quantized` or `kv` that it lacks, or ranks that the model
            cannot be split over.
    """
    quantized = quantized or {}
    model = portable_graph(checkpoint, "float32", locations, exported, quantized)
    if target == "cuda":
        model = lower_cuda(model, checkpoint.spec, max_length, quantized, kv)
    elif target in ENGINE_TARGETS:
        model = lower_tensorrt(model, checkpoint.spec, max_length, dtype, quantized, kv, shard)
    else:
        model = lower_cpu(model, checkpoint.spec, max_length, quantized, activations, kv)
    if kv is not None and key_offset_name(0) in locations:
        _refer(model, kv, locations)
    return model


def _refer(model: ir.Model, kv: KvPlan, locations: Mapping[str, WeightLocation]) -> None:
    """Let what a KV plan changes lie in files, as the other weights do."""
    for name in kv.tensors():
        if name in model.graph.initializers:
            stored, value = external_value(name, locations[name]), model.graph.initializers[name]
            if stored.dtype != value.dtype:
                raise GraphError(f"{name} is stored as {stored.dtype}", f"{value.dtype}", "build again")
            value.const_value = stored.const_value


def graph_bytes(model: ir.Model) -> bytes:
    """Serialize a graph; equal graphs give equal bytes."""
    data: bytes = ir.serde.serialize_model(model).SerializeToString(deterministic=True)
    return data


def cuda_graph_bytes(
    checkpoint: Checkpoint, max_length: int, *, kv: KvPlan | None = None, precision: str | None = None
) -> bytes:
    """Make the graph of target `cuda` for a checkpoint stored as bfloat16, without a bundle around it.

    Args:
        checkpoint: The model; its shards may be sparse, since no weight is read and nothing is hashed.
        max_length: Positions that the graph can reach.
        kv: How the KV cache is quantized; None for one of bfloat16.
        precision: Format of the layers' matrices, in its default scheme; None for bfloat16.

    Returns:
        The serialized graph. Its weights are references by file name into the checkpoint's shards, quantized ones into
        `quantized.safetensors`, which nobody has written: a loader that makes weights up needs no file.

    Raises:
        GraphError: A weight is not stored as bfloat16.
        UnsupportedModelError: The kernels do not take the model's shape.
        UsageError: The precision's groups do not divide the model's columns.
    """
    check_cuda_shapes(checkpoint.spec)
    locations = checkpoint_locations(checkpoint)
    quantized = {} if precision is None else _unwritten(checkpoint.spec, precision)
    return graph_bytes(lowered_graph(checkpoint, "cuda", max_length, locations, quantized=quantized, kv=kv))


def _unwritten(spec: ModelSpec, precision: str) -> dict[str, QuantizedLocation]:
    """Places of the layers' matrices in a file that holds their parts one behind the other."""
    from qwen_rt.export.quantize.plan import SchemeOptions, plan_schemes

    found, offset = {}, 0
    for name, scheme in plan_schemes(spec, SchemeOptions(precision)).items():
        shape = spec.parameters()[name]
        parts = {}
        for part, (dtype, size) in scheme.parts(shape).items():
            nbytes = BYTES_OF_DTYPE[dtype] * math.prod(size)
            parts[part] = WeightLocation(Path("quantized.safetensors"), offset, nbytes, dtype, size)
            offset += nbytes
        found[name] = QuantizedLocation(scheme, shape, parts)
    return found
