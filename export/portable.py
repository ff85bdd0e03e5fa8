"""Checkpoint → portable graph: standard ONNX whose weights are references into the checkpoint's shards."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir

from qwen_rt.checkpoint import Checkpoint
from qwen_rt.errors import GraphError
from qwen_rt.export.passes.compute_dtype import activation_types, set_compute_dtype
from qwen_rt.export.stamp import stamp_layers
from qwen_rt.export.trace import trace_single_layer
from qwen_rt.quantization import Scheme

__all__ = [
    "ST_TO_IR",
    "QuantizedLocation",
    "WeightLocation",
    "attach_weights",
    "checkpoint_locations",
    "external_value",
    "portable_graph",
]

ST_TO_IR = {
    "F32": ir.DataType.FLOAT,
    "BF16": ir.DataType.BFLOAT16,
    "F16": ir.DataType.FLOAT16,
    "F8_E4M3": ir.DataType.FLOAT8E4M3FN,
    "I8": ir.DataType.INT8,
    "U8": ir.DataType.UINT8,
    "I32": ir.DataType.INT32,
}
"""safetensors dtype → ONNX dtype."""


@dataclass(frozen=True)
class WeightLocation:
    """Where the bytes of one tensor lie: `nbytes` from `offset` of `file`, row-major, `dtype` in safetensors' terms."""

    file: Path
    offset: int
    nbytes: int
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class QuantizedLocation:
    """Where the parts of a quantized matrix lie, by the names of `Scheme.parts`; `shape` is [N, K]."""

    scheme: Scheme
    shape: tuple[int, ...]
    parts: Mapping[str, WeightLocation]


def checkpoint_locations(checkpoint: Checkpoint) -> dict[str, WeightLocation]:
    """Where each parameter of the model that is stored as floats lies in the checkpoint's own shards."""
    refs = checkpoint.tensors
    return {
        name: WeightLocation(refs[name].path, refs[name].offset, refs[name].nbytes, refs[name].dtype, refs[name].shape)
        for name in checkpoint.spec.parameters()
        if name in refs
    }


def portable_graph(
    checkpoint: Checkpoint,
    dtype: str,
    locations: Mapping[str, WeightLocation],
    exported: ir.Model | None = None,
    quantized: Collection[str] = (),
) -> ir.Model:
    """Build the graph of a whole model from one traced layer.

    Args:
        checkpoint: The model.
        dtype: Dtype of activations and cache: `float32`, `bfloat16` or `float16`. Weights stay as stored; where the
            two differ, the graph casts.
        locations: Where each parameter's bytes lie.
        exported: A portable graph of this model, to be taken instead of tracing one; changed in place. Not taken
            where it is float32 and `dtype` is narrower: nothing in it tells what has to stay float32.
        quantized: Parameters that get no data: a lowering puts quantized matrices in their place.

    Returns:
        A model at opset 24 with the inputs and outputs of `qwen_rt.tensors`. Each initializer that is named after a
        Hugging Face tensor is an external reference; not one weight byte is read.
    """
    if exported is not None and dtype != "float32" and ir.DataType.FLOAT in activation_types(exported):
        exported = None
    model = exported or stamp_layers(trace_single_layer(checkpoint.spec, dtype), checkpoint.spec.num_layers)
    attach_weights(model, locations, quantized)
    return set_compute_dtype(model, dtype)


def attach_weights(model: ir.Model, locations: Mapping[str, WeightLocation], quantized: Collection[str] = ()) -> None:
    """Point every initializer that has no data at the place of its bytes; `quantized` ones stay empty, as float32.

    Raises:
        GraphError: A parameter is not to be found, or has another shape than the graph.
    """
    for name, value in model.graph.initializers.items():
        if value.const_value is not None and not isinstance(value.const_value, ir.ExternalTensor):
            continue
        if name in quantized:
            value.const_value, value.type = None, ir.TensorType(ir.DataType.FLOAT)
            continue
        if name not in locations:
            raise GraphError(f"the graph needs tensor {name}, which the checkpoint lacks", fix="use a whole checkpoint")
        place = locations[name]
        if value.shape is None or tuple(value.shape) != place.shape:
            raise GraphError(f"tensor {name} has shape {list(place.shape)}", f"{value.shape}", "check config.json")
        filled = external_value(name, place)
        value.const_value, value.type = filled.const_value, filled.type


def external_value(name: str, place: WeightLocation) -> ir.Value:
    """An initializer that refers to its bytes in a file."""
    dtype, shape = ST_TO_IR[place.dtype], ir.Shape(place.shape)
    tensor = ir.ExternalTensor(
        place.file.name, place.offset, place.nbytes, dtype, shape=shape, name=name, base_dir=place.file.parent
    )
    return ir.Value(name=name, type=ir.TensorType(dtype), shape=shape, const_value=tensor)
