"""Matrices of the ops' inputs as numbers, whatever format they are stored in, and what many rows do to them."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from qwen_rt.ops import MAX_ROWS, SKINNY_ROWS, WEIGHT_FORMATS
from qwen_rt.plugins.reference_rounding import round_bf16, round_fp8_rows
from qwen_rt.quantization import QuantizedTensor, Scheme, dequantize

__all__ = ["Way", "matrix", "prefill_operands", "table_rows", "way_of"]

Way = Literal["skinny", "bf16", "fp8"]
"""How a kernel multiplies: stored numbers by bf16 rows; both in bf16; both in e4m3."""

_FORMAT_OF = {number: name for name, number in WEIGHT_FORMATS.items()}


def matrix(
    weight: ArrayLike,
    columns: int,
    weight_format: float,
    scale: ArrayLike | None = None,
    zero_point: ArrayLike | None = None,
    perm: ArrayLike | None = None,
) -> NDArray[np.float64]:
    """Return the matrix that an op's inputs stand for.

    Args:
        weight: [N, K], or uint8 [N, K/2] in int4; fp8 as float8 or as its bits.
        columns: K.
        weight_format: A number of `WEIGHT_FORMATS`.
        scale: [N, G].
        zero_point: As `qwen_rt.quantization` stores it.
        perm: int[K].

    Returns:
        f64[N, K], columns in the order of the activations.

    Raises:
        ValueError: A quantized matrix without scales.
    """
    name, stored = _FORMAT_OF[int(weight_format)], np.asarray(weight)
    if name == "bf16":
        return stored.astype(np.float64)
    if scale is None:
        raise ValueError(f"a matrix of format {name} has no scale")
    scales = np.asarray(scale)
    groups = scales.shape[1]
    scheme = Scheme(name, 0 if groups == 1 else columns // groups, zero_point is None, perm is not None)
    found = QuantizedTensor(
        "weight", scheme, (len(stored), columns), stored, scales, _optional(zero_point), _optional(perm)
    )
    return dequantize(found).astype(np.float64)


def table_rows(
    table: ArrayLike, ids: NDArray[np.int64], weight_format: float, scale: ArrayLike | None
) -> NDArray[np.float64]:
    """Rows of an embedding table of any format: f64[len(ids), hidden]."""
    rows = np.asarray(table)[ids]
    return matrix(rows, rows.shape[1], weight_format, None if scale is None else np.asarray(scale)[ids])


def way_of(
    num_rows: int,
    weight_format: float,
    scale: ArrayLike | None = None,
    zero_point: ArrayLike | None = None,
    perm: ArrayLike | None = None,
) -> Way:
    """Say how rows are multiplied by matrices of this kind, on a GPU that has fp8 products.

    Args:
        num_rows: Of the call.
        weight_format: Of the matrices.
        scale: Of one of them, None if not quantized.
        zero_point: Likewise.
        perm: Likewise.

    Source: `takes_products` and `direct_way` of plugins/csrc/common/prefill.cu.
    """
    name = _FORMAT_OF[int(weight_format)]
    is_plain = scale is not None and np.asarray(scale).shape[1] == 1 and zero_point is None and perm is None
    way: Way = "fp8" if name == "fp8" and is_plain else "bf16"
    most = SKINNY_ROWS if way == "fp8" or name == "bf16" else MAX_ROWS
    return "skinny" if num_rows <= most else way


def prefill_operands(
    way: Way, x: ArrayLike, weights: list[NDArray[np.float64]]
) -> tuple[NDArray[np.float64], list[NDArray[np.float64]]]:
    """Round what many rows are multiplied as: rows to e4m3 with a scale each, or rows and matrices to bfloat16.

    Args:
        way: From `way_of`; `skinny` rounds nothing.
        x: [rows, K].
        weights: Matrices [N, K].
    """
    if way == "fp8":
        return round_fp8_rows(x), weights
    if way == "bf16":
        return round_bf16(x), [round_bf16(weight) for weight in weights]
    return np.asarray(x, np.float64), weights


def _optional(array: ArrayLike | None) -> NDArray[Any] | None:
    return None if array is None else np.asarray(array)
