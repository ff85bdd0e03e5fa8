"""A cuda bundle's graph on a CPU, through the numpy references of its ops: what the kernels' rounding makes of logits.

The references round where the headers of the kernels say that they do, activations between ops to bf16; sums are
float64, where kernels add in float32, in another order. Slow: 7B's shapes take some seconds a layer.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
from numpy.typing import NDArray
from onnx.external_data_helper import ExternalDataInfo, uses_external_data

from qwen_rt import tensors
from qwen_rt.bundle import Bundle
from qwen_rt.errors import BundleError
from qwen_rt.ops import BLOCK_SIZE, find_op
from qwen_rt.plugins.reference_ops import REFERENCES, round_outputs

__all__ = ["ROUNDED", "ReferenceGraph"]

ROUNDED: Mapping[str, str] = {
    "bf16": "activations to bf16; sums float64",
    "fp8": "activations to bf16, in the prompt's call those that meet a quantized matrix to e4m3 with a scale for each "
    "row; sums float64",
    "int8": "activations to bf16, in the prompt's call dequantized matrices too; sums float64",
    "int4": "activations to bf16, in the prompt's call dequantized matrices too; sums float64",
}
"""Precision → what the references round beside the stored weights."""


class ReferenceGraph:
    """One sequence on a graph of target cuda, with a paged cache of bf16 for itself.

    Weights stay mapped files; each op makes float64 of its own ones while it runs, the LM head of 7B 4.4 GB.

    Args:
        bundle: Of target cuda, without a quantized cache.
        capacity: Most tokens of the sequence.

    Raises:
        BundleError: It is no such bundle.
    """

    def __init__(self, bundle: Bundle, capacity: int) -> None:
        spec, manifest = bundle.manifest.model, bundle.manifest
        quantization = manifest.quantization
        if manifest.target != "cuda" or (quantization is not None and quantization.kv_format is not None):
            raise BundleError(f"{bundle.path} has target {manifest.target}", "cuda, and a cache of bf16", "build one")
        graph = onnx.load(str(bundle.graph_file), load_external_data=False).graph
        self._nodes, self._outputs = list(graph.node), [value.name for value in graph.output]
        self._weights = {tensor.name: _mapped(tensor, bundle.weight_files) for tensor in graph.initializer}
        self._num_blocks = -(-capacity // BLOCK_SIZE)
        shape = (1 + self._num_blocks, spec.num_kv_heads, BLOCK_SIZE, spec.head_dim)
        caches = ((tensors.past_key, tensors.present_key), (tensors.past_value, tensors.present_value))
        self._shared = [(past(i), present(i)) for i in range(spec.num_layers) for past, present in caches]
        # What is read before it was written shows in the logits.
        self._pool = {past: np.full(shape, np.nan, ml_dtypes.bfloat16) for past, _ in self._shared}
        self._length = 0
        self.seconds: dict[str, float] = {}

    def prefill(self, tokens: NDArray[np.int64]) -> NDArray[np.float32]:
        """Feed tokens in one call; logits of the last one, f32[V]."""
        found: NDArray[np.float32] = self._run(tokens, np.array([0, len(tokens)], np.int32))[0]
        return found

    def steps(self, tokens: NDArray[np.int64]) -> NDArray[np.float32]:
        """Feed tokens one by one; logits behind each, f32[S, V].

        As they are known, all go through an op at once, as so many sequences of one token each over the same blocks. A
        row of a decode step does not depend on the others, and attention reads only what is before it.
        """
        return self._run(tokens, np.arange(len(tokens) + 1, dtype=np.int32))

    def _run(self, tokens: NDArray[np.int64], starts: NDArray[np.int32]) -> NDArray[np.float32]:
        stop, num_sequences = self._length + len(tokens), len(starts) - 1
        values: dict[str, NDArray[Any]] = self._pool | {
            tensors.INPUT_IDS: tokens,
            tensors.POSITIONS: np.arange(self._length, stop),
            tensors.QUERY_STARTS: starts,
            tensors.BLOCK_TABLES: np.tile(np.arange(1, 1 + self._num_blocks, dtype=np.int32), (num_sequences, 1)),
            tensors.LOGITS_INDICES: starts[1:].astype(np.int64) - 1,
            tensors.WORKSPACE: np.zeros(0, np.uint8),
        }
        for node in self._nodes:
            begin = time.perf_counter()
            values |= zip(node.output, self._call(node, values), strict=False)
            self.seconds[node.op_type] = self.seconds.get(node.op_type, 0.0) + time.perf_counter() - begin
        self._pool = {past: values[present] for past, present in self._shared}
        self._length = stop
        return values[tensors.LOGITS]

    def _call(self, node: onnx.NodeProto, values: Mapping[str, NDArray[Any]]) -> tuple[NDArray[Any], ...]:
        """Run the reference of a node: inputs and attributes by the table, absent inputs as None."""
        op = find_op(node.op_type)
        given = {attribute.name: attribute.f for attribute in node.attribute}
        names = node.input[: len(op.inputs)]
        inputs = [values[name] if name in values else self._weights[name] if name else None for name in names]
        found = REFERENCES[op.name](*inputs, **given, bf16=True)
        return round_outputs(op, found if isinstance(found, tuple) else (found,))


def _mapped(tensor: onnx.TensorProto, files: Mapping[str, Path]) -> NDArray[Any]:
    """An initializer's numbers where they lie."""
    if not uses_external_data(tensor):
        return onnx.numpy_helper.to_array(tensor)
    info, dtype = ExternalDataInfo(tensor), onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
    num_bytes = int(np.prod(tensor.dims)) * dtype.itemsize
    bits = np.memmap(files[info.location], np.uint8, "r", int(info.offset or 0), (num_bytes,))
    return bits.view(dtype).reshape(tuple(tensor.dims))
