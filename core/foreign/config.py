"""The quantization config of a checkpoint: which method, and whether it is one that is read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from qwen_rt.errors import CheckpointError, UnsupportedModelError
from qwen_rt.foreign.awq import read_awq
from qwen_rt.foreign.config_groups import read_compressed_tensors
from qwen_rt.foreign.fields import FIX_CONFIG, Fields
from qwen_rt.foreign.fp8 import read_fp8
from qwen_rt.foreign.gptq import read_gptq
from qwen_rt.foreign.matrix import Quantization
from qwen_rt.strict_json import show

__all__ = ["METHODS", "is_left_out", "read_quantization"]

METHODS: Mapping[str, Callable[[Fields], Quantization]] = {
    "gptq": read_gptq,
    "awq": read_awq,
    "compressed-tensors": read_compressed_tensors,
    "fp8": read_fp8,
}
"""`quant_method` → how its config is read."""

_KEYS = ("quantization_config", "compression_config")
_METHOD = "quant_method"
_LEFT_OUT = (
    "activation_scale",
    "input_scale",
    "input_zero_point",
    "output_scale",
    "output_zero_point",
    "q_scale",
    "k_scale",
    "k_zero_point",
    "v_scale",
    "v_zero_point",
    "kv_scale",
)
"""Ends of the names of tensors that serve to quantize activations and caches."""


def read_quantization(config: Mapping[str, Any]) -> Quantization | None:
    """Read what a `config.json` says about quantized matrices; None if it says nothing.

    Raises:
        CheckpointError: A config that is cut short, malformed, or there twice in two ways.
        UnsupportedModelError: A method, a layout or an option that is not read.
    """
    present = [key for key in _KEYS if config.get(key) not in (None, {}, [], False, "")]
    if not present:
        return None
    if len(present) > 1 and config[present[0]] != config[present[1]]:
        raise CheckpointError(f"config.json has both {' and '.join(_KEYS)}, and they differ", "one", FIX_CONFIG)
    fields = Fields(config[present[0]], present[0])
    if not fields.has(_METHOD) and (present[0] == "compression_config" or fields.has("config_groups")):
        method = "compressed-tensors"
    else:
        method = fields.text(_METHOD)
    if method not in METHODS:
        raise UnsupportedModelError(
            f"{fields.path}.{_METHOD}={show(method)}",
            f"one of {', '.join(METHODS)}",
            "take one of those, or the unquantized checkpoint and let the build quantize it",
        )
    return METHODS[method](fields)


def is_left_out(name: str) -> bool:
    """Whether a stored tensor of a quantized checkpoint serves to quantize activations or caches."""
    return name.rpartition(".")[2] in _LEFT_OUT
