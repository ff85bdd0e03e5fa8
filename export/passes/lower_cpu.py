"""The lowering for ONNX Runtime's CPU kernels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import onnx_ir as ir

from qwen_rt.errors import UnsupportedModelError
from qwen_rt.export.passes.activation import fuse_silu
from qwen_rt.export.passes.attention import fuse_group_query_attention
from qwen_rt.export.passes.compute_dtype import set_compute_dtype
from qwen_rt.export.passes.decoder import match_decoder
from qwen_rt.export.passes.flatten import flatten_tokens
from qwen_rt.export.passes.kv_cache_cpu import quantize_kv_cache
from qwen_rt.export.passes.linear import fuse_linear, pack_qkv
from qwen_rt.export.passes.norm import fuse_norm
from qwen_rt.export.passes.quantized_linear import quantize_linear
from qwen_rt.export.portable import QuantizedLocation
from qwen_rt.spec import ModelSpec

if TYPE_CHECKING:
    from qwen_rt.export.quantize.kv import KvPlan

__all__ = ["check_cpu_shapes", "lower_cpu"]


def check_cpu_shapes(spec: ModelSpec, kv_format: str | None = None) -> None:
    """Refuse a model that ONNX Runtime's GroupQueryAttention does not take, before a bundle is written that cannot run.

    Args:
        spec: The model.
        kv_format: Format of a quantized KV cache, or None: then the operator turns queries and keys itself.

    Raises:
        UnsupportedModelError: head_dim is no multiple of 16, or of 8 with a quantized cache. All of Qwen2 have 64 or
            128.
    """
    unit = 16 if kv_format is None else 8
    if spec.head_dim % unit:
        raise UnsupportedModelError(
            f"head_dim={spec.head_dim} for target cpu", f"a multiple of {unit}", "choose another checkpoint"
        )


def lower_cpu(
    model: ir.Model,
    spec: ModelSpec,
    max_length: int,
    quantized: Mapping[str, QuantizedLocation] | None = None,
    activations: str = "float32",
    kv: KvPlan | None = None,
) -> ir.Model:
    """Lower a portable graph for the CPU: float32 compute (ONNX Runtime has no bf16 product there), 12 nodes a layer.

    The graph is first held against the spec node by node: the patterns below look at no more than they replace, and one
    that was edited or exported by another version would become another model.

    Args:
        model: A portable graph of any dtype; changed in place.
        spec: The model's hyperparameters.
        max_length: Positions that the bundle can reach.
        quantized: Matrices that are stored quantized, and where; they have no data in `model`.
        activations: `float32`, or `int8` to round what int8 and int4 matrices are multiplied by.
        kv: How keys and values are rounded before they are cached, in a float32 cache; None keeps them as they are.

    Returns:
        The same object, with the inputs and outputs of `qwen_rt.tensors`; past and present must be bound to the same
        memory. With several rows, S > 1 needs every `write_indices` to be 0 (a limit of the CPU GroupQueryAttention);
        chunked prefill runs row by row. The last layer has 13 nodes: no norm of its shape follows its residual add.

    Raises:
        GraphError: The graph is not the portable graph of this model.
    """
    match_decoder(model, spec)
    set_compute_dtype(model, "float32")
    fuse_group_query_attention(model, spec, max_length)
    flatten_tokens(model)
    fuse_linear(model)
    if quantized:
        quantize_linear(model, quantized, activations)
    pack_qkv(model)
    fuse_norm(model)
    fuse_silu(model)
    return model if kv is None else quantize_kv_cache(model, spec, kv)
