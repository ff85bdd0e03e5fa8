"""Matrices of the ops' inputs as numbers, whatever format they are stored in."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from qwen_rt.ops import WEIGHT_FORMATS
from qwen_rt.quantization import QuantizedTensor, Scheme, dequantize

__all__ = ["matrix", "table_rows"]

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


def _optional(array: ArrayLike | None) -> NDArray[Any] | None:
    return None if array is None else np.asarray(array)
