"""Rounding to bfloat16, and of activations to e4m3, as the kernels do it, in float64 numbers."""

from __future__ import annotations

from collections.abc import Callable

import ml_dtypes
import numpy as np
from numpy.typing import ArrayLike, NDArray

from qwen_rt.quantization import MAX_FP8, round_fp8

__all__ = ["round_bf16", "round_fp8_rows", "rounding"]

F64 = NDArray[np.float64]


def round_bf16(x: ArrayLike) -> F64:
    """Round to the nearest bfloat16, ties to even; the result is float64 still."""
    return np.asarray(x, np.float64).astype(ml_dtypes.bfloat16).astype(np.float64)


def rounding(bf16: bool) -> Callable[[F64], F64]:
    """Return `round_bf16`, or for exact numbers a function that leaves them."""
    return round_bf16 if bf16 else np.asarray


def round_fp8_rows(x: ArrayLike) -> F64:
    """Round each row to e4m3 with a scale of its own, largest |x| / 448, which is float32: [rows, K]; K > 0."""
    rows = np.asarray(x, np.float64)
    largest = (np.abs(rows).max(-1, keepdims=True) / MAX_FP8).astype(np.float32).astype(np.float64)
    scales = np.where(largest > 0, largest, 1.0)
    rounded: F64 = round_fp8(rows / scales) * scales
    return rounded
