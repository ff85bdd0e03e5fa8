"""How the matrices of a layer are stored on a rank, by precision; everything else is floats.

| precision | `quant_algo`                | `X.weight`            | scale of `X`                           |
|-----------|-----------------------------|-----------------------|----------------------------------------|
| bf16 fp16 | none                        | BF16 or F16 [N, K]    | –                                      |
| int8      | `W8A16`                     | BF16 or F16 [N, K]    | made by trtllm-build from the weights  |
| int8 ¹    | `W8A8_SQ_PER_CHANNEL_…`     | I8 [N, K]             | `per_channel_scale` F32 [1, N]         |
| fp8       | `FP8_PER_CHANNEL_PER_TOKEN` | F8_E4M3 [N, K]        | `per_channel_scale` F32 [N]            |
| int4      | `W4A16_AWQ`                 | I8 [N/2, K]           | `weights_scaling_factor` F16 [N, K/g]  |

¹ with int8 activations: `smoothquant.py` has the rest of it.

    w[n, k] = scale[n] · value[n, k]                      int8 with int8 activations
    w[n, k] = scale[n] · e4m3[n, k]                       fp8
    w[n, k] = scale[n, k // g] · value[n, k]              int4, two's complement, -8 to 7, g = 64 or 128

A byte of int4 holds row 2i in its low four bits and row 2i + 1 above.

`trtllm-build` turns the bytes of int4 into the order that the kernels of its GPU read, so the file fits every GPU. For
`W8A16` it knows no such neutral form: int8 weights in a file must be in the order of one GPU already. It does round
floats itself, a scale of max|w| / 128 a channel, which is what is used here.

Source: TensorRT-LLM 1.2, `models/modeling_utils.py` (`preprocess_perlayer_weights`), `models/convert_utils.py`
(`weight_only_quantize_dict`), `quantization/layers.py` (`Fp8RowwiseLinear`, `WeightOnlyGroupwiseQuantLinear`);
ModelOpt, `torch/export/quant_utils.py`, for the packing of int4.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qwen_rt.errors import UsageError
from qwen_rt.export.trtllm.layout import Target
from qwen_rt.export.weights import NUMPY_DTYPES
from qwen_rt.quantization import QuantizedTensor, Scheme, unpack_nibbles
from qwen_rt.spec import ModelSpec

__all__ = [
    "GROUP_SIZES",
    "ROUNDED_BY_BUILDER",
    "Slice",
    "Tensors",
    "check_scheme_fits",
    "check_widths",
    "cut",
    "ffn_width",
    "float_bytes",
    "slices",
    "tensors_of",
]

GROUP_SIZES = (64, 128)
"""Columns that share an int4 scale in the kernels of TensorRT-LLM."""

ROUNDED_BY_BUILDER = "int8"
"""The precision whose numbers trtllm-build makes."""

_TILE = 64  # its weight-only layers are built larger where a side, dealt out to the ranks, is no multiple of it

Tensors = tuple[tuple[str, str, tuple[int, ...]], ...]
"""(name, safetensors dtype, shape) each."""


@dataclass(frozen=True)
class Slice:
    """What one rank stores of a block of rows: bytes of the weight, and of its scales if it has any."""

    weight: bytes
    scale: bytes = b""


def tensors_of(target: Target, scheme: Scheme | None, dtype: str) -> Tensors:
    """(name, safetensors dtype, shape) of what a rank stores for a target, in order.

    Args:
        target: What is stored.
        scheme: fp8, int8 or int4 scheme of the layers' matrices; None stores floats.
        dtype: Of floats, `BF16` or `F16`.
    """
    if scheme is None or not target.is_linear:
        return ((target.name, dtype, target.shape),)
    stem, (rows, columns) = target.name.removesuffix(".weight"), target.shape
    if scheme.format == "fp8":
        return (target.name, "F8_E4M3", target.shape), (f"{stem}.per_channel_scale", "F32", (rows,))
    if scheme.format == "int8":
        return (target.name, "I8", target.shape), (f"{stem}.per_channel_scale", "F32", (1, rows))
    scale = (f"{stem}.weights_scaling_factor", "F16", (rows, columns // scheme.group_size))
    return (target.name, "I8", (rows // 2, columns)), scale


def float_bytes(name: str, rows: NDArray[np.float32], dtype: str) -> bytes:
    """Floats as they are stored, rounded to nearest even.

    Raises:
        UsageError: A number beyond float16.
    """
    with np.errstate(over="ignore"):
        converted = rows.astype(NUMPY_DTYPES[dtype])
    if dtype == "F16" and np.isfinite(rows).all() and not np.isfinite(converted).all():
        raise UsageError(
            f"tensor {name} holds {np.abs(rows).max():g}, beyond float16", "values up to 65504", "choose bf16"
        )
    return converted.tobytes()


def slices(tensor: QuantizedTensor, width: int, num_slices: int) -> list[Slice]:
    """Store quantized rows, their columns dealt out to ranks: one slice for each, zeros where the columns end.

    Args:
        tensor: fp8 or int8 with a scale for each row, or symmetric int4, an even number of rows.
        width: Columns of a slice, whole groups.
        num_slices: How many.
    """
    if tensor.scheme.format != "int4":
        scale = tensor.scale.astype("<f4").tobytes()
        values = tensor.values.view(np.uint8)
        return [Slice(cut(values, index, width).tobytes(), scale) for index in range(num_slices)]
    # 0 to 15 with 8 for zero → two's complement; pairs of rows share a byte
    nibbles = unpack_nibbles(tensor.values, tensor.shape[1]) ^ np.uint8(8)
    packed, scales = nibbles[0::2] | (nibbles[1::2] << np.uint8(4)), tensor.scale.astype("<f2")
    groups = width // tensor.scheme.group_size
    return [
        Slice(cut(packed, index, width).tobytes(), cut(scales, index, groups).tobytes()) for index in range(num_slices)
    ]


def cut(array: NDArray[Any], index: int, width: int) -> NDArray[Any]:
    """Columns `index · width` and on of a matrix, [n, width], zeros where it ends."""
    columns = array[:, index * width : (index + 1) * width]
    missing = width - columns.shape[1]
    return np.pad(columns, ((0, 0), (0, missing))) if missing else np.ascontiguousarray(columns)


def check_scheme_fits(name: str, scheme: Scheme) -> None:
    """Refuse a scheme that no `quant_algo` stands for.

    Raises:
        UsageError: Any but fp8 by rows and symmetric int4 in groups of 64 or 128 in the order of the columns.
    """
    by_rows = scheme.format == "fp8" and not scheme.group_size
    grouped = scheme.format == "int4" and scheme.group_size in GROUP_SIZES
    if not (by_rows or grouped) or not scheme.symmetric or scheme.permuted:
        hint = "add --activations int8" if scheme == Scheme("int8") else "take a checkpoint of floats"
        raise UsageError(
            f"{name} in {scheme} for target trtllm",
            "fp8 with a scale a row, or symmetric int4 in groups of 64 or 128 without act-order",
            f"{hint}, or build with --precision bf16",
        )


def ffn_width(spec: ModelSpec, tp: int, precision: str, group_size: int) -> int:
    """Width of the MLP as it is stored: for weight-only layers a whole number of their tiles on every rank."""
    multiple = _multiple(tp, precision, group_size)
    return -(-spec.intermediate_size // multiple) * multiple


def check_widths(spec: ModelSpec, tp: int, precision: str, group_size: int) -> None:
    """Refuse sides that the weight-only layers of TensorRT-LLM would pad, where a checkpoint could not be loaded.

    Raises:
        UsageError: A side of a matrix that is no multiple of 64, or the group size, times the ranks.
    """
    if precision not in ("int8", "int4"):
        return
    multiple = _multiple(tp, precision, group_size)
    kv_width = max(spec.num_kv_heads, tp) * spec.head_dim
    sides = {
        "hidden size": spec.hidden_size,
        "query width": spec.num_heads * spec.head_dim,
        "width of q, k and v": spec.num_heads * spec.head_dim + 2 * kv_width,
    }
    for what, size in sides.items():
        if size % multiple:
            raise UsageError(
                f"{precision} over {tp} rank{'s' * (tp > 1)} with a {what} of {size}",
                f"a multiple of {multiple}, or TensorRT-LLM pads the matrices and cannot load them",
                "choose fewer ranks, a smaller --group-size, or --precision fp8 or bf16",
            )
    if group_size and spec.intermediate_size % group_size:
        raise UsageError(
            f"int4 in groups of {group_size} with an MLP of {spec.intermediate_size}",
            f"a multiple of {group_size}",
            "choose a smaller --group-size, or --precision fp8 or bf16",
        )


def _multiple(tp: int, precision: str, group_size: int) -> int:
    return tp * (max(_TILE, group_size) if precision in ("int8", "int4") else 1)
